"""The chart of program sets: how much of a language model's code must be left open before a promise can be kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, proportion
from theodolite.core.subject import Subject
from theodolite.core.view import evaluation_mode
from theodolite.language.local import LocalModel
from theodolite.predictions.program_sets import (
    Generation,
    PartialProgram,
    ProgramSetCalibrator,
    choose_level,
    generate,
)
from theodolite.predictions.program_sets.returns import ReturnLine, return_lines
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS
from theodolite.survey.finding import Finding

_CALIBRATION, _TEST = 48, 24
_LONGEST, _TOKENS, _WIDEST = 250, 16, 40  # characters of a prompt, tokens to write, characters of the right line
_WINDOW = 300
_EPSILON, _DELTA = 0.2, 0.1
_EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_HOLES, _MAIN = (1, 2, 3, 4), 3
_OURS, _GREEDY = "nested-dp", "greedy"
_FLOPS = 4e10  # what one core does
_READ = 90  # tokens of a prompt, about


@dataclass(frozen=True, eq=False)
class _Sets:
    """The sets of every line at every level: whether they miss the right line, and the share of the nodes that is removed."""

    families: list[list[PartialProgram]]
    errors: np.ndarray
    removed: np.ndarray

    def calibrated(self, epsilon: float) -> tuple[int, np.ndarray, np.ndarray]:
        """The level, and of the test lines whether their sets hold the right line and the removed share."""
        level = choose_level(self.errors[:_CALIBRATION], epsilon, _DELTA)
        rest = slice(_CALIBRATION, None)
        if level == self.errors.shape[1]:  # only a hole at the root keeps the promise
            n = len(self.errors) - _CALIBRATION
            return level, np.ones(n, dtype=bool), np.ones(n)
        return level, ~self.errors[rest, level], self.removed[rest, level]


def _refusal(subject: Subject) -> str | None:
    if subject.tokenizer is None:
        return "needs the language model's tokenizer, to write code and tell its log-probabilities"
    window = getattr(subject.predictor.config, "max_position_embeddings", None)
    if window is not None and window < _WINDOW:
        return f"needs a context of {_WINDOW} tokens for a function and a line; this model has {window}"
    return None


def _forecast(subject: Subject) -> float:
    """Seconds, by the number of parameters."""
    tokens = (_CALIBRATION + _TEST) * (_READ + 2 * _TOKENS)
    return 10 + 2.0 * (subject.parameter_count or 0) * tokens / _FLOPS


def _lines(seed: int) -> list[ReturnLine]:
    """Return lines of the standard library, one of a file, that a few tokens can write."""
    found = return_lines(count=2 * (_CALIBRATION + _TEST), longest=_LONGEST, seed=seed)
    return [one for one in found if len(one.rest) <= _WIDEST][: _CALIBRATION + _TEST]


def _sets(written: Sequence[Generation], right: Sequence[str], holes: int, solver: str) -> _Sets:
    calibrator = ProgramSetCalibrator(holes, solver=solver)
    families = calibrator.families(written)
    removed = np.array([[one.removed_fraction for one in family] for family in families])
    return _Sets(families, calibrator.errors(families, right), removed)


@chart("pac-program-sets", needs=Needs(language_model=True, rows=1, test=_refusal), cost=_forecast)
def program_sets(subject: Subject, budget: Budget) -> Finding:
    """Coverage and size of the sets on lines that were not calibrated on, beside the greedy sets and all-or-nothing."""
    lines = _lines(budget.seed)
    right = [one.rest for one in lines]
    model = LocalModel.of(subject.name, subject.predictor, subject.tokenizer)
    with evaluation_mode(subject.predictor):
        written = generate(model, [one.prompt for one in lines], max_tokens=_TOKENS)
    sets = {(m, solver): _sets(written, right, m, solver) for m in _HOLES for solver in (_OURS, _GREEDY)}
    main = sets[_MAIN, _OURS]
    whole = _sets(written, right, 1, "none")
    parsed = np.array([not family[0].tree.unparsed for family in whole.families])
    exact = (~whole.errors[:, 0] & parsed)[_CALIBRATION:]
    n = len(exact)
    level, holds, removed = main.calibrated(_EPSILON)
    coverage, point = (proportion(int(right.sum()), n, unit="of the sets") for right in (holds, exact))
    kept = {
        "with at most 3 holes": 1 - removed,
        "greedy": 1 - sets[_MAIN, _GREEDY].calibrated(_EPSILON)[2],
        "all or nothing": 1 - _sets(written, right, 1, "abstain").calibrated(_EPSILON)[2],
    }
    shares = {name: bootstrap(one, seed=budget.seed, unit="of the nodes") for name, one in kept.items()}
    first = shares["with at most 3 holes"]
    comparison = Comparison(
        f"share of a line's syntax tree that may stand as it was written, {n} lines not calibrated on",
        first,
        (
            Control("the paper's greedy holes, calibrated alike", shares["greedy"], "closed-form"),
            Control("the whole line or nothing", shares["all or nothing"], "null"),
        ),
    )
    return Finding(
        slug="pac-program-sets",
        headline=f"To promise the right return line for {1 - _EPSILON:.0%} of prompts (confidence {1 - _DELTA:.0%}), with at "
        f"most {_MAIN} holes {first.value:.0%} of the code that the model wrote may stand "
        f"({shares['all or nothing'].value:.0%} where a line stands whole or not at all); the sets hold the right line on "
        f"{int(holds.sum())} of {n} prompts that were not calibrated on, the model's own line is right on {int(exact.sum())}.",
        numbers={
            "code that may stand": first,
            "sets that hold the right line": coverage,
            "lines right as they were written": point,
            "code that may stand, greedy": shares["greedy"],
            "code that may stand, all or nothing": shares["all or nothing"],
            "lines that are no Python": proportion(int((~parsed).sum()), len(parsed)),
        },
        comparison=comparison,
        figure=_figure(sets, main, level, lines, written),
        reading="Above, by the share of prompts whose set may miss the right line: how many sets hold it (it should be above "
        "the grey line but for chance), and the share of the code that is a hole; one colour for each number of holes, dashed "
        "the paper's greedy way. Below, what the model wrote for three prompts, and what stands of it at "
        f"{_EPSILON:.0%}: ?? is a hole, into which one expression goes.",
        advice=_advice(first, shares["all or nothing"]),
        seed=budget.seed,
        caveats=(
            f"The prompts are functions of Python's standard library up to one of their returns, at most {_LONGEST} "
            f"characters, one a file; {_CALIBRATION} calibrate, {n} test. The model may have read them. A line of at most "
            f"{_TOKENS} tokens that is no Python is one hole.",
            "The promise is for prompts like these, and for equality of syntax trees: a line that does the same in other words "
            "counts as wrong. With own prompts and programs: theodolite run pac-program-sets PAIRS.jsonl.",
        ),
    )  # fmt: skip


def _advice(first: Estimate, all_or_nothing: Estimate) -> str:
    if first.value == 0:
        return (
            "Do not rely on any part of this model's code at this level: only a hole at the root keeps the promise. Allow a "
            "larger epsilon, or use a model that is right more often."
        )
    if first.value <= all_or_nothing.value:
        return (
            "Show the whole line where the model is sure enough and nothing elsewhere: holes leave no more to use here."
        )
    return "Show the partial programs in the place of the code, and let people or a search fill the holes."


def _figure(
    sets: dict[tuple[int, str], _Sets], main: _Sets, level: int, lines: list[ReturnLine], written: list[Generation]
) -> go.Figure:
    """Coverage and removed share by epsilon and number of holes, and three partial programs."""
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {}], [{"type": "table", "colspan": 2}, None]],
        row_heights=[0.68, 0.32],
        horizontal_spacing=0.12,
        vertical_spacing=0.14,
    )
    for (m, solver), one in sets.items():
        found = [one.calibrated(epsilon)[1:] for epsilon in _EPSILONS]
        name = f"{m} hole{'s' if m > 1 else ''}{', greedy' if solver == _GREEDY else ''}"
        for col, values in ((1, [holds.mean() for holds, _ in found]), (2, [removed.mean() for _, removed in found])):
            figure.add_scatter(
                x=list(_EPSILONS), y=[round(float(value), 4) for value in values], mode="lines+markers", name=name,
                legendgroup=name, showlegend=col == 1, row=1, col=col,
                line={"color": INKS[m - 1], "dash": "dash" if solver == _GREEDY else None},
            )  # fmt: skip
    figure.add_scatter(
        x=list(_EPSILONS), y=[1 - epsilon for epsilon in _EPSILONS], mode="lines", name="promised",
        line={"color": INKS[6], "dash": "dot"}, row=1, col=1,
    )  # fmt: skip
    shown = range(_CALIBRATION, min(_CALIBRATION + 3, len(lines)))
    partial = ["??" if level == main.errors.shape[1] else main.families[i][level].text for i in shown]
    columns = [[written[i].text for i in shown], partial, [lines[i].rest for i in shown]]
    figure.add_trace(
        go.Table(
            header={"values": ["the model wrote", "what may stand", "the right line"], "align": "left"},
            cells={
                "values": [[text.strip() for text in column] for column in columns],
                "align": "left",
                "font": {"family": "monospace"},
                "height": 28,
            },
        ),
        row=2, col=1,
    )  # fmt: skip
    for col, title in ((1, "sets that hold the right line"), (2, "share of the code removed")):
        figure.update_xaxes(title_text="epsilon", tickformat=".0%", row=1, col=col)
        figure.update_yaxes(title_text=title, tickformat=".0%", range=[-0.03, 1.03], row=1, col=col)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 30, "b": 20}, height=580, legend={"orientation": "h", "y": 1.14}
    )
    return figure
