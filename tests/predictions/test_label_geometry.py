import importlib
import itertools
import warnings

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.predictions import label_geometry as lg
from theodolite.predictions.label_geometry import (
    FrechetHead,
    FrechetPredictor,
    LabelMetric,
    adaptation_report,
    frechet_mean,
    is_locus_cover,
    is_pairwise_decomposable,
    locus,
    locus_curve,
    minimum_locus_cover,
    nearest_observed,
    next_class,
    random_tree_metric,
    tree_locus,
)
from theodolite.predictions.label_geometry import metric as metric_module
from theodolite.predictions.label_geometry import predictor as predictor_module
from theodolite.predictions.label_geometry.locus import pair_loci
from theodolite.predictions.label_geometry.predictor import softmax
from theodolite.predictions.label_geometry.rooted import RootedTree
from theodolite.predictions.label_geometry.trees import as_metric

locus_module = importlib.import_module("theodolite.predictions.label_geometry.locus")  # its function has the same name
QUICK = settings(max_examples=40, deadline=None)


def line(n):
    return LabelMetric.from_function(lambda a, b: abs(a - b), range(n))


def complete(n):
    return LabelMetric.from_graph(nx.complete_graph(n))


def random_tree(n, seed):
    return nx.random_labeled_tree(n, seed=seed)


def long_tree(n, seed):
    """A tree with edges of different lengths."""
    rng = np.random.default_rng(seed)
    return [(i, int(rng.integers(0, i)), float(rng.uniform(0.2, 3))) for i in range(1, n)]


def probabilities(n, k, seed):
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.4), size=n)


def on_paths(tree, observed):
    """Nodes on paths between observed ones, by walking every path."""
    found = set(observed)
    for a, b in itertools.combinations(observed, 2):
        found |= set(nx.shortest_path(tree, a, b))
    return found


def means_over_a_grid(metric, observed, steps):
    """Labels that are the only mean, or one of several, for some weights of a fine grid on the simplex."""
    squared = metric.squared(observed)
    k = len(observed)
    grid = [c for c in itertools.product(range(steps + 1), repeat=k - 1) if sum(c) <= steps]
    weights = np.array([(*c, steps - sum(c)) for c in grid]) / steps
    values = weights @ squared
    least = values <= values.min(axis=1, keepdims=True) + 1e-9
    alone = least[least.sum(axis=1) == 1]
    return least.any(axis=0), alone.any(axis=0)


# ---- the locus, exactly


GRID = nx.grid_2d_graph(4, 5)
CORNERS = [(0, 0), (3, 4), (0, 4), (3, 0)]


@pytest.mark.parametrize(("corners", "reachable", "identified"), [(2, 20, 2), (3, 20, 8), (4, 20, 20)])
def test_grid(corners, reachable, identified):
    found = locus(LabelMetric.from_graph(GRID), CORNERS[:corners])
    assert (int(found.reachable.sum()), int(found.identified.sum())) == (reachable, identified)


def test_cycle_of_eight():
    metric = LabelMetric.from_graph(nx.cycle_graph(8))
    two = locus(metric, [0, 4])
    assert two.reachable.all()
    assert not two.identified.all()
    assert two.identified[[0, 4]].all()
    assert locus(metric, [0, 3, 6]).identified.all()
    assert is_locus_cover(metric, [0, 4])
    assert not is_locus_cover(metric, [0, 4], identify=True)
    assert is_locus_cover(metric, [0, 3, 6], identify=True)


@pytest.mark.parametrize("observed", [[0], [1, 4], [0, 2, 5], [0, 1, 2, 3, 4, 5]])
def test_complete_graph_reaches_only_what_is_observed(observed):
    found = locus(complete(6), observed)
    assert np.flatnonzero(found.reachable).tolist() == observed
    assert np.flatnonzero(found.identified).tolist() == observed


def test_margin_is_the_programs_value():
    # of labels 0, 1, 2 on a line, 1 is ahead by most at equal weights: scores 2, 1, 2
    assert np.allclose(locus(line(3), [0, 2]).margin, [1.0, 1.0, 1.0])
    far = locus(line(5), [0, 2])
    # label 3 falls behind least with all weight on 2, where it has 1 and 2 has 0
    assert np.allclose(far.margin[3:], [-1.0, -4.0])
    assert far.reachable.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("seed", range(25))
def test_on_trees_the_identified_labels_are_those_on_paths(seed):
    tree = random_tree(10, seed)
    rng = np.random.default_rng(seed)
    observed = rng.choice(10, int(rng.integers(1, 5)), replace=False).tolist()
    metric = LabelMetric.from_graph(tree)
    expected = on_paths(tree, observed)
    found = locus(metric, observed)
    assert {metric.labels[i] for i in np.flatnonzero(found.identified)} == expected
    assert {metric.labels[i] for i in np.flatnonzero(found.reachable)} == expected
    assert tree_locus(tree, observed) == expected
    assert tree_locus(metric, observed) == expected
    assert is_pairwise_decomposable(metric, observed)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_locus_is_what_a_fine_grid_of_weights_finds_on_trees(k, seed):
    metric = LabelMetric.from_graph(random_tree(9, seed))
    observed = np.random.default_rng(seed).choice(9, k, replace=False).tolist()
    found = locus(metric, observed)
    some, alone = means_over_a_grid(metric, observed, 120 if k == 2 else 60)
    assert (found.reachable == some).all()
    assert (found.identified == alone).all()


@QUICK
@given(n=st.integers(4, 8), k=st.integers(2, 3), seed=st.integers(0, 10_000))
def test_no_weights_on_a_grid_find_a_label_that_the_program_excludes(n, k, seed):
    rng = np.random.default_rng(seed)
    metric = LabelMetric.from_embeddings(rng.normal(size=(n, 2)), range(n))
    observed = rng.choice(n, k, replace=False).tolist()
    found = locus(metric, observed)
    some, alone = means_over_a_grid(metric, observed, 40)
    assert (some <= found.reachable).all()
    assert (alone <= found.identified).all()
    assert found.identified[metric.index(observed)].all()
    assert (found.identified <= found.reachable).all()


