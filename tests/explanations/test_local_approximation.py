import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, KernelShap, Occlusion, Saliency
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from theodolite.core.memory import peak_memory
from theodolite.core.view import ModelView
from theodolite.explanations.local_approximation import (
    METHODS,
    DegenerateNeighbourhoodError,
    LocalApproximation,
    Neighbourhood,
    NotDifferentiableError,
    SingularFitWarning,
    attribute,
    faithfulness,
    faithfulness_by_row,
    faithfulness_table,
    perturbation_curve,
    recommend,
    square_patches,
)

MULTIPLICATIVE = ["LIME", "KernelSHAP", "Occlusion", "Integrated Gradients", "Gradient × Input"]
ADDITIVE = ["C-LIME", "SmoothGrad", "Vanilla Gradients"]
GRADIENT = ["SmoothGrad", "Vanilla Gradients", "Integrated Gradients", "Gradient × Input"]


def network(d=8, classes=3, seed=0, activation: type[nn.Module] = nn.Tanh, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 12), activation(), nn.Linear(12, classes)).to(dtype)


def rows(n=6, d=8, seed=1, dtype=torch.float64):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.1


def shapley_by_enumeration(value, d):
    """Brute force over all coalitions: value(mask) -> number."""
    values = {mask: value(mask) for mask in itertools.product((0, 1), repeat=d)}
    phi = np.zeros(d)
    for mask, v in values.items():
        s = sum(mask)
        for i in range(d):
            if mask[i]:
                without = (*mask[:i], 0, *mask[i + 1 :])
                phi[i] += math.factorial(s - 1) * math.factorial(d - s) / math.factorial(d) * (v - values[without])
    return phi


# ---- oracles


def test_kernelshap_is_the_shapley_value():
    net, x = network(), rows(3)
    found = attribute("KernelSHAP", net, x)
    view = ModelView(net)
    for i in range(len(x)):
        masks = torch.tensor(list(itertools.product((0, 1), repeat=8)), dtype=x.dtype)
        scores = view.target_scores(masks * x[i], int(found.target[i]))
        table = {tuple(int(b) for b in mask): float(v) for mask, v in zip(masks, scores, strict=True)}
        assert np.abs(found.weights[i].numpy() - shapley_by_enumeration(table.__getitem__, 8)).max() < 1e-6
    assert (found.standard_error == 0).all()
    assert torch.allclose(found.intercept.double() + found.weights.double().sum(1), view.target_scores(x), atol=1e-6)


def test_kernelshap_of_a_background_set_is_the_mean_of_its_games():
    net, x, background = network(), rows(4), rows(5, seed=7) - 0.6
    together = attribute("KernelSHAP", net, x, 1, baseline=background)
    alone = [attribute("KernelSHAP", net, x, 1, baseline=one).weights for one in background]
    assert torch.allclose(together.weights, torch.stack(alone).mean(0), atol=1e-6)
    gradients = attribute("Integrated Gradients", net, x, 1, baseline=background)
    each = [attribute("Integrated Gradients", net, x, 1, baseline=one).weights for one in background]
    assert torch.allclose(gradients.weights, torch.stack(each).mean(0), atol=1e-6)


def test_sampled_kernelshap_agrees_with_the_exact_one_within_its_standard_error():
    net, x = network(d=12), rows(8, d=12)
    exact = attribute("KernelSHAP", net, x, enumerate=True).weights
    sampled = attribute("KernelSHAP", net, x, n_samples=400, enumerate=False)
    z = (sampled.weights - exact) / sampled.standard_error
    assert 0.6 < float(z.square().mean().sqrt()) < 1.5
    again = attribute("KernelSHAP", net, x, n_samples=6400, enumerate=False)
    assert float((again.weights - exact).abs().mean()) < 0.5 * float((sampled.weights - exact).abs().mean())


