import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from theodolite.core.errors import InputError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, mean_of_runs, proportion


def test_proportion_is_the_exact_binomial_interval():
    ours = proportion(7, 20)
    theirs = stats.binomtest(7, 20).proportion_ci(method="exact")
    assert (ours.value, ours.low, ours.high) == pytest.approx((0.35, theirs.low, theirs.high))


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5)])
def test_proportion_at_the_ends(successes, n):
    ours = proportion(successes, n)
    theirs = stats.binomtest(successes, n).proportion_ci(method="exact")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_mean_of_runs_is_the_student_interval():
    runs = [1.0, 2.0, 4.0, 3.0]
    theirs = stats.t.interval(0.95, 3, np.mean(runs), stats.sem(runs))
    ours = mean_of_runs(runs)
    assert (ours.low, ours.high) == pytest.approx(theirs)


def test_one_run_has_no_interval():
    assert mean_of_runs([0.5]).low == -math.inf
    assert mean_of_runs([0.5]).high == math.inf


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = bootstrap(rng.normal(size=50), seed=trial, resamples=300)
        covered += found.low <= 0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_by_groups_is_wider_where_rows_of_a_group_are_copies():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=20), 10)
    groups = np.repeat(np.arange(20), 10)
    alone, together = bootstrap(values), bootstrap(values, groups=groups)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert together.n == 20


def test_bootstrap_of_a_median_uses_the_statistic():
    found = bootstrap(np.array([0.0, 0.0, 0.0, 100.0]), np.median)
    assert found.value == 0.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_an_interval_always_holds_its_value(values):
    found = bootstrap(np.array(values), resamples=50)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_estimate_is_never_nan_or_infinite(value):
    with pytest.raises(InputError, match="finite"):
        Estimate(value, 0, 1)


def test_an_estimate_outside_its_interval_is_refused():
    with pytest.raises(InputError, match="interval"):
        Estimate(2, 0, 1)


def test_a_comparison_needs_a_control_and_says_which_it_loses_to():
    ours = Estimate(0.8, 0.75, 0.85)
    below, above = (
        Control("random", Estimate(0.5, 0.45, 0.55), "random"),
        Control("formula", Estimate(0.82, 0.8, 0.9), "closed-form"),
    )
    reference = Control("full", Estimate(0.99, 0.98, 1.0), "reference")
    assert Comparison("ours", ours, (below, above, reference)).loses_to == (above,)
    assert Comparison("error", ours, (below,), larger_is_better=False).loses_to == (below,)
    with pytest.raises(InputError, match="control"):
        Comparison("ours", ours, ())


@pytest.mark.parametrize(("call", "text"), [
    (lambda: proportion(3, 2), "successes"),
    (lambda: proportion(0, 0), "n >= 1"),
    (lambda: mean_of_runs([]), "at least one"),
    (lambda: mean_of_runs([1.0, math.nan]), "finite"),
    (lambda: bootstrap(np.empty(0)), "zero rows"),
])  # fmt: skip
def test_bad_input_is_told(call, text):
    with pytest.raises(InputError, match=text):
        call()


def test_estimates_print_for_people():
    assert str(Estimate.exact(199210, "parameters")) == "199,210 parameters"
    assert str(Estimate(0.95, 0.9, 0.99)) == "0.95 [0.9, 0.99]"
