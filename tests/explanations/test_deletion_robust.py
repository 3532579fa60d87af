import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.influence import ExactRetrainer, LogisticInfluence, SeparableDataError
from theodolite.core.memory import chunks
from theodolite.explanations.deletion_robust import (
    DeletionRobustCounterfactual,
    InfluenceWarning,
    deletion_effect,
    linear,
    networks,
    validity_under_deletion,
    worst_deletion,
)
from theodolite.explanations.deletion_robust.networks import NetworkScore
from theodolite.explanations.deletion_robust.solver import Feasible, cut, nearest, robust_to_weight_box
from theodolite.explanations.table_schema import TableSchema

FREE = Feasible.everything(4)
KINDS = ("leverage", "first-order", "first-order-damped")


def limited(**options):
    return Feasible.of(TableSchema.of(np.eye(4), **options))


def table(n=120, d=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = (x @ np.linspace(2, -1, d) + 1.5 * rng.normal(size=n) > 0).astype(int)
    y[:2] = (0, 1)
    return x, y


def rejected(x, y, m=6):
    w = ExactRetrainer(x, y).weights
    return x[x @ w[:-1] + w[-1] < 0][:m]


def network(d=4, outputs=1, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 8), nn.Softplus(), nn.Linear(8, outputs)).double()


def trained(x, y, outputs=1):
    model = network(x.shape[1], outputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    inputs, labels = torch.as_tensor(x), torch.as_tensor(y)
    for _ in range(150):
        scores = model(inputs)
        loss = (
            nn.functional.cross_entropy(scores, labels)
            if outputs == 2
            else nn.functional.binary_cross_entropy_with_logits(scores[:, 0], labels.double())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# ---- the worst set, by brute force


@pytest.mark.parametrize("kind", KINDS)
def test_the_worst_set_is_the_minimum_over_all_sets(kind):
    x, y = table(12, 3)
    model = LogisticRegression(tol=1e-10).fit(x, y)
    w = np.append(model.coef_[0], model.intercept_)
    directions = LogisticInfluence(x, y, w, 1 / 12).directions(kind)
    for point in np.random.default_rng(1).normal(size=(5, 3)):
        t = np.append(point, 1)
        all_sets = [t @ (w + directions[list(s)].sum(axis=0)) for s in itertools.combinations(range(12), 3)]
        rows, predicted, true = worst_deletion(model, x, y, point, 3, kind)
        assert len(set(rows.tolist())) == 3
        assert predicted == pytest.approx(min(all_sets), abs=1e-10)
        kept = np.setdiff1d(np.arange(12), rows)
        again = LogisticRegression(tol=1e-12, max_iter=1000).fit(x[kept], y[kept])
        assert true == pytest.approx(again.decision_function([point])[0], abs=1e-5)


def test_worst_pair_under_real_retraining():
    x, y = table(24, 3)
    retrainer = ExactRetrainer(x, y)
    pairs = list(itertools.combinations(range(24), 2))
    weights = np.array([retrainer.without(pair) for pair in pairs])
    found, lost = 0, []
    for point in np.random.default_rng(2).normal(size=(10, 3)):
        t = np.append(point, 1)
        scores = weights @ t
        _, _, true = worst_deletion(None, x, y, point, 2)
        found += true <= scores.min() + 1e-9
        lost.append((true - scores.min()) / (t @ retrainer.weights - scores.min()))
    assert found >= 7
    assert max(lost) < 0.15


def test_the_effect_of_a_deletion():
    x, y = table()
    rows = [4, 9]
    retrainer = ExactRetrainer(x, y)
    exact = deletion_effect(None, x, y, rows, exact=True)
    assert exact == pytest.approx(retrainer.without(rows) - retrainer.weights)
    assert deletion_effect(None, x, y, rows) == pytest.approx(exact, abs=0.2 * np.abs(exact).max())
    assert deletion_effect(None, x, y, []) == pytest.approx(np.zeros(5))
    assert worst_deletion(None, x, y, x[0], 2, exact=False).true_score is None
    with pytest.raises(InputError, match="distinct"):
        deletion_effect(None, x, y, [1, 1])


# ---- projections


def test_one_plane_is_the_closed_form():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=4), rng.normal(size=5)
    w[-1] = -9 - x @ w[:-1]
    expected = x + 9 / (w[:-1] @ w[:-1]) * w[:-1]
    assert nearest(x, w[None], 0.0, FREE) == pytest.approx(expected, abs=1e-10)
    assert nearest(x, np.stack([w, w, w - [0, 0, 0, 0, 1e-13]]), 0.0, FREE) == pytest.approx(expected, abs=1e-8)


@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_many_planes_are_the_general_solver_s_answer(seed, q, held):
    rng = np.random.default_rng(seed)
    x, planes = rng.normal(size=4), rng.normal(size=(q, 5)) + np.array([1.5, 0, 0, 0, -1])
    limits = limited(immutable=[2], bounds=(-3, 3)) if held else FREE
    x = np.clip(x, -3, 3)
    bounds = [(x[2], x[2]) if held and j == 2 else (limits.low[j], limits.high[j]) for j in range(4)]
    peer = minimize(
        lambda v: 0.5 * ((v - x) ** 2).sum(), x, jac=lambda v: v - x, bounds=bounds, method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: planes[:, :4] @ v + planes[:, 4], "jac": lambda v: planes[:, :4]},
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    found = nearest(x, planes, 0.0, limits)
    if found is None:
        assert not peer.success or (planes[:, :4] @ peer.x + planes[:, 4]).min() < -1e-7
        return
    assert (planes[:, :4] @ found + planes[:, 4]).min() > -1e-9
    assert ((found >= limits.low) & (found <= limits.high)).all()
    if peer.success:
        assert np.linalg.norm(found - x) <= np.linalg.norm(peer.x - x) + 1e-5
        assert found == pytest.approx(peer.x, abs=1e-4)


def test_norm_one_moves_the_steepest_feature_only():
    w = np.array([1.0, -3.0, 0.5, 0.0, -2.0])
    found = nearest(np.zeros(4), w[None], 0.0, FREE, 1)
    assert found == pytest.approx([0, -2 / 3, 0, 0], abs=1e-9)
    bounded = nearest(np.zeros(4), w[None], 0.0, limited(bounds=(-0.5, 2)), 1)
    assert bounded == pytest.approx([0.5, -0.5, 0, 0], abs=1e-9)
    assert nearest(np.zeros(4), w[None], 0.0, limited(immutable=[0, 1, 2]), 1) is None


@pytest.mark.parametrize("delta", [0.01, 0.2])
def test_the_weight_box_is_the_general_solver_s_answer(delta):
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=4), np.array([1.0, -2.0, 0.5, 0.1, -3.0])

    def worst(points, _):
        signs = np.sign(np.column_stack([points, np.ones(len(points))]))
        weights = w - delta * signs
        return (points * weights[:, :-1]).sum(axis=1) + weights[:, -1], weights, [np.zeros(0, int)] * len(points)

    by_planes = cut(x[None], w, worst, 0.0, FREE, max_planes=1000)
    assert by_planes.done.all()
    assert robust_to_weight_box(x, w, delta) == pytest.approx(by_planes.points[0], abs=1e-6)
    assert np.isnan(robust_to_weight_box(x, w, 5.0)).all()
    assert robust_to_weight_box(np.array([50.0, 0, 0, 0]), w, delta) == pytest.approx([50, 0, 0, 0])


