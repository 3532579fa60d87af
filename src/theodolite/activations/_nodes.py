"""What the interaction basis and the local interaction basis share: the chain of nodes, and coordinates of each of them."""

__all__ = [
    "ModuleNodes",
    "NodeBasis",
    "backward_layers",
    "chain_of",
    "kept_quality",
    "modules_of",
    "node_statistics",
    "rows_of",
    "unmixed",
]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from theodolite.activations._basis import (
    LayerBasis,
    batches,
    centred_gram,
    check_rtol,
    jacobian_grams,
    layer_basis,
    node_moments,
)
from theodolite.activations._edges import Path
from theodolite.core.errors import InputError
from theodolite.core.sections import Sections, sections_of
from theodolite.core.view import model_input

Basis = TypeVar("Basis", bound="NodeBasis")


@dataclass(frozen=True, eq=False)
class ModuleNodes:
    """Named nodes of a module; the chain is cut and checked when the inputs are known."""

    model: nn.Module
    nodes: tuple[str, ...]


def modules_of(given: Any) -> list[nn.Module]:
    """The modules among what an estimator was given as its sections, in their order."""
    if isinstance(given, ModuleNodes):
        return [given.model]
    parts = getattr(given, "functions", given)
    return [part for part in parts if isinstance(part, nn.Module)] if isinstance(parts, Iterable) else []


def rows_of(given: Any, X: Any) -> Tensor:
    """Rows as one tensor, of whatever holds them, in the precision and on the device of the weights of ``given``."""
    try:
        return model_input(nn.ModuleList(modules_of(given)), X)
    except (ValueError, TypeError) as error:
        raise InputError(
            "rows must make one array of numbers; pad sequences of different lengths to one length (the local interaction "
            "basis takes a mask (rows, positions))"
        ) from error


def chain_of(given: Any, x: Tensor) -> Sections:
    """The checked chain of what an estimator was given as its sections: callables, a chain, or nodes of a module."""
    if x.ndim == 0 or len(x) == 0:
        raise InputError(f"need at least one row, got shape {tuple(x.shape)}")
    if (not isinstance(given, ModuleNodes) or "input" in given.nodes) and not (x.is_floating_point() or x.is_complex()):
        raise InputError(f"the input holds {x.dtype} numbers, which have no gradient; start at the embedding")
    if isinstance(given, ModuleNodes):
        return sections_of(given.model, given.nodes, x)
    if not isinstance(given, Sections | Sequence | nn.Sequential | nn.ModuleList):
        raise InputError(f"sections must be a list of callables, got {type(given).__name__}")
    chain = given if isinstance(given, Sections) else Sections(list[Any](given))
    chain.check(x)
    return chain


class NodeBasis(TransformerMixin, BaseEstimator):
    """An estimator whose `layers_` hold the coordinates of every node of a chain, `sections_`."""

    layers_: tuple[LayerBasis, ...]
    sections_: Sections
    basis: str
    target: str
    rtol: float
    n_probes: int | None
    batch_size: int
    dtype: torch.dtype
    memory: int | None
    seed: int

    def __init__(self, sections: Any) -> None:
        self.sections = sections

    def _check_settings(self) -> None:
        """Of the settings that both bases have."""
        check_rtol(self.rtol)
        if self.target not in ("output", "next"):
            raise InputError(f"target must be 'output' or 'next', got {self.target!r}")
        if (self.n_probes is not None and self.n_probes < 1) or self.batch_size < 1:
            raise InputError(f"n_probes and batch_size must be at least 1, got {self.n_probes} and {self.batch_size}")
        if self.dtype not in (torch.float64, torch.float32):
            raise InputError(f"dtype must be torch.float64 or torch.float32, got {self.dtype}")

    def _path(self) -> Path | None:
        """Where the slopes of its edges are taken: at the rows themselves."""
        return None

    @classmethod
    def from_module(cls: type[Basis], model: nn.Module, nodes: Sequence[str], **options: Any) -> Basis:
        """A basis of the named ``nodes`` of any module, in the order they run; `fit` then takes the module's inputs.

        A name is a submodule (its output), "NAME:input", "input" or "output"; the output is added where it is not the last.
        For a decoder, name blocks: the residual stream is what everything passes through.
        """
        return cls(ModuleNodes(model, (nodes,) if isinstance(nodes, str) else tuple(nodes)), **options)

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


def node_statistics(
    sections: Sections,
    x: Tensor,
    *,
    center: bool,
    mask: Bool[Tensor, "row position"] | None = None,
    batch_size: int = 256,
    memory: int | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What features are measured from (the mean, or 0), the Gram matrix about it, of every node; and one row of the last."""
    moments, end = node_moments(sections, x, mask=mask, batch_size=batch_size, memory=memory)
    if not center:
        return [torch.zeros_like(m.mean) for m in moments], [m.second_moment for m in moments], end
    grams = [centred_gram(m, name) for m, name in zip(moments, sections.names, strict=True)]
    return [m.mean for m in moments], grams, end


def backward_layers(
    sections: Sections,
    x: Tensor,
    means: Sequence[Tensor],
    grams: Sequence[Tensor],
    last: LayerBasis,
    *,
    rtol: float,
    spreads: frozenset[int] = frozenset(),
    **options: Any,
) -> list[LayerBasis]:
    """The bases of all nodes from the ``last`` one backwards, each by its Jacobians to the features of the next.

    spreads: nodes whose last coordinate is mixed with no other.
    """
    found = [last]
    for node in reversed(range(len(sections))):
        C = found[0].C
        (k,) = jacobian_grams(
            sections, x, first=node, last=node + 1, transform=lambda f, C=C: f @ C.to(f), **options
        )  # fmt: skip
        k = unmixed(k) if node in spreads else k
        found.insert(0, layer_basis(means[node], grams[node], k, rtol=rtol, name=sections.names[node]))
    return found


def unmixed(gram: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A Gram matrix as if its last coordinate were uncorrelated with the others."""
    made = gram.clone()
    made[-1, :-1] = made[:-1, -1] = 0
    return made


def kept_quality(
    sections: Sections,
    x: Tensor,
    node: int,
    layer: LayerBasis,
    score: Callable[[Tensor], float],
    ks: Sequence[int],
    *,
    memory: int | None = None,
) -> dict[int | None, float]:
    """Score of the outputs with the first k features of one node, the rest at the mean; of the untouched network at None."""
    outputs: dict[int | None, list[Tensor]] = {k: [] for k in (None, *ks)}
    for rows in batches(sections, x, gradients=0, batch_size=1024, memory=memory):
        (f,) = sections.nodes(x[rows], first=node, last=node)
        for k, parts in outputs.items():
            parts.append(sections.run(f if k is None else layer.keep(f, k), node))
    return {k: float(score(torch.cat(parts))) for k, parts in outputs.items()}
