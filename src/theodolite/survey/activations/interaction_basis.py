"""The chart of hidden directions: how many each layer uses, and how they interact."""

import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor, nn

from theodolite.activations._basis import baseline_layer
from theodolite.activations.interaction_basis import (
    DegeneracyReport,
    InteractionBasis,
    RankWarning,
    degeneracy,
    kept_directions_curve,
)
from theodolite.core.curve import QualityCurve, SmallestDimension
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs, proportion
from theodolite.core.memory import chunks
from theodolite.core.sections import SectionError
from theodolite.core.subject import Rows, Subject
from theodolite.core.view import evaluation_mode
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_ROWS = 2_000
_WIDEST = 2_048
_NODES = 3
_ENOUGH = 0.98
_ROTATIONS = 5


def flat_nodes(subject: Subject) -> tuple[str, ...]:
    """Hidden layers whose activations are (rows, width), in the order they run; after a nonlinearity where there is one.

    The network's output is not among them, nor what runs more than once or is wider than 2,048.
    """
    model, seen, x = subject.predictor, list[tuple[str, int]](), subject.data.train.x[:7]

    def note(name: str, output: object) -> None:
        # a kernel or a mixing matrix has two axes too, but none of them is the rows
        if isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(x) and output.shape[1] > 1:
            seen.append((name, output.shape[1]))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and not any(module.children()):
                handle = module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
                stack.callback(handle.remove)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        model(x)
    order = [name for name, width in seen[:-1] if width <= _WIDEST]
    once = [name for name in order if order.count(name) == 1]
    nonlinear = [name for name in once if not isinstance(model.get_submodule(name), nn.Linear)]
    return tuple(nonlinear or once)[-_NODES:]


def _no_node(subject: Subject) -> str | None:
    if flat_nodes(subject):
        return None
    return f"needs a hidden layer with activations (rows, width) of at most {_WIDEST:,}; this network has none"


def _forecast(subject: Subject) -> float:
    """Seconds, from the time of one backward pass: one for each output, in rows of which a sample is timed."""
    x = subject.data.train.x[:128].clone().requires_grad_()
    with evaluation_mode(subject.predictor):
        out = subject.predictor(x)
        started = time.perf_counter()
        torch.autograd.grad(out.sum(), x)
    outputs = min(256, out.numel() // len(x))
    rows = min(_ROWS, len(subject.data.train)) / len(x)
    return 1 + 6 * (time.perf_counter() - started) * rows * outputs


def _basis(subject: Subject, nodes: tuple[str, ...], x: Tensor, budget: Budget) -> InteractionBasis:
    """Of as many of the nodes as make a chain: where something goes around the earlier ones, of the last alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)  # the page says how many rows there are
        for first in range(len(nodes)):
            basis = InteractionBasis.from_module(
                subject.predictor, nodes[first:], memory=budget.memory, seed=budget.seed
            )
            try:
                return basis.fit(x)
            except SectionError:
                if first == len(nodes) - 1:
                    raise
    raise AssertionError("there is at least one node")


def _local(subject: Subject, basis: InteractionBasis, x: Tensor, budget: Budget) -> InteractionBasis:
    """The basis of the same nodes by their influence on the next one alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        return InteractionBasis.from_module(
            subject.predictor, basis.sections_.names[:-1], target="next", memory=budget.memory, seed=budget.seed
        ).fit(x)


def _outputs(basis: InteractionBasis, x: Tensor, node: int, k: int, memory: int) -> Tensor:
    """What the network answers to ``x`` where only the first k directions of one node are kept."""
    sections, layer = basis.sections_, basis.layers_[node]
    parts = []
    for rows in chunks(len(x), sections.row_bytes(x, gradients=False), memory):
        (f,) = sections.nodes(x[rows], first=node, last=node)
        parts.append(sections.run(layer.keep(f, k), node))
    return torch.cat(parts)


@chart(
    "interaction-basis",
    needs=Needs(network=True, modalities=("tabular", "image", "text"), test=_no_node),
    cost=_forecast,
)
def interaction_basis(subject: Subject, budget: Budget) -> Finding:
    """How many directions of a hidden layer the output uses, and how many weights are free on these data."""
    data = subject.data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(budget.seed))[:_ROWS]
    x = data.train.x[order]
    basis = _basis(subject, flat_nodes(subject), x, budget)
    node = len(basis.layers_) - 2  # the last hidden layer: the last node is the output
    layer, name = basis.layers_[node], basis.sections_.names[node]
    asked = Rows(torch.cat([data.validation.x, data.test.x]), torch.cat([data.validation.y, data.test.y]))

    def quality(outputs: Tensor) -> float:
        right, cut = subject.correct(nn.Identity(), Rows(outputs, asked.y)), len(data.validation)
        if subject.holdout is None:
            return float(right[:cut].mean())
        return subject.holdout.ask((right[:cut], right[cut:]), name="interaction-basis kept directions").value

    curve = kept_directions_curve(basis, asked.x, quality, node)
    found = curve.smallest_reaching(_ENOUGH * curve.reference)
    k, ks = found.dimension or curve.dimensions[-1], curve.dimensions
    others = {"principal components": basis.baseline("pca"), "neurons": basis.baseline("neuron")}
    rotations = []
    for i in range(_ROTATIONS):
        turned = basis.baseline("random")
        turned.layers_ = tuple(
            baseline_layer(one, "random", seed=budget.seed * _ROTATIONS + i) for one in basis.layers_
        )
        rotations.append(turned)

    def beside(one: InteractionBasis) -> QualityCurve:
        x, y = data.validation.x, data.validation.y  # nothing is chosen by these, so they need no answers
        kept = [k for k in ks if k <= one.layers_[node].rank]
        return kept_directions_curve(
            one, x, lambda outputs: float(subject.correct(nn.Identity(), Rows(outputs, y)).mean()), node, kept
        )

    curves = {"interaction basis": curve, "local interaction basis": beside(_local(subject, basis, x, budget))}
    curves |= {kind: beside(other) for kind, other in others.items()}
    runs = [beside(other).runs for other in rotations]
    curves["random rotation"] = replace(curve, runs=np.concatenate(runs, axis=1))

    def on_test(one: InteractionBasis) -> Estimate:
        outputs = _outputs(one, data.test.x, node, k, budget.memory)
        right = subject.correct(nn.Identity(), Rows(outputs, data.test.y))
        if data.task == "classification":
            return proportion(int(right.sum()), len(right), unit=subject.metric)
        return mean_of_runs(right, unit=subject.metric, within=(0, 1))

    turned = mean_of_runs([on_test(one).value for one in rotations], unit=subject.metric, within=(0, 1))
    comparison = Comparison(
        f"{subject.metric} on the test rows with {k} of {layer.width} directions of {name}",
        on_test(basis),
        (
            *(
                Control(
                    f"the {k} {kind} of largest variance"
                    if k > 1
                    else f"the one of the {kind} with the largest variance",
                    on_test(other),
                    "closed-form",
                )
                for kind, other in others.items()
            ),
            Control(f"{k} direction{'s' * (k > 1)} of a random rotation", turned, "random"),
            Control("the untouched network", subject.quality(), "reference"),
        ),
    )
    report = degeneracy(subject.predictor, x, memory=budget.memory, seed=budget.seed)
    free = report.free_directions / report.parameters
    return Finding(
        slug="interaction-basis",
        headline=f"Layer {name} uses {layer.rank} of its {layer.width} directions, and {k} of them "
        f"{'keeps' if k == 1 else 'keep'} {_ENOUGH:.0%} of the quality; {report.free_directions:,} of {report.parameters:,} "
        f"weights ({free:.0%}) of the linear layers are free on these data.",
        numbers=_numbers(basis, report, node, found, comparison.estimate),
        comparison=comparison,
        figure=_figure(curves, basis, subject.metric),
        reading="Left: quality when only the first directions of the layer are kept and the rest is set to its mean, in five "
        "bases (the first as the reusable holdout answers, the others on validation rows). Right: how much each direction "
        "of a layer counts for the output, from the largest down (its variance, in units in which every direction has the "
        "same influence); where a line ends, the output does not depend on the rest.",
        advice=f"A low-rank factor of about {k} is enough for {name}: prune or factor what reads it, or choose adapters of that "
        "rank. InteractionBasis.transform gives the coordinates to look at.",
        seed=budget.seed,
        caveats=(
            f"Counted on {len(x):,} training rows: what is free on these rows need not be free on others.",
            "Free directions are a lower bound from two causes, dependent inputs and dependent influence on the output; "
            "convolutions are not counted.",
            *report.notes,
        ),
    )


