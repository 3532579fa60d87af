"""What a layer remembers, as plain numbers: one row a channel."""

__all__ = ["kernel_summary"]

import math

import pandas as pd
import torch
from torch import nn

from theodolite.core.errors import InputError
from theodolite.networks.diagonal_ssm.kernel import DiagonalSSMKernel
from theodolite.networks.diagonal_ssm.layer import S4D

_ENERGY = 0.95
_LONGEST = 1 << 16


def kernel_summary(layer: nn.Module, *, length: int | None = None) -> pd.DataFrame:
    """The memory of every channel of a layer, in steps of its series.

    channel. timescale_steps: 1/dt. decay_steps: the slowest state falls by e in so many, 1 / (dt min |Re A|).
    dominant_frequency: cycles a step where the kernel's spectrum is largest. effective_length: the fewest steps that hold
    95 % of the kernel's energy. Kernels are read over ``length`` steps, what a series of that length can show of them; None
    reads up to 8 times the slowest decay, at most 65,536 steps.

    Raises InputError for anything else than a layer or its kernel, and for a length below 1.

    >>> kernel_summary(S4D(2, n_state=8, seed=0)).columns.tolist()
    ['channel', 'timescale_steps', 'decay_steps', 'dominant_frequency', 'effective_length']
    """
    kernel = layer.kernel if isinstance(layer, S4D) else layer
    if not isinstance(kernel, DiagonalSSMKernel):
        raise InputError(f"kernel_summary takes an S4D layer or its kernel, got {type(layer).__name__}")
    with torch.no_grad():
        dt = kernel.dt.double()
        decay = 1 / (dt * kernel.eigenvalues().real.double().abs().amin(dim=1))
        if length is None:
            length = max(2, math.ceil(min(float(decay.max()) * 8, _LONGEST)))
        values = kernel(length).double()
    energy = values.square().cumsum(dim=1)
    effective = (energy < _ENERGY * energy[:, -1:]).sum(dim=1) + 1
    spectrum = torch.fft.rfft(values, dim=1).abs()
    frequency = spectrum.argmax(dim=1).double() / values.shape[1]
    columns = {"timescale_steps": 1 / dt, "decay_steps": decay, "dominant_frequency": frequency}
    return pd.DataFrame(
        {"channel": range(kernel.d_model)}
        | {name: value.cpu().numpy() for name, value in columns.items()}
        | {"effective_length": effective.cpu().numpy()}
    )
