"""The chart of function interpretation: which answers of a model a formula describes, and where the description is wrong."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from plotly.subplots import make_subplots

from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.explanations.function_interpretation import (
    BlackBox,
    ConstantInterpreter,
    Interpretation,
    PolynomialInterpreter,
    SymbolicInterpreter,
    interpret,
)
from theodolite.explanations.function_interpretation.scores import run_code
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.explanations.probe_words import described_by_words, no_words
from theodolite.survey.figures import INKS
from theodolite.survey.finding import Finding

_UNITS, _PANELS, _BUDGET, _HELD_OUT = 10, 6, 160, 200
_FEATURES = 60  # columns that are tried, the most variable first
_FLAT = 1e-6
_GOOD = 0.9
_WIDE = 0.1  # of the range: narrower exceptions are small print


@dataclass(frozen=True, eq=False)
class _Unit:
    """One output along one column, in the units of its file, the others at their medians."""

    name: str
    low: float
    high: float
    column: int
    output: int
    view: Any
    base: torch.Tensor
    scaling: tuple[float, float]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        rows = self.base.repeat(len(x), 1)
        rows[:, self.column] = torch.as_tensor((x - self.scaling[0]) / self.scaling[1], dtype=rows.dtype)
        return self.view(rows)[:, self.output].double().numpy()


def _units(subject: Subject) -> list[_Unit]:
    """The output of each column along which it moves most, as a share of its spread over the training rows."""
    x = subject.data.train.x
    view = subject.view("probability" if subject.data.task == "classification" else "value")
    names = subject.data.features or tuple(f"column {i}" for i in range(x.shape[1]))
    base = x.median(dim=0).values[None]
    spread = view(x[:2000]).double().numpy().std(axis=0)
    ends = np.quantile(x.numpy(), (0.01, 0.99), axis=0)
    kinds = np.array([len(torch.unique(x[:2000, i])) for i in range(x.shape[1])])
    columns = [i for i in np.argsort(-kinds, kind="stable")[:_FEATURES] if ends[1, i] > ends[0, i] and kinds[i] > 5]
    found = []
    for i in columns:
        rows = base.repeat(33, 1)
        rows[:, i] = torch.linspace(float(ends[0, i]), float(ends[1, i]), 33)
        moved = view(rows).double().numpy().std(axis=0) / np.maximum(spread, 1e-12)
        output = int(np.argmax(moved))
        if moved[output] > _FLAT:
            what = subject.data.classes[output] if subject.data.classes else "the prediction"
            shift, scale = subject.data.scaling[i] if subject.data.scaling else (0.0, 1.0)
            low, high = (shift + scale * float(end) for end in ends[:, i])
            unit = _Unit(f"{what} by {names[i]}", low, high, int(i), output, view, base, (shift, scale))
            found.append((float(moved[output]), unit))
    return [unit for _, unit in sorted(found, key=lambda pair: -pair[0])[:_UNITS]]


def _refusal(subject: Subject) -> str | None:
    return no_words(subject) if subject.data.modality == "text" else _too_flat(subject)


def _too_flat(subject: Subject) -> str | None:
    if len(_units(subject)) < 2:
        return "needs two columns of more than 5 values along which the answers move while the others stay at their medians"
    return None


def _r2(truth: np.ndarray, told: Interpretation, x: np.ndarray) -> float:
    """Of a description's program on held-out inputs, cut at zero: below it the description says nothing."""
    values, _ = run_code(told.code, x)
    if values is None or not np.isfinite(values).all() or truth.var() == 0:
        return 0.0
    return max(0.0, 1 - float(((truth - values) ** 2).mean() / truth.var()))


