import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from typer.testing import CliRunner

import theodolite
from theodolite.cli import app
from theodolite.core.builtin import builtin
from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.networks.clustering import (
    TELL,
    DeadClusterWarning,
    Epoch,
    KMeansLayer,
    baseline_labels,
    clustering_metrics,
    deep_embedded_clustering,
    spherical_kmeans,
)
from theodolite.networks.clustering.networks import autoencoder
from theodolite.networks.clustering.training import Trainer, codes_of


def blobs(n=120, d=3, k=3, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    return np.eye(max(d, k))[:k, :d][y] * 4 + rng.normal(size=(n, d)) * noise, y


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    return bunch.images / 16, bunch.target


@pytest.fixture(scope="module")
def conv(digits):
    """A short run on images: 400 rows, 5 epochs of warm-up, 10 in turns."""
    images, y = digits
    options = {"batch_size": 40, "epochs": 10, "warmup_epochs": 5, "init": "kmeans"}
    return TELL(10, **options).fit(images[:400], y[:400])


# ---- steps, exactly


def one_trainer(alpha=0.5, optimizer="adam", weight=0.1, k=3, seed=0):
    torch.manual_seed(seed)
    encoder, decoder = autoencoder("mlp", (6,), 4)
    layer = KMeansLayer(4, k, alpha=alpha, normalized=True, seed=seed)
    return Trainer(encoder, decoder, layer, cluster_weight=weight, optimizer=optimizer, unit=1.0)


def numbers(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_step_of_centres_goes_by_the_mean_direction_of_their_rows():
    z = nn.functional.normalize(torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    layer = KMeansLayer(4, 3, alpha=0.5, normalized=True, seed=2)
    trainer = Trainer(nn.Flatten(), None, layer, cluster_weight=1e-3, optimizer="adam", unit=1.0)
    before, labels = layer.centers.detach().clone(), layer.assign(z)
    trainer.step(z, "centres")
    for j in range(3):
        mean = z[labels == j].sum(dim=0)
        moved = before[j] + 0.1 * mean / mean.norm()  # 0.2 alpha of a weight row of length 2 alpha
        assert torch.allclose(layer.centers[j], moved / moved.norm(), atol=1e-6)


@pytest.mark.parametrize("alpha", [1e-3, 1.0])
def test_adadeltas_constants_decide_the_reach_of_a_step(alpha):
    z = nn.functional.normalize(torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    layer = KMeansLayer(4, 3, alpha=alpha, normalized=True, seed=2)
    trainer = Trainer(nn.Flatten(), None, layer, cluster_weight=1e-3, optimizer="adadelta", unit=1.0)
    before = layer.centers.detach().clone()
    trainer.step(z, "centres")
    moved = (layer.centers - before).norm(dim=1).max()
    # a gradient of length 0.2 alpha is far below Adadelta's sqrt(eps) = 1e-3 at alpha = 1e-3: a plain step of 0.1
    assert 0.03 < moved < 0.12 if alpha == 1e-3 else moved < 0.01


def test_even_epochs_move_centres_and_hide_the_cluster_loss_from_the_encoder():
    x = torch.rand(32, 6, generator=torch.Generator().manual_seed(0))
    after = []
    for weight in (0.0, 100.0):
        trainer = one_trainer(weight=weight)
        centres, encoder = numbers(trainer.layer), numbers(trainer.encoder)
        torch.manual_seed(3)
        trainer.step(x, "centres")
        assert not torch.equal(numbers(trainer.layer), centres)
        assert not torch.equal(numbers(trainer.encoder), encoder)
        assert torch.allclose(trainer.layer.weight.norm(dim=1), torch.full((3,), 1.0))
        after.append(numbers(trainer.encoder))
    assert torch.equal(*after)


def test_odd_epochs_leave_the_centres_and_move_the_encoder_by_both_terms():
    x = torch.rand(32, 6, generator=torch.Generator().manual_seed(0))
    after = []
    for weight in (0.0, 100.0):
        trainer = one_trainer(weight=weight)
        trainer.step(x, "centres")  # so that the optimiser has a state for the centres
        centres = numbers(trainer.layer)
        torch.manual_seed(3)
        trainer.step(x, "encoder")
        assert torch.equal(numbers(trainer.layer), centres)
        after.append(numbers(trainer.encoder))
    assert not torch.allclose(*after)


def test_the_warm_up_knows_no_clusters():
    x = torch.rand(32, 6, generator=torch.Generator().manual_seed(0))
    trainer = one_trainer()
    centres = numbers(trainer.layer)
    error, distance, labels = trainer.step(x, "warm-up")
    assert torch.equal(numbers(trainer.layer), centres)
    assert (distance, labels) == (None, None)
    assert float(error.detach()) > 0


def test_the_loss_is_the_mean_over_samples_and_elements():
    x = torch.rand(32, 6, generator=torch.Generator().manual_seed(0))
    trainer = one_trainer()
    for module in (*trainer.encoder.modules(), *trainer.decoder.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    z = codes_of(trainer.encoder, x)
    with torch.no_grad():
        expected = (trainer.decoder(z) - x).square().mean()
    squared = (cdist(z.numpy(), trainer.layer.centers.detach().numpy()) ** 2).min(axis=1)
    error, distance, _ = trainer.step(x, "encoder")
    assert float(error.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(distance.detach()) == pytest.approx(squared.mean(), rel=1e-5)


def test_a_centre_without_rows_stays():
    layer = KMeansLayer(2, 3, alpha=1e-3, normalized=True)
    layer.centers = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    z = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    Trainer(nn.Flatten(), None, layer, cluster_weight=1e-3, optimizer="adadelta", unit=1.0).step(z, "centres")
    assert torch.allclose(layer.centers[2], torch.tensor([-1.0, 0.0]))
    assert bool(torch.isfinite(layer.weight).all())


# ---- the estimator


def test_scikit_learns_checks():
    one = "the check asks for one cluster, which is refused"
    failing = dict.fromkeys(
        ("check_dont_overwrite_parameters", "check_methods_subset_invariance", "check_fit2d_1sample", "check_fit2d_1feature",
         "check_fit2d_predict1d"),
        one,
    )  # fmt: skip
    failing["check_estimators_dtypes"] = "the check's whole numbers have a row of zeros, which is refused"
    failing["check_do_not_raise_errors_in_init_or_set_params"] = "types are checked at once here"
    model = TELL(2, encoder=None, init="kmeans", batch_size=2, epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadClusterWarning)
        done = check_estimator(model, expected_failed_checks=failing, on_skip=None, on_fail=None)
    assert {d["check_name"]: str(d["exception"])[:200] for d in done if d["status"] == "failed"} == {}


@settings(max_examples=15, deadline=None)
@given(k=st.integers(2, 4), d=st.integers(4, 6), init=st.sampled_from(["random", "kmeans"]), seed=st.integers(0, 1000))
def test_what_a_fitted_model_says_of_itself_is_consistent(k, d, init, seed):
    x, y = blobs(80, d, k, seed=seed, noise=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadClusterWarning)
        model = TELL(k, encoder=None, init=init, epochs=6, batch_size=20, seed=seed).fit(x, y)
    z, centers = model.transform(x), model.cluster_centers_
    assert np.allclose(z, normalize(x), atol=1e-6)
    assert np.allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-6)
    distance = cdist(z, centers)
    assert np.array_equal(model.predict(x), distance.argmin(axis=1))
    assert np.array_equal(model.labels_, model.predict(x))
    assert model.inertia_ == pytest.approx((distance.min(axis=1) ** 2).sum(), abs=1e-4)
    assert model.n_found_ == len(np.unique(model.labels_))
    assert model.decoded_centers_.shape == (k, d)
    for temperature in (0.01, 1.0, 30.0):
        expected = torch.as_tensor(-(distance**2) / temperature).softmax(dim=1).numpy()
        assert np.allclose(model.soft_predict(x, temperature), expected, atol=1e-4)
    assert [epoch.phase for epoch in model.history_] == ["centres"] * 6
    assert [epoch.nmi is not None for epoch in model.history_] == [True] * 6
    assert model.history_[-1].nmi == pytest.approx(normalized_mutual_info_score(y, model.labels_))
    if init == "kmeans":
        assert adjusted_rand_score(y, model.labels_) == 1


def test_an_explanation_is_what_brute_force_finds(conv, digits):
    x = digits[0][400:600]
    z = conv.transform(x)
    distance = cdist(z, conv.cluster_centers_)
    labels = distance.argmin(axis=1)
    sizes = []
    for j in range(10):
        found = conv.explain(j, x)
        assert np.allclose(found.center, conv.cluster_centers_[j])
        assert found.nearest_index == distance[:, j].argmin()
        assert found.size == (labels == j).sum()
        assert np.allclose(found.decoded, conv.decoded_centers_[j])
        assert np.allclose(found.contrast, found.decoded - x.mean(axis=0), atol=1e-6)
        if found.size:
            expected = np.quantile(distance[labels == j, j], [0, 0.25, 0.5, 0.75, 1])
            assert np.allclose(found.radius_quantiles, expected, atol=1e-5)
        else:
            assert found.radius_quantiles == ()
        sizes.append(found.size)
    assert sum(sizes) == 200
    with pytest.raises(InputError, match=r"0\.\.9"):
        conv.explain(10, x)


def test_a_table_without_an_encoder_is_read_against_its_mean_row():
    x, _ = blobs()
    found = TELL(3, encoder=None, init="kmeans", epochs=4).fit(x).explain(0, x)
    mean = x.mean(axis=0)
    assert np.allclose(found.contrast, found.decoded - mean / np.linalg.norm(mean), atol=1e-6)
    assert int(found.contrast.argmax()) == int(found.decoded.argmax())


def test_images_are_clustered_and_decoded(conv, digits):
    images, y = digits
    assert (conv.n_features_in_, conv.input_shape_, conv.cluster_centers_.shape) == (64, (8, 8), (10, 10))
    assert conv.decoded_centers_.shape == (10, 8, 8)
    assert conv.decoded_centers_.min() >= 0
    assert conv.decoded_centers_.max() <= 1
    assert conv.reconstruction_r2_ > 0.5
    assert conv.n_found_ >= 9
    phases = [epoch.phase for epoch in conv.history_]
    assert phases == ["warm-up"] * 5 + ["centres", "encoder"] * 5
    assert all(epoch.cluster is None and epoch.nmi is None for epoch in conv.history_[:5])
    assert conv.history_[-1].reconstruction < conv.history_[0].reconstruction
    assert conv.history_[-1].alive == conv.n_found_
    assert clustering_metrics(y[400:600], conv.predict(images[400:600])).nmi > 0.45


def test_prediction_does_not_depend_on_the_batch_or_change_the_model(conv, digits):
    images = digits[0][:50]
    before = {name: value.clone() for name, value in conv.encoder_.state_dict().items()}
    conv.encoder_.train()  # batch statistics would differ
    whole, alone = conv.transform(images), np.concatenate([conv.transform(image[None]) for image in images])
    assert np.allclose(whole, alone, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in conv.encoder_.state_dict().items())
    assert conv.encoder_.training
    conv.encoder_.eval()


def test_labels_are_watched_and_never_learnt_from(digits):
    images, y = digits
    options = {"batch_size": 50, "epochs": 2, "warmup_epochs": 1, "init": "kmeans", "seed": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadClusterWarning)
        plain, watched = TELL(4, **options).fit(images[:200]), TELL(4, **options).fit(images[:200], y[:200])
    assert np.array_equal(plain.labels_, watched.labels_)
    assert np.array_equal(plain.transform(images[:50]), watched.transform(images[:50]))
    assert plain.history_[-1].nmi is None
    assert watched.history_[-1].nmi is not None
    with pytest.raises(InputError, match="Unknown label type"):
        TELL(4, **options).fit(images[:200], np.linspace(0, 1, 200))
    with pytest.raises(InputError, match="one per row"):
        TELL(4, **options).fit(images[:200], y)


def test_units_do_not_matter_to_the_built_in_networks(digits):
    images = digits[0][:120]
    options = {"batch_size": 40, "epochs": 2, "warmup_epochs": 2, "init": "kmeans", "cluster_weight": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadClusterWarning)
        one, other = TELL(3, **options).fit(images), TELL(3, **options).fit(images * 255 + 1000)
    assert np.allclose(one.transform(images), other.transform(images * 255 + 1000), atol=1e-2)
    assert np.allclose(other.decoded_centers_, one.decoded_centers_ * 255 + 1000, atol=2)
    assert other.history_[0].reconstruction == pytest.approx(one.history_[0].reconstruction, rel=1e-3)


def test_colour_images_and_tables_and_frames():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadClusterWarning)
        images = rng.random((60, 3, 8, 12)) / 2 + (np.arange(60) % 2)[:, None, None, None] / 2
        colour = TELL(2, epochs=6, warmup_epochs=4, batch_size=10, init="kmeans").fit(images)
        assert colour.decoded_centers_.shape == (2, 3, 8, 12)
        table = load_iris(as_frame=True).data
        frame = TELL(3, epochs=4, batch_size=25, warmup_epochs=6, init="kmeans", optimizer="adam").fit(table)
    assert frame.decoded_centers_.shape == (3, 4)
    assert frame.decoder_ is not None
    assert list(frame.feature_names_in_) == list(table.columns)
    codes = frame.set_output(transform="pandas").transform(table)
    assert isinstance(codes, pd.DataFrame)
    assert list(codes.columns) == [f"tell{i}" for i in range(10)]


# ---- encoders of one's own, and streams


def trained_encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_frozen_encoder_stays_as_it_was_and_has_no_decoder():
    x = torch.as_tensor(StandardScaler().fit_transform(load_iris().data), dtype=torch.float32)
    encoder = trained_encoder().requires_grad_(False)
    before = numbers(encoder)
    model = TELL(3, encoder=encoder, epochs=10, init="kmeans").fit(x)
    assert torch.equal(numbers(model.encoder_), before)
    assert (model.decoder_, model.decoded_centers_, model.reconstruction_r2_) == (None, None, None)
    assert model.explain(0, x).decoded is None
    assert {epoch.phase for epoch in model.history_} == {"centres"}
    with torch.no_grad():
        assert np.allclose(model.transform(x), normalize(encoder(x).numpy()), atol=1e-6)
    assert model.inertia_ <= 1.05 * spherical_inertia(model.transform(x), 3)


def spherical_inertia(z, k):
    labels, centers = spherical_kmeans(z, k)
    return float(((z - centers[labels]) ** 2).sum())


def test_a_trainable_encoder_is_copied_and_trained_with_a_decoder():
    x = StandardScaler().fit_transform(load_iris().data)
    encoder = trained_encoder()
    before = numbers(encoder)
    model = TELL(3, encoder=encoder, epochs=4, warmup_epochs=4, init="kmeans", batch_size=30).fit(x)
    assert torch.equal(numbers(encoder), before)
    assert not torch.equal(numbers(model.encoder_), before)
    assert model.decoded_centers_.shape == (3, 4)
    own = nn.Sequential(nn.Linear(3, 4))
    assert TELL(3, encoder=encoder, decoder=own, epochs=2, init="kmeans").fit(x).decoder_ is not own
    assert clone(model).encoder is not None
    assert TELL(3, encoder=encoder, decoder=None, epochs=2, init="kmeans").fit(x).decoder_ is None


def test_streams_of_wine_reach_the_inertia_of_k_means():
    x = normalize(StandardScaler().fit_transform(load_wine().data))
    best = KMeans(3, n_init=50, random_state=0).fit(x).inertia_
    model, order = TELL(3, encoder=None, init="kmeans"), np.random.default_rng(0)
    model.partial_fit(x[:50])
    for _ in range(20):
        for rows in np.array_split(order.permutation(len(x)), 6):
            model.partial_fit(x[rows])
    distance = cdist(x, model.cluster_centers_) ** 2
    # unit centres cannot be the means that k-means has, so the best they reach is a little more
    means = np.stack([x[distance.argmin(axis=1) == j].mean(axis=0) for j in range(3)])
    assert (cdist(x, means) ** 2).min(axis=1).sum() <= 1.05 * best
    assert distance.min(axis=1).sum() <= 1.02 * spherical_inertia(x, 3)


def test_a_stream_trains_the_encoder_and_repeats():
    x = torch.as_tensor(load_digits().images[:80] / 16)
    models = [TELL(4, init="kmeans", seed=2) for _ in range(2)]
    for model in models:
        for part in x.split(20):
            model.partial_fit(part)
    one, two = (model.transform(x) for model in models)
    assert np.array_equal(one, two)
    assert models[0].decoded_centers_.shape == (4, 8, 8)
    assert not hasattr(models[0], "labels_")
    with pytest.raises(InputError, match=r"\(8, 8\)"):
        models[0].partial_fit(x[:, :4])
    with pytest.raises(InputError, match="more than n_samples = 3"):
        TELL(4).partial_fit(x[:3])


# ---- health


def test_a_dead_cluster_is_told_and_restarted():
    x, _ = blobs(60, 3, 3, noise=0.02)
    layer = KMeansLayer(3, 3, alpha=1e-3, normalized=True)
    layer.centers = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]
    rows = torch.as_tensor(normalize(x), dtype=torch.float32)
    for reseed in (False, True):
        trainer = Trainer(nn.Flatten(), None, layer, cluster_weight=1e-3, optimizer="adadelta", unit=1.0)
        for epoch in range(20):
            done = trainer.epoch(rows, iter(torch.arange(60).split(20)), "centres")
            assert done.alive == 2
            if epoch < 19:
                trainer.tend_dead(rows, reseed=reseed)
        with pytest.warns(DeadClusterWarning, match="cluster 2 for 20 epochs"):
            trainer.tend_dead(rows, reseed=reseed)
        assert len(layer.assign(rows).unique()) == (3 if reseed else 2)
        trainer.epoch(rows, iter(torch.arange(60).split(20)), "centres")
        trainer.tend_dead(rows, reseed=reseed)  # told once


def test_fewer_clusters_than_asked_for_are_told():
    x = np.repeat([[1.0, 0.0], [0.0, 1.0]], 30, axis=0) + np.random.default_rng(0).normal(size=(60, 2)) * 1e-3
    pairs = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    model = TELL(3, encoder=pairs, init="random", epochs=1, batch_size=60, seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x)
    assert (model.n_found_ < 3) == any("of 3 clusters hold rows" in str(one.message) for one in caught)


@pytest.mark.parametrize(("seed", "weight"), [(0, 50.0), (1, 50.0)])
def test_a_collapsed_run_is_refused(digits, seed, weight):
    options = {"epochs": 12, "batch_size": 50, "cluster_weight": weight, "decoder": None, "seed": seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadClusterWarning)
        with pytest.raises(TrainingCollapsedError, match="collapsed"):
            TELL(10, **options).fit(digits[0][:200])


class Broken(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.value = value

    def forward(self, x):
        return self.scale * torch.full((len(x), 2), self.value)


def test_encoders_that_give_no_codes():
    x, _ = blobs()
    with pytest.raises(TrainingCollapsedError, match="not finite"):
        TELL(3, encoder=Broken(float("nan")), epochs=1).fit(x)
    with pytest.raises(TrainingCollapsedError, match="same code"):
        TELL(3, encoder=Broken(1.0), epochs=1).fit(x)
    with pytest.raises(DataError, match=r"120 rows have a code of length zero.*: 0, 1, 2, 3, 4, \.\.\."):
        TELL(3, encoder=Broken(0.0), epochs=1).fit(x)
    with pytest.raises(DataError, match="1 different codes are too few for 3"):
        TELL(3, encoder=Broken(1.0), init="kmeans", epochs=1).fit(x)
    with pytest.raises(ModelError, match="the encoder"):
        TELL(3, encoder=nn.Unflatten(1, (3, 1)), epochs=1).fit(x)
    with pytest.raises(ModelError, match=r"shape \(3,\)"):
        TELL(3, encoder=nn.Linear(5, 2), epochs=1).fit(x)
    with pytest.raises(ModelError, match="the decoder gives"):
        TELL(3, encoder=nn.Linear(3, 2), decoder=nn.Linear(2, 4), epochs=1).fit(x)


# ---- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_clusters": 1}, "at least 2"), ({"n_clusters": True}, "whole number"), ({"n_clusters": 121}, "more than"),
        ({"batch_size": 121}, "no complete batch"), ({"alpha": 0.0}, "alpha"), ({"alpha": -1.0}, "alpha"),
        ({"cluster_weight": -1.0}, "cluster_weight"), ({"epochs": 0}, "epochs"), ({"warmup_epochs": -1}, "warmup"),
        ({"latent_dim": 0}, "latent_dim"), ({"optimizer": "sgd"}, "optimizer"), ({"init": "kmeans++"}, "init"),
        ({"encoder": "deep"}, "encoder"), ({"decoder": "deep"}, "decoder"), ({"encoder": "conv"}, "takes images"),
        ({"warmup_epochs": 2}, "needs a decoder"),
    ],
)  # fmt: skip
def test_wrong_options(options, words):
    x, _ = blobs()
    with pytest.raises(InputError, match=words):
        TELL(**({"n_clusters": 3, "encoder": None, "epochs": 1} | options)).fit(x)


def test_wrong_data(conv, digits):
    x, _ = blobs()
    plain = TELL(3, encoder=None, epochs=1, init="kmeans")
    for bad in (np.nan, np.inf, 1e300):
        broken = x.copy()
        broken[7, 1] = bad
        with pytest.raises(DataError, match="row 7"):
            plain.fit(broken)
    empty = x.copy()
    empty[[4, 9]] = 0
    with pytest.raises(DataError, match=r"2 rows have a code of length zero.*: 4, 9;"):
        plain.fit(empty)
    with pytest.raises(InputError, match=r"divisible by 4.*10 x 8"):
        TELL(2, epochs=1).fit(np.random.default_rng(0).random((80, 10, 8)))
    with pytest.raises(DataError, match="all numbers of X are the same"):
        TELL(2, epochs=1).fit(np.ones((80, 8, 8)))
    with pytest.raises(DataError, match="nothing in it"):
        TELL(2, epochs=1).fit(np.ones((80, 0, 8)))
    with pytest.raises(InputError, match=r"shape \(64,\), fitted were rows of shape \(8, 8\)"):
        conv.predict(digits[0][:5].reshape(5, 64))
    with pytest.raises(InputError, match=r"shape \(4, 8\)"):
        conv.predict(digits[0][:5, :4])
    with pytest.raises(InputError, match="temperature"):
        conv.soft_predict(digits[0][:5], 0.0)
    with pytest.raises(DataError, match="row 2"):
        conv.predict(np.where(np.arange(5)[:, None, None] == 2, np.nan, digits[0][:5]))


# ---- on disk


def test_a_saved_model_is_read_back(conv, digits, tmp_path):
    images = digits[0][:60]
    conv.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["tell.json", "tell.safetensors"]
    assert "encoder" in json.loads((tmp_path / "model" / "tell.json").read_text())["settings"]
    assert "layer.weight" in load_file(tmp_path / "model" / "tell.safetensors")
    state = torch.random.get_rng_state()
    found = TELL.load(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(found.transform(images), conv.transform(images))
    assert np.array_equal(found.labels_, conv.labels_)
    assert np.array_equal(found.decoded_centers_, conv.decoded_centers_)
    assert found.history_ == conv.history_
    assert isinstance(found.history_[0], Epoch)
    assert (found.reconstruction_r2_, found.n_found_) == (conv.reconstruction_r2_, conv.n_found_)
    assert found.get_params() == conv.get_params()
    found.partial_fit(images)
    assert not np.array_equal(found.transform(images), conv.transform(images))


def test_a_model_with_a_module_needs_it_again(tmp_path):
    x = StandardScaler().fit_transform(load_iris().data)
    model = TELL(3, encoder=trained_encoder().requires_grad_(False), epochs=2, init="kmeans").fit(x)
    model.save(tmp_path)
    fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    assert np.array_equal(TELL.load(tmp_path, encoder=fresh).predict(x), model.labels_)
    with pytest.raises(ModelError, match="needs the module"):
        TELL.load(tmp_path)
    with pytest.raises(ModelError, match="do not fit"):
        TELL.load(tmp_path, encoder=nn.Linear(4, 3))
    with pytest.raises(ModelError, match="without a module"):
        TELL.load(tmp_path, encoder=fresh, decoder=nn.Linear(3, 4))


def test_broken_files_are_told(tmp_path):
    with pytest.raises(DataError, match=r"no tell\.json"):
        TELL.load(tmp_path)
    x, _ = blobs()
    TELL(3, encoder=None, epochs=1, init="kmeans").fit(x).save(tmp_path)
    about = json.loads((tmp_path / "tell.json").read_text())
    (tmp_path / "tell.json").write_text(json.dumps(about | {"schema": 7}))
    with pytest.raises(DataError, match="another layout"):
        TELL.load(tmp_path)
    del about["input_shape"]
    (tmp_path / "tell.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="not whole"):
        TELL.load(tmp_path)
    (tmp_path / "tell.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        TELL.load(tmp_path)


# ---- metrics and baselines


def test_metrics_are_scikit_learns_and_cope_with_empty_clusters():
    rng = np.random.default_rng(0)
    y, labels = rng.integers(5, size=200), rng.integers(4, size=200)
    found = clustering_metrics(y, labels)
    assert found.nmi == pytest.approx(normalized_mutual_info_score(y, labels, average_method="arithmetic"))
    assert found.ari == pytest.approx(adjusted_rand_score(y, labels))
    assert found.n_found == 4
    assert len(found.mapping) == 4
    assert found.accuracy == pytest.approx(
        np.mean([found.mapping[j] == c for j, c in zip(labels.tolist(), y.tolist())])
    )
    with pytest.raises(InputError, match="4 clusters, more than the 2 classes"):
        clustering_metrics(y % 2, labels)
    assert clustering_metrics(y % 2, labels, n_clusters=4).n_found == 4
    with pytest.raises(InputError, match="3 asked for"):
        clustering_metrics(y % 2, labels, n_clusters=3)
    with pytest.raises(InputError, match="one length"):
        clustering_metrics(y, labels[:5])


@settings(max_examples=15, deadline=None)
@given(n=st.integers(6, 40), d=st.integers(2, 5), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_spherical_k_means_is_a_fixed_point(n, d, k, seed):
    x = np.random.default_rng(seed).normal(size=(n, d))
    labels, centers = spherical_kmeans(x, k, n_init=2, seed=seed)
    assert np.allclose(np.linalg.norm(centers, axis=1), 1)
    assert np.array_equal(labels, (normalize(x) @ centers.T).argmax(axis=1))


def test_baselines_on_easy_rows():
    x, y = blobs(60, 4, 3)
    plain = baseline_labels(x, 3)
    assert list(plain) == ["k-means", "spherical k-means", "mini-batch k-means"]
    assert all(adjusted_rand_score(y, labels) == 1 for labels in plain.values())
    deep = baseline_labels(x, 3, names=["DEC", "k-means on a plain autoencoder's codes"], epochs=6, batch_size=20)
    assert list(deep) == ["DEC", "k-means on a plain autoencoder's codes"]
    assert all(adjusted_rand_score(y, labels) > 0.9 for labels in deep.values())
    images = np.repeat(x[:, :, None], 4, axis=2).astype(np.float32)
    images.setflags(write=False)
    TELL(3, encoder=None, init="kmeans", epochs=1, batch_size=20).fit(images)
    assert np.array_equal(baseline_labels(pd.DataFrame(x), 3)["k-means"], baseline_labels(x, 3)["k-means"])
    with pytest.raises(InputError, match="no baseline N2D"):
        baseline_labels(x, 3, names=["N2D"])
    with pytest.raises(DataError, match="row 1 is zero"):
        spherical_kmeans(np.array([[1.0, 0.0], [0.0, 0.0]]), 2)
    with pytest.raises(InputError, match="n_clusters"):
        spherical_kmeans(x, 61)
    with pytest.raises(InputError, match="batch_size"):
        deep_embedded_clustering(x, 3, batch_size=61)
    with pytest.raises(DataError, match="not all the same"):
        deep_embedded_clustering(np.ones((60, 3)), 3, batch_size=20)


# ---- chart and command


def a_finding(subject):
    finding = theodolite.measure("tell-clustering", subject)
    written = json.loads(json.dumps(finding.to_json(), allow_nan=False))
    assert [control["kind"] for control in written["controls"]] == ["closed-form", "null", "reference"]
    assert all(number["low"] is not None for number in written["numbers"])
    return finding


def test_the_chart_clusters_a_hidden_layer():
    finding = a_finding(builtin("digits"))
    assert re.search(r"^In 10 clusters of the hidden layer relu3 \d+ % of test rows", finding.headline)
    assert finding.comparison.beats(finding.comparison.controls[1])
    wall = np.array(finding.figure.data[-2].z)  # the five nearest 8 x 8 images of ten clusters, each in a frame
    assert wall.shape == (50, 100)
    assert len(np.unique(wall[:, 0])) == 1


def black_box(x, y, task, **options):
    parts = [slice(0, 240), slice(240, 320), slice(320, 400)]
    train, validation, test = (Rows(torch.as_tensor(x[p]).float(), torch.as_tensor(y[p])) for p in parts)
    data = Dataset("made", options.pop("modality"), task, train, validation, test, **options)
    kind = LogisticRegression(max_iter=1000) if task == "classification" else Ridge()
    return Subject("made", data, kind.fit(train.x.reshape(240, -1).numpy(), train.y.numpy()))


def test_the_chart_clusters_the_inputs_of_a_black_box():
    x, y = blobs(400, 4, 3, noise=0.6)
    table = black_box(x, y, "classification", modality="tabular", features=tuple("abcd"), classes=("u", "v", "w"))
    finding = a_finding(table)
    assert "3 clusters of the inputs" in finding.headline
    assert finding.comparison.estimate.value > 0.9
    target = torch.as_tensor(x[:, 0]).float()
    values = a_finding(black_box(x, target, "regression", modality="tabular", features=tuple("abcd")))
    assert re.search(r"5 clusters of the inputs tell \d+ % of the variance of the target on test rows", values.headline)
    assert "surely" in values.advice or "better" in values.advice


def test_the_chart_copes_with_clusters_that_no_test_row_is_in():
    x, y = blobs(400, 4, 3, noise=0.3)
    order = np.argsort(np.where(y == 2, 0, 1), kind="stable")  # none of the last 80 rows is of the third class
    finding = a_finding(
        black_box(
            x[order], y[order], "classification", modality="tabular", features=tuple("abcd"), classes=("u", "v", "w")
        )
    )
    assert finding.numbers["clusters with test rows"].value == 2
    assert finding.comparison.estimate.value > 0.9


def forecast(series, window=20):
    """A subject of the next value of ``series`` (T,), split by time, with a linear model."""
    values = torch.as_tensor(series).float()
    parts = []
    for part in (values[:600], values[600:800], values[800:]):
        x = part.unfold(0, window, 1)[:-1][..., None]
        parts.append(Rows(x, part[window:], torch.arange(len(x)) // window))
    flat = parts[0].x.flatten(1).numpy()
    return Subject("made", Dataset("made", "series", "regression", *parts), Ridge().fit(flat, parts[0].y.numpy()))


def test_of_a_forecast_clusters_tell_the_change():
    t = np.arange(1000)
    wave = a_finding(forecast(np.sin(t / 5) + t / 50))  # the level of the test rows is in no training row
    assert re.search(r"tell \d+ % of the variance of the next change on test rows", wave.headline)
    assert wave.comparison.estimate.value > 0.3
    assert wave.numbers["variance of the next change on test rows told, neural clustering"].unit == "R2"
    walk = a_finding(forecast(np.random.default_rng(0).normal(size=1000).cumsum()))
    assert walk.comparison.estimate.value < 0.1


def test_the_chart_shows_the_mean_series_of_each_cluster():
    x, y = blobs(400, 12, 3, noise=0.6)
    series = black_box(x[..., None], y, "classification", modality="series", classes=("1", "2", "3"))
    finding = a_finding(series)
    curves = [trace for trace in finding.figure.data if trace.name in ("cluster 0", "cluster 1", "cluster 2")][3:]
    model = TELL(3, encoder=None, init="kmeans", epochs=20, seed=0)
    mean, scale = x[:240].mean(axis=0), x[:240].std(axis=0)
    labels = model.fit((x[:240] - mean) / scale).predict((x[320:] - mean) / scale)
    for j, curve in enumerate(curves):
        assert np.allclose(curve.y, x[320:][labels == j].mean(axis=0), atol=1e-3)
    assert "mean of each cluster's series" in finding.reading
    assert finding.figure.layout.xaxis2.type == "category"  # classes called by numbers are no axis of numbers


def test_the_chart_trains_an_encoder_for_images_of_a_black_box(digits):
    images, y = digits
    some = np.isin(y, [0, 1])
    subject = black_box(
        np.concatenate([images[some], images[some]])[:400, None], np.concatenate([y[some], y[some]])[:400], "classification",
        modality="image", classes=("nought", "one"),
    )  # fmt: skip
    finding = a_finding(subject)
    assert "codes that a convolutional encoder learnt" in finding.headline
    assert "variance of the inputs that the decoder gives back" in finding.numbers
    assert np.array(finding.figure.data[-2].z).shape == (60, 20)  # with the decoded centre


@pytest.mark.parametrize(("classes", "words"), [(51, "at most 50 classes"), (30, "at least 10 training rows")])
def test_the_chart_needs_few_classes_and_rows_for_each(classes, words):
    x, names = np.random.default_rng(0).normal(size=(400, 4)), tuple(f"c{i}" for i in range(classes))
    subject = black_box(x, np.arange(400) % classes, "classification", modality="tabular", classes=names)
    with pytest.raises(ModelError, match=words):
        theodolite.measure("tell-clustering", subject)


def run(*arguments):
    return CliRunner().invoke(app, ["run", "tell-clustering", *map(str, arguments)])


def test_the_command_clusters_vectors(tmp_path):
    x, y = blobs(90, 4, 3)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "y.txt").write_text("\n".join(f"kind {c}" for c in y))
    given = ["--vectors", tmp_path / "x.npy", "--clusters", 3, "--encoder", "none"]
    done = run(*given, "--truth", tmp_path / "y.txt", "--out", tmp_path / "model", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["sizes"] == [30, 30, 30]
    assert told["tell"]["accuracy"] == told["k_means"]["accuracy"] == told["k_means_on_its_codes"]["accuracy"] == 1
    assert np.array_equal(TELL.load(tmp_path / "model").predict(x), told["labels"])
    assert "clusters with rows: 3" in run(*given).output
    np.save(tmp_path / "line.npy", np.arange(9.0))
    np.save(tmp_path / "texts.npy", np.array([["a", "b"]] * 9))
    for wrong, words in (
        (["--vectors", tmp_path / "line.npy"], "must hold numbers, rows x columns"),
        (["--vectors", tmp_path / "texts.npy"], "must hold numbers, rows x columns"),
        (["--encoder", "deep"], "--encoder must be"), (["--clusters", 91], "more than"),
        (["--truth", tmp_path / "x.txt"], "cannot read"),
    ):  # fmt: skip
        failed = run(*given, *wrong)
        assert failed.exit_code != 0
        assert words in str(failed.exception or failed.output)
