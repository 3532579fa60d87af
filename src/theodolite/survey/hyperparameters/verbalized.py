"""The chart of verbalized learning: what a paragraph, read by a language model, does in place of a trained model."""

import string
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.core.subject import Rows, Subject
from theodolite.hyperparameters.verbalized import Candidate, Update, VerbalizedClassifier, reference_scores
from theodolite.language import ENDPOINT, MODEL, LanguageModel, connect, named_model
from theodolite.language.pretrained import WHEELS
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, blank
from theodolite.survey.finding import Finding
from theodolite.survey.hyperparameters.learner import forecast_of_learner, not_a_learner, what_it_learns

_TRAIN, _JUDGE, _TEST = 30, 20, 40
_WORDS, _MOST_CLASSES, _MOST_COLUMNS, _SHOWN = 40, 20, 40, 160
_TASK = "Classify the input."


def _refusal(subject: Subject) -> str | None:
    data = subject.data
    if subject.is_language_model:
        return not_a_learner(subject)
    if min(map(len, data.parts.values())) < _JUDGE:
        return f"needs at least {_JUDGE} rows in each part of the data"
    if len(data.classes) > _MOST_CLASSES:
        return f"reads up to {_MOST_CLASSES} classes; these data have {len(data.classes)}"
    if data.modality == "text" and not data.features:
        return "needs the words of the texts; these were embedded before"
    if data.modality == "tabular" and data.shape[0] > _MOST_COLUMNS:
        return f"reads tables of up to {_MOST_COLUMNS} columns; this one has {data.shape[0]}"
    if named_model() is None:
        how = f"name one in {ENDPOINT} and {MODEL}"
        if data.modality == "tabular":
            return f"needs a language model that can read numbers, larger than the local one: {how}"
        if find_spec(WHEELS["smollm2"]) is None:
            return f"needs a language model: make models, or {how}"
    return None


@dataclass(frozen=True)
class _Learned:
    """What was learned, and accuracies on the test rows: with it, without it, and with what shuffled labels gave."""

    theta: str
    found: Estimate
    without: Estimate
    shuffled: Estimate
    calls: int
    history: tuple[Update, ...] = ()


@chart(
    "verbalized-learning",
    needs=Needs(language_model=None, modalities=("text", "tabular"), task="classification", rows=1, test=_refusal),
    cost=lambda subject: forecast_of_learner(subject) if subject.is_language_model else 45.0,
)
def verbalized_learning(subject: Subject, budget: Budget) -> Finding:
    """Accuracy of a language model that reads a description, beside what it does without and what counting words does; of a
    subject that is a language model, what it takes in of rules and examples.
    """
    if subject.is_language_model:
        return what_it_learns(subject, budget)
    data, place = subject.data, named_model()
    learner = connect(*place) if place else connect()
    parts = [rows.head(n) for rows, n in ((data.train, _TRAIN), (data.validation, _JUDGE), (data.test, _TEST))]
    X = [_read(subject, rows) for rows in parts]
    y = [rows.y.numpy() for rows in parts]
    learn = _trained if place else _chosen
    learned = learn(learner, data.classes, X, y, budget.seed)
    start = "theta_0, not trained" if place else "no description, letters for the classes"
    names = np.array(data.classes)
    reference = reference_scores(_joined(X), names[np.concatenate(y[:2])], X[2], names[y[2]], seed=budget.seed)
    closed = "logistic regression on word counts" if data.modality == "text" else "logistic regression"
    own = proportion(int(subject.correct(subject.predictor, parts[2]).sum()), len(y[2]), unit="accuracy")
    comparison = Comparison(
        f"accuracy of {learner.name} with a description, {len(y[2])} held-out rows",
        learned.found,
        (
            Control(start, learned.without, "null"),
            Control("commonest class", reference["commonest class"], "null"),
            Control(f"{'trained' if place else 'chosen'} by shuffled labels", learned.shuffled, "random"),
            Control(f"{closed}, {len(y[0]) + len(y[1])} rows", reference[closed], "closed-form"),
            Control("this model", own, "reference"),
        ),
    )
    shown = learned.theta if len(learned.theta) <= _SHOWN else f"{learned.theta[:_SHOWN]}…"
    return Finding(
        slug="verbalized-learning",
        headline=f"Told “{shown}”, {learner.name} is right on {learned.found.value:.0%} of {len(y[2])} held-out rows "
        f"({start} {learned.without.value:.0%}, {closed} {reference[closed].value:.0%}, this model {own.value:.0%}); "
        f"{learned.calls} calls to learn.",
        numbers={
            "with the description": learned.found,
            **{control.name: control.estimate for control in comparison.controls},
            "calls to learn": Estimate.exact(learned.calls, "calls"),
        },
        comparison=comparison,
        figure=_steps(learned.history) if learned.history else _bars(comparison),
        reading=(
            f"The learner reads a paragraph; the optimizer rewrote it after each of {len(learned.history)} batches, and what was "
            f"no better on {len(y[1])} rows was refused. A point is the share of wrong answers in a batch before its step; hover "
            "for the paragraph."
            if learned.history
            else f"The language model reads a sentence and scores the classes; the sentence was chosen on {len(y[1])} rows. Bars "
            "are accuracies on the same held-out rows, lines their 95 % intervals."
        ),
        advice=_advice(learned.found, reference[closed], own),
        seed=budget.seed,
        caveats=_caveats(data.modality == "text", place is not None, len(y[2])),
    )  # fmt: skip


