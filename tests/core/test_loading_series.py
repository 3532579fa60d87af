"""Series: windows of a table in time order, arrays of one series a row, and everything that cannot be one."""

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import theodolite
from theodolite.cli import app
from theodolite.core.errors import DataError, InputError
from theodolite.core.loading import DataOptions, load_subject


def table(n=400, seed=0, **columns):
    rng = np.random.default_rng(seed)
    level = np.cumsum(rng.normal(size=n))
    hours = pd.date_range("2024-01-01", periods=n, freq="h").astype(str)
    return pd.DataFrame({"when": hours, "load": level, "heat": np.sin(np.arange(n) / 4)} | columns)


def written(tmp_path, frame):
    frame.to_csv(tmp_path / "data.csv", index=False)
    return tmp_path / "data.csv"


def loaded(tmp_path, frame, **options):
    given = {"target": "load", "series": True, "window": 12} | options
    return load_subject(data=written(tmp_path, frame), options=DataOptions(**given), epochs=1)


def test_windows_hold_the_steps_before_their_target_and_parts_do_not_share_a_time(tmp_path):
    frame = table()
    data = loaded(tmp_path, frame, scale="none").data
    assert data.modality == "series"
    assert data.forecasts
    assert data.features == ("load", "heat")
    assert data.shape == (12, 2)
    values = frame["load"].to_numpy(dtype=np.float32)
    times = {}
    for part, (start, stop) in {"train": (0, 240), "validation": (240, 320), "test": (320, 400)}.items():
        rows = data.parts[part]
        assert len(rows) == stop - start - 12
        at = [int(np.flatnonzero(np.isclose(values, float(y), atol=1e-6))[0]) for y in rows.y]
        for i in (0, 5):
            assert rows.x[i, :, 0].numpy() == pytest.approx(values[at[i] - 12 : at[i]], abs=1e-6)
            assert rows.x[i, :, 1].numpy() == pytest.approx(frame["heat"].to_numpy()[at[i] - 12 : at[i]], abs=1e-6)
        assert min(at) - 12 >= start
        assert max(at) < stop
        times[part] = at
        assert torch.equal(rows.groups, torch.tensor([(t - 12 - start) // 12 for t in at]))
    assert times["train"] != sorted(times["train"])  # rows are in random order, as in every data set


def test_channels_are_scaled_by_the_training_times_and_chance_is_the_last_value(tmp_path):
    frame = table()
    subject = loaded(tmp_path, frame)
    train = frame["load"].to_numpy()[:240]
    first = subject.data.train
    low = (frame["load"].to_numpy() - train.mean()) / train.std()
    assert float(first.x[:, :, 0].min()) == pytest.approx(low[:239].min(), abs=1e-5)
    y, last = low[332:], low[331:-1]
    assert subject.data.chance == pytest.approx(1 - ((y - last) ** 2).sum() / ((y - y.mean()) ** 2).sum(), abs=1e-4)
    assert any("last value has an R2" in note for note in subject.data.notes)
    quality = subject.quality()
    assert quality.low < quality.value < quality.high


def test_a_large_series_is_thinned_not_drawn(tmp_path):
    data = loaded(tmp_path, table(1000), max_rows=100, scale="none").data
    assert sum(map(len, data.parts.values())) <= 100
    assert any("every 10th time" in note for note in data.notes)
    assert torch.equal(data.train.x.diff(dim=1)[0, :, 1].abs() > 0, torch.ones(11, dtype=torch.bool))


def backwards():
    frame = table()
    return pd.concat([frame.iloc[50:], frame.iloc[:50]])


@pytest.mark.parametrize(
    ("frame", "options", "error", "text"),
    [
        (backwards(), {}, DataError, "go back at row"),
        (table(), {"target": "when"}, DataError, "needs numbers in the column 'when'"),
        (table(), {"target": "power"}, DataError, "no such column"),
        (table(), {"target": None}, DataError, "--target"),
        (table(60), {}, DataError, "smaller --window"),
        (table(load=np.ones(400)), {}, DataError, "the target 'load' has the same value at every time"),
        (table(heat=[np.nan] + [0.5] * 399), {}, DataError, "--missing last"),
        (table(heat=[np.nan] + [0.5] * 399), {"missing": "drop"}, DataError, "no time of a series can be left out"),
        (table(), {"task": "classification"}, DataError, "'when' do not"),
        (table(), {"test": "other.csv"}, Exception, "other.csv"),
    ],
)
def test_what_is_no_series_is_told(tmp_path, frame, options, error, text):
    with pytest.raises(error, match=text):
        loaded(tmp_path, frame, **options)


def test_times_that_do_not_go_by_one_step_are_told(tmp_path):
    assert not any("spaced" in note or "row before" in note for note in loaded(tmp_path, table()).data.notes)
    gap = loaded(tmp_path, table(450).drop(index=range(100, 150))).data.notes
    assert any("mostly 1 hour apart, up to 2.12 days before row 101;" in note for note in gap)
    months = pd.date_range("1990-01-31", periods=400, freq="ME").astype(str)
    assert not any("spaced" in note for note in loaded(tmp_path, table(when=months)).data.notes)
    twice = np.repeat(pd.date_range("2024-01-01", periods=200, freq="h").astype(str), 2)
    notes = loaded(tmp_path, table(when=twice)).data.notes
    assert any("200 rows have the time of the row before in 'when'" in note for note in notes)


def test_a_window_without_a_series_or_too_short_is_told():
    for options in ({"window": 12}, {"series": True, "window": 1}):
        with pytest.raises(InputError, match="--window"):
            DataOptions(**options)


def test_missing_values_are_the_ones_before(tmp_path):
    heat = np.arange(400.0)
    heat[[0, 7, 8]] = np.nan
    data = loaded(tmp_path, table(heat=heat), missing="last", scale="none").data
    assert any("value before" in note for note in data.notes)
    first = data.train.x[data.train.x[:, 1, 1].argmin(), :10, 1]  # the earliest window
    assert first.tolist() == [1, 1, 2, 3, 4, 5, 6, 6, 6, 9]
    with pytest.raises(InputError, match="only the times of a --series"):
        DataOptions(missing="last")


@pytest.mark.parametrize("channels", [None, 3])
def test_an_array_holds_one_series_a_row(tmp_path, channels):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 20) if channels is None else (90, 20, channels))
    y = np.arange(90) % 3
    x[y == 1] += 2
    np.savez(tmp_path / "data.npz", x=x, y=np.array(["a", "b", "c"])[y])
    subject = load_subject(data=tmp_path / "data.npz", options=DataOptions(series=True), epochs=2)
    assert subject.data.modality == "series"
    assert not subject.data.forecasts
    assert subject.data.shape == (20, channels or 1)
    assert subject.data.classes == ("a", "b", "c")
    seen = subject.data.train.x.double()
    assert seen.mean(dim=(0, 1)).abs().max() < 1e-5
    assert (seen.std(dim=(0, 1)) - 1).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [((30, 4, 4, 1), {}, "series are numbers"), ((30, 12), {"window": 6}, "--window is for a table")],
)
def test_an_array_that_is_no_series_is_told(tmp_path, shape, options, text):
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=shape), y=np.arange(30) % 2)
    with pytest.raises((DataError, InputError), match=text):
        load_subject(data=tmp_path / "data.npz", options=DataOptions(series=True, **options), epochs=1)


