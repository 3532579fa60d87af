"""Inference algorithms as chains of valid arrows: importance sampling, SMC, trace MCMC, resample-move SMC, PMMH, SMC^2.

The functions that end in ``_program`` are the algorithms themselves: they map a program to a program, which any base can run,
an enumerating one too. The others draw, and hand back what was drawn.
"""

__all__ = [
    "Chain",
    "Particles",
    "collapse",
    "importance",
    "mcmc",
    "mcmc_program",
    "pmmh",
    "pmmh_program",
    "pooled_log_evidence",
    "rmsmc",
    "rmsmc_program",
    "smc",
    "smc2",
    "smc_program",
]

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from theodolite.core.errors import InputError
from theodolite.core.estimate import Estimate
from theodolite.predictions.inference.bases import Base, Sampler
from theodolite.predictions.inference.population import RESAMPLERS, Particle, Population, Weighted, push
from theodolite.predictions.inference.program import (
    Bind,
    DegeneratePopulation,
    Factor,
    InferenceWarning,
    NoValidStart,
    Program,
    Ret,
    Untraced,
)
from theodolite.predictions.inference.representations import (
    Sequential,
    Suspended,
    Traced,
    TracedElement,
)

Rng = np.random.Generator | int
OnStep = Callable[[int, float], None]
_SMALL_ESS = 2.0
_SMALL_ACCEPTANCE = 0.01


@dataclass(frozen=True, eq=False)
class Particles:
    """A weighted population.

    values (n): a list, of `smc_array` an array. log_weights (n,): unnormalised, so that their log-sum is log_evidence, the log
    of an unbiased estimate. ess: effective sample size, (sum w)^2 / sum w^2. ancestors (rounds, n): from which particle each
    came at each resampling; the particle itself where nothing was resampled.
    """

    values: Any
    log_weights: Float[np.ndarray, " particle"]
    log_evidence: float
    ess: float
    ancestors: Int[np.ndarray, "round particle"]

    @property
    def weights(self) -> Float[np.ndarray, " particle"]:
        """Normalised weights."""
        return np.exp(self.log_weights - self.log_evidence)

    def expectation(self, f: Callable[[Any], float] = float) -> float:
        """Weighted mean of ``f`` of the values."""
        return float(self.weights @ np.array([float(f(value)) for value in self.values]))


@dataclass(frozen=True, eq=False)
class Chain:
    """States of a Markov chain, oldest first.

    samples and log_weights (kept,): value and log weight of the kept states. accepted (steps,): of every step, those of the
    burn-in among them. acceptance_rate: after the burn-in.
    """

    samples: list
    log_weights: Float[np.ndarray, " kept"]
    accepted: Bool[np.ndarray, " step"]
    acceptance_rate: float

    def expectation(self, f: Callable[[Any], float] = float) -> float:
        """Mean of ``f`` of the samples."""
        return float(np.mean([float(f(value)) for value in self.samples]))


def pooled_log_evidence(runs: Sequence[Particles]) -> Estimate:
    """Log of the mean of the evidence estimates of independent runs, with its Student interval, in nats.

    The estimates are unbiased on the linear scale, so that is where they are averaged.
    """
    logs = np.array([run.log_evidence for run in runs])
    if len(logs) < 2:
        raise InputError(f"the spread of evidence needs at least two runs, got {len(logs)}")
    ratios = np.exp(logs - logs.max())
    mean = float(ratios.mean())
    half = float(stats.t.ppf(0.975, len(logs) - 1) * ratios.std(ddof=1) / math.sqrt(len(logs)))
    low = math.log(mean - half) if mean > half else -math.inf
    shift = float(logs.max())
    return Estimate(shift + math.log(mean), shift + low, shift + math.log(mean + half), "nats", len(logs))


# ---- algorithms as programs


def collapse(population: Program) -> Program:
    """The measure of a program that gives a population: one particle by weight, the sum of weights as a factor.

    >>> from theodolite.predictions.inference import enumerate_exact, sprinkler
    >>> found = enumerate_exact(collapse(smc_program(sprinkler(), particles=2)))
    >>> found.difference(enumerate_exact(sprinkler())) < 1e-12
    True
    """
    return Population(Base()).collapse(population)


