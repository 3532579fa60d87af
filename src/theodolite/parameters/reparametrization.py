"""Seeded linear maps from few coordinates to many weights: dense, sparse, fastfood and hashed.

    theta = theta_0 + P z,   z in R^d,   P in R^(D x d) with unit columns over all D entries together          (eq. 2)

    dense     P_ij ~ N(0, 1), columns normalised; memory D d
    sparse    P_ij = +-1 with probability 1/sqrt(D), else 0, columns normalised by their own norm; d sqrt(D) entries
    fastfood  P = (1/s) H G Pi H B on vectors padded to L = 2^ceil(log2 D), s = sqrt(L sum(G^2)) sqrt(D / L); memory L,
              the inner H on 2^ceil(log2 d) numbers only
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
_BITS = 6


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
        return _summed_at(z[..., self.columns] * self.values, self.rows, self.shape[0])

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        return _summed_at(g[..., self.rows] * self.values, self.columns, self.shape[1])


def _summed_at(x: Tensor, index: Tensor, size: int) -> Tensor:
    """(..., size): entry j sums the numbers of x (..., n) whose index is j; the adjoint of ``index_select``."""
    zeros = x.new_zeros(*x.shape[:-1], size)
    if x.ndim == 1:
        return zeros.index_add(0, index, x)
    return zeros.scatter_add(-1, index.long().expand(x.shape), x)  # index_add is an order slower on a batch


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
    index: Tensor
    gaussian: Tensor

    def __init__(self, d: int, D: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__(d, D)
        rng = np.random.default_rng(seed)
        L, short = _padded(D), _padded(d)
        permutation = rng.permutation(L).astype(np.int32)
        signs = torch.from_numpy(rng.integers(0, 2, L) * 2.0 - 1).to(dtype)
        gaussian = torch.from_numpy(rng.standard_normal(L)).to(dtype)
        self._keep(  # H B z repeats itself after `short` entries, so the permutation is known by where in one tile it reads
            signs=signs[:d].clone(),
            index=torch.from_numpy(permutation % short),
            gaussian=gaussian / _fastfood_scale(gaussian, D),
        )

    def _apply_map(self, z: Tensor) -> Tensor:
        return _hadamard(_one_tile(z, self.signs).index_select(-1, self.index) * self.gaussian)[..., : self.shape[0]]

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        D, d = self.shape
        padded = nn.functional.pad(g, (0, len(self.gaussian) - D))
        tile = _summed_at(_hadamard(padded) * self.gaussian, self.index, _padded(d))
        return _hadamard(tile)[..., :d] * self.signs


class _Hashed(LinearMap):
    place: Tensor
    scale: Tensor

    def __init__(self, d: int, D: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__(d, D)
        rng = np.random.default_rng(seed)
        place = np.empty(D, dtype=np.int32)
        place[rng.permutation(D)] = np.arange(D, dtype=np.int32)  # the weight at place p belongs to coordinate p mod d
        positive = rng.integers(0, 2, D, dtype=np.int64) == 1
        count = D // d + (np.arange(d) < D % d)
        self._keep(  # 4 bytes a weight: which of the 2 d numbers (z, -z) it takes
            place=torch.from_numpy((place % d + np.where(positive, 0, d)).astype(np.int32)),
            scale=torch.from_numpy(1 / np.sqrt(count)).to(dtype),
        )

    def _apply_map(self, z: Tensor) -> Tensor:
        scaled = z * self.scale
        return torch.cat([scaled, -scaled], dim=-1).index_select(-1, self.place)

    def _apply_adjoint(self, g: Tensor) -> Tensor:
        plus, minus = _summed_at(g, self.place, 2 * self.shape[1]).tensor_split(2, dim=-1)
        return (plus - minus) * self.scale


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

    Raises InputError unless 1 <= d <= D, the seed is at least 0 and the kind is known.

    >>> make_projection("hashed", 2, 4, seed=0).column_norms().tolist()
    [1.0, 1.0]
    """
    if kind not in KINDS:
        raise InputError(f"a projection is one of {', '.join(KINDS)}, got {kind!r}")
    if int(d) != d or int(D) != D or int(seed) != seed or seed < 0:
        raise InputError(f"d, D and seed must be whole numbers and seed at least 0, got {d}, {D} and {seed}")
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
    """H x as products with small Hadamard matrices, one for each axis of x folded into a cube: H_mn = H_m kron H_n.

    Each product takes the first axis and puts it last, so that after all of them the order is the old one. A matrix product
    with 64 terms is far faster than six passes of sums and differences through memory.
    """
    bits = x.shape[-1].bit_length() - 1
    for part in range(0, bits, _BITS):
        size = 1 << min(_BITS, bits - part)
        x = (x.unflatten(-1, (size, -1)).mT @ _hadamard_matrix(size, x)).flatten(-2)
    return x


def _hadamard_matrix(size: int, like: Tensor) -> Tensor:
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        pair = torch.cat([matrix, matrix], dim=1)
        matrix = torch.cat([pair, torch.cat([matrix, -matrix], dim=1)])
    return matrix


def fastfood(
    x: Float[Tensor, "*batch coordinate"],
    D: int,
    *,
    signs: Float[Tensor, " length"],
    permutation: Int[Tensor, " length"],
    gaussian: Float[Tensor, " length"],
) -> Float[Tensor, "*batch weight"]:
    """(1/s) H G Pi H B x, first D entries; s = sqrt(L sum(G^2)) sqrt(D / L), so that columns have norm 1 (exactly at D = L).

    x (..., d) counts as padded with zeros to L; (Pi v)_i = v_permutation(i). Such a vector is e_1 kron x' with x' of length
    d' = 2^ceil(log2 d), and H_L = H_(L/d') kron H_d', so H B x is the transform of d' numbers, repeated L / d' times: one
    of the two long transforms becomes a short one, exactly. Raises InputError where d or D exceed L.
    """
    L = len(signs)
    if not 1 <= x.shape[-1] <= L or not 1 <= D <= L:
        raise InputError(f"need 1 <= d <= L and 1 <= D <= L = {L}, got d = {x.shape[-1]} and D = {D}")
    tile = _one_tile(x, signs)
    mixed = tile[..., permutation & (tile.shape[-1] - 1)] * gaussian
    return fwht(mixed)[..., :D] / _fastfood_scale(gaussian, D)


def _one_tile(x: Tensor, signs: Tensor) -> Tensor:
    """H B x up to where it repeats itself."""
    d = x.shape[-1]
    return fwht(nn.functional.pad(x * signs[:d], (0, _padded(d) - d)))


def _fastfood_scale(gaussian: Tensor, D: int) -> Tensor:
    L = len(gaussian)
    return (L * gaussian.square().sum()).sqrt() * math.sqrt(D / L)


def _padded(D: int) -> int:
    return 1 << (D - 1).bit_length()
