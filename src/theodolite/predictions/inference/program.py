"""Programs: immutable trees of draws and weights that mean an unnormalised measure, run by a loop and never by recursion.

What runs once a draw is marked no_type_check: a run-time check of its annotations would cost many times what it does.
"""

__all__ = [
    "Bind",
    "DegeneratePopulation",
    "Distribution",
    "EnumerationError",
    "Factor",
    "GridMismatch",
    "InferenceWarning",
    "NoValidStart",
    "Program",
    "Ret",
    "Stack",
    "Untraced",
    "condition",
    "factor",
    "head",
    "program",
    "resume",
    "ret",
    "sample",
    "scan",
    "untraced",
]

import functools
import inspect
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, no_type_check

from theodolite.core.errors import InputError, TheodoliteError

Stack = tuple[Callable[[Any], "Program"], Any] | None
"""What is still to be done with a value: a linked list, so that two runs can share it."""


class EnumerationError(TheodoliteError):
    """A program cannot be enumerated: a draw has no finite list of outcomes, or there are too many of them."""


class GridMismatch(InputError):
    """A probability is not a multiple of 1 / grid, so that a grid of uniforms cannot stand for it exactly."""

    def __init__(self, p: float, grid: int) -> None:
        super().__init__(
            f"the probability {p} is not a multiple of 1/{grid}, so {grid} cells cannot stand for it; choose a grid of which "
            "every probability of the program is a multiple"
        )
        self.p, self.grid = p, grid


class DegeneratePopulation(TheodoliteError):
    """All particles have weight zero after ``step`` factors."""

    def __init__(self, step: int) -> None:
        where = f"after factor {step}" if step else "at the end of the program"
        super().__init__(
            f"all particles have weight zero {where}: the program as it is does not reach the data. Check the factor there, "
            "use more particles, or replace a hard condition by a soft one"
        )
        self.step = step


class NoValidStart(TheodoliteError):
    """No run of the program had a positive weight, so a chain has nowhere to start."""


class InferenceWarning(UserWarning):
    """An inference ran to its end, but its numbers are worth little."""


@no_type_check
class Program:
    """A value that may depend on draws and is weighted by factors; made by `ret`, `sample`, `factor` and `bind`."""

    __slots__ = ()

    def bind(self, k: Callable[[Any], "Program"]) -> "Program":
        """This program, then ``k`` of its value. k must be pure: it may be called again with another value."""
        return Bind(self, k)

    def map(self, f: Callable[[Any], Any]) -> "Program":
        """This program with ``f`` of its value."""
        return Bind(self, lambda x: Ret(f(x)))


@no_type_check
class Ret(Program):
    """The point mass at a value."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@no_type_check
class Factor(Program):
    """The weight exp(logw) on the value None."""

    __slots__ = ("logw",)

    def __init__(self, logw: float) -> None:
        self.logw = logw


@no_type_check
class Bind(Program):
    """A program and what is done with its value."""

    __slots__ = ("first", "k")

    def __init__(self, first: Program, k: Callable[[Any], Program]) -> None:
        self.first, self.k = first, k


@no_type_check
class Distribution(Program):
    """A draw. It is made by the inverse of the distribution function from a fixed number of uniforms in (0, 1)."""

    __slots__ = ("site",)
    n_uniforms = 1

    def quantile(self, u: tuple[float, ...]) -> Any:
        """The value that ``n_uniforms`` uniforms stand for."""
        raise NotImplementedError

    def outcomes(self) -> list[tuple[Any, float]] | None:
        """All values of positive probability with its logarithm; None where there is no finite list of them."""
        return None

    def check_grid(self, grid: int) -> None:
        """Raise `GridMismatch` where ``grid`` cells do not stand for the probabilities exactly."""

    def log_prob(self, x: Any) -> float:
        """Logarithm of the probability or density at ``x``; for `factor`, where a value was observed."""
        raise NotImplementedError


@no_type_check
class Untraced(Distribution):
    """A draw that is made by a program without factors; a trace does not record what it draws."""

    __slots__ = ("program",)
    n_uniforms = 0

    def __init__(self, program: Program) -> None:
        self.program = program


@no_type_check
def untraced(program: Program) -> Program:
    """The same measure; a Markov chain over traces draws it anew in every proposal and never moves its draws one by one.

    program: without factors. This is how an estimate of a likelihood by an inner SMC enters a chain over parameters.
    """
    return Untraced(program)


@no_type_check
def ret(x: Any) -> Program:
    """The program that gives ``x``.

    >>> from theodolite.predictions.inference import enumerate_exact
    >>> enumerate_exact(ret(3)).probabilities()
    {3: 1.0}
    """
    return Ret(x)


@no_type_check
def sample(dist: Distribution) -> Program:
    """A draw from ``dist``; a distribution is such a program already, so this only checks it."""
    if not isinstance(dist, Distribution):
        raise InputError(f"sample takes a distribution such as bernoulli(0.5), got {dist!r}")
    return dist


@no_type_check
def factor(logw: float) -> Program:
    """Weight by exp(logw), in nats; -inf is a weight of zero. NaN and +inf are refused here, not at the end."""
    value = float(logw)
    if math.isnan(value) or value == math.inf:
        raise InputError(f"factor takes a log weight below +inf, got {logw}")
    return Factor(value)


@no_type_check
def condition(flag: bool) -> Program:
    """Weight one where ``flag`` is true, otherwise zero."""
    return Factor(0.0 if flag else -math.inf)


@no_type_check
def head(program: Program, stack: Stack) -> tuple[Program, Stack]:
    """Run up to the next draw or factor, or to the end: a `Ret` with an empty stack."""
    while True:
        kind = type(program)
        if kind is Bind:
            stack = (program.k, stack)  # pyright: ignore[reportAttributeAccessIssue]
            program = program.first  # pyright: ignore[reportAttributeAccessIssue]
        elif kind is Ret:
            if stack is None:
                return program, None
            k, stack = stack
            program = k(program.value)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            if not isinstance(program, Program):
                raise not_a_program(program)
            return program, stack


@no_type_check
def resume(stack: Stack, value: Any) -> tuple[Program, Stack]:
    """What follows a draw or factor whose value is there."""
    if stack is None:
        return Ret(value), None
    k, stack = stack
    return k(value), stack


def not_a_program(value: Any) -> InputError:
    """The error for what a user's function gave in the place of a program."""
    if callable(value):
        name = getattr(value, "__name__", "model")
        return InputError(f"expected a program, got the function {name} that makes one; call it: {name}(...)")
    return InputError(f"expected a program, got {value!r}; what follows a bind must give one, such as ret({value!r})")


