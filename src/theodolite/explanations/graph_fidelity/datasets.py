"""Graphs whose true explanation is known by construction, and the molecules of MUTAG, where it is not."""

__all__ = ["GraphSet", "NodeTask", "ba_2motifs", "load_mutag", "rewired", "tree_cycles", "tree_grid"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from theodolite.core.errors import DataError, InputError
from theodolite.explanations.graph_fidelity.graph import Graph, explained_pairs

_TAGS = 7  # C, N, O, F, I, Cl, Br


@dataclass(frozen=True, eq=False)
class GraphSet:
    """Graphs, a label for each and, where it is known, the mask (m,) of the edges that make the label."""

    graphs: tuple[Graph, ...]
    labels: Int[Tensor, " graph"]
    explanations: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.graphs)

    def part(self, rows: slice | np.ndarray) -> "GraphSet":
        """The graphs of these rows."""
        chosen = np.arange(len(self))[rows].tolist()
        masks = None if self.explanations is None else tuple(self.explanations[i] for i in chosen)
        return GraphSet(tuple(self.graphs[i] for i in chosen), self.labels[chosen], masks)


@dataclass(frozen=True, eq=False)
class NodeTask:
    """One graph, a label for each node, and for each node of a motif the mask (m,) of its motif's edges."""

    graph: Graph
    labels: Int[Tensor, " node"]
    explanations: Mapping[int, Bool[Tensor, " edge"]]


def ba_2motifs(n: int = 1000, base: tuple[int, int] = (14, 24), *, seed: int = 0) -> GraphSet:
    """Random trees by preferential attachment, each with a motif on a bridge: label 0 a five-cycle, label 1 a house.

    base: smallest and largest number of nodes of the tree. With one size alone the number of edges tells the label (a
    house has one more), and a network may learn that in place of the motif. The explanation is the motif without its
    bridge. One feature, always 1.

    >>> made = ba_2motifs(4, seed=1)
    >>> made.labels.tolist(), [int(mask.sum()) // 2 for mask in made.explanations]
    ([0, 1, 0, 1], [5, 6, 5, 6])
    """
    if n < 1 or not 2 <= base[0] <= base[1]:
        raise InputError(f"need n >= 1 and 2 <= base[0] <= base[1], got n={n}, base={base}")
    rng = np.random.default_rng(seed)
    graphs, masks = [], []
    for i in range(n):
        size = int(rng.integers(base[0], base[1] + 1))
        graph = nx.barabasi_albert_graph(size, 1, seed=int(rng.integers(1 << 31)))
        motif = nx.house_graph() if i % 2 else nx.cycle_graph(5)
        edges = _attach(graph, motif, int(rng.integers(size)), int(rng.integers(5)))
        made = Graph.from_networkx(graph)
        graphs.append(made)
        masks.append(_mask(made, edges))
    return GraphSet(tuple(graphs), torch.arange(n) % 2, tuple(masks))


def _attach(graph: nx.Graph, motif: nx.Graph, at: int, by: int) -> list[tuple[int, int]]:
    """Add a motif, whose nodes are numbers from 0, on a bridge from its node ``by``; returns its edges."""
    start = graph.number_of_nodes()
    edges = [(u + start, v + start) for u, v in motif.edges()]
    graph.add_nodes_from(range(start, start + motif.number_of_nodes()))  # numbered in order, as in the edges
    graph.add_edges_from(edges)
    graph.add_edge(at, by + start)
    return edges


def _mask(graph: Graph, edges: list[tuple[int, int]]) -> Bool[Tensor, " edge"]:
    chosen = np.append(explained_pairs(graph, edges), False)
    return torch.from_numpy(chosen[graph.pair])


def tree_cycles(depth: int = 8, n_motifs: int = 80, *, seed: int = 0) -> NodeTask:
    """A balanced binary tree with six-cycles on bridges; a node's label is 1 in a cycle. No random edges are added."""
    return _tree(depth, n_motifs, lambda: nx.cycle_graph(6), seed)


