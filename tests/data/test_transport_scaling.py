import dataclasses
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LinearRegression, LogisticRegression

from theodolite.core.errors import DataError, InputError
from theodolite.data.transport_scaling import (
    Source,
    TransportScaling,
    choose_form,
    dataset_transport,
    label_distances,
    mix_gradient,
    project,
    region_errors,
    simplex_grid,
)
from theodolite.data.transport_scaling.forms import FORMS, Law
from theodolite.data.transport_scaling.mixes import count_rows, nearest_allowed
from theodolite.data.transport_scaling.selection import _shapley, climb
from theodolite.data.transport_scaling.transport import exact_seconds, exact_transport

ot = pytest.importorskip("ot", reason="needs POT: pip install 'theodolite[data]'")


def blobs(n, share, seed, gap=2.0):
    """Two classes in a plane, the second with the given share."""
    rng = np.random.default_rng(seed)
    y = rng.permutation((np.arange(n) < round(share * n)).astype(int))
    return rng.normal(size=(n, 2)) + gap * y[:, None], y


def three_classes(n, shares, seed, noise=0.0):
    rng = np.random.default_rng(seed)
    y = rng.choice(3, n, p=shares)
    x = rng.normal(size=(n, 3)) + 2.5 * np.eye(3)[y]
    flipped = rng.random(n) < noise
    return x, np.where(flipped, rng.integers(0, 3, n), y)


@pytest.fixture(scope="module")
def fitted():
    sources = [
        Source("a", *three_classes(60, (0.9, 0.08, 0.02), 0), cost=1.0),
        Source("b", *three_classes(60, (0.02, 0.49, 0.49), 1), cost=3.0, total=500),
        Source("noisy", *three_classes(60, (0.34, 0.33, 0.33), 2, noise=0.9), cost=0.5),
    ]
    validation = three_classes(200, (0.34, 0.33, 0.33), 3)
    return TransportScaling(LogisticRegression(C=10), sizes=(30, 60), grid_step=0.2, n_repeats=2).fit(
        sources, *validation
    )


# ---- the distance


@settings(max_examples=20, deadline=None)
@given(arrays(np.float64, 30, elements=st.floats(-50, 50)), arrays(np.float64, 30, elements=st.floats(-50, 50)))
def test_points_on_a_line_match_sorted_quantiles(a, b):
    for power in (1, 2):
        found = dataset_transport(a[:, None], np.zeros(30), b[:, None], np.zeros(30), lambda_y=0, power=power)
        exact = np.mean(np.abs(np.sort(a) - np.sort(b)) ** power)
        assert found.value == pytest.approx(exact, rel=1e-9, abs=1e-9)
    assert dataset_transport(a[:, None], a, b[:, None], b, lambda_y=0, power=1).value == pytest.approx(
        wasserstein_distance(a, b), rel=1e-9, abs=1e-9
    )


def test_duals_prove_the_value_and_weights_are_masses():
    (X, y), (V, v) = blobs(40, 0.3, 0), blobs(50, 0.5, 1)
    found = dataset_transport(X, y, V, v)
    assert found.solver == "exact"
    assert found.converged
    assert found.gap < 1e-9
    assert found.source_potentials.mean() + found.target_potentials.mean() == pytest.approx(found.value)
    doubled = dataset_transport(np.r_[X, X], np.r_[y, y], V, v)
    weighted = dataset_transport(np.r_[X, X], np.r_[y, y], V, v, weights=np.r_[np.full(40, 5.0), np.zeros(40)])
    assert doubled.value == pytest.approx(found.value)
    assert weighted.value == pytest.approx(found.value)


