"""Linear algebra that the interaction basis and the local interaction basis share.

Activations f of a node have the Gram matrix G = U D U^T, the Jacobians of what comes later the Gram matrix K. With
M = D^{1/2} U^T K U D^{1/2} = V Lambda V^T the features are C^T (f - mean), C = U D^{-1/2} V Lambda^{1/2}, and
C^+ = Lambda^{-1/2} V^T D^{1/2} U^T, so that C^T G C = Lambda and C^+ K C^{+T} = I. Everything in float64.
"""

__all__ = [
    "AT_ONCE",
    "BASELINES",
    "ActivationPrecisionWarning",
    "DegenerateLayerError",
    "LayerBasis",
    "RankWarning",
    "baseline_layer",
    "batches",
    "cast_layer",
    "centred_gram",
    "check_rtol",
    "effective_rank",
    "identity_layer",
    "jacobian_grams",
    "layer_basis",
    "node_moments",
    "valid_positions",
]

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from theodolite.core.capture import ActivationError, Moments, check_finite
from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import chunk_rows
from theodolite.core.sections import Sections

Baseline = Literal["pca", "neuron", "random"]
BASELINES: tuple[Baseline, ...] = ("pca", "neuron", "random")
_UNIDENTIFIED = 1e-3
_PROBES = 128
AT_ONCE = 8
"""Backward passes side by side: more of them gain nothing on a CPU and take rows from the chunk."""
EXACT_OUTPUTS = 256
"""Most output coordinates for which "auto" takes one backward pass each."""


class DegenerateLayerError(ModelError):
    """A node has no direction at all that both varies over the data and changes the output."""


class RankWarning(UserWarning):
    """Ranks are those of the data: there are fewer rows than directions."""


class ActivationPrecisionWarning(UserWarning):
    """Activations have half precision; statistics are float64, but of rounded numbers."""


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """Coordinates of one node: features are C^T (f - mean).

    mean: (d,). C: (d, r), C_pinv: (r, d). eigenvalues: (r,) decreasing: Lambda, which is the variance of each feature; of a
    baseline the variances. gram, jacobian_gram: (d, d) G and K.
    rank_gram, rank_jacobian: eigenvalues of G and K above rtol x the largest. gap: (r,) distance of each eigenvalue to its
    nearest neighbour relative to itself (inf where there is one only); identified: gap >= 1e-3, otherwise the direction is
    only known up to a rotation among its neighbours.
    """

    mean: Float[Tensor, " d"]
    C: Float[Tensor, "d r"]
    C_pinv: Float[Tensor, "r d"]
    eigenvalues: Float[Tensor, " r"]
    gram: Float[Tensor, "d d"]
    jacobian_gram: Float[Tensor, "d d"]
    rank_gram: int
    rank_jacobian: int
    gap: Float[Tensor, " r"]
    identified: Bool[Tensor, " r"]

    @property
    def rank(self) -> int:
        """Number of directions r."""
        return self.C.shape[1]

    @property
    def width(self) -> int:
        """Number of coordinates d of the node."""
        return self.C.shape[0]

    def transform(self, f: Tensor) -> Float[Tensor, "... r"]:
        """Features of activations (..., d)."""
        return (f.to(self.C) - self.mean) @ self.C

    def inverse_transform(self, z: Tensor) -> Float[Tensor, "... d"]:
        """Activations of features (..., k), k <= r; features that are left out are 0, that is at the mean."""
        return self.mean + z.to(self.C) @ self.C_pinv[: z.shape[-1]]

    @property
    def directions(self) -> Float[Tensor, "r d"]:
        """The direction in hidden space of each feature: with `encode` and `decode` this basis is a `Dictionary`."""
        return self.C_pinv

    def encode(self, x: Tensor) -> Float[Tensor, "... r"]:
        """Features of activations, as `transform`."""
        return self.transform(x)

    def decode(self, codes: Tensor) -> Float[Tensor, "... d"]:
        """Activations of features, as `inverse_transform`."""
        return self.inverse_transform(codes)

    def keep(self, f: Tensor, k: int) -> Tensor:
        """Activations with their first k features only, all else at the mean; dtype and device of ``f``."""
        return self.inverse_transform(self.transform(f)[..., :k]).to(f)


def effective_rank(eigenvalues: Float[Tensor, " d"], rtol: float) -> int:
    """How many eigenvalues exceed rtol x the largest; 0 where none is positive.

    >>> effective_rank(torch.tensor([1.0, 1e-3, 1e-12], dtype=torch.float64), 1e-10)
    2
    """
    largest = float(eigenvalues.max()) if len(eigenvalues) else 0.0
    return int((eigenvalues > rtol * largest).sum()) if largest > 0 else 0


