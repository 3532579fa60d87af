"""Convolution along time by the fast Fourier transform."""

__all__ = ["causal_convolution"]

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from scipy.fft import next_fast_len
from torch import Tensor

from theodolite.core.memory import chunks

_SPECTRA = 32 << 20
"""Bytes of spectra that exist at a time; more of them take longer, since they leave the processor's cache."""


def causal_convolution(
    u: Float[Tensor, "batch channel length"], kernel: Float[Tensor, "channel length"]
) -> Float[Tensor, "batch channel length"]:
    """y_l = sum_(m <= l) kernel_m u_(l-m), by FFT over at least 2L - 1 points, so that nothing wraps round.

    Channels go through in groups whose spectra take about 32 MB, and only u and the kernel are kept for the gradients, which
    are transforms of real numbers too: torch's own gradient of `rfft` is a complex transform of all points.

    >>> causal_convolution(torch.tensor([[[1.0, 0.0, 2.0]]]), torch.tensor([[1.0, 0.5, 0.25]])).round(decimals=4).tolist()
    [[[1.0, 0.5, 2.25]]]
    """
    found: Any = _Convolution.apply(u, kernel)
    return found


class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, kernel: Tensor) -> Tensor:
        points = _points(u)
        parts = [
            torch.fft.irfft(torch.fft.rfft(u[:, k], n=points) * torch.fft.rfft(kernel[k], n=points), n=points)
            for k in _groups(u, points)
        ]
        return torch.cat([part[..., : u.shape[-1]] for part in parts], dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Correlations of the output's gradient with the kernel and, summed over the rows, with u."""
        u, kernel = ctx.saved_tensors
        points, length = _points(u), u.shape[-1]
        by_u, by_kernel = list[Tensor](), list[Tensor]()
        for k in _groups(u, points):
            spectrum = torch.fft.rfft(grad[:, k], n=points)
            if ctx.needs_input_grad[0]:
                product = spectrum * torch.fft.rfft(kernel[k], n=points).conj()
                by_u.append(torch.fft.irfft(product, n=points)[..., :length])
            if ctx.needs_input_grad[1]:
                product = (spectrum * torch.fft.rfft(u[:, k], n=points).conj()).sum(dim=0)
                by_kernel.append(torch.fft.irfft(product, n=points)[..., :length])
        return torch.cat(by_u, dim=1) if by_u else None, torch.cat(by_kernel) if by_kernel else None

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, dkernel: Tensor | None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        u, kernel = ctx.saved_tensors
        by_u = None if du is None else causal_convolution(du, kernel)
        by_kernel = None if dkernel is None else causal_convolution(u, dkernel)
        return by_kernel if by_u is None else by_u if by_kernel is None else by_u + by_kernel


def _points(u: Tensor) -> int:
    return next_fast_len(2 * u.shape[-1] - 1, real=True) or 2 * u.shape[-1]


def _groups(u: Tensor, points: int) -> Iterator[slice]:
    """Channels at a time: spectra of u, of its product and of the answer."""
    return chunks(u.shape[1], 4 * (u.shape[0] + 1) * points * u.element_size(), _SPECTRA)