@QUICK
@given(seed=st.integers(0, 10_000), shape=st.sampled_from(["graph", "plane", "tree leaves"]))
def test_the_locus_of_a_pair_by_its_hull_is_the_one_by_programs(seed, shape):
    rng = np.random.default_rng(seed)
    if shape == "graph":
        metric = LabelMetric.from_graph(nx.connected_watts_strogatz_graph(12, 4, 0.3, seed=seed))
    elif shape == "plane":
        metric = LabelMetric.from_embeddings(rng.normal(size=(12, 2)), range(12))
    else:
        tree = random_tree(25, seed)
        metric = LabelMetric.from_graph(tree).restrict([v for v in tree if tree.degree(v) == 1])
    squared = metric.squared(metric.labels)
    first = int(rng.integers(len(metric)))
    found = pair_loci(squared[first], squared)
    for other in rng.choice(len(metric), 3, replace=False):
        expected = locus(metric, [metric.labels[first], metric.labels[int(other)]]).reachable
        assert (found[other] == expected).all()


def test_a_locus_may_need_three():
    # in the plane the middle of a triangle is reached by its three corners together only, as its sides have middles too
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [2.0, 3.5]])
    sides = (corners + np.roll(corners, 1, axis=0)) / 2
    metric = LabelMetric.from_embeddings(np.vstack([corners, sides, corners.mean(axis=0)]), "abcxyzm")
    assert locus(metric, "abc").identified.all()
    assert not is_pairwise_decomposable(metric, "abc")
    assert locus(metric, "ab").reachable.tolist() == [True, True, False, False, True, False, False]


def whole_program(metric, observed, y):
    """The margin with a row for every other label at once."""
    d = metric.squared(observed)
    gains = (np.delete(d, y, axis=1).T - d[:, y]) / d.max()  # the solver's tolerances are absolute
    k = len(observed)
    solved = linprog(
        np.r_[np.zeros(k), -1.0], A_ub=np.c_[-gains, np.ones(len(gains))], b_ub=np.zeros(len(gains)),
        A_eq=np.r_[np.ones(k), 0.0][None], b_eq=[1.0], bounds=[(0, None)] * k + [(None, None)],
    )  # fmt: skip
    return -solved.fun * d.max()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 6), d=st.integers(1, 4), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_margins_are_those_of_the_whole_program(seed, k, d, scale):
    rng = np.random.default_rng(seed)
    metric = LabelMetric.from_embeddings(rng.normal(size=(40, d)) * scale, range(40))
    observed = rng.choice(40, k, replace=False).tolist()
    margin = locus(metric, observed).margin
    for y in rng.choice(40, 5, replace=False):
        assert np.isclose(margin[y], whole_program(metric, observed, y), rtol=1e-6, atol=1e-5 * scale**2)


# ---- what to observe next


@pytest.mark.parametrize("seed", range(12))
def test_next_class_is_optimal_for_every_budget_on_trees(seed):
    tree = random_tree(10, seed)
    for budget in range(2, 6):
        greedy = next_class(tree, [], n=budget)
        best = max(len(on_paths(tree, chosen)) for chosen in itertools.combinations(tree, budget))
        assert len(tree_locus(tree, greedy)) == best
        assert locus_curve(tree, greedy)[-1] == best


