"""Bayesian optimisation by a language model: known answers first, then what must hold for any reply, then errors and traps.

The language model is a script, so that what surrounds it can be checked; nothing here says what a language model can do.
"""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier

from language_server import protocol_server
from theodolite.core.errors import DataError, InputError
from theodolite.hyperparameters.llm_bayesian_optimization import (
    LLAMBO,
    Account,
    CandidateSampler,
    DiscriminativeSurrogate,
    GaussianProcessSearch,
    GaussianProcessSurrogate,
    GenerativeSurrogate,
    LLAMBOSearchCV,
    RandomSearch,
    SobolSearch,
    TaskContext,
    TPESearch,
    desired_score,
    evaluate_candidates,
    evaluate_surrogate,
    expected_improvement,
    known_space,
    normalized_regret,
    rank_agreement,
    warm_start,
)
from theodolite.hyperparameters.llm_bayesian_optimization.surrogate import recalibration
from theodolite.hyperparameters.llm_bayesian_optimization.wording import Wording, read_answer, read_score
from theodolite.hyperparameters.space import Categorical, Float, Int, Ordinal, SearchSpace, Trial
from theodolite.language import connect
from theodolite.language.model import EndpointError, EndpointUnavailable, ScoringUnavailable
from theodolite.language.scripted import ScriptedLanguageModel

SPACE = SearchSpace(
    {
        "max_depth": Int(1, 15),
        "tol": Float(1e-5, 0.1, "log"),
        "width": Ordinal((16, 25, 40)),
        "rule": Categorical(("gini", "log, loss", True)),
    }
)
CONTEXT = TaskContext(
    "DecisionTreeClassifier", "classification", "accuracy", bounds=(0.0, 1.0), n_samples=142, n_features=13
)
ERROR = TaskContext("net", "regression", "squared error", lower_is_better=True)
LINE = SearchSpace({"x": Float(0.0, 1.0)})


def trials(n, space=SPACE, seed=0):
    scores = np.random.default_rng(seed).uniform(0.5, 0.95, n)
    return [Trial(config, float(score)) for config, score in zip(space.sample(n, seed=seed), scores, strict=True)]


def split(made):
    return [trial.config for trial in made], [trial.score for trial in made]


def replies(*texts):
    """Answers in turn, the last one for ever."""
    left = list(texts)
    return ScriptedLanguageModel(lambda _: left.pop(0) if len(left) > 1 else left[0])


# ---------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("lower", [False, True])
def test_expected_improvement_is_the_mean_improvement(lower):
    rng = np.random.default_rng(0)
    mean, sd, best = np.array([0.3, 0.8, 0.55]), np.array([0.2, 0.05, 0.3]), 0.6
    found = expected_improvement(mean, sd, best, lower)
    drawn = rng.normal(mean, sd, (2_000_000, 3))
    gain = np.maximum(best - drawn if lower else drawn - best, 0)
    assert found == pytest.approx(gain.mean(axis=0), rel=0.01, abs=1e-6)
    d = best - mean if lower else mean - best
    assert found == pytest.approx(d * stats.norm.cdf(d / sd) + sd * stats.norm.pdf(d / sd), abs=1e-12)
    assert expected_improvement([0.7, 0.5], [0.0, 0.0], best, lower).tolist() == pytest.approx(
        [0, 0.1] if lower else [0.1, 0]
    )
    with pytest.raises(InputError, match="not negative"):
        expected_improvement([0.1], [-1.0], 0.0)


