"""Distances between labels that are carried by name: a matrix, a graph, a tree or embeddings."""

__all__ = ["LabelMetric", "MetricCheck", "random_tree_metric"]

import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial.distance import cdist

from theodolite.core.errors import DataError, InputError

Label = Hashable
_LARGEST_BLOCK = 4 << 30


@dataclass(frozen=True)
class MetricCheck:
    """Whether distances are a metric on the triples that were looked at; worst_violation is d(a, c) - d(a, b) - d(b, c)."""

    symmetric: bool
    zero_diagonal: bool
    triangle: bool
    worst_violation: float
    triples: int

    def __bool__(self) -> bool:
        return self.symmetric and self.zero_diagonal and self.triangle


class LabelMetric:
    """Distances between named labels; made by one of the ``from_`` functions.

    Nothing of size labels x labels is stored for graphs and embeddings: `squared` works out the rows that are asked for.
    """

    def __init__(
        self,
        labels: Iterable[Label],
        *,
        matrix: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
        graph: sparse.csr_matrix | None = None,
        nodes: np.ndarray | None = None,
    ) -> None:
        self.labels: tuple[Label, ...] = tuple(plain(label) for label in labels)
        self._position = {label: i for i, label in enumerate(self.labels)}
        if len(self._position) != len(self.labels):
            seen: set[Label] = set()
            double = [label for label in self.labels if label in seen or seen.add(label)]  # type: ignore[func-returns-value]
            raise DataError(f"labels must be different, found twice: {double[:5]}")
        if len(self.labels) < 2:
            raise DataError(f"a metric needs at least two labels, got {list(self.labels)}")
        self._matrix, self._embeddings, self._graph = matrix, embeddings, graph
        self._nodes = nodes  # position of each label among the graph's nodes
        self.is_tree = graph is not None and graph.nnz == 2 * (graph.shape[0] - 1)

    @classmethod
    def from_matrix(cls, distances: Any, labels: Sequence[Label]) -> "LabelMetric":
        """Precomputed distances (N, N), rows and columns in the order of ``labels``; a violated triangle inequality warns."""
        d = np.asarray(distances, dtype=np.float64)
        if d.shape != (len(labels), len(labels)):
            raise DataError(f"{len(labels)} labels need a matrix of that many rows and columns, got {d.shape}")
        if not np.isfinite(d).all() or (d < 0).any():
            raise DataError("distances must be finite and not negative")
        if not np.allclose(d, d.T, rtol=1e-6, atol=1e-9):
            i, j = np.unravel_index(int(np.abs(d - d.T).argmax()), d.shape)
            raise DataError(f"distances are not symmetric: {labels[i]!r} to {labels[j]!r} is {d[i, j]}, back {d[j, i]}")
        made = cls(labels, matrix=d)
        check = made.is_metric()
        if not check:
            warnings.warn(f"the matrix is not a metric: {check}", UserWarning, stacklevel=2)
        return made

    @classmethod
    def from_function(cls, distance: Any, labels: Sequence[Label]) -> "LabelMetric":
        """Distances distance(a, b) between labels, each pair asked once."""
        d = np.zeros((len(labels), len(labels)))
        for i, a in enumerate(labels):
            for j in range(i):
                d[i, j] = d[j, i] = float(distance(a, labels[j]))
        return cls.from_matrix(d, labels)

    @classmethod
    def from_embeddings(cls, embeddings: Any, labels: Sequence[Label]) -> "LabelMetric":
        """Euclidean distances between the rows (N, d) that stand for the labels."""
        e = np.asarray(embeddings, dtype=np.float64)
        if e.ndim != 2 or len(e) != len(labels) or not np.isfinite(e).all():
            raise DataError(f"{len(labels)} labels need finite embeddings of shape ({len(labels)}, d), got {e.shape}")
        return cls(labels, embeddings=e)

    @classmethod
    def from_edges(cls, edges: Iterable[Sequence[Any]], labels: Sequence[Label] | None = None) -> "LabelMetric":
        """Shortest paths along edges (a, b) or (a, b, length). labels: the nodes that are labels, all where None."""
        rows = [tuple(edge) for edge in edges]
        if not rows or any(len(edge) not in (2, 3) for edge in rows):
            raise DataError("edges must be pairs (a, b) or triples (a, b, length), and at least one")
        names = list(dict.fromkeys(plain(node) for edge in rows for node in edge[:2]))
        position = {name: i for i, name in enumerate(names)}
        ends = np.array([[position[plain(edge[0])], position[plain(edge[1])]] for edge in rows])
        lengths = np.array([float(edge[2]) if len(edge) == 3 else 1.0 for edge in rows])
        return cls._from_arrays(names, ends, lengths, labels)

    @classmethod
    def from_graph(
        cls, graph: nx.Graph, labels: Sequence[Label] | None = None, weight: str | None = None
    ) -> "LabelMetric":
        """Shortest paths in a networkx graph; weight: the edge attribute that holds lengths, 1 each where None."""
        edges = ((a, b, 1.0 if weight is None else data[weight]) for a, b, data in graph.edges(data=True))
        return cls.from_edges(edges, list(graph.nodes) if labels is None else labels)

    @classmethod
    def from_hierarchy_file(cls, path: str | Path, labels: Sequence[Label] | None = None) -> "LabelMetric":
        """Shortest paths in a tree that a text file gives as "parent child", one edge a line."""
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return cls.from_edges([line.split() for line in lines if line.strip()], labels)

    @classmethod
    def _from_arrays(
        cls, names: list[Label], ends: np.ndarray, lengths: np.ndarray, labels: Sequence[Label] | None
    ) -> "LabelMetric":
        if not np.isfinite(lengths).all() or (lengths <= 0).any():
            raise DataError("edges must have finite lengths above 0")
        a, b = ends.min(axis=1), ends.max(axis=1)
        keep = a != b
        order = np.lexsort((lengths[keep], b[keep], a[keep]))
        a, b, length = a[keep][order], b[keep][order], lengths[keep][order]
        first = np.ones(len(a), dtype=bool)
        first[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])  # of parallel edges the shortest counts
        a, b, length = a[first], b[first], length[first]
        n = len(names)
        graph = sparse.csr_matrix((np.r_[length, length], (np.r_[a, b], np.r_[b, a])), shape=(n, n))
        position = {name: i for i, name in enumerate(names)}
        chosen = names if labels is None else [plain(label) for label in labels]
        missing = [label for label in chosen if label not in position]
        if missing:
            raise DataError(f"{len(missing)} labels are not nodes of the graph: {missing[:5]}")
        parts, part = csgraph.connected_components(graph, directed=False)
        nodes = np.array([position[label] for label in chosen])
        if len(np.unique(part[nodes])) > 1:
            examples = [names[int(np.flatnonzero(part == p)[0])] for p in np.unique(part[nodes])[:5]]
            raise DataError(
                f"the graph falls into {parts} parts without a path between them, one each holds: {examples}"
            )
        return cls(chosen, graph=graph, nodes=nodes)

    def __len__(self) -> int:
        return len(self.labels)

    def index(self, labels: Iterable[Label]) -> np.ndarray:
        """Positions of labels, in the order given; unknown ones raise DataError naming up to five."""
        names = [plain(label) for label in labels]
        missing = list(dict.fromkeys(name for name in names if name not in self._position))
        if missing:
            raise DataError(f"{len(missing)} labels are not in the metric: {missing[:5]}")
        return np.array([self._position[name] for name in names], dtype=np.int64)

    def distances(
        self, rows: Iterable[Label], columns: Iterable[Label] | None = None
    ) -> Float[np.ndarray, "row column"]:
        """Distances from the labels ``rows`` to the labels ``columns`` (all where None)."""
        r = self.index(rows)
        c = np.arange(len(self)) if columns is None else self.index(columns)
        if len(r) * len(c) * 8 > _LARGEST_BLOCK:
            raise InputError(
                f"{len(r)} x {len(c)} distances take {len(r) * len(c) * 8 / 2**30:.0f} GiB; ask for at most "
                f"{_LARGEST_BLOCK // (8 * len(c))} rows at once, or use a tree, whose distances need no matrix"
            )
        if self._matrix is not None:
            return self._matrix[np.ix_(r, c)]
        if self._embeddings is not None:
            return cdist(self._embeddings[r], self._embeddings[c])
        graph, nodes = self._require_graph()
        unweighted = bool((graph.data == 1).all())
        found = csgraph.dijkstra(graph, directed=False, indices=nodes[r], unweighted=unweighted)
        return found[:, nodes[c]]

    def squared(self, rows: Iterable[Label], columns: Iterable[Label] | None = None) -> Float[np.ndarray, "row column"]:
        """Squared distances from the labels ``rows`` to the labels ``columns`` (all where None)."""
        return self.distances(rows, columns) ** 2

    def _require_graph(self) -> tuple[sparse.csr_matrix, np.ndarray]:
        if self._graph is None or self._nodes is None:
            raise InputError("this metric is not made of a graph; use from_edges, from_graph or from_hierarchy_file")
        return self._graph, self._nodes

    def tree(self) -> tuple[sparse.csr_matrix, np.ndarray]:
        """(adjacency with lengths, node of each label); InputError where the metric is not a tree."""
        graph, nodes = self._require_graph()
        if not self.is_tree:
            raise InputError(f"the graph is not a tree: {graph.shape[0]} nodes and {graph.nnz // 2} edges")
        return graph, nodes

    def restrict(self, labels: Sequence[Label]) -> "LabelMetric":
        """The same distances among fewer labels."""
        kept = self.index(labels)
        names = [self.labels[i] for i in kept]
        if self._matrix is not None:
            return LabelMetric(names, matrix=self._matrix[np.ix_(kept, kept)])
        if self._embeddings is not None:
            return LabelMetric(names, embeddings=self._embeddings[kept])
        graph, nodes = self._require_graph()
        return LabelMetric(names, graph=graph, nodes=nodes[kept])

    def is_metric(self, n_samples: int = 200, *, seed: int = 0) -> MetricCheck:
        """Look at all triples among ``n_samples`` random labels."""
        d = self._sample(n_samples, seed)
        scale = max(float(d.max()), 1e-300)
        worst = max(float((d - d[:, [k]] - d[[k], :]).max()) for k in range(len(d)))
        return MetricCheck(
            symmetric=bool(np.allclose(d, d.T, rtol=1e-6)),
            zero_diagonal=bool((np.diag(d) <= 1e-9 * scale).all()),
            triangle=worst <= 1e-9 * scale,
            worst_violation=worst,
            triples=len(d) ** 3,
        )

    def spread(self, n_samples: int = 500, *, seed: int = 0) -> float:
        """Coefficient of variation of the distances between different labels; near 0 all labels are equally far."""
        d = self._sample(n_samples, seed)
        off = d[~np.eye(len(d), dtype=bool)]
        return float(off.std() / off.mean()) if off.mean() > 0 else 0.0

    def _sample(self, n: int, seed: int) -> np.ndarray:
        if len(self) <= n:
            return self.distances(self.labels)
        chosen = np.random.default_rng(seed).choice(len(self), n, replace=False)
        names = [self.labels[i] for i in chosen]
        return self.distances(names, names)


def random_tree_metric(labels: Sequence[Label], *, seed: int = 0) -> LabelMetric:
    """A random recursive tree on the labels: a metric that knows nothing, to compare with."""
    rng = np.random.default_rng(seed)
    names = [labels[i] for i in rng.permutation(len(labels))]
    edges = [(names[i], names[int(rng.integers(0, i))]) for i in range(1, len(names))]
    return LabelMetric.from_edges(edges, labels)


def plain(label: Any) -> Label:
    """A numpy scalar as the Python value that it stands for, so that names compare equal whatever array they came from."""
    return label.item() if isinstance(label, np.generic) else label
