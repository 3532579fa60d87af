"""Distributions that are drawn by the inverse of their distribution function, from a fixed number of uniforms."""

__all__ = [
    "bernoulli",
    "beta",
    "categorical",
    "dirichlet",
    "gamma",
    "geometric",
    "mv_normal",
    "normal",
    "poisson",
    "uniform",
    "uniform_discrete",
]

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral
from statistics import NormalDist
from typing import Any, no_type_check

import numpy as np
from scipy.special import betaincinv, betaln, gammaincinv, gammaln, ndtri, pdtr, pdtrik

from theodolite.core.errors import InputError
from theodolite.predictions.inference.program import Distribution, GridMismatch

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_standard_normal = NormalDist().inv_cdf
_SUM = 1e-9


@no_type_check
def _log(p: float) -> float:
    return math.log(p) if p > 0 else -math.inf


@no_type_check
def _probability(name: str, p: Any) -> float:
    value = float(p)
    if not 0 <= value <= 1:
        raise InputError(f"{name}: a probability must be in [0, 1], got {p}")
    return value


@no_type_check
def _positive(name: str, what: str, x: Any) -> float:
    value = float(x)
    if not 0 < value < math.inf:
        raise InputError(f"{name}: {what} must be positive and finite, got {x}")
    return value


@no_type_check
def _finite(name: str, what: str, x: Any) -> float:
    value = float(x)
    if not math.isfinite(value):
        raise InputError(f"{name}: {what} must be finite, got {x}")
    return value


@no_type_check
def _call_site() -> tuple[str, int]:
    """File and line that made the distribution; a run-time type checker's wrappers between are passed over."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "jaxtyping" not in file and not file.startswith("<@beartype"):
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@no_type_check
class bernoulli(Distribution):
    """True with probability ``p``, otherwise False."""

    __slots__ = ("p",)

    def __init__(self, p: float) -> None:
        self.p = _probability("bernoulli", p)

    def __repr__(self) -> str:
        return f"bernoulli({self.p})"

    def quantile(self, u: tuple[float, ...]) -> bool:
        """True below p."""
        return u[0] < self.p

    def outcomes(self) -> list[tuple[Any, float]]:
        """True and False, where they have a probability."""
        return [(value, math.log(p)) for value, p in ((True, self.p), (False, 1 - self.p)) if p > 0]

    def check_grid(self, grid: int) -> None:
        """p must be a multiple of 1 / grid."""
        _on_grid((self.p,), grid)

    def log_prob(self, x: Any) -> float:
        """Of x true or false."""
        return _log(self.p if x else 1 - self.p)


@no_type_check
def _on_grid(probabilities: Sequence[float], grid: int) -> None:
    for p in probabilities:
        if abs(p * grid - round(p * grid)) > _SUM * grid:
            raise GridMismatch(p, grid)


@no_type_check
class categorical(Distribution):
    """The index 0, 1, ... of one of ``probabilities``, which sum to 1."""

    __slots__ = ("_below", "probabilities")

    def __init__(self, probabilities: Any) -> None:
        p = tuple(map(float, probabilities))
        if not p or not min(p) >= 0 or not abs(sum(p) - 1) <= _SUM:  # not so of NaN either
            raise InputError(f"categorical: probabilities must be at least 0 and sum to 1, got {p}, sum {sum(p)}")
        self.probabilities = p
        last = max(i for i, one in enumerate(p) if one > 0)
        self._below = list(accumulate(p))[:last]  # without the last sum, which rounding may leave below 1

    def __repr__(self) -> str:
        return f"categorical({list(self.probabilities)})"

    def quantile(self, u: tuple[float, ...]) -> int:
        """How many of the running sums are at most u."""
        return bisect_right(self._below, u[0])

    def outcomes(self) -> list[tuple[Any, float]]:
        """The indices of positive probability."""
        return [(i, math.log(p)) for i, p in enumerate(self.probabilities) if p > 0]

    def check_grid(self, grid: int) -> None:
        """Every probability must be a multiple of 1 / grid."""
        _on_grid(self.probabilities, grid)

    def log_prob(self, x: Any) -> float:
        """Of index x; -inf for any other number."""
        return _log(self.probabilities[x]) if x in range(len(self.probabilities)) else -math.inf


@no_type_check
class uniform_discrete(Distribution):
    """One of ``values``, all alike; a number n stands for 0, ..., n - 1."""

    __slots__ = ("values",)

    def __init__(self, values: Any) -> None:
        self.values: Any = range(int(values)) if isinstance(values, Integral) else values
        if not hasattr(self.values, "__getitem__"):
            raise InputError(f"uniform_discrete: takes a number n or a list of values, got {values!r}")
        if len(self.values) == 0:
            raise InputError(f"uniform_discrete: needs at least one value, got {values!r}")

    def __repr__(self) -> str:
        return f"uniform_discrete({self.values!r})"

    def quantile(self, u: tuple[float, ...]) -> Any:
        """The value in whose cell u lies."""
        return self.values[min(int(u[0] * len(self.values)), len(self.values) - 1)]

    def outcomes(self) -> list[tuple[Any, float]]:
        """All values."""
        return [(value, -math.log(len(self.values))) for value in self.values]

    def check_grid(self, grid: int) -> None:
        """1 / n must be a multiple of 1 / grid."""
        _on_grid((1 / len(self.values),), grid)

    def log_prob(self, x: Any) -> float:
        """Of value x."""
        return _log(sum(value == x for value in self.values) / len(self.values))


@no_type_check
class uniform(Distribution):
    """Uniform between ``low`` and ``high``."""

    __slots__ = ("high", "low")

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        self.low, self.high = _finite("uniform", "low", low), _finite("uniform", "high", high)
        if not self.low < self.high:
            raise InputError(f"uniform: low must be below high, got {low} and {high}")
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"uniform({self.low}, {self.high})"

    def quantile(self, u: tuple[float, ...]) -> float:
        """low + (high - low) u."""
        return self.low + (self.high - self.low) * u[0]

    def log_prob(self, x: Any) -> float:
        """Log density at x."""
        return -math.log(self.high - self.low) if self.low <= x <= self.high else -math.inf


@no_type_check
class normal(Distribution):
    """Normal with ``mean`` and standard deviation ``sd``."""

    __slots__ = ("mean", "sd")

    def __init__(self, mean: float, sd: float) -> None:
        self.mean, self.sd = _finite("normal", "mean", mean), _positive("normal", "sd", sd)
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"normal({self.mean}, {self.sd})"

    def quantile(self, u: tuple[float, ...]) -> float:
        """mean + sd z, z the standard normal's quantile."""
        return self.mean + self.sd * _standard_normal(u[0])

    def log_prob(self, x: Any) -> float:
        """Log density at x."""
        z = (x - self.mean) / self.sd
        return -0.5 * z * z - math.log(self.sd) - _HALF_LOG_2PI


