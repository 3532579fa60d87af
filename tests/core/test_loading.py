import csv
import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_iris

from theodolite.core.errors import DataError, InputError
from theodolite.core.loading import DataOptions, load_subject
from theodolite.core.loading.columns import find_columns, fit_encoding
from theodolite.core.loading.data import load_data
from theodolite.core.loading.labels import class_name, numbers
from theodolite.core.loading.options import Wanted
from theodolite.core.loading.tables import read_table
from theodolite.core.sources import find_data


def data_file(name):
    path = find_data(name)
    if path is None:
        pytest.skip(f"needs {name}: set THEODOLITE_DATA")
    return path


def load(path, **options):
    return load_data(str(path), DataOptions(**options), Wanted()).data


def iris(names=True):
    bunch = load_iris()
    frame = pd.DataFrame(bunch.data, columns=["sepal_length", "sepal_width", "petal_length", "petal_width"])
    frame["species"] = bunch.target_names[bunch.target] if names else bunch.target
    return frame


def mixed(n=60):
    random = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "size": random.normal(3, 2, n),
            "colour": random.choice(["red", "green", "blue"], n),
            "new": random.random(n) < 0.5,
            "label": random.choice(["no", "yes"], n),
        }
    )


def all_rows(data):
    return np.concatenate([part.x.numpy() for part in data.parts.values()])


# ---- kinds of columns and their encoding


def test_kinds_levels_and_one_hot_of_a_mixed_table(tmp_path):
    frame = mixed()
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = load(tmp_path / "t.csv", scale="none")
    assert [(c.name, c.kind, c.levels) for c in data.columns] == [
        ("size", "numeric", ()),
        ("colour", "category", ("blue", "green", "red")),
        ("new", "boolean", ("False", "True")),
    ]
    assert data.features == ("size", "colour=blue", "colour=green", "colour=red", "new")
    assert data.classes == ("no", "yes")
    encoded = pd.get_dummies(frame.drop(columns="label"))[
        ["size", *(f"colour_{c}" for c in ("blue", "green", "red")), "new"]
    ]
    rows = all_rows(data)
    expected = encoded.to_numpy(dtype=np.float32)
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_decoding_gives_back_the_columns_as_they_were():
    frame = mixed().drop(columns="label")
    table = find_columns(frame)
    for standardise in (False, True):
        encoding = fit_encoding(table, np.arange(30), standardise=standardise)
        back = encoding.decode(encoding.encode(table.values))
        assert np.allclose(back["size"], frame["size"], atol=1e-5)
        assert (back["colour"] == frame["colour"]).all()
        assert (back["new"] == frame["new"]).all()


def test_what_was_scaled_can_be_told_in_the_units_of_the_file(tmp_path):
    frame = mixed()
    frame.to_csv(tmp_path / "data.csv", index=False)
    raw = load(tmp_path / "data.csv", scale="none")
    assert raw.scaling == ()
    data = load(tmp_path / "data.csv")
    shift, scale = (torch.tensor(values) for values in zip(*data.scaling, strict=True))
    for part, rows in data.parts.items():
        assert (shift + scale * rows.x).numpy() == pytest.approx(raw.parts[part].x.numpy(), abs=1e-5)


def test_standardising_uses_the_training_rows_alone(tmp_path):
    iris().to_csv(tmp_path / "t.csv", index=False)
    data = load(tmp_path / "t.csv", target="species")
    assert np.allclose(data.train.x.mean(dim=0), 0, atol=1e-5)
    assert np.allclose(data.train.x.std(dim=0, correction=0), 1, atol=1e-5)
    assert abs(float(data.test.x.mean())) > 1e-3


def test_the_four_ways_of_a_constant_and_an_empty_column(tmp_path):
    frame = mixed().assign(
        same=0.1, empty=np.nan, when=pd.date_range("2020", periods=60), word=[f"w{i}" for i in range(60)]
    )
    frame.to_parquet(tmp_path / "t.parquet")
    data = load(tmp_path / "t.parquet")
    same = data.features.index("same")
    assert (data.train.x[:, same] == 0).all()
    notes = " ".join(data.notes)
    for left in ("empty", "when", "word"):
        assert left in notes
        assert left not in data.features


