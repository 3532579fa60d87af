import json
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import nnls
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF
from sklearn.ensemble import RandomForestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.errors import DataError, InputError
from theodolite.core.loading import DataOptions, load_subject
from theodolite.core.loading.data import load_data
from theodolite.core.loading.options import Wanted
from theodolite.data import latent_label_shift as lls
from theodolite.data.latent_label_shift import (
    DomainsAlikeError,
    LatentLabelShift,
    NotIdentifiableError,
    class_posterior,
    cluster_shares,
    count_classes,
    domain_posterior,
    factorize_shares,
    kmeans_labels,
    match_labels,
    naive_labels,
    share_error,
    shift_test,
    simulate_label_shift,
)
from theodolite.data.latent_label_shift.factors import fit_factors
from theodolite.data.latent_label_shift.posterior import nonnegative_least_squares
from theodolite.survey.chart import load_charts
from theodolite.survey.run import measure

SHARES = np.array([[0.9, 0.0, 0.05, 0.6], [0.1, 0.95, 0.05, 0.0], [0.0, 0.05, 0.9, 0.4]])


def factors(m=12, k=3, r=6, seed=0):
    """Columns of sum 1, with a word of its own for each class."""
    rng = np.random.default_rng(seed)
    C = rng.dirichlet(np.ones(m), size=k).T
    C[:k] = np.diag(rng.uniform(0.1, 0.5, k))
    return C / C.sum(axis=0), rng.dirichlet(np.ones(k), size=r).T


def off(found, true):
    order = np.abs(found[:, None] - true).sum(axis=2).argmin(axis=0)
    return np.abs(found[order] - true).max()


def blobs(shares=SHARES, rows=200, seed=0, spread=0.3):
    """Rows of Gaussian classes at the corners of a simplex, in domains of ``rows`` rows each (or as many as listed)."""
    rng = np.random.default_rng(seed)
    k, r = shares.shape
    sizes = np.broadcast_to(rows, r)
    domains = np.repeat(np.arange(r), sizes)
    y = np.concatenate([rng.choice(k, size, p=shares[:, d]) for d, size in enumerate(sizes)])
    return 2 * np.eye(k)[y] + spread * rng.normal(size=(len(y), k)), domains, y


@pytest.fixture(scope="module")
def fitted():
    X, domains, y = blobs()
    return LatentLabelShift(3).fit(X, domains), X, domains, y


# ---- oracles


@pytest.mark.parametrize(("method", "bar"), [("anchor", 1e-6), ("nmf", 1e-2)])
@pytest.mark.parametrize("seed", range(5))
def test_exact_shares_with_anchors_give_back_their_factors(method, bar, seed):
    C, W = factors(seed=seed)
    found = factorize_shares(C @ W, 3, method, seed=seed)
    assert off(found.W, W) < bar
    assert off(found.C.T, C.T) < bar
    assert found.converged
    assert found.error < 1e-8


def test_posteriors_are_bayes_for_domains_of_unequal_size():
    rng = np.random.default_rng(1)
    W, p_d = rng.dirichlet(np.ones(3), size=5).T, np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    x, domains = rng.normal(size=(300, 2)) * 2, rng.integers(0, 5, 300)
    like = np.stack([stats.multivariate_normal(mean).pdf(x) for mean in ([0, 0], [2, 0], [0, 2])], axis=1)
    joint = like @ (W * p_d)
    p_domain = joint / joint.sum(axis=1, keepdims=True)
    plain, own = like * (W @ p_d), like * W.T[domains]
    plain, own = plain / plain.sum(axis=1, keepdims=True), own / own.sum(axis=1, keepdims=True)
    for solver in ("nnls", "pinv"):
        p = class_posterior(p_domain, W, p_d, solver)
        assert np.abs(p - plain).max() < 1e-10
        assert np.abs(domain_posterior(p, W, p_d, domains) - own).max() < 1e-10
        assert np.abs(class_posterior(p_domain, W, None, solver) - plain).max() > 0.1
    assert np.abs(plain - own).max() > 0.1  # predicting by p(y | x) instead of p_d(y | x) is not the same


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 9), extra=st.integers(0, 5), seed=st.integers(0, 1000), sign=st.booleans())
def test_all_rows_at_once_are_scipys_nonnegative_least_squares(k, extra, seed, sign):
    rng = np.random.default_rng(seed)
    M, q = rng.random((k + extra, k)), rng.normal(size=(20, k + extra))
    if sign:
        M, q = rng.normal(size=M.shape), np.abs(q)
    found = nonnegative_least_squares(M, q)
    expected = np.stack([nnls(M, row)[0] for row in q])
    assert (found >= 0).all()
    residual = np.linalg.norm(q - found @ M.T, axis=1) - np.linalg.norm(q - expected @ M.T, axis=1)
    assert residual.max() < 1e-6