@no_type_check
class gamma(Distribution):
    """Gamma with ``shape`` and ``scale``: mean shape x scale."""

    __slots__ = ("scale", "shape")

    def __init__(self, shape: float, scale: float) -> None:
        self.shape, self.scale = _positive("gamma", "shape", shape), _positive("gamma", "scale", scale)
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"gamma({self.shape}, {self.scale})"

    def quantile(self, u: tuple[float, ...]) -> float:
        """By the inverse of the incomplete gamma function."""
        return self.scale * float(gammaincinv(self.shape, u[0]))

    def log_prob(self, x: Any) -> float:
        """Log density at x."""
        if not x > 0:
            return -math.inf
        z = x / self.scale
        return (self.shape - 1) * math.log(z) - z - math.lgamma(self.shape) - math.log(self.scale)


@no_type_check
class beta(Distribution):
    """Beta with parameters ``a`` and ``b``: mean a / (a + b)."""

    __slots__ = ("a", "b")

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b = _positive("beta", "a", a), _positive("beta", "b", b)
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"beta({self.a}, {self.b})"

    def quantile(self, u: tuple[float, ...]) -> float:
        """By the inverse of the incomplete beta function."""
        return float(betaincinv(self.a, self.b, u[0]))

    def log_prob(self, x: Any) -> float:
        """Log density at x in (0, 1)."""
        if not 0 < x < 1:
            return -math.inf
        return (self.a - 1) * math.log(x) + (self.b - 1) * math.log1p(-x) - float(betaln(self.a, self.b))


