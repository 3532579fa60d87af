"""Networks under deletion: influence on the last layer or on all weights, a local linear stand-in, and the search in them."""

__all__ = ["LocalSurrogate", "NetworkScore", "search"]

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.errors import ModelError
from theodolite.core.influence import ExactRetrainer, LogisticInfluence
from theodolite.core.memory import DEFAULT_BUDGET, chunks
from theodolite.core.view import ModelView, evaluation_mode
from theodolite.explanations.deletion_robust.linear import smallest
from theodolite.explanations.deletion_robust.solver import MARGIN, Feasible

_STEPS = 60
_BISECTIONS = 40
_STRETCH = (1.0, 1.02, 1.1, 1.3, 1.7, 2.5, 5.0)


def _of_two(chances: Tensor) -> Tensor:
    """The probability of class 1 of two."""
    if chances.shape[1] != 2:
        raise ModelError(f"need a classifier of two classes; this one knows {chances.shape[1]}")
    return chances[:, 1]


def _one_logit(scores: Tensor) -> Tensor:
    """One score a row: the only one, or that of class 1 less that of class 0."""
    if scores.ndim == 1:
        return scores
    if scores.shape[1] > 2:
        raise ModelError(f"need a classifier of two classes; this one gives {scores.shape[1]} scores a row")
    return scores[:, 0] if scores.shape[1] == 1 else scores[:, 1] - scores[:, 0]


