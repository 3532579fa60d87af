"""Readers that stand in for people: a statistical student, and a language model. They are simulated readers, not users.

The student fits a logistic regression to the learning inputs and the model's answers. What an explanation adds:

LIME        decision value + 3 (S(x) - median S) / mean |S|,  S(x) = sum_f W[f, x_f],  W: mean shown weight of a value
anchor      the rule's answer where a rule holds
boundary    the flipped inputs join the training set with the other answer
prototype   the shown prototypes join it with theirs

Counterfactual: with weights p(x) - sum of the weights of changed values; with a boundary "flips" where the perturbation touches
a feature of the shown edit. median S and mean |S| are of the learning inputs, so nothing of the test is seen.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (the tests; the student is this package's own).
"""

__all__ = ["LanguageModelSimulator", "Panel", "StudentSimulator", "run"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression

from theodolite.core.errors import InputError
from theodolite.explanations.simulatability.domain import Domain
from theodolite.explanations.simulatability.methods import Explainer, Explanation
from theodolite.explanations.simulatability.protocol import SimulationProtocol
from theodolite.explanations.simulatability.study import read_label
from theodolite.language.model import LanguageModel, ScoringUnavailable

Answers = Int[np.ndarray, " item"]
"""0 or 1, and -1 where a reader's answer could not be read."""


@dataclass(frozen=True, eq=False)
class Panel:
    """What a reader has seen: inputs with the model's answers, and an explanation of each where they are explained."""

    domain: Domain
    labels: tuple[str, ...]
    codes: Int[np.ndarray, "learning slot"]
    outputs: Int[np.ndarray, " learning"]
    explanations: tuple[Explanation, ...] | None = None


@runtime_checkable
class Simulator(Protocol):
    """A reader: predicts the model's answers, 0 or 1 (-1: no answer)."""

    def forward(self, panel: Panel, items: Int[np.ndarray, "item slot"]) -> Answers:
        """Answers on new inputs, after the panel was studied."""
        ...

    def counterfactual(self, learnt: Panel, originals: Panel, perturbed: Int[np.ndarray, "item slot"]) -> Answers:
        """Answers on the perturbation of each original, whose answer (and explanation, where there is one) is shown."""
        ...


@dataclass(frozen=True)
class StudentSimulator:
    """The offline reader described above. strength: how far weights move its decision value."""

    strength: float = 3.0

    def forward(self, panel: Panel, items: Int[np.ndarray, "item slot"]) -> Answers:
        """Answers on new inputs."""
        domain = panel.domain
        codes, outputs = panel.codes, panel.outputs
        told = panel.explanations or ()
        for one in told:
            flipped = [(one.path[-1], 1 - one.answer)] if one.path else []
            for shown, answer in (*flipped, *one.neighbours):
                codes, outputs = _stack(codes, shown), np.append(outputs, answer)
        score = _regression(domain, codes, outputs, items)
        if any(one.weights for one in told):
            table, seen = np.zeros(domain.width), np.zeros(domain.width)
            for one in told:
                for column, weight in one.weights.items():
                    table[column] += weight
                    seen[column] += 1
            table /= np.maximum(seen, 1)
            learnt, new = domain.one_hot(panel.codes) @ table, domain.one_hot(items) @ table
            spread = np.abs(learnt).mean()
            if spread > 0:
                score = score + self.strength * (new - np.median(learnt)) / spread
        for one in told:
            if one.rule is not None:
                score = np.where(domain.holds(one.rule, items), np.inf if one.answer else -np.inf, score)
        return (score > 0).astype(np.int64)

    def counterfactual(self, learnt: Panel, originals: Panel, perturbed: Int[np.ndarray, "item slot"]) -> Answers:
        """Answers on perturbations."""
        domain, told = originals.domain, originals.explanations
        base = _regression(domain, learnt.codes, learnt.outputs, perturbed)
        answers = (base > 0).astype(np.int64)
        for i, one in enumerate(told or ()):
            changed = originals.codes[i] != perturbed[i][: originals.codes.shape[1]]
            gone = domain.columns(originals.codes[i : i + 1])[0][changed]
            if one.weights:
                answers[i] = one.probability - sum(one.weights.get(int(c), 0.0) for c in gone) > 0.5
            elif one.path:
                touched = bool((changed & (_wide(one.path[-1], len(changed)) != originals.codes[i])).any())
                answers[i] = 1 - one.answer if touched else one.answer
            elif one.rule is not None and not set(map(int, gone)) & set(one.rule):
                answers[i] = one.answer
        return answers


def _stack(codes: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Rows under each other, shorter texts filled with empty slots."""
    more = np.atleast_2d(more)
    width = max(codes.shape[1], more.shape[1])
    return np.vstack([_wide(codes, width), _wide(more, width)])


def _wide(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes (..., slot) with empty slots behind them, up to ``width``."""
    room = [(0, 0)] * (codes.ndim - 1) + [(0, width - codes.shape[-1])]
    return np.pad(codes, room, constant_values=-1)


def _regression(
    domain: Domain, codes: np.ndarray, outputs: np.ndarray, items: np.ndarray
) -> Float[np.ndarray, " item"]:
    """Decision values of a logistic regression on one-hot inputs; all one way where the inputs have one answer."""
    if len(np.unique(outputs)) < 2:
        return np.full(len(items), 1.0 if outputs[0] else -1.0)
    model = LogisticRegression(C=1.0, max_iter=1000).fit(domain.one_hot(codes), outputs)
    return model.decision_function(domain.one_hot(items))


@dataclass(frozen=True)
class LanguageModelSimulator:
    """A language model as reader, of `theodolite.language.connect`. It reads what people would: the learning panel with its
    explanations, then one item; its answer is the likelier of the two labels as the next words. An endpoint that tells no
    log-probabilities of the labels is asked in a chat instead; what it says is read as people's forms are, and an answer
    that cannot be read is missing.

    Small models answer at chance here, whatever is explained; a strong endpoint is needed for a result.
    """

    model: LanguageModel

    def forward(self, panel: Panel, items: Int[np.ndarray, "item slot"]) -> Answers:
        """Answers on new inputs; one request for each."""
        shown = _shown(panel)
        asked = [f"{shown}Input:\n{panel.domain.show(item)}\nModel's answer:" for item in items]
        return self._answers(asked, panel.labels)

    def counterfactual(self, learnt: Panel, originals: Panel, perturbed: Int[np.ndarray, "item slot"]) -> Answers:
        """Answers on perturbations; one request for each."""
        shown, asked = _shown(learnt), []
        for i, new in enumerate(perturbed):
            about = "" if originals.explanations is None else f"Explanation:\n{originals.explanations[i].text}\n"
            before = originals.domain.show(originals.codes[i])
            asked.append(
                f"{shown}Input:\n{before}\nModel's answer: {originals.labels[originals.outputs[i]]}\n{about}The same input, "
                f"changed:\n{originals.domain.change(originals.codes[i], new)}\nModel's answer:"
            )
        return self._answers(asked, originals.labels)

    def _answers(self, prompts: Sequence[str], labels: tuple[str, ...]) -> Answers:
        ends = [f" {label}" for label in labels]
        try:
            self.model.score(prompts[0], ends)  # one request tells whether it can
            return self.model.score_table(prompts, ends).argmax(axis=1).astype(np.int64)
        except ScoringUnavailable:
            asked = f"\n\nAnswer with {labels[0]!r} or {labels[1]!r} and nothing else."
            told = self.model.chat_many([[{"role": "user", "content": prompt + asked}] for prompt in prompts])
            found = [read_label(one.text, labels) for one in told]
            return np.array([-1 if answer is None else answer for answer in found], dtype=np.int64)


def _shown(panel: Panel) -> str:
    lines = [f"A model answers {panel.labels[0]!r} or {panel.labels[1]!r}. Predict its answer."]
    for i, (codes, output) in enumerate(zip(panel.codes, panel.outputs, strict=True)):
        about = "" if panel.explanations is None else f"\nExplanation:\n{panel.explanations[i].text}"
        lines.append(f"Input:\n{panel.domain.show(codes)}\nModel's answer: {panel.labels[output]}{about}")
    return "\n".join([*lines, ""])


def run(
    protocol: SimulationProtocol,
    explainers: Sequence[Explainer],
    simulator: Simulator,
    repeats: int = 10,
    *,
    tests: Sequence[str] = ("forward", "counterfactual"),
) -> pd.DataFrame:
    """Both tests by ``repeats`` readers with every explainer: one row a reader, item, method and test.

    Columns: user, item (row of X), method, test, pre and post (the reader's answers, 0 or 1, before and after explanations;
    missing where it gave none), model (the model's answer) and rating (missing: simulated readers do not rate). Readers
    differ in their learning inputs; items are the same for all readers and methods. `effects` makes estimates of it.
    """
    unknown = sorted(set(tests) - {"forward", "counterfactual"})
    names = [explainer.name for explainer in explainers]
    if repeats < 1 or unknown or not explainers or len(set(names)) < len(names):
        raise InputError(
            "need repeats >= 1, tests of 'forward' and 'counterfactual', and explainers with different names; got "
            f"{repeats}, {list(tests)}, {names}"
        )
    bound = [explainer.bind(protocol) for explainer in explainers]
    known: dict[tuple[int, int], Explanation] = {}

    def explain(which: int, rows: np.ndarray) -> tuple[Explanation, ...]:
        for row in rows.tolist():
            if (which, row) not in known:
                known[which, row] = bound[which].explain(protocol.row(row))
        return tuple(known[which, row] for row in rows.tolist())

    parts = []
    changed = protocol.counterfactual() if "counterfactual" in tests else None
    for user in range(repeats):
        forward = protocol.forward(user)
        seen = _panel(protocol, forward.learning_ids)
        items = protocol.codes[forward.ids]
        if "forward" in tests:
            pre = simulator.forward(seen, items)
            for which, name in enumerate(names):
                told = _panel(protocol, forward.learning_ids, explain(which, forward.learning_ids))
                post = simulator.forward(told, items)
                parts.append(_responses(user, forward.ids, name, "forward", pre, post, forward.model_outputs))
        if changed is not None:
            pre = simulator.counterfactual(seen, _panel(protocol, changed.ids), changed.perturbed_codes)
            for which, name in enumerate(names):
                told = _panel(protocol, changed.ids, explain(which, changed.ids))
                post = simulator.counterfactual(seen, told, changed.perturbed_codes)
                parts.append(
                    _responses(user, changed.ids, name, "counterfactual", pre, post, changed.perturbed_outputs)
                )
    return pd.concat(parts, ignore_index=True)


def _panel(protocol: SimulationProtocol, ids: np.ndarray, explanations: tuple[Explanation, ...] | None = None) -> Panel:
    return Panel(protocol.domain, protocol.labels, protocol.codes[ids], protocol.outputs[ids], explanations)


def _responses(
    user: int, ids: np.ndarray, method: str, test: str, pre: np.ndarray, post: np.ndarray, model: np.ndarray
) -> pd.DataFrame:
    before, after = (
        np.where(answers < 0, np.nan, answers) if (answers < 0).any() else answers for answers in (pre, post)
    )
    rows: dict[str, Any] = {
        "user": user, "item": ids, "method": method, "test": test, "pre": before, "post": after, "model": model,
        "rating": np.nan,
    }  # fmt: skip
    return pd.DataFrame(rows)
