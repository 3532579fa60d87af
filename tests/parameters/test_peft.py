import copy
import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.parameters.peft import (
    PRESETS,
    LabelledTexts,
    Modification,
    PEFTModel,
    apply,
    bottleneck_for_budget,
    compare,
    design_effects,
    find_blocks,
    pareto_front,
    prefix_gate,
    quality_against_parameters,
    tokenized,
)
from theodolite.parameters.peft.changes import Bottleneck, gated_attention
from theodolite.parameters.peft.comparison import train_steps
from theodolite.parameters.peft.modification import named, resolve

transformers = pytest.importorskip("transformers")
F64 = torch.float64
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 50}


def bert(kind="BertModel", **more):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, max_position_embeddings=32, **more)
    return getattr(transformers, kind)(config).eval()


def llama(kind="LlamaForCausalLM", **more):
    torch.manual_seed(0)
    given = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None}
    return getattr(transformers, kind)(transformers.LlamaConfig(**given | more)).eval()


def gpt2(kind="GPT2LMHeadModel"):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=64, pad_token_id=0)
    return getattr(transformers, kind)(config).eval()


def bart():
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
    return transformers.BartModel(transformers.BartConfig(vocab_size=50, d_model=16, **sizes)).eval()


def vit():
    torch.manual_seed(0)
    sizes = {name: n for name, n in SMALL.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).eval()


def batch(rows=3, tokens=7, *, padded=True, left=False, seed=1):
    ids = torch.randint(1, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, slice(0, 3) if left else slice(4, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, given):
    with torch.no_grad():
        return model(**given)[0]


def shake(model, size=0.1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))


FAMILIES = {
    "bert": (bert, batch()),
    "llama": (llama, batch()),
    "gpt2": (gpt2, batch()),
    "bart": (bart, {"input_ids": batch()["input_ids"]}),
    "vit": (vit, {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}),
    "roberta": (
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**SMALL, max_position_embeddings=32)).eval(),
        batch(),
    ),
    "distilbert": (
        lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
        ).eval(),
        batch(),
    ),
}


# ---- the oracle: prefixes are a gated parallel change


def brute_force(q, K, V, P_k, P_v, mask):
    """Attention one query at a time, written from the definition: (output with prefixes, without, of prefixes, lam)."""
    out = [torch.zeros_like(q) for _ in range(3)]
    gate = torch.zeros(q.shape[:3], dtype=q.dtype)
    shared = q.shape[1] // K.shape[1]
    for b, h, t in itertools.product(*(range(n) for n in q.shape[:3])):
        keys, values, own_keys, own_values = K[b, h // shared], V[b, h // shared], P_k[h // shared], P_v[h // shared]
        seen = torch.exp(q[b, h, t] @ keys.T / q.shape[-1] ** 0.5 + mask[b, 0, t])
        own = torch.exp(q[b, h, t] @ own_keys.T / q.shape[-1] ** 0.5)
        out[0][b, h, t] = (own @ own_values + seen @ values) / (own.sum() + seen.sum())
        out[1][b, h, t] = seen @ values / seen.sum()
        out[2][b, h, t] = own @ own_values / own.sum()
        gate[b, h, t] = own.sum() / (own.sum() + seen.sum())
    return *out, gate


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_with_prefixes_is_the_gated_mix(kv_heads):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    q, K, V = draw(2, 4, 6, 8), draw(2, kv_heads, 6, 8), draw(2, kv_heads, 6, 8)
    P_k, P_v = draw(kv_heads, 5, 8), draw(kv_heads, 5, 8)
    mask = torch.zeros(2, 1, 6, 6, dtype=F64)
    mask[0, :, :, 4:] = -1e9
    whole, plain, own, lam = brute_force(q, K, V, P_k, P_v, mask)
    assert torch.allclose(prefix_gate(q, K, P_k, mask), lam, atol=1e-12)
    assert torch.allclose(prefix_gate(q, K, P_k, mask == 0), lam, atol=1e-12)
    assert torch.allclose((1 - lam[..., None]) * plain + lam[..., None] * own, whole, atol=1e-12)
    ours, gate = gated_attention(q, K, V, (P_k, P_v), mask, scaling=8**-0.5)
    assert torch.allclose(ours, whole, atol=1e-12)
    assert torch.equal(gate, prefix_gate(q, K, P_k, mask))
    assert bool((gate > 0).all() and (gate < 1).all())
    assert torch.equal(prefix_gate(q, K, P_k[:, :0], mask), torch.zeros(2, 4, 6, dtype=F64))


@settings(max_examples=30, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), tokens=st.integers(1, 5), keys=st.integers(1, 6), length=st.integers(1, 4),
       size=st.floats(0.1, 30), seed=st.integers(0, 99))  # fmt: skip
def test_the_gate_is_a_share_and_grows_with_the_prefixes(heads, tokens, keys, length, size, seed):
    g = torch.Generator().manual_seed(seed)
    q, K, P_k = (
        size * torch.randn(*s, 4, generator=g, dtype=F64) for s in ((2, 4, tokens), (2, heads, keys), (heads, length))
    )
    lam = prefix_gate(q, K, P_k)
    assert bool(((lam >= 0) & (lam <= 1)).all())
    assert bool((prefix_gate(q, K, torch.cat((P_k, P_k), dim=1)) >= lam).all())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "distilbert", "roberta"])
def test_the_concatenated_and_the_gated_path_agree(family, implementation):
    build, given = FAMILIES[family]
    model = build().double()
    model.set_attn_implementation(implementation)
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    base = run(model, given)
    made = apply(model, "prefix", bottleneck=5, seed=0)
    shake(made, 1.0)
    together = run(made, given)
    made.gate_prefixes()
    rounded = implementation == "eager" and family == "llama"  # transformers' eager Llama takes its softmax in float32
    assert torch.allclose(run(made, given), together, atol=1e-5 if rounded else 1e-12)
    assert not torch.allclose(together, base, atol=1e-3)
    made.remove()
    assert torch.equal(run(model, given), base)


