"""The same numbers from lime, shap and captum, and from arithmetic by hand."""

import importlib
import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import IntegratedGradients, Lime, NoiseTunnel, Saliency
from captum.attr._core.lime import get_exp_kernel_similarity_function
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from torch import nn

from theodolite.core.view import ModelView
from theodolite.explanations.local_approximation import (
    METHODS,
    LocalApproximation,
    Neighbourhood,
    attribute,
    faithfulness,
)


def peer_library(name) -> Any:
    """A library whose import warns, of things that are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"needs the package {name.partition('.')[0]}")


def rows(n, d, seed=1):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def network(d, classes=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 12), nn.Tanh(), nn.Linear(12, classes)).double()


# ---- shap


def test_kernelshap_of_a_forest_is_shaps_exact_answer():
    x = rows(80, 6).numpy()
    forest = RandomForestClassifier(10, max_depth=4, random_state=0).fit(x, (x[:, 0] * x[:, 1] > 0.35).astype(int))
    background = x[:12]
    shap = peer_library("shap")
    exact = shap.explainers.ExactExplainer(
        lambda z: forest.predict_proba(z)[:, 1], shap.maskers.Independent(background)
    )
    peer = exact(x[20:24])
    ours = attribute("KernelSHAP", forest, x[20:24], 1, baseline=background)
    assert np.abs(ours.weights.numpy() - peer.values).max() < 1e-6
    assert np.abs(ours.intercept.numpy() - peer.base_values).max() < 1e-6


def test_kernelshap_of_a_tree_ensemble_is_treeshaps_answer():
    x = rows(200, 5).numpy()
    model = GradientBoostingRegressor(n_estimators=20, random_state=0).fit(x, x[:, 0] * x[:, 1] + np.sin(5 * x[:, 2]))
    background = x[:10]
    peer = (
        peer_library("shap")
        .TreeExplainer(model, background, feature_perturbation="interventional")
        .shap_values(x[50:53])
    )
    ours = attribute("KernelSHAP", model, x[50:53], baseline=background)
    assert np.abs(ours.weights.numpy() - peer).max() < 1e-5


def test_sampled_kernelshap_is_as_near_to_the_exact_one_as_shaps():
    net, x = network(14, classes=1), rows(4, 14)

    def f(z):
        return net(torch.as_tensor(z))[:, 0].detach().numpy()

    exact = attribute("KernelSHAP", ModelView(net, output="logit"), x, enumerate=True).weights.numpy()
    np.random.seed(0)  # noqa: NPY002 - the global generator is the only one shap's explainer draws from
    explainer = peer_library("shap").KernelExplainer(f, np.zeros((1, 14)))
    peer = explainer.shap_values(x.numpy(), nsamples=400, silent=True, l1_reg=False)
    ours = attribute("KernelSHAP", ModelView(net, output="logit"), x, n_samples=400).weights.numpy()
    theirs = np.abs(np.asarray(peer).reshape(4, 14) - exact).mean()
    assert np.abs(ours - exact).mean() < 2 * theirs + 1e-6  # shap also lists the smallest coalitions whole
    assert np.abs(ours - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize("d", [2, 3, 5, 8, 12])
def test_drawn_subsets_have_the_kernels_weight_at_every_size(d):
    law = torch.tensor([1 / (size * (d - size)) for size in range(1, d)], dtype=torch.float64)
    for n in (2, 40, 400, 40_000):
        draws = Neighbourhood.binary("shapley", enumerate=False).draws(d, n, seed=0)
        moves, weight = draws.all(), torch.softmax(draws.log_weight, dim=0)
        sizes = moves.sum(dim=1).long()
        assert len(moves) == draws.size
        assert len(moves[: draws.listed].unique(dim=0)) == draws.listed
        seen = torch.zeros(d - 1, dtype=torch.float64).index_add_(0, sizes - 1, weight)
        if n == 40_000:
            assert torch.allclose(seen, law / law.sum(), atol=0.01)
        for size in sizes[: draws.listed].unique().tolist():
            assert float(seen[size - 1]) == pytest.approx(float(law[size - 1] / law.sum()), rel=1e-9)
            assert int((sizes == size).sum()) == math.comb(d, size)


# ---- lime and captum


def test_lime_is_the_ridge_regression_of_the_lime_package():
    lime_base = peer_library("lime.lime_base")
    net, x = network(7), rows(1, 7)
    moves = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 7)
    scores = ModelView(net).target_scores(moves * x, 0).numpy()
    distances = (x - moves * x).norm(dim=1).numpy()
    base = lime_base.LimeBase(lambda distance: np.exp(-(distance**2) / 0.8**2))
    intercept, pairs, _, _ = base.explain_instance_with_data(
        moves.numpy(), scores[:, None], distances, 0, 7, feature_selection="none"
    )
    peer = np.array([weight for _, weight in sorted(pairs)])
    # the package's penalty of 1 stands beside a sum of weighted squares, ours beside their weighted mean
    total = float(np.exp(-(distances**2) / 0.8**2).sum())
    ours = attribute("LIME", net, x, 0, width=0.8, ridge=1 / total)
    assert np.abs(ours.weights[0].numpy() - peer).max() < 1e-6
    assert float(ours.intercept[0]) == pytest.approx(float(intercept), abs=1e-6)


def test_lime_is_what_captums_sampling_tends_to():
    net, x = network(6), rows(1, 6)

    def f(z):
        return torch.softmax(net(z), dim=1)

    torch.manual_seed(0)
    peer = Lime(
        f,
        interpretable_model=SkLearnLinearRegression(),
        similarity_func=get_exp_kernel_similarity_function("euclidean", kernel_width=0.6),
    ).attribute(x, target=1, n_samples=3000)
    ours = attribute("LIME", net, x, 1, width=math.sqrt(2) * 0.6)
    same_number = attribute("LIME", net, x, 1, width=0.6)
    assert float((ours.weights - peer).abs().max()) < 5e-4
    assert float((ours.weights - peer).abs().sum()) < 0.3 * float((same_number.weights - peer).abs().sum())


def test_smoothgrad_and_integrated_gradients_of_images_are_captums():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.rand(3, 3, 8, 8)

    def f(z):
        return torch.softmax(net(z), dim=1)

    target = f(x).argmax(dim=1)
    baseline = torch.full((3, 8, 8), 0.2)
    peer: Any = IntegratedGradients(f).attribute(
        x, baseline.expand(3, -1, -1, -1), target=target, n_steps=64, method="gausslegendre"
    )
    ours = attribute("Integrated Gradients", net, x, baseline=baseline)
    assert float((ours.weights - peer.flatten(1)).abs().max()) < 1e-6
    last = attribute("Integrated Gradients", net, x.contiguous(memory_format=torch.channels_last), baseline=baseline)
    assert torch.allclose(ours.weights, last.weights, atol=1e-6)
    noisy: Any = NoiseTunnel(Saliency(f)).attribute(x, nt_samples=2000, stdevs=0.1, target=target, abs=False)
    smooth = attribute("SmoothGrad", net, x)
    assert float((smooth.weights - noisy.flatten(1)).abs().mean()) < 3 * float(smooth.standard_error.mean())


# ---- by hand


def test_smoothgrad_of_a_cubic_is_its_expected_gradient():
    # E (x + s e)^2 3 = 3 x^2 + 3 s^2
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    found = attribute("SmoothGrad", lambda z: z.pow(3).sum(dim=1), x, sigma=0.5, n_samples=50_000)
    wanted = 3 * x.square() + 3 * 0.5**2
    assert ((found.weights - wanted).abs() < 4 * found.standard_error).all()
    assert float(found.standard_error.max()) < 0.05


def test_occlusion_and_lime_of_a_product_by_hand():
    # f = x1 x2 at (2, 3): without either it is 0, so each occlusion is 6; the fair-coin plane has slopes 3 and 3
    x = torch.tensor([[2.0, 3.0]])
    product = lambda z: z[:, 0] * z[:, 1]
    assert attribute("Occlusion", product, x).weights.tolist() == [[6.0, 6.0]]
    assert attribute("KernelSHAP", product, x).weights.tolist() == [[3.0, 3.0]]
    uniform = attribute("LIME", product, x, kernel="uniform")
    assert torch.allclose(uniform.weights, torch.tensor([[3.0, 3.0]]), atol=1e-6)
    assert float(uniform.intercept[0]) == pytest.approx(-1.5, abs=1e-6)
    assert float(uniform.loss[0]) == pytest.approx(2.25, abs=1e-5)  # residuals of 1.5 at all four corners
    assert float(uniform.r2[0]) == pytest.approx(1 - 2.25 / 6.75, abs=1e-6)


def test_a_path_part_way_to_the_input_is_the_mean_gradient_there():
    # gradient of z^2 in alpha's direction is 2 alpha x^2, and the mean alpha of U(0.5, 1) is 0.75
    x = torch.tensor([[2.0]])
    found = LocalApproximation(Neighbourhood.path(0.5), "gradient").explain(lambda z: z.square().sum(dim=1), x)
    assert float(found.weights[0, 0]) == pytest.approx(6.0, abs=1e-5)
    # variance of 2 alpha x^2 = 8 alpha over that interval: 64 / 48
    assert float(found.loss[0]) == pytest.approx(64 / 48, rel=1e-4)
    drawn = LocalApproximation(Neighbourhood.path(0.5, quadrature="monte-carlo"), "gradient", n_samples=4000).explain(
        lambda z: z.square().sum(dim=1), x
    )
    assert abs(float(drawn.weights[0, 0]) - 6) < 4 * float(drawn.standard_error[0, 0])
    assert float(drawn.standard_error[0, 0]) == pytest.approx(math.sqrt(64 / 48 / 4000), rel=0.05)


def test_a_single_feature_has_the_whole_change():
    x = torch.tensor([[2.0], [3.0]])
    for name in ("LIME", "KernelSHAP", "Occlusion", "Integrated Gradients"):
        for more in ({}, {"enumerate": False} if name == "KernelSHAP" else {}):
            found = attribute(name, lambda z: z.square().sum(dim=1), x, **more)
            assert torch.allclose(found.weights, x.square(), atol=1e-5), name


def test_the_limits_of_the_paper_are_approached():
    net, x = network(10, classes=1), rows(20, 10)

    def distance(near, name):
        return float((near.weights - attribute(name, net, x).weights).abs().sum(dim=1).mean())

    smooth = [
        distance(attribute("SmoothGrad", net, x, sigma=s), "Vanilla Gradients") for s in (0.3, 0.2, 0.1, 0.05, 0.01)
    ]
    paths = [
        distance(attribute("Integrated Gradients", net, x, low=a), "Gradient × Input")
        for a in (0, 0.5, 0.65, 0.8, 0.95)
    ]
    for series in (smooth, paths):
        assert all(later < 0.85 * earlier for earlier, later in itertools.pairwise(series))
        assert series[-1] < 0.1 * series[0]


def test_no_plane_is_faithful_everywhere():
    # z^2 on [-1, 1] is 1/2 from its best plane at the worst place (Chebyshev), so no explanation can do better there
    square = lambda z: z.square().sum(dim=1)
    x = torch.zeros(1, 1, dtype=torch.float64)
    for sigma in (0.01, 0.3, 1.0):
        for name in ("C-LIME", "SmoothGrad", "Vanilla Gradients"):
            found = attribute(name, square, x, sigma=sigma)
            places = torch.linspace(-1, 1, 201, dtype=torch.float64)
            plane = found.intercept.double() + places * found.weights[0, 0].double()
            assert float((places.square() - plane).square().max()) >= 0.25 - 1e-9
            near = faithfulness(square, x, found.weights, found.intercept, Neighbourhood.gaussian(0.01))
            far = faithfulness(square, x, found.weights, found.intercept, Neighbourhood.gaussian(1.0))
            assert max(float(near[0]), float(far[0])) > 0.01


def test_listed_neighbourhoods_do_not_depend_on_the_seed():
    net, x = network(8), rows(3, 8)
    for name in ("LIME", "KernelSHAP", "Occlusion", "Integrated Gradients"):
        assert torch.equal(attribute(name, net, x, seed=0).weights, attribute(name, net, x, seed=9).weights)
    assert set(METHODS) >= {"LIME", "KernelSHAP"}
