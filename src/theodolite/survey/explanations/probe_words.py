"""Function interpretation on models of texts: the words that move a unit, and whether they tell which others do."""

__all__ = ["described_by_words", "described_encoder", "no_words"]

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import plotly.graph_objects as go
import torch
from sklearn.linear_model import RidgeCV

from theodolite.core.errors import DataError, ModelError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, proportion
from theodolite.core.subject import Subject
from theodolite.core.view import evaluation_mode
from theodolite.explanations.function_interpretation import (
    BlackBox,
    EmbeddingJudge,
    ExemplarInterpreter,
    UnitTest,
    activation_tests,
    interpret,
)
from theodolite.explanations.function_interpretation.judges import sentence_embeddings
from theodolite.explanations.function_interpretation.words import testable
from theodolite.language.pretrained import load_encoder, model_folder
from theodolite.survey.chart import Budget
from theodolite.survey.figures import INKS, blank, level_line
from theodolite.survey.finding import Finding

_WORDS, _UNITS, _TESTS = 400, 20, 200
_FEWEST = 60  # words
_LEAD = "The word:"  # what a language model reads before a probe word
_FEW = 8  # units up to which an interval is over tests, since there are too few units to draw from


@dataclass(frozen=True, eq=False)
class _Probe:
    """words (n,) and how much each moves each unit (n, units).

    what: the units are, and how they read a word. own: where the units are dimensions of the judge's embeddings, which ones.
    """

    words: list[str]
    units: list[str]
    activations: np.ndarray
    what: str
    how: str
    own: tuple[int, ...] = ()


def no_words(subject: Subject) -> str | None:
    """Why this model cannot be probed with words, None where it can."""
    if model_folder("minilm") is None:
        return "needs a sentence encoder that judges words: make models"
    if subject.is_language_model and (subject.tokenizer is None or not hasattr(subject.predictor, "config")):
        return "needs a Hugging Face model with its tokenizer"
    if len(_candidates(subject)) < _FEWEST:
        return f"needs a model of words, {_FEWEST} of them at least"
    if not subject.is_language_model and not any(map(testable, _probe(subject).activations.T)):
        return "needs a model that single words move; on texts of one word its answers hardly differ"
    return None


def _candidates(subject: Subject) -> list[tuple[str, int]]:
    """Probe words, the commonest of the training rows first, each with its token or its column."""
    if subject.is_language_model:
        counts = Counter(subject.data.train.x.ravel().tolist())
        pieces = ((subject.tokenizer.decode([token]), token) for token, _ in counts.most_common(4 * _WORDS))
        found = [
            (text[1:], token) for text, token in pieces if text[:1] == " " and text[1:].isalpha() and len(text) > 4
        ]
    else:
        weights = subject.data.train.x.sum(dim=0)
        names = subject.data.features
        order = torch.argsort(weights, descending=True, stable=True).tolist() if names else []
        found = [(names[j], j) for j in order if names[j].isalpha() and len(names[j]) > 2]
    return found[:_WORDS]


def _probe(subject: Subject) -> _Probe:
    found = _candidates(subject)
    words = [word for word, _ in found]
    if subject.is_language_model:
        lead = subject.tokenizer(_LEAD, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*lead, token] for _, token in found])
        with torch.no_grad(), evaluation_mode(subject.predictor):
            states = torch.cat([
                subject.predictor(input_ids=part, output_hidden_states=True).hidden_states[-1][:, -1].double()
                for part in ids.split(64)
            ]).numpy()  # fmt: skip
        chosen, names = _most_variable(states)
        return _Probe(words, names, states[:, chosen], "dimensions of the last hidden state", f"each after “{_LEAD}”")
    rows = torch.zeros(len(found), subject.data.train.x.shape[1])
    rows[torch.arange(len(found)), torch.tensor([column for _, column in found])] = 1.0  # a text of one word
    view = subject.view("probability" if subject.data.task == "classification" else "value")
    values = view(rows).double().numpy()
    names = list(subject.data.classes) or ["the prediction"]
    moved = [i for i in np.argsort(-values.std(axis=0), kind="stable")[:_UNITS].tolist() if np.ptp(values[:, i]) > 1e-6]
    alone = "each as a text of one word"
    return _Probe(words, [names[i] for i in sorted(moved)], values[:, sorted(moved)], "outputs", alone)


