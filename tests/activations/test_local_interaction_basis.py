import itertools
import json
import math
import warnings

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
from typer.testing import CliRunner

from theodolite.activations._basis import DegenerateLayerError, RankWarning
from theodolite.activations.interaction_basis import InteractionBasis, interactions
from theodolite.activations.local_interaction_basis import (
    AblationCurve,
    EvaluationModeWarning,
    LocalInteractionBasis,
    NotMonotoneWarning,
    ResolutionWarning,
    ablate_edges,
    ablate_nodes,
    ablation,
    accuracy,
    attributions,
    edges,
    edges_required,
    fourier_labels,
    interaction_graph,
    norm_halves,
)
from theodolite.cli import app
from theodolite.core.capture import ActivationError, CaptureError
from theodolite.core.curve import QualityCurve
from theodolite.core.dictionary import Dictionary, explained_variance, stability
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.sections import SectionError

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(*widths, seed=0, activation=nn.ReLU):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).double()


def fitted(net, x, nodes=("input", "1"), **options):
    return LocalInteractionBasis.from_module(net, nodes=list(nodes), **options).fit(x)


def jacobians(function, x):
    return torch.func.vmap(torch.func.jacrev(lambda row: function(row[None])[0]))(x)


def sequences(seed=0, d=5, out=3):
    """Sections over 4 positions that mix them, and rows (40, 4, d)."""
    mix = torch.softmax(normal(4, 4, seed=seed + 1), dim=1)
    W, V = normal(d, d, seed=seed + 2), normal(d, out, seed=seed + 3)
    return [lambda f: torch.tanh(torch.einsum("ts,nsd->ntd", mix, f) @ W), lambda f: torch.tanh(f @ V)], normal(
        40, 4, d
    )


# ---- the basis


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("target", ["next", "output"])
def test_it_diagonalises_both_grams(target, rotate):
    net, x = network(6, 9, 7, 3), normal(300, 6)
    basis = fitted(net, x, ("input", "1", "3"), target=target, rotate_output=rotate)
    for layer in basis.layers_[:-1]:
        off = layer.C.T @ layer.gram @ layer.C - torch.diag(layer.eigenvalues)
        assert float(off.abs().max() / layer.eigenvalues[0]) <= 1e-8
        unit = layer.C_pinv @ layer.jacobian_gram @ layer.C_pinv.T
        assert float((unit - torch.eye(layer.rank)).abs().max()) <= 1e-8
        assert bool((layer.eigenvalues.diff() <= 0).all())
    last = basis.layers_[-1]
    if rotate:
        assert torch.allclose(last.C.T @ last.gram @ last.C, torch.diag(last.eigenvalues), atol=1e-10)
        assert torch.allclose(last.C.T @ last.C, torch.eye(3, dtype=F64), atol=1e-8)
    else:
        assert torch.equal(last.C, torch.eye(3, dtype=F64))
        assert torch.allclose(last.eigenvalues, last.gram.diagonal())


def test_the_jacobian_gram_is_that_of_the_next_features():
    net, x = network(5, 8, 6, 3, activation=nn.Tanh), normal(40, 5)
    basis = fitted(net, x, ("input", "1", "3"), memory=20_000)
    nodes = [x, net[:2](x).detach(), net[:4](x).detach()]
    for number, (node, section) in enumerate(zip(nodes, [net[:2], net[2:4], net[4:]], strict=True)):
        after = basis.layers_[number + 1]
        J = jacobians(lambda f, section=section, C=after.C: section(f) @ C, node)
        assert torch.allclose(basis.layers_[number].jacobian_gram, torch.einsum("nij,nik->jk", J, J) / 40, atol=1e-10)
        plain = jacobians(section, node)
        without = torch.einsum("nij,nik->jk", plain, plain) / 40
        same = torch.allclose(basis.layers_[number].jacobian_gram, without, rtol=1e-3)
        assert same == (number == 2)  # only the last node's features are its own coordinates
    whole = fitted(net, x, ("input", "1", "3"), target="output")
    J = jacobians(net, x)
    assert torch.allclose(whole.layers_[0].jacobian_gram, torch.einsum("nij,nik->jk", J, J) / 40, atol=1e-10)


