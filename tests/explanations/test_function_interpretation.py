import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from language_server import protocol_server
from theodolite.core.errors import DataError, InputError
from theodolite.core.sources import find_data
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.explanations import function_interpretation as fi
from theodolite.explanations.function_interpretation import numeric as numeric_module
from theodolite.explanations.function_interpretation.families import COMPOSABLE, FAMILIES, SIMPLE, draw_parameters
from theodolite.explanations.function_interpretation.judges import parse_choice
from theodolite.explanations.function_interpretation.loop import stated_interval
from theodolite.explanations.function_interpretation.numeric import GRID, VARIANTS
from theodolite.explanations.function_interpretation.scores import interval_iou, run_code, score_values
from theodolite.explanations.function_interpretation.strings import pointless
from theodolite.explanations.function_interpretation.table import string_inputs
from theodolite.language import connect
from theodolite.language.model import EndpointUnavailable
from theodolite.survey.chart import Budget
from theodolite.survey.explanations import function_interpretation as chart
from theodolite.survey.explanations import probe_words


def numeric(family, *parameters, variant="clean", interval=(10.0, 20.0), level=5.0, noise="normal"):
    return fi.NumericFunction(((family, parameters),), "", variant, fi.Corruption(*interval, level), noise)


# ---- families and variants, exactly


def test_families_by_hand():
    x = np.array([-2.0, 0.0, 2.0])
    wanted = {
        ("linear", (2, 1)): [-3, 1, 5],
        ("polynomial", (1, 0, -1)): [3, -1, 3],
        ("absolute", (3, 1)): [7, 1, 7],
        ("step", (2, 1, 7)): [1, 15, 3],  # at zero the parameter, not one half
        ("relu", (2, 1, 0.5)): [-1, 1, 5],
        ("constant", (-4,)): [-4, -4, -4],
        ("rectangle", (4,)): [1, 1, 1],
        ("rectangle", (3,)): [0, 1, 0],
        ("ceil", ()): [-2, 0, 2],
        ("rational", ((1,), (0, 0, 1))): [0.25, math.inf, 0.25],
        ("reciprocal", (4,)): [-0.125, math.inf, 0.125],
        ("square_wave", (8, 0)): [-1, -1, 1],
    }
    for (family, parameters), expected in wanted.items():
        assert np.allclose(numeric(family, *parameters).clean(x), expected), family
    assert np.isclose(numeric("logarithm", 2, 1, 10).clean(np.array([100.0]))[0], 5)
    assert np.isnan(numeric("logarithm", 2, 1, 10).clean(np.array([-1.0]))[0])
    assert np.isclose(numeric("root", 2, 1, 2).clean(np.array([9.0]))[0], 7)
    assert np.isnan(numeric("root", 2, 1, 2).clean(np.array([-9.0]))[0])
    assert np.isclose(numeric("gaussian", 3, 2).clean(np.array([3.0]))[0], 1 / (2 * math.sqrt(2 * math.pi)))
    assert np.isclose(numeric("sin", 2, 4, 1, 5).clean(np.array([2.0]))[0], 7)


def test_sums_and_products():
    parts = (("linear", (2, 1)), ("step", (3, 1, 0)))
    x = np.array([-1.0, 1.0])
    made = [fi.NumericFunction(parts, sign, "clean", fi.Corruption(0, 1, 0), "normal").clean(x) for sign in ("*", "+")]
    assert np.allclose(made, [[-1, 12], [0, 7]])


def test_corruption_is_open_inside_and_closed_on_half_lines():
    x = np.array([9.9, 10.0, 15.0, 20.0])
    assert fi.Corruption(10, 20, 0).inside(x).tolist() == [False, False, True, False]
    assert fi.Corruption(-math.inf, 10, 0).inside(x).tolist() == [True, True, False, False]
    assert fi.Corruption(20, math.inf, 0).inside(x).tolist() == [False, False, False, True]


def test_noise_has_the_mean_that_is_scored():
    x = np.full(20_000, 3.0)
    for noise, shift, sd in (("normal", 0, 1), ("uniform", 0, 3**-0.5), ("poisson", 1, 1)):
        fn = numeric("linear", 2, 1, variant="noisy", noise=noise)
        assert fn.noise == noise
        assert np.allclose(fn.mean(x), 7 + shift)
        assert np.isclose(fn(x).mean(), 7 + shift, atol=0.05)
        assert np.isclose(fn(x).std(), sd, atol=0.05)
    fn = numeric("linear", 2, 1, variant="corrupted")
    inside = fn(np.full(20_000, 15.0))
    assert np.isclose(inside.mean(), 5, atol=0.01)
    assert np.isclose(inside.std(), 0.1, atol=0.01)
    assert np.allclose(fn.mean(np.array([15.0, 3.0])), [5, 7])


def test_noise_starts_anew_on_request_only():
    fn = numeric("linear", 2, 1, variant="noisy")
    x = np.ones(5)
    first, second = fn(x), fn(x)
    assert not np.allclose(first, second)
    assert np.array_equal(fn.again()(x), first)


def test_network_is_close_to_the_formula_and_is_its_own_truth():
    fn = numeric("absolute", 3, 1, variant="mlp")
    x = np.linspace(-100, 100, 57)
    assert np.abs(fn(x) - fn.clean(x)).max() < 0.05 * np.ptp(fn.clean(x))
    assert np.array_equal(fn.mean(x), fn(x))
    assert not np.array_equal(fn(x), fn.clean(x))


