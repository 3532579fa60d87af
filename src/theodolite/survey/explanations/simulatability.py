"""The chart of simulatability: which explanation helps a simulated reader predict the model's answers."""

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from theodolite.core.errors import DataError
from theodolite.core.estimate import Comparison, Control, Estimate
from theodolite.core.subject import Subject
from theodolite.explanations.simulatability import (
    Attribution,
    CannotBalance,
    DecisionBoundary,
    Lime,
    NoFlips,
    Prototype,
    Shuffled,
    SimulationProtocol,
    StudentSimulator,
    effects,
    run,
)
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS, blank, level_line
from theodolite.survey.finding import Finding

_READERS, _DRAWS, _MOST_FEATURES, _MOST_ROWS = 6, 2000, 100, 3000
_SIZES = ((16, 32), (8, 16), (4, 8))
_WORDS = {"lime": "LIME", "boundary": "decision boundary", "prototype": "prototypes"}


class _Asked:
    """The subject's probability of one class, as a model of two answers."""

    def __init__(self, subject: Subject, which: int, memory: int | None) -> None:
        self._view, self._which = subject.view("probability", memory=memory), which

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        scores = self._view(torch.as_tensor(np.asarray(rows, dtype=np.float32))).double().numpy()
        if scores.shape[1] == 1:
            return scores[:, 0]
        return np.clip(scores[:, self._which], 0, 1)


