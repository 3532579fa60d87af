"""The gradient of the shared array, rescaled so that a weight moves by the average gradient of its slot."""

__all__ = ["GRADIENT_SCALES", "gradient_weights", "scale_gradient"]

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.parameters.sharing.maps import SlotMap

GRADIENT_SCALES = ("v1", "v2", "v3", "v4", "v5", "none")
"""Ways to divide the gradient of a slot; "none" is the true gradient (ROAST)."""


def gradient_weights(
    map_: SlotMap, pieces: Sequence[tuple[int, int, float]], kind: str
) -> tuple[Float[Tensor, " slot"], Float[Tensor, " slot"]]:
    """1 / Gamma of every slot, and sqrt(k) / sum(lambda), the step of a slot under Adam; both float64.

    pieces: (lo, hi, lambda) of each layer. With k weights of factors lambda in a slot, Gamma is (sum lambda)^2 / k (v1),
    sum lambda (v2), mean lambda (v3), sqrt(sum lambda^2) (v4), sum lambda^2 (v5) or 1 (none); 1 for empty slots.
    """
    if kind not in GRADIENT_SCALES:
        raise InputError(f"gradient_scale is one of {', '.join(GRADIENT_SCALES)}, got {kind!r}")
    k, first, second = torch.zeros(3, map_.m, dtype=torch.float64, device=map_.unit.device)
    for lo, hi, scale in pieces:
        count = map_.load(lo, hi).double()
        k, first, second = k + count, first + scale * count, second + scale**2 * count
    gamma = {
        "v1": first.square() / k,
        "v2": first,
        "v3": first / k,
        "v4": second.sqrt(),
        "v5": second,
        "none": torch.ones_like(k),
    }[kind]
    one = torch.ones_like(k)
    return torch.where(k > 0, 1 / gamma, one), torch.where(k > 0, k.sqrt() / first, one)


def scale_gradient(x: Float[Tensor, " slot"], weight: Float[Tensor, " slot"]) -> Float[Tensor, " slot"]:
    """``x``, with its gradient multiplied by ``weight``: part of autograd, so that every training loop gets it, once.

    >>> x = torch.ones(2, requires_grad=True)
    >>> scale_gradient(x, torch.tensor([1.0, 0.5])).sum().backward()
    >>> x.grad.tolist()
    [1.0, 0.5]
    """
    fixed = x.detach()
    return fixed + weight * (x - fixed)
