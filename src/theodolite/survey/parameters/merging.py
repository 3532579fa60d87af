"""The chart of merging: whether separately tuned copies of the network can be put together by weights alone."""

import copy
from dataclasses import replace

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import nn

from theodolite.core.errors import InputError
from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.core.subject import Subject
from theodolite.core.train import train
from theodolite.parameters.merging import MergeResult, accuracy_fitness, evolve_weights
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_EVALUATIONS = 150
_LOOKS = 3 * _EVALUATIONS  # of the search, of the grid and of the random search
_ROWS = 1_000  # that a candidate is scored on
_BASE = 0.1  # share of the training rows that the base has seen
_TUNING = 4  # a copy is tuned for this part of the recipe's epochs


def _cost(subject: Subject) -> float:
    """Trainings, and for each candidate a forward pass, which takes a third of a training step on as many rows."""
    if subject.recipe is None:
        raise InputError(f"{subject.name} cannot be trained again")
    scored = min(_ROWS, len(subject.data.validation))
    a_pass = subject.training_seconds / subject.recipe.epochs * scored / len(subject.data.train) / 3
    return (_BASE + 1 / _TUNING) * subject.training_seconds + _LOOKS * (a_pass + 2e-3)


def tuned_copies(subject: Subject, seed: int) -> tuple[nn.Module, list[nn.Module], int]:
    """A base trained on a tenth of the rows, two copies tuned on half of the classes each, and the number of the first half."""
    if subject.build is None or subject.recipe is None:
        raise InputError(f"{subject.name} cannot be trained again")
    rows, half = subject.data.train, len(subject.data.classes) // 2
    recipe = replace(subject.recipe.with_seed(seed), patience=None)
    base = subject.build(seed)
    few = rows.head(max(50, round(_BASE * len(rows))))
    train(base, few.x, few.y, recipe=recipe)
    short, copies = replace(recipe, epochs=max(1, recipe.epochs // _TUNING)), []
    for part in (rows.y < half, rows.y >= half):
        one = copy.deepcopy(base)
        train(one, rows.x[part], rows.y[part], recipe=short)
        copies.append(one.eval())
    return base.eval(), copies, half


def _merged(subject: Subject, base: nn.Module, copies: list[nn.Module], seed: int) -> MergeResult:
    data = subject.data
    few = data.validation.head(_ROWS)
    normed = any(name.endswith("running_var") for name in base.state_dict())
    return evolve_weights(
        copies, accuracy_fitness(few.x, few.y), base=base, max_evaluations=_EVALUATIONS, seed=seed,
        test=accuracy_fitness(data.test.x, data.test.y), baselines=["sources", "average", "grid", "random"],
        recompute_statistics=data.train.head(_ROWS).x if normed else None,
    )  # fmt: skip


def _halves_are_there(subject: Subject) -> str | None:
    half, y = len(subject.data.classes) // 2, subject.data.train.y
    if min(int((y < half).sum()), int((y >= half).sum())) < 20:
        return "needs at least 20 training rows in each half of the classes"
    return None


@chart(
    "evolutionary-merging",
    needs=Needs(network=True, retrainable=True, task="classification", classes=4, test=_halves_are_there),
    cost=_cost,
)
def merged_halves(subject: Subject, budget: Budget) -> Finding:
    """Whether two copies that know half of the classes each can be merged into one that knows all, without training."""
    with torch.random.fork_rng(devices=[]):
        base, copies, half = tuned_copies(subject, budget.seed)
        found = _merged(subject, base, copies, budget.seed)
    rows = len(subject.data.test)

    def share(value: float) -> Estimate:
        return proportion(round(value * rows), rows, unit="accuracy")

    table = found.baselines
    tests = dict(zip(table["baseline"], table["test"], strict=True))
    ours = share(subject.quality(found.model()).value)
    alone = [share(tests[f"source {k}"]) for k in (1, 2)]
    grid = next(name for name in tests if name.startswith("best global"))
    controls = {
        "the plain average of the two": (share(tests["uniform average"]), "closed-form"),
        f"{grid}, one for the whole network": (share(tests[grid]), "closed-form"),
        f"the best of {_EVALUATIONS} random recipes": (share(tests["random search"]), "random"),
        "the better copy alone": (max(alone, key=lambda one: one.value), "null"),
        "the base that both were tuned from": (share(subject.quality(base).value), "null"),
    }
    comparison = Comparison(
        "accuracy of the evolved merge on all classes",
        ours,
        tuple(Control(name, value, kind) for name, (value, kind) in controls.items()),  # type: ignore[arg-type]
    )
    average, best = controls["the plain average of the two"][0], controls["the better copy alone"][0]
    whole = subject.quality()
    numbers = {
        "evolved merge": ours,
        "copy tuned on the first half of the classes": alone[0],
        "copy tuned on the second half": alone[1],
        "plain average": average,
        "the subject itself, trained on all": whole,
        "accuracy in the search, too good": Estimate.exact(found.fitness, "accuracy"),
    }
    return Finding(
        slug="evolutionary-merging",
        headline=f"Two copies tuned on half of the classes each ({alone[0].value:.0%} and {alone[1].value:.0%} of all rows) "
        f"merge without training into one network with {ours.value:.1%}; their plain average has {average.value:.1%}, the "
        f"network trained on all {whole.value:.1%}.",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(found),
        reading=f"A base is trained on a tenth of the rows; one copy is tuned on classes {_named(subject, 0, half)}, another on "
        f"{_named(subject, half, None)}. Left: the best accuracy so far while evolution weighs the two, group by group of "
        "tensors, with what simple recipes reach on the same rows. Right: the weight of each copy in each group.",
        advice=_advice(ours, average, best, whole),
        seed=budget.seed,
        caveats=(
            "One base and one pair of copies, tuned here; your own checkpoints are merged by: theodolite run "
            "evolutionary-merging A B --base BASE --model package.module:factory --data FILE.",
            f"The recipe was chosen on {min(_ROWS, len(subject.data.validation)):,} validation rows and is reported on the test "
            "rows; intervals are over test rows.",
        ),
    )  # fmt: skip


def _named(subject: Subject, start: int, stop: int | None) -> str:
    names = subject.data.classes[start:stop]
    return ", ".join(names) if len(names) <= 5 else f"{names[0]} to {names[-1]}"


def _advice(ours: Estimate, average: Estimate, best: Estimate, whole: Estimate) -> str:
    if ours.low <= best.high:
        return (
            "Copies of this network that are tuned apart do not merge well: tune one copy on all data, or tune for fewer steps "
            "before merging."
        )
    kept = f"The merge keeps {ours.value / whole.value:.0%} of the accuracy of training on all data at once. "
    if ours.low <= average.high:
        return kept + "The plain average is not clearly worse, so try that first; it needs no search."
    return kept + "Where data cannot be brought together, tune copies apart and merge them by evolve_weights."


def _figure(found: MergeResult) -> go.Figure:
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.6, 0.4],
        horizontal_spacing=0.14,
        subplot_titles=("search", "weight of each copy"),
    )
    band_line(
        figure, found.history["evaluation"].tolist(), found.history["best"].tolist(), name="best merge so far", ink=INKS[0],
        row=1, col=1, legend=False,
    )  # fmt: skip
    table = found.baselines
    is_copy = table["baseline"].str.startswith("source")
    level_line(figure, float(table.loc[is_copy, "fitness"].max()), "better copy alone", row=1)
    for name, value in zip(table.loc[~is_copy, "baseline"], table.loc[~is_copy, "fitness"], strict=True):
        level_line(figure, float(value), name, row=1)
    figure.update_xaxes(title_text="candidates", row=1, col=1)
    figure.update_yaxes(title_text="accuracy in the search", tickformat=".0%", row=1, col=1)
    wide = found.weights.pivot(index="group", columns="source", values="weight")
    wide = wide.loc[list(dict.fromkeys(found.weights["group"]))]
    largest = float(wide.abs().to_numpy().max())
    figure.add_heatmap(
        z=wide.to_numpy().tolist(), x=["first half", "second half"], y=list(wide.index), zmin=-largest, zmax=largest,
        colorscale="RdBu", row=1, col=2,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", row=1, col=2)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 40, "b": 50})
    return figure
