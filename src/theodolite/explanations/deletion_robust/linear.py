"""Linear scores under deletion: which rows are the worst to lose, what that does to the weights, and what survives it."""

__all__ = [
    "InfluenceWarning",
    "WorstDeletion",
    "deletion_effect",
    "rows_to_delete",
    "validity_under_deletion",
    "worst_deletion",
]

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.influence import ExactRetrainer, LogisticInfluence, logistic_gradient
from theodolite.core.memory import chunks
from theodolite.explanations.model_changes import robust_validity
from theodolite.explanations.table_schema import plain_rows

_GRADIENT = 1e-4


class InfluenceWarning(UserWarning):
    """The model is not at the minimum of its training loss, so influence, which starts there, is off."""


class WorstDeletion(NamedTuple):
    """rows (k,): the worst to lose, worst first. Scores of the point without them: predicted, and after retraining."""

    rows: Int[np.ndarray, " k"]
    predicted_score: float
    true_score: float | None


def rows_to_delete(k: float, y: np.ndarray) -> int:
    """The number of rows that k means: itself where it is whole, else the share k of the rows, rounded down, at least 1.

    >>> rows_to_delete(0.01, np.repeat([0, 1], 75)), rows_to_delete(3, np.repeat([0, 1], 75))
    (1, 3)
    """
    n, smaller = len(y), int(min((y == 1).sum(), (y == 0).sum()))
    if isinstance(k, (bool, np.bool_)) or not np.isfinite(k) or k < 0:
        raise InputError(f"k must be a number of rows, or a share of them below 1, and not negative; got {k!r}")
    if isinstance(k, (int, np.integer)):
        count = int(k)
    elif k >= 1:
        raise InputError(f"k = {k!r} is no share below 1; give a number of rows as a whole number")
    else:
        count = max(1, int(k * n + 1e-9)) if k > 0 else 0
    if count >= n:
        raise InputError(f"k = {count} would delete all of the {n} training rows")
    if count >= smaller:
        raise InputError(f"deleting k = {count} rows can leave a class with no row: the smaller one has {smaller}")
    return count


@dataclass(frozen=True, eq=False)
class LinearModel:
    """weights (d + 1,), intercept last, of a logistic regression trained with scikit-learn's C."""

    weights: np.ndarray
    C: float


def linear_model(model: Any, x: np.ndarray, y: np.ndarray, C: float) -> LinearModel:
    """The weights and C of ``model`` (None: trained here), with a warning where it is not trained to its minimum."""
    d = x.shape[1]
    if not C > 0:
        raise InputError(f"C must be above 0 (infinity for no ridge), got {C}")
    if model is None:
        return LinearModel(ExactRetrainer(x, y, C).weights, C)
    if isinstance(model, LogisticRegression):
        weights, C = _of_sklearn(model)
    elif isinstance(model, nn.Linear):
        slopes = model.weight.detach().double().cpu().numpy()
        bias = np.zeros(len(slopes)) if model.bias is None else model.bias.detach().double().cpu().numpy()
        if len(slopes) > 2:
            raise ModelError(f"need one score or two, one for each class; this layer gives {len(slopes)}")
        rows = np.column_stack([slopes, bias])
        weights = rows[0] if len(rows) == 1 else rows[1] - rows[0]
    else:
        raise ModelError(
            f"need a LogisticRegression, an nn.Linear or None (train one here), got {type(model).__name__}"
        )
    if weights.shape != (d + 1,):
        raise ModelError(f"the model takes {len(weights) - 1} features but the rows have {d}")
    if not np.isfinite(weights).all():
        raise ModelError("the model's weights hold NaN or infinite values")
    size = float(np.linalg.norm(logistic_gradient(x, y, weights, 1 / (C * len(x)))))
    if size > _GRADIENT:
        warnings.warn(
            f"the gradient of the training loss has norm {size:.2g} (above {_GRADIENT:g}) at these weights, so influence is "
            f"off; train longer (a smaller tol), or check that C = {C:g} and the rows are those of the training",
            InfluenceWarning,
            stacklevel=3,
        )
    return LinearModel(weights, C)


def _of_sklearn(model: LogisticRegression) -> tuple[np.ndarray, float]:
    if not hasattr(model, "coef_"):
        raise ModelError("the LogisticRegression is not fitted; call its fit first, or leave out the model")
    if len(model.coef_) != 1 or np.asarray(model.classes_).tolist() != [0, 1]:
        raise ModelError(f"the model must know the two classes 0 and 1, got {np.asarray(model.classes_).tolist()}")
    options = model.get_params()
    penalty = options.get("penalty")
    if penalty in ("l1", "elasticnet") or (options.get("l1_ratio") or 0) > 0:
        raise ModelError("influence needs an L2 penalty; this model has an L1 part")
    if options.get("class_weight") is not None or not options.get("fit_intercept", True):
        raise ModelError(
            "need a model without class weights and with an intercept; train one here by leaving out the model"
        )
    weights = np.append(model.coef_[0], np.ravel(model.intercept_)).astype(np.float64)
    return weights, float(np.inf if penalty is None else options["C"])


def checked_rows(x: Any, d: int, name: str) -> np.ndarray:
    """Points (m, d) as float64."""
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != d or len(rows) == 0:
        raise DataError(f"{name} must be (m, {d}) with m >= 1, got shape {rows.shape}")
    return rows


def smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices (m, k) of the k smallest of each row of values (m, n), smallest first, ties by index."""
    if k == 0:
        return np.zeros((len(values), 0), dtype=np.int64)
    part = np.sort(np.argpartition(values, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(np.take_along_axis(values, part, axis=1), axis=1, kind="stable")
    return np.take_along_axis(part, order, axis=1)


def summed(directions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What the deletion of each point's rows (m, k) adds to the weights (m, q), in chunks: the gathered rows are m x k x q."""
    out = np.zeros((len(rows), directions.shape[1]))
    for part in chunks(len(rows), 8.0 * max(1, rows.shape[1]) * directions.shape[1]):
        out[part] = directions[rows[part]].sum(axis=1)
    return out