def test_lime_is_the_weighted_least_squares_fit_over_all_subsets():
    net, x = network(), rows(3)
    found = attribute("LIME", net, x, width=0.7)
    masks = torch.tensor(list(itertools.product((0, 1), repeat=8)), dtype=x.dtype)
    for i in range(len(x)):
        moved = masks * x[i]
        kernel = torch.exp(-(x[i] - moved).square().sum(1) / 0.7**2).sqrt()
        design = torch.cat([masks, torch.ones(256, 1, dtype=x.dtype)], dim=1)
        target = ModelView(net).target_scores(moved, int(found.target[i]))
        solution = torch.linalg.lstsq(kernel[:, None] * design, (kernel * target)[:, None]).solution[:, 0]
        assert torch.allclose(found.weights[i].double(), solution[:-1], atol=1e-6)
        assert float(found.intercept[i]) == pytest.approx(float(solution[-1]), abs=1e-6)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_gradient_methods_and_occlusion_are_captums(activation):
    net, x = network(activation=activation, dtype=torch.float32), rows(20, dtype=torch.float32)

    def probability(z):
        return torch.softmax(net(z), dim=1)

    target = probability(x).argmax(1)
    peers = {
        "Vanilla Gradients": Saliency(probability).attribute(x.clone().requires_grad_(), target=target, abs=False),
        "Gradient × Input": InputXGradient(probability).attribute(x.clone().requires_grad_(), target=target),
        "Integrated Gradients": IntegratedGradients(probability).attribute(
            x, target=target, n_steps=64, method="gausslegendre"
        ),
        "Occlusion": Occlusion(probability).attribute(x, sliding_window_shapes=(1,), target=target),
    }
    for name, peer in peers.items():
        ours = attribute(name, net, x)
        assert torch.equal(ours.target, target)
        assert float((ours.weights - peer.detach()).abs().max()) < (1e-5 if activation is nn.ReLU else 1e-4), name


def test_sampled_kernelshap_estimates_what_captums_does():
    net, x = network(dtype=torch.float32), rows(1, dtype=torch.float32)
    torch.manual_seed(0)
    peer = KernelShap(net.forward).attribute(x, target=0, n_samples=4000)
    ours = attribute("KernelSHAP", ModelView(net, output="logit"), x, 0)
    assert float((ours.weights - peer).abs().max()) < 0.02