@pytest.mark.parametrize(("cells", "expected"), [
    (["1", "2.5", None], [1, 2.5, np.nan]),
    ([1, True], None),
    ([10**400, 1], None),
    (["a", "1"], None),
    ([[1], 2], None),
])  # fmt: skip
def test_what_counts_as_numbers(cells, expected):
    found = numbers(pd.Series(cells, dtype=object))
    if expected is None:
        assert found is None
    else:
        assert np.array_equal(found, expected, equal_nan=True)


def test_class_names_do_not_depend_on_the_type():
    assert class_name(1) == class_name(1.0) == class_name(np.int64(1)) == class_name(np.float32(1)) == class_name("1")


# ---- forms of files


def test_every_form_of_a_table_gives_the_same_data(tmp_path):
    frame = iris()
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "b.tsv", index=False, sep="\t")
    frame.to_csv(tmp_path / "c.csv", index=False, sep=";")
    frame.to_csv(tmp_path / "d.csv.gz", index=False)
    frame.to_parquet(tmp_path / "e.parquet")
    frame.to_json(tmp_path / "f.jsonl", orient="records", lines=True)
    (tmp_path / "g.csv").write_text(frame.to_csv(index=False, sep=" "))
    (tmp_path / "h.csv").write_text("\ufeff" + frame.to_csv(index=False).replace(",", ", "), encoding="utf-8")
    first = load(tmp_path / "a.csv", target="species")
    assert len(first.train) == 90
    for path in sorted(tmp_path.iterdir()):
        data = load(path, target="species")
        assert data.features == first.features, path
        assert data.classes == ("setosa", "versicolor", "virginica")
        assert np.allclose(data.test.x, first.test.x, atol=1e-5), path
        assert (data.test.y == first.test.y).all(), path


def test_quoted_fields_may_hold_separators_and_line_ends(tmp_path):
    frame = mixed().replace({"colour": {"red": 'dark, "red"\nor so'}})
    frame.to_csv(tmp_path / "t.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    assert 'dark, "red"\nor so' in load(tmp_path / "t.csv").columns[1].levels


def test_npz_with_numbers_keys_and_test_rows(tmp_path):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(50, 3)), np.arange(50) % 2
    for name, save in (("stored.npz", np.savez), ("packed.npz", np.savez_compressed)):
        save(tmp_path / name, X_train=x, Y_train=y[:, None], x_test=x[:10] + 1, y_test=y[:10])
        data = load(tmp_path / name, scale="none")
        assert len(data.test) == 10
        assert sorted(data.test.x[:, 0].tolist()) == pytest.approx(sorted(x[:10, 0] + 1))
        assert len(data.train) + len(data.validation) == 50


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_rows_are_the_sampled_ones(tmp_path, save, order):
    x = np.asarray(np.arange(4000, dtype=np.float64).reshape(1000, 4), order=order)
    save(tmp_path / "t.npz", x=x, y=(np.arange(1000) % 2))
    data = load(tmp_path / "t.npz", max_rows=100, scale="none")
    rows = all_rows(data)
    assert rows.shape == (100, 4)
    assert (np.diff(rows, axis=1) == 1).all()
    assert (rows[:, 0] % 4 == 0).all()
    assert len(set(rows[:, 0])) == 100
    assert "100 of 1,000 rows" in " ".join(data.notes)


