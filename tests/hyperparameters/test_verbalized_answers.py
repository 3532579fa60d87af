"""What language models write is read strictly, and rows are written as the card says."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theodolite.core.errors import DataError
from theodolite.hyperparameters.verbalized.answers import read_description, read_label, read_number
from theodolite.hyperparameters.verbalized.prompts import described, render

NUMBERS = {
    "Output: -1.5e-3": -0.0015,
    "Output: .5": 0.5,
    "Output: +2": 2.0,
    "Output: ≈ 7.1": 7.1,
    "**Output:** [7.1]": 7.1,
    "**Output**: **7.1**": 7.1,
    "### Output:\n\n7.10\n": 7.1,
    "Output (two decimals): 1,234,567.5": 1234567.5,
    "Output: \u22127.1.": -7.1,
    "Output: \u20137.1": -7.1,
    "Output: y = 7.1": 7.1,
    "Output: $7.10": 7.1,
    "Explanations: 3 times 2 is 6.\n\nOutput:\n[\n 10.00\n]": 10.0,
    "Explanations: the Output: 9 would be too much.\nOutput: 8": 8.0,
    "```\nExplanations: 1\nOutput: 7.1\n```\nI hope that these 2 lines help.": 7.1,
}
REFUSED = [
    "", "7.1", "Explanations: slope 3, so 7.1", "Output:", "Output: unknown", "Output: 5 or 7", "Output: 2-3", "Output: 1/3",
    "Output: 3x + 4", "Output: x1", "Output: 7.1%", "Output: 50 %", "Output: 1,5", "Output: 1,23,456", "Output: 1.2.3",
    "Output: nan", "Output: inf", "Output: 1e999", "Output: 7.1 ± 0.2", "Output: 3.5 + 2 = 5.5", "Throughput: 7.1",
    "Output: - 3", "Output: 4 - 3", "Output: \u00b1 3", "Output: 7.1 million", "Output: 7 percent", "Output: 2 hundred",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_read_however_they_are_written(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_one_number_is_none(text):
    assert read_number(text) is None


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["{!r}", "[{!r}]", "**{!r}**", "{:+.17g}", "{:,.12f}"]),
)
def test_any_float_comes_back_as_it_was_written(value, form):
    written = form.format(value)
    assert read_number(f"Explanations: 1 and 2.\n\nOutput: {written}") == float(written.strip("[]*").replace(",", ""))


@given(st.text(max_size=60))
def test_no_text_makes_a_reader_fail(text):
    for answer in (text, f"Output: {text}", f"New Pattern Descriptions: {text}"):
        number = read_number(answer)
        assert number is None or math.isfinite(number)
        assert read_label(answer, ["good", "bad"]) in (None, 0, 1)
        found = read_description(answer)
        assert found is None or found[1].strip()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Output: good", 0), ("Explanations: bad at first.\n**Output:** [Bad].", 1), ("Output: 'very good'", 2),
        ("Output: not good", None), ("Output: good or bad", None), ("good", None), ("Output: goods", None),
    ],
)  # fmt: skip
def test_labels_are_read_whole(text, place):
    assert read_label(text, ["good", "bad", "very good"]) == place


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Reasoning: too low.\n\nNew Pattern Descriptions: slope 3, intercept 4", ("too low.", "slope 3, intercept 4")),
        ("**Reasoning:** a\n\n**New Pattern Descriptions:** **b**", ("a", "b")),
        ("```\nReasoning: a\n## New Pattern Description:\n[b\nc]\n```", ("a", "b\nc")),
        ("It is low.\nNew Pattern Descriptions: b", ("It is low.", "b")),
        ("Reasoning: the New Pattern Descriptions: need care\nNew Pattern Descriptions: b",
         ("the New Pattern Descriptions: need care", "b")),
        ("Reasoning: a\nNew Pattern Descriptions: [1] and [2]", ("a", "[1] and [2]")),
        ("Reasoning: a", None), ("Reasoning: a\nNew Pattern Descriptions:\n```\n```", None), ("", None),
    ],
)  # fmt: skip
def test_descriptions_are_read_by_section(text, expected):
    assert read_description(text) == expected


def test_rows_are_written_with_names_and_four_digits():
    frame = pd.DataFrame(
        {"age": [41, 12345], "mass (kg)": [70.12345, 1.5e-7], "town": ["Ulm", " Bad  Urach"], "ill": [True, False]}
    )
    rows, form = render(frame)
    assert rows == [
        "age: 41, mass (kg): 70.12, town: Ulm, ill: True",
        "age: 12340, mass (kg): 1.5e-07, town: Bad Urach, ill: False",
    ]
    assert form == ("age", "mass (kg)", "town", "ill")
    assert render(np.array([[1.75649, -2], [3, 0]])) == (["[1.756, -2]", "[3, 0]"], 2)
    assert render([[1.0], [2.5]]) == (["[1]", "[2.5]"], 1)
    assert render(["one text ", "two"]) == (["one text", "two"], None)
    assert render(np.array(["a", "b"])) == render(pd.Series(["a", "b"])) == (["a", "b"], None)


@pytest.mark.parametrize(
    ("X", "told"),
    [
        (np.zeros((2, 8, 8)), "images"), (np.array([[1.0, np.nan]]), "1 missing or infinite"), ([[1.0, np.inf]], "infinite"),
        (pd.DataFrame({"a": ["x", None]}), "row 1, column 0"), ("a text", "one text"), ([], "no rows"),
        ([1.0, 2.0], "(rows, 1)"), (["a", None], "row 1 is no text"),
        (np.zeros((0, 3)), "no rows"),
        ([1.0, 2.0], "table"), (["a", None], "table"), (pd.DataFrame({"a": [1.0, np.inf]}), "infinite"),
    ],
)  # fmt: skip
def test_what_is_not_rows_is_refused(X, told):
    with pytest.raises(DataError, match=told) as found:
        render(X)
    assert isinstance(found.value, ValueError)


def test_theta_0_stands_before_whatever_was_learned():
    assert described("Do it.", "Slope 3.") == "Do it. Slope 3."
    assert described("Do it.", "Do it.") == "Do it."
    assert described("Do it.", "Do it. Slope 3.") == "Do it. Slope 3."
    assert described("", "Slope 3.") == "Slope 3."
