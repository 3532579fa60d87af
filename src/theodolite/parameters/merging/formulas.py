"""The arithmetic of a merge: trims, random masks, elections of signs, arcs and weighted sums of tensors.

Source: Akiba, Shing, Tang, Sun, Ha, 2024, arXiv:2403.13187 (section 3.1); ties: Yadav et al., 2023, arXiv:2306.01708;
DARE: Yu et al., 2023, arXiv:2311.03099; task arithmetic: Ilharco et al., 2022, arXiv:2212.04089.
"""

__all__ = ["METHODS", "Method", "dare", "elect_signs", "method_named", "slerp", "trim"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from theodolite.core.errors import InputError, ModelError


@dataclass(frozen=True)
class Method:
    """What a merging formula needs: a base, densities (and what they keep), an election, and whether it normalises."""

    base: bool
    keeps: str = ""  # "" (no densities), "largest" or "random"
    elects: bool = False
    normalize: bool = False


METHODS = {
    "linear": Method(base=False, normalize=True),
    "slerp": Method(base=False),
    "task_arithmetic": Method(base=True),
    "ties": Method(base=True, keeps="largest", elects=True, normalize=True),
    "dare_linear": Method(base=True, keeps="random"),
    "dare_ties": Method(base=True, keeps="random", elects=True),
}
"""The merging formulas by name, with their defaults."""

_SMALL = 1e-8  # a sum of weights below this is no divisor
_STRAIGHT = 0.9995  # |cos| above which two tensors are taken to be parallel


def exact(tensor: Tensor) -> Tensor:
    """The tensor in the numbers that merging computes with: float64 where it is that, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def trim(tensor: Float[Tensor, "..."], density: object) -> Float[Tensor, "..."]:
    """The ``int(density * n)`` entries of largest magnitude, zeros elsewhere; of equal ones the first are kept.

    >>> trim(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5)
    tensor([ 0., -3.,  2.,  0.])
    """
    kept = kept_largest(as_density(density), tensor.numel())
    return torch.where(magnitude_ranks(tensor).view(tensor.shape) < kept, tensor, torch.zeros_like(tensor))


def kept_largest(density: float, size: int) -> int:
    """How many entries a trim keeps."""
    return int(density * size)


def magnitude_ranks(tensor: Tensor) -> Tensor:
    """For each entry of the flattened tensor its place in the order of magnitude, 0 the largest; int32 where it fits."""
    order = torch.argsort(tensor.reshape(-1).abs(), descending=True, stable=True)
    kind = torch.int32 if order.numel() < 2**31 else torch.int64
    ranks = torch.empty_like(order, dtype=kind)
    ranks[order] = torch.arange(order.numel(), dtype=kind, device=order.device)
    return ranks


def dare(tensor: Float[Tensor, "..."], density: object, generator: torch.Generator) -> Float[Tensor, "..."]:
    """Each entry kept with probability ``density`` and divided by it, zero otherwise; its mean is the tensor itself.

    >>> dare(torch.ones(4), 1.0, torch.Generator().manual_seed(0))
    tensor([1., 1., 1., 1.])
    """
    share = as_density(density)
    drawn = torch.rand(tensor.shape, generator=generator, device=generator.device).to(tensor.device)
    return torch.where(drawn < share, tensor / share, torch.zeros_like(tensor))


def elect_signs(weighted: Float[Tensor, "source ..."], method: str = "sum") -> Bool[Tensor, "source ..."]:
    """Which entries agree with the sign that their position elects; an entry of zero never does.

    weighted: w_k tau_k, sources along the first axis. method: "sum", the sign of the sum over sources (its mass), or
    "count", of the sum of signs. A sum of zero elects +.

    >>> elect_signs(torch.tensor([[2.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]))
    tensor([[ True, False, False],
            [False,  True, False]])
    """
    if method not in ("sum", "count"):
        raise InputError(f"sign_method is 'sum' or 'count', got {method!r}")
    signs = weighted.sign()
    votes = (weighted if method == "sum" else signs).sum(dim=0)
    elected = torch.where(votes >= 0, 1.0, -1.0).to(weighted)
    return signs == elected


def slerp(a: Float[Tensor, "..."], b: Float[Tensor, "..."], t: float | int) -> Float[Tensor, "..."]:
    """The point at ``t`` on the arc from ``a`` (t = 0) to ``b`` (t = 1); on the line where |cos| of the two > 0.9995.

    Raises InputError where shapes differ.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.7071, 0.7071])
    """
    if a.shape != b.shape:
        raise InputError(f"slerp needs two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    first, second = arc_weights(t, cosine(a, b))
    return first * a + second * b


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two flattened tensors; 1 where either is zero, so that the line is taken."""
    x, y = a.reshape(-1).double(), b.reshape(-1).double()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms > _SMALL**2 else 1.0


def arc_weights(t: float | int, cos: float) -> tuple[float, float]:
    """The two weights of a slerp."""
    if abs(cos) > _STRAIGHT:
        return 1.0 - t, float(t)
    angle = math.acos(cos)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def as_density(density: object) -> float:
    """A number in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, (int, float, np.floating)) or not 0 < density <= 1:
        raise InputError(f"a density is the share of entries kept, in (0, 1]; got {density!r}")
    return float(density)


def method_named(name: str) -> Method:
    """The formula of that name."""
    if name not in METHODS:
        raise InputError(f"there is no merging method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def combine(
    deltas: list[Tensor], weights: Sequence[float], *, elects: bool, normalize: bool, sign_method: str
) -> Tensor:
    """sum_k w_k tau_k of task vectors that are masked already, after the election of signs and divided by the weights.

    The task vectors are overwritten.
    """
    for delta, weight in zip(deltas, weights):
        delta.mul_(weight)
    if not elects:
        mixed = deltas[0]
        for delta in deltas[1:]:
            mixed += delta
        total = math.fsum(weights)
        return mixed.div_(total) if normalize and abs(total) > _SMALL else mixed
    votes = deltas[0].clone() if sign_method == "sum" else deltas[0].sign()
    for delta in deltas[1:]:
        votes += delta if sign_method == "sum" else delta.sign()
    elected = torch.ones_like(votes).copysign_(votes)  # a sum of opposites is +0; -0 only where all entries are 0
    # no masks: a comparison, or a choice by it, takes ten times as long as the arithmetic that gives the same numbers
    mixed, divisor = torch.zeros_like(votes), torch.zeros_like(votes) if normalize else None
    for delta, weight in zip(deltas, weights):
        agreeing = delta.mul_(elected).clamp_min_(0.0)
        mixed += agreeing
        if divisor is not None:
            divisor.add_(agreeing.sign_(), alpha=weight)
    mixed.mul_(elected)
    if divisor is not None:
        mixed.div_(divisor.add_(divisor.sign().abs_().neg_().add_(1.0)))  # 1 where it is 0
    return mixed


def keep_mask(order: Tensor, cut: int) -> Tensor:
    """-1 where ``order`` < ``cut`` and 0 elsewhere, by arithmetic: a masked fill takes many times as long."""
    if order.dtype == torch.int16:  # would overflow; float32 holds these numbers exactly
        return order.float().sub_(cut).clamp_(-1, 0)
    return order.sub(cut).clamp_(-1, 0).float()


def linear_divisor(weights: Sequence[float]) -> float:
    """The sum of the weights of a linear merge, where it can be divided by."""
    total = math.fsum(weights)
    if abs(total) <= _SMALL:
        raise ModelError(
            f"the weights {list(weights)} sum to {total:g}, which a linear merge cannot divide by; give weights with "
            "another sum, or normalize=False"
        )
    return total
