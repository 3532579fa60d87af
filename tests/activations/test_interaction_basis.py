import itertools
import json
import math
import warnings

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from theodolite.activations import _basis
from theodolite.activations.interaction_basis import (
    ActivationPrecisionWarning,
    ConvergenceWarning,
    DegenerateLayerError,
    InteractionBasis,
    RankWarning,
    behavioural_hessian,
    behavioural_loss,
    degeneracy,
    effective_parameters,
    find_modules,
    interactions,
    kept_directions_curve,
    synchronised,
    synchronised_heads,
)
from theodolite.activations.interaction_basis.effective import _split_r_hat
from theodolite.activations.interaction_basis.modules import _rewired
from theodolite.cli import app
from theodolite.core.capture import ActivationError, CaptureError
from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import peak_memory
from theodolite.core.sections import SectionError

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(*widths, seed=0, activation=nn.ReLU, bias=True):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def linear(W):
    return lambda f: f @ W.T


def low_rank_inputs(n=300):
    return normal(n, 4, seed=1) @ normal(4, 6, seed=2) + 3


# ---- the basis


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("target", ["output", "next"])
def test_it_diagonalises_both_grams(center, target):
    net, x = network(6, 9, 7, 3), low_rank_inputs()
    basis = InteractionBasis.from_module(net, ["input", "1", "3"], center=center, target=target).fit(x)
    for layer in basis.layers_:
        top = layer.eigenvalues[0]
        assert float((layer.C.T @ layer.gram @ layer.C - torch.diag(layer.eigenvalues)).abs().max() / top) <= 1e-8
        unit = layer.C_pinv @ layer.jacobian_gram @ layer.C_pinv.T
        assert float((unit - torch.eye(layer.rank)).abs().max()) <= 1e-8
        assert layer.rank <= min(layer.rank_gram, layer.rank_jacobian)
        assert bool((layer.eigenvalues.diff() <= 0).all())
        product = torch.linalg.eigvals(layer.gram @ layer.jacobian_gram).real.sort(descending=True).values
        assert torch.allclose(product[: layer.rank], layer.eigenvalues, rtol=1e-6, atol=1e-9 * float(top))
    middle = basis.layers_[1]
    for kind in ("pca", "neuron", "random"):
        other = basis.baseline(kind).layers_[1]
        top = other.eigenvalues[0]
        off = other.C.T @ other.gram @ other.C - torch.diag(other.eigenvalues)
        unit = other.C_pinv @ other.jacobian_gram @ other.C_pinv.T - torch.eye(other.rank)
        assert max(float((off / top).abs().max()), float(unit.abs().max())) > 1e-3, kind
    assert middle.rank_gram >= middle.rank


def test_the_statistics_are_those_of_brute_force():
    net, x = network(5, 8, 6, 3, activation=nn.Tanh), normal(40, 5)
    basis = InteractionBasis.from_module(net, ["input", "1", "3"], memory=20_000).fit(x)
    nodes = [x, net[:2](x), net[:4](x), net(x)]
    for layer, node, rest in zip(basis.layers_, nodes, [net, net[2:], net[4:], nn.Identity()], strict=True):
        node = node.detach()
        J = torch.func.vmap(torch.func.jacrev(lambda row, rest=rest: rest(row[None])[0]))(node)
        assert torch.allclose(layer.jacobian_gram, torch.einsum("nij,nik->jk", J, J) / 40, atol=1e-10)
        assert torch.allclose(layer.gram, torch.cov(node.T, correction=0), atol=1e-10)
        assert torch.allclose(layer.mean, node.mean(dim=0))


def test_a_deep_linear_net_is_solved_exactly():
    weights = [normal(5, 6, seed=3), normal(5, 5, seed=4), normal(3, 5, seed=5)]
    x = low_rank_inputs()
    basis = InteractionBasis([linear(W) for W in weights]).fit(x)
    whole = (weights[2] @ weights[1] @ weights[0]).numpy()
    values, vectors = np.linalg.eigh(np.cov(x.T.numpy(), bias=True))
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    oracle = np.linalg.svd(whole @ root)[1] ** 2
    for layer in basis.layers_:
        assert layer.rank == 3
        assert np.allclose(layer.eigenvalues.numpy(), oracle, rtol=1e-8)
    node = x
    for number, W in enumerate(weights):
        before, after = basis.layers_[number : number + 2]
        between = after.C.T @ W @ before.C_pinv.T
        assert torch.allclose(between.abs(), torch.eye(3, dtype=F64), atol=1e-8)
        z = basis.transform(node, number)
        node = node @ W.T
        assert torch.allclose(basis.transform(node, number + 1).abs(), z.abs(), atol=1e-8)
    for E in interactions(basis, x):
        assert torch.allclose(E, torch.diag(basis.layers_[0].eigenvalues), rtol=1e-6, atol=1e-6)


