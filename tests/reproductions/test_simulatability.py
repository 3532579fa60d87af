import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import simulatability as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "LIME helps forward", "other methods", "simulation: LIME", "simulation: decision boundary", "no leakage", "the intervals",
    "the prototype network", "anchors", "a language model",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told():
    if find_data(paper._FILE) is None:
        pytest.skip(f"needs {paper._FILE}: set THEODOLITE_DATA")
    claims = quick_claims("simulatability", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == ["a language model"]
    assert "--reader" in claims["a language model"].scaled
    for topic in ("LIME helps forward", "no leakage", "the intervals"):
        assert claims[topic].holds is True, topic


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        if topic == "the intervals":
            assert claim.measured is not None
            continue
        assert claim.measured is None
        assert "adult-train.csv" in claim.scaled or topic == "a language model"
