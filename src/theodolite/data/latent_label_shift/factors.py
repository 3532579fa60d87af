"""Shares of clusters in domains as p(cluster | class) times p_d(class)."""

__all__ = ["Factorization", "factorize_shares", "fit_factors", "scaled"]

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import InputError
from theodolite.data.latent_label_shift.posterior import nonnegative_least_squares
from theodolite.data.latent_label_shift.shares import NotIdentifiableError, check_shares

METHODS = ("nmf", "anchor")
_ITERATIONS = 3000
_SWEEPS = 2
_CHECK_EVERY = 20
_TOLERANCE = 1e-5  # relative fall of the squared error in 20 iterations below which a start has arrived
_EMPTY = 1e-9
_FLAT = 1e-12
_EXACT = 1e-6  # of the norm of Q: an error below this is none


@dataclass(frozen=True, eq=False)
class Factorization:
    """Q ~ C W: C (m, k) is p(cluster | class), W (k, r) is p_d(class); columns of both sum to 1.

    Classes are in falling order of their share over all domains. error: Frobenius norm of Q - C W. converged: whether the
    best start arrived. start_errors: the error of each start before columns were scaled; their spread tells whether one start
    would have done.
    """

    C: Float[np.ndarray, "cluster k"]
    W: Float[np.ndarray, "k domain"]
    error: float
    converged: bool
    start_errors: Float[np.ndarray, " start"]


def factorize_shares(
    Q: np.ndarray,
    k: int,
    method: str = "nmf",
    n_init: int = 10,
    seed: int = 0,
) -> Factorization:
    """Factorise shares Q (m, r), one column a domain, each summing to 1, into k classes.

    "nmf": least squares under C, W >= 0 by coordinate descent from n_init random starts and from the anchors' solution;
    the least error wins. Where anchors explain Q exactly, theirs is the answer, although other exact factors may exist.
    "anchor": the k most extreme rows of Q (each scaled to sum 1) by successive projection are rows of W up to scale, C by
    non-negative least squares; exact where every class has a cluster of its own and Q has no noise.

    Raises NotIdentifiableError for more classes than domains, or when the best solution leaves a class empty.

    Source: Roberts et al., 2022, arXiv:2207.13179, algorithm 1; Araujo et al., 2001 (successive projection).

    >>> C = np.array([[0.8, 0.0], [0.2, 0.3], [0.0, 0.7]])
    >>> W = np.array([[0.9, 0.6, 0.3], [0.1, 0.4, 0.7]])
    >>> found = factorize_shares(C @ W, 2, "anchor")
    >>> bool(np.allclose(found.C, C)), bool(np.allclose(found.W, W))
    (True, True)
    """
    Q = check_shares(Q, "Q")
    m, r = Q.shape
    if method not in METHODS:
        raise InputError(f'method must be "nmf" or "anchor", got {method!r}')
    if n_init < 1:
        raise InputError(f"n_init must be at least 1, got {n_init}")
    if not 1 <= k <= m:
        raise InputError(
            f"k must lie between 1 and the {m} clusters, got {k} classes; give more clusters or fewer classes"
        )
    if k > r:
        raise NotIdentifiableError(
            f"{k} classes cannot be told apart with r = {r} domains; ask for at most k = {r} classes"
        )
    C, W = _anchor_factors(Q, k)
    if method == "anchor":
        errors, converged = np.array([np.linalg.norm(Q - C @ W)]), np.array([True])
        starts_C, starts_W = C[None], W[None]
    else:
        rng = np.random.default_rng(seed)
        size = np.sqrt(Q.mean() / k)
        starts_C = np.concatenate([C[None], np.abs(rng.normal(scale=size, size=(n_init, m, k)))])
        starts_W = np.concatenate([W[None], np.abs(rng.normal(scale=size, size=(n_init, k, r)))])
        starts_C, starts_W, squared, converged = fit_factors(Q[None], starts_C, starts_W, _ITERATIONS)
        errors = np.sqrt(squared)
    # where several starts are exact the anchors' solution, the first, is taken
    for best in np.argsort(np.maximum(errors, _EXACT * np.linalg.norm(Q)), kind="stable"):
        C, W = scaled(starts_C[best], starts_W[best])
        if W.mean(axis=1).min() > _EMPTY:
            break
    else:
        filled = int((W.mean(axis=1) > _EMPTY).sum())
        raise NotIdentifiableError(
            f"of {k} classes {k - filled} ended empty: these shares have rank {np.linalg.matrix_rank(Q)} only; "
            f"ask for at most k = {filled} classes"
        )
    order = np.argsort(-W.sum(axis=1), kind="stable")
    C, W = C[:, order], W[order]
    return Factorization(C, W, float(np.linalg.norm(Q - C @ W)), bool(converged[best]), errors)


