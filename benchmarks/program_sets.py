"""Nested families of partial programs beside the authors' encoding, and label sets beside MAPIE; 300 SQL programs calibrated.

Peers: the authors' code gives all levels at once to z3. Its design is given to HiGHS (a Boolean for each node and level, each
implication added by a Python loop), and to z3 itself where it is installed (`pip install z3-solver`). MAPIE
(`pip install mapie`) makes label sets, not partial programs; a label is a program of one node, and there the two agree where
both may make the same number of errors on the calibration rows. They differ in how many that is: MAPIE's sets hold the right
label on average over calibrations, ours with confidence 1 - delta.

Run: python benchmarks/program_sets.py [PATH]      writes program_sets.json beside this file, or PATH
"""

import gzip
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, sparse
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from theodolite.core.sources import find_data
from theodolite.predictions.program_sets import (
    Generation,
    PartialProgram,
    ProgramSetCalibrator,
    ProgramTree,
    TokenLogprob,
    choose_level,
    k_errors,
    parse_program,
    prune,
    pruning_gap,
)

LEVELS, HOLES, TREES = 20, 3, 12
SIZES = (10, 26, 60)
Z3_TREES, Z3_MILLISECONDS = 3, 30_000
PROGRAMS = 300
EPSILON, DELTA, CALIBRATIONS = 0.1, 0.1, 200


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
    """Milliseconds of processor time of one call, and what it gives."""
    began = time.process_time()
    found = call()
    return 1000 * (time.process_time() - began), found


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


def module(name: str) -> Any:
    """A peer, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def beside_z3(nodes: int) -> dict[str, Any] | str:
    """Seconds and nodes kept of z3 on the authors' encoding, and of ours, on the same trees."""
    z3 = module("z3")
    if z3 is None:
        return "not installed here: pip install z3-solver"
    rng, grid = np.random.default_rng(0), np.linspace(1e-5, 1 - 1e-5, LEVELS)
    theirs, ours, found, kept_by_us, stopped = list[float](), list[float](), 0, 0, 0
    for _ in range(Z3_TREES):
        tree, costs = random_tree(nodes, rng), rng.lognormal(-3, 2, nodes)
        taken, family = timed(lambda t=tree, c=costs: prune(t, c, grid, HOLES, "milp"))
        ours.append(taken)
        kept_by_us += kept(family)
        taken, answer = timed(lambda t=tree, c=costs: with_z3(z3, t, c, -np.log(grid)))
        theirs.append(taken)
        found += answer[0]
        stopped += answer[1] != z3.sat
    return {
        "ratio of seconds, milp / z3": round(sum(ours) / sum(theirs), 5),
        "z3, seconds a tree": round(sum(theirs) / Z3_TREES / 1000, 2),
        f"z3 stopped at {Z3_MILLISECONDS // 1000} seconds": f"{stopped} of {Z3_TREES} trees",
        "nodes kept, milp / z3": round(kept_by_us / found, 4) if found else "z3 found no family",
    }


def with_z3(z3: Any, tree: ProgramTree, costs: np.ndarray, budgets: np.ndarray) -> tuple[int, Any]:
    """Nodes kept by the authors' encoding in z3's optimiser, stopped after half a minute, and how it ended."""
    solver, n = z3.Optimize(), len(tree)
    solver.set("timeout", Z3_MILLISECONDS)
    names = [[z3.Bool(f"a{level}_{v}") for v in range(n)] for level in range(len(budgets))]
    for level, (row, budget) in enumerate(zip(names, budgets.tolist(), strict=True)):
        holes = [z3.If(row[0], 0, 1)]
        for child, parent in enumerate(tree.parents.tolist()):
            if parent >= 0:
                solver.add(z3.Implies(row[child], row[parent]))
                holes.append(z3.If(z3.And(row[parent], z3.Not(row[child])), 1, 0))
        solver.add(z3.Sum(holes) <= HOLES)
        solver.add(z3.Sum([z3.If(row[v], float(costs[v]), 0.0) for v in range(n)]) <= budget)
        if level:
            for before, after in zip(names[level - 1], row, strict=True):
                solver.add(z3.Implies(after, before))
    solver.maximize(z3.Sum([z3.If(one, 1, 0) for row in names for one in row]))
    answer = solver.check()
    if answer == z3.unsat:
        return 0, answer
    model = solver.model()
    return sum(z3.is_true(model.evaluate(one)) for row in names for one in row), answer


