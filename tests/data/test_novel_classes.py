import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from scipy.spatial.distance import cdist
from scipy.stats import uniform
from sklearn.cluster import KMeans
from sklearn.manifold import spectral_embedding as peer_embedding
from sklearn.metrics import silhouette_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from theodolite.core.builtin import builtin
from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.loading import DataOptions, load_subject
from theodolite.data.novel_classes import (
    PBN,
    HiddenClassKFold,
    NCDKMeans,
    NCDSpectralClustering,
    TabularNCD,
    clustering_accuracy,
    default_space,
    describe_clusters,
    estimate_n_clusters,
    spectral_bandwidth,
    tune_hidden,
)
from theodolite.data.novel_classes.counts import silhouette
from theodolite.data.novel_classes.kmeans import draw_centroids
from theodolite.data.novel_classes.labels import labelled
from theodolite.data.novel_classes.network import ProjectionNetwork, projection_loss, train_projection
from theodolite.data.novel_classes.spectral import dense_affinity, spanning_tree, sparse_affinity, spectral_embedding
from theodolite.data.novel_classes.tabular_ncd import pair_loss, similar_pairs
from theodolite.run_commands import run_app
from theodolite.survey.chart import load_charts
from theodolite.survey.run import measure

SIX = np.array([[0, 0], [1, 0], [0, 2], [5, 5], [6, 5], [5, 7]], dtype=float)