def test_a_row_without_mass_has_the_potential_it_would_enter_with():
    rng = np.random.default_rng(0)
    cost, step = rng.uniform(size=(6, 5)), 1e-7
    mass = np.r_[rng.dirichlet(np.ones(5)), 0.0]  # off the kinks that equal masses make
    solved, moved = exact_transport(cost, mass), exact_transport(cost, mass * (1 - step) + step * np.eye(6)[5])
    expected = solved.source_potentials[5] - mass @ solved.source_potentials
    assert (moved.value - solved.value) / step == pytest.approx(expected, abs=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    sources = [
        three_classes(30, shares, k) for k, shares in enumerate([(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)])
    ]
    X, y = (np.concatenate(part) for part in zip(*sources))
    V, v = three_classes(50, (0.2, 0.3, 0.5), 9)
    source = np.repeat(np.arange(3), 30)
    weights = rng.uniform(1 - 1e-3, 1 + 1e-3, 90)  # off the kinks
    weights /= weights.sum()
    found = dataset_transport(X, y, V, v, weights=weights)
    gradient = mix_gradient(found.source_potentials, source, weights, 3)
    for i in range(3):
        own = np.where(source == i, weights, 0) / weights[source == i].sum()
        others = np.where(source == i, 0, weights) / weights[source != i].sum()
        up, down = (dataset_transport(X, y, V, v, weights=weights + s * 1e-7 * (own - others)).value for s in (1, -1))
        assert gradient[i] == pytest.approx((up - down) / 2e-7, rel=1e-3)
        plain = np.bincount(source, weights * found.source_potentials)[i] / weights[source == i].sum()
        assert abs(plain - gradient[i]) > 1e-3 * abs(gradient[i])  # "minus the mean of the others" matters
    shifted = mix_gradient(found.source_potentials + 5, source, weights, 3)
    assert np.allclose(shifted, gradient)


def test_label_table_of_normal_classes_is_the_closed_form():
    rng = np.random.default_rng(0)
    A, B = np.array([[1.0, 0.3], [0.3, 0.5]]), np.array([[2.0, -0.4], [-0.4, 1.0]])
    one = rng.multivariate_normal([0, 0], A, 40_000)
    two = rng.multivariate_normal([3, 1], B, 40_000)
    root = sqrtm(A)
    exact = 10 + np.trace(A + B - 2 * np.real(sqrtm(root @ B @ root)))
    found = label_distances(one, np.zeros(len(one)), two, np.zeros(len(two)), "gaussian")
    assert found[0, 0] == pytest.approx(exact, rel=0.03)
    table = label_distances(one[:90], np.arange(90) % 3, one[:90], np.arange(90) % 3)
    assert np.allclose(np.diag(table), 0)
    assert np.allclose(table, table.T)
    alone = ot.emd2([], [], ot.dist(one[:90][0::3], one[:90][1::3]))
    assert table[0, 1] == pytest.approx(alone)


def test_wrong_labels_cost_and_equal_labels_do_not():
    (X, y), (V, v) = blobs(60, 0.5, 0), blobs(60, 0.5, 1)
    wrong = 1 - y
    assert dataset_transport(X, wrong, V, v).value > 2 * dataset_transport(X, y, V, v).value
    assert dataset_transport(V, v, V, v).value == pytest.approx(0, abs=1e-9)
    assert dataset_transport(X, wrong, V, v, lambda_y=0).value == pytest.approx(
        dataset_transport(X, y, V, v, lambda_y=0).value
    )
    # as published, swapped names go unseen: the features of a label are those of the source itself
    names = dataset_transport(X, wrong, V, v, label_reference="pooled").value
    assert names == pytest.approx(dataset_transport(X, y, V, v, label_reference="pooled").value)


def test_without_the_label_term_mixes_of_classes_with_equal_features_look_alike():
    rng = np.random.default_rng(0)
    X = np.tile(rng.normal(size=(30, 2)), (2, 1))
    y = np.repeat([0, 1], 30)
    V = X + np.where(y == 1, 1.0, 0.0)[:, None]
    for first, second in ((y, 1 - y),):
        assert (
            dataset_transport(X, first, V, y, lambda_y=0).value == dataset_transport(X, second, V, y, lambda_y=0).value
        )


def test_a_label_the_validation_lacks_is_taken_from_the_pool():
    (X, y), (V, v) = blobs(40, 0.5, 0), blobs(40, 0.5, 1)
    strange = np.where(np.arange(40) < 10, 7, y)
    assert dataset_transport(X + np.where(strange == 7, 30, 0)[:, None], strange, V, v).value > 100


@pytest.mark.parametrize("dense", [True, False])
def test_sinkhorn_is_unbiased_and_near_the_exact_value(dense, monkeypatch):
    from theodolite.data.transport_scaling import transport

    if not dense:
        monkeypatch.setattr(transport, "_DENSE_BYTES", 100)
    (X, y), (V, v) = blobs(40, 0.3, 0), blobs(50, 0.6, 1)
    same = dataset_transport(V, v, V, v, solver="sinkhorn", reg=0.05)
    exact, soft = dataset_transport(X, y, V, v), dataset_transport(X, y, V, v, solver="sinkhorn", reg=0.05)
    assert abs(same.value) < 1e-3 * exact.value
    assert (soft.solver, soft.converged) == ("sinkhorn", True)
    assert soft.value == pytest.approx(exact.value, rel=0.1)
    a, b = (f.source_potentials - f.source_potentials.mean() for f in (exact, soft))
    assert np.corrcoef(a, b)[0, 1] > 0.95


def test_what_does_not_converge_is_an_error_unless_allowed(monkeypatch):
    from theodolite.data.transport_scaling import transport

    monkeypatch.setattr(transport, "_ROUNDS", 2)
    monkeypatch.setattr(transport, "_MARGINAL", 1e-7)
    (X, y), (V, v) = blobs(30, 0.3, 0), blobs(30, 0.6, 1)
    with pytest.raises(InputError, match="did not converge in 2 rounds"):
        dataset_transport(X, y, V, v, solver="sinkhorn", reg=1e-3)
    taken = dataset_transport(X, y, V, v, solver="sinkhorn", reg=1e-3, allow_unconverged=True)
    assert not taken.converged


def test_large_sets_go_to_sinkhorn_and_an_exact_one_above_4_gb_is_refused(monkeypatch):
    from theodolite.data.transport_scaling import transport

    (X, y), (V, v) = blobs(30, 0.3, 0), blobs(30, 0.6, 1)
    monkeypatch.setattr(transport, "_EXACT_CELLS", 100)
    assert dataset_transport(X, y, V, v, reg=0.1).solver == "sinkhorn"
    monkeypatch.setattr(transport, "_DENSE_BYTES", 100)
    with pytest.raises(InputError, match="most is 4"):
        dataset_transport(X, y, V, v, solver="exact")


def test_the_seconds_of_an_exact_solution_are_forecast_and_told_before_it_starts(monkeypatch):
    from theodolite.data.transport_scaling import transport

    rng = np.random.default_rng(0)
    cost = rng.uniform(size=(500, 400))
    one, four = exact_seconds(cost, 500), exact_seconds(cost, 8000)
    assert 0 < one < four
    assert exact_seconds(cost[:20, :20], 20) == 0  # solved sooner than forecast
    monkeypatch.setattr(transport, "_LONG_SECONDS", 0.0)
    (X, y), (V, v) = blobs(400, 0.3, 0), blobs(300, 0.6, 1)
    with pytest.warns(UserWarning, match="transport of 400 to 300 rows will take about"):
        dataset_transport(X, y, V, v)
    with pytest.warns(
        UserWarning, match="6 exact transports of 15 and 30 rows, besides the trainings, will take about"
    ):
        _fit()


def test_a_solver_that_stops_early_is_an_error_in_tables_and_selection(fitted, monkeypatch):
    from theodolite.data.transport_scaling import tables

    real = tables.exact_transport

    def stopped(cost, mass):
        return dataclasses.replace(real(cost, mass), converged=False, gap=0.2)

    monkeypatch.setattr(tables, "exact_transport", stopped)
    for call in (_fit, lambda: fitted.select(1000), lambda: fitted.predict([0.3, 0.3, 0.4], 60)):
        with pytest.raises(InputError, match=r"stopped before the optimum \(relative gap 0.2\)"):
            call()


def test_an_exact_solution_makes_only_the_label_table_that_it_needs(monkeypatch):
    from theodolite.data.transport_scaling import transport

    calls, real = [], transport.label_distances
    monkeypatch.setattr(
        transport, "label_distances", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    (X, y), (V, v) = blobs(40, 0.3, 0), blobs(50, 0.6, 1)
    dataset_transport(X, y, V, v, label_reference="pooled")
    assert len(calls) == 1
    dataset_transport(X, y, V, v, label_reference="pooled", solver="sinkhorn", reg=0.1)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"X_val": np.ones((4, 3))}, "same features"),
        ({"X": np.full((5, 2), np.nan)}, "NaN"),
        ({"y": [0, 1]}, "one label a row"),
        ({"y": [0, 0, 1, 1, None]}, "1 rows have no label"),
        ({"y": [0, 0, 1, 1, np.nan]}, "1 rows have no label"),
        ({"y": ["a", "a", "b", "b", "b"]}, "write them alike"),
        ({"weights": -np.ones(5)}, "weights must be"),
        ({"lambda_x": 0.0, "lambda_y": 0.0}, "not both 0"),
        ({"label_reference": "mine"}, "label reference"),
        ({"label_distance": "mine"}, "label distance"),
        ({"label_distance": "gaussian", "power": 1}, "power 2 only"),
        ({"X": np.ones(5)}, "shape"),
    ],
)
def test_sets_that_do_not_fit_are_refused(change, match):
    given = {"X": np.ones((5, 2)), "y": [0, 0, 1, 1, 1], "X_val": np.zeros((4, 2)), "y_val": [0, 0, 1, 1]}
    options = given | change
    rows = [options.pop(name) for name in ("X", "y", "X_val", "y_val")]
    with pytest.raises(InputError, match=match):
        dataset_transport(*rows, **options)