def test_it_does_not_depend_on_the_coordinates_of_the_layer():
    W0, W1, W2 = normal(5, 6, seed=3), normal(5, 5, seed=4), normal(3, 5, seed=5)
    x = low_rank_inputs()
    plain = InteractionBasis([linear(W0), lambda f: F.relu(f @ W1.T), linear(W2)]).fit(x)
    features = plain.transform(x @ W0.T, 1)
    pca = plain.baseline("pca").transform(x @ W0.T, 1)
    assert bool(plain.layers_[1].identified.all())
    drift = 0.0
    for seed in range(20):
        Q, _ = torch.linalg.qr(normal(5, 5, seed=seed))
        P, _ = torch.linalg.qr(normal(5, 5, seed=seed + 50))
        A = Q @ torch.diag(torch.logspace(0, 2, 5, dtype=F64)) @ P  # condition 100, far from orthogonal
        inverse = torch.linalg.inv(A)
        other = InteractionBasis([linear(A @ W0), lambda f, i=inverse: F.relu(f @ i.T @ W1.T), linear(W2)]).fit(x)
        moved = other.transform(x @ (A @ W0).T, 1)
        assert float((features.abs() - moved.abs()).abs().max()) <= 1e-6
        drift = max(drift, float((pca.abs() - other.baseline("pca").transform(x @ (A @ W0).T, 1).abs()).abs().max()))
    assert drift > 0.1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e5]), shift=st.sampled_from([0.0, -40.0]))
def test_scale_and_shift_of_a_layer_change_nothing(seed, scale, shift):
    net, x = network(4, 6, 3, seed=seed, activation=nn.Tanh), normal(60, 4, seed=seed)
    plain = InteractionBasis([net[:2], net[2]]).fit(x)
    moved = InteractionBasis([lambda f: net[:2](f) * scale + shift * scale, lambda f: net[2](f / scale - shift)]).fit(x)
    assert torch.allclose(plain.layers_[1].eigenvalues, moved.layers_[1].eigenvalues, rtol=1e-5)
    assert [layer.rank for layer in plain.layers_] == [layer.rank for layer in moved.layers_]


def test_going_there_and_back_keeps_what_matters():
    net, x = network(6, 9, 7, 3), low_rank_inputs()
    basis = InteractionBasis.from_module(net, ["input", "1", "3"]).fit(x)
    for number, node in enumerate([x, net[:2](x), net[:4](x)]):
        z = basis.transform(node, number)
        back = basis.inverse_transform(z, number)
        assert torch.allclose(basis.transform(back, number), z, atol=1e-8)
        out = basis.sections_.run(back, number)
        if basis.layers_[number].rank == basis.layers_[number].rank_gram:
            assert torch.allclose(back, node, atol=1e-7)
        assert torch.allclose(out.mean(dim=0), net(x).mean(dim=0), atol=0.5)
    linear_end = basis.inverse_transform(basis.transform(net[:4](x), 2), 2)
    assert torch.allclose(net[4](linear_end), net(x), atol=1e-8)  # what was left out does not reach the output
    part = basis.inverse_transform(basis.transform(net[:4](x), 2)[:, :1], 2)
    assert torch.allclose(basis.transform(part, 2)[:, 1:], torch.zeros(1, dtype=F64), atol=1e-8)
    assert np.allclose(basis.transform(x.numpy(), 0), basis.transform(x, 0))


def test_hutchinson_is_unbiased_and_auto_is_exact_up_to_256():
    net, x = network(5, 8, 300, activation=nn.Tanh), normal(100, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        exact = InteractionBasis.from_module(net, ["1"], jacobian="exact").fit(x)
        errors = []
        for probes in (4, 400):
            some = InteractionBasis.from_module(net, ["1"], n_probes=probes).fit(x)  # 300 outputs: auto draws probes
            wanted = exact.layers_[0].jacobian_gram
            errors.append(float((some.layers_[0].jacobian_gram - wanted).norm() / wanted.norm()))
        draws = torch.stack(
            [
                InteractionBasis.from_module(net, ["1"], n_probes=2, jacobian="hutchinson", seed=s)
                .fit(x)
                .layers_[0]
                .jacobian_gram
                for s in range(30)
            ]
        )
    assert errors[1] < errors[0] / 4
    assert float((draws.mean(dim=0) - wanted).norm() / wanted.norm()) < 2 * errors[0] / math.sqrt(15)


def test_output_transform_says_what_counts():
    net, x = network(5, 8, 4, activation=nn.Tanh), normal(60, 5)
    basis = InteractionBasis.from_module(net, ["1"], output_transform=lambda out: out[:, :2]).fit(x)
    assert [layer.rank for layer in basis.layers_] == [2, 2]
    whole = InteractionBasis.from_module(nn.Sequential(*net[:2], net[2]), ["1"]).fit(x)
    assert [layer.rank for layer in whole.layers_] == [4, 4]
    soft = InteractionBasis.from_module(net, ["1"], output_transform=lambda out: out.softmax(dim=1)).fit(x)
    assert soft.layers_[-1].rank == 3  # probabilities sum to 1
    with pytest.raises(InputError, match="output_transform"):
        InteractionBasis.from_module(net, ["1"], output_transform=lambda out: out.sum()).fit(x)


def test_nearly_equal_eigenvalues_are_marked():
    x = normal(4000, 3)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0))).T  # covariance exactly the identity
    basis = InteractionBasis([linear(torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=F64)))]).fit(x)
    assert basis.layers_[0].identified.tolist() == [True, False, False]
    assert basis.layers_[0].gap[0] == pytest.approx(0.75)
    lone = InteractionBasis([linear(torch.ones(1, 3, dtype=F64))]).fit(x).layers_[0]
    assert lone.gap.tolist() == [math.inf]
    assert lone.identified.tolist() == [True]


