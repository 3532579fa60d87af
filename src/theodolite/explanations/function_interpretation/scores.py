"""How right an interpretation is: code against the truth on a grid, and what the published indicator does not see.

    nmse = sum (g - g')^2 / sum g^2                        the published indicator; success below .1
    r2_nmse = sum (g - g')^2 / sum (g - mean g)^2          a constant passes only where the truth is one
    local_nmse = sum_in (g - g')^2 / sum_in (g - f)^2      inside a corrupted interval; the clean formula f scores 1

A corrupted interval is at the function's mean, so that a constant at the mean has a small local_nmse too (below .1 on half of the
published intervals that can be detected in simple functions): read it together with r2_nmse and domain_iou.

g is the truth on average over its noise, g' what the code gives; points where g is NaN or infinite do not count, a NaN of
the code elsewhere is a failure.
"""

__all__ = ["SUCCESS", "NumericScore", "interval_iou", "score_numeric", "score_strings", "score_values"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import DataError, InputError
from theodolite.explanations.function_interpretation.loop import Interpretation
from theodolite.explanations.function_interpretation.numeric import GRID, NumericFunction
from theodolite.language.sandbox import SandboxFailure, UnsafeCode, run_sandboxed

SUCCESS = 0.1
_REACH = (-128.0, 128.0)  # intervals are compared within what an interpreter can ask
_TINY = 1e-9  # of the truth's size: differences below are rounding


@dataclass(frozen=True)
class NumericScore:
    """nmse, r2_nmse: infinite where the code fails. local_nmse: None without a detectable corruption.

    domain_iou: of the interval that is stated and the true one; 1 where there is none and none is stated. success: nmse
    below .1. reason: why the code failed, "" where it did not.
    """

    nmse: float
    r2_nmse: float
    local_nmse: float | None
    domain_iou: float
    success: bool
    reason: str = ""


def score_numeric(fn: NumericFunction | Callable[..., Any], interp: Interpretation) -> NumericScore:
    """The code of an interpretation on the 256 grid points, run in the sandbox, against the function's mean.

    fn: a `NumericFunction`, or any function of an array (its values are then the truth). Code that is missing, is refused or
    fails at one point scores infinity with its ``reason``.
    """
    iou = interval_iou(interp.interval, fn.interval if isinstance(fn, NumericFunction) else None)
    values, reason = run_code(interp.code, GRID)
    if values is None:
        local = math.inf if isinstance(fn, NumericFunction) and fn.interval and fn.detectable() else None
        return NumericScore(math.inf, math.inf, local, iou, False, reason)
    return score_values(fn, values, iou)


def score_values(fn: Any, values: Float[np.ndarray, " points"], domain_iou: float = 1.0) -> NumericScore:
    """As `score_numeric` for values (256,) on the grid, however they were made."""
    if np.shape(values) != GRID.shape:
        raise InputError(f"expected {len(GRID)} values on the grid, got {np.shape(values)}")
    known = isinstance(fn, NumericFunction)
    truth = fn.mean(GRID) if known else np.asarray(fn(GRID), dtype=np.float64)
    used = np.isfinite(truth)
    if not used.any():
        raise DataError("the function has no finite value on the grid, so there is nothing to score")
    g, made = truth[used], np.asarray(values, dtype=np.float64)[used]
    local = None
    if known and fn.interval is not None and fn.detectable():
        inside = fn.corruption.inside(GRID[used])
        formula = fn.clean(GRID[used])
        inside &= np.isfinite(formula)
        local = _ratio(g[inside] - made[inside], g[inside] - formula[inside], g)
    if not np.isfinite(made).all():
        return NumericScore(math.inf, math.inf, None if local is None else math.inf, domain_iou, False, "not finite")
    nmse = _ratio(g - made, g, g)
    return NumericScore(nmse, _ratio(g - made, g - g.mean(), g), local, domain_iou, nmse < SUCCESS)


def _ratio(error: np.ndarray, whole: np.ndarray, truth: np.ndarray) -> float:
    """sum error^2 / sum whole^2; where the whole is only rounding, 0 or infinity as the error is rounding too or not."""
    size = float(np.abs(truth).max()) or 1.0
    with np.errstate(over="ignore"):
        above, below = float(((error / size) ** 2).sum()), float(((whole / size) ** 2).sum())
    rounding = len(truth) * _TINY**2
    if not math.isfinite(above):
        return math.inf
    if below > rounding:
        return above / below
    return 0.0 if above <= rounding else math.inf


def interval_iou(stated: tuple[float, float] | None, truth: tuple[float, float] | None) -> float:
    """Length of the intersection over that of the union, within [-128, 128]; 1 where neither is there, 0 where one is.

    >>> interval_iou((0, 10), (5, 15)), interval_iou(None, None), interval_iou(None, (5, 15))
    (0.3333333333333333, 1.0, 0.0)
    """
    if stated is None or truth is None:
        return float(stated is truth)
    (a, b), (c, d) = ((max(low, _REACH[0]), min(high, _REACH[1])) for low, high in (stated, truth))
    both = max(0.0, min(b, d) - max(a, c))
    union = max(0.0, b - a) + max(0.0, d - c) - both
    return both / union if union > 0 else 0.0


def run_code(code: str, inputs: Sequence[Any] | np.ndarray) -> tuple[np.ndarray | None, str]:
    """One number an input, or None with the reason; one failure is a failure of the whole."""
    if not code.strip():
        return None, "no code"
    try:
        results = run_sandboxed(code, inputs)
    except UnsafeCode as error:
        return None, f"unsafe: {error.name}"
    failed = next((one for one in results if isinstance(one, SandboxFailure)), None)
    if failed is not None:
        return None, failed.reason
    try:
        values = np.array([float(np.ravel(one)[0]) if np.size(one) == 1 else math.nan for one in results])
    except (TypeError, ValueError, OverflowError):
        return None, "not a number"
    return values, ""


def score_strings(fn: Callable[[str], str], interp: Interpretation, inputs: Sequence[str]) -> float:
    """The share of held-out ``inputs`` on which the code's output is the function's, character for character.

    Raises InputError where the interpreter asked for one of the inputs: they are not held out then.
    """
    inputs = list(inputs)
    if not inputs:
        raise InputError("need at least one input to score on")
    seen = set(interp.asked) & set(inputs)
    if seen:
        raise InputError(f"{len(seen)} of the inputs were asked for by the interpreter, such as {sorted(seen)[0]!r}")
    if not interp.code.strip():
        return 0.0
    try:
        results = run_sandboxed(interp.code, inputs)
    except UnsafeCode:
        return 0.0
    return float(
        np.mean([isinstance(got, str) and got == fn(given) for got, given in zip(results, inputs, strict=True)])
    )
