"""The scan of series that ask for a known memory, its chart and its command."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.errors import DataError, InputError
from theodolite.core.sources import find_data
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.networks.diagonal_ssm import S4DClassifier
from theodolite.networks.hippo import memory_scan
from theodolite.survey.plan import make_plan
from theodolite.survey.run import measure


def echo(delay, length=48, rows=400, classes=0, seed=0):
    """Windows of smooth noise, two channels, whose target is the first channel ``delay`` steps before the end."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.normal(size=(rows, 2, 4 * length)))
    spectrum[..., np.fft.rfftfreq(4 * length) > 0.08] = 0
    x = np.fft.irfft(spectrum, 4 * length)[..., :length].transpose(0, 2, 1)
    x = torch.tensor(x / x.std(), dtype=torch.float32)
    y = x[:, length - 1 - delay, 0]
    y = (y > 0).long() if classes else y
    parts = [Rows(x[a:b], y[a:b]) for a, b in ((0, rows // 2), (rows // 2, 3 * rows // 4), (3 * rows // 4, rows))]
    names = tuple("ab"[:classes])
    return Dataset("echo", "series", "classification" if classes else "regression", *parts, ("u", "v"), names)


@pytest.mark.parametrize("delay", [10, 30])
def test_the_needed_memory_is_that_of_the_delay(delay):
    found = memory_scan(echo(delay), measures=("legt",))
    assert delay * 0.8 <= found.needed <= delay * 2.5
    assert found.needed_error.high < 0.2
    assert found.last_error.low > 0.5
    assert found.chosen_recall.high < found.random_recall.low
    assert found.chosen_recall.high < found.shuffled_recall.low
    long_enough, too_short = found.memory_steps > 1.2 * delay, found.memory_steps < delay / 2
    assert found.target[0, long_enough].min() < 0.2
    assert (found.target[0, too_short] > 0.3).all()


def test_where_the_last_value_tells_all_no_memory_is_needed():
    found = memory_scan(echo(0))
    assert (found.needed, found.needed_measure, found.wanted) == (1.0, None, False)


def test_classes_are_told_by_the_share_of_wrong_ones():
    found = memory_scan(echo(12, classes=2))
    assert found.needed_error.unit == "of the rows"
    assert found.needed_error.high < found.last_error.low
    assert found.target.shape == (3, len(found.memory_steps))
    assert ((found.target >= 0) & (found.target <= 1)).all()


def test_the_same_seed_gives_the_same_scan():
    first, second = (
        memory_scan(echo(5), memory_steps=[8, 16], seed=3),
        memory_scan(echo(5), memory_steps=[8, 16], seed=3),
    )
    assert np.array_equal(first.recall, second.recall)
    assert first.random_recall == second.random_recall
    assert first.memory_steps.tolist() == [8, 16]


def test_unusable_series_and_options_are_told():
    data = echo(3)
    with pytest.raises(InputError, match="there is no measure"):
        memory_scan(data, measures=("legs", "x"))
    with pytest.raises(InputError, match="must be even"):
        memory_scan(data, n_state=5)
    for bad in ([], [0.0], [np.nan]):
        with pytest.raises(InputError, match="memory_steps that are positive"):
            memory_scan(data, memory_steps=bad)
    with pytest.raises(DataError, match="windows of 10 steps are too short"):
        memory_scan(echo(3, length=10))
    flat = [Rows(torch.ones(9, 20, 1), torch.arange(9.0))] * 3
    with pytest.raises(DataError, match="the series are constant"):
        memory_scan(Dataset("flat", "series", "regression", *flat))
    table = [Rows(torch.randn(9, 20), torch.arange(9.0))] * 3
    with pytest.raises(DataError, match="these are tabular"):
        memory_scan(Dataset("table", "tabular", "regression", *table))


# ---- the chart


def subject(delay=12, classes=2, network=None):
    data = echo(delay, classes=classes)
    return Subject("echo", data, network or S4DClassifier(2, max(1, classes), d_model=4, n_layers=2, n_state=4, seed=0))


@pytest.mark.parametrize("classes", [0, 2])
def test_the_chart_tells_memory_and_what_the_network_has(classes):
    made = subject(classes=classes)
    (step,) = [step for step in make_plan(made) if step.slug == "hippo"]
    assert step.applies, step.reason
    finding = measure("hippo", made)
    assert "needs" in finding.headline
    assert "of the network's 8 channels" in finding.headline
    needed = finding.numbers["memory that the target needs"].value
    dt = torch.cat([block.layer.kernel.dt for block in made.predictor.blocks])
    share = float((1 / dt < needed).double().mean())
    assert finding.numbers["channels of the network that remember less than the target needs"].value == share
    assert {control.kind for control in finding.comparison.controls} == {"random", "null"}
    assert not finding.beaten
    json.dumps(finding.to_json(), allow_nan=False)
    again = measure("hippo", made)
    assert again.headline == finding.headline
    assert again.figure.to_json() == finding.figure.to_json()


def test_a_network_without_such_layers_has_no_time_scales():
    finding = measure("hippo", subject(network=nn.Sequential(nn.Flatten(), nn.Linear(96, 2))))
    assert "network" not in finding.headline
    assert len(finding.numbers) == 5


def test_short_series_are_refused_with_the_reason():
    data = echo(3, length=12, classes=2)
    made = Subject("short", data, nn.Sequential(nn.Flatten(), nn.Linear(24, 2)))
    (step,) = [step for step in make_plan(made) if step.slug == "hippo"]
    assert not step.applies
    assert "at least 16 steps; these have 12" in step.reason


# ---- the command


def run(*arguments):
    return CliRunner().invoke(app, ["run", "hippo", *map(str, arguments)])


@pytest.fixture
def waves(tmp_path):
    t = np.arange(900)
    noise = np.random.default_rng(0).normal(size=900)
    path = tmp_path / "waves.csv"
    rows = zip(np.sin(2 * np.pi * t / 12) + 0.1 * noise, noise, strict=True)
    path.write_text("wave,noise\n" + "".join(f"{a:.5f},{b:.5f}\n" for a, b in rows))
    return path


def test_a_plain_table_is_scanned(waves):
    answer = run("--scan", waves, "--column", "wave", "--window", 40, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["series"] == "wave"
    assert found["windows"].endswith("of 40 steps")
    assert found["dt"] == pytest.approx(1 / found["memory_needed"], rel=0.01)
    assert found["error_from_that_memory"]["high"] < found["error_from_the_last_value"]["low"]
    assert "The next value needs" in found["finding"]
    assert len(found["legs_by_memory"]) == len(found["fout_by_memory"]) > 3


def test_noise_needs_no_memory(waves):
    found = json.loads(run("--scan", waves, "--column", "noise", "--window", 40, "--json").stdout)
    assert found["error_from_that_memory"]["high"] > 0.9
    assert "needs about" not in found["finding"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--column", "wave"], "--column goes with --scan"),
        (["--scan", "FILE"], "2 columns of numbers (wave, noise)"),
        (["--scan", "FILE", "--column", "tide"], "tide"),
        (["--scan", "FILE", "--data", "x.csv"], "leave out --subject, --model and --data"),
        (["--scan", "FILE", "--column", "wave", "--window", "300"], "smaller --window"),
        (["--scan", "nowhere.csv", "--column", "wave"], "cannot be read"),
    ],
)
def test_what_the_command_cannot_do_is_told(waves, arguments, words):
    answer = run(*[waves if argument == "FILE" else argument for argument in arguments])
    assert answer.exit_code == 1
    assert words in str(answer.exception)


def test_a_gap_in_the_series_is_told(tmp_path):
    path = tmp_path / "gap.csv"
    path.write_text("v,w\n" + "".join(f"{'' if i == 70 else i % 9},0\n" for i in range(400)))
    answer = run("--scan", path, "--column", "v")
    assert answer.exit_code == 1
    assert "missing" in str(answer.exception)
    assert run("--scan", path, "--column", "v", "--missing", "last", "--json").exit_code == 0


@pytest.mark.slow
def test_real_series():
    path = find_data("ETTh1.csv")
    if path is None:
        pytest.skip("needs ETTh1.csv: set THEODOLITE_DATA")
    found = json.loads(run("--scan", path, "--column", "HUFL", "--json").stdout)
    assert 4 <= found["memory_needed"] <= 512
    assert found["error_from_that_memory"]["high"] < found["error_from_the_last_value"]["low"]
