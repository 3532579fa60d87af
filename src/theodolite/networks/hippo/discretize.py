"""From x' = A x + B u to a recurrence x_k = Abar x_(k-1) + Bbar u_k with a time step."""

__all__ = ["check_step", "discretize", "unresolved", "zero_order_hold"]

import warnings

import numpy as np
from jaxtyping import Float
from scipy.linalg import expm

from theodolite.core.errors import InputError

_APART = 0.5


def discretize(
    A: Float[np.ndarray, "n n"],
    B: Float[np.ndarray, " n"],
    dt: float,
    method: str = "zoh",
    alpha: float = 0.5,
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]]:
    """Abar (N, N) and Bbar (N,) in float64 for the step dt.

    zoh: u is constant over a step, exp(dt [[A, B], [0, 0]]). bilinear: (I - alpha dt A)^-1 (I + (1 - alpha) dt A) and
    (I - alpha dt A)^-1 dt B; alpha = 1/2 is the trapezoid, 1 backward and 0 forward Euler.

    Raises InputError for dt <= 0, another method, alpha outside [0, 1] or shapes that do not fit. Warns where dt is so
    large that the two methods differ by more than half for some eigenvalue: such states are not resolved.

    >>> Abar, Bbar = discretize(np.array([[-1.0]]), np.array([1.0]), 0.1)
    >>> bool(np.isclose(Abar[0, 0], np.exp(-0.1))), bool(np.isclose(Bbar[0], 1 - np.exp(-0.1)))
    (True, True)
    """
    A, B = np.asarray(A, dtype=np.float64), np.asarray(B, dtype=np.float64)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or B.shape != A.shape[:1]:
        raise InputError(f"need A (N, N) and B (N,), got {A.shape} and {B.shape}")
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise InputError("A and B must be finite numbers")
    check_step(dt)
    if method not in ("zoh", "bilinear"):
        raise InputError(f"there is no method {method!r}; there are zoh and bilinear")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")
    lost = unresolved(np.linalg.eigvals(A), dt)
    if lost:
        warnings.warn(
            f"dt = {dt:g} is too coarse for {lost} of the {len(B)} states: zero-order hold and the bilinear rule differ there "
            "by more than half, so they are not resolved; take a smaller dt (more memory steps) or fewer states",
            UserWarning,
            stacklevel=2,
        )
    if method == "zoh":
        return zero_order_hold(A, B, dt)
    eye = np.eye(len(B))
    out = np.linalg.solve(eye - alpha * dt * A, np.column_stack([eye + (1 - alpha) * dt * A, dt * B]))
    return out[:, :-1], out[:, -1]


def zero_order_hold(A: np.ndarray, B: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """Abar and Bbar for an input that is constant over each step, whatever the step."""
    both = np.zeros((len(B) + 1, len(B) + 1))
    both[:-1, :-1], both[:-1, -1] = A * dt, B * dt
    out = expm(both)
    return out[:-1, :-1], out[:-1, -1]


def check_step(dt: float) -> None:
    """Raise InputError for a time step that is not a positive number."""
    if not (np.isfinite(dt) and dt > 0):
        raise InputError(f"dt must be a positive number, got {dt}")


def unresolved(eigenvalues: np.ndarray, dt: float) -> int:
    """How many eigenvalues a step of dt carries by zero-order hold to a place more than 1/2 from the bilinear one."""
    z = np.asarray(eigenvalues) * dt
    return int((np.abs(np.exp(z) - (1 + z / 2) / (1 - z / 2)) > _APART).sum())
