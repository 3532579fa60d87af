"""The k largest keys of any number of documents, exactly and without holding them: noise by row number, radix selection.

    key of document i = log w_i / temperature + G_i,   G_i ~ Gumbel(0, 1) drawn from (seed, i)

The k documents with the largest keys are a sample without replacement with probabilities proportional to w (Gumbel top-k).
Keys are compared as whole numbers in the same order; the k-th is found with four histograms of 16 bits each.
"""

__all__ = ["Cut", "Draw", "Weights", "gumbel", "ordered", "resample"]

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt64

from theodolite.core.errors import DataError, InputError

Method = Literal["gumbel", "top_k", "random"]
Histogram = Callable[[int, int], np.ndarray]
_ROWS = 1 << 18
_GOLDEN, _MIX = np.uint64(0x9E3779B97F4A7C15), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class Draw:
    """How keys are made: of weights and noise, weights or noise; its seed, what log weights are divided by, the fewest words."""

    method: Method = "gumbel"
    seed: int = 0
    temperature: float = 1.0
    min_words: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"the method is one of {', '.join(get_args(Method))}, got {self.method!r}")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"the temperature must be finite and above 0, got {self.temperature}")

    def keys(self, weights: np.ndarray, rows: np.ndarray, target: int) -> np.ndarray:
        """Ordered keys (rows,) of log weights (rows,) for one target."""
        values = np.zeros_like(weights) if self.method == "random" else weights / self.temperature
        return ordered(values if self.method == "top_k" else values + gumbel(rows, self.seed, target))


