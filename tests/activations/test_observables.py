import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from theodolite.activations import observables as ob
from theodolite.activations.observables import (
    Component,
    ComponentPath,
    FeatureVector,
    Observable,
    all_paths,
    coupling,
    evaluate,
    evaluation,
    find_paths,
    head_norms,
    layernorm_angle,
    logit_attribution,
    propagate,
)
from theodolite.activations.observables.observable import check_pair
from theodolite.activations.observables.propagation import Pair, follow, resolve, through_norm
from theodolite.activations.observables.segment import point_on_segment
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.transformer import decoder_parts, run_decoder

QUICK = settings(max_examples=30, deadline=None)
VOCABULARY, WIDTH, TOKENS = 60, 24, 6


def randomise(model, seed=1):
    """Fresh models have norm weights of one and tiny maps, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
            else:
                p.mul_(8)
    return model.eval()


def llama(layers=3, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=32, **options,
    )  # fmt: skip
    return randomise(transformers.LlamaForCausalLM(config))


def gpt2():
    torch.manual_seed(0)
    return randomise(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=3, n_head=4)
        )
    )


def neox():
    torch.manual_seed(0)
    return randomise(
        transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=32,
            )
        )
    )  # fmt: skip


MODELS = {"llama": llama, "gpt2": gpt2, "gpt_neox": neox}


class Nothing(nn.Module):
    """An MLP that adds nothing."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return 0 * x


def linear_model(layers=2):
    """Attention alone: no norms, no MLPs."""
    model = llama(layers)
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm, layer.mlp = nn.Identity(), nn.Identity(), Nothing()
    return model


def observable(seed=0):
    return Observable(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)))


def prompt(seed=0, tokens=TOKENS):
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def pair(place=2):
    """Two prompts that differ in one token."""
    one = prompt()
    two = one.clone()
    two[place] = (one[place] + 1) % VOCABULARY
    return one, two


def measured(model, ids, n):
    with torch.no_grad():
        return float(n.score(model(ids[None]).logits[0, -1]))


# ---- exact


def test_in_a_linear_model_all_paths_sum_to_the_observable():
    tokens = 3
    model, n, ids = linear_model(), observable(), prompt(tokens=tokens)
    parts = decoder_parts(model)
    heads = range(parts.heads)
    paths = [()]
    paths += [(Component("attn", layer, h, s),) for layer in (0, 1) for h in heads for s in range(tokens)]
    paths += [
        (Component("attn", 1, h, s), Component("attn", 0, g, r))
        for h in heads for s in range(tokens) for g in heads for r in range(s + 1)
    ]  # fmt: skip
    shared = Pair.of(parts, (ids, ids), [0, 1], "positive")
    embedded = shared.run.before[0][0]
    total = 0.0
    for path in paths:
        stops = resolve(parts, [*path, Component("embedding")], tokens)
        feature = follow(parts, n, stops, shared)
        total += feature.gain * float(feature.vector.double() @ embedded[feature.token].double())
    assert total == pytest.approx(measured(model, ids, n), rel=1e-4, abs=1e-4)
    (one,) = [propagate(model, n, paths[5], prompts=(ids, ids))]
    assert (one.layer, one.token, one.stream) == (0, paths[5][0].token, "residual")


