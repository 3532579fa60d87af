"""Program sets that hold the right program for all but a share epsilon of what comes, with confidence 1 - delta."""

__all__ = ["CalibrationTooSmall", "Coverage", "ProgramSetCalibrator", "ReferenceParseError", "choose_level", "k_errors"]

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from theodolite.core.binomial import allowed_errors, binomial_interval, needed_rows
from theodolite.core.errors import DataError, InputError
from theodolite.core.parallel import spread
from theodolite.predictions.program_sets.costs import Generation, node_costs
from theodolite.predictions.program_sets.membership import contains
from theodolite.predictions.program_sets.pruning import PartialProgram, check_grid, prune
from theodolite.predictions.program_sets.trees import (
    ProgramSyntaxError,
    parse_program,
    unparsed_program,
)

_LEVELS = np.linspace(1e-5, 1 - 1e-5, 25)

Contains = Callable[[PartialProgram, str], bool]


class CalibrationTooSmall(DataError):
    """Too few pairs for any promise. n: how many there are; needed: how many there must be at least."""

    def __init__(self, n: int, needed: int) -> None:
        self.n, self.needed = n, needed
        super().__init__(
            f"{n} pairs to calibrate on promise nothing at this epsilon and delta, even without an error; at least {needed} "
            "are needed: add pairs, or ask for a larger epsilon or delta"
        )


class ReferenceParseError(DataError):
    """A reference program does not parse. index: its place in the list."""

    def __init__(self, index: int, because: str) -> None:
        self.index = index
        super().__init__(f"the reference program number {index} cannot be used: {because}; correct it or leave it out")


@dataclass(frozen=True)
class Coverage:
    """How program sets do on pairs: the share of sets that hold the reference, with its exact 95 % interval, and what they
    cost. removed_fraction: mean share of a program's nodes that is removed (a hole at the root covers everything, so
    read it beside coverage). holes: mean number. n: pairs. unparsable: generations that did not parse, one hole each.
    """

    coverage: float
    removed_fraction: float
    holes: float
    ci95: tuple[float, float]
    n: int
    unparsable: int


def k_errors(n: int, epsilon: float, delta: float) -> int:
    """The most errors on n independent pairs that still promise an error rate <= epsilon with confidence 1 - delta.

    k = max {k : P(Binomial(n, epsilon) <= k) <= delta}. Raises CalibrationTooSmall where (1 - epsilon)^n > delta, InputError
    for epsilon or delta outside (0, 1). Source: Khakhar et al., 2023, arXiv:2302.08703, section 3.

    >>> k_errors(100, 0.1, 0.1), k_errors(500, 0.1, 0.1), k_errors(22, 0.1, 0.1)
    (5, 40, 0)
    """
    needed = needed_rows(epsilon, delta)
    k = allowed_errors(n, epsilon, delta) if n > 0 else None
    if k is None:
        raise CalibrationTooSmall(n, needed)
    return k


def choose_level(errors: Bool[np.ndarray, "pair level"], epsilon: float, delta: float) -> int:
    """The smallest level from which on no level has more than k errors; the number of levels where there is none.

    errors: whether the set of a pair at a level of the ascending grid misses the reference. This tests the levels from the
    largest set down and stops at the first that fails, so it is sound for any family of sets that was fixed beforehand; where
    sets are nested, errors only fall along the grid, and it is the smallest level with at most k errors.
    """
    bad = errors.sum(axis=0) > k_errors(len(errors), epsilon, delta)
    return int(np.flatnonzero(bad)[-1]) + 1 if bad.any() else 0