def test_labels_that_are_not_looked_at_may_be_missing():
    X = np.arange(5.0)[:, None]
    assert dataset_transport(X, [np.nan] * 5, X, ["a"] * 5, lambda_y=0).value == pytest.approx(0.0, abs=1e-12)


# ---- mixes, laws, projection


@given(st.integers(2, 4), st.sampled_from([0.1, 0.2, 0.25, 0.5]))
@settings(max_examples=15, deadline=None)
def test_grids_are_whole_sum_to_one_and_hold_every_vertex(m, step):
    grid = simplex_grid(m, step)
    assert np.abs(grid.sum(axis=1) - 1).max() < 1e-12
    assert len(np.unique(grid, axis=0)) == len(grid)
    assert all((grid == vertex).all(axis=1).any() for vertex in np.eye(m))
    assert len(simplex_grid(3)) == 66


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_counts_of_rows_sum_and_round(shares, n):
    p = np.array(shares) / np.sum(shares)
    counts = count_rows(p, n)
    assert counts.sum() == n
    assert np.abs(counts - p * n).max() < 1


@given(arrays(np.float64, 3, elements=st.floats(0.05, 1)))
@settings(max_examples=30, deadline=None)
def test_an_allowed_mix_keeps_budget_and_caps(p):
    caps, costs = np.array([0.5, 0.9, 0.4]), np.array([1.0, 4.0, 2.0])
    near = nearest_allowed(p / p.sum(), caps, costs, 2.0)
    assert near.sum() == pytest.approx(1)
    assert (near <= caps + 1e-9).all()
    assert near @ costs <= 2.0 + 1e-6


