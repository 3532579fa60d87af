"""The chart of program sets: on a small model that writes no code, and on lines that are nearly right."""

import json

import numpy as np
import pytest
from tests.tiny_language_model import save_tiny_model, sentences

from theodolite.language.model import Token
from theodolite.language.subjects import language_subject
from theodolite.predictions.program_sets import Generation
from theodolite.survey.chart import Budget, load_charts
from theodolite.survey.predictions import program_sets as drawn


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts.txt").write_text("\n".join(sentences(120)))
    return language_subject(save_tiny_model(folder / "model"), str(folder / "texts.txt"))


@pytest.fixture(scope="module")
def lines():
    return drawn._lines(0)


@pytest.fixture(autouse=True)
def the_same_lines(lines, monkeypatch):
    monkeypatch.setattr(drawn, "_lines", lambda seed: lines)


def nearly_right(lines, seed):
    """Half of the lines as they should be, half with an unlikely name in the place of a likely one."""
    rng, made = np.random.default_rng(seed), []
    for line in lines:
        wrong = rng.random() < 0.5
        pieces = [
            "unlikely" if wrong and piece == "self" else piece
            for piece in line.rest.replace("self", " self ").split(" ")
        ]
        tokens, at = [], 0
        for place, piece in enumerate(pieces):
            text = ("" if place == 0 else " ") + piece
            tokens.append(Token(text, -3.0 if piece == "unlikely" else -0.001, at))
            at += len(text)
        made.append(Generation("".join(token.text for token in tokens), tuple(tokens)))
    return made


def test_lines_that_are_nearly_right_leave_most_of_the_code(subject, lines, monkeypatch):
    monkeypatch.setattr(drawn, "generate", lambda model, prompts, max_tokens: nearly_right(lines, 0))
    finding = load_charts()["pac-program-sets"].draw(subject, Budget())
    n = drawn._TEST
    assert finding.numbers["code that may stand"].value > 0.5
    assert finding.numbers["sets that hold the right line"].value >= 1 - drawn._EPSILON - 2 * np.sqrt(0.16 / n)
    assert len(lines) == drawn._CALIBRATION + n
    assert all(len(one.rest) <= drawn._WIDEST for one in lines)
    assert f"of {n} prompts" in finding.headline
    assert "partial programs" in finding.advice or "whole line" in finding.advice
    table = finding.figure.data[-1]
    assert table.type == "table"
    assert len(table.cells["values"][0]) == 3
    names = {trace.name for trace in finding.figure.data}
    assert {"1 hole", "4 holes", "4 holes, greedy", "promised"} <= names
    json.dumps(finding.to_json(), allow_nan=False)


def test_a_model_that_writes_no_code_gets_one_hole(subject, monkeypatch):
    words = Generation("no code here", (Token("no code here", -1.0, 0),))
    monkeypatch.setattr(drawn, "generate", lambda model, prompts, max_tokens: [words for _ in prompts])
    finding = load_charts()["pac-program-sets"].draw(subject, Budget())
    assert finding.numbers["code that may stand"].value == 0
    assert finding.numbers["lines right as they were written"].value == 0
    assert finding.numbers["lines that are no Python"].value == 1
    assert "only a hole at the root" in finding.advice


def test_a_model_writes_and_what_cannot_is_refused(subject, monkeypatch):
    chart = load_charts()["pac-program-sets"]
    monkeypatch.setattr(drawn, "_WINDOW", 10**6)
    window = getattr(subject.predictor.config, "max_position_embeddings", None)
    assert window is None or "needs a context" in str(chart.needs.refusal(subject))
    monkeypatch.setattr(drawn, "_WINDOW", 1)
    assert chart.needs.refusal(subject) is None
    assert chart.cost(subject) > 0
    monkeypatch.setattr(drawn, "_TOKENS", 3)
    first, second = (chart.draw(subject, Budget(seed=1)) for _ in range(2))
    assert first.headline == second.headline
    assert first.figure.to_json() == second.figure.to_json()