@pytest.mark.parametrize("name", METHODS)
def test_a_linear_function_is_recovered(name):
    w = torch.linspace(-2, 2, 23, dtype=torch.float64)
    x = torch.rand(5, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = attribute(name, lambda z: z @ w + 0.5, x)
    wanted = w * x if name in MULTIPLICATIVE else w.expand(5, -1)
    assert float((found.weights - wanted).abs().max()) < 1e-5
    assert float(found.loss.max()) < 1e-10
    assert float(found.r2.min()) > 1 - 1e-6


def test_a_logistic_function_is_recovered_by_logistic_gradient_matching_only():
    w = torch.linspace(-2, 2, 10, dtype=torch.float64)
    x = rows(4, d=10)
    for sigma in (0.1, 0.5):
        method = LocalApproximation(Neighbourhood.gaussian(sigma), "gradient", "logistic", n_samples=400)
        found = method.explain(lambda z: torch.sigmoid(z @ w - 0.2), x)
        assert float(torch.cosine_similarity(found.weights.double(), w[None]).min()) > 0.9999
        assert float((found.weights - w).abs().max()) < 1e-3
        linear = attribute("SmoothGrad", lambda z: torch.sigmoid(z @ w - 0.2), x, sigma=sigma)
        assert float((linear.weights - w).abs().sum()) > 5 * float((found.weights - w).abs().sum())
    squared = LocalApproximation(Neighbourhood.gaussian(0.3), "squared", "logistic").explain(
        lambda z: torch.sigmoid(z @ w - 0.2), x
    )
    assert float((squared.weights - w).abs().max()) < 1e-2
    assert float(squared.r2.min()) > 0.999999
    plain = LocalApproximation(Neighbourhood.gaussian(0.3), "squared", "logistic", intercept=False).explain(
        lambda z: torch.sigmoid(z @ w), torch.zeros(1, 10, dtype=torch.float64)
    )
    assert float((plain.weights - w).abs().max()) < 1e-2
    assert plain.intercept.tolist() == [0.0]


def test_integrated_gradients_are_complete():
    for activation, bar in ((nn.Tanh, 2e-3), (nn.ReLU, 1e-2)):
        net, x = network(d=23, classes=1, activation=activation), rows(40, d=23)
        found = attribute("Integrated Gradients", net, x)
        gap = found.weights.sum(1) - (net(x) - net(torch.zeros_like(x))).detach()[:, 0]
        assert float(gap.abs().max()) < bar


def test_clime_approaches_smoothgrad():
    net, x = network(d=23, classes=1), rows(10, d=23)
    distance = {}
    for n in (1000, 16_000):
        a = attribute("C-LIME", net, x, n_samples=n).weights
        b = attribute("SmoothGrad", net, x, n_samples=n).weights
        distance[n] = float((a - b).abs().sum() / b.abs().sum())
    assert distance[1000] < 0.1
    assert 2 < distance[1000] / distance[16_000] < 8


def test_a_multiplicative_gradient_has_the_factor_x_minus_the_baseline():
    x = torch.tensor([[2.0, 3.0]])
    found = attribute("Integrated Gradients", lambda z: z.square().sum(1), x, baseline=1.0)
    assert torch.allclose(found.weights, torch.tensor([[3.0, 8.0]]), atol=1e-5)


# ---- properties


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(METHODS)),
    seed=st.integers(0, 5),
    n=st.integers(2, 5),
    d=st.integers(2, 11),
    scale=st.floats(-3, 3).filter(lambda a: abs(a) > 0.1),
)
def test_explanations_are_linear_in_f_and_rows_do_not_touch_each_other(name, seed, n, d, scale):
    net = network(d=d, classes=1, seed=seed)
    x = rows(n, d=d, seed=seed)
    f = lambda z: net(z)[:, 0]
    whole = attribute(name, f, x, seed=seed)
    one = attribute(name, f, x[1:2], seed=seed)
    scaled = attribute(name, lambda z: scale * f(z) + 1, x, seed=seed)
    assert torch.allclose(whole.weights[1], one.weights[0], atol=1e-6)
    assert torch.allclose(scaled.weights, scale * whole.weights, atol=1e-5)
    assert torch.isfinite(whole.weights).all()
    assert (whole.loss >= 0).all()
    assert (whole.r2 <= 1 + 1e-6).all()


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(list(METHODS)), megabytes=st.sampled_from([0.05, 0.5, 4]), per_row=st.booleans())
def test_neither_memory_nor_trivial_groups_change_the_answer(name, megabytes, per_row):
    net, x = network(d=12), rows(7, d=12)
    groups = torch.arange(12).expand(7, 12) if per_row else torch.arange(12)
    whole = attribute(name, net, x, n_samples=64)
    small = attribute(name, net, x, n_samples=64, memory=int(megabytes * 2**20), groups=groups)
    assert torch.allclose(whole.weights, small.weights, atol=1e-6)
    assert torch.allclose(whole.standard_error, small.standard_error, atol=1e-6)


@pytest.mark.parametrize("name", ["LIME", "C-LIME", "SmoothGrad", "KernelSHAP"])
def test_standard_errors_are_those_of_repeated_runs(name):
    net, x = network(d=14, classes=1), rows(5, d=14)
    runs = [attribute(name, net, x, seed=seed, n_samples=300) for seed in range(40)]
    seen = torch.stack([run.weights for run in runs]).std(dim=0)
    told = torch.stack([run.standard_error for run in runs]).mean(dim=0)
    ratio = float((told.square().mean() / seen.square().mean()).sqrt())
    assert 0.8 < ratio < 1.25
    assert torch.equal(runs[0].weights, attribute(name, net, x, seed=0, n_samples=300).weights)


def test_standard_errors_of_a_logistic_surrogate_are_those_of_repeated_runs():
    net, x = network(d=4, classes=1), rows(3, d=4)
    method = [
        LocalApproximation(Neighbourhood.gaussian(0.4), "gradient", "logistic", n_samples=200, seed=seed).explain(
            net, x
        )
        for seed in range(12)
    ]
    seen = torch.stack([run.weights for run in method]).std(dim=0)
    told = torch.stack([run.standard_error for run in method]).mean(dim=0)
    assert 0.5 < float((told.square().mean() / seen.square().mean()).sqrt()) < 2


