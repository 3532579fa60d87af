"""The paper's theorem as a check: an algorithm is run over all its outcomes, and its measure compared with the program's."""

__all__ = ["ModelCheck", "ValidityReport", "mh_matrix", "validate"]

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import InputError
from theodolite.core.memory import DEFAULT_BUDGET
from theodolite.predictions.inference.bases import Base, Enumerator
from theodolite.predictions.inference.models import SUITE, Example
from theodolite.predictions.inference.program import Bind, EnumerationError, Program, Ret
from theodolite.predictions.inference.representations import Trace, Traced, mh_log_ratio


@dataclass(frozen=True)
class ModelCheck:
    """One program: its evidence, the algorithm's, and the largest difference of the unnormalised masses of any value."""

    name: str
    evidence: float
    algorithm_evidence: float
    difference: float


@dataclass(frozen=True)
class ValidityReport:
    """What `validate` found; true where every difference is at most atol."""

    checks: tuple[ModelCheck, ...]
    atol: float

    @property
    def valid(self) -> bool:
        """Whether the algorithm keeps the measure of every program."""
        return self.difference <= self.atol

    @property
    def difference(self) -> float:
        """The largest difference."""
        return max(check.difference for check in self.checks)

    def __bool__(self) -> bool:
        return self.valid

    def __str__(self) -> str:
        lines = [
            f"{'valid' if self.valid else 'NOT valid'}: largest difference {self.difference:.3g}, allowed {self.atol:.3g}"
        ]
        lines += [
            f"  {c.name}: evidence {c.algorithm_evidence:.12g}, exactly {c.evidence:.12g}, difference {c.difference:.3g}"
            for c in self.checks
        ]
        return "\n".join(lines)


def validate(
    algorithm: Callable[[Program], Program], models: Iterable[Example | Program] = SUITE, atol: float = 1e-10
) -> ValidityReport:
    """Whether an algorithm keeps the unnormalised measure of small discrete programs, to machine precision.

    algorithm: maps a program to a program of its values, as ``lambda m: collapse(smc_program(m, particles=2))`` does. Both are
    enumerated and compared value by value, not after normalising, so that a wrong evidence shows. Work grows quickly with
    particles and draws: algorithms that move traces have room on the programs of a small grid only, `two_sync` and `coins`.

    >>> from theodolite.predictions.inference import mcmc_program
    >>> bool(validate(lambda m: mcmc_program(m, steps=1)))
    True
    """
    checks = []
    for i, one in enumerate(models):
        example = one if isinstance(one, Example) else Example(f"program {i}", one, 0)
        exact = Enumerator().run(example.model)
        ours = Enumerator(example.grid or None).run(algorithm(example.model))
        checks.append(
            ModelCheck(example.name, math.exp(exact.log_evidence), math.exp(ours.log_evidence), exact.difference(ours))
        )
    if not checks:
        raise InputError("there is no program to validate on; give at least one")
    return ValidityReport(tuple(checks), atol)


def mh_matrix(
    model: Program, grid: int, *, log_ratio: Callable[[float, int, float, int], float] = mh_log_ratio
) -> tuple[list[tuple[float, ...]], Float[np.ndarray, " trace"], Float[np.ndarray, "trace trace"]]:
    """All traces of a program on a grid of uniforms, their probabilities pi, and the matrix P of one Metropolis-Hastings step.

    Traces of weight zero are left out; no step leads there. The step is right where pi P = pi and pi_i P_ij = pi_j P_ji.
    Probabilities of the program must be multiples of 1 / grid (`GridMismatch`), and P must fit into 1 GiB, which 11,585 traces
    fill (`EnumerationError`). log_ratio: the acceptance rule to check.

    >>> traces, pi, P = mh_matrix(SUITE[2].model, 10)
    >>> len(traces), bool(np.abs(pi @ P - pi).max() < 1e-12)
    (730, True)
    """
    run, traced = Enumerator(grid), Traced(Base(), log_ratio=log_ratio)
    element = traced.of(model)

    def known(trace: Trace) -> Program:
        return Ret((trace.uniforms, trace.logp))

    found = run.run(Bind(element.run, known))
    if not found.values:
        raise InputError("no trace has a positive weight, so there is no chain")
    traces = [uniforms for uniforms, _ in found.values]
    if 8 * len(traces) ** 2 > DEFAULT_BUDGET:
        raise EnumerationError(
            f"the program has {len(traces):,} traces on a grid of {grid}, and the matrix of a step from each to each takes "
            f"{8 * len(traces) ** 2 / 2**30:.1f} GiB; take a coarser grid or a program of fewer draws"
        )
    place = {uniforms: i for i, uniforms in enumerate(traces)}
    pi = np.exp(found.log_weights - found.log_evidence)
    P = np.zeros((len(traces), len(traces)))
    for i, (uniforms, logp) in enumerate(found.values):
        step = traced.transition(element.model, Trace(uniforms, None, logp))
        row = run.run(Bind(step, lambda moved: Ret(moved[0].uniforms)))
        for value, w in zip(row.values, row.log_weights.tolist()):
            P[i, place[value]] = math.exp(w)
    return traces, pi, P