@QUICK
@given(n=st.integers(2, 14), k=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_each_next_class_enlarges_a_trees_locus_most(n, k, seed):
    tree = random_tree(n, seed)
    observed = np.random.default_rng(seed).choice(n, min(k, n), replace=False).tolist()
    chosen = next_class(tree, observed, n=n)
    inside = set(observed)
    for label in chosen:
        sizes = {v: len(on_paths(tree, [*inside, v])) for v in tree}
        assert sizes[label] == max(sizes.values()) > len(on_paths(tree, list(inside)))
        assert label == min(v for v in tree if sizes[v] == sizes[label])
        inside.add(label)
    assert on_paths(tree, list(inside)) == set(tree)


def test_longer_edges_do_not_make_a_node_a_better_choice():
    metric = LabelMetric.from_edges([(0, 1, 1.0), (1, 2, 1.0), (2, 3, 1.0), (0, 4, 50.0)])
    assert next_class(metric, [0]) == [3]


def test_locus_curve_by_paths():
    tree = random_tree(30, 4)
    order = np.random.default_rng(0).permutation(30)[:12].tolist()
    assert locus_curve(tree, order).tolist() == [len(on_paths(tree, order[: i + 1])) for i in range(12)]


@pytest.mark.parametrize("seed", range(8))
def test_leaves_are_the_smallest_cover(seed):
    tree = random_tree(8, seed)
    leaves = minimum_locus_cover(tree)
    assert sorted(leaves) == sorted(v for v in tree if tree.degree(v) == 1)
    assert is_locus_cover(LabelMetric.from_graph(tree), leaves, identify=True)
    for fewer in range(1, len(leaves)):
        for chosen in itertools.combinations(tree, fewer):
            assert len(on_paths(tree, chosen)) < 8


def test_on_a_grid_the_next_classes_are_corners():
    metric = LabelMetric.from_graph(GRID)
    chosen = next_class(metric, [], n=4)
    assert chosen[0] in CORNERS
    assert set(chosen[:2]) in ({(0, 0), (3, 4)}, {(0, 4), (3, 0)})
    assert set(chosen) == set(CORNERS)
    assert next_class(metric, CORNERS) == []  # all identified: nothing left to gain


def test_next_class_in_a_complete_graph_adds_itself_only():
    assert next_class(complete(5), [0, 3]) == [1]
    assert next_class(complete(4), [0, 1, 2, 3]) == []


@pytest.mark.parametrize("seed", range(4))
def test_greedy_by_pairs_takes_the_largest_union_of_pairs(seed, monkeypatch):
    monkeypatch.setattr(locus_module, "_LARGEST_EXACT", 3)
    metric = LabelMetric.from_graph(nx.connected_watts_strogatz_graph(11, 4, 0.3, seed=seed))
    chosen = next_class(metric, [0, 5], n=3)
    have = [0, 5]
    for label in chosen:
        sizes = {v: pairs_union(metric, [*have, v]) for v in range(11) if v not in have}
        assert label == min(v for v in sizes if sizes[v] == max(sizes.values()))
        have.append(label)


def pairs_union(metric, have):
    inside = np.zeros(len(metric), dtype=bool)
    for a, b in itertools.combinations(have, 2):
        inside |= locus(metric, [a, b]).reachable
    return int(inside.sum())


def test_by_pairs_there_is_no_next_class_where_all_is_reached(monkeypatch):
    monkeypatch.setattr(locus_module, "_LARGEST_EXACT", 3)
    assert next_class(LabelMetric.from_graph(GRID), CORNERS[:2], n=2) == []


def test_trees_with_unlabelled_nodes_go_by_what_is_reached():
    # a spider: four legs of length 3 and a short one at a hub, and only ends are labels
    legs = nx.Graph([("hub", "near")])
    for i in range(4):
        nx.add_path(legs, ["hub", f"a{i}", f"b{i}", f"e{i}"])
    leaves = LabelMetric.from_graph(legs).restrict(["near", "e0", "e1", "e2", "e3"])
    assert leaves.is_tree
    with pytest.raises(InputError, match="use locus"):
        tree_locus(leaves, ["e0", "e1"])
    with pytest.raises(InputError, match="use locus"):
        locus_curve(leaves, ["e0", "e1"])
    with pytest.raises(InputError, match="nodes are labels"):
        minimum_locus_cover(leaves)
    assert locus(leaves, ["e0", "e1"]).identified.tolist() == [True, True, True, False, False]
    assert next_class(leaves, ["e0", "e1"], n=5) == ["e2", "e3"]
    assert not is_locus_cover(leaves, ["e0", "e1"])
    # where all nodes between observed labels are labels, paths tell the locus
    some = LabelMetric.from_graph(legs).restrict(["e0", "b0", "e1"])
    assert tree_locus(some, ["e0", "b0"]) == {"e0", "b0"}


# ---- the prediction


def brute_force(metric, observed, p):
    """One sum a label and a row, in the order of the formula."""
    answers, ties = [], 0
    for row in p:
        scores = []
        for y in metric.labels:
            d = [float(metric.distances([y], [label])[0, 0]) for label in observed]
            scores.append(sum(w * dist**2 for w, dist in zip(row, d, strict=True)))
        least = min(scores)
        near = [i for i, score in enumerate(scores) if score <= least * (1 + 1e-12)]
        answers.append(near[0])
        ties += len(near) > 1
    return answers, ties


METRICS = {
    "matrix": lambda seed: LabelMetric.from_matrix(line(9).distances(range(9)), range(9)),
    "embeddings": lambda seed: LabelMetric.from_embeddings(np.random.default_rng(seed).normal(size=(9, 3)), range(9)),
    "graph": lambda seed: LabelMetric.from_graph(nx.connected_watts_strogatz_graph(9, 4, 0.3, seed=seed)),
    "tree": lambda seed: LabelMetric.from_graph(random_tree(9, seed)),
    "tree with lengths": lambda seed: LabelMetric.from_edges(long_tree(9, seed)),
    "some nodes of a tree": lambda seed: LabelMetric.from_edges(long_tree(16, seed)).restrict([1, 14, 3, 9, 8, 15, 6]),
    "leaves, all edges 1": lambda seed: LabelMetric.from_graph(nx.balanced_tree(3, 2)).restrict([*range(5, 13), 2]),
}


@pytest.mark.parametrize("kind", METRICS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 5), chunk_size=st.sampled_from([1, 2, 4096]), reroot=st.booleans())
def test_predictions_are_those_of_the_formula(kind, seed, k, chunk_size, reroot):
    metric = METRICS[kind](seed)
    rng = np.random.default_rng(seed)
    observed = [metric.labels[i] for i in rng.choice(len(metric), k, replace=False)]
    p = probabilities(6, k, seed)
    p[0], p[1] = np.eye(k)[0], np.full(k, 1 / k)
    answers, ties = brute_force(metric, observed, p)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(predictor_module, "_reroot", lambda *sizes: reroot)
        warnings.simplefilter("ignore", UserWarning)  # small random metrics may be equidistant
        made = FrechetPredictor(metric, observed, chunk_size=chunk_size)
    assert made.predict_indices(p).tolist() == answers
    assert made.ties_ == ties
    assert made.predict(p).tolist() == [metric.labels[i] for i in answers]
    expected = p @ metric.squared(observed)
    assert np.allclose(made.scores(p), expected)
    for row, answer in zip(p, answers, strict=True):
        assert metric.labels[answer] == frechet_mean(observed, row, metric)[0]


@pytest.mark.parametrize("seed", range(3))
def test_complete_graph_is_argmax(seed):
    observed = [7, 2, 5, 0, 9]
    p = probabilities(500, 5, seed)
    p[:50] = np.round(p[:50], 1) + 1e-9
    p[:50] /= p[:50].sum(axis=1, keepdims=True)
    with pytest.warns(UserWarning, match="only observed labels"):
        made = FrechetPredictor(complete(12), observed)
    places = np.array(observed)
    answers = made.predict(p)
    top = p >= p.max(axis=1, keepdims=True) * (1 - 1e-12)
    assert answers.tolist() == [int(places[row].min()) for row in top]  # the metric's own order decides between equals
    assert made.ties_ == int((top.sum(axis=1) > 1).sum())


def test_squares_matter():
    # the median of the same weights never leaves the likelier end of a path
    made = FrechetPredictor(line(11), [0, 10])
    assert made.predict([[0.7, 0.3]]).tolist() == [3]
    assert int((np.array([0.7, 0.3]) @ line(11).distances([0, 10])).argmin()) == 0


def test_probabilities_mean_their_labels_in_any_order():
    metric = LabelMetric.from_graph(random_tree(20, 1))
    observed = [3, 17, 8, 11]
    p = probabilities(50, 4, 0)
    answers = FrechetPredictor(metric, observed).predict(p)
    for order in itertools.permutations(range(4)):
        turned = FrechetPredictor(metric, [observed[i] for i in order]).predict(p[:, order])
        assert (turned == answers).all()
    shuffled = metric.restrict(np.random.default_rng(0).permutation(20).tolist())
    assert (shuffled.squared([3], [17]) == metric.squared([3], [17])).all()