def test_dependent_columns_and_rows_of_zero_are_solved_too():
    M = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    q = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, -1.0, 5.0]])
    found = nonnegative_least_squares(M, q)
    assert np.allclose(found @ M.T, [[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert (found >= 0).all()


def test_a_cycle_of_exchanges_ends_in_scipys_solver(monkeypatch):
    monkeypatch.setattr(lls.posterior, "_ROUNDS", 0)
    rng = np.random.default_rng(0)
    M, q = rng.random((6, 4)), rng.random((5, 6))
    assert np.allclose(nonnegative_least_squares(M, q), [nnls(M, row)[0] for row in q])


def test_words_in_documents_are_scikit_learns_topics():
    rng = np.random.default_rng(0)
    C, W = rng.dirichlet(np.full(30, 0.1), size=4).T, rng.dirichlet(np.full(4, 0.3), size=12).T
    counts = np.stack([rng.multinomial(3000, column) for column in (C @ W).T], axis=1)
    words = np.concatenate([np.repeat(np.arange(30), column) for column in counts.T])
    Q = cluster_shares(words, np.repeat(np.arange(12), 3000), 30)
    assert np.array_equal(Q, counts / 3000)
    fits = [NMF(4, init="random", random_state=s, max_iter=20_000, tol=1e-8) for s in range(10)]
    parts = [(model.fit_transform(Q), model) for model in fits]
    theirs, model = min(parts, key=lambda part: part[1].reconstruction_err_)
    W_theirs = model.components_ * theirs.sum(axis=0)[:, None]
    ours = factorize_shares(Q, 4)
    assert off(ours.W, W_theirs / W_theirs.sum(axis=0)) < 0.01
    assert ours.start_errors.min() <= model.reconstruction_err_ * (1 + 1e-4)


def test_classes_of_separate_blobs_are_found_with_their_shares(fitted):
    model, X, domains, y = fitted
    truth = cluster_shares(y, domains)
    assert match_labels(model.labels_, y).accuracy > 0.95
    assert share_error(model.class_shares_, truth).mean() < 0.15
    assert np.array_equal(model.predict(X, domains), model.labels_)
    assert model.class_shares_.shape == (3, 4)
    assert model.cluster_given_class_.shape == (9, 3)
    assert model.domain_given_class_.shape == (4, 3)
    for table in (model.class_shares_, model.cluster_given_class_, model.domain_given_class_, model.cluster_shares_):
        assert np.allclose(table.sum(axis=0), 1)
    assert model.condition_number_ == np.linalg.cond(model.class_shares_)
    assert model.reconstruction_error_ == pytest.approx(
        np.linalg.norm(model.cluster_shares_ - model.cluster_given_class_ @ model.class_shares_)
    )
    assert model.shift_test_.p_value > 0.02
    total = model.class_shares_ @ model.domain_shares_
    assert (np.diff(total) <= 0).all()  # classes are ordered by their share


# ---- factors


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 4), r=st.integers(4, 7), seed=st.integers(0, 500), method=st.sampled_from(["nmf", "anchor"]))
def test_factors_of_any_counts_are_shares_in_order(k, r, seed, method):
    counts = np.random.default_rng(seed).integers(1, 40, (8, r))
    Q = counts / counts.sum(axis=0)
    found = factorize_shares(Q, k, method, n_init=2, seed=seed)
    assert np.allclose(found.C.sum(axis=0), 1)
    assert np.allclose(found.W.sum(axis=0), 1)
    assert min(found.C.min(), found.W.min()) >= 0
    assert (np.diff(found.W.sum(axis=1)) <= 1e-12).all()
    assert found.error == pytest.approx(np.linalg.norm(Q - found.C @ found.W))
    again = factorize_shares(Q, k, method, n_init=2, seed=seed)
    assert np.array_equal(found.W, again.W)


def test_descent_never_goes_up_and_says_when_it_has_not_arrived():
    rng = np.random.default_rng(0)
    Q, C, W = rng.random((1, 8, 6)), rng.random((3, 8, 3)), rng.random((3, 3, 6))
    errors = [fit_factors(Q, C, W, n)[2] for n in (1, 2, 5, 20, 100)]
    assert (np.diff(errors, axis=0) <= 1e-12).all()
    assert not fit_factors(Q, C, W, 2)[3].any()
    assert fit_factors(Q, C, W, 3000)[3].all()


def test_several_starts_are_taken_since_one_can_end_elsewhere():
    y = load_digits().target
    made = simulate_label_shift(y, 20, seed=1)
    Q = cluster_shares(np.arange(len(y))[made.index] % 30, made.domains, 30)
    found = factorize_shares(Q, 10, n_init=10)
    assert len(found.start_errors) == 11
    assert found.start_errors.max() > found.start_errors.min() * 1.01


def test_a_transposed_table_is_told():
    C, W = factors()
    with pytest.raises(DataError, match="transpose"):
        factorize_shares((C @ W).T, 3)


@pytest.mark.parametrize(
    ("table", "k", "options", "error", "text"),
    [
        (np.full((5, 3), 0.2), 4, {}, NotIdentifiableError, "4 classes .* r = 3 domains"),
        (np.full((2, 5), 0.5), 3, {}, InputError, "the 2 clusters, got 3"),
        (np.full((5, 3), 0.2), 0, {}, InputError, "got 0 classes"),
        (np.full((5, 3), 0.2), 2, {"method": "lda"}, InputError, "lda"),
        (np.full((5, 3), 0.2), 2, {"n_init": 0}, InputError, "n_init"),
        (np.full((5, 3), 0.3), 2, {}, DataError, "must sum to 1"),
        (np.full((5, 3), np.nan), 2, {}, DataError, "finite"),
        (np.array([[1.5, 1.5], [-0.5, -0.5]]), 1, {}, DataError, "at least 0"),
        (np.ones(3), 1, {}, InputError, "matrix"),
        (np.eye(4)[:, [0, 0, 0]], 2, {"method": "anchor"}, NotIdentifiableError, "at most k = 1"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_factorised_are_refused(table, k, options, error, text):
    with pytest.raises(error, match=text):
        factorize_shares(table, k, **options)


def test_cluster_shares_checks_what_it_counts():
    assert cluster_shares(np.array([0, 0, 2]), np.array(["x", "y", "y"])).tolist() == [[1, 0.5], [0, 0], [0, 0.5]]
    for clusters, domains, m in (
        ([0.5, 1.0], [0, 0], None), ([-1, 0], [0, 0], None), ([0, 1], [0], None), ([0, 3], [0, 0], 2), ([], [], None),
    ):  # fmt: skip
        with pytest.raises(InputError):
            cluster_shares(np.array(clusters), np.array(domains), m)


# ---- posteriors


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 500), solver=st.sampled_from(["nnls", "pinv"]))
def test_posteriors_are_probabilities_for_any_scores(seed, solver):
    rng = np.random.default_rng(seed)
    W, q = rng.dirichlet(np.ones(3), size=5).T, rng.dirichlet(np.full(5, 0.2), size=40)
    p = class_posterior(q, W, rng.dirichlet(np.ones(5)) + 0.01, solver)
    own = domain_posterior(p, W, None, rng.integers(0, 5, 40))
    for table in (p, own):
        assert table.min() >= 0  # the pseudo-inverse's negative values are cut and the rest scaled again
        assert np.allclose(table.sum(axis=1), 1)


def test_rows_that_fit_no_class_get_the_shares():
    W = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    p = class_posterior(np.array([[0.0, 0.0, 1.0]]), W, np.array([0.5, 0.5, 0.0]))
    assert np.allclose(p, 0.5)
    assert np.allclose(domain_posterior(np.array([[1.0, 0.0]]), W, None, np.array([1])), [[0, 1]])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: class_posterior(np.full((2, 3), 1 / 3), SHARES), "4 columns"),
        (lambda: class_posterior(np.full((2, 4), np.nan), SHARES), "finite"),
        (lambda: class_posterior(np.full((2, 4), 0.25), SHARES, solver="exact"), "solver"),
        (lambda: class_posterior(np.full((2, 4), 0.25), SHARES, np.ones(3)), "4 numbers"),
        (lambda: class_posterior(np.full((2, 4), 0.25), SHARES, np.zeros(4)), "not all 0"),
        (lambda: domain_posterior(np.full((2, 3), 1 / 3), SHARES, None, np.array([0, 4])), "0 to 3"),
        (lambda: domain_posterior(np.full((2, 3), 1 / 3), SHARES, None, np.array([0.5, 1])), "numbers of columns"),
        (lambda: domain_posterior(np.full((2, 2), 0.5), SHARES, None, np.array([0, 1])), "shape"),
        (lambda: share_error(SHARES, SHARES[:2]), "one shape"),
    ],
)  # fmt: skip
def test_posteriors_refuse_what_does_not_fit(call, text):
    with pytest.raises(InputError, match=text):
        call()