def test_a_series_with_gaps_is_left_out_only_where_asked(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 12))
    x[7, 3] = np.nan
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(60) % 2)
    with pytest.raises(DataError, match="--missing drop"):
        load_subject(data=tmp_path / "data.npz", options=DataOptions(series=True), epochs=1)
    data = load_subject(data=tmp_path / "data.npz", options=DataOptions(series=True, missing="drop"), epochs=1).data
    assert sum(map(len, data.parts.values())) == 59


def test_a_forecast_follows_the_level_of_the_series(tmp_path):
    """The network sees the window less its last values, so a series that has risen is answered as before."""
    subject = loaded(tmp_path, table())
    x = subject.data.test.x[:4]
    with torch.no_grad():
        risen = subject.predictor(x + 100) - subject.predictor(x)
    assert risen.numpy() == pytest.approx(np.full((4, 1), 100.0), abs=1e-3)


def test_a_survey_of_a_series_from_the_command_line(tmp_path):
    file = written(tmp_path, table(1400))
    flags = ["--data", str(file), "--target", "load", "--series", "--window", "12", "--epochs", "1"]
    found = CliRunner().invoke(
        app, ["survey", *flags, "--only", "adaptive-data-analysis", "--out", str(tmp_path / "atlas")]
    )
    assert found.exit_code == 0, found.output
    page = (tmp_path / "atlas" / "index.html").read_text()
    assert "series=True" in page
    assert "the last value has an R2" in page


def test_the_line_of_python_gives_the_same_series(tmp_path):
    file = written(tmp_path, table())
    options = theodolite.DataOptions(target="load", series=True, window=12)
    once, again = (load_subject(data=file, options=options, epochs=1) for _ in range(2))
    assert once.fingerprint == again.fingerprint


