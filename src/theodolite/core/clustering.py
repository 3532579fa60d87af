"""How well clusters agree with classes: labels matched one to one, and two scores that need no matching."""

__all__ = ["ClusterScores", "Matching", "cluster_scores", "clustering_accuracy", "match_labels"]

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from theodolite.core.errors import InputError


@dataclass(frozen=True)
class Matching:
    """The one-to-one map of clusters to classes that agrees on the most rows.

    permutation: {cluster: class}; with more clusters than classes the rest of the clusters are missing, and their rows
    count as wrong. accuracy: share of rows whose cluster is mapped to their class.
    """

    permutation: dict
    accuracy: float

    def __getitem__(self, cluster: object) -> object:
        return self.permutation[cluster]


@dataclass(frozen=True)
class ClusterScores:
    """accuracy (Hungarian), normalised mutual information and adjusted Rand index of one clustering."""

    accuracy: float
    nmi: float
    ari: float


def match_labels(pred: np.ndarray, true: np.ndarray) -> Matching:
    """Match the labels of ``pred`` (n,) to those of ``true`` (n,), one to one, by the Hungarian algorithm.

    The numbers of different labels may differ; a missing label is an InputError. A majority map (many clusters to one
    class) would flatter a clustering with many clusters; this one does not.

    Source: Kuhn, 1955, Naval Research Logistics Quarterly 2.

    >>> match_labels(np.array([2, 2, 0, 0, 1]), np.array(["a", "a", "b", "b", "b"]))
    Matching(permutation={0: 'b', 2: 'a'}, accuracy=0.8)
    """
    pred, true = _checked(pred, true)
    table = contingency_matrix(true, pred)  # class x cluster
    rows, columns = linear_sum_assignment(-table)
    classes, clusters = np.unique(true).tolist(), np.unique(pred).tolist()  # numbers or texts, of whatever dtype
    pairs = sorted(zip(columns, rows))
    return Matching(
        {clusters[column]: classes[row] for column, row in pairs},
        float(table[rows, columns].sum() / len(true)),
    )


def clustering_accuracy(true: np.ndarray, pred: np.ndarray) -> float:
    """Share of rows that are right under the best one-to-one map of clusters to classes; see `match_labels`."""
    return match_labels(pred, true).accuracy


def cluster_scores(true: np.ndarray, pred: np.ndarray) -> ClusterScores:
    """Accuracy, normalised mutual information and adjusted Rand index of ``pred`` (n,) against ``true`` (n,)."""
    true, pred = _checked(true, pred)
    return ClusterScores(
        clustering_accuracy(true, pred),
        float(normalized_mutual_info_score(true, pred)),
        float(adjusted_rand_score(true, pred)),
    )


def _checked(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise InputError(f"need two label vectors of one length >= 1, got shapes {first.shape} and {second.shape}")
    for labels in (first, second):
        if labels.dtype.kind in "fO" and any(label is None or label != label for label in labels.tolist()):
            raise InputError("some labels are missing (NaN or None); leave these rows out of both vectors")
    return first, second