@chart(
    "function-interpretation",
    needs=Needs(language_model=None, modalities=("tabular", "text"), test=_refusal),
    cost=seconds(8),
)
def function_interpretation(subject: Subject, budget: Budget) -> Finding:
    """How well formulas found by experiment predict a model's answers along one column at a time; of a model of texts, how well
    the words that move its units tell which others do.
    """
    if subject.data.modality == "text":
        return described_by_words(subject, budget)
    units = _units(subject)
    rng = np.random.default_rng([budget.seed, 5])
    runners = {
        "described": SymbolicInterpreter(seed=budget.seed),
        "cubic": PolynomialInterpreter(3),
        "constant": ConstantInterpreter(),
    }
    told = {
        name: [interpret(BlackBox(unit, _BUDGET, bounds=(unit.low, unit.high)), runner) for unit in units]
        for name, runner in runners.items()
    }
    inputs = [np.sort(rng.uniform(unit.low, unit.high, _HELD_OUT)) for unit in units]
    truth = [unit(x) for unit, x in zip(units, inputs, strict=True)]
    scores = {
        name: np.array([_r2(y, one, x) for y, one, x in zip(truth, made, inputs, strict=True)])
        for name, made in told.items()
    }
    shuffled = np.array([_shuffled(units, told["described"], truth, inputs, i) for i in range(len(units))])
    ours = scores["described"]

    def mean(values: np.ndarray) -> Estimate:
        return mean_of_runs(values, unit="R2", within=(0, 1))

    comparison = Comparison(
        f"R2 of the described curves on held-out inputs, mean of {len(units)}",
        mean(ours),
        (
            Control("the cubic through the same range", mean(scores["cubic"]), "closed-form"),
            Control("another curve's description", mean(shuffled), "random"),
            Control("a constant", mean(scores["constant"]), "null"),
        ),
    )
    good, cubic, worst = int((ours > _GOOD).sum()), int((scores["cubic"] > _GOOD).sum()), int(np.argmin(ours))
    headline = (
        f"{good} of {len(units)} curves of the model have a description that predicts held-out answers with R² > {_GOOD}, "
        f"{cubic} a cubic that does"
    )
    if ours[worst] <= _GOOD:
        headline += f"; {units[worst].name} is described worst (R² {ours[worst]:.2f})"
    numbers = {
        "mean R2 of the descriptions": mean(ours),
        f"curves described with R2 > {_GOOD}": Estimate.exact(good, f"of {len(units)}"),
        f"curves that a cubic describes with R2 > {_GOOD}": Estimate.exact(cubic, f"of {len(units)}"),
    }
    return Finding(
        slug="function-interpretation",
        headline=headline + ".",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(units, told["described"], truth, inputs, ours),
        reading="One panel a curve: an answer of the model as one column moves between its 1 % and 99 % quantiles and the others "
        "stay at their medians. The line is the model, the dashes what the description predicts for inputs that were not asked. "
        f"An R² of 1 is exact, 0 no better than the mean. The first panel's description: {told['described'][0].description}.",
        advice=_advice(units, told["described"], ours),
        seed=budget.seed,
        caveats=(
            "Other columns stay at their medians: where columns interact, the curve of another row looks different.",
            f"The {len(units)} columns along which answers move most; intervals are over them.",
            "Descriptions are formulas; a language model writes sentences: theodolite run function-interpretation --reader URL "
            "--reader-model NAME.",
        ),
    )  # fmt: skip


def _shuffled(
    units: list[_Unit], told: list[Interpretation], truth: list[np.ndarray], inputs: list[np.ndarray], i: int
) -> float:
    """R2 of the next unit's description, the inputs moved to its range."""
    other = units[(i + 1) % len(units)]
    share = (inputs[i] - units[i].low) / (units[i].high - units[i].low)
    return _r2(truth[i], told[(i + 1) % len(units)], other.low + share * (other.high - other.low))


def _interval_share(interval: tuple[float, float] | None, unit: _Unit) -> float:
    """How much of a unit's range an interval takes; 0 where there is none."""
    if interval is None:
        return 0.0
    return (min(interval[1], unit.high) - max(interval[0], unit.low)) / (unit.high - unit.low)


def _where(interval: tuple[float, float] | None) -> str:
    """An interval in words."""
    low, high = interval or (-np.inf, np.inf)
    if np.isinf(low):
        return f"below {high:.4g}"
    return f"above {low:.4g}" if np.isinf(high) else f"between {low:.4g} and {high:.4g}"


def _advice(units: list[_Unit], told: list[Interpretation], r2: np.ndarray) -> str:
    wrong = [
        (unit, one)
        for unit, one, score in zip(units, told, r2, strict=True)
        if score > _GOOD and _interval_share(one.interval, unit) >= _WIDE
    ]
    if wrong:
        unit, one = wrong[0]
        return f"{unit.name} follows one rule except {_where(one.interval)}, where it is about constant: look at the rows there."
    poor = [unit.name for unit, score in zip(units, r2, strict=True) if score <= _GOOD]
    if poor:
        return f"No short formula holds for {poor[0]}: read that curve itself, not a sentence about it."
    return (
        "The curves follow short formulas, which theodolite.explanations.function_interpretation.interpret gives as code; check "
        "them on a row that matters to you."
    )


def _figure(
    units: list[_Unit], told: list[Interpretation], truth: list[np.ndarray], inputs: list[np.ndarray], r2: np.ndarray
) -> Any:
    shown = min(_PANELS, len(units))
    titles = [f"{units[i].name} (R² {r2[i]:.2f})" for i in range(shown)]
    figure = make_subplots(rows=-(-shown // 2), cols=2, subplot_titles=titles, vertical_spacing=0.12)
    for i in range(shown):
        row, col = i // 2 + 1, i % 2 + 1
        values, _ = run_code(told[i].code, inputs[i])
        lines: list[tuple[str, np.ndarray, str, str | None]] = [("the model", truth[i], INKS[0], None)]
        if values is not None:
            lines.append(("described", np.where(np.isfinite(values), values, np.nan), INKS[1], "dash"))
        for name, y, ink, dash in lines:
            made = [None if np.isnan(one) else float(one) for one in y]
            figure.add_scatter(
                x=inputs[i].tolist(), y=made, mode="lines", name=name, line={"color": ink, "dash": dash}, showlegend=i == 0,
                row=row, col=col,
            )  # fmt: skip
    figure.update_annotations(font_size=11)
    figure.update_layout(height=230 * -(-shown // 2) + 60, margin={"l": 50, "r": 20, "t": 50, "b": 40})
    return figure
