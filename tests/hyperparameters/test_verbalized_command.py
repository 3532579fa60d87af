"""``theodolite run verbalized-learning`` and the chart, with a server that answers by a rule and a tiny local model."""

import dataclasses
import json
import re
import string

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from typer.testing import CliRunner

from language_server import protocol_server
from theodolite.cli import app
from theodolite.core.errors import TheodoliteError
from theodolite.core.loading import DataOptions, load_subject
from theodolite.language import connect
from theodolite.survey.hyperparameters import verbalized as drawn
from theodolite.survey.plan import make_plan
from theodolite.survey.run import measure
from tiny_language_model import save_tiny_model


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("THEODOLITE_ENDPOINT", raising=False)
    monkeypatch.delenv("THEODOLITE_LANGUAGE_MODEL", raising=False)


def run(*arguments):
    return CliRunner().invoke(app, ["run", "verbalized-learning", *map(str, arguments)])


def petals(messages):
    if messages[0]["role"] == "system":
        return "Reasoning: petals.\nNew Pattern Descriptions: a petal length below 2.5 is setosa"
    text = messages[0]["content"]
    length = float(re.search(r"petal length \(cm\): ([\d.]+)", text)[1])
    said = "setosa" if "below 2.5" in text and length < 2.5 else "virginica"
    return f"Explanations: compared.\nOutput: {said}"


def iris(folder):
    frame = load_iris(as_frame=True).frame
    frame["target"] = load_iris().target_names[frame["target"]]
    frame.to_csv(folder / "iris.csv", index=False)
    return folder / "iris.csv"


def test_a_table_is_learned_by_an_endpoint(tmp_path):
    with protocol_server(answer=petals) as server:
        made = run(
            "--data", iris(tmp_path), "--target", "target", "--prior", "Iris flowers.", "--endpoint", server.url,
            "--language-model", "m", "--rows", 40, "--report", tmp_path / "steps.html", "--json",
        )  # fmt: skip
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert told["learned"] == "a petal length below 2.5 is setosa"
    assert told["told"].endswith("Iris flowers.")
    assert told["held_out"]["value"] > told["untrained"]["value"]
    assert told["logistic regression"]["value"] > 0.8
    assert told["rows_to_learn_and_to_test"] == [40, 50]
    assert told["ended"] == "finished"
    assert "about 79 requests to learn" in made.stderr
    assert "a petal length below" in (tmp_path / "steps.html").read_text()


def test_numbers_are_learned_too(tmp_path):
    x = np.arange(40) / 10
    pd.DataFrame({"x": x, "y": 3 * x + 0.25}).to_csv(tmp_path / "line.csv", index=False)

    def answer(messages):
        if messages[0]["role"] == "system":
            return "nothing"
        return f"Output: [{3 * float(re.search(r'x: ([0-9.]+)', messages[0]['content'])[1]):.2f}]"

    with protocol_server(answer=answer) as server:
        made = run(
            "--data", tmp_path / "line.csv", "--endpoint", server.url, "--language-model", "m", "--json", "--rows", 20
        )
        refused = run(
            "--data", tmp_path / "line.csv", "--endpoint", server.url, "--language-model", "m", "--labels", "a,b"
        )
    told = json.loads(made.stdout)
    assert told["held_out"]["value"] == pytest.approx(0.0625)
    assert told["updates_not_read"] == 2
    assert refused.exit_code != 0
    assert "--labels is for classes" in str(refused.exception)


def test_a_local_model_is_told_the_prior_and_scores_texts(tmp_path):
    model = save_tiny_model(tmp_path / "tiny")
    frame = pd.DataFrame({"label": ["cat", "dog"] * 15})
    frame["text"] = [f"{'the mat' if i % 2 else 'a tree'} {string.ascii_lowercase[1 + i // 2]}" for i in range(30)]
    frame.to_csv(tmp_path / "texts.csv", index=False)
    made = run("--data", tmp_path / "texts.csv", "--prior", "the cat and the dog", "--language-model", model, "--json")
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert told["steps"] == 0
    assert 0 <= told["held_out"]["value"] <= 1
    assert told["without_the_prior"]["n"] == 10
    assert told["logistic regression on word counts"]["value"] == 1


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (None, [], "there is no file"), ("a,y\n1,u\n", ["--header"], "20 at least"), ("a,b\n1,2\n", ["--header"], "--target"),
        ("a,y\n" + "1,u\n,v\n" * 15, ["--header"], "missing values"),
        ("a,y\n" + "1,u\n2,v\n" * 15, ["--header", "--labels", "one"], "1 labels for 2"),
        ("a,y\n" + "1,u\n2,v\n" * 15, ["--header", "--test", "b.csv"], "--test are of no use"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_told(tmp_path, content, more, said):
    if content is not None:
        (tmp_path / "d.csv").write_text(content)
    made = run("--data", tmp_path / "d.csv", "--prior", "p", *more)
    assert made.exit_code != 0
    assert isinstance(made.exception, TheodoliteError)
    assert said in str(made.exception)


def reviews(folder):
    words = np.random.default_rng(0).choice(list("bcdefghij"), (120, 6))
    frame = pd.DataFrame({"text": [" ".join(row) for row in words], "label": ["cat", "dog"] * 60})
    frame["text"] += np.where(frame["label"] == "cat", " the mat", " a tree")
    frame.to_csv(folder / "texts.csv", index=False)
    return load_subject(data=folder / "texts.csv", epochs=5)


def test_the_chart_of_texts_by_a_local_model(tmp_path, monkeypatch):
    local = connect(model=save_tiny_model(tmp_path / "tiny"), cache=False)
    monkeypatch.setattr(drawn, "connect", lambda *_: local)
    monkeypatch.setattr(drawn, "find_spec", lambda _: True)
    subject = reviews(tmp_path)
    finding = measure("verbalized-learning", subject)
    assert json.dumps(finding.to_json(), allow_nan=False)
    assert "calls to learn" in finding.headline
    assert finding.numbers["calls to learn"].value == 60
    assert {control.kind for control in finding.comparison.controls} == {"null", "random", "closed-form", "reference"}
    assert any("cannot write descriptions" in caveat for caveat in finding.caveats)


def test_the_chart_of_a_table_by_an_endpoint(tmp_path, monkeypatch):
    subject = load_subject(data=iris(tmp_path), options=DataOptions(scale="none"), epochs=5)
    (step,) = [step for step in make_plan(subject) if step.slug == "verbalized-learning"]
    assert not step.applies
    assert "THEODOLITE_ENDPOINT" in step.reason
    with protocol_server(answer=petals) as server:
        monkeypatch.setenv("THEODOLITE_ENDPOINT", server.url)
        monkeypatch.setenv("THEODOLITE_LANGUAGE_MODEL", "m")
        finding = measure("verbalized-learning", subject)
    assert "a petal length below 2.5 is setosa" in finding.headline
    assert finding.comparison.estimate.value > finding.numbers["theta_0, not trained"].value
    assert len(finding.figure.data[0].y) == 3


def test_what_the_chart_cannot_read_is_told(tmp_path):
    subject = reviews(tmp_path)
    embedded = dataclasses.replace(subject.data, features=())
    assert "embedded" in drawn._refusal(dataclasses.replace(subject, data=embedded))
    many = dataclasses.replace(subject, data=dataclasses.replace(subject.data, modality="tabular"))
    assert "THEODOLITE_ENDPOINT" in drawn._refusal(many)
