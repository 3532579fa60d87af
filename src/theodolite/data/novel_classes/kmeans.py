"""k-means for the unlabelled rows that starts away from the known classes."""

__all__ = ["NCDKMeans"]

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks
from theodolite.core.parallel import seeds_for
from theodolite.data.novel_classes.counts import estimate_n_clusters
from theodolite.data.novel_classes.labels import UNLABELLED, check_count, check_rows, labelled

_TOLERANCE, _STEPS = 1e-10, 1000


class NCDKMeans(BaseEstimator):
    """k-means on the unlabelled rows, whose first centroids are drawn far from the means of the known classes.

    A first centroid is an unlabelled row, drawn with a probability in proportion to d^power, d its distance to the nearest
    of the known classes' means and of those drawn before. Then Lloyd's iterations move the new centroids on unlabelled
    rows only: the known means are no candidates there, or they would steal rows. The best of n_init runs is kept; a
    cluster that loses all rows keeps its place. Without any known row this is k-means with k-means++.

    n_novel: clusters, or "auto" for the best silhouette. power: 2 as in k-means++, 1 as in the published code.
    update: "novel", or "all" to let the known means take part and move on all rows, for comparison.
    fit(X (n, p), y (n,)): y is -1 for unlabelled rows. Afterwards labels_ (cluster of each unlabelled row, in order),
    centroids_ (n_novel, p), initial_centroids_ of the best run, known_centroids_, inertia_ (sum of squared distances).

    DataError without unlabelled rows, or with fewer different ones than clusters; InputError for options out of range.

    Source: Troisemaine et al., 2023, arXiv:2311.05440, NCD k-means; Arthur and Vassilvitskii, 2007 (k-means++).

    >>> X = np.array([[0.0], [0.2], [5.0], [5.2], [9.0], [9.2]])
    >>> NCDKMeans(2).fit(X, np.array([7, 7, -1, -1, -1, -1])).centroids_.ravel().round(1).tolist() in ([5.1, 9.1], [9.1, 5.1])
    True
    """

    def __init__(
        self,
        n_novel: int | str,
        *,
        n_init: int = 10,
        power: float = 2,
        update: str = "novel",
        seed: int = 0,
    ) -> None:
        self.n_novel = n_novel
        self.n_init = n_init
        self.power = power
        self.update = update
        self.seed = seed

    def fit(self, X: Any, y: Any) -> "NCDKMeans":
        """Cluster the rows of X (n, p) whose label in y (n,) is -1."""
        data = labelled(X, y)
        unlabelled = data.x[~data.known]
        given = check_count(self.n_novel, len(unlabelled))
        if self.n_init < 1 or not self.power > 0 or self.update not in ("novel", "all"):
            raise InputError(
                f'need n_init >= 1, power > 0 and update "novel" or "all"; got {self.n_init}, {self.power}, {self.update!r}'
            )
        k = estimate_n_clusters(unlabelled, seed=self.seed).k if given is None else given
        self.n_features_in_ = data.x.shape[1]
        self.known_centroids_ = data.means
        self.inertia_ = np.inf
        for seed in seeds_for(self.seed, self.n_init):
            first = draw_centroids(unlabelled, self.known_centroids_, k, power=self.power, seed=seed)
            if self.update == "novel":
                centroids = lloyd(unlabelled, first)
            else:
                centroids = lloyd(data.x, np.concatenate([self.known_centroids_, first]))[-k:]
            labels = nearest(unlabelled, centroids)
            inertia = float(((unlabelled - centroids[labels]) ** 2).sum())
            if inertia < self.inertia_:
                self.inertia_, self.labels_, self.centroids_, self.initial_centroids_ = (
                    inertia,
                    labels,
                    centroids,
                    first,
                )
        self.n_novel_ = k
        return self

    def predict(self, X: Any) -> Int[np.ndarray, " row"]:
        """The cluster with the nearest centroid of each row of X (n, p)."""
        check_is_fitted(self)
        return nearest(check_width(X, self.n_features_in_), self.centroids_)

    def cluster_hidden(self, X: Any, y: Any, hidden: Bool[np.ndarray, " row"], k: int) -> Int[np.ndarray, " hidden"]:
        """k clusters of the ``hidden`` rows alone, given the rows that y (n,) labels; as tuning asks for them."""
        return fit_hidden(self, X, y, hidden, k)


