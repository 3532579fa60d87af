"""The README's example runs, its table is what the catalogue gives, and every method has a page."""

import importlib.util
import re
from pathlib import Path

import pytest

from theodolite.catalog import CATALOG

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert "accuracy" in capsys.readouterr().out


def test_the_readme_table_is_the_catalogue(generate):
    text = (ROOT / "README.md").read_text()
    assert generate.with_table(text) == text
    for about in CATALOG:
        assert f"`{about.slug}`" in text


@pytest.mark.parametrize("about", [e for e in CATALOG if e.state == "available"], ids=lambda e: e.slug)
def test_every_available_method_has_a_page(generate, about):
    page = generate.method_page(about)
    assert about.arxiv in page
    assert "## Public names" in page


def test_no_file_names_a_place_it_should_not():
    banned = re.compile(r"/work/(main|shared)|/tmp/w/|pypi\.org|files\.pythonhosted", re.IGNORECASE)
    named = []
    for folder in ("src", "tests", "docs", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".json", ".html", ".css", ".js"} and path != Path(__file__):
                found = banned.search(path.read_text(encoding="utf-8"))
                if found:
                    named.append(f"{path}: {found[0]}")
    assert named == []
