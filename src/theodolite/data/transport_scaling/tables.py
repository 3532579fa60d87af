"""Sources, and the pilot tables of distances and scores over mixes that their samples allow."""

__all__ = ["PilotTable", "Pool", "Source", "make_table"]

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import clone, is_regressor
from sklearn.dummy import DummyClassifier
from sklearn.metrics import get_scorer

from theodolite.core.errors import InputError
from theodolite.core.parallel import seeds_for, spread
from theodolite.data.transport_scaling.mixes import count_rows
from theodolite.data.transport_scaling.transport import Transport, exact_transport


@dataclass(frozen=True, eq=False)
class Source:
    """A source of data: its pilot sample X (n, ...), y (n,), the cost of a row, and how many rows it can deliver (None: any)."""

    name: str
    X: Any
    y: Any
    cost: float = 1.0
    total: int | None = None


@dataclass(frozen=True, eq=False)
class PilotTable:
    """Mixes p (G, m) at one size: transport distance and score, medians over repetitions, and the repetitions (G, R)."""

    p: Float[np.ndarray, "mix source"]
    size: int
    transport: Float[np.ndarray, " mix"]
    score: Float[np.ndarray, " mix"]
    n_repeats: int
    transport_runs: Float[np.ndarray, "mix run"]
    score_runs: Float[np.ndarray, "mix run"]


@dataclass(frozen=True, eq=False)
class Pool:
    """All pilot rows in one array, with their source, and their costs to the validation rows that the distance is to."""

    X: np.ndarray
    y: np.ndarray
    source: Int[np.ndarray, " row"]
    cost: Float[np.ndarray, "row target"]
    X_val: np.ndarray
    y_val: np.ndarray

    def draw(self, p: np.ndarray, size: int, rng: np.random.Generator) -> Int[np.ndarray, " drawn"]:
        """Row numbers of ``size`` rows at mix p; with replacement only in a source that has too few."""
        parts = []
        for i, count in enumerate(count_rows(p, size).tolist()):
            rows = np.flatnonzero(self.source == i)
            parts.append(rng.permutation(rows)[:count] if count <= len(rows) else rng.choice(rows, count))
        return np.concatenate(parts)

    def distance(self, rows: np.ndarray) -> float:
        """Transport distance of a uniform sample of the pool."""
        return self.transport(rows, np.full(len(rows), 1 / len(rows))).value

    def transport(self, rows: np.ndarray, mass: np.ndarray) -> Transport:
        """Exact transport of rows of the pool with these masses; an error where the solver stopped short of the optimum."""
        solved = exact_transport(self.cost[rows], mass)
        if not solved.converged:
            raise InputError(
                f"the exact transport of {len(rows):,} rows stopped before the optimum (relative gap {solved.gap:.2g}); lower "
                "`sizes`, or leave out features with extreme values"
            )
        return solved


def regresses(estimator: Any) -> bool:
    """Whether it is a scikit-learn regressor; a function is not."""
    return hasattr(estimator, "fit") and is_regressor(estimator)


def train_and_score(
    estimator: Any, scoring: str, X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray
) -> float:
    """Score on the validation rows of the estimator trained on X, y; a constant answer where y has one class only."""
    if not hasattr(estimator, "fit"):
        score = float(estimator(X, y, X_val, y_val))
    else:
        one_class = not regresses(estimator) and len(np.unique(y)) == 1
        model: Any = DummyClassifier() if one_class else clone(estimator)
        try:
            score = float(get_scorer(scoring)(model.fit(X, y), X_val, y_val))
        except ValueError as error:
            raise InputError(f"training on {len(X)} rows or scoring with {scoring!r} failed: {error}") from error
    if not np.isfinite(score):
        raise InputError(f"training on {len(X)} rows gave the score {score}; scores must be finite")
    return score


def _cell(
    pool: Pool, estimator: Any, scoring: str, p: np.ndarray, size: int, n_repeats: int, seed: int
) -> Float[np.ndarray, "run 2"]:
    """Distance and score of each repetition of one mix."""
    rng = np.random.default_rng(seed)
    out = np.empty((n_repeats, 2))
    for run in range(n_repeats):
        rows = pool.draw(p, size, rng)
        score = train_and_score(estimator, scoring, pool.X[rows], pool.y[rows], pool.X_val, pool.y_val)
        out[run] = pool.distance(rows), score
    return out


def make_table(
    pool: Pool,
    estimator: Any | Callable[..., float],
    scoring: str,
    mixes: np.ndarray,
    size: int,
    n_repeats: int,
    *,
    seed: int,
    executor: Executor | int | None = None,
) -> PilotTable:
    """Train on every mix ``n_repeats`` times: G x R trainings."""
    seeds = seeds_for(seed, len(mixes))
    tasks = [(pool, estimator, scoring, p, size, n_repeats, one) for p, one in zip(mixes, seeds, strict=True)]
    runs = np.stack(spread(_cell, tasks, executor=executor))
    middle = np.median(runs, axis=1)
    return PilotTable(mixes, size, middle[:, 0], middle[:, 1], n_repeats, runs[:, :, 0], runs[:, :, 1])
