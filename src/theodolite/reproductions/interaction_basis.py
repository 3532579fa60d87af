"""Claims of Bushnaq et al., 2024, arXiv:2405.10927, on nets whose degeneracy is known and on networks of digits.

The paper is a theory without experiments: "none given" stands where it has no number, and the thresholds say what its
theorems and conjectures come to on such nets.
"""

__all__ = ["claims"]

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from theodolite.activations.interaction_basis import (
    InteractionBasis,
    LayerBasis,
    behavioural_hessian,
    behavioural_loss,
    degeneracy,
    effective_parameters,
    find_modules,
    interactions,
    kept_directions_curve,
    synchronised,
)
from theodolite.core.estimate import Estimate, mean_of_runs, proportion
from theodolite.core.parallel import seeds_for
from theodolite.core.sources import find_data
from theodolite.core.train import Recipe, accuracy, train
from theodolite.reproductions.claim import Claim, Comparator, Scale

Section = Callable[[Tensor], Tensor]
_F64 = torch.float64
_BASES = ("interaction basis", "pca", "neuron")


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; full takes more two-module nets and more digits networks."""
    yield _diagonal(seed)
    yield _invariance(seed)
    yield _deep_linear(seed)
    yield from _counted(seed)
    yield _synchronised(seed)
    yield from _effective(seed)
    yield from _two_modules(scale, seed)
    yield from _digits(scale, seed)
    yield _mnist()


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=_F64)


def _linear(W: Tensor) -> Section:
    return lambda f: f @ W.T


def _relu_net(seed: int, *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


# ---- identities


def _errors(layer: LayerBasis) -> tuple[float, float]:
    """How far C^T G C is from diagonal and C^+ K C^+T from the identity, the first relative to its largest entry."""
    gram = layer.C.T @ layer.gram @ layer.C
    unit = layer.C_pinv @ layer.jacobian_gram @ layer.C_pinv.T - torch.eye(layer.rank, dtype=_F64)
    top = layer.eigenvalues.max()
    return float((gram - torch.diag(layer.eigenvalues)).abs().max() / top), float(unit.abs().max())


def _diagonal(seed: int) -> Claim:
    net, x = _relu_net(seed, 12, 24, 16, 6), _normal(seed + 1, 500, 9) @ _normal(seed + 2, 9, 12)
    basis = InteractionBasis.from_module(net, ["input", "1", "3"]).fit(x)
    worst = max(max(_errors(layer)) for layer in basis.layers_)
    others = {
        kind: min(max(_errors(layer)) for layer in basis.baseline(kind).layers_[:-1])
        for kind in ("pca", "neuron", "random")
    }
    return Claim(
        "features are uncorrelated and so are their Jacobians: C^T G C = Lambda and C+ K C+^T = 1 on every layer",
        "identity (definition)", Estimate.exact(worst, "largest error"),
        "<= 1e-8, and no baseline satisfies both", worst <= 1e-8 and min(others.values()) > 1e-3,
        Comparator("best layer of PCA, neurons, random rotation", min(others.values())),
        "a random ReLU net 12-24-16-6 on 500 inputs of rank 9",
    )  # fmt: skip


def _invariance(seed: int) -> Claim:
    W0, W1, W2 = _normal(seed, 5, 6), _normal(seed + 1, 5, 5), _normal(seed + 2, 3, 5)
    x = _normal(seed + 3, 400, 4) @ _normal(seed + 4, 4, 6)
    plain = InteractionBasis([_linear(W0), _linear(W1), _linear(W2)]).fit(x)
    features = plain.transform(x @ W0.T, 1).abs()
    pca = plain.baseline("pca").transform(x @ W0.T, 1).abs()
    moved, drifts = [], []
    for i in range(20):
        left, right = (torch.linalg.qr(_normal(seed + 100 + 2 * i + j, 5, 5)).Q for j in (0, 1))
        A = left @ torch.diag(torch.logspace(0, 2, 5, dtype=_F64)) @ right
        h = x @ (A @ W0).T
        other = InteractionBasis([_linear(A @ W0), _linear(W1 @ torch.linalg.inv(A)), _linear(W2)]).fit(x)
        moved.append(float((features - other.transform(h, 1).abs()).abs().max()))
        drifts.append(float((pca - other.baseline("pca").transform(h, 1).abs()).abs().max()))
    return Claim(
        "features do not depend on the coordinates a layer is written in (f -> A f, next weights W A^-1)",
        "invariant up to sign", Estimate.exact(max(moved), "largest change of |feature|"),
        "<= 1e-6 over 20 matrices A of condition 100; PCA moves by > 0.1", max(moved) <= 1e-6 and min(drifts) > 0.1,
        Comparator("PCA, smallest over A", min(drifts)), "random linear net 6-5-5-3, 400 inputs of rank 4",
    )  # fmt: skip


def _deep_linear(seed: int) -> Claim:
    weights = [_normal(seed, 5, 6), _normal(seed + 1, 5, 5), _normal(seed + 2, 3, 5)]
    x = _normal(seed + 3, 400, 4) @ _normal(seed + 4, 4, 6)
    basis = InteractionBasis([_linear(W) for W in weights]).fit(x)
    pca = basis.baseline("pca")

    def off(layers: tuple[LayerBasis, ...]) -> float:
        errors = []
        for W, (before, after) in zip(weights, itertools.pairwise(layers), strict=True):
            between = (after.C.T @ W @ before.C_pinv.T).abs()
            errors.append(float((between - torch.eye(*between.shape, dtype=_F64)).abs().max()))
        return max(errors)

    values, vectors = np.linalg.eigh(np.cov(x.T.numpy(), bias=True))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    whole = (weights[2] @ weights[1] @ weights[0]).numpy()
    oracle = torch.from_numpy(np.linalg.svd(whole @ root)[1] ** 2)
    spread = max(float((layer.eigenvalues / oracle - 1).abs().max()) for layer in basis.layers_)
    error = max(off(basis.layers_), spread)
    return Claim(
        "a deep linear network is solved exactly: layer to layer the features map by ±1, Lambda is the same everywhere and "
        "the squared singular values of (whole map)(input covariance)^1/2",
        "identity (theorem)", Estimate.exact(error, "largest error"), "<= 1e-8", error <= 1e-8,
        Comparator("PCA: largest deviation of the layer maps from ±1", off(pca.layers_)),
        "random linear net 6-5-5-3, 400 inputs of rank 4; oracle: numpy's SVD",
    )  # fmt: skip


# ---- counting


def _counted(seed: int) -> Iterator[Claim]:
    x = _normal(seed, 200, 3) @ _normal(seed + 1, 3, 8)
    for kind, between in (("linear", nn.Identity()), ("ReLU", nn.ReLU())):
        torch.manual_seed(seed)
        last = nn.Linear(6, 4, bias=False).double()
        with torch.no_grad():
            last.weight[3] = last.weight[0]
        net = nn.Sequential(nn.Linear(8, 6, bias=False).double(), between, last)
        row = degeneracy(net, x, layers=["0"]).rows[0]
        loss = behavioural_loss(net, x)
        point = net.get_parameter("0.weight").detach()
        brute = torch.autograd.functional.hessian(lambda w, loss=loss: loss({"0.weight": w}), point)
        brute = torch.as_tensor(brute).reshape(48, 48)
        rank = int(torch.linalg.matrix_rank(brute, hermitian=True, rtol=1e-10))
        ours = float((behavioural_hessian(net, x, ["0.weight"]) - brute).abs().max())
        told = f"r_G = {row.rank_gram}, r_K = {row.rank_jacobian}; our Hessian is off by {ours:.1e}"
        holds = ours <= 1e-10 and rank <= row.rank_gram * row.rank_jacobian
        if kind == "linear":
            kron = 2 * torch.kron(last.weight.detach().T @ last.weight.detach(), x.T @ x / len(x))
            off = float((kron - brute).abs().max())
            holds = holds and rank == row.rank_gram * row.rank_jacobian and off <= 1e-10
            told += f", 2 K⊗G by {off:.1e}"
        yield Claim(
            f"free weight directions are counted right ({kind} net, 6 x 8 layer, rank-3 inputs, a doubled output row)",
            "rank = r_G r_K where the Jacobian is constant, at most that otherwise",
            Estimate.exact(row.free_directions, "free directions of 48"),
            "48 - r_G r_K, " + ("exactly; Hessian 2 K⊗G to 1e-10" if kind == "linear" else "no more than the Hessian has"),
            holds, Comparator("null directions of the full autograd Hessian", 48.0 - rank), told,
        )  # fmt: skip


def _synchronised(seed: int) -> Claim:
    torch.manual_seed(seed)
    first, x = nn.Linear(6, 32), _normal(seed, 5000, 6)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(32, 3)).double()
    order = torch.randperm(32).tolist()
    groups = sorted(tuple(sorted(order[a:b])) for a, b in ((0, 2), (2, 5), (5, 10)))
    weight, bias = first.weight, first.bias
    with torch.no_grad():
        bias.mul_(0.5)
        for group in groups:
            for unit in group[1:]:
                scale = torch.rand((), dtype=_F64) + 0.5
                weight[unit], bias[unit] = weight[group[0]] * scale, bias[group[0]] * scale
        bias[order[10:12]] = -100.0
    row = degeneracy(net, x).rows[0]
    with torch.no_grad():
        bits = first(x) > 0
    brute = set()
    for i in range(32):
        same = tuple(j for j in range(32) if torch.equal(bits[:, i], bits[:, j]))
        if len(same) > 1 and bool(bits[:, i].any()) and not bool(bits[:, i].all()):
            brute.add(same)
    exact = list(row.sync_groups) == groups and set(synchronised(bits)) == brute
    return Claim(
        "synchronised ReLUs are found: 3 planted groups (2, 3, 5) and 2 dead units among 32",
        "k^2 - k directions a group", Estimate.exact(row.sync_extra, "extra directions"),
        "the planted groups exactly, 2 + 6 + 20 directions, 2 dead", exact and row.sync_extra == 28 and row.dead == 2,
        Comparator("groups by comparing all pairs", float(len(brute))), f"found {len(row.sync_groups)} groups, {row.dead} dead",
    )  # fmt: skip


class _Product(nn.Module):
    """y = a b x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """a b x."""
        return self.a * self.b * x