# ---- the simulator


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(2, 4), alpha=st.sampled_from([0.5, 3.0]))
def test_simulated_domains_keep_their_promises(seed, k, alpha):
    y = np.random.default_rng(seed).integers(0, k, 2000)
    made = simulate_label_shift(y, 6, alpha, 8.0, seed=seed)
    assert len(np.unique(made.index)) == len(made.index) == len(made.domains)
    assert np.linalg.cond(made.class_shares) <= 8
    assert np.allclose(made.class_shares, cluster_shares(y[made.index], made.domains, k))
    sizes = np.bincount(made.domains)
    assert sizes.max() - sizes.min() <= k  # equal but for what rounding down to rows takes
    again = simulate_label_shift(y, 6, alpha, 8.0, seed=seed)
    assert np.array_equal(made.index, again.index)


@pytest.mark.parametrize(
    ("y", "domains", "options", "error", "text"),
    [
        (np.arange(300) % 3, 2, {}, NotIdentifiableError, "at least r = 3"),
        (np.zeros(50), 2, {}, DataError, "two classes"),
        (np.arange(300) % 3, 4, {"alpha": 0}, InputError, "alpha"),
        (np.arange(300) % 3, 4, {"max_condition": 0.5}, InputError, "max_condition"),
        (np.arange(20) % 2, 10, {}, DataError, "at least 10 rows"),
        (np.arange(3000) % 3, 4, {"alpha": 1000, "max_condition": 1.2}, DataError, "the least was"),
    ],
)
def test_impossible_simulations_are_refused(y, domains, options, error, text, monkeypatch):
    monkeypatch.setattr(lls.simulate, "_DRAWS", 300)
    with pytest.raises(error, match=text):
        simulate_label_shift(y, domains, **options)


