"""Activations on disk: memory-mapped, by layer, row and token position, continued where a run was stopped.

One folder holds an array (vectors, width) for each layer, and ``store.json`` that says what they are of and how many rows are
done. The arrays are laid out in full before work starts, so that a disk that is too small is told then and not in the middle.
"""

__all__ = ["ActivationStore"]

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.capture import check_finite, forward_nodes
from theodolite.core.errors import DataError, DiskError, InputError
from theodolite.core.files import make_folder, read_json, write_json
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import evaluation_mode

_SCHEMA = 1
_ROWS = 64  # between two notes of how far it is


class ActivationStore:
    """The activations that `ActivationStore.collect` wrote; opening a folder that is not whole is a DataError.

    names: of the layers. positions: which token positions each row has in the store. ``store[name]`` is a read-only
    memory map (rows x positions, width); vector i belongs to row i // p and to position ``positions[i % p]``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        about = _about(self.folder)
        if about is None:
            raise DataError(f"{folder} holds no activations; make them with ActivationStore.collect")
        if about["done"] < about["rows"]:
            raise DataError(f"{folder} has {about['done']} of {about['rows']} rows; collect them again to continue")
        self.names: tuple[str, ...] = tuple(about["names"])
        self.positions: tuple[int, ...] = tuple(about["positions"])
        self.rows: int = about["rows"]
        self._maps = {
            name: np.load(self.folder / f"{i}.npy", mmap_mode="r", allow_pickle=False)
            for i, name in enumerate(self.names)
        }

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._maps:
            raise InputError(f"the store has no layer {name!r}; it has: {', '.join(self.names)}")
        return self._maps[name]

    def tensor(self, name: str, part: slice = slice(None)) -> Tensor:
        """Vectors ``part`` of a layer, copied into memory as float32."""
        return torch.from_numpy(np.array(self[name][part], dtype=np.float32))

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        x: Tensor,
        names: Sequence[str],
        folder: str | Path,
        *,
        positions: str | Sequence[int] = "all",
        max_bytes: int = 4 << 30,
        half: bool = False,
        memory: int | None = None,
    ) -> "ActivationStore":
        """Run ``model`` on the rows ``x`` and write what it holds at ``names`` into ``folder``; a stopped run is continued.

        names: as in `theodolite.core.capture`, each (rows, width) or (rows, tokens, width). positions: of the tokens to keep;
        "not first" leaves out the first, whose state in a decoder is often larger than all others together. half: float16
        on disk. max_bytes: what all arrays together may take.

        Raises InputError where they would take more, DataError where the folder holds the activations of another model,
        of other rows or of other layers, ActivationError for activations that are not finite, and DiskError.
        """
        folder = make_folder(Path(folder))
        names = list(names)
        if not names or len(set(names)) < len(names) or len(x) == 0:
            raise InputError(f"need at least one row and at least one layer, each once; got {len(x)} rows and {names}")
        first = forward_nodes(model, x[:1], names)
        kept = _positions(first, positions)
        widths = [first[name].shape[-1] for name in names]
        size = len(x) * len(kept) * sum(widths) * (2 if half else 4)
        if size > max_bytes:
            raise InputError(
                f"these activations take {size / 2**30:.2f} GiB and {max_bytes / 2**30:.2f} GiB are allowed; give fewer rows, "
                "layers or positions, half=True, or a larger max_bytes"
            )
        about = {
            "schema": _SCHEMA,
            "names": names,
            "widths": widths,
            "positions": kept,
            "rows": len(x),
            "half": half,
            "of": _fingerprint(model, x),
        }
        found = _about(folder)
        if found is None:
            for i, width in enumerate(widths):
                _lay_out(folder / f"{i}.npy", (len(x) * len(kept), width), half)
            found = about | {"done": 0}
            write_json(folder / "store.json", found)
        different = [key for key, value in about.items() if found.get(key) != value]
        if different:
            raise DataError(
                f"{folder} holds activations with another {', '.join(different)} ('of': of another model or other rows); "
                "choose another folder, or remove it"
            )
        maps = [np.lib.format.open_memmap(folder / f"{i}.npy", mode="r+") for i in range(len(names))]
        with evaluation_mode(model):
            cost = bytes_per_row(model, x[:1], gradients=False)
        done = found["done"]
        for block in range(done, len(x), _ROWS):
            rows = x[block : block + _ROWS]
            for part in chunks(len(rows), cost, memory):
                held = forward_nodes(model, rows[part], names)
                at = slice((block + part.start) * len(kept), (block + part.stop) * len(kept))
                for name, array in zip(names, maps, strict=True):
                    check_finite(held[name], name, block + part.start)
                    array[at] = _vectors(held[name], kept).float().cpu().numpy()
            for array in maps:
                array.flush()
            write_json(folder / "store.json", about | {"done": min(len(x), block + _ROWS)})
        return cls(folder)


def _vectors(tensor: Tensor, kept: Sequence[int]) -> Tensor:
    """(rows, width) or (rows, tokens, width) to (rows x kept, width)."""
    return tensor if tensor.ndim == 2 else tensor[:, list(kept)].flatten(0, 1)


def _positions(first: dict[str, Tensor], asked: str | Sequence[int]) -> list[int]:
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in first.items()}
    if any(len(shape) not in (1, 2) for shape in shapes.values()) or len({shape[:-1] for shape in shapes.values()}) > 1:
        raise InputError(f"layers must all be (rows, width) or all (rows, tokens, width); these are {shapes}")
    shape = next(iter(shapes.values()))
    length = 1 if len(shape) == 1 else shape[0]
    choices = {"all": range(length), "last": [length - 1], "not first": range(1, length)}
    if isinstance(asked, str):
        if asked not in choices:
            raise InputError(f'positions are "all", "last", "not first" or numbers, got {asked!r}')
        kept = list(choices[asked])
    else:
        kept = [int(p) + length if int(p) < 0 else int(p) for p in asked]
    if not kept or not all(0 <= p < length for p in kept):
        raise InputError(f"the rows have {length} positions, from 0; asked for {asked!r}")
    return kept


def _lay_out(path: Path, shape: tuple[int, int], half: bool) -> None:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16 if half else np.float32, shape=shape)
    array.flush()
    if hasattr(os, "posix_fallocate"):  # a hole in a file is filled later, and a full disk then ends the process
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                path.unlink()
                raise DiskError(
                    f"cannot lay out {path}: {error.strerror}; choose another folder or fewer rows"
                ) from error


def _about(folder: Path) -> dict | None:
    path = folder / "store.json"
    if not path.exists():
        return None
    about = read_json(path)
    if not isinstance(about, dict) or about.get("schema") != _SCHEMA:
        raise DataError(f"{path} has another layout than version {_SCHEMA}; choose another folder")
    return about


def _fingerprint(model: nn.Module, x: Tensor) -> str:
    """Of the rows and of the model's weights (their sums, which takes no time for a large model)."""
    digest = hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes())
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{float(value.detach().double().sum())!r}".encode())
    return digest.hexdigest()[:32]