@dataclass(frozen=True)
class Cut:
    """What one target takes: the documents with a larger key, and those with this key up to a row."""

    key: int
    row: int

    def takes(self, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which of these documents are taken."""
        return (keys > np.uint64(self.key)) | ((keys == np.uint64(self.key)) & (rows <= self.row))


@dataclass(frozen=True, eq=False)
class Weights:
    """Log weights (n, targets) and words (n,) of consecutive documents, in memory or as .npy files; first: of row numbers.

    words below 0 mark documents that are never taken: -1 is also in the target, -2 cannot be read.
    """

    weights: np.ndarray | Path
    words: np.ndarray | Path
    first: int
    rows: int

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Row numbers, log weights and words, so many at a time that they take little memory."""
        if self.rows == 0:
            return
        weights, words = (
            part if isinstance(part, np.ndarray) else np.load(part, mmap_mode="r", allow_pickle=False)
            for part in (self.weights, self.words)
        )
        for start in range(0, self.rows, _ROWS):
            part = slice(start, min(self.rows, start + _ROWS))
            yield self.first + np.arange(part.start, part.stop), np.asarray(weights[part]), np.asarray(words[part])

    def free(self, draw: Draw, cuts: Sequence[Cut]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, log weights and, of documents that are long enough, those that no target before took."""
        for rows, weights, words in self.blocks():
            free = words >= draw.min_words
            for target, cut in enumerate(cuts):
                free &= ~cut.takes(draw.keys(weights[:, target], rows, target), rows)
            yield rows[free], weights[free], words[free]


def gumbel(rows: Int[np.ndarray, " row"], seed: int, stream: int = 0) -> Float[np.ndarray, " row"]:
    """Standard Gumbel noise that depends on the seed, the stream and the row number, and on nothing else (splitmix64).

    >>> bool((gumbel(np.arange(9), 1)[4:] == gumbel(np.arange(4, 9), 1)).all())
    True
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "big")
    z = (rows.astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    z ^= z >> np.uint64(31)
    uniform = ((z >> np.uint64(12)) + 0.5) * 2.0**-52  # never 0 or 1
    return -np.log(-np.log(uniform))


def ordered(values: Float[np.ndarray, " row"]) -> UInt64[np.ndarray, " row"]:
    """Whole numbers in the order of the floats; -0 is 0."""
    bits = (values + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def as_float(key: int) -> float:
    """The float of an ordered key."""
    bits = key ^ (1 << 63) if key >> 63 else key ^ ((1 << 64) - 1)
    return float(np.array([bits], np.uint64).view(np.float64)[0])


def histogram(parts: Sequence[Weights], draw: Draw, cuts: Sequence[Cut], prefix: int, known: int) -> np.ndarray:
    """Of the free documents whose key begins with the ``known`` bits of ``prefix``, how many have each next 16 bits."""
    found = np.zeros(1 << 16, np.int64)
    for part in parts:
        for rows, weights, _ in part.free(draw, cuts):
            keys = draw.keys(weights[:, len(cuts)], rows, len(cuts))
            if known:
                keys = keys[keys >> np.uint64(64 - known) == np.uint64(prefix)]
            digits = (keys >> np.uint64(48 - known)) & np.uint64(0xFFFF)
            found += np.bincount(digits.astype(np.int64), minlength=1 << 16)
    return found


def ties(part: Weights, draw: Draw, cuts: Sequence[Cut], key: int, most: int) -> np.ndarray:
    """The first ``most`` free rows that have exactly this key."""
    found = []
    for rows, weights, _ in part.free(draw, cuts):
        found.append(rows[draw.keys(weights[:, len(cuts)], rows, len(cuts)) == np.uint64(key)])
    return np.concatenate(found)[:most] if found else np.empty(0, np.int64)


def taken(part: Weights, draw: Draw, cuts: Sequence[Cut]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that the targets take, ascending, and which target takes each."""
    all_rows, all_targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rows, weights, words in part.blocks():
        of = np.where(words >= draw.min_words, -1, -2)
        for target, cut in enumerate(cuts):
            new = (of == -1) & cut.takes(draw.keys(weights[:, target], rows, target), rows)
            of[new] = target
        all_rows.append(rows[of >= 0])
        all_targets.append(of[of >= 0])
    return np.concatenate(all_rows), np.concatenate(all_targets)


def find_cut(k: int, histogram: Histogram, ties: Callable[[int, int], np.ndarray]) -> Cut:
    """The cut that takes exactly k of the documents that the histograms count; there must be as many.

    histogram(prefix, known): as the function of that name. ties(key, most): row numbers with this key, ascending.
    """
    if k == 0:
        return Cut((1 << 64) - 1, -1)  # a key that no number has
    prefix, left = 0, k
    for known in (0, 16, 32, 48):
        counts = histogram(prefix, known)
        above = counts[::-1].cumsum()
        place = int(np.searchsorted(above, left))
        left -= int(above[place] - counts[::-1][place])
        prefix = (prefix << 16) | (0xFFFF - place)
    return Cut(prefix, int(ties(prefix, left)[left - 1]))


def resample(
    log_weights: Float[np.ndarray, " document"],
    k: int,
    method: Method = "gumbel",
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, " chosen"]:
    """k documents without replacement, with probabilities proportional to their weights; row numbers, ascending.

    method "top_k": those with the largest weights, the first of equal ones; "random": all equally likely.

    Raises InputError for k outside 0 .. N and DataError naming the first weight that is not finite.

    Source: Xie, Santurkar, Ma, Liang, 2023, arXiv:2302.03169 (Gumbel top-k resampling).

    >>> resample(np.array([0.1, 1.0, 2.0, 0.5, 0.0]), 2, "top_k").tolist()
    [1, 2]
    """
    values = np.asarray(log_weights, dtype=np.float64)
    if values.ndim != 1 or not 0 <= k <= len(values):
        raise InputError(f"need log weights (N,) and k from 0 to N, got shape {values.shape} and k = {k}")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"the log weight of document {bad[0]} is {values[bad[0]]}; weights must be finite")
    draw = Draw(method, seed, temperature)
    part = Weights(values[:, None], np.zeros(len(values), np.int32), 0, len(values))
    cut = find_cut(
        k,
        lambda prefix, known: histogram([part], draw, [], prefix, known),
        lambda key, most: ties(part, draw, [], key, most),
    )
    return taken(part, draw, [cut])[0]
