"""The search space: oracles for its scales, then what must hold for any space, then every error."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.core.errors import DataError, InputError
from theodolite.hyperparameters.space import (
    Categorical,
    Float,
    Int,
    Optimizer,
    Ordinal,
    SearchSpace,
    best_so_far,
)

QUICK = settings(max_examples=50, deadline=None)
MIXED = SearchSpace(
    {
        "depth": Int(1, 15),
        "leaves": Int(2, 1024, "log"),
        "rate": Float(1e-5, 0.1, "log"),
        "share": Float(0.01, 0.99, "logit"),
        "decrease": Float(0.0, 0.5),
        "width": Ordinal((16, 25, 40.5)),
        "rule": Categorical(("gini", "log, loss", None, True, 3)),
    }
)


class Walk(Optimizer):
    """Random configurations, two of them a design of its own."""

    def ask(self):
        return self.space.sample(1, seed=self._rng())[0]

    def _initial_count(self):
        return 2


def test_scales_are_uniform_in_their_own_coordinate():
    assert Float(1e-4, 1.0, "log").from_unit(0.5) == pytest.approx(1e-2)
    assert Float(0.01, 0.99, "logit").from_unit(0.5) == pytest.approx(0.5)
    assert Float(0.01, 0.99, "logit").to_unit(0.99) == pytest.approx(1)
    assert Float(2.0, 4.0).from_unit(0.25) == 2.5
    drawn = [one["a"] for one in SearchSpace({"a": Int(3, 6)}).sample(8000, seed=1)]
    assert np.bincount(drawn)[3:] / 8000 == pytest.approx([0.25] * 4, abs=0.02)
    counts = np.bincount([one["a"] for one in SearchSpace({"a": Int(1, 4, "log")}).sample(8000, seed=1)])[1:] / 8000
    assert counts == pytest.approx(np.diff(np.log([1, 2, 3, 4, 5])) / np.log(5), abs=0.02)


@given(st.integers(0, 2**32 - 1))
@QUICK
def test_what_is_drawn_is_of_the_space_and_comes_back(seed):
    (config,) = MIXED.sample(1, seed=seed)
    assert MIXED.check(config) == config
    assert [type(value) for value in MIXED.check(config).values()] == [type(value) for value in config.values()]
    (back,) = MIXED.from_unit(MIXED.to_unit([config]))
    assert MIXED.key(back) == MIXED.key(config)
    for name, parameter in MIXED.items():
        read = parameter.parse(parameter.text(config[name]))
        assert type(read) is type(config[name])
        if isinstance(parameter, Float):
            assert read == pytest.approx(config[name], abs=0.51 * 10**-parameter.decimals)
        else:
            assert read == config[name]
    assert MIXED.encode([config]).shape == (1, 6 + 5)
    assert MIXED.encode([config])[0, 6:].sum() == 1


@given(st.floats(1e-6, 0.4), st.sampled_from(["linear", "log", "logit"]), st.floats(0, 1))
@QUICK
def test_no_float_leaves_its_bounds(low, scale, u):
    parameter = Float(low, low + 0.5, scale)
    value = parameter.from_unit(u)
    assert parameter.low <= value <= parameter.high
    assert parameter.low <= float(parameter.text(value)) <= parameter.high


@given(st.integers(-1000, 1000), st.integers(1, 2000), st.floats(0, 1))
@QUICK
def test_no_int_leaves_its_bounds(low, width, u):
    parameter = Int(low, low + width)
    value = parameter.from_unit(u)
    assert type(value) is int
    assert low <= value <= low + width
    assert parameter.from_unit(parameter.to_unit(value)) == value


def test_values_are_written_with_the_lower_bounds_decimals():
    assert Float(1e-5, 0.1).decimals == 5
    assert Float(0.001, 0.999).text(0.12345) == "0.123"
    assert Float(1, 1000.0, "log").text(31.4159) == "31.42"
    assert Float(0.0049, 0.5).text(0.49999) == "0.5000"
    assert Float(0.0, 1 / 3).text(1 / 3) == "0.33"
    assert Float(0.015, 0.99).text(0.015) == "0.015"


def test_values_keep_their_type():
    config = MIXED.check(
        {"depth": 3.0, "leaves": np.int64(8), "rate": np.float32(0.01), "share": 0.5, "decrease": 0, "width": 25.0,
         "rule": np.int64(3)}
    )  # fmt: skip
    assert [type(value) for value in config.values()] == [int, int, float, float, float, int, int]
    assert Categorical((True, 2)).check(True) is True
    with pytest.raises(InputError):
        Categorical((1, 2)).check(True)


def test_designs_cover_the_space():
    for made in (MIXED.sobol(16, seed=3), MIXED.latin_hypercube(16, seed=3)):
        units = MIXED.to_unit(made)
        assert len(made) == 16
        assert sorted(np.floor(units[:, 2] * 16).astype(int)) == list(range(16))
    assert MIXED.sobol(5, seed=1) == MIXED.sobol(16, seed=1)[:5]
    assert len(MIXED.sobol(1)) == 1


def test_a_space_is_made_of_plain_lists_and_back():
    spec = json.loads(json.dumps(MIXED.to_spec()))
    assert SearchSpace.from_spec(spec).to_spec() == MIXED.to_spec()
    assert dict(SearchSpace.from_spec({"C": ["float", "log", [1, 1000.0]]}))["C"] == Float(1.0, 1000.0, "log")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SearchSpace({}), "at least one parameter"),
        (lambda: SearchSpace({" ": Int(1, 2)}), "not blank"),
        (lambda: SearchSpace({"a": (1, 2)}), "must be an Int"),
        (lambda: Float(0.0, 1.0, "log"), "above 0"),
        (lambda: Int(0, 5, "log"), "above 0"),
        (lambda: Float(0.0, 0.9, "logit"), "inside"),
        (lambda: Float(2.0, 1.0), "low < high"),
        (lambda: Float(0.0, math.inf), "finite"),
        (lambda: Float(0.1, 1.0, "square"), "a scale is one of"),
        (lambda: Ordinal((1,)), "two different"),
        (lambda: Ordinal((1, "b")), "not a number"),
        (lambda: Categorical(("a", "a")), "two different"),
        (lambda: Categorical(("1", 1)), "written alike"),
        (lambda: SearchSpace.from_spec({"a": ["int", "linear"]}), "a parameter is"),
        (lambda: SearchSpace.from_spec({"a": ["real", "linear", [1, 2]]}), "a kind is"),
        (lambda: SearchSpace.from_spec({"a": ["int", "linear", [1, 2.5]]}), "whole numbers"),
        (lambda: SearchSpace.from_spec({"a": ["int", "linear", "12"]}), "a list"),
        (lambda: SearchSpace.from_spec({"a": ["float", "linear", [1]]}), "low, high"),
    ],
)
def test_a_space_that_is_none_is_told(make, text):
    with pytest.raises(InputError, match=text):
        make()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"depth": 16}, "depth: 16 is not between"),
        ({"depth": 2.5}, "not a whole number"),
        ({"depth": True}, "not a number"),
        ({"depth": math.nan}, "not a whole number"),
        ({"rate": "0.1"}, "not a number"),
        ({"width": 17}, "not one of 16, 25"),
        ({"rule": "Gini"}, "not one of gini"),
        ({"more": 1}, "not of the space"),
    ],
)
def test_a_configuration_outside_is_told_by_its_parameter(change, text):
    (config,) = MIXED.sample(1)
    with pytest.raises(InputError, match=text):
        MIXED.check(config | change)
    with pytest.raises(InputError, match="missing"):
        MIXED.check({"depth": 3})


@pytest.mark.parametrize("text", ["", "three", "1_0", "nan", "inf", "0x10", "1 2"])
def test_what_is_no_number_is_not_read_as_one(text):
    with pytest.raises(InputError):
        Int(1, 15).parse(text)
    with pytest.raises(InputError):
        Float(0.0, 20.0).parse(text)


def test_the_best_so_far_passes_over_failures():
    assert best_so_far([3.0, math.nan, 1.0, 2.0], lower_is_better=True).tolist() == [3, 3, 1, 1]
    assert np.isnan(best_so_far([math.nan, 1.0])[0])


def test_a_search_that_is_killed_continues_as_if_it_had_not_been(tmp_path):
    def objective(config):
        return math.nan if config["rule"] is None else config["share"]

    whole = Walk(MIXED, seed=4).optimize(objective, 10)
    assert np.isnan(whole.scores).any()
    file = tmp_path / "search.json"
    calls = []

    def killed(config):
        calls.append(config)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return objective(config)

    with pytest.raises(KeyboardInterrupt):
        Walk(MIXED, seed=4).optimize(killed, 10, file=file)
    assert len(json.loads(file.read_text())["trials"]) == 4
    again = Walk(MIXED, seed=4).optimize(objective, 10, file=file)
    assert again.configs == whole.configs
    assert np.array_equal(again.scores, whole.scores, equal_nan=True)
    assert len(again.scores) == 12
    assert again.best.score == np.nanmax(whole.scores)
    done = Walk(MIXED, seed=4).optimize(lambda _: pytest.fail("nothing is left to evaluate"), 10, file=file)
    assert done.configs == whole.configs


def test_a_file_of_another_search_is_refused(tmp_path):
    file = tmp_path / "search.json"
    Walk(MIXED, seed=4).optimize(lambda _: 1.0, 1, file=file)
    with pytest.raises(DataError, match="seed differs"):
        Walk(MIXED, seed=5).optimize(lambda _: 1.0, 1, file=file)
    with pytest.raises(DataError, match="space differs"):
        Walk(SearchSpace({"a": Int(1, 2)}), seed=4).optimize(lambda _: 1.0, 1, file=file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trials": [1]}))
    with pytest.raises(DataError, match="not a whole record"):
        Walk(MIXED, seed=4).optimize(lambda _: 1.0, 1, file=file)
    file.write_text("{")
    with pytest.raises(DataError, match="not a JSON file"):
        Walk(MIXED, seed=4).optimize(lambda _: 1.0, 1, file=file)


def test_scores_and_results_are_checked():
    search = Walk(MIXED)
    with pytest.raises(InputError, match="finite"):
        search.tell(MIXED.sample(1)[0], math.inf)
    with pytest.raises(InputError, match="not be negative"):
        search.optimize(lambda _: 1.0, -1)
    result = search.optimize(lambda _: math.nan, 1)
    with pytest.raises(DataError, match="every evaluation failed"):
        _ = result.best
    assert result.tokens == 0
    assert result.cost(1.0, 2.0) == 0