def test_a_relu_block_with_a_residual_has_its_closed_form():
    W, V, b, x = normal(6, 20, seed=1) / 3, normal(20, 6, seed=2) / 4, normal(20, seed=3), normal(50, 6)
    readout = normal(6, 4, seed=4)
    basis = LocalInteractionBasis([lambda f: f + (f @ W + b).relu() @ V, lambda f: f @ readout]).fit(x)
    A = basis.layers_[1].C @ basis.layers_[1].C.T
    fires = (x @ W + b > 0).double()
    cross = (W * fires.mean(dim=0)) @ V @ A
    closed = A + cross + cross.T + W @ ((V @ A @ V.T) * (fires.T @ fires / 50)) @ W.T
    K = basis.layers_[0].jacobian_gram
    assert float((K - closed).norm() / K.norm()) <= 1e-8


def test_over_positions_the_means_are_by_input_positions():
    sections, x = sequences()
    basis = LocalInteractionBasis(sections).fit(x)
    node = sections[0](x)
    assert torch.allclose(basis.layers_[1].gram, torch.cov(node.reshape(-1, 5).T, correction=0), atol=1e-10)
    J = jacobians(sections[1], node)  # (n, t, i, s, d)
    assert torch.allclose(basis.layers_[1].jacobian_gram, torch.einsum("ntisd,ntise->de", J, J) / 160, atol=1e-10)
    read = [lambda f: f[:, -1], lambda f: torch.tanh(f)]
    flat = LocalInteractionBasis(read).fit(x)
    C = flat.layers_[1].C
    assert torch.allclose(flat.layers_[0].jacobian_gram, C @ C.T / 4, atol=1e-10)  # 40 last positions over 160


def test_masked_positions_are_left_out():
    sections, x = sequences()
    alone = [lambda f: torch.tanh(f @ normal(5, 5, seed=9)), sections[1]]  # positions do not mix
    mask = torch.ones(40, 4, dtype=torch.bool)
    mask[::2, 2:] = False
    spoiled = x.clone()
    spoiled[~mask] = 1e3
    masked = LocalInteractionBasis(alone).fit(spoiled, mask=mask)
    rows = x[mask]
    plain = LocalInteractionBasis(alone).fit(rows)
    for one, other in zip(masked.layers_, plain.layers_, strict=True):
        assert torch.allclose(one.gram, other.gram, atol=1e-10)
        assert torch.allclose(one.jacobian_gram, other.jacobian_gram, atol=1e-10)
    assert torch.allclose(edges(masked, spoiled, 0, mask=mask), edges(plain, rows, 0), atol=1e-10)
    for wrong in (mask[:5], mask.float(), mask[:, 0], torch.zeros_like(mask)):
        with pytest.raises(InputError, match="mask"):
            LocalInteractionBasis(alone).fit(x, mask=wrong)
    with pytest.raises(InputError, match="mask"):
        LocalInteractionBasis(alone).fit([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1e-3, 1e5]), shift=st.sampled_from([0.0, -40.0]))
def test_scale_and_shift_of_a_layer_change_nothing(seed, scale, shift):
    net, x = network(4, 6, 3, seed=seed, activation=nn.Tanh), normal(60, 4, seed=seed)
    plain = LocalInteractionBasis([net[:2], net[2]]).fit(x)
    moved = LocalInteractionBasis(
        [lambda f: net[:2](f) * scale + shift * scale, lambda f: net[2](f / scale - shift)]
    ).fit(x)
    assert [layer.rank for layer in plain.layers_] == [layer.rank for layer in moved.layers_]
    assert torch.allclose(plain.layers_[1].eigenvalues, moved.layers_[1].eigenvalues, rtol=1e-5)
    one, other = edges(plain, x, 0), edges(moved, x, 0)
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-6 * float(one.max()))


def test_directions_that_the_next_layer_ignores_are_left_out():
    x, W = normal(200, 6), normal(3, 6, seed=1)
    basis = LocalInteractionBasis([lambda f: torch.tanh(f[:, :4]), lambda f: f @ W[:, :4].T]).fit(x)
    assert [layer.rank for layer in basis.layers_] == [4, 3, 3]  # 4 of 6 are read, the last map has rank 3
    assert [layer.rank for layer in basis.baseline("pca").layers_] == [6, 4, 3]
    pca = LocalInteractionBasis([torch.tanh], basis="pca").fit(x).layers_[0]
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    assert torch.allclose((vectors.flip(1) * pca.C).sum(dim=0).abs(), torch.ones(6, dtype=F64), atol=1e-8)
    assert torch.allclose(pca.eigenvalues, values.flip(0))


