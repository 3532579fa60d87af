"""The contract that every entry of the catalogue keeps."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from theodolite.catalog import CATALOG, SPACES, entry
from theodolite.core.errors import InputError
from theodolite.reproductions.report import module_name
from theodolite.run_commands import run_app
from theodolite.survey.chart import load_charts

AVAILABLE = [e for e in CATALOG if e.state == "available"]
TESTS = Path(__file__).parent

# a method without a chart, and why
CHARTLESS: dict[str, str] = {
    "intrinsic-dimension-finetuning": "a subject's network has seen its own task; what is asked is what a new task needs",
    "graph-fidelity": "a subject holds arrays; graphs with explanations of their edges are not among them",
}


def test_there_are_fifty_eight_papers_with_their_own_slug_and_module():
    assert len(CATALOG) == 58
    assert len({e.slug for e in CATALOG}) == 58
    assert len({e.module for e in CATALOG}) == 58
    assert {e.space for e in CATALOG} <= set(SPACES)


@pytest.mark.parametrize("about", CATALOG, ids=lambda e: e.slug)
def test_every_entry_is_filled(about):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", about.slug)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", about.arxiv)
    assert 2010 <= about.year <= 2026
    assert about.title
    assert about.authors
    assert about.needs


@pytest.mark.parametrize("about", AVAILABLE, ids=lambda e: e.slug)
def test_an_available_method_is_whole(about):
    module = importlib.import_module(about.import_name)
    assert about.arxiv in module.__doc__
    assert module.__all__
    for name in module.__all__:
        thing = getattr(module, name)
        assert not (inspect.isfunction(thing) or inspect.isclass(thing)) or inspect.getdoc(thing), (
            f"{name} has no docstring"
        )
    assert list((TESTS / about.space).glob("test_*.py"))
    claims = importlib.import_module(module_name(about.slug)).claims
    assert list(inspect.signature(claims).parameters) == ["scale", "seed"]
    assert about.slug in load_charts() or CHARTLESS.get(about.slug)
    assert about.slug in {command.name for command in run_app.registered_commands} | {
        group.name for group in run_app.registered_groups
    }


def test_an_unknown_method_is_told_with_the_nearest_names():
    with pytest.raises(InputError, match="label-geometry"):
        entry("label-geometri")
