"""The best mix under a law: mirror ascent on the simplex, and the plain mixes that it is shown beside."""

__all__ = ["Baseline", "MixSelection", "baseline_mixes", "climb"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

_ITERATIONS = 100
_STEP = 0.5
_DECAY = 0.9
_STEEPEST = 2.0
_STILL = 1e-4
_LARGEST_SHAPLEY = 8

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Baseline:
    """A mix chosen in a plain way, and what the same law predicts for it."""

    p: Float[np.ndarray, " source"]
    predicted_score: float


@dataclass(frozen=True, eq=False)
class MixSelection:
    """The chosen mix p (m,), its predicted score, plain choices by name, and the path (T, m) of the search that found it."""

    p: Float[np.ndarray, " source"]
    predicted_score: float
    baselines: Mapping[str, Baseline]
    path: Float[np.ndarray, "step source"]


def climb(
    objective: Objective, start: Float[np.ndarray, " source"], allowed: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Exponentiated-gradient ascent: the best iterate and the path.

    objective(p) -> (value, gradient up to a constant). Steps are 0.5 * 0.9^t of the gradient divided by its mean size under p,
    no entry above 2, so that a source of hardly any share, whose slope can be steep, does not hold up the others.
    """
    p = allowed(start)
    best, best_value, path = p, -math.inf, [p]
    for t in range(_ITERATIONS):
        value, gradient = objective(p)
        if value > best_value:
            best, best_value = p, value
        gradient = gradient - p @ gradient
        size = p @ np.abs(gradient)
        if not size > 0:
            break
        moved = np.maximum(p, 1e-6) * np.exp(_STEP * _DECAY**t * np.clip(gradient / size, -_STEEPEST, _STEEPEST))
        moved = allowed(moved / moved.sum())
        still = np.abs(moved - p).max() < _STILL
        p = moved
        path.append(p)
        if still:
            break
    if objective(p)[0] > best_value:
        best = p
    return best, np.stack(path)


def baseline_mixes(
    predict: Callable[[np.ndarray], np.ndarray], mixes: np.ndarray, transport: np.ndarray, score: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Plain mixes by name; the values of sources are differences of predicted scores, so that no model is trained.

    mixes (G, m), transport (G,), score (G,): the pilot table at the larger size.
    """
    m = mixes.shape[1]
    whole = np.arange(m)

    def even(members: tuple[int, ...]) -> np.ndarray:
        return np.isin(whole, members) / len(members)

    uniform = even(tuple(range(m)))
    alone = predict(np.eye(m))
    chosen = {
        "uniform": uniform,
        "random": np.random.default_rng(seed).dirichlet(np.ones(m)),
        "best single source": np.eye(m)[int(alone.argmax())],
        "least distance": mixes[int(transport.argmin())],
        "best measured mix": mixes[int(score.argmax())],
    }
    if m > 2:
        without = predict(np.stack([even(tuple(j for j in range(m) if j != i)) for i in range(m)]))
        chosen["leave one out"] = _shares(predict(uniform[None])[0] - without, uniform)
    if m <= _LARGEST_SHAPLEY:
        groups = [group for size in range(1, m + 1) for group in combinations(range(m), size)]
        values: dict[tuple[int, ...], float] = dict(
            zip(groups, predict(np.stack([even(group) for group in groups])).tolist(), strict=True)
        )
        values[()] = min(alone.min(), 0.0)
        chosen["Shapley"] = _shares(_shapley(values, m), uniform)
    return chosen


def _shares(values: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Positive values as shares; where no source is worth anything, ``otherwise``."""
    kept = np.maximum(values, 0.0)
    return kept / kept.sum() if kept.sum() > 0 else otherwise


def _shapley(values: Mapping[tuple[int, ...], float], m: int) -> Float[np.ndarray, " source"]:
    """Exact Shapley values from the value of every group of sources."""
    out = np.zeros(m)
    for group, value in values.items():
        size = len(group)
        for i in range(m):
            if i not in group:
                joined = tuple(sorted((*group, i)))
                weight = math.factorial(size) * math.factorial(m - size - 1) / math.factorial(m)
                out[i] += weight * (values[joined] - value)
    return out
