"""Questions to a sample, and what comes back."""

__all__ = [
    "Answer",
    "HoldoutLeakError",
    "NotAStatisticalQuery",
    "Query",
    "QueryRangeError",
    "check_sample",
    "mean_of",
    "query_mean",
]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from theodolite.core.errors import DataError, InputError

Query = Callable[[Any, Any], np.ndarray]
"""A statistical query: (X, y) -> one value in [0, 1] for each row; its answer is their mean."""


class QueryRangeError(InputError):
    """A query gave values outside [0, 1], or values that are not finite."""


class NotAStatisticalQuery(InputError):
    """A metric is not a mean over rows, so the guarantees of a reusable holdout do not cover it."""


class HoldoutLeakError(DataError):
    """Rows of the holdout are in the training set too."""


@dataclass(frozen=True)
class Answer:
    """One answer. source: the sample or noise it came from; error_bound holds for this answer alone, with the
    mechanism's confidence; budget_left is None where nothing is counted.
    """

    value: float
    source: Literal["train", "holdout", "hypothesis", "noise"]
    error_bound: float
    budget_left: int | None
    index: int


def query_mean(query: "Query | np.ndarray", x: Any, y: Any, n: int) -> float:
    """Mean over n rows of a query, given as a function of (X, y) or as its (n,) values; QueryRangeError outside [0, 1]."""
    values = np.asarray(query(x, y) if callable(query) else query)
    if values.shape != (n,):
        raise QueryRangeError(f"a query gives one value for each of the {n} rows, got an array of shape {values.shape}")
    return mean_of(values)


def mean_of(values: np.ndarray) -> float:
    """Mean of values that must lie in [0, 1]."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):
        raise QueryRangeError(
            f"query values must lie in [0, 1], got a minimum of {low} and a maximum of {high}; clip or rescale them"
        )
    return float(values.mean())


def check_sample(x: Any, y: Any, name: str) -> tuple[Any, Any]:
    """Rows and labels as arrays, data frames and series as they are; empty ones and missing values are refused."""
    x, y = (part if isinstance(part, pd.DataFrame | pd.Series) else np.asarray(part) for part in (x, y))
    if x.ndim == 0 or y.ndim == 0:
        raise DataError(f"the {name} sample needs rows and labels as arrays (sparse ones by .toarray()) or data frames")
    if len(x) == 0 or len(x) != len(y):
        raise DataError(f"the {name} sample needs as many labels as rows and at least one, got {len(x)} and {len(y)}")
    for part in (x, y):
        values = np.asarray(part)
        numbers = values.dtype.kind in "fc"
        if not np.isfinite(values).all() if numbers else pd.isna(values).any():
            raise DataError(f"the {name} sample holds NaN or infinite values")
    return x, y
