"""Inputs of every kind, options for whole tables, controls, and memory."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import nn

from theodolite.core.memory import peak_memory
from theodolite.core.view import ModelView
from theodolite.explanations.local_approximation import (
    METHODS,
    NEIGHBOURHOODS,
    DegenerateNeighbourhoodError,
    LocalApproximation,
    Neighbourhood,
    NotDifferentiableError,
    attribute,
    faithfulness,
    faithfulness_by_row,
    faithfulness_table,
    perturbation_curve,
    recommend,
    square_patches,
    with_options,
)


def network(d=8, classes=3, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, 12), nn.Tanh(), nn.Linear(12, classes)).to(dtype)


def rows(n=6, d=8, seed=1):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) + 0.1


# ---- what may be explained


def test_tables_lists_and_arrays_of_any_kind_are_the_same_rows():
    net, x = network(), rows()
    wanted = attribute("LIME", net, x).weights
    frame = pd.DataFrame(x.numpy())
    frozen = x.numpy().copy()
    frozen.flags.writeable = False
    for given_rows in (frame, frame.astype(object), x.tolist(), frozen, x.double(), x.clone().requires_grad_()):
        assert torch.allclose(attribute("LIME", net, given_rows).weights, wanted, atol=1e-6)
    whole = attribute("Occlusion", net, (10 * x).int())
    assert torch.allclose(whole.weights, attribute("Occlusion", net, (10 * x).int().float()).weights)
    for broken in (np.array([["a"] * 8]), frame.astype(object).replace(frame.iloc[0, 0], "?"), x.to(torch.complex64)):
        with pytest.raises(ValueError, match=r"text|real numbers"):
            attribute("LIME", net, broken)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_a_module_its_probability_or_its_one_output_is_explained(dtype):
    scores, value, x = network(dtype=dtype), network(classes=1, dtype=dtype), rows().to(dtype)
    probability, logistic = nn.Sequential(scores, nn.Softmax(dim=1)), nn.Sequential(value, nn.Sigmoid())
    for module, f in (
        (scores, probability.forward),
        (probability, probability.forward),
        (value, value.forward),
        (logistic, logistic.forward),
    ):
        found, wanted = attribute("Occlusion", module, x), attribute("Occlusion", lambda z, f=f: f(z), x)
        assert torch.equal(found.target, wanted.target)
        assert torch.allclose(found.weights, wanted.weights, atol=1e-6)
    change = (value(x) - value(0 * x)).detach().ravel().float()
    whole = attribute("KernelSHAP", value, x, enumerate=True).weights.sum(dim=1)
    assert torch.allclose(whole, change, atol=1e-5 if dtype == torch.float64 else 0.05)


def test_a_module_in_half_precision_keeps_its_precision():
    net = network().bfloat16()
    found = attribute("Integrated Gradients", net, rows())
    assert found.weights.dtype == torch.float32
    assert float((found.weights - attribute("Integrated Gradients", network(), rows()).weights).abs().max()) < 0.02


def test_what_f_writes_into_its_input_changes_nothing():
    x = rows()
    kept = x.clone()
    for name in METHODS:
        found = attribute(name, lambda z: z.mul_(2).sum(dim=1), x)
        same = attribute(name, lambda z: (2 * z).sum(dim=1), x)
        assert torch.allclose(found.weights, same.weights, atol=1e-6), name
        assert torch.equal(x, kept)


def test_gradients_are_found_without_the_callers_leave():
    net, x = network().requires_grad_(False), rows()
    wanted = attribute("SmoothGrad", net, x).weights
    with torch.no_grad():
        assert torch.equal(attribute("SmoothGrad", net, x).weights, wanted)
    with torch.inference_mode(), pytest.raises(NotDifferentiableError, match="inference_mode"):
        attribute("SmoothGrad", net, x)


def test_a_constant_is_explained_by_nothing():
    for name in METHODS:
        found = attribute(name, lambda z: 0 * z.sum(dim=1) + 1, rows())
        assert float(found.weights.abs().max()) < 1e-12
        assert torch.equal(found.r2, torch.ones(6)), name


def test_images_keep_their_memory_format():
    seen = []

    def f(z):
        seen.append(z.is_contiguous(memory_format=torch.channels_last))
        return z.square().sum(dim=(1, 2, 3))

    x = torch.rand(2, 3, 4, 4)
    for given_rows, last in ((x, False), (x.contiguous(memory_format=torch.channels_last), True)):
        seen.clear()
        attribute("SmoothGrad", f, given_rows, n_samples=3)
        assert seen == [last] * len(seen)


def test_pixels_of_colour_images_and_groups_across_channels():
    weight = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    f = lambda z: (z * weight).sum(dim=(1, 2, 3))
    whole = attribute("Integrated Gradients", f, x)
    assert torch.allclose(whole.weights, (x * weight).flatten(1), atol=1e-5)
    patches = square_patches(8, 8, 4)
    ours = attribute("KernelSHAP", f, x, groups=patches)
    assert ours.weights.shape == (2, 4)
    assert torch.allclose(ours.weights.sum(dim=1), whole.weights.sum(dim=1), atol=1e-4)
    curve = perturbation_curve(f, x, ours.weights, groups=patches, ks=[4])
    assert torch.allclose(curve.change[:, 0], f(x), atol=1e-4)


# ---- errors of inputs


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: attribute("LIME", network(), rows(d=5)), r"f failed on rows of shape \(5,\)"),
        (lambda: attribute("LIME", LogisticRegression(), rows()), "not fitted"),
        (lambda: attribute("LIME", lambda z: torch.tensor(3.0), rows()), "scores"),
        (lambda: attribute("LIME", lambda z: z[:, :, None], rows()), "scores"),
        (lambda: attribute("LIME", lambda z: (z, z), rows()), "f failed"),
        (lambda: attribute("LIME", nn.Linear, rows()), "nn.Module, a fitted estimator or a callable"),
        (lambda: attribute("LIME", network(), rows(), "cat"), "class index"),
        (lambda: attribute("LIME", network(), rows(), np.zeros((6, 1), dtype=int)), "class index"),
        (lambda: attribute("LIME", network(), rows(), True), "class index"),
        (lambda: attribute("LIME", network(), rows(), baseline="mean"), "baseline must be numbers"),
        (lambda: attribute("LIME", network(), rows(), memory=0), "memory"),
        (lambda: attribute("LIME", network(), rows(), seed=-1), "seed"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(6, 8), ks=[1.5]), "each of ks"),
        (lambda: perturbation_curve(network(), rows(), torch.full((6, 8), np.nan)), "numbers"),
        (lambda: perturbation_curve(network(), rows(), torch.zeros(6, 8), "gaussian", sigma=0.0), "sigma"),
        (lambda: faithfulness(network(), rows(), torch.full((6, 8), np.inf), 0.0, Neighbourhood.gaussian()), "finite"),
        (lambda: faithfulness(network(), rows(), torch.zeros(6, 8), 0.0, Neighbourhood.gaussian(), n_samples=0), "n_s"),
        (lambda: LocalApproximation(Neighbourhood.binary("shapley"), "gradient"), "Shapley kernel"),
        (lambda: Neighbourhood.one_hot(groups=torch.tensor([True, False])), "integers"),
        (lambda: with_options(METHODS, sigma=0.2), r"dataclasses\.replace"),
        (lambda: faithfulness_table(network(), rows(), neighbourhoods={}), "at least one"),
        (
            lambda: faithfulness_table(
                network(), rows(), {"a": LocalApproximation(Neighbourhood.gaussian(), "squared", "logistic")}
            ),
            "logistic surrogate",
        ),
        (
            lambda: faithfulness_table(network(), rows(), {"a": attribute("LIME", network(), rows()[:2])}),
            "explains 2 rows",
        ),
        (
            lambda: faithfulness_table(
                network(), rows(), {str(t): attribute("LIME", network(), rows(), t) for t in (0, 1)}
            ),
            "different classes",
        ),
    ],
)
def test_what_cannot_be_used_is_said(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_background_set_of_nothing_but_the_row_is_refused():
    x = rows(2)
    with pytest.raises(DegenerateNeighbourhoodError, match=r"\[1\]"):
        attribute("KernelSHAP", network(), x, baseline=x[1].expand(3, 8))
    assert attribute("KernelSHAP", network(), x, baseline=x).weights.shape == (2, 8)  # each has another to differ from


# ---- whole tables


def test_options_reach_every_method_that_has_them():
    x, base, groups = rows(), torch.full((8,), 0.3), torch.arange(8) // 2
    methods = with_options(METHODS, baseline=base, groups=groups, seed=3, memory=1 << 24)
    places = with_options(NEIGHBOURHOODS, baseline=base, groups=groups)
    for name, method in methods.items():
        alone = {"groups": groups, "seed": 3}
        alone |= {"baseline": base} if method.neighbourhood.multiplicative else {}
        assert torch.allclose(method.explain(network(), x).weights, attribute(name, network(), x, **alone).weights)
        assert (method.seed, method.memory) == (3, 1 << 24)
    assert faithfulness_table(network(), x, methods, places).shape == (8, 4)
    assert METHODS["LIME"].neighbourhood.groups is None


def test_controls_share_the_table_and_lose_where_the_weights_matter():
    w = torch.tensor([5.0, 0.0, 0.0, -3.0, 0.0, 1.0], dtype=torch.float64)
    f = lambda z: z @ w
    x = rows(20, d=6).double()
    table = faithfulness_table(f, x, controls=True)
    assert list(table.index) == [*(name for method in METHODS for name in (method, f"{method}, shuffled")), "constant"]
    for name in METHODS:
        shuffled, own = (np.asarray(table.loc[key]) for key in (f"{name}, shuffled", name))
        assert (shuffled - 100 * own).min() > 1e-4, name
    by_hand = faithfulness(f, x, torch.zeros(20, 6), f(x), Neighbourhood.gaussian(0.1))
    by_row = faithfulness_by_row(f, x, controls=True)
    assert torch.allclose(by_row["constant", "gaussian"].float(), by_hand)
    assert table.loc["constant", "one-hot"] == pytest.approx(float((x * w).square().mean()), rel=1e-6)
    name, ranked = recommend(f, x, Neighbourhood.gaussian(0.1))
    assert list(ranked.columns) == ["loss", "low", "high", "times_best", "shuffled", "constant"]
    assert np.greater(ranked["shuffled"], ranked["high"]).all()
    assert name in METHODS


def test_explanations_are_judged_as_the_methods_that_made_them():
    net, x = network(classes=1), rows()
    made = {name: method.explain(net, x) for name, method in METHODS.items()}
    pd.testing.assert_frame_equal(faithfulness_table(net, x, made), faithfulness_table(net, x))


def test_a_method_keeps_its_weights_in_its_own_coordinates():
    net, x = network(d=14, classes=1), rows(d=14)
    x[:, 0] = 1e-4  # so near the baseline that its slope cannot be told from noise
    found = attribute("LIME", net, x, n_samples=60)
    table = faithfulness_by_row(net, x, {"LIME": found}, {"binary": Neighbourhood.binary()})
    told = faithfulness(net, x, found.weights, found.intercept, Neighbourhood.binary())
    assert torch.allclose(table["LIME", "binary"].float(), told, rtol=1e-4)


def test_one_row_has_no_interval():
    _, table = recommend(network(), rows(1), Neighbourhood.gaussian())
    assert np.isneginf(table["low"]).all()
    assert np.isposinf(table["high"]).all()


def test_black_boxes_are_recommended_a_method_without_gradients():
    x = rows(40).numpy()
    model = LinearRegression().fit(x, np.sin(3 * x[:, 0]) + x[:, 1])
    name, table = recommend(model, x[:5], Neighbourhood.path())
    assert set(table.index) == {"LIME", "KernelSHAP", "Occlusion", "C-LIME"}
    assert name in table.index


# ---- properties


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), d=st.integers(2, 9), classes=st.integers(1, 4))
def test_kernelshap_keeps_shapleys_axioms(seed, d, classes):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 6), nn.ReLU(), nn.Linear(6, classes)).double()
    with torch.no_grad():
        first = next(net.parameters())
        first[:, 0] = 0  # a feature that f does not see
    x = torch.rand(3, d, dtype=torch.float64) + 0.1
    found = attribute("KernelSHAP", net, x)
    view = ModelView(net, output="raw" if classes == 1 else "probability")
    change = view.target_scores(x, found.target) - view.target_scores(0 * x, found.target)
    assert torch.allclose(found.weights.double().sum(dim=1), change, atol=1e-6)
    assert float(found.weights[:, 0].abs().max()) < 1e-6
    with torch.no_grad():
        first[:, -1] = first[:, -2]  # twins
    x[:, -1] = x[:, -2]
    twins = attribute("KernelSHAP", net, x).weights
    assert torch.allclose(twins[:, -1], twins[:, -2], atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(["LIME", "KernelSHAP", "Occlusion", "Integrated Gradients", "Gradient × Input"]),
       seed=st.integers(0, 100), d=st.integers(2, 9))  # fmt: skip
def test_listed_methods_do_not_mind_the_order_of_features(name, seed, d):
    generator = torch.Generator().manual_seed(seed)
    x, order = torch.rand(3, d, generator=generator).double() + 0.1, torch.randperm(d, generator=generator)
    back = order.argsort()
    f = lambda z: torch.sin(z @ torch.arange(1.0, d + 1).double()) * z[:, 0]
    there = attribute(name, f, x).weights
    here = attribute(name, lambda z: f(z[:, back]), x[:, order]).weights
    assert torch.allclose(here, there[:, order], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(["binary", "gaussian"]), end=st.sampled_from(["bottom", "top"]),
       d=st.integers(1, 14), kilobytes=st.sampled_from([1, 40, 1000]))  # fmt: skip
def test_perturbation_curves_do_not_depend_on_memory_and_end_alike(kind, end, d, kilobytes):
    net, x = network(d=d, classes=1), rows(4, d=d)
    weights = torch.randn(4, d, generator=torch.Generator().manual_seed(0))
    whole = perturbation_curve(net, x, weights, kind, end, draws=7)
    small = perturbation_curve(net, x, weights, kind, end, draws=7, memory=kilobytes << 10)
    assert whole.ks == tuple(range(1, min(11, d) + 1))
    assert torch.allclose(whole.change, small.change, atol=1e-6)
    other = perturbation_curve(net, x, weights, kind, "top" if end == "bottom" else "bottom", draws=7)
    if d <= 11:  # all features are disturbed, whatever the order
        assert torch.allclose(whole.change[:, -1], other.change[:, -1], atol=1e-6)


# ---- memory


@pytest.mark.parametrize("name", ["SmoothGrad", "Integrated Gradients", "Occlusion", "KernelSHAP"])
def test_a_network_inside_a_function_is_held_to_the_budget_too(name):
    net = nn.Sequential(nn.Linear(64, 20_000), nn.ReLU(), nn.Linear(20_000, 1))
    f = lambda z: net(z)[:, 0]
    x = rows(40, d=64)
    options = {"n_samples": 200} if name in ("SmoothGrad", "KernelSHAP") else {}
    attribute(name, f, x[:1], **options)
    with peak_memory() as peak:
        found = attribute(name, f, x, memory=48 << 20, **options)
    if peak.bytes is None:
        pytest.skip("needs /proc/self/clear_refs to measure memory")
    assert found.n_evaluations >= 40 * 64
    assert peak.bytes < 100 << 20  # in one batch: at least 2,560 rows of 20,000 floats, 200 MB for each layer