def test_networks_are_trained_as_the_plain_gradient_says_together_or_alone(monkeypatch):
    """Values and gradients from all points x units, by torch, with torch's Adam."""
    monkeypatch.setattr(numeric_module, "_EPOCHS", 30)
    functions = [dataclasses.replace(fn, seed=fn.seed + 1) for fn in fi.make_numeric(6, 4, mix=(0, 0, 0, 1))]
    functions.append(dataclasses.replace(numeric("reciprocal", 2, variant="mlp"), domain=(0.0, 100.0)))  # infinite at 0
    together = numeric_module._trained(functions)
    for fn, made in zip(functions, together, strict=True):
        assert np.array_equal(numeric_module._trained([fn])[0](GRID), made(GRID))
        x = np.linspace(*fn.domain, 256)
        y = fn.clean(x)
        x, y = (torch.tensor(one[np.isfinite(y)]) for one in (x, y))
        z = (x - x.mean()) / (x - x.mean()).abs().max()
        t = (y - y.mean()) / (y.std(correction=0) or 1)
        theta = torch.tensor(numeric_module._start(fn.seed), requires_grad=True)
        adam, best, least = torch.optim.Adam([theta], lr=0.01), theta, math.inf
        for _ in range(30):
            w, b, v, c = theta.split((64, 64, 64, 1))
            values = torch.relu(z[:, None] * w + b) @ v + c
            loss = ((values - t) ** 2).mean()
            if float(loss.detach()) < least:
                best, least = values.detach() * (y.std(correction=0) or 1) + y.mean(), float(loss.detach())
            adam.zero_grad()
            loss.backward()
            adam.step()
        assert np.allclose(made(x.numpy()), best.numpy(), rtol=1e-6, atol=1e-6 * float(y.abs().max())), fn.kind


def test_generator_keeps_the_mix_the_ranges_and_the_seed(monkeypatch):
    monkeypatch.setattr(numeric_module, "_EPOCHS", 1)  # what is drawn does not depend on how networks are trained
    made = fi.make_numeric(250, 3)
    assert [fn.params for fn in made] == [fn.params for fn in fi.make_numeric(250, 3)]
    assert [fn.params for fn in made] != [fn.params for fn in fi.make_numeric(250, 4)]
    shares = [np.mean([fn.variant == variant for fn in made]) for variant in VARIANTS]
    assert np.abs(np.array(shares) - (0.483, 0.191, 0.176, 0.150)).max() < 0.1
    assert abs(np.mean([not fn.joined for fn in made]) - 0.85) < 0.08
    assert {fn.kind for fn in made if not fn.joined} == set(SIMPLE)
    assert {family for fn in made if fn.joined for family, _ in fn.parts} <= set(COMPOSABLE)
    for fn in made:
        assert np.isfinite(fn.clean(GRID)).sum() >= 64
        low, high = fn.corruption.low, fn.corruption.high
        assert math.isinf(low) or math.isinf(high) or 5 <= high - low <= 25
        assert (fn.interval is not None) == (fn.variant == "corrupted")
        assert (fn.noise is not None) == (fn.variant == "noisy")
    inside = np.mean([math.isfinite(fn.corruption.high - fn.corruption.low) for fn in made])
    assert abs(inside - 0.5) < 0.12
    assert {fn.variant for fn in fi.make_numeric(30, 0, mix=(0, 1, 0, 0))} == {"corrupted"}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 10**6))
def test_drawn_parameters_fit_their_family(family, seed):
    parameters = draw_parameters(family, np.random.default_rng(seed))
    with np.errstate(all="ignore"):
        assert FAMILIES[family](GRID, *parameters).shape == GRID.shape
    for value in np.ravel(np.array([one for one in parameters if not isinstance(one, tuple)], dtype=float)):
        assert round(float(value), 1) == value


@pytest.mark.parametrize("mix", [(1, 1, 0, 0), (0.5, 0.5), (1.5, -0.5, 0, 0), (0.2, 0.2, 0.2, 0.2)])
def test_wrong_mix(mix):
    with pytest.raises(InputError, match="four shares"):
        fi.make_numeric(3, 0, mix=mix)


def test_wrong_variant():
    with pytest.raises(InputError, match="corrupted"):
        numeric("linear", 1, 2).as_variant("broken")


# ---- the oracle: the truth scores perfectly on everything without noise


@pytest.mark.parametrize("variant", ["clean", "corrupted", "mlp"])
def test_oracle_on_numbers(variant):
    kinds: dict[str, fi.NumericFunction] = {}
    for fn in fi.make_numeric(80, 1):
        kinds.setdefault(fn.kind if not fn.joined else fn.joined, fn.as_variant(variant))
    assert len(kinds) >= 12
    for fn in list(kinds.values())[:: 2 if variant == "corrupted" else 4]:
        score = fi.score_numeric(fn, fi.interpret(fi.BlackBox(fn), fi.OracleInterpreter(fn)))
        assert (score.success, score.domain_iou, score.reason) == (True, 1.0, ""), fn.kind
        assert score.nmse < 1e-12
        assert score.local_nmse is None or score.local_nmse < 1e-12
    with pytest.raises(InputError, match="OracleInterpreter"):
        fi.interpret(fi.BlackBox(fn), fi.OracleInterpreter())


def test_oracle_on_strings():
    for fn in fi.make_strings(25, 2):
        told = fi.interpret(fi.BlackBox(fn), fi.OracleInterpreter(fn))
        assert fi.score_strings(fn, told, string_inputs(20, 5)) == 1.0, fn.kind


# ---- scores


def test_scores_by_hand():
    fn = numeric("linear", 1, 0)
    zero = score_values(fn, np.zeros(256))
    assert zero.nmse == 1.0
    assert not zero.success
    assert np.isclose(score_values(fn, GRID * 0.9).nmse, 0.01)
    high = numeric("linear", 1, 1000)
    assert score_values(high, np.full(256, 1000.0)).success  # the published normalisation is blind to this
    assert np.isclose(score_values(high, np.full(256, 1000.0)).r2_nmse, 1)
    flat = numeric("constant", 7)
    assert score_values(flat, np.full(256, 7.0)).r2_nmse == 0
    assert score_values(flat, np.full(256, 8.0)).r2_nmse == math.inf
    assert score_values(numeric("constant", 0), np.full(256, 1.0)).nmse == math.inf


def test_the_clean_formula_scores_one_inside_the_interval():
    for fn in fi.make_numeric(60, 5, mix=(0, 1, 0, 0)):
        score = score_values(fn, fn.clean(GRID))
        assert (score.local_nmse is None) == (not fn.detectable())
        if score.local_nmse is not None and np.isfinite(score.local_nmse):
            assert np.isclose(score.local_nmse, 1)