def test_baselines_cost_no_jacobians_and_leave_the_last_node():
    net, x = network(5, 8, 4), normal(80, 5)
    basis = fitted(net, x)
    for kind in ("pca", "neuron", "random"):
        other, direct = basis.baseline(kind), fitted(net, x, basis=kind)
        for one, two in zip(other.layers_, direct.layers_, strict=True):
            assert torch.equal(one.C, two.C)
        assert torch.equal(other.layers_[-1].C, torch.eye(4, dtype=F64))
    assert not torch.equal(basis.baseline("random").layers_[0].C, basis.baseline("pca").layers_[0].C)


def test_probes_are_unbiased():
    sections, x = sequences()
    exact = LocalInteractionBasis(sections).fit(x)
    drawn = [LocalInteractionBasis(sections, n_probes=4, seed=s).fit(x).layers_[1].jacobian_gram for s in range(40)]
    wanted = exact.layers_[1].jacobian_gram
    each = float(np.mean([(k - wanted).norm() / wanted.norm() for k in drawn]))
    assert float((torch.stack(drawn).mean(dim=0) - wanted).norm() / wanted.norm()) < 3 * each / math.sqrt(40)
    E = edges(exact, x, 0)
    some = []
    for seed in range(40):
        exact.set_params(n_probes=1, seed=seed)
        some.append(edges(exact, x, 0))
    each = float(np.mean([(e - E).norm() / E.norm() for e in some]))
    assert float((torch.stack(some).mean(dim=0) - E).norm() / E.norm()) < 3 * each / math.sqrt(40)


def test_a_layer_is_a_dictionary():
    net, x = network(5, 8, 4), normal(80, 5)
    layer = fitted(net, x).layers_[0]
    assert isinstance(layer, Dictionary)
    assert explained_variance(layer, x) == pytest.approx(1, abs=1e-9)
    assert stability(layer, layer) == pytest.approx(1)
    z = fitted(net, x).transform(x, 0)
    assert torch.allclose(fitted(net, x).inverse_transform(z, 0), x, atol=1e-8)


def test_it_keeps_scikit_learns_contract():
    basis = LocalInteractionBasis([torch.tanh], rtol=1e-9, seed=4)
    assert clone(basis).get_params()["rtol"] == 1e-9
    with pytest.raises(NotFittedError):
        basis.transform(torch.ones(2, 3))
    with pytest.raises(NotFittedError):
        basis.baseline("pca")
    assert fitted(network(3, 4, 2), normal(30, 3), dtype=torch.float32).layers_[0].C.dtype == torch.float32


# ---- edges


def test_edges_are_those_of_brute_force():
    sections, x = sequences()
    basis = LocalInteractionBasis(sections).fit(x)
    before, after = basis.layers_[0], basis.layers_[1]
    J = jacobians(sections[0], x)
    slopes = torch.einsum("ntisd,rd,ik->ntskr", J, before.C_pinv, after.C)
    A = torch.einsum("ntskr,nsr->ntkr", slopes, basis.transform(x, 0))
    E = edges(basis, x, 0)
    assert E.dtype == F64
    assert torch.allclose(E, A.square().sum(dim=(0, 1)) / 160, atol=1e-10)
    assert torch.allclose(attributions(basis, x, 0), A, atol=1e-10)
    squared_first = torch.einsum("ntskr,nsr->ntskr", slopes, basis.transform(x, 0)).square().sum(dim=(0, 1, 2)) / 160
    assert not torch.allclose(E, squared_first, rtol=0.1)
    basis.set_params(memory=30_000)
    assert torch.allclose(edges(basis, x, -3), E)


@pytest.mark.parametrize(
    ("kind", "nodes", "bar"), [("integrated", 5, 1e-3), ("integrated", 32, 1e-6), ("trapezoid", 64, 1e-3)]
)
def test_integrated_attributions_add_up(kind, nodes, bar):
    net, x = network(6, 16, 5, activation=nn.GELU), normal(60, 6)
    basis = fitted(net, x, ("input",), attribution=kind, n_quadrature=nodes)
    wanted = (net(x) - net(x.mean(dim=0))).detach()
    made = attributions(basis, x, 0)
    assert made.shape == (60, 1, 5, basis.layers_[0].rank)
    assert float((made[:, 0].sum(dim=2) - wanted).norm() / wanted.norm()) <= bar
    assert torch.allclose(edges(basis, x, 0), made[:, 0].square().mean(dim=0))
    basis.set_params(attribution="gradient")
    assert float((attributions(basis, x, 0)[:, 0].sum(dim=2) - wanted).norm() / wanted.norm()) > 0.01


