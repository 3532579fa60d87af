import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import parameter_sharing as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "nothing is lost", "single precision", "does not depend on sigma", "beats pruning", "narrower dense", "to within one",
    "unbiased", "standard deviation", "scores",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("mnist.npz") is None:
        pytest.skip("needs mnist.npz: set THEODOLITE_DATA")
    claims = quick_claims("parameter-sharing", TOPICS)
    exact = ["nothing is lost", "does not depend on sigma", "to within one", "unbiased", "standard deviation", "scores"]
    assert [topic for topic in exact if not claims[topic].holds] == []
    assert claims["beats pruning"].measured.value > claims["beats pruning"].comparator.measured
    assert "--full" in claims["beats pruning"].scaled
    # one rounding may turn a ReLU, in this network and in any other
    assert claims["single precision"].measured.value < 0.1


@pytest.mark.slow
def test_without_mnist_its_claims_name_the_file(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    missing = [claim for claim in paper.claims(Scale.QUICK, 0) if claim.measured is None]
    assert len(missing) == 3
    assert all(claim.holds is None and "mnist.npz" in claim.scaled for claim in missing)


def test_networks_have_the_stated_sizes():
    net = paper.fully_connected(0)
    assert sum(p.numel() for p in net.parameters() if p.ndim == 2) == 266_200 == paper._WEIGHTS
    assert sum(p.numel() for p in net.parameters() if p.ndim == 1) == 410 == paper._BIASES


@pytest.mark.parametrize("storage", [900, 1_297, 3_072, 9_283])
def test_the_narrower_network_fits_and_a_wider_one_does_not(storage):
    sizes = paper.narrow_sizes(storage)

    def size(a, b):
        return 785 * a + (a + 1) * b + (b + 1) * 10

    assert sum(p.numel() for p in paper.fully_connected(0, sizes).parameters()) == size(*sizes[1:3]) <= storage
    assert sizes[2] == 100 or size(sizes[1], sizes[2] + 1) > storage
    assert size(sizes[1] + 1, 1) > storage


def test_the_poisson_maximum_is_its_median():
    from scipy import stats

    for mean, m in ((266.2, 1_000), (10.0, 26_620), (1.0, 266_200)):
        k = paper._poisson_maximum(mean, m)
        assert stats.poisson.cdf(k, mean) ** m >= 0.5 > stats.poisson.cdf(k - 1, mean) ** m