def tree_grid(depth: int = 8, n_motifs: int = 80, *, seed: int = 0) -> NodeTask:
    """A balanced binary tree with 3 x 3 grids on bridges; a node's label is 1 in a grid. No random edges are added."""
    return _tree(depth, n_motifs, lambda: nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 3)), seed)


def _tree(depth: int, n_motifs: int, motif: Callable[[], nx.Graph], seed: int) -> NodeTask:
    if depth < 1 or n_motifs < 1:
        raise InputError(f"need depth >= 1 and n_motifs >= 1, got {depth} and {n_motifs}")
    rng = np.random.default_rng(seed)
    graph: Any = nx.balanced_tree(2, depth)
    size = graph.number_of_nodes()
    sets = []
    for _ in range(n_motifs):
        one = motif()
        sets.append(_attach(graph, one, int(rng.integers(size)), int(rng.integers(one.number_of_nodes()))))
    made = Graph.from_networkx(graph)
    masks = {}
    for edges in sets:
        mask = _mask(made, edges)
        masks |= dict.fromkeys(sorted({u for edge in edges for u in edge}), mask)
    labels = (torch.arange(made.num_nodes) >= size).long()
    return NodeTask(made, labels, masks)


def rewired(graph: Graph, explanation: Any, *, seed: int = 0) -> Graph:
    """The graph with the explanation's edges put between nodes drawn at random that had none; their number stays.

    A network that goes on telling the label without the motif has learned something else.
    """
    if not graph.undirected:
        raise InputError("rewired needs an undirected graph")
    chosen = explained_pairs(graph, explanation)
    taken = {(int(u), int(v)) for u, v in graph.ends}
    n, rng = graph.num_nodes, np.random.default_rng(seed)
    wanted = int(chosen.sum())
    if n * (n - 1) // 2 - len(taken) < wanted:
        raise InputError(f"the graph has too few pairs of nodes without an edge to move {wanted} edges to")
    free = [(u, v) for u in range(n) for v in range(u + 1, n) if (u, v) not in taken]
    new = np.array([free[i] for i in rng.choice(len(free), wanted, replace=False)], dtype=np.int64).reshape(-1, 2)
    kept = graph.edge_index.cpu().numpy()[:, ~np.append(chosen, False)[graph.pair]]
    edges = np.concatenate([kept, new.T, new.T[::-1]], axis=1)
    return Graph(graph.x, torch.from_numpy(edges).to(graph.edge_index.device))


def load_mutag(path: str | Path) -> GraphSet:
    """MUTAG: 188 molecules, label 1 where mutagenic, atoms as one of seven (C, N, O, F, I, Cl, Br); no true explanations.

    path: text, first the number of graphs; for each a line "nodes label" and then for each node "atom degree neighbours...".
    Every molecule of this set, mutagenic or not, holds an NO2 group, so that group explains nothing here.
    Raises DataError for a file that is not of this form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    graphs, labels, at = [], [], 1
    try:
        for _ in range(int(lines[0])):
            n, label = (int(word) for word in lines[at].split())
            rows = [[int(word) for word in line.split()] for line in lines[at + 1 : at + 1 + n]]
            if len(rows) != n or any(len(row) < 2 or len(row) != 2 + row[1] or not 0 <= row[0] < _TAGS for row in rows):
                raise ValueError(f"the graph of line {at + 1} is not complete")
            pairs = [(u, v) for u, row in enumerate(rows) for v in row[2:]]
            x = torch.nn.functional.one_hot(torch.tensor([row[0] for row in rows]), _TAGS).float()
            graphs.append(Graph(x, torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous()))
            labels.append(label)
            at += n + 1
    except (ValueError, IndexError) as error:
        raise DataError(f"{path} is not a file of graphs as MUTAG's: {error}") from error
    return GraphSet(tuple(graphs), torch.tensor(labels))
