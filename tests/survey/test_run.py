import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import plotly.graph_objects as go
import pytest

from theodolite.core.builtin import builtin
from theodolite.core.errors import DataError, DiskError, InputError, MissingExtraError, ModelError
from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.survey import plan as plan_module
from theodolite.survey import run as run_module
from theodolite.survey.chart import Chart, Needs, seconds
from theodolite.survey.finding import Finding, estimate_from_json, estimate_to_json
from theodolite.survey.plan import make_plan
from theodolite.survey.run import measure, survey

FIRST, SECOND, THIRD = "label-geometry", "intrinsic-dimension", "adaptive-data-analysis"


def finding(slug, seed=0):
    ours = proportion(90, 100, unit="accuracy")
    control = Control("chance", Estimate.exact(0.5), "null")
    return Finding(
        slug=slug, headline=f"{slug} reaches 0.9", numbers={"accuracy": ours},
        comparison=Comparison("accuracy", ours, (control,)),
        figure=go.Figure(go.Bar(x=["a"], y=[1])), reading="Bars.", advice="Nothing.", seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    return builtin("breast-cancer")


@pytest.fixture
def charts(monkeypatch):
    calls = []

    def draw(slug):
        def chart(subject, budget):
            calls.append(slug)
            return finding(slug, budget.seed)

        return chart

    made = {
        FIRST: Chart(FIRST, Needs(), seconds(1.0), draw(FIRST)),
        SECOND: Chart(SECOND, Needs(), seconds(2.0), draw(SECOND)),
    }
    made[THIRD] = Chart(THIRD, Needs(classes=3), seconds(1.0), draw(THIRD))
    monkeypatch.setattr(plan_module, "load_charts", lambda: made)
    monkeypatch.setattr(run_module, "load_charts", lambda: made)
    return made, calls


def replace_draw(made, slug, draw):
    made[slug] = Chart(slug, made[slug].needs, made[slug].cost, draw)


def test_the_plan_tells_for_every_method_that_it_runs_or_why_not(subject, charts):
    steps = {step.slug: step for step in make_plan(subject)}
    assert steps[FIRST].applies
    assert "3 classes; there are 2" in steps[THIRD].reason
    assert all(step.applies or step.reason for step in steps.values())


def test_a_survey_is_on_disk_and_a_second_one_keeps_it(subject, charts, tmp_path):
    _, calls = charts
    outcomes = []
    state = survey(subject, tmp_path, on_outcome=outcomes.append)
    assert [o.state for o in outcomes] == ["found", "found"]
    assert state["status"] == "complete"
    atlas = json.loads((tmp_path / "atlas.json").read_text())
    assert atlas["schema"] == 1
    assert {"subject", "plan", "versions", "command"} <= set(atlas)
    for slug in (FIRST, SECOND):
        found = json.loads((tmp_path / "findings" / f"{slug}.json").read_text())
        assert {"slug", "space", "headline", "numbers", "control", "seconds", "seed"} <= set(found)
    page = (tmp_path / "index.html").read_text()
    assert f"{FIRST} reaches 0.9" in page
    again = []
    survey(subject, tmp_path, on_outcome=again.append)
    assert [o.state for o in again] == ["kept", "kept"]
    assert calls == [FIRST, SECOND]


def test_fresh_starts_over(subject, charts, tmp_path):
    _, calls = charts
    survey(subject, tmp_path)
    survey(subject, tmp_path, fresh=True)
    assert calls == [FIRST, SECOND] * 2


def test_another_subject_or_seed_in_the_folder_is_refused(subject, charts, tmp_path):
    survey(subject, tmp_path)
    with pytest.raises(DataError, match="--fresh"):
        survey(builtin("breast-cancer", seed=1), tmp_path)
    with pytest.raises(DataError, match="seed"):
        survey(subject, tmp_path, seed=1)


def test_what_does_not_fit_the_budget_is_skipped_and_done_later(subject, charts, tmp_path):
    outcomes = []
    state = survey(subject, tmp_path, budget=1.5, on_outcome=outcomes.append)
    assert [o.state for o in outcomes] == ["found", "skipped"]
    assert state["skipped"][0]["slug"] == SECOND
    later = survey(subject, tmp_path, budget=60)
    assert later["skipped"] == []
    assert (tmp_path / "findings" / f"{SECOND}.json").exists()


def test_a_chart_without_its_optional_package_is_skipped_not_failed(subject, charts, tmp_path):
    made, _ = charts

    def lacking(subject, budget):
        raise MissingExtraError("ot is not installed; it comes with: pip install 'theodolite[data]'")

    replace_draw(made, FIRST, lacking)
    state = survey(subject, tmp_path)
    assert state["failed"] == []
    assert [(one["slug"], "theodolite[data]" in str(one)) for one in state["skipped"]] == [(FIRST, True)]
    assert (tmp_path / "findings" / f"{SECOND}.json").exists()


def test_a_chart_that_fails_is_told_and_the_others_go_on(subject, charts, tmp_path):
    made, _ = charts

    def broken(subject, budget):
        raise RuntimeError("out of cheese")

    replace_draw(made, FIRST, broken)
    state = survey(subject, tmp_path)
    assert "out of cheese" in state["failed"][0]["error"]
    assert (tmp_path / "findings" / f"{SECOND}.json").exists()
    assert "out of cheese" in (tmp_path / "index.html").read_text()


def test_an_interrupted_survey_says_stopped_and_continues(subject, charts, tmp_path):
    made, calls = charts

    def interrupted(subject, budget):
        raise KeyboardInterrupt

    whole = made[SECOND]
    replace_draw(made, SECOND, interrupted)
    with pytest.raises(KeyboardInterrupt):
        survey(subject, tmp_path)
    assert json.loads((tmp_path / "atlas.json").read_text())["status"] == "stopped"
    made[SECOND] = whole
    assert survey(subject, tmp_path)["status"] == "complete"
    assert calls == [FIRST, SECOND]


def test_measure_says_why_a_method_does_not_apply(subject, charts):
    with pytest.raises(ModelError, match="3 classes"):
        measure(THIRD, subject)
    with pytest.raises(InputError, match="no chart"):
        measure("hippo", subject)


def test_a_finding_survives_json_with_unbounded_intervals():
    one_run = Estimate(0.5, -math.inf, math.inf, "x", 1)
    written = json.loads(json.dumps(estimate_to_json(one_run)))
    assert written["low"] is None
    assert estimate_from_json(written) == one_run


def test_a_folder_that_cannot_be_written_is_told_before_work(subject, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="choose another"):
        survey(subject, tmp_path / "file" / "atlas")


QUICK = ["adaptive-data-analysis", "interaction-basis", "local-function-approximation", "relevance-pruning"]
ONLY = [word for slug in QUICK for word in ("--only", slug)]
COMMAND = [sys.executable, "-m", "theodolite", "survey", "--subject", "breast-cancer", *ONLY]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def whole(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "findings").glob("*.json")}