def test_prefixes_in_a_rotary_layer_have_no_position_and_are_shared_by_groups():
    model = llama().double()
    layer, seen = model.model.layers[0].self_attn, {}
    made = apply(model, "prefix", bottleneck=5, seed=0)
    shake(made, 1.0)
    change = made.changes["0-0-heads"]
    given = batch(left=True)

    def keep(module, args, kwargs):
        seen.update(kwargs)

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    inputs = layer.o_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    run(made, given)
    handle.remove()
    inputs.remove()
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    q, k, v = (getattr(layer, f"{n}_proj")(x).unflatten(-1, (-1, 4)).transpose(1, 2) for n in "qkv")
    turn = lambda t: t * cos[:, None] + torch.cat((-t[..., 2:], t[..., :2]), dim=-1) * sin[:, None]
    causal = torch.ones(7, 7).tril()[None, None] * given["attention_mask"][:, None, None]
    mask = torch.where(causal > 0, 0.0, -torch.inf).double()
    with torch.no_grad():
        whole, *_ = brute_force(turn(q), turn(k), v, change.key, change.value, mask)
    real = given["attention_mask"].bool()
    assert torch.allclose(seen["out"][real], whole.transpose(1, 2).flatten(2)[real], atol=1e-12)


@pytest.mark.parametrize("composition", ["add", "scale"])
def test_prefixes_can_be_added_instead(composition):
    model = bert().double()
    made = apply(model, Modification("softmax", 3, "heads", composition=composition, scale=2.0), seed=0, layers=[0])
    shake(made, 1.0)
    seen = {}
    module = model.encoder.layer[0].attention
    module.self.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    module.output.dense.register_forward_pre_hook(lambda m, args: seen.update(out=args[0]))
    given = batch(padded=False)
    run(made, given)
    q, k, v = (
        getattr(module.self, n)(seen["x"]).unflatten(-1, (4, 4)).transpose(1, 2) for n in ("query", "key", "value")
    )
    change = made.changes["0-0-heads"]
    with torch.no_grad():
        _, plain, own, _ = brute_force(q, k, v, change.key, change.value, torch.zeros(3, 1, 7, 7, dtype=F64))
        wanted = plain + (2.0 if composition == "scale" else 1.0) * own
    assert torch.allclose(seen["out"], wanted.transpose(1, 2).flatten(2), atol=1e-12)


# ---- where changes go, against the block written out


def written_out(model, x, changes, kind):
    """BERT's first block by its formulas, with one bottleneck at the place ``kind``."""
    layer = model.encoder.layer[0]
    one = layer.attention.self
    delta = lambda t: F.linear(F.relu(F.linear(t, changes.down_weight, changes.down_bias)), changes.up_weight[0],
                               changes.up_bias)  # fmt: skip
    q, k, v = (getattr(one, n)(x).unflatten(-1, (4, 4)).transpose(1, 2) for n in ("query", "key", "value"))
    heads = (torch.softmax(q @ k.mT / 2, dim=-1) @ v).transpose(1, 2).flatten(2)
    if kind == ("attention", "parallel"):
        heads = heads + delta(x)
    h = layer.attention.output.dense(heads)
    if kind == ("attention", "sequential"):
        h = h + delta(h)
    middle = layer.attention.output.LayerNorm(h + x)
    if kind == ("attention", "after_norm"):
        middle = layer.attention.output.LayerNorm(h + x + delta(middle))
    h = layer.output.dense(F.gelu(layer.intermediate.dense(middle)))
    if kind == ("ffn", "parallel"):
        h = h + delta(middle)
    if kind == ("ffn", "sequential"):
        h = h + delta(h)
    out = layer.output.LayerNorm(h + middle)
    return layer.output.LayerNorm(h + middle + delta(out)) if kind == ("ffn", "after_norm") else out


@pytest.mark.parametrize(
    "kind", list(itertools.product(("ffn", "attention"), ("parallel", "sequential", "after_norm")))
)
def test_a_post_norm_block_is_changed_where_it_says(kind):
    model = bert().double()
    made = apply(model, Modification(bottleneck=3, where=kind[0], insertion=kind[1]), seed=0, layers=[0])
    shake(made, 1.0)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3), dtype=F64)
    with torch.no_grad():
        ours = model.encoder.layer[0](x)
        ours = ours if isinstance(ours, torch.Tensor) else ours[0]
        with made.disable():
            wanted, plain = (written_out(model, x, made.changes[f"0-0-{kind[0]}"], one) for one in (kind, None))
    assert torch.allclose(ours, wanted, atol=1e-12)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("where", ["ffn", "attention"])
def test_a_pre_norm_block_reads_the_normalised_input(where):
    model = llama().double()
    made = apply(model, Modification(bottleneck=3, where=where, composition="scale", scale=3.0), seed=0, layers=[1])
    shake(made, 1.0)
    layer, seen = model.model.layers[1], {}
    layer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(middle=args[0]))
    layer.register_forward_hook(lambda m, args, out: seen.update(out=out))
    given = batch()
    run(made, given)
    changed = dict(seen)
    with made.disable():
        run(made, given)
    delta = made.changes[f"1-0-{where}"]
    with torch.no_grad():
        if where == "attention":
            wanted = seen["middle"] + 3 * delta(layer.input_layernorm(seen["x"]))
            assert torch.allclose(changed["middle"], wanted, atol=1e-12)
        else:
            wanted = seen["out"] + 3 * delta(layer.post_attention_layernorm(seen["middle"]))
            assert torch.allclose(changed["out"], wanted, atol=1e-12)


def test_heads_have_their_own_bottlenecks():
    model = bert().double()
    made = apply(model, "multihead_parallel", bottleneck=8, seed=0, layers=[0])
    shake(made, 1.0)
    change = made.changes["0-0-heads"]
    x = torch.randn(2, 5, 16, dtype=F64)
    with torch.no_grad():
        z = F.relu(x @ change.down_weight.T + change.down_bias)
        parts = [z[..., 2 * h : 2 * h + 2] @ change.up_weight[h].T for h in range(4)]
        assert torch.allclose(change(x), torch.cat(parts, dim=-1) + change.up_bias, atol=1e-12)


