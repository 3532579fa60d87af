import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.subject import Column, Dataset, Rows
from theodolite.core.train import Recipe
from theodolite.explanations.counterfactuals import (
    ClosestCounterfactual,
    CounterfactualNotFoundError,
    NearestNeighbour,
    TableSchema,
)
from theodolite.explanations.model_changes import perturbed_weights, retrain, robust_validity
from theodolite.survey.explanations.counterfactuals import one_hot_groups

QUICK = settings(max_examples=30, deadline=None)


def line(weights, intercept):
    net = nn.Linear(len(weights), 1).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([weights], dtype=torch.float64))
        net.bias.fill_(intercept)
    return net


def table(n=200, d=3, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, d))


def cube(d):
    """Training rows whose ranges are [0, 1]."""
    return np.vstack([np.zeros(d), np.ones(d), table(20, d)])


def test_the_closest_point_to_a_half_space_is_the_projection():
    net = line([2.0, -1.0, 3.0], -2.5)
    x = np.array([[0.4, 0.6, 0.3], [0.3, 0.3, 0.5]])
    found = ClosestCounterfactual().fit(net, cube(3)).generate(x)
    w = np.array([2.0, -1.0, 3.0])
    exact = x + ((2.5 - x @ w) / (w @ w))[:, None] * w
    assert np.allclose(found.counterfactuals, exact, atol=0.02)
    assert np.allclose(found.cost, (2.5 - x @ w) / np.linalg.norm(w), rtol=0.01, atol=1e-3)
    assert found.valid.all()


def test_the_closest_point_in_l1_changes_the_steepest_column_alone():
    found = ClosestCounterfactual(norm=1).fit(line([2.0, -1.0, 3.0], -2.5), cube(3)).generate([[0.4, 0.6, 0.3]])
    assert found.cost[0] == pytest.approx((2.5 - (0.8 - 0.6 + 0.9)) / 3, rel=0.02)


def test_a_dear_column_changes_less_by_the_square_of_its_cost():
    w, costs = np.array([2.0, -1.0, 3.0]), np.array([1.0, 1.0, 3.0])
    x = np.array([[0.4, 0.6, 0.3]])
    found = ClosestCounterfactual(costs=costs).fit(line(w.tolist(), -2.5), cube(3)).generate(x)
    priced = w / costs**2  # the nearest in the metric of the costs
    exact = x + ((2.5 - x @ w) / (w @ priced))[:, None] * priced
    assert np.allclose(found.counterfactuals, exact, atol=0.02)
    assert found.cost[0] == pytest.approx(float(np.linalg.norm((exact - x) * costs)), rel=0.02)


def test_in_l1_the_column_with_most_effect_for_its_cost_changes_alone():
    x = np.array([[0.4, 0.4, 0.4]])
    found = ClosestCounterfactual(norm=1, costs={2: 2.0}).fit(line([2.0, -1.0, 3.0], -2.5), cube(3)).generate(x)
    assert np.flatnonzero(np.abs(found.counterfactuals - x)[0] > 0.01).tolist() == [0]
    assert found.cost[0] == pytest.approx((2.5 - (0.8 - 0.4 + 1.2)) / 2, rel=0.02)


def test_neighbours_are_ranked_by_cost():
    train = np.vstack([np.zeros(2), np.ones(2), [0.9, 0.1], [0.2, 0.85]])
    net = line([1.0, 1.0], -0.95)
    plain = NearestNeighbour().fit(net, train).generate([[0.3, 0.2]])
    dear = NearestNeighbour(costs={1: 4.0}).fit(net, train).generate([[0.3, 0.2]])
    assert np.allclose(plain.counterfactuals, [[0.9, 0.1]]) or np.allclose(plain.counterfactuals, [[0.2, 0.85]])
    assert np.allclose(dear.counterfactuals, [[0.9, 0.1]])


@pytest.mark.parametrize(
    ("costs", "message"),
    [({0: 0.0}, "above 0"), ([1.0, np.nan, 1.0], "above 0"), ([1.0], "shape"), ({9: 1.0}, "no column 9")],
)
def test_costs_that_cannot_be(costs, message):
    with pytest.raises((InputError, DataError), match=message):
        TableSchema.of(table(), costs=costs)