def protocol_of(
    subject: Subject,
    *,
    seed: int = 0,
    memory: int | None = None,
    sizes: tuple[tuple[int, int], ...] = _SIZES,
    balance: Literal["errors", "outputs"] = "outputs",
) -> SimulationProtocol:
    """Tests of the subject's answers on its held-out rows; with more than two classes, of whether it answers the commonest.

    sizes: (learning, test) in the order in which they are tried; the first that the rows allow is taken. balance: as in
    `SimulationProtocol`; "outputs" is enough for readers who do not know the task, people need "errors". Raises CannotBalance
    where none is.
    """
    data = subject.data
    x = torch.cat([data.validation.x, data.test.x])[:_MOST_ROWS].double().numpy()
    y = torch.cat([data.validation.y, data.test.y])[:_MOST_ROWS].numpy()
    which = 1
    if len(data.classes) > 2:
        which = int(np.bincount(subject.view("probability", memory=memory).predict(data.validation.x).numpy()).argmax())
    name = data.classes[which]
    labels = (data.classes[0], name) if len(data.classes) == 2 else (f"not {name}", name)
    refused: CannotBalance | None = None
    for learning, test in sizes:
        try:
            return SimulationProtocol(
                _Asked(subject, which, memory), x, (y == which).astype(int), data.features or None, seed=seed,
                learning=learning, test=test, labels=labels, balance=balance,
                most_changes=max(3, x.shape[1] // 4),
            )  # fmt: skip
        except CannotBalance as error:
            refused = error
    raise refused if refused is not None else DataError("sizes must name at least one (learning, test)")


def _refusal(subject: Subject) -> str | None:
    features = int(np.prod(subject.data.shape))
    if features > _MOST_FEATURES:
        return f"explains up to {_MOST_FEATURES} features; these data have {features}"
    try:
        protocol_of(subject)
    except DataError as error:
        return f"needs a balanced test: {error}"
    except ValueError as error:
        return str(error)
    return None


@chart(
    "simulatability",
    needs=Needs(modalities=("tabular",), task="classification", test=_refusal),
    cost=seconds(15),
)
def simulatability(subject: Subject, budget: Budget) -> Finding:
    """What each explanation adds to a simulated reader's share of right predictions, beside shuffled explanations."""
    seed = budget.seed
    protocol = protocol_of(subject, seed=seed, memory=budget.memory)
    lime = Lime(seed=seed)
    methods: list[Any] = [
        lime, Attribution(seed=seed), DecisionBoundary(samples=1000, seed=seed), Prototype(seed=seed),
        Shuffled(of=lime, seed=seed),
    ]  # fmt: skip
    tables = [run(protocol, methods, StudentSimulator(), _READERS, tests=("forward",))]
    caveats = [
        "The reader is simulated: a statistical student that fits the answers it has seen and uses each explanation by a fixed "
        "rule. People may read otherwise; theodolite run simulatability --export FOLDER writes the same test as forms for them.",
        "Tests have as many of each answer; they are not balanced by right and wrong answers, which a reader who knows the task "
        "could use. This reader does not know it.",
    ]
    try:
        tables.append(run(protocol, methods, StudentSimulator(), _READERS, tests=("counterfactual",)))
    except (NoFlips, CannotBalance) as error:
        caveats.append(f"No counterfactual test: {error}")
    found = effects(pd.concat(tables, ignore_index=True), _DRAWS, seed)
    told = {
        (str(row["test"]), str(row["method"])): Estimate(
            100 * row["effect"], 100 * row["low"], 100 * row["high"], "points", int(row["n"])
        )
        for row in found.to_dict("records")
    }
    shuffled = _name("shuffled lime")
    forward = {_name(method): value for (test, method), value in told.items() if test == "forward"}
    real = {name: value for name, value in forward.items() if name != shuffled}
    pre = 100 * float(found.loc[found["test"] == "forward", "pre"].mean())
    first = real["LIME"]
    order = sorted(real, key=lambda name: -real[name].value)
    others = ", ".join(f"{name} {real[name].value:+.1f}" for name in order if name != "LIME")
    verb = "adds" if first.low > 0 else "costs" if first.high < 0 else "does not surely change (by"
    tail = ")" if verb.endswith("(by") else ""
    size = f"{abs(first.value):.1f}" if not tail else f"{first.value:+.1f}"
    headline = (
        f"For a simulated reader LIME {verb} {size} points{tail} of forward simulatability (95 % interval {first.low:+.1f} to "
        f"{first.high:+.1f}, {pre:.0f} % right without); {others}; shuffled LIME {forward[shuffled].value:+.1f}."
    )
    return Finding(
        slug="simulatability",
        headline=headline,
        numbers={f"{_name(method)}, {test}": value for (test, method), value in told.items()},
        comparison=Comparison(
            "points that LIME adds to the forward test",
            first,
            (
                Control("no explanation", Estimate.exact(0.0, "points"), "null"),
                Control("LIME's weights at other values", forward[shuffled], "random"),
            ),
        ),
        figure=_figure(told),
        reading=f"{_READERS} simulated readers each learn from {protocol.learning} inputs with the model's answers and predict "
        f"its answers on {protocol.test} others (forward), or on changed inputs (counterfactual), before and after they see "
        "explanations of the inputs they learn from. A bar is how many more of a hundred predictions are then right; its line is "
        "the 95 % interval over readers and inputs. Grey: the same explanations with their weights at other values.",
        advice=_advice(real, forward[shuffled]),
        seed=seed,
        caveats=tuple(caveats),
    )


def _name(method: str) -> str:
    return "shuffled LIME" if method == "shuffled lime" else _WORDS.get(method, method)


def _figure(told: dict[tuple[str, str], Estimate]) -> go.Figure:
    figure = blank("explanation", "points added to right predictions")
    for k, test in enumerate(sorted({test for test, _ in told}, reverse=True)):
        rows = {_name(method): value for (of, method), value in told.items() if of == test}
        figure.add_trace(
            go.Bar(
                x=list(rows), y=[one.value for one in rows.values()], name=test,
                marker={"color": [INKS[6] if name.startswith("shuffled") else INKS[k] for name in rows]},
                error_y={
                    "type": "data", "symmetric": False, "array": [one.high - one.value for one in rows.values()],
                    "arrayminus": [one.value - one.low for one in rows.values()],
                },
            )
        )  # fmt: skip
    figure.update_layout(barmode="group")
    level_line(figure, 0, "no explanation")
    return figure


def _advice(real: dict[str, Estimate], shuffled: Estimate) -> str:
    good = [name for name, value in real.items() if value.low > max(0.0, shuffled.value)]
    if not good:
        return (
            "No explanation surely helped this reader predict the model. Do not expect one to make the model predictable before "
            "a test with people says so (theodolite run simulatability --export FOLDER)."
        )
    best = max(good, key=lambda name: real[name].value)
    return (
        f"Of these show {best} first, and test it with people before you rely on it: theodolite run simulatability --export "
        "FOLDER writes the forms."
    )
