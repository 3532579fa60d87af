"""A reusable holdout as a scikit-learn scorer, for search loops that look at the same rows again and again."""

__all__ = ["reusable_scorer"]

from collections.abc import Callable
from typing import Any

import numpy as np

from theodolite.core.errors import InputError
from theodolite.data.reusable_holdout.answers import NotAStatisticalQuery
from theodolite.data.reusable_holdout.thresholdout import Thresholdout

PerRow = Callable[[Any, Any, Any], np.ndarray]


def _accuracy(estimator: Any, x: Any, y: Any) -> np.ndarray:
    return (estimator.predict(x) == np.asarray(y)).astype(np.float64)


def _one_hot(estimator: Any, y: Any) -> np.ndarray:
    return (np.asarray(estimator.classes_)[None, :] == np.asarray(y)[:, None]).astype(np.float64)


def _brier(estimator: Any, x: Any, y: Any) -> np.ndarray:
    # half the squared distance between two distributions lies in [0, 1]; larger is better
    return 1 - ((estimator.predict_proba(x) - _one_hot(estimator, y)) ** 2).sum(axis=1) / 2


def _log_loss(estimator: Any, x: Any, y: Any) -> np.ndarray:
    right = (estimator.predict_proba(x) * _one_hot(estimator, y)).sum(axis=1)
    return 1 - np.clip(-np.log(np.clip(right, 1e-15, None)) / _LOSS_CUT, 0, 1)


_LOSS_CUT = 4.0
"""The log loss at which a row counts as entirely wrong (1.8 % for the right class)."""

_PER_ROW: dict[str, PerRow] = {"accuracy": _accuracy, "brier": _brier, "clipped_log_loss": _log_loss}
_NOT_MEANS = {
    "roc_auc",
    "auc",
    "average_precision",
    "f1",
    "precision",
    "recall",
    "balanced_accuracy",
    "r2",
    "matthews_corrcoef",
}


def reusable_scorer(
    metric: "str | Callable[..., Any]", holdout: Thresholdout, *, sensitivity: float | None = None, name: str = ""
) -> Callable[..., float]:
    """A function (estimator, X, y) -> score whose answers come from ``holdout``; larger is better.

    metric: "accuracy", "brier" (1 minus half the squared distance), "clipped_log_loss" (1 minus the loss cut at 4, over 4), or a
    function (estimator, X, y) -> one value in [0, 1] a row. A metric that is no mean over rows (AUC, F1) raises
    NotAStatisticalQuery, unless it is a function (estimator, X, y) -> number given with its ``sensitivity``: how far one row
    can move it. The rows that a search loop passes are not looked at: questions go to the rows that the holdout holds.
    """
    if isinstance(metric, str):
        if metric in _NOT_MEANS:
            raise NotAStatisticalQuery(
                f"{metric} is not a mean over rows; use {', '.join(_PER_ROW)}, or pass a function with its sensitivity"
            )
        if metric not in _PER_ROW:
            raise InputError(f"metric must be one of {', '.join(_PER_ROW)} or a function, got {metric!r}")
    per_row: Callable[..., Any] = _PER_ROW[metric] if isinstance(metric, str) else metric
    label = name or (metric if isinstance(metric, str) else getattr(metric, "__name__", "metric"))

    def score(estimator: Any, X: Any = None, y: Any = None) -> float:
        if sensitivity is not None:
            train, held = holdout.evaluate(lambda x, t: float(per_row(estimator, x, t)))
            return holdout.ask_statistic(train, held, sensitivity=sensitivity, name=label).value

        def question(x: Any, t: Any) -> np.ndarray:
            values = np.asarray(per_row(estimator, x, t))
            if values.ndim == 0:
                raise NotAStatisticalQuery(
                    f"{label} gives one number, not one a row; give a per-row metric, or its sensitivity"
                )
            return values

        return holdout.ask(question, name=label).value

    return score
