"""Exact statements about a share that was counted: Clopper-Pearson bounds, and how many errors a promise can bear."""

__all__ = ["allowed_errors", "binomial_interval", "needed_rows"]

import math

from scipy import stats

from theodolite.core.errors import InputError


def binomial_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval (low, high) of a share of which ``successes`` in ``n`` were seen, equal tails.

    A one-sided bound with confidence c is one end of the interval with confidence 2 c - 1.

    Source: Clopper and Pearson, 1934, Biometrika 26.

    >>> [round(bound, 3) for bound in binomial_interval(9, 10)]
    [0.555, 0.997]
    """
    if n < 1 or not 0 <= successes <= n or successes != int(successes):  # 3.5 successes would be answered by scipy
        raise InputError(f"need whole numbers with 0 <= successes <= n and n >= 1, got successes={successes}, n={n}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(stats.beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def allowed_errors(n: int, epsilon: float, delta: float) -> int | None:
    """The most errors k on ``n`` independent rows that still promise an error rate <= ``epsilon``; None where none do.

    k = max {k : P(Binomial(n, epsilon) <= k) <= delta}: with probability 1 - delta over the rows, a rule chosen by
    "at most k errors" from a nested family errs on at most a share epsilon of what comes later. With (1 - epsilon)^n >
    delta even zero errors promise nothing.

    Source: Vovk, 2012, arXiv:1209.2673, proposition 2b.

    >>> allowed_errors(100, 0.1, 0.1), allowed_errors(22, 0.1, 0.1), allowed_errors(21, 0.1, 0.1)
    (5, 0, None)
    """
    _check_promise(epsilon, delta)
    if n < 1:
        raise InputError(f"need at least one row, got n={n}")
    k = int(stats.binom.ppf(delta, n, epsilon))  # the least k with P(X <= k) >= delta, so k or k - 1 is the answer
    while k >= 0 and stats.binom.cdf(k, n, epsilon) > delta:
        k -= 1
    return None if k < 0 else k


def needed_rows(epsilon: float, delta: float) -> int:
    """The least n for which zero errors promise an error rate <= ``epsilon`` with probability 1 - ``delta``.

    >>> needed_rows(0.1, 0.1)
    22
    """
    _check_promise(epsilon, delta)
    n = max(1, math.ceil(math.log(delta) / math.log1p(-epsilon)))
    return n if (1 - epsilon) ** n <= delta else n + 1


def _check_promise(epsilon: float, delta: float) -> None:
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie strictly between 0 and 1, got {value}")