# ---- counterfactuals


@given(st.integers(0, 200), st.integers(1, 9), st.sampled_from(KINDS), st.sampled_from([0, 1]))
@settings(max_examples=25, deadline=None)
def test_robust_points_reach_the_threshold_after_their_worst_deletion(seed, k, kind, target):
    x, y = table(seed=seed)
    if min(y.sum(), (1 - y).sum()) <= k:
        return
    queries = np.random.default_rng(seed).normal(size=(5, 4))
    made = DeletionRobustCounterfactual(k, influence=kind, threshold=0.1).fit(x, y)
    found = made.generate(queries, target)
    sign = 2 * target - 1
    assert found.valid.all()
    assert not found.certified.any()
    assert (found.cost >= found.plain_cost - 1e-9).all()
    t = np.column_stack([found.counterfactuals, np.ones(5)])
    for i in range(5):
        a = sign * made.directions_ @ t[i]
        worst = sign * (t[i] @ made.weights_) + np.sort(a)[:k].sum()
        assert worst >= sign * 0.1 - 1e-8
        assert sign * found.worst_score[i] == pytest.approx(worst, abs=1e-8)
        assert a[found.worst_rows[i]].sum() == pytest.approx(np.sort(a)[:k].sum(), abs=1e-10)


def test_the_exact_point_is_the_general_solver_s_answer():
    x, y = table()
    made = DeletionRobustCounterfactual(4).fit(x, y)
    for query, cost in zip(q := rejected(x, y), made.generate(q).cost, strict=True):

        def worst(v):
            t = np.append(v, 1.0)
            return t @ made.weights_ + np.sort(made.directions_ @ t)[:4].sum()

        best = min(
            np.linalg.norm(run.x - query)
            for start in (query, query + 1, x[y == 1].mean(axis=0))
            if (
                run := minimize(
                    lambda v, query=query: ((v - query) ** 2).sum(), start, method="SLSQP",
                    constraints={"type": "ineq", "fun": worst}, options={"ftol": 1e-12, "maxiter": 500},
                )
            ).success
        )  # fmt: skip
        assert cost == pytest.approx(best, abs=2e-4)