def test_temperature_is_softmax_of_divided_logits():
    logits = np.random.default_rng(0).normal(size=(40, 3)) * 4
    metric, observed = line(9), [0, 4, 8]
    for t in (0.5, 2.0):
        sharp = FrechetPredictor(metric, observed, t)
        assert np.allclose(
            sharp.scores(softmax(logits)), FrechetPredictor(metric, observed).scores(softmax(logits / t))
        )
    certain = np.eye(3)
    assert FrechetPredictor(metric, observed, 0.25).predict(certain).tolist() == observed


def test_fit_temperature_is_the_best_of_the_grid_with_the_own_label_left_out():
    rng = np.random.default_rng(3)
    metric, observed = line(12), [0, 3, 5, 8, 11]
    truth = rng.choice(12, 300)
    logits = -0.4 * np.abs(truth[:, None] - np.array(observed)) + rng.normal(size=(300, 5))
    seen = np.isin(truth, observed)
    masked = np.where(truth[:, None] == np.array(observed), -np.inf, logits)[seen]
    losses = []
    for t in predictor_module.TEMPERATURES:
        answers = FrechetPredictor(metric, observed).predict(softmax(masked / t))
        losses.append(np.mean((answers - truth[seen]) ** 2))
    made = FrechetPredictor(metric, observed).fit_temperature(logits, truth)
    assert made.temperature_ == predictor_module.TEMPERATURES[int(np.argmin(losses))]
    assert made.temperature == 1.0
    by_hand = FrechetPredictor(metric, observed, made.temperature_)
    assert np.allclose(made.scores(softmax(logits)), by_hand.scores(softmax(logits)))
    assert not hasattr(made.set_params(temperature=2.0), "temperature_")


def test_where_no_temperature_is_better_it_stays_one():
    with pytest.warns(UserWarning, match="only observed"):
        made = FrechetPredictor(complete(5), [0, 1, 2])
    logits = np.random.default_rng(0).normal(size=(30, 3))
    assert made.fit_temperature(logits, [0, 1, 2] * 10).temperature_ == 1.0


def test_certain_rows_have_nothing_to_choose_a_temperature_by():
    made = FrechetPredictor(line(5), [0, 4])
    with np.errstate(divide="ignore"):
        logits = np.log(np.eye(2))
    with pytest.raises(InputError, match="elsewhere"):
        made.fit_temperature(logits, [0, 4])
    mixed = np.vstack([logits, [[0.0, -1.0]]])
    assert made.fit_temperature(mixed, [0, 4, 0]).temperature_ == 1.0


@pytest.mark.parametrize("labels", [["b", "a", "c"], [1.5, 0.5, 2.5], [(0, 1), (1, 2), (2, 3)], [True, False, "x"]])
def test_labels_of_any_kind_come_back(labels):
    metric = LabelMetric.from_matrix(line(3).distances(range(3)), labels)
    found = FrechetPredictor(metric, [labels[0], labels[2]]).predict([[1.0, 0.0], [0.5, 0.5]])
    assert found.tolist() == [labels[0], labels[1]]
    assert FrechetPredictor(metric, labels).predict(np.zeros((0, 3))).shape == (0,)


def test_numbers_from_numpy_are_the_same_labels():
    metric = line(4)
    assert metric.index(np.array([3, 1])).tolist() == [3, 1]
    made = FrechetPredictor(metric, np.array([0, 3]))
    assert made.predict(torch.tensor([[0.4, 0.6]])).tolist() == [2]
    assert LabelMetric.from_matrix(np.eye(2)[::-1], np.array(["u", "v"])).labels == ("u", "v")


def test_from_estimator_goes_by_classes():
    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, [0, 2, 4, 9])
    model = KNeighborsClassifier(3).fit(x[kept], y[kept])
    made = FrechetPredictor.from_estimator(model, line(10), chunk_size=3)
    assert made.observed == [0, 2, 4, 9]
    direct = FrechetPredictor(line(10), [0, 2, 4, 9])
    p = model.predict_proba(x[:200])
    assert (made.predict(p) == direct.predict(p)).all()
    with pytest.raises(ModelError, match="fit it first"):
        FrechetPredictor.from_estimator(KNeighborsClassifier(), line(10))


def test_it_is_a_scikit_learn_estimator():
    made = FrechetPredictor(line(5), [0, 4], temperature=2.0, chunk_size=7)
    copy = clone(made)
    assert copy.get_params()["temperature"] == 2.0
    assert copy.predict([[0.5, 0.5]]).tolist() == [2]
    made.set_params(observed=[0, 2])
    assert made.predict([[0.5, 0.5]]).tolist() == [1]


def test_a_large_tree_is_answered_as_by_its_matrix():
    metric = random_tree_metric(range(3000), seed=1)
    rng = np.random.default_rng(0)
    observed = rng.choice(3000, 700, replace=False).tolist()
    p = rng.dirichlet(np.full(700, 0.01), size=40)
    made = FrechetPredictor(metric, observed)
    assert made._tree is not None  # by rerooting
    expected = (p @ metric.squared(observed)).argmin(axis=1)
    assert (made.predict_indices(p) == expected).all()


# ---- trees inside


@QUICK
@given(n=st.integers(2, 40), k=st.integers(1, 6), seed=st.integers(0, 10_000), root=st.integers(0, 39))
def test_rerooting_and_paths_are_those_of_all_distances(n, k, seed, root):
    metric = LabelMetric.from_edges(long_tree(n, seed), range(n))
    graph = metric.tree()
    tree = RootedTree(graph.adjacency, root % n)
    d = dict(nx.all_pairs_dijkstra_path_length(to_networkx(graph)))
    full = np.array([[d[int(a)][int(b)] for b in tree.order] for a in tree.order])
    places = np.random.default_rng(seed).choice(n, min(k, n), replace=False)
    weights = probabilities(4, len(places), seed)
    assert np.allclose(tree.squared_sums(places, weights), (weights @ full[places] ** 2).T)
    assert np.allclose(tree.distances(places), full[:, places])
    inside = tree.steiner(places)
    assert {int(tree.order[i]) for i in np.flatnonzero(inside)} == on_paths(
        to_networkx(graph), [int(tree.order[i]) for i in places]
    )
    gate, beyond = tree.gates(inside)
    held = np.flatnonzero(inside)
    assert np.allclose(beyond, full[:, held].min(axis=1))
    assert (gate == held[full[:, held].argmin(axis=1)]).all()