def sequence_sections():
    A, B = normal(6, 4, seed=8), normal(3, 6, seed=9)

    def mix(f):
        return torch.tanh(f @ A.T + f.mean(dim=1, keepdim=True) @ A.T)

    return [mix, lambda f: (f * torch.linspace(1, 2, f.shape[1], dtype=f.dtype)[:, None]) @ B.T]


def test_positions_are_summed_as_they_should():
    sections, x = sequence_sections(), normal(50, 5, 4)
    basis = InteractionBasis(sections, batch_size=16).fit(x)
    f1 = sections[0](x)
    J = torch.func.vmap(torch.func.jacrev(lambda f: sections[1](sections[0](f[None]))[0]))(x)  # n, t, i, s, j
    assert torch.allclose(basis.layers_[0].jacobian_gram, torch.einsum("ntisj,ntisk->jk", J, J) / 250)
    assert torch.allclose(basis.layers_[0].gram, torch.cov(x.reshape(-1, 4).T, correction=0))
    z, after, before = basis.transform(x, 0), basis.layers_[1], basis.layers_[0]
    J = torch.func.vmap(torch.func.jacrev(lambda f: sections[0](f[None])[0]))(x)
    A = torch.einsum("ntasb,ai,jb,nsj->ntij", J, after.C, before.C_pinv, z)
    E = interactions(basis, x)[0]
    assert torch.allclose(E, A.square().sum(dim=(0, 1)) / 250)
    assert basis.transform(f1, 1).shape == (50, 5, after.rank)
    rough = interactions(basis, x, n_probes=300)[0]
    assert torch.allclose(rough, E, rtol=0.3, atol=float(E.max()) * 0.02)


def test_interactions_are_gradient_times_activation_squared():
    net, x = network(4, 6, 3, activation=nn.Tanh), normal(30, 4)
    basis = InteractionBasis.from_module(net, ["input", "1"], memory=5000).fit(x)
    z, (before, after, _) = basis.transform(x, 0), basis.layers_
    J = torch.func.vmap(torch.func.jacrev(net[:2]))(x)
    wanted = torch.einsum("nab,ai,jb,nj->nij", J, after.C, before.C_pinv, z).square().mean(dim=0)
    assert torch.allclose(interactions(basis, x)[0], wanted)
    neuron = basis.baseline("neuron")
    order = [int(c.argmax()) for c in neuron.layers_[0].C.T]
    assert sorted(order) == [0, 1, 2, 3]
    wanted = (J * (x - x.mean(dim=0))[:, None]).square().mean(dim=0)
    rows = [int(c.argmax()) for c in neuron.layers_[1].C.T]
    assert torch.allclose(interactions(neuron, x)[0], wanted[rows][:, order])


def test_the_curve_of_kept_directions_ends_at_the_network():
    net, x = network(6, 9, 7, 3), low_rank_inputs()
    wanted = net(x).detach()

    def score(out):
        return 1 - float((out - wanted).square().mean() / (wanted - wanted.mean(dim=0)).square().mean())

    basis = InteractionBasis.from_module(net, ["input", "1", "3"]).fit(x)
    curve = kept_directions_curve(basis, x, score, 2)
    assert curve.reference == 1.0
    assert curve.dimensions == (1, 2, 3)
    assert curve.runs[-1, 0] == pytest.approx(1, abs=1e-8)
    assert curve.chance == pytest.approx(0, abs=1e-8)
    assert curve.total_dimension == 7
    pca = kept_directions_curve(basis.baseline("pca"), x, score, 2, [1, 2, 3])
    assert (curve.mean >= pca.mean - 1e-9).all()
    with pytest.raises(InputError, match=r"1 \.\. 3"):
        kept_directions_curve(basis, x, score, 2, [4])


def test_it_is_an_estimator_and_float32_features_are_float32():
    net, x = network(4, 6, 3), normal(50, 4)
    basis = InteractionBasis.from_module(net, ["1"], rtol=1e-8)
    assert basis.get_params()["rtol"] == 1e-8
    assert clone(basis).get_params()["rtol"] == 1e-8
    basis.set_params(dtype=torch.float32).fit(x)
    assert basis.transform(net[:2](x)).dtype == torch.float32
    assert basis.layers_[0].gram.dtype == F64
    single = InteractionBasis.from_module(net.float(), ["1"]).fit(x.float())
    assert torch.allclose(single.layers_[0].eigenvalues.float(), basis.layers_[0].eigenvalues, rtol=1e-4)
    assert single.transform(net[:2](x.float())).dtype == F64
    assert "rtol=1e-08" in repr(basis)


