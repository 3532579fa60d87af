import numpy as np
import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.explanations.deletion_robust.solver import Feasible, nearest
from theodolite.reproductions import explanations_under_deletion as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "break ordinary", "survive them", "extra cost", "worst set", "worst pair", "leave-one-out", "paper's search", "k smallest",
    "projection", "a network",
]  # fmt: skip
ON_GERMAN = TOPICS[:7]


@pytest.mark.slow
def test_every_claim_is_told_and_those_with_a_margin_hold():
    if paper.german() is None:
        pytest.skip(f"needs {paper._TRAIN} and {paper._TEST}: set THEODOLITE_DATA")
    claims = quick_claims("explanations-under-deletion", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in ("break ordinary", "survive them", "extra cost", "worst set", "k smallest", "projection"):
        assert claims[topic].holds is True, topic


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    monkeypatch.setattr(paper, "_network", lambda scale, seed: paper._top_k(seed))
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in list(zip(TOPICS, claims, strict=True))[:9]:
        assert topic in claim.claim
        if topic in ON_GERMAN:
            assert (claim.measured, claim.holds) == (None, None)
            assert "german-train.csv" in claim.scaled
        else:
            assert claim.holds is True


def test_the_search_comes_near_the_closed_form_and_never_below():
    rng = np.random.default_rng(0)
    for _ in range(3):
        x, w = rng.normal(size=5), rng.normal(size=6)
        w[-1] = -2 - x @ w[:-1]
        exact = nearest(x, w[None], 0.0, Feasible.everything(5))
        assert exact is not None
        least = np.linalg.norm(exact - x)
        point, distance = paper.adam_search(x, w, steps=500)
        assert point @ w[:-1] + w[-1] >= 0
        assert least - 1e-6 <= distance <= 2 * least
        assert distance == pytest.approx(np.linalg.norm(point - x))


def test_german_credit_is_in_units_of_its_training_rows():
    if find_data(paper._TRAIN) is None:
        pytest.skip(f"needs {paper._TRAIN}: set THEODOLITE_DATA")
    data = paper.german()
    assert data is not None
    assert (data.x.shape, data.test.shape, data.queries.shape) == ((800, 60), (200, 60), (21, 60))
    assert data.x.mean(axis=0) == pytest.approx(0, abs=1e-12)
    assert np.abs(data.test.mean(axis=0)).max() > 0.01