def test_at_the_factual_the_point_is_the_closed_form_and_its_cost_is_told():
    x, y = table()
    queries = rejected(x, y)
    made = DeletionRobustCounterfactual(4, worst_set="at-factual", influence="first-order").fit(x, y)
    found = made.generate(queries)
    for query, point, cost in zip(queries, found.counterfactuals, found.cost, strict=True):
        t = np.append(query, 1)
        a = np.sort(made.directions_ @ t)[:4]
        w = made.weights_ + made.directions_[np.argsort(made.directions_ @ t)[:4]].sum(axis=0)
        size = np.linalg.norm(w[:-1])
        assert point == pytest.approx(query + (0 - t @ w) / size**2 * w[:-1], abs=1e-8)
        assert cost <= (0 - t @ made.weights_ + abs(a.sum())) / size + 1e-8
    # the worst rows at the point are not those at the query, so it is not robust even as influence sees it
    assert not found.valid.all()
    assert (found.worst_score[~found.valid] < 0).all()
    refreshed = DeletionRobustCounterfactual(4, influence="first-order").fit(x, y).generate(queries)
    assert refreshed.valid.all()
    assert (refreshed.cost >= found.cost - 1e-8).all()


def test_influence_errs_on_the_unsafe_side_and_verify_mends_it():
    x, y = table(200, 8)
    queries = rejected(x, y, 10)
    unsafe = DeletionRobustCounterfactual(0.05).fit(x, y).generate(queries)
    checked = DeletionRobustCounterfactual(0.05, verify=True).fit(x, y).generate(queries)
    assert validity_under_deletion(unsafe, x, y, 0.05, "worst").mean() < 0.5
    assert validity_under_deletion(checked, x, y, 0.05, "worst").mean() == 1
    assert checked.certified.all()
    assert (checked.retrained > 0).all()
    assert (unsafe.retrained == 0).all()
    assert (checked.cost >= unsafe.cost - 1e-9).all()
    retrainer = ExactRetrainer(x, y)
    for point, rows in zip(checked.counterfactuals, checked.worst_rows, strict=True):
        w = retrainer.without(rows)
        assert point @ w[:-1] + w[-1] >= 0


def test_random_deletions_break_plain_points_and_not_robust_ones():
    x, y = table(200, 8)
    queries = rejected(x, y, 10)
    plain = DeletionRobustCounterfactual(0).fit(x, y).generate(queries)
    robust = DeletionRobustCounterfactual(0.02).fit(x, y).generate(queries)
    assert plain.plain
    assert not robust.plain
    assert plain.cost == pytest.approx(plain.plain_cost)
    assert [len(rows) for rows in plain.worst_rows] == [0] * 10
    told = [validity_under_deletion(f, x, y, 0.02, seed=1).mean() for f in (plain, robust)]
    assert told[0] < 0.8
    assert told[1] > 0.99
    assert validity_under_deletion(plain, x, y, 0.02, "worst").mean() == 0
    assert told[0] == validity_under_deletion(plain.counterfactuals, x, y, 0.02, seed=1).mean()


def test_a_query_that_is_accepted_anyway_is_returned_unchanged():
    x, y = table()
    w = ExactRetrainer(x, y).weights
    far = 6 * w[:-1] / np.linalg.norm(w[:-1])
    for verify in (False, True):
        found = DeletionRobustCounterfactual(2, verify=verify).fit(x, y).generate([far])
        assert (found.counterfactuals == far).all()
        assert found.cost[0] == 0
        assert found.valid.all()
        assert found.certified.all() == verify


def test_what_may_not_change_does_not_and_bounds_hold():
    x, y = table()
    queries = rejected(x, y)
    for norm in (1, 2):
        made = DeletionRobustCounterfactual(3, norm=norm, immutable=[0], bounds=(-3, [4, 3, 2, 1.5])).fit(x, y)
        found = made.generate(queries)
        assert found.valid.any()
        there = found.valid
        assert (found.counterfactuals[there, 0] == queries[there, 0]).all()
        assert (found.counterfactuals[there] >= -3).all()
        assert (found.counterfactuals[there] <= [4, 3, 2, 1.5]).all()
        assert np.isnan(found.counterfactuals[~there]).all()
        expected = np.abs(found.counterfactuals - queries) if norm == 1 else (found.counterfactuals - queries) ** 2
        assert found.cost[there] ** norm == pytest.approx(expected.sum(axis=1)[there])


