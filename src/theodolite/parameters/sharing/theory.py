"""How well a linear model survives sharing or random pruning: the inner product <theta_hat, x>, sampled and in closed form.

    theta_hat = S^T S theta,   S the signed map of m slots;   E <theta_hat, x> = <theta, x>
    Var = sum over pairs {i, j} of p_ij (theta_i x_j + theta_j x_i)^2
          p_ij = 1/m (hashed);   1/m in different chunks of m positions, 0 in the same (fold)
    pruning at random, kept with probability m/n and scaled by n/m:   Var = (n/m - 1) sum_i theta_i^2 x_i^2

Source: Desai, Shrivastava, 2023, arXiv:2310.11611, section on the theory of parameter sharing.
"""

__all__ = ["inner_product_variance", "sketch_inner_product"]

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.parameters.sharing.maps import random_below, random_words, sign_bits, stream_key

_BYTES = 1 << 24  # draws worked on at a time: more would leave the cache
_KINDS = ("fold", "hashed", "pruning")


def sketch_inner_product(
    theta: ArrayLike | Tensor,
    x: ArrayLike | Tensor,
    m: int,
    *,
    mapper: str = "fold",
    samples: int = 1000,
    seed: int = 0,
) -> Float[Tensor, " sample"]:
    """<theta_hat, x> for ``samples`` independent draws of the map (or of the pruned positions), float64.

    theta, x: (n,). mapper: "fold", "hashed" or "pruning".

    >>> float(sketch_inner_product([1.0, 2.0], [3.0, 1.0], 2, samples=3).mean())
    5.0
    """
    theta, x = _pair(theta, x, m, mapper)
    if samples < 1:
        raise InputError(f"need at least one sample, got {samples}")
    n, positions = len(theta), torch.arange(len(theta))
    out = torch.empty(samples, dtype=torch.float64)
    for part in chunks(samples, 8.0 * (6 * n + 4 * m), _BYTES):
        draws = torch.arange(part.start, part.stop)[:, None]
        slot_key = random_words(draws, stream_key(seed, 3))
        if mapper == "pruning":
            kept = random_below(1 << 53, positions, slot_key).double() * 2.0**-53 < m / n
            out[part] = (kept * (theta * x)).sum(dim=1) * (n / m)
            continue
        if mapper == "hashed":
            slots = random_below(m, positions, slot_key)
        else:
            slots = (random_below(m, positions // m, slot_key) + positions % m) % m
        signs = 1.0 - 2.0 * sign_bits(positions, random_words(draws, stream_key(seed, 4)))
        empty = torch.zeros(len(draws), m, dtype=torch.float64)
        sketches = [empty.scatter_add(1, slots, signs * one) for one in (theta, x)]
        out[part] = (sketches[0] * sketches[1]).sum(dim=1)
    return out


def inner_product_variance(theta: ArrayLike | Tensor, x: ArrayLike | Tensor, m: int, mapper: str = "fold") -> float:
    """The exact variance of <theta_hat, x>: what `sketch_inner_product` has over its draws.

    >>> inner_product_variance([1.0, 2.0], [3.0, 1.0], 1), inner_product_variance([1.0, 2.0], [3.0, 1.0], 1, "pruning")
    (49.0, 13.0)
    """
    theta, x = _pair(theta, x, m, mapper)
    if mapper == "pruning":
        return float((len(theta) / m - 1) * (theta * x).square().sum())
    # a fold never puts two positions of one chunk into one slot: their pairs drop out
    within = _pairs(*_by_chunk(theta, x, m)).sum() if mapper == "fold" else 0.0
    return float((_pairs(theta, x) - within).clamp(min=0) / m)


def _pairs(theta: Tensor, x: Tensor) -> Tensor:
    """Sum over unordered pairs of (theta_i x_j + theta_j x_i)^2, along the last axis, without a pair being formed."""
    products = theta * x
    norms = theta.square().sum(dim=-1) * x.square().sum(dim=-1)
    return norms + products.sum(dim=-1).square() - 2 * products.square().sum(dim=-1)


def _by_chunk(theta: Tensor, x: Tensor, m: int) -> list[Tensor]:
    return [torch.nn.functional.pad(one, (0, -len(one) % m)).view(-1, m) for one in (theta, x)]


def _pair(theta: ArrayLike | Tensor, x: ArrayLike | Tensor, m: int, mapper: str) -> tuple[Tensor, Tensor]:
    if mapper not in _KINDS:
        raise InputError(f"mapper is one of {', '.join(_KINDS)}, got {mapper!r}")
    first, second = (
        torch.from_numpy(np.require(np.asarray(one, dtype=np.float64), requirements="W")) for one in (theta, x)
    )
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise InputError(
            f"theta and x must be vectors of one length, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise InputError("theta and x must be finite")
    if not 1 <= m <= len(first):
        raise InputError(f"need 1 <= m <= n = {len(first)}, got m = {m}")
    return first, second
