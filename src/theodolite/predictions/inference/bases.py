"""The two bases that run a program: exact enumeration of its measure, and drawing."""

__all__ = ["Base", "Enumeration", "Enumerator", "Representation", "Sampler", "enumerate_exact", "log_sum"]

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import InputError
from theodolite.predictions.inference.program import (
    Bind,
    Distribution,
    EnumerationError,
    Factor,
    Program,
    Ret,
    Stack,
    Untraced,
    head,
    not_a_program,
    resume,
)

_LARGEST = 5_000_000
_BLOCK = 1024
_SMALLEST = 2.0**-54


@no_type_check
def log_sum(logs: Sequence[float]) -> float:
    """Logarithm of the sum of exponentials, shifted by the largest; -inf of nothing."""
    largest = max(logs, default=-math.inf)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(one - largest) for one in logs))


@no_type_check
class Representation:
    """What inference is written in: `ret`, `bind`, `sample`, `factor`, and `of`, the meaning map that commutes with them.

    The elements of every representation over a base are programs, or pairs of programs, that a base runs. So an inference
    algorithm maps a program to a program, and both bases can run the result.
    """

    base: "Base"

    def ret(self, x: Any) -> Any:
        """The element of a value."""
        raise NotImplementedError

    def bind(self, m: Any, k: Callable[[Any], Any]) -> Any:
        """Element ``m``, then ``k`` of its value."""
        raise NotImplementedError

    def sample(self, dist: Distribution) -> Any:
        """The element of a draw."""
        raise NotImplementedError

    def factor(self, logw: float) -> Any:
        """The element of a weight."""
        raise NotImplementedError

    def lift(self, program: Program) -> Any:
        """The element that leaves a program to the base."""
        raise NotImplementedError

    def map(self, m: Any, f: Callable[[Any], Any]) -> Any:
        """Element ``m`` with ``f`` of its value."""
        return self.bind(m, lambda x: self.ret(f(x)))

    def of(self, program: Program) -> Any:
        """The element that a program means."""
        return self._of(program, None)

    def _of(self, program: Program, stack: Stack) -> Any:
        node, stack = head(program, stack)
        if isinstance(node, Ret):
            return self.ret(node.value)
        m = self.factor(node.logw) if isinstance(node, Factor) else self.sample(node)  # pyright: ignore[reportArgumentType]
        return m if stack is None else self.bind(m, lambda x: self._of(*resume(stack, x)))


@no_type_check
class Base(Representation):
    """The innermost representation: programs as they are."""

    def __init__(self) -> None:
        self.base = self

    def ret(self, x: Any) -> Program:
        """`Ret`."""
        return Ret(x)

    def bind(self, m: Program, k: Callable[[Any], Program]) -> Program:
        """`Bind`."""
        return Bind(m, k)

    def sample(self, dist: Distribution) -> Program:
        """The distribution itself."""
        return dist

    def factor(self, logw: float) -> Program:
        """`Factor`."""
        return Factor(logw)

    def lift(self, program: Program) -> Program:
        """The program itself."""
        return program

    def of(self, program: Program) -> Program:
        """The program itself."""
        return program