def _read(subject: Subject, rows: Rows) -> Any:
    """A table by its columns; a text by its heaviest words, which is all that a subject keeps of it."""
    names = subject.data.features or tuple(f"column {i + 1}" for i in range(subject.data.shape[0]))
    if subject.data.modality == "tabular":
        return pd.DataFrame(rows.x.numpy(), columns=list(names))
    weights = rows.x.numpy()
    order = np.argsort(-weights, axis=1, kind="stable")[:, :_WORDS]
    return [" ".join(names[j] for j in row if weights[i, j] > 0) for i, row in enumerate(order)]


def _joined(X: list[Any]) -> Any:
    """The rows that learn: to train on, then to judge by."""
    return [*X[0], *X[1]] if isinstance(X[0], list) else pd.concat(X[:2], ignore_index=True)


def _right(model: VerbalizedClassifier, X: Any, truth: np.ndarray) -> Estimate:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ of \d+ answers could not be read", UserWarning)  # they count as wrong
        said = model.predict(X)
    return proportion(
        sum(a == b for a, b in zip(said.tolist(), truth.tolist(), strict=True)), len(truth), unit="accuracy"
    )


def _candidates(classes: tuple[str, ...]) -> list[Candidate]:
    """Descriptions that the names of the classes give."""
    either, both = " or ".join(classes), ", ".join(classes)
    return [
        Candidate(f"Is the text {either}?", classes, "Label"),
        Candidate(f"The words of a text, and what it is: {both}.", classes, "Answer"),
        Candidate(f"Every text is one of these: {both}.", classes, "Class"),
    ]


def _chosen(learner: LanguageModel, classes: tuple[str, ...], X: list[Any], y: list[np.ndarray], seed: int) -> _Learned:
    """The best of a few sentences on the rows that judge, by a local model that scores the names of the classes."""

    def told(one: Candidate) -> tuple[VerbalizedClassifier, np.ndarray]:
        made = VerbalizedClassifier(learner, task=_TASK, prior=one.theta, labels=one.labels, cue=one.cue, mode="score")
        return made, np.array(one.labels)

    candidates = _candidates(classes)
    said = [(told(one)[0].predict(X[1]), told(one)[1]) for one in candidates]
    mixed = np.random.default_rng(seed).permutation(y[1])
    best, other = (int(np.argmax([(a == words[truth]).mean() for a, words in said])) for truth in (y[1], mixed))
    found, shuffled = (
        _right(model, X[2], words[y[2]]) for model, words in (told(candidates[best]), told(candidates[other]))
    )
    blind, letters = told(Candidate("", tuple(string.ascii_uppercase[: len(classes)]), "Label"))
    calls = len(candidates) * len(y[1])
    return _Learned(candidates[best].theta, found, _right(blind, X[2], letters[y[2]]), shuffled, calls)


