"""Groups stay whole, and what leaked is named."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theodolite.core.errors import InputError
from theodolite.core.estimate import bootstrap
from theodolite.core.splits import find_leaks, group_split, time_blocks


@given(st.lists(st.integers(0, 8), min_size=6, max_size=60), st.integers(0, 100), st.booleans())
def test_every_row_is_on_one_side_and_no_group_on_both(groups, seed, with_classes):
    groups = np.array(groups)
    if len(np.unique(groups)) < 2:
        return
    y = np.arange(len(groups)) % 2 if with_classes else None
    split = group_split(groups, seed=seed, y=y)
    assert sorted([*split.train, *split.test]) == list(range(len(groups)))
    assert not find_leaks(split.train, split.test, groups=groups)
    assert len(split.train)
    assert len(split.test)


def test_classes_keep_their_shares():
    groups, y = np.repeat(np.arange(100), 3), np.repeat(np.arange(100) % 2, 3)
    split = group_split(groups, test_share=0.25, y=y)
    assert len(split.test) == 75
    assert abs(y[split.test].mean() - 0.5) < 0.05


def test_the_seed_decides():
    groups = np.arange(40)
    np.testing.assert_array_equal(group_split(groups, seed=3).test, group_split(groups, seed=3).test)
    assert not np.array_equal(group_split(groups, seed=3).test, group_split(groups, seed=4).test)


def test_leaks_are_named():
    groups = np.array(["a", "a", "b", "c"])
    X = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [5.0, 6.0]])
    leak = find_leaks(np.array([0, 3]), np.array([1, 2]), groups=groups, X=X)
    assert leak
    assert leak.groups == ("a",)
    assert leak.twins.tolist() == [[0, 2]]
    assert not find_leaks(np.array([0, 1]), np.array([3]), groups=groups, X=X)


def test_a_row_on_both_sides_is_an_error():
    with pytest.raises(InputError, match="row 2"):
        find_leaks(np.array([0, 2]), np.array([2, 3]))


@pytest.mark.parametrize(("groups", "share"), [([1, 1, 1], 0.3), ([1, 2], 0.0), ([1, 2], 1.0)])
def test_what_cannot_be_split_is_refused(groups, share):
    with pytest.raises(InputError, match=r"two groups|test share"):
        group_split(np.array(groups), test_share=share)


def test_frames_names_and_missing_values_are_taken():
    X = pd.DataFrame({"colour": ["red", "blue", "red"], "size": [1, 2, 1]})
    assert find_leaks([0, 1], [2], X=X).twins.tolist() == [[0, 2]]
    numbers = np.array([[np.nan, 0.0], [np.nan, 1.0], [np.nan, -0.0]])
    assert find_leaks([0, 1], [2], X=numbers).twins.tolist() == [[0, 2]]
    assert not find_leaks([], [0], X=numbers)
    split = group_split(pd.Series(["ann", "bob", "ann", 3]))
    assert sorted([*split.train, *split.test]) == [0, 1, 2, 3]


@pytest.mark.parametrize("share", [0.01, 0.95])
def test_each_side_has_a_group_however_small_its_share(share):
    split = group_split([0, 1, 1], test_share=share)
    assert min(len(split.train), len(split.test)) > 0


def test_rare_classes_are_no_warning():
    split = group_split(np.arange(12), y=np.r_[np.zeros(11), 1], seed=1)
    assert len(split.test) == 4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: group_split(["a", None, "b"]), "1 rows have no group"),
        (lambda: group_split([[1, 2]]), "one group a row"),
        (lambda: group_split([0, 1, 2], y=[0, 1]), "one class a row"),
        (lambda: group_split(np.arange(9), y=np.linspace(0, 1, 9)), "y must hold classes"),
        (lambda: group_split(np.arange(4), y=np.arange(4)), "class of its own"),
        (lambda: find_leaks([True, False], [False, True]), "row numbers"),
        (lambda: find_leaks([0], [-1]), "row numbers"),
        (lambda: find_leaks([0], [5], X=np.zeros((2, 2))), "has row 5, but X only 2"),
        (lambda: find_leaks([0], [5], groups=["a"]), "has row 5, but groups only 1"),
    ],
)
def test_what_is_no_split_is_named(call, match):
    with pytest.raises(InputError, match=match):
        call()


def test_blocks_of_neighbours_widen_the_interval_of_a_series_with_memory():
    rng = np.random.default_rng(0)
    noise, series = rng.normal(size=2_000), np.zeros(2_000)
    for t in range(1, 2_000):
        series[t] = 0.95 * series[t - 1] + noise[t]
    rows, blocks = bootstrap(series), bootstrap(series, groups=time_blocks(2_000, 100))
    assert blocks.high - blocks.low > 3 * (rows.high - rows.low)
    with pytest.raises(InputError, match="length=0"):
        time_blocks(3, 0)
