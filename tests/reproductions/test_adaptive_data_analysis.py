import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data

TOPICS = [
    "fooled by pure noise", "Thresholdout is not fooled", "real signal", "closed form", "exponentially many",
    "(T = 0.12)", "(T = 0.2)", "draw for draw", "Laplace noise", "only on disagreement", "(breast cancer", "(digits",
    "Adult",
]  # fmt: skip
EXACT = TOPICS[:10]


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("adult-train.csv") is None:
        pytest.skip("needs adult-train.csv: set THEODOLITE_DATA")
    claims = quick_claims("adaptive-data-analysis", TOPICS)
    assert [topic for topic in EXACT if not claims[topic].holds] == []
    assert claims["Adult"].measured is not None


def test_without_adult_its_claim_names_the_file(monkeypatch):
    from theodolite.reproductions import adaptive_data_analysis as paper

    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    found = [claim for claim in paper._real_tables(paper.Scale.QUICK, 0) if claim.measured is None]
    assert ["adult-train.csv" in claim.scaled for claim in found] == [True]
