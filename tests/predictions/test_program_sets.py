import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from typer.testing import CliRunner

from language_server import protocol_server
from theodolite.cli import app
from theodolite.core.errors import InputError, MissingExtraError
from theodolite.language import connect
from theodolite.language.model import LogprobsUnavailable
from theodolite.predictions import program_sets as ps
from theodolite.predictions.program_sets import (
    CalibrationTooSmall,
    Generation,
    PartialProgram,
    ProgramSetCalibrator,
    ProgramSyntaxError,
    ReferenceParseError,
    TokenAlignmentError,
    TokenLogprob,
    choose_level,
    contains,
    k_errors,
    node_costs,
    parse_program,
    prune,
    pruning_gap,
)
from theodolite.predictions.program_sets.returns import return_lines
from tiny_language_model import save_tiny_model

QUICK = settings(max_examples=40, deadline=None)
SQL = 'SELECT a.x, MAX( b.y ) FROM t AS a , u AS b WHERE a.id = b.id AND a.name = "Bob  B" ORDER BY 1 LIMIT 3 ;'
PYTHON = [
    "return f(a, b)", "x = {**rest, 'k': [1, 2]}", "return self.é + 'ü  ü' if (a) else b[1:, ...]", " a, b",
    "for i in range(3):\n    print(i, end='')  # done\nelse:\n    pass\n", "lambda x, /, y=1, *, z: [q for q in x if q]",
    "f'{a!r} and {b:>{w}}' + g", "@d(1)\ndef f(a: int = 2) -> str:\n    '''doc\n    more'''\n    return a\r\n",
    "    x = 1\n    return x\n", "match a:\n    case [1, *_] if b:\n        raise E from e\n",
]  # fmt: skip


