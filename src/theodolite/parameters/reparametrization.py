"""Seeded linear maps from few coordinates to many weights: dense, sparse, fastfood and hashed.

    theta = theta_0 + P z,   z in R^d,   P in R^(D x d) with unit columns over all D entries together          (eq. 2)

    dense     P_ij ~ N(0, 1), columns normalised; memory D d
    sparse    P_ij = +-1 with probability 1/sqrt(D), else 0, columns normalised by their own norm; d sqrt(D) entries
    fastfood  P = (1/s) H G Pi H B on vectors padded to L = 2^ceil(log2 D), s = sqrt(L sum(G^2)) sqrt(D / L); memory L
    hashed    row i has one entry sign_i / sqrt(count of h(i)) in column h(i), h balanced; memory D

The first three are the paper's; in "hashed" every coordinate owns floor(D/d) or ceil(D/d) weights, the columns are
orthonormal, and d = D gives the full space. All random numbers are drawn on the CPU from the seed, whatever the device.

Source: Li, Farkhoor, Liu, Yosinski, 2018, arXiv:1804.08838, section 7; Li, Hastie, Church, 2006, Very sparse random
projections; Le, Sarlos, Smola, 2013, arXiv:1408.3060 (fastfood).
"""

__all__ = ["KINDS", "LinearMap", "fastfood", "fwht", "make_projection"]

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks

_LARGEST_DENSE = 100_000_000
_DRAWS = 1 << 20
_CACHE = 1 << 23


