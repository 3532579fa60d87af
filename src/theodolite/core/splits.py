"""Splits of rows that keep what belongs together on one side, and the check that nothing leaked across."""

__all__ = ["Leak", "Split", "find_leaks", "group_split", "time_blocks"]

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold
from sklearn.utils.multiclass import type_of_target

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


def group_split(groups: Any, *, test_share: float = 0.3, y: Any = None, seed: int = 0) -> Split:
    """Split rows into train and test with every group of ``groups`` (n,) whole on one side.

    With classes ``y`` (n,) the shares of the classes are kept as near as whole groups allow; the test share is then the
    nearest 1 / round(1 / test_share). Raises InputError for fewer than two groups, rows without one, and a ``y`` of values.

    >>> split = group_split(np.array(["ann", "ann", "bob", "eve", "eve", "joe"]), test_share=0.5)
    >>> sorted(map(int, [*split.train, *split.test]))
    [0, 1, 2, 3, 4, 5]
    """
    number, names = _numbered(groups)
    if len(names) < 2:
        raise InputError(f"need at least two groups to split by, got {len(names)}")
    if not 0 < test_share < 1:
        raise InputError(f"the test share must lie strictly between 0 and 1, got {test_share}")
    if y is None:
        held_out = min(max(1, round(test_share * len(names))), len(names) - 1)
        splitter: Any = GroupShuffleSplit(1, test_size=held_out, random_state=seed)
    else:
        y = np.asarray(y)
        if y.shape != number.shape:
            raise InputError(f"need one class a row, got {y.shape} for {len(number)} rows")
        if type_of_target(y) not in ("binary", "multiclass"):
            raise InputError("y must hold classes; leave it out where it holds values")
        # more folds than the largest class has rows are refused by scikit-learn
        most = int(np.unique(y, return_counts=True)[1].max())
        folds = min(max(2, round(1 / test_share)), len(names), most)
        if folds < 2:
            raise InputError("every row has a class of its own, so there are no shares to keep; leave y out")
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of classes with fewer rows than folds: as near as can be is what is said
        train, test = next(iter(splitter.split(number, y, number)))
    return Split(np.sort(train), np.sort(test))


def find_leaks(train: Any, test: Any, *, groups: Any = None, X: Any = None) -> Leak:
    """What stands on both sides of the row numbers ``train`` and ``test``: groups (n,), and equal rows of ``X`` (n, p).

    Rows are equal where all their values are, whatever they are; missing numbers count as equal. A row number on both sides is
    an error, not a leak: the split itself is broken.
    """
    train, test = _places(train), _places(test)
    both = np.intersect1d(train, test)
    if len(both):
        raise InputError(f"{len(both)} rows are in train and in test, the first is row {both[0]}")
    last = int(max(train.max(initial=-1), test.max(initial=-1)))
    shared: tuple = ()
    if groups is not None:
        number, names = _numbered(groups)
        _check_rows(len(number), last, "groups")
        shared = tuple(names[np.intersect1d(number[train], number[test])].tolist())
    twins = np.empty((0, 2), dtype=np.int64)
    if X is not None:
        values = np.asarray(X)
        _check_rows(len(values), last, "X")
        kind = _kinds(values)
        first = dict(zip(kind[train][::-1].tolist(), train[::-1].tolist()))
        twins = np.array(
            [(first[k], row) for k, row in zip(kind[test].tolist(), test.tolist()) if k in first], dtype=np.int64
        ).reshape(-1, 2)
    return Leak(shared, twins)


def _places(rows: Any) -> np.ndarray:
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (len(numbers) and (numbers.dtype.kind not in "iu" or numbers.min() < 0)):
        raise InputError(f"train and test are lists of row numbers from 0 on, got {numbers.dtype} {numbers.shape}")
    return numbers.astype(np.int64)


def _check_rows(n: int, last: int, what: str) -> None:
    if last >= n:
        raise InputError(f"the split has row {last}, but {what} only {n} rows")


def _numbered(groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Number of each row's group, and the groups' names in the order in which they appear."""
    values = np.asarray(groups)
    if values.ndim != 1:
        raise InputError(f"need one group a row, got an array of shape {values.shape}")
    number, names = pd.factorize(values)
    if (number < 0).any():
        raise InputError(
            f"{int((number < 0).sum())} rows have no group (None or NaN); give them one, or leave them out"
        )
    return number, np.asarray(names)


def _kinds(X: np.ndarray) -> np.ndarray:
    """The same number for rows that are equal, whatever they hold; missing numbers are equal to each other."""
    rows = X.reshape(len(X), -1) if len(X) else X.reshape(0, 0)
    if rows.dtype == object:
        keys: Any = (tuple(row) for row in rows.tolist())
    else:
        rows = np.ascontiguousarray(rows + 0.0 if rows.dtype.kind == "f" else rows)  # -0 is 0
        keys = (row.tobytes() for row in rows)
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def time_blocks(n: int, length: int) -> np.ndarray:
    """Block number of each of ``n`` neighbouring times, ``length`` to a block: ``bootstrap(groups=)`` then keeps
    neighbours together.

    >>> time_blocks(5, 2)
    array([0, 0, 1, 1, 2])
    """
    if n < 1 or length < 1:
        raise InputError(f"need n >= 1 and length >= 1, got n={n}, length={length}")
    return np.arange(n) // length