def test_groups_move_together_and_patches_cover_the_image():
    weight = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    patches = square_patches(8, 8, 4)
    assert patches.unique().tolist() == [0, 1, 2, 3]
    for name in MULTIPLICATIVE:
        found = attribute(name, lambda z: (z * weight).sum(dim=(1, 2, 3)), x, groups=patches)
        wanted = (x * weight).reshape(2, 2, 4, 2, 4).sum(dim=(2, 4)).reshape(2, 4)
        assert torch.allclose(found.weights, wanted, atol=1e-4)
    laid = found.method.neighbourhood.spread_weights(found.weights, x)
    assert laid.shape == x.shape
    assert torch.equal(laid[0, 0, :4, :4], found.weights[0, 0].expand(4, 4))
    noise = attribute("C-LIME", lambda z: (z * weight).sum(dim=(1, 2, 3)), x, groups=patches)
    assert torch.allclose(noise.weights[0].reshape(2, 2), weight.reshape(2, 4, 2, 4).sum(dim=(1, 3)), atol=1e-3)


def test_superpixels_may_differ_by_image():
    x = rows(2, d=6)
    own = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]])
    found = attribute("Occlusion", lambda z: z.sum(1), x, groups=own)
    assert torch.allclose(found.weights[1].double(), torch.stack([x[1, ::2].sum(), x[1, 1::2].sum()]), atol=1e-6)
    assert torch.allclose(found.method.neighbourhood.spread_weights(found.weights, x)[1, ::2], found.weights[1, :1])


def test_the_kernel_is_captums_with_width_times_root_two():
    x, z = torch.tensor([[0.3, 0.9]]), torch.tensor([[0.0, 1.0]])
    ours = Neighbourhood.binary(width=math.sqrt(2) * 0.5).log_kernel(z, x.square())
    assert float(ours.exp()) == pytest.approx(math.exp(-(0.3**2) / (2 * 0.5**2)), rel=1e-6)


def test_the_predicted_class_and_its_probability_are_explained():
    net, x = network(), rows(10)
    found = attribute("Integrated Gradients", net, x)
    assert torch.equal(found.target, net(x).argmax(1))
    view = ModelView(net)
    assert torch.allclose(
        found.weights.sum(1).double(), view.target_scores(x) - view.target_scores(0 * x, found.target), atol=1e-4
    )
    one = attribute("Vanilla Gradients", network(classes=1), x)
    assert (one.target == 0).all()
    assert torch.equal(attribute("Occlusion", net, x.numpy(), np.full(10, 2)).target, torch.full((10,), 2))


def test_estimators_and_black_boxes_are_explained_without_gradients():
    x = rows(60).numpy()
    y = (x[:, 0] > x[:, 1]).astype(int)
    forest = RandomForestClassifier(20, random_state=0).fit(x, y)
    for name in ("LIME", "KernelSHAP", "Occlusion", "C-LIME"):
        found = attribute(name, forest, x[:3])
        assert torch.isfinite(found.weights).all()
        assert found.n_evaluations > 3
    regressor = Ridge(alpha=1e-9).fit(x, x @ np.arange(8.0))
    assert np.allclose(attribute("C-LIME", regressor, x[:2]).weights.numpy(), np.arange(8.0), atol=1e-4)
    table = faithfulness_table(forest, x[:4], n_samples=100)
    assert list(table.index) == ["LIME", "KernelSHAP", "Occlusion", "C-LIME"]


def test_a_module_is_left_in_the_mode_it_had():
    net = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x = rows(3, dtype=torch.float32)
    a, b = attribute("SmoothGrad", net, x), attribute("SmoothGrad", net, x)
    assert torch.equal(a.weights, b.weights)
    assert net.training
    assert all(p.grad is None for p in net.parameters())


def test_memory_is_bounded_by_the_budget():
    net = nn.Sequential(nn.Linear(200, 2000), nn.ReLU(), nn.Linear(2000, 1))
    x = torch.rand(50, 200)
    attribute("SmoothGrad", net, x[:2])
    with peak_memory() as peak:
        attribute("SmoothGrad", net, x, n_samples=500, memory=64 << 20)
    if peak.bytes is None:
        pytest.skip("needs /proc/self/clear_refs to measure memory")
    assert peak.bytes < 200 << 20  # without chunks: 50 x 500 rows of 2,000 floats, about 600 MB


