import pytest

from quick_claims import quick_claims

TOPICS = [
    "has the sum of the scores", "function of the masked network", "five reference rows", "one reference row",
    "which rows are drawn", "in a convolutional network too", "costs about as much as a gradient", "in steps of 5 %",
    "all three plane tasks", "an ImageNet network",
]  # fmt: skip
IN_FULL = TOPICS[-2:]


@pytest.mark.slow
def test_every_claim_is_told_and_the_main_ones_hold():
    claims = quick_claims("relevance-pruning", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == IN_FULL
    assert all("--full" in claims[topic].scaled for topic in IN_FULL)
    held = [topic for topic in TOPICS if claims[topic].holds]
    assert {"function of the masked network", "five reference rows", "which rows are drawn"} <= set(held)
