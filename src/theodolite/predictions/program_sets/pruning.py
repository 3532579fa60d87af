"""Partial programs: which nodes of a program to keep under a budget of surprise, with at most so many holes.

What runs for every node is marked no_type_check: a run-time check of its annotations would cost many times what it does.
"""

__all__ = ["HOLE", "PartialProgram", "prune", "pruning_gap"]

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, sparse

from theodolite.core.errors import InputError
from theodolite.predictions.program_sets.trees import ProgramTree

HOLE = "??"
_SOLVERS = ("auto", "milp", "dp", "nested-dp", "greedy", "abstain", "none")
_JOINT = 1500  # nodes x levels up to which the joint programme is solved whole
_BRANCHES = 50  # of the search tree: a count and not a time, so that the same input gives the same sets
_NEAR = 0.97  # of what no family can pass: near enough not to search on
_STARTS = 8  # levels that the nested sweeps begin at
_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class PartialProgram:
    """A program with holes. kept (n,): nodes that stay; a node stays only where its parent does."""

    tree: ProgramTree
    kept: Bool[np.ndarray, " node"]
    kept_cost: float

    @cached_property
    def holes(self) -> tuple[int, ...]:
        """Removed nodes whose parent is kept; the root where it is removed."""
        parents = self.tree.parents
        above = np.r_[True, self.kept[parents[1:]]]
        return tuple(np.flatnonzero(above & ~self.kept).tolist())

    @property
    def removed_fraction(self) -> float:
        """Share of the nodes that are removed."""
        return 1 - float(self.kept.mean())

    @cached_property
    def text(self) -> str:
        """The code with ``??`` in the place of each hole."""
        if not self.kept[0]:
            return HOLE
        hole = np.full(len(self.kept), -1)
        for number, parent in enumerate(self.tree.parents.tolist()):
            if not self.kept[number]:
                hole[number] = number if self.kept[parent] else hole[parent]
        of = hole[self.tree.owner]
        parts, told = [], set[int]()
        edges = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(of)]
        for start, end in itertools.pairwise(edges):
            number = int(of[start])
            if number < 0:
                parts.append(self.tree.code[start:end])
            elif number not in told:  # a subtree whose text is in pieces is one hole
                told.add(number)
                parts.append(HOLE)
        return "".join(parts)


def prune(
    tree: ProgramTree,
    costs: Float[np.ndarray, " node"] | Sequence[float],
    tau_grid: Sequence[float] | Float[np.ndarray, " level"],
    max_holes: int | None = 3,
    solver: str = "auto",
) -> list[PartialProgram]:
    """For each confidence level tau the partial program that keeps as many nodes as possible, in the order of the grid:

        max sum_v a_v   with   sum_v l_v a_v <= -log tau,   a_child <= a_parent,
                               sum_edges (a_parent - a_child) + (1 - a_root) <= max_holes

    "milp": all levels in one integer programme, also with a_v(tau) >= a_v(tau') for tau < tau': nested and best in sum.
    "dp": each level alone, exact by dynamic programming over the tree; not nested in general. "nested-dp": the same from one
    level on, where what is removed stays removed and, downwards, what is kept stays kept; the best of eight first levels:
    nested, fast, and seldom worse than "milp". "auto": "nested-dp" where that keeps provably 97 % of the best or there
    are more than 1,500 nodes x levels, else the better of it and "milp" with a bounded search; `pruning_gap` tells how good.
    Baselines: "greedy" (the paper's: costliest leaves first, then parents of what is removed), "abstain" (all or a hole at
    the root), "none" (always all). max_holes None: any number.

    Raises InputError for costs that are negative, not finite or not one a node, for a grid that does not ascend in (0, 1),
    for max_holes below 1 and an unknown solver. Source: Khakhar et al., 2023, arXiv:2302.08703, section 4.

    >>> from theodolite.predictions.program_sets.trees import parse_program
    >>> [one.text for one in prune(parse_program("return f(a, b)"), [0, 0, 0.1, 0, 2], [0.1, 0.5, 0.95])]
    ['return f(a, b)', 'return f(a, ??)', 'return ??(a, ??)']
    """
    costs = np.asarray(costs, dtype=np.float64)
    grid = check_grid(tau_grid)
    if costs.shape != (len(tree),):
        raise InputError(f"need one cost a node, {len(tree)} of them, got an array of shape {costs.shape}")
    if not np.isfinite(costs).all() or (costs < 0).any():
        raise InputError("costs must be finite and at least 0")
    if max_holes is not None and max_holes < 1:
        raise InputError(f"max_holes must be at least 1 (a program may have to be one hole), got {max_holes}")
    if solver not in _SOLVERS:
        raise InputError(f"solver must be one of {', '.join(_SOLVERS)}, got {solver!r}")
    kept = _solve(tree.parents, costs, -np.log(grid), max_holes, solver)
    return [PartialProgram(tree, one, float(costs[one].sum())) for one in kept]


