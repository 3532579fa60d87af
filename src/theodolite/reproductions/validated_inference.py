"""Claims of Scibior et al., 2018, arXiv:1711.03219: theorems to machine precision, and samplers against closed forms."""

__all__ = ["NILE", "claims", "kalman"]

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np

from theodolite.core.estimate import Estimate, bootstrap, mean_of_runs
from theodolite.predictions.inference import (
    SUITE,
    Population,
    Program,
    Sampler,
    Sequential,
    Traced,
    Weighted,
    bernoulli,
    beta,
    branching_sprinkler,
    enumerate_exact,
    factor,
    gamma,
    hmm,
    hmm_log_evidence,
    importance,
    mcmc,
    mh_log_ratio,
    mh_matrix,
    normal,
    pmmh,
    rmsmc,
    scan,
    smc,
    smc2,
    sprinkler,
    uniform,
    uniform_discrete,
    validate,
)
from theodolite.predictions.inference.bases import Base
from theodolite.reproductions.claim import Claim, Comparator, Scale

NILE = (
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
    831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759,
    781, 865, 845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890,
    744, 749, 838, 1050, 918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
)  # fmt: skip
"""Annual flow of the Nile at Aswan, 1871 to 1970, in 10^8 cubic metres."""
_FLOW_SD, _LEVEL_SD, _START = 122.9, 38.3, (1000.0, 200.0)
_NONE_GIVEN = "none given (the paper proves, it does not measure)"
_RAIN = 0.3 * 0.2 * 0.91 / 0.5026
_NOT_SCALED = "Not scaled."


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; when quick, the samplers' ones have fewer runs."""
    yield _enumeration()
    yield _smc_valid()
    yield _mh_valid()
    yield _unbiased(scale, seed)
    yield _accurate(scale, seed)
    yield _resample_move(scale, seed)
    yield _one_suite(scale, seed)
    yield _stack_safe(seed)


# ---- theorems


def _enumeration() -> Claim:
    found = enumerate_exact(sprinkler())
    off = max(abs(math.exp(found.log_evidence) - 0.5026), abs(found.probabilities()[True] - _RAIN))
    return Claim(
        "enumeration is exact (sprinkler with soft evidence: evidence and P(rain))", _NONE_GIVEN,
        Estimate.exact(off, "absolute error"), "< 1e-12", off < 1e-12, scaled=_NOT_SCALED,
    )  # fmt: skip


def _smc_by_hand(model: Program, *, reset: bool) -> Program:
    """collapse after finish after (advance after resample)^2 after spawn 2; reset: with weights 1/n after resampling."""
    pop = Population(Base())
    seq = Sequential(pop)

    def resample(m: Program) -> Program:
        drawn = pop.resample(m, "multinomial")
        return drawn.map(lambda ps: [(x, -math.log(len(ps))) for x, _ in ps]) if reset else drawn

    m = seq.hoist_first(lambda run: pop.bind(pop.spawn(2), lambda _: run))(seq.of(model))
    for _ in range(2):
        m = seq.advance(seq.hoist_first(resample)(m))
    return pop.collapse(seq.finish(m))


def _smc_valid() -> Claim:
    models = SUITE[:3]
    right = validate(lambda m: _smc_by_hand(m, reset=False), models)
    wrong = validate(lambda m: _smc_by_hand(m, reset=True), models)
    least = min(check.difference for check in wrong.checks)
    return Claim(
        "SMC keeps the unnormalised measure (two particles, two multinomial resamplings, on three programs, all outcomes)",
        "Theorem: SMC is a valid inference transformation", Estimate.exact(right.difference, "largest difference"),
        "< 1e-12, and > 0.05 on each program where weights are wrongly reset to 1/n",
        right.difference < 1e-12 and least > 0.05,
        Comparator("weights reset to 1/n, the program where it shows least", least), _NOT_SCALED,
    )  # fmt: skip


