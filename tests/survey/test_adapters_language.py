"""The chart and the command of parameter-efficient tuning, on language models made here."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.next_token import next_tokens
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.parameters.peft import PEFTModel, apply
from theodolite.survey.chart import Budget, load_charts
from theodolite.survey.parameters import adapters

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 50}


def llama(**more):
    torch.manual_seed(0)
    given = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0} | more
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given)).eval()


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=64, bos_token_id=1, eos_token_id=1
        )
    ).eval()


def subject(model, texts=8):
    generator = torch.Generator().manual_seed(0)

    def rows(n):  # counting, which a few steps can learn
        return Rows(
            (torch.randint(0, 50, (n, 1), generator=generator) + torch.arange(12)) % 50, torch.arange(n) % texts
        )

    return Subject("small", Dataset("tokens", "text", "language", rows(64), rows(16), rows(20)), model)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_chart_measures_gains_and_leaves_the_model_alone(build, monkeypatch):
    monkeypatch.setattr(adapters, "_STEPS", (8, 8))
    one = subject(build())
    chart = load_charts()["unified-peft"]
    assert chart.needs.refusal(one) is None
    assert chart.cost(one) > 0
    before = {name: value.clone() for name, value in one.predictor.state_dict().items()}
    finding = chart.draw(one, Budget())
    assert all(torch.equal(value, before[name]) for name, value in one.predictor.state_dict().items())
    assert all(p.requires_grad for p in one.predictor.parameters())
    losses = next_tokens(one.predictor, one.data.test.x[:12]).loss.double().mean()
    assert finding.numbers["loss of the model as it is"].value == pytest.approx(float(losses))
    gains = [number for name, number in finding.numbers.items() if name.startswith("gain from")]
    sizes = adapters._plan(one.predictor, 60.0).sizes
    assert len(gains) == sum(map(len, sizes.values()))
    assert max(map(len, sizes.values())) == 2
    assert any("all biases" in name for name in finding.numbers) == (build is gpt2)
    assert any("all biases" in text for text in finding.caveats) == (build is llama)
    assert finding.comparison.estimate in gains
    assert {control.kind for control in finding.comparison.controls} == {"null", "random"}
    assert "perplexity" in finding.headline or "None of" in finding.headline
    assert any(letter.isdigit() for letter in finding.headline)
    json.dumps(finding.to_json(), allow_nan=False)
    again = chart.draw(one, Budget())
    assert again.headline == finding.headline
    assert dict(again.numbers) == dict(finding.numbers)


def test_a_point_is_what_training_those_changes_gives():
    one = subject(llama())
    plan = adapters._plan(one.predictor, 0.0)
    assert plan.steps == 8
    tuner = adapters._Tuner(one, plan, Budget(seed=3))
    point = tuner.changed("lora", plan.sizes["lora"][0], 5e-3)
    made = apply(llama(), "lora", budget=plan.sizes["lora"][0], seed=3)
    assert point.parameters == made.parameter_count.method
    tuner._fit(made, 5e-3)
    rows = one.data.test.x[:12]
    wanted = (next_tokens(llama(), rows).loss - next_tokens(made, rows).loss).double().mean(dim=1)
    assert np.allclose(point.gains, wanted, atol=1e-6)
    random = tuner.in_a_random_subspace(40, 1e-2)
    assert random.parameters == 40
    assert np.isfinite(random.gains).all()


def test_of_a_single_text_the_rows_are_what_varies():
    one = subject(llama(), texts=1)
    tuner = adapters._Tuner(one, adapters._plan(one.predictor, 0.0), Budget())
    estimate = tuner.over_texts(np.arange(12.0))
    assert estimate.low < estimate.value < estimate.high


def test_more_time_means_more_steps_up_to_a_limit():
    model = llama()
    few, many = (adapters._plan(model, seconds) for seconds in (1e-4, 1e9))
    assert (few.steps, many.steps) == adapters._STEPS
    assert few.seconds < many.seconds


def test_models_without_known_blocks_are_refused():
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "vocab_size": 50,
    }
    other = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, max_position_embeddings=64)).eval()
    assert "blocks are known" in load_charts()["unified-peft"].needs.refusal(subject(other))


# ---- the command


@pytest.fixture
def folder(tmp_path):
    """A small model with a tokenizer, and texts."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", *(f"w{i}" for i in range(1, 50))]
    whole = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[PAD]")
    )
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    llama().save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for text in range(30):
        line = " ".join(words[1 + (text + at) % 49] for at in range(40))
        (tmp_path / "texts" / f"{text}.txt").write_text(line)
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, ["run", "unified-peft", *map(str, arguments)])
    return result.exit_code, result.output, result.exception


@pytest.mark.parametrize("method", ["lora", "mam"])
def test_the_command_adapts_a_model_and_saves_what_it_trained(folder, method):
    given = (
        "--model",
        folder / "model",
        "--data",
        folder / "texts",
        "--length",
        16,
        "--steps",
        30,
        "--rate",
        0.01,
        "--json",
    )
    code, output, error = run("--method", method, "--out", folder / "out", "--budget", 600, *given)
    assert code == 0, error
    found = json.loads(output.splitlines()[-1])
    assert 0 < found["numbers_trained"] <= 600
    assert found["test_loss_after"] < found["test_loss_before"]
    assert math.isclose(found["test_loss_before"], math.log(50), rel_tol=0.05)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.randint(1, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).logits
        ours = PEFTModel.load(model, folder / "out")(ids).logits
    assert not torch.allclose(ours, plain, atol=1e-3)
    assert ("peft.PeftModel" in found["read_with"]) == (method == "lora")


@pytest.mark.parametrize(("arguments", "text"), [
    (("--out", "x"), "go with --method"),
    (("--method", "lora", "--task", "regression"), "adapts a language model"),
    (("--method", "lora", "--rate", "0"), "above 0"),
    (("--method", "magic"), "no method is called 'magic'"),
])  # fmt: skip
def test_mistakes_of_the_command_are_told(folder, arguments, text):
    code, _, error = run(*arguments, "--model", folder / "model", "--data", folder / "texts", "--length", 16)
    assert code != 0
    assert text in str(error)
