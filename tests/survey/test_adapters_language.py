"""The chart and the command of parameter-efficient tuning, on language models made here."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.errors import InputError
from theodolite.core.masks import apply_mask, prune_units
from theodolite.core.next_token import next_tokens
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.parameters.peft import PEFTModel, apply
from theodolite.parameters.relevance_pruning import unit_scores
from theodolite.parameters.tucker import adapt
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
    kinds = [type(module) for module in one.predictor.modules()]
    finding = chart.draw(one, Budget())
    assert one.predictor.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in one.predictor.state_dict().items())
    assert all(p.requires_grad for p in one.predictor.parameters())
    assert [type(module) for module in one.predictor.modules()] == kinds
    losses = next_tokens(one.predictor, one.data.test.x[:12]).loss.double().mean()
    assert finding.numbers["loss of the model as it is"].value == pytest.approx(float(losses))
    gains = {name: number for name, number in finding.numbers.items() if name.startswith("gain from")}
    sizes = adapters._plan(one.predictor, 60.0).sizes
    pruned = [name for name in gains if "kept by relevance" in name]
    assert len(pruned) == (3 if build is llama else 0)
    assert len(gains) == sum(map(len, sizes.values())) + len(pruned)
    assert max(map(len, sizes.values())) == 2
    for method in ("lora", "houlsby", "prefix", "mam", "tucker", "sharing"):
        assert sum(f"gain from {adapters._WORDS[method]}," in name for name in gains) == len(sizes[method]) > 0
    assert any("all biases" in name for name in finding.numbers) == (build is gpt2)
    assert any("all biases" in text for text in finding.caveats) == (build is llama)
    assert any("Without pruning, which needs" in text for text in finding.caveats) == (build is gpt2)
    assert finding.comparison.estimate in gains.values()
    assert {control.kind for control in finding.comparison.controls} == {"null", "random"}
    assert "perplexity" in finding.headline or "None of" in finding.headline
    assert any(letter.isdigit() for letter in finding.headline)
    drawn = finding.to_json()["figure"]
    names = {trace["name"] for trace in drawn["data"]}
    assert {name.removeprefix("gain from ").rsplit(", ", 1)[0] for name in gains} <= names
    told = [shape["text"] for shape in drawn["layout"]["annotations"]]
    assert any("model as it is" in text for text in told)
    assert any("chance" in text for text in told)
    json.dumps(finding.to_json(), allow_nan=False)
    again = chart.draw(one, Budget())
    assert again.headline == finding.headline
    assert dict(again.numbers) == dict(finding.numbers)


HIDDEN, INSIDE, LAYERS, TOKENS = 16, 24, 2, 50
QUERY, VALUE = (16, 16), (8, 16)  # four heads of 4, two of them for keys and values


def of_cores(rank):
    ranks = [min(rank, out) for out, _ in (QUERY, VALUE)]
    return LAYERS * sum(r * r + r * (out + into) for r, (out, into) in zip(ranks, (QUERY, VALUE), strict=True))


@pytest.mark.parametrize(("method", "count"), [
    ("lora", lambda r: LAYERS * r * (sum(QUERY) + sum(VALUE))),
    ("tucker", of_cores),
    ("houlsby", lambda r: LAYERS * 2 * (2 * HIDDEN * r + r + HIDDEN)),
    ("prefix", lambda r: LAYERS * 2 * VALUE[0] * r),
    ("mam", lambda r: LAYERS * (2 * VALUE[0] * r + 2 * HIDDEN * r + r + HIDDEN)),
])  # fmt: skip
def test_the_numbers_of_a_point_are_the_most_that_fit_counted_by_hand(method, count):
    model = llama()
    total = (
        TOKENS * HIDDEN * 2
        + LAYERS * (2 * HIDDEN * HIDDEN + 2 * VALUE[0] * HIDDEN + 3 * HIDDEN * INSIDE + 2 * HIDDEN)
        + HIDDEN
    )
    for share in (0.05, 0.1):
        with adapters._changed(model, method, share, seed=0) as (_, numbers):
            rank = max(r for r in range(1, 40) if count(r) <= share * total)
            assert numbers == count(rank)
        with adapters._changed(model, "sharing", share, seed=0) as (shared, numbers):
            assert numbers == int(share * total) == sum(p.numel() for p in shared.trained())
    with adapters._changed(model, "sharing", 0.9, seed=0) as (_, numbers):
        assert numbers == LAYERS * (QUERY[0] * QUERY[1] + VALUE[0] * VALUE[1])


def test_biases_are_counted_and_too_little_room_is_told():
    with adapters._changed(gpt2(), "bitfit", None, seed=0) as (_, numbers):  # 2 norms, 3 + 1 + 4 + 1 widths in a layer
        assert numbers == 2 * 16 * (2 + 9) + 16
    too_few = pytest.raises(InputError, match="too few for a core of rank 1 in each of 4 weights")
    with too_few, adapters._changed(llama(), "tucker", 0.01, seed=0):
        pass


def test_kept_numbers_are_those_without_the_units_that_go():
    one = subject(llama())
    points = adapters._Tuner(one, adapters._plan(one.predictor, 0.0), Budget()).pruned()
    total = sum(p.numel() for p in one.predictor.parameters())
    units = LAYERS * INSIDE  # a unit is a row of gate and up, and a column of down
    assert [point.numbers for point in points] == [
        total - round(amount * units) * 3 * HIDDEN for amount in (0.1, 0.2, 0.4)
    ]
    rows = one.data.test.x[:12]
    references = one.data.train.x[:8]
    scores = unit_scores(one.predictor, (references, references), abs=True)
    with apply_mask(one.predictor, prune_units(one.predictor, scores, amount=0.4)):
        off = next_tokens(one.predictor, rows).loss
    wanted = (next_tokens(one.predictor, rows).loss - off).double().mean(dim=1)
    assert np.allclose(points[-1].gains, wanted, atol=1e-5)


def test_chance_guesses_each_token_by_its_share():
    one = subject(llama())
    tuner = adapters._Tuner(one, adapters._plan(one.predictor, 0.0), Budget())
    seen = one.data.train.x.flatten().tolist()
    targets = one.data.test.x[:12, 1:].flatten().tolist()
    loss = -np.mean([math.log((seen.count(token) + 1) / (len(seen) + 50)) for token in targets])
    assert tuner.chance() == pytest.approx(tuner.before[1].mean() - loss)


@pytest.mark.parametrize("method", ["lora", "tucker"])
def test_a_point_is_what_training_those_changes_gives(method):
    one = subject(llama())
    plan = adapters._plan(one.predictor, 0.0)
    assert plan.steps == 8
    tuner = adapters._Tuner(one, plan, Budget(seed=3))
    size = plan.sizes[method][0]
    point = tuner.trained(method, size, 5e-3)
    if method == "lora":
        made = apply(llama(), "lora", budget=size, seed=3)
        assert point.numbers == made.parameter_count.method
    else:
        made = llama()
        layers = ["*.q_proj", "*.v_proj"]
        rank = max(r for r in range(1, 9) if LAYERS * (r * r * 2 + r * 56) <= size * plan.parameters)
        adapt(made, ranks=rank, include=layers, seed=3)
    tuner._fit(made, 5e-3)
    rows = one.data.test.x[:12]
    wanted = (next_tokens(llama(), rows).loss - next_tokens(made, rows).loss).double().mean(dim=1)
    assert np.allclose(point.gains, wanted, atol=1e-6)
    assert tuner.trained(method, size, 5e-3, beat=point.checked) is None


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
