"""The chart and the command of tuning by a language model, over real HTTP; a script answers, so no number is a result."""

import json
import re

import pytest
from typer.testing import CliRunner

from language_server import protocol_server
from theodolite.cli import app
from theodolite.core.builtin import builtin
from theodolite.survey.chart import load_charts
from theodolite.survey.hyperparameters import llm_bayesian_optimization as page
from theodolite.survey.run import measure

pytest.importorskip("openai")
pytest.importorskip("optuna")


def answer(messages):
    """As a chat model does: a fence of its own. Deeper trees are said to be better."""
    prompt = messages[-1]["content"]
    if "Predict" in prompt:
        depth = int(re.findall(r"max_depth is (\d+)", prompt)[-1])
        return f"Score: ## 0.{depth:02d} ##"
    depth = 1 + len(prompt) % 15
    return (
        f"Configuration: ## max_depth: {depth}, max_features: 0.9{depth % 10}, min_impurity_decrease: 0.00, min_samples_leaf: "
        "0.01, min_samples_split: 0.02, min_weight_fraction_leaf: 0.01 ##"
    )


def test_without_a_language_model_the_chart_says_what_to_set(monkeypatch):
    monkeypatch.delenv(page.MODEL, raising=False)
    assert page.MODEL in load_charts()["llm-bayesian-optimization"].needs.refusal(builtin("breast-cancer"))


def test_the_chart_tunes_and_tells_how_well_the_model_ranks(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(page, "_TRIALS", 2)
    with protocol_server(answer=answer) as server:
        monkeypatch.setenv(page.ENDPOINT, server.url)
        monkeypatch.setenv(page.MODEL, "scripted")
        finding = measure("llm-bayesian-optimization", builtin("breast-cancer"))
        again = measure("llm-bayesian-optimization", builtin("breast-cancer"))
    assert "After 7 evaluations scripted" in finding.headline
    assert {control.kind for control in finding.comparison.controls} == {"random", "closed-form"}
    assert ("model too weak" in finding.headline) == finding.advice.startswith("Do not tune")
    assert "tokens of the language model" in finding.numbers
    assert any("decision tree on its data" in caveat for caveat in finding.caveats)
    json.dumps(finding.to_json(), allow_nan=False)
    assert again.headline == finding.headline


def test_the_command_tunes_keeps_its_file_and_continues(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "search.json"
    arguments = [
        "run",
        "llm-bayesian-optimization",
        "--subject",
        "breast-cancer",
        "--language-model",
        "scripted",
        "--trials",
    ]
    with protocol_server(answer=answer) as server:
        more = ["--endpoint", server.url, "--resume", str(file), "--json"]
        first = CliRunner().invoke(app, [*arguments, "1", *more])
        second = CliRunner().invoke(app, [*arguments, "2", *more])
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert (one["evaluations"], two["evaluations"]) == (6, 7)
    assert one["completion_tokens"] > 0
    assert set(two["best"]) >= {"max_depth"}
    assert len(json.loads(file.read_text())["trials"]) == 7
    space = tmp_path / "space.json"
    space.write_text('{"depth": ["int", "linear", [1, 3]]}')
    wrong = CliRunner().invoke(app, [*arguments, "1", "--endpoint", "http://127.0.0.1:9/v1", "--space", str(space)])
    assert wrong.exit_code != 0
    lost = CliRunner().invoke(app, ["run", "llm-bayesian-optimization", "--resume", str(file)])
    assert lost.exit_code != 0


def test_a_model_that_does_not_answer_ends_the_command_and_is_not_replaced_by_chance(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["--subject", "breast-cancer", "--language-model", "m", "--trials", "1"]
    with protocol_server(*[503] * 50) as server:
        found = CliRunner().invoke(app, ["run", "llm-bayesian-optimization", *flags, "--endpoint", server.url])
    assert found.exit_code != 0
    assert "random" not in found.stdout
    assert 1 <= len(server.seen) <= 10