def to_networkx(graph):
    coo = graph.adjacency.tocoo()
    made = nx.Graph()
    made.add_weighted_edges_from(zip(coo.row.tolist(), coo.col.tolist(), coo.data.tolist(), strict=True))
    return made


def test_a_deep_tree_needs_no_deep_recursion():
    metric = LabelMetric.from_edges([(i, i + 1) for i in range(5000)])
    assert metric.squared([0], [5000])[0, 0] == 5000.0**2
    made = FrechetPredictor(metric, [0, 5000])
    assert made.predict([[0.25, 0.75]]).tolist() == [3750]
    assert len(tree_locus(metric, [10, 20])) == 11


# ---- metrics


def test_metrics_are_the_distances_of_their_sources():
    tree = random_tree(30, 2)
    metric = LabelMetric.from_graph(tree)
    d = dict(nx.all_pairs_shortest_path_length(tree))
    expected = np.array([[d[a][b] for b in metric.labels] for a in metric.labels])
    assert (metric.distances(metric.labels) == expected).all()
    assert (metric.squared([4, 2], [9]) == expected[[4, 2]][:, [9]] ** 2).all()
    assert (metric.distances(metric.labels, [7]) == expected[:, [7]]).all()
    graph = nx.connected_watts_strogatz_graph(20, 4, 0.3, seed=0)
    for a, b in graph.edges:
        graph[a][b]["km"] = 1 + (a * b) % 5
    weighted = LabelMetric.from_graph(graph, weight="km")
    d = dict(nx.all_pairs_dijkstra_path_length(graph, weight="km"))
    assert np.allclose(weighted.distances([3, 8], [11, 3]), [[d[3][11], 0], [d[8][11], d[8][3]]])
    e = np.random.default_rng(0).normal(size=(6, 4))
    assert np.allclose(LabelMetric.from_embeddings(e, "abcdef").squared("b", "e"), ((e[1] - e[4]) ** 2).sum())
    assert np.allclose(line(5).squared([0], [4]), 16)
    assert "tree" in repr(metric)


def test_directions_parallel_edges_and_loops_do_not_matter():
    edges = [("a", "b", 3.0), ("b", "a", 1.0), ("a", "a", 9.0), ("b", "c", 2.0)]
    metric = LabelMetric.from_edges(edges)
    assert metric.distances(["a"], ["b", "c"]).tolist() == [[1.0, 3.0]]
    assert metric.is_tree
    directed = LabelMetric.from_graph(nx.DiGraph([("r", "x"), ("r", "y")]))
    assert directed.distances(["x"], ["y"]).tolist() == [[2.0]]


