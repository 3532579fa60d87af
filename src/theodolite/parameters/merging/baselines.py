"""What a search of merges has to beat: its sources, averages, fixed recipes, a grid and as many random candidates."""

__all__ = ["BASELINES", "measure_baselines"]

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from theodolite.parameters.merging.methods import Merger
from theodolite.parameters.merging.search import random_search

BASELINES = ("sources", "average", "grid", "task_arithmetic", "ties", "dare_ties", "soup", "random")
"""Baselines by name: each source; the uniform average; the best global weights on a grid with the evolved method; task
arithmetic at weights 1; ties and dare_ties at a density of 0.2; the greedy soup; random search with equally many evaluations."""

_FIXED_DENSITY = 0.2
_GRID = 125  # recipes that a grid may have, and no more than the search

Recipe = tuple[np.ndarray, np.ndarray]


def measure_baselines(
    wanted: Sequence[str],
    *,
    merger: Merger,
    candidate: nn.Module,
    score: Callable[..., np.ndarray],
    genes: Any,
    others: Callable[[nn.Module, float], tuple[float, float | None]],
    evaluations: int,
    seed: int,
) -> pd.DataFrame:
    """A table (baseline, fitness, validation, test, evaluations), a row for each baseline.

    score(recipes, merger) is the fitness in the search; others(model, fitness) is (validation, test). Those that need a
    base are left out where there is none. The candidate is written over.
    """
    rows: list[tuple[str, float, float, float | None, int]] = []

    def tell(name: str, with_merger: Merger, recipe: Recipe, value: float, number: int) -> None:
        with_merger.into(candidate, *recipe)
        rows.append((name, value, *others(candidate, value), number))

    def fixed(name: str, method: str, weight: float, density: float) -> None:
        one = merger.with_method(method)
        recipe = one.table([weight] * one.count, "weights"), one.table(density, "densities")
        tell(name, one, recipe, float(score([recipe], one)[0]), 1)

    K = merger.count
    linear = merger.with_method("linear")
    alone = [(linear.table(hot, "weights"), linear.table(1.0, "densities")) for hot in np.eye(K)]
    single = score(alone, linear) if {"sources", "soup"} & set(wanted) else np.empty(0)
    if "sources" in wanted:
        for k, recipe in enumerate(alone):
            tell(f"source {k + 1}", linear, recipe, float(single[k]), 1)
    if "average" in wanted:
        fixed("uniform average", "linear", 1 / K, 1.0)
    if "grid" in wanted and (grid := _global_weights(K, min(_GRID, evaluations))):
        recipes = [(merger.table(weights, "weights"), merger.table(1.0, "densities")) for weights in grid]
        values = score(recipes)
        if np.isfinite(values).any():
            top = int(np.nanargmax(values))
            tell(f"best global weights {_short(grid[top])}", merger, recipes[top], float(values[top]), len(grid))
    if merger.sources.base is not None:
        if "task_arithmetic" in wanted:
            fixed("task arithmetic at 1", "task_arithmetic", 1.0, 1.0)
        for method in ("ties", "dare_ties"):
            if method in wanted:
                fixed(f"{method} at density {_FIXED_DENSITY}", method, 1.0, _FIXED_DENSITY)
    if "soup" in wanted:
        members, value, number = _greedy_soup(single, linear, score)
        recipe = linear.table(members / members.sum(), "weights"), linear.table(1.0, "densities")
        tell("greedy soup", linear, recipe, value, number)
    if "random" in wanted:
        found = random_search(
            lambda many: score([genes.decode(one) for one in many]), genes.draw, max_evaluations=evaluations, seed=seed
        )
        tell("random search", merger, genes.decode(found.genes), found.value, found.evaluations)
    table = pd.DataFrame(rows, columns=["baseline", "fitness", "validation", "test", "evaluations"])
    return table.astype({"test": "float64"})


def _global_weights(K: int, points: int) -> list[tuple[float, ...]]:
    """Weights in [0, 1] on a grid of at most so many points, all zeros left out; none where K is too large for two levels."""
    levels = min(11, int(points ** (1 / K) + 1e-9))
    if levels < 2:
        return []
    return [weights for weights in itertools.product(np.linspace(0, 1, levels).tolist(), repeat=K) if any(weights)]


def _short(weights: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{weight:.2g}" for weight in weights) + ")"


def _greedy_soup(single: np.ndarray, linear: Merger, score: Callable[..., np.ndarray]) -> tuple[np.ndarray, float, int]:
    """Sources from the best on, each added to the average where that does not lower the fitness (Wortsman et al., 2022)."""
    order = [int(k) for k in np.argsort(-np.where(np.isfinite(single), single, -np.inf), kind="stable")]
    members = np.zeros(linear.count)
    members[order[0]] = 1
    value, number = float(single[order[0]]), linear.count
    for k in order[1:]:
        trial = members.copy()
        trial[k] = 1
        recipe = linear.table(trial / trial.sum(), "weights"), linear.table(1.0, "densities")
        reached, number = float(score([recipe], linear)[0]), number + 1
        if reached >= value:
            members, value = trial, reached
    return members, value, number
