import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import latent_label_shift as paper

TOPICS = [
    "beats competitive", "recovers the domains' shares", "look nothing alike", "the more the shares shift", "pen digits",
    "unique: anchor", "unique: nmf", "exactly Bayes'", "topic modelling", "stays quiet", "fires where",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    claims = quick_claims("latent-label-shift", TOPICS)
    for topic in ("unique: anchor", "unique: nmf", "exactly Bayes'", "topic modelling"):
        assert claims[topic].holds is True, topic
    assert "k-means wins" in claims["the more the shares shift"].scaled  # at alpha 10, and the claim says so
    if find_data("tables/pendigits.csv") is None:
        pytest.skip("needs tables/pendigits.csv: set THEODOLITE_DATA")
    assert claims["pen digits"].measured is not None


def test_without_data_the_claim_on_pen_digits_names_the_file(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claim = paper._pen_digits([0])
    assert (claim.measured, claim.holds) == (None, None)
    assert "tables/pendigits.csv" in claim.scaled
