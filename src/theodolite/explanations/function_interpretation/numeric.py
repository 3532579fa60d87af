"""Numeric functions with known answers: sixteen families, their sums and products, and three ways of making them harder.

A variant is what an interpreter sees of a formula f:

    clean       f
    corrupted   f outside an interval, N(mu, .1) inside, mu = mean of f on 100 points of its domain
    noisy       f + N(0, 1), f + U(-1, 1) or f + Poisson(1)
    mlp         a network 1-64-ReLU-1 that was fitted to f on its domain
"""

__all__ = ["GRID", "MIX", "VARIANTS", "Corruption", "NumericFunction", "make_numeric"]

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

import numpy as np

from theodolite.core.errors import InputError
from theodolite.explanations.function_interpretation.families import (
    COMPOSABLE,
    DOMAINS,
    FAMILIES,
    SIMPLE,
    draw_parameters,
)

Variant = Literal["clean", "corrupted", "noisy", "mlp"]
Noise = Literal["normal", "uniform", "poisson"]

VARIANTS: tuple[Variant, ...] = ("clean", "corrupted", "noisy", "mlp")
MIX = (0.483, 0.191, 0.176, 0.150)
"""Shares of the variants in the published set."""

GRID = np.arange(-127.5, 128.0)
"""The 256 points that numeric code is scored on."""

_NOISES: tuple[tuple[Noise, float], ...] = (("normal", 0.342), ("uniform", 0.435), ("poisson", 0.223))
_LEAST = 64  # finite values on the grid that a drawn function must have
_HIDDEN, _POINTS, _EPOCHS, _RATE, _PATIENCE = 64, 256, 2000, 0.01, 300
_TOGETHER = 1024  # networks that are trained side by side