def test_one_quadrature_node_is_the_slope_half_way():
    basis = LocalInteractionBasis([lambda f: f**2], attribution="integrated", n_quadrature=1)
    x = normal(30, 1)
    basis.fit(x)
    wanted = x**2 - x.mean() ** 2  # one Gauss node is exact for a straight slope
    assert torch.allclose(attributions(basis, x, 0)[:, 0, 0], wanted, atol=1e-10)


# ---- ablations


def brute_edges(net_before, net_after, basis, x, mask, layer=0):
    """The output with each next feature computed from its own inputs alone, one at a time."""
    before, after = basis.layers_[layer : layer + 2]
    z = before.transform(x)
    columns = [
        after.transform(net_before(before.inverse_transform(z * row)))[..., i] for i, row in enumerate(mask.double())
    ]
    return net_after(after.inverse_transform(torch.stack(columns, dim=-1)))


@pytest.mark.parametrize("memory", [None, 40_000])
def test_edge_ablation_recomputes_the_section(memory):
    net, x = network(6, 9, 7, 3), normal(50, 6)
    basis = fitted(net, x, ("input", "1"), memory=memory)
    E = edges(basis, x, 0)
    seen = []

    def note(out):
        seen.append(out.clone())
        return float(len(seen))

    curve = ablate_edges(basis, x, note, 0, E, [4, 17, 30])
    order = E.flatten().sort(descending=True).values
    assert curve.k == (4, 17, 30)
    for m, out in zip((4, 17, 30), seen[1:], strict=False):
        mask = order[m - 1] <= E
        wanted = brute_edges(net[:2], net[2:], basis, x, mask)
        assert torch.allclose(out, wanted, atol=1e-9)
        linearised = basis.layers_[1].inverse_transform(
            basis.transform(net[:2](x), 1).mean(dim=0) + (attributions(basis, x, 0)[:, 0] * mask).sum(dim=2)
        )
        assert not torch.allclose(net[2:](linearised), wanted, atol=1e-3)
    assert torch.allclose(seen[0], net(x))


def test_edge_ablation_over_positions():
    sections, x = sequences()
    basis = LocalInteractionBasis(sections).fit(x)
    E = edges(basis, x, 0)
    seen = []
    ablate_edges(basis, x, lambda out: seen.append(out) or 0.0, 0, E, [7])
    mask = E.flatten().sort(descending=True).values[6] <= E
    assert torch.allclose(seen[1], brute_edges(sections[0], sections[1], basis, x, mask), atol=1e-9)


def test_a_linear_section_is_known_in_closed_form_and_only_a_linear_one(monkeypatch):
    x, W, V = normal(60, 5), normal(4, 5, seed=1), normal(3, 4, seed=2)
    linear = LocalInteractionBasis([lambda f: f @ W.T + 1, lambda f: torch.tanh(f @ V.T)]).fit(x)
    E = edges(linear, x, 0)
    made = ablation._EdgeAblation(linear, x, lambda out: float(out.sum()), 0, E)
    assert made.linear is not None
    quick = made._next_features(made.rank < 6)
    made.linear = None
    assert torch.allclose(made._next_features(made.rank < 6), quick, atol=1e-9)
    nearly = LocalInteractionBasis([lambda f: f @ W.T + 1e-3 * (f[:, :1] ** 2)]).fit(x)
    assert ablation._EdgeAblation(nearly, x, lambda out: 0.0, 0, edges(nearly, x, 0)).linear is None


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), single=st.booleans())
def test_with_everything_kept_nothing_changes(seed, single):
    net, x = network(6, 8, 9, 9, seed=seed), normal(60, 6, seed=seed)
    if single:
        net.float()
        x = x.float()
    basis = fitted(net, x, ("input", "1"))
    wanted = net(x).detach()

    def off(out):
        return -float((out - wanted).abs().max())

    for layer in (0, 1):
        if any(one.rank < one.rank_gram for one in basis.layers_[layer : layer + 2]):
            continue  # a unit that never fires is left out, and may fire once it is moved
        E = edges(basis, x, layer)
        tolerance = 1e-4 if single else 1e-6
        assert ablate_edges(basis, x, off, layer, E, [E.numel()]).score[0] >= -tolerance
        assert ablate_nodes(basis, x, off, layer, [basis.layers_[layer].rank]).score[0] >= -tolerance
        assert ablate_edges(basis, x, off, layer, E, [0]).score[0] < -1e-3