def _effective(seed: int) -> Iterator[Claim]:
    torch.manual_seed(seed)
    regression, x = nn.Linear(8, 1, bias=False), _normal(seed, 10_000, 8).float()
    with torch.no_grad():
        regression.weight.fill_(1.0)
    product = _Product()
    cases: list[tuple[str, nn.Module, Tensor, float]] = [
        ("a regular regression of 8 weights", regression, x, 2.0),
        ("a product w = a b", product, x[:, :1], 1e-3),
    ]
    for name, net, rows, eps in cases:
        exact = effective_parameters(net, rows, eps=1e-4)
        sampled = effective_parameters(net, rows, eps=None, method="sgld", seed=seed)
        volume = effective_parameters(net, rows[:300], eps=eps, method="volume", seed=seed)
        error = float(volume.diagnostics["standard_error"][eps])
        told = (
            f"hessian {exact.value:g}, volume {volume.value:.2f} ± {1.96 * error:.2f}, sgld with r-hat "
            f"{sampled.diagnostics['r_hat']:.3f}; 10,000 rows (volume: 300)"
        )
        if net is regression:
            holds = exact.value == 8 and abs(sampled.value - 8) <= 1.2 and abs(volume.value - 8) <= 1.2
            bar = "hessian = 8, sgld and volume 8 ± 1.2"
        else:
            holds = max(exact.value, sampled.value, volume.value) < 2 and abs(volume.value / sampled.value - 1) <= 0.2
            bar = "all three < 2, volume and sgld within 20 %"
        yield Claim(
            f"effective parameters of {name}: Hessian, sampling and volume agree",
            "rank of the Hessian at a regular minimum",
            mean_of_runs(sampled.diagnostics["per_chain"], unit="effective parameters (sgld)"),
            bar, holds, Comparator("parameter count", float(exact.parameters)), told,
        )  # fmt: skip