class LinearMap(nn.Module):
    """A fixed map z -> P z, differentiable in z to any order, that is never trained and never stored in a state dict.

    A subclass gives `_apply_map` and `_apply_adjoint` on the last axis; leading axes are batched.
    """

    shape: tuple[int, int]
    """(D, d)."""

    def __init__(self, d: int, D: int) -> None:
        super().__init__()
        self.shape = (D, d)

    def _apply_map(self, z: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no map")

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no adjoint")

    def forward(self, theta: Float[Tensor, "*batch coordinate"]) -> Float[Tensor, "*batch weight"]:
        """P theta, (..., d) -> (..., D)."""
        if theta.shape[-1] != self.shape[1]:
            raise InputError(f"this map takes {self.shape[1]} coordinates, got {theta.shape[-1]}")
        return _Forward.apply(theta, self)

    def adjoint(self, g: Float[Tensor, "*batch weight"]) -> Float[Tensor, "*batch coordinate"]:
        """P^T g, (..., D) -> (..., d)."""
        if g.shape[-1] != self.shape[0]:
            raise InputError(f"the adjoint takes {self.shape[0]} numbers, got {g.shape[-1]}")
        return _Adjoint.apply(g, self)

    def to_dense(self) -> Float[Tensor, "weight coordinate"]:
        """P as a matrix (D, d), for checks."""
        return self._apply_map(self._units(slice(0, self.shape[1]))).mT.contiguous()

    def column_norms(self) -> Float[Tensor, " coordinate"]:
        """Euclidean norm of each column, (d,), worked out from the map as it is."""
        D, d = self.shape
        # a block that stays in the cache is several times faster than one that fills the memory budget
        parts = [_norm(self._apply_map(self._units(part))) for part in chunks(d, 32.0 * (2 * D + d), _CACHE)]
        return torch.cat(parts)

    def _units(self, part: slice) -> Tensor:
        like = next(iter(buffer for buffer in self.buffers() if buffer.is_floating_point()))
        unit = torch.zeros(part.stop - part.start, self.shape[1], dtype=like.dtype, device=like.device)
        unit[torch.arange(len(unit)), torch.arange(part.start, part.stop)] = 1
        return unit

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def _norm(rows: Tensor) -> Tensor:
    """Norms along the last axis, summed in double precision: D terms of float32 cost digits that a unit column needs."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).to(rows.dtype)


class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, linear: LinearMap) -> Tensor:
        return linear._apply_map(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return _Adjoint.apply(grad[0], ctx.linear), None


class _Adjoint(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, linear: LinearMap) -> Tensor:
        return linear._apply_adjoint(g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return _Forward.apply(grad[0], ctx.linear), None


class _Dense(LinearMap):
    matrix: Tensor

    def __init__(self, d: int, D: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__(d, D)
        if d * D > _LARGEST_DENSE:
            raise InputError(
                f"a dense map of {D} x {d} takes {d * D * 4 / 2**30:.1f} GiB; use hashed, fastfood or sparse"
            )
        rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((d, D), dtype=np.float32)).to(dtype)
        self._keep(matrix=rows / _norm(rows)[:, None])

    def _apply_map(self, z: Tensor) -> Tensor:
        return z @ self.matrix

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        return g @ self.matrix.mT


class _Sparse(LinearMap):
    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, d: int, D: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__(d, D)
        rng = np.random.default_rng(seed)
        cells = _bernoulli_positions(d * D, 1 / math.sqrt(D), rng)
        columns, rows = cells // D, cells % D
        empty = np.setdiff1d(np.arange(d), columns)  # happens for small D only; a column of zeros has no norm
        columns, rows = np.r_[columns, empty], np.r_[rows, rng.integers(0, D, len(empty))]
        order = np.argsort(columns, kind="stable")
        columns, rows = columns[order], rows[order]
        signs = rng.integers(0, 2, len(rows)) * 2.0 - 1
        values = signs / np.sqrt(np.bincount(columns, minlength=d))[columns]
        self._keep(
            rows=torch.from_numpy(rows), columns=torch.from_numpy(columns), values=torch.from_numpy(values).to(dtype)
        )

    def _apply_map(self, z: Tensor) -> Tensor:
        out = z.new_zeros(*z.shape[:-1], self.shape[0])
        return out.index_add(-1, self.rows, z[..., self.columns] * self.values)

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        out = g.new_zeros(*g.shape[:-1], self.shape[1])
        return out.index_add(-1, self.columns, g[..., self.rows] * self.values)


def _bernoulli_positions(n: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Positions of the successes among n independent trials: the gaps between them are geometric."""
    parts, last = [], -1
    while last < n:
        positions = last + np.cumsum(rng.geometric(p, min(_DRAWS, int(1.1 * (n - last) * p) + 16)))
        parts.append(positions)
        last = int(positions[-1])
    found = np.concatenate(parts)
    return found[found < n]


class _Fastfood(LinearMap):
    signs: Tensor
    permutation: Tensor
    inverse: Tensor
    gaussian: Tensor

    def __init__(self, d: int, D: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__(d, D)
        rng = np.random.default_rng(seed)
        L = _padded(D)
        permutation = torch.from_numpy(rng.permutation(L))
        self._keep(
            signs=torch.from_numpy(rng.integers(0, 2, L) * 2.0 - 1).to(dtype),
            permutation=permutation,
            inverse=torch.argsort(permutation),
            gaussian=torch.from_numpy(rng.standard_normal(L)).to(dtype),
        )

    def _apply_map(self, z: Tensor) -> Tensor:
        return fastfood(z, self.shape[0], signs=self.signs, permutation=self.permutation, gaussian=self.gaussian)

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        D, d = self.shape
        padded = nn.functional.pad(g / _fastfood_scale(self.gaussian, D), (0, len(self.signs) - D))
        moved = (_hadamard(padded) * self.gaussian)[..., self.inverse]
        return (_hadamard(moved) * self.signs)[..., :d]


class _Hashed(LinearMap):
    order: Tensor
    place: Tensor
    signs: Tensor
    scale: Tensor

    def __init__(self, d: int, D: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__(d, D)
        rng = np.random.default_rng(seed)
        order = rng.permutation(D)  # the weight at place p belongs to coordinate p mod d
        place = np.empty(D, dtype=np.int32)
        place[order] = np.arange(D, dtype=np.int32)
        count = D // d + (np.arange(d) < D % d)
        self._keep(
            order=torch.from_numpy(order.astype(np.int32)),
            place=torch.from_numpy(place),
            signs=torch.from_numpy(rng.integers(0, 2, D) * 2.0 - 1).to(dtype),
            scale=torch.from_numpy(1 / np.sqrt(count)).to(dtype),
        )

    def _apply_map(self, z: Tensor) -> Tensor:
        D, d = self.shape
        tiled = (z * self.scale).repeat(*[1] * (z.ndim - 1), -(-D // d))
        return tiled.index_select(-1, self.place) * self.signs

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        D, d = self.shape
        moved = (g * self.signs).index_select(-1, self.order)
        padded = nn.functional.pad(moved, (0, -D % d))
        return padded.unflatten(-1, (-1, d)).sum(dim=-2) * self.scale


KINDS: dict[str, type[LinearMap]] = {"dense": _Dense, "sparse": _Sparse, "fastfood": _Fastfood, "hashed": _Hashed}
"""The maps by name."""


def make_projection(
    kind: str,
    d: int | np.integer,
    D: int | np.integer,
    *,
    seed: int | np.integer,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LinearMap:
    """The map of one kind from d coordinates to D weights; the same seed gives the same map on every device.

    Raises InputError unless 1 <= d <= D and the kind is known.

    >>> make_projection("hashed", 2, 4, seed=0).column_norms().tolist()
    [1.0, 1.0]
    """
    if kind not in KINDS:
        raise InputError(f"a projection is one of {', '.join(KINDS)}, got {kind!r}")
    if d < 1:
        raise InputError(f"a subspace needs at least one dimension, got d = {d}")
    if d > D:
        raise InputError(f"a subspace of d = {d} dimensions does not fit into D = {D} parameters; take d <= {D}")
    return KINDS[kind](int(d), int(D), int(seed), dtype).to(device)  # type: ignore[call-arg]


def fwht(x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
    """Unnormalised Walsh-Hadamard transform H x along the last axis, in natural (Hadamard) order; length 2^k.

    >>> fwht(torch.tensor([1.0, 0.0, 1.0, 0.0])).tolist()
    [2.0, 2.0, 0.0, 0.0]
    """
    L = x.shape[-1]
    if L < 1 or L & (L - 1):
        raise InputError(f"the length of a Walsh-Hadamard transform is a power of two, got {L}")
    return _Hadamard.apply(x)


class _Hadamard(torch.autograd.Function):
    """H is symmetric, so the transform is its own adjoint."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _hadamard(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return _Hadamard.apply(grad[0])


def _hadamard(x: Tensor) -> Tensor:
    """log2 L butterfly steps: half of them down the columns of a square, half across, so that each adds long rows."""
    bits = x.shape[-1].bit_length() - 1
    square = _butterflies(x.unflatten(-1, (1 << bits // 2, 1 << (bits - bits // 2))))
    return _butterflies(square.mT.contiguous()).mT.flatten(-2)


def _butterflies(x: Tensor) -> Tensor:
    """H along the second last axis."""
    half = x.shape[-2] // 2
    while half:
        a, b = x.unflatten(-2, (-1, 2, half)).unbind(-3)
        x = torch.stack((a + b, a - b), dim=-3).flatten(-4, -2)
        half //= 2
    return x


def fastfood(
    x: Float[Tensor, "*batch coordinate"],
    D: int,
    *,
    signs: Float[Tensor, " length"],
    permutation: Int[Tensor, " length"],
    gaussian: Float[Tensor, " length"],
) -> Float[Tensor, "*batch weight"]:
    """(1/s) H G Pi H B x, first D entries; s = sqrt(L sum(G^2)) sqrt(D / L), so that columns have norm 1 (exactly at D = L).

    x (..., d) is padded with zeros to L; (Pi v)_i = v_permutation(i). Raises InputError where d or D exceed L.
    """
    L = len(signs)
    if x.shape[-1] > L or not 1 <= D <= L:
        raise InputError(f"need d <= L and 1 <= D <= L = {L}, got d = {x.shape[-1]} and D = {D}")
    padded = nn.functional.pad(x, (0, L - x.shape[-1])) * signs
    mixed = fwht(padded)[..., permutation] * gaussian
    return fwht(mixed)[..., :D] / _fastfood_scale(gaussian, D)


def _fastfood_scale(gaussian: Tensor, D: int) -> Tensor:
    L = len(gaussian)
    return (L * gaussian.square().sum()).sqrt() * math.sqrt(D / L)


def _padded(D: int) -> int:
    return 1 << (D - 1).bit_length()
