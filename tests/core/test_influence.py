import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from theodolite.core.errors import DataError, InputError
from theodolite.core.influence import ExactRetrainer, LogisticInfluence, SeparableDataError, logistic_gradient


def table(n=60, d=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = (x @ rng.normal(size=d) + rng.normal(size=n) > 0).astype(int)
    y[:2] = (0, 1)
    return x, y


def tilted(x):
    return np.column_stack([x, np.ones(len(x))])


# ---- exact retraining


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_weights_are_those_of_scikit_learn(C):
    x, y = table()
    made = ExactRetrainer(x, y, C)
    for rows in ([], [3], [0, 5, 11, 40]):
        kept = np.setdiff1d(np.arange(60), rows)
        peer = LogisticRegression(C=C, tol=1e-12, max_iter=10_000).fit(x[kept], y[kept])
        assert made.without(rows) == pytest.approx([*peer.coef_[0], *peer.intercept_], abs=2e-6)


@given(st.integers(0, 1000), st.floats(0.01, 1e4), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_the_gradient_is_zero_after_every_retraining(seed, C, k):
    x, y = table(seed=seed)
    rows = np.random.default_rng(seed).choice(60, k, replace=False)
    kept = np.setdiff1d(np.arange(60), rows)
    if len(np.unique(y[kept])) < 2:
        return
    w = ExactRetrainer(x, y, C).without(rows)
    # the ridge is of the sum of losses, so its mean form grows as rows leave
    assert np.abs(logistic_gradient(x[kept], y[kept], w, 1 / (C * len(kept)))).max() < 1e-10


def test_without_a_ridge_and_with_complete_one_hot_groups_the_fit_is_the_same():
    x, y = table(80)
    group = np.eye(3)[np.arange(80) % 3]
    full = ExactRetrainer(np.column_stack([x, group]), y, np.inf)
    fewer = ExactRetrainer(np.column_stack([x, group[:, 1:]]), y, np.inf)
    assert tilted(np.column_stack([x, group])) @ full.weights == pytest.approx(
        tilted(np.column_stack([x, group[:, 1:]])) @ fewer.weights, abs=1e-6
    )


def test_separable_classes_without_a_ridge_are_refused():
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    with pytest.raises(SeparableDataError, match="C = 1"):
        ExactRetrainer(x, np.array([0, 0, 1, 1]), np.inf)
    touching = np.array([[-1.0], [0.0], [0.0], [1.0]])
    with pytest.raises(SeparableDataError):
        ExactRetrainer(touching, np.array([0, 0, 1, 1]), np.inf)
    assert np.isfinite(ExactRetrainer(x, np.array([0, 0, 1, 1]), 1.0).weights).all()


@pytest.mark.parametrize(
    ("rows", "what"), [([0, 0], "distinct"), ([-1], "distinct"), ([60], "distinct"), (None, "no row left")]
)
def test_deletions_that_cannot_be(rows, what):
    x, y = table()
    with pytest.raises(ValueError, match=what):
        ExactRetrainer(x, y).without(np.flatnonzero(y == 1) if rows is None else rows)


def test_inputs_that_cannot_be():
    x, y = table()
    with pytest.raises(InputError, match="C must be above 0"):
        ExactRetrainer(x, y, 0)
    with pytest.raises(DataError, match="labels must be 0 and 1"):
        ExactRetrainer(x, 2 * y - 1)
    with pytest.raises(DataError, match="needs both classes"):
        ExactRetrainer(x, np.ones(60, dtype=int))
    with pytest.raises(DataError, match="NaN"):
        ExactRetrainer(np.where(x > 2, np.nan, x), y)
    with pytest.raises(DataError, match="shapes"):
        ExactRetrainer(x, y[:-1])


# ---- influence


def test_the_leverage_step_is_one_newton_step_without_the_row():
    x, y = table()
    w = ExactRetrainer(x, y, 2.0).weights
    influence = LogisticInfluence(x, y, w, 1 / (2.0 * 60))
    t = tilted(x)
    p = 1 / (1 + np.exp(-t @ w))
    for i in (0, 7, 59):
        kept = np.arange(60) != i
        hessian = (t[kept] * (p * (1 - p))[kept, None]).T @ t[kept] + np.diag([0.5] * 4 + [0])
        gradient = t[kept].T @ (p - y)[kept] + np.array([0.5] * 4 + [0]) * w
        assert influence.directions("leverage")[i] == pytest.approx(-np.linalg.solve(hessian, gradient), abs=1e-12)


def test_leverages_sum_to_the_degrees_of_freedom():
    x, y = table()
    w = ExactRetrainer(x, y, np.inf).weights
    assert LogisticInfluence(x, y, w, 0.0).leverage.sum() == pytest.approx(5)
    assert LogisticInfluence(x, y, w, 0.3).leverage.sum() < 5


def test_first_order_directions_and_their_sign():
    x, y = table()
    w = ExactRetrainer(x, y).weights
    influence = LogisticInfluence(x, y, w, 1 / 60)
    expected = influence.gradients @ np.linalg.inv(influence.hessian) / 60
    assert influence.directions("first-order") == pytest.approx(expected)
    damped = influence.hessian - np.diag(influence.ridge) + 0.01 * np.eye(5)
    assert influence.directions("first-order-damped") == pytest.approx(influence.gradients @ np.linalg.inv(damped) / 60)
    retrainer = ExactRetrainer(x, y)
    true = np.array([retrainer.without([i]) - w for i in range(60)])
    for kind in ("leverage", "first-order", "first-order-damped"):
        assert np.corrcoef(influence.directions(kind).ravel(), true.ravel())[0, 1] > 0.98


def test_a_singular_hessian_uses_its_pseudo_inverse():
    x, y = table(80)
    group = np.eye(3)[np.arange(80) % 3]
    full, fewer = np.column_stack([x, group]), np.column_stack([x, group[:, 1:]])
    told = []
    for rows in (full, fewer):
        directions = LogisticInfluence(rows, y, ExactRetrainer(rows, y, np.inf).weights, 0.0).directions()
        assert np.abs(directions).max() < 10
        told.append(directions @ tilted(rows).T)
    assert told[0] == pytest.approx(told[1], abs=1e-6)


def test_leave_one_out_on_breast_cancer():
    """The slope of predicted against true changes of the score: leverage corrects what first order leaves out."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    points, x, y = tilted(x[400:]), x[:400], y[:400]
    retrainer = ExactRetrainer(x, y)
    rows = np.random.default_rng(0).choice(400, 60, replace=False)
    true = np.array([points @ (retrainer.without([i]) - retrainer.weights) for i in rows])
    influence = LogisticInfluence(x, y, retrainer.weights, 1 / 400)
    slopes = {}
    for kind in ("leverage", "first-order"):
        told = influence.directions(kind)[rows] @ points.T
        slopes[kind] = np.polyfit(true.ravel(), told.ravel(), 1)[0]
        assert np.corrcoef(told.ravel(), true.ravel())[0, 1] > 0.98
    assert 0.75 < slopes["first-order"] < slopes["leverage"]
    assert 0.96 < slopes["leverage"] < 1.04


def test_arguments_that_cannot_be():
    x, y = table()
    w = np.zeros(5)
    with pytest.raises(InputError, match="intercept last"):
        LogisticInfluence(x, y, w[:-1], 0.1)
    with pytest.raises(InputError, match="ridge"):
        LogisticInfluence(x, y, w, -1.0)
    with pytest.raises(InputError, match="damping"):
        LogisticInfluence(x, y, w, 0.1, damping=0.0)
    with pytest.raises(InputError, match="influence must be"):
        LogisticInfluence(x, y, w, 0.1).directions("second-order")