class NetworkScore:
    """The logit of a network as base(x) + features(x) . v, where v (q,) is what a deletion adds to the weights.

    route "last-layer": the features are what enters the last linear layer, which is all that a retraining changes.
    "gauss-newton": the features are the gradient of the logit by every weight. damping is put on all of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        x: np.ndarray,
        y: np.ndarray,
        route: str,
        damping: float,
        influence: str,
    ) -> None:
        self.model, self.route = model, route
        first = next(model.parameters(), torch.zeros(0))
        self._like = {"dtype": first.dtype, "device": first.device}
        rows = self._tensor(x)
        with evaluation_mode(model):
            if route == "last-layer":
                self._last = self._find_last(rows[:2])
                with torch.no_grad():
                    _, features = self._last_layer(rows)
                weights = self._head()
                table = LogisticInfluence(
                    features.double().cpu().numpy()[:, :-1], y, weights, np.full(len(weights), damping), damping=damping
                )
                directions = table.directions(influence)
            else:
                directions = self._gauss_newton(rows, y, damping, influence)
        self.directions = torch.as_tensor(directions, **self._like)

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(x), **self._like)

    def _find_last(self, rows: Tensor) -> nn.Linear:
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        if linear:
            self._last = linear[-1]
            with torch.no_grad():
                score, features = self._last_layer(rows)
            told = features.double() @ torch.as_tensor(self._head(), device=features.device)
            if score.shape == told.shape and torch.allclose(score.double(), told, rtol=1e-3, atol=1e-4):
                return self._last
        raise ModelError(
            "the route 'last-layer' needs a network whose answer is its last nn.Linear; take route='gauss-newton' or "
            "'local-linear'"
        )

    def _head(self) -> np.ndarray:
        slopes = self._last.weight.detach().double().cpu().numpy()
        bias = self._last.bias
        rows = np.column_stack(
            [slopes, np.zeros(len(slopes)) if bias is None else bias.detach().double().cpu().numpy()]
        )
        return rows[0] if len(rows) == 1 else rows[1] - rows[0]

    def _last_layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            score = _one_logit(self.model(x))
        finally:
            hook.remove()
        if not seen:
            return score, torch.zeros(len(x), 1, **self._like)
        inside = seen[-1].reshape(len(x), -1)
        return score, torch.cat([inside, torch.ones_like(inside[:, :1])], dim=1)

    def _all_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = dict[str, Tensor]((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

        def one(given: dict[str, Tensor], row: Tensor) -> Tensor:
            return _one_logit(cast(Tensor, torch.func.functional_call(self.model, given, (row[None],))))[0]

        found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(weights, x)
        return _one_logit(self.model(x)), torch.cat([found[name].reshape(len(x), -1) for name in weights], dim=1)

    def _gauss_newton(self, rows: Tensor, y: np.ndarray, damping: float, influence: str) -> np.ndarray:
        """d_i = (H + damping I)^-1 J_i (p_i - y_i) / n by the n x n system, since the weights outnumber the rows."""
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if 3 * 8 * count * len(rows) > DEFAULT_BUDGET:
            raise ModelError(
                f"the route 'gauss-newton' keeps {len(rows):,} x {count:,} gradients, more than 1 GiB; take route='last-layer'"
            )
        with torch.no_grad():
            score, features = self._all_weights(rows)
        j, n = features.double().cpu().numpy(), len(rows)
        p = 1 / (1 + np.exp(-score.double().cpu().numpy()))
        root = np.sqrt(p * (1 - p))
        gram = j @ j.T
        inner = root[:, None] * gram * root + n * damping * np.eye(n)
        solved = np.linalg.solve(inner, root[:, None] * gram)  # (n, n)
        # H^-1 J^T = (J^T - B^T inner^-1 B J^T) / damping with B = root J
        mixed = (np.eye(n) - root[:, None] * solved) / damping  # J^T mixed = H^-1 J^T
        scale = (p - y) / n
        if influence == "leverage":
            leverage = np.einsum("ij,ji->i", gram, mixed) * root**2 / n
            scale = scale / (1 - np.minimum(leverage, 1 - 1e-9))
        return (mixed * scale).T @ j

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logit (m,) and the features (m, q) of inputs, differentiable."""
        return self._last_layer(x) if self.route == "last-layer" else self._all_weights(x)

    def rows_at(self, x: np.ndarray, k: int, sign: float) -> np.ndarray:
        """The k rows (m, k) whose deletion moves each point's score against the sign most."""
        found = []
        with torch.no_grad(), evaluation_mode(self.model):
            for part in self._slices(len(x), k):
                _, features = self.parts(self._tensor(x[part]))
                found.append(smallest(sign * (features @ self.directions.T).double().cpu().numpy(), k))
        return np.concatenate(found)

    def score(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores (m,) of points after the deletion of each one's ``rows`` (m, k)."""
        return self.value_and_slope(x, rows)[0]

    def value_and_slope(self, x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same with the gradient by the inputs (m, d)."""
        values, slopes = np.empty(len(x)), np.empty(x.shape)
        with torch.enable_grad(), evaluation_mode(self.model):
            for part in self._slices(len(x), rows.shape[1]):
                inputs = self._tensor(x[part]).requires_grad_(True)
                moved = self.directions[torch.as_tensor(rows[part])].sum(dim=1)
                base, features = self.parts(inputs)
                value = base + (features * moved).sum(dim=1)
                (slope,) = torch.autograd.grad(value.sum(), inputs)
                values[part], slopes[part] = value.detach().double().cpu().numpy(), slope.double().cpu().numpy()
        return values, slopes

    def _slices(self, m: int, k: int) -> Iterator[slice]:
        """Slices of m points whose features, deleted rows' directions and scores by row fit the budget."""
        n, q = self.directions.shape
        return chunks(m, 8.0 * ((k + 6) * q + 3 * n))


def _onto(x: np.ndarray, slope: np.ndarray, gap: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Nearest points to x (m, d) in the limits with slope . (point - x) >= gap, by the multiplier; as far as they go."""
    slope = np.where(low < high, slope, 0.0)
    size = np.maximum((slope**2).sum(axis=1), 1e-30)
    if np.isinf(low).all() and np.isinf(high).all():
        return x + (np.maximum(gap, 0) / size)[:, None] * slope

    def at(m: np.ndarray) -> np.ndarray:
        return np.clip(x + m[:, None] * slope, low, high)

    def short(m: np.ndarray) -> np.ndarray:
        return gap - (slope * (at(m) - x)).sum(axis=1) > 0

    below, above = np.zeros(len(x)), np.maximum(gap, 0) / size
    for _ in range(30):
        above = np.where(short(above), 2 * above + 1e-12, above)
    for _ in range(60):
        middle = 0.5 * (below + above)
        miss = short(middle)
        below, above = np.where(miss, middle, below), np.where(miss, above, middle)
    return at(above)


def search(
    x: np.ndarray,
    worst: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    threshold: float,
    feasible: Feasible,
) -> np.ndarray:
    """Near points to x (m, d) with worst score >= threshold, NaN where none was found; worst gives scores and slopes.

    Projects x on the half-space that is tangent at the current point, again and again: a fixed point satisfies the first-order
    conditions of the nearest one. Then the point is moved along its ray from x to where it just reaches the threshold. The set
    is not convex, so a nearer point may exist. One-hot groups are free between 0 and 1 at first, then held at their largest
    member and, in another search, at the row's own; the nearer of the two points is taken.
    """
    low, high = feasible.around(x)
    found = _search(x, worst, threshold, low, high, feasible.costs)
    if not feasible.groups:
        return found
    best, least = np.full_like(x, np.nan), np.full(len(x), np.inf)
    for chosen in (np.where(np.isfinite(found), found, x), x):
        held_low, held_high = low.copy(), high.copy()
        for group in feasible.groups:
            columns = list(group)
            likely = np.where(high[:, columns] > 0, chosen[:, columns], -np.inf).argmax(axis=1)
            held_low[:, columns] = held_high[:, columns] = np.eye(len(columns))[likely]
        # a group that may not change, or whose member may not be there, cannot be held elsewhere
        held_low, held_high = np.maximum(held_low, low), np.minimum(held_high, high)
        point = _search(x, worst, threshold, held_low, held_high, feasible.costs)
        cost = np.where(np.isfinite(point[:, 0]), feasible.cost(point - x), np.inf)
        nearer = cost < least
        best[nearer], least[nearer] = point[nearer], cost[nearer]
    return best


def _search(
    x: np.ndarray,
    worst: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    threshold: float,
    low: np.ndarray,
    high: np.ndarray,
    costs: np.ndarray,
) -> np.ndarray:
    nowhere = np.asarray((low > high).any(axis=1))
    low, high = np.minimum(low, high), np.maximum(low, high)
    start = np.clip(x, low, high)
    value, slope = worst(start)
    here, reached = start, value >= threshold
    settled = reached | nowhere
    for step in range(_STEPS):
        if settled.all():
            break
        gap = threshold + MARGIN - value - (slope * (x - here)).sum(axis=1)
        aim = _onto(x * costs, slope / costs, gap, low * costs, high * costs) / costs  # the nearest in units of cost
        here = np.where(settled[:, None], here, here + (1.0 if step < 3 else 0.5) * (aim - here))
        value, slope = worst(here)
    span = here - x

    def on_ray(s: np.ndarray) -> np.ndarray:
        return np.clip(x + s[:, None] * span, low, high)

    near, far = np.zeros(len(x)), np.full(len(x), np.nan)
    for s in _STRETCH:
        ok = worst(on_ray(np.full(len(x), s)))[0] >= threshold
        far = np.where(np.isnan(far) & ok, s, far)
        near = np.where(np.isnan(far), s, near)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (near + np.nan_to_num(far))
        ok = worst(on_ray(middle))[0] >= threshold
        near, far = np.where(ok, near, middle), np.where(ok & ~np.isnan(far), middle, far)
    final = on_ray(np.nan_to_num(far))
    fine = ~np.isnan(far) & (worst(final)[0] >= threshold)
    best = np.where(reached[:, None], start, np.where(fine[:, None], final, np.nan))
    return np.where(nowhere[:, None], np.nan, best)


@dataclass(frozen=True, eq=False)
class LocalSurrogate:
    """A logistic regression fitted around each input on the sign of a model, in place of the model.

    Inputs are drawn around x with Gaussian noise of standard deviation 0.1, wider by 0.05 until both classes appear.
    """

    accepts: Callable[[np.ndarray], np.ndarray]
    draws: int = 10_000
    C: float = 1e4
    seed: int = 0

    @classmethod
    def of(cls, model: Any, threshold: float, seed: int) -> "LocalSurrogate":
        """The surrogate of a network, a fitted estimator with predict_proba, or a function from rows to logits."""
        if not isinstance(model, nn.Module) and hasattr(model, "predict_proba"):
            level, view = 1 / (1 + np.exp(-threshold)), ModelView(model, output="probability")
            return cls(lambda rows: _of_two(view(torch.as_tensor(rows))).cpu().numpy() >= level, seed=seed)
        if isinstance(model, nn.Module):
            view = ModelView(model, output="raw")
            first = next(model.parameters(), torch.zeros(0))
            return cls(
                lambda rows: (
                    _one_logit(view(torch.as_tensor(rows, dtype=first.dtype, device=first.device))).cpu().numpy()
                    >= threshold
                ),
                seed=seed,
            )
        if callable(model):
            return cls(lambda rows: np.asarray(model(rows)).ravel() >= threshold, seed=seed)
        raise ModelError(f"need a network, an estimator with predict_proba or a function, got {type(model).__name__}")

    def weights(self, x: np.ndarray) -> np.ndarray | None:
        """Weights (d + 1,) of the surrogate at x (d,); None where the other class was not found within 10 deviations."""
        rng = np.random.default_rng(self.seed)
        for width in np.arange(0.1, 10.0, 0.05):
            rows = x + width * rng.standard_normal((self.draws, len(x)))
            labels = self.accepts(rows).astype(np.int64)
            if 0 < labels.sum() < len(labels):
                return ExactRetrainer(rows, labels, self.C).weights
        return None
