"""Fine-tuning with a small Tucker core per weight: few trainable numbers that keep the axes of a kernel (arXiv:2405.14739).

    Delta W = s G x1 A(1) x2 A(2) ... xN A(N),   G (J1, ..., JN) starts at 0,   A(n) (In, Jn),   s > 0 fixed

For a convolution kernel (out, in / groups, height, width) the core keeps height and width and cuts the channels; for a
matrix it is LoRA with a free square core. `adapt` puts such an update on every weight that is asked for, by
torch.nn.utils.parametrize, and `TuckerAdapters` saves, merges and removes it; `compare_structures` tells from two checkpoints
how much of a real update each structure can hold.

Source: Si et al., 2024, arXiv:2405.14739 (FLoRA: Low-Rank Core Space for N-dimension).
"""

__all__ = [
    "CPDelta",
    "Delta",
    "FullDelta",
    "LoraDelta",
    "Tucker",
    "TuckerAdapters",
    "TuckerDelta",
    "adapt",
    "budget_ranks",
    "compare_structures",
    "cp_approximation",
    "cp_delta",
    "lora_delta",
    "matrix_approximation",
    "parameter_count",
    "tucker_approximation",
    "tucker_product",
]

from theodolite.parameters.tucker.adapters import TuckerAdapters
from theodolite.parameters.tucker.decomposition import (
    Tucker,
    budget_ranks,
    compare_structures,
    cp_approximation,
    matrix_approximation,
    parameter_count,
    tucker_approximation,
    tucker_product,
)
from theodolite.parameters.tucker.deltas import CPDelta, Delta, FullDelta, LoraDelta, TuckerDelta, cp_delta, lora_delta
from theodolite.parameters.tucker.placing import adapt