def test_points_where_the_truth_is_not_finite_do_not_count_but_a_nan_of_the_code_does():
    fn = numeric("logarithm", 2, 1, 10)
    values = np.where(GRID > 0, fn.clean(GRID), 1e9)
    assert score_values(fn, values).nmse == 0
    values[-1] = np.nan
    score = score_values(fn, values)
    assert (score.nmse, score.success, score.reason) == (math.inf, False, "not finite")
    with pytest.raises(DataError, match="no finite value"):
        score_values(numeric("logarithm", 2, 1, 1.0), GRID)
    with pytest.raises(InputError, match="256"):
        score_values(fn, np.zeros(3))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("", "no code"),
        ("def f(x) return", "syntax"),
        ("import os\ndef f(x): return 1", "unsafe: os"),
        ("def f(x): return x.__class__", "unsafe: __class__"),
        ("def f(x): return 1 / (x - 0.5)", "error"),
        ("def f(x): return None", "not a number"),
        ("def f(x): return 'three'", "not a number"),
        ("def f(x): return [1, 2]", "not finite"),
    ],
)
def test_code_that_fails_scores_nothing_with_a_reason(code, reason):
    fn = numeric("linear", 2, 1, variant="corrupted")
    score = fi.score_numeric(fn, fi.Interpretation("x", "none", code))
    assert (score.success, score.nmse, score.reason) == (False, math.inf, reason)
    assert score.local_nmse == math.inf
    assert score.domain_iou == 0


def test_time_and_memory_are_reasons():
    assert run_code("def f(x):\n    while True:\n        pass", [1.0])[1] == "timeout"
    assert run_code("def f(x): return [0] * 10 ** 10", [1.0])[1] == "memory"


def test_intervals():
    assert interval_iou((0, 10), (0, 10)) == 1
    assert interval_iou((-math.inf, 0), (-math.inf, 64)) == 128 / 192
    assert interval_iou((0, 1), (2, 3)) == 0
    for text, interval in {
        "none": None,
        "differs on [3, 4.5)": (3, 4.5),
        "for -2 < x <= 7": (-2, 7),
        "between 1e1 and 20": (10, 20),
        "x <= −3": (-math.inf, -3),
        "where x > 12.5, constant": (12.5, math.inf),
        "(5, inf)": (5, math.inf),
        "(4, 2)": None,
        "(-∞, ∞)": None,
        "x > 20 and x < 41.5": (20, 41.5),
        "3 >= x": (-math.inf, 3),
        "from -.5 to 3": (-0.5, 3),
        "x < 1 and x > 2": None,
    }.items():
        assert stated_interval(text) == interval, text


# ---- strings


def test_primitives_by_hand():
    from theodolite.explanations.function_interpretation import primitives as p

    wanted = [
        (p.alternate_case("abcd"), "AbCd"),
        (p.reverse_first_half("abcde"), "bacde"),
        (p.reverse_last_half("abcde"), "abedc"),
        (p.reverse_words("ab cd"), "ba dc"),
        (p.swap_ends("abc"), "cba"),
        (p.swap_positions("abc", 0, 9), "abc"),
        (p.swap_positions("abc", 0, 2), "cba"),
        (p.swap_vowels("hello"), "holle"),
        (p.spell_digits("a1b2"), "one two"),
        (p.keep_capitals("aBcD"), "BD"),
        (p.drop_repeats("hello"), "helo"),
        (p.middle_characters("abcd"), "bc"),
        (p.middle_characters("abc"), "b"),
        (p.vowels_to_counted("banana"), "bnnnnn"),
        (p.count_consonants("Hello 1"), "three"),
        (p.count_characters("a" * 25), "twenty-five"),
        (p.position_of_letter("abc", "c"), "two"),
        (p.indexes_of_digits("a1b2"), "one three"),
        (p.ordinal_of_middle("a-b"), "zero"),
        (p.ordinal_of_first("Z"), "twenty-six"),
        (p.caesar("xyZ 1", 3), "abC 1"),
        (p.caesar("abC", -3), "xyZ"),
        (p.shift_by_character("BaZ", 0, 1), "dcb"),
        (p.shift_middle("abc", 1), "acc"),
        (p.shift_middle("abcd", 1), "abcd"),
        (p.insert_middle("abcd", "X"), "abXcd"),
        (p.append_letter("ab", "b"), "ab"),
        (p.append_letter("ab", "c"), "abc"),
        (p.split_on("a-b-c", "-"), "a b c"),
        (p.shift_first("zoo", 2), "aoo"),
        (p.shift_first("yes", 2), "{es"),
        (p.shift_last("aa", -1), "az"),
    ]
    assert [got for got, _ in wanted] == [expected for _, expected in wanted]


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30), st.integers(0, 10**6))
def test_string_functions_take_any_text_and_are_functions(text, seed):
    fn = fi.make_strings(1, seed)[0]
    assert isinstance(fn(text), str)
    assert fn(text) == fn(text)


def test_string_generator():
    made = fi.make_strings(300, 0)
    assert len({fn.steps for fn in made}) == 300
    assert made[:5] == fi.make_strings(5, 0)
    assert abs(np.mean([len(fn.steps) == 2 for fn in made]) - 0.7) < 0.12
    assert not any(pointless(*(name for name, _ in fn.steps)) for fn in made if len(fn.steps) == 2)
    for pair in (
        ("lower", "upper"),
        ("count_vowels", "count_letter"),
        ("drop_spaces", "strip"),
        ("drop_digits", "spell_digits"),
    ):
        assert pointless(*pair)
    assert not pointless("reverse", "upper")


def test_inputs_that_were_asked_for_are_not_held_out():
    fn = fi.make_strings(1, 1)[0]
    told = fi.Interpretation("x", code=fn.source(), asked=("apple",))
    with pytest.raises(InputError, match="'apple'"):
        fi.score_strings(fn, told, ["pear", "apple"])
    with pytest.raises(InputError, match="at least one"):
        fi.score_strings(fn, told, [])
    assert fi.score_strings(fn, dataclasses.replace(told, code=""), ["pear"]) == 0
    assert fi.score_strings(fn, dataclasses.replace(told, code="import os"), ["pear"]) == 0
    assert not set(string_inputs(50, 3)[:20]) & set(string_inputs(30, 3, without=string_inputs(50, 3)[:20]))


# ---- the black box


