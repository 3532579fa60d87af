import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from theodolite.core.capture import (
    ActivationError,
    CaptureError,
    Moments,
    activations,
    activations_and_gradients,
    check_finite,
    forward_nodes,
    gram,
    main_tensor,
)
from theodolite.core.errors import InputError
from theodolite.core.sections import ModuleSections, SectionError, Sections, sections_of

F64 = torch.float64


def network(seed=0, dtype=F64):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)


class Around(nn.Module):
    """A connection from the input goes around the hidden node."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + x


class Many(nn.Module):
    """Gives tuples and mappings, takes keywords, has a frozen embedding and attention over positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pair, self.last = Pair(), nn.Linear(8, 4)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, ids):
        h = self.embed(ids)
        h = h + self.attend(h, h, h)[0]
        return {"extra": None, "logits": self.last(self.pair(hidden_states=h)[0])}


class Pair(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * 2, "other"


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- capture


def test_capture_is_the_tensor_before_an_operation_in_place():
    net, x = network(), torch.randn(9, 4, dtype=F64)
    found = activations(net, x, ["input", "0", "1", "3:input", "output"])
    assert torch.equal(found["input"], x)
    assert torch.equal(found["0"], F.linear(x, net[0].weight, net[0].bias))
    assert torch.equal(found["1"], found["0"].relu())
    assert torch.equal(found["3:input"], found["1"])  # no dropout in eval mode
    assert torch.equal(found["output"], net.eval()(x))
    assert not any(value.requires_grad for value in found.values())


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), memory=st.sampled_from([1, 2000, 20_000, None]))
def test_capture_in_parts_is_capture_at_once(rows, memory):
    net, x = network(), torch.randn(rows, 4, dtype=F64)
    names = ["1", "4"]
    whole = forward_nodes(net, x, names)
    for name, part in activations(net, x, names, memory=memory).items():
        assert torch.allclose(part, whole[name], atol=1e-12)


def test_gradients_are_those_of_autograd():
    net, x = network().eval(), torch.randn(7, 4, dtype=F64)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def target(out, rows):
        return F.cross_entropy(out, y[rows], reduction="none")

    found = activations_and_gradients(net, x, ["input", "1", "4"], target, memory=4000)
    leaf = x.clone().requires_grad_()
    hidden = net[0](leaf).relu()
    last = net[4](net[3](hidden))
    loss = F.cross_entropy(net[5](last), y, reduction="none")
    wanted = torch.autograd.grad(loss.sum(), [leaf, hidden, last])
    for name, slope in zip(["input", "1", "4"], wanted, strict=True):
        assert torch.allclose(found.gradients[name], slope, atol=1e-12)
    assert torch.allclose(found.values["4"], last)
    assert torch.allclose(found.target, loss)


def test_the_model_is_as_before_even_after_an_error():
    net = network()
    net[2].eval()
    modes = [m.training for m in net.modules()]
    weights = list(net.parameters())
    before = [p.clone() for p in weights]
    x = torch.randn(5, 4, dtype=F64)
    activations_and_gradients(net, x, ["1"], lambda out, rows: out.sum(dim=1))
    with pytest.raises(ZeroDivisionError):
        activations_and_gradients(net, x, ["1"], lambda out, rows: 1 / 0)
    with pytest.raises(RuntimeError):
        activations(net, torch.randn(5, 3, dtype=F64), ["1"])
    assert [m.training for m in net.modules()] == modes
    assert hooks_of(net) == 0
    assert all(p is q for p, q in zip(net.parameters(), weights, strict=True))
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(weights, before, strict=True))


def test_replacement_at_a_node_runs_on_from_it():
    net, x = network().eval(), torch.randn(5, 4, dtype=F64)
    put = torch.randn(5, 6, dtype=F64)
    found = forward_nodes(net, x, ["output"], replace={"1": put})
    assert torch.equal(found["output"], net[3:](put))
    found = forward_nodes(net, x, ["output"], replace={"3:input": put})
    assert torch.equal(found["output"], net[3:](put))
    with pytest.raises(CaptureError, match="replacement"):
        forward_nodes(net, x, ["output"], replace={"1": put[:, :5]})
    with pytest.raises(CaptureError, match="order they run"):
        forward_nodes(net, x, ["0"], replace={"4": put[:, :5]})