@no_type_check
class Sampler(Base):
    """Runs a program once by drawing; a factor is an error, since a draw has no weight.

    rng: a numpy Generator or an int. Uniforms are taken from it in blocks.
    """

    def __init__(self, rng: np.random.Generator | int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(rng)
        self._block: list[float] = []

    def uniforms(self, n: int) -> tuple[float, ...]:
        """n uniforms in (0, 1)."""
        if len(self._block) < n:
            self._block.extend(np.maximum(self.rng.random(max(n, _BLOCK)), _SMALLEST).tolist())
        if n == 1:
            return (self._block.pop(),)
        return tuple(self._block.pop() for _ in range(n))

    def run(self, program: Program) -> Any:
        """One value."""
        stack: Any = None
        node: Any = program
        block = self._block
        while True:
            kind = type(node)
            if kind is Bind:
                stack = (node.k, stack)
                node = node.first
                continue
            if kind is Ret:
                value = node.value
            elif kind is Untraced:
                node = node.program
                continue
            elif kind is Factor:
                raise InputError(
                    "factor under a bare Sampler: a draw has no weight to score; wrap it as Weighted(Sampler(rng)), or use "
                    "importance, smc or mcmc"
                )
            elif isinstance(node, Distribution):
                value = node.quantile(
                    (block.pop(),) if node.n_uniforms == 1 and block else self.uniforms(node.n_uniforms)
                )
            else:
                raise not_a_program(node)
            if stack is None:
                return value
            k, stack = stack
            node = k(value)


@dataclass(frozen=True, eq=False)
class Enumeration:
    """A finite measure: distinct values of positive weight, and their log weights, which need not sum to one."""

    values: list
    log_weights: Float[np.ndarray, " value"]

    @property
    def log_evidence(self) -> float:
        """Logarithm of the total mass."""
        return log_sum(self.log_weights.tolist())

    def weights(self) -> dict[Hashable, float]:
        """The unnormalised mass of each value; of lists and arrays in hashable form."""
        return {_key(value): math.exp(w) for value, w in zip(self.values, self.log_weights.tolist())}

    def probabilities(self) -> dict[Hashable, float]:
        """The normalised mass of each value."""
        return {_key(value): p for value, p in zip(self.values, self._normalized().tolist())}

    def expectation(self, f: Callable[[Any], float] = float) -> float:
        """Mean of ``f`` of the value under the normalised measure."""
        return math.fsum(p * float(f(value)) for value, p in zip(self.values, self._normalized().tolist()))

    def _normalized(self) -> np.ndarray:
        total = self.log_evidence
        if total == -math.inf:
            raise InputError(
                "the program has evidence zero, so it has no posterior; every outcome met a factor of zero"
            )
        return np.exp(self.log_weights - total)

    def difference(self, other: "Enumeration") -> float:
        """The largest absolute difference of the unnormalised masses of any value."""
        ours, theirs = self.weights(), other.weights()
        return max((abs(ours.get(v, 0.0) - theirs.get(v, 0.0)) for v in ours.keys() | theirs.keys()), default=0.0)


@no_type_check
def _key(value: Any) -> Hashable:
    """Equal for equal values, and hashable for lists, arrays and dictionaries too."""
    if isinstance(value, np.ndarray):
        return (value.shape, *value.ravel().tolist())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return frozenset((_key(k), _key(v)) for k, v in value.items())
    return value if isinstance(value, Hashable) else id(value)


@no_type_check
class Enumerator(Base):
    """Runs a program through all outcomes of all draws, and adds the masses of equal values.

    grid: where given, each uniform that a program's draws are made from is one of the midpoints (i + 1/2) / grid. Discrete
    draws whose probabilities are multiples of 1 / grid stay exact (others raise `GridMismatch`), continuous ones become sums.
    """

    def __init__(self, grid: int | None = None) -> None:
        super().__init__()
        if grid is not None and grid < 1:
            raise InputError(f"grid must be at least 1, got {grid}")
        self.grid = grid

    def run(self, program: Program) -> Enumeration:
        """The measure of a program."""
        masses: dict[Hashable, list[float]] = {}
        values: dict[Hashable, Any] = {}
        todo: list[tuple[Program, Stack, float]] = [(program, None, 0.0)]
        met = 0
        while todo:
            node, stack, logw = todo.pop()
            node, stack = head(node, stack)
            met += 1
            if met > _LARGEST:
                raise EnumerationError(
                    f"the program has more than {_LARGEST:,} draws and outcomes, or does not end; enumerate a smaller one"
                )
            if isinstance(node, Ret):
                key = _key(node.value)
                values.setdefault(key, node.value)
                masses.setdefault(key, []).append(logw)
            elif isinstance(node, Factor):
                if node.logw > -math.inf:
                    todo.append((*resume(stack, None), logw + node.logw))
            elif isinstance(node, Untraced):
                todo.append((node.program, stack, logw))
            else:
                found = self._outcomes(node)  # pyright: ignore[reportArgumentType]
                todo.extend((*resume(stack, value), logw + log) for value, log in reversed(found))
        return Enumeration(
            list(values.values()), np.array([log_sum(logs) for logs in masses.values()], dtype=np.float64)
        )

    def _outcomes(self, dist: Distribution) -> list[tuple[Any, float]]:
        if self.grid is not None:
            dist.check_grid(self.grid)
        found = dist.outcomes()
        if found is not None:
            return found
        site = getattr(dist, "site", None)
        what = f"{dist!r} at {site[0]}:{site[1]}" if site else repr(dist)
        if self.grid is None:
            raise EnumerationError(
                f"{what} has no finite list of outcomes; give enumerate_exact a grid, which puts midpoints of that many "
                "cells in the place of each uniform, or draw instead of enumerating"
            )
        if self.grid**dist.n_uniforms > _LARGEST:
            raise EnumerationError(f"{what} has more than {_LARGEST:,} outcomes on a grid of {self.grid}")
        cells = [(i + 0.5) / self.grid for i in range(self.grid)]
        log = -dist.n_uniforms * math.log(self.grid)
        return [(dist.quantile(u), log) for u in itertools.product(cells, repeat=dist.n_uniforms)]


def enumerate_exact(model: Program, grid: int | None = None) -> Enumeration:
    """The unnormalised measure of a program, exactly; with a ``grid`` as in `Enumerator`.

    Raises `EnumerationError` where a draw has no finite list of outcomes and no grid is given, or where the program does not end.

    >>> from theodolite.predictions.inference import sprinkler
    >>> found = enumerate_exact(sprinkler())
    >>> round(math.exp(found.log_evidence), 12), round(found.probabilities()[True], 12)
    (0.5026, 0.108635097493)
    """
    return Enumerator(grid).run(model)