def test_node_ablation_is_at_the_mean():
    net, x = network(30, 40, 3), normal(200, 30)
    basis = fitted(net, x)
    seen = []
    curve = ablate_nodes(basis, x, lambda out: seen.append(out) or float(len(seen)), 0)
    assert curve.k == (*range(1, 11), 20, 30)
    assert isinstance(curve, QualityCurve)
    assert isinstance(curve, AblationCurve)
    assert (curve.base, curve.chance, list(curve.score)) == (1.0, 2.0, [float(i) for i in range(3, 15)])
    assert torch.allclose(seen[1], net(x.mean(dim=0)).expand(200, 3))
    assert torch.allclose(seen[4], net(basis.inverse_transform(basis.transform(x, 0)[:, :3], 0)))
    assert ablate_nodes(basis, x, lambda out: 0.0, 0, [0, 2]).k == (0, 2)


def test_the_edges_of_a_separable_net_are_found_exactly():
    x = normal(300, 4)
    basis = LocalInteractionBasis([lambda f: torch.tanh(f * torch.tensor([1.0, 2, 3, 4], dtype=F64))], basis="neuron")
    basis.fit(x)
    y = torch.tanh(x * torch.tensor([1.0, 2, 3, 4], dtype=F64)).argmax(dim=1)
    assert edges_required(basis, x, accuracy(y), 0, drop=0.004) == 4
    with pytest.warns(ResolutionWarning, match="less than one"):
        assert edges_required(basis, x, accuracy(y), 0) == 4
    mixed = basis.baseline("random")
    assert edges_required(mixed, x, accuracy(y), 0, drop=0.004) > 8


def test_a_score_that_is_not_monotone_is_told(monkeypatch):
    net, x = network(4, 6, 3), normal(40, 4)
    basis = fitted(net, x)
    total = edges(basis, x, 0).numel()

    def with_scores(passes):
        monkeypatch.setattr(ablation._EdgeAblation, "score", lambda self, m: float(passes(m)))
        return edges_required(basis, x, lambda out: 1.0, 0, drop=0.5)

    assert with_scores(lambda m: m >= 7) == 7
    assert with_scores(lambda m: True) == 0
    assert with_scores(lambda m: m == total) == total
    with pytest.warns(NotMonotoneWarning, match="from 10 on"):
        assert with_scores(lambda m: m >= 10 or m == 7 or m == 6) == 10
    with pytest.raises(DataError, match="with all"):
        with_scores(lambda m: False)


def test_accuracy_is_the_share_of_right_answers():
    out = torch.tensor([[2.0, 1.0], [3.0, 1.0], [0.0, 1.0]])
    assert accuracy([0, 1, 1])(out) == pytest.approx(2 / 3)
    assert accuracy(np.array([[0, 1]]))(out[None, :2]) == 0.5
    for bad, match in (([], "no class labels"), ([0.5], "whole numbers")):
        with pytest.raises(DataError, match=match):
            accuracy(bad)
    with pytest.raises(InputError, match="one label"):
        accuracy([0, 1])(out)


# ---- graph and labels


def test_the_graph_holds_the_features_the_mean_and_the_strong_edges():
    W = torch.block_diag(normal(2, 2, seed=1), normal(2, 2, seed=2))
    x = normal(100, 4)
    basis = LocalInteractionBasis([lambda f: torch.tanh(f @ W.T), lambda f: torch.tanh(f @ W.T)], basis="neuron").fit(x)
    graph = interaction_graph(basis, x, drop=1e-6)
    means = [node for node in graph.nodes if node.feature < 0]
    assert [node.layer for node in means] == [0, 1, 2]
    assert graph.nodes[0].feature == -1
    assert len(graph.nodes) == 15
    assert graph.modules.count == 2
    frame, network_graph = graph.to_frame(), graph.to_networkx()
    assert len(frame) == len(graph.edges) == network_graph.number_of_edges()
    assert frame.within_module.all()
    assert frame.groupby("layer").share.sum().round(4).tolist() == [1.0, 1.0]
    E = edges(basis, x, 0)
    first = frame.iloc[0]
    assert first.share == pytest.approx(float(E[int(first.target), int(first.source)] / E.sum()))
    assert "node 1" in graph.plot().to_html(include_plotlyjs=False)
    few = interaction_graph(basis, x, drop=0.3)
    assert len(few.edges) < len(graph.edges)
    with pytest.raises(InputError, match="drop"):
        interaction_graph(basis, x, drop=0)


