"""What the states hold: the basis p_n and the weight w of each measure, and the kernels e^(tA) B of any system."""

__all__ = ["basis", "ssm_kernel", "weight"]

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy.polynomial.legendre import legvander
from numpy.typing import ArrayLike
from scipy.linalg import expm

from theodolite.core.errors import InputError
from theodolite.networks.hippo.matrices import WINDOWED, check_measure

_KEPT = 64  # matrix exponentials of uneven times that are kept


def basis(measure: str, n_state: int, times: ArrayLike) -> Float[np.ndarray, "time n"]:
    """p_n(t) for n < N at times t >= 0 before now: the past is u(now - t) ~ sum_n x_n p_n(t).

    legs: sqrt(2n+1) P_n(2 e^-t - 1). legt: sqrt(2n+1) P_n(1 - 2t), fout: 1, 0, sqrt2 cos 2 pi m t, sqrt2 sin 2 pi m t, both
    0 after t = 1. foud: those times e^(-t/2), for all t. lagt: e^(-t/2) L_n(t). With `weight` w they make the kernels,
    p_n w = e^(tA) B: exactly for legs, lagt and foud, as N grows for legt and fout. They are orthonormal under w, but
    for foud, where that holds nearly.

    Raises InputError for an unknown measure, a bad n_state, or times that are negative or not finite.

    >>> basis("legs", 2, np.array([0.0])).round(3).tolist()
    [[1.0, 1.732]]
    """
    check_measure(measure, n_state)
    t = _times(times)
    if measure in ("legs", "legt"):
        at = 2 * np.exp(-t) - 1 if measure == "legs" else 1 - 2 * np.minimum(t, 1.0)
        values = legvander(at, n_state - 1) * np.sqrt(2.0 * np.arange(n_state) + 1)
    elif measure == "lagt":
        values = np.empty((len(t), n_state))
        before, now = np.zeros_like(t), np.exp(-t / 2)
        for n in range(n_state):
            values[:, n] = now
            before, now = now, ((2 * n + 1 - t) * now - n * before) / (n + 1)
    else:
        angle = 2 * np.pi * np.outer(t, np.arange(n_state // 2))
        values = np.stack([np.cos(angle), np.sin(angle)], axis=2).reshape(len(t), n_state) * np.sqrt(2.0)
        values[:, 0] = 1.0
        if measure == "foud":
            values *= np.exp(-t / 2)[:, None]
    return values * (t <= 1)[:, None] if measure in WINDOWED else values


def weight(measure: str, times: ArrayLike) -> Float[np.ndarray, " time"]:
    """w(t): e^-t for legs, 1 on [0, 1] for legt and fout, 1 for lagt and foud, whose basis holds the decay.

    Raises InputError as `basis` does.
    """
    check_measure(measure, 2)
    t = _times(times)
    if measure == "legs":
        return np.exp(-t)
    return (t <= 1).astype(np.float64) if measure in WINDOWED else np.ones_like(t)


def ssm_kernel(
    A: Float[np.ndarray, "n n"], B: Float[np.ndarray, " n"], times: ArrayLike
) -> Float[np.ndarray, "time n"]:
    """e^(tA) B (T, N) in float64, whatever A is: a matrix exponential for each different gap between sorted times.

    On an even grid that is one exponential, and its powers carry ever longer runs of the kernel on at once.
    Raises InputError for shapes that do not fit and for times that are negative or not finite.

    >>> bool(np.allclose(ssm_kernel(np.array([[-2.0]]), np.array([1.0]), np.array([0.5, 1.0]))[:, 0], np.exp([-1, -2])))
    True
    """
    A, B = np.asarray(A, dtype=np.float64), np.asarray(B, dtype=np.float64)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or B.shape != A.shape[:1]:
        raise InputError(f"need A (N, N) and B (N,), got {A.shape} and {B.shape}")
    t = _times(times)
    out = np.empty((len(t), len(B)))
    if not len(t):
        return out
    order = np.argsort(t, kind="stable")
    gaps = np.diff(t[order])
    first = expm(A * t[order[0]]) @ B
    if len(gaps) and np.ptp(gaps) <= 8 * np.finfo(float).eps * t.max():
        out[order] = powers(expm(A * ((t.max() - t.min()) / len(gaps))), first, len(t))
        return out
    step = lru_cache(maxsize=_KEPT)(lambda gap: expm(A * gap))
    out[order[0]] = first
    for before, here, gap in zip(order[:-1], order[1:], gaps.tolist(), strict=True):
        out[here] = step(gap) @ out[before]
    return out


def powers(step: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    """first, step first, step^2 first, ... (length, N), by doubling."""
    out = np.empty((length, len(first)), dtype=np.result_type(step, first))
    out[0] = first
    done = 1
    while done < length:
        more = min(done, length - done)
        out[done : done + more] = out[:more] @ step.T
        done += more
        step = step @ step
    return out


def _times(times: ArrayLike) -> np.ndarray:
    t = np.asarray(times, dtype=np.float64)
    if t.ndim != 1:
        raise InputError(f"times must be one row of numbers, got shape {t.shape}")
    if not np.isfinite(t).all() or (t < 0).any():
        raise InputError("times must be finite and at least 0: they count back from now")
    return t
