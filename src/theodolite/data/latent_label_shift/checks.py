"""Whether label shift explains the domains, and how many classes there are."""

__all__ = ["ClassCount", "ShiftTest", "count_classes", "shift_test"]

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from theodolite.core.errors import InputError
from theodolite.data.latent_label_shift.factors import fit_factors, scaled
from theodolite.data.latent_label_shift.shares import check_shares

_REFITS = 60
_SPLITS = 5
_SPLIT_FITS = 200
_NOISE_DRAWS = 200
_LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class ShiftTest:
    """Distance of the shares from what label shift allows, beside sampling noise.

    statistic: sum over domains of the L1 distance between shares and fit; p_value: how often sampling alone gives as much.
    Small means: not explained by label shift with so many classes. As many classes as domains explain any shares, each domain
    being a class, so the p-value then tells nothing. domain_statistic, domain_p_value (r,): the same for each
    domain, not corrected for their number. noise (draws,): the statistic under label shift.
    """

    statistic: float
    p_value: float
    domain_statistic: Float[np.ndarray, " domain"]
    domain_p_value: Float[np.ndarray, " domain"]
    noise: Float[np.ndarray, " draw"]


def shift_test(
    Q: np.ndarray,
    C: np.ndarray,
    W: np.ndarray,
    rows: np.ndarray,
    *,
    draws: int = 200,
    seed: int = 0,
) -> ShiftTest:
    """Residual test of shares Q (m, r) ~ C (m, k) W (k, r): rows (r,) is the number of rows behind each column of Q.

    Shares are drawn from the fit, Q* = Multinomial(rows_d, (C W)_d) / rows_d, and fitted again from it, so that the noise has
    been fitted as the data have. That the clusters were found on the same rows is not part of it.
    """
    Q, C, W = (check_shares(table, name) for table, name in ((Q, "Q"), (C, "C"), (W, "W")))
    rows = np.asarray(rows)
    if rows.shape != (Q.shape[1],) or rows.min() < 1 or draws < 1:
        raise InputError(
            f"need draws >= 1 and {Q.shape[1]} numbers of rows of at least 1, got draws={draws}, rows={rows}"
        )
    if (C @ W).shape != Q.shape:
        raise InputError(f"C W has shape {(C @ W).shape}, Q has {Q.shape}")
    own = np.abs(Q - C @ W).sum(axis=0)
    sample = _sample(np.random.default_rng(seed), C @ W, rows, draws)
    again_C, again_W, _, _ = fit_factors(
        sample, np.broadcast_to(C, (draws, *C.shape)), np.broadcast_to(W, (draws, *W.shape)), _REFITS
    )
    again_C, again_W = scaled(again_C, again_W)
    noise = np.abs(sample - again_C @ again_W).sum(axis=1)
    total = noise.sum(axis=1)
    return ShiftTest(
        float(own.sum()),
        float((1 + (total >= own.sum()).sum()) / (1 + draws)),
        own,
        (1 + (noise >= own).sum(axis=0)) / (1 + draws),
        total,
    )


@dataclass(frozen=True, eq=False)
class ClassCount:
    """Evidence for a number of classes.

    singular_values: of the shares Q. noise_floor: what the largest singular value of sampling noise stays below in 95 % of
    draws; rank: how many are above. classes (K,): the numbers tried; held_out_error (K, splits): squared error of
    the factors of one half of the rows on the shares of the other. chosen: the least number whose mean error is within one
    standard error (of the differences over splits) of the best one's.
    """

    singular_values: Float[np.ndarray, " value"]
    noise_floor: float
    rank: int
    classes: Int[np.ndarray, " number"]
    held_out_error: Float[np.ndarray, "number split"]
    chosen: int


def count_classes(
    Q: np.ndarray,
    rows: np.ndarray,
    *,
    n_init: int = 3,
    seed: int = 0,
) -> ClassCount:
    """How many classes the shares Q (m, r) of rows (r,) rows show: singular values above noise, and held-out error.

    The rows of each cluster and domain are split in two at random, 5 times, and 1 to min(m, r) classes fitted to one half.
    """
    Q = check_shares(Q, "Q")
    rows = np.asarray(rows)
    if rows.shape != (Q.shape[1],) or rows.min() < 2:
        raise InputError(f"need {Q.shape[1]} numbers of rows of at least 2, one a domain, got {rows}")
    rng = np.random.default_rng(seed)
    noise = np.linalg.norm(_sample(rng, Q, rows, _NOISE_DRAWS) - Q, ord=2, axis=(1, 2))
    floor = float(np.quantile(noise, _LEVEL))
    values = np.linalg.svd(Q, compute_uv=False)
    one, other = _halves(rng, np.rint(Q * rows).astype(np.int64))
    tried = np.arange(1, min(Q.shape) + 1)
    errors = np.stack([_held_out(rng, one, other, k, n_init) for k in tried.tolist()])
    best = int(errors.mean(axis=1).argmin())
    behind = errors - errors[best]
    near = behind.mean(axis=1) <= behind.std(axis=1, ddof=1) / np.sqrt(_SPLITS)
    return ClassCount(values, floor, int((values > floor).sum()), tried, errors, int(tried[near.argmax()]))


def _halves(rng: np.random.Generator, counts: Int[np.ndarray, "m r"]) -> tuple[np.ndarray, np.ndarray]:
    """Shares (splits, m, r) in two random halves of the rows of each domain."""
    columns = [rng.multivariate_hypergeometric(column, column.sum() // 2, size=_SPLITS) for column in counts.T]
    half = np.stack(columns, axis=2)
    rest = counts - half
    return half / half.sum(axis=1, keepdims=True), rest / rest.sum(axis=1, keepdims=True)


def _held_out(rng: np.random.Generator, one: np.ndarray, other: np.ndarray, k: int, n_init: int) -> np.ndarray:
    """Squared error (splits,) on ``other`` of the best of n_init fits to ``one``."""
    Q = np.repeat(one, n_init, axis=0)
    size = np.sqrt(Q.mean() / k)
    C = np.abs(rng.normal(scale=size, size=(*Q.shape[:2], k)))
    W = np.abs(rng.normal(scale=size, size=(len(Q), k, Q.shape[2])))
    C, W, squared, _ = fit_factors(Q, C, W, _SPLIT_FITS)
    best = squared.reshape(len(one), n_init).argmin(axis=1) + n_init * np.arange(len(one))
    return ((other - C[best] @ W[best]) ** 2).sum(axis=(1, 2))


def _sample(
    rng: np.random.Generator, shares: np.ndarray, rows: np.ndarray, draws: int
) -> Float[np.ndarray, "draw m r"]:
    columns = shares / shares.sum(axis=0)
    drawn = rng.multinomial(rows, columns.T, size=(draws, len(rows)))
    return (drawn / rows[:, None]).transpose(0, 2, 1)
