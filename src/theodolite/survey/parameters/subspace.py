"""The chart of the intrinsic dimension: quality against the coordinates of a random subspace of weight space."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import nn

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Rows, Subject
from theodolite.core.train import Recipe, train
from theodolite.parameters.subspace import IntrinsicDimension, SubspaceModel, measure_intrinsic_dimension
from theodolite.survey.chart import Budget, Needs, chart, trainings
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_LR = 0.3
"""Steps of Adam on the coordinates of a random subspace, of the reparametrization's own order and not of the weights'."""

_GRID = (2, 8, 32, 128, 512, 2048)
_PUBLISHED = {"MNIST, LeNet": 290, "MNIST, fully connected": 750, "CIFAR-10, LeNet": 2_900}
"""Li et al., 2018, figures 2, S7 and table S1: d at 90 % of the baseline."""


@dataclass(frozen=True, eq=False)
class _Trainer:
    """Trains fresh networks of the subject in a subspace, directly, or a few of their weights alone."""

    subject: Subject
    build: Callable[[int], nn.Module]
    recipe: Recipe

    @classmethod
    def of(cls, subject: Subject) -> "_Trainer":
        if subject.build is None or subject.recipe is None:
            raise InputError(f"{subject.name} cannot be trained again")
        return cls(subject, subject.build, subject.recipe)

    def fit(self, model: nn.Module, rows: Rows | None = None, lr: float = _LR) -> None:
        """By the subject's recipe; in a subspace with the larger steps that it takes, and the penalty on the weights."""
        rows = self.subject.data.train if rows is None else rows
        if not isinstance(model, SubspaceModel):
            train(model, rows.x, rows.y, recipe=self.recipe)
            return
        l2, penalty = self.recipe.l2, None
        if l2:
            penalty = lambda: l2 / 2 * model.squared_norm()  # noqa: E731
        train(model, rows.x, rows.y, recipe=self._large_steps(lr), penalty=penalty)

    def fit_weights(self, model: nn.Module, count: int, seed: int) -> None:
        """Train ``count`` weights drawn at random; all others keep their start."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        chosen = torch.zeros(sum(p.numel() for p in parameters))
        chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:count]] = 1
        with ExitStack() as stack:
            for parameter, mask in zip(parameters, chosen.split([p.numel() for p in parameters]), strict=True):
                mask = mask.view_as(parameter).to(parameter)
                handle = parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
                stack.callback(handle.remove)
            rows = self.subject.data.train
            train(model, rows.x, rows.y, recipe=self._large_steps(_LR).with_seed(seed))

    def _large_steps(self, lr: float) -> Recipe:
        return replace(self.recipe, lr=lr, optimizer="adam", momentum=0.0, schedule="cosine", l2=0.0, patience=None)

    def quality(self, model: nn.Module, name: str) -> float:
        """What the reusable holdout answers about the model's quality."""
        data = self.subject.data
        validation, test = (self.subject.correct(model, rows) for rows in (data.validation, data.test))
        if self.subject.holdout is None:
            return float(test.mean())
        return self.subject.holdout.ask((validation, test), name=name).value

    def direct(self, seed: int) -> float:
        """Quality of training all weights, from the start and in the order of ``seed``."""
        model = self.build(seed)
        rows = self.subject.data.train
        train(model, rows.x, rows.y, recipe=self.recipe.with_seed(seed))
        return self.quality(model, "direct training")

    def search(self, seeds: tuple[int, ...], direct: float) -> IntrinsicDimension:
        """The whole curve in steps of four, and one point more below the number that it gives."""

        def measure(dimensions: list[int]) -> IntrinsicDimension:
            return measure_intrinsic_dimension(
                self.build, self.fit, lambda model: self.quality(model, "intrinsic-dimension search"), dimensions,
                seeds=seeds, baseline=direct,
            )  # fmt: skip

        total = sum(p.numel() for p in self.build(seeds[0]).parameters() if p.requires_grad)
        coarse = measure([d for d in _GRID if d <= total] or [1])
        if coarse.dimension is None or coarse.dimension == 1:
            return coarse
        fine = measure([coarse.dimension // 2])
        runs = {d: row.tolist() for part in (coarse, fine) for d, row in zip(part.curve.dimensions, part.curve.runs)}
        curve = QualityCurve.from_runs(
            runs, chance=coarse.curve.chance, reference=direct, name=coarse.curve.name, metric=self.subject.metric,
            total_dimension=total,
        )  # fmt: skip
        return replace(coarse if fine.dimension is None else fine, curve=curve)

    def shuffled(self, dimension: int, seeds: tuple[int, ...]) -> Estimate:
        """Accuracy on the training rows themselves after training on shuffled labels, by the better of two step sizes."""
        found = {_LR: list[float](), _LR / 10: list[float]()}
        for seed in seeds:
            rows = self.subject.data.train
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            wrong = Rows(rows.x, rows.y[order])
            for lr, reached in found.items():
                model = SubspaceModel(self.build(seed), dimension, seed=seed)
                self.fit(model, wrong, lr)
                reached.append(float(self.subject.correct(model, wrong).mean()))
        return mean_of_runs(max(found.values(), key=sum), unit="accuracy", within=(0, 1))


@chart("intrinsic-dimension", needs=Needs(network=True, retrainable=True), cost=trainings(34))
def intrinsic_dimension(subject: Subject, budget: Budget) -> Finding:
    """How many coordinates of a random subspace of weight space reach 90 % of the quality of direct training."""
    data, trainer = subject.data, _Trainer.of(subject)
    seeds = tuple(range(budget.seed, budget.seed + 3))

    def mean(values: Sequence[float]) -> Estimate:
        return mean_of_runs(values, unit=subject.metric, within=(-np.inf, 1))

    direct = mean([trainer.direct(seed) for seed in seeds])
    measured = trainer.search(seeds, direct.value)
    total, curve = measured.total_dimension, measured.curve
    shown = measured.dimension or curve.dimensions[-1]
    few = []
    for seed in seeds:
        model = trainer.build(seed)
        trainer.fit_weights(model, shown, seed)
        few.append(trainer.quality(model, "as many weights chosen at random"))
    chance = Estimate.exact(data.chance, subject.metric)
    comparison = Comparison(
        f"{subject.metric} with {shown:,} coordinates",
        mean(curve.runs[curve.dimensions.index(shown)].tolist()),
        (
            Control(f"{shown:,} weights chosen at random", mean(few), "random"),
            Control("always the commonest class" if data.classes else "the mean of the targets", chance, "null"),
            Control("direct training of all weights", direct, "reference"),
        ),
    )
    numbers = _numbers(measured, comparison.estimate, direct, shown)
    shuffled = None
    if data.task == "classification" and measured.dimension is not None:
        shuffled = trainer.shuffled(min(total, 10 * shown), seeds)
        numbers[f"training accuracy on shuffled labels, {min(total, 10 * shown):,} coordinates"] = shuffled
    # of a lopsided task 90 % of the quality is what a constant answer has too
    beaten = all(control.kind != "null" for control in comparison.loses_to)
    idle = None if beaten else "the commonest class" if data.classes else "the mean of the targets"
    gain = curve.smallest(above_chance=True).dimension
    return Finding(
        slug="intrinsic-dimension",
        headline=_headline(measured, shuffled, shown, idle, gain),
        numbers=numbers,
        comparison=comparison,
        figure=_figure(measured, subject.metric, data.name),
        reading=f"Quality when only a random subspace of the {total:,} weights is trained, against the number of its "
        "coordinates; bands span the runs. The found number is where the line first reaches 90 % of direct training. Below, "
        "where this task stands among those of the paper.",
        advice=_advice(measured, total, idle),
        seed=budget.seed,
        caveats=(
            f"The {measured.projection} projection, {len(seeds)} seeds, the subject's own number of epochs, steps of {_LR}; "
            "a longer training needs fewer coordinates.",
            "The candidates grow by factors of two to four, so the number is right to a factor of two.",
        ),
    )


def _numbers(measured: IntrinsicDimension, quality: Estimate, direct: Estimate, shown: int) -> dict[str, Estimate]:
    total, curve = measured.total_dimension, measured.curve
    numbers = {"parameters in all": Estimate.exact(total, "dimensions")}
    found = curve.smallest_reaching(measured.threshold * measured.reference)
    if found.estimate is not None and measured.compression is not None and measured.description_bits is not None:
        d = found.estimate
        numbers["intrinsic dimension at 90 % of direct training"] = d
        numbers["parameters per coordinate"] = Estimate(total / d.value, total / d.high, total / d.low, "x")
        numbers["description of the trained network, beside its code"] = Estimate.exact(
            measured.description_bits, "bits"
        )
    gain = curve.smallest(above_chance=True)
    if gain.estimate is not None:
        numbers["dimension at 90 % of the gain above the untrained network"] = gain.estimate
    numbers[f"quality with {shown:,} coordinates"] = quality
    numbers["quality of direct training"] = direct
    return numbers


def _headline(
    measured: IntrinsicDimension, shuffled: Estimate | None, shown: int, idle: str | None, gain: int | None
) -> str:
    total = measured.total_dimension
    if measured.dimension is None or measured.compression is None:
        return (
            f"More than {shown:,} of {total:,} random directions are needed for 90 % of direct training: with {shown:,} the "
            f"network reaches {measured.curve.mean[-1]:.3f} of {measured.reference:.3f}."
        )
    text = (
        f"{measured.dimension:,} of {total:,} dimensions ({measured.compression:,.0f} times fewer) reach 90 % of direct "
        "training"
    )
    if idle is not None:
        told = f"takes {gain:,}" if gain is not None else "takes more than were tried"
        return f"{text}, but are not shown to beat {idle} as every answer; 90 % of the gain above the untrained network {told}."
    if shuffled is None:
        return f"{text}."
    ten = min(total, 10 * shown)
    verb = "even memorise" if shuffled.value >= 0.9 else "do not memorise"
    return f"{text}; {ten:,} {verb} shuffled labels ({shuffled.value:.0%} of them)."


def _advice(measured: IntrinsicDimension, total: int, idle: str | None) -> str:
    if measured.dimension is None:
        return (
            "Train longer or widen the search with theodolite.parameters.subspace.measure_intrinsic_dimension; a task that "
            "needs most of its weights is memorised or badly matched by the architecture."
        )
    if idle is not None:
        return (
            f"Do not read this number alone: over the seeds, networks of so few dimensions are not shown to beat {idle} as "
            "every answer. Compare architectures by the dimension at 90 % of the gain, or give "
            "theodolite.parameters.subspace.measure_intrinsic_dimension another quality and more seeds."
        )
    return (
        f"Compare architectures by this number: fewer dimensions suit the data better. A checkpoint of {measured.dimension:,} "
        f"numbers and two seeds instead of {total:,} comes from SubspaceModel(network, {measured.dimension}).save(path)."
    )


def _figure(measured: IntrinsicDimension, metric: str, name: str) -> go.Figure:
    curve = measured.curve
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.76, 0.24], vertical_spacing=0.06)
    low, high = np.nanmin(curve.runs, axis=1).tolist(), np.nanmax(curve.runs, axis=1).tolist()
    band_line(
        figure, curve.dimensions, curve.mean.tolist(), name="trained in a random subspace", ink=INKS[0], low=low, high=high,
        row=1, col=1,
    )  # fmt: skip
    level_line(figure, measured.reference, "direct training", row=1)
    level_line(figure, measured.threshold * measured.reference, "90 % of it", dash="dash", row=1)
    level_line(figure, curve.chance, "untrained", row=1)
    places = {**_PUBLISHED, **({name: measured.dimension} if measured.dimension else {})}
    for i, (task, d) in enumerate(places.items()):
        figure.add_trace(
            go.Scatter(
                x=[d], y=[i], mode="markers+text", text=[f"{task}: {d:,}"],
                textposition="middle left" if d > 250 else "middle right",
                showlegend=False, hoverinfo="skip",
                marker={"size": 11, "symbol": "diamond" if task == name else "circle",
                        "color": INKS[0] if task == name else INKS[6]},
            ),
            row=2, col=1,
        )  # fmt: skip
    if measured.dimension:
        figure.add_vline(x=measured.dimension, line_dash="dot", line_width=1, line_color=INKS[0])
    figure.update_xaxes(type="log")
    figure.update_xaxes(title_text="coordinates trained", row=2, col=1)
    figure.update_yaxes(title_text=metric, row=1, col=1)
    figure.update_yaxes(showticklabels=False, range=[-0.8, len(places) - 0.2], row=2, col=1)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.12}, height=480
    )
    return figure
