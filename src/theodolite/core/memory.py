"""One place that turns a byte budget into chunk sizes."""

__all__ = ["DEFAULT_BUDGET", "PeakMemory", "bytes_per_row", "chunk_rows", "chunks", "peak_memory"]

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from theodolite.core.errors import InputError

DEFAULT_BUDGET = 1 << 30
"""Bytes that one call may use for the batch it expands: 1 GiB."""


def chunk_rows(row_bytes: float, budget: int | None = None, *, at_most: int | None = None) -> int:
    """How many rows of ``row_bytes`` fit into ``budget`` bytes (default 1 GiB); at least 1.

    >>> chunk_rows(1024, 4096)
    4
    """
    budget = DEFAULT_BUDGET if budget is None else budget
    if budget < 1:
        raise InputError(f"a memory budget must be at least 1 byte, got {budget}")
    rows = max(1, int(budget // max(1.0, row_bytes)))
    return rows if at_most is None else max(1, min(rows, at_most))


def chunks(n: int, row_bytes: float, budget: int | None = None) -> Iterator[slice]:
    """Slices that cover range(n), each small enough for the budget and all of nearly equal size."""
    if n == 0:
        return
    count = math.ceil(n / chunk_rows(row_bytes, budget))
    size = math.ceil(n / count)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


class _OutputSizes(TorchDispatchMode):
    """Records the bytes of the outputs of every operator, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = list[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor) and not func.is_view:
                self.sizes.append(item.numel() * item.element_size())
        return out


def _output_sizes(model: Callable[[Tensor], object], rows: Tensor) -> list[int]:
    counter = _OutputSizes()
    with torch.no_grad(), counter:
        model(rows)
    return counter.sizes


def bytes_per_row(model: Callable[[Tensor], object], row: Tensor, *, gradients: bool) -> float:
    """Bytes that one more row costs in a forward (or forward and backward) pass of ``model``: two rows against one.

    row: (1, ...) a batch of one. What does not grow with the batch, such as weights made on the fly, is not counted. With
    gradients every intermediate result is kept until the backward pass and its gradient is as large again; without, only
    an operator's own inputs, output and workspace are alive at a time.
    """
    one, two = _output_sizes(model, row), _output_sizes(model, torch.cat([row, row]))
    # where the two passes do not call the same operators, the first alone is an upper bound
    sizes = [max(0, b - a) for a, b in zip(one, two, strict=True)] if len(one) == len(two) else one
    own = row.numel() * row.element_size()
    total, largest = sum(sizes), max(sizes, default=0)
    if gradients:
        return own * 2 + total * 1.5 + largest * 2
    return own + largest * 4


@dataclass
class PeakMemory:
    """Bytes that the process took at most beyond what it had at the start; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the peak of the process's resident memory inside the block (Linux; elsewhere it stays None)."""
    peak = PeakMemory()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # sets the high-water mark back to what is in use now
        before = _status_bytes(status.read_text(), "VmRSS")
    except OSError:
        before = None
    yield peak
    if before is not None:
        peak.bytes = max(0, _status_bytes(status.read_text(), "VmHWM") - before)


def _status_bytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