def test_hierarchy_files(tmp_path):
    path = tmp_path / "tree.txt"
    path.write_text("animal dog\r\nanimal cat\n\nanimal\tsea lion\n", encoding="utf-8")
    metric = LabelMetric.from_hierarchy_file(path)
    assert metric.labels == ("animal", "dog", "cat", "sea lion")
    assert metric.distances(["dog"], ["sea lion"]).tolist() == [[2.0]]
    path.write_text("a b 0.5\nb c 2\n", encoding="utf-8")
    assert LabelMetric.from_hierarchy_file(path, ["c", "a"]).distances(["a"], ["c"]).tolist() == [[2.5]]
    path.write_text("a b\na b c d\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        LabelMetric.from_hierarchy_file(path)
    path.write_text("a b far\n", encoding="utf-8")
    with pytest.raises(DataError, match="a number"):
        LabelMetric.from_hierarchy_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read"):
        LabelMetric.from_hierarchy_file(path)
    with pytest.raises(DataError, match=r"cannot read.*gone"):
        LabelMetric.from_hierarchy_file(tmp_path / "gone.txt")


def test_a_part_of_a_graph_without_labels_is_left_out():
    # a tree of three and a triangle: as many edges as a tree of six would have
    edges = [(0, 1), (1, 2), (3, 4), (4, 5), (5, 3)]
    metric = LabelMetric.from_edges(edges, [0, 1, 2])
    assert metric.is_tree
    assert tree_locus(metric, [0, 2]) == {0, 1, 2}
    assert not LabelMetric.from_edges(edges, [3, 4, 5]).is_tree


def test_restrict_keeps_distances_and_order():
    for make in METRICS.values():
        metric = make(0)
        fewer = metric.restrict(list(metric.labels[::-2]))
        assert fewer.labels == metric.labels[::-2]
        assert np.allclose(fewer.squared(fewer.labels), metric.squared(fewer.labels, fewer.labels))


def test_is_metric_tells_what_is_wrong():
    assert line(30).is_metric()
    assert random_tree_metric(range(300)).is_metric(50, seed=1).triples == 50**3
    squares = line(6).squared(range(6))
    with pytest.warns(UserWarning, match="not a metric"):
        check = LabelMetric.from_matrix(squares, range(6)).is_metric()
    assert not check
    assert not check.triangle
    assert check.symmetric
    assert check.zero_diagonal
    assert check.worst_violation == 25 - 4 - 9
    with pytest.warns(UserWarning, match="zero_diagonal=False"):
        LabelMetric.from_matrix(np.ones((3, 3)), range(3))


def test_spread_falls_where_embeddings_have_many_dimensions():
    rng = np.random.default_rng(0)
    few, many = (LabelMetric.from_embeddings(rng.normal(size=(60, d)), range(60)).spread() for d in (2, 2000))
    assert few > 0.3
    assert many < 0.03
    assert complete(5).spread() == 0.0


def test_random_trees_repeat_with_their_seed():
    a, b, c = (random_tree_metric(range(50), seed=s).distances(range(50)) for s in (1, 1, 2))
    assert (a == b).all()
    assert (a != c).any()


def test_squared_pairs_in_small_steps(monkeypatch):
    monkeypatch.setattr(metric_module, "_STEP_BYTES", 200)
    rng = np.random.default_rng(0)
    for make in METRICS.values():
        metric = make(1)
        a, b = rng.integers(0, len(metric), (2, 60))
        full = metric.squared(metric.labels)
        assert np.allclose(metric.squared_pairs(a, b), full[a, b])


# ---- on logits, with gradients


@pytest.mark.parametrize("kind", METRICS)
def test_the_head_is_the_predictor(kind):
    metric = METRICS[kind](2)
    observed = [metric.labels[i] for i in (5, 0, 3)]
    logits = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    for t in (1.0, 0.5):
        head = FrechetHead(metric, observed, temperature=t)
        made = FrechetPredictor(metric, observed, t)
        p = torch.softmax(logits, dim=1)
        assert np.allclose(-head(logits).numpy(), made.scores(p), rtol=1e-5)
        exact = head.double()
        exact.squared.copy_(torch.from_numpy(metric.squared(observed)))
        scores = exact(logits)
        best = np.take_along_axis(scores.numpy(), made.predict_indices(p)[:, None], axis=1)[:, 0]
        assert np.allclose(best, scores.max(dim=1).values.numpy(), rtol=1e-12)


def test_the_head_takes_logits_of_any_precision():
    head = FrechetHead(line(5), [0, 4])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        out = head(torch.tensor([[0.0, 0.0]], dtype=dtype))
        assert out.argmax(dim=1).tolist() == [2]
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert set(head.state_dict()) == {"squared"}


def test_fine_tuning_loss_and_its_gradient():
    head = FrechetHead(line(4), [0, 3]).double()
    logits = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.tensor([0, 1, 1, 0, 1])
    p = torch.softmax(logits, dim=1)
    scores = torch.stack([p[:, 0] * j**2 + p[:, 1] * (3 - j) ** 2 for j in range(4)], dim=1)
    truth = 3.0 * y.double()
    expected = (torch.softmax(-scores, dim=1) * (torch.arange(4) - truth[:, None]) ** 2).sum(dim=1).mean()
    soft = head.loss(logits, y)
    assert torch.allclose(soft, expected)
    hard = head.loss(logits, y, straight_through=True)
    answers = scores.argmin(dim=1)
    assert torch.allclose(hard, ((answers - truth) ** 2).mean())
    (a,), (b,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (soft, hard))
    assert torch.allclose(a, b)
    assert torch.autograd.gradcheck(lambda z: head.loss(z, y), logits)


def test_fine_tuning_through_the_rule_lowers_the_distance():
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x / 16).float()
    observed = [0, 3, 6, 9]
    kept = torch.from_numpy(np.isin(y, observed))
    column = torch.from_numpy(np.searchsorted(observed, y[kept.numpy()]))
    torch.manual_seed(0)
    model = nn.Linear(64, 4)
    head = FrechetHead(line(10), observed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = head.loss(model(x[kept]), column)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


# ---- the report


def test_report_by_hand():
    metric = line(6)
    p = np.array([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8], [0.6, 0.4]])
    y = [2, 0, 5, 3]
    report = adaptation_report(p, y, metric, [0, 5])
    # argmax says 0 0 5 0; the means are 2.5 (2 and 3 tie: 2), 0, 4, 2
    assert report.squared_argmax.tolist() == [4, 0, 0, 9]
    assert report.squared_frechet.tolist() == [0, 0, 1, 1]
    assert report.msd_argmax == 13 / 4
    assert report.msd_frechet == 2 / 4
    assert report.msd_oracle == (4 + 0 + 0 + 4) / 4
    assert np.isclose(report.relative_improvement, 1 - 2 / 13)
    assert report.ci[0] <= report.relative_improvement <= report.ci[1]
    assert report.accuracy_observed == 0.5
    assert report.argmax_accuracy_observed == 1.0
    assert report.accuracy_unseen == 0.5
    assert report.share_unseen_predictions == 0.75
    assert report.tied == 1
    assert report.best_temperature == 1.0
    assert report.metric_spread == metric.spread()


def test_report_without_observed_rows_or_without_mistakes():
    metric = line(6)
    unseen = adaptation_report([[0.5, 0.5]], [2], metric, [0, 5])
    assert (unseen.accuracy_observed, unseen.argmax_accuracy_observed, unseen.best_temperature) == (None, None, None)
    perfect = adaptation_report(np.eye(2), [0, 5], metric, [0, 5])
    assert (perfect.relative_improvement, perfect.ci) == (None, None)
    assert perfect.accuracy_unseen is None
    assert perfect.best_temperature is None
    rare = np.tile([1.0, 0.0], (40, 1))  # most draws of rows have no mistake of argmax at all
    rare[0] = [0.6, 0.4]
    report = adaptation_report(rare, [2] + [0] * 39, metric, [0, 5])
    assert report.relative_improvement == 1.0
    assert np.isfinite(report.ci).all()


def test_nearest_observed_is_the_least_that_observed_labels_reach():
    metric = LabelMetric.from_graph(random_tree(25, 3))
    observed = [3, 20, 11]
    near = nearest_observed(np.arange(25), metric, observed)
    d = metric.distances(observed)
    assert (metric.squared_pairs(np.arange(25), near) == d.min(axis=0) ** 2).all()
    assert set(near.tolist()) <= set(metric.index(observed).tolist())


@pytest.mark.parametrize("model", [LogisticRegression(C=0.02, max_iter=2000), KNeighborsClassifier(9)])
def test_hidden_digits_get_nearer_answers(model):
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.5, random_state=0, stratify=y)
    rng = np.random.default_rng(0)
    metric = line(10)
    total = {"argmax": 0.0, "mean": 0.0, "oracle": 0.0}
    for _ in range(6):
        observed = np.sort(rng.choice(10, 4, replace=False))
        kept = np.isin(y_train, observed)
        model.fit(x_train[kept], y_train[kept])
        p = model.predict_proba(x_test)
        report = adaptation_report(p, y_test, metric, observed)
        total["argmax"] += report.msd_argmax
        total["mean"] += report.msd_frechet
        total["oracle"] += report.msd_oracle
        assert report.share_unseen_predictions > 0
    assert total["mean"] < total["argmax"]
    assert total["oracle"] < total["argmax"]