def test_tuples_mappings_keywords_and_frozen_weights():
    torch.manual_seed(0)
    net, ids = Many(), torch.randint(0, 7, (3, 5))
    found = activations(net, ids, ["embed", "attend", "pair:input", "pair", "output"])
    assert torch.allclose(found["pair:input"], found["embed"] + found["attend"])
    assert torch.equal(found["pair"], found["pair:input"] * 2)
    assert found["output"].shape == (3, 5, 4)
    put = torch.randn(3, 5, 8)
    replaced = forward_nodes(net, ids, ["output"], replace={"pair": put})
    assert torch.allclose(replaced["output"], net.last(put))
    slopes = activations_and_gradients(net, ids, ["pair"], lambda out, rows: out.sum(dim=(1, 2))).gradients["pair"]
    assert torch.allclose(slopes, net.last.weight.sum(dim=0).expand(3, 5, 8))


def test_names_that_are_not_there_are_told_with_near_ones():
    net, x = network(), torch.randn(2, 4, dtype=F64)
    with pytest.raises(CaptureError, match="no module called 'hidden'"):
        activations(net, x, ["hidden"])
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared).double()
    with pytest.raises(CaptureError, match="more than once"):
        activations(twice, x, ["1", "output"])
    spare = nn.Sequential(nn.Linear(4, 4)).double()
    spare.unused = nn.Linear(4, 4)
    spare.forward = lambda x: spare[0](x)
    with pytest.raises(CaptureError, match="not reached"):
        activations(spare, x, ["unused"])
    with pytest.raises(CaptureError, match="no tensor"):
        main_tensor((1, "a"))
    with pytest.raises(InputError, match="at least one row"):
        activations(net, x[:0], ["0"])
    with pytest.raises(InputError, match="one number a row"):
        activations_and_gradients(net, x, ["0"], lambda out, rows: out)


def test_values_that_are_not_finite_are_told_with_their_row():
    values = torch.zeros(4, 3)
    values[2, 1] = torch.nan
    with pytest.raises(ActivationError, match=r"layer 7 .* row 12"):
        check_finite(values, "layer 7", 10)
    with pytest.raises(ActivationError, match="view_as_real"):
        check_finite(torch.zeros(2, 2, dtype=torch.complex64), "layer 7")


# ---- Gram matrices


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 30), width=st.integers(1, 6), cuts=st.integers(1, 5), seed=st.integers(0, 99))
def test_moments_of_parts_are_numpys(rows, width, cuts, seed):
    x = np.random.default_rng(seed).normal(3, 2, (rows, width))
    moments = Moments(width)
    for part in np.array_split(x, cuts):
        moments.add(torch.from_numpy(part))
    assert moments.count == rows
    assert np.allclose(moments.mean, x.mean(axis=0))
    assert np.allclose(moments.covariance, np.cov(x.T, bias=True).reshape(width, width))
    assert np.allclose(moments.second_moment, x.T @ x / rows)
    assert np.allclose(gram(torch.from_numpy(x), memory=300), moments.covariance)
    assert np.allclose(gram(torch.from_numpy(x), center=False), moments.second_moment)


def test_a_huge_mean_costs_no_digits():
    x = torch.randn(1000, 2, dtype=F64) * 1e-3
    moments = Moments(2)
    for part in (x + 1e4).split(100):
        moments.add(part)
    assert torch.allclose(moments.covariance, gram(x), rtol=1e-6, atol=0)


# ---- sections


def test_the_chain_of_a_module_is_the_module():
    net, x = network(), torch.randn(9, 4, dtype=F64)
    chain = sections_of(net, ["input", "1", "4"], x)
    assert chain.names == ("input", "1", "4", "output")
    nodes = chain.nodes(x)
    assert [node.shape[1] for node in nodes] == [4, 6, 5, 3]
    for layer, function in enumerate(chain.functions):
        assert torch.allclose(function(nodes[layer]), nodes[layer + 1])
        assert torch.allclose(chain.run(nodes[layer], layer), nodes[-1])
    assert sections_of(net, ["1", "5"], x).names == ("1", "5")  # the last is the output already
    plain = Sections([net[:2], net[2:5], net[5]])
    for one, other in zip(plain.nodes(x), nodes, strict=True):
        assert torch.allclose(one, other)
    assert net.training
    assert hooks_of(net) == 0


