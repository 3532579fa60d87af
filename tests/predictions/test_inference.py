"""Exact oracles: enumeration, transported algorithms, Metropolis-Hastings matrices, densities; then laws and properties."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from theodolite.predictions import inference as inf
from theodolite.predictions.inference import (
    SUITE,
    Enumerator,
    Population,
    Replay,
    Sampler,
    Sequential,
    Traced,
    Weighted,
    bernoulli,
    branching_sprinkler,
    categorical,
    coins,
    collapse,
    enumerate_exact,
    factor,
    hmm,
    hmm_log_evidence,
    mcmc_program,
    mh_log_ratio,
    mh_matrix,
    normal,
    pmmh_program,
    ret,
    rmsmc_program,
    scan,
    smc_program,
    sprinkler,
    two_sync,
    uniform,
    uniform_discrete,
    validate,
)
from theodolite.predictions.inference.bases import Base, Representation
from theodolite.predictions.inference.population import Ancestors
from theodolite.predictions.inference.representations import Done

QUICK = settings(max_examples=40, deadline=None)
RESAMPLERS = ["multinomial", "stratified", "systematic"]
COINS = (SUITE[1], SUITE[3])


def mass(program, grid=None):
    return enumerate_exact(program, grid)


# ---- enumeration


def test_sprinkler_in_closed_form():
    found = mass(sprinkler())
    assert math.exp(found.log_evidence) == pytest.approx(0.5026, abs=1e-12)
    assert found.probabilities()[True] == pytest.approx(0.10863509749303624, abs=1e-12)
    assert found.expectation() == pytest.approx(0.0546 / 0.5026, abs=1e-12)
    assert mass(sprinkler(), 10).difference(found) < 1e-12


def test_two_sync_keeps_only_what_has_weight():
    found = mass(two_sync())
    assert found.values == [2]
    assert math.exp(found.log_evidence) == pytest.approx(0.25)


def test_hmm_by_enumeration_is_the_forward_algorithm():
    ys = [0.9, -0.3, 0.2]
    assert mass(hmm(ys)).log_evidence == pytest.approx(hmm_log_evidence(ys), abs=1e-12)
    assert hmm_log_evidence() == pytest.approx(-44.685841550865845, abs=1e-9)


def test_values_that_cannot_be_hashed_are_added_too():
    model = bernoulli(0.25).map(lambda b: [np.array([1.0, 2.0]), {"a": [1]}] if b else [np.zeros(2), {}])
    twice = bernoulli(0.5).bind(lambda _: model)
    assert sorted(mass(twice).probabilities().values()) == pytest.approx([0.25, 0.75])


def test_a_grid_puts_midpoints_in_the_place_of_uniforms():
    assert mass(uniform(2, 4), 4).values == [2.25, 2.75, 3.25, 3.75]
    assert mass(normal(1, 2), 501).expectation() == pytest.approx(1, abs=1e-9)
    assert mass(normal(0, 1), 2001).expectation(lambda x: x * x) == pytest.approx(1, abs=1e-2)


# ---- algorithms keep the measure


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("steps", [0, 1, 2, 5, None])
@pytest.mark.parametrize("ess_threshold", [1.0, 0.6])
def test_smc_is_valid_for_any_number_of_steps(resampler, steps, ess_threshold):
    def algorithm(model):
        return collapse(smc_program(model, particles=2, steps=steps, resampler=resampler, ess_threshold=ess_threshold))

    report = validate(algorithm, atol=1e-12)
    assert report, str(report)
    assert len(report.checks) == len(SUITE)


def test_smc_is_valid_with_three_particles_and_three_observations():
    assert validate(lambda m: collapse(smc_program(m, particles=3)), [hmm([0.5])], atol=1e-12)
    assert validate(lambda m: collapse(smc_program(m, particles=3, resampler="stratified")), COINS, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_mcmc_is_valid(steps):
    models = SUITE if steps < 2 else COINS
    assert validate(lambda m: mcmc_program(m, steps=steps), models, atol=1e-12)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_resample_move_is_valid(freeze, resampler):
    def algorithm(model):
        return collapse(rmsmc_program(model, particles=2, moves=1, freeze=freeze, resampler=resampler))

    assert validate(algorithm, COINS, atol=1e-12)


def test_a_parameter_weighted_by_an_inner_smc_has_the_exact_marginal():
    def noisy(theta, ys=(True, False)):
        return scan(
            lambda s, y: bernoulli(0.5).bind(lambda x: factor(math.log(theta if x == y else 0.2)).map(lambda _: s)),
            0,
            ys,
        )

    parameters = uniform_discrete([0.9, 0.6])
    exact = mass(parameters.bind(lambda theta: noisy(theta).map(lambda _: theta)))
    for resampler in RESAMPLERS:
        marginal = pmmh_program(parameters, noisy, particles=2, resampler=resampler)
        assert mass(marginal).difference(exact) < 1e-12
    assert mass(mcmc_program(marginal, steps=1), 2).difference(exact) < 1e-12
    one = pmmh_program(parameters, noisy, particles=1)
    smc2 = collapse(rmsmc_program(one, particles=2, moves=1))
    assert mass(smc2, 2).difference(exact) < 1e-12


def test_wrong_algorithms_are_caught():
    def no_evidence(model):
        return collapse(smc_program(model, particles=2).map(lambda ps: [(x, -math.log(2)) for x, _ in ps]))

    report = validate(no_evidence, SUITE[:3])
    assert not report
    assert min(check.difference for check in report.checks) > 0.05
    assert "NOT valid" in str(report)
    # right after normalising, wrong as a measure
    halved = validate(lambda m: factor(math.log(0.5)).bind(lambda _: m))
    assert not halved
    assert halved.checks[0].algorithm_evidence == pytest.approx(0.2513)


def test_scoring_moves_into_the_population_is_caught():
    """The trap: a re-run that scores too squares the weights."""
    pop = Population(Base())
    traced = Traced(pop)

    def scoring_twice(model):
        m = traced.of(model)
        again = pop.bind(m.run, lambda t: pop.bind(pop.factor(t.logp), lambda _: pop.ret(t.output)))
        return pop.collapse(again)

    assert not validate(scoring_twice, COINS)
    assert validate(lambda m: pop.collapse(traced.marginal(traced.mh_step(traced.of(m)))), COINS, atol=1e-12)


# ---- the Metropolis-Hastings kernel


@pytest.mark.parametrize("example", SUITE, ids=lambda e: e.name)
def test_kernel_is_stochastic_stationary_and_reversible(example):
    traces, pi, P = mh_matrix(example.model, example.grid)
    assert len(set(traces)) == len(traces)
    assert np.abs(P.sum(axis=1) - 1).max() < 1e-12
    assert np.abs(pi @ P - pi).max() < 1e-12
    flow = pi[:, None] * P
    assert np.abs(flow - flow.T).max() < 1e-12


def test_traces_of_the_branching_sprinkler_and_the_mutant_without_lengths():
    traces, pi, P = mh_matrix(branching_sprinkler(), 10)
    assert len(traces) == 730
    assert {len(trace) for trace in traces} == {2, 3}
    _, _, wrong = mh_matrix(branching_sprinkler(), 10, log_ratio=lambda p, n, q, m: mh_log_ratio(p, 1, q, 1))
    assert np.abs(pi @ P - pi).max() < 1e-12
    assert np.abs(pi @ wrong - pi).max() > 1e-4


# ---- representations and arrows


class Literal(Representation):
    """Only the four operations of another representation: its meaning map is the generic one."""

    def __init__(self, of):
        self.rep, self.base = of, of.base
        self.ret, self.bind, self.sample, self.factor = of.ret, of.bind, of.sample, of.factor


def weighted_mass(element, rep):
    return mass(rep.apply_weight(element))


@pytest.mark.parametrize("example", SUITE, ids=lambda e: e.name)
def test_quick_meaning_maps_are_those_of_the_four_operations(example):
    exact = mass(example.model)
    base = Base()
    weighted = Weighted(base)
    pop = Population(base)
    seq = Sequential(base)
    traced = Traced(base)
    finish = {
        "weighted": (weighted, weighted.apply_weight),
        "population": (pop, pop.collapse),
        "sequential": (seq, seq.finish),
        "traced": (traced, traced.marginal),
        "nested": (Population(Weighted(base)), lambda m: weighted.apply_weight(Population(weighted).collapse(m))),
    }
    for rep, arrow in finish.values():
        for made in (rep.of(example.model), Literal(rep).of(example.model)):
            assert mass(arrow(made), example.grid).difference(exact) < 1e-12


def test_operations_lift_what_is_left_to_the_base():
    base = Base()
    p = bernoulli(0.25)
    weighted, pop, seq, replay = Weighted(base), Population(base), Sequential(base), Replay(base)
    assert mass(weighted.lift(p)).probabilities()[(True, 0.0)] == pytest.approx(0.25)
    assert mass(pop.collapse(pop.lift(p))).probabilities()[True] == pytest.approx(0.25)
    assert mass(seq.finish(seq.lift(p))).probabilities()[True] == pytest.approx(0.25)
    assert mass(replay.run(replay.lift(p), (0.9,))).probabilities()[(True, ())] == pytest.approx(0.25)
    traced = Traced(base)
    assert mass(traced.marginal(traced.lift(p))).probabilities()[True] == pytest.approx(0.25)


def test_push_evidence_and_proper_keep_the_measure():
    pop = Population(Base())
    model = pop.bind(pop.spawn(2), lambda _: pop.of(coins()))
    exact = mass(coins())
    assert mass(pop.collapse(pop.push_evidence(model))).difference(exact) < 1e-12
    assert mass(Weighted(Base()).apply_weight(pop.proper(model))).difference(exact) < 1e-12
    (pushed,) = mass(pop.push_evidence(ret([("a", math.log(3)), ("b", math.log(1))]))).values
    assert [x for x, _ in pushed] == ["a", "b"]
    assert np.exp([w for _, w in pushed]) == pytest.approx([0.75, 0.25])


def test_a_population_without_weight_is_left_as_it_is():
    pop = Population(Base())
    dead = [("a", -math.inf), ("b", -math.inf)]
    for resampler in RESAMPLERS:
        assert Sampler(0).run(pop.resample(ret(dead), resampler)) == dead
    assert mass(pop.push_evidence(ret(dead))).values == []
    assert mass(pop.collapse(ret(dead))).values == []


def test_resampling_gives_every_offspring_the_mean_weight():
    pop = Population(Base())
    population = ret([("a", math.log(3)), ("b", math.log(1)), ("c", -math.inf)])
    for resampler in RESAMPLERS:
        new = Sampler(1).run(pop.resample(population, resampler))
        assert [w for _, w in new] == pytest.approx([math.log(4 / 3)] * 3)
        assert "c" not in [x for x, _ in new]


@pytest.mark.parametrize("resampler", RESAMPLERS)
@QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4).filter(lambda w: sum(w) > 1e-3))
def test_expected_offspring_are_the_weights(resampler, raw):
    weights = np.array(raw) / sum(raw)
    ancestors = Ancestors(resampler, weights)
    outcomes = ancestors.outcomes()
    assert math.fsum(math.exp(log) for _, log in outcomes) == pytest.approx(1, abs=1e-9)
    expected = sum(math.exp(log) * np.bincount(found, minlength=len(weights)) for found, log in outcomes)
    assert np.allclose(expected, len(weights) * weights, atol=1e-9)


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_outcomes_of_resampling_are_what_its_uniforms_give(resampler):
    weights = np.array([0.5, 0.3, 0.2])
    ancestors = Ancestors(resampler, weights)
    cells = (np.arange(50) + 0.5) / 50
    counts: dict = {}
    for u in (
        itertools.product(cells, repeat=ancestors.n_uniforms)
        if ancestors.n_uniforms == 1
        else [tuple(row) for row in np.random.default_rng(0).random((20_000, 3))]
    ):
        key = tuple(ancestors.quantile(tuple(map(float, u))))
        counts[key] = counts.get(key, 0) + 1
    total = sum(counts.values())
    exact = {tuple(found): math.exp(log) for found, log in ancestors.outcomes()}
    for found in exact.keys() | counts.keys():
        assert counts.get(found, 0) / total == pytest.approx(exact.get(found, 0), abs=0.021)


def test_no_index_is_out_of_range_where_rounding_leaves_the_sum_below_one():
    weights = np.full(10, 0.1)
    assert np.cumsum(weights)[-1] < 1
    for resampler in RESAMPLERS:
        ancestors = Ancestors(resampler, weights)
        assert max(ancestors.quantile((1 - 2**-53,) * ancestors.n_uniforms)) == 9
    assert Ancestors("systematic", np.array([1.0, 0.0])).quantile((1 - 2**-53,)) == [0, 0]
    assert categorical([0.1] * 10).quantile((1 - 2**-53,)) == 9
    assert categorical([1.0, 0.0]).quantile((1 - 2**-53,)) == 0
    assert categorical([0.0, 1.0]).quantile((2**-54,)) == 1


def test_sequential_stops_after_each_factor_and_advance_does_nothing_at_the_end():
    seq = Sequential(Weighted(Base()))
    model = factor(-1).bind(lambda _: bernoulli(0.5)).bind(lambda b: factor(-2).map(lambda _: b))
    first = seq.of(model)
    assert [w for _, w in mass(first).values] == [-1.0]
    second = seq.advance(first)
    assert [type(s) for s, _ in mass(second).values] == [Done, Done]
    assert {w for _, w in mass(second).values} == {-3.0}
    assert {w for _, w in mass(seq.advance(second)).values} == {-3.0}
    assert {x for x, _ in mass(seq.finish(first)).values} == {True, False}


def test_hoist_applies_an_arrow_before_every_suspension_and_hoist_first_once():
    weighted = Weighted(Base())
    seq = Sequential(weighted)

    def doubled(m):
        return weighted.bind(weighted.factor(math.log(2)), lambda _: m)

    model = scan(lambda s, _: factor(0.0).map(lambda _: s), 0, range(3)).bind(lambda s: bernoulli(1).map(lambda _: s))
    for hoist, times in ((seq.hoist_first, 1), (seq.hoist, 4)):
        ((_, w),) = mass(seq.finish(hoist(doubled)(seq.of(model)))).values
        assert w == pytest.approx(times * math.log(2))


def test_replay_takes_uniforms_by_position():
    replay = Replay(Base())
    model = bernoulli(0.5).bind(lambda b: normal(0, 1).map(lambda x: (b, x)) if b else ret((b, None)))
    assert Sampler(0).run(replay.run(model, (0.1, 0.5))) == ((True, 0.0), (0.1, 0.5))
    assert Sampler(0).run(replay.run(model, (0.9, 0.5, 0.2))) == ((False, None), (0.9,))
    (b, _), used = Sampler(0).run(replay.run(model, (0.1,)))
    assert b
    assert len(used) == 2
    two = inf.mv_normal([0, 0], np.eye(2))
    _, used = Sampler(0).run(replay.run(two, (0.3,)))
    assert used[0] == 0.3
    assert len(used) == 2


def test_freezing_keeps_the_value_and_forgets_the_draws():
    traced = Traced(Weighted(Base()))
    frozen = traced.freeze(traced.of(coins()))
    trace, _ = Sampler(3).run(frozen.run)
    assert trace.uniforms == ()
    assert trace.start == trace.output
    moved, _ = Sampler(4).run(traced.mh_step(frozen).run)
    assert moved.uniforms == ()


def test_monad_laws_hold_as_measures():
    k = lambda b: factor(math.log(0.5 if b else 0.25)).map(lambda _: not b)
    h = lambda b: bernoulli(0.75 if b else 0.5)
    m = bernoulli(0.25)
    for rep, arrow in ((Base(), lambda e: e), (Weighted(Base()), Weighted(Base()).apply_weight)):
        one, then, last = rep.of(m), lambda x, rep=rep: rep.of(k(x)), lambda x, rep=rep: rep.of(h(x))
        left = rep.bind(rep.bind(one, then), last)
        right = rep.bind(one, lambda x, rep=rep, then=then, last=last: rep.bind(then(x), last))
        assert mass(arrow(left)).difference(mass(arrow(right))) < 1e-15
        assert mass(arrow(rep.bind(rep.ret(True), then))).difference(mass(k(True))) < 1e-15


@st.composite
def programs(draw, depth=3):
    """Small programs of coins and factors."""
    if depth == 0:
        return ret(draw(st.integers(0, 3)))
    p = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    w = draw(st.sampled_from([0.0, -0.5, 0.3, -math.inf]))
    yes, no = draw(programs(depth=depth - 1)), draw(programs(depth=depth - draw(st.integers(1, depth))))
    return bernoulli(p).bind(lambda b: factor(w).bind(lambda _: yes) if b else no)


@QUICK
@given(programs(), st.sampled_from(RESAMPLERS), st.integers(1, 2))
def test_any_small_program_keeps_its_measure_under_smc(model, resampler, n):
    smc = collapse(smc_program(model, particles=n, resampler=resampler))
    assert mass(smc).difference(mass(model)) < 1e-12


@settings(max_examples=15, deadline=None)
@given(programs(depth=2))
def test_any_small_program_keeps_its_measure_under_moves(model):
    assert mass(mcmc_program(model, steps=1), 4).difference(mass(model)) < 1e-12


# ---- distributions against scipy


CONTINUOUS = [
    (inf.normal(1.5, 2.0), stats.norm(1.5, 2.0)),
    (inf.uniform(-1, 3), stats.uniform(-1, 4)),
    (inf.gamma(0.7, 2.0), stats.gamma(0.7, scale=2.0)),
    (inf.beta(0.5, 3.0), stats.beta(0.5, 3.0)),
]
DISCRETE = [
    (inf.poisson(3.7), stats.poisson(3.7)),
    (inf.poisson(0.01), stats.poisson(0.01)),
    (inf.poisson(400.0), stats.poisson(400.0)),
    (inf.geometric(0.3), stats.geom(0.3, loc=-1)),
    (inf.bernoulli(0.3), stats.bernoulli(0.3)),
    (inf.uniform_discrete(6), stats.randint(0, 6)),
    (inf.categorical([0.2, 0.5, 0.3]), stats.rv_discrete(values=([0, 1, 2], [0.2, 0.5, 0.3]))),
]


@pytest.mark.parametrize(("ours", "theirs"), CONTINUOUS, ids=lambda d: repr(d)[:20])
def test_continuous_quantiles_and_densities(ours, theirs):
    for u in (1e-4, 0.01, 0.3, 0.5, 0.9, 0.999):
        x = ours.quantile((u,))
        assert x == pytest.approx(theirs.ppf(u), rel=1e-9, abs=1e-12)
        assert ours.log_prob(x) == pytest.approx(theirs.logpdf(x), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("ours", "theirs"), DISCRETE, ids=lambda d: repr(d)[:20])
def test_discrete_probabilities(ours, theirs):
    cells = (np.arange(20_000) + 0.5) / 20_000
    values = np.array([int(ours.quantile((u,))) for u in cells.tolist()])
    for x in np.unique(values):
        assert np.mean(values == x) == pytest.approx(theirs.pmf(x), abs=1e-4)
        assert ours.log_prob(int(x)) == pytest.approx(theirs.logpmf(x), rel=1e-9, abs=1e-9)
    assert ours.log_prob(-1) == -math.inf or isinstance(ours, bernoulli)


def test_vectors():
    rng = np.random.default_rng(0)
    alphas, p = [0.5, 2.0, 1.5], np.array([0.2, 0.5, 0.3])
    one = inf.dirichlet(alphas)
    draws = np.array([one.quantile(tuple(u)) for u in rng.random((4000, 2)).tolist()])
    assert np.allclose(draws.sum(axis=1), 1)
    assert np.allclose(draws.mean(axis=0), np.array(alphas) / 4, atol=0.02)
    assert np.allclose(draws.var(axis=0), stats.dirichlet(alphas).var(), atol=0.01)
    assert one.log_prob(p) == pytest.approx(stats.dirichlet(alphas).logpdf(p))
    cov = np.array([[2.0, 0.6], [0.6, 1.0]])
    two = inf.mv_normal([1, -1], cov)
    draws = np.array([two.quantile(tuple(u)) for u in rng.random((8000, 2)).tolist()])
    assert np.allclose(np.cov(draws.T), cov, atol=0.12)
    assert two.log_prob([0.3, 0.4]) == pytest.approx(stats.multivariate_normal([1, -1], cov).logpdf([0.3, 0.4]))


def test_tiny_dirichlet_parameters_do_not_give_nan():
    for u in np.random.default_rng(0).random((50, 3)).tolist():
        p = inf.dirichlet([1e-3] * 4).quantile(tuple(u))
        assert np.isfinite(p).all()
        assert p.sum() == pytest.approx(1)


def test_enumerators_are_made_of_whole_grids_only():
    with pytest.raises(ValueError, match="grid must be at least 1"):
        Enumerator(0)