def test_in_many_columns_l1_still_moves_few_of_them():
    """The nearest accepted row changes every column; the search must not be content with it."""
    rng = np.random.default_rng(0)
    w, train = rng.normal(size=30), cube(30)
    net = line(w.tolist(), -float(np.quantile(train @ w, 0.8)))
    x = train[2:][(train[2:] @ w < np.quantile(train @ w, 0.8))][:5]
    found = ClosestCounterfactual(norm=1).fit(net, train).generate(x)
    for row, cost, point in zip(x, found.cost, found.counterfactuals, strict=True):
        gap, exact = float(np.quantile(train @ w, 0.8) - row @ w), 0.0
        for j in np.argsort(
            -np.abs(w)
        ):  # a linear program over a box: the steepest columns first, each as far as it goes
            step = min(gap / abs(w[j]), 1 - row[j] if w[j] > 0 else row[j])
            exact, gap = exact + step, gap - step * abs(w[j])
        assert cost == pytest.approx(exact, rel=0.03, abs=2e-3)
        assert (point == row).mean() > 0.5  # columns about as steep as each other may share the change


def test_units_of_the_user_do_not_matter():
    net, x = line([2.0, -1.0, 3.0], -2.5), np.array([[0.4, 0.6, 0.3]])
    factor, shift = np.array([1000.0, 0.01, 5.0]), np.array([-7.0, 3.0, 0.0])
    moved = line((np.array([2.0, -1.0, 3.0]) / factor).tolist(), -2.5 - float((shift / factor) @ [2.0, -1.0, 3.0]))
    plain = ClosestCounterfactual().fit(net, cube(3)).generate(x)
    other = ClosestCounterfactual().fit(moved, cube(3) * factor + shift).generate(x * factor + shift)
    assert other.cost == pytest.approx(plain.cost, rel=1e-3)
    assert np.allclose((other.counterfactuals - shift) / factor, plain.counterfactuals, atol=2e-3)


@QUICK
@given(st.integers(0, 10_000))
def test_projection_is_inside_idempotent_and_nearest(seed):
    rng = np.random.default_rng(seed)
    x = table(30, 6, seed)
    x[:, 3:] = np.eye(3)[rng.integers(0, 3, 30)]
    x[:3, 3:] = np.eye(3)
    schema = TableSchema.of(x, immutable=[0], increasing=[1], groups=[(3, 4, 5)])
    region = schema.region(x)
    z = torch.as_tensor(rng.normal(size=(30, 6)) * 2)
    p = region.project(z)
    assert torch.allclose(region.project(p), p, atol=1e-9)
    assert torch.equal(p[:, 0], region.start[:, 0])
    assert (p[:, 1] >= region.start[:, 1]).all()
    assert torch.allclose(p[:, 3:].sum(dim=1), torch.ones(30, dtype=torch.float64))
    assert (p >= region.low - 1e-9).all()
    assert (p <= region.high + 1e-9).all()
    inside = region.project(torch.as_tensor(rng.normal(size=(30, 6))))
    # the angle at a projection onto a convex set is never acute
    assert (((z - p) * (inside - p)).sum(dim=1) <= 1e-8).all()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000))
def test_what_may_not_change_does_not(seed):
    rng = np.random.default_rng(seed)
    x = table(60, 6, seed)
    x[:, 3:] = np.eye(3)[np.arange(60) % 3]
    net = line(rng.normal(size=6).tolist(), -0.2)
    names = ["age", "pay", "debt", "a", "b", "c"]
    generator = ClosestCounterfactual(
        names=names, immutable=["age"], increasing=["pay"], decreasing=["debt"], groups=[("a", "b", "c")],
        steps=40, binary_search_steps=3, k=10,
    )  # fmt: skip
    found = generator.fit(net, x).generate(x[:12])
    good, there = found.counterfactuals, found.valid
    assert (good[there, 0] == x[:12][there, 0]).all()
    assert (good[there, 1] >= x[:12][there, 1]).all()
    assert (good[there, 2] <= x[:12][there, 2]).all()
    assert np.isin(good[there, 3:], (0, 1)).all()
    assert (good[there, 3:].sum(axis=1) == 1).all()
    assert np.isnan(good[~there]).all()
    answer = net(torch.as_tensor(good[there]))[:, 0].detach().numpy()
    assert (answer >= 0).all()


def test_rows_that_have_the_class_come_back_unchanged():
    x = np.array([[0.9, 0.9], [0.1, 0.2]])
    found = ClosestCounterfactual().fit(line([1.0, 1.0], -1.0), cube(2)).generate(x)
    assert found.unchanged.tolist() == [True, False]
    assert (found.counterfactuals[0] == x[0]).all()
    assert found.cost[0] == 0


