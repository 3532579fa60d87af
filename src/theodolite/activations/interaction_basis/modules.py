"""Parts of a network that interact little, counted on a log scale: the volume gained by cutting an edge grows with log(1/eps)."""

__all__ = ["Modules", "find_modules"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from theodolite.core.errors import DataError, InputError
from theodolite.core.parallel import seeds_for

_NULLS = 20
_DROPPED_MASS = 1e-3
_SWAP_ROUNDS = 20


@dataclass(frozen=True, eq=False)
class Modules:
    """Clusters of the layered interaction graph.

    labels: one array of cluster numbers per node layer (r_l,); 0 is the largest cluster; features without an edge have a
    cluster of their own. q: Newman's modularity of the weighted graph. q_null: of 20 graphs with the same number of edges
    at every feature and the same weights, rewired at random between the same two layers: a q inside their range is no
    modularity. eps: the interaction that counts as none.
    """

    labels: tuple[Int[np.ndarray, " _r"], ...]
    q: float
    q_null: tuple[float, ...]
    eps: float

    @property
    def count(self) -> int:
        """Number of clusters of at least two features."""
        sizes = np.bincount(np.concatenate(self.labels))
        return int((sizes > 1).sum())


def find_modules(
    interactions: Sequence[Float[Tensor, "_r_next _r"]],
    eps: float | None = None,
    *,
    resolution: float = 1.0,
    n_seeds: int = 5,
    seed: int = 0,
) -> Modules:
    """Cluster the features of all layers by edge weights max(0, log10(E_ij / eps)), the best of ``n_seeds`` searches.

    interactions: E (r_{l+1}, r_l) of each pair of neighbouring layers. eps: the interaction below which an edge may be cut;
    None takes the value below which 0.1 % of the whole interaction lies. resolution: of the modularity. The search is
    Louvain's; clusters that are not connected are split.

    Raises InputError for shapes that do not follow each other and DataError where no edge exceeds eps.

    >>> E = torch.tensor([[1.0, 1.0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    >>> [part.tolist() for part in find_modules([E], eps=0.1).labels]
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if not 0 < resolution < math.inf or n_seeds < 1:
        raise InputError(f"need resolution > 0 and n_seeds >= 1, got {resolution} and {n_seeds}")
    edges = [_checked(e) for e in interactions]
    if not edges or any(b.shape[1] != a.shape[0] for a, b in pairwise(edges)):
        raise InputError(
            f"need edges (r_1, r_0), (r_2, r_1), .. between neighbouring layers, got {[e.shape for e in edges]}"
        )
    eps = _small_edge(edges) if eps is None else float(eps)
    if not 0 < eps < math.inf:
        raise InputError(f"eps must be above 0, got {eps}")
    with np.errstate(divide="ignore"):
        weights = [np.maximum(0.0, np.log10(e / eps)) for e in edges]
    if not any(w.any() for w in weights):
        raise DataError(f"no interaction exceeds eps = {eps:.3g}; give a smaller eps")
    searches = seeds_for(seed, n_seeds + 2 * _NULLS)
    found = [_cluster(weights, resolution, s) for s in searches[:n_seeds]]
    clusters, q = max(found, key=lambda one: one[1])
    nulls = []
    for swap, search in zip(searches[n_seeds : n_seeds + _NULLS], searches[n_seeds + _NULLS :], strict=True):
        rng = np.random.default_rng(swap)
        nulls.append(_cluster([_rewired(w, rng) for w in weights], resolution, search)[1])
    widths = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    labels = np.empty(sum(widths), dtype=np.int64)
    for number, members in enumerate(sorted(clusters, key=lambda members: (-len(members), min(members)))):
        labels[sorted(members)] = number
    return Modules(tuple(np.split(labels, np.cumsum(widths)[:-1])), q, tuple(nulls), eps)


def _checked(edges: Any) -> Float[np.ndarray, "r_next r"]:
    array = torch.as_tensor(edges).detach().cpu().double().numpy()
    if array.ndim != 2 or not np.isfinite(array).all() or (array < 0).any():
        raise InputError("an interaction is a matrix (r_next, r) of finite numbers >= 0")
    return array


def _small_edge(edges: Sequence[np.ndarray]) -> float:
    """The value below which 0.1 % of the whole interaction lies."""
    values = np.sort(np.concatenate([e.ravel() for e in edges]))
    total = values.sum()
    if total <= 0:
        raise DataError("all interactions are 0, so there is no graph to cluster")
    # the smallest value that has to be kept; edges equal to it get weight 0, so go just below
    first = int(np.searchsorted(np.cumsum(values), _DROPPED_MASS * total, side="right"))
    return float(values[min(first, len(values) - 1)]) * (1 - 1e-9)


def _graph(weights: Sequence[np.ndarray]) -> nx.Graph:
    graph = nx.Graph()
    widths = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    starts = [0, *accumulate(widths)]
    graph.add_nodes_from(range(starts[-1]))
    for layer, w in enumerate(weights):
        after, before = np.nonzero(w)
        graph.add_weighted_edges_from(
            zip((before + starts[layer]).tolist(), (after + starts[layer + 1]).tolist(), w[after, before].tolist())
        )
    return graph


def _cluster(weights: Sequence[np.ndarray], resolution: float, seed: int) -> tuple[list[set[int]], float]:
    graph = _graph(weights)
    found = nx.community.louvain_communities(graph, resolution=resolution, seed=seed)
    whole = [part for members in found for part in nx.connected_components(graph.subgraph(members))]
    return whole, float(nx.community.modularity(graph, whole, resolution=resolution))


def _rewired(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same numbers of edges in every row and column and the same weights, in random places.

    Pairs of edges (a, b), (c, d) become (a, d), (c, b) where both places are free, all disjoint pairs of a round at once;
    then the weights are dealt out anew (a nearly complete graph has no free places).
    """
    there = weights > 0
    rows, columns = np.nonzero(there)
    values = weights[rows, columns]
    for _ in range(_SWAP_ROUNDS):
        order = rng.permutation(len(rows))
        half = len(order) // 2
        one, two = order[:half], order[half : 2 * half]
        new_a, new_b = (rows[one], columns[two]), (rows[two], columns[one])
        free = ~there[new_a] & ~there[new_b]
        places = np.concatenate([new_a[0] * there.shape[1] + new_a[1], new_b[0] * there.shape[1] + new_b[1]])
        _, inverse, counts = np.unique(places, return_inverse=True, return_counts=True)
        alone = counts[inverse] == 1  # two swaps of one round must not land in one place
        good = free & alone[:half] & alone[half:]
        one, two = one[good], two[good]
        there[rows[one], columns[one]] = there[rows[two], columns[two]] = False
        columns[one], columns[two] = columns[two], columns[one]
        there[rows[one], columns[one]] = there[rows[two], columns[two]] = True
    new = np.zeros_like(weights)
    new[rows, columns] = rng.permutation(values)
    return new
