import pytest

from quick_claims import quick_claims

TOPICS = [
    "the layer is k-means", "length 1", "online", "better clusters", "without pretraining", "end-to-end", "must stay small",
    "alive", "readable", "sentence vectors",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    claims = quick_claims("tell-clustering", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == [
        "without pretraining",
        "must stay small",
        "sentence vectors",
    ]
    for topic in ("the layer is k-means", "length 1", "online", "readable"):
        assert claims[topic].holds is True, topic
    assert claims["the layer is k-means"].measured.value == pytest.approx(1277.9285, abs=1e-3)
    assert claims["alive"].measured.value >= 9
    assert claims["better clusters"].measured.value > 0.6
    assert claims["end-to-end"].measured.value < 0.1  # the bar of 0.03 is for five times the training
    for topic in ("without pretraining", "must stay small", "sentence vectors"):
        assert "--full" in claims[topic].scaled