def scaled(C: Float[np.ndarray, "*b m k"], W: Float[np.ndarray, "*b k r"]) -> tuple[np.ndarray, np.ndarray]:
    """C with columns of sum 1, its scale moved into W, then W with columns of sum 1; an empty class stays at 0."""
    total = C.sum(axis=-2)
    C = C / np.where(total > 0, total, 1.0)[..., None, :]
    W = W * total[..., :, None]
    column = W.sum(axis=-2, keepdims=True)
    return C, W / np.where(column > 0, column, 1.0)


def fit_factors(
    Q: Float[np.ndarray, "#b m r"], C: Float[np.ndarray, "b m k"], W: Float[np.ndarray, "b k r"], iterations: int
) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, " b"], np.ndarray]:
    """Descend ||Q - C W||^2 under C, W >= 0 from all starts (b) at once: (C, W, squared error, whether each arrived).

    Source: Gillis and Glineur, 2012, Neural Computation 24 (hierarchical alternating least squares).
    """
    Ct, W, Qt = C.transpose(0, 2, 1).copy(), W.copy(), Q.transpose(0, 2, 1)
    before, arrived = np.full(len(C), np.inf), np.zeros(len(C), dtype=bool)
    for step in range(1, iterations + 1):
        _descend(Ct, W @ Qt, W @ W.transpose(0, 2, 1))
        _descend(W, Ct @ Q, Ct @ Ct.transpose(0, 2, 1))
        if step % _CHECK_EVERY == 0 or step == iterations:
            squared = ((Q - Ct.transpose(0, 2, 1) @ W) ** 2).sum(axis=(1, 2))
            arrived = before - squared <= _TOLERANCE * squared + 1e-20
            before = squared
            if arrived.all():
                break
    return Ct.transpose(0, 2, 1), W, before, arrived


def _descend(F: np.ndarray, target: np.ndarray, gram: np.ndarray) -> None:
    """A few sweeps of exact minimisation, one row of F (b, k, n) at a time, of F' gram F / 2 - F' target; in place."""
    diagonal = np.einsum("bkk->bk", gram)
    size = np.maximum(diagonal, 1e-300)[..., None]
    for _ in range(_SWEEPS):
        for j in range(F.shape[1]):
            step = (target[:, j] - (gram[:, j, None] @ F)[:, 0]) / size[:, j]
            F[:, j] = np.where(diagonal[:, j, None] > 0, np.maximum(F[:, j] + step, 0.0), 0.0)


def _anchor_factors(Q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """C (m, k) and W (k, r), not scaled, by successive projection on the rows of Q that sum to 1."""
    total = Q.sum(axis=1)
    profile = Q / np.where(total > 0, total, 1.0)[:, None]
    rest, W = profile.copy(), np.zeros((k, Q.shape[1]))
    for j in range(k):
        farthest = int((rest**2).sum(axis=1).argmax())
        axis = rest[farthest]
        length = np.linalg.norm(axis)
        if length <= _FLAT:
            break  # no direction is left: the other classes are empty
        W[j] = profile[farthest]
        rest = rest - np.outer(rest @ axis, axis) / length**2
    return nonnegative_least_squares(W.T, Q), W