def fit_hidden(estimator: Any, X: Any, y: Any, hidden: np.ndarray, k: int) -> Int[np.ndarray, " hidden"]:
    """Fit ``estimator`` on labelled and hidden rows only and give the clusters of the hidden ones."""
    x, _ = check_rows(X)
    rows = hidden | (np.asarray(y) != UNLABELLED)
    return estimator.set_params(n_novel=k).fit(x[rows], np.asarray(y)[rows]).labels_


def check_width(X: Any, columns: int) -> Float[np.ndarray, "row column"]:
    """X (n, p) as float64; DataError where it has not the number of columns that was fitted."""
    x, _ = check_rows(X)
    if x.shape[1] != columns:
        raise DataError(f"fitted on {columns} columns, got rows of {x.shape[1]}")
    return x


def draw_centroids(
    points: Float[np.ndarray, "row column"],
    known: Float[np.ndarray, "known column"],
    n: int,
    *,
    power: float,
    seed: int,
) -> Float[np.ndarray, "novel column"]:
    """n of the points, each drawn with probability ~ d^power from the nearest of ``known`` and of those drawn before."""
    rng = np.random.default_rng(seed)
    near = np.full(len(points), np.inf)
    for row in known:
        np.minimum(near, np.linalg.norm(points - row, axis=1), out=near)
    chosen = list[int]()
    for _ in range(n):
        weight = near**power if np.isfinite(near[0]) else np.ones(len(points))
        total = weight.sum()
        if total == 0:
            raise DataError(
                f"only {len(chosen)} different unlabelled rows lie apart from the means of the known classes, too few for "
                f"{n} clusters; lower n_novel"
            )
        chosen.append(int(rng.choice(len(points), p=weight / total)))
        np.minimum(near, np.linalg.norm(points - points[chosen[-1]], axis=1), out=near)
    return points[chosen]


def nearest(points: Float[np.ndarray, "row column"], centres: Float[np.ndarray, "centre column"]) -> np.ndarray:
    """Index of the nearest centre of each point (n,), by one matrix product a chunk.

    ||x - c||^2 / 2 = ||x - m||^2 / 2 + ||d||^2 / 2 + m d - x d, with d = c - m and m the mean of the centres: without m, columns
    far from zero (times, years) would lose their distances to rounding.
    """
    out = np.empty(len(points), dtype=np.int64)
    middle = centres.mean(axis=0)
    apart = centres - middle
    half = 0.5 * (apart**2).sum(axis=1) + apart @ middle
    for part in chunks(len(points), 8.0 * len(centres), 1 << 22):
        product = points[part] @ apart.T
        np.subtract(half, product, out=product)  # a second table of this size would cost more than the product
        out[part] = product.argmin(axis=1)
    return out


def lloyd(
    points: Float[np.ndarray, "row column"], centres: Float[np.ndarray, "centre column"]
) -> Float[np.ndarray, "centre column"]:
    """Lloyd's iterations until no centre moves by more than 1e-10 (at most 1,000); one without points keeps its place."""
    n, k = len(points), len(centres)
    ones, starts = np.ones(n), np.arange(n + 1)
    for _ in range(_STEPS):
        labels = nearest(points, centres)
        member = sparse.csc_matrix((ones, labels, starts), shape=(k, n))
        sizes = np.bincount(labels, minlength=k)[:, None]
        moved = np.where(sizes > 0, (member @ points) / np.maximum(sizes, 1), centres)
        shift = np.sqrt(((moved - centres) ** 2).sum(axis=1).max())
        centres = moved
        if shift <= _TOLERANCE:
            break
    return centres
