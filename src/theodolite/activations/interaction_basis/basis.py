"""The interaction basis of every node of a chain of sections, and the interactions between neighbouring nodes."""

__all__ = ["InteractionBasis", "ModuleNodes", "interactions", "kept_directions_curve"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from theodolite.activations._basis import (
    LayerBasis,
    baseline_layer,
    batches,
    centred_gram,
    check_rtol,
    edge_strengths,
    jacobian_grams,
    layer_basis,
    node_moments,
)
from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError
from theodolite.core.sections import Sections, sections_of


@dataclass(frozen=True, eq=False)
class ModuleNodes:
    """Named nodes of a module; the chain is cut and checked when the inputs are known."""

    model: nn.Module
    nodes: tuple[str, ...]


class InteractionBasis(TransformerMixin, BaseEstimator):
    """Coordinates of each node in which activations and Jacobians to the final output are both uncorrelated.

    f^ = C^T (f - mean) with C^T G C = Lambda (decreasing) and C^+ K C^{+T} = I; the directions that do not vary or that the
    output does not depend on are left out. f -> A f with the next weights W A^{-1} leaves the features as they are, up to
    sign (and rotation among features with `identified` False).

    sections: callables F_0 .. F_{L-1}, (n, d_l) or (n, p_l, d_l) -> the same with d_{l+1}; `from_module` cuts a module.
    target: "output" takes the Jacobians K of the final output, "next" those of the next node's features (the local basis).
    center: about the mean; False about 0. rtol: share of the largest eigenvalue below which a direction is left out.
    output_transform: what of the last node counts as output, for instance the last position. jacobian: "exact" takes one
    backward pass per output coordinate, "hutchinson" n_probes (128 where None) random signs, "auto" exact up to 256
    coordinates. batch_size: most rows at once; fewer where `memory` (bytes, 1 GiB where None) asks for it. dtype: of the
    features and of `layers_`; all statistics are float64.

    layers_: a `LayerBasis` for each node. sections_: the checked chain.

    Raises InputError for settings that mean nothing, SectionError for a node that something goes around,
    ActivationError (layer and row) for values that are not finite, DegenerateLayerError for a dead node; warns
    (RankWarning) of fewer rows than directions.

    Source: Bushnaq et al., 2024, arXiv:2405.10927.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> basis = InteractionBasis.from_module(net, nodes=["input", "1"]).fit(x)
    >>> [layer.rank for layer in basis.layers_]
    [4, 2, 2]
    """

    layers_: tuple[LayerBasis, ...]
    sections_: Sections

    def __init__(
        self,
        sections: Any,
        *,
        target: str = "output",
        center: bool = True,
        rtol: float = 1e-10,
        output_transform: Callable[[Tensor], Tensor] | None = None,
        jacobian: str = "auto",
        n_probes: int | None = None,
        batch_size: int = 256,
        dtype: torch.dtype = torch.float64,
        memory: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sections = sections
        self.target = target
        self.center = center
        self.rtol = rtol
        self.output_transform = output_transform
        self.jacobian = jacobian
        self.n_probes = n_probes
        self.batch_size = batch_size
        self.dtype = dtype
        self.memory = memory
        self.seed = seed

    @classmethod
    def from_module(cls, model: nn.Module, nodes: Sequence[str], **options: Any) -> "InteractionBasis":
        """A basis of the named ``nodes`` of any module, in the order they run; `fit` then takes the module's inputs.

        A name is a submodule (its output), "NAME:input", "input" or "output"; the output is added where it is not the last.
        For a decoder, name blocks: the residual stream is what everything passes through.
        """
        return cls(ModuleNodes(model, (nodes,) if isinstance(nodes, str) else tuple(nodes)), **options)

    def fit(self, X: Any, y: object = None) -> "InteractionBasis":
        """Find the basis of every node from rows ``X``: f_0 (n, d_0) or (n, p_0, d_0), or the module's inputs."""
        self._check_settings()
        x = torch.as_tensor(X)
        self.sections_ = _chain(self.sections, x)
        every = {"batch_size": self.batch_size, "memory": self.memory}
        moments, end = node_moments(self.sections_, x, **every)
        names = self.sections_.names
        if self.center:
            means = [m.mean for m in moments]
            grams = [centred_gram(m, name) for m, name in zip(moments, names, strict=True)]
        else:
            means = [torch.zeros_like(m.mean) for m in moments]
            grams = [m.second_moment for m in moments]
        options = every | {"jacobian": self.jacobian, "n_probes": self.n_probes, "seed": self.seed}

        def basis(node: int, jacobian_gram: Tensor) -> LayerBasis:
            return layer_basis(means[node], grams[node], jacobian_gram, rtol=self.rtol, name=names[node])

        last = len(self.sections_)
        end_gram = self._end_gram(x, end, options)
        if self.target == "output":
            before = jacobian_grams(self.sections_, x, transform=self.output_transform, **options)
            found = [basis(node, k) for node, k in enumerate([*before, end_gram])]
        else:
            found = [basis(last, end_gram)]
            for node in reversed(range(last)):
                C = found[0].C
                (k,) = jacobian_grams(
                    self.sections_, x, first=node, last=node + 1, transform=lambda f, C=C: f @ C.to(f), **options
                )
                found.insert(0, basis(node, k))
        self.layers_ = tuple(_cast(layer, self.dtype) for layer in found)
        return self

    def _end_gram(self, x: Tensor, end: Tensor, options: dict[str, Any]) -> Tensor:
        """K of the last node: the identity, or that of output_transform."""
        if self.output_transform is None:
            return torch.eye(end.shape[-1], dtype=torch.float64, device=end.device)
        chain, last = self.sections_, len(self.sections_)
        tail = _Tail(chain, self.output_transform)
        return jacobian_grams(tail, x, first=last, last=last + 1, **options)[0]

    def _check_settings(self) -> None:
        check_rtol(self.rtol)
        if self.target not in ("output", "next"):
            raise InputError(f"target must be 'output' or 'next', got {self.target!r}")
        if self.jacobian not in ("auto", "exact", "hutchinson"):
            raise InputError(f"jacobian must be 'auto', 'exact' or 'hutchinson', got {self.jacobian!r}")
        if (self.n_probes is not None and self.n_probes < 1) or self.batch_size < 1:
            raise InputError(f"n_probes and batch_size must be at least 1, got {self.n_probes} and {self.batch_size}")
        if self.dtype not in (torch.float64, torch.float32):
            raise InputError(f"dtype must be torch.float64 or torch.float32, got {self.dtype}")

    def _layer(self, layer: int) -> LayerBasis:
        if not hasattr(self, "layers_"):
            raise NotFittedError("this basis is not fitted yet; call fit with rows first")
        if not -len(self.layers_) <= layer < len(self.layers_):
            raise InputError(f"there are {len(self.layers_)} nodes, 0 to {len(self.layers_) - 1}, got {layer}")
        return self.layers_[layer]

    def transform(self, h: Any, layer: int = 0) -> Float[Tensor, "... r"]:
        """Features (n, r) or (n, p, r) of the activations ``h`` (n, d) or (n, p, d) of node ``layer``."""
        basis, h = self._layer(layer), torch.as_tensor(h)
        if h.ndim < 1 or h.shape[-1] != basis.width:
            raise InputError(f"node {layer} is {basis.width} wide, got activations of shape {tuple(h.shape)}")
        return basis.transform(h.detach())

    def inverse_transform(self, z: Any, layer: int = 0) -> Float[Tensor, "... d"]:
        """Activations of features ``z`` (..., r) of node ``layer``, with the mean; fewer columns are the first features."""
        basis, z = self._layer(layer), torch.as_tensor(z)
        if z.ndim < 1 or z.shape[-1] > basis.rank:
            raise InputError(f"node {layer} has {basis.rank} features, got shape {tuple(z.shape)}")
        return basis.inverse_transform(z.detach())

    def baseline(self, kind: str) -> "InteractionBasis":
        """The same nodes in another basis: "pca", "neuron" or "random" (rotation, from the seed); for comparison."""
        self._layer(0)
        other = InteractionBasis(**self.get_params(deep=False))
        other.sections_ = self.sections_
        other.layers_ = tuple(
            baseline_layer(layer, kind, seed=self.seed + node, rtol=self.rtol)
            for node, layer in enumerate(self.layers_)
        )
        return other


class _Tail(Sections):
    """A chain with output_transform as one section more."""

    def __init__(self, chain: Sections, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__([*chain.functions, transform], [*chain.names, "transformed output"])
        self._chain = chain

    def nodes(self, x: Tensor, *, first: int = 0, last: int | None = None, gradients: bool = False) -> list[Tensor]:
        """The last node of the chain and its transform."""
        end = self._chain.nodes(x, first=first)[-1].detach()
        with torch.set_grad_enabled(gradients):
            end = end.requires_grad_(gradients)
            return [end, self.functions[-1](end)]

    def row_bytes(self, x: Tensor, *, gradients: bool) -> float:
        """That of the chain."""
        return self._chain.row_bytes(x, gradients=gradients)


def _chain(given: Any, x: Tensor) -> Sections:
    if x.ndim == 0 or len(x) == 0:
        raise InputError(f"need at least one row, got shape {tuple(x.shape)}")
    if isinstance(given, ModuleNodes):
        return sections_of(given.model, given.nodes, x)
    chain = given if isinstance(given, Sections) else Sections(given)
    if not (x.is_floating_point() or x.is_complex()):
        raise InputError(f"node 0 holds {x.dtype} numbers, which have no gradient; start at the embedding")
    chain.check(x)
    return chain


def _cast(layer: LayerBasis, dtype: torch.dtype) -> LayerBasis:
    return replace(
        layer,
        mean=layer.mean.to(dtype),
        C=layer.C.to(dtype),
        C_pinv=layer.C_pinv.to(dtype),
        eigenvalues=layer.eigenvalues.to(dtype),
    )


def interactions(basis: InteractionBasis, X: Any, *, n_probes: int | None = None) -> list[Float[Tensor, "r_next r"]]:
    """E (r_{l+1}, r_l) for each pair of neighbouring nodes: E_ij = (1/n) sum_x (f^_j d f^'_i / d f^_j)^2, float64.

    Features j of one node, i of the next; over positions the sum is taken before the square (and the mean is over the
    input positions). n_probes: random signs over the output positions in place of all of them.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> [tuple(e.shape) for e in interactions(InteractionBasis.from_module(net, ["input", "1"]).fit(x), x)]
    [(2, 4), (2, 2)]
    """
    basis._layer(0)
    x = torch.as_tensor(X)
    return [
        edge_strengths(
            basis.sections_, x, layer, basis.layers_, n_probes=n_probes, batch_size=basis.batch_size,
            memory=basis.memory, seed=basis.seed,
        )
        for layer in range(len(basis.layers_) - 1)
    ]  # fmt: skip


def kept_directions_curve(
    basis: InteractionBasis,
    X: Any,
    score: Callable[[Tensor], float],
    layer: int,
    ks: Sequence[int] | None = None,
    *,
    name: str = "interaction basis",
) -> QualityCurve:
    """Quality of the network when only the first k directions of one node are kept, the rest at the mean.

    score(output of all rows) -> number, larger is better. ks: 1, 2, 3, 4, 6, 8, 12, .. up to all where left out. chance is
    the score with no direction, reference that of the untouched network.
    """
    chosen = basis._layer(layer)
    x = torch.as_tensor(X)
    tried = sorted(set(ks)) if ks is not None else _steps(chosen.rank)
    if not tried or tried[0] < 1 or tried[-1] > chosen.rank:
        raise InputError(f"ks must lie in 1 .. {chosen.rank}, got {list(tried)}")
    node = layer % len(basis.layers_)
    outputs: dict[int | None, list[Tensor]] = {k: [] for k in (None, 0, *tried)}
    for rows in batches(basis.sections_, x, gradients=0, batch_size=1024, memory=basis.memory):
        (f,) = basis.sections_.nodes(x[rows], first=node, last=node)
        for k, parts in outputs.items():
            edited = f if k is None else chosen.keep(f, k)
            parts.append(basis.sections_.run(edited, node))
    quality = {k: float(score(torch.cat(parts))) for k, parts in outputs.items()}
    return QualityCurve(
        tuple(tried), np.array([[quality[k]] for k in tried]), chance=quality[0], reference=quality[None],
        name=name, total_dimension=chosen.width,
    )  # fmt: skip


def _steps(rank: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, .. and all."""
    steps = {2**i for i in range(rank.bit_length())} | {3 * 2**i for i in range(rank.bit_length())}
    return sorted({k for k in steps if k < rank} | {rank})
