"""The families of numeric functions: plain functions of x and their parameters, whose text is also the truth in code.

Each is defined with numpy alone, so that its own source, sent to the sandbox, is what `OracleInterpreter` answers.
"""

__all__ = ["COMPOSABLE", "DOMAINS", "FAMILIES", "SIMPLE", "draw_parameters"]

from collections.abc import Callable
from typing import Any

import numpy as np


def linear(x, m, c):
    return m * x + c


def polynomial(x, *coefficients):
    return np.polyval(coefficients, x)


def absolute(x, s, b):
    return s * np.abs(x) + b


def root(x, s, b, n):
    return s * x ** (1.0 / n) + b


def logarithm(x, s, b, base):
    return s * np.log(x) / np.log(base) + b


def step(x, s, b, at_zero):
    return s * np.heaviside(x, at_zero) + b


def relu(x, s, b, leak):
    return s * np.where(x > 0, x, leak * x) + b


def tanh(x, a, b, c, d):
    return a * np.tanh(2 * np.pi / b * (x - c)) + d


def constant(x, a):
    return np.full(np.shape(x), float(a))


def sin(x, a, b, c, d):
    return a * np.sin(2 * np.pi / b * (x - c)) + d


def cos(x, a, b, c, d):
    return a * np.cos(2 * np.pi / b * (x - c)) + d


def reciprocal(x, a):
    return 1 / (a * x)


def gaussian(x, mean, sd):
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))


def rational(x, numerator, denominator):
    return np.polyval(numerator[::-1], x) / np.polyval(denominator[::-1], x)


def rectangle(x, width):
    return np.where(np.abs(x) <= width / 2, 1.0, 0.0)


def square_wave(x, period, shift):
    return np.where(np.sin(2 * np.pi * (x - shift) / period) > 0, 1.0, -1.0)


def ceil(x):
    return np.ceil(x)


def floor(x):
    return np.floor(x)


SIMPLE = (
    "linear", "polynomial", "absolute", "root", "logarithm", "step", "relu", "tanh", "constant", "sin", "cos", "reciprocal",
    "gaussian", "rational", "rectangle", "square_wave",
)  # fmt: skip
"""What stands alone."""

COMPOSABLE = ("linear", "polynomial", "step", "relu", "constant", "ceil", "floor", "rectangle", "square_wave")
"""What a product or a sum is made of."""

FAMILIES: dict[str, Callable[..., np.ndarray]] = {
    function.__name__: function
    for function in (
        linear, polynomial, absolute, root, logarithm, step, relu, tanh, constant, sin, cos, reciprocal, gaussian, rational,
        rectangle, square_wave, ceil, floor,
    )
}  # fmt: skip
"""By name: function(x, *parameters), elementwise."""

DOMAINS = {"root": (0.0, 100.0), "logarithm": (1.0, 100.0)}
"""Where a function lives, if not on (-100, 100)."""


def draw_parameters(family: str, rng: np.random.Generator) -> tuple[Any, ...]:
    """Parameters as the benchmark draws them, rounded to a tenth.

    A base of 1, a slope of 0 under a fraction and a period of 0 are drawn again: they leave no function.
    """

    def uniform(low: float, high: float, n: int = 1) -> list[float]:
        return [round(float(value), 1) for value in rng.uniform(low, high, n)]

    def nonzero(low: float, high: float, zero: float = 0.0) -> float:
        while (value := uniform(low, high)[0]) == zero:
            pass
        return value

    if family in ("tanh", "sin", "cos"):
        amplitude, period, shift = (
            round(float(rng.choice(np.linspace(low, high, 100))), 1)
            for low, high in ((-10, 10), (0.1, 2 * np.pi), (0.1, 2 * np.pi))
        )
        return (amplitude, period, shift, *uniform(-30, 30))
    if family == "linear":
        return tuple(uniform(-10, 10, 2))
    if family == "polynomial":
        return tuple(uniform(-5, 5, int(rng.integers(2, 6)) + 1))
    if family == "rational":
        above = int(rng.integers(0, 5))
        below = int(rng.integers(above + 1, 6))
        return tuple(uniform(-10, 10, above + 1)), tuple(uniform(-10, 10, below + 1))
    if family == "constant":
        return (int(rng.integers(-100, 100)),)
    if family == "gaussian":
        return (*uniform(-50, 50), *uniform(1, 10))
    if family == "rectangle":
        return tuple(uniform(1, 10))
    if family == "square_wave":
        return (*uniform(1, 10), *uniform(-5, 5))
    if family == "reciprocal":
        return (nonzero(-10, 10),)
    if family in ("ceil", "floor"):
        return ()
    scale = tuple(uniform(-30, 30, 2))
    if family == "root":
        return (*scale, int(rng.integers(1, 3)))
    if family == "logarithm":
        return (*scale, nonzero(1, 10, 1.0))
    if family == "step":
        return (*scale, *uniform(-100, 100))
    return (*scale, *uniform(0, 1)) if family == "relu" else scale
