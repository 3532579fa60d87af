"""Kinds of parameters: their bounds, how they are drawn, how they are written and read back."""

__all__ = ["Categorical", "Float", "Int", "Ordinal", "Parameter", "number"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from theodolite.core.errors import InputError


def _forward(value: float, scale: str) -> float:
    if scale == "log":
        return math.log(value)
    return math.log(value / (1 - value)) if scale == "logit" else value


def _backward(value: float, scale: str) -> float:
    if scale == "log":
        return math.exp(value)
    return 1 / (1 + math.exp(-value)) if scale == "logit" else value


def _check_bounds(low: float, high: float, scale: str, scales: tuple[str, ...]) -> None:
    if scale not in scales:
        raise InputError(f"a scale is one of {', '.join(scales)}; got {scale!r}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"bounds must be finite with low < high, got {low} and {high}")
    if scale == "log" and low <= 0:
        raise InputError(f"a log scale needs bounds above 0, got {low}; use a linear scale")
    if scale == "logit" and not 0 < low < high < 1:
        raise InputError(f"a logit scale needs bounds inside (0, 1), got {low} and {high}")


def number(value: Any) -> float:
    """The value as a float; InputError where it is no number (True and False are none)."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError(f"{value!r} is not a number")
    return float(value)


@dataclass(frozen=True)
class Int:
    """Whole numbers from low to high, both included. scale: "linear" or "log"."""

    low: int
    high: int
    scale: str = "linear"

    def __post_init__(self) -> None:
        if int(self.low) != self.low or int(self.high) != self.high:
            raise InputError(f"bounds of an Int are whole numbers, got {self.low} and {self.high}")
        _check_bounds(self.low, self.high, self.scale, ("linear", "log"))

    def check(self, value: Any) -> int:
        """The value as an int; InputError where it is not whole or not within the bounds."""
        found = number(value)
        if not found.is_integer():
            raise InputError(f"{value!r} is not a whole number")
        if not self.low <= found <= self.high:
            raise InputError(f"{value!r} is not between {self.low} and {self.high}")
        return int(found)

    def from_unit(self, u: float) -> int:
        """The value at u in [0, 1]."""
        start, end = _forward(self.low, self.scale), _forward(self.high + 1, self.scale)
        return min(self.high, max(self.low, math.floor(_backward(start + u * (end - start), self.scale))))

    def to_unit(self, value: Any) -> float:
        """The middle of what `from_unit` maps to the value."""
        start, end = _forward(self.low, self.scale), _forward(self.high + 1, self.scale)
        return (_forward(self.check(value) + 0.5, self.scale) - start) / (end - start)

    def text(self, value: Any) -> str:
        """As it is written in a prompt."""
        return str(self.check(value))

    def parse(self, text: str) -> int:
        """The value that was written; InputError where it is none of these."""
        return self.check(_read_number(text))

    def describe(self) -> str:
        """The range in words."""
        return f"whole number from {self.low} to {self.high}" + _scale_words(self.scale)


@dataclass(frozen=True)
class Float:
    """Numbers from low to high. scale: "linear", "log" or "logit"."""

    low: float
    high: float
    scale: str = "linear"

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, self.scale, ("linear", "log", "logit"))

    @property
    def decimals(self) -> int:
        """Digits after the point when it is written: as many as the lower bound has, at least 2."""
        exponent = Decimal(repr(float(self.low))).normalize().as_tuple().exponent
        return max(2, -int(exponent))

    def check(self, value: Any) -> float:
        """The value as a float; InputError where it is not within the bounds."""
        found = number(value)
        if not self.low <= found <= self.high:
            raise InputError(f"{value!r} is not between {self.low} and {self.high}")
        return found

    def from_unit(self, u: float) -> float:
        """The value at u in [0, 1]."""
        start, end = _forward(self.low, self.scale), _forward(self.high, self.scale)
        return min(float(self.high), max(float(self.low), _backward(start + u * (end - start), self.scale)))

    def to_unit(self, value: Any) -> float:
        """Where the value lies in [0, 1] on its scale."""
        start, end = _forward(self.low, self.scale), _forward(self.high, self.scale)
        return (_forward(self.check(value), self.scale) - start) / (end - start)

    def text(self, value: Any) -> str:
        """As it is written in a prompt; rounded to `decimals`, but not out of the bounds."""
        found = self.check(value)
        written = f"{found:.{self.decimals}f}"
        return written if self.low <= float(written) <= self.high else repr(found)

    def parse(self, text: str) -> float:
        """The value that was written; InputError where it is none of these."""
        return self.check(_read_number(text))

    def describe(self) -> str:
        """The range in words."""
        return f"number from {self.low:g} to {self.high:g}" + _scale_words(self.scale)


@dataclass(frozen=True)
class _Listed(ABC):
    """One of several values."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.values) < 2 or any(a == b for i, a in enumerate(self.values) for b in self.values[:i]):
            raise InputError(f"need at least two different values, got {self.values!r}")

    @abstractmethod
    def check(self, value: Any) -> Any:
        """The member that the value equals; InputError where it is none."""

    def from_unit(self, u: float) -> Any:
        """The value at u in [0, 1]."""
        return self.values[min(len(self.values) - 1, max(0, int(u * len(self.values))))]

    def to_unit(self, value: Any) -> float:
        """The middle of what `from_unit` maps to the value."""
        return (self.index(value) + 0.5) / len(self.values)

    def index(self, value: Any) -> int:
        """The place of the value."""
        found = self.check(value)
        return next(i for i, member in enumerate(self.values) if member is found)

    def text(self, value: Any) -> str:
        """As it is written in a prompt."""
        return str(self.check(value))


@dataclass(frozen=True)
class Ordinal(_Listed):
    """One of several numbers, in the order in which they are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in self.values:
            number(value)

    def check(self, value: Any) -> Any:
        """The member that the value equals; InputError where it is none."""
        found = number(value)
        for member in self.values:
            if math.isclose(found, member, rel_tol=1e-9, abs_tol=0):
                return member
        raise InputError(f"{value!r} is not one of {', '.join(map(str, self.values))}")

    def parse(self, text: str) -> Any:
        """The value that was written; InputError where it is none of these."""
        return self.check(_read_number(text))

    def describe(self) -> str:
        """The values in words."""
        return f"one of {', '.join(map(str, self.values))} (in this order)"


@dataclass(frozen=True)
class Categorical(_Listed):
    """One of several values without an order: texts, numbers, True and False, None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({str(value) for value in self.values}) < len(self.values):
            raise InputError(f"two values are written alike: {', '.join(map(repr, self.values))}")

    def check(self, value: Any) -> Any:
        """The member that the value equals, of its own type; InputError where it is none."""
        for member in self.values:
            if value is member or (type(value) is type(member) and value == member):
                return member
        for member in self.values:  # a number from an array, but not 1 for True
            if not isinstance(value, (bool, np.bool_)) and not isinstance(member, bool) and value == member:
                return member
        raise InputError(f"{value!r} is not one of {', '.join(map(str, self.values))}")

    def parse(self, text: str) -> Any:
        """The value that was written; InputError where it is none of these."""
        written = text.strip().strip("\"'")
        for member in self.values:
            if str(member) == written:
                return member
        raise InputError(f"{text!r} is not one of {', '.join(map(str, self.values))}")

    def describe(self) -> str:
        """The values in words."""
        return f"one of {', '.join(map(str, self.values))}"


Parameter = Int | Float | Ordinal | Categorical


def _read_number(text: str) -> float:
    try:
        return float(text.strip().strip("\"'").replace("_", "x"))  # Python reads 1_0, people do not write it
    except ValueError:
        raise InputError(f"{text!r} is not a number") from None


def _scale_words(scale: str) -> str:
    return {"linear": "", "log": " (log scale)", "logit": " (logit scale)"}[scale]