@no_type_check
class poisson(Distribution):
    """Poisson with mean ``rate``."""

    __slots__ = ("rate",)

    def __init__(self, rate: float) -> None:
        self.rate = _positive("poisson", "rate", rate)
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"poisson({self.rate})"

    def quantile(self, u: tuple[float, ...]) -> int:
        """The least k whose distribution function reaches u."""
        k = math.ceil(float(pdtrik(u[0], self.rate)))
        return k - 1 if k > 0 and float(pdtr(k - 1, self.rate)) >= u[0] else k

    def log_prob(self, x: Any) -> float:
        """Of count x."""
        if x < 0 or x != int(x):
            return -math.inf
        return x * math.log(self.rate) - self.rate - math.lgamma(x + 1)


@no_type_check
class geometric(Distribution):
    """Failures before the first success, 0, 1, ..., of trials that succeed with probability ``p``."""

    __slots__ = ("p",)

    def __init__(self, p: float) -> None:
        self.p = _positive("geometric", "p", _probability("geometric", p))
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"geometric({self.p})"

    def quantile(self, u: tuple[float, ...]) -> int:
        """The least k with 1 - (1 - p)^(k + 1) >= u."""
        if self.p == 1:
            return 0
        return max(0, math.ceil(math.log1p(-u[0]) / math.log1p(-self.p)) - 1)

    def log_prob(self, x: Any) -> float:
        """Of count x."""
        if x < 0 or x != int(x):
            return -math.inf
        return _log(self.p) + (x * math.log1p(-self.p) if self.p < 1 else (0.0 if x == 0 else -math.inf))


@no_type_check
class dirichlet(Distribution):
    """Probabilities (k,) with parameters ``alphas`` (k,), drawn by breaking a stick with k - 1 beta variables."""

    __slots__ = ("alphas", "n_uniforms")

    def __init__(self, alphas: Any) -> None:
        self.alphas = tuple(_positive("dirichlet", "every alpha", a) for a in alphas)
        if not self.alphas:
            raise InputError("dirichlet: needs at least one alpha, got none")
        self.n_uniforms = len(self.alphas) - 1
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"dirichlet({list(self.alphas)})"

    def quantile(self, u: tuple[float, ...]) -> np.ndarray:
        """Each part is a beta share of what is left."""
        left, rest, parts = 1.0, sum(self.alphas), []
        for a, one in zip(self.alphas, u):
            rest -= a
            share = float(betaincinv(a, rest, one))
            parts.append(left * share)
            left *= 1 - share
        return np.array([*parts, left])

    def log_prob(self, x: Any) -> float:
        """Log density at x (k,), which sums to 1."""
        p, a = np.asarray(x, dtype=np.float64), np.array(self.alphas)
        if p.shape != a.shape or (p <= 0).any() or abs(p.sum() - 1) > _SUM:
            return -math.inf
        return float(((a - 1) * np.log(p)).sum() + gammaln(a.sum()) - gammaln(a).sum())


@no_type_check
class mv_normal(Distribution):
    """Normal vectors with ``mean`` (k,) and covariance ``cov`` (k, k), which must be symmetric and positive definite."""

    __slots__ = ("_root", "mean", "n_uniforms")

    def __init__(self, mean: Any, cov: Any) -> None:
        self.mean, covariance = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
        k = self.mean.size
        if self.mean.shape != (k,) or covariance.shape != (k, k):
            raise InputError(f"mv_normal: needs mean (k,) and cov (k, k), got {self.mean.shape} and {covariance.shape}")
        if not np.isfinite(self.mean).all() or not np.allclose(covariance, covariance.T):
            raise InputError(f"mv_normal: mean must be finite and cov symmetric, got {mean} and {cov}")
        try:
            self._root = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError as error:
            raise InputError(f"mv_normal: cov must be positive definite, got {cov}") from error
        self.n_uniforms = k
        self.site = _call_site()

    def __repr__(self) -> str:
        return f"mv_normal({self.mean.tolist()}, cov {self.n_uniforms} x {self.n_uniforms})"

    def quantile(self, u: tuple[float, ...]) -> np.ndarray:
        """mean + L z, with cov = L L' and z standard normal quantiles."""
        return self.mean + self._root @ ndtri(np.array(u))

    def log_prob(self, x: Any) -> float:
        """Log density at x (k,)."""
        z = np.linalg.solve(self._root, np.asarray(x, dtype=np.float64) - self.mean)
        return float(-0.5 * z @ z - np.log(np.diag(self._root)).sum() - self.n_uniforms * _HALF_LOG_2PI)
