import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import robust_counterfactuals as paper
from theodolite.reproductions.claim import Scale

EXACT = ["linear model", "probit", "constant model", "= 3 eps", "= 5 eps", "= 10 eps", "breaks the", "same bits"]
TOPICS = [
    *EXACT, "closest counterfactuals", "tau = 0.6", "tau = 0.75", "tau = 0.85", "confidence", "price", "T-Rex:NN",
    "plain nearest", "code of an autoencoder", "ranks its survival",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data(paper._FILE) is None:
        pytest.skip(f"needs {paper._FILE}: set THEODOLITE_DATA")
    claims = quick_claims("robust-counterfactuals", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in EXACT:
        assert claims[topic].holds is True, topic
    closest, ours = (claims[topic].measured.value for topic in ("closest counterfactuals", "tau = 0.75"))
    assert ours > closest


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        if topic in EXACT:
            assert claim.holds is True, topic
        else:
            assert (claim.measured, claim.holds) == (None, None)
            assert paper._FILE in claim.scaled