def check_grid(tau_grid: Sequence[float] | np.ndarray) -> Float[np.ndarray, " level"]:
    """The grid as an array; raises InputError where it does not ascend within (0, 1)."""
    grid = np.asarray(tau_grid, dtype=np.float64)
    if grid.ndim != 1 or not len(grid) or not ((grid > 0) & (grid < 1)).all() or (np.diff(grid) <= 0).any():
        raise InputError(f"the grid of tau must ascend strictly within (0, 1), got {tau_grid!r}")
    return grid


def pruning_gap(tree: ProgramTree, costs: Float[np.ndarray, " node"], family: Sequence[PartialProgram],
                tau_grid: Sequence[float] | np.ndarray, max_holes: int | None = 3) -> float:  # fmt: skip
    """How far a family falls short of its levels' own optima, which are not nested: 1 - kept / sum of the optima."""
    best = _total([one.kept for one in prune(tree, costs, tau_grid, max_holes, "dp")])
    return 0.0 if best == 0 else 1 - _total([one.kept for one in family]) / best


def _solve(
    parents: np.ndarray, costs: np.ndarray, budgets: np.ndarray, max_holes: int | None, solver: str
) -> list[Bool[np.ndarray, " node"]]:
    everything = np.ones(len(parents), dtype=bool)
    if solver == "none":
        return [everything for _ in budgets]
    if solver == "abstain":
        return [everything if costs.sum() <= budget else ~everything for budget in budgets]
    if solver == "greedy":
        return _greedy(parents, costs, budgets, max_holes)
    if solver == "milp":
        made = _joint(parents, costs, budgets, max_holes)
        if made is not None:
            return made
    table = _Table(parents, costs, max_holes)
    optima = [table.best(budget) for budget in budgets]
    if solver == "dp" or all((b <= a).all() for a, b in itertools.pairwise(optima)):
        return optima
    nested = _nested(table, budgets, optima)
    # no family keeps more than each level's own optimum
    near = _total(nested) >= _NEAR * _total(optima)
    if solver != "auto" or near or len(parents) * len(budgets) > _JOINT:
        return nested
    bounds = _Bounds(np.array([kept.sum() for kept in optima]), _total(nested) + 1)
    return _joint(parents, costs, budgets, max_holes, bounds) or nested


def _total(family: Sequence[np.ndarray]) -> int:
    return sum(int(kept.sum()) for kept in family)


