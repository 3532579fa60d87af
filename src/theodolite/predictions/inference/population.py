"""Weighted values and populations of them: resampling, and pushing evidence out."""

__all__ = ["RESAMPLERS", "Ancestors", "Coin", "Index", "Particle", "Population", "Weighted", "push"]

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import numpy as np

from theodolite.core.errors import InputError
from theodolite.predictions.inference.bases import Representation, log_sum
from theodolite.predictions.inference.distributions import bernoulli, categorical, uniform_discrete
from theodolite.predictions.inference.program import Distribution, Factor, Program, Ret, Stack, head, resume

RESAMPLERS = ("multinomial", "stratified", "systematic")
Particle = tuple[Any, float]
"""A value and its log weight."""


@no_type_check
class Weighted(Representation):
    """Over R: an element of R that gives (x, logw); factors multiply the weight and are not scored in R."""

    def __init__(self, inner: Representation) -> None:
        self.inner, self.base = inner, inner.base

    def ret(self, x: Any) -> Any:
        """Weight one."""
        return self.inner.ret((x, 0.0))

    def bind(self, m: Any, k: Callable[[Any], Any]) -> Any:
        """Weights multiply."""
        inner = self.inner
        return inner.bind(m, lambda xw: inner.map(k(xw[0]), lambda yv: (yv[0], xw[1] + yv[1])))

    def sample(self, dist: Distribution) -> Any:
        """Drawn in R."""
        return self.inner.map(self.inner.sample(dist), lambda x: (x, 0.0))

    def factor(self, logw: float) -> Any:
        """The weight itself."""
        return self.inner.ret((None, logw))

    def lift(self, program: Program) -> Any:
        """Left to the base, weight one."""
        return self.inner.map(self.inner.lift(program), lambda x: (x, 0.0))

    def of(self, program: Program) -> Any:
        """The same as by `bind`, with one step of R a draw."""
        return self._score(program, None, 0.0)

    def _score(self, program: Program, stack: Stack, logw: float) -> Any:
        while True:
            node, stack = head(program, stack)
            if isinstance(node, Factor):
                logw += node.logw
                program, stack = resume(stack, None)
            elif isinstance(node, Ret):
                return self.inner.ret((node.value, logw))
            else:
                m = self.inner.sample(node)  # pyright: ignore[reportArgumentType]
                return self.inner.bind(m, lambda x, stack=stack, logw=logw: self._score(*resume(stack, x), logw))

    def apply_weight(self, m: Any) -> Any:
        """Score the weight in R."""
        inner = self.inner
        return inner.bind(m, lambda xw: inner.map(inner.factor(xw[1]), lambda _: xw[0]))


@no_type_check
class _Pick(categorical):
    """A choice that an algorithm makes; it does not belong to the program, so a grid does not replace its uniform."""

    __slots__ = ()

    def check_grid(self, grid: int) -> None:
        """Any grid will do."""


@no_type_check
class Coin(bernoulli):
    """As `_Pick`, of two: whether a proposal is accepted."""

    __slots__ = ()

    def check_grid(self, grid: int) -> None:
        """Any grid will do."""


@no_type_check
class Index(uniform_discrete):
    """As `_Pick`, all alike: which uniform is moved."""

    __slots__ = ()

    def check_grid(self, grid: int) -> None:
        """Any grid will do."""


@no_type_check
class Ancestors(Distribution):
    """n indices of particles by their weights (n,), which sum to one; each scheme takes its own number of uniforms."""

    __slots__ = ("n_uniforms", "scheme", "weights")

    def __init__(self, scheme: str, weights: np.ndarray) -> None:
        if scheme not in RESAMPLERS:
            raise InputError(f"resampler must be one of {', '.join(RESAMPLERS)}, got {scheme!r}")
        self.scheme, self.weights = scheme, weights
        self.n_uniforms = 1 if scheme == "systematic" else len(weights)

    def quantile(self, u: tuple[float, ...]) -> list[int]:
        """`indices` as a list."""
        return self.indices(np.array(u)).tolist()

    def indices(self, u: np.ndarray) -> np.ndarray:
        """Of uniforms; the sum that rounding may leave below 1 is not looked at, so no index is out of range."""
        n = len(self.weights)
        at = u if self.scheme == "multinomial" else (np.arange(n) + u) / n
        last = int(np.flatnonzero(self.weights)[-1])
        return np.searchsorted(np.cumsum(self.weights)[:last], at, side="right")

    def outcomes(self) -> list[tuple[Any, float]]:
        """Exactly: choices of one uniform are independent, and those of a systematic one change at finitely many places."""
        n, ends = len(self.weights), np.cumsum(self.weights).clip(max=1.0)
        if self.scheme == "systematic":
            cuts = np.unique(np.concatenate([[0.0, 1.0], (ends * n) % 1.0]))
            middle = (cuts[1:] + cuts[:-1]) / 2
            cells = [(self.quantile((float(u),)), float(np.log(w))) for u, w in zip(middle, np.diff(cuts))]
            return [(found, log) for found, log in cells if log > -math.inf]
        if self.scheme == "multinomial":
            shares = [self.weights] * n
        else:
            starts = np.r_[0.0, ends[:-1]]
            ends = np.r_[ends[:-1], 1.0]
            shares = [n * (np.minimum(ends, (i + 1) / n) - np.maximum(starts, i / n)).clip(min=0.0) for i in range(n)]
        options = [[(j, math.log(p)) for j, p in enumerate(share.tolist()) if p > 0] for share in shares]
        return [([j for j, _ in picked], sum(log for _, log in picked)) for picked in itertools.product(*options)]


