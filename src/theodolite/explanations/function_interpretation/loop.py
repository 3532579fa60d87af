"""The experiment: an interpreter asks a black box, within a budget, and ends with a description, a domain and code."""

__all__ = [
    "MODES", "AnswerError", "BlackBox", "Interpretation", "Interpreter", "interpret", "parse_answer", "stated_interval",
]  # fmt: skip

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from theodolite.core.errors import InputError, TheodoliteError
from theodolite.explanations.function_interpretation.errors import DomainError, QueryBudgetExceeded

Mode = Literal["agent", "seeded", "single_round"]
MODES: tuple[Mode, ...] = ("agent", "seeded", "single_round")
SECTIONS = {
    "numeric": ("DESCRIPTION", "DOMAIN", "CODE"),
    "string": ("DESCRIPTION", "CODE"),
    "neuron": ("DESCRIPTION", "DOMAIN"),
}
"""What an answer must have, by the kind of function."""

_LONGEST = 2000  # characters of an input


class AnswerError(TheodoliteError):
    """An answer that does not have the sections it must have; the text says which."""


class BlackBox:
    """A function that can only be asked: inputs in, (input, output) pairs out, at most ``budget`` inputs in all.

    fn: a `NumericFunction`, a string function, a neuron, or any callable: on an array of numbers where ``modality`` is
    "numeric", on one text where it is "string", on a list of texts where it is "neuron". modality: what ``fn.modality``
    says, "numeric" where it says nothing. bounds: of numeric inputs. examples: inputs that "seeded" and "single_round" show;
    ``fn.examples`` where None. log: all pairs, in order.

    >>> box = BlackBox(lambda x: 2 * x, budget=3)
    >>> box.query([1, 2.5])
    [(1.0, 2.0), (2.5, 5.0)]
    >>> box.left
    1
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        budget: int = 400,
        *,
        modality: str | None = None,
        bounds: tuple[float, float] = (-128.0, 128.0),
        examples: Sequence[Any] | None = None,
    ) -> None:
        self.modality = modality or getattr(fn, "modality", "numeric")
        if self.modality not in SECTIONS:
            raise InputError(f"a function is {', '.join(SECTIONS)}, got {self.modality!r}")
        if budget < 1 or not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise InputError(f"need budget >= 1 and finite bounds in order, got {budget} and {bounds}")
        self.budget, self.bounds = budget, (float(bounds[0]), float(bounds[1]))
        shown = getattr(fn, "examples", None) if examples is None else examples
        self.examples = tuple(
            np.linspace(*self.bounds, 33) if shown is None and self.modality == "numeric" else shown or ()
        )
        self.log: list[tuple[Any, Any]] = []
        modality_, ask = self.modality, fn

        def answer(inputs: list[Any]) -> list[Any]:  # holds the function, so that no attribute of the box does
            if modality_ == "string":
                return [ask(one) for one in inputs]
            given = ask(np.array(inputs)) if modality_ == "numeric" else ask(inputs)
            outputs = np.asarray(given)
            if outputs.shape != (len(inputs),) or (modality_ == "numeric" and outputs.dtype.kind not in "biuf"):
                raise InputError(
                    f"a function must give one {'number' if modality_ == 'numeric' else 'value'} an input, shape "
                    f"({len(inputs)},); this one gave shape {outputs.shape} of {outputs.dtype}"
                )
            return (outputs.astype(np.float64) if modality_ == "numeric" else outputs).tolist()

        self._answer = answer

    @property
    def left(self) -> int:
        """How many inputs may still be asked for."""
        return self.budget - len(self.log)

    def query(self, inputs: Iterable[Any]) -> list[tuple[Any, Any]]:
        """Pairs (input, output). Raises QueryBudgetExceeded and DomainError; then none of the inputs was answered."""
        wanted = [self._checked(one) for one in inputs]
        if len(wanted) > self.left:
            raise QueryBudgetExceeded(f"{len(wanted)} inputs were asked for and {self.left} of {self.budget} are left")
        pairs = list(zip(wanted, self._answer(wanted), strict=True)) if wanted else []
        self.log += pairs
        return pairs

    def _checked(self, value: Any) -> Any:
        if self.modality == "numeric":
            if isinstance(value, bool | str) or not np.isscalar(value) or not np.isreal(value):
                raise DomainError(f"an input must be a number, got {value!r}")
            if not self.bounds[0] <= float(value) <= self.bounds[1]:  # type: ignore[arg-type]
                raise DomainError(f"an input must lie in [{self.bounds[0]:g}, {self.bounds[1]:g}], got {value!r}")
            return float(value)  # type: ignore[arg-type]
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise DomainError(f"an input must be a text of at most {_LONGEST} characters, got {str(value)[:40]!r}")
        return value


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What an interpreter said, and what it cost.

    description, domain, code: the sections, "" where there is none. rounds: of the dialogue. queries: inputs that were asked
    for; asked: which. transcript: messages. reason: why there is no answer, "" where there is one. calls, prompt_tokens,
    completion_tokens: of a language model.
    """

    description: str
    domain: str = ""
    code: str = ""
    rounds: int = 0
    queries: int = 0
    transcript: tuple[dict[str, str], ...] = ()
    asked: tuple[Any, ...] = ()
    reason: str = ""
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval that [DOMAIN] states, None where it states none."""
        return stated_interval(self.domain)


@runtime_checkable
class Interpreter(Protocol):
    """What finds out what a black box does. name: in tables."""

    name: str

    def interpret(self, blackbox: BlackBox, *, mode: Mode, rounds: int) -> Interpretation:
        """Ask and answer; never raises for what the black box or a language model answers."""
        ...


def interpret(blackbox: BlackBox, interpreter: Interpreter, mode: str = "agent", rounds: int = 20) -> Interpretation:
    """Let ``interpreter`` find out what ``blackbox`` does; it is handed the box and nothing else.

    mode: "agent" (it may ask), "seeded" (it is shown the examples and may ask), "single_round" (it is shown the examples and
    answers). rounds: 1 to 20 of a dialogue. An endpoint that is down raises EndpointUnavailable.
    """
    if mode not in MODES or not 1 <= rounds <= 20:
        raise InputError(f"need a mode of {', '.join(MODES)} and 1 to 20 rounds, got {mode!r} and {rounds}")
    return interpreter.interpret(blackbox, mode=mode, rounds=rounds)  # type: ignore[arg-type]


_HEADING = re.compile(
    r"(?:^[ \t]*#+[ \t]*)?(?:\*\*|__)?\[(DESCRIPTION|DOMAIN|CODE)\](?:\*\*|__)?[ \t]*:?(?:\*\*|__)?", re.MULTILINE
)
_FENCED = re.compile(r"^[ \t]*(```|~~~)[ \t]*\w*[ \t]*\r?\n(.*?)\r?\n?^[ \t]*\1", re.MULTILINE | re.DOTALL)


def parse_answer(text: str, modality: str = "numeric") -> dict[str, str]:
    """The sections of an answer, each once and with text, in their order.

    Marks of a heading ("**[CODE]**:", "### [CODE]") are taken off, and of a [CODE] with one fenced block that block is taken.

    Raises AnswerError saying what is missing, there twice or out of order.

    >>> parse_answer("[DESCRIPTION] doubles [DOMAIN] none [CODE] def f(x): return 2 * x")["CODE"]
    'def f(x): return 2 * x'
    """
    wanted = SECTIONS[modality]
    marks = [(found.group(1), found.start(), found.end()) for found in _HEADING.finditer(text)]
    names = [name for name, *_ in marks]
    for name in wanted:
        if names.count(name) != 1:
            raise AnswerError(f"[{name}] must be there once, and is there {names.count(name)} times")
    if tuple(name for name in names if name in wanted) != wanted:
        raise AnswerError(f"the sections must stand in the order {', '.join(f'[{name}]' for name in wanted)}")
    ends = [start for _, start, _ in marks[1:]] + [len(text)]
    sections = {
        name: text[after:end].strip() for (name, _, after), end in zip(marks, ends, strict=True) if name in wanted
    }
    if "CODE" in sections:
        fenced = _FENCED.findall(sections["CODE"])
        sections["CODE"] = fenced[0][1] if len(fenced) == 1 else sections["CODE"]
    empty = next((name for name, value in sections.items() if not value), None)
    if empty is not None:
        raise AnswerError(f"[{empty}] has no text")
    return sections


_NUMBER = r"([-+]?(?:inf(?:inity)?|∞|(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?))"
_PAIR = re.compile(rf"[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[\])]", re.IGNORECASE)
_BETWEEN = re.compile(
    rf"{_NUMBER}\s*(?:<=?|≤)\s*x\s*(?:<=?|≤)\s*{_NUMBER}|(?:between|from)\s+{_NUMBER}\s+(?:and|to)\s+{_NUMBER}",
    re.IGNORECASE,
)
_SIDE = re.compile(rf"\bx\s*(<=?|>=?|≤|≥)\s*{_NUMBER}|{_NUMBER}\s*(<=?|>=?|≤|≥)\s*x\b", re.IGNORECASE)
_AND = re.compile(r"\s*(?:,|&+|∧|,?\s*and|,?\s*but)\s*", re.IGNORECASE)


def stated_interval(domain: str) -> tuple[float, float] | None:
    """The first interval in a text, "(a, b)", "a < x < b", "between a and b", "x > a and x < b" or "x <= a"; None where there
    is none.

    The whole line is none: a function that behaves alike everywhere.

    >>> stated_interval("corrupted on (3.5, 12]"), stated_interval("x >= 7"), stated_interval("(-inf, inf)")
    ((3.5, 12.0), (7.0, inf), None)
    """
    text = domain.replace("−", "-")
    for pattern in (_PAIR, _BETWEEN):
        if found := pattern.search(text):
            low, high = (_number(one) for one in found.groups() if one is not None)
            return _interval(low, high)
    sides = list(_SIDE.finditer(text))
    if not sides:
        return None
    low, high = _side(sides[0])
    if len(sides) > 1 and _AND.fullmatch(text[sides[0].end() : sides[1].start()]):
        other = _side(sides[1])
        low, high = max(low, other[0]), min(high, other[1])
    return _interval(low, high)


def _number(text: str) -> float:
    return float(text.replace("∞", "inf"))


def _interval(low: float, high: float) -> tuple[float, float] | None:
    return (low, high) if low < high and (math.isfinite(low) or math.isfinite(high)) else None


def _side(found: re.Match[str]) -> tuple[float, float]:
    """The half-line of "x <= a" or of "a >= x"."""
    after, end, start, before = found.groups()
    below = after[0] in "<≤" if after else before[0] in ">≥"
    return (-math.inf, _number(end or start)) if below else (_number(end or start), math.inf)
