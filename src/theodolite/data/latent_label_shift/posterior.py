"""Class probabilities of rows from the probabilities of their domains."""

__all__ = ["class_posterior", "domain_posterior", "nonnegative_least_squares"]

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks
from theodolite.data.latent_label_shift.shares import check_shares

SOLVERS = ("nnls", "pinv")
_ROUNDS = 100
_FULL_EXCHANGES = 3
_BUDGET = 1 << 27


def class_posterior(
    p_domain: np.ndarray,
    class_shares: np.ndarray,
    domain_shares: np.ndarray | None = None,
    solver: str = "nnls",
) -> Float[np.ndarray, "row k"]:
    """p(y | x) (n, k) over all domains together, from p(d | x) (n, r) and p_d(y) (k, r).

    Solves p(d | x) = sum_y p(d | y) p(y | x) with p(d | y) = p_d(y) p(d) / sum_d' p_d'(y) p(d'), then scales rows to sum 1.
    domain_shares (r,): p(d), the shares of the domains in what the domain classifier was trained on; None means equal, and
    is wrong where they are not. solver: "nnls", or "pinv" (the published one; negative values are set to 0).

    Source: Roberts et al., 2022, arXiv:2207.13179, section 4.

    >>> shares = np.array([[0.9, 0.2], [0.1, 0.8]])
    >>> class_posterior(shares / shares.sum(axis=1, keepdims=True), shares).round(6).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    shares, weights = _checked(class_shares, domain_shares)
    q = np.asarray(p_domain, dtype=np.float64)
    if q.ndim != 2 or q.shape[1] != shares.shape[1]:
        raise InputError(f"p_domain must have {shares.shape[1]} columns, one a domain, got shape {q.shape}")
    if not np.isfinite(q).all() or (q < 0).any():
        raise DataError("p_domain must hold finite probabilities of at least 0")
    if solver not in SOLVERS:
        raise InputError(f'solver must be "nnls" or "pinv", got {solver!r}')
    joint = shares * weights
    prior = joint.sum(axis=1)
    M = (joint / np.where(prior > 0, prior, 1.0)[:, None]).T
    p = nonnegative_least_squares(M, q) if solver == "nnls" else np.maximum(q @ np.linalg.pinv(M).T, 0.0)
    return _normalised(p, prior)


def domain_posterior(
    p_class: np.ndarray,
    class_shares: np.ndarray,
    domain_shares: np.ndarray | None,
    domains: np.ndarray,
) -> Float[np.ndarray, "row k"]:
    """p_d(y | x) (n, k) of each row in its own domain, proportional to p(y | x) p(d | y).

    p_class (n, k): p(y | x). domains (n,): the number of each row's domain, a column of class_shares (k, r). domain_shares:
    as in `class_posterior`. Where a domain has none of the classes that a row can be of, its class shares are the answer.
    """
    shares, weights = _checked(class_shares, domain_shares)
    index = np.asarray(domains)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise InputError("domains must be numbers of columns of class_shares, one a row")
    if len(index) and not 0 <= index.min() <= index.max() < shares.shape[1]:
        raise InputError(f"domains must be numbers from 0 to {shares.shape[1] - 1}, got {index.min()} to {index.max()}")
    p = np.asarray(p_class, dtype=np.float64)
    if p.shape != (len(index), len(shares)):
        raise InputError(f"p_class must have shape {(len(index), len(shares))} (rows, classes), got {p.shape}")
    return reweighted(p, shares.T[index], (shares * weights).sum(axis=1))


def reweighted(p_class: np.ndarray, own: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """p(y | x) (n, k) under class shares ``prior`` (k,) as it is under each row's own shares (n, k) or (k,)."""
    return _normalised(p_class * own / np.where(prior > 0, prior, 1.0), own)


def nonnegative_least_squares(M: Float[np.ndarray, "r k"], q: Float[np.ndarray, "row r"]) -> Float[np.ndarray, "row k"]:
    """argmin ||M p - q_i||, p >= 0, for every row q_i, (n, k): one active set a row, all rows in each round.

    Rows whose sets have not settled after 100 rounds (M without full rank) are solved one by one.

    Source: Kim and Park, 2011, SIAM J. Sci. Comput. 33 (block principal pivoting).
    """
    scale = np.linalg.norm(M, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    A = M / scale
    gram, k = A.T @ A, M.shape[1]
    out = np.empty((len(q), k))
    for part in chunks(len(q), 8.0 * k * (k + 6), _BUDGET):
        out[part] = _pivot(A, gram, q[part])
    return out / scale


def _pivot(A: np.ndarray, gram: np.ndarray, q: np.ndarray) -> np.ndarray:
    target = q @ A
    n, k = target.shape
    slack = 1e-12 * np.abs(target).max(axis=1, initial=1e-300)[:, None]
    free = np.zeros((n, k), dtype=bool)
    p, fewest, tries = np.zeros((n, k)), np.full(n, k + 1), np.full(n, _FULL_EXCHANGES)
    gradient, open_ = -target, np.arange(n)
    for _ in range(_ROUNDS):
        wrong = np.where(free[open_], p[open_] < -slack[open_], gradient[open_] < -slack[open_])
        count = wrong.sum(axis=1)
        open_, wrong, count = open_[count > 0], wrong[count > 0], count[count > 0]
        if not len(open_):
            return np.maximum(p, 0.0)
        better = count < fewest[open_]
        fewest[open_] = np.where(better, count, fewest[open_])
        tries[open_] = np.where(better, _FULL_EXCHANGES, tries[open_] - 1)
        single = tries[open_] < 0  # exchanging only the last wrong variable cannot cycle
        last = k - 1 - wrong[:, ::-1].argmax(axis=1)
        wrong[single] = np.arange(k) == last[single, None]
        free[open_] ^= wrong
        p[open_] = _solve_free(gram, target[open_], free[open_])
        gradient[open_] = p[open_] @ gram - target[open_]
    for row in open_:
        p[row] = nnls(A, q[row])[0]
    return np.maximum(p, 0.0)


def _solve_free(gram: np.ndarray, target: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Least squares in the free variables of each row, 0 in the others; one factor for all rows with the same free set."""
    kinds, which = np.unique(np.packbits(free, axis=1), axis=0, return_inverse=True)
    masks = np.unpackbits(kinds, axis=1, count=free.shape[1]).astype(bool)
    inverse = np.linalg.pinv(gram * (masks[:, :, None] & masks[:, None]), rcond=1e-13, hermitian=True)
    return np.einsum("nij,nj->ni", inverse[which.ravel()], target)


def _normalised(p: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    total = p.sum(axis=1, keepdims=True)
    return np.where(total > 0, p / np.where(total > 0, total, 1.0), fallback)


def _checked(class_shares: np.ndarray, domain_shares: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    shares = check_shares(class_shares, "class_shares")
    if domain_shares is None:
        return shares, np.full(shares.shape[1], 1 / shares.shape[1])
    weights = np.asarray(domain_shares, dtype=np.float64)
    if weights.shape != (shares.shape[1],):
        raise InputError(f"domain_shares must hold {shares.shape[1]} numbers, one a domain, got shape {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise DataError("domain_shares must be finite, at least 0, and not all 0")
    return shares, weights / weights.sum()
