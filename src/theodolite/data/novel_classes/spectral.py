"""Spectral clustering of the unlabelled rows in an embedding that they share with the known ones."""

__all__ = ["NCDSpectralClustering", "spectral_bandwidth"]

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import linalg, sparse
from scipy.sparse.linalg import eigsh
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import check_is_fitted

from theodolite.core.errors import DataError, InputError
from theodolite.data.novel_classes.kmeans import NCDKMeans, check_width, fit_hidden, nearest
from theodolite.data.novel_classes.labels import check_count, check_rows, labelled

_EXACT = 600  # rows up to which all eigenvectors are worked out at once


class NCDSpectralClustering(BaseEstimator):
    """Spectral clustering whose graph holds known and unlabelled rows, followed by `NCDKMeans` in the embedding.

    A_ij = exp(-||x_i - x_j||^2 / (2 sigma^2)) with a zero diagonal and sigma of `spectral_bandwidth`;
    L = I - Deg^-1/2 A Deg^-1/2; the embedding are its eigenvectors 2..n_components+1, smallest eigenvalues first.
    Beyond max_dense rows A keeps only each row's n_neighbors nearest ones and the edges of the minimum spanning tree, so
    that it stays connected. Without any known row this is plain spectral clustering.

    n_novel: clusters, or "auto" for the best silhouette in the embedding. n_components: columns of the embedding; None for
    one less than the known and novel classes (than twice the known ones where the number of novel ones is to be found).
    fit(X (n, p), y (n,)): y is -1 for unlabelled rows. Afterwards labels_ (of the unlabelled rows, in order), embedding_
    (n, n_components), sigma_, centroids_ (n_novel, n_components) and inertia_, both in the embedding. `predict` gives a new
    row the cluster of the nearest unlabelled row of the fit, since the embedding has no formula for new rows.

    Source: Troisemaine et al., 2023, arXiv:2311.05440, NCD spectral clustering; Ng, Jordan and Weiss, 2001.

    >>> X = np.array([[0.0], [0.2], [0.1], [5.0], [5.2], [9.0], [9.3]])
    >>> labels = NCDSpectralClustering(2).fit(X, np.array([7, 7, 7, -1, -1, -1, -1])).labels_
    >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
    True
    """

    def __init__(
        self,
        n_novel: int | str,
        *,
        n_components: int | None = None,
        min_dist: float = 0.6,
        n_init: int = 10,
        power: float = 2,
        n_neighbors: int = 30,
        max_dense: int = 5000,
        seed: int = 0,
    ) -> None:
        self.n_novel = n_novel
        self.n_components = n_components
        self.min_dist = min_dist
        self.n_init = n_init
        self.power = power
        self.n_neighbors = n_neighbors
        self.max_dense = max_dense
        self.seed = seed

    def fit(self, X: Any, y: Any) -> "NCDSpectralClustering":
        """Cluster the rows of X (n, p) whose label in y (n,) is -1."""
        data = labelled(X, y)
        n, unlabelled = len(data.x), ~data.known
        given = check_count(self.n_novel, int(unlabelled.sum()))
        if self.n_neighbors < 1 or self.max_dense < 1:
            raise InputError(f"need n_neighbors >= 1 and max_dense >= 1, got {self.n_neighbors} and {self.max_dense}")
        classes = len(data.classes)
        wanted = self.n_components
        if wanted is None:
            groups = 2 * classes if given is None else classes + given
            wanted = min(n - 1, max(1, groups - 1))
        if not 1 <= wanted < n:
            raise InputError(f"n_components must lie between 1 and {n - 1} for {n} rows, got {wanted}")
        self.sigma_ = spectral_bandwidth(data.x, self.min_dist)
        if n <= self.max_dense:
            affinity = dense_affinity(data.x, self.sigma_)
        else:
            affinity = sparse_affinity(data.x, self.sigma_, self.n_neighbors)
        self.embedding_ = spectral_embedding(affinity, wanted, seed=self.seed)
        clusters = NCDKMeans(self.n_novel, n_init=self.n_init, power=self.power, seed=self.seed)
        clusters.fit(self.embedding_, np.where(data.known, data.y, -1))
        self.labels_, self.n_novel_ = clusters.labels_, clusters.n_novel_
        self.centroids_, self.inertia_ = clusters.centroids_, clusters.inertia_
        self.n_features_in_ = data.x.shape[1]
        self._rows = data.x[unlabelled]
        return self

    def predict(self, X: Any) -> Int[np.ndarray, " row"]:
        """The cluster of the nearest unlabelled row of the fit, for each row of X (n, p)."""
        check_is_fitted(self)
        return self.labels_[nearest(check_width(X, self.n_features_in_), self._rows)]

    def cluster_hidden(self, X: Any, y: Any, hidden: Bool[np.ndarray, " row"], k: int) -> Int[np.ndarray, " hidden"]:
        """k clusters of the ``hidden`` rows alone, given the rows that y (n,) labels; as tuning asks for them."""
        return fit_hidden(self, X, y, hidden, k)