def check_options(steps: int | None, resampler: str, ess_threshold: float) -> float:
    """The number of steps as a float; raises where an option is not among what is possible."""
    if resampler not in RESAMPLERS:
        raise InputError(f"resampler must be one of {', '.join(RESAMPLERS)}, got {resampler!r}")
    if not 0 <= ess_threshold <= 1:
        raise InputError(f"ess_threshold is a share of the particles in [0, 1], got {ess_threshold}")
    if steps is not None and steps < 0:
        raise InputError(f"steps must be at least 0, got {steps}")
    return math.inf if steps is None else steps


@dataclass
class _Watch:
    """What the drawing functions see of a run; nothing is watched where a program is enumerated."""

    on_step: OnStep | None = None
    ancestors: list[list[int]] = field(default_factory=list)
    step: int = 0

    def look(self, step: int, particles: Sequence[Particle]) -> None:
        """After ``step`` factors."""
        self.step = step
        logs = np.array([w for _, w in particles])
        if logs.max() == -math.inf:
            raise DegeneratePopulation(step)
        if self.on_step is not None:
            self.on_step(step, effective_size(logs))


def effective_size(logs: np.ndarray) -> float:
    """(sum w)^2 / sum w^2 of log weights."""
    weights = np.exp(logs - logs.max())
    return float(weights.sum() ** 2 / (weights @ weights))


@no_type_check
def smc_program(
    model: Program,
    *,
    particles: int,
    steps: int | None = None,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    watch: _Watch | None = None,
) -> Program:
    """SMC as a program that gives a population, a list of (value, log weight); `collapse` of it has the model's measure.

    sis(resample, steps) after hoist_first(spawn(particles) then .) on Sequential(Population(base)). steps: how often to
    resample and go on to the next factor; None: until no particle is suspended. A smaller number leaves the rest to weights.

    Source: Scibior et al., 2018, arXiv:1711.03219, section on sequential Monte Carlo.
    """
    limit = check_options(steps, resampler, ess_threshold)
    pop = Population(Base())
    seq = Sequential(pop)
    note = None if watch is None else watch.ancestors.append

    def resample(m: Program) -> Program:
        return pop.resample(m, resampler, ess_threshold=ess_threshold, on_ancestors=note)

    def loop(step: int, now: list[Particle]) -> Program:
        if watch is not None:
            watch.look(step, now)
        if step > limit or not any(isinstance(state, Suspended) for state, _ in now):
            return seq.finish(Ret(now))
        return Bind(seq.advance(seq.hoist_first(resample)(Ret(now))), lambda later: loop(step + 1, later))

    spawned = seq.hoist_first(lambda m: pop.bind(pop.spawn(particles), lambda _: m))(seq.of(model))
    return Bind(spawned, lambda now: loop(1, now))


def mcmc_program(model: Program, *, steps: int) -> Program:
    """Trace Metropolis-Hastings as a program: a weighted run, then ``steps`` moves that keep its measure."""
    traced = Traced(Base())
    m = traced.of(model)
    for _ in range(steps):
        m = traced.mh_step(m)
    return traced.marginal(m)


@no_type_check
def rmsmc_program(
    model: Program,
    *,
    particles: int,
    moves: int,
    freeze: bool = False,
    steps: int | None = None,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    watch: _Watch | None = None,
) -> Program:
    """Resample-move SMC as a program that gives a population.

    marginal after sis(mh_step^moves after hoist(resample), steps) after hoist_first(hoist(spawn(particles))) on
    Sequential(Traced(Population(base))). freeze: after the moves, what was drawn so far is fixed.
    """
    limit = check_options(steps, resampler, ess_threshold)
    if moves < 0:
        raise InputError(f"moves must be at least 0, got {moves}")
    pop = Population(Base())
    traced = Traced(pop)
    seq = Sequential(traced)
    note = None if watch is None else watch.ancestors.append

    def move(m: TracedElement) -> TracedElement:
        m = traced.hoist(lambda run: pop.resample(run, resampler, ess_threshold=ess_threshold, on_ancestors=note))(m)
        for _ in range(moves):
            m = traced.mh_step(m)
        return traced.freeze(m) if freeze else m

    def loop(step: int, m: TracedElement) -> Program:
        def decide(now: list[Particle]) -> Program:
            if watch is not None:
                watch.look(step, now)
            here = TracedElement(m.model, lambda: Ret(now))
            if step > limit or not any(isinstance(trace.output, Suspended) for trace, _ in now):
                return traced.marginal(seq.finish(here))
            return loop(step + 1, seq.advance(seq.hoist_first(move)(here)))

        return Bind(m.run, decide)

    spawn = traced.hoist(lambda run: pop.bind(pop.spawn(particles), lambda _: run))
    return loop(1, seq.hoist_first(spawn)(seq.of(model)))