def check_rtol(rtol: float) -> None:
    """A Gram matrix squares the condition number, so float64 resolves its eigenvalues to about 1e-14."""
    if not 1e-13 <= rtol < 1:
        raise InputError(
            f"rtol must lie in [1e-13, 1), got {rtol}: below that the eigenvalues of a float64 Gram matrix are rounding "
            "noise, and a rank made from them means nothing"
        )


def layer_basis(
    mean: Tensor, gram: Float[Tensor, "d d"], jacobian_gram: Float[Tensor, "d d"], *, rtol: float, name: str = "node"
) -> LayerBasis:
    """The basis that diagonalises both Gram matrices; directions without variance or without influence are left out.

    Raises DegenerateLayerError where nothing is left.
    """
    D, U = torch.linalg.eigh(gram)
    rank_gram = effective_rank(D, rtol)
    jacobian_values = torch.linalg.eigvalsh(jacobian_gram)
    rank_jacobian = effective_rank(jacobian_values, rtol)
    if rank_gram == 0 or rank_jacobian == 0:
        raise _dead(name, "its activations are 0" if rank_gram == 0 else "the output does not depend on it")
    root, U = D[-rank_gram:].sqrt(), U[:, -rank_gram:]
    half = U * root  # U D^{1/2}
    L, V = torch.linalg.eigh(half.T @ jacobian_gram @ half)
    # of scales the product of the two largest is the most that Lambda can be; what is below its rounding is none
    noise = 1e-15 * float(D[-1]) * float(jacobian_values[-1])
    rank = effective_rank(L, rtol) if float(L[-1]) > noise else 0
    if rank == 0:
        raise _dead(name, "no direction of it both varies over the rows and changes the output")
    L, V = L.flip(0)[:rank], V.flip(1)[:, :rank]
    C = (U / root) @ V * L.sqrt()
    C_pinv = (V / L.sqrt()).T @ half.T
    gap = _gaps(L)
    return LayerBasis(
        mean, C, C_pinv, L, gram, jacobian_gram, rank_gram, rank_jacobian, gap, gap >= _UNIDENTIFIED
    )  # fmt: skip


def _dead(name: str, why: str) -> DegenerateLayerError:
    return DegenerateLayerError(f"{name} is dead: {why}; leave it out of the nodes, or give other data")


def centred_gram(moments: Moments, name: str) -> Float[Tensor, "d d"]:
    """Covariance of a node; raises DegenerateLayerError where it is no more than the rounding of the mean."""
    gram = moments.covariance
    if float(gram.trace()) <= 1e-28 * float(moments.second_moment.trace()):
        raise _dead(name, "its activations are the same on all rows")
    return gram


