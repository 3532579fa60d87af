"""Files of labelled series, one a line, as the UCR and UEA archives and sktime have them (.ts)."""

__all__ = ["read_ts"]

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from theodolite.core.errors import DataError
from theodolite.core.loading.arrays import Arrays
from theodolite.core.loading.options import DataOptions
from theodolite.core.loading.tables import sample_rows
from theodolite.core.subject import Task


def read_ts(path: Path, options: DataOptions) -> tuple[Arrays, Task]:
    """Sampled series x (n, steps, channels) of a file with their labels y, and whether those are classes or values.

    A line is ``channel:channel:label``, a channel its values with commas between; "?" is a value that is missing.
    Raises DataError for a file without a header or labels, with time stamps, or whose series differ in steps or channels.
    """
    try:
        with _lines(path) as lines:
            header = _header(path, lines)
            count = sum(1 for _ in lines)
        kept, notes = sample_rows(count, options)
        wanted = set(kept.tolist())
        with _lines(path) as lines:
            _header(path, lines)
            cut = [(i, line.rsplit(":", 1)) for i, line in enumerate(lines) if i in wanted]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    task = _task(path, header)
    if not cut or any(len(parts) != 2 for _, parts in cut):
        raise DataError(f"{path}: after @data each line must be values, a colon and a label; {count} lines were found")
    x = [_series(path, i, values) for i, (values, _) in cut]
    for what, sizes in (("channels", {len(one) for one in x}), ("steps", {one.shape[1] for one in x})):
        if len(sizes) > 1:
            raise DataError(
                f"{path}: its series have from {min(sizes)} to {max(sizes)} {what}; a survey takes series of one size, so cut, "
                "fill or resample them first"
            )
    y = np.array([None if label.strip() in ("?", "") else label.strip() for _, (_, label) in cut], dtype=object)
    return Arrays(np.stack(x).transpose(0, 2, 1), y, np.zeros(len(x), dtype=bool), notes), task


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[str]]:
    """The lines that are neither blank nor comments."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        whole = io.TextIOWrapper(file, encoding="utf-8-sig")  # pyright: ignore[reportArgumentType]
        yield (line for line in map(str.strip, whole) if line and line[0] not in "#%")


def _header(path: Path, lines: Iterator[str]) -> dict[str, list[str]]:
    """The words after each @name, in lower case, of the lines before @data."""
    found: dict[str, list[str]] = {}
    for line in lines:
        name, *words = line.lower().split()
        if name == "@data":
            return found
        found[name] = words
    raise DataError(f"{path} has no line @data, so it is no .ts file of series")


def _task(path: Path, header: dict[str, list[str]]) -> Task:
    if header.get("@timestamps", ["false"])[:1] == ["true"]:
        raise DataError(
            f"{path} holds time stamps; a survey takes evenly spaced values without them (@timeStamps false)"
        )
    if header.get("@classlabel", [])[:1] == ["true"]:
        return "classification"
    if header.get("@targetlabel", [])[:1] == ["true"]:
        return "regression"
    raise DataError(f"{path} has no labels (neither @classLabel true nor @targetLabel true)")


def _series(path: Path, row: int, text: str) -> np.ndarray:
    """(channels, steps) of one line."""
    try:
        channels = [np.array(part.replace("?", "nan").split(","), dtype=np.float64) for part in text.split(":")]
        return np.stack(channels)
    except ValueError as error:
        raise DataError(f"{path}: series {row + 1} is not rows of numbers of one length: {error}") from error