def test_black_box_counts_and_keeps():
    box = fi.BlackBox(lambda x: x**2, budget=3)
    assert box.query([2, 3.0]) == [(2.0, 4.0), (3.0, 9.0)]
    with pytest.raises(fi.QueryBudgetExceeded, match="2 inputs were asked for and 1 of 3"):
        box.query([1, 2])
    assert box.log == [(2.0, 4.0), (3.0, 9.0)]
    assert box.left == 1
    for wrong in ("a", None, True, math.nan, 200, [1]):
        with pytest.raises(fi.DomainError, match="must"):
            box.query([wrong])
    text = fi.BlackBox(fi.make_strings(1, 0)[0])
    with pytest.raises(fi.DomainError, match="text"):
        text.query([3])
    for options in ({"budget": 0}, {"bounds": (1, 0)}, {"bounds": (0, math.inf)}, {"bounds": (math.nan, 1)}):
        with pytest.raises(InputError, match="budget"):
            fi.BlackBox(lambda x: x, **options)
    with pytest.raises(InputError, match="numeric, string, neuron"):
        fi.BlackBox(lambda x: x, modality="image")


@pytest.mark.parametrize(
    "fn", [lambda x: 3.0, lambda x: x[:-1], lambda x: x[:, None], lambda x: x * 1j, lambda x: x.astype(str)]
)
def test_a_function_that_gives_no_number_for_each_input_is_named(fn):
    box = fi.BlackBox(fn)
    with pytest.raises(InputError, match="one number an input, shape"):
        box.query([1, 2])
    assert box.log == []


def test_no_attribute_of_a_box_leads_to_the_function():
    fn = numeric("linear", 2, 1)
    box = fi.BlackBox(fn)
    assert all(value is not fn for value in vars(box).values())
    assert not any(hasattr(box, name) for name in ("fn", "params", "clean", "kind", "parts"))


def test_wrong_mode_and_rounds():
    for options in ({"mode": "chat"}, {"rounds": 0}, {"rounds": 21}):
        with pytest.raises(InputError, match="1 to 20 rounds"):
            fi.interpret(fi.BlackBox(lambda x: x), fi.ConstantInterpreter(), **options)


# ---- answers of language models, with a scripted server

ANSWER = "[DESCRIPTION] doubles and adds one\n[DOMAIN] none\n[CODE]\n```python\ndef f(x):\n    return 2 * x + 1\n```"


def test_answers_are_parsed_strictly():
    made = fi.parse_answer(ANSWER)
    assert made["CODE"] == "def f(x):\n    return 2 * x + 1"
    assert made["DOMAIN"] == "none"
    for wrong, why in (
        ("It doubles.", r"\[DESCRIPTION\] must be there once, and is there 0 times"),
        (ANSWER + "\n[CODE] x", r"\[CODE\] must be there once, and is there 2 times"),
        ("[DOMAIN] none [DESCRIPTION] a [CODE] b", "order"),
        ("[DESCRIPTION] [DOMAIN] none [CODE] b", r"\[DESCRIPTION\] has no text"),
    ):
        with pytest.raises(fi.AnswerError, match=why):
            fi.parse_answer(wrong)
    for how in ("**[{}]**", "[{}]:", "### [{}]\n", "__[{}]__:", "**[{}]:**"):
        text = f"Sure.\n{how.format('DESCRIPTION')} x**2, twice\n{how.format('DOMAIN')} none\n{how.format('CODE')}\n"
        for code in ("{}", "```python\n{}\n```\nI hope this helps.", "Here it is:\n~~~\r\n{}\r\n~~~"):
            told = fi.parse_answer(text + code.format("def f(x): return 2 * x**2"))
            assert tuple(told.values()) == ("x**2, twice", "none", "def f(x): return 2 * x**2"), (how, code)
    assert set(fi.parse_answer("[DESCRIPTION] a [CODE] b", "string")) == {"DESCRIPTION", "CODE"}
    assert set(fi.parse_answer("[DESCRIPTION] a [DOMAIN] b", "neuron")) == {"DESCRIPTION", "DOMAIN"}


def test_three_rounds_over_http(scripted):
    model, seen = scripted("QUERY: [0, 1]", "QUERY: [200]", ANSWER)
    told = fi.interpret(fi.BlackBox(numeric("linear", 2, 1)), fi.LanguageModelInterpreter(model))
    assert (told.rounds, told.queries, told.calls, told.reason) == (3, 2, 3, "")
    assert told.asked == (0.0, 1.0)
    messages = seen[-1]["messages"]
    assert "0.0 -> 1.0\n1.0 -> 3.0" in messages[2]["content"]
    assert "must lie in [-128, 128]" in messages[4]["content"]
    assert fi.score_numeric(numeric("linear", 2, 1), told).success
    assert told.completion_tokens == 9


def test_every_output_that_was_paid_for_is_shown(scripted):
    model, seen = scripted(f"QUERY: {list(range(100))}", ANSWER)
    told = fi.interpret(fi.BlackBox(numeric("linear", 2, 1)), fi.LanguageModelInterpreter(model))
    assert told.queries == 100
    assert "99.0 -> 199.0" in seen[-1]["messages"][2]["content"]


def test_what_a_model_does_wrong_is_told_and_ends_in_a_reason(scripted):
    model, seen = scripted("I think it doubles.", "QUERY: [0, oops]", "QUERY: [1, 2, 3, 4]", "QUERY: [1]")
    told = fi.interpret(fi.BlackBox(lambda x: x, budget=3), fi.LanguageModelInterpreter(model), rounds=4)
    assert (told.description, told.code, told.rounds, told.reason) == ("", "", 4, "it asked in its last round")
    texts = [message["content"] for message in seen[-1]["messages"] if message["role"] == "user"]
    assert "[DESCRIPTION] must be there once" in texts[1]
    assert "not a JSON list" in texts[2]
    assert "4 inputs were asked for and 3 of 3" in texts[3]
    assert "Answer now" in texts[3]


def test_modes(scripted):
    model, seen = scripted(ANSWER)
    box = fi.BlackBox(numeric("linear", 2, 1), examples=[1, 2])
    told = fi.interpret(box, fi.LanguageModelInterpreter(model), mode="single_round")
    assert told.rounds == 1
    assert "1.0 -> 3.0" in seen[0]["messages"][0]["content"]
    assert "QUERY" not in seen[0]["messages"][0]["content"]
    model, seen = scripted(ANSWER)
    fi.interpret(fi.BlackBox(numeric("linear", 2, 1), examples=[1]), fi.LanguageModelInterpreter(model), mode="seeded")
    assert "1.0 -> 3.0" in seen[0]["messages"][0]["content"]
    assert "QUERY" in seen[0]["messages"][0]["content"]