def test_projection_is_exact_at_both_sizes_and_on_a_power_law():
    for response in ("log_error", "score"):
        assert project(0.6, 0.8, 100, 300, [100, 300], response) == pytest.approx([0.6, 0.8], abs=1e-12)

    def law(n):
        return 1 + 1e-6 - 3.0 * n**-0.5

    assert project(law(100), law(300), 100, 300, 3000) == pytest.approx(law(3000), abs=1e-12)
    assert project(0.7, 0.95, 100, 200, 10_000, "score") > 1
    assert project(0.7, 0.95, 100, 200, 10**9) <= 1
    assert project([0.5, 0.6], [0.6, 0.7], 10, 20, 40).shape == (2,)
    bad = [
        ((0.5, 0.6, 20, 10, 40), "must rise"),
        ((0.5, 0.6, 10, 20, 0), "positive"),
        ((1.5, 1.6, 9, 20, 40), "at most 1"),
        ((math.nan, 0.6, 9, 20, 40), "must be finite"),
    ]
    for values, match in bad:
        with pytest.raises(InputError, match=match):
            project(*values)


@pytest.mark.parametrize("form", FORMS)
def test_a_law_finds_itself_and_its_gradient_is_exact(form):
    rng = np.random.default_rng(0)
    p, far = simplex_grid(3), rng.uniform(5, 9, 66)
    count = len(Law.fit(form, p, far, far).coefficients)
    truth = Law(form, rng.normal(size=count))
    law = Law.fit(form, p, far, truth(p, far))
    assert np.allclose(law(p, far), truth(p, far))
    at, slope, step = np.array([0.2, 0.3, 0.5]), np.array([1.0, -2.0, 0.5]), 1e-6

    def value(q):
        return law(q[None], np.array([6.0 + slope @ (q - at)]))[0]

    numeric = [(value(at + step * e) - value(at - step * e)) / (2 * step) for e in np.eye(3)]
    assert law.gradient(at, 6.0, slope) == pytest.approx(numeric, rel=1e-4, abs=1e-5)


def test_the_form_is_chosen_on_regions_it_was_not_fitted_on():
    rng = np.random.default_rng(0)
    p = simplex_grid(3)
    far = 4 + 6 * ((p - 0.4) ** 2).sum(axis=1) + 0.2 * rng.normal(size=66)
    score = 0.95 - 0.03 * far + 0.01 * rng.normal(size=66)
    assert choose_form(p, far, score) == "ot"
    assert choose_form(p, rng.normal(size=66), p @ [0.5, 0.7, 0.2]) == "linear"
    on_its_own_points = {form: np.abs(Law.fit(form, p, far, score)(p, far) - score).mean() for form in FORMS}
    assert on_its_own_points["pq"] < on_its_own_points["ot"]  # where it was fitted the largest form looks best
    errors = region_errors(p, far, score)
    assert errors["ot"] < errors["pq"]


def test_a_law_with_roots_follows_scores_that_bend_near_an_empty_source():
    p, rng = simplex_grid(3), np.random.default_rng(0)
    score = 0.4 + np.log1p(200 * p) @ [0.03, 0.04, 0.02] + 0.005 * rng.normal(size=66)
    far = 4 + 6 * ((p - 0.4) ** 2).sum(axis=1)
    assert choose_form(p, far, score) in ("root", "ot_root")
    errors = region_errors(p, far, score, (*FORMS, "forest"))
    assert errors["ot_root"] < min(errors[form] for form in ("ot", "linear", "quadratic", "forest"))


