import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import interaction_basis as paper

TOPICS = [
    "uncorrelated", "do not depend on the coordinates", "deep linear network", "linear net, 6 x 8", "ReLU net, 6 x 8",
    "synchronised", "regression of 8 weights", "product w = a b", "sparser", "modules that a rotation hides",
    "few directions", "carry the network's accuracy", "MNIST",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("mnist.npz") is None or find_data("rib/mnist-mlp.safetensors") is None:
        pytest.skip("needs mnist.npz and rib/mnist-mlp.safetensors: set THEODOLITE_DATA")
    claims = quick_claims("interaction-basis", TOPICS)
    assert [topic for topic, claim in claims.items() if not claim.holds] == []


@pytest.mark.slow
def test_without_the_network_its_claim_names_the_files(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claim = paper._mnist()
    assert (claim.measured, claim.holds) == (None, None)
    assert "mnist.npz" in claim.scaled


def test_edges_are_counted_until_the_mass_is_reached():
    E = torch.tensor([[5.0, 3.0], [1.5, 0.5]])
    assert [paper._edges_for(mass, E) for mass in (0.4, 0.5, 0.8, 0.81, 0.99)] == [1, 1, 2, 3, 4]


def test_a_mixed_net_is_two_halves_once_unmixed():
    net = paper._mixed(3)
    plain = net.x @ net.rotations[0]
    assert torch.allclose(plain.std(dim=0)[:6], torch.linspace(0.5, 1.5, 6, dtype=torch.float64), rtol=0.1)
    changed = plain.clone()
    changed[:, 6:] = 0
    one, other = (net.sections[0](f @ net.rotations[0].T) @ net.rotations[1] for f in (plain, changed))
    assert torch.allclose(one[:, :6], other[:, :6])
    assert not torch.allclose(one[:, 6:], other[:, 6:])


def test_the_companion_network_is_read_in_its_order():
    W, V = torch.randn(3, 4), torch.randn(4, 2)
    net = paper._companion({"1.W": V, "0.W": W, "0.b": torch.ones(4), "1.b": torch.zeros(2)})
    x = torch.randn(5, 3)
    assert torch.allclose(net(x), (x @ W + 1).relu() @ V, atol=1e-6)
