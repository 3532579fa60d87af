"""The chart of baselines: which of them suits which metric, and what a bandit that learns it gains."""

import time
import warnings
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from theodolite.core.attribution_metrics import METRICS, attribution_scores, target_probabilities
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.explanations.baseline_bandit import (
    BanditExplanation,
    BaselineBandit,
    ConstantMapWarning,
    FamilyScores,
    SplitError,
    family_scores,
    feature_layers,
    random_smooth_maps,
)
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS
from theodolite.survey.finding import Finding

_FITTED, _EXPLAINED, _DRAWS, _PER_FAMILY, _STEPS, _SHOWN = 80, 40, 10, 4, 10, 4
_TABLE_METRICS = tuple(name for name in METRICS if name not in ("sic", "aic"))


def _no_layer(subject: Subject) -> str | None:
    """Why the network cannot be split, in words; None where it can."""
    if not subject.is_network:
        return None
    if subject.data.train.x.ndim not in (2, 4):
        return f"explains images and tables; one input here has shape {subject.data.shape}"
    try:
        feature_layers(subject.predictor, subject.data.train.x[:1])
    except SplitError as error:
        return f"needs a layer that everything passes through: {error}"
    return None


def _forecast(subject: Subject) -> float:
    """Seconds for all paths, from the time of one forward pass over the points of a path."""
    view, rows = subject.view(), subject.data.train.x[:_STEPS]
    view(rows)
    started = time.perf_counter()
    view(rows)
    # two bandits learn from two paths a row and explain all rows; of images a third one explains those that are drawn
    paths = 4 * _FITTED + 2 * _EXPLAINED * (_DRAWS + 3)
    paths += 2 * _FITTED + _SHOWN * (_DRAWS + 3) if subject.data.modality == "image" else 0
    # a backward pass takes two forward ones; hooks, draws and scores of a path take some milliseconds
    return paths * (4 * (time.perf_counter() - started) + 0.006)


@dataclass(frozen=True, eq=False)
class _Explained:
    """What one bandit says of the explained rows: the best of its draws, and a fresh draw of the arm it chose."""

    found: list[BanditExplanation]
    fresh: np.ndarray

    @property
    def best(self) -> np.ndarray:
        return np.array([one.score for one in self.found])


def _explain(subject: Subject, metric: str, rows: Tensor, removed: Tensor, context: str, budget: Budget) -> _Explained:
    train = subject.data.train.x
    bandit = BaselineBandit(
        metric, context=context, draws=_DRAWS, steps=_STEPS, removed=removed, combine=_combine(subject),
        finetune=context != "uniform", memory=budget.memory, seed=budget.seed,
    )  # fmt: skip
    bandit.fit(subject.predictor, train[:_FITTED], bank=train[_FITTED : 2 * _FITTED] if len(train) > _FITTED else train)
    with warnings.catch_warnings():
        # such a map has the score that it has, and counts against the bandit
        warnings.simplefilter("ignore", ConstantMapWarning)
        found = [bandit.explain(row) for row in rows]
    fresh = np.array([bandit.fresh(row, one, seed=budget.seed)[1] for row, one in zip(rows, found, strict=True)])
    return _Explained(found, fresh)


def _combine(subject: Subject) -> str:
    """Inputs of a table have signs, so what a feature adds is its share of the difference of the answers."""
    return "relu-product" if subject.data.modality == "image" else "integrated"


def _removed(subject: Subject) -> Tensor:
    """What a removed feature is: of an image the darkest value of its channel, of a table the column's mean."""
    x = subject.data.train.x
    return x.mean(dim=0) if x.ndim == 2 else x.amin(dim=(0, 2, 3))[:, None, None]