@dataclass(frozen=True)
class Corruption:
    """Where a function is replaced by N(level, .1): low < x < high, or with an infinite end x <= high or x >= low."""

    low: float
    high: float
    level: float

    def inside(self, x: np.ndarray) -> np.ndarray:
        """Whether each x lies in the interval."""
        return ((x > self.low) & (x < self.high)) if math.isfinite(self.high - self.low) else (
            (x >= self.low) & (x <= self.high)
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class NumericFunction:
    """A black box with a known answer: ``fn(x)`` for an array x of any shape gives what an interpreter sees.

    parts: one (family, parameters), or two of them joined by ``joined``, "*" or "+". variant: "clean", "corrupted", "noisy"
    or "mlp". corruption, noise_kind: what the variant applies, kept whichever it is. domain: where a network is fitted.
    """

    parts: tuple[tuple[str, tuple[Any, ...]], ...]
    joined: Literal["", "*", "+"]
    variant: Variant
    corruption: Corruption
    noise_kind: Noise
    domain: tuple[float, float] = (-100.0, 100.0)
    name: str = ""
    seed: int = 0

    modality = "numeric"

    @property
    def kind(self) -> str:
        """The family, or both with the sign between them: "relu*linear"."""
        return self.joined.join(family for family, _ in self.parts)

    @property
    def params(self) -> tuple[Any, ...]:
        """The parameters of the family, or those of both."""
        return self.parts[0][1] if not self.joined else tuple(parameters for _, parameters in self.parts)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the function is corrupted, with infinite ends of half-lines; None where it is not."""
        return (self.corruption.low, self.corruption.high) if self.variant == "corrupted" else None

    @property
    def noise(self) -> Noise | None:
        """The noise on the function, None where there is none."""
        return self.noise_kind if self.variant == "noisy" else None

    def clean(self, x: np.ndarray) -> np.ndarray:
        """The formula alone; NaN or infinite where it is not defined."""
        x = np.asarray(x, dtype=np.float64)
        with np.errstate(all="ignore"):
            values = [FAMILIES[family](x, *parameters) for family, parameters in self.parts]
            return (
                values[0] if not self.joined else values[0] * values[1] if self.joined == "*" else values[0] + values[1]
            )

    def mean(self, x: np.ndarray) -> np.ndarray:
        """What ``fn(x)`` is on average: the truth that is scored. Poisson noise has mean 1."""
        x = np.asarray(x, dtype=np.float64)
        if self.variant == "mlp":
            return self._network(x)
        values = self.clean(x)
        if self.variant == "corrupted":
            return np.where(self.corruption.inside(x), self.corruption.level, values)
        return values + 1 if self.noise == "poisson" else values

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """One noisy answer an input; each call draws anew."""
        x = np.asarray(x, dtype=np.float64)
        values, rng = self.mean(x), self._rng
        if self.variant == "corrupted":
            return np.where(self.corruption.inside(x), values + rng.normal(0, 0.1, x.shape), values)
        if self.noise == "poisson":
            return values - 1 + rng.poisson(1, x.shape)
        if self.noise is not None:
            return values + (rng.normal(0, 1, x.shape) if self.noise == "normal" else rng.uniform(-1, 1, x.shape))
        return values

    def detectable(self) -> bool:
        """Whether the corruption can be seen: root mean square of its change on the grid > .05 sd(f) + .3."""
        formula = self.clean(GRID)
        inside = self.corruption.inside(GRID) & np.isfinite(formula)
        if not inside.any():
            return False
        change = np.sqrt(np.mean((formula[inside] - self.corruption.level) ** 2))
        return bool(change > 0.05 * formula[np.isfinite(formula)].std() + 0.3)

    def as_variant(self, variant: str) -> "NumericFunction":
        """The same formula seen as another variant."""
        if variant not in VARIANTS:
            raise InputError(f"a variant is one of {', '.join(VARIANTS)}, got {variant!r}")
        return replace(self, variant=cast(Variant, variant))

    def again(self) -> "NumericFunction":
        """The same function, whose noise begins anew."""
        made = copy.copy(self)
        made.__dict__.pop("_rng", None)
        return made

    def source(self) -> str:
        """The function's mean as a program that numpy alone can run."""
        lines = ["import numpy as np", ""]
        if self.variant == "mlp":
            lines += ["def function(x):", *(f"    {line}" for line in self._network.lines()), ""]
            return "\n".join(lines)
        for family in dict.fromkeys(family for family, _ in self.parts):
            lines += [inspect.getsource(FAMILIES[family])]
        calls = [f"{family}({', '.join(['x', *(repr(one) for one in given)])})" for family, given in self.parts]
        lines += ["def function(x):", "    x = np.asarray(x, dtype=float)", f"    y = {f' {self.joined} '.join(calls)}"]
        if self.interval is not None:
            inside = _condition(self.interval)
            lines.append(f"    y = np.where({inside}, {self.corruption.level!r}, y)")
        lines.append("    return y + 1" if self.noise == "poisson" else "    return y")
        return "\n".join([*lines, ""])

    @cached_property
    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 7])

    @cached_property
    def _network(self) -> "_Network":
        return _fitted(self.parts, self.joined, self.domain, self.seed)


def _condition(interval: tuple[float, float]) -> str:
    """Membership in an interval as a program writes it, closed at the finite end of a half-line."""
    low, high = interval
    if math.isfinite(low) and math.isfinite(high):
        return f"(x > {low!r}) & (x < {high!r})"
    return f"x <= {high!r}" if math.isfinite(high) else f"x >= {low!r}"


@dataclass(frozen=True, eq=False)
class _Network:
    """1-64-ReLU-1 in inputs (x - shift) / scale."""

    shift: float
    scale: float
    inner: np.ndarray
    inner_bias: np.ndarray
    outer: np.ndarray
    bias: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        z = (np.asarray(x)[..., None] - self.shift) / self.scale
        return np.maximum(z * self.inner + self.inner_bias, 0) @ self.outer + self.bias

    def lines(self) -> list[str]:
        w, b, v = (
            f"np.array({[float(value) for value in one]!r})" for one in (self.inner, self.inner_bias, self.outer)
        )
        return [
            "x = np.asarray(x, dtype=float)",
            f"z = (x[..., None] - {self.shift!r}) / {self.scale!r}",
            f"return np.maximum(z * {w} + {b}, 0) @ {v} + {self.bias!r}",
        ]


