"""Convolution along time by the fast Fourier transform."""

__all__ = ["causal_convolution"]

import torch
from jaxtyping import Float
from scipy.fft import next_fast_len
from torch import Tensor


def causal_convolution(
    u: Float[Tensor, "batch channel length"], kernel: Float[Tensor, "channel length"]
) -> Float[Tensor, "batch channel length"]:
    """y_l = sum_(m <= l) kernel_m u_(l-m), by FFT over at least 2L - 1 points, so that nothing wraps round.

    >>> causal_convolution(torch.tensor([[[1.0, 0.0, 2.0]]]), torch.tensor([[1.0, 0.5, 0.25]])).round(decimals=4).tolist()
    [[[1.0, 0.5, 2.25]]]
    """
    length = u.shape[-1]
    points = next_fast_len(2 * length, real=True)
    spectrum = torch.fft.rfft(u, n=points) * torch.fft.rfft(kernel, n=points)
    return torch.fft.irfft(spectrum, n=points)[..., :length]