@pytest.mark.parametrize(
    ("scores", "alpha", "lower", "bounds", "wanted"),
    [
        ([0.5, 0.9], 0.1, False, (-math.inf, math.inf), 0.94),
        ([0.5, 0.9], -0.2, False, (0, 1), 0.82),
        ([0.5, 0.9], 0.0, False, (0, 1), 0.8996),
        ([0.5, 0.9], 0.1, True, (0, math.inf), 0.46),
        ([2.0, 2.0], 0.1, False, (-math.inf, math.inf), 2.02),
        ([-2.0, -2.0], 0.1, True, (-math.inf, math.inf), -2.02),
        ([0.0, 0.0], 0.1, False, (-math.inf, math.inf), 0.0),
        ([0.5, 1.0], 0.1, False, (0, 1), 0.9995),
        ([0.5, 0.999], 0.1, False, (0, 1), 0.999 + 0.001 * 0.499),
        ([1.0, 1.0], 0.1, False, (0, 1), 0.999),
        ([0.9999999, 1.0], 0.1, False, (0, 1), 1 - 1e-4),
        ([0.0, 0.4], 0.1, True, (0, 1), 0.0004),
        ([0.0, 0.0], 0.1, True, (0, 1), 1e-5),
        ([0.5, math.nan, 0.9], 1.0, False, (-math.inf, math.inf), 1.3),
        ([0.95], 1.0, False, (0, 1), 0.95 + 0.1 * 0.095),
    ],
)
def test_the_wanted_score(scores, alpha, lower, bounds, wanted):
    assert desired_score(scores, alpha, lower, bounds) == pytest.approx(wanted, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(-1, 1), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_wanted_score_is_always_possible(scores, alpha, lower):
    wanted = desired_score(scores, alpha, lower, (0.0, 1.0))
    assert wanted >= 1e-5 if lower else wanted <= 0.9999


def test_wanted_scores_need_scores_and_an_alpha():
    with pytest.raises(DataError, match="at least one finite"):
        desired_score([math.nan])
    with pytest.raises(InputError, match="alpha"):
        desired_score([0.5], 1.5)


def test_regret_is_normalised_by_what_all_methods_reached():
    assert normalized_regret([0.4, 0.8, math.nan, 0.7], 0.9, 0.4).tolist() == pytest.approx([1, 0.2, 0.2, 0.2])
    assert normalized_regret([3.0, 1.0], 1.0, 3.0, True).tolist() == [1, 0]
    with pytest.raises(InputError, match="better than the worst"):
        normalized_regret([0.5], 0.4, 0.9)


# --------------------------------------------------------------------------------------------------------------- surrogates


def test_a_sampled_surrogate_gives_numpys_mean_and_deviation():
    configs, scores = split(trials(6))
    told = iter([0.7, 0.8, 0.75, 0.72, 0.9, 0.6, 0.65, 0.7, 0.55, 0.81])
    surrogate = DiscriminativeSurrogate(
        SPACE, CONTEXT, ScriptedLanguageModel(lambda _: f" {next(told):.6f} ##"), n_templates=2, n_samples=10
    )
    mean, sd = surrogate.fit(configs, scores).predict(configs[:1])
    drawn = np.array([0.7, 0.8, 0.75, 0.72, 0.9, 0.6, 0.65, 0.7, 0.55, 0.81])
    assert mean == pytest.approx([drawn.mean()], abs=1e-12)
    assert sd == pytest.approx([drawn.std()], abs=1e-12)


def test_a_configuration_without_an_answer_has_the_others_mean_and_no_nan():
    configs, scores = split(trials(6))
    first, second = SPACE.sample(2, seed=9)
    written = Wording(SPACE, CONTEXT).sentence(first)
    account = Account()
    options = {"n_templates": 2, "n_samples": 6, "account": account}
    llm = ScriptedLanguageModel(lambda prompt: "no idea" if prompt.endswith(f"{written}\nScore: ##") else "0.8 ##")
    mean, sd = DiscriminativeSurrogate(SPACE, CONTEXT, llm, **options).fit(configs, scores).predict([first, second])
    assert mean == pytest.approx([0.8, 0.8])
    assert sd.tolist() == [1e-5, 1e-5]
    assert account.rejected == 6
    mean, sd = DiscriminativeSurrogate(SPACE, CONTEXT, replies("?"), **options).fit(configs, scores).predict([first])
    assert mean == pytest.approx([np.mean(scores)])
    assert sd == pytest.approx([np.std(scores)])


def test_each_template_gives_at_least_three_answers():
    asked = []
    llm = ScriptedLanguageModel(lambda prompt: asked.append(prompt) or "0.5 ##")
    configs, scores = split(trials(4))
    DiscriminativeSurrogate(SPACE, CONTEXT, llm, n_templates=2, n_samples=2).fit(configs, scores).predict(configs[:2])
    assert len(asked) == 2 * 2 * 3
    assert len(set(asked)) == 4


def test_digits_give_the_mean_and_deviation_of_their_distribution():
    configs, scores = split(trials(5))
    p = np.array([0.05, 0, 0.1, 0, 0.25, 0, 0, 0.6, 0, 0])
    asked = []

    def log_probability(prompt, text):
        asked.append(prompt)
        return math.log(max(p[int(text)], 1e-300)) - 4  # digits are a small part of what may follow

    llm = ScriptedLanguageModel(str, log_probability=log_probability)
    surrogate = DiscriminativeSurrogate(SPACE, CONTEXT, llm, method="logprob").fit(configs, scores)
    mean, sd = surrogate.predict(configs[:2])
    drawn = np.random.default_rng(0).choice(10, 400_000, p=p) + np.random.default_rng(1).random(400_000)
    step = (max(scores) - min(scores)) / 8
    assert mean[0] == pytest.approx(min(scores) + (drawn.mean() - 1) * step, rel=0.002)
    assert sd[0] == pytest.approx(drawn.std() * step, rel=0.01)
    told = [float(x) for x in re.findall(r"Score: ## ([\d.]+) ##", asked[0])]
    assert sorted(told)[0] == 1.0
    assert sorted(told)[-1] == 9.0


def test_digits_of_equal_scores_stay_finite():
    llm = ScriptedLanguageModel(str, log_probability=lambda *_: -1.0)
    for score in (0.0, 0.7):
        surrogate = DiscriminativeSurrogate(LINE, CONTEXT, llm, method="logprob")
        mean, sd = surrogate.fit(LINE.sample(3), [score] * 3).predict(LINE.sample(2, seed=1))
        assert np.isfinite(mean).all()
        assert (sd > 0).all()


def test_labels_are_the_trials_strictly_beyond_the_percentile():
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    llm = ScriptedLanguageModel(str, log_probability=lambda *_: -1.0)
    for context, wanted in ((CONTEXT, [0] * 6 + [1] * 2), (ERROR, [1] * 2 + [0] * 6)):
        assert GenerativeSurrogate(LINE, context, llm).fit(LINE.sample(8), scores).labels() == wanted
    assert GenerativeSurrogate(LINE, CONTEXT, llm).fit(LINE.sample(4), [0.5] * 4).labels() == [0] * 4


def test_the_generative_surrogate_compares_zero_and_one():
    configs, scores = split(trials(8))
    p = {"0": 0.02, "1": 0.06}
    llm = ScriptedLanguageModel(str, log_probability=lambda _, text: math.log(p[text.strip()]))
    found = GenerativeSurrogate(SPACE, CONTEXT, llm).fit(configs, scores).predict_proba(configs[:3])
    assert found == pytest.approx([0.75] * 3, abs=1e-12)
    with pytest.raises(ScoringUnavailable, match="discriminative"):
        GenerativeSurrogate(SPACE, CONTEXT, replies("1 ##")).fit(configs, scores).predict_proba(configs[:1])


def test_the_smaller_error_is_the_better_one_for_both_surrogates():
    observed = [({"x": 0.1}, 4.0), ({"x": 0.5}, 1.0), ({"x": 0.9}, 6.0)]
    offers = iter(["x: 0.30 ##", "x: 0.60 ##"] * 9)

    def answer(prompt):
        if "Recommend" in prompt:
            return next(offers)
        return f"{2 - float(re.findall(r'x is ([0-9.]+)', prompt)[-1]):.6f} ##"

    told = []

    def best_below(prompt, text):
        told.append(prompt)
        return float(re.findall(r"x is ([0-9.]+)", prompt)[-1]) * int(text)

    for surrogate in ("discriminative", "generative"):
        search = LLAMBO(
            LINE, ERROR, ScriptedLanguageModel(answer, log_probability=best_below), surrogate=surrogate,
            initial=[config for config, _ in observed], n_candidates=2,
        )  # fmt: skip
        for config, score in observed:
            search.tell(config, score)
        assert search.ask() == {"x": 0.6}
    assert "x is 0.50\nAmong the best: ## 1 ##" in told[0]


def test_recalibration_covers_68_percent():
    rng = np.random.default_rng(0)
    mean, truth = np.zeros(4000), rng.normal(size=4000)
    for sd in (0.1, 3.0):
        factor = recalibration(mean, np.full(4000, sd), truth)
        assert factor * sd == pytest.approx(stats.norm.ppf(0.84), rel=0.05)
    configs, scores = split(trials(6))
    wide, narrow = (
        DiscriminativeSurrogate(SPACE, CONTEXT, replies("0.7 ##"), recalibrate=on)
        .fit(configs, scores)
        .predict(configs[:1])
        for on in (True, False)
    )
    assert wide[0] == narrow[0]
    assert narrow[1] == pytest.approx([1e-5])
    assert wide[1] >= narrow[1]


def test_bootstrap_draws_other_examples_for_each_template():
    configs, scores = split(trials(12))
    asked = []
    llm = ScriptedLanguageModel(lambda prompt: asked.append(prompt) or "0.5 ##")
    DiscriminativeSurrogate(SPACE, CONTEXT, llm, bootstrap=True, n_samples=6).fit(configs, scores).predict(configs[:1])
    sets = [frozenset(re.findall(r"Score: ## ([\d.]+) ##", prompt)) for prompt in dict.fromkeys(asked)]
    assert sets[0] != sets[1]
    assert all(len(one) < 12 for one in sets)


# ------------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("text", "whole", "wanted"),
    [
        (" 0.93 ##", True, 0.93),
        (" 0.93 ##\n\nConfiguration: max_depth is 3\nScore: ## 0.5 ##", True, 0.93),
        ("## 0.93 ##", True, 0.93),
        ("Score: ## 0.93 ##", True, 0.93),
        ("The best was 0.95 and ## 0.91 ## was next. Score: ## 0.93 ##", True, 0.93),
        ("0.93", True, 0.93),
        ("-1.5e-3 ##", True, -0.0015),
        ("0.93", False, None),
        ("## 0.93", False, None),
        ("The score is 0.93", True, None),
        ("Score: 0.93", True, None),
        ("about ## 0.9 or so ##", True, None),
        ("nan ##", True, None),
        ("1e999 ##", True, None),
        ("", True, None),
        ("## ##", True, None),
        ("####", True, None),
    ],
)
def test_only_what_is_fenced_is_read(text, whole, wanted):
    assert read_answer(text, read_score, whole=whole) == wanted


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_reply_can_crash_the_reading(text):
    wording = Wording(SPACE, CONTEXT)
    read_answer(text, read_score)
    config = read_answer(text, wording.read_pairs)
    assert config is None or SPACE.check(config) == config
    wording.read_dictionaries("{" + text + "}")


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_back(seed, anonymize, log10):
    wording = Wording(SPACE, CONTEXT, anonymize=anonymize, log10=log10)
    (config,) = SPACE.sample(1, seed=seed)
    read = wording.read_pairs(wording.pairs(config))
    assert {**read, "tol": 0} == {**config, "tol": 0}
    assert read["tol"] == pytest.approx(config["tol"], rel=0.02) if log10 else abs(read["tol"] - config["tol"]) < 6e-6
    assert read == wording.read_pairs(wording.sentence(config))
    assert type(read["rule"]) is type(config["rule"])
    listed = repr([dict(zip(wording.names.values(), read.values(), strict=True))])
    if not log10:
        assert wording.read_dictionaries(listed) == ([read], 0)