# ---- the tests of the assumption


def test_the_shift_test_is_uniform_or_careful_under_its_assumption():
    C, W = factors(10, 3, 8, seed=2)
    rows, values = np.full(8, 200), []
    for seed in range(40):
        Q = np.stack([np.random.default_rng([seed, d]).multinomial(200, (C @ W)[:, d]) / 200 for d in range(8)], axis=1)
        found = factorize_shares(Q, 3, n_init=3, seed=seed)
        values.append(shift_test(Q, found.C, found.W, rows, draws=60, seed=seed).p_value)
    assert np.mean(np.array(values) <= 0.05) <= 0.15
    assert np.median(values) > 0.25


def test_the_shift_test_fires_where_some_domains_are_of_no_mix():
    C, W = factors(10, 3, 16, seed=2)
    Q = C @ W
    Q[:, [5, 9, 13]] = np.random.default_rng(0).dirichlet(np.ones(10), size=3).T
    found = factorize_shares(Q, 3)
    result = shift_test(Q, found.C, found.W, np.full(16, 500))
    assert result.p_value < 0.02
    assert result.domain_p_value.min() < 0.02
    assert result.statistic == pytest.approx(result.domain_statistic.sum())
    assert result.noise.shape == (200,)
    with pytest.raises(InputError, match="numbers of rows"):
        shift_test(Q, found.C, found.W, np.full(7, 500))
    with pytest.raises(InputError, match="has shape"):
        shift_test(Q, found.C[:5] / found.C[:5].sum(axis=0), found.W, np.full(16, 500))


@pytest.mark.parametrize("k", [2, 4])
def test_the_number_of_classes_shows_in_counts(k):
    C, W = factors(15, k, 8, seed=k)
    W = np.where(W > 0.2, W, 0.02)
    W /= W.sum(axis=0)
    rng = np.random.default_rng(0)
    Q = np.stack([rng.multinomial(2000, column) / 2000 for column in (C @ W).T], axis=1)
    found = count_classes(Q, np.full(8, 2000))
    assert found.chosen == k
    assert found.rank == k
    assert found.classes.tolist() == list(range(1, 9))
    assert found.held_out_error.shape == (8, 5)
    with pytest.raises(InputError, match="at least 2"):
        count_classes(Q, np.ones(8))


# ---- the estimator


def test_the_estimator_follows_scikit_learns_rules():
    reason = "the check's labels stand for domains, which have under 10 rows or look identical there; both are refused"
    names = (
        "check_dict_unchanged", "check_dont_overwrite_parameters", "check_dtype_object", "check_estimators_dtypes",
        "check_estimators_fit_returns_self", "check_estimators_nan_inf", "check_estimators_overwrite_params",
        "check_f_contiguous_array_estimator", "check_fit2d_1feature", "check_fit2d_1sample", "check_fit2d_predict1d",
        "check_fit_idempotent", "check_fit_score_takes_y", "check_methods_sample_order_invariance",
        "check_methods_subset_invariance", "check_n_features_in", "check_n_features_in_after_fitting",
        "check_readonly_memmap_input",
    )  # fmt: skip
    too_few = dict.fromkeys(names, reason)
    too_few["check_do_not_raise_errors_in_init_or_set_params"] = "the tests check types at once"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        done = check_estimator(LatentLabelShift(2), expected_failed_checks=too_few, on_skip=None, on_fail=None)
    failed = {one["check_name"]: str(one["exception"])[:150] for one in done if one["status"] == "failed"}
    assert failed == {}


