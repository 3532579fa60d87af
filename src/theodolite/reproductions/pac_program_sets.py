"""Claims of Khakhar, Mell and Bastani, 2023, arXiv:2302.08703, on text to SQL, Python's standard library and a known truth."""

__all__ = ["claims"]

import ast
import functools
import itertools
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from theodolite.core.estimate import Estimate, bootstrap, mean_of_runs, proportion
from theodolite.core.sources import find_data
from theodolite.predictions.program_sets import (
    PartialProgram,
    ProgramSyntaxError,
    ProgramTree,
    choose_level,
    contains,
    node_costs,
    parse_program,
    prune,
)
from theodolite.reproductions.claim import Claim, Comparator, Scale
from theodolite.reproductions.pac_program_sets_copy import TextToSQL, train_text_to_sql

_FILE, _ATIS = "text2sql/geography.json", "text2sql/atis.json.gz"
_ATIS_LONGEST = 48  # pieces of a query: the short ones, about as many to train on as GeoQuery has
_GRID = np.linspace(1e-5, 1 - 1e-5, 25)
_DELTA = 0.1
_SPLITS = 10
_HOLES = (1, 2, 3, 4)
_PAC = (
    "the right program is in the set for all but a share epsilon of prompts, with confidence 1 - delta",
    "a theorem (epsilon, delta in its figures)",
    "share of calibrations with a true error > 0.1 at most 0.135, for a model that tells the truth and one that says half "
    "its doubt; mean true error >= 0.02; the second one's sets at tau = 1 - epsilon have a true error > 0.1",
)
_EXACT = (
    "the optimisation is exact: one level by integer programming, by dynamic programming and by trying all subtrees",
    "none given (z3 there)",
    "0 of the trees differ",
)
_NESTED = (
    "the sets of one programme for all levels are nested, within their budgets and with at most m holes",
    "required by its constraints",
    "0 violations; the joint sum at most that of the levels' own optima, which are not nested for at least 1 tree",
)
_COMPACT = (
    "the optimised sets are smaller than those of the greedy baseline",
    "as its figures show",
    "removed nodes, optimised / greedy: at most 1 for each m, at most 0.92 at m = 4",
)
_MORE = (
    "with more holes less of the program is removed (epsilon = 0.2)",
    "as its figures show, m = 1 to 4",
    "removed share does not rise with m by more than 0.02, and m = 4 has at most 0.85 of m = 1",
)
_COVERED = (
    "sets that were calibrated on real mistakes hold the right query on held-out questions",
    "as its figures show",
    "coverage >= 1 - epsilon - 2 standard errors in at least 9 of 10 splits, for epsilon = 0.1, 0.2 and 0.3",
)
_IDENTITY = (
    "the nodes' costs add up to -log p of the generated program",
    "none given",
    "absolute error below 1e-9 a token, for every generation",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; a smaller model of text to SQL when quick, and what is missing where the data are not there."""
    yield _guarantee(scale, seed)
    yield _exact(scale, seed)
    yield _nested(scale, seed)
    yield _compact(scale, seed)
    full = {"width": 128, "layers": 2}
    on_geoquery, on_atis = (_MORE, _COVERED, _IDENTITY), tuple(_of_atis(words) for words in (_MORE, _COVERED))
    path, larger = find_data(_FILE), find_data(_ATIS)
    if path is None:
        yield from _not_measured(on_geoquery, f"needs {_FILE} in the folder THEODOLITE_DATA")
    else:
        options = {**full, "epochs": 60} if scale is Scale.FULL else {"width": 64, "layers": 1, "epochs": 16}
        yield from _on_questions(path, "GeoQuery", options, on_geoquery, seed)
    if larger is None:
        yield from _not_measured(on_atis, f"needs {_ATIS} in the folder THEODOLITE_DATA")
    elif scale is not Scale.FULL:
        yield from _not_measured(on_atis, "measured by the full reproduction only: training on ATIS takes minutes")
    else:
        options = {**full, "epochs": 30, "longest": _ATIS_LONGEST}
        yield from _on_questions(larger, f"ATIS (queries of at most {_ATIS_LONGEST} pieces)", options, on_atis, seed)


def _of_atis(words: tuple[str, str, str]) -> tuple[str, str, str]:
    return f"{words[0]}, ATIS", words[1], words[2]


def _not_measured(claims: tuple[tuple[str, str, str], ...], why: str) -> Iterator[Claim]:
    for words in claims:
        yield Claim(*words[:2], None, words[2], None, scaled=why)


# ---- trees and a generator whose truth is known


@functools.cache
def _library_trees(count: int, seed: int) -> tuple[ProgramTree, ...]:
    """Functions of 10 to 60 nodes, at most ten of a file."""
    rng = np.random.default_rng(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    trees: list[ProgramTree] = []
    for place in rng.permutation(len(files)).tolist():
        code = files[place].read_text(encoding="utf-8")
        lines = code.splitlines()
        functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
        own = [parse_program("\n".join(lines[node.lineno - 1 : node.end_lineno])) for node in functions]
        trees += [tree for tree in own if 10 <= len(tree) <= 60][:10]
        if len(trees) >= count:
            break
    return tuple(trees[:count])


def _surprises(trees: tuple[ProgramTree, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Costs as real models have them: most nodes hardly in doubt, a few very much."""
    return [rng.lognormal(-3, 2, len(tree)) for tree in trees]


def _random_tree(nodes: int, rng: np.random.Generator) -> ProgramTree:
    """A random recursive tree, as nested lists."""
    parents = [-1, *(int(rng.integers(0, i)) for i in range(1, nodes))]

    def written(i: int) -> str:
        return "[" + ", ".join(written(child) for child in range(i + 1, nodes) if parents[child] == i) + "]"

    return parse_program(written(0))


def _guarantee(scale: Scale, seed: int) -> Claim:
    """The true program differs at each node independently with probability 1 - exp(-cost), so errors have a closed form."""
    epsilon, n, runs = 0.1, 200, 300
    rng = np.random.default_rng(seed)
    trees = _library_trees(300 if scale is Scale.FULL else 60, seed)
    costs = _surprises(trees, rng)
    honest, found = _true_errors(trees, costs, 1.0, n, runs, epsilon, rng)
    sure, wrong = _true_errors(trees, costs, 0.5, n, runs, epsilon, rng)
    bad = [int((errors > epsilon).sum()) for errors in (found, wrong)]
    ours = proportion(max(bad), runs, unit="of the calibrations, the worse of the two models")
    holds = ours.value <= 0.135 and min(found.mean(), wrong.mean()) >= 0.02 and sure > epsilon
    return Claim(
        *_PAC[:2], ours, _PAC[2], bool(holds),
        Comparator("true error of the second model's sets at tau = 1 - epsilon, uncalibrated", sure),
        f"{len(trees)} functions of the standard library with log-normal costs, any number of holes, {n} pairs, {runs} "
        f"calibrations; shares {bad[0] / runs:.3f} and {bad[1] / runs:.3f}, mean true errors {found.mean():.3f} and "
        f"{wrong.mean():.3f}; the honest model's uncalibrated error is {honest:.3f}",
    )  # fmt: skip


def _true_errors(
    trees: tuple[ProgramTree, ...], costs: list[np.ndarray], told: float, n: int, runs: int, epsilon: float,
    rng: np.random.Generator,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """True errors of the sets of a model that tells ``told`` of each cost: at tau = 1 - epsilon, and calibrated (runs,)."""
    widest = max(map(len, trees))
    differs, kept = np.zeros((len(trees), widest)), np.zeros((len(trees), len(_GRID) + 1, widest), dtype=bool)
    nominal = int(np.searchsorted(_GRID, 1 - epsilon))
    grid = np.insert(_GRID, nominal, 1 - epsilon)
    for i, (tree, cost) in enumerate(zip(trees, costs, strict=True)):
        differs[i, : len(tree)] = 1 - np.exp(-cost)
        for level, one in enumerate(prune(tree, told * cost, grid, None, "nested-dp")):
            kept[i, level, : len(tree)] = one.kept
    surprise = -np.log1p(-differs)
    truth = (1 - np.exp(-(kept * surprise[:, None]).sum(axis=2))).mean(axis=0)
    found = []
    for _ in range(runs):
        rows = rng.integers(0, len(trees), n)
        errors = np.asarray((kept[rows] & (rng.random((n, widest)) < differs[rows])[:, None]).any(axis=2))
        level = choose_level(errors, epsilon, _DELTA)
        found.append(truth[level] if level < len(grid) else 0.0)
    return float(truth[nominal]), np.array(found)


def _exact(scale: Scale, seed: int) -> Claim:
    trees = 200 if scale is Scale.FULL else 60
    rng = np.random.default_rng(seed)
    differ, greedy = 0, 0
    for _ in range(trees):
        tree = _random_tree(int(rng.integers(2, 13 if scale is Scale.FULL else 11)), rng)
        costs, most = rng.exponential(0.5, len(tree)), int(rng.integers(1, 4))
        tau = math.exp(-float(rng.uniform(0.05, 1) * costs.sum()))
        best = _brute_force(tree, costs, -math.log(tau), most)
        sizes = {s: int(prune(tree, costs, [tau], most, s)[0].kept.sum()) for s in ("milp", "dp", "greedy")}
        differ += not best == sizes["milp"] == sizes["dp"]
        greedy += best != sizes["greedy"]
    return Claim(
        *_EXACT[:2], Estimate.exact(differ, "trees that differ"), _EXACT[2], differ == 0,
        Comparator("greedy: trees where it keeps fewer nodes", float(greedy)),
        f"{trees} random trees of at most {12 if scale is Scale.FULL else 10} nodes, m at most 3, one random level each",
    )  # fmt: skip


def _brute_force(tree: ProgramTree, costs: np.ndarray, budget: float, most: int) -> int:
    parents = tree.parents[1:]
    rows = np.array(list(itertools.product([False, True], repeat=len(tree))))
    rows = rows[(rows[:, 1:] <= rows[:, parents]).all(axis=1)]
    holes = (rows[:, parents] & ~rows[:, 1:]).sum(axis=1) + ~rows[:, 0]
    return int(rows[(holes <= most) & (rows @ costs <= budget)].sum(axis=1).max())


def _nested(scale: Scale, seed: int) -> Claim:
    trees = 200 if scale is Scale.FULL else 40
    rng = np.random.default_rng(seed)
    grid = np.linspace(1e-5, 1 - 1e-5, 20)
    violations = crossed = larger = 0
    for _ in range(trees):
        tree = _random_tree(int(rng.integers(2, 13)), rng)
        costs, most = rng.exponential(0.5, len(tree)), int(rng.integers(1, 4))
        joint, alone = (prune(tree, costs, grid, most, solver) for solver in ("milp", "dp"))
        violations += not _is_nested(joint)
        violations += any(len(one.holes) > most for one in joint)
        violations += any(one.kept_cost > -math.log(tau) for one, tau in zip(joint, grid, strict=True))
        larger += int(sum(one.kept.sum() for one in joint) > sum(one.kept.sum() for one in alone))
        crossed += not _is_nested(alone)
    return Claim(
        *_NESTED[:2], Estimate.exact(violations + larger, "violations"), _NESTED[2],
        violations == 0 and larger == 0 and crossed >= 1,
        Comparator("trees whose levels' own optima are not nested", float(crossed)),
        f"{trees} random trees of at most 12 nodes, 20 levels",
    )  # fmt: skip


def _is_nested(family: list[PartialProgram]) -> bool:
    return all((b.kept <= a.kept).all() for a, b in itertools.pairwise(family))


def _compact(scale: Scale, seed: int) -> Claim:
    trees = _library_trees(300 if scale is Scale.FULL else 60, seed)
    rng = np.random.default_rng(seed)
    costs = _surprises(trees, rng)
    removed = {most: _removed(trees, costs, most) for most in _HOLES}
    ratios = {most: float(rows[:, 0].sum() / rows[:, 1].sum()) for most, rows in removed.items()}
    ours = bootstrap(
        removed[4], lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum()), seed=seed, unit="of greedy's, m = 4"
    )
    light = _removed(trees, [rng.exponential(0.15, len(tree)) for tree in trees], 4).sum(axis=0)
    return Claim(
        *_COMPACT[:2], ours, _COMPACT[2], bool(max(ratios.values()) <= 1 and ratios[4] <= 0.92),
        Comparator("greedy, removed nodes a tree and level at m = 4", float(removed[4][:, 1].mean() / 3)),
        f"{len(trees)} functions of the standard library (10 to 60 nodes) with random costs, log-normal (-3, 2), tau = 0.3, "
        f"0.6, 0.9; by m: {', '.join(f'{most}: {ratio:.3f}' for most, ratio in ratios.items())}; with exponential costs (mean "
        f"0.15) {light[0] / light[1]:.3f} at m = 4: the gain hangs on the costs' shape",
    )  # fmt: skip


def _removed(trees: tuple[ProgramTree, ...], costs: list[np.ndarray], most: int) -> np.ndarray:
    """Removed nodes of each tree (trees, 2) over three levels: optimised and greedy."""
    return np.array(
        [
            [
                sum(int((~one.kept).sum()) for one in prune(tree, cost, [0.3, 0.6, 0.9], most, solver))
                for solver in ("auto", "greedy")
            ]
            for tree, cost in zip(trees, costs, strict=True)
        ]
    )


# ---- text to SQL


@dataclass(frozen=True, eq=False)
class _Sets:
    """errors (n, levels): whether each set misses the right query. removed (n, levels): share of the nodes."""

    errors: np.ndarray
    removed: np.ndarray

    def on_splits(self, epsilon: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Coverage and removed share on the other half, for each random half that is calibrated on."""
        found = []
        for split in range(_SPLITS):
            order = np.random.default_rng([seed, split]).permutation(len(self.errors))
            half, rest = np.array_split(order, 2)
            level = choose_level(self.errors[half], epsilon, _DELTA)
            if level == len(_GRID):
                found.append((1.0, 1.0))
            else:
                found.append((1 - self.errors[rest, level].mean(), self.removed[rest, level].mean()))
        coverage, removed = np.array(found).T
        return coverage, removed


def _on_questions(
    path: Path, name: str, options: dict[str, int], words: tuple[tuple[str, str, str], ...], seed: int
) -> Iterator[Claim]:
    """The claims of ``words`` (more holes, coverage and, where it is asked for, the identity) on one set of questions."""
    made = train_text_to_sql(path, **options, seed=seed)
    parsed = _parse(made)
    chosen = [*((most, solver) for most in _HOLES for solver in ("nested-dp", "greedy")), (1, "abstain"), (1, "none")]
    sets = {(most, solver): _sets(parsed, most, solver) for most, solver in chosen}
    accuracy = 1 - float(sets[1, "none"].errors[:, 0].mean())
    setting = (
        f"{name} in place of Spider: {made.trained_on} questions to train a copying Transformer of {made.parameters:,} "
        f"parameters on, {len(made.references)} others, of which a random half calibrates and the rest tests, {_SPLITS} times; "
        f"the model is right on {accuracy:.1%}"
    )
    yield _more_holes(words[0], sets, setting, seed)
    yield _covered(words[1], sets[3, "nested-dp"], accuracy, setting, seed)
    if len(words) > 2:
        yield _identity(made, parsed, setting)


@dataclass(frozen=True, eq=False)
class _Parsed:
    """Generations that parse (None for the others) with their costs, and the right queries."""

    trees: list[ProgramTree | None]
    costs: list[np.ndarray]
    references: list[ProgramTree]


def _parse(made: TextToSQL) -> _Parsed:
    trees: list[ProgramTree | None] = []
    costs = []
    for one in made.generations:
        try:
            tree = parse_program(one.text, "sql")
        except ProgramSyntaxError:
            tree = None
        trees.append(tree)
        costs.append(np.empty(0) if tree is None else node_costs(tree, one.tokens))
    return _Parsed(trees, costs, [parse_program(sql, "sql") for sql in made.references])


def _sets(parsed: _Parsed, most: int, solver: str) -> _Sets:
    """Sets at every level; a generation that does not parse is one hole, and "none" counts it as an error."""
    errors = np.full((len(parsed.trees), len(_GRID)), solver == "none")
    removed = np.full(errors.shape, float(solver != "none"))
    for i, (tree, costs, right) in enumerate(zip(parsed.trees, parsed.costs, parsed.references, strict=True)):
        if tree is not None:
            family = prune(tree, costs, _GRID, most, solver)
            errors[i] = [not contains(one, right) for one in family]
            removed[i] = [one.removed_fraction for one in family]
    return _Sets(errors, removed)


def _more_holes(words: tuple[str, str, str], sets: dict[tuple[int, str], _Sets], setting: str, seed: int) -> Claim:
    removed = {key: one.on_splits(0.2, seed)[1] for key, one in sets.items()}
    by_holes = [float(removed[most, "nested-dp"].mean()) for most in _HOLES]
    greedy = [float(removed[most, "greedy"].mean()) for most in _HOLES]
    ours = mean_of_runs(removed[4, "nested-dp"], unit="of the nodes removed at m = 4", within=(0, 1))
    rises = max(b - a for a, b in itertools.pairwise(by_holes))
    return Claim(
        *words[:2], ours, words[2], bool(rises <= 0.02 and by_holes[3] <= 0.85 * by_holes[0]),
        Comparator("abstain: removed share", float(removed[1, "abstain"].mean())),
        f"{setting}; removed share at m = 1 to 4: " + ", ".join(f"{value:.3f}" for value in by_holes)
        + "; greedy: " + ", ".join(f"{value:.3f}" for value in greedy) + "; splits share their questions",
    )  # fmt: skip


def _covered(words: tuple[str, str, str], sets: _Sets, accuracy: float, setting: str, seed: int) -> Claim:
    rest = len(sets.errors) // 2
    good, found = [], []
    for epsilon in (0.1, 0.2, 0.3):
        coverage, removed = sets.on_splits(epsilon, seed)
        bar = 1 - epsilon - 2 * math.sqrt(epsilon * (1 - epsilon) / rest)
        good.append(int((coverage >= bar).sum()))
        found.append(f"epsilon {epsilon}: {coverage.mean():.3f} with {removed.mean():.0%} removed")
    return Claim(
        *words[:2], proportion(min(good), _SPLITS, unit="of the splits, the worst epsilon"), words[2],
        min(good) >= 9, Comparator("point prediction: coverage", accuracy),
        f"{setting}; m = 3; mean coverage at {'; '.join(found)}; splits share their questions",
    )  # fmt: skip


def _identity(made: TextToSQL, parsed: _Parsed, setting: str) -> Claim:
    worst, official = 0.0, []
    for one, tree, costs in zip(made.generations, parsed.trees, parsed.costs, strict=True):
        if tree is not None:
            told = sum(token.logprob or 0.0 for token in one.tokens)
            worst = max(worst, abs(float(costs.sum()) + told) / len(one.tokens))
            official.append(float(node_costs(tree, one.tokens, "official").sum()) + told)
    unparsed = len(made.generations) - len(official)
    return Claim(
        *_IDENTITY[:2], Estimate.exact(worst, "nats a token, the worst generation"), _IDENTITY[2], worst < 1e-9,
        Comparator("the authors' cost: nats too many or too few, mean", float(np.mean(official))),
        f"{setting}; {len(official)} generations parse, {unparsed} do not",
    )  # fmt: skip