def test_columns_of_a_data_frame_are_held_by_name():
    x, y = table()
    frame = pd.DataFrame(x, columns=list("abcd"))
    queries = rejected(x, y)
    named = DeletionRobustCounterfactual(3, immutable=["b"], bounds={"a": (None, 2.0)}).fit(frame, y).generate(queries)
    told = DeletionRobustCounterfactual(3, immutable=[1], bounds=(None, [2, np.inf, np.inf, np.inf])).fit(x, y)
    assert named.counterfactuals == pytest.approx(told.generate(queries).counterfactuals, abs=1e-9, nan_ok=True)
    assert (named.counterfactuals[named.valid, 1] == queries[named.valid, 1]).all()


def kinds(n=160, seed=0):
    """Two numbers and two one-hot groups, of three and of two kinds."""
    rng = np.random.default_rng(seed)
    first, second = np.eye(3)[rng.integers(0, 3, n)], np.eye(2)[rng.integers(0, 2, n)]
    x = np.column_stack([rng.normal(size=(n, 2)), first, second])
    y = (x @ [1.0, -0.5, 1.5, -1.0, 0.5, -0.8, 0.8] + rng.normal(size=n) > 0).astype(int)
    return x, y


GROUPS = ([2, 3, 4], [5, 6])


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_with_one_hot_groups_the_nearest_point_is_that_of_all_choices(seed, norm):
    rng = np.random.default_rng(seed)
    x, _ = kinds(seed=seed)
    feasible = Feasible.of(TableSchema.of(x, groups=GROUPS, bounds={0: (-1.5, 1.5), 1: (-1.5, 1.5)}))
    planes = rng.normal(size=(3, 8)) - [0, 0, 0, 0, 0, 0, 0, 1.0]
    for query in x[:4]:
        costs = []
        for i, j in itertools.product((2, 3, 4), (5, 6)):
            held = np.where(np.isin(np.arange(7), (i, j)), 1.0, 0.0)
            move = minimize(
                lambda v, q=query: np.abs(v - q[:2]).sum() if norm == 1 else np.linalg.norm(v - q[:2]), query[:2] + 0.1,
                bounds=[(-1.5, 1.5)] * 2, method="SLSQP", options={"ftol": 1e-13, "maxiter": 500},
                constraints={"type": "ineq", "fun": lambda v, h=held: planes[:, :7] @ np.append(v, h[2:]) + planes[:, 7]},
            )  # fmt: skip
            if (planes[:, :7] @ np.append(move.x, held[2:]) + planes[:, 7]).min() > -1e-7:
                point = np.append(move.x, held[2:])
                costs.append(np.linalg.norm(point - query, ord=norm))
        found = nearest(query, planes, 0.0, feasible, norm)
        if found is None:
            assert not costs
            continue
        assert np.linalg.norm(found - query, ord=norm) <= min(costs) + 1e-5
        assert [found[list(group)].sum() for group in GROUPS] == [1, 1]
        assert set(found[2:].tolist()) <= {0.0, 1.0}
        assert (planes[:, :7] @ found + planes[:, 7]).min() > -1e-8


@pytest.mark.parametrize("route", ["linear", "last-layer", "local-linear"])
def test_groups_stay_one_hot_and_one_way_columns_go_one_way(route):
    x, y = kinds()
    model = None if route == "linear" else trained(x, y)
    w = ExactRetrainer(x, y).weights
    queries = x[(x @ w[:-1] + w[-1] < -0.5) & (y == 0)][:6]
    given = {"groups": GROUPS, "increasing": [0], "decreasing": [1]}
    found = DeletionRobustCounterfactual(3, **given).fit(x, y, model, route=route).generate(queries)
    points = found.counterfactuals[found.valid]
    assert found.valid.sum() >= {"linear": 6, "last-layer": 4, "local-linear": 1}[route]  # a network levels off
    assert (points[:, 0] >= queries[found.valid, 0]).all()
    assert (points[:, 1] <= queries[found.valid, 1]).all()
    for group in GROUPS:
        assert set(np.unique(points[:, list(group)]).tolist()) <= {0.0, 1.0}
        assert (points[:, list(group)].sum(axis=1) == 1).all()
    held = DeletionRobustCounterfactual(3, **given, immutable=[2]).fit(x, y, model, route=route).generate(queries)
    assert (held.counterfactuals[held.valid][:, 2:5] == queries[held.valid][:, 2:5]).all()
    if route == "linear":
        free = DeletionRobustCounterfactual(3).fit(x, y).generate(queries)
        assert (found.cost >= free.cost - 1e-9).all()