def test_what_cannot_be_reached_is_nan_or_an_error():
    x = np.array([[0.1, 0.2]])
    for options in ({"immutable": [0, 1]}, {"bounds": (0.0, 0.3)}, {"bounds": {0: (0.5, 0.6), 1: (0.0, 0.3)}}):
        found = ClosestCounterfactual(steps=30, **options).fit(line([1.0, 1.0], -1.0), cube(2)).generate(x)
        assert not found.valid.any()
        assert not found.reached.any()
        assert np.isnan(found.counterfactuals).all()
        assert np.isnan(found.cost).all()
    stuck = ClosestCounterfactual(steps=30, immutable=[0, 1], on_failure="raise").fit(line([1.0, 1.0], -1.0), cube(2))
    with pytest.raises(CounterfactualNotFoundError, match="1 of 1 rows"):
        stuck.generate(x)


def test_bounds_hold_and_columns_are_found_by_name():
    frame = pd.DataFrame(cube(2), columns=["pay", "debt"])
    generator = ClosestCounterfactual(bounds={"pay": (None, 0.5)}).fit(line([1.0, 1.0], -1.0), frame)
    found = generator.generate(pd.DataFrame({"debt": [0.2], "pay": [0.4]}))
    assert found.factuals.tolist() == [[0.4, 0.2]]
    assert found.valid.all()
    assert found.counterfactuals[0, 0] <= 0.5
    with pytest.raises(DataError, match="lacks the columns"):
        generator.generate(pd.DataFrame({"debt": [0.2]}))
    with pytest.raises(DataError, match="no column 'wage'"):
        ClosestCounterfactual(immutable=["wage"]).fit(line([1.0, 1.0], -1.0), frame)


def test_a_row_outside_the_training_ranges_may_stay_there():
    found = ClosestCounterfactual().fit(line([1.0, 0.0], -0.8), cube(2)).generate([[0.1, 1.7]])
    assert found.counterfactuals[0, 1] == pytest.approx(1.7, abs=0.02)


def test_the_nearest_neighbour_is_a_training_row_and_needs_no_gradient():
    x = table(100, 2)
    model = LogisticRegression().fit(x, x.sum(axis=1) > 1)
    found = NearestNeighbour().fit(model, x).generate(x[:10])
    accepted = x[model.predict(x) == 1]
    for row, point in zip(x[:10][~found.unchanged], found.counterfactuals[~found.unchanged], strict=True):
        exact = accepted[np.argmin(np.linalg.norm((accepted - row) / np.ptp(x, axis=0), axis=1))]
        assert np.allclose(point, exact)
    with pytest.raises(ModelError, match="gradients"):
        ClosestCounterfactual().fit(model, x).generate(x[:3])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"norm": 3}, "norm"), ({"sigma": 0.0}, "sigma"), ({"k": 1}, "k must")],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        ClosestCounterfactual(**options)