@pytest.mark.parametrize("kind", ["module", "callables"])
def test_nodes_hang_together_in_one_graph(kind):
    net, x = network().eval(), torch.randn(6, 4, dtype=F64)
    chain = sections_of(net, ["input", "1"], x) if kind == "module" else Sections([net[:2], net[2:]])
    first, middle, last = chain.nodes(x, gradients=True)
    (slope,) = torch.autograd.grad(last.sum(), [middle], retain_graph=True)
    wanted = torch.func.vmap(torch.func.jacrev(net[3:]))(middle.detach()).sum(dim=1)
    assert torch.allclose(slope, wanted)
    (slope,) = torch.autograd.grad(last.sum(), [first])
    assert torch.allclose(slope, torch.func.vmap(torch.func.jacrev(lambda r: net[3:](net[0](r).relu())))(x).sum(dim=1))
    second, third = chain.nodes(x, first=1, last=2)
    assert torch.allclose(second, middle)
    assert torch.allclose(third, last)


def test_a_connection_around_a_node_is_found():
    net, x = Around(), torch.randn(8, 3)
    with pytest.raises(SectionError, match="'output' is not a function of 'a' alone"):
        sections_of(net, ["input", "a"], x)
    assert sections_of(net, ["input"], x).names == ("input", "output")


def test_sections_that_are_random_or_mix_rows_are_refused():
    x = torch.randn(8, 3)
    with pytest.raises(SectionError, match="mixes rows"):
        Sections([lambda f: f - f.mean(dim=0)]).check(x)
    with pytest.raises(SectionError, match="random"):
        Sections([lambda f: f + torch.randn_like(f)]).check(x)
    with pytest.raises(SectionError, match="for 8 rows"):
        Sections([lambda f: f[:1]]).check(x)
    with pytest.raises(SectionError, match="positions, width"):
        Sections([lambda f: f.sum(dim=1)]).check(x)
    with pytest.raises(SectionError, match="rows have shape"):
        Sections([torch.relu]).check(x[0])
    Sections([nn.Dropout(0.5)]).check(x)  # a module is put into eval mode
    with pytest.raises(ActivationError, match="node 1"):
        Sections([lambda f: f / 0]).check(x)


def test_what_is_no_chain_is_refused():
    net, x = network(), torch.randn(4, 4, dtype=F64)
    with pytest.raises(InputError, match="at least one callable"):
        Sections([])
    with pytest.raises(InputError, match="2 nodes"):
        Sections([torch.relu], names=["a"])
    with pytest.raises(InputError, match="at least one node"):
        sections_of(net, [], x)
    with pytest.raises(InputError, match="list of names"):
        sections_of(net, "12", x)
    with pytest.raises(InputError, match="twice"):
        sections_of(net, ["1", "1"], x)
    with pytest.raises(InputError, match="at least one row"):
        sections_of(net, ["1"], x[:0])
    with pytest.raises(InputError, match="start at the embedding"):
        sections_of(Many(), ["input", "pair"], torch.randint(0, 7, (3, 5)))
    images = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(SectionError, match="positions, width"):
        sections_of(images, ["0"], torch.randn(3, 1, 4, 4))


def test_positions_and_the_residual_stream_work():
    torch.manual_seed(0)
    net, ids = Many(), torch.randint(0, 7, (3, 5))
    chain = sections_of(net, ["embed", "pair:input"], ids)
    assert isinstance(chain, ModuleSections)
    a, b, c = chain.nodes(ids, gradients=True)
    assert a.shape == b.shape == (3, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a backward pass without a batching rule would warn
        units = torch.eye(4).repeat_interleave(15, dim=0).reshape(4, 3, 5, 4)
        (slope,) = torch.autograd.grad(c, [a], units, is_grads_batched=True)
    assert slope.shape == (4, 3, 5, 8)
    assert chain.run(b.detach()[:1], 1).shape == (1, 5, 4)


def test_one_row_is_checked_against_other_surroundings():
    with pytest.raises(SectionError):
        sections_of(Around(), ["a"], torch.randn(1, 3))
    assert len(sections_of(network(), ["1"], torch.randn(1, 4, dtype=F64))) == 1