def _numbers(
    basis: InteractionBasis, report: DegeneracyReport, node: int, found: SmallestDimension, quality: Estimate
) -> dict[str, Estimate]:
    numbers = {}
    for i, (layer, name) in enumerate(zip(basis.layers_[: node + 1], basis.sections_.names, strict=False)):
        numbers[f"{name}: directions used, of {layer.width}"] = Estimate.exact(layer.rank, "directions")
        if i == node:
            numbers[f"{name}: directions that vary at all"] = Estimate.exact(layer.rank_gram, "directions")
    if found.dimension is not None:
        numbers[f"directions for {_ENOUGH:.0%} of the quality"] = Estimate.exact(found.dimension, "directions")
    numbers["quality with them on the test rows"] = quality
    for row in report.rows:
        numbers[f"free directions of {row.name}, of {row.parameters:,} weights"] = Estimate.exact(row.free_directions)
    numbers["further directions of units that fire together"] = Estimate.exact(sum(r.sync_extra for r in report.rows))
    numbers["units that never fire"] = Estimate.exact(sum(row.dead for row in report.rows), "units")
    return numbers


def _figure(curves: Mapping[str, QualityCurve], basis: InteractionBasis, metric: str) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, column_widths=[0.58, 0.42], horizontal_spacing=0.12)
    for (name, curve), ink in zip(curves.items(), (INKS[0], INKS[5], INKS[1], INKS[2], INKS[6]), strict=True):
        spread = {"low": curve.runs.min(axis=1).tolist(), "high": curve.runs.max(axis=1).tolist()}
        band_line(
            figure, curve.dimensions, curve.mean.tolist(), name=name, ink=ink, row=1, col=1,
            dash="dot" if name == "random rotation" else None, **(spread if curve.runs.shape[1] > 1 else {}),
        )  # fmt: skip
    first = next(iter(curves.values()))
    level_line(figure, first.reference, "untouched", row=1)
    level_line(figure, first.chance, "none kept", row=1)
    hidden = zip(basis.layers_[:-1], basis.sections_.names, strict=False)
    for (layer, name), ink in zip(hidden, (INKS[3], INKS[4], INKS[1]), strict=False):
        values = layer.eigenvalues / layer.eigenvalues[0]
        band_line(
            figure, list(range(1, layer.rank + 1)), values.tolist(), name=f"spectrum of {name}", ink=ink, row=1, col=2
        )  # fmt: skip
    figure.update_xaxes(title_text="directions kept", type="log", row=1, col=1)
    figure.update_xaxes(title_text="direction", type="log", row=1, col=2)
    figure.update_yaxes(title_text=metric, row=1, col=1)
    figure.update_yaxes(title_text="share of the first", type="log", exponentformat="power", row=1, col=2)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.2}, height=430)
    return figure
