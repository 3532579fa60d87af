"""A trainable sequence layer whose inside can be read: every channel is a sum of damped oscillators.

    x' = A x + B u,   y = 2 Re(C x) + D u,   A diagonal;   K_l = 2 Re sum_n C_n Bbar_n Abar_n^l,   y = K * u + D u

`S4D` is the layer: a convolution for training, a recurrence for streaming, the same weights. `S4DClassifier` puts a few of
them into a network for series; `ssm_parameter_groups` gives an optimiser what it should treat apart; `kernel_summary` tells
the memory and the frequency of every channel. `initial_spectrum` and `initial_input` are where A and B start.

Source: Gu, Gupta, Goel, Re, 2022, arXiv:2206.11893 (On the Parameterization and Initialization of Diagonal State Space
Models).
"""

__all__ = [
    "INITS",
    "S4D",
    "DiagonalSSMKernel",
    "Recurrence",
    "S4DClassifier",
    "initial_input",
    "initial_spectrum",
    "kernel_summary",
    "ssm_parameter_groups",
]

from theodolite.networks.diagonal_ssm.classifier import S4DClassifier
from theodolite.networks.diagonal_ssm.kernel import DiagonalSSMKernel
from theodolite.networks.diagonal_ssm.layer import S4D, Recurrence, ssm_parameter_groups
from theodolite.networks.diagonal_ssm.spectrum import INITS, initial_input, initial_spectrum
from theodolite.networks.diagonal_ssm.summary import kernel_summary