@no_type_check
def _weights(particles: Sequence[Particle]) -> tuple[np.ndarray, float]:
    """Normalised weights and the logarithm of their sum; zeros where the sum is zero."""
    logs = np.array([w for _, w in particles])
    largest = float(logs.max())
    if largest == -math.inf:
        return np.zeros(len(logs)), largest
    weights = np.exp(logs - largest)
    total = float(weights.sum())
    return weights / total, largest + math.log(total)


@no_type_check
def push(particles: Sequence[Particle]) -> tuple[list[Particle], float]:
    """Particles with weights that sum to one, and the log of the sum they had; 1/n each where it was zero."""
    total = log_sum([w for _, w in particles])
    if total == -math.inf:
        return [(x, -math.log(len(particles))) for x, _ in particles], total
    return [(x, w - total) for x, w in particles], total


@no_type_check
class Population(Representation):
    """Over R: an element of R that gives a list of particles (x, logw); their weights, added, are the measure.

    It is a monad only up to distribution: effects of different particles may come in another order.
    """

    def __init__(self, inner: Representation) -> None:
        self.inner, self.base = inner, inner.base
        self._weighted = Weighted(inner)

    def ret(self, x: Any) -> Any:
        """One particle."""
        return self.inner.ret([(x, 0.0)])

    def bind(self, m: Any, k: Callable[[Any], Any]) -> Any:
        """Each particle goes on by itself, one after the other in R."""
        inner = self.inner

        def go(particles: list[Particle], i: int, found: Any) -> Any:
            if i == len(particles):
                parts = []
                while found is not None:
                    part, found = found
                    parts.append(part)
                return inner.ret([one for part in reversed(parts) for one in part])
            x, w = particles[i]

            def later(new: list[Particle]) -> Any:
                return go(particles, i + 1, ([(y, w + v) for y, v in new], found))

            return inner.bind(k(x), later)

        return inner.bind(m, lambda particles: go(particles, 0, None))

    def sample(self, dist: Distribution) -> Any:
        """One particle, drawn in R."""
        return self.inner.map(self.inner.sample(dist), lambda x: [(x, 0.0)])

    def factor(self, logw: float) -> Any:
        """One particle with the weight."""
        return self.inner.ret([(None, logw)])

    def lift(self, program: Program) -> Any:
        """One particle, left to the base."""
        return self.inner.map(self.inner.lift(program), lambda x: [(x, 0.0)])

    def of(self, program: Program) -> Any:
        """One particle with the program's weight."""
        return self.inner.map(self._weighted.of(program), lambda xw: [xw])

    def spawn(self, n: int) -> Any:
        """n particles of weight 1/n."""
        if n < 1:
            raise InputError(f"the number of particles must be at least 1, got {n}")
        return self.inner.ret([(None, -math.log(n))] * n)

    def resample(
        self,
        m: Any,
        scheme: str = "multinomial",
        *,
        ess_threshold: float = 1.0,
        on_ancestors: Callable[[list[int]], None] | None = None,
    ) -> Any:
        """n ancestors by weight, each offspring with the mean weight; nothing changes where all weights are zero.

        ess_threshold: only where the effective sample size 1 / sum w^2 is at most this share of n (1: always).
        """
        inner = self.inner

        def drawn(particles: list[Particle], indices: list[int], each: float) -> Any:
            if on_ancestors is not None:
                on_ancestors(indices)
            return [(particles[i][0], each) for i in indices]

        def decide(particles: list[Particle]) -> Any:
            weights, total = _weights(particles)
            n = len(particles)
            if total == -math.inf or (ess_threshold < 1 and 1 / (weights @ weights) > ess_threshold * n):
                if on_ancestors is not None:
                    on_ancestors(list(range(n)))
                return inner.ret(particles)
            ancestors = inner.sample(Ancestors(scheme, weights))
            return inner.map(ancestors, lambda indices: drawn(particles, indices, total - math.log(n)))

        return inner.bind(m, decide)

    def push_evidence(self, m: Any) -> Any:
        """Weights that sum to one; their sum is scored in R."""
        inner = self.inner

        def score(particles: list[Particle]) -> Any:
            pushed, total = push(particles)
            return inner.map(inner.factor(total), lambda _: pushed)

        return inner.bind(m, score)

    def proper(self, m: Any) -> Any:
        """An element of Weighted(R): one particle, picked by weight, with the sum of the weights."""
        inner = self.inner

        def pick(particles: list[Particle]) -> Any:
            weights, total = _weights(particles)
            if total == -math.inf:
                return inner.ret((particles[0][0], total))
            return inner.map(inner.sample(_Pick(weights.tolist())), lambda i: (particles[i][0], total))

        return inner.bind(m, pick)

    def collapse(self, m: Any) -> Any:
        """An element of R: one particle, picked by weight; the sum of the weights is scored in R."""
        return self._weighted.apply_weight(self.proper(m))