def blobs(classes=6, rows=30, columns=16, seed=0, spread=0.5):
    """Rows of round classes with far means, and the class of each."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(classes, columns)) * 4
    c = np.repeat(np.arange(classes), rows)
    return means[c] + rng.normal(size=(len(c), columns)) * spread, c


def hide(c, novel):
    return np.where(np.isin(c, novel), -1, c)


# ---- exact answers


@pytest.mark.parametrize("seed", range(5))
def test_without_known_rows_it_is_k_means(seed):
    x = np.random.default_rng(seed).normal(size=(300, 4))
    ours = NCDKMeans(5, n_init=1, seed=seed).fit(x, np.full(300, -1))
    peer = KMeans(5, init=ours.initial_centroids_, n_init=1, tol=0, max_iter=1000).fit(x)
    assert ours.inertia_ == pytest.approx(peer.inertia_, abs=1e-8)
    assert np.allclose(ours.centroids_, peer.cluster_centers_)
    assert (ours.labels_ == peer.labels_).all()


@pytest.mark.parametrize("offset", [1e6, 1.7e9, 1e12])
def test_columns_far_from_zero_keep_their_clusters(offset):
    x, c = blobs(5, 40, 4)
    made = NCDKMeans(3).fit(x + offset, hide(c, [2, 3, 4]))
    assert clustering_accuracy(c[80:], made.labels_) == 1
    assert (made.predict(x[80:] + offset) == made.labels_).all()


def test_rows_on_a_known_centroid_are_never_drawn():
    rng = np.random.default_rng(0)
    known = np.array([[0.0, 0.0], [4.0, 1.0]])
    points = np.concatenate([np.repeat(known, 40, axis=0), rng.normal(size=(5, 2)) + 9])
    on = 0
    for seed in range(1000):
        drawn = draw_centroids(points, known, 2, power=2, seed=seed)
        on += int((cdist(drawn, known) == 0).any())
    assert on == 0
    x = np.concatenate([[[1.0, 0], [-1.0, 0], [0, 0], [0, 0]], [[8.0, 8], [9, 9]]])
    fitted = [NCDKMeans(1, n_init=1, seed=seed).fit(x, np.array([3, 3, -1, -1, -1, -1])) for seed in range(50)]
    assert all(one.initial_centroids_.min() >= 8 for one in fitted)


@pytest.mark.parametrize("power", [1, 2])
def test_draws_follow_the_distance_to_the_power(power):
    points, known = np.array([[1.0], [2.0], [3.0]]), np.array([[0.0]])
    drawn = np.array([draw_centroids(points, known, 1, power=power, seed=s)[0, 0] for s in range(4000)])
    expected = np.arange(1, 4) ** power / (np.arange(1, 4) ** power).sum()
    share = np.array([(drawn == value).mean() for value in (1, 2, 3)])
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_the_six_points_have_the_known_bandwidth_and_embedding():
    sigma = spectral_bandwidth(SIX, 0.5)
    assert sigma == pytest.approx(math.sqrt(34 / math.log(2)), rel=1e-12)
    assert sigma == pytest.approx(7.00369, abs=1e-5)
    a = np.exp(-(cdist(SIX, SIX) ** 2) / (2 * sigma**2))
    np.fill_diagonal(a, 0)
    assert np.allclose(dense_affinity(SIX, sigma), a)
    degree = a.sum(axis=1)
    laplacian = np.eye(6) - a / np.sqrt(degree[:, None] * degree)
    _, vectors = linalg.eigh(laplacian)
    ours = spectral_embedding(a, 2)
    assert np.allclose(laplacian @ ours, ours * np.diag(ours.T @ laplacian @ ours), atol=1e-9)
    for i in range(2):  # up to the sign
        assert abs(ours[:, i] @ vectors[:, i + 1]) == pytest.approx(1, abs=1e-9)
    peer = peer_embedding(a, n_components=2, drop_first=True, random_state=0)
    for i in range(2):  # scikit-learn divides each row by the root of its degree
        scaled = peer[:, i] * np.sqrt(degree)
        assert abs(scaled @ ours[:, i]) / np.linalg.norm(scaled) == pytest.approx(1, abs=1e-6)
    assert NCDSpectralClustering(2, min_dist=0.5, n_components=1).fit(SIX, np.full(6, -1)).sigma_ == sigma


def test_many_rows_by_lanczos_give_the_same_embedding():
    x, _ = blobs(4, 160)
    a = dense_affinity(x, spectral_bandwidth(x, 0.6))
    degree = a.sum(axis=1)
    _, vectors = linalg.eigh(a / np.sqrt(degree[:, None] * degree))
    ours = spectral_embedding(a, 3)
    assert len(x) > 600
    assert np.allclose(np.abs((ours * vectors[:, [-2, -3, -4]]).sum(axis=0)), 1, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_the_spanning_tree_is_a_shortest_one(n, p, seed):
    x = np.random.default_rng(seed).integers(0, 6, size=(n, p)).astype(float)
    parent, squared = spanning_tree(x)
    assert np.allclose(squared, ((x[1:] - x[parent]) ** 2).sum(axis=1))
    reached, d = {0}, cdist(x, x, "sqeuclidean")
    total = 0.0
    while len(reached) < n:  # Kruskal's weight by plain growth
        i, j = min(((a, b) for a in reached for b in range(n) if b not in reached), key=lambda pair: d[pair])
        total += d[i, j]
        reached.add(j)
    assert squared.sum() == pytest.approx(total)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 30), st.integers(0, 10**6))
def test_accuracy_is_the_best_over_all_injective_maps(classes, clusters, n, seed):
    rng = np.random.default_rng(seed)
    true, pred = rng.integers(classes, size=n), rng.integers(clusters, size=n)
    width = max(classes, clusters)
    best = max(np.mean(np.array(image)[pred] == true) for image in itertools.permutations(range(width), clusters))
    assert clustering_accuracy(true, pred) == pytest.approx(best)


def test_many_clusters_are_not_mapped_to_one_class():
    assert clustering_accuracy(np.zeros(4, int), np.arange(4)) == 0.25


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(8, 40), st.integers(0, 10**6))
def test_the_silhouette_is_scikit_learns(k, n, seed):
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(n, 3)), np.r_[np.arange(k), rng.integers(k, size=n - k)]
    assert silhouette(cdist(x, x), labels) == pytest.approx(silhouette_score(x, labels), abs=1e-12)


# ---- the loss


def test_the_loss_sums_over_columns_and_takes_all_rows():
    torch.manual_seed(0)
    network = ProjectionNetwork(4, (3, 2), 2, 3, dropout=0.0).eval()
    x, y = torch.randn(6, 4), torch.tensor([0, -1, 2, -1, 1, -1])
    with torch.no_grad():
        back, scores = network(x)
        classification, reconstruction = projection_loss(network, x, y)
    assert float(reconstruction) == pytest.approx(float(((back - x) ** 2).sum(dim=1).mean()), rel=1e-5)
    named = y >= 0
    assert float(classification) == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores[named], y[named])), rel=1e-5
    )
    nobody = projection_loss(network, x, torch.full((6,), -1))[0]
    assert float(nobody.detach()) == 0  # not NaN


def test_decoder_and_classifier_see_codes_of_length_one():
    torch.manual_seed(0)
    network = ProjectionNetwork(4, (3, 2), 2, 3, dropout=0.0).eval()
    x = torch.randn(5, 4)
    z = network.normalise(network.encoder(x))
    assert torch.allclose(z.norm(dim=1), torch.ones(5))
    back, scores = network(x)
    assert torch.equal(back, network.decoder(z))
    assert torch.equal(scores, network.classifier(z))
    bare = ProjectionNetwork(4, (3, 2), 2, 3, dropout=0.0, norm="none").eval()
    assert torch.equal(bare.normalise(x), x)


def test_the_layers_are_the_papers():
    made = PBN(13, n_novel=2, epochs=1).fit(*_sixteen())
    widths = [(m.in_features, m.out_features) for m in made.network_.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [(16, 12), (12, 8), (8, 13), (13, 8), (8, 12), (12, 16), (13, 3)]
    kinds = [type(m).__name__ for m in made.network_.encoder]
    assert kinds == ["Linear", "ReLU", "BatchNorm1d", "Dropout"] * 2 + ["Linear"]


def _sixteen():
    x, c = blobs(5, 20, 16)
    return x, hide(c, [3, 4])


def test_with_w_one_unlabelled_rows_do_not_matter_to_the_network():
    x, y = _sixteen()
    far = x.copy()
    far[y == -1] += 3
    networks = []
    for rows in (x, far):
        torch.manual_seed(0)
        network = ProjectionNetwork(16, (12, 8), 4, 3, dropout=0.0)
        train_projection(
            network, torch.as_tensor(rows).float(), torch.as_tensor(y), w=1, lr=1e-3, epochs=2, batch_size=32, seed=0
        )
        networks.append(network.state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_with_w_below_one_unlabelled_rows_are_reconstructed():
    x, y = _sixteen()
    made = PBN(12, 0.3, n_novel=2, epochs=150, lr=5e-3, dropout=0.0).fit(x, y)
    assert made.history_.reconstruction[-1] < 0.5 * made.history_.reconstruction[0]
    z = torch.as_tensor(made._codes(x[y == -1]), dtype=torch.float32)
    with torch.no_grad():
        back = made.network_.decoder(made.network_.normalise(z)).numpy()
    truth = (x[y == -1] - made._shift) / made._scale
    assert 1 - ((back - truth) ** 2).sum() / (truth**2).sum() > 0.5


# ---- PBN


def test_it_finds_new_classes_and_names_known_ones():
    x, c = blobs(6, 60)
    y = hide(c, [4, 5])
    keep = np.arange(len(c)) % 3 > 0
    made = PBN(n_novel=2, epochs=40, lr=5e-3).fit(x[keep], y[keep])
    new = ~keep & (y == -1)
    assert clustering_accuracy(c[keep & (y == -1)], made.labels_) >= 0.95
    assert clustering_accuracy(c[new], made.predict(x[new])) >= 0.95
    old = ~keep & (y != -1)
    assert (made.predict_known(x[old]) == c[old]).mean() >= 0.95
    answers = made.predict_open(x[~keep])
    known = np.array([not isinstance(answer, str) for answer in answers])
    assert (known == (y[~keep] != -1)).mean() >= 0.9
    assert set(answers[~known]) <= {"novel-0", "novel-1"}


@pytest.mark.parametrize("clusterer", ["kmeans", "ncd_kmeans", "spectral", "ncd_spectral"])
@pytest.mark.parametrize("normalized", [False, True])
def test_prediction_repeats_the_labels_of_the_fit(clusterer, normalized):
    x, c = blobs()
    y = hide(c, [4, 5])
    made = PBN(n_novel=2, epochs=15, lr=5e-3, clusterer=clusterer, cluster_normalized=normalized).fit(x, y)
    assert (made.predict(x[y == -1]) == made.labels_).all()
    assert clustering_accuracy(c[y == -1], made.labels_) >= 0.9
    lengths = np.linalg.norm(made.transform(x), axis=1)
    assert np.allclose(lengths, 1) == normalized
    assert np.array_equal(made.transform(x), made.transform(x))  # dropout is off


def test_the_number_is_estimated_only_where_it_is_not_given():
    x, c = blobs(7, 40, spread=0.3)
    y = hide(c, [4, 5, 6])
    found = PBN(epochs=40, lr=5e-3).fit(x, y)
    assert found.count_ is not None
    assert found.n_novel_ == found.count_.k == 3
    assert found.count_.tried == tuple(range(2, 31))
    given_ = PBN(n_novel=5, epochs=2).fit(x, y)
    assert (given_.count_, given_.n_novel_) == (None, 5)


def test_the_same_seed_gives_the_same_and_torchs_own_seed_is_left_alone():
    x, y = _sixteen()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second, other = (PBN(n_novel=2, epochs=2, seed=s).fit(x, y).transform(x) for s in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_columns_are_scaled_by_the_rows_of_the_fit_only():
    x, y = _sixteen()
    x[:, 3] = 5.0
    frame = pd.DataFrame(x, columns=[f"c{i}" for i in range(16)])
    made = PBN(n_novel=2, epochs=2).fit(frame, y)
    assert made.dropped_columns_ == ("c3",)
    assert np.allclose(made._shift, np.delete(x, 3, axis=1).mean(axis=0))
    before = made.transform(x[:3])
    made.transform(x + 100)
    assert np.allclose(before, made.transform(x[:3]))
    scaled = PBN(n_novel=2, epochs=2).fit(x * 1000 + 7, y)
    assert np.allclose(made.transform(x), scaled.transform(x * 1000 + 7), atol=1e-3)


def test_labels_may_be_texts_and_it_stands_in_a_pipeline():
    x, c = blobs()
    y = np.where(c >= 4, "-1", np.array(["a", "b", "c", "d", "e", "f"])[c])
    made = make_pipeline(StandardScaler(), PBN(n_novel=2, epochs=20, lr=5e-3)).fit(x, y)
    assert set(made.predict(x)) <= {0, 1}
    assert set(made[-1].classes_) == {"a", "b", "c", "d"}
    mixed = np.array([-1 if one == "-1" else one for one in y], dtype=object)
    assert (
        PBN(n_novel=2, epochs=20, lr=5e-3).fit(StandardScaler().fit_transform(x), mixed).labels_ == made[-1].labels_
    ).all()
    assert make_pipeline(StandardScaler(), NCDKMeans(2)).fit(x, y).predict(x[:3]).shape == (3,)


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_last_batch_of_one_row_is_no_error(extra):
    x, c = blobs(4, 8)
    x, c = np.concatenate([x, x[:extra]]), np.r_[c, c[:extra]]
    assert np.isfinite(PBN(n_novel=2, epochs=2, batch_size=16).fit(x, hide(c, [2, 3])).history_.reconstruction).all()


def test_one_column_and_batches_without_known_rows_work():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(size=3), rng.normal(size=60) + np.repeat([5, 9], 30)][:, None]
    made = PBN(n_novel=2, epochs=3, batch_size=8).fit(x, np.r_[np.zeros(3, int), np.full(60, -1)])
    assert made.transform(x).shape == (63, 1)
    assert np.isfinite(made.history_.classification).all()


# ---- k-means and spectral clustering


def test_known_means_take_no_rows_in_lloyds_iterations():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.normal(size=(50, 2)),
            rng.normal(size=(80, 2)) + np.array([2, 0]),
            rng.normal(size=(80, 2)) + np.array([9, 0]),
        ]
    )
    y = np.r_[np.zeros(50, int), np.full(160, -1)]
    made = NCDKMeans(2).fit(x, y)
    new = x[50:]
    assert np.allclose(made.known_centroids_, x[:50].mean(axis=0))
    for j in range(2):  # the fixed point: each centroid is the mean of unlabelled rows nearest to it, whatever is known
        mine = cdist(new, made.centroids_).argmin(axis=1) == j
        assert np.allclose(made.centroids_[j], new[mine].mean(axis=0))
    every = NCDKMeans(2, update="all").fit(x, y)
    assert every.inertia_ >= made.inertia_ - 1e-9


def test_a_cluster_without_rows_keeps_its_place():
    from theodolite.data.novel_classes.kmeans import lloyd

    centres = lloyd(np.array([[0.0], [1.0]]), np.array([[0.4], [50.0]]))
    assert centres.ravel().tolist() == [0.5, 50.0]


def test_the_number_may_be_found_for_both():
    x, c = blobs(5, 40, spread=0.2)
    y = hide(c, [2, 3, 4])
    assert NCDKMeans("auto").fit(x, y).n_novel_ == 3
    assert NCDSpectralClustering("auto").fit(x, y).n_novel_ == 3


def test_a_sparse_graph_finds_the_same_clusters_and_stays_connected():
    x, c = blobs(5, 60, spread=0.3)
    y = hide(c, [3, 4])
    dense, thin = (NCDSpectralClustering(2, max_dense=m).fit(x, y) for m in (5000, 100))
    assert clustering_accuracy(dense.labels_, thin.labels_) == 1
    assert (thin.predict(x[y == -1]) == thin.labels_).all()
    from scipy.sparse.csgraph import connected_components

    a = sparse_affinity(x, spectral_bandwidth(x, 0.6), 2)
    assert connected_components(a)[0] == 1
    assert abs(a - a.T).max() == 0
    assert a.diagonal().sum() == 0


# ---- TabularNCD


def test_pairs_are_each_rows_most_similar_ones_and_their_loss_is_a_cross_entropy():
    codes = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
    same = similar_pairs(codes, 0.34)
    assert same.nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    by_hand = [
        -math.log(t) if same[i, j] else -math.log(1 - t)
        for i, j in itertools.permutations(range(4), 2)
        for t in [float(p[i] @ p[j])]
    ]
    assert float(pair_loss(p, same)) == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_tabular_ncd_finds_classes_far_apart():
    x, c = blobs(6, 40)
    y = hide(c, [4, 5])
    made = TabularNCD(2, epochs=60, lr=5e-3, top_share=0.3).fit(x, y)
    assert clustering_accuracy(c[y == -1], made.labels_) >= 0.9
    assert (made.predict(x[y == -1]) == made.labels_).all()
    assert (TabularNCD(2, epochs=60, lr=5e-3, top_share=0.3).fit(x, y).labels_ == made.labels_).all()
    for options in ({"w": 2}, {"top_share": 0}, {"n_neighbors": 0}, {"lr": 0}, {"batch_size": 1}):
        with pytest.raises(InputError, match="need"):
            TabularNCD(2, **options).fit(x, y)
    with pytest.raises(DataError, match="no row has a known class"):
        TabularNCD(2).fit(x, np.full(len(x), -1))
    with pytest.raises(InputError, match="needs a number"):
        TabularNCD("auto").fit(x, y)


# ---- the number of clusters


@pytest.mark.parametrize("index", ["silhouette", "davies_bouldin", "calinski_harabasz"])
def test_each_index_finds_well_separated_clusters(index):
    x, _ = blobs(4, 60, spread=0.1)
    found = estimate_n_clusters(x, range(2, 9), index=index, runs=2, max_samples=150)
    assert found.k == 4
    assert found.scores.shape == (7, 2)


def test_a_count_needs_different_rows():
    with pytest.raises(DataError, match="too few to tell"):
        estimate_n_clusters(np.ones((50, 3)))
    assert estimate_n_clusters(np.repeat(np.eye(4), 5, axis=0)).tried == (2, 3)
    for options in ({"index": "elbow"}, {"runs": 0}, {"k_range": range(1, 4)}):
        with pytest.raises(InputError):
            estimate_n_clusters(np.eye(5), **options)


# ---- tuning


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 14), st.integers(0, 1000))
def test_folds_hide_at_least_two_classes_and_each_at_most_once(classes, seed):
    y = np.r_[np.repeat(np.arange(classes) * 3, 2), [-1, -1]]
    splits = list(HiddenClassKFold(seed=seed).split(np.zeros((len(y), 1)), y))
    assert len(splits) == min(5, classes // 2)
    hidden_before = set()
    for train, hidden in splits:
        assert not (train & hidden).any()
        assert ((train | hidden) == (y != -1)).all()
        assert set(y[train]).isdisjoint(y[hidden])
        assert len(set(y[hidden])) >= 2
        assert train.any()
        assert hidden_before.isdisjoint(y[hidden])
        hidden_before |= set(y[hidden])
    assert len(splits) == 1 or len(hidden_before) == classes


class Spy(NCDKMeans):
    """Remembers what labels it was given."""

    seen = None

    def cluster_hidden(self, X, y, hidden, k):
        Spy.seen.append((np.array(y), np.array(hidden), k))
        return super().cluster_hidden(X, y, hidden, k)


def test_tuning_never_shows_labels_of_hidden_or_new_rows():
    x, c = blobs(8, 15)
    y = hide(c, [6, 7])
    Spy.seen = []
    result = tune_hidden(Spy(2), {"power": [1, 2]}, x, y, prune=False)
    assert len(Spy.seen) == 2 * 3
    for labels, hidden, k in Spy.seen:
        assert (labels[hidden] == -1).all()
        assert (labels[y == -1] == -1).all()
        assert not hidden[y == -1].any()  # only hidden known rows are scored
        assert k == len(set(c[hidden]))
    assert [trial.params for trial in result.table] == [{"power": 1}, {"power": 2}]
    assert all(len(trial.scores) == 3 for trial in result.table)
    assert result.refit.labels_.shape == ((y == -1).sum(),)


def test_tuning_chooses_the_best_mean_and_refits():
    x, c = blobs(8, 20, spread=1.0)
    y = hide(c, [6, 7])
    result = tune_hidden(PBN(n_novel=2, epochs=5), {"w": [0.0, 0.5, 1.0], "lr": [1e-5, 1e-2]}, x, y, n_trials=6)
    whole = [trial for trial in result.table if not trial.pruned]
    assert result.best_params == max(whole, key=lambda trial: trial.score).params
    assert all(len(trial.scores) in (2, 3) for trial in result.table)
    assert any(trial.pruned for trial in result.table)
    assert (result.refit.w, result.refit.lr) == (result.best_params["w"], result.best_params["lr"])
    assert len(result.refit.classes_) == 6
    again = tune_hidden(PBN(n_novel=2, epochs=5), {"w": [0.0, 0.5, 1.0], "lr": [1e-5, 1e-2]}, x, y, n_trials=6)
    assert again.table == result.table


def test_settings_are_drawn_from_distributions_and_texts_may_name_classes():
    x, c = blobs(5, 10)
    y = np.where(c == 4, "-1", np.array(list("abcde"))[c])
    result = tune_hidden(NCDSpectralClustering(2), {"min_dist": uniform(0.1, 0.8)}, x, y, n_trials=3)
    values = [trial.params["min_dist"] for trial in result.table]
    assert len(set(values)) == 3
    assert all(0.1 <= v <= 0.9 for v in values)
    space = default_space(16)
    drawn = space["latent_dim"].rvs(200, random_state=0)
    assert (drawn.min(), drawn.max()) == (4, 24)
    default = tune_hidden(PBN(n_novel=2, epochs=1), None, x, y, n_trials=2)
    assert set(default.best_params) == {"lr", "dropout", "w", "latent_dim"}


def test_hidden_rows_are_clustered_alone():
    """Real unlabelled rows that lie between the hidden classes do not change how the hidden ones are clustered."""
    rng = np.random.default_rng(0)
    means = np.repeat([[0, 9], [0, -9], [-9, 0], [9, 0], [0, 0]], [20, 20, 20, 20, 200], axis=0)
    x = means + rng.normal(size=(280, 2))
    y = np.r_[np.repeat([0, 1, -1, -1], 20), np.full(200, -1)]
    hidden = np.r_[np.zeros(40, bool), np.ones(40, bool), np.zeros(200, bool)]
    for made in (NCDKMeans(2), NCDSpectralClustering(2), PBN(epochs=60, lr=5e-3, hidden=(16, 16))):
        labels = made.cluster_hidden(x, y, hidden, 2)
        assert labels.shape == (40,)
        assert clustering_accuracy(np.repeat([0, 1], 20), labels) >= 0.95


# ---- descriptions


def test_a_cluster_is_described_by_the_columns_that_set_it_apart():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, size=(400, 3))
    labels = ((x[:, 1] > 0.8) & (x[:, 2] <= 0.5)).astype(int)
    known = (
        rng.uniform(0, 1, size=(60, 3)) + np.repeat([[0, 0, 0], [0, 9, 0]], 30, axis=0),
        np.repeat(["ok", "far"], 30),
    )
    plain, special = describe_clusters(x, labels, ["a", "speed", "load"], known=known)
    assert "speed > 0.8" in special.rule or "speed > 0.7" in special.rule
    assert "load <= 0.5" in special.rule or "load <= 0.4" in special.rule
    assert "a " not in special.rule
    assert special.rows == labels.sum()
    assert min(special.precision, special.recall, special.fidelity) > 0.85
    assert special.nearest_known == "ok"
    assert str(special).startswith(f"group 1 (n = {labels.sum()}): ")
    assert plain.rows + special.rows == 400
    assert describe_clusters(x, np.zeros(400, int))[0].rule == "all rows"


def test_a_rule_names_categories():
    x = np.repeat([[0.0, 1.0], [1.0, 0.0]], 20, axis=0)
    rules = [one.rule for one in describe_clusters(x[:, :1], np.repeat([0, 1], 20), ["colour=red"])]
    assert rules == ["not colour=red", "colour=red"]
    rules = [one.rule for one in describe_clusters(x[:, 1:], np.repeat([0, 1], 20), ["switched on"])]
    assert rules == ["switched on > 0.5", "switched on <= 0.5"]


def test_a_rule_that_separates_nothing_is_told_by_its_quality():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(600, 2)), rng.integers(2, size=600)
    for one in describe_clusters(x, labels):
        assert one.fidelity is None or one.fidelity < 0.6
    with pytest.raises(DataError, match="2 columns"):
        describe_clusters(x, labels, ["only one"])
    with pytest.raises(DataError, match="one cluster label"):
        describe_clusters(x, labels[:5])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([-1.0, 2.0, 4.0], [2, 4]), ([-1, np.int64(2), np.float32(4)], [2, 4]), (["-1", "b", "a"], ["a", "b"]),
        ([-1.0, "b", 2.0], ["2", "b"]), ([np.int8(-1), True, "b"], ["True", "b"]),
    ],
)  # fmt: skip
def test_labels_of_mixed_types_mark_unlabelled_rows_too(labels, classes):
    given_ = np.array([labels[i] for i in (0, 0, 1, 1, 2, 2)], dtype=object)
    data = labelled(np.arange(6.0)[:, None], given_)
    assert data.classes.tolist() == classes
    assert data.known.tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("epochs", "batch_size", "taken"), [(None, 512, 1600), (None, 16, 400), (None, 4, 200), (7, 512, 7)]
)
def test_small_tables_are_trained_for_as_many_steps_as_large_ones(epochs, batch_size, taken, monkeypatch):
    def stopped(*_, epochs, batch_size, **__):
        raise StopIteration(epochs, batch_size)

    monkeypatch.setattr("theodolite.data.novel_classes.pbn.train_projection", stopped)
    x, c = blobs(4, 16, 3)
    with pytest.raises(StopIteration) as asked:
        PBN(n_novel=2, epochs=epochs, batch_size=batch_size).fit(x, hide(c, [2, 3]))
    assert asked.value.args == (taken, batch_size)


# ---- what cannot be used is told


X, Y = blobs(5, 8, 5)
Y_HIDDEN = hide(Y, [3, 4])
ALL = [PBN(n_novel=2, epochs=1), NCDKMeans(2), NCDSpectralClustering(2)]


@pytest.mark.parametrize("made", ALL, ids=lambda made: type(made).__name__)
@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        (X, Y, "nothing to discover"),
        (X, np.r_[99, Y_HIDDEN[1:]], "known class 99 has a single row"),
        (X, Y_HIDDEN[:-1], "one label a row"),
        (np.where(np.eye(40, 5) > 0, np.nan, X), Y_HIDDEN, "NaN or infinite values in column 0, column 1"),
        (pd.DataFrame({"speed": X[:, 0], "colour": ["red"] * 40}), Y_HIDDEN, "not numbers: colour"),
        (X[:, 0], Y_HIDDEN, "need a table"),
        (X, np.where(Y_HIDDEN == -1, np.nan, Y_HIDDEN), "16 labels are missing"),
        (X, np.array([None if one == -1 else "a" for one in Y_HIDDEN], dtype=object), "16 labels are missing"),
        (X, Y_HIDDEN + 0.5, "fractions"),
        (X, np.where(Y_HIDDEN == 0, np.inf, Y_HIDDEN), "fractions or infinite"),
        (X * np.array([1, 1e160, 1, 1, 1]), Y_HIDDEN, "values above 1e.150 in column 1"),
    ],
)
def test_data_that_cannot_be_used_are_told(made, rows, labels, words):
    with pytest.raises(DataError, match=words):
        made.fit(rows, labels)


@pytest.mark.parametrize("made", [PBN(n_novel=17), NCDKMeans(17), NCDSpectralClustering(17)])
def test_more_clusters_than_rows_are_told(made):
    with pytest.raises(InputError, match="n_novel=17 is more than the 16"):
        made.fit(X, Y_HIDDEN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"w": 1.2}, "w must lie"), ({"w": -0.1}, "w must lie"), ({"latent_dim": 0}, "latent_dim"), ({"lr": 0}, "lr > 0"),
        ({"dropout": 1.0}, "dropout"), ({"epochs": 0}, "epochs"), ({"batch_size": 1}, "batch_size"), ({"hidden": (0,)}, "hidden"),
        ({"norm": "l3"}, "norm must be"), ({"clusterer": "dbscan"}, "clusterer must be"), ({"n_novel": 0}, "n_novel"),
        ({"n_novel": "many"}, "n_novel"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_told(options, words):
    with pytest.raises(InputError, match=words):
        PBN(**options).fit(X, Y_HIDDEN)


def test_other_things_that_cannot_be_are_told():
    with pytest.raises(DataError, match="all columns are constant"):
        PBN().fit(np.ones((40, 2)), Y_HIDDEN)
    with pytest.raises(DataError, match="no row has a known class"):
        PBN().fit(X, np.full(40, -1))
    made = PBN(w=0, n_novel=2, epochs=1).fit(X, Y_HIDDEN)
    with pytest.raises(ModelError, match="w = 0"):
        made.predict_known(X)
    with pytest.raises(DataError, match="fitted on 5 columns"):
        made.predict(X[:, :3])
    with pytest.raises(TrainingCollapsedError, match="no longer finite"):
        PBN(n_novel=2, epochs=60, lr=1e30).fit(X, Y_HIDDEN)
    for low in (0, 1, -0.5, 1.5):
        with pytest.raises(InputError, match="min_dist"):
            spectral_bandwidth(SIX, low)
        with pytest.raises(InputError, match="min_dist"):
            NCDSpectralClustering(2, min_dist=low).fit(X, Y_HIDDEN)
    with pytest.raises(DataError, match="the same"):
        spectral_bandwidth(np.ones((5, 2)), 0.5)
    with pytest.raises(InputError, match="n_components"):
        NCDSpectralClustering(2, n_components=40).fit(X, Y_HIDDEN)
    with pytest.raises(InputError, match="max_dense"):
        NCDSpectralClustering(2, max_dense=0).fit(X, Y_HIDDEN)
    for options in ({"n_init": 0}, {"power": 0}, {"update": "known"}):
        with pytest.raises(InputError, match="n_init"):
            NCDKMeans(2, **options).fit(X, Y_HIDDEN)
    same = np.r_[X[:24], np.repeat(X[:1], 16, axis=0)]
    with pytest.raises(DataError, match="too few for"):
        NCDKMeans(3).fit(same, Y_HIDDEN)
    with pytest.raises(DataError, match="too few for 3 clusters"):
        PBN(n_novel=3, epochs=1).fit(same, Y_HIDDEN)


def test_tuning_that_cannot_be_is_told():
    two = np.where(Y < 2, Y, -1)
    with pytest.raises(DataError, match=r"at least three.*default parameters"):
        tune_hidden(PBN(), None, X, two)
    with pytest.raises(InputError, match="fewer than two classes"):
        list(HiddenClassKFold(3).split(X, Y))
    with pytest.raises(InputError, match="fewer than two classes"):
        list(HiddenClassKFold(0).split(X, Y))
    with pytest.raises(ModelError, match="no cluster_hidden"):
        tune_hidden(KMeans(2), {"n_init": [1]}, X, Y_HIDDEN)
    with pytest.raises(InputError, match="no parameter"):
        tune_hidden(PBN(), {}, X, Y_HIDDEN)
    with pytest.raises(InputError, match="n_trials"):
        tune_hidden(PBN(), None, X, Y_HIDDEN, n_trials=0)


# ---- chart and command


def test_the_chart_hides_classes_and_tells_what_comes_of_it(tmp_path):
    x, c = blobs(6, 60, 8, spread=1.5)
    frame = pd.DataFrame(x, columns=[f"sensor{i}" for i in range(8)])
    frame["kind"] = np.array(list("abcdef"))[c]
    frame.to_csv(tmp_path / "six.csv", index=False)
    subject = load_subject(data=tmp_path / "six.csv", options=DataOptions(target="kind"), epochs=2)
    applies = load_charts()["novel-class-discovery"].needs
    assert applies.refusal(subject) is None
    assert "at least 4 classes" in str(applies.refusal(builtin("breast-cancer")))
    finding = measure("novel-class-discovery", subject)
    assert "3 of 6 classes made nameless" in finding.headline
    ours = finding.comparison.estimate
    assert ours.n == finding.numbers["test rows in the right group, k-means on the input columns"].n == 36
    assert ours.low > finding.comparison.controls[1].estimate.high  # all in one group
    assert "some of its classes were hidden" in finding.caveats[0]
    lost = finding.comparison.controls[0].estimate.low > ours.high
    assert ("fewer than k-means'" in finding.headline) == finding.advice.startswith("Here k-means") == lost
    assert "sensor" in finding.advice
    json.dumps(finding.to_json(), allow_nan=False)
    again = measure("novel-class-discovery", subject)
    assert again.headline == finding.headline
    assert again.figure.to_json() == finding.figure.to_json()
    few = DataOptions(target="kind", max_rows=60)
    small = load_subject(data=tmp_path / "six.csv", options=few, epochs=2)
    assert "needs at least" in str(applies.refusal(small))


def test_the_chart_hides_two_of_four_classes(tmp_path):
    x, c = blobs(4, 60, 8, spread=1.5)
    frame = pd.DataFrame(x, columns=[f"sensor{i}" for i in range(8)]).assign(kind=np.array(list("abcd"))[c])
    frame.to_csv(tmp_path / "four.csv", index=False)
    subject = load_subject(data=tmp_path / "four.csv", options=DataOptions(target="kind"), epochs=2)
    finding = measure("novel-class-discovery", subject)
    assert "2 of 4 classes made nameless" in finding.headline
    assert finding.numbers["weight of the known labels"].value == 0.5
    assert "w is 0.5, the default" in finding.caveats[1]
    assert finding.comparison.estimate.low > finding.comparison.controls[1].estimate.high


def test_the_chart_groups_rows_that_have_no_label(tmp_path):
    x, c = blobs(7, 60, 8, spread=0.8)
    frame = pd.DataFrame(100 + x, columns=[f"sensor{i}" for i in range(8)])
    frame["kind"] = np.array([*"abcd", "", "", ""], dtype=object)[c]
    frame.to_csv(tmp_path / "some.csv", index=False)
    options = DataOptions(target="kind", missing="drop")
    subject = load_subject(data=tmp_path / "some.csv", options=options, epochs=2)
    data = subject.data
    assert tuple(data.unlabelled.shape) == (180, 8)
    shift, scale = np.array(data.scaling).T
    assert np.allclose(data.unlabelled.numpy() * scale + shift, 100 + x[c >= 4], atol=1e-3)
    finding = measure("novel-class-discovery", subject)
    groups = int(finding.numbers["groups of rows without a label, latent space"].value)
    assert f"180 rows without a label form {groups} groups" in finding.headline
    assert 2 <= groups <= 4
    assert "in a trial with 2 of 4 classes made nameless" in finding.headline
    assert finding.numbers["rows without a label"].value == 180
    assert finding.advice.count("nearest known class") == groups
    cut = float(re.search(r"sensor\d (?:>|<=) (\d+\.\d+|\d+)", finding.advice)[1])
    assert 80 < cut < 120  # in the units of the file
    json.dumps(finding.to_json(), allow_nan=False)
    with pytest.raises(DataError, match="missing"):
        load_subject(data=tmp_path / "some.csv", options=DataOptions(target="kind"), epochs=2)


def run(*arguments):
    return CliRunner().invoke(run_app, ["novel-class-discovery", *map(str, arguments)])


@pytest.fixture
def table(tmp_path):
    x, c = blobs(5, 25, 8, seed=1, spread=0.3)
    frame = pd.DataFrame(x, columns=[f"sensor{i}" for i in range(8)])
    frame["colour"] = np.where(x[:, 0] > 0, "red", "blue")
    frame["kind"] = [["ok", "leak", "jam", "", ""][i] for i in c]
    path = tmp_path / "machines.csv"
    frame.to_csv(path, index=False)
    return path, c


def test_the_command_groups_rows_without_a_label(table, tmp_path):
    path, c = table
    done = run(path, "--label", "kind", "--epochs", 60, "--novel", 2, "--out", tmp_path / "groups.csv", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["known_classes"] == ["jam", "leak", "ok"]
    assert (told["labelled_rows"], told["unlabelled_rows"], told["new_groups"]) == (75, 50, 2)
    assert told["number_of_groups"] == "as given"
    assert all("nearest known class" in group for group in told["groups"])
    groups = pd.read_csv(tmp_path / "groups.csv")
    assert groups["row"].tolist() == list(range(75, 125))
    assert clustering_accuracy(c[groups["row"]], groups["group"].to_numpy()) >= 0.9
    estimated = run(path, "--label", "kind", "--epochs", 3, "--tune", 2)
    assert estimated.exit_code == 0, estimated.output
    assert "estimated by the silhouette" in estimated.output
    assert "parameters" in estimated.output


def test_the_command_tells_what_is_wrong(table, tmp_path):
    path, _ = table
    frame = pd.read_csv(path)
    frame.dropna().to_csv(tmp_path / "whole.csv", index=False)
    frame.loc[3, "sensor1"] = np.nan
    frame.to_csv(tmp_path / "gaps.csv", index=False)
    for arguments, error, words in (
        ((tmp_path / "none.csv",), DataError, "no file"),
        ((path, "--label", "species"), InputError, "--label species: .*machines.csv has no such column"),
        ((path, "--label", "kind", "--domain", "site"), InputError, "no such column"),
        ((tmp_path / "gaps.csv", "--label", "kind"), DataError, "values are missing in 1 rows .sensor1."),
        (
            (tmp_path / "whole.csv", "--label", "kind"),
            DataError,
            "nothing to discover: every row of .*whole.csv has a label; leave the label empty",
        ),
        ((path, "--label", "kind", "--novel", 51), InputError, "more than the 50"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, error)
        assert re.search(words, str(done.exception)), done.exception
    for missing in ("drop", "median"):
        done = run(
            tmp_path / "gaps.csv", "--label", "kind", "--missing", missing, "--novel", 2, "--epochs", 2, "--json"
        )
        assert json.loads(done.stdout)["labelled_rows"] == (74 if missing == "drop" else 75)
