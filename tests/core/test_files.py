import json
import math
import subprocess
import sys

import pytest

from theodolite.core.errors import DataError, DiskError
from theodolite.core.files import make_folder, read_json, write_json, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1, "far": math.inf, "none": [math.nan]})
    assert read_json(path) == {"x": 1, "far": None, "none": [None]}
    write_whole(path, "second")
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_has_the_mode_that_any_new_file_has(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_whole(tmp_path / "whole", "x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    write_json(tmp_path / "a.json", {"old": True})
    # a limit on the size of files stands in for a full disk: the write fails half way
    script = f"""
import resource, signal
from pathlib import Path
from theodolite.core.errors import DiskError
from theodolite.core.files import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(Path({str(tmp_path)!r}) / "a.json", "x" * 100_000)
except DiskError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="choose another"):
        make_folder(tmp_path / "file" / "atlas")


def test_what_is_not_json_is_told(tmp_path):
    (tmp_path / "a.json").write_text("{half")
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