def test_a_kind_that_no_training_row_has_is_kept_and_never_taken():
    x, y = kinds()
    x = np.column_stack([x, np.zeros(len(x))])
    groups = ([2, 3, 4, 7], [5, 6])
    query = x[:1].copy()
    query[0, [2, 3, 4, 7]] = (0, 0, 0, 1)
    free = DeletionRobustCounterfactual(2, groups=groups).fit(x, y).generate(np.vstack([query, x[:5]]))
    assert free.valid.all()
    assert (free.counterfactuals[1:, 7] == 0).all()
    held = DeletionRobustCounterfactual(2, groups=groups, immutable=[7]).fit(x, y).generate(query)
    assert held.valid.all()
    assert held.counterfactuals[0, [2, 3, 4, 7]].tolist() == [0, 0, 0, 1]


def test_groups_that_are_none_are_told():
    x, y = kinds()
    with pytest.raises(DataError, match="not one-hot"):
        DeletionRobustCounterfactual(3, groups=[[0, 1]]).fit(x, y)
    made = DeletionRobustCounterfactual(3, groups=GROUPS).fit(x, y)
    with pytest.raises(DataError, match="X_query: the columns"):
        made.generate(x[:1] + 0.5)


def test_queries_of_a_data_frame_are_read_by_name():
    x, y = table()
    frame = pd.DataFrame(x, columns=list("abcd"))
    made = DeletionRobustCounterfactual(3).fit(frame, y)
    queries = frame.iloc[:5]
    straight, turned = made.generate(queries), made.generate(queries[list("dcba")])
    assert np.array_equal(straight.counterfactuals, turned.counterfactuals, equal_nan=True)


def test_what_cannot_be_reached_is_nan():
    x, y = table()
    queries = rejected(x, y)
    for options in ({"immutable": [0, 1, 2, 3]}, {"bounds": (queries.min() - 0.01, queries.min())}):
        found = DeletionRobustCounterfactual(3, **options).fit(x, y).generate(queries)
        assert not found.valid.any()
        assert not found.certified.any()
        assert np.isnan(found.counterfactuals).all()
        assert np.isnan(found.cost).all()
        assert (validity_under_deletion(found, x, y, 3) == 0).all()
        assert (validity_under_deletion(found, x, y, 3, "worst") == 0).all()
    outside = DeletionRobustCounterfactual(3, immutable=[2], bounds=(None, [9, 9, -8, 9])).fit(x, y).generate(queries)
    assert np.isnan(outside.counterfactuals).all()


def test_too_few_planes_are_told_as_not_valid():
    x, y = table(200, 8)
    found = DeletionRobustCounterfactual(0.1, max_planes=1).fit(x, y).generate(rejected(x, y))
    assert not found.valid.any()
    assert (found.worst_score < 0).all()


def test_models_of_other_makers_give_the_same():
    x, y = table()
    queries = rejected(x, y)
    own = DeletionRobustCounterfactual(3).fit(x, y, C=0.5).generate(queries)
    model = LogisticRegression(C=0.5, tol=1e-12, max_iter=1000).fit(x, y)
    assert DeletionRobustCounterfactual(3).fit(x, y, model).generate(queries).cost == pytest.approx(own.cost, abs=1e-4)
    one, two = nn.Linear(4, 1).double(), nn.Linear(4, 2).double()
    w = ExactRetrainer(x, y, 0.5).weights
    with torch.no_grad():
        one.weight[:], one.bias[:] = torch.as_tensor(w[None, :-1]), torch.as_tensor(w[-1:])
        two.weight[:], two.bias[:] = torch.zeros(2, 4), torch.zeros(2)
        two.weight[1], two.bias[1] = torch.as_tensor(w[:-1]), torch.as_tensor(w[-1])
    for layer in (one, two):
        made = DeletionRobustCounterfactual(3).fit(x, y, layer, C=0.5)
        assert made.generate(queries).cost == pytest.approx(own.cost, abs=1e-8)


