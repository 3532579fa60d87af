"""Samplers against closed forms, every warning, error and trap, and the recalibration of a classifier."""

import gc
import math
import sys

import numpy as np
import pandas as pd
import pytest

from theodolite.core.errors import DataError, InputError
from theodolite.core.estimate import Estimate
from theodolite.predictions import inference as inf
from theodolite.predictions.inference import (
    DegeneratePopulation,
    EnumerationError,
    GridMismatch,
    InferenceWarning,
    NoValidStart,
    Population,
    Sampler,
    Traced,
    Weighted,
    bernoulli,
    beta,
    categorical,
    condition,
    enumerate_exact,
    factor,
    gamma,
    hmm,
    hmm_log_evidence,
    importance,
    mcmc,
    mh_matrix,
    normal,
    pmmh,
    program,
    recalibration,
    ret,
    rmsmc,
    sample,
    scan,
    smc,
    smc2,
    smc_array,
    sprinkler,
    two_sync,
    uniform,
    uniform_discrete,
)
from theodolite.predictions.inference.bases import Base
from theodolite.survey.predictions import recalibration as recalibration_chart


def flips(heads, prior=None):
    return (prior or uniform()).bind(
        lambda p: scan(lambda q, head: factor(math.log(q if head else 1 - q)).map(lambda _: q), p, heads)
    )


HEADS = [True] * 6 + [False] * 2
MEAN = 7 / 10


# ---- against closed forms


@pytest.mark.parametrize("resampler", ["multinomial", "stratified", "systematic"])
def test_smc_finds_the_evidence_of_the_hmm(resampler):
    found = smc(hmm(), particles=1000, resampler=resampler, rng=0)
    assert found.log_evidence == pytest.approx(hmm_log_evidence(), abs=0.5)
    assert found.log_weights.dtype == np.float64
    assert np.logaddexp.reduce(found.log_weights) == pytest.approx(found.log_evidence)
    assert len(found.values) == 1000
    assert found.ancestors.shape == (15, 1000)
    assert 0 <= found.ancestors.min() <= found.ancestors.max() < 1000
    assert 1 <= found.ess <= 1000
    assert found.weights.sum() == pytest.approx(1)


def test_each_sampler_finds_the_bias_of_a_coin():
    model = flips(HEADS)
    assert importance(model, 2000, 0).expectation() == pytest.approx(MEAN, abs=0.03)
    assert smc(model, particles=1000, rng=1).expectation() == pytest.approx(MEAN, abs=0.04)
    assert smc(model, particles=1000, ess_threshold=0.5, rng=1).expectation() == pytest.approx(MEAN, abs=0.03)
    assert rmsmc(model, particles=100, moves=1, rng=2).expectation() == pytest.approx(MEAN, abs=0.07)
    assert rmsmc(model, particles=200, moves=1, freeze=True, rng=3).expectation() == pytest.approx(MEAN, abs=0.07)
    assert mcmc(model, steps=2000, burn_in=100, rng=4).expectation() == pytest.approx(MEAN, abs=0.04)
    one = lambda p: flips(HEADS, ret(p))
    assert pmmh(uniform(), one, steps=300, particles=2, burn_in=30, rng=5).expectation() == pytest.approx(
        MEAN, abs=0.06
    )
    assert smc2(uniform(), one, particles=60, inner_particles=2, rng=6).expectation() == pytest.approx(MEAN, abs=0.08)


def test_evidence_of_a_coin_and_its_standard_error():
    exact = math.lgamma(7) + math.lgamma(3) - math.lgamma(10)
    runs = [smc(flips(HEADS), particles=200, rng=seed) for seed in range(20)]
    pooled = inf.pooled_log_evidence(runs)
    assert pooled.low <= pooled.value <= pooled.high
    assert abs(pooled.value - exact) < 3 * (pooled.high - pooled.low)
    assert pooled.n == 20
    assert pooled.unit == "nats"
    with pytest.raises(InputError, match="at least two runs"):
        inf.pooled_log_evidence(runs[:1])


