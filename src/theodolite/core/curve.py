"""Quality against the number of coordinates, and the fewest coordinates that suffice."""

__all__ = ["QualityCurve", "SmallestDimension"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import InputError
from theodolite.core.estimate import Estimate


@dataclass(frozen=True)
class SmallestDimension:
    """The smallest tried dimension whose mean quality reaches `target`.

    dimension is None when no tried dimension reaches it (never the largest tried). estimate holds the bootstrap
    interval over runs; its high end is infinite where some resamples never reach the target. standard_error is over
    the resamples that do.
    """

    dimension: int | None
    target: float
    estimate: Estimate | None
    standard_error: float | None


@dataclass(frozen=True, eq=False)
class QualityCurve:
    """Quality of one kind of coordinates at several dimensions, with chance and reference marked.

    dimensions: (k,) increasing counts of coordinates kept, trained or selected.
    runs: (k, r) quality of each run; larger is better. NaN marks a run that was not made (a lazy search).
    chance: quality of no coordinates at all; reference: quality of all of them (or of the full model).
    name: what the coordinates are; metric: what quality is.
    """

    dimensions: tuple[int, ...]
    runs: Float[np.ndarray, "dimension run"]
    chance: float
    reference: float
    name: str = ""
    metric: str = "accuracy"
    total_dimension: int | None = field(default=None)

    def __post_init__(self) -> None:
        runs = np.asarray(self.runs, dtype=np.float64)
        if len(self.dimensions) == 0 or runs.ndim != 2 or runs.shape[0] != len(self.dimensions):
            raise InputError(f"need runs of shape ({len(self.dimensions)}, r), got {runs.shape}")
        if any(b <= a for a, b in zip(self.dimensions, self.dimensions[1:], strict=False)):
            raise InputError(f"dimensions must increase strictly, got {list(self.dimensions)}")
        if np.isnan(runs).all(axis=1).any():
            raise InputError("every dimension on the curve needs at least one run")
        object.__setattr__(self, "runs", runs)

    @classmethod
    def from_runs(cls, runs: Mapping[int, Sequence[float]], **options: object) -> "QualityCurve":
        """A curve from {dimension: qualities}, ragged lists allowed."""
        dimensions = tuple(sorted(runs))
        width = max((len(runs[d]) for d in dimensions), default=0)
        table = np.full((len(dimensions), width), np.nan)
        for row, d in enumerate(dimensions):
            table[row, : len(runs[d])] = runs[d]
        return cls(dimensions, table, **options)  # type: ignore[arg-type]

    @property
    def mean(self) -> Float[np.ndarray, " dimension"]:
        """Mean quality over runs, per dimension."""
        return np.nanmean(self.runs, axis=1)

    @property
    def std(self) -> Float[np.ndarray, " dimension"]:
        """Standard deviation over runs, per dimension (0 for a single run)."""
        return np.nanstd(self.runs, axis=1)

    def target(self, level: float = 0.9, *, above_chance: bool = False) -> float:
        """The quality that counts as enough: level x reference, or chance + level x (reference - chance)."""
        if not 0 < level <= 1:
            raise InputError(f"level must lie in (0, 1], got {level}")
        if above_chance:
            return self.chance + level * (self.reference - self.chance)
        if self.reference <= 0:
            raise InputError(
                f"a share of the reference needs a reference above 0, got {self.reference}; use above_chance=True "
                "or an absolute target"
            )
        return level * self.reference

    def smallest(
        self, level: float = 0.9, *, above_chance: bool = False, resamples: int = 1000, seed: int = 0
    ) -> SmallestDimension:
        """Fewest coordinates whose mean quality reaches `target(level)`, with a bootstrap interval over runs.

        >>> curve = QualityCurve.from_runs({1: [0.2], 4: [0.8], 16: [0.95]}, chance=0.1, reference=1.0)
        >>> curve.smallest().dimension, curve.smallest(0.75).dimension
        (16, 4)
        """
        return self.smallest_reaching(self.target(level, above_chance=above_chance), resamples=resamples, seed=seed)

    def smallest_reaching(self, target: float, *, resamples: int = 1000, seed: int = 0) -> SmallestDimension:
        """Fewest coordinates whose mean quality reaches the absolute quality ``target``."""
        grid = np.asarray(self.dimensions)
        found = self._first(self.mean[None], target)[0]
        draws = self._first(self._resampled_means(resamples, seed), target)
        if found < 0:
            return SmallestDimension(None, target, None, None)
        values = np.where(draws >= 0, grid[np.maximum(draws, 0)].astype(np.float64), np.inf)
        low, high = np.quantile(values, [0.025, 0.975], method="nearest")
        reached = values[np.isfinite(values)]
        value = float(grid[found])
        estimate = Estimate(value, min(float(low), value), max(float(high), value), "dimensions", self.runs.shape[1])
        return SmallestDimension(int(grid[found]), target, estimate, float(reached.std()) if reached.size else None)

    def _resampled_means(self, resamples: int, seed: int) -> Float[np.ndarray, "resample dimension"]:
        rng = np.random.default_rng(seed)
        means = np.empty((resamples, len(self.dimensions)))
        for row, runs in enumerate(self.runs):  # runs at different dimensions are independent: resample each alone
            made = runs[~np.isnan(runs)]
            means[:, row] = made[rng.integers(0, made.size, (resamples, made.size))].mean(axis=1)
        return means

    @staticmethod
    def _first(means: np.ndarray, target: float) -> np.ndarray:
        """Index of the first column that reaches the target, -1 where none does."""
        passed = means >= target
        return np.where(passed.any(axis=1), passed.argmax(axis=1), -1)
