import pytest
import torch
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.masks import apply_mask, coupled_units, footprint, prune_units, remove_units
from theodolite.core.masks.transformers import answer
from theodolite.parameters.relevance_pruning import (
    CRITERIA,
    RelevancePruner,
    UnsupportedLayerError,
    compare_criteria,
    relevance,
    unit_scores,
)

transformers = pytest.importorskip("transformers")


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert(kind=None, seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return (kind or transformers.BertForSequenceClassification)(config).eval()


def opt(seed=0):
    torch.manual_seed(seed)
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=24, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4, init_std=0.3,
        word_embed_proj_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


def tokens(rows=5, length=7, seed=0):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- what is removed


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, bert, opt])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_switching_units_off_is_removing_them(make, scope):
    model, ids = make(), tokens()
    labels = torch.arange(5) % 3 if make is bert else ids
    before = answer(model, ids)
    mask = prune_units(model, unit_scores(model, (ids, labels)), amount=0.4, scope=scope)
    assert mask.fraction == pytest.approx(0.4)
    smaller = remove_units(model, mask, ids)
    with apply_mask(model, mask):
        masked = answer(model, ids)
    assert float((masked - answer(smaller, ids)).abs().max()) <= 1e-5
    assert float((masked - before).abs().max()) > 1e-3
    assert torch.equal(answer(model, ids), before)
    assert footprint(smaller, ids).macs < footprint(model, ids).macs


@torch.no_grad()
def test_a_removed_unit_is_its_hidden_number_set_to_zero():
    model, ids = llama(), tokens()
    down = model.model.layers[1].mlp.down_proj

    def without(module, args):
        hidden = args[0].clone()
        hidden[..., [3, 17]] = 0
        return (hidden,)

    scores = {"model.layers.1.mlp.up_proj": torch.ones(20)}
    scores["model.layers.1.mlp.up_proj"][[3, 17]] = 0
    smaller = remove_units(model, prune_units(model, scores, amount=2), ids)
    handle = down.register_forward_pre_hook(without)
    assert float((answer(model, ids) - answer(smaller, ids)).abs().max()) <= 1e-5
    handle.remove()
    assert smaller.model.layers[1].mlp.down_proj.in_features == 18
    assert smaller.model.layers[1].mlp.gate_proj.out_features == 18
    assert smaller.model.layers[0].mlp.gate_proj.out_features == 20


@torch.no_grad()
def test_what_is_left_can_be_saved_and_loaded_where_all_mlps_are_alike(tmp_path):
    model, ids = llama(), tokens()
    smaller = remove_units(model, prune_units(model, unit_scores(model, (ids, ids)), amount=0.25, scope="layer"))
    assert (smaller.config.intermediate_size, model.config.intermediate_size) == (15, 20)
    smaller.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, ids), answer(smaller, ids))


def test_units_are_the_hidden_numbers_of_every_mlp():
    found = coupled_units(llama())
    assert found.units == 60
    assert len(found.layers) == 6
    assert torch.equal(found.rows["model.layers.2.mlp.gate_proj"], torch.arange(40, 60))
    assert torch.equal(found.columns["model.layers.2.mlp.down_proj"], torch.arange(40, 60))


# ---- relevance


@pytest.mark.parametrize("start", ["logit", "one"])
def test_relevance_has_the_sum_of_the_scores_it_starts_from(start):
    model, ids = llama(), tokens()
    found = relevance(model, ids, ids, start=start)
    with torch.no_grad():
        logits = answer(model, ids)[:, :-1].gather(2, ids[:, 1:, None])
    wanted = float(logits.double().sum()) if start == "logit" else logits.numel()
    assert float(found["input"].double().sum()) == pytest.approx(wanted, rel=1e-4)
    assert found["input"].shape == (5, 7, 24)
    assert [found[f"model.layers.{i}.mlp.up_proj"].shape for i in range(3)] == [(5, 7, 20)] * 3


def test_relevance_of_the_last_mlp_is_what_its_units_add_to_the_scores():
    # behind the last MLP there is only the norm, whose denominator is constant: each unit's share of the logit is its own
    model, ids = llama(), tokens()
    R = relevance(model, ids, ids)["model.layers.2.mlp.up_proj"]
    kept = {}
    mlp, norm = model.model.layers[2].mlp, model.model.norm
    mlp.down_proj.register_forward_pre_hook(lambda _, args: kept.update(hidden=args[0]))
    norm.register_forward_pre_hook(lambda _, args: kept.update(stream=args[0]))
    with torch.no_grad():
        answer(model, ids)
        factor = norm.weight * torch.rsqrt(kept["stream"].square().mean(-1, keepdim=True) + norm.variance_epsilon)
        reads = model.lm_head.weight[ids[:, 1:]] * factor[:, :-1]  # of each position, by its next token
        wanted = kept["hidden"][:, :-1] * (reads @ mlp.down_proj.weight)
    assert torch.allclose(R[:, :-1], wanted, atol=1e-4)
    assert torch.equal(R[:, -1], torch.zeros(5, 20))


