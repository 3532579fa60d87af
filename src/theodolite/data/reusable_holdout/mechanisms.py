"""Other ways to answer many questions from one sample: from the plain mean to private multiplicative weights."""

__all__ = [
    "Empirical",
    "GaussianNoise",
    "Ladder",
    "PrivateMultiplicativeWeights",
    "SampleSplitting",
    "SparseValidate",
]

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from theodolite.core.errors import BudgetExhausted, DataError, InputError
from theodolite.data.reusable_holdout.answers import Answer, Query, QueryRangeError, check_sample, query_mean
from theodolite.data.reusable_holdout.bounds import default_noise

_CONFIDENCE = 0.95


def _sampling_error(n: int, confidence: float = _CONFIDENCE) -> float:
    """Hoeffding's bound for one query that does not depend on the sample."""
    return math.sqrt(math.log(2 / (1 - confidence)) / (2 * n))


class _Logged:
    """Numbers the answers and remembers them."""

    def __init__(self) -> None:
        self._log: list[tuple[int, str, float, str, float, int | None]] = []

    def _give(self, value: float, source: Any, bound: float, left: int | None, name: str) -> Answer:
        answer = Answer(value, source, bound, left, len(self._log))
        self._log.append((answer.index, name, value, source, bound, left))
        return answer

    @property
    def log(self) -> pd.DataFrame:
        """What was asked, and answered."""
        return pd.DataFrame(self._log, columns=["index", "name", "value", "source", "error_bound", "budget_left"])


class Empirical(_Logged):
    """The plain mean over one sample: fooled by adaptive questions after about n tau^2 of them."""

    def __init__(self, X: Any, y: Any) -> None:
        super().__init__()
        self._sample = check_sample(X, y, "given")

    def ask(self, query: Query | np.ndarray, *, name: str = "") -> Answer:
        """The sample's own mean. error_bound holds for a query that was fixed before the sample was seen."""
        n = len(self._sample[0])
        return self._give(query_mean(query, *self._sample, n), "holdout", _sampling_error(n), None, name)


class SampleSplitting(_Logged):
    """Fresh rows for every question: safe, and wasteful. The sample is cut into ``max_queries`` equal parts."""

    def __init__(self, X: Any, y: Any, *, max_queries: int, seed: int = 0) -> None:
        super().__init__()
        self._sample = check_sample(X, y, "given")
        n = len(self._sample[0])
        if not 1 <= max_queries <= n:
            raise InputError(f"max_queries must lie in 1..{n} (the number of rows), got {max_queries}")
        self._parts = np.array_split(np.random.default_rng(seed).permutation(n), max_queries)

    def ask(self, query: Query | np.ndarray, *, name: str = "") -> Answer:
        """Mean over rows that no earlier question has seen; BudgetExhausted when none are left."""
        used = len(self._log)
        if used >= len(self._parts):
            raise BudgetExhausted(f"all {used} parts of the sample are used; no answer was made")
        rows = self._parts[used]
        x, y = (getattr(part, "iloc", part)[rows] for part in self._sample)
        value = query_mean(query if callable(query) else np.asarray(query)[rows], x, y, len(rows))
        return self._give(value, "holdout", _sampling_error(len(rows)), len(self._parts) - used - 1, name)


class GaussianNoise(_Logged):
    """The sample's mean with Gaussian noise. sigma None: `default_noise` for ``max_queries``, a rule of thumb."""

    def __init__(self, X: Any, y: Any, *, sigma: float | None = None, max_queries: int = 1000, seed: int = 0) -> None:
        super().__init__()
        self._sample = check_sample(X, y, "given")
        self.sigma = default_noise(max_queries, len(self._sample[0])) if sigma is None else sigma
        if not self.sigma >= 0:
            raise InputError(f"sigma must not be negative, got {sigma}")
        self._rng = np.random.default_rng(seed)

    def ask(self, query: Query | np.ndarray, *, name: str = "") -> Answer:
        """Mean plus noise; large noise takes the bias away and the answer's use with it, so look at both."""
        n = len(self._sample[0])
        value = query_mean(query, *self._sample, n) + float(self._rng.normal(0.0, self.sigma))
        return self._give(value, "noise", _sampling_error(n) + 1.96 * self.sigma, None, name)


