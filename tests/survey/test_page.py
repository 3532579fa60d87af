import json
import re

import plotly.graph_objects as go
import pytest

from theodolite.core.builtin import builtin
from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.core.files import read_json, write_json
from theodolite.survey.atlas import SCHEMA, describe, versions
from theodolite.survey.finding import Finding
from theodolite.survey.page import render, render_folder
from theodolite.survey.terrain import contours

HOSTILE = "<script>alert('x')</script>"


def finding(slug="adaptive-data-analysis", *, text="plain", wins=True):
    ours = proportion(90, 100, unit="accuracy")
    control = Control(f"chance {text}", Estimate.exact(0.5 if wins else 0.95, "accuracy"), "null")
    return {
        "schema": SCHEMA,
        **Finding(
            slug=slug,
            headline=f"{text} reaches 0.9",
            numbers={f"accuracy {text}": ours, "one run": Estimate(0.5, float("-inf"), float("inf"), "", 1)},
            comparison=Comparison("accuracy", ours, (control,)),
            figure=go.Figure(go.Bar(x=[text, "b<br>c"], y=[1, 2], hovertemplate="%{x}<extra></extra>")),
            reading=f"Bars {text}",
            advice=f"Nothing {text}",
            seed=0,
            caveats=(f"few rows {text}",),
            code=f"print({text!r})",
        ).to_json(),
    }


@pytest.fixture(scope="module")
def atlas():
    subject = builtin("breast-cancer")
    return {
        "schema": SCHEMA, "name": subject.name, "command": "theodolite survey", "fingerprint": subject.fingerprint,
        "seed": 0, "started": "2026-01-02T03:04:05+00:00", "finished": None, "status": "complete", "seconds": 83.0,
        "subject": describe(subject), "planned": ["hippo"], "failed": [{"slug": "label-geometry", "error": "no luck"}],
        "skipped": [], "holdout": {"asked": 3, "spent": 1, "budget": 40, "rows": 114,
                                   "naive_gain": {"value": 0.1, "low": 0.1, "high": 0.1, "unit": "", "n": None}},
        "plan": [{"slug": "label-geometry", "space": "predictions", "title": "T", "applies": False,
                  "reason": "needs at least 3 classes; there are 2", "seconds": 0.0}],
        "versions": versions(), "machine": "Linux",
    }  # fmt: skip


def test_the_page_shows_headline_numbers_controls_and_reasons(atlas):
    page = render(atlas, [finding()])
    for text in ("plain reaches 0.9", "chance plain", "needs at least 3 classes", "no luck", "Nothing plain",
                 "few rows plain", "[−∞, ∞]", "1 min 23 s", "2 January 2026"):  # fmt: skip
        assert text in page, text
    assert "does not beat its control" not in page
    assert "does not beat its control" in render(atlas, [finding(wins=False)])


def test_whatever_the_data_call_themselves_is_shown_as_text(atlas):
    hostile = json.loads(json.dumps(atlas))
    hostile["name"] = hostile["subject"]["description"] = hostile["command"] = HOSTILE
    hostile["subject"]["data"]["columns"] = [
        {"name": HOSTILE, "kind": "category", "missing": 0, "levels": [HOSTILE, "</table>"]}
    ]
    hostile["subject"]["data"]["classes"] = [HOSTILE, "b"]
    hostile["failed"] = [{"slug": HOSTILE, "error": HOSTILE}]
    page = render(hostile, [finding(text=HOSTILE)])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script") == 3
    assert page.count("</script>") == 3
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])
    (bar,) = figures["adaptive-data-analysis"]["data"]
    assert bar["x"] == [HOSTILE.replace("<", "&lt;").replace(">", "&gt;"), "b<br>c"]
    assert bar["hovertemplate"] == "%{x}<extra></extra>"


def test_the_page_asks_no_network_and_stays_small(atlas):
    page = render(atlas, [finding()])
    assert len(page.encode()) < 8_000_000
    before_scripts = page[: page.index('id="figures"')]
    assert not re.search(r'(src|href)="(?!#|data:|https://arxiv\.org/)', before_scripts)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src &#39;none&#39;" in policy
    assert policy.count("sha256-") == 2
    assert "unsafe-eval" not in policy


def test_an_empty_survey_has_a_page(atlas):
    assert "Nothing was found yet" in render({**atlas, "plan": [], "failed": [], "planned": []}, [])


def test_a_page_is_made_again_from_the_folder(atlas, tmp_path):
    (tmp_path / "findings").mkdir()
    write_json(tmp_path / "atlas.json", atlas)
    write_json(tmp_path / "findings" / "adaptive-data-analysis.json", finding())
    page = render_folder(tmp_path)
    assert page.read_text(encoding="utf-8") == render(read_json(tmp_path / "atlas.json"), [finding()])


def test_each_fingerprint_has_its_own_hill():
    assert contours("a") == contours("a")
    assert contours("a") != contours("b")
    assert contours("a").count("<polygon") == 15