# ---- networks


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("route", ["last-layer", "gauss-newton", "local-linear"])
def test_networks_by_three_routes(route, outputs):
    x, y = table()
    model = trained(x, y, outputs)

    def score(points):
        with torch.no_grad():
            told = model(torch.as_tensor(points)).numpy()
        return told[:, 0] if outputs == 1 else told[:, 1] - told[:, 0]

    queries = x[score(x) < -0.2][:4]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made = DeletionRobustCounterfactual(4, bounds=(-4, 4), immutable=[3]).fit(x, y, model, route=route)
    found = made.generate(queries)
    there = found.valid
    assert there.sum() >= (
        1 if route == "local-linear" else 4
    )  # a stand-in's point counts only where the model accepts it
    assert (score(found.counterfactuals[there]) >= 0).all()
    assert (found.counterfactuals[there, 3] == queries[there, 3]).all()
    assert np.abs(found.counterfactuals[there]).max() <= 4
    assert not (found.cost[there] < found.plain_cost[there]).any()
    assert [len(rows) for rows in found.worst_rows] == np.where(there, 4, 0).tolist()
    assert model.training
    assert all((state[name] == value).all() for name, value in model.state_dict().items())
    assert all(p.grad is None or route for p in model.parameters())
    down = made.generate(x[score(x) > 0.2][:2], 0)
    assert (score(down.counterfactuals[down.valid]) <= 0).all()
    fixed = clone(made).set_params(worst_set="at-factual").fit(x, y, model, route=route).generate(queries)
    assert np.isfinite(fixed.cost[there]).all()


def test_points_and_rows_in_pieces_are_the_same(monkeypatch):
    """Many deleted rows of many points by many weights are gathered in pieces."""
    x, y = table()
    directions, points = np.random.default_rng(0).normal(size=(120, 5)), np.random.default_rng(1).normal(size=(30, 4))
    rows = linear.worst_rows(directions, points, 7)
    whole, model = linear.summed(directions, rows), trained(x, y)
    score = NetworkScore(model, x, y, "gauss-newton", 0.05, "leverage")
    found = score.rows_at(points, 7, 1.0)
    values = score.value_and_slope(points, found)
    for module in (linear, networks):
        monkeypatch.setattr(module, "chunks", lambda n, cost: chunks(n, cost, int(3 * cost)))
    assert np.array_equal(linear.summed(directions, rows), whole)
    assert np.allclose(whole, directions[rows].sum(axis=1))
    assert np.array_equal(score.rows_at(points, 7, 1.0), found)
    for a, b in zip(score.value_and_slope(points, found), values, strict=True):
        assert np.allclose(a, b, atol=1e-10)


def test_the_last_layer_of_a_linear_network_is_the_linear_answer():
    """With identity features the search must find what cutting planes find."""
    x, y = table()
    w = ExactRetrainer(x, y).weights
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        model[1].weight[:], model[1].bias[:] = torch.as_tensor(w[None, :-1]), torch.as_tensor(w[-1:])
    queries = rejected(x, y)
    exact = DeletionRobustCounterfactual(4, influence="first-order-damped").fit(x, y).generate(queries)
    for route in ("last-layer", "gauss-newton"):
        made = DeletionRobustCounterfactual(4, influence="first-order-damped").fit(x, y, model, route=route)
        found = made.generate(queries)
        assert made.network_.directions.numpy() == pytest.approx(
            LogisticInfluence(x, y, w, 1 / 120).directions("first-order-damped"), abs=1e-9
        )
        assert (found.cost >= exact.cost - 1e-6).all()
        assert found.cost == pytest.approx(exact.cost, rel=0.02)
        assert found.plain_cost == pytest.approx(exact.plain_cost, abs=1e-6)


def test_gauss_newton_directions_are_the_dense_inverse():
    x, y = table(30)
    model = network()
    for kind in ("first-order", "leverage"):
        made = NetworkScore(model, x, y, "gauss-newton", 0.05, kind)
        score, j = (part.detach().numpy() for part in made.parts(torch.as_tensor(x)))
        p = 1 / (1 + np.exp(-score))
        s = p * (1 - p)
        inverse = np.linalg.inv((j * s[:, None]).T @ j / 30 + 0.05 * np.eye(j.shape[1]))
        expected = ((p - y)[:, None] * j) @ inverse / 30
        if kind == "leverage":
            expected /= (1 - s * np.einsum("ij,jk,ik->i", j, inverse, j) / 30)[:, None]
        assert made.directions.numpy() == pytest.approx(expected, abs=1e-10)


