"""The nearest point inside a convex set that is known by its worst half-space: cutting planes and exact projections."""

__all__ = ["CutResult", "Feasible", "cut", "nearest", "robust_to_weight_box"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog, nnls

from theodolite.explanations.table_schema import TableSchema

MARGIN = 1e-9
"""How far above the threshold a plane is met, in logits, so that rounding does not leave a point just below it."""

_RELAXATIONS = 200

Worst = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, list[np.ndarray]]]
"""(points (m, d), index of each query (m,)) -> worst score (m,), weights that give it (m, d + 1), the deleted rows."""


@dataclass(frozen=True, eq=False)
class Feasible:
    """What a counterfactual may change: low and high (d,) in any case, may_fall and may_rise (d,), one-hot groups,
    and the costs (d,) of a change.

    The same limits as in `theodolite.explanations.table_schema.TableSchema`, but for the range of the training rows, which is
    no limit here: the nearest robust point of a linear model often lies outside.
    """

    low: np.ndarray
    high: np.ndarray
    may_fall: np.ndarray
    may_rise: np.ndarray
    costs: np.ndarray
    groups: tuple[tuple[int, ...], ...] = ()
    absent: tuple[int, ...] = ()

    @classmethod
    def everything(cls, d: int) -> "Feasible":
        """Nothing is held."""
        return cls(np.full(d, -np.inf), np.full(d, np.inf), np.ones(d, dtype=bool), np.ones(d, dtype=bool), np.ones(d))

    @classmethod
    def of(cls, schema: TableSchema) -> "Feasible":
        """The limits of a table; a row is not moved to a member of a one-hot group that no training row has."""
        low, high = schema.floor.copy(), schema.ceiling.copy()
        members = [column for group in schema.groups for column in group]
        low[members] = np.maximum(low[members], 0.0)
        high[members] = np.minimum(high[members], 1.0)
        fall, rise = ~(schema.immutable | schema.increasing), ~(schema.immutable | schema.decreasing)
        return cls(low, high, fall, rise, schema.costs, schema.groups, tuple(sorted(schema.absent)))

    def cost(self, change: np.ndarray, norm: int = 2) -> Any:
        """L1 or L2 cost of changes (..., d): an array, or a number of one change (d,)."""
        return np.linalg.norm(change * self.costs, ord=norm, axis=-1)

    @property
    def open(self) -> bool:
        """Whether nothing is held."""
        free = self.may_fall.all() and self.may_rise.all() and not self.groups
        return bool(free and np.isinf(self.low).all() and np.isinf(self.high).all())

    def around(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest values that each row of x (..., d) may take; lowest above highest where it may not be at all."""
        low = np.where(self.may_fall, self.low, np.maximum(self.low, x))
        high = np.where(self.may_rise, self.high, np.minimum(self.high, x))
        columns = list(self.absent)
        high[..., columns] = np.minimum(high[..., columns], x[..., columns])
        return low, high


def nearest(
    x: np.ndarray, planes: np.ndarray, threshold: float, feasible: Feasible, norm: int = 2
) -> np.ndarray | None:
    """The point nearest to x (d,) where (point, 1) . plane >= threshold for all planes (q, d + 1); None where there is none.

    norm 2: least-distance programming as a non-negative least-squares problem (Lawson and Hanson, 1974); norm 1: a linear
    program; each column's change counts times its cost. For one plane w, nothing held and costs 1 it is
    x + (threshold - f(x)) w / |w|^2. With one-hot groups by branch and bound
    over their members, likeliest first: the nearest where its 200 relaxations suffice, otherwise the nearest found.
    """
    low, high = feasible.around(x)
    if (low > high).any():
        return None
    if feasible.open and norm == 2 and len(planes) == 1:
        slope, gap = planes[0, :-1], threshold - planes[0, :-1] @ x - planes[0, -1]
        slope = slope / feasible.costs**2
        size = float(planes[0, :-1] @ slope)
        if gap <= 0:
            return x.copy()
        return None if size == 0 else x + gap / size * slope
    best, least, left = None, np.inf, _RELAXATIONS
    waiting = [(low, high)]
    while waiting and left:
        low, high = waiting.pop()
        left -= 1
        point = _inside(x, planes, threshold, low, high, feasible, norm)
        if point is None or feasible.cost(point - x, norm) >= least - 1e-9:
            continue
        held = low == high
        unsettled = [list(group) for group in feasible.groups if not held[list(group)].all()]
        if not unsettled:
            best, least = point, float(feasible.cost(point - x, norm))
            continue
        most = [float(point[group].max()) for group in unsettled]
        widest = unsettled[int(np.argmin(most))]
        if min(most) > 1 - 1e-7:  # every group is one-hot already, up to rounding
            waiting.append(_settled(point, low, high, unsettled))
            continue
        for member in np.array(widest)[np.argsort(point[widest], kind="stable")]:
            if high[member] > 0:
                waiting.append(_settled(np.eye(len(x))[member], low, high, [widest]))
    return best


def _settled(
    point: np.ndarray, low: np.ndarray, high: np.ndarray, groups: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The limits with each of these groups held at its largest member of ``point``."""
    low, high = low.copy(), high.copy()
    for group in groups:
        low[group] = high[group] = 0.0
        chosen = group[int(point[group].argmax())]
        low[chosen] = high[chosen] = 1.0
    return low, high


def _inside(
    x: np.ndarray,
    planes: np.ndarray,
    threshold: float,
    low: np.ndarray,
    high: np.ndarray,
    feasible: Feasible,
    norm: int,
) -> np.ndarray | None:
    """`nearest` within low and high (d,), where the members of a group sum to 1 but need not be 0 or 1."""
    free, found = low < high, np.clip(x, low, high)
    found[free] = x[free]
    sums, costs = np.zeros((len(feasible.groups), len(x))), feasible.costs[free]
    for row, group in zip(sums, feasible.groups, strict=True):
        row[list(group)] = 1.0
    slopes = np.vstack([planes[:, :-1], sums, -sums])
    wanted = np.concatenate([threshold - planes[:, -1], np.ones(len(sums)), -np.ones(len(sums))])
    gaps = wanted - slopes @ found
    if not free.any():
        return found if (gaps <= 1e-9).all() else None
    below, above = (low[free] - x[free]) * costs, (high[free] - x[free]) * costs  # in units of cost
    change = (_least_squares if norm == 2 else _least_sum)(slopes[:, free] / costs, gaps, below, above)
    if change is None:
        return None
    found[free] = np.clip(x[free] + change / costs, low[free], high[free])
    return found


def _least_squares(a: np.ndarray, r: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray | None:
    """argmin |v|_2 with a v >= r and below <= v <= above."""
    d = a.shape[1]
    lower, upper = np.isfinite(below), np.isfinite(above)
    rows = np.vstack([a, np.eye(d)[lower], -np.eye(d)[upper]])
    right = np.concatenate([r, below[lower], -above[upper]])
    size = np.linalg.norm(rows, axis=1)
    if (right[size == 0] > 0).any():
        return None
    rows, right = rows[size > 0] / size[size > 0, None], right[size > 0] / size[size > 0]
    if not len(rows) or right.max() <= 0:
        return np.zeros(d)
    unit = right.max()  # v and r are measured in the largest distance to a plane, a lower bound of |v|
    dual = np.vstack([rows.T, right / unit])
    target = np.zeros(d + 1)
    target[-1] = 1
    weights, _ = nnls(dual, target, maxiter=50 * len(rows) + 200)
    residual = dual @ weights - target
    if -residual[-1] <= 1e-10:
        return None
    active = weights > 0
    change = -residual[:-1] / residual[-1] * unit
    # the active planes hold with equality; solving for them directly gives the last digits
    polished = np.linalg.lstsq(rows[active], right[active], rcond=None)[0]
    if (rows @ polished >= right - 1e-12).all() and np.linalg.norm(polished) <= np.linalg.norm(change) + 1e-9:
        return polished
    return change


def _least_sum(a: np.ndarray, r: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray | None:
    """argmin |v|_1 with a v >= r and below <= v <= above, as v = up - down."""
    if (r <= 0).all() and (below <= 0).all() and (above >= 0).all():
        return np.zeros(a.shape[1])
    limits = [(max(0.0, b), max(0.0, t)) for b, t in zip(below, above, strict=True)]
    limits += [(max(0.0, -t), max(0.0, -b)) for b, t in zip(below, above, strict=True)]
    found = linprog(np.ones(2 * a.shape[1]), A_ub=np.hstack([-a, a]), b_ub=-r, bounds=limits, method="highs")
    if not found.success:
        return None
    return found.x[: a.shape[1]] - found.x[a.shape[1] :]


@dataclass(frozen=True, eq=False)
class CutResult:
    """points (m, d), NaN where there is none; score (m,): the worst there; planes (m,) used; done (m,): it reaches."""

    points: np.ndarray
    score: np.ndarray
    rows: list[np.ndarray]
    planes: np.ndarray
    done: np.ndarray


def cut(
    x: np.ndarray,
    start: np.ndarray,
    worst: Worst,
    threshold: float,
    feasible: Feasible,
    *,
    norm: int = 2,
    max_planes: int = 100,
    confirm: Callable[[int, np.ndarray, np.ndarray], np.ndarray | None] | None = None,
) -> CutResult:
    """Nearest points to x (m, d) whose worst score reaches the threshold, by cutting planes, all queries in step.

    start: (d + 1,) the first plane of every query. worst: see `Worst`. confirm(query, rows, point) is asked where the worst
    score is reached and gives one more plane where the point still fails, or None.
    """
    m = len(x)
    points, score, done = x.astype(np.float64).copy(), np.full(m, np.nan), np.zeros(m, dtype=bool)
    planes = [[start] for _ in range(m)]
    rows: list[np.ndarray] = [np.zeros(0, dtype=np.int64) for _ in range(m)]
    active = np.arange(m)
    while len(active):
        for i in active:
            found = nearest(x[i], np.stack(planes[i]), threshold + MARGIN, feasible, norm)
            points[i] = np.nan if found is None else found
        active = active[np.isfinite(points[active]).all(axis=1)]
        if not len(active):
            break
        found_score, weights, deleted = worst(points[active], active)
        still = []
        for j, i in enumerate(active):
            score[i], rows[i] = found_score[j], deleted[j]
            plane = weights[j] if found_score[j] < threshold else None
            if plane is None and confirm is not None:
                plane = confirm(int(i), deleted[j], points[i])
            if plane is None:
                done[i] = True
            elif len(planes[i]) < max_planes:
                planes[i].append(plane)
                still.append(i)
        active = np.array(still, dtype=np.int64)
    lost = ~np.asarray(np.isfinite(points).all(axis=1))
    score[lost] = np.nan
    for i in np.flatnonzero(lost):
        rows[i] = np.zeros(0, dtype=np.int64)
    return CutResult(points, score, rows, np.array([len(p) for p in planes]), done)


def robust_to_weight_box(x: np.ndarray, w: np.ndarray, delta: float, threshold: float = 0.0) -> np.ndarray:
    """Nearest point to x (d,) that stays accepted when every weight of w (d + 1,) may move by delta: what ROAR asks for.

        min |x' - x|_2  with  (x', 1) . w - delta (|x'|_1 + 1) >= threshold

    By its dual: x' = soft(x + m w, m delta) for the smallest multiplier m >= 0 that satisfies the constraint. NaN where none
    does (every |w_j| <= delta).

    Source: Upadhyay, Joshi, Lakkaraju, 2021, arXiv:2102.13620.
    """
    slopes, level = w[:-1], threshold - w[-1] + delta

    def at(m: float) -> np.ndarray:
        moved = x + m * slopes
        return np.sign(moved) * np.maximum(np.abs(moved) - m * delta, 0)

    def short(point: np.ndarray) -> float:
        return level - float(slopes @ point - delta * np.abs(point).sum())

    if short(x) <= 0:
        return x.astype(np.float64).copy()
    low, high = 0.0, 1.0
    while short(at(high)) > 0:
        low, high = high, 2 * high
        if high > 1e12:
            return np.full(len(x), np.nan)
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if short(at(middle)) > 0 else (low, middle)
    return at(high)
