import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError


def curve(runs, chance=0.1, reference=1.0):
    return QualityCurve.from_runs(runs, chance=chance, reference=reference)


def test_smallest_is_the_first_that_reaches_the_share_of_the_reference():
    found = curve({1: [0.3], 2: [0.89], 4: [0.91], 8: [0.85]}).smallest()
    assert found.dimension == 4
    assert found.target == pytest.approx(0.9)


def test_above_chance_differs_where_a_majority_class_passes_alone():
    flat = curve({1: [0.9], 8: [0.9]}, chance=0.9, reference=0.95)
    assert flat.smallest().dimension == 1
    assert flat.smallest(above_chance=True).dimension is None


def test_none_where_nothing_passes_never_the_largest_tried():
    assert curve({1: [0.2], 1000: [0.5]}).smallest().dimension is None


def test_interval_over_runs_holds_the_neighbours_that_some_resamples_choose():
    found = curve({1: [0.85, 0.95, 0.88], 2: [0.95, 0.96, 0.97]}).smallest()
    assert found.dimension == 2
    assert found.estimate.low == 1
    assert found.standard_error > 0


def test_high_end_is_infinite_where_some_resamples_never_pass():
    found = curve({1: [0.2, 0.2, 0.2], 2: [0.7, 1.0, 1.0]}).smallest()
    assert found.dimension == 2
    assert found.estimate.high == np.inf


def test_runs_that_were_not_made_are_left_out():
    ragged = QualityCurve.from_runs({1: [0.5], 2: [0.9, 1.0]}, chance=0, reference=1)
    assert ragged.mean.tolist() == pytest.approx([0.5, 0.95])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.05, 1.0))
def test_smallest_agrees_with_a_loop(means, level):
    made = QualityCurve.from_runs({d + 1: [m] for d, m in enumerate(means)}, chance=0.0, reference=1.0)
    expected = next((d + 1 for d, m in enumerate(means) if m >= level), None)
    assert made.smallest(level).dimension == expected


@pytest.mark.parametrize(("make", "text"), [
    (lambda: QualityCurve((2, 1), np.ones((2, 1)), 0, 1), "increase"),
    (lambda: QualityCurve((1, 2), np.ones((1, 1)), 0, 1), "shape"),
    (lambda: QualityCurve((1,), np.full((1, 2), np.nan), 0, 1), "at least one run"),
    (lambda: curve({1: [1.0]}).smallest(0.0), "level"),
    (lambda: curve({1: [1.0]}, reference=-1.0).smallest(), "reference above 0"),
])  # fmt: skip
def test_bad_input_is_told(make, text):
    with pytest.raises(InputError, match=text):
        make()
