"""A memory of a stream in N numbers with a known meaning: the coefficients of its past in a named orthogonal basis.

    x' = A x + B u,     x_n(t) = <u(t - .), p_n>_w,     u(t - s) ~ sum_n x_n(t) p_n(s)

`hippo_matrix` gives A and B, `basis` and `weight` the p_n and w whose products p_n w are the kernels e^(tA) B, `HippoMemory`
the recurrence over a series, `S4` the trainable layer that starts from it. The time step is the memory length: with
dt = 1 / memory_steps the window measures (legt, fout) hold exactly the last memory_steps samples, legs fades over them.
`memory_scan` tells how long a memory given series ask for.

Source: Gu, Johnson, Timalsina, Rudra, Re, 2022, arXiv:2206.12037 (How to Train Your HiPPO); Gu et al., 2020,
arXiv:2008.07669 (HiPPO); Gu, Goel, Re, 2021, arXiv:2111.00396 (S4).
"""

__all__ = [
    "NPLR",
    "S4",
    "DelayReadout",
    "HippoMemory",
    "MemoryScan",
    "S4Kernel",
    "S4Recurrence",
    "basis",
    "discretize",
    "hippo_matrix",
    "low_rank_correction",
    "memory_scan",
    "normal_plus_low_rank",
    "ssm_kernel",
    "timescale_report",
    "weight",
]

from theodolite.networks.hippo.discretize import discretize
from theodolite.networks.hippo.kernels import basis, ssm_kernel, weight
from theodolite.networks.hippo.matrices import NPLR, hippo_matrix, low_rank_correction, normal_plus_low_rank
from theodolite.networks.hippo.memory import DelayReadout, HippoMemory
from theodolite.networks.hippo.s4 import S4, S4Recurrence, timescale_report
from theodolite.networks.hippo.s4_kernel import S4Kernel
from theodolite.networks.hippo.scan import MemoryScan, memory_scan