def test_rows_are_never_scored_by_a_classifier_that_saw_them(fitted):
    model, X, domains, y = fitted
    assert np.array_equal(model.predict_proba_domain(X), model.out_of_fold_)
    assert np.array_equal(model.predict_proba_domain(X[::-1]), model.out_of_fold_[::-1])
    new = X + 1e-9
    assert np.abs(model.predict_proba_domain(new) - model.out_of_fold_).max() > 1e-4
    assert match_labels(model.predict(new, domains), y).accuracy > 0.95


def test_new_rows_are_classified_in_their_domain_or_without_one(fitted):
    model = fitted[0]
    X, domains, y = blobs(seed=9)
    named = model.predict_proba(X, domains)
    plain = model.predict_proba(X)
    for p in (named, plain):
        assert p.shape == (800, 3)
        assert np.allclose(p.sum(axis=1), 1)
    assert match_labels(named.argmax(axis=1), y).accuracy > 0.95
    expected = domain_posterior(plain, model.class_shares_, model.domain_shares_, domains)
    assert np.allclose(named, expected)


def test_a_domain_can_be_added_without_fitting_again(fitted):
    model, _, _, y_fitted = fitted
    X, _, y = blobs(np.array([[0.05], [0.25], [0.7]]), rows=300, seed=5)
    names = np.full(300, "late")
    with pytest.raises(InputError, match="add_domain"):
        model.predict(X, names)
    shares = model.add_domain(X, name="late")
    assert shares.shape == (3,)
    table = match_labels(model.labels_, y_fitted).permutation
    truth = np.bincount(y, minlength=3) / 300
    assert np.abs(shares - truth[[table[i] for i in range(3)]]).sum() < 0.2
    assert match_labels(model.predict(X, names), y).accuracy > 0.95
    with pytest.raises(InputError, match="was fitted on"):
        model.add_domain(X, name=0)
    with pytest.raises(DataError, match="at least 10"):
        model.add_domain(X[:3])


def test_domains_of_unequal_size_do_not_mislead():
    X, domains, y = blobs(rows=[800, 200, 150, 150])
    model = LatentLabelShift(3).fit(X, domains)
    assert np.allclose(model.domain_shares_, np.array([800, 200, 150, 150]) / 1300)
    assert match_labels(model.labels_, y).accuracy > 0.9
    assert np.allclose(model.domain_given_class_.sum(axis=0), 1)


def test_any_names_factorizer_solver_and_classifier_will_do():
    X, domains, y = blobs()
    names = np.array(["north", "east", "south", "west"])[domains]
    for given_names in (names, names.astype(object), names.tolist()):
        model = LatentLabelShift(3, GaussianNB(), n_clusters=8, factorizer="anchor", solver="pinv").fit(X, given_names)
        assert model.domains_.tolist() == ["east", "north", "south", "west"]
        assert match_labels(model.predict(X, given_names), y).accuracy > 0.9


def test_a_torch_module_is_trained_on_a_copy():
    X, domains, y = blobs(rows=300)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))
    before = [p.detach().clone() for p in module.parameters()]
    model = LatentLabelShift(3, module, cv=3).fit(X, domains)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert match_labels(model.labels_, y).accuracy > 0.9
    with pytest.raises(InputError, match="5 scores a row, but there are 4"):
        LatentLabelShift(3, nn.Linear(3, 5)).fit(X, domains)
    with pytest.raises(InputError, match="cannot take rows"):
        LatentLabelShift(3, nn.Linear(7, 4)).fit(X, domains)


def test_uncalibrated_scores_are_told():
    X, domains, _ = blobs(np.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5]]))
    with pytest.warns(UserWarning, match="worse than none.*calibrate"):
        LatentLabelShift(2, RandomForestClassifier(5, random_state=0)).fit(X, domains)


def test_classes_that_occur_alike_are_told(monkeypatch):
    monkeypatch.setattr(lls.estimator, "_WORST_CONDITION", 1.0)
    X, domains, _ = blobs()
    with pytest.warns(UserWarning, match="rank 3 for 3 classes and condition number .* hardly differ"):
        LatentLabelShift(3).fit(X, domains)


