"""Interpreters: a language model in a dialogue, and those that it has to be compared with."""

__all__ = ["ConstantInterpreter", "LanguageModelInterpreter", "OracleInterpreter", "PolynomialInterpreter"]

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np

from theodolite.core.errors import InputError
from theodolite.explanations.function_interpretation.errors import DomainError, QueryBudgetExceeded
from theodolite.explanations.function_interpretation.loop import (
    SECTIONS,
    AnswerError,
    BlackBox,
    Interpretation,
    Mode,
    parse_answer,
)
from theodolite.language.model import LanguageModel

_SHOWN = 60  # examples that a prompt begins with
_MEANINGS = {
    "DESCRIPTION": "what the function does, in one or two sentences",
    "DOMAIN": "where it behaves differently from the rest, as an interval (a, b), or none",
    "CODE": "a Python function of one argument with the same outputs; it may import math, numpy, scipy, re and string (by name, "
    "no *) and define functions, no classes",
}
_INPUTS = {"numeric": "numbers between {low:g} and {high:g}", "string": "texts", "neuron": "words or short texts"}


class PolynomialInterpreter:
    """The least squares polynomial of a degree through a grid of points: what an interpreter has to beat."""

    numeric_only = True

    def __init__(self, degree: int = 3) -> None:
        if degree != int(degree) or degree < 0:
            raise InputError(f"a degree is a whole number, at least 0, got {degree}")
        self.degree = degree
        self.name = "constant" if degree == 0 else f"polynomial of degree {degree}"

    def interpret(self, blackbox: BlackBox, *, mode: Mode = "agent", rounds: int = 20) -> Interpretation:
        """Ask for 256 equally spaced points, or as many as the budget has; in "single_round" the examples are all."""
        low, high = blackbox.bounds
        wanted = blackbox.examples if mode == "single_round" else np.linspace(low, high, min(256, blackbox.left))
        pairs = np.array(blackbox.query(wanted[: blackbox.left])).reshape(-1, 2)
        asked = tuple(pairs[:, 0].tolist())
        kept = pairs[np.isfinite(pairs[:, 1])]
        if len(kept) == 0:
            return Interpretation("no finite value was seen", "none", rounds=1, queries=len(asked), asked=asked)
        middle, unit = (low + high) / 2, (high - low) / 2
        z = (kept[:, 0] - middle) / unit
        degree = min(self.degree, len(np.unique(z)) - 1)
        powers = np.vander(z, degree + 1)
        coefficients = np.linalg.lstsq(powers, kept[:, 1], rcond=None)[0].tolist()
        code = (
            "import numpy as np\n\ndef function(x):\n"
            f"    return np.polyval({coefficients!r}, (np.asarray(x, dtype=float) - {middle!r}) / {unit!r})\n"
        )
        words = "about constant" if degree == 0 else f"about a polynomial of degree {degree}"
        return Interpretation(words, "none", code, rounds=1, queries=len(asked), asked=asked)


class ConstantInterpreter(PolynomialInterpreter):
    """The mean."""

    def __init__(self) -> None:
        super().__init__(0)


class OracleInterpreter:
    """The truth, for checking scores. fn: the function behind the black box, which it is told; `benchmark` tells it."""

    name = "oracle"

    def __init__(self, fn: Any = None) -> None:
        self._fn = fn

    def interpret(self, blackbox: BlackBox, *, mode: Mode = "agent", rounds: int = 20) -> Interpretation:
        """Asks nothing."""
        if self._fn is None:
            raise InputError("the oracle must be told the function: OracleInterpreter(fn)")
        interval = getattr(self._fn, "interval", None)
        domain = "none" if interval is None else f"({interval[0]!r}, {interval[1]!r})"
        source = self._fn.source() if hasattr(self._fn, "source") else ""
        words = getattr(self._fn, "description", "") or getattr(self._fn, "kind", "")
        return Interpretation(words, domain, source, rounds=1, reason="" if words or source else "no known formula")