@pytest.mark.parametrize(
    "text",
    [
        "max_depth: 16, tol: 0.01, width: 25, rule: gini",
        "max_depth: 2.5, tol: 0.01, width: 25, rule: gini",
        "max_depth: 2, tol: 0.5, width: 25, rule: gini",
        "max_depth: 2, tol: 0.01, width: 26, rule: gini",
        "max_depth: 2, tol: 0.01, width: 25, rule: entropy",
        "max_depth: 2, tol: 0.01, width: 25",
        "max_depth: 2, max_depth: 3, tol: 0.01, width: 25, rule: gini",
        "max_depth: 2, more: 3, tol: 0.01, width: 25, rule: gini",
        "max_depth: None, tol: 0.01, width: 25, rule: gini",
        "max_depth: nan, tol: 0.01, width: 25, rule: gini",
    ],
)
def test_a_configuration_that_is_none_is_not_read(text):
    with pytest.raises(InputError):
        Wording(SPACE, CONTEXT).read_pairs(text)


# ------------------------------------------------------------------------------------------------- candidates and the start


def test_candidates_are_new_different_and_inside():
    observed = trials(5)
    wording = Wording(SPACE, CONTEXT)
    fresh = SPACE.sample(6, seed=77)
    texts = [f"{wording.pairs(config)} ##" for config in (fresh[0], fresh[0], observed[2].config, *fresh[1:])]
    account = Account()
    sampler = CandidateSampler(SPACE, CONTEXT, replies("bad", "max_depth: 99 ##", *texts), account=account)
    known = wording.read_pairs(wording.pairs(observed[2].config))
    found = sampler.propose([*observed, Trial(known, 0.5)], 0.97)
    assert [SPACE.key(config) for config in found] == [
        SPACE.key(wording.read_pairs(wording.pairs(config))) for config in fresh
    ]
    assert account.rejected >= 4
    assert account.fallbacks == 0