def test_the_slope_of_a_root_at_an_empty_source_is_finite():
    law = Law("ot_root", np.array([0.1, -0.01, 0.2, 0.3, 0.4]))
    slopes = law.gradient(np.array([0.0, 0.25, 0.75]), 6.0, np.zeros(3))
    assert slopes == pytest.approx([0.2 / 2e-3, 0.3, 0.4 / (2 * np.sqrt(0.75))])


def test_a_climb_on_roots_finds_the_mix_and_can_bring_a_source_back():
    worth = np.array([0.2, 0.4, 0.1])

    def objective(p):
        return float(worth @ np.sqrt(p)), worth / (2 * np.sqrt(np.maximum(p, 1e-6)))

    best, path = climb(objective, np.array([0.98, 0.02, 0.0]), lambda p: p)
    assert best == pytest.approx(worth**2 / (worth**2).sum(), abs=0.02)  # by Lagrange: shares as the squared worths
    assert np.allclose(path.sum(axis=1), 1)


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_no_plain_mix_that_may_be_bought_is_predicted_to_do_better(seed):
    shares = {"a": (0.8, 0.1, 0.1), "b": (0.1, 0.8, 0.1), "c": (0.1, 0.1, 0.8)}
    sources = [
        Source(name, *three_classes(60, share, 10 * seed + i, noise=0.5 * (name == "c")), cost=1 + i)
        for i, (name, share) in enumerate(shares.items())
    ]
    scaling = TransportScaling(
        LogisticRegression(), sizes=(20, 40), grid_step=0.25, n_repeats=2, form="ot", seed=seed
    ).fit(sources, *three_classes(120, (1 / 3, 1 / 3, 1 / 3), 100 + seed))
    for budget in (None, 850):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = scaling.select(400, budget)
        costs = {name: 400 * plain.p @ [1, 2, 3] for name, plain in found.baselines.items()}
        bought = [name for name, cost in costs.items() if budget is None or cost <= budget]
        assert len(bought) > 2
        assert found.predicted_score >= max(found.baselines[name].predicted_score for name in bought)
        assert budget is None or 400 * found.p @ [1, 2, 3] <= budget + 1e-6
        assert found.path.shape[1] == 3


def test_a_size_below_the_pilot_is_told_once(fitted):
    with pytest.warns(UserWarning, match="interpolation") as told:
        fitted.select(50)
    assert len(told) == 1


def test_shapley_of_additive_values_are_the_values():
    worth = np.array([0.2, 0.5, 0.1])
    groups = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert _shapley({group: worth[list(group)].sum() for group in groups}, 3) == pytest.approx(worth)


# ---- the estimator


def test_fit_makes_both_tables_by_the_trainings_it_counts(fitted):
    one, two = fitted.tables_
    assert (one.size, two.size) == (30, 60)
    assert one.p.shape == (21, 3)
    assert fitted.n_trainings_ == 2 * 21 * 2
    assert np.array_equal(two.score, np.median(two.score_runs, axis=1))
    assert {"ot", "pq", "forest", "linear"} <= set(fitted.errors_.index)
    noise, clean = ((two.p == p).all(axis=1) for p in ([0, 0, 1], [0.4, 0.6, 0]))
    assert two.transport[noise] > two.transport[clean]


def test_predictions_are_scores_and_lie_in_their_interval(fitted):
    p = [0.4, 0.5, 0.1]
    score = fitted.predict(p, 1000)
    low, high = fitted.predict_interval(p, 1000)
    assert 0 <= low <= score <= high <= 1
    assert fitted.predict([p, p], 1000) == pytest.approx([score, score])


def test_selection_trains_nothing_and_leaves_the_noisy_source(fitted, monkeypatch):
    from theodolite.data.transport_scaling import tables

    def no_training(*_):
        raise AssertionError("a model was trained")

    monkeypatch.setattr(tables, "train_and_score", no_training)
    found = fitted.select(1000)
    assert found.p.sum() == pytest.approx(1)
    assert np.allclose(found.path.sum(axis=1), 1)
    assert found.p[1] * 1000 <= 500 + 1e-6
    assert found.p[2] < 1 / 3
    assert found.predicted_score >= found.baselines["uniform"].predicted_score
    assert {"uniform", "random", "best single source", "least distance", "Shapley", "leave one out"} <= set(
        found.baselines
    )


