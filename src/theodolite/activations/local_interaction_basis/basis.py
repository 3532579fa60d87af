"""The local interaction basis of every node of a chain of sections, and the edges between neighbouring nodes."""

__all__ = ["EvaluationModeWarning", "LocalInteractionBasis", "attributions", "edges"]

import time
import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from theodolite.activations._basis import (
    BASELINES,
    LayerBasis,
    baseline_layer,
    cast_layer,
    identity_layer,
    jacobian_grams,
    layer_basis,
)
from theodolite.activations._edges import Path, edge_blocks, edge_strengths
from theodolite.activations._nodes import (
    NodeBasis,
    backward_layers,
    chain_of,
    modules_of,
    node_statistics,
    rows_of,
    unmixed,
)
from theodolite.activations.local_interaction_basis.norms import NormSpread
from theodolite.core.errors import InputError, ModelError
from theodolite.core.sections import Sections

_MOST_OUTPUTS = 4096
_TIMED_ROWS = 32
_ATTRIBUTIONS = ("gradient", "integrated", "trapezoid")


class EvaluationModeWarning(UserWarning):
    """The network was in training mode, in which it gives random answers; it is measured in evaluation mode."""


class LocalInteractionBasis(NodeBasis):
    """Coordinates of each node in which activations and Jacobians to the next node's features are both uncorrelated.

    f^ = C^T (f - mean) with C^T G C = Lambda (decreasing) and C^+ K C^{+T} = I. The last node keeps its own coordinates, or
    with ``rotate_output`` its principal components. The mean is a node of its own, which is never rotated and never cut.

    sections: callables F_0 .. F_{L-1}, (n, d_l) or (n, p_l, d_l) -> the same with d_{l+1}; `from_module` cuts a module. For
    a decoder name places on the residual stream.
    target: "next" takes the Jacobians of the next node's features, "output" those of the last node's. basis: "lib", or of
    the same nodes "pca" (U alone), "neuron" or "random" (a rotation from the seed), by falling variance.
    center: about the mean; False about 0. rtol: share of the largest eigenvalue, of G and of Lambda, below which a direction
    is left out. attribution: of `edges`: "gradient" at each row, or its mean on the straight line from the mean activation
    to the row, by ``n_quadrature`` Gauss-Legendre nodes ("integrated") or by the trapezoid rule ("trapezoid").
    n_probes: that many random sign vectors stand in for all output coordinates in K, and for all output positions in
    `edges` (unbiased); needed for more than 4,096 output coordinates a row.
    isolate_ln_var: at a node after the first of `norm_halves`, keep the norm's spread (the last coordinate) a direction of its
    own that is mixed with no other.
    batch_size: most rows at once; fewer where ``memory`` (bytes, 1 GiB where None) asks for it. dtype: of the features and of
    `layers_`; all statistics are float64.

    layers_: a `LayerBasis`, which is a `core.dictionary.Dictionary`, for each node. sections_: the checked chain.

    Raises InputError for settings that mean nothing, rows of different lengths and too many outputs without probes, ModelError
    for batch normalisation in training mode, SectionError for a node that something goes around, ActivationError for values
    that are not finite, DegenerateLayerError for a dead node; warns of dropout (EvaluationModeWarning) and of fewer rows than
    directions (RankWarning).

    Source: Bushnaq et al., 2024, arXiv:2405.10928.

    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> basis = LocalInteractionBasis.from_module(net, nodes=["input", "1"]).fit(x)
    >>> [layer.rank for layer in basis.layers_]
    [4, 2, 2]
    """

    def __init__(
        self,
        sections: Any,
        *,
        target: str = "next",
        basis: str = "lib",
        center: bool = True,
        rtol: float = 1e-12,
        rotate_output: bool = False,
        attribution: str = "gradient",
        n_quadrature: int = 5,
        n_probes: int | None = None,
        isolate_ln_var: bool = False,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float64,
        memory: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sections = sections
        self.target = target
        self.basis = basis
        self.center = center
        self.rtol = rtol
        self.rotate_output = rotate_output
        self.attribution = attribution
        self.n_quadrature = n_quadrature
        self.n_probes = n_probes
        self.isolate_ln_var = isolate_ln_var
        self.batch_size = batch_size
        self.dtype = dtype
        self.memory = memory
        self.seed = seed

    def fit(self, X: Any, y: object = None, *, mask: Any = None) -> "LocalInteractionBasis":
        """Find the basis of every node from rows ``X``: f_0 (n, d_0) or (n, p_0, d_0), or the module's inputs.

        mask: (n, p) True where a position counts; the others are left out of G and K, in nodes that have p positions.
        """
        self._check_settings()
        x = rows_of(self.sections, X)
        _check_modes(self.sections)
        self.sections_ = chain_of(self.sections, x)
        counted = _mask(mask, x, self.sections_)
        every: dict[str, Any] = {"mask": counted, "batch_size": self.batch_size, "memory": self.memory}
        self._check_outputs(x)
        means, grams, _ = node_statistics(self.sections_, x, center=self.center, **every)
        spreads = self._spreads()
        grams = [unmixed(gram) if node in spreads else gram for node, gram in enumerate(grams)]
        unit = torch.eye(len(means[-1]), dtype=torch.float64, device=means[-1].device)
        name = self.sections_.names[-1]
        last = (
            layer_basis(means[-1], grams[-1], unit, rtol=self.rtol, name=name)
            if self.rotate_output
            else identity_layer(means[-1], grams[-1], unit, rtol=self.rtol)
        )
        options = every | {"n_probes": self.n_probes, "seed": self.seed}
        options["jacobian"] = "exact" if self.n_probes is None else "hutchinson"
        if self.target == "next":
            found = backward_layers(self.sections_, x, means, grams, last, rtol=self.rtol, spreads=spreads, **options)
        else:
            ks = jacobian_grams(self.sections_, x, transform=lambda f: f @ last.C.to(f), **options)
            ks = [unmixed(k) if node in spreads else k for node, k in enumerate(ks)]
            found = [
                layer_basis(mean, gram, k, rtol=self.rtol, name=name)
                for mean, gram, k, name in zip(means, grams, ks, self.sections_.names, strict=False)
            ]
            found.append(last)
        if self.basis != "lib":
            found = self._other(found, self.basis)
        self.layers_ = tuple(cast_layer(layer, self.dtype) for layer in found)
        return self

    def baseline(self, kind: str) -> "LocalInteractionBasis":
        """The same nodes in another basis, without new Jacobians: "pca", "neuron" or "random" (rotation, from the seed)."""
        self._layer(0)
        other = LocalInteractionBasis(**self.get_params(deep=False))
        other.basis = kind
        other._check_settings()
        other.sections_ = self.sections_
        other.layers_ = tuple(cast_layer(layer, self.dtype) for layer in self._other(self.layers_, kind))
        return other

    def _other(self, layers: Any, kind: str) -> list[LayerBasis]:
        hidden = [
            baseline_layer(layer, kind, seed=self.seed + node, rtol=self.rtol) for node, layer in enumerate(layers[:-1])
        ]
        return [*hidden, layers[-1]]

    def _spreads(self) -> frozenset[int]:
        """Nodes whose last coordinate is the spread of a norm."""
        if not self.isolate_ln_var:
            return frozenset()
        found = frozenset(i + 1 for i, one in enumerate(self.sections_.functions) if isinstance(one, NormSpread))
        if not found:
            raise InputError(
                "isolate_ln_var needs a section that is the first of norm_halves(norm), after which the norm's spread is the "
                "last coordinate; there is none"
            )
        return found

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.basis not in ("lib", *BASELINES):
            raise InputError(f"basis must be 'lib' or one of {', '.join(BASELINES)}, got {self.basis!r}")
        if self.attribution not in _ATTRIBUTIONS:
            raise InputError(f"attribution must be one of {', '.join(_ATTRIBUTIONS)}, got {self.attribution!r}")
        if self.n_quadrature < (2 if self.attribution == "trapezoid" else 1):
            raise InputError(f"n_quadrature must be at least 1 (trapezoid: 2), got {self.n_quadrature}")

    def _check_outputs(self, x: Tensor) -> None:
        """Refuse, with the time that it would take, more backward passes than anyone waits for."""
        if self.n_probes is not None:
            return
        some = x[:_TIMED_ROWS]
        targets = self.sections_.nodes(some)[1:] if self.target == "next" else self.sections_.nodes(some)[-1:]
        for name, node in zip(self.sections_.names[-len(targets) :], targets, strict=True):
            places = node[0].numel() // node.shape[-1]
            outputs = places * min(node.shape[-1], len(x) * places)
            if outputs <= _MOST_OUTPUTS:
                continue
            first, *_, end = self.sections_.nodes(some, gradients=True)
            started = time.perf_counter()
            torch.autograd.grad(end.sum(), first)
            took = (time.perf_counter() - started) * outputs * len(x) / len(some)
            raise InputError(
                f"{name} has {outputs:,} coordinates a row, and K takes a backward pass for each: about {took:,.0f} s for "
                f"{len(x):,} rows. Give n_probes (some hundreds of random sign vectors), fewer positions or a narrower node"
            )

    def _path(self) -> Path | None:
        if self.attribution == "gradient":
            return None
        if self.attribution == "integrated":
            nodes, weights = np.polynomial.legendre.leggauss(self.n_quadrature)
            return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
        weights = np.full(self.n_quadrature, 1 / (self.n_quadrature - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, self.n_quadrature).tolist(), weights.tolist()


def edges(basis: NodeBasis, X: Any, layer: int, *, mask: Any = None) -> Float[Tensor, "r_next r"]:
    """E (r_{l+1}, r_l): how strongly each feature j of node ``layer`` acts on each feature i of the next one; float64, no root.

    E_ij = (1/(n p)) sum over rows and output positions t of (sum over input positions s of A_{t,i;s,j})^2, p the number of
    input positions and A the basis's attribution. The mean's own edges are not among them. E grows with the square of a
    feature's scale, so compare bases by `edges_required`, not by shares of E. Takes an `InteractionBasis` as well.

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> edges(LocalInteractionBasis([net]).fit(x), x, 0).shape
    torch.Size([2, 2])
    """
    node, x = section_index(basis, layer), rows_of(basis.sections, X)
    counted = _mask(mask, x, basis.sections_)
    return edge_strengths(basis.sections_, x, node, basis.layers_, mask=counted, **_edge_options(basis))


def attributions(basis: NodeBasis, X: Any, layer: int) -> Float[Tensor, "row position r_next r"]:
    """A of each row: what each feature of node ``layer`` adds to each of the next, summed over input positions; float64.

    "integrated" adds up: the sum over the features is what the next node's feature is at the row less what it is at the mean.
    Holds everything at once: n p' r_{l+1} r_l numbers. Of a node without positions p' is 1.
    """
    node, x = section_index(basis, layer), rows_of(basis.sections, X)
    before, after = basis.layers_[node : node + 2]
    options = _edge_options(basis)
    options["n_probes"] = None
    parts = list[Tensor]()
    seen = -1
    for rows, _, block, _ in edge_blocks(basis.sections_, x, node, basis.layers_, **options):
        if rows.start != seen:
            seen = rows.start
            parts.append(torch.zeros(block.shape[1], 0, before.rank, dtype=torch.float64, device=block.device))
        parts[-1] = torch.cat([parts[-1], block.transpose(0, 1).to(torch.float64)], dim=1)
    return torch.cat(parts).unflatten(1, (-1, after.rank))


def _edge_options(basis: NodeBasis) -> dict[str, Any]:
    return {
        "path": basis._path(),
        "n_probes": basis.n_probes,
        "batch_size": basis.batch_size,
        "memory": basis.memory,
        "seed": basis.seed,
    }


def section_index(basis: NodeBasis, layer: int) -> int:
    """The number of the section that starts at node ``layer``; the last node starts none."""
    basis._layer(layer)
    count = len(basis.layers_)
    node = layer % count
    if node == count - 1:
        raise InputError(f"the edges of layer {layer} would go beyond the last node; there are pairs 0 to {count - 2}")
    return node


def _mask(mask: Any, x: Tensor, sections: Sections) -> Bool[Tensor, "row position"] | None:
    if mask is None:
        return None
    counted = torch.as_tensor(mask)
    if counted.ndim != 2 or len(counted) != len(x) or counted.dtype != torch.bool:
        raise InputError(
            f"mask must be (rows, positions) of True and False for {len(x)} rows, got {tuple(counted.shape)} of {counted.dtype}"
        )
    if not bool(counted.any()):
        raise InputError("the mask leaves no position")
    shapes = [tuple(node.shape[1:]) for node in sections.nodes(x[:1])]
    if not any(len(shape) == 2 and shape[0] == counted.shape[1] for shape in shapes):
        raise InputError(
            f"the mask has {counted.shape[1]} positions, and no node has as many: they are of shapes {shapes}"
        )
    return counted


def _check_modes(sections: Any) -> None:
    modules = [part for one in modules_of(sections) for part in one.modules()]
    if any(isinstance(part, _BatchNorm) and part.training for part in modules):
        raise ModelError(
            "batch normalisation is in training mode, where each row's output depends on the other rows; call model.eval() "
            "when it is trained"
        )
    if any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in modules):
        warnings.warn(
            "dropout is on; the network is measured in evaluation mode, without it, and put back afterwards",
            EvaluationModeWarning,
            stacklevel=3,
        )