def test_memory_stays_within_the_budget():
    net = network(64, 256, 256, 100).float()
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    InteractionBasis.from_module(net, ["input", "1", "3"]).fit(x[:400])  # libraries take their own memory first
    with peak_memory() as used:
        InteractionBasis.from_module(net, ["input", "1", "3"], memory=16 << 20, batch_size=3000).fit(x)
    whole = 3000 * 100 * (64 + 256 + 256) * 4  # all Jacobians at once: 690 MB
    assert (used.bytes or 0) < whole / 8


# ---- errors of the basis


def test_settings_that_mean_nothing_are_refused():
    x = normal(20, 4)
    for options, match in [
        ({"rtol": 0.0}, "rounding"), ({"rtol": 1e-15}, "rounding"), ({"target": "loss"}, "target"),
        ({"jacobian": "fast"}, "jacobian"), ({"n_probes": 0}, "n_probes"), ({"batch_size": 0}, "batch_size"),
        ({"dtype": torch.float16}, "dtype"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=match):
            InteractionBasis([nn.Linear(4, 2).double()], **options).fit(x)
    basis = InteractionBasis([nn.Linear(4, 2).double()])
    with pytest.raises(NotFittedError):
        basis.transform(x)
    basis.fit(x)
    with pytest.raises(InputError, match="4 wide"):
        basis.transform(x[:, :3], 0)
    with pytest.raises(InputError, match="2 features"):
        basis.inverse_transform(x, 0)
    with pytest.raises(InputError, match="2 nodes"):
        basis.transform(x, 2)
    with pytest.raises(InputError, match="no baseline"):
        basis.baseline("ica")
    with pytest.raises(InputError, match="at least one row"):
        basis.fit(x[:0])


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x)) + x


def test_broken_input_is_told_before_long_work():
    net, x = network(4, 6, 3), normal(40, 4)
    with pytest.raises(SectionError, match="'a'"):
        InteractionBasis.from_module(Skip().double(), ["input", "a"]).fit(normal(10, 3))
    bad = x.clone()
    bad[33, 1] = math.inf
    with pytest.raises(ActivationError, match="input holds NaN or infinite values, first in row 33"):
        InteractionBasis.from_module(net, ["input", "1"]).fit(bad)
    with pytest.raises(InputError, match="embedding"):
        InteractionBasis([nn.Linear(4, 2)]).fit(torch.arange(8).reshape(2, 4))
    with pytest.raises(ActivationError, match="view_as_real"):
        InteractionBasis([lambda f: f * 2]).fit(x.to(torch.complex128))
    with pytest.warns(RankWarning, match=r"input \(3 rows, 4 wide\)"):
        InteractionBasis.from_module(net, ["input", "1"]).fit(x[:3])
    with pytest.warns(ActivationPrecisionWarning, match="half precision"):
        InteractionBasis.from_module(net.bfloat16(), ["1"], rtol=1e-6).fit(x.bfloat16())
    with pytest.raises(ActivationError, match="Jacobian of the output by node 0"):
        InteractionBasis([lambda f: f.abs().sqrt()]).fit(x.index_fill(0, torch.tensor([7]), 0))
    with pytest.raises(CaptureError, match="no module called"):
        InteractionBasis.from_module(net, ["hidden"]).fit(x)


def test_dead_layers_are_told():
    x = normal(40, 4)
    with pytest.raises(DegenerateLayerError, match="node 1 is dead: its activations"):
        InteractionBasis([lambda f: F.relu(f - 99), linear(torch.ones(2, 4, dtype=F64))]).fit(x)
    with pytest.raises(DegenerateLayerError, match="node 0 is dead: the output does not depend"):
        InteractionBasis([lambda f: F.relu(f - 99) + normal(40, 4)[: len(f)]]).fit(x)
    x[:, 1:] = 0
    with pytest.raises(DegenerateLayerError, match="node 0 is dead: no direction"):
        InteractionBasis([lambda f: f[:, :1].round() + f[:, 1:2]]).fit(x)  # steps have no slope
    with pytest.raises(DegenerateLayerError, match="node 0 is dead: its activations are 0"):
        InteractionBasis([lambda f: f + 1], center=False).fit(x * 0)


# ---- behavioural loss