def test_a_model_that_talks_nonsense_is_asked_four_times_and_then_random_ones_stand_in():
    asked = []
    account = Account(keep=True)
    llm = ScriptedLanguageModel(lambda prompt: asked.append(prompt) or "I cannot do that.")
    found = CandidateSampler(SPACE, CONTEXT, llm, account=account).propose(trials(5), 0.9)
    assert len(found) == 5
    assert len(asked) == 4 * 10
    assert (account.rejected, account.fallbacks) == (40, 1)
    assert account.prompts == list(dict.fromkeys(asked))


def test_a_space_that_is_used_up_still_gives_something():
    small = SearchSpace({"a": Int(1, 2)})
    observed = [({"a": 1}, 0.1), ({"a": 2}, 0.2)]
    assert CandidateSampler(small, CONTEXT, replies("a: 1 ##")).propose(observed, 0.3)[0]["a"] in (1, 2)
    assert len(warm_start(small, CONTEXT, replies("none"), 5)) == 5


def test_starting_points_are_read_filled_up_and_counted():
    good = '{"max_depth": 3, "tol": 0.001, "width": 25, "rule": "gini"}'
    other = "{'max_depth': 7, 'tol': 0.01, 'width': 16, 'rule': True}"
    lost = '{"max_depth": None, "tol": 0.01, "width": 16, "rule": "gini"}'
    account = Account()
    found = warm_start(SPACE, CONTEXT, replies(f"[{good}, {other}, {lost}]"), 3, account=account)
    assert found[:2] == [
        {"max_depth": 3, "tol": 0.001, "width": 25, "rule": "gini"},
        {"max_depth": 7, "tol": 0.01, "width": 16, "rule": True},
    ]
    assert len({SPACE.key(config) for config in found}) == 3
    assert account.fallbacks == 1
    for design in ("random", "sobol", "latin_hypercube"):
        made = warm_start(SPACE, CONTEXT, None, 5, design, seed=2)
        assert made == warm_start(SPACE, CONTEXT, None, 5, design, seed=2)
        assert [SPACE.check(config) for config in made] == made
    with pytest.raises(InputError, match="a warm start is"):
        warm_start(SPACE, CONTEXT, None, 5, "grid")
    with pytest.raises(InputError, match="needs a language model"):
        warm_start(SPACE, CONTEXT, None)


# ------------------------------------------------------------------------------------------------------------------ prompts


def run_scripted(**options):
    llm = ScriptedLanguageModel(lambda prompt: "0.5 ##" if "Predict" in prompt else "?")
    x, y = load_wine(return_X_y=True, as_frame=True)
    context = TaskContext.from_data(DecisionTreeClassifier(), x, y, "accuracy")
    space = known_space(DecisionTreeClassifier())
    search = LLAMBO(space, context, llm, keep_prompts=True, seed=3, **options)
    return search.optimize(lambda config: config["max_features"], 3)


def test_the_same_seed_sends_the_same_prompts():
    assert run_scripted().prompts == run_scripted().prompts
    assert len(run_scripted().prompts) == 1 + 3 * (2 + 2 * 5)


def test_anonymous_prompts_hold_no_parameters_name():
    names = list(known_space(DecisionTreeClassifier()))
    plain, hidden = run_scripted().prompts, run_scripted(anonymize=True).prompts
    for name in names:
        assert name in plain[0]
        assert not any(re.search(rf"\b{name}\b", prompt) for prompt in hidden)
    assert all("X6" in prompt for prompt in hidden)


def test_levels_of_context_tell_what_they_may():
    full, partial, none = (
        run_scripted(context_level=level, warm_start=level).prompts for level in ("full", "partial", "none")
    )
    assert "skewness" in full[0]
    assert "178 samples, 13 features, 3 classes" in full[0]
    assert not any("178" in prompt for prompt in (*partial, *none))
    assert all("accuracy" in prompt and "classification" in prompt for prompt in partial)
    assert not any("accuracy" in prompt or "classification" in prompt for prompt in none)
    assert any("ends of the ranges" in prompt for prompt in partial)
    assert not any("ends of the ranges" in prompt for prompt in none)
    assert any("a metric" in prompt for prompt in none)


def test_templates_have_the_trials_in_different_orders():
    first, second = CandidateSampler(SPACE, CONTEXT, replies("?")).prompts(trials(8), 0.97)
    orders = [re.findall(r"Score: ([\d.]+)\nConf", prompt) for prompt in (first, second)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0][-1] == "0.970000"