def test_selection_keeps_the_budget(fitted):
    free, tight = fitted.select(1000), fitted.select(1000, budget=1100)
    costs = np.array([1.0, 3.0, 0.5])
    assert tight.p @ costs * 1000 <= 1100 * (1 + 1e-6)
    assert free.p @ costs * 1000 > 1100
    with pytest.raises(InputError, match="buys fewer than 1000 rows; the cheapest mix costs 500"):
        fitted.select(1000, budget=400)


def test_the_objective_follows_its_own_gradient(fitted):
    objective = fitted._objective(1000, np.random.default_rng(0))
    p = np.random.default_rng(1).dirichlet(np.full(3, 20.0))  # off the kinks that round shares make
    _, gradient = objective(p)
    for i in range(3):
        toward = np.eye(3)[i] - p
        up, down = (objective(p + s * 1e-6 * toward)[0] for s in (1, -1))
        assert (up - down) / 2e-6 == pytest.approx(gradient @ toward, rel=1e-3, abs=1e-6)


def test_the_same_seed_gives_the_same_and_sources_may_be_reordered():
    sources = [Source("a", *blobs(30, 0.1, 0)), Source("b", *blobs(30, 0.9, 1))]
    validation = blobs(100, 0.5, 2)
    options = {"grid_step": 0.25, "n_repeats": 2, "sizes": (15, 30)}
    runs = [TransportScaling(LogisticRegression(), **options).fit(sources, *validation) for _ in range(2)]
    assert runs[0].predict([0.5, 0.5], 300) == runs[1].predict([0.5, 0.5], 300)
    assert runs[0].select(300).p == pytest.approx(runs[1].select(300).p)


def test_a_regressor_and_a_function_serve_too():
    rng = np.random.default_rng(0)

    def rows(n, centre):
        X = rng.normal(size=(n, 2)) + centre
        return X, X[:, 0] ** 2 + 0.1 * rng.normal(size=n)

    sources = [Source("a", *rows(40, 0.0)), Source("b", *rows(40, 3.0))]
    validation = rows(80, 1.0)
    options = {"grid_step": 0.25, "n_repeats": 1, "sizes": (20, 40)}
    scaling = TransportScaling(LinearRegression(), **options).fit(sources, *validation)
    assert scaling.tables_[0].score.max() <= 1
    assert np.isfinite(scaling.predict([0.5, 0.5], 100))

    def loss(X, y, X_val, y_val):
        return -float(np.mean((y.mean() - y_val) ** 2)) + 2.5

    called = TransportScaling(loss, response="score", **options).fit(sources, *validation)
    assert np.isfinite(called.predict([0.5, 0.5], 100))


def test_five_sources_use_a_random_design_and_embed_takes_other_shapes():
    sources = [Source(str(k), blobs(12, 0.2 * k, k)[0].reshape(12, 1, 2), blobs(12, 0.2 * k, k)[1]) for k in range(5)]
    X_val, y_val = blobs(60, 0.5, 9)

    def flat(X):
        return X.reshape(len(X), -1)

    def score(X, y, X_val, y_val):
        return 1 - abs(y.mean() - y_val.mean())

    scaling = TransportScaling(score, embed=flat, n_repeats=1, sizes=(6, 12)).fit(
        sources, X_val.reshape(60, 1, 2), y_val
    )
    assert scaling.tables_[0].p.shape == (66, 5)
    assert scaling.select(40).p.sum() == pytest.approx(1)
    with pytest.raises(InputError, match="need embed"):
        TransportScaling(score, sizes=(6, 12)).fit(sources, X_val.reshape(60, 1, 2), y_val)


def _fit(sources=None, validation=None, estimator=None, **options):
    sources = [Source("a", *blobs(30, 0.2, 0)), Source("b", *blobs(30, 0.8, 1))] if sources is None else sources
    options = {"grid_step": 0.5, "n_repeats": 1, "sizes": (15, 30)} | options
    validation = blobs(60, 0.5, 2) if validation is None else validation
    return TransportScaling(estimator or LogisticRegression(), **options).fit(sources, *validation)


