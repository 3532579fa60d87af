"""Every chart on every kind of subject: what it finds, what it is compared with, and that it repeats."""

import contextlib
import io
import json

import pandas as pd
import pytest
import skops.io
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import RandomForestRegressor

from theodolite.core.builtin import builtin
from theodolite.core.loading import DataOptions, load_subject
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.networks.diagonal_ssm import S4DClassifier
from theodolite.survey.activations.interaction_basis import flat_nodes
from theodolite.survey.chart import load_charts
from theodolite.survey.finding import estimate_to_json
from theodolite.survey.plan import make_plan
from theodolite.survey.run import measure, survey

SLUGS = sorted(load_charts())


def diabetes(folder):
    bunch = load_diabetes(as_frame=True)
    bunch.frame.to_csv(folder / "diabetes.csv", index=False)
    return folder / "diabetes.csv"


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data = diabetes(folder)
    frame = pd.read_csv(data)
    forest = RandomForestRegressor(20, random_state=0).fit(frame.drop(columns="target"), frame["target"])
    skops.io.dump(forest, folder / "forest.skops")
    iris = load_iris(as_frame=True).frame
    iris["target"] = load_iris().target_names[iris["target"]]
    iris.to_csv(folder / "iris.csv", index=False)
    regression = DataOptions(task="regression")
    return {
        "tabular": builtin("breast-cancer"),
        "regression": load_subject(data=data, options=regression, epochs=20),
        "black box": load_subject(model=str(folder / "forest.skops"), data=data, options=regression),
        "three classes": load_subject(data=folder / "iris.csv", epochs=30),
    }


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("kind", ["tabular", "regression", "black box", "three classes"])
def test_a_chart_finds_something_or_says_why_not(subjects, kind, slug):
    subject = subjects[kind]
    (step,) = [step for step in make_plan(subject) if step.slug == slug]
    if not step.applies:
        assert step.reason
        return
    assert step.seconds > 0
    finding = measure(slug, subject)
    assert any(letter.isdigit() for letter in finding.headline)
    kinds = {control.kind for control in finding.comparison.controls}
    assert kinds & {"random", "closed-form", "null"}
    assert finding.reading
    assert finding.advice
    json.dumps(finding.to_json(), allow_nan=False)
    again = measure(slug, subject)
    first, second = ({name: estimate_to_json(number) for name, number in f.numbers.items()} for f in (finding, again))
    assert first == second
    assert finding.figure.to_json() == again.figure.to_json()


def test_what_applies_depends_on_the_subject(subjects):
    applies = {kind: {step.slug for step in make_plan(subject) if step.applies} for kind, subject in subjects.items()}
    assert {"intrinsic-dimension", "interaction-basis", "local-function-approximation"} <= applies["tabular"]
    assert {"intrinsic-dimension", "interaction-basis"}.isdisjoint(applies["black box"])
    assert "local-function-approximation" in applies["black box"]
    assert "label-geometry" not in applies["three classes"]


def test_hidden_layers_are_found_by_shape():
    assert flat_nodes(builtin("digits")) == ("flatten", "relu3")
    assert flat_nodes(builtin("breast-cancer")) == ("relu1", "relu2")
    series = Rows(torch.rand(40, 12, 1), torch.arange(40) % 2)
    data = Dataset("series", "series", "classification", series, series, series, (), ("a", "b"))
    network = S4DClassifier(1, 2, d_model=4, n_state=4, seed=0)  # its kernels have two axes, but no rows
    assert flat_nodes(Subject("series", data, network)) == ()


@pytest.mark.parametrize("length", [10, 2])
def test_the_holdout_counts_rows_that_overlap_in_time_once(length):
    rows = Rows(torch.rand(60, 3, 1), torch.arange(60) % 2, groups=torch.arange(60) // length)
    data = Dataset("series", "series", "classification", rows, rows, rows, (), ("no", "yes"))
    subject, holdout = (
        Subject("series", data, S4DClassifier(1, 2, d_model=4, n_state=4, seed=0)),
        load_charts()["adaptive-data-analysis"],
    )
    if length == 10:
        assert "at least 20 blocks of test rows that do not overlap in time; there are 6" in holdout.needs.refusal(
            subject
        )
    else:
        assert holdout.needs.refusal(subject) is None
        assert "these 30 blocks of test rows" in measure("adaptive-data-analysis", subject).headline


@pytest.mark.slow
def test_the_code_of_a_finding_gives_its_numbers(tmp_path):
    state = survey(builtin("breast-cancer"), tmp_path, code="subject = theodolite.subject('breast-cancer')")
    paths = sorted((tmp_path / "findings").glob("*.json"))
    assert [path.stem for path in paths] == sorted(step["slug"] for step in state["plan"] if step["applies"])
    for path in paths:
        found = json.loads(path.read_text())
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(found["code"], found["slug"], "exec"), {})
        lines = said.getvalue().splitlines()
        assert lines[0] == found["headline"]
        for number in found["numbers"]:
            (line,) = [line for line in lines if line.startswith(f"  {number['name']}: ")]
            assert line.removeprefix(f"  {number['name']}: ").split(" ")[0]