class ProgramSetCalibrator(BaseEstimator):
    """Turns programs that a model generates into partial programs with a promise (PAC prediction sets).

        tau = min {tau in the grid : errors(tau') <= k(n, epsilon, delta) for all tau' >= tau}

    With probability 1 - delta over n independent calibration pairs, the partial programs of `predict` hold the right program
    for at least a share 1 - epsilon of later prompts from the same source. The promise refers to ``match``.

    max_holes, solver: as in `prune`. tau_grid: ascending in (0, 1), chosen before any error is seen; 25 levels from 1e-5 to
    1 - 1e-5 where None. match: "structural", "official" (see `contains`) or a function of (partial program, reference text)
    that says whether the set is right, such as "a completion passes the tests", for which references may be any text.
    cost: as in `node_costs`. on_unparsable: "root-hole" (a generation that does not parse is one hole) or "raise".
    executor: what `fit`, `score` and `families` spread the programs over, as in `spread`; the sets are the same.

    Learned: tau_ (1.0 where only holes at the root keep the promise), k_, errors_ (levels,), n_, unparsable_.

    Source: Khakhar, Mell, Bastani, 2023, arXiv:2302.08703, algorithm 1.
    """

    def __init__(
        self,
        max_holes: int | None = 3,
        tau_grid: Sequence[float] | None = None,
        solver: str = "auto",
        match: str | Contains = "structural",
        cost: str = "split",
        *,
        language: str = "python",
        dialect: str | None = None,
        hole_arity: str = "one",
        on_unparsable: str = "root-hole",
        executor: Executor | int | None = None,
    ) -> None:
        self.max_holes = max_holes
        self.tau_grid = tau_grid
        self.solver = solver
        self.match = match
        self.cost = cost
        self.language = language
        self.dialect = dialect
        self.hole_arity = hole_arity
        self.on_unparsable = on_unparsable
        self.executor = executor

    def fit(
        self, generations: Sequence[Generation], references: Sequence[str], epsilon: float = 0.1, delta: float = 0.1
    ) -> "ProgramSetCalibrator":
        """Choose tau on pairs of what the model wrote and the right program, one for each of independent prompts.

        Raises CalibrationTooSmall, ReferenceParseError, InputError (epsilon or delta outside (0, 1), other lengths, options),
        what `node_costs` raises, and ProgramSyntaxError with on_unparsable "raise".
        """
        grid = self._grid()
        k = k_errors(len(generations), epsilon, delta)
        right = self._right(generations, references)
        families = self.families(generations)
        errors = self._errors(families, right)
        level = choose_level(errors, epsilon, delta)
        self.tau_ = float(grid[level]) if level < len(grid) else 1.0
        self.k_, self.n_ = k, len(errors)
        self.errors_ = errors.sum(axis=0)
        self.unparsable_ = sum(family[0].tree.unparsed for family in families)
        return self

    def predict(self, generation: Generation) -> PartialProgram:
        """The partial program of one generation at the chosen tau."""
        self._check_fitted()
        return self._chosen(_family(generation, **self._how()))

    def score(self, generations: Sequence[Generation], references: Sequence[str]) -> Coverage:
        """Coverage and size of the sets on pairs that were not calibrated on. Raises as `fit`."""
        self._check_fitted()
        if not len(generations):
            raise InputError("need at least one pair to score")
        truth = self._right(generations, references)
        sets = [self._chosen(family) for family in self.families(generations)]
        right = int((~self._errors([[one] for one in sets], truth)).sum())
        n = len(sets)
        return Coverage(
            right / n,
            float(np.mean([one.removed_fraction for one in sets])),
            float(np.mean([len(one.holes) for one in sets])),
            binomial_interval(right, n),
            n,
            sum(one.tree.unparsed for one in sets),
        )

    def families(self, generations: Sequence[Generation]) -> list[list[PartialProgram]]:
        """The partial programs of each generation at every level of the grid."""
        make = partial(_family, **self._how())
        return spread(make, [(generation,) for generation in generations], executor=self.executor)

    def errors(
        self, families: Sequence[Sequence[PartialProgram]], references: Sequence[str]
    ) -> Bool[np.ndarray, "pair level"]:
        """Whether each partial program of each pair's family misses the pair's reference."""
        return self._errors(families, self._right(families, references))

    def _right(self, pairs: Sequence[Any], references: Sequence[str]) -> list[Any]:
        """The references as `match` takes them, after a check that each of ``pairs`` has one; before any work starts."""
        if len(pairs) != len(references):
            raise InputError(
                f"need one reference a generation, got {len(pairs)} generations and {len(references)} references"
            )
        if callable(self.match):
            return list(references)
        trees = []
        for index, reference in enumerate(references):
            try:
                trees.append(parse_program(reference, self.language, self.dialect))
            except ProgramSyntaxError as error:
                raise ReferenceParseError(index, str(error)) from error
        return trees

    def _errors(
        self, families: Sequence[Sequence[PartialProgram]], right: Sequence[Any]
    ) -> Bool[np.ndarray, "pair level"]:
        match = self.match
        rows = []
        for family, truth in zip(families, right, strict=True):
            known: dict[bytes, bool] = {}  # neighbouring levels often keep the same nodes
            row = []
            for one in family:
                key = one.kept.tobytes()
                if key not in known:
                    known[key] = (
                        bool(match(one, truth))
                        if callable(match)
                        else contains(one, truth, match, hole_arity=self.hole_arity)
                    )
                row.append(not known[key])
            rows.append(row)
        return np.array(rows, dtype=bool)

    def _grid(self) -> np.ndarray:
        return check_grid(_LEVELS if self.tau_grid is None else self.tau_grid)

    def _check_fitted(self) -> None:
        if not hasattr(self, "tau_"):
            raise NotFittedError("this calibrator has no tau yet; call fit first")

    def _how(self) -> dict[str, Any]:
        """What `_family` needs beside the generation."""
        if self.on_unparsable not in ("root-hole", "raise"):
            raise InputError(f'on_unparsable must be "root-hole" or "raise", got {self.on_unparsable!r}')
        return {
            "grid": self._grid(),
            "max_holes": self.max_holes,
            "solver": self.solver,
            "cost": self.cost,
            "language": self.language,
            "dialect": self.dialect,
            "refuse": self.on_unparsable == "raise",
        }

    def _chosen(self, family: Sequence[PartialProgram]) -> PartialProgram:
        """The member of a family at the chosen tau."""
        if self.tau_ == 1.0:
            tree = family[0].tree
            return PartialProgram(tree, np.zeros(len(tree), dtype=bool), 0.0)
        return family[int(np.searchsorted(self._grid(), self.tau_))]


def _family(
    generation: Generation,
    grid: Float[np.ndarray, " level"],
    max_holes: int | None,
    solver: str,
    cost: str,
    language: str,
    dialect: str | None,
    refuse: bool,
) -> list[PartialProgram]:
    """The partial programs of one generation; one that does not parse is a hole, or refused."""
    try:
        tree = parse_program(generation.text, language, dialect)
    except ProgramSyntaxError:
        if refuse:
            raise
        hole = PartialProgram(unparsed_program(generation.text, language), np.zeros(1, dtype=bool), 0.0)
        return [hole] * len(grid)
    return prune(tree, node_costs(tree, generation.tokens, cost), grid, max_holes, solver)