def test_an_endpoint_that_is_down_says_so():
    with protocol_server(*[500] * 20) as server:
        model = connect(server.url, "m", cache=False, retries=1)
        with pytest.raises(EndpointUnavailable):
            fi.interpret(fi.BlackBox(lambda x: x), fi.LanguageModelInterpreter(model))


@pytest.fixture
def scripted():
    """A model behind a real HTTP server that gives these answers in turn, and the requests that it saw."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    servers = []

    def start(*answers):
        left, seen = list(answers), []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                message = {"role": "assistant", "content": left.pop(0)}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return connect(url, "scripted", cache=False, concurrency=1), seen

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- judges

TESTS = [fi.UnitTest(("cat", "car", "sky"), 1), fi.UnitTest(("sea", "dog", "law"), 2)]


class Fixed:
    def __init__(self, *answers):
        self.answers = list(answers)

    def choose(self, description, tests):
        return self.answers


def test_unit_test_counts():
    score = fi.unit_test("animals", TESTS, Fixed(1, None))
    assert (score.accuracy, score.unparsed, score.n) == (0.5, 1, 2)
    assert np.allclose(score.ci95, (0.01257912, 0.98742088))
    assert fi.unit_test("animals", TESTS, Fixed(4, 0)).unparsed == 2  # no index of a candidate
    assert fi.unit_test("animals", [(["a", "b", "c"], 3)], Fixed(3)).accuracy == 1
    for wrong in ([], [(["a", "b"], 1)], [(["a", "b", "c"], 4)]):
        with pytest.raises(InputError, match=r"at least one|three candidates"):
            fi.unit_test("animals", wrong, Fixed(1))


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("2", 2),
        (" Answer: 3. ", 3),
        ("1, 2 or 3", None),
        ("", None),
        ("4", None),
        ("1.5", None),
        ("-1", None),
        ("12", None),
    ],
)
def test_a_choice_is_exactly_one_index(text, choice):
    assert parse_choice(text) == choice


def test_language_model_judge(scripted):
    model, seen = scripted("1", "1, 2 or 3")
    score = fi.unit_test("animals", TESTS, fi.LanguageModelJudge(model))
    assert (score.accuracy, score.unparsed) == (0.5, 1)
    assert "1. cat\n2. car\n3. sky" in seen[0]["messages"][0]["content"]


def test_embedding_judge_takes_the_largest_cosine_and_embeds_once():
    asked = []

    def embed(texts):
        asked.extend(texts)
        table = {
            "animals": (1, 0),
            "cat": (5, 1),
            "dog": (1, 0.1),
            "car": (0, 1),
            "sky": (0, 2),
            "sea": (-1, 0),
            "law": (0, 0),
        }
        return np.array([table[text] for text in texts], dtype=float)

    judge = fi.EmbeddingJudge(embed)
    assert judge.choose("animals", TESTS) == [1, 2]
    assert judge.choose("animals", TESTS) == [1, 2]
    assert sorted(asked) == sorted(set(asked))
    assert judge.choose(" ", TESTS) == [None, None]


def test_execution_judge():
    tests = [fi.UnitTest(("ab -> AB", "a -> b", "c -> c"), 1), fi.UnitTest(("a -> A", "b -> B", "c -> d"), 1)]
    assert fi.ExecutionJudge().choose("def f(s): return s.upper()", tests) == [1, None]
    assert fi.ExecutionJudge().choose("import os", tests) == [None, None]
    assert fi.ExecutionJudge().choose("not code", tests) == [None, None]
    with pytest.raises(InputError, match="->"):
        fi.ExecutionJudge().choose("def f(s): return s", TESTS)


# ---- neurons


def test_neurons_with_a_given_embedding():
    table = {"animals": (1, 0), "food": (0, 1), "cat": (1, 0), "bread": (0, 1), "law": (-1, -1)}
    backend = fi.EmbeddingBackend(lambda texts: np.array([table[text] for text in texts], dtype=float))
    single, double = fi.make_neurons(["animals", ("animals", "food")], backend)
    assert np.allclose(single(["cat", "bread", "law"]), [1, 0, 0], atol=0.01)
    assert np.allclose(double(["cat", "bread", "law"]), [1, 1, 0], atol=0.01)
    assert double.description == "animals or food"
    assert fi.BlackBox(single).query(["cat"])[0][1] > 0.99
    with pytest.raises(InputError, match="language model"):
        fi.make_neurons([fi.Relation("a country", "its capital")])
    for wrong in ([("a", "b", "c")], [""], [3], [None], "animals"):
        with pytest.raises(InputError, match="concept"):
            fi.make_neurons(wrong, backend)
    with pytest.raises(InputError, match="relatedness"):
        fi.make_neurons(["a"], "magic")


def test_relation_with_an_exception(scripted):
    model, _ = scripted("Paris.", "")

    class Backend(fi.LanguageModelBackend):
        def relatedness(self, concept, words):
            return np.array([float(word == "Kenya") for word in words])

    (neuron,) = fi.make_neurons([fi.Relation("a country", "its capital", "countries in Africa")], Backend(model))
    assert [neuron(word) for word in ("France", "Kenya", "blue")] == ["Paris", "undefined", "undefined"]
    assert "except countries in Africa" in neuron.description


# ---- interpreters and the table


def test_baselines_are_least_squares():
    fn = numeric("polynomial", 1.0, -2.0, 0.0, 3.0)
    told = fi.interpret(fi.BlackBox(fn), fi.PolynomialInterpreter(3))
    assert fi.score_numeric(fn, told).nmse < 1e-20
    assert told.queries == 256
    told = fi.interpret(fi.BlackBox(fn, budget=20), fi.PolynomialInterpreter(3))
    assert (told.queries, told.asked[0], told.asked[-1]) == (20, -128.0, 128.0)  # over the whole range all the same
    told = fi.interpret(fi.BlackBox(numeric("linear", 1, 4)), fi.ConstantInterpreter())
    assert np.allclose(run_code(told.code, [7.0])[0], [4.0])
    nothing = fi.interpret(fi.BlackBox(lambda x: x * np.nan), fi.PolynomialInterpreter(3))
    assert (nothing.code, nothing.description) == ("", "no finite value was seen")
    with pytest.raises(InputError, match="degree"):
        fi.PolynomialInterpreter(-1)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("linear", (2.5, -3)), ("constant", (7,)), ("absolute", (3, 1)), ("root", (4, 2, 2)), ("logarithm", (5, 1, 3)),
        ("step", (3, 1, 20)), ("relu", (3, 1, 0.2)), ("sin", (4, 3.3, 1.2, 5)), ("gaussian", (20, 6)), ("tanh", (5, 2, 3, 1)),
        ("reciprocal", (4,)), ("square_wave", (7.3, 1.2)), ("rectangle", (5.3,)), ("rational", ((1, 2), (3, 0.5, 1))),
    ],
)  # fmt: skip
def test_symbolic_finds_each_family(family, parameters):
    fn = numeric(family, *parameters)
    told = fi.interpret(fi.BlackBox(fn), fi.SymbolicInterpreter())
    assert fi.score_numeric(fn, told).r2_nmse < (1e-3 if family not in ("square_wave", "rectangle") else 0.1), (
        told.description
    )
    assert told.interval is None
    assert told.queries <= 400


def test_symbolic_finds_a_corrupted_interval_that_a_global_fit_misses():
    fn = numeric("linear", 2, 1, variant="corrupted", interval=(30.3, 45.2), level=1.0)
    found = {scan: fi.interpret(fi.BlackBox(fn), fi.SymbolicInterpreter(scan=scan)) for scan in (True, False)}
    score = fi.score_numeric(fn, found[True])
    assert score.local_nmse < 0.05
    assert score.domain_iou > 0.9
    assert "but about" in found[True].description
    assert fi.score_numeric(fn, found[False]).local_nmse > 0.3
    assert found[False].interval is None
    half = numeric("linear", 2, 1, variant="corrupted", interval=(-math.inf, -40.0), level=1.0)
    assert fi.score_numeric(half, fi.interpret(fi.BlackBox(half), fi.SymbolicInterpreter())).domain_iou > 0.9


def test_symbolic_on_other_ranges_budgets_and_broken_functions():
    box = fi.BlackBox(lambda x: 3 * x - 1, budget=12, bounds=(0.0, 2.0))
    told = fi.interpret(box, fi.SymbolicInterpreter())
    assert told.queries == 12
    assert np.allclose(run_code(told.code, [0.3, 1.7])[0], [-0.1, 4.1])
    nothing = fi.interpret(fi.BlackBox(lambda x: x * np.nan), fi.SymbolicInterpreter())
    assert nothing.description.startswith("0 finite values were seen")
    shown = fi.interpret(
        fi.BlackBox(lambda x: 2 * x, examples=[1, 2, 3, 4, 5, 6]), fi.SymbolicInterpreter(), mode="single_round"
    )
    assert shown.queries == 6
    few = fi.interpret(fi.BlackBox(lambda x: 2 * x, budget=2), fi.SymbolicInterpreter())
    assert few.code == ""


def test_table_has_baselines_costs_and_shuffled_descriptions(scripted):
    bad = "[DESCRIPTION] nothing [DOMAIN] none [CODE] import os"
    model, _ = scripted(ANSWER, bad)
    functions = fi.make_numeric(2, 0, mix=(1, 0, 0, 0))
    table = fi.benchmark(functions, [fi.OracleInterpreter(), fi.LanguageModelInterpreter(model)])
    frame = table.frame()
    assert set(frame["interpreter"]) == {"oracle", "scripted", "polynomial of degree 3", "constant"}
    assert frame[frame["interpreter"] == "oracle"]["success"].all()
    rows = frame[frame["interpreter"] == "scripted"]
    assert rows["calls"].tolist() == [1, 1]
    assert rows["reason"].tolist()[1] == "unsafe: os"
    assert table.success("oracle").value == 1
    with pytest.raises(InputError, match="no local_nmse"):
        table.success("oracle", measure="local_nmse")
    strings = fi.benchmark(fi.make_strings(4, 0), [fi.OracleInterpreter()], judge=ByCode(), seed=1)
    frame = strings.frame()
    assert (frame["exact"] == 1).all()
    with pytest.raises(InputError, match="at least one"):
        fi.benchmark([], [fi.ConstantInterpreter()])


class ByCode:
    """Answers 1 whatever it is told."""

    def choose(self, description, tests):
        return [1] * len(tests)


# ---- the published set


def test_published_set_is_read():
    folder = find_data("find/numeric-data.json")
    if folder is None:
        pytest.skip("needs find/numeric-data.json: set THEODOLITE_DATA")
    made = fi.load_published(folder.parent, "numeric")
    assert [sum(fn.variant == variant for fn in made) for variant in VARIANTS] == [483, 191, 176, 150]
    inside = [fn.as_variant("corrupted") for fn in made if math.isfinite(fn.corruption.high - fn.corruption.low)]
    assert len(inside) == 491
    assert abs(np.mean([fn.detectable() for fn in inside]) - 0.67) < 0.01
    assert np.isclose(made[0].clean(np.array([-2.0]))[0], 26.8 * 2 - 8.2)
    entities = fi.load_published(folder.parent, "neurons_entities")
    assert [len(entities), sum(len(one.concepts) == 2 for one in entities)] == [200, 60]
    assert entities[0].tests[0] == fi.UnitTest(("fuel", "Chomsky", "NFL"), 3)
    relations = fi.load_published(folder.parent, "neurons_relations")
    assert [len(relations), sum(one.exception is not None for one in relations)] == [75, 50]
    strings = fi.load_published(folder.parent, "strings")
    assert len(strings) == 1000
    assert strings[0].tests[0].candidates[1] == "Python -> PythonXyKQh"


def test_published_set_that_is_none(tmp_path):
    with pytest.raises(InputError, match="neurons_entities"):
        fi.load_published(tmp_path, "images")
    with pytest.raises(DataError, match="holds neither"):
        fi.load_published(tmp_path, "numeric")
    (tmp_path / "numeric-data.json").write_text("[{}]")
    (tmp_path / "numeric-func_name_dict.json").write_text("{}")
    with pytest.raises(DataError, match="not the published"):
        fi.load_published(tmp_path, "numeric")
    (tmp_path / "numeric-data.json").write_text("[{]")
    with pytest.raises(DataError, match="as JSON"):
        fi.load_published(tmp_path, "numeric")


# ---- the chart


def subject_of(function, classes=()):
    """A black box over three columns."""

    class Model:
        def predict(self, x):
            return function(x)

        def fit(self, x, y):
            return self

    x = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    y = torch.as_tensor(function(x), dtype=torch.float32)
    rows = [Rows(torch.as_tensor(x[part]), y[part]) for part in (slice(0, 200), slice(200, 250), slice(250, 300))]
    data = Dataset("made up", "tabular", "regression", *rows, features=("a", "b", "c"), classes=classes)
    return Subject("made up", data, Model())


def test_chart_describes_the_curves_of_a_black_box():
    subject = subject_of(lambda x: 2 * x[:, 0] + (x[:, 1] > 0.5) * 3.0)
    found = chart.function_interpretation(subject, Budget())
    assert "2 of 2 curves" in found.headline
    assert found.comparison.estimate.value > 0.95
    assert {control.kind for control in found.comparison.controls} == {"closed-form", "random", "null"}
    json.dumps(found.to_json(), allow_nan=False)


def test_chart_names_what_no_formula_describes():
    noise = np.random.default_rng(1).normal(size=4096)
    subject = subject_of(lambda x: x[:, 0] + noise[(np.abs(x[:, 1]) * 1000).astype(int) % 4096] * 3)
    found = chart.function_interpretation(subject, Budget())
    assert "by b is described worst" in found.headline
    assert "No short formula holds for the prediction by b" in found.advice


def spelled(words):
    """Embeddings by letters: words that begin alike are near each other."""
    out = np.zeros((len(words), 27))
    for row, word in zip(out, words, strict=True):
        for k, letter in enumerate(word[:8]):
            row[ord(letter) - ord("a") if letter.isalpha() else 26] += 1 / (1 + k) ** 3
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def words_subject(weights):
    """Two classes by counted words: the log odds of a text are the sum of its words' weights."""
    words = [a + b + c for a in "abcdefgh" for b in "aeiou" for c in ("nk", "rt", "st")]
    w = torch.tensor([weights(word) for word in words])[:, None]

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.cat([-x @ w, x @ w], dim=1)

    x = torch.as_tensor(np.random.default_rng(0).random((160, len(words))), dtype=torch.float32)
    parts = [Rows(x[a:b], torch.arange(b - a) % 2) for a, b in ((0, 80), (80, 120), (120, 160))]
    data = Dataset("words", "text", "classification", *parts, features=tuple(words), classes=("no", "yes"))
    return Subject("words", data, Model())