def test_the_behavioural_loss_is_zero_here_and_its_hessian_is_autograds():
    net, x = network(3, 4, 2, activation=nn.Tanh), normal(25, 3)
    loss = behavioural_loss(net, x)
    params = {name: p.detach() for name, p in net.named_parameters()}
    assert float(loss(params)) == 0
    names = list(params)
    sizes = [p.numel() for p in params.values()]

    def of(vector):
        pieces = vector.split(sizes)
        return loss({n: piece.view(params[n].shape) for n, piece in zip(names, pieces, strict=True)})

    start = torch.cat([p.reshape(-1) for p in params.values()])
    wanted = torch.autograd.functional.hessian(of, start)
    assert torch.allclose(behavioural_hessian(net, x), wanted, atol=1e-10)
    assert torch.allclose(behavioural_hessian(net, x, memory=3000), wanted, atol=1e-10)
    part = behavioural_hessian(net, x, ["2.bias", "0.bias"])
    assert torch.allclose(part[:2, :2], wanted[-2:, -2:])
    assert torch.allclose(part[2:, 2:], wanted[12:16, 12:16])
    moved = start + normal(len(start))
    by_hand = (
        torch.func.functional_call(net, dict(zip(names, _split(moved, params), strict=True)), (x,)) - net(x)
    ).square()
    assert float(of(moved)) == pytest.approx(float(by_hand.sum(dim=1).mean().detach()))
    with pytest.raises(InputError, match=r"no parameters called 1\.weight"):
        behavioural_hessian(net, x, ["1.weight"])
    with pytest.raises(InputError, match="GiB"):
        behavioural_hessian(nn.Linear(1000, 10), torch.zeros(2, 1000))


def _split(vector, params):
    return [p.view(q.shape) for p, q in zip(vector.split([q.numel() for q in params.values()]), params.values())]


# ---- degeneracy


def test_free_directions_of_a_linear_net_are_exact():
    """Hessian block of a 6 x 8 layer: 2 K ⊗ G, and its rank r_K r_G."""
    torch.manual_seed(0)
    first, middle, last = nn.Linear(5, 8, bias=False), nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        last.weight[3] = last.weight[0]  # a duplicated output row: rank 3
    net = nn.Sequential(first, middle, last).double()
    x = normal(100, 3) @ normal(3, 5, seed=1)
    H = behavioural_hessian(net, x, ["1.weight"])
    f = first(x)
    G, K = f.T @ f / 100, last.weight.T @ last.weight
    assert torch.allclose(H, 2 * torch.kron(K, G), atol=1e-10)
    brute = torch.autograd.functional.hessian(
        lambda w: behavioural_loss(net, x)({"1.weight": w}), middle.weight.detach()
    )
    assert torch.allclose(H, brute.reshape(48, 48), atol=1e-10)
    row = degeneracy(net, x, layers=["1"]).rows[0]
    assert (row.rank_gram, row.rank_jacobian) == (3, 3)
    assert row.free_directions == 48 - 9 == 48 - int(torch.linalg.matrix_rank(H, hermitian=True, rtol=1e-10))


def test_free_directions_of_a_relu_net_are_a_lower_bound():
    net, x = network(5, 8, 6, 4, bias=False), normal(100, 3) @ normal(3, 5, seed=1)
    with torch.no_grad():
        net[4].weight[3] = net[4].weight[0]
    for name in ("0", "2", "4"):
        H = behavioural_hessian(net, x, [f"{name}.weight"])
        (row,) = degeneracy(net, x, layers=[name]).rows
        rank = int(torch.linalg.matrix_rank(H, hermitian=True, rtol=1e-10))
        assert rank <= row.rank_gram * row.rank_jacobian == row.parameters - row.free_directions
    assert degeneracy(net, x).rows[0].rank_gram == 3


def test_a_trained_bias_is_a_column_more():
    net, x = network(3, 4, 2), normal(50, 3)
    with_bias = degeneracy(net, x)
    assert [row.parameters for row in with_bias.rows] == [16, 10]
    assert with_bias.rows[0].rank_gram == 4
    H = behavioural_hessian(net, x, ["2.weight", "2.bias"])
    assert int(torch.linalg.matrix_rank(H, hermitian=True)) == 10 - with_bias.rows[1].free_directions
    net[0].bias.requires_grad_(False)
    assert degeneracy(net, x).rows[0].parameters == 12
    assert with_bias.parameters == 26
    assert with_bias.free_directions == sum(row.free_directions for row in with_bias.rows)


def planted(x):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).double()
    groups = [(0, 7), (3, 12, 20), (5, 6, 9, 25, 31)]
    with torch.no_grad():
        for group in groups:
            for unit in group[1:]:
                scale = torch.rand(()) + 0.5
                net[0].weight[unit] = net[0].weight[group[0]] * scale
                net[0].bias[unit] = net[0].bias[group[0]] * scale
        net[0].bias[[14, 28]] = -100
        net[0].bias[30] = 100
    return net, groups