def test_metric_rows_in_another_order_are_told_by_name():
    """The same matrix with its rows permuted but not its names answers elsewhere; by name it cannot go wrong."""
    tree = random_tree(40, 5)
    metric = LabelMetric.from_graph(tree)
    order = np.random.default_rng(0).permutation(40)
    d = metric.distances(metric.labels)
    permuted = LabelMetric.from_matrix(d[np.ix_(order, order)], order)
    observed = [4, 9, 30, 22]
    p = probabilities(100, 4, 0)
    right, left = FrechetPredictor(metric, observed), FrechetPredictor(permuted, observed)
    a, b = right.scores(p), left.scores(p)
    assert np.allclose(a[:, [metric.labels.index(v) for v in permuted.labels]], b)


# ---- errors


BAD = {
    "unknown observed": (lambda: FrechetPredictor(line(3), [0, 9, 8]), DataError, r"2 labels are not in the metric.*9, 8"),
    "text for a number": (lambda: FrechetPredictor(line(3), ["0"]), DataError, "0 is there"),
    "observed twice": (lambda: FrechetPredictor(line(3), [0, 0]), DataError, "more than once"),
    "nothing observed": (lambda: FrechetPredictor(line(3), []), DataError, "at least one"),
    "temperature": (lambda: FrechetPredictor(line(3), [0, 2], temperature=0.0), InputError, "temperature > 0"),
    "chunk size": (lambda: FrechetPredictor(line(3), [0, 2], chunk_size=0), InputError, "chunk_size >= 1"),
    "negative": (lambda: FrechetPredictor(line(3), [0, 2]).predict([[1.5, -0.5]]), InputError, "looks like logits"),
    "sum": (lambda: FrechetPredictor(line(3), [0, 2]).predict([[0.5, 0.5], [0.6, 0.5]]), InputError, "row 1 .*sums to 1.1"),
    "nan": (lambda: FrechetPredictor(line(3), [0, 2]).predict([[np.nan, 1.0]]), InputError, "looks like logits"),
    "columns": (lambda: FrechetPredictor(line(3), [0, 2]).predict(np.eye(3)), InputError, "2 observed labels"),
    "one row": (lambda: FrechetPredictor(line(3), [0, 2]).scores([0.5, 0.5]), InputError, "shape"),
    "words": (lambda: FrechetPredictor(line(3), [0, 2]).predict([["a", "b"]]), InputError, "must be numbers"),
    "logits shape": (lambda: FrechetPredictor(line(3), [0, 2]).fit_temperature(np.eye(3), [0, 0, 2]), InputError, "need logits"),
    "logits nan": (
        lambda: FrechetPredictor(line(3), [0, 2]).fit_temperature([[np.nan, 0.0]], [0]), InputError, "nan or inf",
    ),
    "no observed row": (
        lambda: FrechetPredictor(line(3), [0, 2]).fit_temperature([[0.0, 1.0]], [1]), InputError, "none of the 1 rows",
    ),
    "one column": (lambda: FrechetPredictor(line(3), [0]).fit_temperature([[0.0]], [0]), InputError, "at least two"),
    "head columns": (lambda: FrechetHead(line(3), [0, 2])(torch.zeros(2, 3)), InputError, "need logits"),
    "head temperature": (lambda: FrechetHead(line(3), [0, 2], temperature=-1.0), InputError, "temperature > 0"),
    "head labels": (
        lambda: FrechetHead(line(3), [0, 2]).loss(torch.zeros(1, 2), torch.tensor([2])), InputError, "must index",
    ),
    "weights": (lambda: frechet_mean([0, 1], [0.0, 0.0], line(3)), InputError, "not all 0"),
    "weight count": (lambda: frechet_mean([0, 1], [1.0], line(3)), InputError, "one weight"),
    "not square": (lambda: LabelMetric.from_matrix(np.zeros((2, 3)), "ab"), DataError, "matrix"),
    "negative distance": (lambda: LabelMetric.from_matrix([[0, -1], [-1, 0]], "ab"), DataError, "'a' to 'b' is -1"),
    "infinite distance": (lambda: LabelMetric.from_matrix([[0, np.inf], [np.inf, 0]], "ab"), DataError, "finite"),
    "nan distance": (lambda: LabelMetric.from_matrix([[0, np.nan], [1, 0]], "ab"), DataError, "finite"),
    "not symmetric": (lambda: LabelMetric.from_matrix([[0, 1], [2, 0]], "ab"), DataError, "'a' to 'b' is 1.0, back 2.0"),
    "duplicate labels": (lambda: LabelMetric.from_matrix(np.zeros((3, 3)), "aba"), DataError, r"more than once: \['a'\]"),
    "one label": (lambda: LabelMetric.from_matrix([[0]], "a"), DataError, "two labels"),
    "embeddings": (lambda: LabelMetric.from_embeddings(np.zeros((2, 3)), "abc"), DataError, "embeddings"),
    "parts": (
        lambda: LabelMetric.from_edges([("a", "b"), ("c", "d")]), DataError, r"falls into 2 parts.*'a', 'c'",
    ),
    "lonely node": (lambda: LabelMetric.from_graph(nx.empty_graph(3)), DataError, "without edges"),
    "length": (lambda: LabelMetric.from_edges([("a", "b", 0.0)]), DataError, "above 0"),
    "no edges": (lambda: LabelMetric.from_edges([]), DataError, "at least one"),
    "attributes": (lambda: LabelMetric.from_edges([("a", "b", {"km": 1})]), DataError, "a number"),
    "edge parts": (lambda: LabelMetric.from_edges([("a",)]), DataError, "pairs"),
    "no weight": (lambda: LabelMetric.from_graph(nx.path_graph(3), weight="km"), DataError, "has no 'km'"),
    "not a node": (lambda: LabelMetric.from_edges([("a", "b")], ["a", "z"]), DataError, "not nodes of the graph"),
    "samples": (lambda: line(3).is_metric(1), InputError, "at least 2"),
    "no tree": (lambda: tree_locus(nx.cycle_graph(4), [0]), InputError, "not a tree: 4 nodes and 4 edges"),
    "edges for a tree": (lambda: as_metric([(0, 1)]), InputError, r"got a list; of an edge list.*from_edges"),
    "huge embeddings": (lambda: LabelMetric.from_embeddings([[0.0], [1e200]], "ab"), DataError, "rescale"),
    "huge distance": (lambda: LabelMetric.from_matrix([[0, 1e200], [1e200, 0]], "ab"), DataError, "at most 1e\\+150"),
    "no graph": (lambda: tree_locus(line(4), [0]), InputError, "not made of a graph"),
    "empty tree locus": (lambda: tree_locus(nx.path_graph(4), []), DataError, "no label"),
    "empty curve": (lambda: locus_curve(nx.path_graph(4), []), DataError, "no label"),
    "empty locus": (lambda: locus(line(4), []), DataError, "no label"),
    "tolerance": (lambda: locus(line(4), [0], tol=-1.0), InputError, "tol"),
    "none wanted": (lambda: next_class(line(4), [0], n=0), InputError, "n must be"),
    "rows and labels": (lambda: adaptation_report(np.eye(2), [0], line(3), [0, 2]), InputError, "2 rows and 1 labels"),
    "no rows": (lambda: adaptation_report(np.zeros((0, 2)), [], line(3), [0, 2]), InputError, "at least one"),
    "unknown truth": (lambda: adaptation_report(np.eye(2), [0, 7], line(3), [0, 2]), DataError, r"not in the metric: \[7\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_is_wrong(case):
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


def test_a_data_frame_is_read_by_its_names():
    rng = np.random.default_rng(5)
    names, observed = list("abcdef"), ["e", "b", "a"]
    e = rng.normal(size=(6, 3))
    metric = LabelMetric.from_embeddings(e, names)
    every = metric.squared(names, names)
    shuffled = [names[i] for i in rng.permutation(6)]
    frame = pd.DataFrame(e, index=names).loc[shuffled]
    np.testing.assert_allclose(LabelMetric.from_embeddings(frame, names).squared(names, names), every)
    table = pd.DataFrame(np.sqrt(every), names, names).loc[shuffled, shuffled[::-1]]
    np.testing.assert_allclose(LabelMetric.from_matrix(table, names).squared(names, names), every)
    p = rng.dirichlet(np.ones(3), size=20)
    named = pd.DataFrame(p, columns=observed)[["a", "e", "b"]]
    rule, y = FrechetPredictor(metric, observed), rng.choice(observed, size=20)
    np.testing.assert_allclose(rule.scores(named), rule.scores(p))
    np.testing.assert_allclose(rule.scores(pd.DataFrame(p)), rule.scores(p))
    assert (
        adaptation_report(named, y, metric, observed).msd_frechet
        == adaptation_report(p, y, metric, observed).msd_frechet
    )
    logits = np.log(named) * 3
    assert (
        rule.fit_temperature(logits, y).temperature_
        == rule.fit_temperature(logits[observed].to_numpy(), y).temperature_
    )
    other = pd.DataFrame(p, columns=["p_e", "p_b", "p_a"])  # bears none of the names: taken at its order
    np.testing.assert_allclose(rule.scores(other), rule.scores(p))
    with pytest.raises(DataError, match=r"columns are only in part the 3 labels, different are \['b', 'x'\]"):
        rule.predict(pd.DataFrame(p, columns=["e", "x", "a"]))


def test_missing_labels_are_named_up_to_five():
    with pytest.raises(DataError, match=r"8 labels are not in the metric: \[10, 11, 12, 13, 14\]"):
        line(10).index(range(18))


def test_too_large_a_block_says_what_would_fit(monkeypatch):
    monkeypatch.setattr(metric_module, "_LARGEST_BLOCK", 8 * 100)
    graph = LabelMetric.from_graph(nx.cycle_graph(30))
    with pytest.raises(InputError, match=r"chunks of at most 3 rows"):
        FrechetPredictor(graph, range(0, 30, 2))


def test_small_budgets_give_the_same_answers(monkeypatch):
    p = probabilities(50, 4, 1)
    for make in METRICS.values():
        metric = make(3)
        observed = list(metric.labels[1:5])
        whole = FrechetPredictor(metric, observed)
        expected, ties = whole.predict_indices(p), whole.ties_
        scores = whole.scores(p)
        with monkeypatch.context() as patch:
            patch.setattr(predictor_module, "DEFAULT_BUDGET", 16)
            patch.setattr(predictor_module, "_STEP_BYTES", 3000)
            patch.setattr(metric_module, "_STEP_BYTES", 300)
            small = FrechetPredictor(metric, observed, chunk_size=2)
            assert (small.predict_indices(p) == expected).all()
            assert small.ties_ == ties
            assert np.allclose(small.scores(p), scores)


def test_too_many_pairs_are_refused_before_they_are_tried(monkeypatch):
    monkeypatch.setattr(locus_module, "_LARGEST_EXACT", 3)
    monkeypatch.setattr(locus_module, "_LARGEST_PAIRS", 100)
    with pytest.raises(InputError, match="restrict"):
        next_class(LabelMetric.from_graph(GRID), CORNERS[:2])


def test_equidistant_metrics_warn_and_others_do_not():
    with pytest.warns(UserWarning, match="equally far"):
        FrechetPredictor(LabelMetric.from_matrix(2.0 * (1 - np.eye(4)), range(4)), [0, 1])
    FrechetPredictor(line(3), [1])  # one label is always the answer; that is no property of the metric
    FrechetPredictor(LabelMetric.from_graph(nx.star_graph(4)), [1, 2])


def test_public_names_are_documented():
    for name in lg.__all__:
        assert getattr(lg, name).__doc__