def _gaps(values: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Distance to the nearest neighbour relative to the value itself, of decreasing positive values."""
    steps = values[:-1] - values[1:]
    edge = torch.full((1,), math.inf, dtype=values.dtype, device=values.device)
    return torch.minimum(torch.cat([edge, steps]), torch.cat([steps, edge])) / values


def baseline_layer(layer: LayerBasis, kind: str, *, seed: int = 0, rtol: float = 1e-10) -> LayerBasis:
    """Another basis of the same node: "pca" (U alone), "neuron" (the identity), "random" (a random rotation).

    eigenvalues are the variances of the directions, which are in the order of their variances.
    """
    d, like = layer.width, layer.gram
    if kind == "pca":
        D, U = torch.linalg.eigh(layer.gram)
        C = U.flip(1)[:, : effective_rank(D, rtol)]
    elif kind == "neuron":
        C = torch.eye(d, dtype=like.dtype, device=like.device)
    elif kind == "random":
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(d, d, generator=generator, dtype=like.dtype)
        q, r = torch.linalg.qr(gaussian)
        C = (q * r.diagonal().sign()).to(like.device)  # the signs make the rotation uniform
    else:
        raise InputError(f"there is no baseline {kind!r}; there are {', '.join(BASELINES)}")
    variances, order = torch.einsum("dr,de,er->r", C, layer.gram, C).clamp_min(0).sort(descending=True)
    C = C[:, order]
    gap = _gaps(variances.clamp_min(torch.finfo(like.dtype).tiny))
    return LayerBasis(
        layer.mean, C, C.T, variances, layer.gram, layer.jacobian_gram, layer.rank_gram, layer.rank_jacobian,
        gap, gap >= _UNIDENTIFIED,
    )  # fmt: skip


def identity_layer(
    mean: Tensor, gram: Float[Tensor, "d d"], jacobian_gram: Float[Tensor, "d d"], *, rtol: float
) -> LayerBasis:
    """The coordinates of a node as they are and in the order they have, about their mean."""
    eye = torch.eye(len(mean), dtype=gram.dtype, device=gram.device)
    variances = gram.diagonal().clone()
    gap = torch.full_like(variances, math.inf)
    rank_gram, rank_jacobian = (effective_rank(torch.linalg.eigvalsh(one), rtol) for one in (gram, jacobian_gram))
    return LayerBasis(mean, eye, eye, variances, gram, jacobian_gram, rank_gram, rank_jacobian, gap, gap > 0)


def cast_layer(layer: LayerBasis, dtype: torch.dtype) -> LayerBasis:
    """Coordinates in another number type; the Gram matrices stay float64."""
    return replace(
        layer,
        mean=layer.mean.to(dtype),
        C=layer.C.to(dtype),
        C_pinv=layer.C_pinv.to(dtype),
        eigenvalues=layer.eigenvalues.to(dtype),
    )


# ---- statistics over rows


def valid_positions(node: Tensor, mask: Tensor | None) -> Bool[Tensor, "row position"] | None:
    """The rows' mask where the node has the positions it speaks of."""
    if mask is None or node.ndim != 3 or node.shape[1] != mask.shape[1]:
        return None
    return mask.to(node.device)


def batches(sections: Sections, x: Tensor, *, gradients: int, batch_size: int, memory: int | None) -> Iterator[slice]:
    """Slices of rows that fit the budget when ``gradients`` backward passes run side by side (0: none)."""
    cost = sections.row_bytes(x, gradients=gradients > 0) * (1 + gradients)
    size = chunk_rows(cost, memory, at_most=batch_size)
    for start in range(0, len(x), size):
        yield slice(start, min(len(x), start + size))


def node_moments(
    sections: Sections,
    x: Tensor,
    *,
    mask: Bool[Tensor, "row position"] | None = None,
    batch_size: int = 256,
    memory: int | None = None,
) -> tuple[list[Moments], Tensor]:
    """Mean and Gram of every node over rows (and positions), and the shape of the last node's rows.

    mask: positions that count, of the nodes that have as many.

    Raises ActivationError for values that are not finite; warns once of half precision and of fewer rows than directions.
    """
    moments: list[Moments] = []
    last = x[:0]
    half = False
    for rows in batches(sections, x, gradients=0, batch_size=max(batch_size, 1024), memory=memory):
        nodes = sections.nodes(x[rows])
        moments = moments or [Moments(node.shape[-1], device=node.device) for node in nodes]
        for name, node, moment in zip(sections.names, nodes, moments, strict=True):
            check_finite(node, name, rows.start)
            half = half or node.dtype in (torch.float16, torch.bfloat16)
            valid = valid_positions(node, None if mask is None else mask[rows])
            moment.add(node if valid is None else node[valid])
        last = nodes[-1][:1]
    if half:
        warnings.warn(
            "activations have half precision: statistics are float64, but directions below about 1e-3 of the largest are "
            "rounding; use the model in float32 for counting ranks",
            ActivationPrecisionWarning,
            stacklevel=3,
        )
    short = [f"{name} ({m.count} rows, {len(m.mean)} wide)" for name, m in zip(sections.names, moments, strict=True)
             if m.count < len(m.mean)]  # fmt: skip
    if short:
        warnings.warn(
            f"fewer rows than directions in {', '.join(short)}: the rank is at most the number of rows, so what looks free "
            "is free on these data and need not be in the network; give more rows",
            RankWarning,
            stacklevel=3,
        )
    return moments, last


@dataclass(frozen=True)
class Probes:
    """Which output vectors v the vector-Jacobian products J^T v are taken with.

    exact: every unit vector; otherwise ``count`` vectors of random signs for each row, whose mean of (J^T v)(J^T v)^T is
    J^T J.
    """

    exact: bool
    count: int
    seed: int

    @classmethod
    def choose(cls, how: str, outputs: int, n_probes: int | None, seed: int) -> "Probes":
        """ "auto" is exact up to 256 output coordinates a row."""
        if how not in ("auto", "exact", "hutchinson"):
            raise InputError(f"jacobian must be 'auto', 'exact' or 'hutchinson', got {how!r}")
        if n_probes is not None and n_probes < 1:
            raise InputError(f"n_probes must be at least 1, got {n_probes}")
        exact = how == "exact" or (how == "auto" and outputs <= EXACT_OUTPUTS)
        return cls(exact, outputs if exact else n_probes or _PROBES, seed)

    def vectors(
        self, rows: int, outputs: int, like: Tensor, at_once: int
    ) -> Iterator[Float[Tensor, "probe row output"]]:
        """Blocks of at most ``at_once`` output vectors."""
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.count, at_once):
            many = min(at_once, self.count - start)
            if self.exact:
                units = torch.zeros(many, outputs, dtype=like.dtype, device=like.device)
                units[torch.arange(many), torch.arange(start, start + many)] = 1
                yield units[:, None].expand(many, rows, outputs)
            else:
                signs = torch.randint(0, 2, (many, rows, outputs), generator=generator) * 2 - 1
                yield signs.to(like)