# ---- faithfulness


def test_faithfulness_is_the_weighted_mean_of_squares_over_all_moves():
    net, x = network(d=5, classes=1), rows(3, d=5)
    found = attribute("LIME", net, x)
    told = faithfulness(net, x, found.weights, found.intercept, Neighbourhood.binary())
    assert torch.allclose(told, found.loss, rtol=1e-3)  # 32 moves are all there are
    worse = faithfulness(net, x, found.weights + 0.1, found.intercept, Neighbourhood.binary())
    assert (worse > told).all()
    occluded = attribute("Occlusion", net, x)
    assert float(faithfulness(net, x, occluded.weights, 0.0, Neighbourhood.one_hot()).max()) < 1e-12
    assert (occluded.intercept == 0).all()


def test_faithfulness_uses_other_draws_than_the_fit():
    net, x = network(d=30, classes=1), rows(5, d=30)
    found = attribute("C-LIME", net, x, n_samples=40, sigma=0.5)
    held_out = faithfulness(net, x, found.weights, found.intercept, Neighbourhood.gaussian(0.5))
    assert (held_out > 1.5 * found.loss).all()
    matched = attribute("SmoothGrad", net, x)
    told = faithfulness(net, x, matched.weights, matched.intercept, Neighbourhood.gaussian(0.1), "gradient")
    assert torch.allclose(told, matched.loss, rtol=0.3)


def test_logistic_surrogates_have_a_faithfulness():
    w = torch.linspace(-1, 1, 6, dtype=torch.float64)
    x = torch.zeros(2, 6, dtype=torch.float64)
    f = lambda z: torch.sigmoid(z @ w)
    for loss in ("squared", "gradient"):
        told = faithfulness(f, x, w.expand(2, 6), 0.0, Neighbourhood.gaussian(0.5), loss, surrogate="logistic")
        assert float(told.max()) < 1e-12
        assert (
            faithfulness(f, x, 2 * w.expand(2, 6), 0.0, Neighbourhood.gaussian(0.5), loss, surrogate="logistic") > 1e-4
        ).all()


def test_a_plane_is_faithful_in_every_neighbourhood_whatever_its_coordinates():
    w = torch.linspace(-2, 2, 7, dtype=torch.float64)
    for groups in (None, torch.arange(7)):
        table = faithfulness_table(
            lambda z: z @ w,
            rows(4, d=7),
            neighbourhoods={
                "binary": Neighbourhood.binary(groups=groups),
                "one-hot": Neighbourhood.one_hot(baseline=0.3),
                "gaussian": Neighbourhood.gaussian(0.2),
                "path": Neighbourhood.path(groups=groups),
            },
        )
        assert table.shape == (8, 4)
        assert float(table.to_numpy().max()) < 1e-8


def test_each_neighbourhood_is_won_by_the_method_made_for_it():
    net, x = network(d=12, classes=1, activation=nn.ReLU), rows(30, d=12)
    with torch.no_grad():
        next(net.parameters()).mul_(4)
    table = faithfulness_table(net, x)
    own = {"gaussian": "C-LIME", "binary": "LIME", "one-hot": "Occlusion", "path": "Integrated Gradients"}
    assert table.idxmin().to_dict() == own
    name, ranked = recommend(net, x, Neighbourhood.gaussian(0.1))
    assert name == ranked.index[0] == "C-LIME"
    assert ranked["loss"].is_monotonic_increasing
    assert ranked["times_best"].iloc[0] == 1
    by_row = faithfulness_by_row(net, x, {"LIME": METHODS["LIME"]}, {"here": Neighbourhood.gaussian()})
    assert by_row["LIME", "here"].shape == (30,)
    assert isinstance(table, pd.DataFrame)


# ---- the perturbation test