# ---- two modules, mixed


@dataclass(frozen=True, eq=False)
class _Mixed:
    """Two independent halves of 6 coordinates, hidden by a rotation at each of three nodes."""

    sections: list[Section]
    rotations: list[Tensor]
    x: Tensor


def _mixed(seed: int) -> _Mixed:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=_F64)

    rotations = [torch.linalg.qr(normal(12, 12)).Q for _ in range(3)]
    spread = torch.cat([torch.linspace(0.5, 1.5, 6, dtype=_F64), torch.linspace(0.4, 1.7, 6, dtype=_F64)])
    parts = [
        [(normal(20, 6) / math.sqrt(6), 0.3 * normal(20), 1.5 * normal(6, 20) / math.sqrt(20)) for _ in range(2)]
        for _ in range(2)
    ]

    def section(layer: int) -> Section:
        def run(f: Tensor) -> Tensor:
            halves = (f @ rotations[layer]).split(6, dim=1)
            made = [torch.relu(half @ W.T + b) @ V.T for half, (W, b, V) in zip(halves, parts[layer], strict=True)]
            return torch.cat(made, dim=1) @ rotations[layer + 1].T

        return run

    return _Mixed([section(0), section(1)], rotations, normal(2000, 12) * spread @ rotations[0].T)


def _edges_for(mass: float, E: Tensor) -> int:
    """Fewest edges that carry this share of the interaction."""
    values = E.flatten().sort(descending=True).values
    return int((values.cumsum(0) < mass * values.sum()).sum()) + 1


