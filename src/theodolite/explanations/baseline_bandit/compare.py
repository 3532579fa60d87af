"""Which family of baselines does best by which metric, every family with the same number of draws."""

__all__ = ["FamilyScores", "compare_families", "family_scores"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from theodolite.core.attribution_metrics import (
    HIGHER_IS_BETTER,
    METRICS,
    attribution_scores,
    metric_name,
    target_probabilities,
)
from theodolite.core.errors import InputError
from theodolite.core.view import ModelView, model_input
from theodolite.explanations.baseline_bandit.baselines import BaselineFamily
from theodolite.explanations.baseline_bandit.engine import Arm, Draws


@dataclass(frozen=True, eq=False)
class FamilyScores:
    """Scores (metric, family, draw, row) by every metric of the same maps; NaN where a gradient was not finite.

    A family's maps are at the first layer; two metrics see the same draws, so that a map which is best for one can be asked
    for by the other.
    """

    metrics: tuple[str, ...]
    families: tuple[str, ...]
    values: Float[np.ndarray, "metric family draw row"]

    def of(self, metric: str) -> Float[np.ndarray, "family draw row"]:
        """Scores by one metric."""
        return self.values[self.metrics.index(metric_name(metric))]

    def signed(self, metric: str) -> Float[np.ndarray, "family draw row"]:
        """The same, larger is better."""
        return self.of(metric) if HIGHER_IS_BETTER[metric_name(metric)] else -self.of(metric)

    def winner(self, metric: str) -> str:
        """The family with the best mean."""
        return self.families[int(np.nanmean(self.signed(metric), axis=(1, 2)).argmax())]

    def best_draw(self, metric: str) -> Float[np.ndarray, "metric row"]:
        """What every metric says of each row's best map by ``metric``."""
        flat = self.signed(metric).reshape(-1, self.values.shape[3])
        best = np.nanargmax(flat, axis=0)
        return self.values.reshape(len(self.metrics), -1, self.values.shape[3])[:, best, np.arange(len(best))]

    def win_share(self, metric: str) -> Float[np.ndarray, " family"]:
        """Share of the rows for which each family has the best mean over its draws; ties are split."""
        means = np.nanmean(self.signed(metric), axis=1)
        wins = np.isclose(means, means.max(axis=0), rtol=0, atol=1e-12)
        return (wins / wins.sum(axis=0)).mean(axis=1)

    def table(self) -> pd.DataFrame:
        """Rows (metric, family): mean over draws and inputs, best (mean over inputs of the best draw), win_share."""
        rows = []
        for metric in self.metrics:
            pick = np.nanmax if HIGHER_IS_BETTER[metric] else np.nanmin
            share = self.win_share(metric)
            for i, family in enumerate(self.families):
                scores = self.of(metric)[i]
                rows.append((metric, family, np.nanmean(scores), pick(scores, axis=0).mean(), share[i]))
        frame = pd.DataFrame(rows, columns=["metric", "family", "mean", "best", "win_share"])
        return frame.set_index(["metric", "family"])


def family_scores(
    model: Any,
    X: Float[Tensor, "row ..."],
    targets: Int[Tensor, " row"] | int | None = None,
    metrics: Sequence[str] = METRICS,
    draws: int = 4,
    *,
    families: int | Sequence[BaselineFamily] = 5,
    bank: Float[Tensor, "bank ..."] | None = None,
    removed: float | Tensor | str = 0.0,
    metric_steps: int = 10,
    seed: int = 0,
    memory: int | None = None,
    **options: Any,
) -> FamilyScores:
    """Score ``draws`` maps of every family on every row of ``X`` by all ``metrics``; options as in `Draws.of`."""
    names = tuple(metric_name(metric) for metric in metrics)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1 or not names:
        raise InputError(f"need draws >= 1 and at least one metric, got {draws!r} and {list(metrics)}")
    X, bank = model_input(model, X), None if bank is None else model_input(model, bank)
    made = Draws.of(model, X, families=families, bank=bank, memory=memory, **options)
    layer, split = next(iter(made.splits.items()))
    view = ModelView(model, memory=memory)
    target, plain = target_probabilities(view, X, targets)
    a = split.lower_all(X, memory=memory)
    shape = tuple(X.shape[2:]) if X.ndim == 4 else tuple(X.shape[1:])
    rng = torch.Generator().manual_seed(seed)
    values = np.full((len(names), len(made.families), draws, len(X)), np.nan)
    for i, family in enumerate(made.families):
        for j in range(draws):
            maps = made.maps(Arm(layer, family), a, target, shape, rng)
            good = ~torch.isnan(maps).flatten(1).any(dim=1)
            if not bool(good.any()):
                continue
            for k, name in enumerate(names):
                found = attribution_scores(
                    name, view, X[good], maps[good], target[good], removed=removed, steps=metric_steps,
                    plain=plain[good], memory=memory,
                )  # fmt: skip
                values[k, i, j, good.cpu().numpy()] = found.cpu().numpy()
    lost = np.isnan(values).all(axis=2)
    if lost.any():
        raise InputError(f"row {int(np.argwhere(lost)[0][2])} has no finite gradient in any draw; leave it out")
    return FamilyScores(names, tuple(made.families), values)


def compare_families(
    model: Any,
    X: Float[Tensor, "row ..."],
    targets: Int[Tensor, " row"] | int | None = None,
    metrics: Sequence[str] = METRICS,
    draws: int = 4,
    **options: Any,
) -> pd.DataFrame:
    """Metric x family: mean, best (of ``draws``, mean over inputs) and win_share; options as in `family_scores`.

    Means compare families fairly; the best of several draws was chosen by the metric that reports it.
    """
    return family_scores(model, X, targets, metrics, draws, **options).table()
