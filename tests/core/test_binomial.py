"""Exact bounds against sums of the binomial law itself."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from theodolite.core.binomial import allowed_errors, binomial_interval, needed_rows
from theodolite.core.errors import InputError


def at_most(k, n, p):
    return sum(math.comb(n, h) * p**h * (1 - p) ** (n - h) for h in range(k + 1))


@given(st.integers(1, 60), st.data())
def test_the_ends_leave_the_tails(n, data):
    k = data.draw(st.integers(0, n))
    low, high = binomial_interval(k, n, confidence=0.9)
    if k > 0:
        assert 1 - at_most(k - 1, n, low) == pytest.approx(0.05, abs=1e-9)
    if k < n:
        assert at_most(k, n, high) == pytest.approx(0.05, abs=1e-9)
    assert low <= k / n <= high


@pytest.mark.parametrize(
    ("n", "epsilon", "delta", "k"),
    [
        (100, 0.05, 0.1, 1),
        (100, 0.1, 0.1, 5),
        (100, 0.2, 0.1, 14),
        (500, 0.1, 0.1, 40),
        (22, 0.1, 0.1, 0),
        (21, 0.1, 0.1, None),
        (100, 0.1, 0.01, 3),
        (100, 0.05, 0.01, 0),
    ],
)
def test_published_numbers_of_allowed_errors(n, epsilon, delta, k):
    assert allowed_errors(n, epsilon, delta) == k


@given(st.integers(1, 80), st.floats(0.01, 0.6), st.floats(0.001, 0.5))
def test_allowed_errors_are_the_most_that_the_law_bears(n, epsilon, delta):
    k = allowed_errors(n, epsilon, delta)
    if k is None:
        assert (1 - epsilon) ** n > delta * (1 - 1e-9)
    else:
        assert at_most(k, n, epsilon) <= delta * (1 + 1e-9)
        assert at_most(k + 1, n, epsilon) > delta * (1 - 1e-9)


@given(st.floats(0.01, 0.9), st.floats(0.001, 0.9))
def test_needed_rows_is_where_zero_errors_begin_to_promise(epsilon, delta):
    n = needed_rows(epsilon, delta)
    assert (1 - epsilon) ** n <= delta * (1 + 1e-9)
    assert n == 1 or (1 - epsilon) ** (n - 1) > delta * (1 - 1e-9)


@pytest.mark.parametrize("wrong", [0, 1, -0.1, float("nan")])
def test_promises_outside_zero_and_one_are_refused(wrong):
    with pytest.raises(InputError, match="epsilon"):
        allowed_errors(10, wrong, 0.1)
    with pytest.raises(InputError, match="delta"):
        needed_rows(0.1, wrong)
    with pytest.raises(InputError, match="confidence"):
        binomial_interval(1, 2, confidence=wrong)


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 4), (0, 0)])
def test_counts_that_cannot_be_are_refused(successes, n):
    with pytest.raises(InputError, match=f"successes={successes}, n={n}"):
        binomial_interval(successes, n)
