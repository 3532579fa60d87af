import pytest

from quick_claims import quick_claims

TOPICS = [
    "has the sum of the scores", "function of the masked network", "five reference rows", "one reference row",
    "which rows are drawn", "in a convolutional network too", "costs about as much as a gradient", "in steps of 5 %",
    "all three plane tasks", "an ImageNet network",
]  # fmt: skip
IN_FULL = TOPICS[-2:]


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    claims = quick_claims("relevance-pruning", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == IN_FULL
    assert all("--full" in claims[topic].scaled for topic in IN_FULL)
    assert claims["has the sum of the scores"].holds
    assert claims["function of the masked network"].holds
    five, draws = claims["five reference rows"], claims["which rows are drawn"]
    assert (five.measured.n, draws.measured.n) == (3, 24)  # networks, and the draws of all of them
    assert "LRP by network" in five.scaled
