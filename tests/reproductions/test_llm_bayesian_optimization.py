import pytest

from theodolite.core.sources import find_data
from theodolite.reproductions import llm_bayesian_optimization as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "recorded scores", "after 10 evaluations", "after 30 evaluations", "ahead of TPE", "published starts", "on HPOBench",
    "Branin", "decision tree on wine", "mean, deviation", "the wanted score", "135 M parameters", "too weak",
    "prompts repeat", "run live",
]  # fmt: skip
NOT_QUICK = ["135 M parameters", "too weak", "run live"]


@pytest.mark.slow
def test_every_claim_is_told():
    if find_data(paper._RUNS) is None:
        pytest.skip(f"needs {paper._RUNS}: set THEODOLITE_DATA")
    pytest.importorskip("optuna")
    from theodolite.reproductions.report import reproduce

    report = reproduce("llm-bayesian-optimization", seed=0)
    claims = {topic: claim for topic, claim in zip(TOPICS, report.claims, strict=True) if topic in claim.claim}
    assert list(claims) == TOPICS
    assert [topic for topic, claim in claims.items() if claim.measured is None] == NOT_QUICK
    for topic in (
        "recorded scores",
        "published starts",
        "on HPOBench",
        "Branin",
        "mean, deviation",
        "the wanted score",
        "prompts repeat",
    ):
        assert claims[topic].holds is True, topic


def test_the_best_of_a_few_draws_is_exact():
    from itertools import combinations

    import numpy as np

    scores = np.array([0.3, 0.9, 0.3, 0.1, 0.7])
    for k in (1, 3, 5):
        wanted = np.mean([max(part) for part in combinations(scores, k)])
        assert paper._best_of(scores, (k,))[0] == pytest.approx(wanted)


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    paper._recorded.cache_clear()
    try:
        claims = list(paper.claims(Scale.QUICK, 1))
    finally:
        paper._recorded.cache_clear()
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        assert claim.measured is not None or "THEODOLITE_DATA" in claim.scaled or "run live" in claim.claim
