"""Programs with known answers: the suite that algorithms are checked on, and the recalibration of a classifier."""

__all__ = [
    "HMM_OBSERVATIONS",
    "SUITE",
    "Example",
    "branching_sprinkler",
    "coins",
    "hmm",
    "hmm_log_evidence",
    "recalibration",
    "sprinkler",
    "two_sync",
]

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np

from theodolite.core.errors import DataError, InputError
from theodolite.predictions.inference.bases import log_sum
from theodolite.predictions.inference.distributions import bernoulli, beta, categorical, gamma, normal, uniform_discrete
from theodolite.predictions.inference.program import Program, factor, program, scan

HMM_OBSERVATIONS = (0.9, 0.8, 0.7, 0.0, -0.025, -5.0, -2.0, -0.1, 0.0, 0.13, 0.45, 6.0, 0.2, 0.3, -1.0, -1.0)
_ROWS = ((0.1, 0.4, 0.5), (0.2, 0.6, 0.2), (0.15, 0.7, 0.15))
_MEANS = (-1.0, 1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Example:
    """A small discrete program by name; on a grid of ``grid`` cells its uniforms are exact."""

    name: str
    model: Program
    grid: int


@program
def sprinkler() -> Generator[Any, Any, bool]:
    """Rain, given wet grass, with soft evidence: evidence 0.5026."""
    rain = yield bernoulli(0.3)
    if rain:
        yield factor(math.log(0.2))
    on = yield bernoulli(0.1 if rain else 0.4)
    if on:
        yield factor(math.log(0.1))
    return rain


@program
def branching_sprinkler() -> Generator[Any, Any, tuple[bool, bool]]:
    """As `sprinkler`, with one draw more where there is no rain, so that runs differ in length: evidence 0.3906."""
    rain = yield bernoulli(0.3)
    if rain:
        yield factor(math.log(0.2))
    else:
        x = yield bernoulli(0.5)
        if x:
            yield factor(math.log(0.5))
    on = yield bernoulli(0.1 if rain else 0.4)
    if on:
        yield factor(math.log(0.1))
    return rain, on


@no_type_check
def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


@program
def two_sync() -> Generator[Any, Any, int]:
    """Two draws of 0 or 1, each weighted by itself, so that half of the runs die at the first: evidence 1/4, value 2."""
    x = yield uniform_discrete(2)
    yield factor(_log(x))
    y = yield uniform_discrete(2)
    yield factor(_log(y))
    return x + y


@program
def coins() -> Generator[Any, Any, tuple[bool, bool]]:
    """Fair coins, the second only after a head, with uneven factors: small enough for enumerated moves of two particles."""
    first = yield bernoulli(0.5)
    yield factor(math.log(0.8 if first else 0.3))
    second = (yield bernoulli(0.5)) if first else False
    yield factor(math.log(0.6 if second else 0.1))
    return first, second


SUITE = (
    Example("sprinkler", sprinkler(), 10),
    Example("two_sync", two_sync(), 2),
    Example("branching_sprinkler", branching_sprinkler(), 10),
    Example("coins", coins(), 2),
)


@no_type_check
def hmm(observations: Sequence[float] = HMM_OBSERVATIONS) -> Program:
    """The last state of a hidden Markov model of three states; a transition precedes every observation, of unit variance."""
    rows = [categorical(row) for row in _ROWS]
    noise = [normal(mean, 1.0) for mean in _MEANS]

    def step(state: int, y: float) -> Program:
        return rows[state].bind(lambda new: factor(noise[new].log_prob(y)).map(lambda _: new))

    return uniform_discrete(3).bind(lambda state: scan(step, state, observations))


def hmm_log_evidence(observations: Sequence[float] = HMM_OBSERVATIONS) -> float:
    """Log evidence of `hmm` by the forward algorithm.

    >>> round(hmm_log_evidence(), 6)
    -44.685842
    """
    noise = [normal(mean, 1.0) for mean in _MEANS]
    logs = [-math.log(3)] * 3
    for y in observations:
        moved = [log_sum([logs[i] + math.log(_ROWS[i][j]) for i in range(3)]) for j in range(3)]
        logs = [moved[j] + noise[j].log_prob(y) for j in range(3)]
    return log_sum(logs)


def recalibration(log_probabilities: Any, labels: Any, *, blocks: int = 8) -> Program:
    """(temperature, lapse rate) of a classifier, given its held-out log-probabilities (n, classes) and the labels (n,).

    The probability of class c is (1 - lapse) softmax(log p / temperature)_c + lapse / classes, with temperature ~ gamma(2, 1)
    and lapse ~ beta(1, 20). A temperature above 1 says that the classifier is over-confident. The rows come in ``blocks``
    factors, so that particles can be resampled between them. Labels are the columns of the classes, 0, 1, ...

    Raises DataError for log-probabilities that are not finite, and for labels that are no columns of them.
    """
    scores, own_class = np.asarray(log_probabilities, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or own_class.shape != scores.shape[:1] or not np.isfinite(scores).all():
        raise DataError(
            f"needs finite log-probabilities (rows, classes), one row a label, got {scores.shape}, {own_class.shape}"
        )
    if (
        len(scores) == 0
        or own_class.dtype.kind not in "iu"
        or own_class.min() < 0
        or own_class.max() >= scores.shape[1]
    ):
        raise DataError(f"needs rows, and labels that are whole numbers from 0 to {scores.shape[1] - 1}")
    if blocks < 1:
        raise InputError(f"needs at least one block of rows, got {blocks}")
    parts = [
        (part, scores[part, own_class[part]])
        for part in np.array_split(np.arange(len(scores)), min(blocks, len(scores)))
    ]
    shifted = [(scores[part] - own[:, None]) for part, own in parts]

    @no_type_check
    def score(theta: tuple[float, float], gaps: np.ndarray) -> Program:
        temperature, lapse = theta
        with np.errstate(over="ignore"):
            own = 1 / np.exp(gaps / temperature).sum(axis=1)
        likelihood = np.log((1 - lapse) * own + lapse / scores.shape[1] + 1e-300).sum()
        return factor(float(likelihood)).map(lambda _: theta)

    @no_type_check
    def both(temperature: float) -> Program:
        return beta(1, 20).map(lambda lapse: (temperature, lapse))

    return gamma(2, 1).bind(both).bind(lambda theta: scan(score, theta, shifted))
