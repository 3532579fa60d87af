"""String functions with known answers: one of 59 primitives, or one after another."""

__all__ = ["StringFunction", "make_strings"]

import inspect
import string
from dataclasses import dataclass
from typing import Any

import numpy as np

from theodolite.core.errors import InputError
from theodolite.explanations.function_interpretation.primitives import HELPERS, PRIMITIVES

_BY_NAME = {function.__name__: function for function in PRIMITIVES}
_NAMES = tuple(_BY_NAME)
_ARGUMENTS = {name: len(inspect.signature(function).parameters) - 1 for name, function in _BY_NAME.items()}
_SPELLED = frozenset(
    [
        "count_vowels",
        "count_consonants",
        "count_capitals",
        "count_small",
        "count_letter",
        "count_substring",
        "count_characters",
        "position_of_letter",
        "indexes_of_digits",
        "indexes_of_letters",
        "ordinal_of_first",
        "ordinal_of_last",
        "ordinal_of_middle",
        "spell_digits",
    ]
)  # what gives number words: small letters, blanks and hyphens
_SHORT = frozenset(("first", "last", "middle_characters"))
_CASES = frozenset(("lower", "upper", "capitalize", "alternate_case"))
_STRIPS = frozenset(("strip", "strip_left", "strip_right"))
_ON_DIGITS = frozenset(("spell_digits", "drop_digits", "indexes_of_digits"))
_ON_CAPITALS = frozenset(("keep_capitals", "count_capitals"))
_SMALL_ONLY = frozenset(("lower", "shift_by_character", "permute_alphabet"))
_MOST_TRIES = 200


@dataclass(frozen=True)
class StringFunction:
    """``fn(text)`` gives a text. steps: (primitive, arguments), applied in this order."""

    steps: tuple[tuple[str, tuple[Any, ...]], ...]
    name: str = ""

    modality = "string"
    examples = ("apple", "Hello World", "test123", "Code", "banana split", "XYZ 42", "  space  ", "a")
    interval = None

    def __call__(self, text: str) -> str:
        """Apply the steps."""
        for primitive, arguments in self.steps:
            text = _BY_NAME[primitive](text, *arguments)
        return text

    @property
    def kind(self) -> str:
        """The primitives from the inside out."""
        return " then ".join(primitive for primitive, _ in self.steps)

    @property
    def params(self) -> tuple[tuple[Any, ...], ...]:
        """The arguments of each step."""
        return tuple(arguments for _, arguments in self.steps)

    @property
    def description(self) -> str:
        """The truth in words."""
        told = (PRIMITIVES[_BY_NAME[primitive]].format(*map(repr, given)) for primitive, given in self.steps)
        return "the text " + "; then of that, ".join(told)

    def source(self) -> str:
        """The function as a program."""
        used = dict.fromkeys([*HELPERS, *(_BY_NAME[primitive] for primitive, _ in self.steps)])
        lines = [inspect.getsource(function) for function in used]
        text = "s"
        for primitive, arguments in self.steps:
            text = f"{primitive}({', '.join([text, *map(repr, arguments)])})"
        return "\n".join([*lines, "def function(s):", f"    return {text}", ""])


def make_strings(n: int, seed: int) -> list[StringFunction]:
    """``n`` different functions, 30 % of them one primitive and 70 % one after another, without pointless pairs.

    Pointless: a primitive twice, a count of a count, a case after another case, stripping after white space was removed, and
    what works on digits or capitals after what gives none.

    >>> make_strings(1, seed=3)[0]("Code 7")
    'C'
    """
    if n < 0:
        raise InputError(f"need n >= 0, got {n}")
    rng = np.random.default_rng([seed, 10])
    seen: dict[tuple[Any, ...], None] = {}
    for _ in range(n):
        steps, made = (1 if rng.random() < 0.3 else 2), None
        for _ in range(_MOST_TRIES):
            chosen = [_NAMES[i] for i in rng.integers(0, len(_NAMES), steps)]
            made = tuple((name, _arguments(name, rng)) for name in chosen)
            if made not in seen and not (steps == 2 and pointless(*chosen)):
                break
        else:
            raise InputError(f"{len(seen)} different string functions were found by drawing, not {n}; ask for fewer")
        seen[made] = None
    return [StringFunction(steps, f"f{i:05d}") for i, steps in enumerate(seen)]


def pointless(inner: str, outer: str) -> bool:
    """Whether applying ``outer`` after ``inner`` does nothing new."""
    spelled = inner in _SPELLED
    return (
        inner == outer
        or (spelled and outer in _SPELLED)
        or (inner in _CASES and outer in _CASES)
        or (inner in _SHORT and outer in _SHORT)
        or (
            inner in _STRIPS | {"drop_spaces"}
            and outer in _STRIPS | ({"drop_spaces"} if inner == "drop_spaces" else set())
        )
        or ((spelled or inner in ("drop_digits", "keep_capitals")) and outer in _ON_DIGITS)
        or ((spelled or inner in _SMALL_ONLY) and outer in _ON_CAPITALS)
        or ((spelled or inner in _SMALL_ONLY) and outer == "lower")
        or (inner in ("upper", "keep_capitals") and outer in ("keep_capitals", "upper", "count_small"))
    )


def _arguments(name: str, rng: np.random.Generator) -> tuple[Any, ...]:
    def letter(among: str = string.ascii_lowercase) -> str:
        return among[int(rng.integers(len(among)))]

    def shift() -> int:
        return int(rng.integers(1, 10)) * (1 if rng.random() < 0.5 else -1)

    if name in ("swap_positions", "replace_letter"):
        a, b = (int(i) for i in rng.choice(10 if name == "swap_positions" else 26, 2, replace=False))
        return (a, b) if name == "swap_positions" else (string.ascii_lowercase[a], string.ascii_lowercase[b])
    if name == "insert_middle":
        return (letter(string.digits + string.ascii_letters),)
    if name == "shift_by_character":
        return int(rng.integers(0, 5)), 1 if rng.random() < 0.5 else -1
    if name == "shift_at":
        return int(rng.integers(0, 10)), shift()
    if name == "permute_alphabet":
        return ("".join(string.ascii_lowercase[i] for i in rng.permutation(26)),)
    if name == "append_text":
        return ("".join(letter(string.ascii_letters) for _ in range(int(rng.integers(1, 6)))),)
    if name == "count_substring":
        return (letter() + letter(),)
    if name in ("caesar", "shift_middle", "shift_first", "shift_last"):
        return (shift(),)
    return tuple(letter() for _ in range(_ARGUMENTS[name]))
