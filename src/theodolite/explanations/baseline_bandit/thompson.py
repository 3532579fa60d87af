"""Thompson sampling over arms whose reward depends on a context, by Bayesian logistic regression.

Source: Chapelle and Li, 2011, An Empirical Evaluation of Thompson Sampling (Algorithm 3: diagonal Gaussian posterior).
"""

__all__ = ["BetaBernoulli", "Policy", "ThompsonLogistic", "UniformChoice"]

import copy
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from theodolite.core.errors import InputError


class Policy(ABC):
    """What chooses among arms, the one whose sampled value is largest, and learns from rewards of +1 and -1."""

    def __init__(self, n_arms: int, seed: int | list[int]) -> None:
        if n_arms < 1:
            raise InputError(f"need at least one arm, got {n_arms}")
        self.n_arms = n_arms
        self.rng = np.random.default_rng(seed)

    def reseeded(self, seed: list[int]) -> "Policy":
        """A copy that learns on its own, with another stream of random numbers."""
        other = copy.deepcopy(self)
        other.rng = np.random.default_rng(seed)
        return other

    def choose(self, context: np.ndarray) -> int:
        """The arm whose sampled value is largest."""
        return int(self._values(context, 1, self.rng)[0].argmax())

    def probabilities(self, context: np.ndarray, samples: int = 1000) -> np.ndarray:
        """Share (n_arms,) of ``samples`` posterior samples in which each arm is chosen; the state is left as it is."""
        best = self._values(context, samples, copy.deepcopy(self.rng)).argmax(axis=1)
        return np.bincount(best, minlength=self.n_arms) / samples

    @abstractmethod
    def update(self, arm: int, context: np.ndarray, reward: float) -> None:
        """Take in the reward (+1 or -1) of ``arm`` in ``context``."""

    @abstractmethod
    def _values(self, context: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray: ...

    def _checked(self, arm: int, reward: float) -> None:
        if not 0 <= arm < self.n_arms:
            raise InputError(f"arm must be 0..{self.n_arms - 1}, got {arm}")
        if reward not in (-1, 1):
            raise InputError(f"a reward is +1 or -1, got {reward}")


class ThompsonLogistic(Policy):
    """One Bayesian logistic regression an arm, with independent Gaussians N(mean, 1 / precision) of the weights.

        choose: w_k ~ N(m_k, diag(1 / q_k)), argmax_k w_k . c
        update: w* = argmin 1/2 sum_i q_i (w_i - m_i)^2 + log(1 + exp(-r w . c));  m <- w*;  q_i <- q_i + c_i^2 p (1 - p)

    with r = +1 or -1 and p = 1 / (1 + exp(-w* . c)). The minimum lies on m + t c / q, so it is found as the root of one
    number. mean and precision are (n_arms, dim).

    >>> bandit = ThompsonLogistic(2, 1)
    >>> for _ in range(50):
    ...     bandit.update(0, np.ones(1), 1.0); bandit.update(1, np.ones(1), -1.0)
    >>> bandit.choose(np.ones(1))
    0
    """

    def __init__(self, n_arms: int, dim: int, prior_precision: float = 1.0, *, seed: int | list[int] = 0) -> None:
        super().__init__(n_arms, seed)
        if dim < 1 or not prior_precision > 0:
            raise InputError(f"need dim >= 1 and prior_precision > 0, got {dim} and {prior_precision}")
        self.mean = np.zeros((n_arms, dim))
        self.precision = np.full((n_arms, dim), float(prior_precision))

    def update(self, arm: int, context: np.ndarray, reward: float) -> None:
        """Take in the reward (+1 or -1) of ``arm`` in ``context`` (dim,)."""
        self._checked(arm, reward)
        c = self._context(context)
        m, q = self.mean[arm], self.precision[arm]
        before, reach = float(m @ c), float((c * c / q).sum())
        # with w = m + r t c / q the gradient is 0 where t = sigmoid(-r w . c), and t lies between 0 and 1
        t: Any = brentq(lambda t: t - expit(-(reward * before + t * reach)), 0.0, 1.0, xtol=1e-15)
        self.mean[arm] = m + reward * t * c / q
        p = float(expit(self.mean[arm] @ c))
        self.precision[arm] = q + c * c * p * (1 - p)

    def _values(self, context: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
        # w . c of independent Gaussians is one Gaussian
        c = self._context(context)
        deviation = np.sqrt((c * c / self.precision).sum(axis=1))
        return self.mean @ c + deviation * rng.standard_normal((samples, self.n_arms))

    def _context(self, context: np.ndarray) -> np.ndarray:
        c = np.asarray(context, dtype=np.float64)
        if c.shape != self.mean.shape[1:] or not np.isfinite(c).all():
            raise InputError(f"a context is {self.mean.shape[1]} finite numbers, got shape {c.shape}")
        return c


class BetaBernoulli(Policy):
    """Thompson sampling without context: a Beta(1 + successes, 1 + failures) an arm."""

    def __init__(self, n_arms: int, *, seed: int | list[int] = 0) -> None:
        super().__init__(n_arms, seed)
        self.counts = np.ones((n_arms, 2))

    def update(self, arm: int, context: np.ndarray, reward: float) -> None:
        """Take in the reward (+1 or -1) of ``arm``."""
        self._checked(arm, reward)
        self.counts[arm, 0 if reward > 0 else 1] += 1

    def _values(self, context: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
        return rng.beta(self.counts[:, 0], self.counts[:, 1], (samples, self.n_arms))


class UniformChoice(Policy):
    """The control: every arm as often as any other, whatever it brought."""

    def __init__(self, n_arms: int, *, seed: int | list[int] = 0) -> None:
        super().__init__(n_arms, seed)

    def update(self, arm: int, context: np.ndarray, reward: float) -> None:
        """Nothing is learned."""
        self._checked(arm, reward)

    def _values(self, context: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
        return rng.random((samples, self.n_arms))
