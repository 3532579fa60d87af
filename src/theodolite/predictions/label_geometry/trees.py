"""Trees of labels: which labels can ever be answered, and what to observe next, in linear time."""

__all__ = ["locus_curve", "minimum_locus_cover", "tree_locus"]

from collections.abc import Iterable, Sequence
from typing import Any

import networkx as nx
import numpy as np
from jaxtyping import Bool, Int

from theodolite.core.errors import DataError, InputError
from theodolite.predictions.label_geometry.metric import Label, LabelGraph, LabelMetric
from theodolite.predictions.label_geometry.rooted import RootedTree


def as_metric(metric: Any) -> LabelMetric:
    """A metric, from itself or from a networkx graph; InputError for anything else."""
    if not isinstance(metric, LabelMetric | nx.Graph):
        raise InputError(
            f"expected a LabelMetric or a networkx graph, got a {type(metric).__name__}; of an edge list make one by "
            "LabelMetric.from_edges(edges)"
        )
    return metric if isinstance(metric, LabelMetric) else LabelMetric.from_graph(metric)


def as_tree(tree: LabelMetric | nx.Graph) -> LabelMetric:
    """A metric that is a tree, from itself or from a networkx tree; InputError for a graph that is none."""
    metric = as_metric(tree)
    metric.tree()
    return metric


def _places(metric: LabelMetric, observed: Iterable[Label], rooted: RootedTree) -> Int[np.ndarray, " observed"]:
    chosen = metric.index(observed)
    if not len(chosen):
        raise DataError("no label is observed; give at least one")
    return rooted.place[metric.tree().nodes[chosen]]


def _steiner(metric: LabelMetric, observed: Iterable[Label], rooted: RootedTree) -> Bool[np.ndarray, " node"]:
    """Places on paths between observed labels; where one of them is no label, the locus is not known by paths alone."""
    graph = metric.tree()
    inside = rooted.steiner(_places(metric, observed, rooted))
    if not graph.all_labelled:
        labelled = np.zeros(rooted.size, dtype=bool)
        labelled[rooted.place[graph.nodes]] = True
        between = np.flatnonzero(inside & ~labelled)
        if len(between):
            names = [graph.names[rooted.order[place]] for place in between[:5]]
            raise InputError(
                f"{len(between)} nodes between observed labels are not labels themselves ({names}), so labels beside the "
                "paths can be predicted too; use locus(metric, observed), which is exact"
            )
    return inside


def tree_locus(tree: LabelMetric | nx.Graph, observed: Iterable[Label]) -> frozenset[Label]:
    """All labels that can ever be predicted on a tree: those on paths between observed ones. Each is identified.

    >>> sorted(tree_locus(nx.path_graph(5), [1, 3]))
    [1, 2, 3]
    """
    metric = as_tree(tree)
    graph = metric.tree()
    rooted = graph.rooted
    inside = _steiner(metric, observed, rooted)[rooted.place[graph.nodes]]
    return frozenset(metric.names(np.flatnonzero(inside)))


def minimum_locus_cover(tree: LabelMetric | nx.Graph) -> list[Label]:
    """The smallest set of labels from which every label of a tree can be predicted: its leaves.

    >>> minimum_locus_cover(nx.path_graph(5))
    [0, 4]
    """
    metric = as_tree(tree)
    graph = metric.tree()
    if not graph.all_labelled:
        raise InputError(
            f"only {len(graph.nodes)} of the tree's {len(graph.names)} nodes are labels, and the leaves are the smallest "
            "cover where all are; check a set with is_locus_cover(metric, observed)"
        )
    degree = np.diff(graph.adjacency.indptr)[graph.nodes]
    return metric.names(np.flatnonzero(degree <= 1))


def locus_curve(tree: LabelMetric | nx.Graph, order: Sequence[Label]) -> Int[np.ndarray, " observed"]:
    """Size of the tree's locus after each label of ``order`` was observed, (len(order),).

    >>> locus_curve(nx.path_graph(5), [1, 3, 0]).tolist()
    [1, 3, 4]
    """
    metric = as_tree(tree)
    graph = metric.tree()
    first = metric.index(order[:1])
    if not len(first):
        raise DataError("no label is observed; give at least one")
    rooted = RootedTree(graph.adjacency, int(graph.nodes[first[0]]))
    _steiner(metric, order, rooted)
    inside = np.zeros(rooted.size, dtype=bool)
    inside[0] = True
    size, sizes = 1, []
    for place in _places(metric, order, rooted).tolist():
        while not inside[place]:  # each node is walked over once in all
            inside[place] = True
            size += 1
            place = int(rooted.parent[place])
        sizes.append(size)
    return np.array(sizes)


def farthest(tree: LabelMetric, observed: Sequence[Label], n: int) -> list[Label]:
    """The n labels whose addition, one after another, enlarges the locus of a tree most; every node must be a label.

    Going for the farthest node each time takes the chains of a longest-path decomposition in the order of their lengths.
    """
    graph = tree.tree()
    label = np.empty(len(graph.names), dtype=np.int64)
    label[graph.nodes] = np.arange(len(graph.nodes))

    def ends(nodes: np.ndarray) -> list[Label]:
        rooted = RootedTree(graph.adjacency, int(nodes[0]))
        found, _ = rooted.chains(rooted.steiner(rooted.place[nodes]), label[rooted.order])
        return tree.names(label[rooted.order[found[:n]]])

    start = graph.nodes[tree.index(observed)]
    if len(start):
        return ends(start)
    first = ends(np.zeros(1, dtype=np.int64))[0]  # farthest from any node: an end of a longest path
    return [first, *ends(graph.nodes[tree.index([first])])][:n]


def candidates(
    graph: LabelGraph, columns: Int[np.ndarray, " observed"]
) -> tuple[Int[np.ndarray, " candidate"], Bool[np.ndarray, " candidate"]]:
    """The only labels of a tree that a mean of the labels at ``columns`` can be, in rising order, and which have a twin.

    A label off the paths between observed ones lies beyond the node where its own path meets them (its gate), and the
    scores grow with the distance to the gate; so of the labels at one gate only the nearest counts. A twin is another
    one as near, which therefore always ties.
    """
    rooted = graph.rooted
    place = rooted.place[graph.nodes]
    gate, beyond = rooted.gates(rooted.steiner(place[columns]))
    gate, beyond = gate[place], beyond[place]
    least = np.full(rooted.size, np.inf)
    np.minimum.at(least, gate, beyond)
    near = np.flatnonzero(beyond <= least[gate] * (1 + 1e-12))
    _, first, count = np.unique(gate[near], return_index=True, return_counts=True)
    order = np.argsort(near[first])
    return near[first][order], count[order] > 1