def _most_variable(states: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The dimensions that move most, in order, with their names."""
    chosen = np.sort(np.argsort(-states.std(axis=0), kind="stable")[:_UNITS])
    return chosen, [f"dimension {i}" for i in chosen]


def described_by_words(subject: Subject, budget: Budget) -> Finding:
    """How often a unit's strongest words tell which of three other words moves it."""
    return _described(_probe(subject), budget)


def described_encoder(name: str, texts: Sequence[str], budget: Budget) -> Finding:
    """The same of a text encoder's sentence embeddings, by the commonest words of ``texts``.

    name: as `load_encoder` takes it. Raises DataError for texts with fewer than 60 different words.
    """
    judge = model_folder("minilm")
    if judge is None:
        raise ModelError("a sentence encoder judges the words, and it is not installed: make models")
    counts = Counter(word.lower() for text in texts for word in re.findall(r"[^\W\d_]{4,}", text))
    words = [word for word, _ in counts.most_common(_WORDS)]
    if len(words) < _FEWEST:
        raise DataError(f"the texts have {len(words)} different words of four letters and more; {_FEWEST} are needed")
    states = sentence_embeddings(words, load_encoder(name)).astype(np.float64)
    chosen, names = _most_variable(states)
    own = tuple(chosen.tolist()) if model_folder(name) == judge else ()
    how = "each as a text of one word"
    return _described(_Probe(words, names, states[:, chosen], "dimensions of sentence embeddings", how, own), budget)


def _described(probe: _Probe, budget: Budget) -> Finding:
    order = np.random.default_rng([budget.seed, 14]).permutation(len(probe.words))
    shown, held = order[: len(order) // 2], order[len(order) // 2 :]
    kept = [u for u in range(len(probe.units)) if testable(probe.activations[held, u])]
    if not kept:
        raise DataError("on the words that are held out the answers hardly differ, so no description can be tested")
    probe = replace(
        probe, units=[probe.units[u] for u in kept], activations=probe.activations[:, kept],
        own=tuple(probe.own[u] for u in kept if probe.own),
    )  # fmt: skip
    words = [[probe.words[i] for i in part] for part in (shown, held)]
    meanings = sentence_embeddings(probe.words)
    each_has = max(10, _TESTS // len(probe.units))
    told, tests, judges, guessed = [], [], [], []
    for u in range(len(probe.units)):
        embedded = meanings.copy()
        hidden = probe.own[u : u + 1]
        embedded[:, hidden] = 0  # a judge that sees the unit itself would be told the answer
        judges.append(EmbeddingJudge(partial(_looked_up, words=probe.words, embedded=embedded, hidden=hidden)))
        values = dict(zip(probe.words, probe.activations[:, u].tolist(), strict=True))
        box = BlackBox(
            lambda texts, values=values: [values[text] for text in texts],
            len(shown),
            modality="neuron",
            examples=words[0],
        )
        told.append(interpret(box, ExemplarInterpreter(), "single_round").description)
        tests.append(activation_tests(words[1], probe.activations[held, u], n=each_has, seed=budget.seed + u))
        fitted = RidgeCV(np.geomspace(1e-2, 1e2, 9)).fit(embedded[shown], probe.activations[shown, u])
        expected = dict(zip(words[1], np.asarray(fitted.predict(embedded[held])).tolist(), strict=True))
        guessed.append(_right(tests[u], [1 + int(np.argmax([expected[w] for w in t.candidates])) for t in tests[u]]))
    ours, other = (
        np.array([_right(test, judges[u].choose(told[u - back], test)) for u, test in enumerate(tests)])
        for back in (0, 1)
    )
    found, swapped, ridge = _share(ours), _share(other), _share(np.array(guessed))
    chance = Estimate.exact(1 / 3, "share of tests")
    each, best = ours.mean(axis=1), int(np.argmax(ours.mean(axis=1)))
    comparison = Comparison(
        f"share of {ours.size} tests that a unit's strongest words answer, {len(probe.units)} {probe.what}",
        found,
        (
            Control("a guess among three", chance, "null"),
            Control("another unit's words", swapped, "random"),
            Control("ridge regression on embeddings of the shown words", ridge, "closed-form"),
        ),
    )
    return Finding(
        slug="function-interpretation",
        headline=f"Which of three unseen words moves a unit most is told by the words that moved it before in {found.value:.0%} "
        f"of {ours.size} tests (chance 33%, another unit's words {swapped.value:.0%}); {len(probe.units)} {probe.what}, told "
        f"best: {probe.units[best]} ({told[best]}).",
        numbers={
            "tests answered from a unit's words": found,
            "tests answered from another unit's words": swapped,
            "tests answered by a regression on embeddings": ridge,
            "units told in at least 80 % of their tests": Estimate.exact(int((each >= 0.8).sum()), f"of {len(each)}"),
        },
        comparison=comparison,
        figure=_figure(probe.units, told, ours, other),
        reading=f"Each bar is a unit: the share of its {each_has} tests that are answered rightly from its strongest words "
        "(shown when pointed at), with its 95 % interval; the crosses from another unit's words. A sentence encoder answers, by "
        "which of three words is nearest to the description.",
        advice=_advice(found, swapped, ridge, ours),
        seed=budget.seed,
        caveats=(
            f"{len(probe.words)} common words, half of them shown; {probe.how}.",
            *["The judge is this encoder too; of each unit it was kept from seeing that dimension."] * bool(probe.own),
            "The judge knows what words mean, not how they are spelled: a unit that answers to form is told badly.",
            "A language model writes sentences instead: LanguageModelInterpreter in the method's module.",
        ),
    )  # fmt: skip


def _looked_up(texts: list[str], words: list[str], embedded: np.ndarray, hidden: tuple[int, ...]) -> np.ndarray:
    """Embeddings of words that are there already, and of what else is asked for, without the dimensions ``hidden``."""
    known = dict(zip(words, embedded, strict=True))
    new = [text for text in texts if text not in known]
    made = sentence_embeddings(new) if new else np.empty((0, embedded.shape[1]))
    made[:, hidden] = 0
    known |= dict(zip(new, made, strict=True))
    return np.array([known[text] for text in texts])


def _right(tests: list[UnitTest], answers: list[int | None] | list[int]) -> list[float]:
    return [float(answer == test.answer) for answer, test in zip(answers, tests, strict=True)]


def _share(right: np.ndarray) -> Estimate:
    if len(right) <= _FEW:
        return proportion(int(right.sum()), right.size, unit="share of tests")
    return bootstrap(right.mean(axis=1), unit="share of tests")


def _figure(units: list[str], told: list[str], ours: np.ndarray, other: np.ndarray) -> go.Figure:
    figure = blank("", "share of tests answered rightly")
    shown = [one.replace("<", "&lt;") for one in told]
    each = [proportion(int(row.sum()), len(row)) for row in ours]
    figure.add_trace(
        go.Bar(
            x=units, y=[one.value for one in each], name="its own words", marker_color=INKS[0], hovertext=shown,
            error_y={
                "type": "data", "symmetric": False, "array": [one.high - one.value for one in each],
                "arrayminus": [one.value - one.low for one in each],
            },
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=units, y=other.mean(axis=1).tolist(), mode="markers", name="another unit's words",
            marker={"color": INKS[1], "symbol": "x", "size": 9},
        )
    )  # fmt: skip
    level_line(figure, 1 / 3, "chance")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return figure


def _advice(found: Estimate, swapped: Estimate, ridge: Estimate, right: np.ndarray) -> str:
    if found.low <= max(1 / 3, swapped.value):
        if ridge.low > 1 / 3:
            return (
                "Do not name these units by their strongest words: those tell no more than chance or another unit's words, "
                "although the meaning of a word does say something of its value (the regression on embeddings)."
            )
        return "Do not name these units by their strongest words: on other words such names tell no more than chance."
    clear = sum(proportion(int(row.sum()), len(row)).low > 1 / 3 for row in right)
    check = "theodolite.explanations.function_interpretation.activation_tests"
    if 2 * clear <= len(right):
        return (
            "The strongest words are a hint at these units and no name: over all units they tell more than chance, but only for "
            f"{clear} of {len(right)} when each is tested by itself. Test a unit with more words before you name it: {check}."
        )
    return (
        f"The strongest words are a fair name for {clear} of these {len(right)} units; check it on words of your own before you "
        f"rely on one of them: {check}."
    )