def test_tables_are_checked():
    x = cube(3)
    for broken, words in (
        (np.full((3, 3), np.nan), "NaN"), (x[0], "shape"), (np.zeros((0, 3)), "zero training rows"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            TableSchema.of(broken)
    with pytest.raises(DataError, match="not one-hot"):
        TableSchema.of(x, groups=[(0, 1)])
    with pytest.raises(DataError, match="twice"):
        TableSchema.of(x, groups=[(0, 0)])
    with pytest.raises(InputError, match="bounds"):
        TableSchema.of(x, bounds=(1.0, 0.0))
    with pytest.raises(InputError, match="not fitted"):
        ClosestCounterfactual().generate(x)
    with pytest.raises(DataError, match="columns"):
        TableSchema.of(x).rows(np.zeros((2, 5)))


def test_a_constant_column_stays_and_a_mask_may_be_a_list():
    x = table(60)
    x[:, 2] = 7.0
    found = ClosestCounterfactual(steps=60, immutable=[True, False, False]).fit(line([1.0, 1.0, 1.0], -7.7), x)
    told = found.generate(x[:5])
    assert (told.counterfactuals[told.valid][:, 2] == 7.0).all()
    assert (told.counterfactuals[told.valid][:, 0] == x[:5][told.valid, 0]).all()
    schema = TableSchema.of(x)
    assert schema.span.tolist() == pytest.approx([*np.ptp(x[:, :2], axis=0), 1.0])
    assert schema.high[2] == schema.low[2] == 7.0


def test_a_kind_that_no_training_row_has_may_be_kept_and_is_never_taken():
    x = np.column_stack([table(40, 1), np.eye(3)[np.arange(40) % 2]])
    schema = TableSchema.of(x, groups=[(1, 2, 3)], immutable=[1])
    assert schema.absent == {3}
    own = np.array([[0.5, 0.0, 0.0, 1.0]])
    assert schema.region(own).possible.all()
    assert schema.region(own).project(torch.zeros(1, 4, dtype=torch.float64))[0, 1:].tolist() == [0, 0, 1]
    free = TableSchema.of(x, groups=[(1, 2, 3)]).region(x[:1])
    pushed, _ = free.settle(torch.tensor([[0.5, 0.0, 0.0, 9.0]], dtype=torch.float64))
    assert pushed[0, 3] == 0


def test_each_row_alone_gets_what_it_gets_in_a_batch():
    x, net = table(12), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for method in (ClosestCounterfactual(steps=40, k=10), ClosestCounterfactual(steps=40, k=10, norm=1)):
        made = method.fit(net, table())
        whole, found = made.generate(x), [made.generate(row[None]) for row in x]
        alone = np.concatenate([one.counterfactuals for one in found])
        assert np.allclose(alone, whole.counterfactuals, atol=1e-9, equal_nan=True)


def test_the_categories_of_a_file_are_its_groups():
    rows = Rows(torch.zeros(2, 5), torch.tensor([0, 1]))
    columns = (
        Column("pay", "numeric", 0), Column("job", "category", 0, ("a", "b", "c")),
        Column("own", "boolean", 0, ("False", "True")), Column("class", "category", 0, ("no", "yes")),
    )  # fmt: skip
    data = Dataset(
        "one",
        "tabular",
        "classification",
        rows,
        rows,
        rows,
        ("pay", "job=a", "job=b", "job=c", "own"),
        ("no", "yes"),
        columns,
    )
    assert one_hot_groups(data) == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"immutable": "age"}, "list of names"), ({"immutable": [True]}, "mask")],
)
def test_columns_are_told_as_a_list(options, words):
    with pytest.raises(InputError, match=words):
        TableSchema.of(cube(3), **options)


def test_tables_of_words_and_double_names_are_told():
    with pytest.raises(DataError, match="one-hot columns first"):
        TableSchema.of(pd.DataFrame({"a": ["x", "y"], "b": [1, 2]}))
    with pytest.raises(DataError, match="all of them different"):
        TableSchema.of(pd.DataFrame(np.eye(2), columns=["a", "a"]))


def test_a_model_without_probabilities_or_with_one_class_is_told():
    x = table(40)
    with pytest.raises(ModelError, match="predict_proba"):
        NearestNeighbour(k=10).fit(LinearSVC().fit(x, x[:, 0] > 0.5), x).generate(x[:2])
    with pytest.raises(ModelError, match="one class only"):
        robust_validity(x, [DecisionTreeClassifier().fit(x, np.ones(40))])


# ---- changes of the model


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


RECIPE = Recipe(epochs=20, batch_size=32, lr=5e-2)


@pytest.mark.parametrize("mode", ["seed", "leave-one-out", "bootstrap"])
def test_retrained_models_differ_repeat_and_learn(mode):
    x = table()
    y = (x.sum(axis=1) > 1.5).astype(int)
    one, two = (retrain(network, x, y, 3, mode=mode, leave_out=5, recipe=RECIPE, seed=1) for _ in range(2))
    rows = torch.as_tensor(x).float()
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a(rows), b(rows))
        assert ((a(rows).argmax(dim=1).numpy() == y).mean()) > 0.7
    assert not torch.allclose(one[0](rows), one[1](rows))


