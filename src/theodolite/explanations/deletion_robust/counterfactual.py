"""The cheapest change that stays accepted after the worst deletion of at most k training rows."""

__all__ = ["DeletionCounterfactualSet", "DeletionRobustCounterfactual"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.influence import ExactRetrainer, LogisticInfluence, logistic_table
from theodolite.explanations.deletion_robust.linear import linear_model, rows_to_delete, summed, worst_rows
from theodolite.explanations.deletion_robust.networks import LocalSurrogate, NetworkScore, search
from theodolite.explanations.deletion_robust.solver import CutResult, Feasible, cut
from theodolite.explanations.table_schema import TableSchema, plain_rows


@dataclass(frozen=True, eq=False)
class DeletionCounterfactualSet:
    """Counterfactuals of m queries and what deletions do to them.

    counterfactuals: (m, d), NaN where there is none. cost: (m,) distance from the query. plain_cost: (m,) of the nearest
    accepted point where nothing is deleted. worst_score: (m,) score there after the worst deletion of k rows, as influence
    predicts it. worst_rows: those rows, worst first. planes: (m,) half-spaces used. retrained: (m,) exact retrainings.
    certified: (m,) accepted after exact retraining without ``worst_rows`` too, and no promise for other sets. valid: (m,)
    worst_score reaches the threshold. k: rows that may be deleted; 0 makes plain counterfactuals, and `plain` says so.
    """

    counterfactuals: Float[np.ndarray, "query feature"]
    cost: Float[np.ndarray, " query"]
    plain_cost: Float[np.ndarray, " query"]
    worst_score: Float[np.ndarray, " query"]
    worst_rows: list[np.ndarray]
    planes: Int[np.ndarray, " query"]
    retrained: Int[np.ndarray, " query"]
    certified: Bool[np.ndarray, " query"]
    valid: Bool[np.ndarray, " query"]
    k: int

    @property
    def plain(self) -> bool:
        """Whether no deletion was asked for, so that nothing here is robust."""
        return self.k == 0

    def __len__(self) -> int:
        return len(self.cost)


class DeletionRobustCounterfactual(BaseEstimator):
    """Nearest points that a classifier accepts, and still accepts after the worst deletion of k of its training rows.

        min |x' - x|   with   f_w(x') + min_{|S| = k} sum_{i in S} (x', 1) . d_i >= threshold

    k: rows, or the share of them below 1 (rounded down, at least 1). norm: 2 or 1. threshold: of the score, a logit.
    worst_set: "refreshed" finds the worst rows again at the counterfactual, which makes it robust under the influence model;
    "at-factual" chooses them once at the query as the paper's code does, which does not. influence: "leverage" (corrected for
    the curvature that leaves with the row), "first-order" (the paper's equation) or "first-order-damped" (the paper's code:
    ``damping`` in place of the ridge). For networks ``damping`` is the ridge of the influence. verify: retrain without the rows
    that were found and go on until the counterfactual survives that too; only then is it `certified`, for the sets visited.
    immutable, increasing, decreasing, groups, bounds, costs: what may change, and at what price, as in
    `theodolite.explanations.table_schema.TableSchema`:
    columns by number or name (of a data frame) that keep their value, may only grow, may only fall; one-hot groups, whose
    members stay 0 or 1 with exactly one 1 (leave these columns unscaled); (low, high), each a number, one a column or None, or
    {column: (low, high)}; costs of one unit of a column, {column: number} or (d,). The range of the training rows is no limit.

    Points on the boundary of an influence model are often rejected after a true retraining, for influence is a little too
    small; verify mends that.

    Raises `ValueError` for labels other than 0 and 1, for k that reaches n or can leave a class with no row, and
    `SeparableDataError` without a ridge on separable classes. Warns (`InfluenceWarning`) where the model is not at the
    minimum of its loss. What cannot be reached within immutable and bounds is NaN with valid False.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(80, 3))
    >>> y = (x @ [2.0, -1.0, 0.5] + rng.normal(size=80) > 0).astype(int)
    >>> found = DeletionRobustCounterfactual(k=4).fit(x, y).generate([[-1.0, 1.0, 0.0]])
    >>> bool(found.valid[0] and found.cost[0] > found.plain_cost[0]), len(found.worst_rows[0])
    (True, 4)
    """

    def __init__(
        self,
        k: float = 0.01,
        *,
        norm: int = 2,
        threshold: float = 0.0,
        worst_set: str = "refreshed",
        influence: str = "leverage",
        damping: float = 0.01,
        verify: bool = False,
        max_planes: int = 100,
        immutable: Any = None,
        bounds: Any = None,
        increasing: Any = None,
        decreasing: Any = None,
        groups: Any = (),
        costs: Any = None,
    ) -> None:
        self.k = k
        self.norm = norm
        self.threshold = threshold
        self.worst_set = worst_set
        self.influence = influence
        self.damping = damping
        self.verify = verify
        self.max_planes = max_planes
        self.immutable = immutable
        self.bounds = bounds
        self.increasing = increasing
        self.decreasing = decreasing
        self.groups = groups
        self.costs = costs

    def fit(
        self,
        X: Any,
        y: Any,
        model: Any = None,
        C: float = 1.0,
        *,
        route: str = "last-layer",
        seed: int = 0,
    ) -> "DeletionRobustCounterfactual":
        """Learn what each training row does to the scores.

        X: (n, d) as the model takes it, scaled by statistics that stay fixed. y: (n,) of 0 and 1. model: a LogisticRegression
        (its own C counts) or nn.Linear trained on these rows, None to train one with C, or another network, then ``route`` says
        how: "last-layer" (features frozen), "gauss-newton" (all weights of a small network), or "local-linear" (a logistic
        regression fitted around each query, which any estimator or function can be put in place of; seed: of its draws).
        """
        if self.norm not in (1, 2):
            raise InputError(f"norm must be 1 or 2, got {self.norm!r}")
        if self.worst_set not in ("refreshed", "at-factual"):
            raise InputError(f"worst_set must be 'refreshed' or 'at-factual', got {self.worst_set!r}")
        if self.verify and self.worst_set == "at-factual":
            raise InputError("verify finds the worst rows again after each step; take worst_set='refreshed' with it")
        if self.influence not in ("leverage", "first-order", "first-order-damped"):
            raise InputError(
                f"influence must be 'leverage', 'first-order' or 'first-order-damped', got {self.influence!r}"
            )
        if self.max_planes < 1 or not self.damping > 0 or not np.isfinite(self.threshold):
            raise InputError("need max_planes >= 1, damping > 0 and a finite threshold")
        table, labels = logistic_table(plain_rows(X), np.asarray(y))
        self.X_, self.y_ = table[:, :-1], labels
        self.n_features_in_ = self.X_.shape[1]
        self.k_ = rows_to_delete(self.k, labels)
        self.schema_ = self._schema(X if hasattr(X, "columns") else self.X_)
        self.feasible_ = Feasible.of(self.schema_)
        self.route_ = "linear" if model is None or isinstance(model, (LogisticRegression, nn.Linear)) else route
        if self.route_ != "linear" and self.verify:
            raise InputError("verify retrains a linear model exactly, which a network cannot be; leave it out")
        if self.route_ == "linear":
            found = linear_model(model, self.X_, labels, C)
            self.weights_, self.C_ = found.weights, found.C
            self.directions_ = LogisticInfluence(
                self.X_, labels, found.weights, 1 / (found.C * len(labels)), damping=self.damping
            ).directions(self.influence)
            if self.verify:
                self.retrainer_ = ExactRetrainer(self.X_, labels, found.C)
        elif self.route_ == "local-linear":
            self.surrogate_ = LocalSurrogate.of(model, self.threshold, seed)
        elif self.route_ in ("last-layer", "gauss-newton"):
            if not isinstance(model, nn.Module):
                raise ModelError(
                    f"route {route!r} needs a network, got {type(model).__name__}; take route='local-linear'"
                )
            if self.norm != 2:
                raise InputError("norm 1 is solved for linear models only; take norm=2, or route='local-linear'")
            self.network_ = NetworkScore(model, self.X_, labels, self.route_, self.damping, self.influence)
        else:
            raise InputError(f"route must be 'last-layer', 'gauss-newton' or 'local-linear', got {route!r}")
        return self

    def _schema(self, X: Any) -> TableSchema:
        try:
            return TableSchema.of(
                X, immutable=self.immutable, increasing=self.increasing, decreasing=self.decreasing,
                groups=self.groups, bounds=self.bounds, costs=self.costs,
            )  # fmt: skip
        except (InputError, TypeError):
            raise
        except ValueError as error:
            raise InputError(f"bounds must be (low, high), each a number, one a column or None: {error}") from error

    def generate(self, X_query: Any, target: int = 1) -> DeletionCounterfactualSet:
        """Counterfactuals of the queries (m, d) that reach class ``target``: score >= threshold for 1, <= threshold for 0."""
        check_is_fitted(self, "route_")
        if target not in (0, 1):
            raise InputError(f"target must be 0 or 1, got {target!r}")
        try:
            x = self.schema_.rows(X_query)
        except DataError as error:
            raise DataError(f"X_query: {error}") from error
        sign = 1.0 if target == 1 else -1.0
        if self.route_ == "linear":
            return self._linear(x, sign)
        return self._local(x, sign) if self.route_ == "local-linear" else self._network(x, sign)

    def _solve(
        self, x: np.ndarray, w: np.ndarray, directions: np.ndarray, k: int, sign: float, confirm: Any = None
    ) -> CutResult:
        """The nearest robust points where the score is (x, 1) . w; scores in the result are turned by the sign."""
        w, directions, threshold = sign * w, sign * directions, sign * self.threshold

        def worst(points: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
            rows = worst_rows(directions, points, k)
            weights = w + summed(directions, rows)
            return np.einsum("ij,ij->i", points, weights[:, :-1]) + weights[:, -1], weights, list(rows)

        options: dict[str, Any] = {"norm": self.norm, "max_planes": self.max_planes}
        if self.worst_set == "refreshed" or k == 0:
            return cut(x, w, worst, threshold, self.feasible_, confirm=confirm, **options)
        fixed = worst(x, np.arange(len(x)))[1]
        parts = [
            cut(x[i : i + 1], fixed[i], _only(fixed[i]), threshold, self.feasible_, **options) for i in range(len(x))
        ]
        points = np.concatenate([part.points for part in parts])
        there = np.asarray(np.isfinite(points).all(axis=1))
        score, rows = np.full(len(x), np.nan), [np.zeros(0, dtype=np.int64)] * len(x)
        if there.any():
            score[there], _, found = worst(points[there], np.flatnonzero(there))
            for i, deleted in zip(np.flatnonzero(there), found, strict=True):
                rows[i] = deleted
        return CutResult(points, score, rows, np.ones(len(x), dtype=np.int64), there)

    def _linear(self, x: np.ndarray, sign: float) -> DeletionCounterfactualSet:
        retrained = np.zeros(len(x), dtype=np.int64)
        known: dict[bytes, np.ndarray] = {}

        def confirm(query: int, rows: np.ndarray, point: np.ndarray) -> np.ndarray | None:
            key = np.sort(rows).tobytes()
            if key not in known:
                known[key] = sign * self.retrainer_.without(rows)
            retrained[query] += 1
            w = known[key]
            return w if point @ w[:-1] + w[-1] < sign * self.threshold else None

        checking = self.verify and self.k_ > 0 and self.worst_set == "refreshed"
        found = self._solve(x, self.weights_, self.directions_, self.k_, sign, confirm if checking else None)
        plain = self._solve(x, self.weights_, self.directions_, 0, sign)
        return self._result(
            x, found.points, plain.points, sign * found.score, found.rows, found.planes, sign,
            retrained=retrained, certified=found.done & checking,
        )  # fmt: skip

    def _local(self, x: np.ndarray, sign: float) -> DeletionCounterfactualSet:
        points, plain = np.full_like(x, np.nan), np.full_like(x, np.nan)
        score, planes = np.full(len(x), np.nan), np.zeros(len(x), dtype=np.int64)
        rows = [np.zeros(0, dtype=np.int64)] * len(x)
        ridge = np.full(x.shape[1] + 1, self.damping)
        for i, query in enumerate(x):
            w = self.surrogate_.weights(query)
            if w is None:
                continue
            table = LogisticInfluence(self.X_, self.y_, w, ridge, damping=self.damping)
            found = self._solve(query[None], w, table.directions(self.influence), self.k_, sign)
            near = self._solve(query[None], w, table.directions(self.influence), 0, sign)
            both = np.concatenate([found.points, near.points])
            there = np.asarray(np.isfinite(both).all(axis=1))
            kept = there & (self.surrogate_.accepts(np.where(there[:, None], both, query)) == (sign > 0))
            planes[i] = found.planes[0]
            if kept[0]:
                points[i], score[i], rows[i] = both[0], sign * found.score[0], found.rows[0]
            if kept[1]:
                plain[i] = both[1]
        return self._result(x, points, plain, score, rows, planes, sign)

    def _network(self, x: np.ndarray, sign: float) -> DeletionCounterfactualSet:
        def robust(k: int) -> np.ndarray:
            return search(x, self._worst_of_network(x, k, sign), sign * self.threshold, self.feasible_)

        points, plain = robust(self.k_), robust(0)
        there = np.asarray(np.isfinite(points).all(axis=1))
        score, rows = np.full(len(x), np.nan), [np.zeros(0, dtype=np.int64)] * len(x)
        if there.any():
            found = self.network_.rows_at(points[there], self.k_, sign)
            score[there] = self.network_.score(points[there], found)
            for i, deleted in zip(np.flatnonzero(there), found, strict=True):
                rows[i] = deleted
        return self._result(x, points, plain, score, rows, np.where(there, 1, 0), sign)

    def _worst_of_network(
        self, x: np.ndarray, k: int, sign: float
    ) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        fixed = self.network_.rows_at(x, k, sign) if self.worst_set == "at-factual" else None

        def worst(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = self.network_.rows_at(points, k, sign) if fixed is None else fixed
            value, slope = self.network_.value_and_slope(points, rows)
            return sign * value, sign * slope

        return worst

    def _result(
        self,
        x: np.ndarray,
        points: np.ndarray,
        plain: np.ndarray,
        score: np.ndarray,
        rows: list[np.ndarray],
        planes: np.ndarray,
        sign: float,
        *,
        retrained: np.ndarray | None = None,
        certified: np.ndarray | None = None,
    ) -> DeletionCounterfactualSet:
        never = np.zeros(len(x), dtype=bool)
        there = np.asarray(np.isfinite(points).all(axis=1))
        reaches = np.where(there, sign * (np.where(there, score, 0.0) - self.threshold) >= -1e-7, False)
        return DeletionCounterfactualSet(
            points, self.feasible_.cost(points - x, self.norm), self.feasible_.cost(plain - x, self.norm),
            score, rows, planes, np.zeros(len(x), dtype=np.int64) if retrained is None else retrained,
            never if certified is None else certified & there, reaches, self.k_,
        )  # fmt: skip


def _only(w: np.ndarray) -> Any:
    """The oracle of a single plane."""

    def worst(points: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        nobody = [np.zeros(0, dtype=np.int64)] * len(points)
        return np.full(len(points), np.inf), np.broadcast_to(w, (len(points), len(w))), nobody

    return worst
