import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from theodolite.catalog import CATALOG
from theodolite.cli import app
from theodolite.commands import SubjectFlags, parse_duration
from theodolite.core.errors import InputError, TheodoliteError

runner = CliRunner()


def shell(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "theodolite", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_methods_lists_all_papers_as_json_and_nothing_else():
    done = runner.invoke(app, ["methods", "--json"])
    rows = json.loads(done.stdout)
    assert [row["slug"] for row in rows] == [about.slug for about in CATALOG]
    assert {"slug", "title", "space", "needs", "state", "arxiv", "module"} <= set(rows[0])


def test_a_warning_is_one_line_without_code():
    code = "import warnings, theodolite.cli as cli; cli.app = lambda: warnings.warn('few rows'); cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "warning: few rows\n"


def test_methods_of_one_space():
    rows = json.loads(runner.invoke(app, ["methods", "--space", "networks", "--json"]).stdout)
    assert {row["space"] for row in rows} == {"networks"}
    assert runner.invoke(app, ["methods", "--space", "nowhere"]).exit_code == 2


def test_subjects_lists_the_built_in_ones():
    assert [row["name"] for row in json.loads(runner.invoke(app, ["subjects", "--json"]).stdout)] == [
        "digits", "breast-cancer", "pixels", "smollm2",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["survey", "--help"], ["run", "--help"], ["reproduce", "--help"]])
def test_every_help_can_be_read(arguments):
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (["survey", "--subject", "digit"], 1, "breast-cancer"),
    (["survey", "--only", "label-geometri"], 1, "did you mean"),
    (["survey", "--budget", "soon"], 1, "duration"),
    (["survey", "--data", "no-such-file.csv"], 1, "no-such-file.csv"),
    (["survey", "--model", "forest.skops"], 1, "--data"),
    (["survey", "--no-such-flag"], 2, "no-such-flag"),
    (["reproduce", "no-such-method"], 1, "no method"),
    (["reproduce", "step-law"], 1, "no reproduction"),
    (["run", "step-law"], 2, "step-law"),
])  # fmt: skip
def test_a_mistake_is_one_clear_error_without_traceback(arguments, code, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = shell(*arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_durations():
    assert [parse_duration(t) for t in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]
    for bad in ("", "0", "-1", "10 minutes"):
        with pytest.raises(InputError, match="duration"):
            parse_duration(bad)


def test_the_code_for_a_subject_names_what_was_given():
    assert SubjectFlags().code() == "subject = theodolite.subject('digits')"
    assert SubjectFlags(subject="a.b:c").code() == "from a.b import c\nsubject = c()"
    for flags in (SubjectFlags(model="smollm2"), SubjectFlags(task="language")):  # on the built-in texts
        assert flags.code() == "subject = theodolite.language_subject('smollm2')"
    code = SubjectFlags(data="t.csv", target="y", epochs=3).code()
    assert code == (
        "subject = theodolite.load_subject(model='auto', data='t.csv', "
        "options=theodolite.DataOptions(target='y'), epochs=3)"
    )


def test_a_subject_and_a_model_at_once_are_refused():
    with pytest.raises(TheodoliteError, match="leave out"):
        SubjectFlags(subject="digits", data="t.csv").load()
