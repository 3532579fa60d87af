"""Domains made out of labelled rows, which differ in nothing but their shares of the classes."""

__all__ = ["Simulation", "simulate_label_shift"]

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from theodolite.core.errors import DataError, InputError
from theodolite.data.latent_label_shift.shares import NotIdentifiableError

_SMALLEST = 1e-7
_DRAWS = 20_000
_FEWEST = 10


@dataclass(frozen=True, eq=False)
class Simulation:
    """Rows ``index`` (n,) of the data, the domain of each (n,) from 0, and the class shares (k, r) of the rows drawn.

    classes (k,): the labels that the rows of class_shares belong to.
    """

    index: Int[np.ndarray, " row"]
    domains: Int[np.ndarray, " row"]
    class_shares: Float[np.ndarray, "k domain"]
    classes: Shaped[np.ndarray, " k"]


def simulate_label_shift(
    y: np.ndarray, n_domains: int, alpha: float = 0.5, max_condition: float = 4.0, seed: int = 0
) -> Simulation:
    """Draw rows of labels y (n,) into domains with p_d(y) ~ Dirichlet(alpha / k, ..., alpha / k), no row twice.

    The shares are drawn again until their condition number is at most max_condition, before and after rounding to rows.
    Domains are as large as the rarest class allows, all of nearly the same size: of class y domain d gets
    floor(p_d(y) scale) rows. A small alpha means a strong shift.

    Source: Roberts et al., 2022, arXiv:2207.13179, section 5 (shares below 1e-7 are 0).

    >>> made = simulate_label_shift(np.repeat([0, 1], 100), 4, seed=0)
    >>> bool(np.linalg.cond(made.class_shares) <= 4), len(np.unique(made.index)) == len(made.index)
    (True, True)
    """
    y = np.asarray(y)
    if y.dtype.kind in "fO" and any(label is None or label != label for label in y.ravel().tolist()):
        raise DataError("some rows have no label (NaN or None); leave them out")
    classes, label, available = np.unique(y, return_inverse=True, return_counts=True)
    k = len(classes)
    if y.ndim != 1 or k < 2:
        raise DataError(f"need one label a row and at least two classes, got {k} in an array of shape {y.shape}")
    if not alpha > 0 or not max_condition >= 1:
        raise InputError(f"need alpha > 0 and max_condition >= 1, got {alpha} and {max_condition}")
    if n_domains < k:
        raise NotIdentifiableError(f"{k} classes need at least r = {k} domains, got n_domains={n_domains}")
    rng = np.random.default_rng(seed)
    best = np.inf
    for _ in range(_DRAWS):
        shares = rng.dirichlet(np.full(k, alpha / k), size=n_domains).T
        shares[shares < _SMALLEST] = 0.0
        used = shares.sum(axis=1)
        if used.min() == 0:
            continue
        counts = np.floor(shares * (available / used).min()).astype(np.int64)
        size = counts.sum(axis=0)
        if size.min() < _FEWEST:
            continue
        rounded = counts / size
        condition = max(float(np.linalg.cond(shares)), float(np.linalg.cond(rounded)))
        best = min(best, condition)
        if condition <= max_condition:
            break
    else:
        raise DataError(
            f"no draw of {_DRAWS:,} made {n_domains} domains of at least {_FEWEST} rows with condition number <= "
            f"{max_condition:g} (the least was {best:.3g}); allow a larger max_condition, a smaller alpha or fewer domains"
        )
    index, domains = [], []
    for c in range(k):
        rows = rng.permutation(np.flatnonzero(label == c))[: counts[c].sum()]
        index.append(rows)
        domains.append(np.repeat(np.arange(n_domains), counts[c]))
    order = rng.permutation(int(counts.sum()))
    return Simulation(np.concatenate(index)[order], np.concatenate(domains)[order], rounded, classes)
