"""Where the eigenvalues of a diagonal state space model start: the named spectra, and the input vector of each."""

__all__ = ["INITS", "check_states", "initial_input", "initial_spectrum"]

from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Complex

from theodolite.core.errors import InputError
from theodolite.networks.hippo import normal_plus_low_rank

INITS = ("lin", "inv", "quad", "legs", "real", "random")
"""The names of the initial spectra."""


def check_states(n_state: int) -> None:
    """Raise InputError for a number of states that has no conjugate halves."""
    if not isinstance(n_state, Integral) or n_state < 2 or n_state % 2:
        raise InputError(f"n_state counts conjugate pairs, so it must be even and at least 2, got {n_state!r}")


def initial_spectrum(
    kind: str, n_state: int, dtype: Any = np.complex128, *, frequency_scale: float = 1.0, seed: int = 0
) -> Complex[np.ndarray, " half"]:
    """The N/2 eigenvalues with Im >= 0 of A; their conjugates are the other half. For n = 0..N/2-1:

    lin: -1/2 + i pi n. inv: -1/2 + i (N/pi) (N/(2n+1) - 1). quad: -1/2 + i (1+2n)^2 / pi. real: -(n+1).
    random: -1/2 + i exp(N(0, 1)), drawn with ``seed``. legs: the eigenvalues of A_LegS + P P', by the Hermitian solver in
    float64, -1/2 + i w with w up to about N^2/pi, rising. frequency_scale multiplies every imaginary part.

    Raises InputError for another kind or an odd or too small n_state.

    Source: Gu, Gupta, Goel, Re, 2022, arXiv:2206.11893, section 4.

    >>> initial_spectrum("real", 4).real.tolist()
    [-1.0, -2.0]
    """
    check_states(n_state)
    n = np.arange(n_state // 2)
    if kind == "lin":
        frequency = np.pi * n
    elif kind == "inv":
        frequency = n_state / np.pi * (n_state / (2 * n + 1) - 1)
    elif kind == "quad":
        frequency = (1 + 2 * n) ** 2 / np.pi
    elif kind == "random":
        frequency = np.exp(np.random.default_rng(seed).standard_normal(len(n)))
    elif kind == "legs":
        frequency = np.imag(normal_plus_low_rank("legs", n_state).eigenvalues[n_state // 2 :])
    elif kind == "real":
        frequency = np.zeros(len(n))
    else:
        raise InputError(f"there is no initialisation {kind!r}; there are {', '.join(INITS)}")
    decay = n + 1.0 if kind == "real" else np.full(len(n), 0.5)
    return (-decay + 1j * frequency_scale * frequency).astype(dtype)


def initial_input(kind: str, n_state: int, *, official_scaling: bool = False) -> Complex[np.ndarray, " half"]:
    """The input vector B (N/2,) that goes with `initial_spectrum`: 1, and for legs V* B_LegS / 2.

    official_scaling: as the authors' code has it, without the 1/2 and with Im B cut to [-2, 2].
    Raises InputError as `initial_spectrum` does.

    >>> initial_input("lin", 4).tolist()
    [(1+0j), (1+0j)]
    """
    if kind != "legs":
        return np.ones_like(initial_spectrum(kind, n_state))
    check_states(n_state)
    B = normal_plus_low_rank("legs", n_state).B[n_state // 2 :]
    return np.real(B) + 1j * np.imag(B).clip(-2, 2) if official_scaling else B / 2
