"""The chart of storage: how well a network learns that may store only a few weights from its first step on, by which."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import nn

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError, ModelError, TrainingCollapsedError
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.core.train import Recipe, train
from theodolite.parameters.pruning_at_init import LayerCollapseWarning, apply_masks, prune_at_init
from theodolite.parameters.sharing import FoldMap, HashedMap, share_parameters
from theodolite.parameters.subspace import SubspaceModel
from theodolite.parameters.tucker import adapt
from theodolite.parameters.weights import weight_tensors
from theodolite.survey.chart import Budget, Needs, chart, trainings
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_COMPRESSIONS = (4.0, 20.0, 100.0)
_SHOWN = 20.0
_SEEDS = 3
_FEWEST = 20  # numbers that the strongest compression must leave
_STEPS = (1.0, 4.0)  # times the recipe's: fewer weights often want larger steps
_SUBSPACE_STEPS = (0.3, 0.03)  # of Adam on coordinates, whose own order has nothing to do with the weights'
_WORDS = {
    "sharing": "weights read from one shared array",
    "subspace": "random subspace of the weights",
    "core": "low-rank change of the random start",
    "synflow": "pruned before training (SynFlow)",
    "random": "pruned before training (at random)",
}
_CALLS = {
    "sharing": "theodolite.parameters.sharing.share_parameters(network, compression={c:.0f})",
    "subspace": "theodolite.parameters.subspace.SubspaceModel(network, dimension)",
    "core": "theodolite.parameters.tucker.adapt(network, ranks=...)",
    "synflow": 'theodolite.parameters.pruning_at_init.prune_at_init(network, "synflow", {c:.0f}, data=(x, y))',
    "random": 'theodolite.parameters.pruning_at_init.prune_at_init(network, "random", {c:.0f})',
}


@dataclass(frozen=True, eq=False)
class _Learner:
    """Trains fresh networks of the subject that store few of their weights."""

    subject: Subject
    build: Callable[[int], nn.Module]
    recipe: Recipe

    @classmethod
    def of(cls, subject: Subject) -> "_Learner":
        if subject.build is None or subject.recipe is None:
            raise InputError(f"{subject.name} cannot be trained again")
        return cls(subject, subject.build, subject.recipe)

    def _start(self, method: str, compression: float, seed: int) -> nn.Module | None:
        """The network before training, None where the method cannot be that small."""
        model, rows = self.build(seed), self.subject.data.train.head(256)
        if method == "sharing":
            return share_parameters(model, compression=compression, optimizer="adam", seed=seed)
        if method == "subspace":  # moves biases and norms as well, so it may have as many coordinates more
            weights = sum(weight.parameter.numel() for weight in weight_tensors(model))
            others = sum(p.numel() for p in model.parameters()) - weights
            return SubspaceModel(model, int(weights / compression) + others, seed=seed)
        if method == "core":
            return _low_rank(lambda: self.build(seed), compression, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LayerCollapseWarning)  # it shows as chance in the figure
            masks = prune_at_init(model, method, compression, data=(rows.x, rows.y), seed=seed)
        return apply_masks(model, masks)

    def _trained(self, method: str, compression: float, seed: int, step: float) -> nn.Module | None:
        """The trained network, None where the loss did not stay finite."""
        model, rows = self._start(method, compression, seed), self.subject.data.train
        if model is None:
            return None
        lr = step if method == "subspace" else step * self.recipe.lr
        recipe = replace(self.recipe, lr=lr, optimizer="adam", momentum=0.0, patience=None, seed=seed)
        if method == "subspace":
            recipe = replace(recipe, l2=0.0)  # decay would pull towards the random start
        try:
            train(model, rows.x, rows.y, recipe=recipe)
        except TrainingCollapsedError:
            return None
        return model

    def _quality(self, model: nn.Module | None, part: str) -> float:
        """Quality on one part; of a training that collapsed that of knowing nothing."""
        return self.subject.data.chance if model is None else self.subject.quality(model, part=part).value  # type: ignore[arg-type]

    def runs(self, method: str, seeds: range) -> dict[float, list[float]]:
        """Quality on test rows by compression and seed, [] where the method cannot be that small.

        The step size is the one that the first seed does best with on validation rows, at the compression that is shown.
        """
        steps = _SUBSPACE_STEPS if method == "subspace" else _STEPS
        tried = {step: self._trained(method, _SHOWN, seeds[0], step) for step in steps}
        step = max(steps, key=lambda one: self._quality(tried[one], "validation"))
        made = dict[float, list[float]]()
        for compression in _COMPRESSIONS:
            if self._start(method, compression, seeds[0]) is None:
                made[compression] = []
                continue
            first = tried[step] if compression == _SHOWN else self._trained(method, compression, seeds[0], step)
            models = (first, *(self._trained(method, compression, seed, step) for seed in seeds[1:]))
            made[compression] = [self._quality(model, "test") for model in models]
        return made


def _low_rank(build: Callable[[], nn.Module], compression: float, seed: int) -> nn.Module | None:
    """The random start with a trainable core and factors on each weight, of the largest rank that fits, and free biases."""
    budget = sum(weight.parameter.numel() for weight in weight_tensors(build())) / compression

    def placed(rank: int) -> tuple[nn.Module, int]:
        model = build()
        adapters = adapt(model, ranks=rank, clip=True, statistics="save", tied="share", seed=seed)
        return model, sum(p.numel() for p in adapters.trainable_parameters())

    low, high = 0, max(max(weight.shape) for weight in weight_tensors(build()))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if placed(middle)[1] <= budget else (low, middle - 1)
    if low == 0:
        return None
    model, _ = placed(low)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and "parametrizations" not in name:
            parameter.requires_grad_(True)
    return model


def _too_small(subject: Subject) -> str | None:
    try:
        total = sum(weight.parameter.numel() for weight in weight_tensors(subject.predictor))
    except ModelError as error:
        return f"needs linear or convolution layers: {str(error)[:120]}"
    least = _FEWEST * int(max(_COMPRESSIONS))
    return None if total >= least else f"needs at least {least:,} weights; there are {total:,}"


@chart(
    "parameter-sharing",
    needs=Needs(network=True, retrainable=True, test=_too_small),
    cost=trainings(len(_WORDS) * (len(_COMPRESSIONS) * _SEEDS + 1) * 1.3),
)
def parameter_sharing(subject: Subject, budget: Budget) -> Finding:
    """Quality of networks that store a quarter, a twentieth and a hundredth of their weights, by which are stored."""
    learner, full, chance = _Learner.of(subject), subject.quality(), subject.data.chance
    seeds = range(budget.seed, budget.seed + _SEEDS)
    total = sum(weight.parameter.numel() for weight in weight_tensors(learner.build(budget.seed)))
    stored = {c: max(1, int(total / c)) for c in _COMPRESSIONS}
    runs = {method: learner.runs(method, seeds) for method in _WORDS}
    curves = {
        method: QualityCurve.from_runs(
            {stored[c]: found for c, found in by_size.items() if found}, chance=chance, reference=full.value,
            name=_WORDS[method], metric=subject.metric, total_dimension=total,
        )
        for method, by_size in runs.items()
        if any(by_size.values())
    }  # fmt: skip
    within = (0.0, 1.0) if subject.data.task == "classification" else (-np.inf, 1.0)
    kept = {
        method: mean_of_runs(found[_SHOWN], unit=subject.metric, within=within)
        for method, found in runs.items()
        if found[_SHOWN]
    }
    kinds = {"subspace": "random", "core": "closed-form", "synflow": "closed-form", "random": "random"}
    comparison = Comparison(
        f"{subject.metric} with {stored[_SHOWN]:,} of {total:,} weights stored",
        kept["sharing"],
        (
            *(Control(_WORDS[name], kept[name], kind) for name, kind in kinds.items() if name in kept),  # type: ignore[arg-type]
            Control("the network as it is", full, "reference"),
        ),
    )
    numbers = {f"{_WORDS[name]}, {_SHOWN:.0f} times fewer": value for name, value in kept.items()}
    numbers[f"{subject.metric} of the network as it is"] = full
    for method, curve in curves.items():
        found = curve.smallest(above_chance=True).estimate
        if found is not None:
            name = f"weights stored for 90 % of the gain above chance, {_WORDS[method]}"
            numbers[name] = replace(found, unit="weights")
    return Finding(
        slug="parameter-sharing",
        headline=_headline(kept, full, stored[_SHOWN], total, subject),
        numbers=numbers,
        comparison=comparison,
        figure=_figure(curves, full.value, chance, subject.metric, total, budget.seed),
        reading="Fresh networks are trained that may store only so many numbers for their weights: an array that all weights are "
        "read from, coordinates of a random subspace, low-rank changes, or the weights that two rules leave before training. "
        "Each has the better of two step sizes, found on validation rows at the middle size; bands span the seeds. Below, how "
        "many weights read each number of the array: the fold used here spreads them evenly, independent hashing does not.",
        advice=_advice(kept),
        seed=budget.seed,
        caveats=(
            f"{_SEEDS} seeds, Adam by the subject's recipe; the paper trains with SGD.",
            "Biases and normalisation stay whole for all methods and are not counted; the subspace moves them too, and has as "
            "many coordinates more. It and the low-rank change start from weights that a seed gives again.",
            "The low-rank change has the largest rank that fits, so it may store less than where it is drawn.",
            f"Sizes are {', '.join(f'{c:.0f}' for c in _COMPRESSIONS)} times fewer, so the smallest one that suffices is rough.",
        ),
    )


def _headline(kept: dict[str, Estimate], full: Estimate, stored: int, total: int, subject: Subject) -> str:
    def told(value: float) -> str:
        return f"{value:.0%} accuracy" if subject.data.task == "classification" else f"R2 {value:.2f}"

    other = max((name for name in kept if name != "sharing"), key=lambda name: kept[name].value)
    return (
        f"Storing {stored:,} numbers for {total:,} weights from the first step on, sharing reaches "
        f"{told(kept['sharing'].value)}; the best other way, {_WORDS[other]}, {told(kept[other].value)} (all weights: "
        f"{told(full.value)})."
    )


def _advice(kept: dict[str, Estimate]) -> str:
    best = max(kept, key=lambda name: kept[name].value)
    return (
        f"{_CALLS[best].format(c=_SHOWN)} before training where memory is short; it has the highest mean here at this size. It "
        "saves memory, not arithmetic."
    )


def _figure(
    curves: dict[str, QualityCurve], full: float, chance: float, metric: str, total: int, seed: int
) -> go.Figure:
    figure = make_subplots(rows=2, cols=1, row_heights=[0.74, 0.26], vertical_spacing=0.18)
    inks = dict(zip(_WORDS, (INKS[0], INKS[2], INKS[3], INKS[1], INKS[6]), strict=True))
    for method, curve in curves.items():
        band_line(
            figure, curve.dimensions, curve.mean.tolist(), name=curve.name, ink=inks[method], low=curve.runs.min(axis=1).tolist(),
            high=curve.runs.max(axis=1).tolist(), dash="dot" if method == "random" else None, row=1, col=1,
        )  # fmt: skip
    level_line(figure, full, "all weights", row=1)
    level_line(figure, chance, "chance", row=1)
    slots = max(1, int(total / _SHOWN))
    for name, map_, ink in (("fold", FoldMap, INKS[0]), ("independent hashing", HashedMap, INKS[6])):
        count = torch.bincount(map_(total, slots, seed).load()).tolist()
        bars = go.Bar(x=list(range(len(count))), y=count, name=f"slots, {name}", marker_color=ink, showlegend=False)
        figure.add_trace(bars, row=2, col=1)
    figure.update_xaxes(type="log", title_text="weights stored", row=1, col=1)
    figure.update_yaxes(title_text=f"{metric} on test rows", row=1, col=1)
    figure.update_xaxes(title_text=f"weights that read one of the {slots:,} numbers", row=2, col=1)
    figure.update_yaxes(title_text="numbers", row=2, col=1)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.18}, height=560
    )
    return figure
