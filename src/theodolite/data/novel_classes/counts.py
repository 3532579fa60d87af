"""How many classes the unlabelled rows hold, by an index of cluster quality."""

__all__ = ["ClusterCount", "estimate_n_clusters"]

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from theodolite.core.errors import DataError, InputError
from theodolite.core.parallel import seeds_for
from theodolite.data.novel_classes.labels import check_rows

K_RANGE = range(2, 31)


@dataclass(frozen=True, eq=False)
class ClusterCount:
    """k: the number of clusters with the best mean score. tried: the numbers tried; scores: (tried, runs)."""

    k: int
    tried: tuple[int, ...]
    scores: Float[np.ndarray, "tried run"]
    index: str


def estimate_n_clusters(
    Z: Any,
    k_range: Iterable[int] = K_RANGE,
    *,
    index: str = "silhouette",
    runs: int = 3,
    max_samples: int = 2000,
    seed: int = 0,
) -> ClusterCount:
    """The number of clusters in rows Z (n, p) whose k-means clustering has the best mean index over ``runs`` runs.

    The index is worked out on at most ``max_samples`` rows, always the same, since the silhouette's cost grows with their
    square: "silhouette" and "calinski_harabasz" are best where largest, "davies_bouldin" where smallest. Numbers of
    ``k_range`` that are not below the number of different rows are left out; DataError where none is left.

    Source: Troisemaine et al., 2023, arXiv:2311.05440, estimation of the number of novel classes; Rousseeuw, 1987.

    >>> rng = np.random.default_rng(0)
    >>> Z = rng.normal(size=(90, 2)) * 0.1 + np.repeat([[0, 0], [5, 0], [0, 5]], 30, axis=0)
    >>> estimate_n_clusters(Z, range(2, 7)).k
    3
    """
    if index not in ("silhouette", "davies_bouldin", "calinski_harabasz"):
        raise InputError(f"index must be silhouette, davies_bouldin or calinski_harabasz, got {index!r}")
    if runs < 1 or max_samples < 3:
        raise InputError(f"need runs >= 1 and max_samples >= 3, got {runs} and {max_samples}")
    z, _ = check_rows(Z)
    wanted = sorted(set(k_range))
    if not wanted or any(not isinstance(k, (int, np.integer)) or k < 2 for k in wanted):
        raise InputError(f"k_range must hold whole numbers of at least 2, got {wanted[:5]}")
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.permutation(len(z))[:max_samples])
    different = len(np.unique(z[sample], axis=0))
    tried = [k for k in wanted if k < different]
    if not tried:
        raise DataError(f"{different} different rows are too few to tell the number of clusters; give n_novel yourself")
    rows = z[sample]
    distances = cdist(rows, rows) if index == "silhouette" else None
    scores = np.empty((len(tried), runs))
    for run, run_seed in enumerate(seeds_for(seed, runs)):
        for i, k in enumerate(tried):
            labels = _kmeans(z, k, run_seed)[sample]
            if distances is not None:
                scores[i, run] = silhouette(distances, np.unique(labels, return_inverse=True)[1])
            else:
                scores[i, run] = (davies_bouldin_score if index == "davies_bouldin" else calinski_harabasz_score)(
                    rows, labels
                )
    mean = scores.mean(axis=1)
    best = int(mean.argmin() if index == "davies_bouldin" else mean.argmax())
    return ClusterCount(tried[best], tuple(tried), scores, index)


def _kmeans(z: Float[np.ndarray, "row column"], k: int, seed: int) -> Int[np.ndarray, " row"]:
    options: dict[str, Any] = {"n_init": 1, "random_state": seed}
    fitted: Any = KMeans(k, **options).fit(z)
    return fitted.labels_


def silhouette(distances: Float[np.ndarray, "row row"], labels: Int[np.ndarray, " row"]) -> float:
    """Mean silhouette of clusters 0..k-1, each with a row, by one matrix product; a cluster of one row counts 0."""
    k = int(labels.max()) + 1
    member = np.eye(k)[labels]
    sizes = member.sum(axis=0)
    if k < 2:
        return 0.0
    sums = distances @ member
    own = np.arange(len(labels)), labels
    inside = sums[own] / np.maximum(sizes[labels] - 1, 1)
    means = sums / sizes
    means[own] = np.inf
    outside = means.min(axis=1)
    larger = np.maximum(inside, outside)
    value = np.divide(outside - inside, larger, out=np.zeros(len(labels)), where=larger > 0)
    return float(np.where(sizes[labels] > 1, value, 0.0).mean())
