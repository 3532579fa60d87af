"""Splits of rows that keep what belongs together on one side, and the check that nothing leaked across."""

__all__ = ["Leak", "Split", "find_leaks", "group_split", "time_blocks"]

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold

from theodolite.core.errors import InputError


@dataclass(frozen=True)
class Split:
    """Two disjoint sets of rows, ascending int64."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Leak:
    """What stands on both sides of a split.

    groups: names of groups with rows on both sides. twins: pairs (row in train, row in test) with the same values, one
    pair for each such test row.
    """

    groups: tuple
    twins: np.ndarray

    def __bool__(self) -> bool:
        return bool(self.groups) or len(self.twins) > 0


def group_split(groups: np.ndarray, *, test_share: float = 0.3, y: np.ndarray | None = None, seed: int = 0) -> Split:
    """Split rows into train and test with every group of ``groups`` (n,) whole on one side.

    With classes ``y`` (n,) the shares of the classes are kept as near as whole groups allow; the test share is then the
    nearest 1 / round(1 / test_share).

    >>> split = group_split(np.array(["ann", "ann", "bob", "eve", "eve", "joe"]), test_share=0.5)
    >>> sorted(map(int, [*split.train, *split.test]))
    [0, 1, 2, 3, 4, 5]
    """
    groups = np.asarray(groups)
    names = np.unique(groups)
    if groups.ndim != 1 or len(names) < 2:
        raise InputError(f"need at least two groups to split by, got {len(names)} in an array of shape {groups.shape}")
    if not 0 < test_share < 1:
        raise InputError(f"the test share must lie strictly between 0 and 1, got {test_share}")
    if y is None:
        splitter = GroupShuffleSplit(1, test_size=test_share, random_state=seed)
    else:
        folds = min(max(2, round(1 / test_share)), len(names))
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    train, test = next(iter(splitter.split(groups, y, groups)))
    return Split(np.sort(train), np.sort(test))


def find_leaks(
    train: np.ndarray, test: np.ndarray, *, groups: np.ndarray | None = None, X: np.ndarray | None = None
) -> Leak:
    """What stands on both sides of the row numbers ``train`` and ``test``: groups (n,), and equal rows of ``X`` (n, p).

    A row number on both sides is an error, not a leak: the split itself is broken.
    """
    train, test = np.asarray(train), np.asarray(test)
    both = np.intersect1d(train, test)
    if len(both):
        raise InputError(f"{len(both)} rows are in train and in test, the first is row {both[0]}")
    shared: tuple = ()
    if groups is not None:
        groups = np.asarray(groups)
        shared = tuple(np.intersect1d(groups[train], groups[test]).tolist())
    twins = np.empty((0, 2), dtype=np.int64)
    if X is not None:
        rows = np.ascontiguousarray(np.asarray(X).reshape(len(X), -1))
        _, kind = np.unique(rows, axis=0, return_inverse=True)
        first = dict(zip(kind[train][::-1].tolist(), train[::-1].tolist()))
        twins = np.array(
            [(first[k], row) for k, row in zip(kind[test].tolist(), test.tolist()) if k in first], dtype=np.int64
        ).reshape(-1, 2)
    return Leak(shared, twins)


def time_blocks(n: int, length: int) -> np.ndarray:
    """Block number of each of ``n`` neighbouring times, ``length`` to a block: ``bootstrap(groups=)`` then keeps
    neighbours together.

    >>> time_blocks(5, 2)
    array([0, 0, 1, 1, 2])
    """
    if n < 1 or length < 1:
        raise InputError(f"need n >= 1 and length >= 1, got n={n}, length={length}")
    return np.arange(n) // length
