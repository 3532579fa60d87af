"""Unit tests of descriptions: which of three candidates is a real execution, told from the description alone.

Chance is one third. A judge that answers with anything but exactly one index is counted as ``unparsed``, and as wrong: the
published check, whether the right digit occurs in the answer, is passed by "1, 2 or 3".
"""

__all__ = [
    "EmbeddingJudge",
    "ExecutionJudge",
    "Judge",
    "LanguageModelJudge",
    "UnitTest",
    "UnitTestScore",
    "parse_choice",
    "sentence_embeddings",
    "unit_test",
]

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from theodolite.core.binomial import binomial_interval
from theodolite.core.errors import InputError
from theodolite.language.model import LanguageModel
from theodolite.language.sandbox import SandboxFailure, UnsafeCode, run_sandboxed


@dataclass(frozen=True)
class UnitTest:
    """Three candidates, and which of them is real: 1, 2 or 3. A candidate is a word, or "input -> output"."""

    candidates: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.candidates) != 3 or self.answer not in (1, 2, 3):
            raise InputError(
                f"a test has three candidates and an answer of 1 to 3, got {len(self.candidates)} and {self.answer}"
            )


@dataclass(frozen=True)
class UnitTestScore:
    """accuracy: share of tests that were answered rightly, with its exact 95 % interval; unparsed: answers that are none."""

    accuracy: float
    ci95: tuple[float, float]
    unparsed: int
    n: int = 0


@runtime_checkable
class Judge(Protocol):
    """Answers tests from a description."""

    def choose(self, description: str, tests: Sequence[UnitTest]) -> list[int | None]:
        """1, 2 or 3 for each test; None where the answer is not exactly one of them."""
        ...


def unit_test(description: str, tests: Sequence[Any], judge: Judge) -> UnitTestScore:
    """Share of ``tests`` that ``judge`` answers rightly from ``description``.

    tests: `UnitTest`, or pairs (three candidates, answer from 1 to 3).
    """
    made = [one if isinstance(one, UnitTest) else UnitTest(tuple(one[0]), int(one[1])) for one in tests]
    if not made:
        raise InputError("need at least one test")
    answers = [one if one in (1, 2, 3) else None for one in judge.choose(description, made)]
    right = sum(answer == test.answer for answer, test in zip(answers, made, strict=True))
    return UnitTestScore(right / len(made), binomial_interval(right, len(made)), answers.count(None), len(made))


def parse_choice(text: str) -> int | None:
    """The one number from 1 to 3 in an answer; None where there is none, another number, or several.

    >>> [parse_choice(text) for text in ("2", "Candidate 3.", "1, 2 or 3", "13", "the first", "2 or 2")]
    [2, 3, None, None, None, 2]
    """
    numbers = set(re.findall(r"-?\d+(?:\.\d+)?", text))
    return int(numbers.pop()) if len(numbers) == 1 and numbers <= {"1", "2", "3"} else None


class EmbeddingJudge:
    """The candidate whose sentence embedding has the largest cosine with the description's; runs offline.

    embed: texts -> (n, width); MiniLM where None. Each text is embedded once.
    """

    def __init__(self, embed: Callable[[list[str]], np.ndarray] | None = None) -> None:
        self._embed = embed
        self._known: dict[str, np.ndarray] = {}

    def know(self, texts: Sequence[str]) -> None:
        """Embed texts that are not known yet, together."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            rows = np.asarray((self._embed or sentence_embeddings)(new), dtype=np.float64)
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            self._known.update(zip(new, rows, strict=True))

    def choose(self, description: str, tests: Sequence[UnitTest]) -> list[int | None]:
        """The index of the largest cosine; None for a description without text."""
        if not description.strip():
            return [None] * len(tests)
        self.know([description, *(text for test in tests for text in test.candidates)])
        told = self._known[description]
        return [1 + int(np.argmax([self._known[text] @ told for text in test.candidates])) for test in tests]


@cache
def _encoder() -> Any:
    from theodolite.language.pretrained import load_encoder

    return load_encoder()


def sentence_embeddings(texts: list[str], encoder: Any = None) -> np.ndarray:
    """Sentence embeddings (n, width), of length one: the mean of the tokens' last hidden states.

    encoder: what `theodolite.language.pretrained.load_encoder` gives; MiniLM, of 384 dimensions, where None.
    """
    encoder = encoder or _encoder()
    order = np.argsort([len(text) for text in texts], kind="stable")
    out = np.empty((len(texts), encoder.model.config.hidden_size))
    with torch.no_grad():
        for rows in np.array_split(order, -(-len(order) // 128)):
            batch = encoder.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            hidden = encoder.model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None]
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return out


class LanguageModelJudge:
    """A language model that sees the description and three candidates and must answer with one number."""

    def __init__(self, model: LanguageModel, *, temperature: float = 0.0) -> None:
        self.model, self._temperature = model, temperature

    def choose(self, description: str, tests: Sequence[UnitTest]) -> list[int | None]:
        """Asks for all tests, as many at a time as the model was connected for."""
        conversations = [[{"role": "user", "content": _question(description, test)}] for test in tests]
        answers = self.model.chat_many(conversations, temperature=self._temperature, max_tokens=16)
        return [parse_choice(answer.text) for answer in answers]


def _question(description: str, test: UnitTest) -> str:
    candidates = "\n".join(f"{i}. {text}" for i, text in enumerate(test.candidates, 1))
    return (
        f"A function is described like this:\n{description}\n\nExactly one of these three candidates fits the function "
        f"(a word that activates it most, or an input with its true output):\n{candidates}\n\n"
        "Answer with its number, 1, 2 or 3, and nothing else."
    )


class ExecutionJudge:
    """Runs the description as code: the candidate "input -> output" whose output it gives, where exactly one does.

    For functions of strings, of which a description is a program. A program that is refused answers nothing.
    """

    def choose(self, description: str, tests: Sequence[UnitTest]) -> list[int | None]:
        """The index of the one candidate that the program reproduces; None where none or several are."""
        pairs = [text.split(" -> ", 1) for test in tests for text in test.candidates]
        if not all(len(pair) == 2 for pair in pairs):
            raise InputError('a program is judged by candidates of the form "input -> output"')
        try:
            results = run_sandboxed(description, [given for given, _ in pairs])
        except UnsafeCode:
            return [None] * len(tests)
        same = [
            not isinstance(got, SandboxFailure) and str(got) == told
            for got, (_, told) in zip(results, pairs, strict=True)
        ]
        chosen: list[int | None] = []
        for i in range(len(tests)):
            hits = [k for k in (1, 2, 3) if same[3 * i + k - 1]]
            chosen.append(hits[0] if len(hits) == 1 else None)
        return chosen