def jacobian_grams(
    sections: Sections,
    x: Tensor,
    *,
    first: int = 0,
    last: int | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    mask: Bool[Tensor, "row position"] | None = None,
    jacobian: str = "auto",
    n_probes: int | None = None,
    batch_size: int = 256,
    memory: int | None = None,
    seed: int = 0,
) -> list[Float[Tensor, "d d"]]:
    """K of the nodes first .. last-1: (1/(n p)) sum J^T J, J the Jacobian of transform(f_last) by the node; p positions.

    One forward pass a batch and one batched backward pass for all nodes together. The mean over the p positions of the
    node itself goes with the sum over all output coordinates (of all output positions). Positions outside ``mask`` are left
    out on both sides, in nodes that have as many.
    """
    last = len(sections) if last is None else last
    grams: list[Tensor] = []
    places: list[int] = []
    probes: Probes | None = None
    outputs = _outputs(sections, x[:1], first, last, transform)
    side_by_side = min(outputs, n_probes or _PROBES, AT_ONCE)
    for batch, rows in enumerate(batches(sections, x, gradients=side_by_side, batch_size=batch_size, memory=memory)):
        nodes = sections.nodes(x[rows], first=first, last=last, gradients=True)
        valid = [valid_positions(node, None if mask is None else mask[rows]) for node in nodes]
        with torch.enable_grad():
            end = transform(nodes[-1]) if transform is not None else nodes[-1]
            if valid[-1] is not None and end.ndim == 3:
                end = end * valid[-1][..., None]
            end = end.reshape(len(end), -1)
        probes = Probes.choose(jacobian, end.shape[1], n_probes, seed + batch)
        sources = nodes[:-1]
        grams = grams or [_square(node) for node in sources]
        places = places or [0 for _ in sources]
        for i, (node, some) in enumerate(zip(sources, valid, strict=False)):
            places[i] += node[..., 0].numel() if some is None else int(some.sum())
        for vectors in probes.vectors(len(end), end.shape[1], end, side_by_side):
            slopes = torch.autograd.grad(
                end, sources, vectors, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            for total, slope, some in zip(grams, slopes, valid, strict=False):
                if slope is not None:
                    add_gram(total, slope if some is None else slope * some[..., None])
        for name, total in zip(sections.names[first:], grams, strict=False):
            if not bool(torch.isfinite(total).all()):
                raise ActivationError(
                    f"the Jacobian of the output by {name} is not finite in rows {rows.start} to {rows.stop - 1}; look for "
                    "a square root, logarithm or division at 0 behind it"
                )
    share = 1 if probes is None or probes.exact else probes.count
    return [total / (share * count) for total, count in zip(grams, places, strict=True)]


def add_gram(total: Float[Tensor, "d d"], slopes: Float[Tensor, "probe row ... d"]) -> None:
    """Add sum of g g^T over all rows g of ``slopes`` to ``total``, in float64."""
    rows = 1
    if slopes.ndim == 4:  # outputs read at one position leave most others without a gradient
        live = (slopes != 0).any(dim=3).any(dim=1).any(dim=0)
        slopes = slopes if bool(live.all()) else slopes[:, :, live]
    if torch.equal(slopes, slopes[:, :1].expand_as(slopes)):  # before a linear readout all rows have one Jacobian
        rows, slopes = slopes.shape[1], slopes[:, :1]
    flat = slopes.reshape(-1, slopes.shape[-1]).to(torch.float64)
    total.addmm_(flat.T, flat, alpha=rows)


def _square(node: Tensor) -> Tensor:
    return torch.zeros(node.shape[-1], node.shape[-1], dtype=torch.float64, device=node.device)


def _outputs(
    sections: Sections, row: Tensor, first: int, last: int, transform: Callable[[Tensor], Tensor] | None
) -> int:
    end = sections.nodes(row, first=first, last=last)[-1]
    if transform is not None:
        with torch.no_grad():
            end = transform(end)
    if not isinstance(end, Tensor) or end.ndim < 2 or len(end) != 1:
        raise InputError("output_transform must map (n, ...) outputs to (n, ...) with at least one column")
    return end[0].numel()