def _module_of(layer: LayerBasis, rotation: Tensor) -> Tensor:
    """Which half holds more of each feature's direction."""
    squared = (layer.C_pinv @ rotation).square()
    return (squared[:, 6:].sum(dim=1) > squared[:, :6].sum(dim=1)).long()


def _two_modules(scale: Scale, seed: int) -> Iterator[Claim]:
    edges: dict[str, list[int]] = {name: [] for name in _BASES}
    even: dict[str, list[int]] = {name: [] for name in _BASES}
    crossing: dict[str, list[float]] = {name: [] for name in _BASES}
    quality: list[tuple[float, float]] = []
    seeds = seeds_for(seed, 10 if scale is Scale.QUICK else 50)
    for one in seeds:
        net = _mixed(one)
        found = InteractionBasis(net.sections).fit(net.x)
        for name in _BASES:
            basis = found if name == "interaction basis" else found.baseline(name)
            E = interactions(basis, net.x)
            edges[name].append(_edges_for(0.99, E[0]))
            even[name].append(_edges_for(0.99, E[0] / E[0].sum(dim=1, keepdim=True)))
            labels = [_module_of(layer, Q) for layer, Q in zip(basis.layers_, net.rotations, strict=True)]
            across = sum(float(e[labels[i + 1][:, None] != labels[i]].sum()) for i, e in enumerate(E))
            crossing[name].append(across / float(sum(e.sum() for e in E)))
            if name == "interaction basis":
                modules = find_modules(E, seed=one)
                quality.append((modules.q, float(np.mean(modules.q_null))))
    ours, pca, neuron = (float(np.mean(edges[name])) for name in _BASES)
    fair = ", ".join(f"{name} {np.mean(even[name]):.0f}" for name in _BASES)
    setting = f"{len(seeds)} random nets of two independent 6-20-6-20-6 halves, mixed by rotations"
    yield Claim(
        "interactions are sparser than between principal components and between neurons",
        "conjecture, 'some evidence'",
        mean_of_runs(edges["interaction basis"], unit="edges of 144 with 99 % of the interaction"),
        "mean <= 0.90 x PCA and <= 0.70 x neurons", ours <= 0.90 * pca and ours <= 0.70 * neuron,
        Comparator("PCA", pca),
        f"{setting}; neurons {neuron:.0f}. With every output feature's interaction scaled to the same sum (the basis scales "
        f"features by their importance, which alone concentrates the mass): {fair}",
    )  # fmt: skip
    mean = {name: float(np.mean(crossing[name])) for name in _BASES}
    yield Claim(
        "modules that a rotation hides show up: little interaction crosses the true halves",
        "conjecture", mean_of_runs(crossing["interaction basis"], unit="share of the interaction that crosses"),
        "mean <= 0.20 and less than half of the neurons'",
        mean["interaction basis"] <= 0.20 and mean["interaction basis"] < 0.5 * mean["neuron"],
        Comparator("neurons", mean["neuron"]),
        f"{setting}; PCA {mean['pca']:.2f}; modularity of the log-weighted graph {np.mean([q for q, _ in quality]):.2f}, "
        f"rewired {np.mean([null for _, null in quality]):.2f}",
    )  # fmt: skip


# ---- trained networks