def test_frequencies_are_named():
    a, b = np.meshgrid(np.arange(13), np.arange(13), indexing="ij")
    turn = 2 * np.pi / 13
    features = np.stack(
        [
            np.cos(turn * 3 * (a + b)) + np.cos(turn * 3 * a) + np.sin(turn * 3 * b),
            2 + np.cos(turn * 5 * a),
            np.sin(turn * 4 * b) + 0.5 * np.cos(turn * 2 * (a + b)),
            np.cos(turn * (3 * a + 5 * b)),
            np.cos(turn * 2 * (a - b)),
            np.full_like(a, 7.0, dtype=float),
        ],
        axis=-1,
    )
    frame = fourier_labels(features, 13)
    assert frame[["frequency_a", "frequency_b"]].to_numpy().tolist() == [
        [3, 3],
        [5, 0],
        [0, 4],
        [3, 5],
        [2, -2],
        [0, 0],
    ]
    assert frame.power_share.to_numpy() == pytest.approx([1, 1, 0.8, 1, 1, 0])
    assert fourier_labels(torch.from_numpy(features.reshape(169, 6)), 13).equals(frame)
    even = np.cos(np.pi * np.arange(4))[:, None, None] * np.ones((4, 4, 1))
    assert fourier_labels(even, 4).to_numpy().tolist() == [[2, 0, 1]]
    both = np.cos(np.pi * np.arange(4))[:, None, None] * np.cos(np.pi * np.arange(4))[None, :, None]
    assert fourier_labels(both, 4).to_numpy().tolist() == [[2, 2, 1]]
    with pytest.raises(InputError, match="169"):
        fourier_labels(features.reshape(169, 6)[:100], 13)
    with pytest.raises(InputError, match="modulus"):
        fourier_labels(features, 1)
    with pytest.raises(DataError, match="NaN"):
        fourier_labels(np.full((4, 1), np.nan), 2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), modulus=st.integers(2, 9))
def test_power_shares_lie_between_0_and_1(seed, modulus):
    frame = fourier_labels(np.random.default_rng(seed).normal(size=(modulus**2, 3)), modulus)
    assert frame.power_share.between(0, 1 + 1e-9).all()
    assert (frame.power_share > 0).all()
    assert frame.frequency_a.between(0, modulus // 2).all()


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "last"}, "target"),
        ({"basis": "svd"}, "basis"),
        ({"attribution": "exact"}, "attribution"),
        ({"attribution": "trapezoid", "n_quadrature": 1}, "n_quadrature"),
        ({"n_probes": 0}, "n_probes"),
        ({"batch_size": 0}, "batch_size"),
        ({"rtol": 1e-15}, "rtol"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        LocalInteractionBasis([torch.tanh], **options).fit(normal(20, 3))


def test_layers_and_counts_out_of_range_are_refused():
    net, x = network(4, 6, 3), normal(40, 4)
    basis = fitted(net, x)
    E = edges(basis, x, 0)
    for call, match in (
        (lambda: edges(basis, x, 2), "beyond the last node"),
        (lambda: edges(basis, x, 5), "3 nodes"),
        (lambda: ablate_nodes(basis, x, lambda out: 0.0, 0, [5]), "ks"),
        (lambda: ablate_nodes(basis, x, lambda out: 0.0, 0, []), "ks"),
        (lambda: ablate_edges(basis, x, lambda out: 0.0, 0, E, [E.numel() + 1]), "ms"),
        (lambda: ablate_edges(basis, x, lambda out: 0.0, 0, E.T, [1]), "edges must be"),
        (lambda: ablate_edges(basis, x, lambda out: 0.0, 0, E * math.nan, [1]), "finite"),
        (lambda: edges_required(basis, x, lambda out: 0.0, 0, drop=-1), "drop"),
        (lambda: basis.baseline("svd"), "basis"),
        (lambda: basis.transform(x[:, :2], 0), "wide"),
    ):
        with pytest.raises(InputError, match=match):
            call()
    with pytest.raises(DataError, match="finite number"):
        ablate_nodes(basis, x, lambda out: math.nan, 0, [1])


def test_a_chain_that_is_none_is_refused():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x) + x

    with pytest.raises(SectionError, match="goes around"):
        fitted(Around(), normal(30, 4).float(), ("inner",))
    with pytest.raises(CaptureError, match="no module"):
        fitted(network(4, 6, 3), normal(30, 4), ("nothing",))
    with pytest.raises(DegenerateLayerError, match="dead"):
        LocalInteractionBasis([lambda f: f * 0 + 1.0, torch.tanh]).fit(normal(30, 4))
    bad = normal(30, 4)
    bad[7, 1] = math.nan
    with pytest.raises(ActivationError, match="row 7"):
        LocalInteractionBasis([torch.tanh]).fit(bad)


