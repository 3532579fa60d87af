import numpy as np
import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.estimate import Estimate
from theodolite.core.sources import find_data
from theodolite.reproductions import intrinsic_dimension as paper
from theodolite.reproductions.claim import Claim, Scale

TOPICS = [
    "toy problem", "unit columns", "in 300 dimensions", "in 750 dimensions", "750 dimensions do for", "hashed and sparse",
    "two seeds", "convolution", "shuffled labels", "pole",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("mnist.npz") is None:
        pytest.skip("needs mnist.npz: set THEODOLITE_DATA")
    claims = quick_claims("intrinsic-dimension", TOPICS)
    assert "--full" in claims["convolution"].scaled
    assert [topic for topic, claim in claims.items() if claim.measured is None] == ["convolution"]
    for topic in (
        "toy problem",
        "unit columns",
        "in 750 dimensions",
        "750 dimensions do for",
        "two seeds",
        "shuffled labels",
    ):
        assert claims[topic].holds is True, topic


@pytest.mark.slow
def test_without_mnist_its_claims_name_the_file(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    for name in ("_toy", "_shuffled"):  # as ever without MNIST, and told above
        monkeypatch.setattr(paper, name, lambda *_: Claim("told above", "", Estimate.exact(0.0), "", True))
    claims = list(paper.claims(Scale.QUICK, 0))
    missing = [claim for claim in claims if claim.measured is None]
    assert len(missing) == 5
    assert all(claim.holds is None and "mnist.npz" in claim.scaled for claim in missing)
    pole = claims[-1]
    assert pole.measured is not None
    assert pole.holds is None
    assert "mnist.npz" in pole.scaled


def test_networks_have_the_papers_sizes():
    def size(network):
        return sum(p.numel() for p in network.parameters())

    assert [size(paper.fully_connected(0, width=width)) for width in (50, 200, 400)] == [42_310, 199_210, 478_410]
    assert size(paper.lenet(0)) == 61_706
    assert paper.lenet(0)(torch.zeros(2, 784)).shape == (2, 10)
    assert len(paper._pole_start(0)) == 562


def test_the_pole_falls_as_it_should():
    nothing = torch.zeros(3, 562)
    pushed = nothing.clone()
    pushed[:, -1] = 1.0  # the bias of "push right"
    generator = np.random.default_rng(0)
    for weights in (nothing, pushed):  # pushed always to one side, a pole falls within about ten steps
        steps = paper._balanced_steps(weights, paper._POLE_LAYERS, generator)
        assert np.all((steps >= 7) & (steps <= 11))
