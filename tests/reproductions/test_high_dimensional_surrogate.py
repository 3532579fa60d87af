import numpy as np
import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import high_dimensional_surrogate as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "rules are the tree", "L1-closest leaf", "f = 3 x1", "on 30 of 64", "on 10 of 64", "20,000 dimensions",
    "thousands of dimensions",
    "comprehensiveness", "sufficiency", "finds the columns", "memorised", "redundant", "beside boosting",
]  # fmt: skip
EXACT = ("rules are the tree", "L1-closest leaf", "f = 3 x1")


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if any(find_data(f"highdim/{name}.npz") is None for name in paper._NEED_DATA):
        pytest.skip("needs highdim/*.npz: set THEODOLITE_DATA")
    claims = quick_claims("high-dimensional-surrogate", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in EXACT:
        assert claims[topic].holds is True, topic
    for topic in TOPICS[3:5]:
        claim = claims[topic]
        assert claim.measured is not None
        assert claim.comparator is not None
        assert claim.measured.value > claim.comparator.measured, topic


def test_without_the_tables_claims_name_the_files(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    # what needs no table is measured in the slow test
    monkeypatch.setattr(paper, "_digits", lambda seed, quick: iter(()))
    monkeypatch.setattr(paper, "_many_columns", lambda seed, quick: iter(()))
    claims = list(paper.claims(Scale.QUICK, 1))
    told = [topic for topic in TOPICS if topic not in TOPICS[3:6]]
    assert len(claims) == len(told)
    for topic, claim in zip(told, claims, strict=True):
        assert topic in claim.claim
        if topic in EXACT:
            assert claim.holds is True
        else:
            assert (claim.measured, claim.holds) == (None, None)
            assert "highdim/" in claim.scaled


def test_the_parts_of_a_split_are_disjoint_and_standardised():
    x = np.arange(800.0).reshape(200, 4)
    split = paper._Split.of(x, np.arange(200) % 2, 0)
    rows = [part[:, 0] for part in (split.x, split.x_val, split.x_test)]
    assert [len(part) for part in rows] == [140, 30, 30]
    assert len(np.unique(np.concatenate(rows))) == 200
    assert np.allclose(split.x.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(split.x.std(axis=0), 1, atol=1e-6)
