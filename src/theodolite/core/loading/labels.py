"""Labels: which column they are, what task they make, what their classes are called, and the split by class."""

__all__ = ["TARGET_NAMES", "Labels", "check_given_test", "class_name", "find_target", "numbers", "read_labels", "split"]

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types

from theodolite.core.errors import DataError, ModelError
from theodolite.core.loading.options import DataOptions, Wanted
from theodolite.core.subject import Task

TARGET_NAMES = frozenset({"target", "label", "labels", "class", "y", "outcome"})
"""Names, in lower case, that a label column is known by."""

_FEW = 10  # whole numbers of at most so many values are classes


@dataclass(frozen=True, eq=False)
class Labels:
    """Task, class names and targets (n,): class indices (int64) or values (float32)."""

    task: Task
    classes: tuple[str, ...]
    y: np.ndarray
    notes: tuple[str, ...] = ()


def find_target(names: list[str], options: DataOptions) -> str:
    """Name of the label column: the one that was named, or the only one with a usual name."""
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    if options.target is not None:
        if options.target not in names:
            raise DataError(f"--target {options.target}: there is no such column; there are: {shown}")
        return options.target
    found = [name for name in names if name.lower() in TARGET_NAMES]
    if len(found) != 1:
        what = f"{' and '.join(found)} may each be" if found else "none has a usual name of"
        raise DataError(f"of the columns {shown}, {what} the label; say which is with --target NAME")
    return found[0]


def numbers(values: Any) -> np.ndarray | None:
    """Values as float64 with NaN for what is missing, or None where a cell is no number."""
    if types.is_bool_dtype(values.dtype) or types.is_complex_dtype(values.dtype):
        return None
    if types.is_numeric_dtype(values.dtype):
        return values.to_numpy(dtype=np.float64, na_value=np.nan)
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    elif not (types.is_object_dtype(values.dtype) or types.is_string_dtype(values.dtype)):
        return None
    there = values[values.notna()]
    if not types.is_string_dtype(values) and not set(there.map(type)).isdisjoint({bool, np.bool_, complex, list, dict}):
        return None
    try:
        converted: Any = pd.to_numeric(there, errors="coerce")
        found = converted.astype("float64")
    except (TypeError, ValueError, OverflowError):
        return None
    if bool(found.isna().any()):
        return None
    return found.reindex(values.index).to_numpy(dtype=np.float64)


def class_name(value: Any) -> str:
    """How a class is written: 1, 1.0 and "1" are the same class.

    >>> class_name(1.0), class_name("yes"), class_name(0.5)
    ('1', 'yes', '0.5')
    """
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def read_labels(values: Any, options: DataOptions, wanted: Wanted) -> Labels:
    """Labels of a column without missing values; what is ambiguous is an error that names the flag."""
    name, found = values.name, numbers(values)
    if wanted.task and options.task and wanted.task != options.task:
        raise ModelError(f"--task {options.task} does not fit the model, which is made for {wanted.task}")
    notes: tuple[str, ...] = ()
    task = wanted.task or options.task
    if found is None:
        if task == "regression":
            raise DataError(f"the label column {name!r} holds texts, so it cannot be the target of a regression")
        task = "classification"
    distinct = np.unique(found) if found is not None else None
    if task is None and distinct is not None:
        whole = bool((distinct == np.round(distinct)).all())
        if whole and 2 < len(distinct) <= _FEW:
            notes = (
                f"{name!r} has {len(distinct)} whole values, taken as classes; --task regression takes them as sizes",
            )
        if len(distinct) > 2 and whole and len(distinct) > _FEW:
            raise DataError(
                f"the label column {name!r} holds {len(distinct)} different whole numbers, which may be classes or "
                "sizes; say --task classification or --task regression"
            )
        task = "classification" if whole or len(distinct) <= 2 else "regression"
    if task == "regression":
        return _values(values, found, options)
    return _classes(values, distinct, wanted, notes)


def _values(values: Any, found: np.ndarray | None, options: DataOptions) -> Labels:
    if found is None or len(np.unique(found)) < 2:
        raise DataError(f"the target {values.name!r} has the same value in every row, so there is nothing to learn")
    if not np.abs(found).max() < 1e18:
        raise DataError(f"the target {values.name!r} has values up to {np.abs(found).max():.3g}; rescale it below 1e18")
    return Labels("regression", (), found.astype(np.float32))


def _classes(values: Any, distinct: np.ndarray | None, wanted: Wanted, notes: tuple[str, ...]) -> Labels:
    cells: Any = (
        values if distinct is None else pd.Series(numbers(values))
    )  # "1" and "1.0" of a text file are one class
    names = cells.astype(object).map(class_name)
    counts = names.value_counts().to_dict()
    found = sorted(counts) if distinct is None else [class_name(value) for value in distinct]
    if len(found) < 2:
        raise DataError(
            f"all {len(values)} rows are of one class, {found[0]!r} in column {values.name!r}; give rows of at least "
            "two classes, or name another column with --target"
        )
    if len(found) > len(values) / 2:
        raise DataError(
            f"the label column {values.name!r} has {len(found)} different values in {len(values)} rows, which are no "
            "classes; name another column with --target" + ("" if distinct is None else ", or say --task regression")
        )
    rare = [name for name in found if counts[name] < 5]
    if rare:
        notes = (*notes, f"classes with fewer than 5 rows: {', '.join(rare[:8])}{', ...' if len(rare) > 8 else ''}")
    classes = wanted.classes or tuple(found)
    if not set(found) <= set(classes):
        if classes != tuple(str(i) for i in range(len(found))):
            strange = ", ".join(repr(name) for name in found if name not in classes)
            raise ModelError(
                f"the labels hold {strange[:200]}, which the model does not know; its classes are "
                f"{', '.join(map(repr, classes[:8]))}"
            )
        classes = tuple(found)
        pairs = ", ".join(f"{i} = {name}" for i, name in list(enumerate(found))[:6])
        notes = (*notes, f"the model knows its classes by number only; taken in sorted order: {pairs}")
    index = {name: i for i, name in enumerate(classes)}
    return Labels("classification", classes, names.map(index).to_numpy(dtype=np.int64), notes)


def check_given_test(labels: Labels, given_test: np.ndarray) -> None:
    """DataError where the given test rows have classes that no other row has (often the same ones, spelt otherwise)."""
    if labels.task == "classification" and given_test.any():
        new = np.setdiff1d(labels.y[given_test], labels.y[~given_test])
        if len(new):
            shown = ", ".join(repr(labels.classes[i]) for i in new[:5])
            raise DataError(
                f"the test rows have the classes {shown}, which no other row has; of {', '.join(labels.classes[:8])}, "
                "spell the same class in the same way in both files"
            )


def split(labels: Labels, given_test: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Positions of the train, validation and test rows, in random order, in equal shares of every class.

    given_test: (n,) whether a row is known to be for testing. Where none is, a fifth of each class is the test part and
    a fifth the validation part; otherwise a quarter of the other rows is the validation part.
    """
    order = np.random.default_rng(seed).permutation(len(labels.y))
    parts = {"test": order[given_test[order]]}
    order = order[~given_test[order]]
    group = labels.y[order] if labels.task == "classification" else np.zeros(len(order))
    by_group = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[by_group], group[by_group])
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_group] = np.arange(len(order)) - starts
    if given_test.any():
        turn = rank % 4
        return {"train": order[turn != 1], "validation": order[turn == 1], **parts}
    turn = rank % 5
    return {"train": order[(turn != 1) & (turn != 2)], "validation": order[turn == 2], "test": order[turn == 1]}
