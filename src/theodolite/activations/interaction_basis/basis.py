"""The interaction basis of every node of a chain of sections, and the interactions between neighbouring nodes."""

__all__ = ["InteractionBasis", "interactions", "kept_directions_curve"]

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.activations._basis import (
    LayerBasis,
    baseline_layer,
    cast_layer,
    jacobian_grams,
    layer_basis,
)
from theodolite.activations._edges import edge_strengths
from theodolite.activations._nodes import (
    NodeBasis,
    backward_layers,
    chain_of,
    kept_quality,
    node_statistics,
    rows_of,
)
from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError
from theodolite.core.sections import Sections


class InteractionBasis(NodeBasis):
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

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> basis = InteractionBasis.from_module(net, nodes=["input", "1"]).fit(x)
    >>> [layer.rank for layer in basis.layers_]
    [4, 2, 2]
    """

    basis = "interaction basis"

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

    def fit(self, X: Any, y: object = None) -> "InteractionBasis":
        """Find the basis of every node from rows ``X``: f_0 (n, d_0) or (n, p_0, d_0), or the module's inputs."""
        self._check_settings()
        x = rows_of(self.sections, X)
        self.sections_ = chain_of(self.sections, x)
        every = {"batch_size": self.batch_size, "memory": self.memory}
        means, grams, end = node_statistics(self.sections_, x, center=self.center, **every)
        options = every | {"jacobian": self.jacobian, "n_probes": self.n_probes, "seed": self.seed}

        def basis(node: int, jacobian_gram: Tensor) -> LayerBasis:
            name = self.sections_.names[node]
            return layer_basis(means[node], grams[node], jacobian_gram, rtol=self.rtol, name=name)

        end_gram = self._end_gram(x, end, options)
        if self.target == "output":
            before = jacobian_grams(self.sections_, x, transform=self.output_transform, **options)
            found = [basis(node, k) for node, k in enumerate([*before, end_gram])]
        else:
            last = basis(len(self.sections_), end_gram)
            found = backward_layers(self.sections_, x, means, grams, last, rtol=self.rtol, **options)
        self.layers_ = tuple(cast_layer(layer, self.dtype) for layer in found)
        return self

    def _end_gram(self, x: Tensor, end: Tensor, options: dict[str, Any]) -> Tensor:
        """K of the last node: the identity, or that of output_transform."""
        if self.output_transform is None:
            return torch.eye(end.shape[-1], dtype=torch.float64, device=end.device)
        chain, last = self.sections_, len(self.sections_)
        tail = _Tail(chain, self.output_transform)
        return jacobian_grams(tail, x, first=last, last=last + 1, **options)[0]

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.jacobian not in ("auto", "exact", "hutchinson"):
            raise InputError(f"jacobian must be 'auto', 'exact' or 'hutchinson', got {self.jacobian!r}")

    def baseline(self, kind: str) -> "InteractionBasis":
        """The same nodes in another basis: "pca", "neuron" or "random" (rotation, from the seed); for comparison."""
        self._layer(0)
        other = InteractionBasis(**self.get_params(deep=False))
        other.basis, other.sections_ = kind, self.sections_
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


def interactions(basis: InteractionBasis, X: Any, *, n_probes: int | None = None) -> list[Float[Tensor, "_r_next _r"]]:
    """E (r_{l+1}, r_l) for each pair of neighbouring nodes: E_ij = (1/n) sum_x (f^_j d f^'_i / d f^_j)^2, float64.

    Features j of one node, i of the next; over positions the sum is taken before the square (and the mean is over the
    input positions). n_probes: random signs over the output positions in place of all of them.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> [tuple(e.shape) for e in interactions(InteractionBasis.from_module(net, ["input", "1"]).fit(x), x)]
    [(2, 4), (2, 2)]
    """
    basis._layer(0)
    x = rows_of(basis.sections, X)
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
    x = rows_of(basis.sections, X)
    tried = sorted(set(ks)) if ks is not None else _steps(chosen.rank)
    if not tried or tried[0] < 1 or tried[-1] > chosen.rank:
        raise InputError(f"ks must lie in 1 .. {chosen.rank}, got {list(tried)}")
    node = layer % len(basis.layers_)
    quality = kept_quality(basis.sections_, x, node, chosen, score, [0, *tried], memory=basis.memory)
    return QualityCurve(
        tuple(tried), np.array([[quality[k]] for k in tried]), chance=quality[0], reference=quality[None],
        name=name, total_dimension=chosen.width,
    )  # fmt: skip


def _steps(rank: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, .. and all."""
    steps = {2**i for i in range(rank.bit_length())} | {3 * 2**i for i in range(rank.bit_length())}
    return sorted({k for k in steps if k < rank} | {rank})