@no_type_check
def pmmh_program(
    parameters: Program,
    model_of: Callable[[Any], Program],
    *,
    particles: int,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
) -> Program:
    """The program of the parameters alone: each is weighted by the evidence that an inner SMC estimates for its model.

    After each factor of ``model_of(theta)`` the inner population's evidence is pushed out as a factor of this program. The inner
    draws are `untraced`. Run by `mcmc` this is PMMH, run by `rmsmc` SMC^2; both are exact, since the estimate is unbiased.
    """
    check_options(None, resampler, ess_threshold)
    pop = Population(Base())
    seq = Sequential(pop)

    def resample(m: Program) -> Program:
        return pop.resample(m, resampler, ess_threshold=ess_threshold)

    def inner(theta: Any, run: Program) -> Program:
        return Bind(Untraced(run.map(push)), lambda pushed: score(theta, *pushed))

    def score(theta: Any, now: list[Particle], log_z: float) -> Program:
        if not any(isinstance(state, Suspended) for state, _ in now):
            return Bind(Factor(log_z), lambda _: Ret(theta))
        later = seq.advance(seq.hoist_first(resample)(Ret(now)))
        return Bind(Factor(log_z), lambda _: inner(theta, later))

    def spawned(theta: Any) -> Program:
        return inner(theta, pop.bind(pop.spawn(particles), lambda _: seq.of(model_of(theta))))

    return parameters.bind(spawned)


# ---- drawing


def _particles(population: Sequence[Particle], watch: _Watch, *, resamples: bool) -> Particles:
    logs = np.array([w for _, w in population], dtype=np.float64)
    watch.look(watch.step, population)
    values = [x for x, _ in population]
    ancestors = np.array(watch.ancestors, dtype=np.int64).reshape(-1, len(values))
    return checked(values, logs, ancestors, alone=resamples and len(ancestors) == 0)


def checked(values: Any, logs: np.ndarray, ancestors: np.ndarray, *, alone: bool = False) -> Particles:
    """Particles of unnormalised weights, with a warning where they are worth little."""
    largest = float(logs.max())
    log_evidence = largest + math.log(float(np.exp(logs - largest).sum()))
    ess = effective_size(logs)
    if alone:
        warnings.warn(
            "the program has at most one factor, so SMC never resampled and is importance sampling; split the factor into one an "
            "observation",
            InferenceWarning,
            stacklevel=3,
        )
    if ess < _SMALL_ESS <= len(logs):
        warnings.warn(
            f"the effective sample size is {ess:.2f} of {len(logs)} particles at the end, so one particle is nearly all of the "
            "answer; use more particles, smaller factors, or rmsmc",
            InferenceWarning,
            stacklevel=3,
        )
    return Particles(values, logs, log_evidence, ess, ancestors)


def importance(model: Program, n: int, rng: Rng, *, on_step: OnStep | None = None) -> Particles:
    """n weighted runs of a program: the plainest inference, and the control of every other one.

    Raises `DegeneratePopulation` where no run has a positive weight.
    """
    pop = Population(Base())
    population = Sampler(rng).run(pop.bind(pop.spawn(n), lambda _: pop.of(model)))
    return _particles(population, _Watch(on_step), resamples=False)


def smc(
    model: Program,
    *,
    particles: int,
    steps: int | None = None,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    rng: Rng,
    on_step: OnStep | None = None,
) -> Particles:
    """Sequential Monte Carlo: particles that are resampled after each factor but the last; cost linear in particles x factors.

    steps: resamplings, None for as many as the program asks for. resampler: "multinomial", "stratified" or "systematic".
    ess_threshold: resample only where the effective sample size is at most this share of the particles. on_step(factors so far,
    effective sample size) is called after each factor. Raises `DegeneratePopulation` where all weights are zero; warns where
    the program has at most one factor, or where the effective sample size ends below 2.

    >>> from theodolite.predictions.inference import hmm
    >>> round(smc(hmm(), particles=500, rng=0).log_evidence)
    -45
    """
    watch = _Watch(on_step)
    chain = smc_program(
        model, particles=particles, steps=steps, resampler=resampler, ess_threshold=ess_threshold, watch=watch
    )
    return _particles(Sampler(rng).run(chain), watch, resamples=steps != 0)