@chart(
    "bee",
    needs=Needs(network=True, modalities=("tabular", "image"), task="classification", test=_no_layer),
    cost=_forecast,
)
def bee(subject: Subject, budget: Budget) -> Finding:
    """Which family of baselines wins by which metric, and what choosing the baseline for the input and the metric gains."""
    image = subject.data.train.x.ndim == 4
    rows = subject.data.test.x[:_EXPLAINED]
    removed, metrics = _removed(subject), METRICS if image else _TABLE_METRICS
    scores = family_scores(
        subject.predictor, rows, None, metrics, _PER_FAMILY, bank=subject.data.train.x[:100], removed=removed,
        combine=_combine(subject), steps=_STEPS, seed=budget.seed, memory=budget.memory,
    )  # fmt: skip
    ours = _explain(subject, "adp", rows, removed, "penultimate", budget)
    uniform = _explain(subject, "adp", rows, removed, "uniform", budget)
    beside = _explain(subject, "insertion", rows[:_SHOWN], removed, "penultimate", budget) if image else None
    shape = tuple(rows.shape[2:]) if image else tuple(rows.shape[1:])
    blind = random_smooth_maps(_DRAWS * len(rows), shape, seed=budget.seed).unflatten(0, (_DRAWS, len(rows)))
    target, plain = target_probabilities(subject.predictor, rows, memory=budget.memory)
    random = np.stack([
        attribution_scores(
            "adp", subject.predictor, rows, maps, target, removed=removed, plain=plain, memory=budget.memory
        ).numpy()
        for maps in blind
    ])  # fmt: skip
    zero = np.array([one.baseline_score for one in ours.found])
    comparison = Comparison(
        "average drop when only the map's part is kept, a fresh draw from the baselines the bandit chose",
        _drop(ours.fresh),
        (
            Control("the zero baseline", _drop(zero), "closed-form"),
            Control(f"baselines chosen by {_DRAWS} uniform draws, a fresh draw", _drop(uniform.fresh), "random"),
            Control("one random smooth map", _drop(random[0]), "random"),
        ),
        larger_is_better=False,
    )
    lost = _lost(scores)
    numbers = {
        "average drop, fresh draw from the bandit's choice": _drop(ours.fresh),
        f"average drop, best of the bandit's {_DRAWS} draws": _drop(ours.best),
        f"average drop, best of {_DRAWS} draws of a uniform mixture": _drop(uniform.best),
        f"average drop, best of {_DRAWS} random smooth maps": _drop(random.min(axis=0)),
        "insertion lost by the map that is best by average drop": lost,
    }
    by_drop, by_insertion = scores.winner("adp"), scores.winner("insertion")
    same = by_drop == by_insertion
    wins = (
        f"{by_drop.capitalize()} baselines win by average drop and by insertion" if same
        else f"{by_drop.capitalize()} baselines win by average drop, {by_insertion} ones by insertion"
    )  # fmt: skip
    return Finding(
        slug="bee",
        headline=f"{wins}; chosen for each input they lose {ours.fresh.mean():.1f} % of the answer, where the zero baseline "
        f"loses {zero.mean():.1f} % and a random map {random[0].mean():.1f} %.",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(scores, ours, beside, uniform, zero, random, rows),
        reading="For each metric, the share of the held-out inputs for which a family of baselines has the best mean over "
        f"{_PER_FAMILY} draws. A row with one dark cell is a metric that prefers one baseline; even rows say that the choice "
        "hardly matters. "
        + (
            "Beside it, inputs and the maps that two bandits chose, one by average drop and one by insertion." if image
            else "Beside it, the average drop of the maps: lower is better."
        ),
        advice=_advice(by_drop, by_insertion, ours, zero, random),
        seed=budget.seed,
        caveats=(
            f"{len(rows)} test rows explained, the bandit taught on {min(_FITTED, len(subject.data.train))} training rows; the "
            "class explained is the predicted one.",
            "A removed pixel takes the darkest value of its channel in training images." if image
            else "A removed feature takes its training mean; at the input of a table three families are distinct.",
            f"The best of {_DRAWS} draws was chosen by the metric that reports it: compare it only with the best of as many.",
        ),
    )  # fmt: skip