@pytest.mark.slow
def test_kill_9_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path):
    out = tmp_path / "atlas"
    run = subprocess.Popen([*COMMAND, "--out", str(out)], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("findings/*.json")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    first = whole(out)
    assert first, "no finding was made before the kill"
    done = subprocess.run(
        [*COMMAND, "--out", str(out), "--json"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert state["status"] == "complete"
    second = whole(out)
    assert len(second) == sum(step["applies"] for step in state["plan"])
    for slug, found in first.items():
        assert second[slug] == found
    unbroken = tmp_path / "unbroken"
    subprocess.run([*COMMAND, "--out", str(unbroken), "--json"], env=ENVIRONMENT, capture_output=True, check=True)
    for slug, found in whole(unbroken).items():
        assert second[slug]["numbers"] == found["numbers"], f"{slug} differs after a kill"


@pytest.mark.slow
def test_a_full_disk_is_told_and_earlier_findings_are_whole(tmp_path):
    # a limit on the size of files stands in for the full disk: the page is larger than the limit, findings are not
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000));"
        "from theodolite.cli import main; main()"
    )
    out = tmp_path / "atlas"
    arguments = ["survey", "--subject", "breast-cancer", *ONLY, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    json.loads((out / "atlas.json").read_text())
    whole(out)