def broken(**changes):
    X, domains, _ = blobs(rows=20)
    return changes.get("X", X), changes.get("domains", domains)


@pytest.mark.parametrize(
    ("options", "changes", "error", "text"),
    [
        ({"n_classes": 5}, {}, NotIdentifiableError, "k = 5 .* r = 4"),
        ({}, {"domains": np.zeros(80, dtype=int)}, NotIdentifiableError, "one domain, 0;"),
        ({}, {"domains": np.repeat([0, 1, 2, 3], [5, 25, 25, 25])}, DataError, "domain 0 has 5 rows"),
        ({"n_clusters": 2}, {}, InputError, "n_clusters"),
        ({"n_clusters": 81}, {}, InputError, "n_clusters"),
        ({"n_classes": 0}, {}, InputError, "n_classes"),
        ({"cv": 1}, {}, InputError, "cv"),
        ({}, {"X": np.full((80, 3), np.nan)}, DataError, "NaN"),
        ({}, {"domains": None}, InputError, "domains are needed"),
        ({}, {"domains": np.arange(7)}, InputError, "80 rows"),
        ({}, {"domains": np.where(np.arange(80) < 3, np.nan, 1.0)}, DataError, "no domain"),
        ({}, {"domains": [None, *["a"] * 79]}, DataError, "no domain"),
        ({"domain_classifier": LinearSVC()}, {}, InputError, "predict_proba"),
        (
            {},
            {"X": np.random.default_rng(0).normal(size=(400, 3)), "domains": np.arange(400) % 4},
            DomainsAlikeError,
            "look identical",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_a_reason(options, changes, error, text):
    with pytest.raises(error, match=text):
        LatentLabelShift(**{"n_classes": 3, **options}).fit(*broken(**changes))


@pytest.mark.parametrize("options", [{"factorizer": "svd"}, {"solver": "exact"}, {"n_init": 0}])
def test_options_are_refused_before_anything_is_trained(options, monkeypatch):
    monkeypatch.setattr(GaussianNB, "fit", lambda *_: pytest.fail("trained before the options were checked"))
    with pytest.raises(InputError, match=next(iter(options))):
        LatentLabelShift(3, GaussianNB(), **options).fit(*broken())


@pytest.mark.parametrize(("name", "value"), [("n_classes", 2.5), ("n_clusters", "9"), ("cv", None)])
def test_numbers_that_are_not_whole_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} must be a whole number, got {value!r}"):
        LatentLabelShift(3).set_params(**{name: value}).fit(*broken())


def test_rows_to_predict_are_checked(fitted):
    model, X, domains, _ = fitted
    with pytest.raises(DataError, match="2 features"):
        model.predict(X[:, :2])
    with pytest.raises(InputError, match="one domain for each"):
        model.predict(X, domains[:-1])


# ---- the chart and the command


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV of the classes' rows with a column of sites and the true label."""
    X, domains, y = blobs()
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    frame["site"], frame["label"] = [f"s{d}" for d in domains], [f"kind {c}" for c in y]
    path = tmp_path_factory.mktemp("tables") / "sites.csv"
    frame.to_csv(path, index=False)
    return path


def run(*arguments):
    done = CliRunner().invoke(app, ["run", "latent-label-shift", *map(str, arguments)])
    return done.exit_code, done.output + str(done.exception or "")


def of(path, domain=None):
    return load_subject(model="auto", data=str(path), options=DataOptions(target="label", domain=domain), epochs=2)


def test_the_chart_finds_classes_by_a_column_of_sites(table):
    finding = measure("latent-label-shift", of(table))
    assert finding.comparison.estimate.value > 0.9
    assert "commonest class" not in " ".join(control.name for control in finding.beaten)
    assert "4 values of 'site' show 3 hidden classes" in finding.headline
    assert 0 < finding.numbers["p-value of label shift"].value <= 1
    assert finding.numbers["classes that stand out of sampling noise"].value == 3
    # shares, three classes with their corners, singular values
    assert [type(trace).__name__ for trace in finding.figure.data] == ["Heatmap", *["Scatter"] * 7]
    json.dumps(finding.to_json(), allow_nan=False)


def test_as_many_classes_as_domains_explain_anything_and_this_is_told(table, tmp_path):
    frame = pd.read_csv(table)
    frame[frame.site != "s3"].to_csv(tmp_path / "three.csv", index=False)
    finding = measure("latent-label-shift", of(tmp_path / "three.csv"))
    assert "label shift cannot be tested with as many classes as values" in finding.headline
    assert "p-value of label shift" not in finding.numbers
    assert "more values of the domain than there are classes" in finding.advice
    for classes, words in (
        (3, "none: as many classes as domains explain any difference"),
        (2, "p value of label shift: 0."),
    ):
        code, out = run(tmp_path / "three.csv", "--domain", "site", "--classes", classes, "--target", "label")
        assert code == 0, out
        assert words in " ".join(out.split())


@pytest.fixture
def wards(table, tmp_path):
    """The same rows with the domain as numbers, under a name that does not tell what it is; ``a`` keeps the row."""
    frame = pd.read_csv(table).rename(columns={"site": "ward"})
    frame["ward"] = 10 * frame["ward"].str[1:].astype(int)
    frame.to_csv(tmp_path / "wards.csv", index=False)
    return tmp_path / "wards.csv", frame


def test_the_user_names_the_column_of_domains(wards):
    path, frame = wards
    subject = of(path, "ward")
    data = subject.data
    assert data.features == ("a", "b", "c")
    assert (data.domains.name, data.domains.levels) == ("ward", ("0", "10", "20", "30"))
    for rows in data.parts.values():
        in_file = rows.x.numpy() * np.array(data.scaling)[:, 1] + np.array(data.scaling)[:, 0]
        row = np.abs(in_file[:, None] - frame[["a", "b", "c"]].to_numpy()).sum(axis=2).argmin(axis=1)
        assert [int(data.domains.levels[i]) for i in rows.domain.tolist()] == frame["ward"].to_numpy()[row].tolist()
        assert rows.head(5).domain.tolist() == rows.domain[:5].tolist()
    finding = measure("latent-label-shift", subject)
    assert "4 values of 'ward' show 3 hidden classes" in finding.headline
    assert finding.comparison.estimate.value > 0.9
    assert load_charts()["latent-label-shift"].needs.refusal(of(path)) is not None
    relabelled = {part: replace(rows, domain=rows.domain.flip(0)) for part, rows in data.parts.items()}
    assert replace(subject, data=replace(data, **relabelled)).fingerprint != subject.fingerprint


def test_a_trained_model_that_asks_for_the_domain_gets_it(table):
    columns = ("a", "b", "c", *(f"site=s{i}" for i in range(4)))
    found = load_data(str(table), DataOptions(target="label", domain="site"), Wanted(trained=True, columns=columns))
    data = found.data
    assert data.features == columns
    assert (data.test.x[:, 3:].argmax(dim=1) == data.test.domain).all()


def test_domains_that_cannot_be_used_are_told(wards, tmp_path):
    path, frame = wards
    frame.assign(text=["some words of a text that goes on and on"] * len(frame)).to_csv(tmp_path / "t.csv", index=False)
    frame.loc[3, "ward"] = None
    frame.to_csv(tmp_path / "nowhere.csv", index=False)
    np.savez(tmp_path / "images.npz", x=np.zeros((40, 8, 8)), y=np.arange(40) % 2)
    for file, options, words in (
        (path, {"domain": "site"}, "no such column; the others are a, b, c, ward"),
        (path, {"domain": "label"}, "that is the label"),
        (tmp_path / "nowhere.csv", {"domain": "ward"}, "1 of 800 rows have no value in the --domain column"),
        (tmp_path / "t.csv", {"domain": "ward", "text": "text"}, "a table of numbers and categories"),
        (tmp_path / "images.npz", {"domain": "ward", "target": None}, "a table of numbers and categories"),
    ):
        with pytest.raises((DataError, InputError), match=words):
            load_data(str(file), DataOptions(**{"target": "label", **options}), Wanted())
    with pytest.raises(InputError, match="--series"):
        DataOptions(domain="ward", series=True)
    dropped = load_data(
        str(tmp_path / "nowhere.csv"), DataOptions(target="label", domain="ward", missing="drop"), Wanted()
    )
    assert sum(len(rows) for rows in dropped.data.parts.values()) == 799


def test_domains_that_look_alike_are_a_finding(tmp_path):
    X, _, y = blobs()
    frame = pd.DataFrame(X, columns=["a", "b", "c"]).assign(label=y)
    frame["ward"] = np.random.default_rng(0).integers(4, size=len(frame))
    frame.to_csv(tmp_path / "alike.csv", index=False)
    finding = measure("latent-label-shift", of(tmp_path / "alike.csv", "ward"))
    assert "4 values of 'ward' look alike" in finding.headline
    assert [control.name for control in finding.beaten] == ["always the largest one"]  # which is as good
    assert finding.numbers["log loss of the domains, out of fold"].value >= finding.numbers[
        "log loss of the domains' shares alone"
    ].value  # fmt: skip
    json.dumps(finding.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: f.rename(columns={"site": "colour"}), "column that names each row's domain: --domain COLUMN"),
        (lambda f: f.assign(site=np.where(f.site == "s0", "s0", "s1")), "at least 3 domains"),
        (lambda f: f[["site", "label"]], "columns besides"),
    ],
)
def test_the_chart_says_why_it_does_not_apply(table, tmp_path, change, text):
    change(pd.read_csv(table)).to_csv(tmp_path / "x.csv", index=False)
    assert text in str(load_charts()["latent-label-shift"].needs.refusal(of(tmp_path / "x.csv")))