def _trained(
    learner: LanguageModel, classes: tuple[str, ...], X: list[Any], y: list[np.ndarray], seed: int
) -> _Learned:
    """One epoch by an endpoint, beside the same with shuffled labels."""
    names, rows, labels = np.array(classes), _joined(X), np.concatenate(y[:2])
    truth = names[y[2]]

    def fit(targets: np.ndarray) -> VerbalizedClassifier:
        made = VerbalizedClassifier(
            learner, epochs=1, validation=len(y[1]) / len(labels), accept="if-better", seed=seed
        )
        return made.fit(rows, names[targets])

    model, other = fit(labels), fit(np.random.default_rng(seed).permutation(labels))
    found, shuffled = (_right(one, X[2], truth) for one in (model, other))
    theta, model.theta_ = model.theta_, model.theta_initial_
    return _Learned(theta, found, _right(model, X[2], truth), shuffled, model.calls_, tuple(model.history_))


def _bars(comparison: Comparison) -> go.Figure:
    rows = {"the description": comparison.estimate} | {one.name: one.estimate for one in comparison.controls}
    figure = blank("", "accuracy on held-out rows")
    figure.add_trace(
        go.Bar(
            x=list(rows), y=[one.value for one in rows.values()], marker={"color": [INKS[0], *[INKS[6]] * (len(rows) - 1)]},
            error_y={
                "type": "data", "symmetric": False, "array": [one.high - one.value for one in rows.values()],
                "arrayminus": [one.value - one.low for one in rows.values()],
            },
        )
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def _steps(history: tuple[Update, ...]) -> go.Figure:
    figure = blank("step", "share of wrong answers")
    steps = [one.step for one in history]
    # the page takes text as it is, but plotly reads a little markup in what it shows on hovering
    shown = [one.theta_before.replace("<", "&lt;")[:600] for one in history]
    for name, ink, values in (
        ("batch, before the step", INKS[0], [one.loss_before for one in history]),
        ("rows that judge, after it", INKS[1], [one.loss_after_validation for one in history]),
    ):
        figure.add_trace(
            go.Scatter(x=steps, y=values, name=name, mode="lines+markers", line={"color": ink}, hovertext=shown)
        )
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def _advice(found: Estimate, closed: Estimate, own: Estimate) -> str:
    if found.low > closed.high:
        return (
            "A description says more here than the rows that it was given: write down what you know of the task, and use it "
            "(theodolite run verbalized-learning --data FILE --target NAME --prior '...') where labels are few."
        )
    if found.high < own.low:
        return (
            "Keep the trained model. A description pays where labels are few and what is known can be said; say it with "
            "theodolite run verbalized-learning --data FILE --target NAME --prior '...', or name a stronger language model."
        )
    return (
        "The difference is within chance. Say what you know of the task and measure again on more rows: theodolite run "
        "verbalized-learning --data FILE --target NAME --prior '...'."
    )


def _caveats(texts: bool, endpoint: bool, rows: int) -> tuple[str, ...]:
    found = [
        f"{rows} held-out rows tell differences of a few points from chance only when they are large; see the intervals."
    ]
    if texts:
        found.append(
            "A subject keeps the words of a text without their order; the language model is given the heaviest of them."
        )
    if not endpoint:
        found.append(
            "The local model cannot write descriptions, so the sentences are made from the names of the classes, which have to "
            f"be words. With {ENDPOINT} and {MODEL} the paragraph is trained instead."
        )
    return tuple(found)