def test_chart_of_words_tells_units_that_follow_what_the_judge_knows(monkeypatch):
    monkeypatch.setattr(probe_words, "sentence_embeddings", spelled)
    found = chart.function_interpretation(words_subject(lambda word: 3.0 if word[0] in "ab" else -1.0), Budget())
    told, (chance, other, ridge) = found.comparison.estimate, found.comparison.controls
    assert told.value > 0.7
    assert told.n == 200
    assert other.estimate.value < 0.5
    assert chance.estimate.value == pytest.approx(1 / 3)
    assert ridge.estimate.value > 0.7
    assert "fair name" in found.advice
    json.dumps(found.to_json(), allow_nan=False)
    noise = np.random.default_rng(3)
    found = chart.function_interpretation(words_subject(lambda word: float(noise.normal())), Budget())
    assert abs(found.comparison.estimate.value - 1 / 3) < 0.2
    assert "Do not name" in found.advice


def test_an_encoders_dimensions_are_described_and_a_judge_that_is_it_does_not_see_them(monkeypatch, tmp_path):
    def unrelated(words, encoder=None):
        return np.stack([np.random.default_rng(list(word.encode())).normal(size=24) for word in words])

    monkeypatch.setattr(probe_words, "sentence_embeddings", unrelated)
    monkeypatch.setattr(probe_words, "load_encoder", lambda name: name)
    monkeypatch.setattr(probe_words, "model_folder", lambda name: name)
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (300, 6))
    (tmp_path / "texts.txt").write_text(" ".join("".join(row) for row in letters))
    told = {}
    for name in ("another", "minilm"):  # the judge is minilm
        made = command("--encoder", name, "--data", tmp_path / "texts.txt", "--json")
        assert made.exit_code == 0, made.output
        found = json.loads(made.stdout)
        assert "dimensions of sentence embeddings" in found["headline"]
        assert any("kept from seeing" in one for one in found["caveats"]) == (name == "minilm")
        told[name] = next(one["value"] for one in found["numbers"] if "regression" in one["name"])
    assert told["another"] > 0.99  # it sees the units themselves
    assert told["minilm"] < 0.5  # other dimensions say nothing of them
    with pytest.raises(DataError, match="3 different words"):
        probe_words.described_encoder("minilm", ["three short words"], Budget())
    assert "--subject" in str(command("--encoder", "minilm", "--subject", "digits").exception)