def _mh_valid() -> Claim:
    def residual(rule: Callable[[float, int, float, int], float]) -> tuple[int, float, float]:
        traces, pi, P = mh_matrix(branching_sprinkler(), 10, log_ratio=rule)
        flow = pi[:, None] * P
        return len(traces), float(np.abs(pi @ P - pi).max()), float(np.abs(flow - flow.T).max())

    def without_lengths(logp: float, n: int, new_logp: float, new_n: int) -> float:
        return mh_log_ratio(logp, 1, new_logp, 1)

    count, off, unbalanced = residual(mh_log_ratio)
    _, wrong, _ = residual(without_lengths)
    worst = max(off, unbalanced)
    return Claim(
        f"trace Metropolis-Hastings keeps the posterior, in detailed balance, while traces change length ({count} traces)",
        "Theorem: Metropolis-Hastings-Green over traces is valid", Estimate.exact(worst, "largest residual"),
        "< 1e-12 with 730 traces, and > 1e-4 without the ratio of lengths",
        count == 730 and worst < 1e-12 and wrong > 1e-4,
        Comparator("acceptance without the ratio of lengths", wrong), _NOT_SCALED,
    )  # fmt: skip


# ---- samplers on the hidden Markov model


def _seeds(seed: int, topic: int, n: int) -> list[np.random.Generator]:
    return [np.random.default_rng(child) for child in np.random.SeedSequence([seed, topic]).spawn(n)]


def _unbiased(scale: Scale, seed: int) -> Claim:
    runs = 200 if scale is Scale.FULL else 100
    exact = hmm_log_evidence()
    ratios = np.exp([smc(hmm(), particles=100, rng=rng).log_evidence - exact for rng in _seeds(seed, 1, runs)])
    error = float(ratios.std(ddof=1) / math.sqrt(runs))
    return Claim(
        "SMC's evidence is unbiased (hidden Markov model, 16 observations, 100 particles)", "a consequence of its theorem",
        mean_of_runs(ratios, unit="of the exact evidence"), "mean within 4 standard errors of 1",
        abs(float(ratios.mean()) - 1) <= 4 * error,
        Comparator("exp of the mean log evidence, which is biased", float(np.exp(np.log(ratios).mean()))),
        f"{runs} runs; exact by the forward algorithm.",
    )  # fmt: skip


def _accurate(scale: Scale, seed: int) -> Claim:
    runs = 20 if scale is Scale.FULL else 6
    exact = hmm_log_evidence()
    ours = np.array([smc(hmm(), particles=2000, rng=rng).log_evidence for rng in _seeds(seed, 2, runs)]) - exact
    plain = np.array([importance(hmm(), 2000, rng).log_evidence for rng in _seeds(seed, 3, runs)]) - exact
    rmse, other = (float(np.sqrt((x**2).mean())) for x in (ours, plain))
    return Claim(
        "SMC is accurate (hidden Markov model, 2,000 particles: root mean squared error of the log evidence)", _NONE_GIVEN,
        bootstrap(ours, lambda x: float(np.sqrt((x**2).mean())), seed=seed, unit="nats"),
        "every run within 0.30, RMSE <= 0.12, and at most half of importance sampling's",
        bool(np.abs(ours).max() < 0.30 and rmse <= 0.12 and other >= 2 * rmse),
        Comparator("importance sampling with as many runs of the program", other),
        f"{runs} runs; the farthest is {np.abs(ours).max():.2f} nats off.",
    )  # fmt: skip


# ---- resample-move


def _flips(heads: list[bool], prior: Program) -> Program:
    """A coin of unknown bias, weighted by each flip."""
    return prior.bind(lambda p: scan(lambda q, head: factor(math.log(q if head else 1 - q)).map(lambda _: q), p, heads))