def _advice(by_drop: str, by_insertion: str, ours: _Explained, zero: np.ndarray, random: np.ndarray) -> str:
    text = (
        "Say first which metric matters, then let theodolite.explanations.baseline_bandit.BaselineBandit choose for it."
    )
    if random.min(axis=0).mean() <= ours.best.mean():
        return (
            f"{text} Do not go by average drop alone here: the best of {_DRAWS} random smooth maps does as well, since the "
            "metric rewards every map that keeps much of the input."
        )
    if ours.fresh.mean() >= zero.mean():
        return f"{text} By average drop the zero baseline does as well here, at a tenth of the work."
    one = (
        f"{by_drop} for both"
        if by_drop == by_insertion
        else f"{by_drop} for average drop and {by_insertion} for insertion"
    )
    return f"{text} With one family only, take {one}."


def _drop(values: np.ndarray) -> Estimate:
    return mean_of_runs(values, unit="%", within=(0, 100))


def _lost(scores: FamilyScores) -> Estimate:
    """By how much insertion is smaller for the map that is best by ADP than for the one that is best by insertion."""
    at = scores.metrics.index("insertion")
    by_drop, own = scores.best_draw("adp")[at], scores.best_draw("insertion")[at]
    return mean_of_runs(100 * (own - by_drop) / np.maximum(own, 1e-12), unit="%", within=(0, 100))


def _figure(
    scores: FamilyScores,
    ours: _Explained,
    beside: _Explained | None,
    uniform: _Explained,
    zero: np.ndarray,
    random: np.ndarray,
    rows: Tensor,
) -> go.Figure:
    share = np.stack([scores.win_share(metric) for metric in scores.metrics])
    heat = go.Heatmap(
        z=share, x=list(scores.families), y=list(scores.metrics), zmin=0, zmax=1, colorscale="Blues", showscale=False,
        texttemplate="%{z:.0%}", hovertemplate="%{y}, %{x}: %{z:.0%}<extra></extra>",
    )  # fmt: skip
    if beside is None:  # a table has bars in the place of maps
        figure = make_subplots(rows=1, cols=2, subplot_titles=("share of inputs won", "average drop, %"))
        figure.add_trace(heat, row=1, col=1)
        bars = {
            "bandit, fresh": ours.fresh, "uniform, fresh": uniform.fresh, "zero baseline": zero, "random map": random[0],
        }  # fmt: skip
        means = [_drop(values) for values in bars.values()]
        figure.add_trace(
            go.Bar(
                x=list(bars), y=[m.value for m in means], marker_color=INKS[0], showlegend=False,
                error_y={
                    "array": [m.high - m.value for m in means], "arrayminus": [m.value - m.low for m in means],
                },
            ),
            row=1, col=2,
        )  # fmt: skip
        figure.update_layout(margin={"l": 60, "r": 20, "t": 40, "b": 50})
        return figure
    shown = min(_SHOWN, len(rows))
    specs = [[{"rowspan": shown}, {}, {}, {}], *([None, {}, {}, {}] for _ in range(shown - 1))]
    titles = ["share of inputs won", "input", "by average drop", "by insertion"]
    figure = make_subplots(
        rows=shown, cols=4, specs=specs, column_widths=[0.52, 0.16, 0.16, 0.16], subplot_titles=titles,
        vertical_spacing=0.03, horizontal_spacing=0.04,
    )  # fmt: skip
    figure.add_trace(heat, row=1, col=1)
    for i in range(shown):
        for col, pixels in ((2, rows[i].mean(dim=0)), (3, ours.found[i].map), (4, beside.found[i].map)):
            drawn = (
                torch.round(pixels[:: max(1, pixels.shape[0] // 56), :: max(1, pixels.shape[1] // 56)] * 1000) / 1000
            )
            figure.add_trace(
                go.Heatmap(z=drawn.flip(0).tolist(), colorscale="Greys_r" if col == 2 else "Viridis", showscale=False),
                row=i + 1, col=col,
            )  # fmt: skip
            figure.update_xaxes(visible=False, row=i + 1, col=col)
            figure.update_yaxes(visible=False, row=i + 1, col=col)
    figure.update_layout(margin={"l": 80, "r": 20, "t": 40, "b": 50}, height=480)
    return figure
