"""What a language model is told about a task: the model that is tuned, the data, the metric."""

__all__ = ["TaskContext"]

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.base import is_classifier
from sklearn.metrics import get_scorer
from sklearn.pipeline import Pipeline

from theodolite.core.errors import DataError, InputError

_STRONG = 0.5  # a correlation that is worth telling
_MOST_COLUMNS = 200  # of which correlations with each other are counted
_SHARES = (
    "accuracy",
    "f1",
    "precision",
    "recall",
    "roc_auc",
    "balanced_accuracy",
    "jaccard",
    "average_precision",
    "top_k",
)


@dataclass(frozen=True)
class TaskContext:
    """model: the name of what is tuned. task: "classification", "regression" or other words. metric: its name.

    bounds: between which the metric lies at all, so that no score is asked for that cannot be. The rest are facts about
    the training data; what is None is not told.
    """

    model: str
    task: str
    metric: str
    lower_is_better: bool = False
    n_samples: int | None = None
    n_features: int | None = None
    n_categorical: int | None = None
    n_classes: int | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    class_shares: tuple[float, ...] = ()
    skewness: tuple[float, ...] = ()
    kurtosis: tuple[float, ...] = ()
    n_target_correlations: int | None = None
    n_feature_correlations: int | None = None

    def __post_init__(self) -> None:
        for name in ("model", "task", "metric"):
            if not getattr(self, name).strip():
                raise InputError(f"a task needs a {name}, got a blank text")
        if not self.bounds[0] < self.bounds[1]:
            raise InputError(f"bounds of the metric must be (low, high), got {self.bounds}")

    @classmethod
    def from_data(cls, estimator: Any, X: Any, y: Any, scoring: str = "accuracy") -> "TaskContext":
        """Of the training data X (n, features: an array or a DataFrame, text columns are categorical) and y (n,).

        scoring: a name of scikit-learn's; larger is better for all of them. Give training rows only: what is told to a
        language model is no longer held out. Raises DataError for data of no rows or of other lengths.
        """
        try:
            get_scorer(scoring)
        except ValueError as error:
            raise InputError(f"scoring is a name that scikit-learn knows, got {scoring!r}") from error
        values = X if isinstance(X, pd.DataFrame) else np.asarray(X)
        if values.ndim != 2:
            raise DataError(
                f"X must be a dense table of rows and columns, got {type(X).__name__} of shape {np.shape(X)}"
            )
        table = pd.DataFrame(values)
        target = np.asarray(y).ravel()
        if len(table) != len(target) or len(table) < 2:
            raise DataError(f"need as many targets as rows and at least two, got {len(table)} and {len(target)}")
        final = estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator
        numeric = table.select_dtypes("number").astype(np.float64)
        numeric = numeric.loc[:, numeric.std() > 0]
        known: dict[str, Any] = {"bounds": _bounds(scoring)}
        if is_classifier(estimator):
            names, counts = np.unique(target, return_counts=True)
            codes = np.searchsorted(names, target).astype(np.float64)
            known |= {"n_classes": len(names), "class_shares": tuple(np.sort(counts / len(target))[::-1].tolist())}
        else:
            codes = target.astype(np.float64)
        if numeric.shape[1]:
            values = numeric.to_numpy()
            known |= {
                "skewness": _spread(stats.skew(values, nan_policy="omit")),
                "kurtosis": _spread(stats.kurtosis(values, nan_policy="omit")),
                "n_target_correlations": _strong(numeric.corrwith(pd.Series(codes, index=numeric.index))),
            }
            some = numeric.iloc[:, :_MOST_COLUMNS].corr().to_numpy()
            known["n_feature_correlations"] = _strong(some[np.triu_indices(len(some), 1)])
        return cls(
            type(final).__name__, "classification" if is_classifier(estimator) else "regression", scoring, False,
            len(table), table.shape[1], table.shape[1] - table.select_dtypes("number").shape[1], **known,
        )  # fmt: skip


def _bounds(scoring: str) -> tuple[float, float]:
    if scoring.startswith("neg_"):
        return (-math.inf, 0.0)
    if scoring.startswith(_SHARES):
        return (0.0, 1.0)
    return (
        (-math.inf, 1.0)
        if scoring in ("r2", "explained_variance", "d2_absolute_error_score")
        else (-math.inf, math.inf)
    )


def _spread(values: Any) -> tuple[float, ...]:
    """Least, middle and largest of the features' numbers: a line that stays short on wide tables."""
    found = np.asarray(values, dtype=np.float64)
    found = found[np.isfinite(found)]
    return tuple(np.quantile(found, [0, 0.5, 1]).round(2).tolist()) if len(found) else ()


def _strong(values: Any) -> int:
    return int((np.abs(np.nan_to_num(np.asarray(values, dtype=np.float64))) > _STRONG).sum())
