"""Points of the simplex of mixes: grids, checks, whole numbers of rows, projections under a budget."""

__all__ = ["as_mixes", "count_rows", "design", "nearest_allowed", "simplex_grid"]

from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from theodolite.core.errors import InputError

_DESIGN = 66


def simplex_grid(m: int, step: float = 0.1) -> Float[np.ndarray, "mix source"]:
    """Every mix of m sources in multiples of ``step``; made of whole numbers, so that each sums to 1.

    >>> simplex_grid(2, 0.5).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    """
    parts = round(1 / step) if 0 < step <= 1 else 0
    if parts < 1 or abs(parts * step - 1) > 1e-6:
        raise InputError(f"a grid step must divide 1, such as 0.1 or 0.25; got {step}")
    if m < 1:
        raise InputError(f"need at least one source, got {m}")
    bars = np.array(list(combinations(range(parts + m - 1), m - 1)), dtype=np.int64).reshape(-1, m - 1)
    ends = np.pad(bars, ((0, 0), (1, 1)), constant_values=-1)
    ends[:, -1] = parts + m - 1
    return (np.diff(ends, axis=1) - 1) / parts


def design(m: int, step: float, seed: int) -> Float[np.ndarray, "mix source"]:
    """The grid for up to 4 sources; for more the vertices, the middle and Dirichlet draws, 66 mixes or 3 a source."""
    if m <= 4:
        return simplex_grid(m, step)
    drawn = np.random.default_rng(seed).dirichlet(np.ones(m), size=max(_DESIGN, 4 * m) - m - 1)
    return np.concatenate([np.eye(m), np.full((1, m), 1 / m), drawn])


def as_mixes(p: Any, m: int) -> Float[np.ndarray, "mix source"]:
    """One mix (m,) or several (G, m) as (G, m), after a check that each lies on the simplex."""
    mixes = np.atleast_2d(np.asarray(p, dtype=np.float64))
    if mixes.ndim != 2 or mixes.shape[1] != m:
        raise InputError(f"a mix has one share for each of the {m} sources, got an array of shape {mixes.shape}")
    off = ~(np.isfinite(mixes).all(axis=1) & (mixes >= -1e-9).all(axis=1) & (np.abs(mixes.sum(axis=1) - 1) <= 1e-6))
    if off.any():
        raise InputError(
            f"shares must be at least 0 and sum to 1, got {mixes[off][0].tolist()}, sum {mixes[off][0].sum():.6g}"
        )
    mixes = np.maximum(mixes, 0.0)
    return mixes / mixes.sum(axis=1, keepdims=True)


def count_rows(p: Float[np.ndarray, " source"], n: int) -> Int[np.ndarray, " source"]:
    """n rows by shares p: whole numbers that sum to n, the largest remainders rounded up.

    >>> count_rows(np.array([0.34, 0.33, 0.33]), 10).tolist()
    [4, 3, 3]
    """
    exact = np.round(p * n, 9)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: n - counts.sum()]] += 1
    return counts


def nearest_allowed(
    p: Float[np.ndarray, " source"],
    caps: Float[np.ndarray, " source"],
    costs: Float[np.ndarray, " source"],
    most: float,
) -> Float[np.ndarray, " source"]:
    """The mix nearest to a positive p (relative entropy) with p_i <= caps_i and costs . p <= most, which must exist."""
    p = _capped(p, caps)
    if p @ costs <= most:
        return p
    low, high = 0.0, 1.0
    tilt = costs - costs.min()
    while (tilted := _capped(p * np.exp(-high * tilt), caps)) @ costs > most and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        tilted = _capped(p * np.exp(-middle * tilt), caps)
        low, high = (middle, high) if tilted @ costs > most else (low, middle)
    return _capped(p * np.exp(-high * tilt), caps)


def _capped(p: Float[np.ndarray, " source"], caps: Float[np.ndarray, " source"]) -> Float[np.ndarray, " source"]:
    full: Bool[np.ndarray, " source"] = np.zeros(len(p), dtype=bool)
    p = np.maximum(p, 1e-300)
    out = p / p.sum()
    while (over := ~full & (out > caps * (1 + 1e-12))).any():
        full |= over
        out = caps.copy()
        if not full.all():
            out[~full] = p[~full] / p[~full].sum() * max(0.0, 1 - caps[full].sum())
    return out