def test_chart_of_words_says_what_is_missing(monkeypatch):
    subject = words_subject(lambda word: 1.0)
    few = dataclasses.replace(subject.data, features=tuple(f"{i}" for i in range(120)))
    monkeypatch.setattr(probe_words, "model_folder", lambda name: "there")
    assert "model of words" in chart._refusal(dataclasses.replace(subject, data=few))
    assert "single words move" in chart._refusal(subject)
    assert chart._refusal(words_subject(lambda word: float(len(word)) if word < "c" else 0.0)) is None
    monkeypatch.setattr(probe_words, "model_folder", lambda name: None)
    assert "make models" in chart._refusal(subject)


def test_exemplars_are_the_strongest_of_the_shown_words():
    values = {"cat": 1.0, "dog": 3.0, "sun": -2.0, "sky": float("nan")}
    box = fi.BlackBox(lambda texts: [values[t] for t in texts], modality="neuron", examples=list(values))
    told = fi.interpret(box, fi.ExemplarInterpreter(2))
    assert told.description == "dog, cat"
    assert told.asked == tuple(values)
    with pytest.raises(InputError, match="numeric"):
        fi.interpret(fi.BlackBox(lambda x: x), fi.ExemplarInterpreter())
    with pytest.raises(InputError, match="count"):
        fi.ExemplarInterpreter(0)