def test_resample_move_keeps_more_values_than_smc():
    model = flips([True, True, False] * 8)
    plain, moved = smc(model, particles=50, rng=0), rmsmc(model, particles=50, moves=1, rng=0)
    assert len(set(moved.values)) >= 3 * len(set(plain.values))


def test_the_array_filter_is_the_programs_filter():
    rows = np.array([[0.1, 0.4, 0.5], [0.2, 0.6, 0.2], [0.15, 0.7, 0.15]]).cumsum(axis=1)
    means = np.array([-1.0, 1.0, 0.0])

    def run(observations, rng, **options):
        return smc_array(
            lambda n, g: g.integers(0, 3, n),
            lambda x, g: (g.random(len(x))[:, None] > rows[x]).sum(axis=1).clip(max=2),
            lambda x, y: -0.5 * (y - means[x]) ** 2 - 0.5 * math.log(2 * math.pi),
            observations, particles=4000, rng=rng, **options,
        )  # fmt: skip

    for options in ({}, {"resampler": "multinomial"}, {"resampler": "stratified", "ess_threshold": 0.5}):
        found = run(inf.HMM_OBSERVATIONS, 0, **options)
        assert found.log_evidence == pytest.approx(hmm_log_evidence(), abs=0.3)
        assert found.ancestors.shape == (15, 4000)
        assert isinstance(found.values, np.ndarray)
    with pytest.raises(DegeneratePopulation) as error:
        smc_array(
            lambda n, g: np.zeros(n),
            lambda x, g: x,
            lambda x, y: np.where(y > 1, -np.inf, x),
            [0, 0, 2],
            particles=3,
            rng=0,
        )
    assert error.value.step == 3
    for broken in (lambda x, y: np.full(3, np.nan), lambda x, y: np.full(3, np.inf), lambda x, y: np.zeros(2)):
        with pytest.raises(InputError, match="log_likelihood must give 3 numbers"):
            smc_array(lambda n, g: np.zeros(n), lambda x, g: x, broken, [0.0], particles=3, rng=0)
    with pytest.raises(InputError, match="needs particles and observations"):
        smc_array(lambda n, g: np.zeros(n), lambda x, g: x, lambda x, y: x, [], particles=3, rng=0)


# ---- chains


def test_a_chain_keeps_the_newest_and_drops_the_oldest():
    model = uniform().bind(lambda p: factor(0.0).map(lambda _: p))
    whole = mcmc(model, steps=50, rng=0)
    for burn_in, thin in ((0, 1), (10, 1), (10, 3), (49, 7)):
        part = mcmc(model, steps=50, burn_in=burn_in, thin=thin, rng=0)
        assert part.samples == whole.samples[::-1][: 50 - burn_in : thin][::-1]
        assert part.samples[-1] == whole.samples[-1]
        assert len(part.log_weights) == len(part.samples)
    assert whole.accepted.dtype == bool
    assert whole.acceptance_rate == 1.0


def test_a_chain_visits_runs_of_any_length():
    model = bernoulli(0.5).bind(
        lambda b: normal(0, 1).bind(lambda x: normal(x, 1)).map(lambda y: (b, y)) if b else ret((b, 0.0))
    )
    chain = mcmc(model.bind(lambda v: factor(math.log(0.3 if v[0] else 0.6)).map(lambda _: v)), steps=6000, rng=0)
    assert chain.expectation(lambda v: v[0]) == pytest.approx(1 / 3, abs=0.04)


def test_a_program_without_draws_has_a_chain():
    assert mcmc(factor(-1).map(lambda _: 7), steps=3, rng=0).samples == [7, 7, 7]