def test_a_factory_without_an_argument_is_made_under_the_seed():
    x, y = table(60, 2), (table(60, 2)[:, 0] > 0.5).astype(int)
    recipe = Recipe(epochs=2, batch_size=32, lr=1e-2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = (retrain(lambda: nn.Linear(2, 2), x, y, 2, recipe=recipe, seed=3) for _ in range(2))
    assert torch.equal(one[1].weight, two[1].weight)
    assert not torch.equal(one[0].weight, one[1].weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_option_with_a_default_is_no_seed():
    x, y = table(60, 2), (table(60, 2)[:, 0] > 0.5).astype(int)
    recipe = Recipe(epochs=2, batch_size=32, lr=1e-2)
    (wide,) = retrain(
        lambda hidden=3: nn.Sequential(nn.Linear(2, hidden), nn.Linear(hidden, 2)), x, y, 1, recipe=recipe
    )
    assert wide[0].out_features == 3
    one, two = (retrain(DecisionTreeClassifier, x, y, 2, mode="bootstrap", seed=4) for _ in range(2))
    assert one[0].random_state is not None
    assert all((a.predict_proba(x) == b.predict_proba(x)).all() for a, b in zip(one, two, strict=True))


def test_retraining_that_changes_nothing_is_refused():
    x, y = table(60, 2), np.array(["no", "yes"])[(table(60, 2)[:, 0] > 0.5).astype(int)]
    with pytest.raises(InputError, match="bootstrap"):
        retrain(LogisticRegression, x, y, 2)
    kept = retrain(LogisticRegression, x, y, 2, mode="leave-one-out", leave_out=5)
    assert not np.array_equal(kept[0].coef_, kept[1].coef_)


def test_labels_that_a_network_cannot_learn_are_told():
    x = table(30)
    for broken in (
        np.arange(30) % 2 * 2,
        np.array(["a", "b"])[np.arange(30) % 2],
        np.where(np.arange(30) % 2, 1.0, np.nan),
    ):
        with pytest.raises(DataError, match=r"class numbers 0\.\.1"):
            retrain(network, x, broken, 1, recipe=RECIPE)
    with pytest.raises(DataError, match="one label"):
        retrain(network, x, np.zeros((30, 1)), 1)


def test_retraining_refuses_shared_initial_weights():
    with pytest.raises(InputError, match="same initial weights"):
        retrain(lambda seed: network(0), table(), np.arange(200) % 2, 2, recipe=RECIPE)


def test_estimators_and_single_logits_are_retrained_too():
    x = table()
    y = (x.sum(axis=1) > 1.5).astype(int)
    forests = retrain(lambda seed: LogisticRegression(), x, y, 2, mode="bootstrap")
    nets = retrain(lambda seed: nn.Sequential(network(seed), nn.Dropout(0.1), nn.Linear(2, 1)), x, y, 2, recipe=RECIPE)
    shares = robust_validity(x, [*forests, *nets])
    assert shares.shape == (200,)
    assert shares[y == 1].mean() > shares[y == 0].mean()


def test_a_point_that_is_none_survives_no_change():
    points = np.array([[1.0, 1.0], [np.nan, 1.0]])
    for some in (points, torch.as_tensor(points), pd.DataFrame(points)):
        assert robust_validity(some, [line([1.0, 0.0], 0.0)]).tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match="points must be"):
        robust_validity(points[0], [line([1.0, 0.0], 0.0)])


def test_robust_validity_counts_models_of_the_target_class():
    points = np.array([[0.2, 0.0], [0.6, 0.0], [0.9, 0.0]])
    models = [line([1.0, 0.0], -edge) for edge in (0.1, 0.5, 0.8)]
    assert robust_validity(points, models).tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert robust_validity(points, models, target=0).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    three = nn.Linear(2, 3).double()
    with torch.no_grad():
        three.weight.zero_()
        three.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    assert robust_validity(points, [three], target=1).tolist() == [
        0,
        0,
        0,
    ]  # another class than 0, and not the wanted one
    with pytest.raises(ModelError, match="target="):
        robust_validity(points, [three])
    with pytest.raises(InputError, match="at least one"):
        robust_validity(points, [])


def test_disturbed_weights_leave_the_model_alone():
    net = network(0)
    before = [p.clone() for p in net.parameters()]
    changed = perturbed_weights(net, 2, scale=0.1, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not torch.equal(changed[0][0].weight, changed[1][0].weight)
    off = (changed[0][0].weight - net[0].weight).square().mean().sqrt() / net[0].weight.square().mean().sqrt()
    assert 0.05 < float(off.detach()) < 0.2
    with pytest.raises(InputError, match="scale"):
        perturbed_weights(net, 1, scale=0.0)


def test_settings_of_retraining_are_checked():
    with pytest.raises(InputError, match="n_models"):
        retrain(network, table(), np.arange(200) % 2, 0)
    with pytest.raises(DataError, match="labels"):
        retrain(network, table(), np.arange(10), 1)
