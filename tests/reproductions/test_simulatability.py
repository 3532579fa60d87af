import numpy as np
import pytest
import torch

from language_server import protocol_server
from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.language import connect
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
    assert "THEODOLITE_ENDPOINT" in claims["a language model"].scaled
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


def test_the_named_language_model_reads(monkeypatch, tmp_path):
    """The server's shorter words are likelier: what it answers says nothing of a language model."""
    x = np.random.default_rng(0).integers(0, 2, (4000, len(paper._NAMES)))
    torch.manual_seed(0)
    network = torch.nn.Linear(2 * len(paper._NAMES), 2)
    model = paper._OneHot(network, (2,) * len(paper._NAMES))
    y = np.where(np.random.default_rng(1).random(len(x)) < 0.7, *(model(x).argmax(1) == k for k in (1, 0))).astype(int)
    adult = paper._Adult(x, y, x, y, model, 0.7)
    with protocol_server() as server:
        monkeypatch.setenv("THEODOLITE_ENDPOINT", server.url)
        monkeypatch.setenv("THEODOLITE_LANGUAGE_MODEL", "m")
        monkeypatch.setattr(paper, "connect", lambda *place: connect(*place, cache=tmp_path / "answers.sqlite"))
        claim = paper._language_model(adult, Scale.FULL, 0)
    assert claim.holds is None
    assert (claim.measured.value, claim.comparator.measured) == (0, 0)
    assert "m, 3 learning panels" in claim.scaled
    assert paper._language_model(adult, Scale.QUICK, 0).measured is None
