"""Optimal transport between two labelled sets of rows, with its dual potentials."""

__all__ = ["Transport", "dataset_transport", "label_distances", "mix_gradient"]

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from theodolite.core.errors import DataError, InputError, require
from theodolite.core.memory import chunks

_CLASS_ROWS = 100
_EXACT_CELLS = 2000 * 2000
_DENSE_BYTES = 4e9
_TIMED_CELLS, _TIMED_ROWS, _LONG_SECONDS = 100_000, 200, 10.0
_GAP = 1e-6
_MARGINAL = 1e-3
_ROUNDS = 2000


@dataclass(frozen=True, eq=False)
class Transport:
    """A distance and the dual potentials that prove it.

    source_potentials (N,), target_potentials (M,): how the value moves with the mass of a point, up to a constant. gap:
    relative difference of primal and dual (exact), or the L1 error of the marginals (Sinkhorn); converged where it is small.
    """

    value: float
    source_potentials: Float[np.ndarray, " source"]
    target_potentials: Float[np.ndarray, " target"]
    solver: str
    converged: bool
    gap: float


def dataset_transport(
    X: Any,
    y: Any,
    X_val: Any,
    y_val: Any,
    *,
    lambda_x: float = 1.0,
    lambda_y: float = 1.0,
    power: float = 2,
    label_distance: str = "exact",
    label_reference: str = "validation",
    solver: str = "auto",
    reg: float = 1e-2,
    weights: Any = None,
    allow_unconverged: bool = False,
) -> Transport:
    """Transport distance from rows X (N, p) with labels y to X_val (M, p), y_val, in the units of cost: distance^power.

    label_reference: "validation" takes both classes of a pair from X_val, so that wrong labels in y count and equal labels
    cost nothing (a label that X_val lacks is taken from X); "pooled", as published, takes the source's class from X. For values
    instead of classes set lambda_y = 0. weights (N,): mass of each source row, scaled to sum to 1. solver "auto" is exact up to
    4 million pairs of rows, else Sinkhorn made unbiased (OT(D, D) = 0), in blocks where the cost is above 4 GB. reg is in units
    of the mean cost.

    Raises InputError for sets that do not fit together, and where Sinkhorn does not converge unless allow_unconverged.

    Source: Kang et al., 2023, arXiv:2307.02460, section 3; the label distance is Alvarez-Melis and Fusi, 2020, arXiv:2002.02923.

    >>> x = np.array([[0.0], [1.0]])
    >>> dataset_transport(x, [0, 1], x + 3, [0, 1], lambda_y=0).value
    9.0
    """
    X, X_val = as_rows(X, "X"), as_rows(X_val, "X_val")
    labels, labels_val = np.asarray(y), np.asarray(y_val)
    _check_pair(X, labels, X_val, labels_val)
    if not (lambda_x >= 0 and lambda_y >= 0 and lambda_x + lambda_y > 0 and power >= 1 and reg > 0):
        raise InputError(
            f"need lambda_x, lambda_y >= 0 and not both 0, power >= 1, reg > 0; got {lambda_x}, {lambda_y}, {power}, {reg}"
        )
    if solver not in ("auto", "exact", "sinkhorn"):
        raise InputError(f"the solver is 'auto', 'exact' or 'sinkhorn', got {solver!r}")
    mass = as_mass(weights, len(X))
    if lambda_y > 0:
        check_labels(labels, labels_val)
    else:
        labels, labels_val = np.zeros(len(X)), np.zeros(len(X_val))
    spaces = _LabelTables(X, labels, X_val, labels_val, label_distance, label_reference, power, lambda_y > 0)
    cells = len(X) * len(X_val)
    if solver == "exact" and cells * 8 > _DENSE_BYTES:
        raise InputError(
            f"an exact solution needs {cells * 8 / 1e9:.0f} GB for the costs; the most is 4. Use solver='sinkhorn', or fewer rows"
        )

    def pair(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], table: np.ndarray) -> "_Cost":
        return _Cost(*a, *b, lambda_x, lambda_y * table, power)

    source, target = (X, spaces.source), (X_val, spaces.target)
    across = pair(source, target, spaces.across)
    if solver == "exact" or (solver == "auto" and cells <= _EXACT_CELLS):
        cost = across.rows(slice(None))
        warn_of_seconds(exact_seconds(cost, len(X)), f"the exact transport of {len(X):,} to {len(X_val):,} rows")
        return exact_transport(cost, mass)
    within_source, within_target = spaces.within()
    within = pair(source, source, within_source), pair(target, target, within_target)
    return _debiased(across, *within, mass, reg, allow_unconverged)