def test_activation_tests_have_one_word_that_activates():
    words = [f"w{i}" for i in range(50)]
    values = np.random.default_rng(2).permutation(50.0 * np.ones(50).cumsum())
    for test in fi.activation_tests(words, values, n=40, seed=1):
        strengths = [values[words.index(word)] for word in test.candidates]
        assert int(np.argmax(strengths)) + 1 == test.answer
        assert max(strengths) >= np.quantile(values, 0.89)
        assert sorted(strengths)[1] <= np.median(values)
    assert {test.answer for test in fi.activation_tests(words, values, n=40)} == {1, 2, 3}
    two_values = np.where(np.arange(50) < 3, 0.0, 1.0)  # nearly all are high: the others are the three
    for test in fi.activation_tests(words, two_values, n=20):
        assert [two_values[words.index(word)] for word in test.candidates].count(0.0) == 2
    with pytest.raises(DataError, match="hardly differ"):
        fi.activation_tests(words, np.ones(50))
    with pytest.raises(DataError, match="20 words"):
        fi.activation_tests(words[:5], values[:5])


def test_a_function_of_ones_own_is_in_the_table():
    frame = fi.benchmark([lambda x: 1e200 * x, lambda x: 1e-200 * x], [fi.SymbolicInterpreter()]).frame()
    assert (frame[frame["interpreter"] == "symbolic"]["r2_nmse"] < 1e-6).all()
    assert set(frame["interpreter"]) == {"symbolic", "polynomial of degree 3", "constant"}


def test_an_interpreter_that_asks_too_much_is_a_row_with_a_reason():
    class Greedy:
        name = "greedy"

        def interpret(self, blackbox, *, mode, rounds):
            blackbox.query([1, 2])
            return blackbox.query([3]) and fi.Interpretation("never said")

    frame = fi.benchmark([lambda x: x], [Greedy(), fi.OracleInterpreter()], budget=2).frame().set_index("interpreter")
    assert "1 inputs were asked for and 0 of 2" in frame.loc["greedy", "reason"]
    assert frame.loc["greedy", "queries"] == 2
    assert not frame.loc["greedy", "success"]
    assert frame.loc["oracle", "reason"] == "no known formula"


def test_interpreters_of_numbers_are_given_no_texts_and_others_are():
    class Echo:
        name = "echo"

        def interpret(self, blackbox, *, mode, rounds):
            return fi.Interpretation("the same", code="def f(s): return s")

    functions = [*fi.make_strings(2, 0), *fi.make_numeric(1, 0)]
    frame = fi.benchmark(functions, [Echo(), fi.SymbolicInterpreter()]).frame()
    assert frame["interpreter"].tolist()[:4] == ["echo"] * 3 + ["symbolic"]


def test_chart_is_refused_where_nothing_moves():
    assert "two columns" in chart._too_flat(subject_of(lambda x: np.ones(len(x))))
    assert chart._too_flat(subject_of(lambda x: x[:, 0] + x[:, 2])) is None


# ---- the command


def command(*arguments):
    from typer.testing import CliRunner

    from theodolite.cli import app

    return CliRunner().invoke(app, ["run", "function-interpretation", *map(str, arguments)])


def test_command_runs_writes_and_scores(tmp_path):
    made = command("--functions", 2, "--table", tmp_path / "rows.csv", "--json")
    assert made.exit_code == 0, made.output
    ran = json.loads(made.stdout)
    made = command("--functions", 2, "--answers", tmp_path / "rows.csv", "--json")
    scored = json.loads(made.stdout)
    assert scored["functions answered"] == "2 of 2"
    assert scored["r2_nmse < .1"]["value"] == ran["symbolic: r2_nmse < .1"]["value"]
    (tmp_path / "bad.csv").write_text("function,code\nf00000,import os\nf00001,def f(x): return x\n")
    told = json.loads(command("--functions", 2, "--answers", tmp_path / "bad.csv", "--json").stdout)
    assert told["code that failed"] == "1 unsafe: os"
    (tmp_path / "strings.csv").write_text("function,code\nf00000,def f(s): return s\n")
    told = json.loads(
        command("--functions", 2, "--category", "strings", "--answers", tmp_path / "strings.csv", "--json").stdout
    )
    assert 0 <= told["mean share of identical outputs"] <= 1


def published_neurons(folder):
    rows = [
        {"dir": f"n/{i}", "concept1": word, "concept2": None, "initial": [word]}
        for i, word in enumerate(("dog", "sun"))
    ]
    tests = [
        {"name": str(i), "test_vec": [["x", word, "y"]], "correct_inx": [2]} for i, word in enumerate(("dog", "sun"))
    ]
    (folder / "neurons_entities-data.json").write_text(json.dumps(rows))
    (folder / "neurons_entities-unit_test_data.json").write_text(json.dumps(tests))
    (folder / "told.csv").write_text("function,description\n0,a dog\n1,the sun\n")
    return folder


def test_command_judges_descriptions_of_published_neurons(tmp_path):
    def judge(messages):
        words = messages[0]["content"]
        described = "dog" if "a dog" in words else "sun"
        return next((str(i) for i in (1, 2, 3) if f"{i}. {described}" in words), "none of them")

    folder = published_neurons(tmp_path)
    with protocol_server(answer=judge) as server:
        made = command(
            "--published", folder, "--category", "neurons_entities", "--answers", folder / "told.csv", "--reader", server.url,
            "--reader-model", "m", "--json",
        )  # fmt: skip
    told = json.loads(made.stdout)
    assert told["tests answered"]["value"] == 1
    assert told["tests answered from another's description"]["value"] == 0
    assert told["tests answered from another's description: not parsed"] == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--category", "images", "--functions", 2), "--category"),
        (("--category", "neurons_entities", "--functions", 2), "--published"),
        (("--category", "strings", "--functions", 2), "language model"),
        (("--category", "strings", "--published", "."), "--answers to judge"),
        (("--answers", "nothing.csv"), "cannot read"),
    ],
)
def test_command_errors(arguments, text):
    made = command(*arguments)
    assert made.exit_code != 0
    assert text in str(made.exception)
