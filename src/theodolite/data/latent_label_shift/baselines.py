"""What the method has to beat: plain clusters of the rows, and clusters of the domains' probabilities taken as classes."""

__all__ = ["kmeans_labels", "naive_labels"]

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA

from theodolite.core.errors import DataError, InputError
from theodolite.data.latent_label_shift.factors import factorize_shares
from theodolite.data.latent_label_shift.shares import cluster_shares

_VARIANCE = 0.9
_STARTS: Any = 10


def kmeans_labels(
    X: Float[np.ndarray, "row feature"],
    k: int,
    *,
    features: str = "raw",
    n_features: int | None = None,
    seed: int = 0,
) -> Int[np.ndarray, " row"]:
    """Clusters (n,) of k-means with k clusters, best of 10 starts, on the rows ("raw") or their components ("pca", "ica").

    n_features: principal or independent components; those that hold 90 % of the variance where not given. It looks at no domain.

    >>> kmeans_labels(np.array([[0.0], [0.1], [5.0], [5.1]]), 2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    True
    """
    if features not in ("raw", "pca", "ica"):
        raise InputError(f'features must be "raw", "pca" or "ica", got {features!r}')
    if not 1 <= k <= len(X):
        raise InputError(f"k must lie between 1 and the number of rows, {len(X)}, got {k}")
    Z = np.asarray(X, dtype=np.float64)
    if not np.isfinite(Z).all():
        raise DataError("X holds NaN or infinite values; fill them in or leave these rows out")
    if features != "raw":
        pca = PCA(_VARIANCE if n_features is None else n_features, random_state=seed, svd_solver="full").fit(Z)
        Z = pca.transform(Z)
        if features == "ica":
            Z = FastICA(whiten="unit-variance", random_state=seed, max_iter=1000, tol=1e-3).fit_transform(Z)
    return KMeans(k, n_init=_STARTS, random_state=seed).fit_predict(Z)


def naive_labels(
    p_domain: Float[np.ndarray, "row domain"], domains: np.ndarray, k: int, *, seed: int = 0
) -> Int[np.ndarray, " row"]:
    """Classes (n,) where each of k clusters of p(d | x) has one class a domain: argmax over y of C_cy W_yd.

    p_domain: scored out of fold (`LatentLabelShift.out_of_fold_`); its columns are the domains in the order of `np.unique`.
    """
    clusters = KMeans(k, n_init=_STARTS, random_state=seed).fit_predict(p_domain)
    found = factorize_shares(cluster_shares(clusters, domains, k), k, seed=seed)
    _, column = np.unique(domains, return_inverse=True)
    return (found.C[clusters] * found.W.T[column]).argmax(axis=1)