def test_any_model_by_its_local_stand_in():
    x, y = table()
    forest = RandomForestClassifier(20, max_depth=3, random_state=0).fit(x, y)
    queries = x[forest.predict(x) == 0][:3]
    made = DeletionRobustCounterfactual(2).fit(x, y, forest, route="local-linear", seed=1)
    found = made.generate(queries)
    again = made.generate(queries)
    assert np.array_equal(found.counterfactuals, again.counterfactuals, equal_nan=True)
    assert (forest.predict(found.counterfactuals[found.valid]) == 1).all()
    never = DeletionRobustCounterfactual(2).fit(x, y, lambda rows: np.full(len(rows), -1.0), route="local-linear")
    nowhere = never.generate(queries[:1])
    assert not nowhere.valid.any()
    assert np.isnan(nowhere.cost).all()


def test_networks_that_a_route_cannot_take():
    x, y = table()
    last = nn.Sequential(nn.Linear(4, 1), nn.Tanh()).double()
    with pytest.raises(ModelError, match=r"its last nn\.Linear"):
        DeletionRobustCounterfactual(2).fit(x, y, last)
    with pytest.raises(ModelError, match="two classes"):
        DeletionRobustCounterfactual(2).fit(x, y, network(outputs=3))
    with pytest.raises(ModelError, match="needs a network"):
        DeletionRobustCounterfactual(2).fit(x, y, RandomForestClassifier(2).fit(x, y))
    with pytest.raises(ModelError, match="a function"):
        DeletionRobustCounterfactual(2).fit(x, y, "model", route="local-linear")
    with pytest.raises(InputError, match="route must be"):
        DeletionRobustCounterfactual(2).fit(x, y, network(), route="lime")
    with pytest.raises(InputError, match="verify"):
        DeletionRobustCounterfactual(2, verify=True).fit(x, y, network())
    with pytest.raises(InputError, match="norm 1"):
        DeletionRobustCounterfactual(2, norm=1).fit(x, y, network())
    three = RandomForestClassifier(5, random_state=0).fit(x, y + (x[:, 0] > 1))
    with pytest.raises(ModelError, match="knows 3"):
        DeletionRobustCounterfactual(2).fit(x, y, three, route="local-linear").generate(x[:1])


# ---- errors


@pytest.mark.parametrize(
    ("k", "what"),
    [(120, "all of the 120"), (500, "all of the 120"), (-1, "not negative"), (True, "not negative"), (1.0, "share below 1"),
     (0.99, "no row"), (float("nan"), "not negative")],
)  # fmt: skip
def test_numbers_of_deletions_that_cannot_be(k, what):
    x, y = table()
    with pytest.raises(ValueError, match=what):
        DeletionRobustCounterfactual(k).fit(x, y)


def test_shares_are_rounded_down_but_delete_at_least_one():
    x, y = table()
    for k, expected in ((0.001, 1), (0.02, 2), (0.05, 6), (0.1, 12), (0.0, 0), (0, 0), (3, 3)):
        assert DeletionRobustCounterfactual(k).fit(x, y).k_ == expected


@pytest.mark.parametrize(
    ("options", "what"),
    [({"norm": 3}, "norm"), ({"worst_set": "both"}, "worst_set"), ({"influence": "none"}, "influence"),
     ({"max_planes": 0}, "max_planes"), ({"verify": True, "worst_set": "at-factual"}, "verify finds"),
     ({"damping": 0.0}, "damping"), ({"immutable": [9]}, "no column 9"), ({"bounds": (1, 0)}, "bounds must be"),
     ({"bounds": (1, 2, 3)}, "bounds must be"),
     ({"bounds": ([1, 2], 3)}, "bounds must be")],
)  # fmt: skip
def test_options_that_cannot_be(options, what):
    x, y = table()
    with pytest.raises(InputError, match=what):
        DeletionRobustCounterfactual(2, **options).fit(x, y)


def test_data_that_cannot_be():
    x, y = table()
    with pytest.raises(DataError, match="labels must be 0 and 1"):
        DeletionRobustCounterfactual(2).fit(x, y + 1)
    with pytest.raises(SeparableDataError, match="C = 1"):
        DeletionRobustCounterfactual(2).fit(x, (x[:, 0] > 0).astype(int), C=np.inf)
    made = DeletionRobustCounterfactual(2).fit(x, y)
    with pytest.raises(DataError, match="X_query"):
        made.generate(x[:, :2])
    with pytest.raises(InputError, match="NaN"):
        made.generate(x * np.nan)
    with pytest.raises(InputError, match="target"):
        made.generate(x, 2)
    with pytest.raises(DataError, match="one-hot columns first"):
        DeletionRobustCounterfactual(2).fit(pd.DataFrame(x).astype(str) + "a", y)
    with pytest.raises(InputError, match="C must be"):
        DeletionRobustCounterfactual(2).fit(x, y, nn.Linear(4, 1), C=0)
    with pytest.raises(InputError, match="mode"):
        validity_under_deletion(x, x, y, 2, "best")
    with pytest.raises(InputError, match="draws"):
        validity_under_deletion(x, x, y, 2, draws=0)
    with pytest.raises(InputError, match="target"):
        validity_under_deletion(x, x, y, 2, target=3)