@pytest.mark.parametrize("shape", [(40, 6, 5), (40, 6, 5, 3), (40, 3, 6, 5)])
def test_npz_images_become_channels_first_in_the_unit_interval(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.savez(tmp_path / "t.npz", x=pixels, y=np.arange(40) % 4)
    data = load(tmp_path / "t.npz")
    assert data.modality == "image"
    assert data.shape == ((1, 6, 5) if len(shape) == 3 else (3, 6, 5))
    assert float(all_rows(data).max()) == pixels.max() / 255
    smaller = load(tmp_path / "t.npz", image_size=4, scale="standard")
    assert smaller.shape[1:] == (4, 4)
    assert np.allclose(smaller.train.x.mean(dim=(0, 2, 3)), 0, atol=1e-5)


@pytest.fixture
def digits_folder(tmp_path):
    path = data_file("mnist.npz")
    with np.load(path) as archive:
        images, labels = archive["x_test"][:200], archive["y_test"][:200]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "digits" / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return tmp_path / "digits", images, labels


def test_a_folder_of_images_by_class(digits_folder):
    folder, images, labels = digits_folder
    data = load(folder)
    assert data.shape == (1, 28, 28)
    assert data.classes == tuple(f"digit {i}" for i in range(10))
    counts = sum(np.bincount(part.y, minlength=10) for part in data.parts.values())
    assert (counts == np.bincount(labels)).all()
    assert float(all_rows(data).sum()) == pytest.approx(images.sum() / 255, rel=1e-5)


def test_a_subject_of_an_image_folder_learns(digits_folder):
    subject = load_subject(data=digits_folder[0])
    assert subject.retrainable
    assert subject.quality().low > subject.data.chance


def test_images_of_different_sizes_need_a_size_and_colours_win(tmp_path):
    for i in range(24):
        folder = tmp_path / "pets" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        mode = "RGB" if i == 5 else "L"
        Image.new(mode, (20 + i, 30), 10 * i if mode == "L" else (i, i, i)).save(folder / f"{i}.jpg")
    with pytest.raises(DataError, match="--image-size"):
        load(tmp_path / "pets")
    assert load(tmp_path / "pets", image_size=16).shape == (3, 16, 16)
    (tmp_path / "pets" / "cat" / "broken.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(DataError, match=r"broken\.png.*--missing drop"):
        load(tmp_path / "pets", image_size=16)
    assert "broken.png left out" not in load(tmp_path / "pets", image_size=16, missing="drop").notes
    total = sum(map(len, load(tmp_path / "pets", image_size=16, missing="drop").parts.values()))
    assert total == 24


def test_train_and_test_folders_of_images_are_kept_apart(tmp_path):
    for part, n in (("train", 12), ("test", 4)):
        for i in range(n):
            folder = tmp_path / "pets" / part / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 200 if part == "test" else 10).save(folder / f"{i}.png")
    data = load(tmp_path / "pets")
    assert len(data.test) == 4
    assert (data.test.x == np.float32(200 / 255)).all()


def sentences(n=200):
    path = data_file("rt-polarity/rt-polarity.pos")
    found = {side: path.with_suffix(f".{side}").read_text("latin-1").split("\n")[:n] for side in ("pos", "neg")}
    return [{"text": text, "label": side} for side, texts in found.items() for text in texts]


def test_json_lines_of_texts(tmp_path):
    records = sentences(1500)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    subject = load_subject(data=tmp_path / "t.jsonl")
    assert subject.data.modality == "text"
    assert subject.data.classes == ("neg", "pos")
    assert subject.quality().low > 0.55
    assert "movie" in subject.data.features


def test_texts_in_a_csv_are_found_or_named(tmp_path):
    frame = pd.DataFrame(sentences()).rename(columns={"text": "said"}).assign(number=1.0)
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert load(tmp_path / "t.csv", text="said").modality == "text"
    assert load(tmp_path / "t.csv").modality == "tabular"
    with pytest.raises(DataError, match="--text"):
        load(tmp_path / "t.csv", text="other")
    with pytest.raises(InputError, match="--scale"):
        load(tmp_path / "t.csv", text="said", scale="standard")


def test_a_saved_datasets_folder_with_parts_and_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    records = [{"text": row["text"], "label": int(row["label"] == "pos")} for row in sentences(40)]
    whole = datasets.Dataset.from_list(records, features=features)
    datasets.DatasetDict(train=whole, test=whole.select(range(30, 50))).save_to_disk(tmp_path / "both")
    whole.save_to_disk(tmp_path / "one")
    data = load(tmp_path / "both")
    assert data.classes == ("bad", "good")
    assert len(data.test) == 20
    assert sum(map(len, load(tmp_path / "one").parts.values())) == 80


# ---- what is ambiguous names the flag that settles it


@pytest.mark.parametrize(("name", "options", "flag"), [
    ("winequality-white.csv", {}, "--no-header"),
    ("winequality-white.csv", {"header": False}, "--target"),
    ("heloc.csv", {"header": False, "target": "column99"}, "--target"),
    ("seaborn/titanic.csv", {"target": "survived"}, "--missing"),
    ("seaborn/mpg.csv", {"target": "weight", "missing": "drop"}, "--task"),
])  # fmt: skip
def test_real_tables_ask_for_what_they_do_not_tell(name, options, flag):
    with pytest.raises(DataError, match=flag):
        load(data_file(name), **options)


def test_no_header_and_strings_only_is_ambiguous(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a,b,c"] + ["x,y,z", "x,z,y"] * 20))
    with pytest.raises(DataError, match="--no-header"):
        load(path)
    assert len(load(path, header=False, target="column3").train) > 20
    assert load(path, header=True, target="c").features == ("a=x", "b=y", "b=z")


def test_two_usual_names_of_a_label_are_ambiguous(tmp_path):
    mixed().assign(y=1).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"(?s)label.*--target"):
        load(tmp_path / "t.csv")


def test_few_whole_values_are_classes_and_many_are_asked_for(tmp_path):
    frame = pd.DataFrame({"x": np.arange(100.0) ** 0.5, "y": np.arange(100) % 20})
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="--task"):
        load(tmp_path / "t.csv")
    assert load(tmp_path / "t.csv", task="regression").task == "regression"
    assert len(load(tmp_path / "t.csv", task="classification").classes) == 20
    frame.assign(y=frame["y"] % 3).to_csv(tmp_path / "t.csv", index=False)
    data = load(tmp_path / "t.csv")
    assert data.classes == ("0", "1", "2")
    assert any("--task regression" in note for note in data.notes)
    frame.assign(y=frame["x"] * 1.5).to_csv(tmp_path / "t.csv", index=False)
    assert load(tmp_path / "t.csv").task == "regression"


