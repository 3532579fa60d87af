"""Trees of labels: sums of squared distances to all nodes in linear time, and which labels can ever be answered."""

__all__ = ["TreeSums", "locus_curve", "minimum_locus_cover", "tree_locus"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from jaxtyping import Float
from scipy.sparse import csgraph

from theodolite.core.errors import DataError
from theodolite.predictions.label_geometry.metric import Label, LabelMetric


def as_tree(tree: LabelMetric | nx.Graph) -> LabelMetric:
    """A metric that is a tree, from itself or from a networkx tree."""
    metric = tree if isinstance(tree, LabelMetric) else LabelMetric.from_graph(tree)
    metric.tree()
    return metric


@dataclass(frozen=True, eq=False)
class _Level:
    """Nodes of one depth in the order of their parents; starts marks where each parent's children begin."""

    nodes: np.ndarray
    parents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class TreeSums:
    """F(y) = sum_i w_i d(y, l_i)^2 for every node y of a tree in O(nodes) a sample, by rerooting.

    Going up, each node sums w, w d and w d^2 of its subtree; going down, each child takes its parent's sums over all
    nodes and moves them along the edge. Nodes of one depth are handled at once, for all samples at once.
    """

    def __init__(self, metric: LabelMetric) -> None:
        graph, self._label_nodes = metric.tree()
        self.size = graph.shape[0]
        order, parent = csgraph.breadth_first_order(graph, 0, directed=False)
        depth = np.zeros(self.size, dtype=np.int64)
        for start, stop in _levels(order, parent):
            depth[order[start:stop]] = depth[parent[order[start]]] + 1
        length = np.zeros(self.size)
        rest = order[1:]
        length[rest] = np.asarray(graph[rest, parent[rest]]).ravel()
        self.root = int(order[0])
        self._levels: list[_Level] = []
        for d in range(1, int(depth.max()) + 1):
            nodes = order[np.searchsorted(depth[order], d) : np.searchsorted(depth[order], d, side="right")]
            nodes = nodes[np.argsort(parent[nodes], kind="stable")]
            parents, starts = np.unique(parent[nodes], return_index=True)
            self._levels.append(_Level(nodes, parents, starts, length[nodes][:, None]))
        self._parent = parent

    def __call__(
        self, weights: Float[np.ndarray, "sample observed"], observed: np.ndarray
    ) -> Float[np.ndarray, "label sample"]:
        """F at every label, for weights on the labels at the positions ``observed``."""
        samples = len(weights)
        w = np.zeros((self.size, samples))
        np.add.at(w, self._label_nodes[observed], weights.T)
        wd, wd2 = np.zeros_like(w), np.zeros_like(w)
        for level in reversed(self._levels):
            lengths, nodes = level.lengths, level.nodes
            a, b = w[nodes], wd[nodes]
            moved = lengths * a
            w[level.parents] += np.add.reduceat(a, level.starts)
            wd[level.parents] += np.add.reduceat(b + moved, level.starts)
            wd2[level.parents] += np.add.reduceat(wd2[nodes] + lengths * (2 * b + moved), level.starts)
        total = w[self.root].copy()
        for level in self._levels:
            lengths, nodes = level.lengths, level.nodes
            up = self._parent[nodes]
            a, b, c = w[nodes], wd[nodes], wd2[nodes]
            moved = lengths * a
            rest = total - a
            rest_d = wd[up] - (b + moved)
            rest_d2 = wd2[up] - (c + lengths * (2 * b + moved))
            wd[nodes] = b + rest_d + lengths * rest
            wd2[nodes] = c + rest_d2 + lengths * (2 * rest_d + lengths * rest)
        return wd2[self._label_nodes]


def _levels(order: np.ndarray, parent: np.ndarray) -> Iterable[tuple[int, int]]:
    """Runs of a breadth-first order that have one depth."""
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    parents = position[parent[order[1:]]]
    start, n = 1, len(order)
    boundary = 0  # last position of the level above
    while start < n:
        stop = start + int(np.searchsorted(parents[start - 1 :], boundary, side="right"))
        yield start, stop
        boundary, start = stop - 1, stop


def _steiner(metric: LabelMetric, observed: np.ndarray) -> np.ndarray:
    """Mask over nodes: those on a path between two observed ones."""
    graph, nodes = metric.tree()
    keep = np.zeros(graph.shape[0], dtype=bool)
    keep[nodes[observed]] = True
    order, parent = csgraph.breadth_first_order(graph, int(nodes[observed[0]]), directed=False)
    for node in order[
        :0:-1
    ]:  # rooted at an observed node, a node lies on a path where its subtree holds an observed one
        if keep[node]:
            keep[parent[node]] = True
    return keep


def tree_locus(tree: LabelMetric | nx.Graph, observed: Iterable[Label]) -> frozenset[Label]:
    """All labels that can ever be predicted on a tree: those on paths between observed ones.

    >>> sorted(tree_locus(nx.path_graph(5), [1, 3]))
    [1, 2, 3]
    """
    metric = as_tree(tree)
    chosen = metric.index(observed)
    if not len(chosen):
        raise DataError("no label is observed")
    _, nodes = metric.tree()
    inside = _steiner(metric, chosen)[nodes]
    return frozenset(label for label, is_in in zip(metric.labels, inside, strict=True) if is_in)


def minimum_locus_cover(tree: LabelMetric | nx.Graph) -> list[Label]:
    """The smallest set of labels from which every label of a tree can be predicted: its leaves."""
    metric = as_tree(tree)
    graph, nodes = metric.tree()
    degree = np.diff(graph.indptr)
    labelled = np.zeros(graph.shape[0], dtype=bool)
    labelled[nodes] = True
    if not labelled[degree <= 1].all():
        raise DataError("some leaves of the tree are not labels, so no labels cover it")
    return [label for label, node in zip(metric.labels, nodes, strict=True) if degree[node] <= 1]


def locus_curve(tree: LabelMetric | nx.Graph, order: Sequence[Label]) -> np.ndarray:
    """Size of the tree's locus after each label of ``order`` was observed, (len(order),)."""
    metric = as_tree(tree)
    graph, nodes = metric.tree()
    chosen = nodes[metric.index(order)]
    labelled = np.zeros(graph.shape[0], dtype=bool)
    labelled[nodes] = True
    _, parent = csgraph.breadth_first_order(graph, int(chosen[0]), directed=False)
    inside = np.zeros(graph.shape[0], dtype=bool)
    inside[chosen[0]] = True
    size, sizes = int(labelled[chosen[0]]), []
    for node in chosen:
        step = int(node)
        while not inside[step]:  # each node is walked over once in all
            inside[step] = True
            size += int(labelled[step])
            step = int(parent[step])
        sizes.append(size)
    return np.array(sizes)


def farthest(tree: LabelMetric, observed: list[Label], n: int) -> list[Label]:
    """The n labels whose addition, one after another, enlarges the locus of a tree most."""
    graph, nodes = tree.tree()
    hops = graph.copy()
    hops.data[:] = 1.0  # the locus counts nodes, not lengths
    added: list[Label] = []
    inside = np.zeros(graph.shape[0], dtype=bool)
    if observed:
        inside = _steiner(tree, tree.index(observed))
    while len(added) < n:
        if not inside.any():
            # one end of a longest path: the node farthest from any node
            start = csgraph.dijkstra(hops, directed=False, indices=int(nodes[0]), unweighted=True)[nodes]
            best = int(start.argmax())
        else:
            sources = np.flatnonzero(inside)
            distance = csgraph.dijkstra(hops, directed=False, indices=sources, unweighted=True, min_only=True)[nodes]
            best = int(distance.argmax())
            if distance[best] == 0:
                break
        added.append(tree.labels[best])
        inside = _steiner(tree, tree.index([*observed, *added]))
    return added