def test_the_command_finds_classes_in_a_table(table, tmp_path):
    code, out = run("--data", table, "--domain", "site", "--classes", 3, "--target", "label", "--json")
    assert code == 0, out
    found = json.loads(out)
    assert found["accuracy"] > 0.9
    assert (found["rows"], found["columns"], found["domains"]) == (800, 3, 4)
    assert len(found["labels"]) == 800
    assert sum(found["class_shares"]["s0"]) == pytest.approx(1, abs=1e-3)
    written = tmp_path / "labels.txt"
    assert run("--data", table, "--domain", "site", "--classes", 3, "--leave-out", "label", "--out", written)[0] == 0
    assert written.read_text().split() == [str(label) for label in found["labels"]]


def test_the_command_counts_classes_where_no_number_is_given(table):
    code, out = run(table, "--domain", "site", "--leave-out", "label", "--json")
    assert code == 0, out
    assert json.loads(out)["singular_values_above_noise"] == 3


def test_mistakes_of_the_command_are_told(table, tmp_path):
    frame = pd.read_csv(table)
    frame[["site", "label"]].to_csv(tmp_path / "bare.csv", index=False)
    frame.loc[3, "a"] = None
    frame.to_csv(tmp_path / "holes.csv", index=False)
    frame.loc[5, "site"] = None
    frame.to_csv(tmp_path / "nowhere.csv", index=False)
    site = ("--domain", "site", "--classes", 2, "--leave-out", "label")
    for arguments, text in (
        (("--classes", 3), "need --domain"),
        (("--domain", "site"), "--data FILE"),
        ((table, "--data", table, "--domain", "site"), "give the table once"),
        (("--data", tmp_path / "no.csv", *site), "no file"),
        (("--data", table, "--domain", "shop"), "no column 'shop'"),
        (("--data", tmp_path / "holes.csv", *site), "missing values in column a"),
        (("--data", tmp_path / "nowhere.csv", *site), "no value in column"),
        (("--data", tmp_path / "bare.csv", *site), "no column is left"),
        (("--data", table, "--domain", "site", "--classes", 9), "k = 9"),
    ):
        code, out = run(*arguments)
        assert code != 0
        assert text in " ".join(out.split()), out
    assert run("--data", tmp_path / "holes.csv", *site, "--missing", "median")[0] == 0


