"""How well clusters agree with classes that were known all along."""

__all__ = ["ClusteringMetrics", "clustering_metrics"]

from dataclasses import dataclass
from typing import Any

import numpy as np

from theodolite.core.clustering import cluster_scores, match_labels
from theodolite.core.errors import InputError


@dataclass(frozen=True)
class ClusteringMetrics:
    """nmi (arithmetic mean), ari, accuracy under the best one-to-one map, clusters with rows, and that map {cluster: class}."""

    nmi: float
    ari: float
    accuracy: float
    n_found: int
    mapping: dict


def clustering_metrics(y_true: Any, labels: Any, *, n_clusters: int | None = None) -> ClusteringMetrics:
    """Scores of ``labels`` (n,) against the classes ``y_true`` (n,); empty clusters are fine.

    n_clusters: how many clusters were asked for, the number of classes where not given; more labels than that are an
    InputError, since rows of a cluster that is matched to no class count as wrong.

    >>> clustering_metrics([0, 0, 1, 1], ["b", "b", "a", "a"])
    ClusteringMetrics(nmi=1.0, ari=1.0, accuracy=1.0, n_found=2, mapping={'a': 1, 'b': 0})
    """
    true, pred = np.asarray(y_true), np.asarray(labels)
    scores = cluster_scores(true, pred)
    found = len(np.unique(pred))
    asked = len(np.unique(true)) if n_clusters is None else n_clusters
    if found > asked:
        what = "classes; give n_clusters where that is meant" if n_clusters is None else "asked for"
        raise InputError(f"labels name {found} clusters, more than the {asked} {what}")
    return ClusteringMetrics(scores.nmi, scores.ari, scores.accuracy, found, match_labels(pred, true).permutation)