def test_scores_are_sums_over_rows_whatever_the_chunks():
    model, ids = llama(), tokens(8)
    name = "model.layers.0.mlp.up_proj"
    whole = relevance(model, ids, ids)[name].sum(dim=(0, 1))
    assert torch.allclose(unit_scores(model, (ids, ids))[name], whole, atol=1e-4)
    assert torch.allclose(unit_scores(model, (ids, ids), memory=1)[name], whole, atol=1e-4)
    loader = [(ids[:3], ids[:3]), (ids[3:], ids[3:])]
    assert torch.allclose(unit_scores(model, loader)[name], whole, atol=1e-4)
    absolute = relevance(model, ids, ids)[name].abs().sum(dim=(0, 1))
    assert torch.allclose(unit_scores(model, (ids, ids), abs=True)[name], absolute, atol=1e-4)


def test_taylor_is_the_slope_of_the_loss_along_each_unit():
    model, ids = llama(), tokens()
    name, eps = "model.layers.1.mlp.up_proj", 1e-3
    scores = unit_scores(model, (ids, ids), criterion="taylor")[name]
    up = model.get_submodule(name)
    slopes = []
    with torch.no_grad():
        for unit in range(20):
            losses = []
            for factor in (1 + eps, 1 - eps):
                row = up.weight[unit].clone()
                up.weight[unit] *= factor
                losses.append(model(ids, labels=ids).loss.double())
                up.weight[unit] = row
            slopes.append((losses[0] - losses[1]) / (2 * eps))
    slopes = torch.stack(slopes).abs()
    assert torch.allclose(scores.double(), slopes / slopes.norm(), atol=0.02)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_is_left_as_it_was(criterion):
    model, ids = llama().train(), tokens()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = unit_scores(model, (ids, ids), criterion=criterion, layers="model.layers.1")
    assert all(name.startswith("model.layers.1.") for name in scores)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_has_no_part():
    model, ids = bert(transformers.BertForMaskedLM), tokens()
    batch = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][:, 5:] = 0
    first = unit_scores(model, (batch, ids))
    batch["input_ids"][:, 5:] = 0
    labels = ids.clone()
    labels[:, 5:] = 7
    for name, scores in unit_scores(model, (batch, labels)).items():
        assert torch.allclose(scores, first[name], atol=1e-4)


# ---- errors


def test_what_cannot_be_done_is_told():
    model, ids = llama(), tokens()
    with pytest.raises(DataError, match="token ids, whole numbers"):
        unit_scores(model, (torch.randn(3, 4), ids))
    with pytest.raises(DataError, match=r"token ids must be 0..49"):
        unit_scores(model, (ids + 40, ids))
    with pytest.raises(DataError, match="one target a token"):
        unit_scores(model, (ids, ids[:, 1:]))
    with pytest.raises(DataError, match="targets must be tokens"):
        unit_scores(model, (ids, ids - 60))
    with pytest.raises(DataError, match="the targets must be tokens"):
        unit_scores(model, (ids, torch.zeros(5, dtype=torch.long)))
    with pytest.raises(DataError, match="no position has a target"):
        unit_scores(model, (ids, torch.full_like(ids, -100)))
    with pytest.raises(InputError, match="one rule of its own"):
        relevance(model, ids, ids, rule="epsilon")
    with pytest.raises(InputError, match="no layer with removable units"):
        unit_scores(model, (ids, ids), layers="lm_head")
    for work in (
        lambda: compare_criteria(model, (ids, ids), (ids, ids), [1]),
        lambda: RelevancePruner().fit(model, ids, ids),
    ):
        with pytest.raises(ModelError, match="is a transformer, which is pruned with unit_scores"):
            work()


def test_a_model_of_other_parts_is_refused_by_name():
    torch.manual_seed(0)
    small = {"vocab_size": 50, "n_embd": 24, "n_layer": 1, "n_head": 4}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    with pytest.raises(ModelError, match="has no MLP of linear layers with names that are known"):
        unit_scores(gpt2, (tokens(), tokens()))
    neox = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=50, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4
        )
    )
    with pytest.raises(UnsupportedLayerError, match=r"queries, keys and values in one layer; use criterion='taylor'"):
        unit_scores(neox, (tokens(), tokens()))
    assert set(unit_scores(neox, (tokens(), tokens()), criterion="taylor")) == {"gpt_neox.layers.0.mlp.dense_h_to_4h"}
    with torch.no_grad():
        bad = llama()
        bad.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        unit_scores(bad, (tokens(), tokens()))


@pytest.mark.filterwarnings("ignore:.*no reference row")
def test_a_network_around_a_transformer_has_no_rule_for_its_parts():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, x):
            return self.inner(x.long()).logits[:, -1]

    with pytest.raises(ModelError, match="no relevance rule for"):
        unit_scores(Wrapped(), (tokens().float(), torch.zeros(5, dtype=torch.long)))
