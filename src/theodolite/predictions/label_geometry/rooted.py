"""A tree laid out by depth, so that every step of an algorithm on it handles one depth of all samples at once."""

__all__ = ["RootedTree"]

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse import csgraph


@dataclass(frozen=True, eq=False)
class _Level:
    """Nodes start..stop of one depth; ``parents`` (``group`` among all) have first children at ``first``, from start on."""

    start: int
    stop: int
    parents: np.ndarray
    first: np.ndarray
    group: slice


class RootedTree:
    """Nodes in breadth-first order from a root; all indices are places in that order, and arrays have a row a node.

    order (nodes,): the node at each place. place (nodes,): the place of each node. parent, length (nodes,): of each place
    but the first, the place of its parent and the length of the edge to it.
    """

    def __init__(self, adjacency, root: int = 0) -> None:
        order, parent = csgraph.breadth_first_order(adjacency, root, directed=False)
        self.size = len(order)
        self.order = order.astype(np.int64)
        self.place = np.empty(self.size, dtype=np.int64)
        self.place[self.order] = np.arange(self.size)
        self.parent = np.zeros(self.size, dtype=np.int64)
        self.parent[1:] = self.place[parent[order[1:]]]
        self.length = np.zeros((self.size, 1))
        if self.size > 1:
            self.length[1:, 0] = np.asarray(adjacency[order[1:], parent[order[1:]]]).ravel()
        # a breadth-first order has children beside each other, and in the order of their parents
        first = (
            np.flatnonzero(self.parent[1:] != np.r_[-1, self.parent[1:-1]]) + 1 if self.size > 1 else np.zeros(0, int)
        )
        self._first, self._parents = first, self.parent[first]
        bounds = [0, 1]
        while bounds[-1] < self.size:
            bounds.append(1 + int(np.searchsorted(self.parent[1:], bounds[-1])))
        self._bounds = bounds
        self._groups = np.searchsorted(first, bounds)
        self.depth = len(bounds) - 2
        self.from_root = np.zeros(self.size)
        for level in self._down():
            here = slice(level.start, level.stop)
            self.from_root[here] = self.from_root[self.parent[here]] + self.length[here, 0]

    def _level(self, depth: int) -> _Level:
        start, stop = self._bounds[depth], self._bounds[depth + 1]
        group = slice(self._groups[depth], self._groups[depth + 1])
        return _Level(start, stop, self._parents[group], self._first[group] - start, group)

    @cached_property
    def _children(self) -> sparse.csr_matrix:
        """Sums over children, a row for each parent: a product with it is several times as fast as np.add.reduceat."""
        ends = np.r_[self._first, self.size] - 1
        columns = np.arange(1, self.size)
        return sparse.csr_matrix((np.ones(self.size - 1), columns, ends), shape=(len(self._first), self.size))

    def _down(self) -> Iterator[_Level]:
        return (self._level(depth) for depth in range(1, self.depth + 1))

    def _up(self) -> Iterator[_Level]:
        return (self._level(depth) for depth in range(self.depth, 0, -1))

    def squared_sums(
        self, places: Int[np.ndarray, " source"], weights: Float[np.ndarray, "sample source"]
    ) -> Float[np.ndarray, "node sample"]:
        """F(v) = sum_i w_i d(v, s_i)^2 for every node v, in O(nodes) a sample, by rerooting. The sources are different.

        a and m are the weight below v and its summed distance to v's parent. From the parent p to v, W being all weight,

            sum_i w_i d(v, s_i) = B(v) = B(p) + length (W - 2 a(v))
            F(v) = F(p) + length (2 B(p) + length W - 4 m(v))
        """
        a = np.zeros((self.size, len(weights)))
        a[places] = weights.T
        m = np.zeros_like(a)
        total = weights.sum(axis=1)
        for level in self._up():
            here, sums = slice(level.start, level.stop), self._children[level.group]
            m[here] += self.length[here] * a[here]
            a[level.parents] += sums @ a
            m[level.parents] += sums @ m
        a[0] = m[0]
        m[0] = weights @ self.from_root[places] ** 2
        for level in self._down():
            here = slice(level.start, level.stop)
            length, up = self.length[here], self.parent[here]
            b = a[up]
            step = length * total
            a[here] *= -2 * length
            a[here] += step
            a[here] += b
            b *= 2
            b += step
            m[here] *= -4
            m[here] += b
            m[here] *= length
            m[here] += m[up]
        return m

    def distances(self, places: Int[np.ndarray, " source"]) -> Float[np.ndarray, "node source"]:
        """Length of the path from every node to each source."""
        d = np.full((self.size, len(places)), np.inf)
        d[places, np.arange(len(places))] = 0.0
        return self._spread(d)

    def _spread(self, d: np.ndarray) -> np.ndarray:
        """Distance to the nearest source, where d is 0 at sources and infinite elsewhere; in place."""
        for level in self._up():
            here = slice(level.start, level.stop)
            nearest = np.minimum.reduceat(d[here] + self.length[here], level.first)
            d[level.parents] = np.minimum(d[level.parents], nearest)
        for level in self._down():
            here = slice(level.start, level.stop)
            np.minimum(d[here], d[self.parent[here]] + self.length[here], out=d[here])
        return d

    def steiner(self, places: Int[np.ndarray, " source"]) -> Bool[np.ndarray, " node"]:
        """Nodes on a path between two sources, sources among them."""
        below = np.zeros(self.size, dtype=np.int64)
        below[places] = 1
        for level in self._up():
            below[level.parents] += np.add.reduceat(below[level.start : level.stop], level.first)
        inside = below > 0
        above = np.flatnonzero(below == below[0])  # a chain from the root, which ends at the sources' common ancestor
        inside[above[:-1]] = False
        return inside

    def spanned(
        self, adjacency: sparse.csr_matrix, nodes: Int[np.ndarray, " source"]
    ) -> tuple["RootedTree", Int[np.ndarray, " node"]]:
        """The tree that some nodes of ``adjacency`` span, and the place in it of each node of the whole (-1: not in it)."""
        kept = np.sort(self.order[self.steiner(self.place[nodes])])
        smaller = RootedTree(adjacency[kept][:, kept])
        place = np.full(self.size, -1)
        place[kept] = smaller.place
        return smaller, place

    def gates(self, inside: Bool[np.ndarray, " node"]) -> tuple[Int[np.ndarray, " node"], Float[np.ndarray, " node"]]:
        """The node of a connected set that each node is nearest to, and its distance."""
        gate = np.where(inside, np.arange(self.size), -1)
        if not inside[0]:
            gate[0] = int(np.argmax(inside))  # the set's node nearest to the root
        for level in self._down():
            here = slice(level.start, level.stop)
            gate[here] = np.where(inside[here], gate[here], gate[self.parent[here]])
        return gate, self._spread(np.where(inside, 0.0, np.inf)[:, None])[:, 0]

    def chains(
        self, inside: Bool[np.ndarray, " node"], rank: Int[np.ndarray, " node"]
    ) -> tuple[Int[np.ndarray, " chain"], Int[np.ndarray, " chain"]]:
        """The longest chains of edges that hang on a connected set holding the root: (place of the end, edges), longest first.

        Each next chain hangs on the set and the chains before it; of chains of one length the one whose end has the lower
        rank goes first. rank (nodes,): a permutation of 0..nodes - 1.
        """
        step = self.size
        key = self.size - 1 - rank  # step * edges below + what prefers low ranks; no two nodes' ends share the second
        for level in self._up():
            key[level.parents] = np.maximum.reduceat(key[level.start : level.stop], level.first) + step
        top = ~inside & (inside[self.parent] | (key + step != key[self.parent]))
        found = np.sort(key[top])[::-1]
        by_rank = np.empty(self.size, dtype=np.int64)
        by_rank[rank] = np.arange(self.size)
        return by_rank[self.size - 1 - found % step], found // step + 1