def test_the_same_seed_gives_the_same_and_progress_is_told():
    told = []
    first = smc(hmm(), particles=20, rng=3, on_step=lambda step, ess: told.append((step, ess)))
    assert [step for step, _ in told][:16] == list(range(1, 17))
    again = smc(hmm(), particles=20, rng=np.random.default_rng(3))
    assert first.values == again.values
    assert np.array_equal(first.log_weights, again.log_weights)
    steps = []
    mcmc(hmm(), steps=5, rng=0, on_step=lambda step, rate: steps.append(step))
    assert steps == [1, 2, 3, 4, 5]


# ---- warnings


def test_warnings_say_what_is_wrong_and_are_no_errors():
    with pytest.warns(InferenceWarning, match="at most one factor"):
        smc(normal(0, 1).bind(lambda x: factor(-x * x).map(lambda _: x)), particles=50, rng=0)
    narrow = scan(lambda x, _: factor(-((1e4 * (x - 0.5)) ** 2)).map(lambda _: x), 0.0, [1, 2])
    spread = uniform().bind(lambda u: scan(lambda x, _: factor(-((1e4 * (x - 0.5)) ** 2)).map(lambda _: x), u, [1]))
    assert enumerate_exact(narrow).values == [0.0]
    with pytest.warns(InferenceWarning, match="effective sample size is 1.00 of 50"):
        importance(spread, 50, 0)
    stuck = uniform().bind(lambda u: condition(u < 0.003).map(lambda _: u))
    with pytest.warns(InferenceWarning, match=r"accepted \d of 400 steps"):
        mcmc(stuck, steps=400, init_tries=10_000, rng=0)


# ---- errors


def test_what_cannot_be_enumerated_is_named_with_its_place():
    with pytest.raises(EnumerationError, match=r"normal\(0.0, 1.0\) at .*test_inference_sampling.py:\d+.*grid"):
        enumerate_exact(bernoulli(0.5).bind(lambda _: normal(0, 1)))
    for dist in (inf.poisson(2), inf.geometric(0.5), inf.beta(1, 1), inf.dirichlet([1, 1]), inf.mv_normal([0], [[1]])):
        with pytest.raises(EnumerationError, match=type(dist).__name__):
            enumerate_exact(dist)
    with pytest.raises(EnumerationError, match="outcomes on a grid"):
        enumerate_exact(inf.mv_normal(np.zeros(9), np.eye(9)), 100)


def test_a_program_without_end_is_not_enumerated_for_ever(monkeypatch):
    monkeypatch.setattr("theodolite.predictions.inference.bases._LARGEST", 1000)

    def wait(n):
        return bernoulli(0.5).bind(lambda b: ret(n) if b else wait(n + 1))

    with pytest.raises(EnumerationError, match="does not end"):
        enumerate_exact(wait(0))
    assert Sampler(0).run(wait(0)) >= 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bernoulli(1.2), r"\[0, 1\], got 1.2"),
        (lambda: bernoulli(math.nan), "got nan"),
        (lambda: inf.geometric(0), "got 0"),
        (lambda: normal(0, -1), "sd must be positive and finite, got -1"),
        (lambda: normal(math.nan, 1), "mean must be finite, got nan"),
        (lambda: gamma(1, -2), "scale must be positive and finite, got -2"),
        (lambda: gamma(0, 1), "shape must be positive"),
        (lambda: beta(-1, 1), "a must be positive"),
        (lambda: inf.poisson(-3), "rate must be positive"),
        (lambda: categorical([0.5, 0.4]), r"sum to 1, got \(0.5, 0.4\)"),
        (lambda: categorical([1.5, -0.5]), "at least 0"),
        (lambda: categorical([math.nan, 1.0]), "nan"),
        (lambda: categorical([0.5, math.nan]), "nan"),
        (lambda: categorical([]), "sum to 1"),
        (lambda: uniform_discrete(0), "at least one value"),
        (lambda: uniform_discrete({1, 2}), "list of values"),
        (lambda: uniform(2, 1), "low must be below high, got 2 and 1"),
        (lambda: inf.dirichlet([1, 0]), "alpha must be positive"),
        (lambda: inf.dirichlet([]), "at least one alpha"),
        (lambda: inf.mv_normal([0, 0], [[1, 2], [2, 1]]), "positive definite"),
        (lambda: inf.mv_normal([0, 0], [[1, 2], [0, 1]]), "symmetric"),
        (lambda: inf.mv_normal([0, 0], [[1]]), "cov"),
        (lambda: sample(0.5), "takes a distribution"),
        (lambda: factor(math.nan), "below .inf, got nan"),
        (lambda: factor(math.inf), "got inf"),
    ],
)
def test_wrong_arguments_are_refused_where_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_categorical_sums_within_a_billionth_are_taken():
    assert categorical([0.5, 0.5 + 5e-10]).probabilities[1] > 0.5