@lru_cache(maxsize=4096)
def _fitted(parts: tuple[Any, ...], joined: Any, domain: tuple[float, float], seed: int) -> _Network:
    return _trained([NumericFunction(parts, joined, "mlp", Corruption(0, 0, 0), "normal", domain, seed=seed)])[0]


def _trained(functions: Sequence[NumericFunction]) -> list[_Network]:
    """Adam on the mean squared error of all points at once, inputs and values standardised; the best network seen of each.

    A unit is active on a run of the sorted points, so that values and gradients are sums over prefixes: a step costs points +
    units, not points x units. Networks are trained side by side, each as it would be alone.
    """
    grids = np.array([np.linspace(*fn.domain, _POINTS) for fn in functions])
    values = np.array([fn.clean(x) for fn, x in zip(functions, grids, strict=True)])
    used = np.isfinite(values)
    seen = [(x[m], y[m]) for x, y, m in zip(grids, values, used, strict=True)]
    shift = np.array([x.mean() for x, _ in seen])
    scale = np.array([np.abs(x - x.mean()).max() for x, _ in seen])
    middle = np.array([y.mean() for _, y in seen])
    spread = np.array([y.std() or 1.0 for _, y in seen])
    z = (grids - shift[:, None]) / scale[:, None]
    t = np.where(used, (np.where(used, values, 0) - middle[:, None]) / spread[:, None], 0)
    theta = np.array([_start(fn.seed) for fn in functions])
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    best, least, since = theta.copy(), np.full(len(theta), math.inf), np.zeros(len(theta), dtype=int)
    count, step = used.sum(axis=1), z[:, 1:2] - z[:, :1]
    row = np.arange(len(theta))[:, None] * (_POINTS + 1)
    w, b, v = (slice(_HIDDEN * i, _HIDDEN * (i + 1)) for i in range(3))
    gradient = np.empty_like(theta)

    def prefix(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((len(rows), 1)), np.cumsum(rows, axis=1)], axis=1).ravel()

    def spans(amounts: np.ndarray) -> np.ndarray:
        """At each point the sum of the amounts of the units that are active there."""
        size, flat = len(theta) * (_POINTS + 1), amounts.ravel()
        changes = np.bincount(start.ravel(), flat, size) - np.bincount(stop.ravel(), flat, size)
        return np.cumsum(changes.reshape(len(theta), -1), axis=1)[:, :-1]

    for epoch in range(1, _EPOCHS + 1):
        inner = np.where(theta[:, w] == 0, 1e-300, theta[:, w])
        turn = np.clip((-theta[:, b] / inner - z[:, :1]) / step, -1, _POINTS)  # where a unit turns, in points
        start = row + np.where(inner > 0, np.minimum(np.floor(turn) + 1, _POINTS), 0).astype(int)
        stop = row + np.where(inner > 0, _POINTS, np.maximum(np.ceil(turn), 0)).astype(int)
        error = spans(theta[:, v] * inner) * z + spans(theta[:, v] * theta[:, b]) + theta[:, -1:] - t
        error = np.where(used, error, 0)
        loss = (error**2).sum(axis=1) / count
        since = np.where((since <= _PATIENCE) & (loss < 0.999 * least), 0, since + 1)
        better = (since <= _PATIENCE) & (loss < least)
        best[better], least[better] = theta[better], loss[better]
        if (since > _PATIENCE).all():
            break
        error *= 2 / count[:, None]
        plain, weighted = prefix(error), prefix(error * z)
        plain, weighted = plain[stop] - plain[start], weighted[stop] - weighted[start]
        gradient[:, w], gradient[:, b] = theta[:, v] * weighted, theta[:, v] * plain
        gradient[:, v], gradient[:, -1] = inner * weighted + theta[:, b] * plain, error.sum(axis=1)
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        theta = theta - _RATE * (first / (1 - 0.9**epoch)) / (np.sqrt(second / (1 - 0.999**epoch)) + 1e-8)
    return [
        _Network(
            float(shift[i]), float(scale[i]), one[w], one[b], one[v] * spread[i], float(one[-1] * spread[i] + middle[i])
        )
        for i, one in enumerate(best)
    ]