def of_sql(file: str) -> dict[str, Any] | str:
    """Processor seconds to calibrate on queries of a text2sql-data file, tokens and their surprise drawn."""
    path = find_data(f"text2sql/{file}")
    if path is None:
        return f"needs text2sql/{file} in the folder THEODOLITE_DATA"
    data = path.read_bytes()
    read = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    queries = [(query["sql"][0], len(query["sentences"])) for query in read]
    rng = np.random.default_rng(0)
    share = np.array([count for _, count in queries], dtype=np.float64)
    chosen = [queries[i][0] for i in rng.choice(len(queries), PROGRAMS, p=share / share.sum())]
    generations = []
    for sql in chosen:
        pieces = re.findall(r"\s*\S+", sql)
        starts = np.cumsum([0, *map(len, pieces[:-1])]).tolist()
        surprise = rng.lognormal(-4, 2, len(pieces)).tolist()
        tokens = [TokenLogprob(*one) for one in zip(pieces, [-s for s in surprise], starts, strict=True)]
        generations.append(Generation("".join(pieces), tuple(tokens)))
    sizes = [len(parse_program(sql, "sql")) for sql in chosen]
    out: dict[str, Any] = {"nodes of a program, median and largest": [int(np.median(sizes)), max(sizes)]}
    for solver, workers in (("auto", 1), ("auto", 2), ("nested-dp", 1)):
        began = time.perf_counter()
        calibrator = ProgramSetCalibrator(
            HOLES, solver=solver, language="sql", executor=None if workers == 1 else workers
        )
        calibrator.fit(generations, chosen, EPSILON, DELTA)
        over = "" if workers == 1 else f" over {workers} processes"
        out[f"{solver}{over}, seconds for {PROGRAMS} programs, 25 levels (bar 60)"] = round(
            time.perf_counter() - began, 1
        )
    return out


def label_sets() -> dict[str, Any] | str:
    """Digits: sets {label: 1 - p <= q}, q by MAPIE and by the calibration of program sets.

    Calibration rows are drawn with replacement, so that the error over all rows is the true one.
    """
    mapie = module("mapie.classification")
    if mapie is None:
        return "not installed here: pip install mapie"
    rows: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(rows.target))
    X, y = rows.data[order] / 16, rows.target[order]
    model = LogisticRegression(max_iter=500).fit(X[:100], y[:100])
    X, y = X[100:], y[100:]
    scores = 1 - model.predict_proba(X)
    of_truth = scores[np.arange(len(y)), y]
    n, rng = 500, np.random.default_rng(1)
    k = k_errors(n, EPSILON, DELTA)

    def ours(calibration: np.ndarray) -> np.ndarray:
        levels = np.sort(of_truth[calibration])
        return scores <= levels[choose_level(of_truth[calibration][:, None] > levels, EPSILON, DELTA)]

    def theirs(calibration: np.ndarray, confidence: float) -> np.ndarray:
        made = mapie.SplitConformalClassifier(model, confidence_level=confidence, conformity_score="lac", prefit=True)
        return np.asarray(made.conformalize(X[calibration], y[calibration]).predict_set(X)[1])[:, :, 0]

    agree, seconds = list[float](), {"ours": 0.0, "MAPIE": 0.0}
    misses: dict[str, list[float]] = {"ours": [], "MAPIE at the same epsilon": []}
    sizes: dict[str, list[float]] = {"ours": [], "MAPIE at the same epsilon": []}
    for _ in range(CALIBRATIONS):
        calibration = rng.integers(0, len(y), n)
        taken, own = timed(lambda c=calibration: ours(c))
        seconds["ours"] += taken
        # the level at which MAPIE leaves out as many calibration rows as ours may
        taken, same = timed(lambda c=calibration: theirs(c, 1 - (k + 1) / (n + 1) - 1e-9))
        seconds["MAPIE"] += taken
        agree.append(float((own == same).all(axis=1).mean()))
        usual = theirs(calibration, 1 - EPSILON)
        for name, sets in (("ours", own), ("MAPIE at the same epsilon", usual)):
            misses[name].append(1 - float(sets[np.arange(len(y)), y].mean()))
            sizes[name].append(float(sets.sum(axis=1).mean()))
    return {
        "rows with the same set, with the same number of errors allowed": round(float(np.mean(agree)), 6),
        f"share of {CALIBRATIONS} calibrations with a true error above {EPSILON}": {
            name: round(float((np.array(values) > EPSILON).mean()), 3) for name, values in misses.items()
        },
        "mean true error": {name: round(float(np.mean(values)), 4) for name, values in misses.items()},
        "labels in a set, mean": {name: round(float(np.mean(values)), 3) for name, values in sizes.items()},
        "ratio of seconds, ours / MAPIE, one calibration and its sets": round(seconds["ours"] / seconds["MAPIE"], 3),
        "data": f"digits, {n} rows drawn from {len(y):,} to calibrate on; epsilon {EPSILON}, delta {DELTA}",
    }


def main() -> None:
    result = {
        "name": f"nested families at {LEVELS} levels, at most {HOLES} holes; processor time, one core",
        "peer": "the encoding of the authors' code (a Boolean a node and level), by HiGHS and by z3; MAPIE for label sets",
        "trees": {f"{nodes} nodes": on_trees(nodes) for nodes in SIZES},
        "z3, trees of 10 nodes": beside_z3(10),
        "SQL programs": {file: of_sql(file) for file in ("geography.json", "atis.json.gz")},
        "label sets": label_sets(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/program_sets.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