A = Source("a", *blobs(30, 0.2, 0))
ONE, TWO = (Source(name, *blobs(30, share, 0)) for name, share in (("one", 0.0), ("two", 1.0)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sources": [A]}, "at least two sources"),
        ({"sources": [A, Source("b", *blobs(9, 0.5, 1))]}, "'b' has 9 rows; at least 10"),
        ({"sources": [A, A]}, "its own name"),
        ({"sources": [A, Source("b", np.ones((20, 3)), np.ones(20))]}, "'b' has rows of shape"),
        ({"sources": [A, Source("b", np.full((20, 2), np.nan), np.ones(20))]}, "sources hold NaN"),
        ({"sources": [A, Source("b", np.ones((20, 2)), np.ones(19))]}, "labels of shape"),
        ({"sources": [A, Source("b", np.ones((20, 2)), np.full(20, np.nan))]}, "20 rows have no label"),
        ({"sources": [A, Source("b", np.ones((20, 2)), ["x"] * 20)]}, "write them alike"),
        (
            {"sources": [Source(n, np.array([["x", 1]] * 20, dtype=object), np.arange(20) % 2) for n in "ab"]},
            "need embed",
        ),
        ({"sources": [A, Source("b", *blobs(30, 0.5, 1), cost=-1)]}, "cost >= 0"),
        ({"sizes": (30, 30)}, "N_0 < N_1"),
        ({"sizes": (30, 20)}, "N_0 < N_1"),
        ({"grid_step": 0.3}, "must divide 1"),
        ({"n_repeats": 0}, "n_repeats"),
        ({"form": "cubic"}, "form must be"),
        ({"estimator": lambda *_: 0.5}, "nothing to predict"),
        ({"estimator": lambda *_: float("nan")}, "must be finite"),
        ({"estimator": lambda X, y, *_: 2 + y.mean()}, "response='score'"),
        ({"scoring": "neg_log_loss", "estimator": LinearRegression()}, "not an accuracy"),  # not trained
        ({"scoring": "neg_log_loss", "response": "score", "sources": [ONE, TWO]}, "scoring with 'neg_log_loss' failed"),
    ],
)
def test_what_cannot_be_scaled_is_refused(options, match):
    with pytest.raises(InputError, match=match):
        _fit(**options)