@pytest.mark.parametrize("options", [
    {"task": "ranking"}, {"missing": "mean"}, {"scale": "minmax"}, {"max_rows": 3}, {"image_size": 0}, {"seed": -1},
])  # fmt: skip
def test_options_outside_their_values_are_refused(options):
    with pytest.raises(InputError, match=f"--{next(iter(options)).replace('_', '-')}"):
        DataOptions(**options)


# ---- missing values


def test_missing_values_are_dropped_or_filled_with_the_training_rows_median(tmp_path):
    frame = mixed(200)
    frame.loc[:19, "size"] = np.nan
    frame.loc[20:29, "colour"] = None
    frame.loc[30, "label"] = None
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"(?s)label.*'size' in 20.*--missing drop.*median"):
        load(tmp_path / "t.csv")
    dropped = load(tmp_path / "t.csv", missing="drop", scale="none")
    assert sum(map(len, dropped.parts.values())) == 169
    filled = load(tmp_path / "t.csv", missing="median", scale="none")
    assert sum(map(len, filled.parts.values())) == 199
    assert [c.missing for c in filled.columns] == [20, 10, 0]
    values, counts = np.unique(all_rows(filled)[:, 0], return_counts=True)
    known = filled.train.x[:, 0][filled.train.x[:, 0] != values[counts.argmax()]]
    assert counts.max() >= 20
    assert values[counts.argmax()] == pytest.approx(float(known.quantile(0.5)), abs=0.05)


def test_infinite_values_count_as_missing(tmp_path):
    frame = mixed()
    frame.loc[3, "size"] = np.inf
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="--missing"):
        load(tmp_path / "t.parquet")
    assert any("infinite" in note for note in load(tmp_path / "t.parquet", missing="drop").notes)


# ---- sample and split