@pytest.mark.parametrize("composition", ["add", "scale", "learned_scale", "gate"])
@pytest.mark.parametrize("layer_norm", [None, "in", "out"])
def test_compositions_and_norms(composition, layer_norm):
    m = Modification(torch.tanh, 3, composition=composition, scale=2.5, init="bert", layer_norm=layer_norm)
    change = Bottleneck(m, 6, 6).double()
    assert sum(p.numel() for p in change.parameters()) == Bottleneck.size(m, 6, 6)
    h, x = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    if composition == "gate":
        assert torch.equal(change.compose(h, x), h)
        with torch.no_grad():
            change.factor.fill_(0.3)
    norm = lambda t: F.layer_norm(t, (6,))
    z = torch.tanh((norm(x) if layer_norm == "in" else x) @ change.down_weight.T)
    delta = norm(z @ change.up_weight[0].T) if layer_norm == "out" else z @ change.up_weight[0].T
    wanted = {
        "add": h + delta,
        "scale": h + 2.5 * delta,
        "learned_scale": h + 2.5 * delta,
        "gate": 0.7 * h + 0.3 * delta,
    }
    assert torch.allclose(change.compose(h, x), wanted[composition], atol=1e-12)


# ---- every preset on every family

STARTS_ELSEWHERE = {"prefix", "prompt", "mam"}


def options(method):
    return {"multihead_parallel": {"bottleneck": 8}, "bitfit": {}, "full": {}}.get(method, {"bottleneck": 4})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [name for name in PRESETS if name != "head"])
