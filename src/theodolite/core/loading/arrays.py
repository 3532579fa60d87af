"""NPZ archives: arrays x and y (or x_train, y_train, x_test, y_test), of which only the sampled rows are read."""

__all__ = ["Arrays", "read_npz"]

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.core.errors import DataError
from theodolite.core.loading.options import DataOptions
from theodolite.core.loading.tables import sample_rows

_BLOCK = 1 << 24  # bytes of a compressed array that are unpacked at a time
_KEYS = (("x_train", "y_train", "x_test", "y_test"), ("x", "y", "x_test", "y_test"))


@dataclass(frozen=True, eq=False)
class Arrays:
    """Inputs (n, ...) and targets (n,), with which rows are known to be for testing."""

    x: np.ndarray
    y: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Member:
    """One array of an archive, before it is read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


def read_npz(path: Path, options: DataOptions) -> Arrays:
    """Sampled rows of an archive; an array of Python objects is refused, since reading it could run code."""
    try:
        return _read(path, options)
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not an NPZ archive that can be read: {error}") from error


def _read(path: Path, options: DataOptions) -> Arrays:
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).stem.lower(): name for name in archive.namelist() if name.endswith(".npy")}
        keys = next((keys for keys in _KEYS if set(keys[:2]) <= set(names)), None)
        if keys is None:
            raise DataError(f"{path} holds {', '.join(names) or 'no arrays'}; expected x and y, or x_train and y_train")
        members = [_member(path, archive, names[key]) for key in keys if key in names]
        if len(members) == 3:
            raise DataError(f"{path} needs both x_test and y_test, or neither")
        found = [_pair(archive, members[i], members[i + 1], options) for i in range(0, len(members), 2)]
    if len(found) == 2 and found[0][0].shape[1:] != found[1][0].shape[1:]:
        raise DataError(f"{path}: train rows have shape {found[0][0].shape[1:]}, test rows {found[1][0].shape[1:]}")
    test = np.repeat(np.arange(len(found)) == 1, [len(x) for x, _, _ in found])
    notes = tuple(note for _, _, more in found for note in more)
    return Arrays(np.concatenate([x for x, _, _ in found]), np.concatenate([y for _, y, _ in found]), test, notes)


def _pair(
    archive: zipfile.ZipFile, x: _Member, y: _Member, options: DataOptions
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    if len(x.shape) not in (1, 2, 3, 4):
        raise DataError(f"{x.path}: {x.name} has shape {x.shape}; expected rows of numbers or images")
    if len(y.shape) == 0 or len(y.shape) > 2 or y.shape[1:] not in ((), (1,)):
        raise DataError(f"{y.path}: {y.name} has shape {y.shape}; expected one value a row")
    if x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise DataError(
            f"{x.path}: {x.shape[0]} rows in {x.name} but {y.shape[0]} in {y.name}; need as many, at least 1"
        )
    rows, notes = sample_rows(x.shape[0], options)
    return _rows(archive, x, rows), _rows(archive, y, rows).ravel(), notes


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> _Member:
    with archive.open(name) as file:
        shape, fortran, dtype = _header(file)
    if dtype.hasobject or dtype.kind not in "biufUS":
        raise DataError(
            f"{path}: {name} holds {dtype}; expected numbers or strings (arrays of objects are pickles, which could run "
            "code; save with x.astype(float))"
        )
    return _Member(path, name, shape, dtype, fortran)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _rows(archive: zipfile.ZipFile, member: _Member, rows: np.ndarray) -> np.ndarray:
    """The rows at ascending positions, unpacked block by block (memory-mapped where the archive is not compressed)."""
    with archive.open(member.name) as file:
        _header(file)
        row = member.dtype.itemsize * int(np.prod(member.shape[1:]))
        info = archive.getinfo(member.name)
        if info.compress_type == zipfile.ZIP_STORED and row:
            start = _start(member.path, info) + file.tell()
            order = "F" if member.fortran else "C"
            mapped = np.memmap(member.path, member.dtype, "r", start, member.shape, order)
            return np.array(mapped[rows])
        if member.fortran or not row:
            whole = np.frombuffer(file.read(), member.dtype)
            return whole.reshape(member.shape, order="F" if member.fortran else "C")[rows]
        out = np.empty((len(rows), *member.shape[1:]), member.dtype)
        size = max(1, _BLOCK // row)
        for first in range(0, member.shape[0], size):
            block = np.frombuffer(file.read(row * min(size, member.shape[0] - first)), member.dtype)
            low, high = np.searchsorted(rows, [first, first + size])
            out[low:high] = block.reshape(-1, *member.shape[1:])[rows[low:high] - first]
    return out


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset in the archive of a member's bytes: its local header has a name and an extra field of its own length."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        sizes = np.frombuffer(file.read(4), "<u2")
    return info.header_offset + 30 + int(sizes.sum())