class PrivateMultiplicativeWeights(_Logged):
    """Answers exponentially many questions about a finite universe X from n rows.

    A hypothesis w over X starts uniform. Per query: a = S[q] + Lap(s), d = a - w[q]. If |d| <= T the answer is w[q], for
    free; otherwise w(x) is multiplied by exp(-eta r(x)) with r = q where d < 0 and 1 - q else, the answer is a, and one of
    at most 8 log|X| / T^2 updates is spent. Defaults eta = T / 2, s = T / (4 log(4 m)).

    universe: the |X| points, or how many; sample_index: (n,) the point of X that each row is.
    Source: Hardt and Rothblum, 2010; Dwork et al., 2014, arXiv:1411.2664.
    """

    def __init__(
        self,
        universe: "int | Sequence[Any] | np.ndarray",
        sample_index: np.ndarray,
        *,
        threshold: float = 0.12,
        max_queries: int = 1000,
        eta: float | None = None,
        scale: float | None = None,
        budget: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._points = np.arange(universe) if isinstance(universe, (int, np.integer)) else np.asarray(universe)
        size, index = len(self._points), np.asarray(sample_index)
        if size < 2 or index.size == 0:
            raise DataError(
                f"need a universe of at least 2 points and a sample, got {size} points and {index.size} rows"
            )
        if index.ndim != 1 or index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= size:
            raise DataError(f"sample_index must hold integers 0..{size - 1}, one a row")
        if not 0 < threshold < 1 or max_queries < 1:
            raise InputError(f"need a threshold in (0, 1) and max_queries >= 1, got {threshold} and {max_queries}")
        self._empirical = np.bincount(index, minlength=size) / index.size
        self._rows = index.size
        self._log_weights = np.zeros(size)
        self.threshold = threshold
        self.eta = threshold / 2 if eta is None else eta
        self.scale = threshold / (4 * math.log(4 * max_queries)) if scale is None else scale
        self.remaining = math.floor(8 * math.log(size) / threshold**2) if budget is None else budget
        self.updates = 0
        self._rng = np.random.default_rng(seed)

    @property
    def hypothesis(self) -> np.ndarray:
        """The weights of the points, (|X|,), summing to 1."""
        weights = np.exp(self._log_weights - self._log_weights.max())
        return weights / weights.sum()

    def ask(self, query: "Query | np.ndarray", *, name: str = "") -> Answer:
        """Answer a query given by its (|X|,) values in [0, 1] on the points, or as a function of (points, None)."""
        values = np.asarray(query(self._points, None) if callable(query) else query, dtype=np.float64)
        if values.shape != self._points.shape[:1]:
            raise QueryRangeError(
                f"a query gives one value for each of the {len(self._points)} points, got {values.shape}"
            )
        query_mean(values, None, None, len(values))
        guess = float(self.hypothesis @ values)
        noisy = float(self._empirical @ values) + float(self._rng.laplace(0.0, self.scale))
        difference = noisy - guess
        bound = self.threshold + self.scale * math.log(2 / (1 - _CONFIDENCE)) + _sampling_error(self._rows)
        if abs(difference) <= self.threshold:
            return self._give(guess, "hypothesis", bound, self.remaining, name)
        if self.remaining < 1:
            raise BudgetExhausted(f"all updates are spent after {self.updates}; no answer was made")
        self.remaining -= 1
        self.updates += 1
        self._log_weights -= self.eta * (values if difference < 0 else 1 - values)
        return self._give(min(1.0, max(0.0, noisy)), "noise", bound, self.remaining, name)


class SparseValidate(_Logged):
    """Says only whether a claimed mean holds on the holdout; the budget counts the claims that fail.

    A claim holds where |S_h[q] - claim| <= tolerance + Lap(4 sigma) + gamma, gamma ~ Lap(2 sigma) drawn anew after a
    failure. An answer of 1.0 means that it holds.
    """

    def __init__(
        self, X: Any, y: Any, *, tolerance: float, budget: int, sigma: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self._sample = check_sample(X, y, "holdout")
        if not 0 < tolerance < 1 or budget < 1:
            raise InputError(f"need a tolerance in (0, 1) and a budget of at least 1, got {tolerance} and {budget}")
        self.tolerance, self.remaining = tolerance, budget
        self.sigma = tolerance / 32 if sigma is None else sigma
        if not self.sigma >= 0:
            raise InputError(f"sigma must not be negative, got {sigma}")
        self._rng = np.random.default_rng(seed)
        self._gamma = float(self._rng.laplace(0.0, 2 * self.sigma))

    def ask(self, query: Query | np.ndarray, *, claim: float, name: str = "") -> Answer:
        """1.0 where the claimed mean holds, 0.0 where it does not."""
        if not 0 <= claim <= 1:
            raise InputError(f"a claimed mean lies in [0, 1], got {claim}")
        if self.remaining < 1:
            raise BudgetExhausted("the budget of failed claims is spent; no answer was made")
        n = len(self._sample[0])
        off = abs(query_mean(query, *self._sample, n) - claim)
        holds = off <= self.tolerance + self._gamma + float(self._rng.laplace(0.0, 4 * self.sigma))
        if not holds:
            self.remaining -= 1
            self._gamma = float(self._rng.laplace(0.0, 2 * self.sigma))
        return self._give(float(holds), "holdout", _sampling_error(n), self.remaining, name)


class Ladder(_Logged):
    """A leaderboard that answers with the best score so far, moved only by an improvement of at least ``step``.

    Answers are rounded to multiples of the step. Source: Blum and Hardt, 2015, arXiv:1502.04585.
    """

    def __init__(self, X: Any, y: Any, *, step: float) -> None:
        super().__init__()
        self._sample = check_sample(X, y, "holdout")
        if not 0 < step < 1:
            raise InputError(f"step must lie in (0, 1), got {step}")
        self.step = step
        self.best = 0.0

    def ask(self, query: Query | np.ndarray, *, name: str = "") -> Answer:
        """The best score so far, after this one."""
        n = len(self._sample[0])
        score = query_mean(query, *self._sample, n)
        if score >= self.best + self.step:
            self.best = round(score / self.step) * self.step
        return self._give(self.best, "holdout", _sampling_error(n) + self.step, None, name)
