"""Representations that wrap one another: sequential, replay, traced; weighted and population stand in `population`.

Each keeps the unnormalised measure of a program, and so do the arrows between them; so does every chain of them.
"""

__all__ = [
    "Done",
    "Replay",
    "Sequential",
    "Suspended",
    "Trace",
    "Traced",
    "TracedElement",
    "mh_log_ratio",
]

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

from theodolite.predictions.inference.bases import Base, Representation
from theodolite.predictions.inference.distributions import uniform
from theodolite.predictions.inference.population import Coin, Index, Weighted
from theodolite.predictions.inference.program import (
    Bind,
    Distribution,
    Factor,
    Program,
    Ret,
    Stack,
    Untraced,
    head,
    resume,
)

Arrow = Callable[[Any], Any]


@no_type_check
class Done:
    """A program that came to its end."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@no_type_check
class Suspended:
    """A program that stopped after a factor; ``rest()`` is the element of what follows."""

    __slots__ = ("rest",)

    def __init__(self, rest: Callable[[], Any]) -> None:
        self.rest = rest


@no_type_check
class Sequential(Representation):
    """Over R: an element of R that gives `Done` or `Suspended`; a program stops after every factor that is not its last act."""

    def __init__(self, inner: Representation) -> None:
        self.inner, self.base = inner, inner.base

    def ret(self, x: Any) -> Any:
        """Done."""
        return self.inner.ret(Done(x))

    def bind(self, m: Any, k: Callable[[Any], Any]) -> Any:
        """What follows goes behind the last suspension."""

        def go(state: Any) -> Any:
            if isinstance(state, Done):
                return k(state.value)
            return self.inner.ret(Suspended(lambda: self.bind(state.rest(), k)))

        return self.inner.bind(m, go)

    def sample(self, dist: Distribution) -> Any:
        """Done, drawn in R."""
        return self.inner.map(self.inner.sample(dist), Done)

    def factor(self, logw: float) -> Any:
        """Scored in R, then suspended."""
        return self.inner.map(self.inner.factor(logw), lambda _: Suspended(lambda: self.ret(None)))

    def lift(self, program: Program) -> Any:
        """Done, left to the base."""
        return self.inner.map(self.inner.lift(program), Done)

    def of(self, program: Program) -> Any:
        """Up to just after the first factor; done where nothing but a value follows it."""
        return self.inner.of(self._segment(program, None))

    def _segment(self, program: Program, stack: Stack) -> Program:
        node, stack = head(program, stack)
        if isinstance(node, Ret):
            return Ret(Done(node.value))
        if isinstance(node, Factor):
            return Bind(node, lambda _: Ret(self._after(*resume(stack, None))))
        return Bind(node, lambda x: self._segment(*resume(stack, x)))

    def _after(self, program: Program, stack: Stack) -> Done | Suspended:
        node, stack = head(program, stack)
        if isinstance(node, Ret):
            return Done(node.value)
        return Suspended(lambda: self.inner.of(self._segment(node, stack)))

    def advance(self, m: Any) -> Any:
        """Run to just after the next factor; nothing where done."""
        return self.inner.bind(m, lambda s: self.inner.ret(s) if isinstance(s, Done) else s.rest())

    def finish(self, m: Any) -> Any:
        """An element of R: run to the end."""
        return self.inner.bind(m, lambda s: self.inner.ret(s.value) if isinstance(s, Done) else self.finish(s.rest()))

    def hoist_first(self, t: Arrow) -> Arrow:
        """Apply an arrow of R to what was run up to the first suspension."""
        return t

    def hoist(self, t: Arrow) -> Arrow:
        """Apply an arrow of R before every suspension."""

        def go(m: Any) -> Any:
            return self.inner.map(t(m), lambda s: s if isinstance(s, Done) else Suspended(lambda: go(s.rest())))

        return go


@no_type_check
class _Uniforms(Distribution):
    """The uniforms that a draw of ``dist`` still needs."""

    __slots__ = ("dist", "n_uniforms")

    def __init__(self, dist: Distribution, n: int) -> None:
        self.dist, self.n_uniforms = dist, n

    def __repr__(self) -> str:
        return f"a trace of {self.dist!r}"

    def quantile(self, u: tuple[float, ...]) -> tuple[float, ...]:
        return u

    def check_grid(self, grid: int) -> None:
        self.dist.check_grid(grid)


@no_type_check
class _Start(Program):
    """The value from which a frozen trace goes on."""

    __slots__ = ()


_START = _Start()
_UNIT = uniform()


@no_type_check
class Replay(Base):
    """Over R: a program that `run` leads through a given list of uniforms."""

    def __init__(self, inner: Representation) -> None:
        self.inner, self.base = inner, inner.base

    def lift(self, program: Program) -> Program:
        """Left to the base when run, and not recorded."""
        return Untraced(program)

    def run(self, m: Program, uniforms: tuple[float, ...] = (), start: Any = None) -> Any:
        """An element of R that gives (value, the uniforms used).

        Draws take the next of ``uniforms`` by position, whatever they stood for before; fresh ones where the list is used up.
        What is left of it at the end is dropped. start: the value of a frozen trace.
        """
        return self._run(m, None, uniforms, 0, None, start)

    def _run(self, m: Program, stack: Stack, given: tuple[float, ...], at: int, used: Any, start: Any) -> Any:
        inner = self.inner
        node: Any
        while True:
            node, stack = head(m, stack)
            if isinstance(node, Ret):
                parts = []
                while used is not None:
                    part, used = used
                    parts.append(part)
                return inner.ret((node.value, tuple(itertools.chain.from_iterable(reversed(parts)))))
            if isinstance(node, _Start):
                m, stack = resume(stack, start)
            elif isinstance(node, Factor):
                return inner.bind(
                    inner.factor(node.logw),
                    lambda _, stack=stack, at=at, used=used: self._run(*resume(stack, None), given, at, used, start),
                )
            elif isinstance(node, Untraced):
                return inner.bind(
                    inner.sample(node),
                    lambda x, stack=stack, at=at, used=used: self._run(*resume(stack, x), given, at, used, start),
                )
            else:
                have = given[at : at + node.n_uniforms]
                if len(have) < node.n_uniforms:

                    def fresh(u: tuple[float, ...], dist=node, have=have, stack=stack, at=at, used=used) -> Any:
                        whole = have + u
                        value = dist.quantile(whole)
                        return self._run(*resume(stack, value), given, at + len(whole), (whole, used), start)

                    return inner.bind(inner.sample(_Uniforms(node, node.n_uniforms - len(have))), fresh)
                at += node.n_uniforms
                used = (have, used)
                m, stack = resume(stack, node.quantile(have))


@no_type_check
@dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """One run: its uniforms in order, what it gave, the log of the product of its factors, and where a frozen one began."""

    uniforms: tuple[float, ...]
    output: Any
    logp: float
    start: Any = None


@no_type_check
class TracedElement:
    """model: an element of Weighted(Replay(base)), to be run again. run: an element of R that gives a `Trace`.

    The run is built when it is asked for, since a model that is run again asks for models only.
    """

    __slots__ = ("_build", "model")

    def __init__(self, model: Program, build: Callable[[], Any]) -> None:
        self.model, self._build = model, build

    @property
    def run(self) -> Any:
        """Built anew by each call; running it twice draws twice."""
        return self._build()


@no_type_check
def mh_log_ratio(logp: float, n: int, new_logp: float, new_n: int) -> float:
    """Log acceptance ratio q n / (p n') of a proposed run of weight q with n' uniforms, from one of weight p with n.

    Source: Scibior et al., 2018, arXiv:1711.03219 (Metropolis-Hastings-Green on traces of any length).
    """
    if new_logp == -math.inf:
        return -math.inf
    return math.inf if logp == -math.inf else new_logp + math.log(n) - logp - math.log(new_n)


@no_type_check
class Traced(Representation):
    """Over R: a model to run again, and R of a trace. Only the run scores in R, so that moves do not score twice."""

    def __init__(
        self, inner: Representation, *, log_ratio: Callable[[float, int, float, int], float] = mh_log_ratio
    ) -> None:
        self.inner, self.base, self.log_ratio = inner, inner.base, log_ratio
        self._replay = Replay(Base())
        self._model = Weighted(self._replay)

    def _element(self, model: Program) -> TracedElement:
        inner = self.inner

        def scored(found: Any) -> Any:
            (x, logw), used = found
            return inner.map(inner.factor(logw), lambda _: Trace(used, x, logw))

        return TracedElement(model, lambda: inner.bind(inner.lift(self._replay.run(model)), scored))

    def ret(self, x: Any) -> TracedElement:
        """An empty trace."""
        return TracedElement(self._model.ret(x), lambda: self.inner.ret(Trace((), x, 0.0)))

    def bind(self, m: TracedElement, k: Callable[[Any], TracedElement]) -> TracedElement:
        """Models one after the other, traces joined."""
        inner = self.inner

        def joined(a: Trace) -> Any:
            return inner.map(
                k(a.output).run, lambda b: Trace(a.uniforms + b.uniforms, b.output, a.logp + b.logp, a.start)
            )

        return TracedElement(self._model.bind(m.model, lambda x: k(x).model), lambda: inner.bind(m.run, joined))

    def sample(self, dist: Distribution) -> TracedElement:
        """A trace of this draw."""
        return self._element(self._model.sample(dist))

    def factor(self, logw: float) -> TracedElement:
        """No draw, and the weight, which is scored in R too."""
        return self._element(self._model.factor(logw))

    def lift(self, program: Program) -> TracedElement:
        """Left to the base, and not recorded."""
        return self._element(self._model.lift(program))

    def of(self, program: Program) -> TracedElement:
        """The same as by `bind`, in one run; the weight is scored in R at its end."""
        return self._element(self._model.of(program))

    def hoist(self, t: Arrow) -> Arrow:
        """Apply an arrow of R to the run."""
        return lambda m: TracedElement(m.model, lambda: t(m.run))

    def transition(self, model: Program, trace: Trace) -> Program:
        """One Metropolis-Hastings step as a program of the base that gives (trace, whether the proposal was accepted).

        One uniform of the n is drawn anew, the model runs again by position, giving weight q and n' uniforms, and is
        accepted with probability min(1, q n / (p n')).
        """
        n, given = len(trace.uniforms), trace.uniforms
        if n == 0:
            return Ret((trace, True))

        def judge(found: Any) -> Program:
            (x, logw), used = found
            ratio = self.log_ratio(trace.logp, n, logw, len(used))
            if ratio == -math.inf:
                return Ret((trace, False))
            new = Trace(used, x, logw, trace.start)
            if ratio >= 0:
                return Ret((new, True))
            return Bind(Coin(math.exp(ratio)), lambda yes: Ret((new, True) if yes else (trace, False)))

        def propose(i: int, u: float) -> Program:
            return Bind(self._replay.run(model, (*given[:i], u, *given[i + 1 :]), trace.start), judge)

        return Bind(Index(n), lambda i: Bind(_UNIT, lambda u: propose(i, u)))

    def mh_step(self, m: TracedElement) -> TracedElement:
        """Every trace after one Metropolis-Hastings step, whose target is its own weight."""
        inner = self.inner

        def step(trace: Trace) -> Any:
            return inner.lift(Bind(self.transition(m.model, trace), lambda moved: Ret(moved[0])))

        return TracedElement(m.model, lambda: inner.bind(m.run, step))

    def freeze(self, m: TracedElement) -> TracedElement:
        """Every trace forgets its draws and goes on from its value; what was drawn so far is not moved any more."""
        model = self._replay.bind(_START, self._model.ret)
        return TracedElement(model, lambda: self.inner.map(m.run, lambda t: Trace((), t.output, 0.0, t.output)))

    def marginal(self, m: TracedElement) -> Any:
        """An element of R: the value of the run."""
        return self.inner.map(m.run, lambda t: t.output)