def _start(seed: int) -> np.ndarray:
    """Weights before training: inner, inner biases, outer, bias."""
    rng = np.random.default_rng([seed, 8])
    sizes, reach = (_HIDDEN, _HIDDEN, _HIDDEN, 1), (1.0, 1.0, _HIDDEN**-0.5, _HIDDEN**-0.5)
    return np.concatenate([rng.uniform(-r, r, n) for n, r in zip(sizes, reach, strict=True)])


def make_numeric(n: int, seed: int, mix: Sequence[float] = MIX) -> list[NumericFunction]:
    """``n`` functions drawn as the benchmark draws them; ``mix``: shares of clean, corrupted, noisy and mlp ones.

    With p = .85 one of the sixteen families, otherwise a product or a sum of two of the nine that compose. A draw with fewer
    than 64 finite values on the 256 grid points, or without a finite mean on its domain, is drawn again. Networks are trained
    here, all together: a few hundredths of a second each.

    Source: Schwettmann et al., 2023, arXiv:2309.03886, appendix A and its published generator.

    >>> [fn.kind for fn in make_numeric(3, seed=0)]
    ['root', 'logarithm', 'linear']
    """
    shares = np.asarray(mix, dtype=np.float64)
    if n < 0 or shares.shape != (4,) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise InputError(f"need n >= 0 and four shares that add up to 1, got n={n} and mix={tuple(mix)}")
    rng = np.random.default_rng([seed, 6])
    made: list[NumericFunction] = []
    while len(made) < n:
        variant = cast(Variant, str(rng.choice(VARIANTS, p=shares / shares.sum())))
        one = _draw(rng, variant, int(rng.integers(1 << 31)))
        if np.isfinite(one.corruption.level) and np.isfinite(one.clean(GRID)).sum() >= _LEAST:
            made.append(replace(one, name=f"f{len(made):05d}"))
    approximated = [fn for fn in made if fn.variant == "mlp"]
    for i in range(0, len(approximated), _TOGETHER):
        part = approximated[i : i + _TOGETHER]
        for fn, network in zip(part, _trained(part), strict=True):
            fn.__dict__["_network"] = network
    return made


def _draw(rng: np.random.Generator, variant: Variant, seed: int) -> NumericFunction:
    simple = rng.random() < 0.85
    joined = "" if simple else str(rng.choice(("*", "+")))
    families = [str(rng.choice(SIMPLE if simple else COMPOSABLE)) for _ in range(1 if simple else 2)]
    parts = tuple((family, draw_parameters(family, rng)) for family in families)
    domain = DOMAINS.get(families[0], (-100.0, 100.0))
    start = round(float(rng.uniform(max(domain[0], -100), 100)), 1)
    low, high = (
        (start, float(rng.uniform(start + 5, start + 25))) if rng.random() < 0.5
        else (-math.inf, start) if rng.random() < 0.5 else (start, math.inf)
    )  # fmt: skip
    kinds, odds = zip(*_NOISES, strict=True)
    noise = cast(Noise, str(rng.choice(kinds, p=odds)))
    one = NumericFunction(parts, joined, variant, Corruption(low, high, 0.0), noise, domain, seed=seed)  # type: ignore[arg-type]
    level = float(np.mean(one.clean(np.linspace(*domain, 100))))
    return replace(one, corruption=Corruption(low, high, level))
