"""The chart of storage: how well a network learns that may store only a few numbers from its first step on, by which."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from theodolite.parameters.peft import apply, find_blocks
from theodolite.parameters.pruning_at_init import LayerCollapseWarning, apply_masks, prune_at_init
from theodolite.parameters.sharing import FoldMap, HashedMap, share_parameters
from theodolite.parameters.subspace import SubspaceModel
from theodolite.parameters.weights import weight_tensors
from theodolite.survey.chart import Budget, Needs, chart, trainings
from theodolite.survey.figures import INKS
from theodolite.survey.finding import Finding
from theodolite.survey.parameters.pareto import Point, draw, largest_update, not_beaten

_COMPRESSIONS = (4.0, 20.0, 100.0)
_SHOWN = 20.0
_SEEDS = 3
_FEWEST = 20  # numbers that the strongest compression must leave
_STEPS = (1.0, 4.0)  # times the recipe's: fewer weights often want larger steps
_SUBSPACE_STEPS = (0.3, 0.03)  # of Adam on coordinates, whose own order has nothing to do with the weights'
_WORDS = {
    "sharing": "weights read from one shared array",
    "subspace": "random subspace of the weights",
    "tucker": "Tucker cores on the random start",
    "lora": "low rank (LoRA) on the random start",
    "houlsby": "adapters in the random start",
    "prefix": "prefixes in the random start",
    "synflow": "pruned before training (SynFlow)",
    "random": "pruned before training (at random)",
}
_BLOCKS = ("houlsby", "prefix")  # what needs the blocks of a transformer
_CALLS = {
    "sharing": "theodolite.parameters.sharing.share_parameters(network, compression={c:.0f})",
    "subspace": "theodolite.parameters.subspace.SubspaceModel(network, dimension)",
    "tucker": "theodolite.parameters.tucker.adapt(network, ranks=...)",
    "lora": 'theodolite.parameters.tucker.adapt(network, kind="lora", ranks=...)',
    "houlsby": 'theodolite.parameters.peft.apply(network, "houlsby", budget=...)',
    "prefix": 'theodolite.parameters.peft.apply(network, "prefix", budget=...)',
    "synflow": 'theodolite.parameters.pruning_at_init.prune_at_init(network, "synflow", {c:.0f}, data=(x, y))',
    "random": 'theodolite.parameters.pruning_at_init.prune_at_init(network, "random", {c:.0f})',
}


@dataclass(frozen=True, eq=False)
class _Network:
    """A network that stores few of its weights, and how many numbers those are; None for one whose loss went astray."""

    network: nn.Module | None
    stored: int


@dataclass(frozen=True)
class _Runs:
    """Numbers stored in place of the weights, and the quality on test rows of each seed."""

    stored: int
    qualities: list[float]


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

    def start(self, method: str, compression: float, seed: int) -> _Network | None:
        """The network before training, None where the method cannot be that small or has no place in it.

        What is no weight of a linear, convolution or embedding layer stays whole and trains in all of them, uncounted.
        """
        model = self.build(seed)
        found = [weight.parameter for weight in weight_tensors(model)]
        total, own = sum(p.numel() for p in found), {id(p) for p in found}
        rest = [p for p in model.parameters() if id(p) not in own]
        budget = max(1, int(total / compression))
        if method == "sharing":
            shared = share_parameters(model, compression=compression, optimizer="adam", seed=seed)
            return _Network(shared, shared.stored_parameters)
        if method == "subspace":  # moves biases and norms as well, so it may have as many coordinates more
            return _Network(SubspaceModel(model, budget + sum(p.numel() for p in rest), seed=seed), budget)
        if method in ("tucker", "lora"):
            update = largest_update(model, budget, kind=method, statistics="save", tied="share", seed=seed)
            if update is None:
                return None
            _open(rest)
            return _Network(model, sum(p.numel() for p in update.trainable_parameters()))
        if method in _BLOCKS:
            try:
                made = apply(model, method, budget=budget, train_head=False, seed=seed, probe=False)
            except (InputError, ModelError):  # no blocks, or none so narrow
                return None
            count = made.parameter_count.method
            _open(rest)
            return _Network(made, count)
        rows = self.subject.data.train.head(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LayerCollapseWarning)  # it shows as chance in the figure
            masks = prune_at_init(model, method, compression, data=(rows.x, rows.y), seed=seed)
        return _Network(apply_masks(model, masks), sum(int(mask.sum()) for mask in masks.values()))

    def _trained(self, method: str, compression: float, seed: int, step: float) -> _Network | None:
        """The trained network, None where the method cannot be that small."""
        made, rows = self.start(method, compression, seed), self.subject.data.train
        if made is None or made.network is None:
            return None
        lr = step if method == "subspace" else step * self.recipe.lr
        recipe = replace(self.recipe, lr=lr, optimizer="adam", momentum=0.0, patience=None, seed=seed)
        if method == "subspace":
            recipe = replace(recipe, l2=0.0)  # decay would pull towards the random start
        try:
            train(made.network, rows.x, rows.y, recipe=recipe)
        except TrainingCollapsedError:
            return _Network(None, made.stored)
        return made

    def _quality(self, made: _Network | None, part: str) -> float:
        """Quality on one part; of a training that collapsed that of knowing nothing."""
        if made is None or made.network is None:
            return self.subject.data.chance
        return self.subject.quality(made.network, part=part).value  # type: ignore[arg-type]

    def runs(self, method: str, seeds: range) -> dict[float, _Runs]:
        """What each compression reaches that the method can have.

        The step size is the one that the first seed does best with on validation rows, at the compression that is shown, or
        at the smallest where it cannot be had there. Pruning at random is a control at the one that is shown.
        """
        made, step = dict[float, _Runs](), None
        others = [] if method == "random" else [one for one in _COMPRESSIONS if one != _SHOWN]
        for compression in (_SHOWN, *others):
            steps = (step,) if step is not None else _SUBSPACE_STEPS if method == "subspace" else _STEPS
            found = {one: self._trained(method, compression, seeds[0], one) for one in steps}
            tried = {one: network for one, network in found.items() if network is not None}
            if not tried:
                continue
            if step is None:
                step = max(tried, key=lambda one, tried=tried: self._quality(tried[one], "validation"))
            first = tried[step]
            models = (first, *(self._trained(method, compression, seed, step) for seed in seeds[1:]))
            made[compression] = _Runs(first.stored, [self._quality(model, "test") for model in models])
        return made


def _open(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


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
    cost=lambda subject: trainings(1.3 * _trainings(subject))(subject),
)
def parameter_sharing(subject: Subject, budget: Budget) -> Finding:
    """Quality of networks that store a quarter, a twentieth and a hundredth of their weights, by which are stored."""
    learner, full, chance = _Learner.of(subject), subject.quality(), subject.data.chance
    seeds = range(budget.seed, budget.seed + _SEEDS)
    total = sum(weight.parameter.numel() for weight in weight_tensors(learner.build(budget.seed)))
    runs = {method: found for method in _ways(subject) if (found := learner.runs(method, seeds))}
    within = (0.0, 1.0) if subject.data.task == "classification" else (-np.inf, 1.0)

    def mean(run: _Runs) -> Estimate:
        return mean_of_runs(run.qualities, unit=subject.metric, within=within)

    points = {
        _WORDS[method]: [Point(run.stored, mean(run)) for run in by_size.values()] for method, by_size in runs.items()
    }
    kept = {method: mean(by_size[_SHOWN]) for method, by_size in runs.items() if _SHOWN in by_size}
    kinds = {
        "subspace": "random", "tucker": "closed-form", "lora": "closed-form", "synflow": "closed-form", "random": "random"
    }  # fmt: skip
    stored = max(1, int(total / _SHOWN))
    comparison = Comparison(
        f"{subject.metric} with {stored:,} of {total:,} weights stored",
        kept["sharing"],
        (
            *(Control(_WORDS[name], kept[name], kind) for name, kind in kinds.items() if name in kept),  # type: ignore[arg-type]
            Control("the network as it is", full, "reference"),
        ),
    )
    numbers = {f"{_WORDS[name]}, {runs[name][_SHOWN].stored:,} numbers": value for name, value in kept.items()}
    numbers[f"{subject.metric} of the network as it is"] = full
    for method, by_size in runs.items():
        curve = QualityCurve.from_runs(
            {run.stored: run.qualities for run in by_size.values()}, chance=chance, reference=full.value,
            name=_WORDS[method], metric=subject.metric, total_dimension=total,
        )  # fmt: skip
        found = curve.smallest(above_chance=True).estimate
        if found is not None and len(by_size) > 1:
            name = f"numbers stored for 90 % of the gain above chance, {_WORDS[method]}"
            numbers[name] = replace(found, unit="numbers")
    front = dict.fromkeys(name for name, _, _ in not_beaten(points, nothing=chance))
    return Finding(
        slug="parameter-sharing",
        headline=_headline(kept, full, stored, total, subject),
        numbers=numbers,
        comparison=comparison,
        figure=_figure(points, full.value, chance, subject.metric, total, budget.seed),
        reading="Fresh networks are trained that may store only so many numbers for their weights: an array that all weights are "
        "read from, coordinates of a random subspace, low-rank changes, adapters and prefixes where there are blocks for them, "
        "or the weights that two rules leave before training. Each has the better of two step sizes, found on validation rows "
        "at the middle size; bands are 95 % over seeds. The black line joins the points that no other reaches with as few "
        f"numbers: {', '.join(front) or 'none is better than chance'}. Below, how many weights read each number of the array: "
        "the fold used here spreads them evenly, independent hashing does not.",
        advice=_advice(kept),
        seed=budget.seed,
        caveats=(
            f"{_SEEDS} seeds, Adam by the subject's recipe; the paper trains with SGD.",
            "Biases and normalisation stay whole for all methods and are not counted; the subspace moves them too, and has as "
            "many coordinates more. What changes a random start needs the seed that gives the start again. The network as it "
            "is has learnt these rows already, so low-rank changes and adapters start where all others do, not from it.",
            "Low-rank changes and adapters have the largest rank that fits, so they may store fewer numbers than the others.",
            f"Sizes are {', '.join(f'{c:.0f}' for c in _COMPRESSIONS)} times fewer, so the smallest one that suffices is rough.",
            *_left_out(subject, runs),
        ),
    )


def _ways(subject: Subject) -> list[str]:
    """The methods that the network has a place for."""
    try:
        find_blocks(subject.predictor)
    except ModelError:
        return [method for method in _WORDS if method not in _BLOCKS]
    return list(_WORDS)


def _trainings(subject: Subject) -> int:
    ways = len(_ways(subject))
    return ways + _SEEDS + (ways - 1) * _SEEDS * len(_COMPRESSIONS)


def _left_out(subject: Subject, runs: Mapping[str, Mapping[float, _Runs]]) -> Iterator[str]:
    """What is not drawn, and why."""
    ways = _ways(subject)
    if not set(_BLOCKS) & set(ways):
        yield (
            "Adapters and prefixes are not drawn: adapters stand at the sub-blocks of a transformer, and prefixes are keys and "
            "values that its attention looks at. This network has no such blocks; a convolution or a linear layer looks at "
            "nothing that a prefix could be put in front of."
        )
    short = []
    for method in ways:
        missing = [c for c in _COMPRESSIONS if c not in runs.get(method, {}) and method != "random"]
        if missing:
            short.append(f"{_WORDS[method]} at {', '.join(f'{c:.0f}' for c in missing)} times fewer")
    if short:
        yield f"Not possible, since even the smallest holds more numbers: {'; '.join(short)}."


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
    points: Mapping[str, Sequence[Point]], full: float, chance: float, metric: str, total: int, seed: int
) -> go.Figure:
    figure = make_subplots(rows=2, cols=1, row_heights=[0.74, 0.26], vertical_spacing=0.18)
    levels = {"all weights": full, "chance": chance}
    draw(figure, points, nothing=chance, levels=levels, control=[_WORDS["random"]], row=1)
    slots = max(1, int(total / _SHOWN))
    for name, map_, ink in (("fold", FoldMap, INKS[0]), ("independent hashing", HashedMap, INKS[6])):
        count = torch.bincount(map_(total, slots, seed).load()).tolist()
        bars = go.Bar(x=list(range(len(count))), y=count, name=f"slots, {name}", marker_color=ink, showlegend=False)
        figure.add_trace(bars, row=2, col=1)
    figure.update_xaxes(type="log", title_text="numbers trained or kept in place of the weights", row=1, col=1)
    figure.update_yaxes(title_text=f"{metric} on test rows", row=1, col=1)
    figure.update_xaxes(title_text=f"weights that read one of the {slots:,} numbers", row=2, col=1)
    figure.update_yaxes(title_text="numbers", row=2, col=1)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.24}, height=600
    )
    return figure