def test_it_starts_at_the_model_changes_it_and_goes_away(family, method):
    build, given = FAMILIES[family]
    model = build()
    if method == "bitfit" and family == "llama":
        with pytest.raises(ModelError, match="no bias parameters"):
            apply(model, method)
        return
    if method == "pfeiffer" and family in ("llama", "gpt2", "vit"):
        with pytest.raises(InputError, match="LayerNorm behind the residual"):
            apply(model, method)
        return
    if method == "prompt" and family in ("vit", "bart"):
        with pytest.raises(ModelError, match="prompts need"):
            apply(model, method)
        return
    before = {name: (p, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    state = {id(module): (dict(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks),
                          getattr(module, "config", None)) for module in model.modules()}  # fmt: skip
    base = run(model, given)
    made = apply(model, method, seed=0, **options(method))
    start = run(made, given)
    assert start.shape == base.shape
    assert torch.equal(start, base) == (method not in STARTS_ELSEWHERE)
    shake(made)
    changed = run(made, given)
    assert not torch.allclose(changed, base, atol=1e-4)
    with made.disable():
        assert torch.equal(run(model, given), base)
    assert torch.equal(run(made, given), changed)
    made.disable()
    assert torch.equal(run(model, given), base)
    with made.enable():
        assert torch.equal(run(model, given), changed)
    assert made.remove() is model
    assert torch.equal(run(model, given), base)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert p.requires_grad == before[name][1]
        assert torch.equal(p, before[name][2])
    for module in model.modules():
        attributes, hooks, pre_hooks, config = state[id(module)]
        assert vars(module).keys() == attributes.keys()
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == (hooks, pre_hooks)
        assert getattr(module, "config", None) is config


@pytest.mark.parametrize("method", [name for name in PRESETS if name != "head"])
def test_counts_are_those_of_the_parameters_and_only_those_train(method):
    model = bert("BertForSequenceClassification", num_labels=3)
    base = sum(p.numel() for p in model.bert.parameters())
    made = apply(model, method, seed=0, **options(method))
    count = made.parameter_count
    assert count.head == 16 * 3 + 3
    assert count.base == base
    assert count.training == count.method + count.head == sum(p.numel() for p in made.trainable_parameters())
    assert count.share == count.method / base
    assert count.share_with_head == (count.method + count.head) / (base + count.head)
    loss = made(**batch(), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    frozen = [name for name, p in made.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []
    sizes = {
        "houlsby": 2 * 2 * (2 * 16 * 4 + 4 + 16), "pfeiffer": 2 * (2 * 16 * 4 + 4 + 16),
        "parallel": 2 * (2 * 16 * 4 + 4 + 16), "scaled_parallel": 2 * (2 * 16 * 4 + 4 + 16),
        "multihead_parallel": 2 * (16 * 8 + 8 * 4 + 8 + 16), "lora": 2 * 2 * 4 * 32, "prefix": 2 * 2 * 4 * 16,
        "prompt": 4 * 16, "mam": 2 * 2 * 4 * 16 + 2 * (2 * 16 * 4 + 4 + 16),
        "bitfit": sum(p.numel() for n, p in model.bert.named_parameters() if n.endswith("bias")),
        "full": sum(p.numel() for p in model.bert.encoder.layer.parameters()),
    }  # fmt: skip
    assert count.method == sizes[method]


@pytest.mark.parametrize("method", ["houlsby", "mam", "lora", "prompt", "bitfit", "full", "head"])
def test_training_moves_the_changes_and_not_the_model(method):
    model = bert("BertForSequenceClassification", num_labels=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = apply(model, method, seed=0, **({} if method == "head" else options(method)))
    given, labels = batch(rows=8, padded=False), torch.tensor([0, 1] * 4)
    losses = train_steps(made, lambda step: F.cross_entropy(made(**given).logits, labels), 40, learning_rate=0.03)
    assert losses[-1] < 0.95 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(made.own_weights)
    assert (
        {name for name in moved if name.startswith("classifier")}
        == made.head
        == {"classifier.weight", "classifier.bias"}
    )
    trained = run(made, given)
    made.remove()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.allclose(run(model, given), trained, atol=1e-2)


def test_the_counts_of_the_paper_for_minilm():
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
                                     vocab_size=100)  # fmt: skip
    with torch.device("cpu"):
        model = transformers.BertModel(config, add_pooling_layer=False)
    counts = {}
    for method, size in (("parallel", 16), ("prefix", 16), ("lora", 8)):
        made = apply(model, method, bottleneck=size, probe=False)
        counts[method] = made.parameter_count.method
        made.remove()
    assert counts == {"parallel": 76_128, "prefix": 73_728, "lora": 73_728}
    made = apply(model, "bitfit")
    assert made.parameter_count.method == sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias"))


# ---- LoRA


def hand_lora(model, changes, x, scale, name):
    module = getattr(model.encoder.layer[0].attention.self, name)
    return module(x) + scale * x @ changes.down_weight.T @ changes.up_weight[0].T


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_merged_lora_is_lora(family):
    build, given = FAMILIES[family]
    model = build()
    made = apply(model, "lora", bottleneck=3, alpha=6, seed=0)
    shake(made, 0.3)
    ours = run(made, given)
    merged = made.merge()
    assert merged is model
    assert torch.allclose(run(model, given), ours, atol=1e-5)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_lora_is_its_formula():
    model = bert().double()
    made = apply(model, "lora", bottleneck=3, alpha=12, seed=0)
    shake(made, 0.3)
    x = torch.randn(2, 5, 16, dtype=F64)
    with torch.no_grad():
        ours = model.encoder.layer[0].attention.self.value(x)
        with made.disable():
            wanted = hand_lora(model, made.changes["0-1-value"], x, 4.0, "value")
    assert torch.allclose(ours, wanted, atol=1e-12)


@pytest.mark.parametrize(("family", "targets", "wheres"), [
    ("bert", ["query", "value"], ("query", "value")),
    ("llama", ["q_proj", "v_proj"], ("query", "value")),
    ("llama", ["o_proj", "up_proj", "gate_proj", "down_proj"], ("output", "ffn_in", "ffn_gate", "ffn_out")),
    ("gpt2", ["c_attn"], ("fused",)),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lora_of_peft_is_read_and_written(tmp_path, family, targets, wheres):
    peft = pytest.importorskip("peft")
    build, given = FAMILIES[family]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False,
                             fan_in_fan_out=family == "gpt2")  # fmt: skip
    theirs = peft.get_peft_model(build(), config).eval()
    wanted = run(theirs, given)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PEFTModel.load(build(), tmp_path / "theirs")
    assert torch.allclose(run(ours, given), wanted, atol=1e-6)
    assert {m.where for m in ours.modifications} == set(wheres)
    ours.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    assert torch.allclose(run(again, given), wanted, atol=1e-6)
    assert torch.allclose(run(again.merge_and_unload(), given), run(ours.merge(), given), atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_head_goes_along_with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    build = lambda: bert("BertForSequenceClassification", num_labels=3)
    made = apply(build(), "lora", bottleneck=2, seed=0)
    shake(made)
    wanted = run(made, batch())
    made.save(tmp_path)
    other = build()
    nn.init.normal_(other.classifier.weight)
    assert torch.allclose(run(PEFTModel.load(other, tmp_path), batch()), wanted, atol=1e-6)
    assert torch.allclose(run(peft.PeftModel.from_pretrained(build(), tmp_path).eval(), batch()), wanted, atol=1e-6)


# ---- saving


@pytest.mark.parametrize("method", [name for name in PRESETS if name != "lora"])
def test_what_is_saved_is_loaded(tmp_path, method):
    build = lambda: bert("BertForSequenceClassification", num_labels=3)
    made = apply(build(), method, seed=0, **({} if method == "head" else options(method)))
    shake(made)
    wanted = run(made, batch())
    with made.disable():  # trained weights of the base are saved all the same
        made.save(tmp_path)
    again = PEFTModel.load(build(), tmp_path)
    assert torch.equal(run(again, batch()), wanted)
    assert again.modifications == made.modifications


def test_generated_prefixes_are_settled_and_saved_as_plain_ones(tmp_path):
    model = bert()
    made = apply(model, "mam", bottleneck=4, generator=11, seed=0)
    count = made.parameter_count
    assert count.method == 2 * 2 * 4 * 16 + 2 * (2 * 16 * 4 + 4 + 16)
    assert count.training == count.method - 2 * 2 * 4 * 16 + 4 * 16 + 11 * 16 + 11 + 2 * (11 * 32 + 32)
    shake(made)
    wanted = run(made, batch())
    made.save(tmp_path)
    made.settle()
    assert torch.allclose(run(made, batch()), wanted, atol=1e-6)
    assert made.parameter_count.training == count.method
    again = PEFTModel.load(bert(), tmp_path)
    assert torch.allclose(run(again, batch()), wanted, atol=1e-6)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no folder of changes"):
        PEFTModel.load(bert(), tmp_path)
    made = apply(bert(), "mam", bottleneck=4)
    made.save(tmp_path / "mam")
    with pytest.raises(ModelError, match="another model"):
        PEFTModel.load(llama(), tmp_path / "mam")
    lora = apply(bert(), "lora", bottleneck=2)
    lora.save(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"no linear maps .*q_proj"):
        PEFTModel.load(llama(), tmp_path / "lora")
    about = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(about.read_text())
    about.write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match="use_dora"):
        PEFTModel.load(bert(), tmp_path / "lora")
    about.write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="only LORA"):
        PEFTModel.load(bert(), tmp_path / "lora")
    (tmp_path / "mam" / "theodolite_peft.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be read"):
        PEFTModel.load(bert(), tmp_path / "mam")
    (tmp_path / "mam" / "theodolite_peft.json").write_text("{}")
    with pytest.raises(ModelError):
        PEFTModel.load(bert(), tmp_path / "mam")
    with pytest.raises(InputError, match="Python function"):
        apply(bert(), Modification(torch.tanh)).save(tmp_path / "f")


# ---- caches and generation


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["mam", "prefix", "prompt", "lora", "houlsby", "multihead_parallel"])
def test_a_cache_changes_no_token_and_padding_no_state(family, method):
    made = apply(FAMILIES[family][0](), method, seed=0, **options(method))
    shake(made, 0.5)
    given = batch(padded=True, left=True)
    length = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        cached, plain = (made.generate(**given, use_cache=use, **length) for use in (True, False))
        alone = {name: value[:1, 3:] for name, value in given.items()}
        single = made.generate(**alone, **length)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:1, 3:], single)


@pytest.mark.parametrize("method", ["mam", "prefix", "prompt"])
def test_padding_changes_no_state_of_an_encoder(method):
    made = apply(bert().double(), method, bottleneck=4, seed=0)
    shake(made, 0.5)
    given = batch(padded=True)
    alone = {name: value[:1, :4] for name, value in given.items()}
    assert torch.allclose(run(made, given)[:1, :4], run(made, alone), atol=1e-12)


def test_prompts_of_a_decoder_are_what_embedding_them_gives():
    model = llama().double()
    ids = batch(padded=False)["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    made = apply(model, "prompt", bottleneck=4, seed=0)
    vectors = made.changes["x-0-input"].vectors
    ours = run(made, {"input_ids": ids})
    with made.disable(), torch.no_grad():
        whole = model(inputs_embeds=torch.cat((vectors.expand(3, -1, -1), embedded), dim=1)).logits
    assert torch.allclose(ours, whole[:, 4:], atol=1e-12)


def test_gradient_checkpointing_gives_the_same_gradients():
    made = apply(llama().double(), "mam", bottleneck=4, seed=0)
    shake(made)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            with warnings.catch_warnings():  # it has another name from transformers 6 on
                warnings.simplefilter("ignore", FutureWarning)
                made.base.gradient_checkpointing_enable({"use_reentrant": False})
        made.train()
        made.zero_grad()
        made(**batch(), use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in made.trainable_parameters()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


def test_outputs_keep_their_type():
    model = bert("BertForSequenceClassification", num_labels=3)
    kind = type(model(**batch()))
    made = apply(model, "mam", bottleneck=4)
    out = made(**batch(), output_hidden_states=True, labels=torch.tensor([0, 1, 2]))
    assert type(out) is kind
    assert len(out.hidden_states) == 3
    assert isinstance(made(**batch(), return_dict=False), tuple)


# ---- copies, compilers and other ways to run it


@pytest.mark.parametrize("method", ["mam", "houlsby", "lora", "prompt", "bitfit", "multihead_parallel"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_has_changes_of_its_own(method, how):
    made = apply(bert(), method, seed=0, **options(method))
    shake(made)
    wanted, copied = run(made, batch()), how(made)
    assert torch.equal(run(copied, batch()), wanted)
    shake(copied, 1.0)
    assert not torch.allclose(run(copied, batch()), wanted)
    assert torch.equal(run(made, batch()), wanted)
    copied.remove()
    assert torch.equal(run(copied.base, batch()), run(bert(), batch()))
    assert torch.equal(run(made, batch()), wanted)


def test_a_copy_of_the_base_keeps_its_changes():
    made = apply(llama(), "mam", bottleneck=4, seed=0)
    shake(made)
    wanted, copied = run(made, batch()), copy.deepcopy(made.base)
    made.remove()
    assert torch.equal(run(copied, batch()), wanted)


_COMPILED = """
import torch, transformers
from theodolite.parameters.peft import apply
torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=50)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0)).eval()
made, ids = apply(model, "mam", bottleneck=4, seed=0), torch.arange(1, 15).view(2, 7)
with torch.no_grad():
    wanted = made(ids).logits
    found = torch.compile(made, backend="eager", fullgraph=True)(ids).logits
assert torch.allclose(found, wanted, atol=1e-5)
"""


@pytest.mark.slow
def test_it_compiles_without_a_break():
    """In a process of its own: the checks of shapes that tests turn on cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("method", ["mam", "prefix", "houlsby"])
def test_a_static_cache_and_beams_give_the_same_tokens(method):
    made = apply(llama(), method, seed=0, **options(method))
    shake(made, 0.5)
    given, length = batch(left=True), {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        plain = made.generate(**given, use_cache=False, **length)
        assert torch.equal(made.generate(**given, cache_implementation="static", **length), plain)
        beams = [made.generate(**given, use_cache=use, num_beams=3, **length) for use in (True, False)]
    assert torch.equal(*beams)


def test_a_prompt_with_a_static_cache_is_refused():
    made = apply(llama(), "prompt", bottleneck=4)
    with pytest.raises(ModelError, match="static"):
        made.generate(**batch(), max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("method", ["mam", "prompt"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_a_text_read_in_two_pieces_gives_the_same(method):
    made = apply(gpt2().double(), method, bottleneck=4, seed=0)
    shake(made, 0.5)
    ids = batch(padded=False)["input_ids"]
    with torch.no_grad():
        whole, first = made(ids).logits, made(ids[:, :3], use_cache=True)
        second = made(ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat((first.logits, second.logits), dim=1), whole, atol=1e-12)


@pytest.mark.parametrize("build", [
    lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None)),
    lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3, pad_token_id=0, eos_token_id=None)),
    lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, vocab_size=50,
                               max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, eos_token_id=None)),
])  # fmt: skip
def test_other_decoders_keep_cache_padding_and_gate(build):
    torch.manual_seed(0)
    made = apply(build().eval().double(), "mam", bottleneck=4, seed=0)
    shake(made, 0.3)
    given, length = batch(left=True), {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        cached, plain = (made.generate(**given, use_cache=use, **length) for use in (True, False))
        alone = made.generate(**{name: value[:1, 3:] for name, value in given.items()}, **length)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:1, 3:], alone)
    together = run(made, batch())
    made.gate_prefixes()
    assert torch.allclose(run(made, batch()), together, atol=1e-12)


# ---- budgets


@pytest.mark.parametrize("method", [n for n in PRESETS if n not in ("bitfit", "full", "head", "prompt")])
def test_a_budget_is_used_as_far_as_it_goes(method):
    budget = 1200
    size = bottleneck_for_budget(bert(), method, budget)
    step = 4 if method == "multihead_parallel" else 1
    made = apply(bert(), method, budget=budget)
    assert made.parameter_count.method <= budget
    assert made.modifications[-1].bottleneck == size
    if size + step <= 16:
        assert apply(bert(), method, bottleneck=size + step).parameter_count.method > budget
    base = sum(p.numel() for p in bert().parameters())
    assert bottleneck_for_budget(bert(), method, budget / base) == size
    whole = resolve(method)
    assert bottleneck_for_budget(bert(), list(whole), budget) == size
    with pytest.raises(InputError, match="over the budget"):
        bottleneck_for_budget(bert(), method, 3)


def test_fixed_options_stay_in_a_budget():
    made = apply(bert(), "mam", budget=1200, prefixes=2)
    assert [m.bottleneck for m in made.modifications] == [2, 15]
    assert apply(bert(), "lora", budget=1200, alpha=9.0).modifications[0].scale == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["bitfit", "full", "head"])
def test_what_has_no_bottleneck_has_no_budget(method):
    with pytest.raises(InputError, match="no bottleneck"):
        bottleneck_for_budget(bert(), method, 100)


# ---- models of any kind


class Tiny(nn.Module):
    """A transformer block of nobody's family, in a model with a head."""

    def __init__(self, dead=False):
        super().__init__()
        self.dead = dead
        self.q, self.o, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.o(torch.tanh(self.q(x)))
        change = self.down(F.relu(self.up(x)))
        return x if self.dead else x + change

    def parts(self):
        return [
            {"attention": self, "query": self.q, "output": self.o, "ffn_in": self.up, "ffn_out": self.down, "heads": 2}
        ]


class WithHead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body, self.top = Tiny(**options), nn.Linear(8, 2)

    def forward(self, x):
        return self.top(self.body(x))


def test_blocks_by_hand():
    model = WithHead()
    x = torch.randn(3, 8)
    made = apply(model, "scaled_parallel", bottleneck=2, blocks=model.body.parts(), probe={"x": x})
    assert made.head == {"top.weight", "top.bias"}
    assert torch.equal(run_plain(made, x), run_plain(WithHeadLike(model), x))
    for method in ("houlsby", "multihead_parallel", "lora"):
        made.remove()
        given = {"where": "query"} if method == "lora" else {}
        made = apply(model, method, bottleneck=2, blocks=model.body.parts(), probe={"x": x}, **given)
        assert len(made.changes) == (2 if method == "houlsby" else 1)
    made.remove()
    with pytest.raises(ModelError, match="attn_implementation"):
        apply(model, "prefix", bottleneck=2, blocks=model.body.parts())


def run_plain(model, x):
    with torch.no_grad():
        return model(x)


class WithHeadLike(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.inner = WithHead()
        self.inner.load_state_dict(self.weights)

    def forward(self, x):
        return self.inner(x)


def test_a_change_without_effect_is_found():
    model = WithHead(dead=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ModelError, match="no effect"):
        apply(model, "houlsby", bottleneck=2, blocks=model.body.parts(), probe={"x": torch.randn(3, 8)})
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert not model.body.down._forward_hooks
    body = Tiny()
    aside = nn.Linear(12, 8)
    parts = [body.parts()[0] | {"ffn_out": aside}]
    with pytest.raises(ModelError, match=r"none of the changes|never reached"):
        apply(body, "parallel", bottleneck=2, blocks=parts, probe={"x": torch.randn(3, 8)})


def test_encoders_inside_other_modules_have_heads():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = bert(), nn.Linear(16, 2)

        def forward(self, **given):
            return self.head(self.encoder(**given).last_hidden_state.mean(dim=1))

    made = apply(Wrapped(), "mam", bottleneck=4)
    assert made.head == {"head.weight", "head.bias"}
    assert apply(Wrapped(), [], train_head=True).parameter_count.method == 0
    assert apply(bert("BertForSequenceClassification"), "lora", train_head="bert.pooler").head == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias"
    }  # fmt: skip
    assert apply(llama(), "lora").head == frozenset()
    assert apply(llama("LlamaForSequenceClassification"), "lora").head == {"score.weight"}


def test_chosen_layers_seeds_and_types():
    made = apply(bert(), "parallel", bottleneck=2, layers=[-1])
    assert list(made.changes) == ["1-0-ffn"]
    assert {p.dtype for p in apply(bert().bfloat16(), "mam", bottleneck=2).changes.parameters()} == {torch.bfloat16}
    same = [apply(bert(), "mam", bottleneck=2, seed=3).changes.state_dict() for _ in range(2)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert not torch.equal(
        apply(bert(), "mam", bottleneck=2, seed=4).changes["0-0-heads"].key, same[0]["0-0-heads.key"]
    )
    assert len(find_blocks(bart())) == 4


# ---- errors


@pytest.mark.parametrize(("options", "text"), [
    ({"form": "tanh"}, "form is one of"),
    ({"where": "nose"}, "where is one of"),
    ({"insertion": "inside"}, "insertion is one of"),
    ({"composition": "times"}, "composition is one of"),
    ({"init": "zero"}, "init is one of"),
    ({"layer_norm": "both"}, "layer_norm is one of"),
    ({"bottleneck": 0}, "at least 1"),
    ({"scale": 0.0}, "above 0"),
    ({"scale": -1.0}, "above 0"),
    ({"dropout": 1.0}, "dropout"),
    ({"form": "softmax"}, 'where="heads"'),
    ({"form": "softmax", "where": "heads", "composition": "learned_scale"}, "gate"),
    ({"where": "query", "insertion": "after_norm"}, "after_norm"),
    ({"generator": 800}, "generator"),
])  # fmt: skip
def test_modifications_that_make_no_sense(options, text):
    with pytest.raises(InputError, match=text):
        Modification(**options)


@pytest.mark.parametrize(("method", "options", "text"), [
    ("magic", {}, "no method is called"),
    ("lora", {"scale": 2}, "no option scale"),
    (3, {}, "a method is a name"),
    ([3], {}, "a method is a name"),
    (Modification(), {"bottleneck": 3}, "options go with the name"),
    (Modification(bottleneck=17), {}, "wider than the states"),
    ("multihead_parallel", {"bottleneck": 6}, "4 heads do not divide"),
    ("prefix", {"bottleneck": 33}, "32 positions"),
    ("prompt", {"bottleneck": 33}, "32 positions"),
    (Modification(where="fused"), {}, "have no 'fused'"),
    (Modification(where="heads", insertion="sequential"), {}, "in parallel"),
    ([Modification("softmax", 2, "heads")] * 2, {}, "one prefix is enough"),
    ("mam", {"layers": [2]}, "layers must be"),
    ("mam", {"layers": []}, "layers must be"),
    ("mam", {"probe": 3}, "probe must be"),
    ("mam", {"train_head": "nothing"}, "no parameter is called"),
    ("head", {}, "nothing is left to train"),
    ([], {}, "nothing is left to train"),
    ("mam", {"budget": 0}, "above 0"),
])  # fmt: skip
def test_what_does_not_fit_is_told_and_changes_nothing(method, options, text):
    model = bert()
    with pytest.raises(InputError, match=text):
        apply(model, method, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    apply(model, "parallel", bottleneck=2)


@pytest.mark.parametrize(("method", "options", "text"), [
    ("lora", {"bottleneck": 0}, "at least 1"),
    ("lora", {"alpha": float("nan")}, "scale"),
    ("lora", {"alpha": float("inf")}, "scale"),
    ("mam", {"prefixes": 0}, "at least 1"),
])  # fmt: skip
def test_options_out_of_range_are_told(method, options, text):
    with pytest.raises(InputError, match=text):
        apply(bert(), method, **options)


def test_models_that_do_not_fit_are_refused_in_words():
    sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, d_kv=4))
    for method, text in (("mam", "T5ForConditionalGeneration has no blocks of a known family"), ("prompt", "prompts need"),
                         ("bitfit", "no bias parameters"), ("head", "nothing is left to train")):  # fmt: skip
        with pytest.raises(ModelError, match=text):
            apply(t5, method)
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    whisper = transformers.WhisperModel(transformers.WhisperConfig(vocab_size=60, d_model=16, **sides, **ids))
    with pytest.raises(ModelError, match=r"cannot run a made-up probe batch .* pass a batch"):
        apply(whisper, "lora", bottleneck=2)
    assert all(p.requires_grad for name, p in whisper.named_parameters() if "embed_positions" not in name)
    twice = bert()
    twice.encoder.layer[1] = twice.encoder.layer[0]
    with pytest.raises(ModelError, match="same module stands for several blocks"):
        apply(twice, "mam")
    fused = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    parts = {"attention": fused.self_attn, "output": fused.self_attn.out_proj, "ffn_in": fused.linear1,
             "ffn_out": fused.linear2, "heads": 2}  # fmt: skip
    with pytest.raises(ModelError, match="never reached"):
        apply(fused, "houlsby", bottleneck=2, blocks=[parts], probe={"src": torch.randn(2, 3, 8)})
    with pytest.raises(InputError, match="what 'attention' reads is not known"):
        apply(fused, "parallel", where="attention", bottleneck=2, blocks=[parts])


def test_a_part_of_a_changed_model_has_changes_already():
    words_model = Words(0)
    made = apply(words_model, "mam", bottleneck=2)
    with pytest.raises(ModelError, match="has changes already"):
        apply(words_model.encoder, "lora")
    made.remove()
    apply(words_model.encoder, "lora")


@pytest.mark.parametrize("change", [{"r": None}, {"r": "x"}, {"r": 0}, {"lora_alpha": None}, {"lora_dropout": "y"}])
def test_a_broken_description_of_lora_is_told(tmp_path, change):
    apply(bert(), "lora", bottleneck=2).save(tmp_path)
    about = tmp_path / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(ModelError, match="does not describe LoRA"):
        PEFTModel.load(bert(), tmp_path)


def test_other_errors():
    made = apply(bert(), "mam", bottleneck=2)
    with pytest.raises(ModelError, match="has changes already"):
        apply(made.base, "lora")
    with pytest.raises(ModelError, match="has changes already"):
        apply(made, "lora")
    with pytest.raises(ModelError, match="only LoRA can be merged"):
        made.merge()
    with pytest.raises(ModelError, match="blocks="):
        apply(nn.Sequential(nn.Linear(3, 3)), "mam")
    with pytest.raises(ModelError, match="at least attention"):
        find_blocks(bert(), [{"attention": 3}])
    with pytest.raises(ModelError, match="no parameters"):
        apply(nn.ReLU(), "mam")
    with pytest.raises(ModelError, match="prompts need"):
        apply(WithHead(), "prompt")
    q = torch.zeros(1, 2, 3, 4)
    for wrong in ((q, q, torch.zeros(2, 1, 5)), (q[0], q, q[0]), (q, torch.zeros(1, 3, 3, 4), q[0]), (1, q, q)):
        with pytest.raises(InputError):
            prefix_gate(*wrong)
    with pytest.raises(InputError):
        prefix_gate(q, q, q, mask=3)


# ---- comparisons


class Words(nn.Module):
    """Tells whether a token is among the inputs; a small encoder under a head."""

    def __init__(self, seed):
        super().__init__()
        self.encoder = bert()
        torch.manual_seed(seed)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden[:, 0])


def words(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (n, 6), generator=generator)
    labels = torch.arange(n) % 2
    ids[labels == 1, 3] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


@pytest.fixture(scope="module")
def table():
    data = LabelledTexts(words(64, 0), words(40, 1), words(80, 2))
    methods = {
        "head": "head",
        "parallel": Modification(bottleneck=4),
        "sequential": Modification(bottleneck=4, insertion="sequential"),
        "scaled": Modification(bottleneck=4, composition="scale"),
        "attention": Modification(bottleneck=4, where="attention"),
    }
    seen = []
    rates = {"head": [1e-2], "": [1e-3, 2e-2]}
    found = compare(Words, data, methods, budgets=[400], seeds=(0, 1), epochs=3, learning_rates=rates,
                    on_run=lambda *what: seen.append(what))  # fmt: skip
    return found, seen


def test_compare_trains_each_method_at_its_best_step_size(table):
    found, seen = table
    assert len(seen) == 2 + 4 * 2 * 2
    assert list(found["method"]) == ["head", "parallel", "sequential", "scaled", "attention"]
    assert found.loc[0, "parameters"] == 0
    assert set(found.loc[1:, "parameters"]) == {2 * (2 * 16 * 5 + 5 + 16)}
    assert set(found["learning_rate"]) <= {1e-3, 1e-2, 2e-2}
    assert all(len(runs) == 2 for runs in found["runs"])
    assert np.allclose(found["quality"], [np.mean(runs) for runs in found["runs"]])
    assert found["quality"].between(0, 1).all()
    assert pd.isna(found.loc[0, "budget"])
    assert (found["seconds"] > 0).all()


def test_design_effects_are_paired_differences(table):
    found, _ = table
    effects = design_effects(found).set_index("level")
    assert set(effects.index) == {"parallel - sequential", "ffn - attention", "scale - add"}
    runs = dict(zip(found["method"], found["runs"], strict=True))
    wanted = np.subtract(runs["parallel"], runs["sequential"]).mean()
    assert effects.loc["parallel - sequential", "effect"] == pytest.approx(wanted)
    low, high = effects.loc["scale - add", "interval"]
    assert low <= effects.loc["scale - add", "effect"] <= high
    with pytest.raises(InputError, match="differ in one choice"):
        design_effects(found[found["method"].isin(["head", "parallel"])])
    with pytest.raises(InputError, match="compare has made"):
        design_effects(pd.DataFrame({"method": []}))


def test_functions_are_compared_with_methods_and_drawn_on_one_axis():
    def last_rows(model, budget, seed):
        for p in model.parameters():
            p.requires_grad_(False)
        model.head.weight.requires_grad_(True)
        return (model, 5) if budget is None else model

    data = LabelledTexts(words(16, 0), words(8, 1), words(20, 2))
    methods = {"parallel": Modification(bottleneck=2), "rows": last_rows}
    found = compare(Words, data, methods, budgets=[100, 300], seeds=(0, 1), epochs=1, learning_rates=[1e-2])
    assert list(found["method"]) == ["parallel", "parallel", "rows", "rows"]
    assert list(found["parameters"]) == [2 * (2 * 16 + 1 + 16), 2 * (4 * 2 * 16 + 4 + 16), 32, 32]
    assert compare(Words, data, [last_rows], seeds=(0,), epochs=1).loc[0, "parameters"] == 5
    curves = quality_against_parameters(found, chance=0.5, reference=1.0, total=5000)
    assert set(curves) == {"parallel", "rows"}
    assert curves["parallel"].dimensions == (98, 296)
    assert curves["rows"].runs.shape == (1, 4)
    assert curves["rows"].name == "rows"
    assert np.allclose(curves["parallel"].mean, found["quality"][:2])
    front = pareto_front(curves)
    assert front[0][:2] == ("rows", 32)
    assert [value for *_, value in front] == sorted(value for *_, value in front)
    with pytest.raises(InputError, match="as compare makes"):
        quality_against_parameters(pd.DataFrame({"method": []}), chance=0.0, reference=1.0)
    with pytest.raises(InputError, match="keeps any number"):
        quality_against_parameters(
            pd.DataFrame({"method": ["head"], "parameters": [0], "runs": [(0.5,)]}), chance=0.0, reference=1.0
        )
    for wrong, text in ((lambda model, budget, seed: 3, "must return a model"),
                        (lambda model, budget, seed: model.requires_grad_(False), "nothing requires gradients")):  # fmt: skip
        with pytest.raises(InputError, match=text):
            compare(Words, data, {"wrong": wrong}, seeds=(0,))


def test_bad_comparisons_are_told():
    inputs, labels = words(8, 0)
    good = (inputs, labels)
    with pytest.raises(InputError, match="labels as class numbers"):
        LabelledTexts((inputs, None), good, good)
    with pytest.raises(InputError, match="8 labels but another number"):
        LabelledTexts(({"input_ids": inputs["input_ids"][:3]}, labels), good, good)
    with pytest.raises(DataError, match="no rows"):
        LabelledTexts(good, ({"input_ids": inputs["input_ids"][:0]}, labels[:0]), good)
    data = LabelledTexts(good, good, good)
    with pytest.raises(InputError, match="at least one method"):
        compare(Words, data, [])
    with pytest.raises(InputError, match="no learning rate"):
        compare(Words, data, ["head"], learning_rates={"mam": [1e-3]})
    made = apply(Words(0), "head")
    with pytest.raises(TrainingCollapsedError, match="step 1"):
        train_steps(made, lambda step: made(**inputs).sum() * float("nan"), 3, learning_rate=0.1)


def test_names_of_methods():
    assert named("mam") == "mam"
    assert named(Modification()) == "relu ffn parallel add"
    assert named([]) == "head"
    assert [dataclasses.replace(m, bottleneck=3).bottleneck for m in resolve("houlsby")] == [3, 3]


def test_tokens_that_are_cut_are_counted():
    tokenizer = pytest.importorskip("tokenizers")
    whole = tokenizer.Tokenizer(tokenizer.models.WordLevel({"a": 0, "b": 1, "[PAD]": 2}, unk_token="b"))
    whole.pre_tokenizer = tokenizer.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="[PAD]")
    with pytest.warns(UserWarning, match="cuts 43% of the tokens"):
        got = tokenized(fast, ["a b a b a", "a b"], max_length=2)
    assert got["input_ids"].tolist() == [[0, 1], [0, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = tokenized(fast, ["a b a b a", "a b"], max_length=5)
    assert got["attention_mask"].sum(dim=1).tolist() == [5, 2]
