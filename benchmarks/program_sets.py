"""Nested families of partial programs, beside one solver model a node and level as the authors' z3 code builds it.

Peer: the authors' code gives all levels at once to z3 (`pip install z3-solver`); here its design is given to HiGHS: a Boolean
for each node and level, and each implication added by a Python loop. z3 itself is not run.

Run: python benchmarks/program_sets.py [PATH]      writes program_sets.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, sparse

from theodolite.predictions.program_sets import PartialProgram, ProgramTree, parse_program, prune, pruning_gap

LEVELS, HOLES, TREES = 20, 3, 12
SIZES = (10, 26, 60)


def random_tree(nodes: int, rng: np.random.Generator) -> ProgramTree:
    """A random recursive tree, as nested lists."""
    parents = [-1, *(int(rng.integers(0, i)) for i in range(1, nodes))]

    def written(i: int) -> str:
        return "[" + ", ".join(written(child) for child in range(i + 1, nodes) if parents[child] == i) + "]"

    return parse_program(written(0))


def one_by_one(tree: ProgramTree, costs: np.ndarray, budgets: np.ndarray) -> int:
    """Nodes kept by the design of the authors' code, its constraints added one by one; the solver is HiGHS."""
    n = len(tree)
    rows, columns, values, limits = list[int](), list[int](), list[float](), list[float]()

    def add(terms: list[tuple[int, float]], limit: float) -> None:
        for column, value in terms:
            rows.append(len(limits))
            columns.append(column)
            values.append(value)
        limits.append(limit)

    for level, budget in enumerate(budgets.tolist()):
        first, holes = level * n, [(level * n, -1.0)]
        for child, parent in enumerate(tree.parents.tolist()):
            if parent >= 0:
                add([(first + child, 1.0), (first + parent, -1.0)], 0.0)
                holes += [(first + parent, 1.0), (first + child, -1.0)]
        add([(first + v, float(costs[v])) for v in range(n)], budget)
        add(holes, HOLES - 1)
        if level + 1 < len(budgets):
            for v in range(n):
                add([(first + n + v, 1.0), (first + v, -1.0)], 0.0)
    matrix = sparse.csr_matrix((values, (rows, columns)), shape=(len(limits), n * len(budgets)))
    everything: Any = optimize.LinearConstraint(matrix, -np.inf, np.array(limits))  # type: ignore[arg-type]
    count = n * len(budgets)
    solved = optimize.milp(
        -np.ones(count), integrality=np.ones(count), bounds=optimize.Bounds(0, 1), constraints=everything
    )
    return round(-solved.fun)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of one call, and what it gives."""
    began = time.perf_counter()
    found = call()
    return 1000 * (time.perf_counter() - began), found


def kept(family: list[PartialProgram]) -> int:
    """Nodes kept over all levels."""
    return sum(int(one.kept.sum()) for one in family)


def on_trees(nodes: int) -> dict[str, Any]:
    """Milliseconds and nodes kept of each way, taken in turns on the same trees."""
    rng = np.random.default_rng(0)
    grid = np.linspace(1e-5, 1 - 1e-5, LEVELS)
    times: dict[str, list[float]] = {"auto": [], "nested-dp": [], "design of the peer": []}
    sizes: dict[str, int] = dict.fromkeys(times, 0)
    gaps = []
    for _ in range(TREES if nodes < 60 else 3):
        tree = random_tree(nodes, rng)
        costs = rng.lognormal(-3, 2, nodes)
        for solver in ("auto", "nested-dp"):
            taken, family = timed(lambda s=solver, t=tree, c=costs: prune(t, c, grid, HOLES, s))
            times[solver].append(taken)
            sizes[solver] += kept(family)
        gaps.append(pruning_gap(tree, costs, family, grid, HOLES))
        taken, best = timed(lambda t=tree, c=costs: one_by_one(t, c, -np.log(grid)))
        times["design of the peer"].append(taken)
        sizes["design of the peer"] += best
    mean = {name: statistics.mean(values) for name, values in times.items()}
    peer = mean["design of the peer"]
    return {
        "ratio of seconds, auto / design of the peer": round(mean["auto"] / peer, 4),
        "ratio of seconds, nested-dp / design of the peer": round(mean["nested-dp"] / peer, 4),
        "milliseconds a tree": {name: round(value, 1) for name, value in mean.items()},
        "nodes kept, of the peer's": {
            name: round(sizes[name] / sizes["design of the peer"], 4) for name in ("auto", "nested-dp")
        },
        "gap of nested-dp to levels by themselves, mean": round(statistics.mean(gaps), 4),
    }


def main() -> None:
    result = {
        "name": f"nested families at {LEVELS} levels, at most {HOLES} holes, one core",
        "peer": "the encoding of the authors' code (a Boolean a node and level) solved by HiGHS; z3 itself is not run",
        "trees": {f"{nodes} nodes": on_trees(nodes) for nodes in SIZES},
        "command": "OMP_NUM_THREADS=1 python benchmarks/program_sets.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
