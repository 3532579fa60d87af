"""Tables of shares: what part of each domain lies in each cluster, and how far two tables of class shares are apart."""

__all__ = ["DomainsAlikeError", "NotIdentifiableError", "check_shares", "cluster_shares", "share_error"]

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from theodolite.core.errors import DataError, InputError

_SLACK = 1e-6


class NotIdentifiableError(DataError):
    """So many classes cannot be told apart with these domains; the text says how many can."""


class DomainsAlikeError(DataError):
    """The domain classifier cannot tell the domains apart, so nothing about classes can be learnt from them."""


def check_shares(table: np.ndarray, name: str) -> Float[np.ndarray, "row domain"]:
    """``table`` as float64 where it is finite, not negative, and every column sums to 1; DataError where not."""
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(f"{name} must be a matrix with one column a domain, got shape {table.shape}")
    if not np.isfinite(table).all() or (table < 0).any():
        raise DataError(f"{name} must hold finite shares of at least 0")
    off = np.abs(table.sum(axis=0) - 1)
    if off.max() > _SLACK:
        hint = "; its rows do: transpose it" if np.abs(table.sum(axis=1) - 1).max() <= _SLACK else ""
        raise DataError(f"the columns of {name} (one a domain) must sum to 1, column {off.argmax()} does not{hint}")
    return table


def cluster_shares(
    clusters: np.ndarray, domains: np.ndarray, n_clusters: int | None = None
) -> Float[np.ndarray, "m r"]:
    """Share of each domain's rows that lie in each cluster (m, r); columns sum to 1, domains in the order of `np.unique`.

    clusters (n,): numbers from 0. domains (n,): any names. n_clusters: m, the largest number + 1 where not given.

    >>> cluster_shares(np.array([0, 1, 1, 0]), np.array(["a", "a", "a", "b"])).round(2).tolist()
    [[0.33, 1.0], [0.67, 0.0]]
    """
    clusters, domains = np.asarray(clusters), np.asarray(domains)
    if clusters.ndim != 1 or clusters.shape != domains.shape or not len(clusters):
        raise InputError(f"need one cluster and one domain a row, got shapes {clusters.shape} and {domains.shape}")
    if not np.issubdtype(clusters.dtype, np.integer) or clusters.min() < 0:
        raise InputError("clusters must be whole numbers from 0; use np.unique(values, return_inverse=True)[1]")
    names, column = np.unique(domains, return_inverse=True)
    m = int(clusters.max()) + 1 if n_clusters is None else n_clusters
    if m <= clusters.max():
        raise InputError(f"there are clusters up to number {clusters.max()}, so n_clusters={m} is too small")
    counts = np.bincount(clusters * len(names) + column, minlength=m * len(names)).reshape(m, len(names))
    return counts / counts.sum(axis=0)


def share_error(found: np.ndarray, true: np.ndarray) -> Float[np.ndarray, " r"]:
    """L1 distance of class shares in each domain, sum over classes of abs(found - true), rows matched to lose least.

    found, true (k, r). Its mean is the error a domain; its sum the published error over all entries.

    >>> share_error(np.array([[0.2, 0.9], [0.8, 0.1]]), np.array([[0.7, 0.1], [0.3, 0.9]])).round(2).tolist()
    [0.2, 0.0]
    """
    found, true = np.asarray(found, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if found.shape != true.shape or found.ndim != 2:
        raise InputError(f"need two tables of one shape (classes, domains), got {found.shape} and {true.shape}")
    rows, columns = linear_sum_assignment(np.abs(found[:, None] - true).sum(axis=2))
    return np.abs(found[rows] - true[columns]).sum(axis=0)
