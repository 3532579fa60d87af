"""A module run with other tensors: nothing of it moves, whatever stands in it twice."""

import copy

import pytest
import torch
from torch import nn

from theodolite.activations.interaction_basis.behaviour import Behaviour
from theodolite.core.errors import ModelError
from theodolite.core.functional import call_with, tensor_places
from theodolite.core.train import Recipe, train, train_ensemble
from theodolite.parameters.subspace import SubspaceModel


class Shared(nn.Module):
    """One module under two names, and a weight that another module shares."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Shared()


def test_every_place_of_a_tensor_is_known_once(net):
    assert tensor_places(net) == {"a.weight": ("a.weight", "c.weight"), "a.bias": ("a.bias",), "c.bias": ("c.bias",)}


def test_a_call_gives_what_a_copy_with_these_tensors_gives_and_moves_nothing(net):
    before = copy.deepcopy(net.state_dict())
    moved = {name: parameter + 0.1 for name, parameter in net.named_parameters()}
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(moved[name])
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(call_with(net, moved, (x,)), other(x))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.b is net.a
    assert net.c.weight is net.a.weight


def test_an_unknown_name_is_told(net):
    with pytest.raises(ModelError, match=r"b\.weight"):
        call_with(net, {"b.weight": torch.zeros(4, 4)}, (torch.randn(3, 4),))


def test_a_subspace_of_a_network_with_a_shared_module_stays_where_it_started(net):
    model = SubspaceModel(net, 5, projection="dense")
    with torch.no_grad():
        model.coordinates.normal_()
    x = torch.randn(3, 4)
    first = model(x)
    assert torch.equal(model(x), first)
    assert all(torch.equal(a, b) for a, b in zip(model.module.parameters(), net.parameters(), strict=True))
    assert torch.allclose(model.materialize()(x), first, atol=1e-6)


def test_a_behavioural_loss_of_a_shared_module_is_that_of_the_moved_network(net):
    x = torch.randn(6, 4)
    loss = Behaviour(net, x)
    moved = {name: parameter.detach() + 0.1 for name, parameter in net.named_parameters()}
    first = float(loss.loss(moved))
    assert float(loss.loss(moved)) == first > 0
    assert float(loss.loss({name: parameter.detach() for name, parameter in net.named_parameters()})) < 1e-10


def test_an_ensemble_of_networks_with_a_shared_module_trains_as_one_does(net):
    x, y = torch.randn(40, 4), torch.randint(0, 4, (40,))
    recipe = Recipe(epochs=2, batch_size=20, lr=0.05)
    alone = copy.deepcopy(net)
    train(alone, x, y, recipe=recipe)
    made = train_ensemble([copy.deepcopy(net), copy.deepcopy(net)], x, y, recipe=recipe)
    assert torch.allclose(made.scores(x)[0], alone.eval()(x), atol=1e-4)
    assert torch.allclose(made.member(1)(x), made.scores(x)[1], atol=1e-5)