def test_a_model_that_is_not_at_its_minimum_is_warned_about():
    x, y = table()
    model = LogisticRegression(tol=1e-10).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeletionRobustCounterfactual(2).fit(x, y, model)
    model.coef_ = model.coef_ * 1.5
    with pytest.warns(InfluenceWarning, match="norm 0"):
        DeletionRobustCounterfactual(2).fit(x, y, model)
    with pytest.warns(InfluenceWarning, match="influence is off"):
        worst_deletion(model, x, y, x[0], 2)


@pytest.mark.parametrize(
    ("model", "what"),
    [(LogisticRegression(), "not fitted"), (LogisticRegression(class_weight="balanced"), "class weights"),
     (LogisticRegression(fit_intercept=False), "intercept"),
     (LogisticRegression(l1_ratio=0.5, solver="saga", max_iter=5000), "L1")],
)  # fmt: skip
def test_models_that_influence_cannot_follow(model, what):
    x, y = table()
    if what != "not fitted":
        model.fit(x, y)
    with pytest.raises(ModelError, match=what):
        DeletionRobustCounterfactual(2).fit(x, y, model)


def test_other_models_that_cannot_be():
    x, y = table()
    names = np.array(["bad", "good"])[y]
    for model, what in (
        (LogisticRegression().fit(x, names), "0 and 1"),
        (LogisticRegression().fit(x[:, :2], y), "takes 2 features"),
        (nn.Linear(4, 3), "one score or two"),
    ):
        with pytest.raises(ModelError, match=what):
            DeletionRobustCounterfactual(2).fit(x, y, model)
    with pytest.raises(ModelError, match=r"nn\.Linear or None"):
        worst_deletion(network(), x, y, x[0], 2)


@pytest.mark.parametrize("norm", [1, 2])
def test_costs_are_the_same_as_columns_in_other_units(norm):
    rng, costs = np.random.default_rng(3), np.array([1.0, 2.0, 0.5, 3.0])
    planes, x = rng.normal(size=(3, 5)), rng.normal(size=4)
    priced = nearest(x, planes, 1.0, limited(costs=costs), norm)
    stretched = planes / np.append(costs, 1.0)
    plain = nearest(x * costs, stretched, 1.0, FREE, norm)
    assert priced is not None
    assert plain is not None
    assert np.linalg.norm((priced - x) * costs, ord=norm) == pytest.approx(
        np.linalg.norm(plain - x * costs, ord=norm), abs=1e-8
    )
    assert (planes @ np.append(priced, 1.0) >= 1 - 1e-7).all()


def test_one_plane_with_costs_is_its_closed_form():
    w, x, costs = np.array([1.0, -2.0, 0.5, 1.0, -0.3]), np.array([0.2, 0.1, -0.4, 0.0]), np.array([1.0, 2.0, 0.5, 3.0])
    slope = w[:-1] / costs**2
    exact = x + (1.0 - w[:-1] @ x - w[-1]) / (w[:-1] @ slope) * slope
    assert np.allclose(nearest(x, w[None], 1.0, limited(costs=costs)), exact, atol=1e-12)


@pytest.mark.parametrize("route", [None, "last-layer"])
def test_a_dear_column_is_left_where_it_is_by_a_robust_counterfactual(route):
    x, y = table()
    model = None if route is None else trained(x, y)
    options = {} if route is None else {"route": route}
    queries = rejected(x, y)
    found = DeletionRobustCounterfactual(k=3, costs={0: 20.0}).fit(x, y, model, **options).generate(queries)
    plain = DeletionRobustCounterfactual(k=3).fit(x, y, model, **options).generate(queries)
    moved, before = (np.abs(one.counterfactuals - queries)[one.valid].mean(axis=0) for one in (found, plain))
    assert found.valid.any()
    assert moved[0] < 0.1 * before[0]
    there = found.valid
    change = (found.counterfactuals - queries) * [20.0, 1.0, 1.0, 1.0]
    assert np.allclose(found.cost[there], np.linalg.norm(change[there], axis=1))