def _digits(scale: Scale, seed: int) -> Iterator[Claim]:
    x, y = load_digits(return_X_y=True)
    rows, held, labels, answers = train_test_split(x / 16, y, test_size=0.2, random_state=seed, stratify=y)
    inputs, targets = torch.from_numpy(rows).float(), torch.from_numpy(labels).long()
    test_x, test_y = torch.from_numpy(held).float(), torch.from_numpy(answers).long()
    ranks, spans, kept, components, full, free = [], [], [], [], [], []
    for one in seeds_for(seed, 3 if scale is Scale.QUICK else 10):
        net = _relu_net(one, 64, 64, 64, 10).float()
        train(net, inputs, targets, recipe=Recipe(epochs=30, batch_size=64, lr=2e-3, seed=one))
        full.append(accuracy(net, test_x, test_y))
        basis = InteractionBasis.from_module(net, ["input", "1", "3"]).fit(inputs)

        def score(out: Tensor) -> float:
            return float((out.argmax(dim=1) == test_y).double().mean())

        kept.append(float(kept_directions_curve(basis, test_x, score, 2, [8]).mean[0]))
        components.append(float(kept_directions_curve(basis.baseline("pca"), test_x, score, 2, [8]).mean[0]))
        ranks.append(basis.layers_[2].rank)
        spans.append(basis.layers_[2].rank_gram)
        report = degeneracy(net, inputs)
        free.append(report.free_directions / report.parameters)
    good = min(full) >= 0.90
    setting = f"digits network 64-64-64-10, {len(full)} seed(s), test accuracy {np.mean(full):.3f}"
    yield Claim(
        "a trained network uses few directions of its last hidden layer: no more than it has outputs",
        "none given", Estimate.exact(max(ranks), "directions of 64"), "<= 10 while the activations span >= 40",
        good and max(ranks) <= 10 and min(spans) >= 40, Comparator("rank of the activations", float(min(spans))),
        f"{setting}; free by dependent activations and Jacobians: at least {min(free):.0%} of all weights",
    )  # fmt: skip
    yield Claim(
        "8 directions of the last hidden layer carry the network's accuracy",
        "none given", mean_of_runs(kept, unit="accuracy"), ">= 0.98 x the whole network's",
        good and all(k >= 0.98 * f for k, f in zip(kept, full, strict=True)),
        Comparator("8 principal components", float(np.mean(components))), setting,
    )  # fmt: skip


def _mnist() -> Claim:
    told = (
        "8 directions of the last hidden layer carry the accuracy of the companion code's MNIST network",
        "none given",
        ">= 0.98 x the whole network's",
    )
    weights, images = find_data("rib/mnist-mlp.safetensors"), find_data("mnist.npz")
    if weights is None or images is None:
        why = "needs rib/mnist-mlp.safetensors and mnist.npz: set THEODOLITE_DATA"
        return Claim(told[0], told[1], None, told[2], None, None, why)
    net = _companion(load_file(weights))
    with np.load(images, allow_pickle=False) as arrays:
        fit = torch.from_numpy(arrays["x_train"][:10_000]).float().flatten(1) / 255
        x, y = torch.from_numpy(arrays["x_test"]).float().flatten(1) / 255, torch.from_numpy(arrays["y_test"]).long()
    basis = InteractionBasis.from_module(net, ["1", "3"]).fit(fit)
    report = degeneracy(net, fit)

    def score(out: Tensor) -> float:
        return float((out.argmax(dim=1) == y).double().mean())

    curve = kept_directions_curve(basis, x, score, 1, [8])
    pca = kept_directions_curve(basis.baseline("pca"), x, score, 1, [8])
    kept, ranks = float(curve.mean[0]), [layer.rank for layer in basis.layers_[:2]]
    return Claim(
        told[0], told[1], proportion(round(kept * len(y)), len(y), unit="accuracy"), told[2],
        kept >= 0.98 * curve.reference, Comparator("8 principal components", float(pca.mean[0])),
        f"784-100-100-10 with accuracy {curve.reference:.4f}; fitted on 10,000 training images; directions used "
        f"{ranks[0]} and {ranks[1]} of 100, {report.free_directions / report.parameters:.0%} of all weights free",
    )  # fmt: skip


def _companion(tensors: dict[str, Tensor]) -> nn.Sequential:
    """The ReLU network whose layers' weights (in, out) and biases are ``tensors``, in the order of their names."""
    matrices = [tensors[name] for name in sorted(tensors) if tensors[name].ndim == 2]
    biases = [tensors[name] for name in sorted(tensors) if tensors[name].ndim == 1]
    layers: list[nn.Module] = []
    for W, b in zip(matrices, biases, strict=True):
        layer = nn.Linear(W.shape[0], W.shape[1])
        with torch.no_grad():
            layer.weight.copy_(W.T)
            layer.bias.copy_(b)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()
