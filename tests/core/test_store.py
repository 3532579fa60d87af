"""Activations on disk: what is read is what was held, a stopped run goes on, and nothing is larger than asked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from theodolite.core.capture import ActivationError, activations
from theodolite.core.errors import DataError, DiskError, InputError
from theodolite.core.store import ActivationStore


class Tokens(nn.Module):
    """Ids to states (n, L, 6) to scores."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 6)
        self.mix = nn.Linear(6, 6)
        self.calls = 0

    def forward(self, ids):
        self.calls += len(ids)
        return self.mix(torch.tanh(self.embed(ids)))


IDS = torch.arange(200 * 5).view(200, 5) % 20


def test_it_holds_what_the_network_held_at_the_positions_asked_for(tmp_path):
    model = Tokens()
    whole = activations(model, IDS, ["embed", "mix"])
    for positions, kept in (("all", [0, 1, 2, 3, 4]), ("last", [4]), ("not first", [1, 2, 3, 4]), ([0, -1], [0, 4])):
        store = ActivationStore.collect(model, IDS, ["embed", "mix"], tmp_path / str(positions), positions=positions)
        assert store.positions == tuple(kept)
        for name in ("embed", "mix"):
            assert torch.equal(store.tensor(name), whole[name][:, kept].flatten(0, 1))
    assert isinstance(store["mix"], np.memmap)
    assert not store["mix"].flags.writeable


def test_rows_without_positions_and_half_precision(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    x = torch.randn(100, 3)
    store = ActivationStore.collect(net, x, ["1"], tmp_path, half=True)
    assert store["1"].dtype == np.float16
    assert torch.allclose(store.tensor("1", slice(10, 20)), activations(net, x, ["1"])["1"][10:20], atol=1e-2)


def test_chunks_do_not_change_it(tmp_path):
    a = ActivationStore.collect(Tokens(), IDS, ["mix"], tmp_path / "a")
    b = ActivationStore.collect(Tokens(), IDS, ["mix"], tmp_path / "b", memory=1)
    assert np.allclose(a["mix"], b["mix"], atol=1e-6)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_store import IDS, ActivationStore, Tokens
model = Tokens()
model.embed.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if model.calls > 130 else None)
ActivationStore.collect(model, IDS, ["mix"], sys.argv[2])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "s")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    done = json.loads((tmp_path / "s" / "store.json").read_text())["done"]
    assert 0 < done < 200
    with pytest.raises(DataError, match=f"{done} of 200 rows"):
        ActivationStore(tmp_path / "s")
    model = Tokens()
    store = ActivationStore.collect(model, IDS, ["mix"], tmp_path / "s")
    assert model.calls < 200 - done + 10
    assert torch.equal(store.tensor("mix"), activations(Tokens(), IDS, ["mix"])["mix"].flatten(0, 1))
    before = model.calls
    ActivationStore.collect(model, IDS, ["mix"], tmp_path / "s")
    assert model.calls - before < 10  # all is there; only shapes and sizes are looked up


def test_another_model_other_rows_or_layers_are_refused(tmp_path):
    ActivationStore.collect(Tokens(), IDS, ["mix"], tmp_path)
    other = Tokens()
    with torch.no_grad():
        other.mix.weight += 0.1
    for model, ids, names in ((other, IDS, ["mix"]), (Tokens(), IDS.flip(0), ["mix"]), (Tokens(), IDS, ["embed"])):
        with pytest.raises(DataError, match="holds activations with another"):
            ActivationStore.collect(model, ids, names, tmp_path)


def test_more_than_is_allowed_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(InputError, match="are allowed"):
        ActivationStore.collect(Tokens(), IDS, ["mix"], tmp_path, max_bytes=1000)
    assert not list(tmp_path.glob("*.npy"))


def test_a_disk_that_is_too_small_is_told_before_work_starts(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = Tokens()
    with pytest.raises(DiskError, match="No space left"):
        ActivationStore.collect(model, IDS, ["mix"], tmp_path)
    assert model.calls < 10
    assert not list(tmp_path.glob("*.npy"))


def test_numbers_that_are_not_finite_are_told_with_their_row(tmp_path):
    model = Tokens()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    with pytest.raises(ActivationError, match="first in row 1"):
        ActivationStore.collect(model, IDS, ["mix"], tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"names": []}, "at least one layer"),
        ({"names": ["mix", "mix"]}, "each once"),
        ({"x": IDS[:0]}, "at least one row"),
        ({"positions": "middle"}, '"not first"'),
        ({"positions": [9]}, "5 positions"),
        ({"positions": []}, "5 positions"),
    ],
)
def test_bad_input_is_told(tmp_path, options, text):
    given = {"x": IDS, "names": ["mix"]} | options
    with pytest.raises(InputError, match=text):
        ActivationStore.collect(Tokens(), given.pop("x"), given.pop("names"), tmp_path, **given)


def test_a_folder_without_a_store_is_told(tmp_path):
    with pytest.raises(DataError, match="no activations"):
        ActivationStore(tmp_path)
    store = ActivationStore.collect(Tokens(), IDS, ["mix"], tmp_path)
    with pytest.raises(InputError, match="no layer 'embed'"):
        store["embed"]