def test_planted_synchronised_units_are_found_exactly():
    x = normal(3000, 6)
    net, groups = planted(x)
    row = degeneracy(net, x).rows[0]
    assert list(row.sync_groups) == groups
    assert row.sync_extra == 2 + 6 + 20
    assert (row.dead, row.dead_units) == (2, (14, 28))
    assert (row.always_on, row.always_on_units) == (1, (30,))
    bits = net[0](x) > 0
    brute = {
        tuple(j for j in range(32) if torch.equal(bits[:, i], bits[:, j])) for i in range(32)
        if bits[:, i].any() and not bits[:, i].all()
    }  # fmt: skip
    assert set(synchronised(bits)) == {group for group in brute if len(group) > 1}


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 8), seed=st.integers(0, 999))
def test_synchronised_is_pairwise_comparison(n, d, seed):
    bits = torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) > 0.5
    groups = synchronised(bits)
    member = {unit: group for group in groups for unit in group}
    for i in range(d):
        for j in range(i):
            live = bits[:, i].any() and not bits[:, i].all()
            same = torch.equal(bits[:, i], bits[:, j]) and live
            assert same == (i in member and member[i] is member.get(j))


def test_heads_with_one_pattern_are_grouped():
    attention = torch.softmax(torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    attention[:, 3] = attention[:, 1]
    assert synchronised_heads(attention) == [(1, 3)]
    assert synchronised_heads(attention, tol=1.0) == [(0, 1, 2, 3, 4)]
    with pytest.raises(InputError, match="tol >= 0"):
        synchronised_heads(attention, tol=-1.0)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.spare = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        return self.c(F.gelu(self.b(torch.relu(self.a(x)))) * 2)


def test_activations_are_seen_as_modules_and_functions():
    x = normal(30, 4).float()
    report = degeneracy(Functional(), x, batch_size=7)
    assert [(row.name, row.activation) for row in report.rows] == [("a", "relu"), ("b", "gelu"), ("c", "")]
    assert any("gelu is not ReLU" in note for note in report.notes)
    plain = degeneracy(network(3, 4, 2, activation=nn.Identity), normal(30, 3))
    assert plain.rows[0].sync_groups == ()
    assert any("no activation function directly after 0" in note for note in plain.notes)
    frame = report.to_frame()
    assert list(frame["name"]) == ["a", "b", "c"]
    assert "free_directions" in frame.columns


def test_what_degeneracy_cannot_count_is_told():
    net, x = network(3, 4, 2), normal(30, 3)
    with pytest.raises(CaptureError, match=r"'?spare'? is no nn.Linear that runs"):
        degeneracy(Functional(), torch.ones(2, 4), layers=["spare"])
    with pytest.raises(CaptureError, match="none"):
        degeneracy(nn.ReLU(), x)
    with pytest.raises(InputError, match="rounding"):
        degeneracy(net, x, rtol=0)
    with pytest.raises(InputError, match="at least one row"):
        degeneracy(net, x[:0])
    with pytest.raises(ActivationError, match="row 4"):
        degeneracy(net, x.index_fill(0, torch.tensor([4]), math.nan))
    with pytest.raises(InputError, match="booleans"):
        synchronised(torch.ones(3, 3))
    assert any("fewer rows" in note for note in degeneracy(net, x[:2]).notes)
    wide = degeneracy(network(3, 4, 300), x, n_probes=8)
    assert any("8 random output vectors" in note for note in wide.notes)
    assert not net[0]._forward_hooks


def test_positions_and_patterns_above_a_tolerance():
    net, x = network(3, 4, 2), normal(30, 5, 3)
    flat, deep = degeneracy(net, x.reshape(-1, 3)), degeneracy(net, x)
    assert [row.rank_gram for row in flat.rows] == [row.rank_gram for row in deep.rows]
    assert degeneracy(net, x, atol_pattern=100).rows[0].dead == 4


# ---- effective parameters


def test_effective_parameters_of_a_regression():
    torch.manual_seed(0)
    net, x = nn.Linear(8, 1, bias=False), normal(10_000, 8).float()
    with torch.no_grad():
        net.weight.fill_(1.0)
    exact = effective_parameters(net, x, eps=[1e-4, 1e-2])
    assert exact.per_eps == {1e-4: 8.0, 1e-2: 8.0}
    assert exact.parameters == 8
    sampled = effective_parameters(net, x, eps=None, method="sgld")
    assert abs(sampled.value - 8) <= 1.2
    assert sampled.diagnostics["converged"]
    assert sampled.diagnostics["r_hat"] <= 1.1
    assert sampled.diagnostics["trace"].shape == (4, 800)
    volume = effective_parameters(net, x[:300], eps=2.0, method="volume")
    assert abs(volume.value - 8) <= 1.2
    assert volume.diagnostics["standard_error"][2.0] < 0.5
    again = effective_parameters(net, x[:300], eps=2.0, method="volume")
    assert again.value == volume.value


class Product(nn.Module):
    """y = a b x."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.a * self.b * x


def test_effective_parameters_of_a_product_are_fewer_than_its_parameters():
    net, x = Product(), normal(10_000, 1).float()
    found = {
        "hessian": effective_parameters(net, x, eps=1e-3),
        "sgld": effective_parameters(net, x, eps=None, method="sgld"),
        "volume": effective_parameters(net, x[:200], eps=1e-3, method="volume"),
    }
    assert all(one.value < 2 for one in found.values())
    assert found["hessian"].value == 1
    assert found["volume"].value == pytest.approx(1, abs=0.1)
    assert abs(found["sgld"].value / found["volume"].value - 1) <= 0.2


def test_r_hat_tells_chains_that_agree():
    good = normal(4, 400)
    assert _split_r_hat(good) < 1.02
    assert _split_r_hat(good + torch.arange(4.0)[:, None]) > 1.5
    assert _split_r_hat(good + torch.linspace(0, 5, 400)) > 1.3  # a drift within the chains
    assert _split_r_hat(torch.ones(4, 10, dtype=F64)) == 1
    assert _split_r_hat(torch.arange(4.0, dtype=F64)[:, None].repeat(1, 10)) == math.inf


def test_a_sampler_that_does_not_settle_says_so():
    net, x = nn.Linear(8, 1, bias=False), normal(2000, 8).float()
    with pytest.warns(ConvergenceWarning, match="do not agree"):
        effective_parameters(net, x, eps=None, method="sgld", step=1e-9, burn_in=1, draws=40)
    with pytest.raises(InputError, match="smaller step"):
        effective_parameters(net, x * 1e4, eps=None, method="sgld", step=1.0)
    rough = effective_parameters(net, x, eps=None, method="sgld", batch_size=500, localisation=1.0)
    assert abs(rough.value - 8) < 2


def test_settings_of_effective_parameters_are_checked():
    net, x = network(3, 4, 2), normal(50, 3)
    for options, match in [
        ({"eps": 1.0, "method": "fisher"}, "method"), ({"eps": -1.0}, "eps"), ({"eps": None}, "eps"),
        ({"eps": []}, "eps"), ({"eps": 1.0, "radius": 0.0}, "radius"), ({"eps": 1.0, "method": "volume"}, "at most 12"),
        ({"eps": None, "method": "sgld", "chains": 1}, "two chains"), ({"eps": 1.0, "params": ["x"]}, "no parameters"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=match):
            effective_parameters(net, x, **options)
    with pytest.raises(InputError, match="take eps >="):
        effective_parameters(net, x, eps=1e-9, params=["2.weight"], method="volume", samples=10_000)
    with pytest.raises(InputError, match="at least 3 rows"):
        effective_parameters(net, x[:2], eps=None, method="sgld")


# ---- modules


def blocks(cross=0.0, seed=0):
    rng = np.random.default_rng(seed)
    edges = []
    for _ in range(2):
        E = rng.uniform(1, 10, (8, 8))
        E[:4, 4:] = E[4:, :4] = cross
        edges.append(torch.from_numpy(E))
    return edges


def test_two_planted_modules_are_found():
    found = find_modules(blocks(cross=1e-3), eps=1e-2)
    assert [part.tolist() for part in found.labels] == [[0] * 4 + [1] * 4] * 3
    assert found.count == 2
    assert found.q == pytest.approx(0.5, abs=0.01)
    assert len(found.q_null) == 20
    assert found.q > max(found.q_null)
    again = find_modules(blocks(cross=1e-3), eps=1e-2)
    assert again.q_null == found.q_null


def test_the_default_eps_drops_a_thousandth_of_the_interaction():
    E = torch.tensor([[100.0, 0.05], [0.01, 100.0]])
    found = find_modules([E])
    assert found.eps == pytest.approx(100.0)
    assert [part.tolist() for part in found.labels] == [[0, 1], [0, 1]]
    whole = find_modules([torch.ones(3, 3)])
    assert whole.eps < 1


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), share=st.floats(0.1, 1), seed=st.integers(0, 99))
def test_rewiring_keeps_degrees_and_weights(rows, columns, share, seed):
    rng = np.random.default_rng(seed)
    w = rng.uniform(1, 2, (rows, columns)) * (rng.random((rows, columns)) < share)
    new = _rewired(w, np.random.default_rng(seed))
    assert ((new > 0).sum(axis=0) == (w > 0).sum(axis=0)).all()
    assert ((new > 0).sum(axis=1) == (w > 0).sum(axis=1)).all()
    assert np.allclose(np.sort(new[new > 0]), np.sort(w[w > 0]))


def test_q_is_networkxs_modularity_of_log_edges():
    edges = blocks(cross=0.5, seed=3)
    found = find_modules(edges, eps=0.1)
    graph = nx.Graph()
    for layer, E in enumerate(edges):
        for i in range(8):
            for j in range(8):
                graph.add_edge((layer, j), (layer + 1, i), weight=max(0, math.log10(float(E[i, j]) / 0.1)))
    parts = {}
    for layer, labels in enumerate(found.labels):
        for unit, label in enumerate(labels):
            parts.setdefault(int(label), set()).add((layer, unit))
    assert found.q == pytest.approx(nx.community.modularity(graph, parts.values()))


def test_graphs_that_cannot_be_clustered_are_refused():
    for edges, match in [([], "neighbouring"), ([torch.ones(3, 2), torch.ones(2, 2)], "neighbouring")]:
        with pytest.raises(InputError, match=match):
            find_modules(edges)
    with pytest.raises(InputError, match=">= 0"):
        find_modules([-torch.ones(2, 2)])
    with pytest.raises(InputError, match="eps"):
        find_modules([torch.ones(2, 2)], eps=0.0)
    with pytest.raises(InputError, match="resolution"):
        find_modules([torch.ones(2, 2)], resolution=0.0)
    with pytest.raises(DataError, match="smaller eps"):
        find_modules([torch.ones(2, 2)], eps=2.0)
    with pytest.raises(DataError, match="all interactions are 0"):
        find_modules([torch.zeros(2, 2)])


def test_ranks_count_what_exceeds_the_tolerance():
    assert _basis.effective_rank(torch.tensor([0.0, -1e-20], dtype=F64), 1e-10) == 0
    assert _basis.effective_rank(torch.tensor([1e-30, 1e-33], dtype=F64), 1e-10) == 2


# ---- a decoder


@pytest.fixture(scope="module")
def decoder():
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'theodolite[language]'")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_the_residual_stream_of_a_decoder_is_a_chain(decoder):
    ids = torch.randint(1, 30, (40, 6), generator=torch.Generator().manual_seed(0))
    nodes = ["model.embed_tokens", "model.layers.0", "model.layers.2"]
    basis = InteractionBasis.from_module(decoder, nodes, output_transform=lambda out: out[:, -1, :5]).fit(ids)
    assert [layer.width for layer in basis.layers_] == [16, 16, 16, 30]
    assert basis.layers_[1].rank == 16
    assert basis.layers_[3].rank == 5  # of 30 outputs, those that are read
    hidden = decoder(ids, output_hidden_states=True).hidden_states[1].detach()
    z = basis.transform(hidden, 1)
    assert z.shape == (40, 6, 16)
    out = basis.sections_.run(basis.inverse_transform(z, 1).float(), 1)
    assert torch.allclose(out, decoder(ids).logits, atol=1e-4)
    E = interactions(basis, ids, n_probes=2)
    assert [tuple(e.shape) for e in E] == [(16, 16), (16, 16), (5, 16)]
    with pytest.raises(SectionError, match=r"'model\.layers\.0\.mlp' alone"):
        InteractionBasis.from_module(decoder, ["model.layers.0.mlp", "model.layers.1"]).fit(ids)
    report = degeneracy(
        decoder, ids, layers=["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"], n_probes=4
    )
    assert [row.activation for row in report.rows] == ["", "silu"]


def tables(x):
    """One array of float32 rows in the containers and precisions that people have them in."""
    closed = x.numpy().copy()
    closed.flags.writeable = False
    return [pd.DataFrame(x.numpy()), x.numpy().astype(np.float64), x.tolist(), closed]


def test_rows_may_come_in_any_container_and_precision():
    net, x = network(5, 8, 3).float(), normal(60, 5).float()
    chain = [net[:2], net[2]]
    frame = degeneracy(net, x).to_frame()
    hessian = behavioural_hessian(net, x, ["2.bias"])
    for rows in tables(x):
        for made in (InteractionBasis(chain), InteractionBasis.from_module(net, ["input", "1"])):
            wanted, basis = clone(made).fit(x), made.fit(rows)
            E = interactions(wanted, x)[0]  # a table lies in memory the other way round: rounding differs in float32
            assert torch.allclose(interactions(basis, rows)[0], E, rtol=1e-3, atol=1e-5 * float(E.max()))
        assert degeneracy(net, rows).to_frame().equals(frame)
        assert torch.allclose(behavioural_hessian(net, rows, "2.bias"), hessian)
    with pytest.raises(InputError, match="one array of numbers"):
        InteractionBasis(chain).fit([[1.0, 2.0], [1.0]])
    with pytest.raises(InputError, match="one array of numbers"):
        InteractionBasis(chain).fit(pd.DataFrame({"a": ["x", "y"]}))


def test_a_layer_may_be_named_without_a_list():
    net, x = network(5, 8, 3), normal(30, 5)
    assert [row.name for row in degeneracy(net, x, layers="2").rows] == ["2"]


def test_the_command_names_the_layers_as_they_are(tmp_path):
    load_iris(as_frame=True).frame.to_csv(tmp_path / "iris.csv", index=False)
    flags = ["--data", str(tmp_path / "iris.csv"), "--target", "target", "--task", "classification", "--epochs", "5"]
    command = ["run", "interaction-basis", *flags, "--nodes", "hidden1_relu, hidden2_relu"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "hidden1_relu" in told.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert list(found["layers"]) == ["hidden1_relu", "hidden2_relu", "output"]
    last = found["layers"]["output"]
    assert last["width"] == 3 >= last["directions"] == len(last["eigenvalues"])
    assert 0 <= found["free_directions"] < found["weights_of_linear_layers"]
    lost = CliRunner().invoke(app, ["run", "interaction-basis", *flags, "--nodes", "nowhere"])
    assert lost.exit_code == 1
    assert "hidden1_relu" in str(lost.exception)