def test_perturbation_curves_by_hand():
    w = torch.tensor([[3.0, -2.0, 1.0]])
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    f = lambda z: z @ w[0]
    bottom = perturbation_curve(f, x, w.expand(2, 3), ks=[1, 2, 3])
    assert bottom.change.tolist() == [[1, 1, 2], [1, 1, 7]]
    assert bottom.lower_is_better
    top = perturbation_curve(f, x, w.expand(2, 3), "binary", "top", [1, 2])
    assert top.change.tolist() == [[3, 1], [6, 6]]
    assert top.area == pytest.approx(4.0)
    noisy = perturbation_curve(f, x, w.expand(2, 3), "gaussian", "top", [1], sigma=0.2, draws=4000)
    assert noisy.mean[0].item() == pytest.approx(3 * 0.2 * math.sqrt(2 / math.pi), rel=0.05)
    assert np.asarray(noisy).shape == (1,)
    small = perturbation_curve(f, x, w.expand(2, 3), "gaussian", "top", [1], sigma=0.2, draws=4000, memory=1 << 16)
    assert torch.allclose(noisy.change, small.change, atol=1e-5)


# ---- errors


def test_a_gradient_loss_refuses_what_has_no_gradient():
    x = rows(30).numpy()
    estimator = LogisticRegression().fit(x, x[:, 0] > 0.6)
    boxes = [
        estimator,
        RandomForestRegressor(3, random_state=0).fit(x, x[:, 0]),
        lambda z: torch.from_numpy(z.numpy().sum(axis=1)),
        lambda z: z.detach().sum(dim=1),
        lambda z: np.asarray(z).sum(axis=1),
    ]
    for name in GRADIENT:
        for f in boxes:
            with pytest.raises(NotDifferentiableError, match="LIME, KernelSHAP, Occlusion and C-LIME"):
                attribute(name, f, x[:2])
    with pytest.raises(NotDifferentiableError):
        faithfulness(estimator, x[:2], torch.zeros(2, 8), 0.0, Neighbourhood.path(), "gradient")
    with pytest.raises(NotDifferentiableError):
        faithfulness_table(estimator, x[:2], {"SmoothGrad": METHODS["SmoothGrad"]})


def test_a_row_equal_to_its_baseline_is_refused_by_name():
    x = rows(3)
    x[1] = 0.5
    for name in MULTIPLICATIVE:
        with pytest.raises(DegenerateNeighbourhoodError, match=r"\[1\]"):
            attribute(name, network(), x, baseline=0.5)
    assert attribute("SmoothGrad", network(), x).weights.shape == (3, 8)


def test_a_feature_at_its_baseline_gets_nothing():
    x = rows(2)
    x[:, 3] = 0
    for name in MULTIPLICATIVE:
        assert float(attribute(name, network(), x).weights[:, 3].abs().max()) < 1e-6


def test_too_few_samples_name_the_number_that_is_needed():
    for name in ("LIME", "KernelSHAP", "C-LIME"):
        with pytest.raises(ValueError, match="n_samples >= 24"):
            attribute(name, network(d=23), rows(2, d=23), n_samples=20)
    found = attribute("C-LIME", network(d=23), rows(2, d=23), n_samples=20, ridge=1e-3)
    assert torch.isfinite(found.weights).all()