# ---- baselines and real rows


def test_baselines_cluster_and_the_naive_route_uses_domains(fitted):
    model, X, domains, y = fitted
    for kind in ("raw", "pca", "ica"):
        assert match_labels(kmeans_labels(X, 3, features=kind), y).accuracy > 0.9
    assert match_labels(naive_labels(model.out_of_fold_, domains, 3), y).accuracy > 0.7
    with pytest.raises(InputError, match="features"):
        kmeans_labels(X, 3, features="umap")
    with pytest.raises(InputError, match="k must"):
        kmeans_labels(X, 0)
    with pytest.raises(DataError, match="NaN"):
        kmeans_labels(np.full((9, 2), np.nan), 2)


def test_missing_labels_are_no_class():
    for y in (np.array([0, 1, np.nan] * 60), np.array(["a", "b", None] * 60)):
        with pytest.raises(DataError, match="no label"):
            simulate_label_shift(y, 4)
        with pytest.raises(InputError, match="labels are missing"):
            match_labels(np.arange(180) % 3, y)


def test_members_of_a_class_need_not_look_alike():
    X, y = load_digits(return_X_y=True)
    pairs = y % 5  # 0 with 5, 1 with 6, ...
    made = simulate_label_shift(pairs, 10, seed=3)
    rows, truth = X[made.index] / 16, pairs[made.index]
    model = LatentLabelShift(5, n_clusters=15).fit(rows, made.domains)
    ours, plain = match_labels(model.labels_, truth).accuracy, match_labels(kmeans_labels(rows, 5), truth).accuracy
    assert ours > plain + 0.2
    bright = rows + np.linspace(-0.3, 0.3, 10)[made.domains][:, None]
    assert LatentLabelShift(5, n_clusters=15).fit(bright, made.domains).shift_test_.p_value < 0.02


def test_public_names_are_documented():
    for name in lls.__all__:
        assert getattr(lls, name).__doc__
