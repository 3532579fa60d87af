"""Claims of relative representations: quick ones are told, exact ones hold, and what is missing is named."""

import numpy as np
import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.language.pretrained import model_folder
from theodolite.reproductions import relative_representations as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "300 uniform anchors", "1,000 anchors", "more anchors", "centring", "zero-shot stitching", "need standardising",
    "(classification)", "reconstruction", "a rotation", "a shift", "basis similarity",
]  # fmt: skip
ON_MODELS, EXACT = TOPICS[:6], TOPICS[8:]


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if model_folder("smollm2") is None or model_folder("minilm") is None or not all(map(find_data, paper._TREC)):
        pytest.skip(f"needs {paper._TREC}: set THEODOLITE_DATA and run make models")
    claims = quick_claims("relative-representations", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in (*EXACT, "300 uniform anchors", "1,000 anchors", "more anchors", "(classification)"):
        assert claims[topic].holds is True, topic


def test_without_models_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    monkeypatch.setattr(paper, "WHEELS", {"smollm2": "no_such_package"})
    told = [*paper._on_words(Scale.QUICK, 0), *paper._on_questions(Scale.QUICK, 0)]
    assert len(told) == len(ON_MODELS)
    for topic, claim in zip(ON_MODELS, told, strict=True):
        assert topic in claim.claim
        assert (claim.measured, claim.holds) == (None, None)
        assert "no-such-package" in claim.scaled
    assert "TREC.train.all" in told[-1].scaled


def test_the_oracles_hold_for_other_seeds():
    for seed in (3, 4):
        claims = list(paper._oracles(seed))
        assert [claim.holds for claim in claims] == [True] * 3


def test_the_search_tells_a_rotated_space_from_an_unrelated_one():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(300, 40, generator=draw)
    turned = a @ torch.linalg.qr(torch.randn(40, 40, generator=draw)).Q
    found = paper._search(a, turned, 60, 200, 2, 0, "center")
    assert np.allclose(found.mrr, 1)
    assert max(found.permuted) < 0.2
    assert max(paper._search(a, torch.randn(300, 40, generator=draw), 60, 200, 2, 0, "center").mrr) < 0.2