def worst_rows(directions: np.ndarray, points: np.ndarray, k: int, *, memory: int | None = None) -> np.ndarray:
    """The k rows (m, k) whose deletion lowers the score of each point (m, d) most, under additive directions (n, d + 1)."""
    tilted = np.column_stack([points, np.ones(len(points))])
    found = [smallest(tilted[part] @ directions.T, k) for part in chunks(len(points), 24.0 * len(directions), memory)]
    return np.concatenate(found)


def worst_deletion(
    model: Any,
    X: Float[np.ndarray, "row feature"],
    y: np.ndarray,
    x: Float[np.ndarray, " feature"],
    k: float,
    influence: str = "leverage",
    *,
    C: float = 1.0,
    exact: bool = True,
) -> WorstDeletion:
    """The k training rows whose deletion lowers the score of the point ``x`` (d,) most, and the score without them.

        f_worst(x) = f_w(x) + sum of the k smallest a_i,   a_i = (x, 1) . d_i

    The first-order model is additive, so the k smallest a_i are its exact minimum over all sets of k rows.
    model: a LogisticRegression, an nn.Linear, or None to train one with C. exact: retrain without the rows for true_score.

    Raises `ValueError` where k reaches n or can leave a class with no row.
    """
    X, y = plain_rows(X), np.asarray(y)
    found = linear_model(model, X, y, C)
    k = rows_to_delete(k, y)
    directions = LogisticInfluence(X, y, found.weights, 1 / (found.C * len(y))).directions(influence)
    point = checked_rows(np.asarray(x)[None], X.shape[1], "x")
    rows = worst_rows(directions, point, k)[0]
    tilted = np.append(point[0], 1.0)
    predicted = float(tilted @ (found.weights + directions[rows].sum(axis=0)))
    true = float(tilted @ ExactRetrainer(X, y, found.C).without(rows)) if exact else None
    return WorstDeletion(rows, predicted, true)


def deletion_effect(
    model: Any,
    X: Float[np.ndarray, "row feature"],
    y: np.ndarray,
    rows: Any,
    *,
    exact: bool = False,
    influence: str = "leverage",
    C: float = 1.0,
) -> Float[np.ndarray, " weight"]:
    """What the deletion of ``rows`` adds to the weights (d + 1,), intercept last; exact: by training without them."""
    X, y = plain_rows(X), np.asarray(y)
    rows = np.asarray(rows, dtype=np.int64).ravel()
    if len(np.unique(rows)) < len(rows) or (len(rows) and not (rows.min() >= 0 and rows.max() < len(y))):
        raise InputError(f"rows must be distinct indices in 0..{len(y) - 1}, got {rows[:10].tolist()}")
    found = linear_model(model, X, y, C)
    if exact:
        retrainer = ExactRetrainer(X, y, found.C)
        return retrainer.without(rows) - retrainer.weights
    directions = LogisticInfluence(X, y, found.weights, 1 / (found.C * len(y))).directions(influence)
    return directions[rows].sum(axis=0)


def validity_under_deletion(
    cfs: Any,
    X: Float[np.ndarray, "row feature"],
    y: np.ndarray,
    k: float,
    mode: str = "random",
    draws: int = 20,
    *,
    C: float = 1.0,
    threshold: float = 0.0,
    target: int = 1,
    influence: str = "leverage",
    seed: int = 0,
) -> Float[np.ndarray, " point"]:
    """Share of deletions of k rows, each followed by a true retraining, after which each point is still accepted.

    cfs: points (m, d), or what `DeletionRobustCounterfactual.generate` returned. mode "random": ``draws`` sets of k distinct
    rows, the same for all points; "worst": the one set that influence finds worst at each point (a share of 0 or 1). Points
    that are NaN are never accepted.
    """
    X, y = plain_rows(X), np.asarray(y)
    points = checked_rows(getattr(cfs, "counterfactuals", cfs), X.shape[1], "cfs")
    if target not in (0, 1):
        raise InputError(f"target must be 0 or 1, got {target!r}")
    if draws < 1:
        raise InputError(f"draws must be at least 1, got {draws}")
    if mode not in ("random", "worst"):
        raise InputError(f"mode must be 'random' or 'worst', got {mode!r}")
    k = rows_to_delete(k, y)
    retrainer = ExactRetrainer(X, y, C)
    if mode == "random":
        rng = np.random.default_rng(seed)
        models = [
            _probability(retrainer.without(rng.choice(len(y), k, replace=False)), threshold) for _ in range(draws)
        ]
        return robust_validity(points, models, target=target)
    sign = 1.0 if target == 1 else -1.0
    directions = sign * LogisticInfluence(X, y, retrainer.weights, 1 / (C * len(y))).directions(influence)
    share, there = np.zeros(len(points)), np.flatnonzero(np.isfinite(points).all(axis=1))
    for i in there:
        rows = worst_rows(directions, points[i : i + 1], k)[0]
        model = _probability(retrainer.without(rows), threshold)
        share[i] = robust_validity(points[i : i + 1], [model], target=target)[0]
    return share


def _probability(w: np.ndarray, threshold: float) -> Callable[[Tensor], Tensor]:
    """The model with weights (d + 1,) as the probability of class 1, one half where its score is the threshold."""
    slopes, level = torch.as_tensor(w[:-1]), float(w[-1]) - threshold
    return lambda x: torch.sigmoid(x @ slopes + level)