def label_distances(
    X: Any,
    y: Any,
    X2: Any,
    y2: Any,
    method: str = "exact",
    *,
    power: float = 2,
) -> Float[np.ndarray, "label label2"]:
    """W_q^q between the rows of each class of y and of each class of y2, (K, K2); classes in sorted order, q = power.

    "exact" takes at most 100 rows of a class, spread evenly over its rows; "gaussian" is the closed form for normal
    distributions (Bures), for q = 2 only.

    >>> x = np.array([[0.0], [2.0]])
    >>> label_distances(x, [0, 1], x, [0, 1]).tolist()
    [[0.0, 4.0], [4.0, 0.0]]
    """
    if method not in ("exact", "gaussian"):
        raise InputError(f"the label distance is 'exact' or 'gaussian', got {method!r}")
    if method == "gaussian" and power != 2:
        raise InputError(f"the Gaussian label distance is known for power 2 only, got {power}")
    X, X2 = as_rows(X, "X"), as_rows(X2, "X2")
    labels, labels2 = np.asarray(y), np.asarray(y2)
    _check_pair(X, labels, X2, labels2)
    one, two = ([rows[of == label] for label in np.unique(of)] for rows, of in ((X, labels), (X2, labels2)))
    if method == "gaussian":
        first, second = [_moments(rows) for rows in one], [_moments(rows) for rows in two]
        return np.array([[_bures(a, b) for b in second] for a in first])
    same = X is X2 and np.array_equal(labels, labels2)
    out = np.zeros((len(one), len(two)))
    one, two = [_thinned(rows) for rows in one], [_thinned(rows) for rows in two]
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            if same and j <= i:
                out[i, j] = out[j, i]
                continue
            cost = distances(a, b, power)
            out[i, j] = exact_transport(cost, np.full(len(a), 1 / len(a))).value
    return out


def mix_gradient(
    potentials: Float[np.ndarray, " row"],
    source: Int[np.ndarray, " row"],
    weights: Float[np.ndarray, " row"],
    n_sources: int,
) -> Float[np.ndarray, " source"]:
    """Derivative of the distance as each source gains mass and the others lose it in proportion to what they have.

        dOT / dp_i = mean of f over source i - mean of f over all other rows

    weights (n,): mass of each row; the means are weighted by it. Duals are known up to a constant, which cancels.

    Source: Kang et al., 2023, arXiv:2307.02460, section 4.

    >>> mix_gradient(np.array([1.0, 3.0, 6.0]), np.array([0, 0, 1]), np.ones(3), 2).tolist()
    [-4.0, 4.0]
    """
    mass = np.bincount(source, weights=weights, minlength=n_sources)
    total = np.bincount(source, weights=weights * potentials, minlength=n_sources)
    if n_sources < 2 or not (mass > 0).all():
        raise InputError("the gradient needs at least two sources, each with rows of positive weight")
    return total / mass - (total.sum() - total) / (mass.sum() - mass)


