"""Distances between labels that are carried by name: a matrix, a graph, a tree or embeddings."""

__all__ = ["LabelMetric", "MetricCheck", "random_tree_metric"]

import warnings
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial.distance import cdist

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks
from theodolite.predictions.label_geometry.rooted import RootedTree

Label = Hashable
_LARGEST_BLOCK = 4 << 30
_STEP_BYTES = 1 << 28
_LARGEST = 1e150
"""Above it squares leave the range of a float64."""


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


@dataclass(frozen=True, eq=False)
class LabelGraph:
    """A connected graph: edge lengths, the names of its nodes and the node of each label."""

    adjacency: sparse.csr_matrix
    names: tuple[Label, ...]
    nodes: Int[np.ndarray, " label"]

    @property
    def is_tree(self) -> bool:
        """Connected, with one edge fewer than nodes."""
        return self.adjacency.nnz == 2 * (len(self.names) - 1)

    @property
    def all_labelled(self) -> bool:
        """Whether every node is a label."""
        return len(self.nodes) == len(self.names)

    @cached_property
    def rooted(self) -> RootedTree:
        """The tree laid out from its first node."""
        return RootedTree(self.adjacency)

    def distances(self, rows: Int[np.ndarray, " row"], columns: Int[np.ndarray, " column"]) -> np.ndarray:
        """Shortest paths from the nodes ``rows`` to the nodes ``columns``."""
        out = np.empty((len(rows), len(columns)))
        unweighted = bool((self.adjacency.data == 1).all())
        for part in chunks(len(rows), 24.0 * len(self.names), _STEP_BYTES):
            if self.is_tree:
                tree = self.rooted
                out[part] = tree.distances(tree.place[rows[part]])[tree.place[columns]].T
            else:
                found = csgraph.dijkstra(self.adjacency, directed=False, indices=rows[part], unweighted=unweighted)
                out[part] = found[:, columns]
        return out