def _resample_move(scale: Scale, seed: int) -> Claim:
    runs = 100 if scale is Scale.FULL else 10
    heads = (np.random.default_rng([seed, 4]).random(50) < 0.7).tolist()
    exact = (1 + sum(heads)) / 52
    model = _flips(heads, uniform())
    ours = [rmsmc(model, particles=100, moves=1, rng=rng) for rng in _seeds(seed, 5, runs)]
    plain = [smc(model, particles=100, rng=rng) for rng in _seeds(seed, 6, runs)]
    errors = np.array([[one.expectation() - exact for one in pair] for pair in zip(ours, plain)])
    unique = [float(np.mean([len(set(one.values)) for one in group])) for group in (ours, plain)]

    def ratio(pairs: np.ndarray) -> float:
        rmse = np.sqrt((pairs**2).mean(axis=0))
        return float(rmse[0] / rmse[1])

    found = bootstrap(errors, ratio, seed=seed, unit="RMSE of the posterior mean / SMC's")
    return Claim(
        "resample-move beats SMC on a static parameter (bias of a coin, 50 flips, 100 particles, one move)",
        "motivates resample-move SMC; no number", found, "<= 0.5, and at least 5 times as many different values",
        found.value <= 0.5 and unique[0] >= 5 * unique[1],
        Comparator("SMC's own RMSE", float(np.sqrt((errors[:, 1] ** 2).mean()))),
        f"{runs} runs; {unique[0]:.0f} different values against {unique[1]:.1f}; exact by the beta posterior.",
    )  # fmt: skip


# ---- one suite for all; its programs run once a draw, so their annotations are not checked at run time


def kalman(flows: tuple[int, ...], level_sd: float) -> tuple[float, float]:
    """(mean of the last level, log evidence) of the local level model, whose level moves before every flow."""
    mean, variance, log_evidence = _START[0], _START[1] ** 2, 0.0
    for y in flows:
        variance += level_sd**2
        total = variance + _FLOW_SD**2
        log_evidence -= 0.5 * ((y - mean) ** 2 / total + math.log(2 * math.pi * total))
        mean, variance = mean + variance / total * (y - mean), variance * _FLOW_SD**2 / total
    return mean, log_evidence


@no_type_check
def _local_level(flows: tuple[int, ...], level_sd: float) -> Program:
    def step(level: float, y: int) -> Program:
        return normal(level, level_sd).bind(lambda new: factor(normal(new, _FLOW_SD).log_prob(y)).map(lambda _: new))

    return normal(*_START).bind(lambda level: scan(step, level, flows))


@dataclass(frozen=True, eq=False)
class _Case:
    """A program with the exact mean of its value, the prior's, and the same split for PMMH and SMC^2 with their exact mean."""

    model: Program
    exact: float
    prior: float
    parameters: Program
    model_of: Callable[[Any], Program]
    exact_parameter: float
    prior_parameter: float


@no_type_check
def _cases() -> dict[str, _Case]:
    heads = [True, True, False, True, True, False, True, True]
    bias = (2 + sum(heads)) / (4 + len(heads))
    numbers = [1.2, -0.4, 0.8, 1.9, 0.5, 1.1]
    middle = sum(numbers) / (1 + len(numbers))
    precision = (2 + len(numbers) / 2) / (2 + sum(y * y for y in numbers) / 2)
    flows, sds = NILE[:10], (10.0, 40.0, 160.0)
    evidence = np.exp([kalman(flows, sd)[1] - kalman(flows, 40.0)[1] for sd in sds])
    sd = float(evidence @ np.array(sds) / evidence.sum())

    def weigh(mean: float, noise: float) -> Program:
        return scan(lambda m, y: factor(normal(m, noise).log_prob(y)).map(lambda _: m), mean, numbers)

    def noisy(m: float, y: float) -> Program:
        return normal(m, 0.6).bind(lambda x: factor(normal(x, 0.8).log_prob(y)).map(lambda _: m))

    def hidden(mean: float) -> Program:
        return scan(noisy, mean, numbers)

    def flipped(p: float) -> Program:
        return scan(lambda q, head: factor(math.log(q if head else 1 - q)).map(lambda _: q), p, heads)

    def by_precision(tau: float) -> Program:
        return weigh(0.0, tau**-0.5).map(lambda _: tau)

    return {
        "Beta-Bernoulli": _Case(_flips(heads, beta(2, 2)), bias, 0.5, beta(2, 2), flipped, bias, 0.5),
        "Normal-Normal": _Case(
            normal(0, 1).bind(lambda m: weigh(m, 1.0)), middle, 0.0, normal(0, 1), hidden, middle, 0.0
        ),
        "Gamma-Normal": _Case(
            gamma(2, 0.5).bind(by_precision), precision, 1.0, gamma(2, 0.5), by_precision, precision, 1.0
        ),
        "Nile": _Case(
            _local_level(flows, 40.0), kalman(flows, 40.0)[0], _START[0],
            uniform_discrete(sds), lambda one: _local_level(flows, one), sd, float(np.mean(sds)),
        ),
    }  # fmt: skip


