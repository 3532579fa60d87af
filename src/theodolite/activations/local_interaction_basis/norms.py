"""A norm in two halves, so that a node can stand between them: after the spread is taken, before it divides.

    x -> (x - mean, s) -> w * (x - mean) / s + b,   s = sqrt(var + eps);   of an RMS norm s = sqrt(mean x^2 + eps), no mean

Mixed with the others, the one coordinate s would make every direction act on every output through the division.

Source: Bushnaq et al., 2024, arXiv:2405.10928, appendix on layer norms.
"""

__all__ = ["NormDivision", "NormSpread", "norm_halves"]

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import ModelError


class NormSpread(nn.Module):
    """The first half: (..., width) to (..., width + 1), centred where the norm centres, and the spread last."""

    def __init__(self, eps: float, *, centred: bool) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred

    def forward(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row more"]:
        """(x - mean, s)."""
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return torch.cat([x, (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()], dim=-1)


class NormDivision(nn.Module):
    """The second half: divides by the last coordinate, then weight and bias of the norm as it is (nothing is copied)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Float[Tensor, "*row more"]) -> Float[Tensor, "*row width"]:
        """w (x - mean) / s + b."""
        made = x[..., :-1] / x[..., -1:]
        weight, bias = (getattr(self.norm, name, None) for name in ("weight", "bias"))
        made = made if weight is None else made * weight
        return made if bias is None else made + bias


def norm_halves(norm: nn.Module) -> tuple[NormSpread, NormDivision]:
    """Both halves of a LayerNorm over the last axis, or of an RMS norm, as sections of a `LocalInteractionBasis`.

    Raises ModelError for what is neither: their product has to be the norm itself, which is tried.

    >>> norm, x = nn.LayerNorm(4), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    >>> spread, division = norm_halves(norm)
    >>> bool(torch.allclose(division(spread(x)), norm(x), atol=1e-6)), tuple(spread(x).shape)
    (True, (2, 5))
    """
    eps = getattr(norm, "eps", None)
    eps = getattr(norm, "variance_epsilon", None) if eps is None else eps
    like = next(norm.parameters(), None)
    width = like.shape[-1] if like is not None else int((getattr(norm, "normalized_shape", None) or (0,))[-1])
    dtype = torch.float32 if like is None else like.dtype
    eps = torch.finfo(dtype).eps if eps is None else float(eps)
    if width > 1:
        generator = torch.Generator().manual_seed(0)
        x = (torch.randn(8, width, generator=generator) * 3 + 1).to(
            torch.zeros(0, dtype=dtype) if like is None else like
        )
        with torch.no_grad():
            wanted = norm(x)
            for centred in (True, False):
                halves = NormSpread(eps, centred=centred), NormDivision(norm)
                if wanted.shape == x.shape and torch.allclose(halves[1](halves[0](x)), wanted, rtol=1e-3, atol=1e-5):
                    return halves
    raise ModelError(f"{type(norm).__name__} is neither a LayerNorm over the last axis nor an RMS norm")