@no_type_check
def scan(step: Callable[[Any, Any], Program], init: Any, xs: Iterable[Any]) -> Program:
    """The state after ``step(state, x)`` for every x in turn; each costs the same however many there are.

    step gives a program of the next state. To keep the path, carry it in the state as a linked list, (newest, the rest), so
    that particles share what they have in common.

    >>> from theodolite.predictions.inference import bernoulli, enumerate_exact
    >>> flips = scan(lambda heads, _: bernoulli(0.5).map(lambda b: heads + b), 0, range(3))
    >>> enumerate_exact(flips).expectation(float)
    1.5
    """
    items = xs if isinstance(xs, Sequence) else tuple(xs)

    def after(i: int, state: Any) -> Program:
        if i == len(items):
            return Ret(state)
        return Bind(step(state, items[i]), lambda later: after(i + 1, later))

    return Bind(Ret(init), lambda state: after(0, state))


@no_type_check
def program(function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Program]:
    """Write a program as a generator function: ``x = yield normal(0, 1)``, and ``return`` its value.

    Generators cannot be copied. The first run that passes a yield goes on with the generator that is there; every other one
    (another outcome, another offspring of a particle) runs it again from the start with the values recorded so far. So T
    yields under SMC cost O(T^2); long loops belong into `scan`. The function must be pure, as every program.

    >>> from theodolite.predictions.inference import bernoulli, enumerate_exact
    >>> @program
    ... def both(p):
    ...     a = yield bernoulli(p)
    ...     b = yield bernoulli(p)
    ...     return a and b
    >>> enumerate_exact(both(0.5)).probabilities()[True]
    0.25
    """
    if not inspect.isgeneratorfunction(inspect.unwrap(function)):
        raise InputError(f"@program takes a generator function (x = yield ...); {function!r} has no yield")

    @functools.wraps(function)
    def build(*args: Any, **options: Any) -> Program:
        def start() -> Generator[Any, Any, Any]:
            return function(*args, **options)

        return Bind(Ret(None), lambda _: _go_on(start, start(), None, None))

    return build


_History = tuple[Any, Any] | None


@no_type_check
def _go_on(
    start: Callable[[], Generator[Any, Any, Any]], generator: Generator[Any, Any, Any], sent: _History, value: Any
) -> Program:
    """Send ``value`` to a generator that got all of ``sent``, newest first, ``value`` among it."""
    try:
        asked = generator.send(value)
    except StopIteration as end:
        return Ret(end.value)
    if not isinstance(asked, Program):
        raise InputError(f"a program yields distributions and programs, got {asked!r}")
    unused = [generator]

    def k(x: Any) -> Program:
        own = unused.pop() if unused else _again(start, sent)
        return _go_on(start, own, (x, sent), x)

    return Bind(asked, k)


def _again(start: Callable[[], Generator[Any, Any, Any]], sent: _History) -> Generator[Any, Any, Any]:
    """A new generator that got all of ``sent``."""
    values = []
    while sent is not None:
        values.append(sent[0])
        sent = sent[1]
    generator = start()
    generator.send(None)
    for value in reversed(values):
        generator.send(value)
    return generator
