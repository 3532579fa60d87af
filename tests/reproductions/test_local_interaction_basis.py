import math

import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import local_interaction_basis as paper
from theodolite.reproductions.claim import Scale
from theodolite.reproductions.local_interaction_adder import MODULUS, Adder, pairs

TOPICS = [
    "closed form", "uncorrelated", "add up", "untouched", "before attention and before the MLP", "before unembedding",
    "published numbers", "compact", "ignores", "single frequencies", "first to second", "input to first",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("rib/modadd-seed3.safetensors") is None:
        pytest.skip("needs rib/modadd-seed0..4.safetensors: set THEODOLITE_DATA")
    claims = quick_claims("local-interaction-basis", TOPICS)
    exact = ("closed form", "uncorrelated", "add up", "untouched", "published numbers", "ignores")
    assert [topic for topic in exact if not claims[topic].holds] == []


def test_without_the_networks_their_claims_name_the_files(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = [*paper._adders(Scale.QUICK, 0), paper._mnist(), paper._cifar(0)]
    assert len(claims) == 8
    for claim in claims:
        assert (claim.measured, claim.holds) == (None, None)
        assert "THEODOLITE_DATA" in claim.scaled


def small_adder():
    torch.manual_seed(0)
    shapes = {
        "embed.W_E": (114, 8), "pos_embed.W_pos": (3, 8), "unembed.W_U": (8, 114), "unembed.b_U": (114,),
        "blocks.0.attn.W_O": (2, 4, 8), "blocks.0.attn.b_O": (8,), "blocks.0.mlp.W_in": (8, 16),
        "blocks.0.mlp.b_in": (16,), "blocks.0.mlp.W_out": (16, 8), "blocks.0.mlp.b_out": (8,),
        **{f"blocks.0.attn.W_{x}": (2, 8, 4) for x in "QKV"}, **{f"blocks.0.attn.b_{x}": (2, 4) for x in "QKV"},
    }  # fmt: skip
    return Adder({name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()})


def test_the_adder_attends_as_written_out_by_head():
    model, tokens = small_adder(), pairs()[0][:5]
    w, h = model.weights, model.embed(tokens)
    made = h[:, 2].clone()
    for head in range(2):
        q, k, v = (h @ w[f"blocks_0_attn_W_{x}"][head] + w[f"blocks_0_attn_b_{x}"][head] for x in "QKV")
        weights = torch.softmax((q[:, 2:] @ k.transpose(1, 2)) / math.sqrt(4), dim=2)
        made = made + (weights @ v)[:, 0] @ w["blocks_0_attn_W_O"][head]
    assert torch.allclose(model.attend(h), made + w["blocks_0_attn_b_O"])
    assert torch.allclose(model.sections().run(h, 0), model(tokens))


def test_the_pairs_are_split_as_published():
    tokens, sums, train, test = pairs()
    assert tokens[114].tolist() == [1, 1, MODULUS]
    assert int(sums[-1]) == 111
    assert (len(train), len(test)) == (3830, 8939)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(12_769))
    one, two = torch.utils.data.random_split(range(12_769), [3830, 8939], torch.Generator().manual_seed(0))
    assert list(one.indices) == train.tolist()
    assert list(two.indices) == test.tolist()