def tokens_of(code, seed=0):
    """The code cut at random places, each piece with a random log-probability."""
    rng = np.random.default_rng(seed)
    cuts = [0, *np.sort(rng.choice(np.arange(1, len(code)), min(len(code) - 1, len(code) // 3 + 1), False)), len(code)]
    return tuple(TokenLogprob(code[a:b], -float(rng.exponential()), int(a)) for a, b in itertools.pairwise(cuts))


def generation(code, seed=0):
    return Generation(code, tokens_of(code, seed))


def own_texts(tree):
    return ["".join(tree.code[a:b] for a, b in node.own_spans) for node in tree.nodes]


def random_tree(n, rng):
    """A random tree of n nodes, as nested lists."""
    parents = [-1, *(int(rng.integers(0, i)) for i in range(1, n))]

    def written(i):
        return "[" + ", ".join(written(child) for child in range(n) if parents[child] == i) + "]"

    return parse_program(written(0))


def closed_subsets(parents):
    """All ways to keep nodes with their parents, as rows."""
    n = len(parents)
    rows = np.array(list(itertools.product([False, True], repeat=n)))
    return rows[(rows[:, 1:] <= rows[:, parents[1:]]).all(axis=1)]


def hole_counts(kept, parents):
    return (kept[:, parents[1:]] & ~kept[:, 1:]).sum(axis=1) + ~kept[:, 0]


# ---- the optimum, by brute force


@pytest.mark.parametrize("seed", range(60))
def test_one_level_is_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(int(rng.integers(1, 11)), rng)
    costs = rng.exponential(0.5, len(tree))
    most = int(rng.integers(1, 4)) if seed % 5 else None
    subsets = closed_subsets(tree.parents)
    if most is not None:
        subsets = subsets[hole_counts(subsets, tree.parents) <= most]
    tau = math.exp(-float(rng.uniform(0.02, 1) * costs.sum()))
    best = subsets.sum(axis=1)[subsets @ costs <= -math.log(tau)].max()
    for solver in ("dp", "milp", "nested-dp", "auto"):
        (found,) = prune(tree, costs, [tau], most, solver)
        assert found.kept.sum() == best, solver
        assert (subsets == found.kept).all(axis=1).any()


@pytest.mark.parametrize("seed", range(8))
def test_the_joint_programme_is_the_best_nested_family(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(int(rng.integers(3, 7)), rng)
    costs, grid, most = rng.exponential(0.6, len(tree)), [0.15, 0.4, 0.7], int(rng.integers(1, 3))
    subsets = closed_subsets(tree.parents)
    subsets = subsets[hole_counts(subsets, tree.parents) <= most]
    cost, size = subsets @ costs, subsets.sum(axis=1)
    best = 0
    for a, b, c in itertools.product(range(len(subsets)), repeat=3):
        inside = (subsets[c] <= subsets[b]).all() and (subsets[b] <= subsets[a]).all()
        if inside and all(cost[i] <= -math.log(tau) for i, tau in zip((a, b, c), grid, strict=True)):
            best = max(best, size[a] + size[b] + size[c])
    assert sum(one.kept.sum() for one in prune(tree, costs, grid, most, "milp")) == best


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), most=st.sampled_from([1, 2, 3, 4, None]))
def test_families_are_within_bounds(seed, n, most):
    rng = np.random.default_rng(seed)
    tree, grid = random_tree(n, rng), np.linspace(0.02, 0.98, 8)
    costs = rng.exponential(rng.choice([0.01, 0.2, 2.0]), n) * (rng.random(n) < 0.8)
    sums = {}
    for solver in ("milp", "auto", "nested-dp", "dp", "greedy", "abstain"):
        family = prune(tree, costs, grid, most, solver)
        kept = np.array([one.kept for one in family])
        assert (kept[:, 1:] <= kept[:, tree.parents[1:]]).all()
        for one, tau in zip(family, grid, strict=True):
            assert one.kept_cost <= -math.log(tau)
            assert np.isclose(one.kept_cost, costs[one.kept].sum())
            assert most is None or len(one.holes) <= most
            assert one.text.count("??") == len(one.holes)
        if solver != "dp":
            assert (kept[1:] <= kept[:-1]).all(), solver
        sums[solver] = kept.sum()
    assert sums["dp"] >= sums["milp"] >= max(sums["nested-dp"], sums["greedy"], sums["abstain"])
    assert sums["milp"] >= sums["auto"] >= sums["nested-dp"]
    assert sums["auto"] >= 0.97 * sums["milp"] or n * len(grid) > 1500
    assert all(one.kept.all() for one in prune(tree, costs, grid, most, "none"))


def test_levels_by_themselves_need_not_be_nested():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(40):
        tree = random_tree(12, rng)
        costs, grid = rng.exponential(0.4, 12), np.linspace(0.05, 0.95, 20)
        alone, joint = (prune(tree, costs, grid, 2, solver) for solver in ("dp", "nested-dp"))
        crossed = any((b.kept > a.kept).any() for a, b in itertools.pairwise(alone))
        found += crossed
        assert crossed or [one.text for one in alone] == [one.text for one in joint]
    assert found > 0


def test_the_greedy_baseline_by_hand():
    tree = parse_program("f(a, g(b))")  # Call: f, a, Call: g, b
    costs = np.array([0.1, 0.2, 0.9, 0.3, 0.4, 0.5])

    def text(budget, most):
        return prune(tree, costs, [math.exp(-budget)], most, "greedy")[0].text

    assert text(2.45, 2) == "f(a, g(b))"
    assert text(2.3, 2) == "f(??, g(b))"  # the costliest leaf, a
    assert text(1.4, 2) == "f(??, g(??))"  # then b; no hole is left
    assert text(0.9, 2) == "f(??, ??)"  # the costlier parent of a removed node: g(b)
    assert text(0.2, 2) == "??"  # f would be a third hole, so the root
    assert text(0.5, 3) == "f(??, ??)"  # a hole to spare and only leaves of what is kept: g's are gone one by one
    assert text(1.4, 1) == "??"
    assert [one.text for one in prune(tree, costs, [0.05, 0.5], 2, "abstain")] == ["f(a, g(b))", "??"]


def test_the_gap_is_the_share_that_nesting_costs():
    rng = np.random.default_rng(3)
    tree, grid = random_tree(25, rng), np.linspace(1e-5, 1 - 1e-5, 20)
    costs = rng.exponential(0.2, 25)
    own = sum(one.kept.sum() for one in prune(tree, costs, grid, 3, "dp"))
    family = prune(tree, costs, grid, 3, "greedy")
    assert pruning_gap(tree, costs, family, grid, 3) == 1 - sum(one.kept.sum() for one in family) / own
    assert 0 <= pruning_gap(tree, costs, prune(tree, costs, grid), grid) < 0.05


def test_many_levels_of_a_large_tree():
    rng = np.random.default_rng(0)
    tree, grid = random_tree(120, rng), np.linspace(1e-5, 1 - 1e-5, 100)
    costs = rng.exponential(0.02, 120)
    family = prune(tree, costs, grid)  # too large for the joint programme
    assert all((b.kept <= a.kept).all() for a, b in itertools.pairwise(family))
    assert pruning_gap(tree, costs, family, grid) < 0.1


def test_wrong_arguments_of_prune():
    tree = parse_program("f(a)")
    for grid in ([], [0.5, 0.5], [0.6, 0.2], [0.0, 0.5], [0.5, 1.0], [math.nan]):
        with pytest.raises(InputError, match="grid"):
            prune(tree, [0, 0, 0], grid)
    for most in (0, -1):
        with pytest.raises(ValueError, match="max_holes"):
            prune(tree, [0, 0, 0], [0.5], most)
    for costs in ([0, 0], [0, -1, 0], [0, math.nan, 0], [0, math.inf, 0]):
        with pytest.raises(InputError, match="cost"):
            prune(tree, costs, [0.5])
    with pytest.raises(InputError, match="solver"):
        prune(tree, [0, 0, 0], [0.5], 3, "z3")


# ---- trees


@pytest.mark.parametrize("code", PYTHON)
def test_every_character_of_python_is_one_nodes_own(code):
    tree = parse_program(code)
    covered = sorted(span for node in tree.nodes for span in node.own_spans)
    assert "".join(code[a:b] for a, b in covered) == code
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
    assert (tree.parents[1:] < np.arange(1, len(tree))).all()
    for number, node in enumerate(tree.nodes):
        assert all(tree.nodes[child].parent == number for child in node.children)
        assert all(node.span[0] <= tree.nodes[child].span[0] for child in node.children)


@pytest.mark.parametrize(
    "code", [SQL, "select 1 ; select count(distinct é) from t", "SELECT * FROM a LEFT JOIN b USING (x)"]
)
def test_every_character_of_sql_is_one_nodes_own(code):
    tree = parse_program(code, "sql")
    covered = sorted(span for node in tree.nodes for span in node.own_spans)
    assert "".join(code[a:b] for a, b in covered) == code


def test_own_texts_of_python():
    tree = parse_program("return self.é + 'ü  ü' if (a) else b")
    found = {node.type: text.split() for node, text in zip(tree.nodes, own_texts(tree), strict=True)}
    assert found["Return"] == ["return"]
    assert found["IfExp"] == ["if", "()", "else"]
    assert found["BinOp"] == ["+"]
    assert found["Attribute"] == [".é"]
    assert found["Constant"] == ["'ü", "ü'"]
    assert {node.type for node in tree.nodes} == {"Return", "IfExp", "BinOp", "Attribute", "Constant", "Name"}


def test_nodes_without_a_place_are_their_parents():
    tree = parse_program("lambda x, *, y=1: [q + 1 for q in x if q]")
    assert [node.type for node in tree.nodes] == [
        "Lambda", "arg", "arg", "Constant", "ListComp", "BinOp", "Name", "Constant", "Name", "Name", "Name",
    ]  # fmt: skip
    assert "Load" not in {node.type for node in tree.nodes}


def test_own_texts_of_sql():
    tree = parse_program(SQL, "sql")
    texts = [(node.type, text.strip()) for node, text in zip(tree.nodes, own_texts(tree), strict=True)]
    for expected in (
        ("Max", "MAX(  )"), ("Where", "WHERE"), ("And", "AND"), ("EQ", "="), ("Limit", "LIMIT"), ("Literal", "3"),
        ("Table", ""), ("TableAlias", "AS a"), ("Join", ","), ("Column", '"Bob  B"'), ("From", "FROM"),
    ):  # fmt: skip
        assert expected in texts
    assert texts[0] == ("Select", "SELECT ,       ;")


@pytest.mark.parametrize("text", ["", "  \n", "f(", "x = ", "a\x00b", "    x\ny", "# only a comment"])
def test_what_is_not_python(text):
    with pytest.raises(ProgramSyntaxError, match="Python"):
        parse_program(text)


@pytest.mark.parametrize("text", ["", "  ", "select (", "SELECT FROM WHERE ((", "select 'open"])
def test_what_is_not_sql(text):
    with pytest.raises(ProgramSyntaxError, match="SQL"):
        parse_program(text, "sql")


def test_deep_and_odd_texts():
    deep = "+".join(["a"] * 600)
    assert len(parse_program(deep)) == 1199
    assert len(parse_program(r"'\d' + x")) == 3  # an escape that the parser warns of
    with pytest.raises(InputError, match="language"):
        parse_program("x", "rust")


def test_sql_names_its_extra_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    with pytest.raises(MissingExtraError, match=r"theodolite\[code\]"):
        parse_program("select 1", "sql")


# ---- costs


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("code", [*PYTHON, SQL])
def test_costs_add_up_to_the_programs_surprise(code, seed):
    tree = parse_program(code, "sql" if code == SQL else "python")
    made = generation(code, seed)
    costs = node_costs(tree, made.tokens)
    assert (costs >= 0).all()
    assert abs(costs.sum() + made.logprob) < 1e-9 * len(made.tokens)
    assert abs(made.logprob - sum(token.logprob for token in made.tokens)) < 1e-9


def test_costs_by_hand():
    tree = parse_program("f(a, g)")  # Call, f, a, g
    tokens = [
        TokenLogprob("f(", -1.0, 0), TokenLogprob("a, ", -0.6, 2), TokenLogprob(" ", -9.0, 5), TokenLogprob("g)", -4.0, 5),
    ]  # fmt: skip
    with pytest.raises(TokenAlignmentError) as caught:
        node_costs(tree, tokens)
    assert caught.value.position == 5
    tokens = [
        TokenLogprob("f(", -1.0, 0),
        TokenLogprob("a,", -0.6, 2),
        TokenLogprob(" ", -9.0, 4),
        TokenLogprob("g)\n", -40.0, 5),
    ]
    assert np.allclose(node_costs(tree, tokens), [0.5 + 0.3 + 20, 0.5, 0.3, 20 + 9])
    assert np.allclose(node_costs(tree, tokens, "official"), [10, 1, 0.6, 10])  # 41.6 and 49 before they are clipped


def test_tokens_beyond_the_code_cost_nothing():
    tree = parse_program("a + b")
    tokens = [TokenLogprob("a +", -1.0, 0), TokenLogprob(" b", -2.0, 3)]
    costs = node_costs(tree, tokens)
    more = [TokenLogprob("\n", -5.0, 5), TokenLogprob("x = 3", -7.0, 6)]
    assert np.array_equal(node_costs(tree, tokens + more), costs)
    assert Generation("a + b", (*tokens, *more)).logprob == -3.0


def test_white_space_at_the_end_and_pieces_of_a_character():
    tree = parse_program("é + b ")
    tokens = [
        TokenLogprob("", -1.0, 0),
        TokenLogprob("é", -2.0, 0),
        TokenLogprob(" + b", -3.0, 1),
        TokenLogprob(" ", -4.0, 5),
    ]
    assert np.allclose(node_costs(tree, tokens), [1.5 + 4, 3, 1.5])


def test_strings_with_spaces_are_found_where_they_stand():
    code = "f('a  b', (x) )"
    tokens = [
        TokenLogprob(piece, -float(i), start)
        for i, (piece, start) in enumerate([("f(", 0), ("'a  ", 2), ("b'", 6), (", (x) )", 8)])
    ]
    costs = node_costs(parse_program(code), tokens)
    assert np.allclose(costs, [3 * 4 / 5, 0, 3, 3 / 5])


@pytest.mark.parametrize(
    ("tokens", "position"),
    [([("f(", 0), ("b)", 2)], 2), ([("f(", 0), ("a", 2)], 3), ([("f(", 0), ("a)", 3)], 2), ([], 0), ([(" f(a)", 0)], 0)],
)  # fmt: skip
def test_tokens_that_are_not_the_text(tokens, position):
    with pytest.raises(TokenAlignmentError) as caught:
        node_costs(parse_program("f(a)"), [TokenLogprob(text, -1.0, start) for text, start in tokens])
    assert caught.value.position == position


def test_log_probabilities_that_are_none():
    tree = parse_program("a")
    with pytest.raises(LogprobsUnavailable, match="'a'"):
        node_costs(tree, [TokenLogprob("a", None, 0)])
    for wrong in (math.nan, -math.inf, 0.5):
        with pytest.raises(InputError, match="finite number, at most 0"):
            node_costs(tree, [TokenLogprob("a", wrong, 0)])
    assert node_costs(tree, [TokenLogprob("a", 1e-7, 0)]).tolist() == [0.0]  # what arithmetic makes of log 1
    with pytest.raises(InputError, match="cost must be"):
        node_costs(tree, [TokenLogprob("a", -1.0, 0)], "mean")


# ---- membership


def partial(code, removed, language="python"):
    """The program without the subtrees whose own text is one of ``removed``."""
    tree = parse_program(code, language)
    kept = np.ones(len(tree), dtype=bool)
    for number, text in enumerate(own_texts(tree)):
        parent = tree.parents[number]
        kept[number] = text.strip() not in removed and (parent < 0 or kept[parent])
    return PartialProgram(tree, kept, 0.0)


HOLD = [
    ("x+1", [], ["x + 1", "(x + 1)", "x  +\\\n1"], ["x - 1", "x + 2", "1 + x", "x"]),
    ("f(a, 'b')", [], ['f( a, "b", )', "f(a,'b')"], ["f(a, 'B')", "f(a, b)", "f(a)", "g(a, 'b')"]),
    ("f(a, b)", ["a"], ["f(g(1), b)", "f(c, b)"], ["f(b)", "f(a, c, b)", "f(a, c)", "f(*a, b, c)"]),
    ("f(a, k=1)", ["k="], ["f(a, m=2)"], ["f(a)", "f(a, b)"]),
    ("a < b <= c", ["b"], ["a < 3 <= c"], ["a < b < c", "a < b"]),
    ("{**r, 'k': 1}", ["1"], ["{**r, 'k': 2}"], ["{'r': r, 'k': 1}", "{**r, 'j': 1}"]),
    ("x[1:]", ["1"], ["x[2:]"], ["x[:1]", "x[:]", "x[1:2]"]),
    ("return f'{a}'", [], ["return f'{a}'", 'return f"{a}"'], ["return f'{b}'", "return 'a'"]),
    ("a\nb", ["a"], ["c\nb", "f(x); b"], ["b", "a\nb\nc"]),
    ("[x for x in y]", ["y"], ["[x for x in z]"], ["[x for x in y if x]", "[x async for x in y]", "{x for x in y}"]),
]


@pytest.mark.parametrize(("code", "removed", "inside", "outside"), HOLD)
def test_completions_of_python(code, removed, inside, outside):
    made = partial(code, removed)
    for other in inside:
        assert contains(made, parse_program(other)), other
    for other in outside:
        assert not contains(made, parse_program(other)), other


def test_completions_of_sql():
    made = partial(SQL, ["3"], "sql")
    same = SQL.replace("SELECT", "select").replace("MAX( b.y )", "max(B.Y)").replace(" ,", ",").replace(" ;", "")
    assert contains(made, parse_program(same, "sql"))
    assert contains(made, parse_program(same.replace("3", "7"), "sql"))
    for change in (("Bob  B", "bob  B"), ("MAX(", "MIN("), ("AND", "OR"), ("b.y", "b.z"), ("LIMIT 3", "")):
        assert not contains(made, parse_program(SQL.replace(*change), "sql")), change
    text = partial("SELECT a FROM t WHERE b = 'Xy'", [], "sql")
    assert contains(text, parse_program("select A from T where B='Xy'", "sql"))
    assert not contains(text, parse_program("select a from t where b = 'xy'", "sql"))


def test_a_hole_for_any_number():
    made = partial("f(a, b, k=1)", ["a"])
    for code, fits in (("f(b, k=1)", True), ("f(a, c, b, k=1)", True), ("f(b, a, k=1)", False), ("f(b)", False)):
        assert contains(made, parse_program(code), hole_arity="any") == fits
    assert contains(partial("f(a, b)", ["a", "b"]), parse_program("f()"), hole_arity="any")
    single = partial("f(a)[b]", ["b"])  # not a list: exactly one
    assert contains(single, parse_program("f(a)[1:2]"), hole_arity="any")
    assert not contains(single, parse_program("f(a)"), hole_arity="any")
    assert not contains(partial("[a, b, c]", ["b"]), parse_program("[a]"), hole_arity="any")


def test_the_official_notion_is_looser():
    made = partial("f(a, b, c)", ["c"])
    for code, fits in (("f(b, a)", True), ("f(a, b, x, y)", True), ("f(a, x)", False), ("g(a, b)", False)):
        assert contains(made, parse_program(code), "official") == fits
        if fits:
            assert not contains(made, parse_program(code))


def test_a_hole_at_the_root_holds_everything():
    tree = parse_program("f(a)")
    made = PartialProgram(tree, np.zeros(3, dtype=bool), 0.0)
    assert (made.text, made.holes, made.removed_fraction) == ("??", (0,), 1.0)
    assert contains(made, parse_program("x = 1\ny = 2"))
    with pytest.raises(InputError, match="match"):
        contains(made, tree, "equal")
    with pytest.raises(InputError, match="hole_arity"):
        contains(made, tree, hole_arity="two")
    with pytest.raises(InputError, match="sql"):
        contains(partial("f(a)", []), parse_program("select 1", "sql"))


@QUICK
@given(seed=st.integers(0, 10_000), a=st.sampled_from(PYTHON), b=st.sampled_from(PYTHON))
def test_a_program_completes_itself_and_removing_more_never_excludes(seed, a, b):
    rng = np.random.default_rng(seed)
    tree, other = parse_program(a), parse_program(b)
    family = prune(tree, rng.exponential(0.3, len(tree)), [0.05, 0.3, 0.6, 0.9], 3)
    for match, arity in (("structural", "one"), ("structural", "any"), ("official", "one")):
        assert all(contains(one, tree, match, hole_arity=arity) for one in family)
        held = [contains(one, other, match, hole_arity=arity) for one in family]
        assert held == sorted(held)
        if match == "structural" and arity == "one":
            strict = held
        else:
            assert all(loose >= exact for loose, exact in zip(held, strict, strict=True))


def test_holes_are_counted_once_however_much_they_remove():
    made = partial("f(a, g(b, c), d)", ["(, )", "d"])
    made = PartialProgram(made.tree, np.array([True, True, True, False, False, False, False, False]), 0.0)
    assert made.text == "f(a, ??, ??)"
    assert len(made.holes) == 2
    assert made.removed_fraction == 5 / 8


# ---- calibration


@pytest.mark.parametrize(
    ("n", "epsilon", "delta", "k"),
    [(100, 0.05, 0.1, 1), (100, 0.1, 0.1, 5), (100, 0.2, 0.1, 14), (500, 0.1, 0.1, 40), (22, 0.1, 0.1, 0), (100, 0.1, 0.01, 3),
     (100, 0.05, 0.01, 0)],
)  # fmt: skip
def test_allowed_errors(n, epsilon, delta, k):
    assert k_errors(n, epsilon, delta) == k
    assert stats.binom.cdf(k, n, epsilon) <= delta < stats.binom.cdf(k + 1, n, epsilon)


def test_too_few_pairs_is_an_error_and_not_zero_errors():
    with pytest.raises(CalibrationTooSmall) as caught:
        k_errors(21, 0.1, 0.1)
    assert (caught.value.n, caught.value.needed) == (21, 22)
    assert "22" in str(caught.value)
    for epsilon, delta in ((0, 0.1), (1, 0.1), (0.1, 0), (0.1, 1), (-1, 0.1)):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            k_errors(100, epsilon, delta)


def test_the_level_is_the_end_of_the_good_ones():
    def level(*counts):
        return choose_level(np.arange(100)[:, None] < np.array(counts), 0.1, 0.1)  # k = 5

    assert level(9, 6, 5, 0) == 2
    assert level(5, 4, 3, 0) == 0
    assert level(90, 80, 70, 6) == 4
    assert level(5, 6, 5, 0) == 2  # not nested: a good level before a bad one does not count


def pairs(n, seed, wrong=0.3):
    """Generations of f(a, b), and references that differ in an argument now and then; the model knows which."""
    rng = np.random.default_rng(seed)
    made, references = [], []
    for _ in range(n):
        doubt, other = rng.random() < wrong, rng.random() < 0.5
        code = "f(a, b)"
        tokens = [("f(", -0.001), ("a", -0.001), (", ", -0.001), ("b", -0.7 if doubt else -0.001), (")", -0.001)]
        start, kept = 0, []
        for text, logprob in tokens:
            kept.append(TokenLogprob(text, logprob, start))
            start += len(text)
        made.append(Generation(code, tuple(kept)))
        references.append("f( a,c )" if doubt and other else "f( a,b )")
    return made, references


def test_calibration_puts_the_hole_where_the_doubt_is():
    made, references = pairs(120, 0)
    calibrator = ProgramSetCalibrator().fit(made, references, epsilon=0.05, delta=0.1)
    assert calibrator.n_ == 120
    assert calibrator.k_ == k_errors(120, 0.05, 0.1)
    assert calibrator.errors_[0] > calibrator.k_
    assert (np.diff(calibrator.errors_) <= 0).all()
    grid = np.linspace(1e-5, 1 - 1e-5, 25)
    assert calibrator.tau_ == grid[np.flatnonzero(calibrator.errors_ <= calibrator.k_)[0]]
    texts = {calibrator.predict(one).text for one in made}
    assert texts == {"f(a, b)", "f(a, ??)"}
    held = calibrator.score(*pairs(100, 1))
    assert held.coverage == 1.0
    assert held.n == 100
    assert 0 < held.removed_fraction < 0.15
    assert 0.1 < held.holes < 0.5
    assert held.ci95[0] < held.ci95[1] == 1.0
    loose = ProgramSetCalibrator().fit(made, references, epsilon=0.4)
    assert loose.score(*pairs(100, 1)).removed_fraction == 0


@pytest.mark.parametrize("solver", ["auto", "milp", "dp", "nested-dp", "greedy", "abstain", "none"])
def test_every_family_is_calibrated_with_its_own_level(solver):
    made, references = pairs(90, 3)
    calibrator = ProgramSetCalibrator(solver=solver, max_holes=1).fit(made, references, epsilon=0.05)
    score = calibrator.score(made, references)
    assert score.coverage >= 1 - calibrator.k_ / 90
    if solver == "none":  # the point prediction is wrong too often: only the hole at the root keeps the promise
        assert (calibrator.tau_, score.removed_fraction) == (1.0, 1.0)


def test_sets_are_the_same_over_two_processes():
    made, references = pairs(60, 3)

    def own_match(partial_program, reference):  # stays here: a local function cannot be sent to a process
        return partial_program.text == reference or "??" in partial_program.text

    here, there = (
        ProgramSetCalibrator(max_holes=2, match=own_match, executor=executor).fit(made, references, epsilon=0.2)
        for executor in (None, 2)
    )
    assert (here.tau_, here.errors_.tolist()) == (there.tau_, there.errors_.tolist())
    for alone, spread in zip(here.families(made[:20]), there.families(made[:20]), strict=True):
        assert [one.kept.tolist() for one in alone] == [one.kept.tolist() for one in spread]
    assert here.score(made, references) == there.score(made, references)


def test_where_no_level_keeps_the_promise_everything_is_a_hole():
    made = [generation("f(a)", i) for i in range(50)]
    calibrator = ProgramSetCalibrator(tau_grid=[0.001]).fit(made, ["g(b)"] * 50, 0.1, 0.1)
    assert calibrator.tau_ == 1.0
    assert calibrator.predict(made[0]).text == "??"
    assert calibrator.score(made, ["anything"] * 50).coverage == 1.0


def test_generations_that_do_not_parse():
    made, references = pairs(60, 0, wrong=0.0)
    broken = Generation("f(", (TokenLogprob("f(", -0.1, 0),))
    calibrator = ProgramSetCalibrator().fit([*made, broken], [*references, "g(1)"])
    assert calibrator.unparsable_ == 1
    assert calibrator.predict(broken).text == "??"
    score = calibrator.score([*made, broken, Generation("", ())], [*references, "g(1)", "y"])
    assert (score.unparsable, score.coverage) == (2, 1.0)
    strict = ProgramSetCalibrator(on_unparsable="raise")
    with pytest.raises(ProgramSyntaxError):
        strict.fit([*made, broken], [*references, "g(1)"])


def test_errors_of_the_calibrator():
    made, references = pairs(40, 0)
    with pytest.raises(ReferenceParseError) as caught:
        ProgramSetCalibrator().fit(made, [*references[:7], "f(", *references[8:]])
    assert caught.value.index == 7
    with pytest.raises(CalibrationTooSmall):
        ProgramSetCalibrator().fit(made[:5], references[:5])
    with pytest.raises(CalibrationTooSmall):
        ProgramSetCalibrator().fit([], [])
    with pytest.raises(InputError, match="one reference a generation"):
        ProgramSetCalibrator().fit(made, references[:-1])
    for epsilon, delta in ((0.0, 0.1), (0.1, 1.0)):
        with pytest.raises(ValueError, match="strictly between"):
            ProgramSetCalibrator().fit(made, references, epsilon, delta)
    with pytest.raises(ValueError, match="max_holes"):
        ProgramSetCalibrator(0).fit(made, references)
    with pytest.raises(ValueError, match="grid"):
        ProgramSetCalibrator(tau_grid=[0.5, 0.1]).fit(made, references)
    with pytest.raises(InputError, match="on_unparsable"):
        ProgramSetCalibrator(on_unparsable="skip").fit(made, references)
    with pytest.raises(InputError, match="match"):
        ProgramSetCalibrator(match="equal").fit(made, references)
    with pytest.raises(NotFittedError, match="fit first"):
        ProgramSetCalibrator().predict(made[0])
    with pytest.raises(InputError, match="at least one pair"):
        ProgramSetCalibrator().fit(made, references).score([], [])
    with pytest.raises(TokenAlignmentError):
        ProgramSetCalibrator().fit([Generation("f(a)", made[0].tokens)] * 40, references)


def test_parameters_are_kept_as_they_are_given():
    made = ProgramSetCalibrator(2, [0.1, 0.2], "dp", "official", "official", language="sql", dialect="sqlite")
    assert clone(made).get_params() == made.get_params()
    assert made.get_params()["dialect"] == "sqlite"


def test_a_users_own_notion_of_right():
    made, _ = pairs(60, 0)
    asked = []

    def first_argument(partial_program, reference):
        asked.append(reference)
        return "??" in partial_program.text or reference != "fails"

    calibrator = ProgramSetCalibrator(match=first_argument).fit(made, ["not ( a program"] * 60)
    assert calibrator.tau_ == np.linspace(1e-5, 1 - 1e-5, 25)[0]
    assert calibrator.score(made, ["fails"] * 60).coverage < 1
    assert "not ( a program" in asked


def test_calibration_is_valid_where_the_truth_is_drawn_from_the_costs():
    """P(error) = 1 - exp(-kept cost) in closed form: true error rates of 150 calibrations."""
    rng = np.random.default_rng(0)
    grid, epsilon, delta, n = np.linspace(1e-5, 1 - 1e-5, 25), 0.1, 0.1, 100
    trees = [random_tree(8, rng) for _ in range(80)]
    costs = [rng.exponential(0.1, 8) for _ in trees]
    families = [prune(tree, cost, grid, 2) for tree, cost in zip(trees, costs, strict=True)]
    kept = np.array([[one.kept for one in family] for family in families])
    for says in (1.0, 2.0):  # the second model is sure of twice as much as it knows
        truth = 1 - np.exp(-says * np.array([[one.kept_cost for one in family] for family in families])).T
        true_errors = []
        for _ in range(150):
            chosen = rng.integers(0, len(trees), n)
            differs = rng.random((n, 8)) < 1 - np.exp(-says * np.array(costs)[chosen])
            errors = (kept[chosen] & differs[:, None]).any(axis=2)
            level = choose_level(errors, epsilon, delta)
            true_errors.append(truth[level].mean() if level < len(grid) else 0.0)
        bad = int((np.array(true_errors) > epsilon).sum())
        assert stats.binomtest(bad, 150, delta, alternative="greater").pvalue > 0.001
        assert np.mean(true_errors) > 0.02


# ---- real servers and models


def test_tokens_of_a_server_are_the_text():
    with protocol_server() as server:
        model = connect(server.url, "m", cache=False)
        (made,) = ps.generate(model, ["b) f(a,"], stop=";", max_tokens=5)
        body = server.seen[0][1]
    assert made.text == "f(a, b)"
    assert [token.text for token in made.tokens] == ["f(a,", " b)"]
    assert made.logprob == -1.0
    assert (body["logprobs"], body["stop"], body["max_tokens"], body["temperature"]) == (True, [";"], 5, 0.0)
    costs = node_costs(parse_program(made.text), made.tokens)
    assert np.allclose(costs, [0.5 / 2 + 0.25, 0.125, 0.125, 0.25])


def test_a_server_without_log_probabilities_is_told():
    with protocol_server("no logprobs") as server:
        model = connect(server.url, "m", cache=False, retries=0)
        with pytest.raises(LogprobsUnavailable, match="log-probabilities"):
            ps.generate(model, ["a b"])


def test_a_local_model(tmp_path):
    model = connect(model=save_tiny_model(tmp_path), cache=False)
    made = ps.generate(model, ["the cat", "a dog"], stop="then", max_tokens=6)
    assert all(one.tokens and all(token.logprob <= 0 for token in one.tokens) for one in made)
    for one in made:
        assert "".join(token.text for token in one.tokens).startswith(one.text)
        assert "then" not in one.text


def test_python_is_parsed_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').write('x')"
    calibrator = ProgramSetCalibrator().fit([generation(code, i) for i in range(30)], [code] * 30)
    assert calibrator.tau_ < 1
    assert not marker.exists()


def test_importing_the_module_imports_no_parser_of_sql():
    code = "import sys, theodolite.predictions.program_sets; print('sqlglot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- the command


def command(*arguments):
    done = CliRunner().invoke(app, ["run", "pac-program-sets", *map(str, arguments), "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def written_pairs(path, n=60, **change):
    made, references = pairs(n, 0)
    rows = [
        {
            "text": one.text,
            "tokens": [{"token": t.text, "logprob": t.logprob} for t in one.tokens],
            "reference": reference,
        }
        | change
        for one, reference in zip(made, references, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_calibrates_what_a_server_wrote(tmp_path):
    file, out = written_pairs(tmp_path / "calib.jsonl", 100), tmp_path / "sets.jsonl"
    told = command(file, "--epsilon", 0.1, "--delta", 0.1, "--out", out)
    assert told["pairs"] == {"calibration": 70, "test": 30}
    assert told["test"]["coverage"] >= 0.8
    assert told["allowed_errors"] == k_errors(70, 0.1, 0.1)
    assert len(out.read_text().splitlines()) == 30
    assert {json.loads(line)["partial"] for line in out.read_text().splitlines()} <= {"f(a, b)", "f(a, ??)", "??"}


def test_the_command_asks_an_endpoint(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "b) f(a,", "reference": "f(a, b)"}\n' * 40)
    with protocol_server() as server:
        told = command(file, "--endpoint", server.url, "--model", "m")
    assert told["point_prediction_coverage"] == 1.0
    assert told["examples"] == ["f(a, b)"] * 3


def test_the_command_names_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="either PAIRS"):
        command()
    with pytest.raises(InputError, match="--test-share"):
        command(written_pairs(tmp_path / "a.jsonl"), "--test-share", 1)
    with pytest.raises(CalibrationTooSmall, match="at least 22"):
        command(written_pairs(tmp_path / "few.jsonl", 20))
    with pytest.raises(InputError, match="gave an empty list"):
        command(written_pairs(tmp_path / "b.jsonl", tokens=[]))
    with pytest.raises(InputError, match="must be texts"):
        command(written_pairs(tmp_path / "c.jsonl", reference=3))
    with pytest.raises(InputError, match="holds no function"):
        command("--sources", tmp_path)
    for name, text, words in (
        ("d", "{", "not JSON"), ("e", '{"prompt": "x"}', "prompt"), ("f", "", "no pairs"), ("g", "[1]", "none of them"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words):
            command(tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        command(tmp_path / "missing.jsonl")


def test_return_lines_of_real_code(tmp_path):
    (tmp_path / "a.py").write_text(
        "def f(x):\n    y = 1\n    return g(x, 'é')\n\ndef h(x):\n    return x + 1  # more\n"
    )
    (tmp_path / "b.py").write_text("def broken(:\n")
    (tmp_path / "c.py").write_text("def k():\n    return\n\ndef m():\n    return (1,\n        2)\n")
    (found,) = return_lines(tmp_path)
    assert (found.prompt, found.rest, found.file) == ("def h(x):\n    return", " x + 1", "a.py")
    library = return_lines(count=8, seed=3)
    assert len({one.file for one in library}) == 8
    assert all(one.prompt.endswith("return") and parse_program(one.rest) for one in library)
    assert return_lines(count=8, seed=3) == library
