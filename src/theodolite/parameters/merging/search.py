"""Evolution of a vector of genes by CMA-ES: the best vector ever evaluated, and how the search went.

Source: Hansen and Ostermeier, 2001, Evolutionary Computation 9(2); Ros and Hansen, 2008, PPSN X (the diagonal variant).
"""

__all__ = ["SearchResult", "cma_search", "population_size", "random_search"]

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from theodolite.core.errors import InputError, ModelError

Evaluate = Callable[[np.ndarray], np.ndarray]

_FULL_COVARIANCE = 200  # genes up to which a full covariance matrix is learned
# flat and slowly moving fitness is normal for an accuracy; only these say that the search cannot go on
_FATAL = {"tolx", "tolfacupx", "noeffectaxis", "noeffectcoord", "conditioncov", "tolconditioncov"}


@dataclass(frozen=True, eq=False)
class SearchResult:
    """genes: the best ever evaluated. value: its fitness. history: a DataFrame (evaluation, best, mean), a row for each
    generation: evaluations so far, best fitness so far, mean fitness of the generation. evaluations: made in all.
    dropped: candidates whose fitness was no number.
    """

    genes: Float[np.ndarray, " gene"]
    value: float
    history: pd.DataFrame
    evaluations: int
    dropped: int


def population_size(genes: int) -> int:
    """4 + floor(3 ln n), the usual number of candidates a generation.

    >>> population_size(12)
    11
    """
    return 4 + int(3 * math.log(genes)) if genes > 1 else 4


class _Record:
    """What was evaluated so far: the best, the counts and the history."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.genes: np.ndarray | None = None
        self.value, self.worst = -math.inf, math.inf
        self.evaluations = self.dropped = 0
        self.rows: list[tuple[int, float, float]] = []

    def __call__(self, genes: np.ndarray) -> np.ndarray:
        values = np.asarray(self.evaluate(genes), dtype=np.float64)
        if values.shape != (len(genes),):
            raise InputError(f"the fitness of {len(genes)} candidates must be {len(genes)} numbers, got {values.shape}")
        good = np.isfinite(values)
        self.evaluations += len(values)
        self.dropped += int((~good).sum())
        if good.any():
            top = int(np.argmax(np.where(good, values, -np.inf)))
            if values[top] > self.value:
                self.value, self.genes = float(values[top]), np.array(genes[top], dtype=np.float64)
            self.worst = min(self.worst, float(values[good].min()))
        self.rows.append((self.evaluations, self.value, float(values[good].mean()) if good.any() else math.nan))
        return values

    def result(self, *, warn_of_flat: bool = True) -> SearchResult:
        if self.genes is None:
            raise ModelError(
                f"the fitness of all {self.evaluations} candidates was NaN or infinite; run fitness(source) by itself "
                "and see what it gives"
            )
        if warn_of_flat and self.evaluations > 1 and self.worst == self.value:
            warnings.warn(
                f"the fitness is flat: all {self.evaluations} candidates score {self.value:g}, so nothing was searched; "
                "give a fitness that tells candidates apart (a loss instead of an accuracy, more examples)",
                UserWarning,
                stacklevel=4,
            )
        history = pd.DataFrame(self.rows, columns=["evaluation", "best", "mean"])
        return SearchResult(self.genes, self.value, history, self.evaluations, self.dropped)


def cma_search(
    evaluate: Evaluate,
    start: Float[np.ndarray, " gene"],
    *,
    sigma: float,
    max_evaluations: int,
    population: int | None = None,
    seed: int = 0,
    patience: int | None = None,
    first: Sequence[np.ndarray] = (),
    on_generation: Callable[[int, float], None] | None = None,
) -> SearchResult:
    """Maximise ``evaluate`` from ``start`` with steps of about ``sigma``, the best ever evaluated returned.

    evaluate: (candidates, genes) -> (candidates,) fitness, larger is better, NaN where there is none. first: vectors that
    are evaluated with the start before the search and count. patience: generations without a better best before the end.
    on_generation(evaluations, best) is called after each generation. Up to 200 genes the full covariance matrix is
    learned, above only its diagonal.

    Raises InputError for a budget smaller than one generation, MissingExtraError without the package cma, ModelError
    where no candidate has a finite fitness; warns where all have the same.
    """
    n = len(start)
    size = population_size(n) if population is None else int(population)
    if size < 3:
        raise InputError(f"a population needs at least 3 candidates, got {population}")
    if not np.isfinite(start).all():
        raise InputError("the search starts from numbers that are not finite")
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(f"sigma is the first step size and must be above 0, got {sigma}")
    if patience is not None and patience < 1:
        raise InputError(f"patience is a number of generations of at least 1, got {patience}")
    seeds = [np.asarray(start, dtype=np.float64), *first]
    if max_evaluations < len(seeds) + size:
        raise InputError(
            f"max_evaluations={max_evaluations} is too few: the start and the sources take {len(seeds)}, a generation {size}"
        )
    import cma  # slow to import, and only the search needs it

    record = _Record(evaluate)
    record(np.stack(seeds))
    draw = np.random.default_rng(seed)
    # one gene alone is more than the library takes: it gets an idle companion
    strategy = cma.CMAEvolutionStrategy(
        np.append(start, 0.0) if n == 1 else start,
        sigma,
        {
            "popsize": size,
            "seed": np.nan,  # nothing global is seeded; all randomness comes from `draw`
            "randn": lambda rows, width: draw.standard_normal((rows, width)),
            "CMA_diagonal": n > _FULL_COVARIANCE,
            "verbose": -9,
            "verb_log": 0,
        },
    )
    stale = 0
    while record.evaluations < max_evaluations and (patience is None or stale < patience):
        before = record.value
        asked = strategy.ask()
        some = np.stack(asked)[: max_evaluations - record.evaluations, :n]
        values = record(some)
        stale = 0 if record.value > before else stale + 1
        if on_generation is not None:
            on_generation(record.evaluations, record.value)
        if len(some) < size:
            break  # the rest of the budget: a part of a generation teaches the strategy nothing
        floor = record.worst if math.isfinite(record.worst) else 0.0
        strategy.tell(asked, list(-np.where(np.isfinite(values), values, floor)))
        if _FATAL & set(strategy.stop() or ()):
            break
    return record.result()


def random_search(
    evaluate: Evaluate, draw: Callable[[np.random.Generator, int], np.ndarray], *, max_evaluations: int, seed: int = 0
) -> SearchResult:
    """The best of ``max_evaluations`` vectors that ``draw(generator, number)`` gives: the control of a search."""
    record, generator = _Record(evaluate), np.random.default_rng(seed)
    while record.evaluations < max_evaluations:
        record(draw(generator, min(16, max_evaluations - record.evaluations)))
    return record.result(warn_of_flat=False)  # the search that it is a control of says so