def frozen_gradient(model, n, ids, layer):
    """Autograd of the observable by the stream before a block, where attention maps are constants of the graph."""
    parts = decoder_parts(model)
    maps = run_decoder(parts, ids[None], maps=range(len(parts))).maps
    stream = {}

    def frozen(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // value.shape[1]
        weights = maps[module.layer_idx]
        return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), weights

    transformers.AttentionInterface.register("frozen_maps", frozen)
    before = model.config._attn_implementation
    model.set_attn_implementation("frozen_maps")
    module = parts.final_norm.module if layer == len(parts) else parts.blocks[layer].module

    def catch(module, args):
        stream["x"] = args[0].detach().requires_grad_()
        return (stream["x"], *args[1:])

    handle = module.register_forward_pre_hook(catch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = n.score(model(ids[None]).logits[0, -1])
    finally:
        handle.remove()
        model.set_attn_implementation(before)
    return torch.autograd.grad(score, stream["x"])[0][0]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_all_paths_together_are_the_gradient_with_frozen_attention(kind, layer):
    model, n, ids = MODELS[kind](), observable(), prompt()
    expected = frozen_gradient(model, n, ids, layer)
    for token in (0, 3, -1):
        found = all_paths(model, n, ids, layer=layer, token=token)
        off = float((found.vector - expected[token]).norm())
        assert off <= 1e-4 * float(expected.norm()), (layer, token)


@pytest.mark.parametrize("kind", MODELS)
def test_one_path_is_the_gradient_of_its_own_function(kind):
    """The observable as a function of the stream at the path's start, through these components alone."""
    model, n, (one, two) = MODELS[kind](), observable(), pair()
    parts = decoder_parts(model)
    path = (Component("attn", 2, 3, 4), Component("mlp", 1, token=4), Component("attn", 0, 1, 2))
    found = propagate(model, n, path, prompts=(one, two), at="positive")
    run = run_decoder(parts, one[None], before=[0, 2, 3], between=[1], maps=[0, 2])

    def head(layer, h, x):
        block = parts.blocks[layer]
        attention = block.attention
        group = attention.value_weight[h // (attention.heads // attention.kv_heads)]
        return attention.output_weight[:, h] @ (group @ block.attention_norm.module(x[None])[0])

    def back(function, x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, y)[0]

    y = n.vector @ parts.unembedding_weight
    y = back(lambda x: parts.final_norm.module(x[None])[0], run.before[3][0, -1], y)
    y = back(lambda x: head(2, 3, x), run.before[2][0, 4], y)
    y = back(
        lambda x: parts.blocks[1].mlp(parts.blocks[1].mlp_norm.module(x[None, None]))[0, 0], run.between[1][0, 4], y
    )
    y = back(lambda x: head(0, 1, x), run.before[0][0, 2], y)
    assert torch.allclose(found.vector, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    gain = float(run.maps[2][0, 3, -1, 4] * run.maps[0][0, 1, 4, 2])
    assert found.gain == pytest.approx(gain, rel=1e-4)
    assert str(found.path) == "attn2.3@4 <= mlp1@4 <= attn0.1@2"
    assert (found.layer, found.token, found.stream, found.offset) == (0, 2, "residual", 0)


@pytest.mark.parametrize("kind", MODELS)
def test_head_norms_are_those_of_the_matrices(kind):
    model, n = MODELS[kind](), observable()
    parts = decoder_parts(model)
    y = n.vector @ parts.unembedding_weight
    folded, plain = head_norms(model, n), head_norms(model, n, fold_norm=False)
    for block in parts.blocks:
        for h in range(parts.heads):
            inner = parts.blocks[block.index].attention
            both = inner.output_weight[:, h] @ inner.value_weight[inner.kv_head(h)]
            assert float(plain[block.index, h]) == pytest.approx(float((both.T @ y).norm()), rel=1e-4)
            found = propagate(model, n, (Component("attn", block.index, h),))
            assert float(folded[block.index, h]) == pytest.approx(float(found.vector.norm()), rel=1e-4)
            assert found.weights_only
            assert found.gain == 1.0


@pytest.mark.parametrize("kind", MODELS)
def test_attributions_sum_to_the_observable(kind):
    model, n, ids = MODELS[kind](), observable(), prompt()
    parts = decoder_parts(model)
    found = logit_attribution(model, n, ids)
    assert found.total == pytest.approx(measured(model, ids, n), rel=1e-4)
    # by hand: what one head writes, through the final norm with its scale held
    run = run_decoder(parts, ids[None], before=[1, 3], maps=[1])
    attention = parts.blocks[1].attention
    x = parts.blocks[1].attention_norm.module(run.before[1])[0]
    values = x @ attention.value_weight[attention.kv_head(2)].T
    if attention.value_bias is not None:
        values = values + attention.value_bias[attention.kv_head(2)]
    written = attention.output_weight[:, 2] @ (run.maps[1][0, 2, -1] @ values)
    norm, last = parts.final_norm, run.before[3][0, -1]
    y = norm.direction(n.vector @ parts.unembedding_weight) * norm.scale(last)
    assert float(found.heads[1, 2]) == pytest.approx(float(written.detach() @ y), rel=1e-3, abs=1e-3)


def test_without_biases_the_final_norm_or_the_head_nothing_is_left_over():
    assert logit_attribution(linear_model(), observable(), prompt()).bias == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_scores_of_single_components_are_what_they_change(kind):
    """The first step of the search: swap one component's input, carry what it adds through the final norm's gradient."""
    model, n, (one, two) = MODELS[kind](), observable(), pair()
    parts = decoder_parts(model)
    found = {str(p.path): p for p in find_paths(model, n, (one, two), max_length=1, beam=1000)}
    assert len(found) == 3 * parts.heads * TOKENS + 3 + 1
    y = propagate(model, n, (), prompts=(one, two)).vector
    run = run_decoder(parts, torch.stack([one, two]), before=[0, 1], between=[1], maps=[1])
    attention = parts.blocks[1].attention
    inside = parts.blocks[1].attention_norm.module(run.before[1])
    for h, s in ((0, 2), (3, 4)):
        values = inside[:, s] @ attention.value_weight[attention.kv_head(h)].T
        written = (values[0] - values[1]) @ attention.output_weight[:, h].T * run.maps[1][:, h, -1, s].mean()
        assert found[f"attn1.{h}@{s}"].score == pytest.approx(float(written.detach() @ y), rel=1e-3, abs=1e-4)
    out = parts.blocks[1].mlp(parts.blocks[1].mlp_norm.module(run.between[1]))
    assert found[f"mlp1@{TOKENS - 1}"].score == pytest.approx(
        float((out[0, -1] - out[1, -1]).detach() @ y), rel=1e-3, abs=1e-4
    )
    assert found[f"embedding@{TOKENS - 1}"].score == pytest.approx(0, abs=1e-5)
    assert found["attn1.0@1"].score == pytest.approx(0, abs=1e-5)  # before the name nothing differs


def test_the_table_of_scores_is_the_first_step_of_the_search():
    model, n, prompts = llama(), observable(), pair()
    table = ob.head_scores(model, n, prompts)
    found = find_paths(model, n, prompts, max_length=1, beam=1000, mlps=False)
    assert table.shape == (3, 6, TOKENS)
    for one in found:
        (stop,) = one.path
        if stop.kind == "attn":
            assert float(table[stop.layer, stop.head, stop.token]) == pytest.approx(one.score, rel=1e-4, abs=1e-6)


def test_found_paths_are_those_that_propagate_makes():
    model, n, prompts = llama(), observable(), pair()
    found = find_paths(model, n, prompts, max_length=3, beam=4)
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True)
    assert {len(one.path) for one in found} == {1, 2, 3}
    assert len(found) == 12
    for one in found:
        again = propagate(model, n, one.path, prompts=prompts)
        assert torch.allclose(again.vector, one.feature.vector, rtol=1e-3, atol=1e-5)
        assert again.gain == pytest.approx(one.feature.gain, rel=1e-4)
        heights = [2 * stop.layer + (stop.kind == "mlp") for stop in one.path if stop.kind != "embedding"]
        assert all(late > early for late, early in pairwise(heights))
    smallest = find_paths(model, n, prompts, max_length=1, kind="smallest", mlps=False)
    assert smallest[0].score == min(one.score for one in smallest) < 0
    assert not any(stop.kind == "mlp" for one in smallest for stop in one.path)
    with_embedding = find_paths(model, n, prompts, max_length=2, beam=200)
    assert any(one.path[-1].kind == "embedding" for one in with_embedding)


def test_in_a_linear_model_a_single_heads_score_is_its_whole_effect():
    """Where all is linear and one head reads the differing token, scores are exact: all first steps sum to the change."""
    model, n, (one, two) = linear_model(1), observable(), pair()
    parts = decoder_parts(model)
    # a constant pattern, so that freezing it changes nothing
    with torch.no_grad():
        parts.model.model.layers[0].self_attn.q_proj.weight.zero_()
    found = find_paths(model, n, (one, two), max_length=1, beam=1000, mlps=False)
    whole = measured(model, one, n) - measured(model, two, n)
    assert sum(path.score for path in found) == pytest.approx(whole, rel=1e-3)


# ---- norms


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("width", [8, 64, 576])
def test_the_angle_of_a_norm_is_that_of_autograd(kind, width):
    generator = torch.Generator().manual_seed(0)
    x, n = (torch.randn(200, width, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x.requires_grad_()
    centred = x - x.mean(dim=1, keepdim=True) if kind == "layer" else x
    out = width**0.5 * centred / centred.norm(dim=1, keepdim=True)
    (slope,) = torch.autograd.grad((out * n).sum(), x)
    expected = torch.nn.functional.cosine_similarity(slope, n, dim=1)
    found = layernorm_angle(x.detach(), n, kind)
    assert torch.allclose(found.cos(), expected, atol=1e-9)
    assert torch.allclose(layernorm_angle(x.detach()[:1], n[0], kind), found[:1], atol=1e-12)


@QUICK
@given(st.integers(3, 40), st.integers(0, 10_000), st.sampled_from(["LayerNorm", "RMSNorm"]))
def test_the_angle_does_not_depend_on_lengths(width, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x, n = (torch.randn(5, width, generator=generator, dtype=torch.float64) for _ in range(2))
    one = layernorm_angle(x, n, kind)
    assert torch.allclose(one, layernorm_angle(7 * x, -0.3 * n, kind), atol=1e-9)
    if kind == "LayerNorm":
        assert torch.allclose(one, layernorm_angle(x + 3, n, kind), atol=1e-7)
    assert bool(((one >= 0) & (one <= torch.pi / 2)).all())


def test_rows_without_a_direction_have_no_angle():
    for x, n, kind, text in (
        (torch.ones(1, 4), torch.ones(4), "layer", "constant"),
        (torch.zeros(1, 4), torch.ones(4), "rms", "zero"),
        (torch.ones(1, 4), torch.zeros(4), "rms", "zero"),
        (torch.ones(1, 4), torch.ones(4), "batch", "kind must be"),
    ):
        with pytest.raises(InputError, match=text):
            layernorm_angle(x, n, kind)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_three_rules_of_a_norm(kind):
    norm = decoder_parts(MODELS[kind]()).final_norm
    generator = torch.Generator().manual_seed(0)
    x, y = 30 * torch.randn(WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(norm.module(leaf[None])[0], leaf, y)
    assert torch.allclose(through_norm(norm, y, x, "exact"), slope, atol=1e-6)
    scaled = through_norm(norm, y, x, "scale")
    centred = x - x.mean() if kind == "gpt2" else x
    along = norm.weight * y - ((norm.weight * y).mean() if kind == "gpt2" else 0)
    assert torch.allclose(scaled, WIDTH**0.5 / centred.norm() * along, atol=1e-6)
    # the exact gradient is the scaled one without its part along x
    out = scaled - (scaled @ centred) / (centred @ centred) * centred
    assert torch.allclose(slope, out, atol=1e-4)
    assert torch.equal(through_norm(norm, y, x, "none"), y)
    assert torch.allclose(through_norm(norm, y, None, "exact"), along, atol=1e-6)


# ---- coupling


def test_coupling_is_the_slope_of_the_regression_for_isotropic_activations():
    generator = torch.Generator().manual_seed(0)
    y1, y2 = torch.randn(16, generator=generator), torch.randn(16, generator=generator) + 1
    x = torch.randn(400_000, 16, generator=generator)
    slope = np.polyfit((x @ y1).numpy(), (x @ y2).numpy(), 1)[0]
    assert slope == pytest.approx(coupling(y1, y2), abs=0.01)
    assert coupling(y1, y2) != pytest.approx(coupling(y2, y1), rel=0.01)


@QUICK
@given(st.integers(2, 20), st.integers(0, 10_000), st.floats(0.1, 10))
def test_coupling_and_cosine_know_their_scales(width, seed, factor):
    generator = torch.Generator().manual_seed(seed)
    y1, y2 = torch.randn(width, generator=generator), torch.randn(width, generator=generator)
    assert coupling(y1, y1) == pytest.approx(1)
    assert coupling(y1, factor * y2) == pytest.approx(factor * coupling(y1, y2), rel=1e-4, abs=1e-6)
    assert coupling(factor * y1, y2) == pytest.approx(coupling(y1, y2) / factor, rel=1e-4, abs=1e-6)
    assert ob.cosine(y1, factor * y2) == pytest.approx(ob.cosine(y2, y1), rel=1e-4, abs=1e-6)
    assert coupling(y1, y2) * coupling(y2, y1) == pytest.approx(ob.cosine(y1, y2) ** 2, rel=1e-4, abs=1e-6)
    matrix = ob.coupling_matrix([y1, y2])
    assert float(matrix[0, 1]) == pytest.approx(coupling(y1, y2), rel=1e-4, abs=1e-6)


def test_lengths_that_mean_nothing_are_not_coupled():
    model, n = llama(), observable()
    one = propagate(model, n, (Component("attn", 1, 0),), prompts=pair(), normalise=True)
    assert float(one.vector.norm()) == pytest.approx(1, rel=1e-5)
    with pytest.raises(InputError, match="only their cosine"):
        coupling(one, one)
    early, late = (propagate(model, n, (Component("attn", layer, 0),)) for layer in (0, 1))
    with pytest.raises(InputError, match="not comparable between layers"):
        coupling(early, late)
    assert -1 <= ob.cosine(early, late) <= 1
    assert coupling(early, early) == pytest.approx(1)
    for wrong, text in ((torch.zeros(3), "not zero"), (torch.ones(4), "width 3 and 4")):
        with pytest.raises(InputError, match=text):
            coupling(torch.ones(3), wrong)
    with pytest.raises(InputError, match="at least one feature"):
        ob.coupling_matrix([])


# ---- the point where an MLP is taken


def test_the_boundary_is_where_the_value_is_zero():
    a, b = torch.zeros(2), torch.tensor([1.0, 2.0])
    point, crossed = point_on_segment(lambda x: x[:, 0] ** 3 - 0.2, a, b, "boundary")
    assert crossed
    assert float(point[0]) == pytest.approx(0.2 ** (1 / 3), abs=1e-5)
    point, crossed = point_on_segment(lambda x: 1 + (x[:, 0] - 0.3) ** 2, a, b, "boundary")
    assert not crossed
    assert float(point[0]) == pytest.approx(0.3, abs=1e-2)
    several, crossed = point_on_segment(
        lambda x: (x[:, 0] - 0.1) * (x[:, 0] - 0.55) * (x[:, 0] - 0.9), a, b, "boundary"
    )
    assert crossed
    assert float(several[0]) == pytest.approx(0.55, abs=1e-5)  # the one nearest to the middle
    for at, expected in (("positive", b), ("negative", a), ("mean", b / 2)):
        assert torch.equal(point_on_segment(lambda x: x[:, 0], a, b, at)[0], expected)


def test_an_mlp_that_keeps_its_sign_is_told():
    class Squares(nn.Module):
        def __init__(self, y):
            super().__init__()
            self.y = nn.Parameter(y)

        def forward(self, x):
            return (1 + x.square().sum(dim=-1, keepdim=True)) * self.y

    model, n = llama(), observable()
    model.model.layers[1].mlp = Squares(propagate(model, n, (), prompts=pair(TOKENS - 1)).vector)
    found = propagate(model, n, (Component("mlp", 1),), prompts=pair(TOKENS - 1))
    assert not found.boundary_found
    assert propagate(model, n, (Component("mlp", 1),), prompts=pair(TOKENS - 1), at="mean").boundary_found
    assert found.stream == "middle"


# ---- any network


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()


def test_of_a_classifier_the_feature_is_the_gradient_at_the_boundary():
    model, n = classifier(), Observable.from_classes(0, 2, 3)
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        scores = n.score(model(x))
        positive, negative = x[scores.argmax()], x[scores.argmin()]
        hidden = model[:2](x).float()
    found = propagate(model, n, ["4", "3", "2"], prompts=(positive, negative))
    assert found.boundary_found
    assert (found.layer, found.stream, found.path) == ("2", "input", ("4", "3", "2"))
    # by hand
    ends = [model[:2](row[None])[0].detach() for row in (negative, positive)]
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]
    values = n.score(model[2:](ends[0] + t * (ends[1] - ends[0]))).detach()
    at = (ends[0] + t[int(values.abs().argmin())] * (ends[1] - ends[0])).requires_grad_()
    (slope,) = torch.autograd.grad(n.score(model[2:](at[None])).sum(), at)
    assert torch.allclose(found.vector.double(), slope, rtol=1e-2, atol=1e-4)
    report = evaluate(model, found, n, x, labels=scores > 0)
    assert report.r2 == pytest.approx(float(np.corrcoef((hidden @ found.vector), scores)[0, 1] ** 2), rel=1e-4)
    assert report.r2 > 0.5
    table = ob.compare_baselines(model, found, n, x, n_train=(3,), n_splits=2)
    assert set(table.method) == {
        "feature", "random direction", "linear regression", "mean difference", "logistic regression",
    }  # fmt: skip
    assert bool(table.r2.between(0, 1).all())
    with ob.ablate(model, found, mean=float((hidden @ found.direction).mean())), torch.no_grad():
        flat = n.score(model(x))
    assert float(flat.std()) < float(scores.std())
    with pytest.raises(InputError, match="late to early"):
        propagate(model, n, ["2", "4"], prompts=(positive, negative))
    with pytest.raises(InputError, match="needs prompts"):
        propagate(model, n, ["4"])
    with pytest.raises(InputError, match="named twice"):
        propagate(model, n, ["4", "4"], prompts=(positive, negative))
    with pytest.raises(InputError, match="one shape"):
        propagate(model, n, ["4"], prompts=(positive, negative[:3]))
    with pytest.raises(InputError, match="uses score 7"):
        propagate(model, Observable.from_classes(7, 2, 9), ["4"], prompts=(positive, negative))


def test_a_path_of_modules_leaves_out_what_goes_around_them():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x + self.inner(x))

    torch.manual_seed(0)
    model, n = Residual().eval(), Observable.from_classes(0, 1, 2)
    rows = torch.randn(2, 4)
    head = model.head.weight[0] - model.head.weight[1]
    found = propagate(model, n, ["head", "inner"], prompts=rows, at="mean")
    assert torch.allclose(found.vector, model.inner.weight.T @ head, atol=1e-5)


def test_an_encoders_classifier_is_measured_by_its_classes():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, num_labels=3
    )
    model, n = transformers.BertForSequenceClassification(config).eval(), Observable.from_classes(0, 1, 3)
    ids = torch.randint(0, 30, (2, 7))
    with pytest.raises(ModelError, match="difference of two class scores"):
        propagate(model, n, (Component("attn", 0, 0),), prompts=list(ids))
    found = propagate(model, n, ["classifier"], prompts=ids, at="mean")
    assert torch.allclose(found.vector, (model.classifier.weight[0] - model.classifier.weight[1]).detach(), atol=1e-6)
    with pytest.raises(InputError, match="no gradient"):
        propagate(model, n, ["bert.embeddings.word_embeddings"], prompts=ids)


# ---- observables and prompts


class Words:
    """A tokenizer of words and of letters where the word is unknown."""

    def __init__(self):
        self.words = [" she", " he", " it", " her", "x", "y", "z"]

    def __len__(self):
        return len(self.words)

    def encode(self, text, *, add_special_tokens):
        return [self.words.index(text)] if text in self.words else [self.words.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def test_observables_are_means_of_tokens():
    n = Observable.from_tokens([" she", " her"], [" he"], Words())
    assert n.vector.tolist() == [0.5, -1, 0, 0.5, 0, 0, 0]
    assert str(n) == "she + her − he"
    logits = torch.arange(10.0)[None]  # a padded vocabulary
    assert n.score(logits).tolist() == [0.5]
    assert Observable.from_tokens(["xyz"], [" he"], Words(), first_token=True).vector.tolist() == [0, -1, 0, 0, 1, 0, 0]
    with pytest.raises(InputError, match=r"\['x', 'y', 'z'\].*first_token=True"):
        Observable.from_tokens(["xyz"], [" he"], Words())
    with pytest.raises(InputError, match="give lists"):
        Observable.from_tokens(" she", [" he"], Words())
    for positive, negative in (([" she"], [" she"]), ([], [])):
        with pytest.raises(InputError, match="zeros"):
            Observable.from_tokens(positive, negative, Words())
    for vector, text in ((torch.zeros(4), "zeros"), (torch.tensor([torch.nan]), "finite")):
        with pytest.raises(InputError, match=text):
            Observable(vector)
    with pytest.raises(InputError, match=r"0\.\.2"):
        Observable.from_classes(0, 3, 3)
    with pytest.raises(InputError, match="zeros"):
        Observable.from_classes(1, 1, 3)
    with pytest.raises(InputError, match="uses score 3"):
        n.score(torch.ones(1, 3))


def test_a_pair_must_align_token_by_token():
    with pytest.raises(InputError, match=r"5 and 4 tokens: from token 1 on \[2, 3\] \(2 tokens\) stands against \[9\]"):
        check_pair(([1, 2, 3, 4, 5], [1, 9, 4, 5]))
    with pytest.raises(InputError, match="3 and 2 tokens"):
        check_pair(([1, 2, 3], [1, 2]))
    for wrong, text in (
        (([1],), "a pair"),
        ("ab", "a pair"),
        (([], [1]), "at least one"),
        (("a b", "a c"), "need a tokenizer"),
    ):
        with pytest.raises(InputError, match=text):
            check_pair(wrong)


def test_paths_that_cannot_be_are_told_with_the_range():
    model, n, prompts = llama(), observable(), pair()
    for path, text in (
        ((Component("attn", 0, 0), Component("attn", 1, 0)), "does not come before attn0.0"),
        ("model.layers.0", "for one alone give"),
        ((Component("attn", 1, 0), Component("attn", 1, 1)), "does not come before"),
        ((Component("attn", 1, 0), Component("mlp", 1)), "does not come before"),
        ((Component("attn", 3, 0),), r"layers lie in 0\.\.2"),
        ((Component("attn", -1, 0),), r"layers lie in 0\.\.2"),
        ((Component("attn", 0, 6),), r"head in 0\.\.5"),
        ((Component("attn", 0),), r"head in 0\.\.5"),
        ((Component("attn", 0, 0, 6),), r"tokens 0\.\.5"),
        ((Component("attn", 1, 0, 2), Component("attn", 0, 0, 3)), "lies after token 2"),
        ((Component("mlp", 1, 2),), "no heads"),
        ((Component("attn", 2, 0, 2), Component("mlp", 1, token=3)), "at token 2"),
        ((Component("embedding", 0), Component("attn", 0, 0)), "where a path ends"),
    ):
        with pytest.raises(InputError, match=text):
            propagate(model, n, path, prompts=prompts)
    assert propagate(model, n, (Component("mlp", 1), Component("attn", 1, 0)), prompts=prompts).layer == 1
    with pytest.raises(InputError, match="does not come before"):  # both read the stream before the block
        propagate(neox(), n, (Component("mlp", 1), Component("attn", 1, 0)), prompts=prompts)
    with pytest.raises(InputError, match="linearised between two prompts"):
        propagate(model, n, (Component("mlp", 1),))
    with pytest.raises(InputError, match="uses score"):
        propagate(model, Observable.from_classes(0, 70, 80), (), prompts=prompts)
    for options in ({"max_length": 0}, {"beam": 0}):
        with pytest.raises(InputError, match="max_length and beam"):
            find_paths(model, n, prompts, **options)
    for options in ({"layer": 4}, {"layer": 0, "token": 9}):
        with pytest.raises(InputError, match=r"0\.\."):
            all_paths(model, n, prompts[0], **options)


def test_a_path_prints_as_its_stops():
    path = ComponentPath([Component("attn", 13, 11, 5), Component("attn", 9, 1, 3), Component("embedding", 0, None, 3)])
    assert str(path) == "attn13.11@5 <= attn9.1@3 <= embedding@3"
    assert str(ComponentPath()) == "direct"
    assert path == tuple(path)


def test_fused_attention_is_switched_for_the_pair_and_said_so():
    model, n, prompts = llama(), observable(), pair()
    model.set_attn_implementation("sdpa")
    fused = propagate(model, n, (Component("attn", 2, 0, 2),), prompts=prompts)
    assert model.config._attn_implementation == "sdpa"
    assert "eager" in fused.notes[0]
    model.set_attn_implementation("eager")
    eager = propagate(model, n, (Component("attn", 2, 0, 2),), prompts=prompts)
    assert eager.notes == ()
    assert torch.allclose(fused.vector, eager.vector, rtol=1e-4, atol=1e-5)


def test_attention_takes_part_as_a_gain_alone():
    """The feature does not move with queries and keys; only the gain does."""
    model, n, prompts = llama(), observable(), pair()
    path = (Component("attn", 0, 1, 2),)
    before = propagate(model, n, path, prompts=prompts, norm="none")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    after = propagate(model, n, path, prompts=prompts, norm="none")
    assert torch.allclose(before.vector, after.vector, atol=1e-6)
    assert before.gain != after.gain


def test_value_biases_move_the_intercept_alone():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model, n = randomise(transformers.Qwen2ForCausalLM(config)), observable()
    model.model.norm, model.model.layers[0].mlp = nn.Identity(), Nothing()
    path, prompts = (Component("attn", 0, 1, 2),), pair()
    rows = torch.stack([prompts[0]] * 12)
    rows[:, 2] = torch.arange(12)
    feature = propagate(model, n, path, prompts=prompts)
    first = evaluate(model, feature, n, rows)
    shift = torch.randn(12, generator=torch.Generator().manual_seed(5)).mul(3)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.bias[4:8] += shift[:4]
    again = propagate(model, n, path, prompts=prompts)
    assert torch.allclose(feature.vector, again.vector)
    second = evaluate(model, again, n, rows)
    assert second.r2 == pytest.approx(first.r2, rel=0.2)
    assert second.intercept != pytest.approx(first.intercept, rel=1e-3)


def test_a_classifier_takes_inputs_of_any_precision_and_tables():
    model, n = classifier().float(), Observable.from_classes(0, 2, 3)
    x = np.random.default_rng(0).normal(size=(20, 5))
    feature = propagate(model, n, ["4", "2"], prompts=(x[0], x[1]))
    expected = evaluate(model, feature, n, torch.tensor(x, dtype=torch.float32))
    assert expected.from_pair == 2
    assert vars(evaluate(model, feature, n, x)) == vars(expected)
    assert vars(evaluate(model, feature, n, pd.DataFrame(x))) == vars(expected)
    assert vars(evaluate(model, feature, n, list(x))) == vars(expected)


# ---- evaluation


def families(count=12):
    """Prompts of two templates of different lengths, with a word that varies at another place in each."""
    rows = []
    for template, place in ((prompt(3, 6), 2), (prompt(4, 8), 5)):
        for word in range(count):
            ids = template.clone()
            ids[place] = word
            rows.append(ids)
    return rows


def test_features_are_read_where_the_varying_word_is():
    model, n, rows = llama(), observable(), families()
    feature = propagate(model, n, (Component("attn", 2, 1, 2),), prompts=(rows[0], rows[1]))
    assert feature.offset == 0
    parts = decoder_parts(model)
    found = ob.read(model, feature, n, rows)
    for i, place in ((0, 2), (20, 5)):
        expected = run_decoder(parts, rows[i][None], before=[2])
        assert torch.allclose(found.x[i], expected.before[2][0, place], atol=1e-5)
        assert float(found.observed[i]) == pytest.approx(measured(model, rows[i], n), rel=1e-4, abs=1e-4)
    given = ob.read(model, feature, n, rows, tokens=[2] * 12 + [5] * 12)
    assert torch.equal(given.x, found.x)
    assert not torch.allclose(ob.read(model, feature, n, rows, tokens=0).x, found.x)
    mean = ob.read(model, feature, n, rows, tokens="mean")
    assert torch.allclose(mean.x[0], run_decoder(parts, rows[0][None], before=[2]).before[2][0].mean(dim=0), atol=1e-5)
    after = propagate(model, n, (Component("attn", 2, 1, 4),), prompts=(rows[0], rows[1]))
    assert after.offset == 2
    assert torch.equal(ob.read(model, after, n, rows).x, ob.read(model, feature, n, rows, tokens=[4] * 12 + [7] * 12).x)
    last = propagate(model, n, (Component("attn", 2, 1),), prompts=(rows[0], rows[1]))
    assert last.offset is None
    assert torch.equal(ob.read(model, last, n, rows).x, ob.read(model, feature, n, rows, tokens=-1).x)
    small = ob.read(model, feature, n, rows, memory=1)
    assert torch.allclose(small.x, found.x, atol=1e-5)


def test_where_the_word_cannot_be_told_a_token_is_asked_for():
    model, n, rows = llama(), observable(), families()
    feature = propagate(model, n, (Component("attn", 2, 1, 2),), prompts=(rows[0], rows[1]))
    with pytest.raises(InputError, match="cannot tell where to read"):
        ob.read(model, feature, n, [*rows[:4], prompt(9, 11)])
    unlike = torch.stack([torch.arange(6) + 6 * i for i in range(4)])  # of the pair's length, and made of no template
    assert torch.equal(ob.read(model, feature, n, unlike).x, ob.read(model, feature, n, unlike, tokens=2).x)
    with pytest.raises(InputError, match="as many tokens"):
        ob.read(model, feature, n, rows, tokens=[1])
    with pytest.raises(InputError, match="cannot read at token 40"):
        ob.read(model, feature, n, rows, tokens=40)


def test_the_report_pools_all_prompts():
    model, n, rows = llama(), observable(), families()
    feature = propagate(model, n, (Component("attn", 2, 1, 2),), prompts=(rows[0], rows[1]))
    labels = np.arange(24) % 2
    found = evaluate(model, feature, n, rows, labels=labels)
    readings = ob.read(model, feature, n, rows)
    s, o = (readings.x @ feature.vector).numpy(), readings.observed.numpy()
    slope, intercept = np.polyfit(s, o, 1)
    assert found.slope == pytest.approx(slope, rel=1e-3)
    assert found.intercept == pytest.approx(intercept, rel=1e-3, abs=1e-3)
    assert found.r2 == pytest.approx(np.corrcoef(s, o)[0, 1] ** 2, rel=1e-3)
    greater = (s[labels == 1][:, None] > s[labels == 0]).mean()
    assert found.auc == pytest.approx(greater, abs=1e-6)
    assert (found.n, found.from_pair) == (24, 2)
    assert evaluate(model, feature, n, rows).auc is None


def test_prompts_that_prove_nothing_are_refused():
    model, n, rows = llama(), observable(), families()
    feature = propagate(model, n, (Component("attn", 2, 1, 2),), prompts=(rows[0], rows[1]))
    with pytest.raises(DataError, match="the pair that the feature was made from"):
        evaluate(model, feature, n, rows[:4])
    with pytest.raises(DataError, match="is the same for all prompts"):
        evaluate(model, feature, n, [rows[5]] * 5, tokens=2)
    rounded = torch.ones(5, WIDTH) + torch.finfo(torch.float32).eps * torch.eye(5, WIDTH)
    with pytest.raises(DataError, match="is the same for all prompts"):  # rounding is no difference
        evaluation.report(feature, ob.Readings(rounded, torch.arange(5.0)))
    with pytest.raises(DataError, match="NaN or infinite for 1 of 5 prompts"):
        evaluation.report(feature, ob.Readings(torch.randn(5, WIDTH), torch.tensor([1.0, 2.0, float("nan"), 3.0, 4.0])))
    for labels, text in (([0] * 24, "0 and 1"), ([0, 1], "one label for each"), ([1, 2] * 12, "0 and 1")):
        with pytest.raises(DataError, match=text):
            evaluate(model, feature, n, rows, labels=labels)
    with pytest.raises(InputError, match="not one string"):
        evaluate(model, feature, n, "a text")
    with pytest.raises(InputError, match="width"):
        evaluate(model, FeatureVector(torch.ones(3), 0), n, rows)
    with pytest.raises(InputError, match="at least one prompt"):
        evaluate(model, feature, n, [])


def test_baselines_are_those_of_the_activations():
    model, n, rows = llama(), observable(), families(20)
    feature = propagate(model, n, (Component("attn", 2, 1, 2),), prompts=(rows[0], rows[1]))
    table = ob.compare_baselines(model, feature, n, rows, n_train=(1, 3, 10, 30), n_splits=3, seed=1)
    assert set(table.n_train) == {0, 1, 3, 10}  # 30 a class are not there
    assert set(table[table.n_train == 0].method) == {"feature", "gradient", "random direction"}
    assert bool((table.r2_low <= table.r2).all())
    assert bool((table.r2 <= table.r2_high).all())
    again = ob.compare_baselines(model, feature, n, rows, n_train=(1, 3, 10, 30), n_splits=3, seed=1)
    assert table.equals(again)
    with pytest.raises(InputError, match="leaves three prompts"):
        ob.compare_baselines(model, feature, n, rows, n_train=(30,))


# ---- interventions


@pytest.mark.parametrize("kind", MODELS)
def test_edits_change_the_stream_as_they_say(kind):
    model, n, rows = MODELS[kind](), observable(), torch.stack(families()[:12])
    parts = decoder_parts(model)
    paths = {0: (Component("attn", 0, 1, 2),), 2: (Component("attn", 2, 1, 2),), 3: ()}
    for layer, path in paths.items():
        feature = propagate(model, n, path, prompts=(rows[0], rows[1]))
        unit, token = feature.vector / feature.vector.norm(), feature.token
        assert feature.layer == layer
        x = run_decoder(parts, rows, before=[layer]).before[layer]
        theirs = x.roll(1, dims=0)[:, token]

        def stream(context, layer=layer):
            with context:
                return run_decoder(parts, rows, before=[layer]).before[layer]

        edits = {
            "steer": (ob.steer(model, feature, 2.5), x[:, token] + 2.5 * unit),
            "ablate": (ob.ablate(model, feature, mean=0.5), x[:, token] + (0.5 - x[:, token] @ unit)[:, None] * unit),
            "patch": (
                ob.projection_patch(model, feature, theirs, kappa=2.0),
                x[:, token] + 2 * ((theirs - x[:, token]) @ unit)[:, None] * unit,
            ),
            "one for all": (
                ob.projection_patch(model, feature, theirs[0]),
                x[:, token] + ((theirs[0] - x[:, token]) @ unit)[:, None] * unit,
            ),
        }
        for name, (context, expected) in edits.items():
            found = stream(context)
            assert torch.allclose(found[:, token], expected, atol=1e-4), name
            others = [t for t in range(rows.shape[1]) if t != token]
            assert torch.allclose(found[:, others], x[:, others], atol=1e-6), name
        everywhere = stream(ob.steer(model, feature, 1.0, token="all"))
        assert torch.allclose(everywhere, x + unit, atol=1e-4)
        assert torch.allclose(run_decoder(parts, rows, before=[layer]).before[layer], x)


@pytest.mark.parametrize("kind", MODELS)
def test_edits_between_attention_and_mlp_reach_both_ways_on(kind):
    model, n, rows = MODELS[kind](), observable(), torch.stack(families()[:4])
    parts = decoder_parts(model)
    feature = propagate(model, n, (Component("mlp", 1),), prompts=(rows[0], rows[1]))
    unit = feature.direction
    run = run_decoder(parts, rows, before=[1, 2], between=[1])
    with ob.steer(model, feature, 3.0):
        edited = run_decoder(parts, rows, before=[2], between=[1])
    if feature.stream == "residual":  # parallel blocks: it is the stream before the block
        assert torch.allclose(edited.between[1][:, -1], run.before[1][:, -1] + 3 * unit, atol=1e-4)
        return
    assert torch.allclose(edited.between[1][:, -1], run.between[1][:, -1] + 3 * unit, atol=1e-4)
    block = parts.blocks[1]
    middle = edited.between[1]
    assert torch.allclose(edited.before[2], middle + block.mlp(block.mlp_norm.module(middle)), atol=1e-4)


def test_effects_are_of_the_models_answers():
    model, n, rows = llama(), observable(), torch.stack(families()[:12])
    feature = propagate(model, n, (), prompts=(rows[0], rows[1]))
    none = ob.measure_effect(model, n, rows, lambda part: ob.steer(model, feature, 0.0))
    assert float(none.change.abs().max()) < 1e-5
    assert float(none.kl.max()) < 1e-5
    moved = ob.measure_effect(model, n, rows, lambda part: ob.steer(model, feature, 5.0))
    expected = [measured(model, row, n) for row in rows]
    assert torch.allclose(moved.before, torch.tensor(expected), atol=1e-4)
    assert float(moved.change.mean()) > 0
    assert float(moved.kl.min()) > 0
    theirs = run_decoder(decoder_parts(model), rows, before=[3]).before[3][:, -1].roll(1, dims=0)
    one = ob.measure_effect(model, n, rows, lambda part: ob.projection_patch(model, feature, theirs[part]))
    many = ob.measure_effect(model, n, rows, lambda part: ob.projection_patch(model, feature, theirs[part]), memory=1)
    assert torch.allclose(one.after, many.after, atol=1e-4)
    with torch.no_grad():
        p = model(rows).logits[:, -1].softmax(dim=1)
        with ob.steer(model, feature, 5.0):
            q = model(rows).logits[:, -1].softmax(dim=1)
    assert torch.allclose(moved.kl, (p * (p / q).log()).sum(dim=1), rtol=1e-3, atol=1e-5)


def test_edits_that_cannot_be_made_are_told_and_leave_nothing_behind():
    model, n, rows = llama(), observable(), torch.stack(families()[:4])
    feature = propagate(model, n, (), prompts=(rows[0], rows[1]))
    with pytest.raises(InputError, match="of width 24"):
        ob.projection_patch(model, feature, torch.ones(3))
    with (
        pytest.raises(InputError, match="2 activations for a batch of 4"),
        ob.projection_patch(model, feature, torch.ones(2, 24)),
    ):
        model(rows)
    with pytest.raises(InputError, match="cannot edit token 9"), ob.steer(model, feature, 1.0, token=9):
        model(rows)
    with pytest.raises(InputError, match="same number of tokens"):
        ob.measure_effect(model, n, families(), lambda part: ob.steer(model, feature, 1.0))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_weights_are_not_touched():
    model, n = llama(), observable()
    before = {name: p.clone() for name, p in model.named_parameters()}
    find_paths(model, n, pair(), max_length=2)
    all_paths(model, n, prompt(), layer=0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


# ---- names


class Spaced:
    """A tokenizer of words with the space before them; words with a capital Z are two tokens."""

    def __init__(self):
        self.seen = {}

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": self.encode(text, add_special_tokens=False)})()

    def encode(self, text, *, add_special_tokens):
        words = ["" + word for word in text.replace(",", " ,").split(" ") if word]
        pieces = [piece for word in words for piece in ([word[:1], word[1:]] if word.startswith("Z") else [word])]
        return [self.seen.setdefault(piece, len(self.seen)) for piece in pieces]


def test_named_prompts_know_their_names():
    made = ob.named_prompts(
        ("Well, {} is here", "See {} run"), (("Ann", "Zoe", "Eve"), ("Bob", "Tom")), Spaced(), per_group=2
    )
    assert len(made.prompts) == 8
    assert made.labels.tolist() == [1, 1, 0, 0] * 2
    assert made.tokens == [2] * 4 + [1] * 4
    assert made.names[:4] == ["Ann", "Eve", "Bob", "Tom"]
    one, two = made.pair(1, "Ann", "Tom")
    assert int((one != two).sum()) == 1
    with pytest.raises(InputError, match="holds Zoe"):
        made.pair(0, "Zoe", "Tom")
    with pytest.raises(DataError, match="only 2 of the names"):
        ob.named_prompts(("See {}",), (("Ann", "Zoe", "Eve"), ("Bob", "Tom")), Spaced(), per_group=3)
    with pytest.raises(InputError, match="two groups"):
        ob.named_prompts(("See",), (("Ann",), ("Bob",)), Spaced())


def test_the_names_are_of_two_groups():
    female, male = ob.NAMES["female"], ob.NAMES["male"]
    assert len(set(female)) == len(female) >= 20
    assert len(set(male)) == len(male) >= 20
    assert not set(female) & set(male)
