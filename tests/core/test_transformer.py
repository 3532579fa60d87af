import pytest
import torch
import transformers
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.transformer import attention_maps_on, decoder_parts, is_decoder, run_decoder, same_length

SMALL = {"vocab_size": 50, "max_position_embeddings": 32}
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
IDS = torch.randint(0, 50, (5, 7), generator=torch.Generator().manual_seed(0))


def randomise(model):
    """Norm weights and biases are ones and zeros in a fresh model, which would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
            else:
                p.mul_(8)
    return model.eval()


def make(kind):
    torch.manual_seed(0)
    t = transformers
    configs = {
        "llama": lambda: t.LlamaConfig(**SMALL, **LLAMA),
        "qwen2": lambda: t.Qwen2Config(**SMALL, **LLAMA),
        "mistral": lambda: t.MistralConfig(**SMALL, **LLAMA),
        "qwen3": lambda: t.Qwen3Config(**SMALL, **LLAMA, head_dim=8),
        "gemma": lambda: t.GemmaConfig(**SMALL, **LLAMA, head_dim=4),
        "phi3": lambda: t.Phi3Config(**SMALL, **LLAMA, pad_token_id=0),
        "gpt2": lambda: t.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=4),
        "gpt_neo": lambda: t.GPTNeoConfig(
            **SMALL, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            **SMALL, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
        ),
        "gpt_neox, serial": lambda: t.GPTNeoXConfig(
            **SMALL, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, use_parallel_residual=False
        ),
    }  # fmt: skip
    return randomise(t.AutoModelForCausalLM.from_config(configs[kind]()))


KINDS = [
    "llama", "qwen2", "mistral", "qwen3", "gemma", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gpt_neox, serial",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_put_together_are_the_model(kind):
    model = make(kind)
    parts = decoder_parts(model)
    layers = list(range(len(parts)))
    run = run_decoder(parts, IDS, before=[*layers, len(parts)], between=layers, maps=layers)
    with torch.no_grad():
        for block in parts.blocks:
            x, attention = run.before[block.index], block.attention
            inside = block.attention_norm.module(x)
            values = torch.einsum("btd,ksd->btks", inside, attention.value_weight)
            if attention.value_bias is not None:
                values = values + attention.value_bias
            values = values[:, :, [attention.kv_head(h) for h in range(attention.heads)]]
            mixed = torch.einsum("bhts,bshe->bthe", run.maps[block.index], values)
            added = torch.einsum("bthe,dhe->btd", mixed, attention.output_weight)
            bias = getattr(model.get_submodule(attention.output_name), "bias", None)
            added = added if bias is None else added + bias
            middle = x if block.parallel else x + added
            assert torch.allclose(run.between[block.index], middle, atol=1e-4)
            mlp = block.mlp(block.mlp_norm.module(middle))
            assert torch.allclose(run.before[block.index + 1], x + added + mlp, rtol=1e-4, atol=1e-4)
        logits = model(IDS).logits[:, -1]
        made = parts.final_norm.module(run.before[len(parts)][:, -1]) @ parts.unembedding_weight.T
    assert torch.allclose(run.logits, logits, atol=1e-4)
    assert torch.allclose(made, logits, atol=1e-4)
    assert parts.vocabulary == 50
    assert parts.width == 24


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_give_the_shapes_and_values_are_views(kind):
    parts = decoder_parts(make(kind))
    attention = parts.blocks[-1].attention
    assert attention.query_weight.shape == (attention.heads, attention.head_width, 24)
    assert attention.key_weight.shape == (attention.kv_heads, attention.head_width, 24)
    owned = {p.untyped_storage().data_ptr() for p in parts.model.parameters()}
    for view in (attention.query_weight, attention.key_weight, attention.value_weight, attention.output_weight):
        assert view.untyped_storage().data_ptr() in owned


def test_queries_and_keys_make_the_attention_map_of_gpt2():
    model = make("gpt2")
    parts = decoder_parts(model)
    run = run_decoder(parts, IDS, before=[1], maps=[1])
    block = parts.blocks[1]
    x = block.attention_norm.module(run.before[1])
    bias = model.transformer.h[1].attn.c_attn.bias.view(3, 4, 6)
    queries = torch.einsum("btd,hed->bhte", x, block.attention.query_weight) + bias[0][None, :, None]
    keys = torch.einsum("btd,hed->bhte", x, block.attention.key_weight) + bias[1][None, :, None]
    scores = (queries @ keys.mT / 6**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    assert torch.allclose(run.maps[1], scores.softmax(dim=-1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_carry_directions_back_one_by_one(kind):
    attention = decoder_parts(make(kind)).blocks[0].attention
    y = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    for head in range(attention.heads):
        both = attention.output_weight[:, head] @ attention.value_weight[attention.kv_head(head)]
        assert torch.allclose(attention.back(y)[:, head], y @ both, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_a_norm_is_weight_times_scale(kind):
    parts = decoder_parts(make(kind))
    norm, x = parts.final_norm, 5 * torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
    assert norm.kind == ("layer" if kind == "gpt2" else "rms")
    with torch.no_grad():
        bias = norm.module(torch.zeros(1, 24))
        assert torch.allclose(norm.scale(x) * norm.weight * norm.centred(x) + bias, norm.module(x), atol=1e-4)


def test_a_norm_that_was_taken_out_is_none():
    model = make("llama")
    model.model.norm = nn.Identity()
    norm = decoder_parts(model).final_norm
    assert norm.kind == "none"
    assert bool((norm.scale(torch.ones(2, 24)) == 1).all())


def test_half_precision_is_read_too():
    parts = decoder_parts(make("llama").bfloat16())
    run = run_decoder(parts, IDS, before=[0], maps=[2])
    assert run.before[0].dtype == run.logits.dtype == torch.float32
    assert torch.allclose(parts.final_norm.weight, parts.model.model.norm.weight.float())


def test_chunks_change_nothing_and_modes_come_back():
    model = make("llama").train()
    model.set_attn_implementation("sdpa")
    parts = decoder_parts(model)
    whole, part = (run_decoder(parts, IDS, before=[1], maps=[0], memory=memory) for memory in (None, 1))
    assert torch.allclose(whole.before[1], part.before[1], atol=1e-5)
    assert torch.allclose(whole.maps[0], part.maps[0], atol=1e-5)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_attention_function_comes_back_after_an_error():
    model = make("llama")
    model.set_attn_implementation("sdpa")
    with attention_maps_on(model) as before:
        assert (before, model.config._attn_implementation) == ("sdpa", "eager")
    with pytest.raises(KeyError), attention_maps_on(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_models_that_are_no_known_decoder_are_refused():
    t = transformers
    bert = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    for model, text in (
        (nn.Linear(2, 2), "expected a Hugging Face causal language model, got Linear"),
        (t.BertForSequenceClassification(t.BertConfig(**bert)), "difference of two class scores"),
        (t.BertForMaskedLM(t.BertConfig(**bert)), "names that are known"),
        (t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, **LLAMA, head_dim=4)), "norms after its sub-blocks"),
    ):
        assert not is_decoder(model)
        with pytest.raises(ModelError, match=text):
            decoder_parts(model)
    assert is_decoder(make("llama"))


def test_a_multiplier_between_the_parts_is_found_out():
    config = transformers.GraniteConfig(**SMALL, **LLAMA, residual_multiplier=0.5)
    parts = decoder_parts(randomise(transformers.GraniteForCausalLM(config)))
    with pytest.raises(ModelError, match="not what its parts add up to"):
        run_decoder(parts, IDS)


def test_what_cannot_be_run_is_told():
    parts = decoder_parts(make("llama"))
    for ids, options, text in (
        (IDS[:0], {}, "shape"),
        (IDS + 50, {}, r"0\.\.49"),
        (IDS, {"before": [4]}, "no layer 4"),
        (IDS, {"maps": [3]}, r"blocks 0\.\.2"),
    ):
        with pytest.raises(InputError, match=text):
            run_decoder(parts, ids, **options)
    assert same_length([IDS[0], IDS[1, :3]]) == {7: [0], 3: [1]}