def test_training_mode_is_told_or_refused():
    x = normal(60, 4).float()
    torch.manual_seed(0)
    dropout = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 2)).train()
    with pytest.warns(EvaluationModeWarning, match="evaluation mode"):
        noisy = fitted(dropout, x, ("input", "2"))
    assert dropout[1].training
    dropout.eval()
    assert torch.equal(noisy.layers_[0].C, fitted(dropout, x, ("input", "2")).layers_[0].C)
    normed = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).train()
    with pytest.raises(ModelError, match="batch normalisation"):
        fitted(normed, x, ("input", "2"))
    with pytest.raises(ModelError, match="batch normalisation"):
        LocalInteractionBasis([normed[:2], normed[2:]]).fit(x)
    assert fitted(normed.eval(), x, ("input", "2")).layers_[0].rank >= 1


def test_too_many_outputs_are_refused_with_the_time_they_would_take():
    W, x = normal(4, 5000), normal(40, 4)
    sections = [lambda f: torch.tanh(f @ W).reshape(len(f), 100, 50)]
    with pytest.raises(InputError, match=r"5,000 coordinates a row.* s for 40 rows. Give n_probes"):
        LocalInteractionBasis(sections).fit(x)
    assert LocalInteractionBasis(sections, n_probes=8).fit(x).layers_[0].rank == 4


def test_fewer_rows_than_directions_are_told():
    with pytest.warns(RankWarning, match="fewer rows"):
        LocalInteractionBasis([torch.tanh]).fit(normal(5, 8))


# ---- layer norms