def test_a_prompt_that_is_too_long_keeps_the_best_and_the_most_recent():
    observed = [Trial(config, float(i)) for i, config in enumerate(LINE.sample(40, seed=1))]
    account = Account(keep=True)
    sampler = CandidateSampler(LINE, CONTEXT, replies("x: 0.123 ##"), context_window=420, account=account)
    reverse = [Trial(trial.config, -trial.score) for trial in observed]
    with pytest.warns(UserWarning, match=r"\d+ of 40 trials fit .* 420 tokens") as told:
        sampler.propose(reverse, 1.0)
    kept = int(re.match(r"(\d+)", str(told[0].message)).group(1))
    scores = sorted(float(x) for x in re.findall(r"Score: (-?[\d.]+)\nConfiguration: ## x", account.prompts[0]))
    wanted = sorted([*(-float(i) for i in range(-(-kept // 2))), *(-float(i) for i in range(40 - kept // 2, 40))])
    assert scores == wanted
    assert len(account.prompts[0]) / 3 <= 420
    with pytest.raises(InputError, match="more than the window of 50"):
        CandidateSampler(LINE, CONTEXT, replies("?"), context_window=50).propose(observed, 1.0)


def test_the_data_are_described_by_the_rows_that_are_given():
    x, y = load_wine(return_X_y=True, as_frame=True)
    told = TaskContext.from_data(make_pipeline(StandardScaler(), DecisionTreeClassifier()), x, y, "accuracy")
    assert (told.model, told.n_samples, told.n_features, told.n_classes) == ("DecisionTreeClassifier", 178, 13, 3)
    assert told.class_shares == pytest.approx([71 / 178, 59 / 178, 48 / 178])
    assert told.n_target_correlations == int((x.corrwith(y).abs() > 0.5).sum())
    assert told.bounds == (0, 1)
    assert TaskContext.from_data(SVR(), *load_diabetes(return_X_y=True), "neg_mean_squared_error").bounds[1] == 0
    mixed = x.assign(kind=["a", "b"] * 89)
    assert TaskContext.from_data(DecisionTreeClassifier(), mixed, y).n_categorical == 1
    with pytest.raises(InputError, match="scikit-learn knows"):
        TaskContext.from_data(SVR(), x, y, "acuracy")
    with pytest.raises(DataError, match="as many targets"):
        TaskContext.from_data(SVR(), x, y[:-1], "r2")
    with pytest.raises(InputError, match="needs a metric"):
        TaskContext("m", "t", " ")


# --------------------------------------------------------------------------------------------------------------- the search


EXAMPLE = r"Score: (-?[\d.]+)\nConfiguration: ## x: (-?[\d.]+), y: (-?[\d.]+) ##"


def near_the_best(prompt):
    """A scripted optimiser without knowledge of the objective: small moves from the best example, nearest example's score."""
    rng = np.random.default_rng(len(prompt) + sum(map(ord, prompt[-200:])) + near_the_best.calls)
    near_the_best.calls += 1
    number = r"(-?[\d.]+)"
    if "Recommend" in prompt:
        rows = [list(map(float, row)) for row in re.findall(EXAMPLE, prompt)]
        _, x, y = max(rows)
        width = 0.3 + 3 * rng.random() ** 2
        x, y = (low + 15 - abs((at + rng.normal() * width - low) % 30 - 15) for at, low in ((x, -5), (y, 0)))
        return f"x: {x:.4f}, y: {y:.4f} ##"
    rows = np.array(re.findall(rf"x is {number}, y is {number}\nScore: ## {number} ##", prompt), dtype=float)
    at = np.array(re.findall(rf"x is {number}, y is {number}\nScore: ##$", prompt), dtype=float)[0]
    return f"{rows[np.argmin(((rows[:, :2] - at) ** 2).sum(axis=1)), 2]:.6f} ##"


near_the_best.calls = 0
BRANIN = SearchSpace({"x": Float(-5.0, 10.0), "y": Float(0.0, 15.0)})


def branin(config):
    x, y = config["x"], config["y"]
    b, c = 5.1 / (4 * math.pi**2), 5 / math.pi
    return -((y - b * x * x + c * x - 6) ** 2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10)


def test_the_loop_finds_a_better_point_than_random_and_stays_inside():
    near_the_best.calls = 0
    ours, random = [], []
    for seed in range(4):
        context = TaskContext("a function", "test", "height", bounds=(-math.inf, 0.0))
        llm = ScriptedLanguageModel(near_the_best)
        found = LLAMBO(BRANIN, context, llm, warm_start="random", seed=seed, n_samples=6).optimize(branin, 20)
        assert [BRANIN.check(config) for config in found.configs] == list(found.configs)
        assert len(found.scores) == 25
        assert found.n_unreadable == 0
        assert found.n_fallback == 0
        assert np.isfinite(found.predicted[5:]).all()
        assert found.tokens > 0
        assert found.cost(1e6, 0.0) == found.prompt_tokens
        ours.append(-0.397887 - found.best_so_far[-1])
        random.append(-0.397887 - RandomSearch(BRANIN, seed=seed).optimize(branin, 20).best_so_far[-1])
    assert np.mean(ours) <= 0.6 * np.mean(random)


def test_a_killed_search_continues_and_keeps_its_account(tmp_path):
    llm = ScriptedLanguageModel(lambda prompt: "0.5 ##" if "Predict" in prompt else "?")
    whole = LLAMBO(SPACE, CONTEXT, llm, seed=1).optimize(lambda config: config["tol"], 4)
    file, seen = tmp_path / "run.json", []

    def killed(config):
        seen.append(config)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return config["tol"]

    with pytest.raises(KeyboardInterrupt):
        LLAMBO(SPACE, CONTEXT, llm, seed=1).optimize(killed, 4, file=file)
    again = LLAMBO(SPACE, CONTEXT, llm, seed=1).optimize(lambda config: config["tol"], 4, file=file)
    assert again.configs == whole.configs
    assert again.predicted == pytest.approx(whole.predicted, nan_ok=True)
    assert again.n_rejected == whole.n_rejected
    assert again.n_fallback == whole.n_fallback
    assert again.calls > 0
    assert json.loads(file.read_text())["trials"][-1][0] == whole.configs[-1]


def test_failed_trials_are_kept_but_not_told():
    account = LLAMBO(SPACE, CONTEXT, replies("?"), warm_start="random", keep_prompts=True)
    result = account.optimize(lambda config: math.nan if config["max_depth"] > 5 else 0.25, 3)
    assert np.isnan(result.scores).any()
    assert len(result.scores) == 8
    assert not any("nan" in prompt for prompt in result.prompts)
    lost = LLAMBO(SPACE, CONTEXT, replies("?"), warm_start="random").optimize(lambda _: math.nan, 3)
    assert np.isnan(lost.scores).all()
    assert lost.n_fallback == 3


def test_ask_is_a_function_of_what_was_told():
    search = LLAMBO(SPACE, CONTEXT, replies("?"), warm_start="sobol", n_initial=2)
    assert search.ask() == search.ask() == SPACE.sobol(2, seed=0)[0]
    for config in SPACE.sample(3, seed=5):  # a user may evaluate others than were asked for
        search.tell(config, 0.5)
    before = search.llm.usage.calls
    assert search.ask() == search.ask()
    assert search.llm.usage.calls == before + 4 * 2 + 2 * 5
    with pytest.raises(InputError, match="max_depth"):
        search.tell(search.ask() | {"max_depth": 99}, 0.1)


def test_options_out_of_range_are_told_at_once():
    for options, text in (
        ({"surrogate": "forest"}, "surrogate is"),
        ({"fallback": "grid"}, "fallback is"),
        ({"alpha": 2.0}, "alpha"),
        ({"n_initial": 0}, "n_initial"),
        ({"n_candidates": 0}, "n_candidates"),
        ({"n_templates": 0}, "n_templates"),
        ({"n_samples": 0}, "n_samples"),
        ({"method": "guess"}, "method is"),
        ({"surrogate": "generative", "top_fraction": 1.0}, "top_fraction"),
        ({"context_level": "some"}, "context level"),
        ({"context_window": 0}, "context_window"),
        ({"initial": [{"max_depth": 99, "tol": 0.01, "width": 16, "rule": "gini"}]}, "max_depth: 99"),
    ):
        with pytest.raises(InputError, match=text):
            LLAMBO(SPACE, CONTEXT, replies("?"), **options)
    surrogate = DiscriminativeSurrogate(SPACE, CONTEXT, replies("?"))
    with pytest.raises(InputError, match="fit the surrogate"):
        surrogate.predict(SPACE.sample(1))
    with pytest.raises(DataError, match="finite scores"):
        surrogate.fit(SPACE.sample(1), [math.nan])
    with pytest.raises(DataError, match="2 scores"):
        surrogate.fit(SPACE.sample(1), [0.1, 0.2])
    with pytest.raises(DataError, match="did not fail"):
        CandidateSampler(SPACE, CONTEXT, replies("?")).propose([Trial(SPACE.sample(1)[0], math.nan)], 0.5)


def test_an_endpoint_that_is_down_stops_or_is_replaced_and_counted():
    pytest.importorskip("openai")
    with protocol_server() as server:
        url = server.url
    llm = connect(url, "m", cache=False, retries=0)
    with pytest.raises(EndpointUnavailable):
        LLAMBO(LINE, CONTEXT, llm, fallback="raise").optimize(lambda config: config["x"], 1)
    result = LLAMBO(LINE, CONTEXT, llm).optimize(lambda config: config["x"], 2)
    assert result.n_fallback == 7
    assert len(result.scores) == 7
    with protocol_server(*[401] * 9) as server, pytest.raises(EndpointError, match="401"):
        LLAMBO(LINE, CONTEXT, connect(server.url, "m", cache=False)).optimize(lambda config: config["x"], 1)


def test_an_endpoint_without_log_probabilities_says_so():
    pytest.importorskip("openai")
    with protocol_server(*["no logprobs"] * 99) as server:
        llm = connect(server.url, "m", cache=False)
        search = LLAMBO(LINE, CONTEXT, llm, surrogate="generative", warm_start="random")
        with pytest.raises(ScoringUnavailable, match="discriminative"):
            search.optimize(lambda config: config["x"], 1)


# -------------------------------------------------------------------------------------------------- baselines and reports


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("kind", [RandomSearch, SobolSearch, TPESearch, GaussianProcessSearch])
def test_baselines_start_alike_repeat_and_stay_inside(kind, lower):
    if kind is TPESearch:
        pytest.importorskip("optuna")
    start = SPACE.sample(5, seed=8)
    sign = -1 if lower else 1

    def objective(config):
        return math.nan if config["rule"] is True else sign * math.log(config["tol"])

    found, again = (kind(SPACE, lower_is_better=lower, initial=start, seed=1).optimize(objective, 4) for _ in range(2))
    assert found.configs == again.configs
    assert list(found.configs[:5]) == start
    assert [SPACE.check(config) for config in found.configs] == list(found.configs)


@pytest.mark.parametrize("lower", [False, True])
def test_model_based_baselines_beat_random(lower):
    pytest.importorskip("optuna")
    sign = -1 if lower else 1
    best = {}
    for kind in (RandomSearch, TPESearch, GaussianProcessSearch):
        runs = [
            kind(BRANIN, lower_is_better=lower, seed=s).optimize(lambda c: sign * branin(c), 12).best_so_far[-1]
            for s in range(2)
        ]
        best[kind] = sign * float(np.mean(runs))
    assert best[GaussianProcessSearch] > best[TPESearch] - 3
    assert best[GaussianProcessSearch] > best[RandomSearch]


def test_a_surrogates_report_is_numpys():
    class Known:
        def fit(self, configs, scores):
            return self

        def predict(self, configs):
            return np.array([config["x"] for config in configs]), np.full(len(configs), 0.1)

    held = LINE.sample(400, seed=1)
    x = np.array([config["x"] for config in held])
    truth = x + np.random.default_rng(0).normal(0, 0.1, 400)
    report = evaluate_surrogate(Known(), LINE.sample(3), [0.1, 0.2, 0.3], held, truth)
    assert report.nrmse == pytest.approx(np.sqrt(np.mean((truth - x) ** 2)) / np.ptp(truth))
    assert report.log_density == pytest.approx(stats.norm.logpdf(truth, x, 0.1).mean())
    assert report.coverage == pytest.approx(0.68, abs=0.06)
    assert report.calibration_error < 0.05
    assert report.spearman.value == pytest.approx(stats.spearmanr(x, truth).statistic)
    assert report.spearman.low < report.spearman.value < report.spearman.high
    assert report.regret == pytest.approx((truth.max() - truth[x.argmax()]) / np.ptp(truth))
    assert report.verdict == "usable"
    turned = evaluate_surrogate(Known(), LINE.sample(3), [0.1, 0.2, 0.3], held, -truth, lower_is_better=True)
    assert turned.verdict == "model too weak"
    assert turned.regret == pytest.approx((-truth[x.argmin()] + truth.max()) / np.ptp(truth))
    assert rank_agreement([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    with pytest.raises(DataError, match="not all equal"):
        evaluate_surrogate(Known(), LINE.sample(3), [0.1, 0.2, 0.3], held, np.ones(400))


def test_a_gaussian_process_ranks_what_it_has_not_seen():
    configs, held = BRANIN.sample(30, seed=0), BRANIN.sample(50, seed=1)
    report = evaluate_surrogate(
        GaussianProcessSurrogate(BRANIN), configs, [branin(c) for c in configs], held, [branin(c) for c in held]
    )
    assert report.spearman.low > 0.5


def test_candidates_are_described_where_they_lie():
    observed = BRANIN.sample(50, seed=0)
    near, far = observed[:5], BRANIN.from_unit(np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    one = evaluate_candidates(BRANIN, near, [branin(c) for c in near], observed, -0.4, -310.0)
    two = evaluate_candidates(BRANIN, far, [branin(c) for c in far], observed, -0.4, -310.0)
    assert two.mahalanobis > one.mahalanobis
    assert two.log_density < one.log_density
    assert two.generalised_variance == pytest.approx(1 / 9)
    assert one.best_regret == pytest.approx(min((-0.4 - branin(c)) / 309.6 for c in near))
    with pytest.raises(DataError, match="at least two"):
        evaluate_candidates(BRANIN, near[:1], [0.1], observed, 1.0, 0.0)


# --------------------------------------------------------------------------------------------------------- other libraries


def test_an_estimator_is_tuned_inside_scikit_learn():
    x, y = load_wine(return_X_y=True)
    space = SearchSpace({"max_depth": Int(1, 6), "criterion": Categorical(("gini", "entropy"))})
    llm = replies("max_depth: 4, criterion: entropy ##")
    search = LLAMBOSearchCV(
        DecisionTreeClassifier(random_state=0), space, "accuracy", llm=llm, cv=3, n_trials=2,
        options={"warm_start": "random", "method": "sample"},
    )  # fmt: skip
    search = clone(search).fit(x, y)
    assert set(search.best_params_) == set(space)
    assert type(search.best_params_["max_depth"]) is int
    assert search.best_score_ == np.nanmax(search.result_.scores)
    assert (search.predict(x) == y).mean() == search.score(x, y)
    assert search.predict_proba(x).shape == (178, 3)
    with pytest.raises(InputError, match="give a language model"):
        LLAMBOSearchCV(DecisionTreeClassifier(), space).fit(x, y)
    with pytest.raises(InputError, match="no parameters criterion"):
        LLAMBOSearchCV(SVR(), SearchSpace({"C": Float(1.0, 2.0), "criterion": Int(1, 2)}), llm=llm).fit(x, y)


def test_an_evaluation_that_raises_is_a_failed_trial():
    x, y = load_wine(return_X_y=True)
    space = SearchSpace({"min_samples_leaf": Float(-1.0, 0.3), "max_depth": Int(1, 3)})
    search = LLAMBOSearchCV(
        DecisionTreeClassifier(), space, llm=replies("?"), cv=3, n_trials=1,
        options={"initial": [{"min_samples_leaf": -0.5, "max_depth": 2}, {"min_samples_leaf": 0.1, "max_depth": 2}]},
    ).fit(x, y)  # fmt: skip
    assert math.isnan(search.result_.scores[0])
    assert search.best_score_ > 0.5


def test_it_is_a_sampler_of_optunas():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = LLAMBO(
        SPACE, ERROR, replies("max_depth: 2, tol: 0.001, width: 16, rule: True ##"), warm_start="sobol", n_initial=3
    )
    study = optuna.create_study(direction="minimize", sampler=search.as_optuna_sampler())

    def objective(trial):
        trial.suggest_float("other", 0, 1)
        trial.suggest_categorical("rule", ["gini", "log, loss", True])
        trial.suggest_categorical("width", [16, 25, 40])
        return trial.suggest_float("tol", 1e-5, 0.1, log=True) * trial.suggest_int("max_depth", 1, 15)

    study.optimize(objective, n_trials=4)
    assert [trial.params["tol"] for trial in study.trials[:3]] == [config["tol"] for config in SPACE.sobol(3, seed=0)]
    assert study.trials[3].params["max_depth"] in range(1, 16)
    wrong = optuna.create_study(direction="maximize", sampler=search.as_optuna_sampler())
    with pytest.raises(InputError, match="direction"):
        wrong.optimize(objective, n_trials=1)


def test_an_objective_of_other_parameters_is_told_to_optuna():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = LLAMBO(SPACE, ERROR, replies("?"), warm_start="sobol").as_optuna_sampler()
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(
        InputError, match="does not suggest rule, tol, width"
    ):  # and not the first point again and again
        study.optimize(lambda trial: trial.suggest_int("max_depth", 1, 15), n_trials=2)
    both = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
    with pytest.raises(InputError, match="one objective"):
        both.optimize(lambda trial: (trial.suggest_int("max_depth", 1, 15), 0.0), n_trials=1)


def test_what_cannot_be_searched_is_told_with_its_reason():
    x, y = load_wine(return_X_y=True)
    x[0, 0] = np.nan
    space = SearchSpace({"C": Float(0.1, 10.0)})
    options = {"warm_start": "random", "n_initial": 2}
    with pytest.raises(DataError, match=r"every evaluation failed.*NaN"):
        LLAMBOSearchCV(SVC(), space, llm=replies("?"), n_trials=0, options=options).fit(x, y)
    with pytest.raises(InputError, match="name of a metric"):
        LLAMBOSearchCV(SVC(), space, llm=replies("?")).set_params(scoring=len).fit(x, y)
    with pytest.raises(InputError, match="SearchSpace, got dict"):
        LLAMBOSearchCV(SVC(), space, llm=replies("?")).set_params(space={"C": Float(0.1, 10.0)}).fit(x, y)
    with pytest.raises(InputError, match="got None"):
        LLAMBO(space, CONTEXT, replies("?"), **options).optimize(lambda config: None, 1)


def test_scores_that_are_close_are_told_apart():
    scores = [3e-9, 4e-9, 9e-9]
    observed = [Trial({"x": x}, score) for x, score in zip((0.2, 0.5, 0.8), scores, strict=True)]
    told = CandidateSampler(LINE, ERROR, replies("?")).prompts(observed, 2e-9)[0]
    assert [f"Score: {score:.12f}" in told for score in (*scores, 2e-9)] == [True] * 4
    usual = CandidateSampler(LINE, CONTEXT, replies("?")).prompts(trials(3, LINE), 0.97)[0]
    assert usual.endswith("Score: 0.970000\nConfiguration: ##")
    seen = []
    llm = ScriptedLanguageModel(lambda prompt: seen.append(prompt) or "0.000000004 ##")
    surrogate = DiscriminativeSurrogate(LINE, ERROR, llm).fit(*split(observed))
    assert surrogate.predict([{"x": 0.4}])[0] == pytest.approx(4e-9)
    assert all(f"## {score:.12f} ##" in prompt for prompt in seen for score in scores)


def test_equal_prompts_are_asked_once_for_as_many_answers():
    asked = []
    llm = ScriptedLanguageModel(lambda prompt: asked.append(prompt) or f"x: {len(asked) / 100:.2f} ##")
    found = CandidateSampler(LINE, CONTEXT, llm, n_candidates=6, n_templates=3).propose([({"x": 0.5}, 0.7)], 0.8)
    assert len(asked) == len(found) == 6  # one trial has one order
    assert llm.usage.calls == 1
    DiscriminativeSurrogate(LINE, CONTEXT, llm, n_templates=3, n_samples=9).fit([{"x": 0.5}], [0.7]).predict(
        [{"x": 0.1}]
    )
    assert llm.usage.calls == 2


def test_scripted_models_are_test_doubles():
    llm = ScriptedLanguageModel(lambda prompt: f"{prompt}; and more")
    assert [made.text for made in llm.generate("a", 2, stop=[";"])] == ["a", "a"]
    assert llm.chat([{"role": "user", "content": "hi"}]).text == "hi; and more"
    assert llm.usage.calls == 2
    for call in (lambda: llm.score("a", ["b"]), lambda: llm.token_logprobs("a")):
        with pytest.raises(ScoringUnavailable):
            call()
    assert ScriptedLanguageModel(str, log_probability=lambda a, b: -float(len(a + b))).score("a", ["bc"]).tolist() == [
        -3.0
    ]


def test_a_local_model_is_read_by_digits_from_a_shared_prefix(tmp_path):
    pytest.importorskip("transformers")
    from tiny_language_model import save_tiny_model

    llm = connect(model=save_tiny_model(tmp_path), cache=False)
    llm.model.config.max_position_embeddings = 4096
    llm.model.model.rotary_emb.max_seq_len_cached = 4096
    configs, scores = split(trials(4, LINE))
    surrogate = DiscriminativeSurrogate(LINE, CONTEXT, llm).fit(configs, scores)
    assert surrogate.method == "logprob"
    mean, sd = surrogate.predict(LINE.sample(3, seed=4))
    assert np.isfinite(mean).all()
    assert (sd > 0).all()
    result = LLAMBO(LINE, CONTEXT, llm, n_initial=2, n_candidates=2).optimize(lambda config: config["x"], 1)
    assert result.n_fallback >= 1  # its words are no numbers
    assert len(result.scores) == 3


def test_a_gaussian_process_leaves_failed_trials_out():
    space = SearchSpace({"x": Float(0.0, 1.0)})
    configs = [{"x": x} for x in (0.1, 0.4, 0.6, 0.9)]
    some = GaussianProcessSurrogate(space).fit([configs[i] for i in (0, 1, 3)], [1.0, 2.0, 3.0]).predict(configs)
    every = GaussianProcessSurrogate(space).fit(configs, [1.0, 2.0, math.nan, 3.0]).predict(configs)
    assert np.array_equal(some[0], every[0])
    with pytest.raises(DataError, match="finite"):
        GaussianProcessSurrogate(space).fit(configs, [math.nan] * 4)


def test_what_is_no_table_is_told():
    from scipy.sparse import csr_matrix

    with pytest.raises(DataError, match="rows and columns"):
        TaskContext.from_data(DecisionTreeClassifier(), csr_matrix(np.eye(4)), [0, 1, 0, 1])