def rmsmc(
    model: Program,
    *,
    particles: int,
    moves: int,
    freeze: bool = False,
    steps: int | None = None,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    rng: Rng,
    on_step: OnStep | None = None,
) -> Particles:
    """SMC that moves each particle by ``moves`` Metropolis-Hastings steps after each resampling; for static parameters.

    A move runs the program up to the present factor again, so cost grows with the square of the factors; with ``freeze`` only
    draws made since the last resampling are moved, and it is linear. Otherwise as `smc`.
    """
    watch = _Watch(on_step)
    chain = rmsmc_program(
        model, particles=particles, moves=moves, freeze=freeze, steps=steps, resampler=resampler,
        ess_threshold=ess_threshold, watch=watch,
    )  # fmt: skip
    return _particles(Sampler(rng).run(chain), watch, resamples=steps != 0)


def mcmc(
    model: Program,
    *,
    steps: int,
    burn_in: int = 0,
    thin: int = 1,
    rng: Rng,
    init_tries: int = 1000,
    on_step: OnStep | None = None,
) -> Chain:
    """Single-site Metropolis-Hastings over the uniforms of a run, for programs of any structure; a step costs one run.

    steps: all steps; the first ``burn_in`` are dropped, and of the rest every ``thin``-th is kept, the newest among them.
    init_tries: runs of the program to find a start of positive weight, `NoValidStart` where none is found. Warns where fewer
    than one step in a hundred is accepted. on_step(step, acceptance so far) is called after each step.
    """
    if not 0 <= burn_in < steps or thin < 1 or init_tries < 1:
        raise InputError(
            f"needs 0 <= burn_in < steps, thin >= 1 and init_tries >= 1, got steps={steps}, burn_in={burn_in}, thin={thin}, "
            f"init_tries={init_tries}"
        )
    base = Sampler(rng)
    traced = Traced(Weighted(base))
    start = traced.of(model)
    for _ in range(init_tries):
        trace, logw = base.run(start.run)
        if logw > -math.inf:
            break
    else:
        raise NoValidStart(
            f"none of {init_tries} runs of the program had a positive weight, so there is nowhere to start; soften the "
            "conditions, use smc, or raise init_tries"
        )
    accepted = np.zeros(steps, dtype=bool)
    kept = set(range(steps - 1, burn_in - 1, -thin))
    samples, logs, taken = [], [], 0
    for step in range(steps):
        trace, accepted[step] = base.run(traced.transition(start.model, trace))
        taken += int(accepted[step])
        if step in kept:
            samples.append(trace.output)
            logs.append(trace.logp)
        if on_step is not None:
            on_step(step + 1, taken / (step + 1))
    rate = float(accepted[burn_in:].mean())
    if rate < _SMALL_ACCEPTANCE:
        warnings.warn(
            f"the chain accepted {int(accepted[burn_in:].sum())} of {steps - burn_in} steps, so its samples are nearly all the "
            "same; use smc or rmsmc, or write the program with fewer draws a factor",
            InferenceWarning,
            stacklevel=2,
        )
    return Chain(samples, np.array(logs, dtype=np.float64), accepted, rate)


def pmmh(
    parameters: Program,
    model_of: Callable[[Any], Program],
    *,
    steps: int,
    particles: int,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    burn_in: int = 0,
    thin: int = 1,
    rng: Rng,
    init_tries: int = 1000,
    on_step: OnStep | None = None,
) -> Chain:
    """Particle marginal Metropolis-Hastings: a chain over parameters, the likelihood of each estimated by an inner SMC.

    parameters: a program of theta. model_of(theta): a program with the factors; its value is not kept. samples are thetas.
    """
    marginal = pmmh_program(parameters, model_of, particles=particles, resampler=resampler, ess_threshold=ess_threshold)
    return mcmc(marginal, steps=steps, burn_in=burn_in, thin=thin, rng=rng, init_tries=init_tries, on_step=on_step)


def smc2(
    parameters: Program,
    model_of: Callable[[Any], Program],
    *,
    particles: int,
    inner_particles: int,
    moves: int = 1,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    rng: Rng,
    on_step: OnStep | None = None,
) -> Particles:
    """SMC^2: resample-move SMC over parameters, each with an inner SMC that takes one factor a step. values are thetas.

    Arguments as in `pmmh`. A move runs the inner SMC again from its start, so cost grows with the square of the factors.
    """
    marginal = pmmh_program(
        parameters, model_of, particles=inner_particles, resampler=resampler, ess_threshold=ess_threshold
    )
    return rmsmc(
        marginal,
        particles=particles,
        moves=moves,
        resampler=resampler,
        ess_threshold=ess_threshold,
        rng=rng,
        on_step=on_step,
    )