class RootMeanSquare(torch.nn.Module):
    """As Llama has it."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-5

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def norm_chain(norm):
    torch.manual_seed(0)
    one, two = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
    return [one, *norm_halves(norm), two], torch.nn.Sequential(one, norm, two)


@pytest.mark.parametrize("make", [torch.nn.LayerNorm, torch.nn.RMSNorm, RootMeanSquare])
@pytest.mark.parametrize("target", ["next", "output"])
def test_the_spread_of_a_norm_is_kept_apart_from_all_directions(make, target):
    norm = make(6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 6))
    sections, whole = norm_chain(norm)
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1)) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        mixed, apart = (
            LocalInteractionBasis(sections, isolate_ln_var=on, target=target).fit(x) for on in (False, True)
        )
    assert torch.allclose(apart.sections_.run(x, 0), whole(x), atol=1e-5)
    for basis, alone in ((mixed, False), (apart, True)):
        C = basis.layers_[2].C.abs() / basis.layers_[2].C.abs().amax(dim=0)
        own = (C[-1] > 1e-6) & (C[:-1].amax(dim=0) < 1e-6)
        assert int(own.sum()) == int(alone)
        assert bool((C[-1][~own] < 1e-6).all()) == alone
    layer = apart.layers_[2]
    assert torch.allclose(layer.C.T @ layer.gram @ layer.C, torch.diag(layer.eigenvalues), atol=1e-8)
    kept = ablate_nodes(apart, x, lambda out: -float((out - whole(x)).detach().abs().max()), 2, [layer.rank])
    assert kept.score[0] > -1e-5


def test_what_is_no_norm_is_not_cut_and_what_is_not_cut_is_not_isolated():
    with pytest.raises(ModelError, match="BatchNorm1d is neither"):
        norm_halves(torch.nn.BatchNorm1d(4))
    with pytest.raises(ModelError, match="neither"):
        norm_halves(torch.nn.Identity())
    with pytest.raises(InputError, match="norm_halves"):
        LocalInteractionBasis([torch.nn.Linear(3, 2)], isolate_ln_var=True).fit(torch.randn(20, 3))


def test_rows_may_come_in_any_container_and_precision():
    net, x = network(5, 8, 3).float(), normal(60, 5).float()
    wanted = fitted(net, x)
    score = accuracy(net(x).argmax(dim=1))
    E = edges(wanted, x, 0)
    for rows in (pd.DataFrame(x.numpy()), x.numpy().astype(np.float64)):
        basis = fitted(net, rows)
        assert torch.allclose(edges(basis, rows, 0), E, rtol=1e-3, atol=1e-5 * float(E.max()))
        assert attributions(basis, rows, 0).shape == attributions(wanted, x, 0).shape
        assert np.array_equal(ablate_nodes(basis, rows, score, 1).score, ablate_nodes(wanted, x, score, 1).score)
        assert ablate_edges(basis, rows, score, 0, E, [E.numel()]).score == 1.0


def test_the_global_basis_of_the_sister_method_has_edges_and_ablations_too():
    net, x = network(4, 8, 3), normal(200, 4)
    score = accuracy(net(x).argmax(dim=1))
    sister = InteractionBasis.from_module(net, ["input", "1"]).fit(x)
    same = fitted(net, x, target="output", rtol=1e-10, rotate_output=True)
    for layer in range(2):
        E = edges(sister, x, layer)
        assert torch.allclose(E, interactions(sister, x)[layer])
        assert torch.allclose(E, edges(same, x, layer), rtol=1e-6, atol=1e-9 * float(E.max()))
    assert edges_required(sister, x, score, 0, drop=0.05) == edges_required(same, x, score, 0, drop=0.05)
    assert ablate_nodes(sister, x, score, 1).name == "interaction basis features"
    assert ablate_nodes(sister.baseline("pca"), x, score, 1).name == "pca features"
    assert len(interaction_graph(sister, x).edges) > 0


def test_class_labels_may_be_a_table_column_and_names_are_refused():
    output = torch.tensor([[2.0, 1.0], [3.0, 1.0]])
    assert accuracy(pd.Series([0, 1], index=[7, 9]))(output) == 0.5
    with pytest.raises(DataError, match="whole numbers"):
        accuracy(["cat", "dog"])


def test_a_mask_that_fits_no_node_is_refused():
    x = normal(10, 5, 4)
    chain = [nn.Linear(4, 3).double()]
    with pytest.raises(InputError, match="4 positions, and no node has as many"):
        LocalInteractionBasis(chain).fit(x, mask=torch.ones(10, 4, dtype=torch.bool))
    basis = LocalInteractionBasis(chain).fit(x)
    with pytest.raises(InputError, match="no node has as many"):
        edges(basis, x, 0, mask=torch.ones(10, 6, dtype=torch.bool))


def test_whole_numbers_are_refused_before_the_network_runs():
    with pytest.raises(InputError, match="start at the embedding"):
        fitted(network(4, 8, 3), torch.ones(20, 4, dtype=torch.int64))


@pytest.mark.parametrize("given", [3, nn.Linear(2, 2)])
def test_sections_that_are_no_list_are_refused(given):
    with pytest.raises(InputError, match="list of callables"):
        LocalInteractionBasis(given).fit(normal(5, 2))


def test_the_command_compares_the_bases_it_is_asked_for(tmp_path):
    load_iris(as_frame=True).frame.to_csv(tmp_path / "iris.csv", index=False)
    flags = ["--data", str(tmp_path / "iris.csv"), "--target", "target", "--task", "classification", "--epochs", "5"]
    command = ["run", "local-interaction-basis", *flags, "--nodes", "hidden1_relu,hidden2_relu", "--against", "pca"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotMonotoneWarning)
        told = CliRunner().invoke(app, [*command, "--drop", "0.1", "--json"])
        lost = CliRunner().invoke(app, [*command[:-1], "nothing"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert {"lib", "pca"} <= set(found)
    assert "neuron" not in found
    for kind in ("lib", "pca"):
        pair = found[kind]["hidden1_relu -> hidden2_relu"]
        assert 0 <= pair["edges_required"] <= math.prod(pair["matrix"])
    assert lost.exit_code == 1
    assert "pca, neuron, random" in str(lost.exception)