def test_a_sample_of_a_csv_is_uniform_and_repeats(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("v,y\n" + "".join(f"{i},{i % 2}\n" for i in range(5000)))
    kept = [read_table(path, DataOptions(max_rows=500, seed=s)).frame["v"].astype(int) for s in (0, 0, 1)]
    assert len(kept[0]) == 500
    assert kept[0].is_monotonic_increasing
    assert kept[0].tolist() == kept[1].tolist() != kept[2].tolist()
    assert abs(kept[0].mean() - 2500) < 4 * 1443 / 500**0.5


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_every_row_is_as_likely_whatever_its_block(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("theodolite.core.loading.tables._CELLS", 1)  # blocks of 1,000 rows
    frame = pd.DataFrame({"v": np.arange(5000), "y": np.arange(5000) % 2})
    path = tmp_path / f"t.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    counts = np.zeros(5)
    for seed in range(10):
        kept = read_table(path, DataOptions(max_rows=200, seed=seed)).frame["v"].astype(int)
        assert kept.nunique() == 200
        counts += np.bincount(kept // 1000, minlength=5)
    assert ((counts - 400) ** 2 / 400).sum() < 20  # chi-square, 4 degrees of freedom: one in 2,000


def test_the_split_is_disjoint_and_by_class(tmp_path):
    frame = pd.DataFrame({"x": np.arange(1000.0), "y": ["rare"] * 20 + ["common"] * 980})
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = load(tmp_path / "t.csv", scale="none")
    assert [len(part) for part in data.parts.values()] == [600, 200, 200]
    assert sorted(all_rows(data)[:, 0].tolist()) == frame["x"].tolist()
    assert [int((part.y == data.classes.index("rare")).sum()) for part in data.parts.values()] == [12, 4, 4]
    other = load(tmp_path / "t.csv", scale="none", seed=1)
    assert not np.array_equal(other.train.x, data.train.x)
    assert np.array_equal(load(tmp_path / "t.csv", scale="none").train.x, data.train.x)


def test_a_class_of_one_row_is_in_the_training_part(tmp_path):
    pd.DataFrame({"x": np.arange(31.0), "y": ["a"] * 20 + ["b"] * 10 + ["c"]}).to_csv(tmp_path / "t.csv", index=False)
    data = load(tmp_path / "t.csv")
    assert 2 in data.train.y
    assert any("fewer than 5" in note for note in data.notes)


def test_a_second_file_gives_the_test_rows(tmp_path):
    frame = iris()
    frame.iloc[::2].to_csv(tmp_path / "a.csv", index=False)
    frame.iloc[1::2].to_csv(tmp_path / "b.csv", index=False)
    data = load(tmp_path / "a.csv", test=str(tmp_path / "b.csv"), target="species", scale="none")
    assert sorted(map(tuple, data.test.x.tolist())) == sorted(
        map(tuple, frame.iloc[1::2, :4].to_numpy(np.float32).tolist())
    )
    assert len(data.train) == 57
    frame.rename(columns={"sepal_width": "other"}).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(DataError, match="different columns"):
        load(tmp_path / "a.csv", test=str(tmp_path / "c.csv"), target="species")
    with pytest.raises(DataError, match="--test"):
        load(tmp_path / "a.csv", test=str(tmp_path / "none.csv"), target="species")


def test_classes_spelt_otherwise_in_the_test_file_are_an_error():
    train, test = data_file("adult-train.csv"), data_file("adult-test.csv")
    with pytest.raises(DataError, match="spell"):
        load(train, test=str(test), header=False, target="column15", missing="median", max_rows=2000)


# ---- the network that is trained where none is named


@pytest.mark.parametrize(("name", "options"), [
    ("pima.csv", {"header": False, "target": "column9"}),
    ("german-credit.csv", {"header": False, "target": "column21"}),
    ("heloc.csv", {"header": False, "target": "column1", "max_rows": 3000}),
    ("seaborn/penguins.csv", {"target": "species", "missing": "drop"}),
    ("seaborn/mpg.csv", {"target": "mpg", "missing": "median"}),
    ("tables/pendigits.csv", {"max_rows": 3000}),
])  # fmt: skip
def test_the_network_of_a_real_table_beats_chance(name, options):
    subject = load_subject(data=data_file(name), options=DataOptions(**options))
    assert subject.retrainable
    assert subject.quality(part="train").low > subject.data.chance
    assert subject.quality().value > subject.data.chance
    again = subject.fit(subject.build(5), seed=5)
    assert subject.quality(again).value > subject.data.chance


def test_a_regression_answers_in_the_units_of_its_target(tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 2))
    pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "y": 1e5 + 3e4 * x[:, 0]}).to_csv(tmp_path / "t.csv", index=False)
    subject = load_subject(data=tmp_path / "t.csv")
    assert subject.quality().value > 0.95
    assert subject.fingerprint == load_subject(data=tmp_path / "t.csv").fingerprint


def test_epochs_are_those_that_were_asked_for(tmp_path):
    iris().to_csv(tmp_path / "t.csv", index=False)
    subject = load_subject(data=tmp_path / "t.csv", options=DataOptions(target="species"), epochs=3)
    assert subject.recipe.epochs == 3
    with pytest.raises(InputError, match="--epochs"):
        load_subject(data=tmp_path / "t.csv", options=DataOptions(target="species"), epochs=0)


def test_a_cut_archive_of_a_table_is_an_error(tmp_path):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(iris().to_csv(index=False).encode())[:-400])
    with pytest.raises(DataError):
        load(tmp_path / "t.csv.gz", target="species")
