"""A graph as tensors, and an explanation of it as a set of its edges."""

__all__ = ["Graph", "as_graph", "explained_pairs"]

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from theodolite.core.errors import DataError, InputError


@dataclass(frozen=True, eq=False)
class Graph:
    """Node features (n, d) and edges (2, m), from the first row's node to the second's.

    undirected: every edge stands in ``edge_index`` in both directions, and the two are one edge in all that is counted,
    drawn and dropped. Raises DataError for features that are not finite, nodes that are not there and, in an undirected
    graph, an edge without its other direction.

    >>> Graph.from_networkx(nx.cycle_graph(3)).edge_index.tolist()
    [[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]]
    """

    x: Float[Tensor, "node feature"]
    edge_index: Int[Tensor, "2 edge"]
    undirected: bool = True

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.edge_index.ndim != 2 or self.edge_index.shape[0] != 2:
            raise DataError(
                f"a graph needs x (nodes, features) and edge_index (2, edges), got {tuple(self.x.shape)} and "
                f"{tuple(self.edge_index.shape)}"
            )
        if not bool(torch.isfinite(self.x).all()):
            raise DataError("x holds values that are not finite")
        ends = self.edge_index
        if ends.numel() and (int(ends.min()) < 0 or int(ends.max()) >= len(self.x)):
            raise DataError(f"edge_index names nodes outside 0..{len(self.x) - 1}")
        if self.undirected and ends.numel():
            forward, backward = _keys(ends[0], ends[1], len(self.x)), _keys(ends[1], ends[0], len(self.x))
            single = ~np.isin(forward, backward)
            if single.any():
                u, v = ends[:, int(single.argmax())].tolist()
                raise DataError(
                    f"edge ({u}, {v}) has no edge ({v}, {u}) in an undirected graph; add it, or give undirected=False"
                )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.x)

    @cached_property
    def _paired(self) -> tuple[np.ndarray, np.ndarray]:
        u, v = self.edge_index.cpu().numpy()
        low, high = (np.minimum(u, v), np.maximum(u, v)) if self.undirected else (u, v)
        keys = low.astype(np.int64) * max(1, len(self.x)) + high
        loops = u == v
        found, inverse = np.unique(keys[~loops], return_inverse=True)
        pair = np.full(len(u), -1, dtype=np.int64)
        pair[~loops] = inverse
        return pair, np.stack([found // max(1, len(self.x)), found % max(1, len(self.x))], axis=1)

    @property
    def pair(self) -> Int[np.ndarray, " edge"]:
        """For each column of ``edge_index`` which edge it belongs to, counted once a pair; -1 for a self-loop."""
        return self._paired[0]

    @property
    def ends(self) -> Int[np.ndarray, "pair 2"]:
        """The two nodes of each edge, counted once a pair, without self-loops."""
        return self._paired[1]

    @classmethod
    def from_networkx(cls, graph: nx.Graph, x: Tensor | np.ndarray | str | None = None) -> "Graph":
        """A networkx graph, its nodes in its own order; weights of edges are passed over.

        x: features (n, d), the name of a node attribute that holds them, or None for a single feature that is always 1.
        """
        place = {node: i for i, node in enumerate(graph.nodes)}
        rows = [(place[u], place[v]) for u, v in graph.edges()]
        directed = graph.is_directed()
        if not directed:
            rows += [(v, u) for u, v in rows if u != v]
        edge_index = torch.tensor(sorted(rows), dtype=torch.long).reshape(-1, 2).T.contiguous()
        if isinstance(x, str):
            x = np.array([np.ravel(graph.nodes[node][x]) for node in graph.nodes], dtype=np.float32)
        features = torch.ones(len(place), 1) if x is None else torch.as_tensor(x)
        return cls(_floating(features), edge_index, not directed)

    @classmethod
    def from_pyg(cls, data: Any) -> "Graph":
        """A torch_geometric ``Data`` (or ``Explanation``): its x and edge_index; undirected where every edge has both ways.

        Raises DataError for weighted edges, whose weights could not be told from those that drop edges. Features of edges
        (edge_attr) are not passed on; give a model that has them at hand.
        """
        x, edge_index = getattr(data, "x", None), getattr(data, "edge_index", None)
        if x is None or edge_index is None:
            raise DataError(
                f"{type(data).__name__} needs x and edge_index; give nodes without features a column of ones"
            )
        weight = getattr(data, "edge_weight", None)
        if weight is not None and not bool((torch.as_tensor(weight) == 1).all()):
            raise DataError("the edges have weights; only graphs whose edges all weigh 1 are supported")
        forward, backward = _keys(edge_index[0], edge_index[1], len(x)), _keys(edge_index[1], edge_index[0], len(x))
        return cls(_floating(x), edge_index, bool(np.isin(forward, backward).all()))

    @classmethod
    def from_dense(cls, adjacency: Tensor | np.ndarray, x: Tensor | np.ndarray | None = None) -> "Graph":
        """An adjacency matrix (n, n) of 0 and 1, an edge from j to i where A[i, j] = 1; undirected where it is symmetric."""
        a = torch.as_tensor(adjacency)
        if a.ndim != 2 or a.shape[0] != a.shape[1]:
            raise DataError(f"an adjacency matrix is square, got shape {tuple(a.shape)}")
        if not bool(((a == 0) | (a == 1)).all()):
            raise DataError("an adjacency matrix must hold only 0 and 1; weights of edges are not supported")
        edge_index = a.nonzero().T.flip(0).contiguous()
        features = torch.ones(len(a), 1, device=a.device) if x is None else torch.as_tensor(x)
        return cls(_floating(features), edge_index, bool((a == a.T).all()))


def _floating(x: Tensor) -> Tensor:
    x = x[:, None] if x.ndim == 1 else x
    return x if x.is_floating_point() else x.float()


def _keys(u: Tensor, v: Tensor, n: int) -> np.ndarray:
    return u.cpu().numpy().astype(np.int64) * max(1, n) + v.cpu().numpy()


def as_graph(graph: Any) -> Graph:
    """``graph`` itself, or one made of a torch_geometric ``Data``."""
    return graph if isinstance(graph, Graph) else Graph.from_pyg(graph)


def explained_pairs(
    graph: Graph, explanation: Any, *, threshold: float | None = None, top_k: int | None = None
) -> Bool[np.ndarray, " pair"]:
    """The explanation as one truth value for each edge of the graph, counted once a pair.

    explanation: a mask (m,), one value for each column of ``edge_index``; a list of edges (u, v); or an object with an
    ``edge_mask`` such as torch_geometric's ``Explanation``. A soft mask needs ``threshold`` (edges above it) or ``top_k``
    (so many edges, undirected ones counted once); its two directions are averaged first. A hard mask must agree on them.
    What it says about self-loops, which are never dropped, is passed over.
    """
    if threshold is not None and top_k is not None:
        raise InputError("give threshold or top_k, not both")
    mask = explanation.edge_mask if hasattr(explanation, "edge_mask") else explanation
    if mask is None:
        raise InputError("the explanation has no edge_mask; explanations by nodes or features alone are not supported")
    if _lists_edges(mask):
        if threshold is not None or top_k is not None:
            raise InputError("a list of edges is an explanation as it is; threshold and top_k are for soft masks")
        return _by_name(graph, mask)
    values = torch.as_tensor(mask).detach().cpu().double().numpy()
    edges, pairs = graph.edge_index.shape[1], len(graph.ends)
    if values.shape != (edges,):
        more = " (it has one value for each undirected edge)" if values.shape == (pairs,) else ""
        raise InputError(
            f"the explanation must have one value for each of the {edges} columns of edge_index, got shape {values.shape}{more}"
        )
    if not np.isfinite(values).all():
        raise InputError("the explanation holds values that are not finite")
    inner = graph.pair >= 0
    pair, values = graph.pair[inner], values[inner]
    mean = np.bincount(pair, values, minlength=pairs) / np.bincount(pair, minlength=pairs)
    if threshold is not None:
        return mean > threshold
    if top_k is not None:
        if not 0 <= top_k <= pairs:
            raise InputError(f"top_k must be 0..{pairs}, the number of edges, got {top_k}")
        chosen = np.zeros(pairs, dtype=bool)
        chosen[np.argsort(-mean, kind="stable")[:top_k]] = True
        return chosen
    if not np.isin(values, (0.0, 1.0)).all():
        raise InputError("the explanation is a soft mask; give threshold or top_k to say which edges belong to it")
    uneven = (mean > 0) & (mean < 1)
    if uneven.any():
        u, v = graph.ends[int(uneven.argmax())].tolist()
        raise InputError(
            f"the explanation holds edge ({u}, {v}) in one direction only, and the graph is undirected; mark both, or give "
            "the soft mask with threshold or top_k"
        )
    return mean > 0


def _lists_edges(mask: Any) -> bool:
    if isinstance(mask, (list, tuple, set, frozenset)):
        return all(np.ndim(item) == 1 and np.size(item) == 2 for item in mask)
    return getattr(mask, "ndim", 0) == 2 and mask.shape[1] == 2


def _by_name(graph: Graph, edges: Iterable[Any]) -> Bool[np.ndarray, " pair"]:
    place = {(int(u), int(v)): i for i, (u, v) in enumerate(graph.ends)}
    if graph.undirected:
        place |= {(v, u): i for (u, v), i in place.items()}
    chosen = np.zeros(len(graph.ends), dtype=bool)
    for u, v in edges:
        named = (int(u), int(v))
        if named not in place:
            raise InputError(f"the explanation names edge {named}, which is not in the graph")
        chosen[place[named]] = True
    return chosen