def test_grid_mismatch_tells_probability_and_grid():
    for call in (lambda: mh_matrix(bernoulli(0.35), 10), lambda: enumerate_exact(bernoulli(0.35), 10)):
        with pytest.raises(GridMismatch, match=r"0\.35 is not a multiple of 1/10") as error:
            call()
        assert (error.value.p, error.value.grid) == (0.35, 10)
    for dist in (categorical([0.25, 0.75]), uniform_discrete(3)):
        with pytest.raises(GridMismatch):
            mh_matrix(dist, 10)
    assert len(mh_matrix(bernoulli(0.35), 20)[0]) == 20


def test_a_matrix_that_would_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr("theodolite.predictions.inference.validation.DEFAULT_BUDGET", 8 * 20**2 - 1)
    with pytest.raises(EnumerationError, match="20 traces on a grid of 20"):
        mh_matrix(bernoulli(0.35), 20)


def test_all_weights_zero():
    never = lambda at: scan(lambda s, t: condition(t != at).bind(lambda _: bernoulli(0.5)), 0, range(4))
    for run in (
        lambda: smc(never(2), particles=10, rng=0),
        lambda: rmsmc(never(2), particles=10, moves=1, rng=0),
    ):
        with pytest.raises(DegeneratePopulation, match="weight zero after factor 3") as error:
            run()
        assert error.value.step == 3
    with pytest.raises(DegeneratePopulation, match="at the end of the program"):
        importance(never(2), 10, 0)
    with pytest.raises(DegeneratePopulation):
        smc(never(3), particles=10, steps=1, rng=0)
    with pytest.raises(NoValidStart, match="none of 5 runs"):
        mcmc(never(0), steps=10, init_tries=5, rng=0)
    with pytest.raises(InputError, match="evidence zero"):
        enumerate_exact(never(0)).probabilities()
    with pytest.raises(InputError, match="no trace has a positive weight"):
        mh_matrix(never(0), 2)