def test_a_singular_fit_warns_and_gives_numbers():
    x = 40 + rows(2, d=12)  # so far from the baseline that a single move has weight
    with pytest.warns(SingularFitWarning, match="2 of 2 rows"):
        found = attribute("LIME", network(d=12), x, n_samples=500)
    assert torch.isfinite(found.weights).all()
    assert torch.isfinite(found.standard_error).all()
    line = LocalApproximation(Neighbourhood.path(), "squared")
    with pytest.warns(SingularFitWarning):
        found = line.explain(lambda z: z.sum(1), rows(2))
    assert torch.allclose(found.weights.sum(1).double(), rows(2).sum(1), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Neighbourhood.gaussian(0), "sigma must be above 0 and finite, got 0"),
        (lambda: Neighbourhood.gaussian(-1.5), "-1.5"),
        (lambda: Neighbourhood.gaussian(math.nan), "nan"),
        (lambda: Neighbourhood.binary(width=-2), "width must be above 0 and finite, got -2"),
        (lambda: Neighbourhood.binary("triangle"), "'triangle'"),
        (lambda: Neighbourhood.binary(enumerate="sometimes"), "'sometimes'"),
        (lambda: Neighbourhood.path(0.5, 0.5), "low=0.5, high=0.5"),
        (lambda: Neighbourhood.path(2, 1), "low < high"),
        (lambda: Neighbourhood.path(nodes=0), "nodes"),
        (lambda: Neighbourhood.path(quadrature="simpson"), "'simpson'"),
        (lambda: Neighbourhood.one_hot(groups=torch.tensor([0, 2])), "without gaps"),
        (lambda: Neighbourhood.one_hot(groups=torch.tensor([0.0, 1.0])), "integers"),
        (lambda: Neighbourhood().draws(3, 5, seed=0), "Neighbourhood.binary"),
        (lambda: LocalApproximation(Neighbourhood.gaussian(), "hinge"), "'hinge'"),
        (lambda: LocalApproximation(Neighbourhood.gaussian(), "squared", "tree"), "'tree'"),
        (lambda: LocalApproximation(Neighbourhood.gaussian(), n_samples=0), "n_samples"),
        (lambda: LocalApproximation(Neighbourhood.gaussian(), ridge=-1.0), "ridge"),
        (lambda: LocalApproximation(Neighbourhood.binary("shapley"), "squared", "logistic"), "Shapley kernel"),
        (lambda: LocalApproximation(Neighbourhood.binary("shapley"), intercept=False), "Shapley kernel"),
        (lambda: square_patches(0, 4, 2), "at least 1"),
        (lambda: attribute("GradCAM", network(), rows()), "no method called 'GradCAM'"),
        (lambda: attribute("LIME", network(), rows(), sigma=0.1), "no option sigma"),
        (lambda: attribute("LIME", network(), rows(), 3), "0..2"),
        (lambda: attribute("LIME", network(), rows(), -1), "-1"),
        (lambda: attribute("LIME", network(), rows(), [0, 1]), "target"),
        (lambda: attribute("LIME", network(), rows(), 0.5), "0.5"),
        (lambda: attribute("LIME", network(), torch.full((2, 8), math.nan)), "nan at"),
        (lambda: attribute("LIME", network(), torch.zeros(0, 8)), "at least one row"),
        (lambda: attribute("LIME", network(), torch.zeros(8)), r"\(8,\)"),
        (lambda: attribute("LIME", network(), rows(), baseline=torch.zeros(5)), "baseline"),
        (lambda: attribute("LIME", network(), rows(), baseline=math.inf), "baseline is not finite"),
        (lambda: attribute("LIME", network(), rows(), groups=torch.arange(5)), "do not fit"),
        (lambda: attribute("LIME", lambda z: z.log().sum(1) - math.inf, rows()), "not finite"),
        (lambda: attribute("SmoothGrad", lambda z: (z - z).sqrt().sum(1), rows()), "gradient of f"),
        (lambda: attribute("LIME", "model", rows()), "nn.Module"),
        (lambda: attribute("LIME", lambda z: z[:1, 0], rows()), "scores"),
        (lambda: attribute("LIME", network(d=30), rows(d=30), enumerate=True), "2\\^30"),
        (lambda: attribute("LIME", network(d=400), rows(d=400), memory=1 << 20), "feature groups"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(6, 8), "salt"), "'salt'"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(6, 8), end="middle"), "'middle'"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(6, 8), ks=[9]), "1..8"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(6, 8), ks=[]), "1..8"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(5, 8)), r"\(6, 8\)"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(6, 8), "gaussian", draws=0, ks=[1]), "draws"),
        (lambda: faithfulness(network(), rows(), torch.zeros(6, 7), 0.0, Neighbourhood.gaussian()), r"\(6, 8\)"),
        (
            lambda: faithfulness(network(), rows(), torch.zeros(6, 8), torch.zeros(3), Neighbourhood.gaussian()),
            "intercept",
        ),
        (lambda: faithfulness(network(), rows(), torch.zeros(6, 8), 0.0, Neighbourhood.gaussian(), "hinge"), "'hinge'"),
        (lambda: faithfulness_table(network(), rows(), {}), "at least one method"),
    ],
)
def test_what_cannot_be_used_is_said(make, text):
    with pytest.raises(ValueError, match=text):
        make()