class LanguageModelInterpreter:
    """A language model that asks and answers in a dialogue.

    In each round it either asks, ``QUERY: [inputs as a JSON list]``, or answers with its sections. What it does wrong, a query
    beyond the budget or the domain, an answer without its sections, is told to it as text and costs the round. In the last
    round it is told to answer. Local models and endpoints alike: see `theodolite.language.connect`.
    """

    def __init__(self, model: LanguageModel, temperature: float = 0.0, *, max_tokens: int = 1024) -> None:
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.name = model.name

    def interpret(self, blackbox: BlackBox, *, mode: Mode = "agent", rounds: int = 20) -> Interpretation:
        """The dialogue; without an answer in the end the description is empty and ``reason`` says why."""
        rounds = 1 if mode == "single_round" else rounds
        before, asked = self.model.usage, len(blackbox.log)
        messages = [{"role": "user", "content": _opening(blackbox, mode, rounds)}]
        sections: dict[str, str] = {}
        reason, used = "no answer", 0
        for used in range(1, rounds + 1):
            text = self.model.chat(messages, temperature=self.temperature, max_tokens=self.max_tokens).text
            messages.append({"role": "assistant", "content": text})
            told, sections, reason = _turn(text, blackbox, asks=mode != "single_round" and used < rounds)
            if sections or used == rounds:
                break
            left = rounds - used
            told += f"\nRounds left: {left}. " + ("Answer now." if left == 1 else f"Inputs left: {blackbox.left}.")
            messages.append({"role": "user", "content": told})
        after = self.model.usage
        made = Interpretation(
            sections.get("DESCRIPTION", ""), sections.get("DOMAIN", ""), sections.get("CODE", ""), used,
            len(blackbox.log) - asked, tuple(messages), tuple(given for given, _ in blackbox.log[asked:]), reason,
        )  # fmt: skip
        return replace(
            made, calls=after.calls + after.cached - before.calls - before.cached,
            prompt_tokens=after.prompt_tokens - before.prompt_tokens,
            completion_tokens=after.completion_tokens - before.completion_tokens,
        )  # fmt: skip


def _opening(blackbox: BlackBox, mode: Mode, rounds: int) -> str:
    inputs = _INPUTS[blackbox.modality].format(low=blackbox.bounds[0], high=blackbox.bounds[1])
    sections = "\n".join(f"[{name}] {_MEANINGS[name]}" for name in SECTIONS[blackbox.modality])
    parts = [f"Find out what an unknown function does. Its inputs are {inputs}."]
    if mode != "agent" and blackbox.examples:
        parts.append(
            f"Some inputs and outputs:\n{_pairs(blackbox.query(blackbox.examples[: min(_SHOWN, blackbox.left)]))}"
        )
    if mode != "single_round" and rounds > 1:
        parts.append(
            f"You have {rounds} rounds and {blackbox.left} inputs. To see outputs, write one line and nothing else:\n"
            "QUERY: [inputs as a JSON list]"
        )
    parts.append(f"When you know, end with exactly these sections:\n{sections}")
    return "\n\n".join(parts)


def _pairs(pairs: list[tuple[Any, Any]]) -> str:
    return "\n".join(f"{json.dumps(given)} -> {json.dumps(got)}" for given, got in pairs)


def _turn(text: str, blackbox: BlackBox, *, asks: bool) -> tuple[str, dict[str, str], str]:
    """What is told to the model, its sections where it answered, and the reason where it did not."""
    asked = re.search(r"^\s*QUERY:\s*(\[.*?\])\s*$", text, re.MULTILINE | re.DOTALL)
    if asked and not re.search(r"\[DESCRIPTION\]", text):
        if not asks:
            return "", {}, "it asked in its last round"
        try:
            pairs = blackbox.query(json.loads(asked.group(1)))
        except (DomainError, QueryBudgetExceeded) as error:
            return str(error), {}, "no answer"
        except ValueError as error:
            return f"The inputs are not a JSON list: {error}", {}, "no answer"
        return _pairs(pairs) or "No input was given.", {}, "no answer"
    try:
        return "", parse_answer(text, blackbox.modality), ""
    except AnswerError as error:
        return f"{error}.", {}, str(error)