def test_what_can_mislead_is_said(fitted):
    sources = [Source("a", *blobs(30, 0.2, 0)), Source("b", *blobs(30, 0.8, 1))]
    X_val, y_val = blobs(60, 0.5, 2)
    with pytest.warns(UserWarning, match="no source has the labels 5"):
        _fit(validation=(X_val, np.where(np.arange(60) < 5, 5, y_val)))
    with pytest.warns(UserWarning, match="30 validation rows equal pilot rows"):
        _fit(validation=(np.r_[X_val, sources[0].X], np.r_[y_val, sources[0].y]))
    with pytest.warns(UserWarning, match="'a', 'b' have fewer rows than N_1 = 40"):
        _fit(sizes=(20, 40))
    with pytest.warns(UserWarning, match="'pq' has 6 coefficients but the table has 3 mixes"):
        assert _fit(form="pq").form_ == "ot"
    with pytest.warns(UserWarning, match="interpolation"):
        fitted.predict([0.3, 0.3, 0.4], 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.predict([0.3, 0.3, 0.4], 60)


def test_mixes_off_the_simplex_and_early_calls_are_refused(fitted):
    for p in ([0.5, 0.5, 0.1], [0.5, 0.5], [1.2, -0.2, 0.0], [np.nan, 0.5, 0.5]):
        with pytest.raises(InputError, match=r"shares must|one share"):
            fitted.predict(p, 100)
    fitted.predict([0.5, 0.3, 0.2 + 1e-9], 100)
    with pytest.raises(InputError, match="fit before"):
        TransportScaling(LogisticRegression()).predict([0.5, 0.5], 100)
    with pytest.raises(InputError, match="n_repeats >= 2"):
        _fit().predict_interval([0.5, 0.5], 100)
    with pytest.raises(InputError, match="no gradient"):
        _fit(form="forest").select(100)
    with pytest.raises(InputError, match="deliver 1500 rows"):
        _fit(sources=[Source("a", *blobs(30, 0.2, 0), total=1000), Source("b", *blobs(30, 0.8, 1), total=500)]).select(
            2000
        )
    assert issubclass(DataError, InputError)


# ---- the command and the chart


def _csv(path, X, y, source=None):
    rows = [",".join(["x1", "x2", "label", *(["src"] if source is not None else [])])]
    for i, (x, label) in enumerate(zip(X, y)):
        rows.append(f"{x[0]:.4f},{x[1]:.4f},class{label}" + (f",{source[i]}" if source is not None else ""))
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_the_command_reads_tables_and_tells_the_mix(tmp_path):
    import json

    from typer.testing import CliRunner

    from theodolite.cli import app

    (X, y), (X2, y2) = blobs(30, 0.2, 0), blobs(30, 0.8, 1)
    data = _csv(tmp_path / "data.csv", np.r_[X, X2], np.r_[y, y2], ["north"] * 30 + ["south"] * 30)
    val = _csv(tmp_path / "val.csv", *blobs(60, 0.5, 2))
    base = ["run", "transport-scaling", data, "--source-column", "src", "--target", "label"]
    options = ["--val", val, "--size", "500", "--grid-step", "0.25", "--repeats", "2"]
    answer = CliRunner().invoke(app, [*base, *options, "--json", "--cost", "south=3", "--budget", "1000"])
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    assert sum(told["mix"].values()) == pytest.approx(1, abs=0.01)
    assert told["mix"]["north"] + 3 * told["mix"]["south"] <= 2.01
    assert told["interval"][0] <= told["predicted_score"] <= told["interval"][1]
    for wrong, match in (
        (base, "--val FILE"),
        ([*base[:4], "site", *base[5:], *options], "no column 'site'"),
        ([*base, *options, "--cost", "east=2"], "north, south"),
        ([*base, "--val", str(tmp_path / "none.csv"), "--size", "9"], "there is no file"),
        (["run", "transport-scaling", "--size", "9"], "need a table"),
    ):
        failed = CliRunner().invoke(app, wrong)
        assert failed.exit_code != 0
        assert match in " ".join((failed.output + str(failed.exception)).split())


def test_the_chart_measures_mixes_it_was_not_fitted_on():
    from theodolite.survey.data.transport_scaling import make_sources

    sources, words = make_sources(*three_classes(300, (0.4, 0.3, 0.3), 0), 3, 0)
    assert sum(len(source.X) for source in sources) == 300
    assert "classes" in words
    assert all(np.bincount(source.y, minlength=3).max() > 0.6 * len(source.y) for source in sources)


def _tables(folder, columns, **options):
    """A table of 480 rows whose label follows two numbers, with more columns, as a subject."""
    import pandas as pd

    from theodolite.core.loading import DataOptions, load_subject

    (X, y) = blobs(480, 0.5, 0)
    frame = pd.DataFrame({"x1": X[:, 0], "x2": X[:, 1], **columns(y), "label": [f"k{label}" for label in y]})
    frame.to_csv(folder / "data.csv", index=False)
    return load_subject(data=str(folder / "data.csv"), options=DataOptions(target="label", **options), epochs=3)


def test_the_chart_takes_the_column_that_is_named_a_source_and_its_level_names(tmp_path):
    from theodolite.survey.data.transport_scaling import _sources, find_column

    rng = np.random.default_rng(0)

    def columns(y):
        site = np.where(rng.random(480) < 0.3, y, rng.integers(0, 4, 480))
        names = np.array(["north", "south", "east", "west"])[site]
        names[:6] = "rare"
        return {"colour": rng.choice(["red", "blue"], 480), "clinic_site": names}

    subject = _tables(tmp_path, columns)
    found = find_column(subject)
    assert found is not None
    name, kept = found
    assert name == "clinic_site"
    assert sorted(kept) == ["east", "north", "south", "west"]
    sources, words = _sources(subject, 0)
    assert sum(len(source.X) for source in sources) == sum(rows.sum() for rows in kept.values())
    assert words.startswith("The sources are the values of 'clinic_site' but for rare, which have fewer rows; ")


def test_the_chart_takes_the_column_of_domains_before_all_others(tmp_path):
    from theodolite.survey.data.transport_scaling import _sources

    rng = np.random.default_rng(0)
    shop = rng.choice([f"shop {i}" for i in range(9)], 480, p=[0.2, 0.2, *[0.6 / 7] * 7])
    subject = _tables(tmp_path, lambda y: {"source": rng.choice(["a", "b"], 480), "shop": shop}, domain="shop")
    sources, words = _sources(subject, 0)
    assert subject.data.domains is not None
    assert subject.data.train.domain is not None
    counts = np.bincount(subject.data.train.domain.numpy(), minlength=9)
    largest = [level for level, n in zip(subject.data.domains.levels, counts) if n >= max(30, np.sort(counts)[3])]
    assert [source.name for source in sources] == largest
    assert words.startswith("The sources are the values of 'shop' but for shop ")


def test_the_chart_of_three_sources_shows_a_triangle_and_the_projection(tmp_path):
    import json

    from theodolite.survey.run import measure

    rng = np.random.default_rng(0)

    def columns(y):
        return {"source": np.array(["a", "b", "c"])[np.where(rng.random(480) < 0.7, y, rng.integers(0, 3, 480))]}

    found = measure("transport-scaling", _tables(tmp_path, columns))
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert "scatterternary" in {trace["type"] for trace in told["figure"]["data"]}
    names = [trace["name"] for trace in told["figure"]["data"]]
    assert {"chosen mix, projected", "even mix, projected"} <= set(names)
    assert "from a/b/c: predicted" in found.headline
    predictions = [number for name, number in found.numbers.items() if name.startswith("predicted accuracy")]
    assert [number.low < number.high for number in predictions] == [True, True]
    assert found.comparison.controls[0].name.startswith("the mix alone")