class LabelMetric:
    """Distances between named labels; made by one of the ``from_`` functions.

    Nothing of size labels x labels is stored for graphs and embeddings: `squared` works out the rows that are asked for.
    A matrix is kept as it was given, without a copy where it is of float64.

    >>> LabelMetric.from_edges([("animal", "dog"), ("animal", "cat")]).squared(["dog"], ["cat", "animal"]).tolist()
    [[4.0, 1.0]]
    """

    def __init__(
        self,
        labels: Iterable[Label],
        *,
        matrix: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
        graph: LabelGraph | None = None,
    ) -> None:
        self.labels: tuple[Label, ...] = names_of(labels)
        self._position = {label: i for i, label in enumerate(self.labels)}
        if len(self.labels) < 2:
            raise DataError(f"a metric needs at least two labels, got {list(self.labels)}")
        self._matrix, self._embeddings, self._graph = matrix, embeddings, graph
        self.is_graph = graph is not None
        self.is_tree = graph is not None and graph.is_tree

    @classmethod
    def from_matrix(cls, distances: Any, labels: Iterable[Label]) -> "LabelMetric":
        """Precomputed distances (N, N), rows and columns in the order of ``labels``; one that is no metric warns.

        A data frame whose rows and columns bear the labels' names is put in their order. DataError for entries that are
        negative, not finite or not symmetric.
        """
        names = names_of(labels)
        for axis in (0, 1):
            distances = in_order(distances, names, axis=axis)
        d = np.asarray(distances, dtype=np.float64)
        if d.shape != (len(names), len(names)):
            raise DataError(f"{len(names)} labels need a matrix of that many rows and columns, got {d.shape}")
        for part in chunks(len(d), 64.0 * len(d), _STEP_BYTES):
            rows, back = d[part], d[:, part].T
            if not ((rows >= 0) & (rows <= _LARGEST)).all():
                i, j = np.argwhere(~((rows >= 0) & (rows <= _LARGEST)))[0]
                what = f"{names[part.start + int(i)]!r} to {names[int(j)]!r} is {rows[i, j]}"
                raise DataError(f"distances must be finite (at most {_LARGEST:g}) and not negative; {what}")
            if not np.allclose(rows, back, rtol=1e-6, atol=1e-9 * float(rows.max(initial=0.0))):
                i, j = np.unravel_index(int(np.abs(rows - back).argmax()), rows.shape)
                there = f"{names[part.start + int(i)]!r} to {names[int(j)]!r} is {rows[i, j]}, back {back[i, j]}"
                raise DataError(f"distances are not symmetric: {there}; give (D + D.T) / 2 if that is meant")
        made = cls(names, matrix=d)
        check = made.is_metric()
        if not check:
            warnings.warn(f"the matrix is not a metric: {check}", UserWarning, stacklevel=2)
        return made

    @classmethod
    def from_function(cls, distance: Callable[[Any, Any], Any], labels: Iterable[Label]) -> "LabelMetric":
        """Distances distance(a, b) between labels, each pair asked once."""
        names = names_of(labels)
        d = np.zeros((len(names), len(names)))
        for i, a in enumerate(names):
            for j in range(i):
                d[i, j] = d[j, i] = float(distance(a, names[j]))
        return cls.from_matrix(d, names)

    @classmethod
    def from_embeddings(cls, embeddings: Any, labels: Iterable[Label]) -> "LabelMetric":
        """Euclidean distances between the rows (N, d) that stand for the labels.

        In many dimensions rows tend to be equally far from each other, which leaves nothing to gain: look at `spread`.
        """
        names = names_of(labels)
        e = np.asarray(in_order(embeddings, names, axis=0), dtype=np.float64)
        if e.ndim != 2 or len(e) != len(names) or not np.isfinite(e).all():
            raise DataError(f"{len(names)} labels need finite embeddings of shape ({len(names)}, d), got {e.shape}")
        if len(e) and np.abs(e).max() > _LARGEST:
            raise DataError(
                f"embeddings up to {np.abs(e).max():.3g} have no squared distances in float64; rescale them"
            )
        return cls(names, embeddings=e)

    @classmethod
    def from_edges(cls, edges: Iterable[Any], labels: Iterable[Label] | None = None) -> "LabelMetric":
        """Shortest paths along edges (a, b) or (a, b, length). labels: the nodes that are labels, all where None."""
        rows = [tuple(edge) for edge in edges]
        if not rows or any(len(edge) not in (2, 3) for edge in rows):
            raise DataError("edges must be pairs (a, b) or triples (a, b, length), and at least one")
        nodes = list(dict.fromkeys(plain(node) for edge in rows for node in edge[:2]))
        position = {name: i for i, name in enumerate(nodes)}
        ends = np.array([[position[plain(edge[0])], position[plain(edge[1])]] for edge in rows])
        try:
            lengths = np.array([float(edge[2]) if len(edge) == 3 else 1.0 for edge in rows])
        except (TypeError, ValueError) as error:
            raise DataError(f"the third part of an edge is its length, a number: {error}") from error
        return cls._from_arrays(nodes, ends, lengths, labels)

    @classmethod
    def from_graph(
        cls, graph: nx.Graph, labels: Iterable[Label] | None = None, weight: str | None = None
    ) -> "LabelMetric":
        """Shortest paths in a networkx graph, directions left aside; weight: the edge attribute that holds lengths."""
        edges = []
        for a, b, data in graph.edges(data=True):
            if weight is not None and weight not in data:
                raise DataError(f"the edge {a!r}, {b!r} has no {weight!r}; it has {sorted(map(str, data))}")
            edges.append((a, b, 1.0 if weight is None else data[weight]))
        names = list(graph.nodes) if labels is None else list(labels)
        alone = {node for node in graph.nodes if graph.degree(node) == 0} & set(names)
        if alone:
            some = sorted(map(repr, alone))[:5]
            raise DataError(f"the graph falls into parts without a path between them; nodes without edges: {some}")
        return cls.from_edges(edges, names)

    @classmethod
    def from_hierarchy_file(cls, path: str | Path, labels: Iterable[Label] | None = None) -> "LabelMetric":
        """Shortest paths in a tree or graph that a text file gives as "parent child" or "parent child length" a line.

        Parts of a line are set apart by tabs where it has any, else by blanks.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the hierarchy {path}: {error}") from error
        edges = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                parts = [part.strip() for part in line.strip().split("\t" if "\t" in line.strip() else None)]
                if len(parts) not in (2, 3):
                    raise DataError(
                        f"{path}, line {number}: expected 'parent child' or with a length, got {line[:80]!r}"
                    )
                edges.append(parts)
        return cls.from_edges(edges, labels)

    @classmethod
    def _from_arrays(
        cls, names: list[Label], ends: np.ndarray, lengths: np.ndarray, labels: Iterable[Label] | None
    ) -> "LabelMetric":
        if not np.isfinite(lengths).all() or (lengths <= 0).any():
            raise DataError("edges must have finite lengths above 0; a similarity is not a length")
        a, b = ends.min(axis=1), ends.max(axis=1)
        keep = a != b
        order = np.lexsort((lengths[keep], b[keep], a[keep]))
        a, b, length = a[keep][order], b[keep][order], lengths[keep][order]
        first = np.ones(len(a), dtype=bool)
        first[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])  # of parallel edges the shortest counts
        a, b, length = a[first], b[first], length[first]
        n = len(names)
        adjacency = sparse.csr_matrix((np.r_[length, length], (np.r_[a, b], np.r_[b, a])), shape=(n, n))
        position = {name: i for i, name in enumerate(names)}
        chosen = names_of(names if labels is None else labels)
        missing = [label for label in chosen if label not in position]
        if missing:
            raise DataError(
                f"{len(missing)} labels are not nodes of the graph: {missing[:5]}{_hint(missing, position)}"
            )
        nodes = np.array([position[label] for label in chosen], dtype=np.int64)
        parts, part = csgraph.connected_components(adjacency, directed=False)
        used = np.unique(part[nodes])
        if len(used) > 1:
            examples = [names[int(np.flatnonzero(part == p)[0])] for p in used[:5]]
            raise DataError(
                f"the graph falls into {parts} parts without a path between them, so some distances are infinite; "
                f"{len(used)} of them hold labels, one node of each: {examples}"
            )
        if parts > 1:
            inside = part == used[0]
            adjacency = sparse.csr_matrix(adjacency[inside][:, inside])
            nodes = (np.cumsum(inside) - 1)[nodes]
            names = [name for name, is_in in zip(names, inside, strict=True) if is_in]
        return cls(chosen, graph=LabelGraph(adjacency, tuple(names), nodes))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        kind = "a matrix" if self._matrix is not None else "embeddings" if self._embeddings is not None else "a graph"
        return f"<LabelMetric of {len(self)} labels, from {'a tree' if self.is_tree else kind}>"

    def index(self, labels: Iterable[Label]) -> Int[np.ndarray, " label"]:
        """Positions of labels, in the order given; unknown ones raise DataError naming up to five."""
        names = [plain(label) for label in labels]
        missing = list(dict.fromkeys(name for name in names if name not in self._position))
        if missing:
            raise DataError(
                f"{len(missing)} labels are not in the metric: {missing[:5]}{_hint(missing, self._position)}"
            )
        return np.array([self._position[name] for name in names], dtype=np.int64)

    def names(self, positions: Int[np.ndarray, " label"]) -> list[Label]:
        """Labels at positions."""
        return [self.labels[i] for i in positions.tolist()]

    def distances(
        self, rows: Iterable[Label], columns: Iterable[Label] | None = None
    ) -> Float[np.ndarray, "row column"]:
        """Distances from the labels ``rows`` to the labels ``columns`` (all where None)."""
        r = self.index(rows)
        return self.between(r, np.arange(len(self)) if columns is None else self.index(columns))

    def squared(self, rows: Iterable[Label], columns: Iterable[Label] | None = None) -> Float[np.ndarray, "row column"]:
        """Squared distances from the labels ``rows`` to the labels ``columns`` (all where None)."""
        found = self.distances(rows, columns)
        return np.square(found, out=found)

    def between(self, r: Int[np.ndarray, " row"], c: Int[np.ndarray, " column"]) -> Float[np.ndarray, "row column"]:
        """Distances between labels at positions; a block of more than 4 GiB raises InputError that says what would fit."""
        if len(r) * len(c) * 8 > _LARGEST_BLOCK:
            raise InputError(
                f"{len(r)} x {len(c)} distances take {len(r) * len(c) * 8 / 2**30:.1f} GiB; ask for chunks of at most "
                f"{_LARGEST_BLOCK // (8 * len(c))} rows at once, observe fewer labels, or use a tree, whose distances need "
                "no matrix"
            )
        if self._matrix is not None:
            return self._matrix[np.ix_(r, c)]
        if self._embeddings is not None:
            return cdist(self._embeddings[r], self._embeddings[c])
        graph = self.graph()
        if len(c) < len(r):
            return graph.distances(graph.nodes[c], graph.nodes[r]).T
        return graph.distances(graph.nodes[r], graph.nodes[c])

    def squared_pairs(self, a: Int[np.ndarray, " pair"], b: Int[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
        """Squared distances d(a_i, b_i)^2 between labels at positions, worked out once for each different label."""
        (left, i), (right, j) = np.unique(a, return_inverse=True), np.unique(b, return_inverse=True)
        out = np.empty(len(a))
        order = np.argsort(i, kind="stable")
        bounds = np.searchsorted(i[order], np.arange(len(left) + 1))
        for part in chunks(len(left), 8.0 * len(right), _STEP_BYTES):
            rows = order[bounds[part.start] : bounds[part.stop]]
            out[rows] = self.between(left[part], right)[i[rows] - part.start, j[rows]] ** 2
        return out

    def graph(self) -> LabelGraph:
        """The graph whose shortest paths these are; InputError where the metric is not made of one."""
        if self._graph is None:
            raise InputError("this metric is not made of a graph; use from_edges, from_graph or from_hierarchy_file")
        return self._graph

    def tree(self) -> LabelGraph:
        """The tree whose paths these are; InputError where it is no tree."""
        graph = self.graph()
        if not graph.is_tree:
            raise InputError(f"the graph is not a tree: {len(graph.names)} nodes and {graph.adjacency.nnz // 2} edges")
        return graph

    def restrict(self, labels: Iterable[Label]) -> "LabelMetric":
        """The same distances among fewer labels, in the order given."""
        kept = self.index(labels)
        names = self.names(kept)
        if self._matrix is not None:
            return LabelMetric(names, matrix=self._matrix[np.ix_(kept, kept)])
        if self._embeddings is not None:
            return LabelMetric(names, embeddings=self._embeddings[kept])
        graph = self.graph()
        return LabelMetric(names, graph=LabelGraph(graph.adjacency, graph.names, graph.nodes[kept]))

    def is_metric(self, n_samples: int = 200, *, seed: int = 0) -> MetricCheck:
        """Look at all triples among ``n_samples`` random labels."""
        d = self._sample(n_samples, seed)
        scale = float(d.max())
        worst = max(float((d - d[:, [k]] - d[[k], :]).max()) for k in range(len(d)))
        return MetricCheck(
            symmetric=bool(np.allclose(d, d.T, rtol=1e-6, atol=1e-9 * scale)),
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
        if n < 2:
            raise InputError(f"n_samples must be at least 2, got {n}")
        chosen = np.arange(len(self))
        if len(self) > n:
            chosen = np.random.default_rng(seed).choice(len(self), n, replace=False)
        return self.between(chosen, chosen)


def random_tree_metric(labels: Iterable[Label], *, seed: int = 0) -> LabelMetric:
    """A random recursive tree on the labels: a metric that knows nothing, to compare with."""
    names = names_of(labels)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(names))
    edges = [(names[order[i]], names[order[int(rng.integers(0, i))]]) for i in range(1, len(names))]
    return LabelMetric.from_edges(edges, names)


def plain(label: Any) -> Label:
    """A numpy scalar as the Python value that it stands for, so that names compare equal whatever array they came from."""
    return label.item() if isinstance(label, np.generic) else label


def in_order(values: Any, names: Iterable[Label], *, axis: int) -> Any:
    """A data frame with its rows (axis 0) or columns (1) in the order of ``names``, where it bears these names.

    Anything else, and a frame that bears none of them, is returned as it is: its order is taken at its word. DataError for a
    frame that bears only some of them.
    """
    if not isinstance(values, pd.DataFrame) or isinstance(values.axes[axis], pd.RangeIndex):
        return values
    wanted = [plain(name) for name in names]
    position = {plain(name): i for i, name in enumerate(values.axes[axis])}
    if not position.keys() & set(wanted):
        return values
    if position.keys() != set(wanted) or values.shape[axis] != len(wanted):
        other = [name for name in [*wanted, *position] if name not in position or name not in wanted]
        raise DataError(
            f"the data frame's {('rows', 'columns')[axis]} are only in part the {len(wanted)} labels, different are "
            f"{other[:5]}; give it exactly their names, or its .to_numpy() with them in order"
        )
    return values.take([position[name] for name in wanted], axis=axis)


def names_of(labels: Iterable[Label]) -> tuple[Label, ...]:
    """Labels as Python values; the same one twice raises DataError."""
    names = tuple(plain(label) for label in labels)
    if len(set(names)) != len(names):
        seen: set[Label] = set()
        double: list[Label] = []
        for name in names:
            if name in seen and name not in double:
                double.append(name)
            seen.add(name)
        raise DataError(f"labels must be different, found more than once: {double[:5]}")
    return names


def _hint(missing: list[Label], known: dict[Label, int]) -> str:
    """What may have gone wrong, where a label is there as text or as a number."""
    types = {type(name) for name in known}
    for name in missing[:5]:
        for kind in (str, int, float):
            try:
                other = kind(name)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                continue
            if kind in types and other in known:
                return f"; {other!r} is there, and labels are compared with their type"
    return ""
