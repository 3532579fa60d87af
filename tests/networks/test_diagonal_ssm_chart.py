"""The chart on networks with such layers and beside other models of series, and its command."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.builtin import builtin
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.core.train import Recipe, train
from theodolite.networks.diagonal_ssm import S4D, S4DClassifier
from theodolite.survey.chart import CHARTS, Budget
from theodolite.survey.networks import state_space


def rows(n, seed, length=24):
    """Series of noise whose class is the sign of an early step, which a linear model of all steps can read as well."""
    x = torch.randn(n, length, 2, generator=torch.Generator().manual_seed(seed))
    return Rows(x, (x[:, 2, 0] > 0).long())


def data():
    parts = rows(160, 0), rows(60, 1), rows(80, 2)
    return Dataset("signs", "series", "classification", *parts, features=("a", "b"), classes=("down", "up"))


def subject_with(network, dataset=None):
    return Subject("signs", dataset or data(), network.eval())


class StepByStep(nn.Module):
    """A network that asks for no kernels."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = S4D(2, n_state=4, seed=0), nn.Linear(2, 2)

    def forward(self, x):
        state = self.layer.initial_state(len(x))
        for sample in x.unbind(dim=1):
            y, state = self.layer.step(sample, state)
        return self.head(y)


@pytest.fixture(scope="module")
def trained():
    dataset = data()
    network = S4DClassifier(2, 2, d_model=16, n_state=16, n_layers=1, pooling="last", seed=0, dt_min=0.01, dt_max=0.5)
    train(network, dataset.train.x, dataset.train.y, recipe=Recipe(epochs=25, batch_size=16, lr=1e-2))
    return subject_with(network, dataset)


def test_it_applies_to_series_and_to_networks_with_such_layers():
    needs = CHARTS["diagonal-state-space"].needs
    assert needs.refusal(subject_with(StepByStep())) is None
    assert needs.refusal(subject_with(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))) is None
    assert needs.refusal(builtin("breast-cancer")) == "needs series data, or a network that holds S4D layers"


def test_a_network_is_told_by_its_memory_and_beats_random_cuts(trained):
    finding = state_space.diagonal_state_space(trained, Budget(seed=1))
    median = int(finding.numbers["median memory of a kernel"].value)
    assert f"median memory of the 16 kernels is {median} steps (series have 24)" in finding.headline
    assert finding.numbers["accuracy of the network"] == trained.quality()
    random, whole = finding.comparison.controls
    assert (random.kind, whole.kind) == ("random", "reference")
    assert whole.estimate.low > 0.5
    assert finding.comparison.estimate.value > random.estimate.value
    names = [trace.name for trace in finding.figure.data]
    assert {"at the start", "now", "newest steps kept", "random steps kept"} <= set(names)
    curve = next(trace for trace in finding.figure.data if trace.name == "newest steps kept")
    assert curve.y[-1] == trained.correct(trained.predictor, trained.data.validation.head(256)).mean()
    json.dumps(finding.to_json(), allow_nan=False)
    assert not state_space.kernels_of(trained.predictor)["blocks.0.layer.kernel"]._forward_hooks


def test_moved_states_are_counted_from_where_they_started(trained):
    network = S4DClassifier(2, 2, d_model=3, n_state=8, n_layers=1, seed=0)
    kernels = state_space.kernels_of(network)
    assert state_space._moved(kernels) == (0, 12)
    (kernel,) = kernels.values()
    with torch.no_grad():
        kernel.imag[0, 1] *= 1.2
        kernel.imag[1, 2] *= 1.05
        kernel.imag[2, 0] += 0.06
    assert state_space._moved(kernels) == (2, 12)
    again = next(iter(state_space.kernels_of(state_space._put_back(network)).values()))
    assert torch.allclose(again.imag, kernel.initial_eigenvalues().imag.float())
    assert kernel.imag[0, 1].item() == pytest.approx(1.2 * np.pi, rel=1e-5)


@pytest.mark.parametrize("network", [StepByStep(), S4DClassifier(2, 2, d_model=4, n_state=4, init="random", seed=0)])
def test_unknown_starts_and_streams_are_charted_too(network):
    finding = state_space.diagonal_state_space(subject_with(network), Budget())
    drawn = not isinstance(network, StepByStep)
    assert ("moved" in finding.headline) is not drawn
    assert any("drawn at random" in caveat for caveat in finding.caveats) is drawn
    assert ("series have" in finding.headline) is drawn


def test_beside_another_model_the_layers_are_a_baseline():
    other = subject_with(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))
    finding = state_space.diagonal_state_space(other, Budget(seconds=1.0))
    assert [control.kind for control in finding.comparison.controls] == ["closed-form", "null", "reference"]
    assert finding.numbers["accuracy of the subject's own model"] == other.quality()
    # the class is read from one early step, which the linear model of all 24 steps sees
    assert finding.comparison.controls[0].estimate.value > 0.7
    assert finding.numbers["epochs of training"].value == 9
    again = state_space.diagonal_state_space(other, Budget(seconds=1.0))
    assert finding.to_json() == again.to_json()


def test_a_forecast_is_a_change_from_the_last_value():
    def walk(n, seed):
        x = torch.randn(n, 30, 1, generator=torch.Generator().manual_seed(seed)).cumsum(dim=1) + 100
        return Rows(x, x[:, -1, 0] + 0.5 * (x[:, -1, 0] - x[:, -2, 0]), torch.arange(n))

    class Last(nn.Module):
        def forward(self, x):
            return x[:, -1]

    dataset = Dataset("walk", "series", "regression", walk(300, 0), walk(60, 1), walk(80, 2))
    finding = state_space.diagonal_state_space(Subject("walk", dataset, Last()), Budget(seconds=2.0))
    _, null, own = finding.comparison.controls
    assert null.name == "answering with the last value"
    assert null.estimate.value == pytest.approx(own.estimate.value)
    assert finding.comparison.estimate.value > null.estimate.value
    means = replace(dataset, train=replace(dataset.train, groups=None))
    finding = state_space.diagonal_state_space(Subject("walk", means, Last()), Budget(seconds=0.5))
    assert finding.comparison.controls[1].name == "the mean of the targets"
    assert "Start from the simple one" in finding.advice


def run(*arguments):
    return CliRunner().invoke(app, ["run", "diagonal-state-space", *map(str, arguments)])


def test_the_command_charts_and_inspects(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text(
        "from theodolite.networks.diagonal_ssm import S4DClassifier\n"
        "def network():\n    return S4DClassifier(2, 2, d_model=4, n_state=4, n_layers=2, seed=0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    many = rows(240, 3)
    np.savez(tmp_path / "series.npz", x=many.x.numpy(), y=many.y.numpy())
    given = ["--model", "made_here:network", "--data", tmp_path / "series.npz", "--series", "--epochs", 1]
    done = run(*given, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["slug"] == "diagonal-state-space"
    done = run(*given, "--inspect", tmp_path / "channels.csv", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["blocks.0.layer.kernel"]["channels"] == 4
    table = pd.read_csv(tmp_path / "channels.csv")
    assert len(table) == 8
    assert {"channel", "effective_length", "layer"} <= set(table.columns)
    refused = run("--subject", "breast-cancer", "--inspect", tmp_path / "none.csv")
    assert refused.exit_code != 0
    assert "holds no S4D layers" in str(refused.exception) + refused.output
    assert not (tmp_path / "none.csv").exists()