def test_a_factor_under_a_bare_sampler_says_what_to_wrap_it_in():
    with pytest.raises(InputError, match=r"Weighted\(Sampler\(rng\)\)"):
        Sampler(0).run(sprinkler())
    weighted = Weighted(Sampler(0))
    value, logw = weighted.base.run(weighted.of(sprinkler()))
    assert isinstance(value, bool)
    assert logw <= 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smc(hmm(), particles=0, rng=0), "at least 1, got 0"),
        (lambda: smc(hmm(), particles=5, resampler="best", rng=0), "multinomial, stratified, systematic, got 'best'"),
        (lambda: smc(hmm(), particles=5, ess_threshold=2, rng=0), "share of the particles"),
        (lambda: smc(hmm(), particles=5, steps=-1, rng=0), "steps must be at least 0"),
        (lambda: rmsmc(hmm(), particles=5, moves=-1, rng=0), "moves must be at least 0"),
        (lambda: importance(hmm(), 0, 0), "at least 1"),
        (lambda: mcmc(hmm(), steps=5, burn_in=5, rng=0), "burn_in < steps"),
        (lambda: mcmc(hmm(), steps=5, thin=0, rng=0), "thin >= 1"),
        (lambda: inf.validate(lambda m: m, []), "no program to validate on"),
        (lambda: Sampler(0).run(bernoulli(0.5).bind(lambda b: b)), r"such as ret\("),
        (lambda: enumerate_exact(bernoulli(1).bind(lambda b: 3)), "expected a program, got 3"),
        (
            lambda: enumerate_exact(bernoulli(1).bind(lambda b: sprinkler)),
            r"the function sprinkler that makes one; call it: sprinkler\(",
        ),
        (lambda: program(lambda: 3), "has no yield"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_generator_that_yields_something_else_is_told():
    @program
    def wrong():
        yield 0.5

    with pytest.raises(InputError, match=r"yields distributions and programs, got 0\.5"):
        Sampler(0).run(wrong())


# ---- traps


def test_offspring_of_a_generator_do_not_share_its_state():
    @program
    def collects(n):
        seen = []
        for _ in range(n):
            seen.append((yield bernoulli(0.5)))
            yield factor(0.0)
        return tuple(seen)

    found = enumerate_exact(collects(3))
    assert len(found.values) == 8
    assert list(found.probabilities().values()) == pytest.approx([0.125] * 8)
    once = collects(2)
    assert enumerate_exact(once).difference(enumerate_exact(once)) == 0
    for values in (smc(collects(4), particles=64, rng=0).values, mcmc(collects(4), steps=50, rng=0).samples):
        assert {len(value) for value in values} == {4}
        assert len(set(values)) > 4


def test_weights_stay_in_log_space():
    model = scan(lambda s, _: factor(-5000.0).map(lambda _: s), 0, range(3))
    assert smc(model, particles=4, rng=0).log_evidence == pytest.approx(-15000)
    assert enumerate_exact(model).log_evidence == pytest.approx(-15000)
    assert importance(model, 4, 0).ess == pytest.approx(4)


def test_dead_particles_are_replaced():
    found = smc(two_sync(), particles=200, rng=0)
    assert found.expectation() == 2
    assert math.exp(found.log_evidence) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_fifty_thousand_binds_run_without_a_stack(side):
    n = 50_000
    if side == "right":
        model = scan(lambda s, _: bernoulli(0.5).map(lambda b: s + b), 0, range(n))
    else:
        model = ret(0)
        for _ in range(n):
            model = model.bind(lambda s: bernoulli(0.5).map(lambda b: s + b))
    assert sys.getrecursionlimit() < n
    assert abs(Sampler(0).run(model) - n / 2) < 600
    base = Sampler(1)
    traced = Traced(Weighted(base))
    trace, logw = base.run(traced.of(model).run)
    assert len(trace.uniforms) == n
    assert logw == 0
    del model, trace
    gc.collect()


def test_long_chains_of_moves_and_suspensions_run_without_a_stack():
    ys = np.random.default_rng(0).normal(size=1500).tolist()
    assert len(smc(hmm(ys), particles=3, rng=0).ancestors) == 1499
    assert len(rmsmc(hmm(ys), particles=2, moves=1, freeze=True, rng=0).values) == 2
    assert len(rmsmc(hmm(ys[:300]), particles=2, moves=0, rng=0).values) == 2


def test_work_is_linear_in_steps_and_particles(monkeypatch):
    """Counted, not timed: how often the sampler is asked to continue."""
    drawn = []
    original = categorical.quantile
    monkeypatch.setattr(categorical, "quantile", lambda self, u: drawn.append(1) or original(self, u))
    counts = {}
    for steps, n in ((50, 10), (100, 10), (100, 20)):
        drawn.clear()
        smc(hmm([0.1] * steps), particles=n, rng=0)
        counts[steps, n] = len(drawn)
    assert counts == {(50, 10): 500, (100, 10): 1000, (100, 20): 2000}


def test_untraced_draws_are_made_anew_and_not_recorded():
    base = Sampler(0)
    traced = Traced(Weighted(base))
    model = bernoulli(0.5).bind(lambda b: inf.untraced(uniform().bind(lambda u: uniform(0, u))).map(lambda v: (b, v)))
    trace, _ = base.run(traced.of(model).run)
    assert len(trace.uniforms) == 1
    assert 0 < Sampler(1).run(model)[1] < 1
    pop = Population(Base())
    assert Sampler(1).run(pop.of(model))[0][1] == 0.0


# ---- recalibration


def scored(temperature, lapse, n=600, classes=3, seed=0):
    """Log-probabilities that are right after recalibration by (temperature, lapse), and labels."""
    rng = np.random.default_rng(seed)
    logits = 2 * temperature * rng.normal(size=(n, classes))
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    p = np.exp(logits / temperature)
    p = (1 - lapse) * p / p.sum(axis=1, keepdims=True) + lapse / classes
    labels = (rng.random(n)[:, None] > p.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    return logp, labels


def test_recalibration_on_a_grid_of_parameters():
    logp, labels = scored(2.0, 0.0, n=60)
    whole = enumerate_exact(recalibration(logp, labels), 20)
    for (temperature, lapse), mass in whole.weights().items():
        p = np.exp(logp / temperature)
        p = (1 - lapse) * p / p.sum(axis=1, keepdims=True) + lapse / 3
        exact = np.log(p[np.arange(60), labels]).sum() - 2 * math.log(20)
        assert math.log(mass) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_recalibration_finds_the_temperature(temperature):
    found = rmsmc(recalibration(*scored(temperature, 0.0)), particles=60, moves=2, rng=0)
    assert found.expectation(lambda theta: theta[0]) == pytest.approx(temperature, rel=0.2)
    assert found.expectation(lambda theta: theta[1]) < 0.06


@pytest.mark.parametrize(
    ("logp", "labels"),
    [
        (np.array([[0.0, -np.inf]]), np.array([0])),
        (np.zeros((2, 2)), np.array([0])),
        (np.zeros((1, 2)), np.array([2])),
        (np.zeros((1, 2)), np.array([-1])),
        (np.zeros((0, 2)), np.array([], dtype=np.int64)),
        (np.zeros((1, 2)), np.array([1.0])),
        (np.zeros((1, 2)), ["cat"]),
    ],
)
def test_broken_probabilities_are_refused(logp, labels):
    with pytest.raises(DataError, match="needs"):
        recalibration(logp, labels)


def test_recalibration_takes_lists_and_series():
    p = np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]])
    labels = [0, 1, 1]
    found = [
        importance(recalibration(logp, one), 20, 0).log_evidence
        for logp, one in (
            (np.log(p), np.array(labels)), (np.log(p).tolist(), labels), (np.log(p), pd.Series(labels, index=[7, 8, 9])),
        )
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
    with pytest.raises(InputError, match="at least one block"):
        recalibration(np.log(p), labels, blocks=0)


def test_a_number_of_any_kind_says_how_many_values_there_are():
    assert enumerate_exact(uniform_discrete(np.int64(3))).probabilities() == pytest.approx(
        dict.fromkeys(range(3), 1 / 3)
    )


@pytest.mark.parametrize(
    ("temperature", "gain", "words"),
    [
        ((0.8, 1.2), (0.01, 0.02), "Leave the probabilities as they are, or give more validation rows"),
        ((0.3, 0.9), (-0.01, 0.02), "70 test rows cannot tell whether correcting it pays"),
        ((0.3, 0.9), (-0.03, -0.01), "correcting it harms the test rows: look for a shift"),
        ((1.2, 1.6), (0.01, 0.02), "Divide the logits by 1.40"),
    ],
)
def test_the_charts_advice_goes_no_further_than_its_rows(temperature, gain, words):
    estimates = [Estimate((low + high) / 2, low, high, "", 70) for low, high in (temperature, gain)]
    assert words in recalibration_chart._advice(*estimates)
