"""What sets a cluster apart, in the words of the table's own columns."""

__all__ = ["ClusterDescription", "describe_clusters"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.tree import DecisionTreeClassifier

from theodolite.core.errors import DataError
from theodolite.data.novel_classes.labels import Labelled, check_rows, labelled

_DEPTH = 3


@dataclass(frozen=True)
class ClusterDescription:
    """One cluster in words.

    rows: how many it has. rule: conditions on columns, "" where no tree of depth 3 tells it from the others. precision:
    share of the rows under the rule that are the cluster's; recall: share of the cluster's rows under the rule; fidelity:
    accuracy of the tree at telling the cluster from all others; all three on rows held out of the tree (None where
    none can be held out or none is under the rule). nearest_known: the known class with the nearest mean, and its
    distance in deviations of the columns, root mean square over columns (None without known rows).
    """

    cluster: int
    rows: int
    rule: str
    precision: float | None
    recall: float | None
    fidelity: float | None
    nearest_known: Any = None
    distance: float | None = None

    def __str__(self) -> str:
        text = f"group {self.cluster} (n = {self.rows:,}): {self.rule or 'no short rule'}"
        if self.recall is not None and self.precision is not None:
            text += f" [precision {self.precision:.2f}, recall {self.recall:.2f}]"
        if self.distance is not None:
            text += f"; nearest known class {self.nearest_known!s}, {self.distance:.2f} deviations off"
        return text


def describe_clusters(
    X: Any,
    labels: Any,
    names: Sequence[str] | None = None,
    *,
    known: tuple[Any, Any] | None = None,
    seed: int = 0,
) -> list[ClusterDescription]:
    """Describe each cluster of rows X (n, p) with cluster ``labels`` (n,) by the columns ``names``, for people to name it.

    A decision tree of depth 3, grown on half of the rows, tells each cluster from all others; its rule is the branch that
    holds most of the cluster, and its quality is measured on the other half. known: (rows, labels) of the known classes,
    to say which lies nearest.

    >>> X = np.array([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0], [12.0], [13.0]])
    >>> describe_clusters(X, [0, 0, 0, 0, 1, 1, 1, 1], ["speed"])[1].rule.split(" > ")[0]
    'speed'
    """
    x, columns = check_rows(X)
    clusters = np.asarray(labels)
    if clusters.shape != (len(x),):
        raise DataError(f"need one cluster label a row: {len(x)} rows, labels of shape {clusters.shape}")
    columns = columns if names is None else tuple(map(str, names))
    if len(columns) != x.shape[1]:
        raise DataError(f"{len(columns)} names for {x.shape[1]} columns")
    classes = None if known is None else labelled(*known, novel=False)
    if classes is not None and (not len(classes.classes) or classes.x.shape[1] != x.shape[1]):
        raise DataError(f"known must be labelled rows of {x.shape[1]} columns, got {classes.x.shape}")
    rng = np.random.default_rng(seed)
    return [_describe(x, clusters == c, c, columns, classes, rng) for c in np.unique(clusters).tolist()]


def _describe(
    x: np.ndarray,
    inside: np.ndarray,
    cluster: int,
    names: Sequence[str],
    known: Labelled | None,
    rng: np.random.Generator,
) -> ClusterDescription:
    rule, precision, recall, fidelity = "", None, None, None
    if inside.all():
        rule = "all rows"
    else:
        fitted = np.zeros(len(x), dtype=bool)
        for part in (np.flatnonzero(inside), np.flatnonzero(~inside)):
            fitted[rng.permutation(part)[: (len(part) + 1) // 2]] = True
        tree = DecisionTreeClassifier(max_depth=_DEPTH, class_weight="balanced", random_state=0).fit(
            x[fitted], inside[fitted]
        )
        under, rule = _largest_branch(tree, x, inside & fitted, names)
        held = ~fitted
        if rule and (held & inside).any():
            recall = float((under & inside & held).sum() / (inside & held).sum())
            fidelity = float((tree.predict(x[held]) == inside[held]).mean())
            if (under & held).any():
                precision = float((under & inside & held).sum() / (under & held).sum())
    nearest, distance = None, None
    if known is not None:
        scale = np.concatenate([x, known.x]).std(axis=0)
        moves = scale > 0
        off = (known.means - x[inside].mean(axis=0))[:, moves] / scale[moves]
        far = np.sqrt((off**2).mean(axis=1)) if moves.any() else np.zeros(len(off))
        nearest, distance = known.classes[far.argmin()].item(), float(far.min())
    return ClusterDescription(cluster, int(inside.sum()), rule, precision, recall, fidelity, nearest, distance)


def _largest_branch(
    tree: DecisionTreeClassifier, x: np.ndarray, wanted: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, str]:
    """Rows in the leaf that answers "inside" and holds most of the ``wanted`` rows, and its conditions in words."""
    leaves, grown = tree.apply(x), tree.tree_
    yes = [leaf for leaf in np.unique(leaves[wanted]) if grown.value[leaf, 0].argmax() == 1]
    if not yes:
        return np.zeros(len(x), dtype=bool), ""
    leaf = max(yes, key=lambda one: int((leaves[wanted] == one).sum()))
    low, high = dict[int, float](), dict[int, float]()
    node = 0
    while node != leaf:
        column, cut, left = int(grown.feature[node]), float(grown.threshold[node]), int(grown.children_left[node])
        # children are numbered depth first, so the right child is the first node that is not under the left one
        if leaf < grown.children_right[node]:
            high[column], node = min(cut, high.get(column, np.inf)), left
        else:
            low[column], node = max(cut, low.get(column, -np.inf)), int(grown.children_right[node])
    words = []
    for column in sorted(low.keys() | high.keys()):
        if "=" in names[column] and np.isin(x[:, column], (0, 1)).all():  # whether a row is of a category
            words.append(names[column] if column in low else f"not {names[column]}")
        elif column in low and column in high:
            words.append(f"{low[column]:.4g} < {names[column]} <= {high[column]:.4g}")
        elif column in low:
            words.append(f"{names[column]} > {low[column]:.4g}")
        else:
            words.append(f"{names[column]} <= {high[column]:.4g}")
    return leaves == leaf, " and ".join(words)
