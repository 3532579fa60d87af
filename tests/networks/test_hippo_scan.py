"""The scan of series that ask for a known memory, its chart and its command."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.builtin import builtin
from theodolite.core.errors import DataError, InputError
from theodolite.core.sources import find_data
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.core.train import Recipe, train
from theodolite.networks.diagonal_ssm import S4DClassifier
from theodolite.networks.hippo import S4, memory_scan
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
    still = [Rows(torch.randn(30, 20, 1), torch.zeros(30))] * 3
    with pytest.raises(DataError, match="the target is the same in all training rows"):
        memory_scan(Dataset("still", "series", "regression", *still))
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
    assert len(finding.numbers) == 6


class OfOthers(nn.Module):
    """A layer of another's making, which has time steps by the name that they usually have."""

    def __init__(self):
        super().__init__()
        self.log_dt, self.head = nn.Parameter(torch.tensor([0.1, 0.01]).log()), nn.Linear(96, 2)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_time_steps_of_other_layers_are_told_too():
    finding = measure("hippo", subject(network=OfOthers()))
    assert "of the network's 2 channels" in finding.headline
    assert finding.numbers["median memory of the network's channels"].value == pytest.approx(55.0)


class ByPixel(nn.Module):
    """Reads a table's row as a series by S4 layers of two kinds: rows are told by the first value, which needs memory."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = S4(8, 8, dt_min=0.01, dt_max=1.0, seed=0), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layer.convolve(x[..., None].expand(-1, -1, 8))[:, -1])


@pytest.fixture(scope="module")
def by_pixel():
    def part(n, seed):
        x = torch.randn(n, 30, generator=torch.Generator().manual_seed(seed))
        return Rows(x, (x[:, 0] > 0).long())

    data = Dataset("firsts", "tabular", "classification", part(300, 0), part(60, 1), part(200, 2), classes=("n", "y"))
    network = ByPixel()
    train(network, data.train.x, data.train.y, recipe=Recipe(epochs=30, batch_size=16, lr=1e-2))
    return Subject("firsts", data, network.eval())


def test_layers_are_charted_whatever_the_data(by_pixel):
    (step,) = [step for step in make_plan(by_pixel) if step.slug == "hippo"]
    assert step.applies, step.reason
    before = copy.deepcopy(by_pixel.predictor.state_dict())
    finding = measure("hippo", by_pixel)
    memory = 1 / by_pixel.predictor.layer.kernel.dt.detach()
    assert "of 30 that they read" in finding.headline
    assert finding.numbers["median memory of the network's channels"].value == pytest.approx(memory.median(), rel=0.5)
    longest = memory.argsort(descending=True)[:2]
    quiet = copy.deepcopy(by_pixel.predictor)
    with torch.no_grad():
        quiet.layer.kernel.C[longest] = 0
    assert finding.comparison.estimate == by_pixel.quality(quiet)
    assert [control.kind for control in finding.comparison.controls] == ["random", "reference"]
    assert finding.comparison.controls[1].estimate == by_pixel.quality()
    names = [trace.name for trace in finding.figure.data]
    assert "basis function 0" in names
    assert sum("layer.kernel, channel" in str(name) for name in names) == 5
    json.dumps(finding.to_json(), allow_nan=False)
    after = by_pixel.predictor.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class Streamed(ByPixel):
    """The same layer, one value at a time."""

    def forward(self, x):
        state = self.layer.initial_state(len(x))
        for value in x.unbind(dim=1):
            y, state = self.layer.step(value[:, None].expand(-1, 8), state)
        return self.head(y)


def test_a_network_that_streams_is_charted_and_left_as_it_was(by_pixel):
    network = Streamed().eval()
    before = copy.deepcopy(network.state_dict())
    finding = measure("hippo", Subject("stream", by_pixel.data, network))
    assert "that they read" not in finding.headline
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_black_box_of_a_table_is_refused():
    (step,) = [step for step in make_plan(builtin("breast-cancer")) if step.slug == "hippo"]
    assert step.reason == "needs series data, or a network that holds state space layers; these data are tabular"


def test_short_series_are_refused_with_the_reason():
    data = echo(3, length=12, classes=2)
    made = Subject("short", data, nn.Sequential(nn.Flatten(), nn.Linear(24, 2)))
    (step,) = [step for step in make_plan(made) if step.slug == "hippo"]
    assert not step.applies
    assert "at least 16 steps; these have 12" in step.reason


def test_a_constant_target_is_refused_with_the_reason():
    data = echo(3)
    still = [Rows(part.x, torch.ones(len(part))) for part in data.parts.values()]
    made = Subject(
        "still", Dataset("still", "series", "regression", *still), nn.Sequential(nn.Flatten(), nn.Linear(96, 1))
    )
    (step,) = [step for step in make_plan(made) if step.slug == "hippo"]
    assert step.reason == "needs a target that changes in the training and the test rows"


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
    answer = run("--scan", waves, "--column", "wave", "--window", 30, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["series"] == "wave"
    assert found["windows"].endswith("of 30 steps")
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


def test_a_short_series_is_not_called_sure(tmp_path):
    """Thirteen test windows of 16 steps are one stretch of the series, over which there is no interval."""
    t = np.arange(144)
    (tmp_path / "short.csv").write_text("v\n" + "".join(f"{value:.4f}\n" for value in np.sin(t / 2) + t / 50))
    found = json.loads(run("--scan", tmp_path / "short.csv", "--json").stdout)
    assert "no sure gain from memory" in found["finding"]
    assert "1 independent stretch is too few to tell" in found["finding"]


def test_the_windows_of_a_scan_leave_enough_stretches_to_be_sure(waves, tmp_path):
    found = json.loads(run("--scan", waves, "--column", "wave", "--json").stdout)
    assert found["windows"].endswith("of 28 steps")  # the tenth of the times left two stretches, which tell nothing
    assert found["finding"].startswith("The next value needs about")
    (tmp_path / "few.csv").write_text("v\n" + "1.5\n2.5\n" * 50)
    answer = run("--scan", tmp_path / "few.csv")
    assert answer.exit_code == 1
    assert "needs at least 130 times" in str(answer.exception)


@pytest.mark.slow
def test_real_series():
    path = find_data("ETTh1.csv")
    if path is None:
        pytest.skip("needs ETTh1.csv: set THEODOLITE_DATA")
    found = json.loads(run("--scan", path, "--column", "HUFL", "--json").stdout)
    assert 4 <= found["memory_needed"] <= 512
    assert found["error_from_that_memory"]["high"] < found["error_from_the_last_value"]["low"]
