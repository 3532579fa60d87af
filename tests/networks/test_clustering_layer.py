import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler

from theodolite.core.errors import DataError, InputError
from theodolite.networks.clustering import KMeansLayer
from theodolite.networks.clustering import layer as layer_module

QUICK = settings(max_examples=40, deadline=None)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- k-means, exactly


@pytest.fixture(scope="module")
def wine():
    x = StandardScaler().fit_transform(load_wine().data)
    return x, KMeans(3, n_init=10, random_state=0).fit(x)


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 50])
def test_the_layer_is_k_means_for_every_alpha(wine, alpha):
    x, found = wine
    layer = KMeansLayer(13, 3, alpha=alpha)
    layer.centers = found.cluster_centers_
    rows = torch.as_tensor(x)
    assert sorted(np.bincount(found.labels_).tolist()) == [51, 62, 65]
    assert np.array_equal(layer(rows).argmax(dim=1).numpy(), found.labels_)
    assert np.array_equal(layer.assign(rows).numpy(), found.labels_)
    assert float(layer.loss(rows).detach()) * 178 == pytest.approx(1277.9285, abs=1e-3)
    assert found.inertia_ == pytest.approx(1277.9285, abs=1e-4)


@QUICK
@given(
    n=st.integers(1, 20), d=st.integers(1, 6), k=st.integers(2, 7), alpha=st.floats(1e-3, 1e3), seed=st.integers(0, 10_000)
)  # fmt: skip
def test_outputs_are_distances_in_disguise(n, d, k, alpha, seed):
    layer = KMeansLayer(d, k, alpha=alpha, seed=seed).double()
    x = normal(n, d, seed=seed, dtype=torch.float64)
    squared = cdist(x.numpy(), layer.centers.detach().numpy()) ** 2
    expected = -alpha * squared + alpha * x.square().sum(dim=1, keepdim=True).numpy()
    assert np.allclose(layer(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9 * alpha)
    soft = torch.as_tensor(-alpha * squared).softmax(dim=1)
    assert np.allclose(layer(x).softmax(dim=1).detach().numpy(), soft.numpy(), atol=1e-9)
    assert np.array_equal(layer.assign(x).numpy(), squared.argmin(axis=1))
    assert float(layer.loss(x).detach()) == pytest.approx(squared.min(axis=1).mean(), rel=1e-9)


@QUICK
@given(d=st.integers(1, 8), k=st.integers(2, 6), alpha=st.floats(1e-3, 1e2), seed=st.integers(0, 10_000))
def test_the_normalised_identity(d, k, alpha, seed):
    layer = KMeansLayer(d, k, alpha=alpha, normalized=True, seed=seed).double().normalize_()
    z = torch.nn.functional.normalize(normal(9, d, seed=seed + 1, dtype=torch.float64), dim=1)
    squared = cdist(z.numpy(), layer.centers.detach().numpy()) ** 2
    assert np.allclose(((2 * alpha - z @ layer.weight.T) / alpha).detach().numpy(), squared, atol=1e-6)
    assert torch.allclose(layer.weight.norm(dim=1), torch.full((k,), 2 * alpha, dtype=torch.float64))
    assert float(layer.loss(z).detach()) == pytest.approx(squared.min(axis=1).mean(), abs=1e-9)
    # also of rows that have another length
    x = 3 * normal(5, d, seed=seed + 2, dtype=torch.float64)
    assert float(layer.loss(x).detach()) == pytest.approx(
        (cdist(x.numpy(), layer.centers.detach().numpy()) ** 2).min(axis=1).mean(), rel=1e-9
    )


def test_the_loss_moves_only_the_nearest_centre_and_takes_its_choice_as_given():
    layer = KMeansLayer(2, 3)
    layer.centers = [[0.0, 0.0], [5.0, 0.0], [100.0, 0.0]]
    x = torch.tensor([[1.0, 0.0], [4.0, 1.0]], requires_grad=True)
    layer.loss(x).backward()
    # d/dc of mean ||x - c||^2 is (c - x), and c = W / 2
    assert torch.allclose(layer.weight.grad, torch.tensor([[-1.0, 0.0], [1.0, -1.0], [0.0, 0.0]]) / 2)
    assert torch.allclose(x.grad, torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    # normalised: the gradient of a centre is along its rows' mean
    layer = KMeansLayer(2, 2, alpha=0.25, normalized=True)
    layer.centers = [[1.0, 0.0], [0.0, 1.0]]
    z = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    layer.loss(z).backward()
    assert torch.allclose(layer.weight.grad, -torch.tensor([[0.8, 0.6], [0.6, 1.8]]) / 0.25 / 3)


def test_k_means_by_falling_steps_does_not_raise_the_objective(wine):
    x, found = wine
    rows, layer = torch.as_tensor(x), KMeansLayer(13, 3, alpha=0.5).double()
    layer.centers = rows[[0, 80, 150]]
    values = []
    for step in range(400):
        loss = layer.loss(rows)
        values.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        with torch.no_grad():
            layer.weight -= 0.5 / (1 + step / 20) * gradient
    assert max(np.diff(values)) <= 1e-12
    assert values[-1] * 178 <= 1.02 * found.inertia_


def test_blocks_and_a_common_offset_change_nothing(monkeypatch):
    layer = KMeansLayer(5, 4, seed=3)
    x = normal(101, 5, seed=1)
    whole, loss = layer.assign(x), float(layer.loss(x).detach())
    monkeypatch.setattr(layer_module, "_BLOCK", 64)
    assert torch.equal(layer.assign(x), whole)
    assert float(layer.loss(x).detach()) == pytest.approx(loss, rel=1e-6)
    # rows near 10,000 have four digits left in single precision, and squares of distances none
    near = KMeansLayer(5, 4)
    near.centers = layer.centers.detach() + 10_000
    assert (near.assign(x + 10_000) == whole).float().mean() > 0.95


def test_centres_are_set_and_scaled():
    layer = KMeansLayer(2, 2, alpha=3.0, normalized=True)
    layer.centers = np.array([[3.0, 4.0], [0.0, 2.0]])
    assert torch.allclose(layer.centers, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert torch.allclose(layer(torch.zeros(1, 2)), torch.tensor([[-3.0, -3.0]]))  # the bias, -alpha for all
    free = KMeansLayer(2, 2, alpha=3.0)
    free.centers = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert torch.allclose(free.weight, 6 * torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    assert torch.allclose(free(torch.zeros(1, 2)), torch.tensor([[-75.0, -12.0]]))
    assert torch.equal(KMeansLayer(3, 2, seed=5).weight, KMeansLayer(3, 2, seed=5).weight)
    assert not torch.equal(KMeansLayer(3, 2, seed=5).weight, KMeansLayer(3, 2, seed=6).weight)
    again = KMeansLayer(2, 2, alpha=3.0)
    again.load_state_dict(free.state_dict())
    assert torch.equal(again.centers, free.centers)


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((3, 2), {"alpha": 0.0}, "alpha"), ((3, 2), {"alpha": -1.0}, "alpha"), ((3, 2), {"alpha": float("nan")}, "alpha"),
        ((3, 2), {"alpha": float("inf")}, "alpha"), ((3, 1), {}, "2 clusters"), ((0, 2), {}, "1 feature"),
    ],
)  # fmt: skip
def test_wrong_layers(arguments, options, words):
    with pytest.raises(InputError, match=words):
        KMeansLayer(*arguments, **options)


def test_wrong_rows_and_centres():
    layer = KMeansLayer(2, 2)
    with pytest.raises(InputError, match=r"\(rows, 2\)"):
        layer.loss(torch.zeros(4, 3))
    with pytest.raises(InputError, match="at least one row"):
        layer.assign(torch.zeros(0, 2))
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(4, 2)
        x[2, 1] = bad
        with pytest.raises(DataError, match="row 2"):
            layer.assign(x)
        with pytest.raises(DataError, match="row 2"):
            layer.loss(x)
    with pytest.raises(InputError, match=r"\(2, 2\)"):
        layer.centers = torch.zeros(3, 2)
    with pytest.raises(InputError, match="finite"):
        layer.centers = [[0.0, np.nan], [0.0, 0.0]]
    with pytest.raises(DataError, match="centre 1 is zero"):
        KMeansLayer(2, 2, normalized=True).centers = [[1.0, 0.0], [0.0, 0.0]]
