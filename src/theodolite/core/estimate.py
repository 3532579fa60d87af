"""Numbers with their uncertainty, and the control that each learned number is shown beside."""

__all__ = ["Comparison", "Control", "Estimate", "bootstrap", "format_number", "mean_of_runs", "proportion"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from theodolite.core.binomial import binomial_interval
from theodolite.core.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A measured number, the interval it lies in with 95 % confidence, and its unit.

    `n` is the number of independent things (rows, seeds, draws) behind it. An exact count has low = value = high.
    """

    value: float
    low: float
    high: float
    unit: str = ""
    n: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise InputError(f"an estimate must be a finite number, got {self.value}")
        if not self.low <= self.value <= self.high:
            raise InputError(f"an estimate must lie in its interval, got {self.value} in [{self.low}, {self.high}]")

    @classmethod
    def exact(cls, value: float, unit: str = "") -> "Estimate":
        """A number without sampling error: a count, a size, a closed form."""
        return cls(float(value), float(value), float(value), unit)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit and self.unit != "%" else self.unit
        if self.low == self.high:
            return f"{format_number(self.value)}{unit}"
        return f"{format_number(self.value)}{unit} [{format_number(self.low)}, {format_number(self.high)}]"


def format_number(value: float) -> str:
    """A number as people read it: four digits, whole numbers whole, with separators.

    >>> [format_number(v) for v in (199210, 0.89631, 12.0, -3.1e-7)]
    ['199,210', '0.8963', '12', '-3.1e-07']
    """
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 10_000 else f"{value:.4g}"


@dataclass(frozen=True)
class Control:
    """What a cheap stand-in reaches with the same budget, on the same held-out data.

    kind: "random" (equal-budget random choice), "closed-form" (best formula without learning), "null" (the answer
    under no effect, e.g. chance), "reference" (the full thing that is being compressed or explained).
    """

    name: str
    estimate: Estimate
    kind: Literal["random", "closed-form", "null", "reference"]


@dataclass(frozen=True)
class Comparison:
    """A measured number beside its controls; the headline may only claim what `beats` confirms."""

    name: str
    estimate: Estimate
    controls: tuple[Control, ...]
    larger_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.controls:
            raise InputError(f"{self.name} has no control; every searched, selected or learned number needs one")

    def beats(self, control: Control) -> bool:
        """True where the intervals do not overlap and the difference has the right sign."""
        ours, theirs = self.estimate, control.estimate
        return ours.low > theirs.high if self.larger_is_better else ours.high < theirs.low

    @property
    def loses_to(self) -> tuple[Control, ...]:
        """The random and closed-form controls that this number does not beat."""
        return tuple(c for c in self.controls if c.kind in ("random", "closed-form", "null") and not self.beats(c))


def proportion(successes: int, n: int, *, confidence: float = 0.95, unit: str = "") -> Estimate:
    """Share of successes with its exact (Clopper-Pearson) interval.

    Source: Clopper and Pearson, 1934, Biometrika 26.

    >>> round(proportion(9, 10).low, 3)
    0.555
    """
    low, high = binomial_interval(successes, n, confidence=confidence)
    return Estimate(successes / n, low, high, unit, n)


def mean_of_runs(
    runs: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    unit: str = "",
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Mean over independent runs with its Student interval; one run gives an interval without bounds.

    within: what the quantity can be at all, (0, 1) for a share; the interval is cut there.
    """
    values = np.asarray(runs, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise InputError(f"need at least one finite run, got {values!r}")
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, *within, unit, 1)
    half = float(stats.t.ppf((1 + confidence) / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    low, high = max(within[0], mean - half), min(within[1], mean + half)
    return Estimate(mean, min(mean, low), max(mean, high), unit, values.size)


def bootstrap(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    unit: str = "",
    groups: np.ndarray | None = None,
) -> Estimate:
    """Percentile bootstrap of ``statistic`` over the rows of ``rows`` (n, ...), by whole ``groups`` (n,) where given.

    ``statistic`` takes an array like ``rows`` and returns a number. Rows that belong together (same person, same
    scene, neighbouring times) must share a group, or the interval is too narrow; of one group alone it has no bounds.
    """
    rows = np.asarray(rows)
    if rows.shape[0] == 0:
        raise InputError("cannot bootstrap zero rows")
    rng = np.random.default_rng(seed)
    value = float(statistic(rows))
    if groups is None:
        if statistic is np.mean and rows.ndim == 1:  # a multinomial count per row replaces 1,000 copies of the rows
            draws = _bootstrap_means(rows.astype(np.float64), rng, resamples)
        else:
            draws = np.array([statistic(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(resamples)])
        n = len(rows)
    else:
        names, inverse = np.unique(np.asarray(groups), return_inverse=True)
        if len(names) == 1:  # one thing that happened once
            return Estimate(value, -math.inf, math.inf, unit, 1)
        members = [np.flatnonzero(inverse == g) for g in range(len(names))]
        draws = np.empty(resamples)
        for r in range(resamples):
            chosen = rng.integers(0, len(names), len(names))
            draws[r] = statistic(rows[np.concatenate([members[g] for g in chosen])])
        n = len(names)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(min(low, value)), float(max(high, value)), unit, n)


def _bootstrap_means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    n, block = len(values), max(1, 4_000_000 // max(1, len(values)))
    means = [
        values[rng.integers(0, n, (min(block, resamples - i), n))].mean(axis=1) for i in range(0, resamples, block)
    ]
    return np.concatenate(means)
