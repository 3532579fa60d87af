"""How far answers from a reused sample can be off, and how many rows or queries that allows."""

__all__ = ["Bound", "adaptive_bias", "default_noise", "max_safe_queries", "required_sample_size"]

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from theodolite.core.errors import InputError


@dataclass(frozen=True)
class Bound:
    """A number of rows; where constant_known is False only its growth is proved and the constant is taken as 1."""

    n: int
    constant_known: bool


def adaptive_bias(d: int, n: int, sigma: float = 0.0) -> float:
    """Accuracy that pure noise seems to reach on n rows after d correlations were asked of the same rows.

    The last question is the accuracy of sign(sum_j sign(a_j) x_j), a_j the answered correlation of feature j with the
    label. Its expectation is Phi( sqrt(2 d / (pi n)) / sqrt(1 + n sigma^2) ), where sigma is the standard deviation of
    the noise in each answer; the truth is 0.5.

    >>> round(adaptive_bias(1000, 1000), 4)
    0.7875
    """
    if d < 0 or n < 1 or not sigma >= 0:
        raise InputError(f"need d >= 0 queries, n >= 1 rows and sigma >= 0, got d={d}, n={n}, sigma={sigma}")
    return float(stats.norm.cdf(math.sqrt(2 * d / (math.pi * n)) / math.sqrt(1 + n * sigma * sigma)))


def default_noise(max_queries: int, n: int) -> float:
    """Noise that makes adaptive_bias - 0.5 + 2 sigma smallest: a rule of thumb that weighs bias against noise, no theorem."""
    found = optimize.minimize_scalar(
        lambda s: adaptive_bias(max_queries, n, s) - 0.5 + 2 * s, bounds=(0.0, 1.0), method="bounded"
    )
    # the objective may fall towards 0, where a bounded search never quite arrives
    return 0.0 if adaptive_bias(max_queries, n) - 0.5 <= found.fun else float(found.x)


def required_sample_size(
    m: int,
    tau: float,
    beta: float = 0.05,
    mechanism: str = "thresholdout",
    *,
    budget: int | None = None,
    universe: int | None = None,
) -> Bound:
    """Rows with which m queries are answered within tau, all of them with probability 1 - beta.

    "fixed" queries (chosen beforehand) and "splitting" (fresh rows for each) follow from Hoeffding's inequality, with
    its constant. "empirical" m / tau^2, "gaussian" sqrt(m) (log m)^1.5 / tau^2.5, "pmw" (log m)^1.5 sqrt(log |X|) /
    tau^3.5 for a ``universe`` of |X| points, and "thresholdout" log(m/beta) / tau^2 min(B, sqrt(B log(log(m/beta) /
    tau))) for a ``budget`` B are orders of growth from the papers.
    """
    _check(tau, beta)
    if m < 1:
        raise InputError(f"need at least one query, got m={m}")
    log_m = math.log(max(m, 2))
    if mechanism == "fixed":
        return Bound(math.ceil(math.log(2 * m / beta) / (2 * tau**2)), True)
    if mechanism == "splitting":
        return Bound(m * math.ceil(math.log(2 * m / beta) / (2 * tau**2)), True)
    if mechanism == "empirical":
        return Bound(math.ceil(m / tau**2), False)
    if mechanism == "gaussian":
        return Bound(math.ceil(math.sqrt(m) * log_m**1.5 / tau**2.5), False)
    if mechanism == "pmw":
        if universe is None or universe < 2:
            raise InputError(f"pmw needs the size of the universe, at least 2, got {universe}")
        return Bound(math.ceil(log_m**1.5 * math.sqrt(math.log(universe)) / tau**3.5), False)
    if mechanism == "thresholdout":
        if budget is None or budget < 1:
            raise InputError(f"thresholdout needs a budget of at least 1, got {budget}")
        return Bound(math.ceil(math.log(m / beta) / tau**2 * _budget_factor(budget, m, beta, tau)), False)
    raise InputError(
        f"mechanism must be one of fixed, splitting, empirical, gaussian, pmw, thresholdout, got {mechanism!r}"
    )


def max_safe_queries(n: int, tau: float, beta: float = 0.05, mechanism: str = "empirical", **options: int) -> int:
    """Most queries that n rows answer within tau by `required_sample_size`; 0 where not even one.

    >>> max_safe_queries(10_000, 0.1, mechanism="empirical")
    100
    """

    def fits(m: int) -> bool:
        return required_sample_size(m, tau, beta, mechanism, **options).n <= n

    if not fits(1):
        return 0
    high = 1
    while fits(high) and high < 2**60:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def theory_settings(n: int, tau: float, beta: float, m: int) -> tuple[float, float, int]:
    """Threshold 3 tau / 4, noise tau / (96 log(4 m / beta)) and the largest budget that n rows carry (0: none)."""
    _check(tau, beta)
    if m < 1:
        raise InputError(f"max_queries must be at least 1, got {m}")
    allowed = n * tau**2 / math.log(m / beta)
    inner = max(1.0, math.log(math.log(m / beta) / tau))
    budget = int(max(min(allowed, inner), allowed**2 / inner)) if allowed >= 1 else 0
    return 0.75 * tau, tau / (96 * math.log(4 * m / beta)), budget


def smallest_tolerance(n: int, beta: float, m: int) -> float:
    """The smallest tau for which n rows carry a budget of 1."""
    return math.sqrt(math.log(m / beta) / n)


def _budget_factor(budget: int, m: int, beta: float, tau: float) -> float:
    return min(budget, math.sqrt(budget * max(1.0, math.log(math.log(m / beta) / tau))))


def _check(tau: float, beta: float) -> None:
    if not (0 < tau < 1 and 0 < beta < 1 and np.isfinite(tau)):
        raise InputError(f"tolerance and failure probability must lie in (0, 1), got {tau} and {beta}")