def spectral_bandwidth(X: Any, min_dist: float) -> float:
    """sigma = sqrt(-L^2_max / ln(min_dist)) of rows X (n, p), L^2_max the largest squared edge of their spanning tree.

    In a minimum spanning tree of the squared distances the largest edge then has the similarity sqrt(min_dist), so that the
    graph is connected at any scale of the columns. Time grows with n^2, memory with n. InputError for min_dist outside
    (0, 1), DataError where all rows are the same.

    Source: Troisemaine et al., 2023, arXiv:2311.05440.

    >>> X = np.array([[0, 0], [1, 0], [0, 2], [5, 5], [6, 5], [5, 7]])
    >>> round(spectral_bandwidth(X, 0.5), 5)
    7.00369
    """
    if not 0 < min_dist < 1:
        raise InputError(f"min_dist must lie strictly between 0 and 1, got {min_dist}")
    x, _ = check_rows(X)
    longest = float(spanning_tree(x)[1].max(initial=0.0))
    if longest == 0:
        raise DataError(f"all {len(x)} rows are the same, so there is no distance to set the bandwidth by")
    return float(np.sqrt(-longest / np.log(min_dist)))


def spanning_tree(x: Float[np.ndarray, "row column"]) -> tuple[np.ndarray, np.ndarray]:
    """For rows 1..n-1 the row that each hangs on in a minimum spanning tree, and the squared length of that edge.

    Prim's algorithm with one matrix-vector product a step.
    """
    centred = x - x.mean(axis=0)
    squared = (centred**2).sum(axis=1)
    best, parent = np.full(len(x), np.inf), np.zeros(len(x), dtype=np.int64)
    inside = np.zeros(len(x), dtype=bool)
    here = 0
    for _ in range(len(x) - 1):
        inside[here] = True
        distance = squared + (squared[here] - 2 * (centred @ centred[here]))
        closer = (distance < best) & ~inside
        best[closer], parent[closer] = distance[closer], here
        best[here] = np.inf
        here = int(best.argmin())
    return parent[1:], ((x[1:] - x[parent[1:]]) ** 2).sum(axis=1)


def dense_affinity(x: Float[np.ndarray, "row column"], sigma: float) -> Float[np.ndarray, "row row"]:
    """A_ij = exp(-||x_i - x_j||^2 / (2 sigma^2)), zero on the diagonal."""
    affinity = cdist(x, x, "sqeuclidean")
    affinity /= -2 * sigma**2
    np.exp(affinity, out=affinity)
    np.fill_diagonal(affinity, 0)
    return affinity


def sparse_affinity(x: Float[np.ndarray, "row column"], sigma: float, neighbours: int) -> sparse.csr_matrix:
    """The same between neighbours only, and along the spanning tree."""
    n = len(x)
    near = NearestNeighbors(n_neighbors=min(neighbours, n - 1)).fit(x).kneighbors(return_distance=False)
    parent, _ = spanning_tree(x)
    a = np.concatenate([np.repeat(np.arange(n), near.shape[1]), np.arange(1, n)])
    b = np.concatenate([near.ravel(), parent])
    pairs = np.unique(np.sort(np.stack([a, b], axis=1), axis=1), axis=0)
    value = np.exp(-((x[pairs[:, 0]] - x[pairs[:, 1]]) ** 2).sum(axis=1) / (2 * sigma**2))
    upper = sparse.coo_matrix((value, (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return sparse.csr_matrix(upper + upper.T)


def spectral_embedding(affinity: Any, n_components: int, *, seed: int = 0) -> Float[np.ndarray, "row component"]:
    """Eigenvectors 2..n_components+1 of I - Deg^-1/2 A Deg^-1/2, smallest eigenvalues first, each largest entry positive."""
    n = affinity.shape[0]
    root = 1 / np.sqrt(np.asarray(affinity.sum(axis=1)).ravel())
    if sparse.issparse(affinity):
        normal: Any = sparse.diags(root) @ affinity @ sparse.diags(root)
    else:
        normal = affinity * root
        normal *= root[:, None]
    # the eigenvectors of L with the smallest eigenvalues are those of I - L with the largest
    if n <= _EXACT or n_components + 1 >= n // 4:
        full = normal.toarray() if sparse.issparse(normal) else normal
        _, vectors = linalg.eigh(full, subset_by_index=[n - n_components - 1, n - 1])
    else:
        start = np.random.default_rng(seed).normal(size=n)
        values, vectors = eigsh(normal, n_components + 1, which="LA", v0=start)
        vectors = vectors[:, np.argsort(values)]
    vectors = vectors[:, ::-1][:, 1:]
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[largest, np.arange(n_components)])
