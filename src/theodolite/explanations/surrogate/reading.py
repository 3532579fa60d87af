"""What an explainer is given: tables of numbers, names of columns, labels."""

__all__ = ["OverlapWarning", "check_apart", "column_names", "numbers", "targets"]

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from theodolite.core.errors import DataError, InputError

_SHARED = 0.1  # share of validation rows that may also be training rows


class OverlapWarning(UserWarning):
    """Many validation rows are training rows too, so what is measured on them is too good."""


def numbers(
    x: Any, name: str, features: Sequence[str] | None, *, missing: bool, frame: Sequence[str] | None = None
) -> Float[np.ndarray, "row column"]:
    """Rows (n, d) of float64 with the columns ``features``, where these are known; missing: whether NaN is allowed.

    frame: columns of the data frame that was fitted; those of another frame are found by name.
    """
    if isinstance(x, pd.DataFrame) and frame is not None:
        by_name = {str(column): column for column in x.columns}
        lacking = [column for column in frame if column not in by_name]
        if lacking:
            raise InputError(f"{name} lacks the columns {', '.join(lacking[:5])}, which X_train has")
        x = x[[by_name[column] for column in frame]]
    table = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    if table.dtype.kind not in "fiub" and not isinstance(x, pd.DataFrame):
        raise InputError(f"{name} must hold numbers, got an array of {table.dtype}; encode categories first")
    try:
        table = table.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must hold numbers; encode categories first ({error})") from error
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] == 0:
        raise InputError(f"{name} must be a table (rows, columns) with at least one row, got shape {table.shape}")
    if features is not None and table.shape[1] != len(features):
        raise InputError(f"{name} has {table.shape[1]} columns, but {len(features)} were fitted")
    if np.isinf(table).any():
        raise DataError(f"{name} holds infinite values")
    empty = np.flatnonzero(np.isnan(table).any(axis=0))
    if len(empty) and not missing:
        names = [f"column {j}" for j in range(table.shape[1])] if features is None else list(features)
        listed = ", ".join(names[j] for j in empty[:10]) + (", ..." if len(empty) > 10 else "")
        raise DataError(f"{name} has missing values in {listed}; fill them in, or use surrogate='boosting'")
    return table


def column_names(x: Any, d: int, given: Sequence[str] | None) -> list[str]:
    """Names as given, those of a data frame, or x0, x1, ..."""
    if given is not None and len(given) != d:
        raise InputError(f"{len(given)} feature names for {d} columns")
    if given is None and not isinstance(x, pd.DataFrame):
        return [f"x{j}" for j in range(d)]
    names = [str(name) for name in (x.columns if given is None else given)]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < d else []
    if twice:
        raise InputError(f"every column needs a name of its own; there is more than one {', '.join(twice[:5])}")
    return names


def targets(y: Any, n: int, classes: np.ndarray | None, *, positions: bool) -> np.ndarray:
    """Class indices (n,) of labels, or values where there are no classes; positions: whole numbers are indices already."""
    labels = y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    labels = labels.reshape(-1)
    if len(labels) != n:
        raise InputError(f"need one label a row, got {len(labels)} for {n} rows")
    if classes is None:
        return labels.astype(np.float64)
    if positions and labels.dtype.kind in "iu":
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(f"labels must be positions 0..{len(classes) - 1} or class names")
        return labels.astype(np.int64)
    place = {label: i for i, label in enumerate(classes.tolist())}
    unknown = sorted({str(label) for label in labels.tolist() if label not in place})
    if unknown:
        raise InputError(
            f"labels {', '.join(unknown[:5])} are none of the model's classes "
            f"({', '.join(map(str, list(place)[:5]))}{', ...' if len(place) > 5 else ''})"
        )
    return np.array([place[label] for label in labels.tolist()])


def check_apart(x: np.ndarray, held: np.ndarray) -> None:
    """Raise where the validation rows are the training rows, warn where many of them are."""
    if x.shape == held.shape and np.array_equal(x, held, equal_nan=True):
        raise InputError("X_val is X_train; columns have to be scored on rows that the copy was not fitted on")
    train = {row.tobytes() for row in x}
    shared = sum(row.tobytes() in train for row in held)
    if shared > _SHARED * len(held):
        warnings.warn(
            f"{shared} of {len(held)} validation rows are training rows too, so k and the scores look better than they are",
            OverlapWarning,
            stacklevel=3,
        )