def as_rows(X: Any, name: str) -> np.ndarray:
    """X as finite float64 (n, p)."""
    rows = np.asarray(X, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise DataError(f"{name} must have the shape (rows, features) with at least one row, got {rows.shape}")
    if not np.isfinite(rows).all():
        raise DataError(f"{name} holds NaN or infinite values; fill them in or leave the rows out")
    return rows


def as_mass(weights: Any, n: int) -> Float[np.ndarray, " source"]:
    """Weights that sum to 1 in float64; uniform where None."""
    if weights is None:
        return np.full(n, 1 / n)
    mass = np.asarray(weights, dtype=np.float64)
    if mass.shape != (n,) or not np.isfinite(mass).all() or (mass < 0).any() or mass.sum() <= 0:
        raise InputError(
            f"weights must be {n} numbers of at least 0 that are not all 0, got an array of shape {mass.shape}"
        )
    return mass / mass.sum()


def distances(a: np.ndarray, b: np.ndarray, power: float) -> Float[np.ndarray, "row row2"]:
    """Euclidean distance^power of every pair of rows; the squares by one matrix product."""
    if power == 2:
        centre = b.mean(axis=0)  # rows far from 0 lose digits otherwise
        a, b = a - centre, b - centre
        squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * a @ b.T
        return np.maximum(squared, 0.0)
    return cdist(a, b) ** power


def exact_transport(cost: Float[np.ndarray, "source target"], mass: Float[np.ndarray, " source"]) -> Transport:
    """Network simplex from ``mass`` to the uniform distribution; rows without mass get the potential they would enter with."""
    ot = require("ot", "data")
    n_target = cost.shape[1]
    target = np.full(n_target, 1 / n_target)
    used = mass > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it warns of shows in the gap
        value, log = ot.emd2(mass[used], target, np.ascontiguousarray(cost[used]), numItermax=5_000_000, log=True)
    f, g = np.empty(len(mass)), np.asarray(log["v"], dtype=np.float64)
    f[used] = log["u"]
    f[~used] = (cost[~used] - g).min(axis=1) if not used.all() else 0.0
    value = float(value)
    dual = float(mass[used] @ f[used] + target @ g)
    slack = float((cost[used] - f[used][:, None] - g).min())  # below 0 where the potentials prove nothing
    scale = max(abs(value), 1e-12 * float(cost.max()), 1e-300)
    gap = (abs(value - dual) + max(0.0, -slack)) / scale
    return Transport(value, f, g, "exact", bool(log["warning"] is None and gap < _GAP), float(gap))


def exact_seconds(cost: Float[np.ndarray, "source target"], n: int) -> float:
    """Forecast of the seconds of an exact solution for n rows with costs like these to the same targets; 0 for small ones.

    Up to 200 of the rows and of the targets, evenly spread, are solved and timed. Measured from 100 x 100
    to 6,000 x 400 rows, the time grows with n m sqrt(n + m); the forecast is right within a factor of about 2.
    """
    m = cost.shape[1]
    if n * m < _TIMED_CELLS:
        return 0.0
    a, b = (np.linspace(0, k - 1, min(k, _TIMED_ROWS)).astype(np.int64) for k in cost.shape)
    part = cost[np.ix_(a, b)]
    start = time.process_time()
    exact_transport(part, np.full(len(a), 1 / len(a)))
    seconds = time.process_time() - start
    return seconds * (n * m * math.sqrt(n + m)) / (len(a) * len(b) * math.sqrt(len(a) + len(b)))


def warn_of_seconds(seconds: float, what: str) -> None:
    """Say before the work starts that it will take long."""
    if seconds >= _LONG_SECONDS:
        warnings.warn(f"{what} will take about {seconds:,.0f} seconds; fewer rows take less", UserWarning, stacklevel=3)


def _check_pair(X: np.ndarray, y: np.ndarray, X2: np.ndarray, y2: np.ndarray) -> None:
    if X.shape[1] != X2.shape[1]:
        raise InputError(f"both sets need the same features, got {X.shape[1]} and {X2.shape[1]} columns")
    if y.shape != (len(X),) or y2.shape != (len(X2),):
        raise InputError(f"need one label a row, got {y.shape} for {len(X)} rows and {y2.shape} for {len(X2)} rows")


def check_labels(y: np.ndarray, y2: np.ndarray) -> None:
    """Raise where labels are missing, or are texts in one set and numbers in the other, so that none could be equal."""
    missing = int(pd.isna(y).sum() + pd.isna(y2).sum())
    if missing:
        raise DataError(f"{missing} rows have no label (NaN or None); fill them in or leave the rows out")
    if len({one.dtype.kind in "US" for one in (y, y2) if one.dtype.kind != "O"}) == 2:
        raise InputError(
            f"labels are texts in one set and numbers in the other ({y.dtype} and {y2.dtype}); write them alike"
        )


def _thinned(rows: np.ndarray) -> np.ndarray:
    if len(rows) <= _CLASS_ROWS:
        return rows
    return rows[np.linspace(0, len(rows) - 1, _CLASS_ROWS).round().astype(np.int64)]


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centred = rows - rows.mean(axis=0)
    return rows.mean(axis=0), centred.T @ centred / max(1, len(rows) - 1)


def _bures(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    values, vectors = np.linalg.eigh(a[1])
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b[1] @ root), 0.0)).sum()
    return float(max(0.0, ((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * cross))


class _LabelTables:
    """Distances between labels as the costs look them up, and the place of each row's label in them."""

    def __init__(
        self,
        X: np.ndarray,
        y: np.ndarray,
        X_val: np.ndarray,
        y_val: np.ndarray,
        method: str,
        reference: str,
        power: float,
        wanted: bool,
    ) -> None:
        if reference not in ("validation", "pooled"):
            raise InputError(f"the label reference is 'validation' or 'pooled', got {reference!r}")
        names, self.source = np.unique(y, return_inverse=True)
        names_val, self.target = np.unique(y_val, return_inverse=True)
        self._pooled: tuple[Any, ...] | None = None
        if not wanted:
            self.across = np.zeros((1, 1))
            return
        if np.issubdtype(names.dtype, np.floating) and len(names) > max(20, len(y) // 2):
            raise InputError(f"{len(names)} different labels for {len(y)} rows look like values; set lambda_y=0")
        if reference == "pooled":
            self.across = label_distances(X, y, X_val, y_val, method, power=power)
            self._pooled = X, y, X_val, y_val, method, power
            return
        absent = ~np.isin(y, names_val)
        rows, labels = np.concatenate([X_val, X[absent]]), np.concatenate([y_val, y[absent]])
        known = np.unique(labels)
        self.across = label_distances(rows, labels, rows, labels, method, power=power)
        self.source, self.target = np.searchsorted(known, y), np.searchsorted(known, y_val)

    def within(self) -> tuple[np.ndarray, np.ndarray]:
        """Tables of the labels of each set with themselves, which only the Sinkhorn solver needs."""
        if self._pooled is None:
            return self.across, self.across
        X, y, X_val, y_val, method, power = self._pooled
        return (
            label_distances(X, y, X, y, method, power=power),
            label_distances(X_val, y_val, X_val, y_val, method, power=power),
        )


@dataclass(frozen=True, eq=False)
class _Cost:
    """Costs between two sets, made row block by row block."""

    x: np.ndarray
    label: np.ndarray
    x2: np.ndarray
    label2: np.ndarray
    lambda_x: float
    table: np.ndarray
    power: float

    def rows(self, part: slice) -> Float[np.ndarray, "row row2"]:
        """Costs of the rows in ``part``."""
        cost = self.lambda_x * distances(self.x[part], self.x2, self.power)
        cost += self.table[self.label[part]][:, self.label2]
        return cost

    def blocks(self) -> Callable[[], Any]:
        """A function that goes over (slice, costs): kept whole up to 4 GB, made anew each time above."""
        width = len(self.x2) * 8.0
        if len(self.x) * width <= _DENSE_BYTES:
            whole = self.rows(slice(None))
            return lambda: iter([(slice(None), whole)])
        return lambda: ((part, self.rows(part)) for part in chunks(len(self.x), 4 * width))


def _sinkhorn(cost: _Cost, mass: np.ndarray, target: np.ndarray, reg: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Potentials in the log domain, with the regularisation lowered by halves, and the L1 error of the marginals."""
    over = cost.blocks()
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(mass), np.log(target)
    f, g = np.zeros(len(mass)), np.zeros(len(target))
    mean = float(np.mean([block.mean() for _, block in over()])) or 1.0
    steps = max(0, math.ceil(math.log2(1 / reg)))
    error = math.inf
    for eps in [mean * max(reg, 2.0**-k) for k in range(steps + 1)]:
        for step in range(_ROUNDS if eps <= mean * reg else 10):
            sums, column = [], np.full(len(g), -np.inf)
            for part, block in over():
                old = f[part]
                f[part] = -eps * logsumexp((g - block) / eps + log_b, axis=1)
                sums.append(np.abs(mass[part] * np.expm1(np.clip((old - f[part]) / eps, -50, 50))))
                column = np.logaddexp(
                    column, logsumexp((f[part][:, None] - block) / eps + log_a[part][:, None], axis=0)
                )
            g = -eps * column
            error = float(np.concatenate(sums).sum())
            if step > 1 and error < _MARGINAL / 10:
                break
    return f, g, error


def _symmetric(cost: _Cost, mass: np.ndarray, reg: float) -> tuple[np.ndarray, float]:
    """The one potential of the transport of a set to itself, by averaged steps, which converge fast."""
    over = cost.blocks()
    with np.errstate(divide="ignore"):
        log_a = np.log(mass)
    f = np.zeros(len(mass))
    error = math.inf
    for _ in range(_ROUNDS):
        new = np.empty_like(f)
        for part, block in over():
            new[part] = -reg * logsumexp((f - block) / reg + log_a, axis=1)
        error = float(np.abs(mass * np.expm1(np.clip((f - new) / reg, -50, 50))).sum())
        f = (f + new) / 2
        if error < _MARGINAL / 10:
            break
    return f, error


def _debiased(across: _Cost, source: _Cost, target: _Cost, mass: np.ndarray, reg: float, allow: bool) -> Transport:
    """OT_reg(a, b) - OT_reg(a, a) / 2 - OT_reg(b, b) / 2, whose gradient in a is f_ab - f_aa."""
    uniform = np.full(len(across.x2), 1 / len(across.x2))
    f, g, error = _sinkhorn(across, mass, uniform, reg)
    mean = float(np.mean([block.mean() for _, block in across.blocks()()])) or 1.0
    f_self, error_source = _symmetric(source, mass, reg * mean)
    g_self, error_target = _symmetric(target, uniform, reg * mean)
    gap = max(error, error_source, error_target)
    if gap > _MARGINAL and not allow:
        raise InputError(
            f"Sinkhorn did not converge in {_ROUNDS} rounds (marginals off by {gap:.2g}); raise reg above {reg}, or take the "
            "result as it is with allow_unconverged=True"
        )
    f, g = f - f_self, g - g_self
    return Transport(float(mass @ f + uniform @ g), f, g, "sinkhorn", gap <= _MARGINAL, gap)