def _algorithms(size: int) -> dict[str, Callable[[_Case, np.random.Generator], float]]:
    def of_smc(resampler: str) -> Callable[[_Case, np.random.Generator], float]:
        return lambda case, rng: smc(case.model, particles=2 * size, resampler=resampler, rng=rng).expectation()

    return {
        "importance": lambda case, rng: importance(case.model, 4 * size, rng).expectation(),
        **{f"smc, {name}": of_smc(name) for name in ("multinomial", "stratified", "systematic")},
        "mcmc": lambda case, rng: mcmc(case.model, steps=10 * size, burn_in=size, rng=rng).expectation(),
        "rmsmc": lambda case, rng: rmsmc(case.model, particles=size, moves=1, rng=rng).expectation(),
        "rmsmc, frozen": lambda case, rng: rmsmc(
            case.model, particles=2 * size, moves=1, freeze=True, rng=rng
        ).expectation(),
        "pmmh": lambda case, rng: pmmh(
            case.parameters, case.model_of, steps=2 * size, burn_in=size // 4, particles=4, rng=rng
        ).expectation(),
        "smc2": lambda case, rng: smc2(
            case.parameters, case.model_of, particles=size, inner_particles=2, rng=rng
        ).expectation(),
    }  # fmt: skip


def _one_suite(scale: Scale, seed: int) -> Claim:
    runs, size = (40, 150) if scale is Scale.FULL else (16, 30)
    found: dict[str, tuple[float, ...]] = {}
    pairs = itertools.product(_cases().items(), _algorithms(size).items())
    for i, ((title, case), (name, mean_by)) in enumerate(pairs):
        means = np.array([mean_by(case, rng) for rng in _seeds(seed, 100 + i, runs)])
        error = float(means.std(ddof=1)) / math.sqrt(runs)
        of_parameters = name in ("pmmh", "smc2")
        exact, prior = (case.exact_parameter, case.prior_parameter) if of_parameters else (case.exact, case.prior)
        found[f"{name} on {title}"] = tuple(abs(float(means.mean()) - other) / error for other in (exact, prior))
    worst = max(found, key=lambda one: found[one][0])
    return Claim(
        "one suite for all algorithms: posterior means agree with closed forms and the Kalman filter (9 algorithms, 4 models)",
        _NONE_GIVEN, Estimate.exact(found[worst][0], "standard errors, the largest"),
        "every mean within 4 Monte Carlo standard errors", found[worst][0] <= 4,
        Comparator("the prior mean in the place of the exact one, the smallest distance", min(far for _, far in found.values())),
        f"{runs} runs each; the worst is {worst}. Nile: the level after the first 10 of 100 years, since importance sampling and "
        "single-site moves do not reach 100 years; PMMH and SMC^2 find the level's standard deviation among three values.",
    )  # fmt: skip


def _stack_safe(seed: int) -> Claim:
    n = 50_000
    right = scan(lambda s, _: bernoulli(0.5).map(lambda head: s + head), 0, range(n))
    left = bernoulli(0.5).map(int)
    for _ in range(n - 1):
        left = left.bind(lambda s: bernoulli(0.5).map(lambda head: s + head))
    base = Sampler(seed)
    traced = Traced(Weighted(base))
    lengths = []
    for model in (right, left):
        value = base.run(model)
        trace, _ = base.run(traced.of(model).run)
        lengths.append(len(trace.uniforms) if 0 <= value <= n and trace.output <= n else 0)
    return Claim(
        "50,000 binds in a row, to either side, run without a stack, drawn and traced", _NONE_GIVEN,
        Estimate.exact(min(lengths), "binds"), "no RecursionError", min(lengths) == n, scaled=_NOT_SCALED,
    )  # fmt: skip