# ---- one labelled series a row, in text files

HEADER = "@problemName waves\n@timeStamps false\n@univariate {one}\n@{kind}Label true {names}\n@data\n"


def ts_file(path, x, labels, kind="class", names=""):
    """Series x (n, channels, steps) as a .ts file."""
    rows = [":".join(",".join(map(str, channel)) for channel in series) for series in x]
    body = "\n".join(f"{row}:{label}" for row, label in zip(rows, labels, strict=True))
    path.write_text("# waves of two kinds\n" + HEADER.format(one=x.shape[1] == 1, kind=kind, names=names) + body + "\n")
    return path


def waves(n, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = np.sin(np.arange(20) / np.where(y, 2, 4)[:, None, None] + rng.normal(size=(n, channels, 1)))
    return x.round(5), np.array(["slow", "fast"])[y]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_ts_file_holds_one_series_a_line(tmp_path, channels):
    x, y = waves(40, channels)
    train = ts_file(tmp_path / "waves_TRAIN.ts", x, y, names="slow fast")
    test = ts_file(tmp_path / "waves_TEST.ts", *waves(10, channels, seed=1))
    options = DataOptions(test=str(test), scale="none")
    data = load_subject(data=train, options=options, epochs=1).data
    assert (data.modality, data.task, data.shape) == ("series", "classification", (20, channels))
    assert data.classes == ("fast", "slow")
    assert len(data.test) == 10
    seen = torch.cat([data.train.x, data.validation.x])
    assert sorted(seen.sum(dim=(1, 2)).tolist()) == pytest.approx(sorted(x.sum(axis=(1, 2)).tolist()), abs=1e-4)


def test_a_ts_file_of_values_is_a_regression(tmp_path):
    x, _ = waves(40)
    file = ts_file(tmp_path / "sizes.ts", x, x[:, 0, 0] * 2, kind="target")
    data = load_subject(data=file, options=DataOptions(), epochs=1).data
    assert (data.modality, data.task) == ("series", "regression")


def test_gaps_of_a_ts_file_are_left_out_only_where_asked(tmp_path):
    x, y = waves(40)
    file = ts_file(tmp_path / "waves.ts", x, np.where(np.arange(40) == 3, "?", y))
    file.write_text(file.read_text().replace(f"{x[5, 0, 0]},", "?,", 1))
    with pytest.raises(DataError, match="--missing drop"):
        load_subject(data=file, options=DataOptions(), epochs=1)
    data = load_subject(data=file, options=DataOptions(missing="drop"), epochs=1).data
    assert sum(map(len, data.parts.values())) == 38


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("@data\n", "", "no line @data"),
        ("@timeStamps false", "@timeStamps true", "time stamps"),
        ("@classLabel true", "@classLabel false", "no labels"),
        (":fast", ",1.0:fast", "from 20 to 21 steps"),
        (":fast", ":1.0:fast", "not rows of numbers of one length"),
        (":fast", ",high:fast", "not rows of numbers"),
        (":fast", "", "a colon and a label"),
    ],
)
def test_what_is_no_ts_file_of_series_is_told(tmp_path, old, new, words):
    file = ts_file(tmp_path / "waves.ts", *waves(40))
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=words):
        load_subject(data=file, options=DataOptions(), epochs=1)


def test_train_and_test_files_must_fit(tmp_path):
    train = ts_file(tmp_path / "waves_TRAIN.ts", *waves(40))
    test = ts_file(tmp_path / "waves_TEST.ts", *waves(10, channels=2))
    with pytest.raises(DataError, match="another shape"):
        load_subject(data=train, options=DataOptions(test=str(test)), epochs=1)


def test_a_table_with_classes_holds_one_series_a_row(tmp_path):
    """As the archives' .tsv files: the label first, no header."""
    x, y = waves(40)
    pd.DataFrame(x[:, 0]).assign(label=y)[["label", *range(20)]].to_csv(
        tmp_path / "waves.tsv", sep="\t", header=False, index=False
    )
    options = DataOptions(series=True, task="classification", target="column1", header=False, scale="none")
    data = load_subject(data=tmp_path / "waves.tsv", options=options, epochs=1).data
    assert (data.modality, data.shape, data.classes) == ("series", (20, 1), ("fast", "slow"))
    seen = torch.cat([part.x for part in data.parts.values()])
    assert sorted(seen.sum(dim=(1, 2)).tolist()) == pytest.approx(sorted(x.sum(axis=(1, 2)).tolist()), abs=1e-4)