@no_type_check
class _Table:
    """g[h, r]: the largest cost that a removal of r nodes of the tree leaving h holes can take away, for all h and r.

    f_v, with v kept, is the (max, +) convolution of its children's g; g_v is f_v or, in one hole, all of v's subtree. Without
    a bound on the holes they are not counted. most, least (n,): nodes that may be kept and nodes that must be. Does not
    depend on the budget.
    """

    def __init__(
        self,
        parents: np.ndarray,
        costs: np.ndarray,
        max_holes: int | None,
        most: np.ndarray | None = None,
        least: np.ndarray | None = None,
    ) -> None:
        self.parents, self.costs, self.max_holes = parents, costs, max_holes
        n = len(parents)
        counted = max_holes is not None
        rows = min(max_holes, n) + 1 if max_holes is not None else 1
        self._sizes, self._totals = np.ones(n, dtype=np.int64), costs.copy()
        children: list[list[int]] = [[] for _ in range(n)]
        for v in range(n - 1, 0, -1):
            self._sizes[parents[v]] += self._sizes[v]
            self._totals[parents[v]] += self._totals[v]
            children[parents[v]].append(v)
        self._whole = 1 if counted else 0  # row of g that removing all of a subtree is in
        self._g: list[np.ndarray] = [np.empty(0)] * n
        self._steps: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(n)]
        for v in range(n - 1, -1, -1):
            f = np.full((rows, 1), -np.inf)
            f[0, 0] = 0.0
            for child in reversed(children[v]):
                f, choice = _convolve(f, self._g[child])
                self._steps[v].append((child, choice))
            g = np.full((rows, int(self._sizes[v]) + 1), -np.inf)
            if most is None or most[v]:
                g[:, : f.shape[1]] = f
            if least is None or not least[v]:
                g[self._whole, -1] = self._totals[v]
            self._g[v] = g
        self._reach = self._g[0].max(axis=0)
        self._sets: dict[int, np.ndarray] = {}  # of nodes to keep, by how many are removed

    def best(self, budget: float) -> Bool[np.ndarray, " node"]:
        """The nodes to keep: as many as can be, and among those sets the cheapest."""
        need = self._totals[0] - budget
        for removed in np.flatnonzero(self._reach >= need - _SLACK * (1 + abs(need))).tolist():
            kept = self._sets[removed] = self._sets[removed] if removed in self._sets else self._trace(removed)
            # sums in another order differ in the last digits; what counts is the sum of what is kept
            if self.costs[kept].sum() <= budget:
                return kept
        return np.zeros(len(self.parents), dtype=bool)

    def _trace(self, removed: int) -> Bool[np.ndarray, " node"]:
        kept = np.ones(len(self.parents), dtype=bool)
        stack = [(0, int(self._g[0][:, removed].argmax()), removed)]
        while stack:
            v, h, r = stack.pop()
            if r == self._sizes[v]:
                kept[v : v + r] = False  # in preorder a subtree is a run
                continue
            for child, choice in reversed(self._steps[v]):
                taken = int(choice[h, r])
                width = int(self._sizes[child]) + 1
                if taken:
                    stack.append((child, taken // width, taken % width))
                h, r = h - taken // width, r - taken % width
        return kept


@no_type_check
def _convolve(f: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """max over (h, r) of f[H - h, R - r] + g[h, r] for all H, R, and the h, r (as one number) that reach it."""
    rows, width = f.shape
    out = np.full((rows, width + g.shape[1] - 1), -np.inf)
    choice = np.zeros(out.shape, dtype=np.int64)
    for place in np.flatnonzero(np.isfinite(g)).tolist():
        h, r = divmod(place, g.shape[1])
        candidate = f[: rows - h] + g[h, r]
        there = out[h:, r : r + width]
        better = candidate > there
        there[better] = candidate[better]
        choice[h:, r : r + width][better] = place
    return out, choice


def _nested(table: _Table, budgets: np.ndarray, optima: Sequence[np.ndarray]) -> list[Bool[np.ndarray, " node"]]:
    """The best of the sweeps from several levels."""
    binding = np.flatnonzero(budgets < table.costs.sum())
    starts = binding[np.unique(np.linspace(0, len(binding) - 1, _STARTS).astype(int))]
    return max((_sweep(table, budgets, optima, int(start)) for start in starts), key=_total)


def _sweep(
    table: _Table, budgets: np.ndarray, optima: Sequence[np.ndarray], start: int
) -> list[Bool[np.ndarray, " node"]]:
    """The optimum of level ``start``, then the levels on both sides in turn: their own optimum where it is nested with the
    neighbour's, else the best set that is."""
    found = list(optima)
    for levels in (range(start + 1, len(budgets)), range(start - 1, -1, -1)):
        now, using = optima[start], table
        for level in levels:
            smaller = level > start
            if not smaller or table.costs[now].sum() > budgets[level]:
                candidate = optima[level] if using is table else using.best(budgets[level])
                if (candidate > now).any() if smaller else (candidate < now).any():
                    sides = {"most": now} if smaller else {"least": now}
                    using = _Table(table.parents, table.costs, table.max_holes, **sides)
                    candidate = using.best(budgets[level])
                now = candidate
            found[level] = now
    return found


@dataclass(frozen=True, eq=False)
class _Bounds:
    """What shortens a search for a family that keeps ``least`` nodes or more, of which no level can keep more than ``most``."""

    most: Int[np.ndarray, " level"]
    least: int


def _joint(
    parents: np.ndarray, costs: np.ndarray, budgets: np.ndarray, max_holes: int | None, bounds: _Bounds | None = None
) -> list[Bool[np.ndarray, " node"]] | None:
    """All levels in one integer programme by HiGHS; with ``bounds`` None where a bounded search finds no family within them."""
    n, levels = len(parents), len(budgets)
    binding = budgets < costs.sum()
    if not binding.any():
        return [np.ones(n, dtype=bool)] * levels
    first = int(binding.argmax())  # below it everything is kept
    levels -= first
    each = sparse.identity(levels, format="csr")
    closed = sparse.csr_matrix(
        (np.r_[np.ones(n - 1), -np.ones(n - 1)], (np.tile(np.arange(n - 1), 2), np.r_[np.arange(1, n), parents[1:]])),
        shape=(n - 1, n),
    )  # a_child - a_parent <= 0
    parts = [sparse.kron(each, closed), sparse.kron(each, costs[None])]
    limits = [np.zeros((n - 1) * levels), budgets[first:]]
    if levels > 1:
        later = sparse.eye(levels - 1, levels, k=1) - sparse.eye(levels - 1, levels)
        parts.append(sparse.kron(later, sparse.identity(n)))
        limits.append(np.zeros((levels - 1) * n))
    if max_holes is not None:
        edges = np.bincount(parents[1:], minlength=n).astype(np.float64)
        edges -= 1  # each node but the root closes one edge, and the root its own hole
        parts.append(sparse.kron(each, edges[None]))
        limits.append(np.full(levels, max_holes - 1.0))
    if bounds is not None:
        parts += [sparse.kron(each, np.ones((1, n))), sparse.csr_matrix(-np.ones((1, n * levels)))]
        limits += [bounds.most[first:].astype(np.float64), np.array([first * n - bounds.least], dtype=np.float64)]
    rows = sparse.vstack(parts, format="csr")
    upper: Any = np.concatenate(limits)
    no_limit: Any = np.full(len(upper), -np.inf)
    budget_rows = slice((n - 1) * levels, n * levels)
    for _ in range(3):
        solved = optimize.milp(
            -np.ones(n * levels), integrality=np.ones(n * levels), bounds=optimize.Bounds(0, 1),
            constraints=optimize.LinearConstraint(rows, no_limit, upper),
            options={} if bounds is None else {"node_limit": _BRANCHES},
        )  # fmt: skip
        if solved.x is None:
            return None
        kept = solved.x.reshape(levels, n) > 0.5
        over = (kept * costs).sum(axis=1) > budgets[first:]
        if not over.any():
            return [np.ones(n, dtype=bool)] * first + list(kept)
        # the solver's tolerance let a level in that is over its budget: the same again with that level's a little smaller
        upper[budget_rows] -= np.where(over, 2e-6 * (1 + budgets[first:]), 0.0)
    return None


def _greedy(
    parents: np.ndarray, costs: np.ndarray, budgets: np.ndarray, max_holes: int | None
) -> list[Bool[np.ndarray, " node"]]:
    """While over the budget: with a hole to spare the costliest kept node without kept children, else the costliest parent
    of a removed node. Each budget continues where the larger one stopped."""
    n = len(parents)
    most = math.inf if max_holes is None else max_holes
    kept = np.ones(n, dtype=bool)
    sizes = np.ones(n, dtype=np.int64)
    for v in range(n - 1, 0, -1):
        sizes[parents[v]] += sizes[v]
    found = []
    for budget in budgets:
        while costs[kept].sum() > budget:
            above = np.r_[True, kept[parents[1:]]]
            holes = above & ~kept
            if holes.sum() < most:
                inner = np.zeros(n, dtype=bool)
                inner[parents[1:][kept[1:]]] = True
                candidates = np.flatnonzero(kept & ~inner)
            else:
                candidates = np.unique(parents[np.flatnonzero(holes)])
            chosen = int(candidates[costs[candidates].argmax()])
            kept[chosen : chosen + sizes[chosen]] = False
        found.append(kept.copy())
    return found
