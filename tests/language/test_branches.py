"""Continuations that share what they go on from: beside a plain forward pass of each, and drawing beside its definition."""

import numpy as np
import pytest
import torch
import transformers

from theodolite.core.errors import ModelError
from theodolite.language import connect
from theodolite.language.branches import Branches, _read, draw, read_text, shares
from theodolite.language.local import LocalModel
from tiny_language_model import save_tiny_model

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
NETWORKS = {  # type and options, and whether it shares
    "grouped heads": ("llama", {"num_key_value_heads": 2}, True),
    "learned places": ("gpt2", {}, True),
    "a window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 6}, False),
    "no interface": ("bloom", {}, False),
}


def network(name):
    torch.manual_seed(0)
    kind, options, _ = NETWORKS[name]
    config = transformers.AutoConfig.for_model(kind, **SMALL, **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return connect(model=save_tiny_model(tmp_path_factory.mktemp("model")), cache=False)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_each_row_has_the_logits_of_a_plain_pass(name):
    model = network(name)
    assert shares(model) == NETWORKS[name][2]
    starts = [torch.randint(3, 40, (n,)).tolist() for n in (9, 5)][: 2 if shares(model) else 1]
    counts = [3, 2][: len(starts)]
    texts = [read_text(model, start) for start in starts]
    branches = Branches(model, list(zip(texts, counts, strict=True)), 8)
    rows = [list(start) for start, count in zip(starts, counts, strict=True) for _ in range(count)]
    attention = model.config._attn_implementation
    for step, width in enumerate((3, 1, 1, 2, 1)):
        if step == 2:
            kept = [0, 2, 4][: len(starts) + 1]
            branches.keep(kept)
            rows = [rows[i] for i in kept]
        new = torch.randint(3, 40, (len(rows), width))
        found = branches.step(new, width)
        for row, more, logits in zip(rows, new.tolist(), found, strict=True):
            row += more
            torch.testing.assert_close(logits, model(torch.tensor([row])).logits[0, -width:], atol=1e-5, rtol=0)
    assert model.config._attn_implementation == attention
    # what was read serves again
    again = Branches(model, [(texts[0], 1)], 1).step(torch.tensor([[5]]))
    torch.testing.assert_close(again[0], model(torch.tensor([[*starts[0], 5]])).logits[0, -1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_network_that_needs_copies_goes_on_from_one_text():
    model = network("a window")
    with pytest.raises(ModelError, match="one text at a time"):
        Branches(model, [(read_text(model, [3, 4]), 1), (read_text(model, [5]), 1)], 2)


def test_attention_without_the_kernel_is_the_same():
    query, keys, values = (torch.randn(1, 2, n, 8) for n in (5, 7, 7))
    by_kernel, sums = _read(query, keys, values)
    by_hand, same = _read(query, keys, values[..., :4])  # for which there is no kernel
    torch.testing.assert_close(by_hand, by_kernel[..., :4])
    torch.testing.assert_close(same, sums)


@pytest.mark.parametrize(
    ("temperature", "top_p", "spread"), [(0.7, 0.9, 3.0), (1.0, 0.95, 0.1), (1.3, 1.0, 1.0), (0.5, 1e-9, 1.0)]
)
def test_tokens_are_drawn_from_the_smallest_set_of_at_least_top_p(temperature, top_p, spread):
    logits = spread * torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    n = 4000
    places = torch.as_tensor((np.arange(n) + 0.5) / n)
    for row in logits:
        p = (row.double() / temperature).softmax(-1).numpy()
        order = np.argsort(-p)
        inside = order[: int((np.cumsum(p[order]) - p[order] < top_p).sum())]
        wanted = np.zeros_like(p)
        wanted[inside] = p[inside] / p[inside].sum()
        drawn = np.bincount(draw(row.expand(n, -1), temperature, top_p, places).numpy(), minlength=300)
        assert drawn == pytest.approx(n * wanted, abs=1.01)  # places on a grid: no more than rounding of each end
        assert not drawn[wanted == 0].any()
    assert draw(logits, 0.0, 1.0, places[:3]).tolist() == logits.argmax(1).tolist()


def test_places_at_the_ends_give_tokens_that_can_be_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    assert draw(logits, 1.0, 1.0, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]


@pytest.mark.parametrize("memory", [None, 1, 60_000])
def test_a_continuation_is_the_same_whatever_is_written_beside_it(local, memory):
    prompts = ["the cat sat on", "the dog", "a tree and then the", "the dog"]
    options = {
        "temperature": 1.2,
        "top_p": 0.9,
        "max_tokens": 12,
        "seed": 3,
        "stop": ["mat", "on the"],
        "logprobs": True,
    }
    alone = [local.generate(prompt, 5, **options) for prompt in prompts]
    local._memory = memory
    together = local.generate_many(prompts, 5, **options)
    local._memory = None
    assert [[one.text for one in row] for row in together] == [[one.text for one in row] for row in alone]
    assert together[1] == together[3]
    for many, few in zip(alone, local.generate_many(prompts, 2, **options), strict=True):
        assert [one.text for one in many[:2]] == [one.text for one in few]
    assert len({one.text for one in alone[0]}) > 1
    told = [token.logprob for row in together for one in row for token in one.tokens]
    assert told == pytest.approx([token.logprob for row in alone for one in row for token in one.tokens], abs=1e-5)


def test_a_shorter_prompt_beside_a_long_one_has_its_own_room(local):
    window = local.window
    prompts = ["the " * window, "the cat", "the " * (window - 2)]
    options = {"temperature": 1.0, "max_tokens": 30, "seed": 1}
    full, short, near = (made[0] for made in local.generate_many(prompts, **options))
    assert (full.text, full.completion_tokens, full.finish) == ("", 0, "length")
    assert near.completion_tokens <= 2
    assert short.text == local.generate("the cat", **options)[0].text
    assert short.completion_tokens > 2


def test_a_network_that_needs_copies_writes_the_same(local):
    model = LocalModel.of("eager", local.model, local.tokenizer)
    options = {"temperature": 1.0, "max_tokens": 8, "seed": 2}
    shared = local.generate_many(["the cat", "a dog sat"], 3, **options)
    model.model.set_attn_implementation("eager")
    try:
        assert not shares(model.model)
        copied = model.generate_many(["the cat", "a dog sat"], 3, **options)
    finally:
        model.model.set_attn_implementation("sdpa")
    assert [[one.text for one in row] for row in copied] == [[one.text for one in row] for row in shared]


def test_weights_that_change_between_calls_are_read_anew(local):
    model = LocalModel.of("trained", local.model, local.tokenizer)
    before = model.generate("the cat", max_tokens=6)[0].text
    head = local.model.lm_head.weight.data.clone()
    local.model.lm_head.weight.data.mul_(-1)
    try:
        assert model.generate("the cat", max_tokens=6)[0].text != before
    finally:
        local.model.lm_head.weight.data.copy_(head)
