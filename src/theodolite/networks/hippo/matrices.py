"""The named matrices A, B of x' = A x + B u, and each A as normal plus low rank."""

__all__ = ["MEASURES", "NPLR", "WINDOWED", "hippo_matrix", "low_rank_correction", "normal_plus_low_rank"]

from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Complex, Float

from theodolite.core.errors import InputError

MEASURES = ("legs", "legt", "fout", "foud", "lagt")
"""The measures by name."""
WINDOWED = frozenset({"legt", "fout"})
"""Measures whose kernels end at time 1: they hold a window and nothing before it."""


@dataclass(frozen=True, eq=False)
class NPLR:
    """A = V (diag(eigenvalues) - P' conj(P)) V*, in V's coordinates: B = V* B and each row of P = V* P.

    eigenvalues (N,): all on the line Re = -c, sorted by imaginary part, so that entry N-1-n is the conjugate of entry n
    and the same holds of the columns of V: the last N // 2 tell the rest of an even N. V (N, N) is unitary.
    """

    eigenvalues: Complex[np.ndarray, " n"]
    P: Complex[np.ndarray, "rank n"]
    B: Complex[np.ndarray, " n"]
    V: Complex[np.ndarray, "n n"]


def check_measure(measure: str, n_state: int) -> None:
    """Raise InputError for a measure or a state size that has no matrix."""
    if measure not in MEASURES:
        raise InputError(f"there is no measure {measure!r}; there are {', '.join(MEASURES)}")
    if not isinstance(n_state, Integral) or n_state < 1:
        raise InputError(f"n_state must be a whole number of at least 1, got {n_state!r}")
    if measure in ("fout", "foud") and n_state % 2:
        raise InputError(f"{measure} pairs a cosine with a sine, so n_state must be even, got {n_state}")


def hippo_matrix(
    measure: str, n_state: int, dtype: Any = np.float64
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]]:
    """A (N, N) and B (N,) of x' = A x + B u for one measure; every A is stable.

    legs: A[n,k] = -sqrt(2n+1) sqrt(2k+1) for n > k, -(n+1) for n = k, 0 above; B_n = sqrt(2n+1). Fading memory.
    legt: A[n,k] = -sqrt(2n+1) sqrt(2k+1) (1 if n >= k else (-1)^(n-k)), same B. The window [0, 1] (many codes halve both:
    the window [0, 2]).
    fout: A = S - 2 b b', B = 2 b, S[2m+1,2m] = -S[2m,2m+1] = 2 pi m, b_0 = 1, other even b = sqrt 2, odd b = 0. The window
    [0, 1]; state 1 is always 0.
    foud: A = S - I/2, B = b. lagt: A = I/2 - tril(1), B = 1.

    Raises InputError for another measure, n_state < 1, or an odd n_state of fout and foud.

    Source: Gu et al., 2022, arXiv:2206.12037 (fout); Gu et al., 2020, arXiv:2008.07669 (legs, legt, lagt).

    >>> hippo_matrix("lagt", 2)[0].tolist()
    [[-0.5, 0.0], [-1.0, -0.5]]
    """
    check_measure(measure, n_state)
    n = np.arange(n_state)
    root = np.sqrt(2.0 * n + 1)
    if measure == "legs":
        A, B = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0), root
    elif measure == "legt":
        A, B = -np.outer(root, root) * np.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] - n)), root
    elif measure == "lagt":
        A, B = np.eye(n_state) / 2 - np.tril(np.ones((n_state, n_state))), np.ones(n_state)
    else:
        m = np.arange(n_state // 2)
        S = np.zeros((n_state, n_state))
        S[2 * m + 1, 2 * m], S[2 * m, 2 * m + 1] = 2 * np.pi * m, -2 * np.pi * m
        b = np.where(n % 2 == 0, np.sqrt(2.0), 0.0)
        b[0] = 1.0
        A, B = (S - 2 * np.outer(b, b), 2 * b) if measure == "fout" else (S - np.eye(n_state) / 2, b)
    return A.astype(dtype), B.astype(dtype)


def low_rank_correction(measure: str, n_state: int) -> Float[np.ndarray, "rank n"]:
    """P (r, N) such that A + P' P is -c I plus a skew matrix: r = 2 for legt, 0 for foud (already normal), otherwise 1.

    Raises InputError as `hippo_matrix` does.

    >>> low_rank_correction("legs", 3).round(3).tolist()
    [[0.707, 1.225, 1.581]]
    """
    _, B = hippo_matrix(measure, n_state)
    if measure == "legs":
        return np.sqrt(np.arange(n_state) + 0.5)[None]
    if measure == "legt":
        even = np.arange(n_state) % 2 == 0
        return np.stack([B * even, B * ~even])
    if measure == "lagt":
        return np.full((1, n_state), np.sqrt(0.5))
    return B[None] / np.sqrt(2.0) if measure == "fout" else np.zeros((0, n_state))


@lru_cache(maxsize=64)
def normal_plus_low_rank(measure: str, n_state: int) -> NPLR:
    """The eigenvectors of A + P' P and all of A, B, P in their coordinates, by the Hermitian solver in float64.

    Kept for each measure and size; the arrays are read-only. Raises InputError as `hippo_matrix` does.

    >>> found = normal_plus_low_rank("legs", 64)
    >>> bool(np.allclose(found.eigenvalues.real, -0.5)), found.P.shape
    (True, (1, 64))
    """
    A, B = hippo_matrix(measure, n_state)
    P = low_rank_correction(measure, n_state)
    normal = A + P.T @ P
    shift = -0.5 if measure in ("legs", "foud") else 0.0
    skew = (normal - normal.T) / 2
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    none = np.abs(frequencies) <= 8 * n_state * np.finfo(float).eps * np.abs(frequencies).max(initial=0.0)
    up = frequencies > 0
    up &= ~none
    middle = _conjugate_pairs(vectors[:, none])
    V = np.concatenate([vectors[:, up][:, ::-1].conj(), middle, vectors[:, up]], axis=1)
    ordered = np.concatenate([-frequencies[up][::-1], np.zeros(int(none.sum())), frequencies[up]])
    found = NPLR(shift + 1j * ordered, P @ V.conj(), V.conj().T @ B, V)
    for part in (found.eigenvalues, found.P, found.B, found.V):
        part.setflags(write=False)
    return found


def _conjugate_pairs(space: np.ndarray) -> np.ndarray:
    """A unitary basis of a space closed under conjugation, in which column k from the left is conjugate to k from the right."""
    size = space.shape[1]
    real = np.linalg.svd(np.concatenate([np.real(space), np.imag(space)], axis=1), full_matrices=False)[0][:, :size]
    half = size // 2
    pairs = (real[:, :half] + 1j * real[:, half : 2 * half]) / np.sqrt(2.0)
    return np.concatenate([pairs.conj()[:, ::-1], real[:, 2 * half :], pairs], axis=1)
