import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import nn
from typer.testing import CliRunner

from theodolite.cli import app
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.explanations.robust_counterfactuals import (
    ClosestCounterfactual,
    ConfidenceThreshold,
    CounterfactualNotFoundError,
    NearestNeighbour,
    Roar,
    StableNeighbourSearch,
    TrainModeWarning,
    TRex,
    TRexNearest,
    Wachter,
    benchmark,
    samples_needed,
    stability,
    stability_guarantee,
)

QUICK = settings(max_examples=25, deadline=None)


def network(d=4, outputs=2, seed=0, hidden=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def rows(n=120, d=4, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, d))


def trained(seed=0, d=4):
    """A network that tells on which side of a bent line a row lies."""
    net, x = network(d, seed=seed), torch.as_tensor(rows(400, d)).float()
    y = (x[:, 0] + x[:, 1] ** 2 > 0.8).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def rejected(net, n=8):
    x = rows(300, seed=5)
    with torch.no_grad():
        return x[net(torch.as_tensor(x).float()).argmax(dim=1).numpy() == 0][:n]


# ---- stability: closed forms


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.01, 0.1))
def test_a_linear_model_loses_its_mean_absolute_move(seed, d, sigma):
    a = np.random.default_rng(seed).normal(size=d)
    a *= 0.5 / np.linalg.norm(a)
    slope, k = torch.as_tensor(a), 4000
    found = stability(lambda z: 0.5 + z @ slope, np.zeros((1, d)), sigma=sigma, k=k, seed=seed)
    # five standard errors, as forty draws of it are looked at
    assert abs(found[0] - (0.5 - sigma * 0.5 * math.sqrt(2 / math.pi))) <= 5 * 1.17 * sigma * 0.5 / math.sqrt(k)


@pytest.mark.parametrize("scale", [0.05, 0.2, 1.0])
def test_a_probit_model_on_its_boundary(scale):
    a, normal = torch.tensor([3.0, -4.0], dtype=torch.float64), torch.distributions.Normal(0.0, 1.0)
    found = stability(lambda z: normal.cdf(z @ a / scale), np.zeros((1, 2)), k=100_000)
    assert abs(found[0] - (0.5 - math.atan(0.05 * 5 / scale) / math.pi)) <= 0.01


@pytest.mark.parametrize("form", ["relaxed", "lipschitz", "given"])
def test_a_constant_model_is_as_stable_as_it_is_sure(form):
    known = {"lipschitz": 0.0} if form == "given" else {}
    flat = lambda z: torch.full((len(z),), 0.7, dtype=torch.float64)
    assert np.allclose(stability(flat, rows(5), form=form, k=50, **known), 0.7, atol=1e-6)


@QUICK
@given(st.integers(0, 10_000))
def test_stability_is_the_definition_and_below_m(seed):
    net, x = network(seed=seed).double(), rows(3, seed=seed)
    noise = np.random.default_rng(seed).normal(size=(40, 4))
    units = np.array([1.0, 2.0, 0.5, 1.0])
    m = lambda z: torch.softmax(net(torch.as_tensor(z)), dim=1)[:, 1].detach().numpy()
    for form in ("relaxed", "lipschitz", "given"):
        found = stability(
            net, x, sigma=0.1, noise=noise, units=units, form=form, lipschitz=2.0 if form == "given" else None
        )
        for i in range(3):
            around = m(x[i] + 0.1 * noise * units)
            reach = 0.1 * np.linalg.norm(noise, axis=1)
            if form == "relaxed":
                exact = (around - np.abs(m(x[i : i + 1]) - around)).mean()
                assert found[i] <= m(x[i : i + 1])[0] + 1e-12
            else:
                apart = 0.1 * np.linalg.norm(noise[:, None] - noise, axis=2) + 1e-8
                steep = 2.0 if form == "given" else (np.abs(around[:, None] - around) / apart).max()
                exact = (around - steep * reach).mean()
            assert found[i] == pytest.approx(exact, abs=1e-8)


def test_small_sigma_gives_m_and_batches_and_budgets_do_not_matter():
    net, x = network().double(), rows(20)
    m = torch.softmax(net(torch.as_tensor(x)), dim=1)[:, 1].detach().numpy()
    assert np.allclose(stability(net, x, sigma=1e-9), m, atol=1e-6)
    whole = stability(net, x, k=300, seed=4)
    assert (whole == stability(net, x, k=300, seed=4)).all()
    assert np.allclose(whole, np.concatenate([stability(net, r[None], k=300, seed=4) for r in x]), atol=1e-5)
    assert np.allclose(whole, stability(net, x, k=300, seed=4, memory=20_000), atol=1e-9)
    assert not np.allclose(whole, stability(net, x, k=300, seed=5), atol=1e-9)
    assert stability(net, x[:0]).shape == (0,)


def test_one_logit_two_logits_and_a_callable_are_the_same_model():
    one = network(outputs=1).double()
    two = nn.Sequential(one, nn.Linear(1, 2).double())
    with torch.no_grad():
        two[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
        two[1].bias.zero_()
    x = rows(6)
    for target in (0, 1):
        found = [stability(m, x, target=target, k=50) for m in (one, two, lambda z: torch.sigmoid(one(z))[:, 0])]
        assert np.allclose(found[0], found[1])
        assert np.allclose(found[0], found[2])


def test_a_black_box_has_a_stability_and_three_classes_need_a_target():
    x = rows()
    forest = RandomForestClassifier(10, random_state=0).fit(x, (3 * x[:, 0]).astype(int))
    with pytest.raises(ValueError, match="target="):
        stability(forest, x[:2], k=10)
    found = stability(forest, x[:4], k=10, target=2)
    assert ((found >= -1) & (found <= 1)).all()
    with pytest.raises(InputError, match=r"0\.\.2"):
        stability(forest, x[:2], k=10, target=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": 0.0}, "sigma"), ({"k": 1}, "k must"), ({"form": "given"}, "lipschitz"),
        ({"lipschitz": 1.0}, "lipschitz"), ({"noise": np.zeros((5, 9))}, "noise"),
    ],
)  # fmt: skip
def test_stability_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        stability(network(), rows(2), **options)


def test_rows_and_probabilities_have_to_be_finite():
    with pytest.raises(ValueError, match="NaN"):
        stability(network(), np.full((1, 4), np.nan))
    with pytest.raises(ModelError, match="probabilities"):
        stability(lambda z: z.sum(dim=1) * 100, rows(2))


def test_training_mode_is_left_for_the_call_and_put_back():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    with pytest.warns(TrainModeWarning) as told:
        found = stability(net, rows(3), k=20)
    assert len(told) == 1
    assert net.training
    assert net[1].training
    assert (found == stability(net.eval(), rows(3), k=20)).all()
    with pytest.warns(TrainModeWarning) as told:
        TRex(k=20, search_k=8, max_steps=2, base="nearest").fit(net.train(), rows()).generate(rows(3, seed=1))
    assert len(told) == 1
    assert net.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stability(network().train(), rows(2), k=10)  # nothing in it that training mode changes


def test_the_guarantee_and_its_inverse():
    assert stability_guarantee(0.1, 100, 0.05, 1.0, 1.0) == pytest.approx(1 - math.exp(-1 / (8 * 4 * 0.0025)))
    for wanted in (0.5, 0.9, 0.999):
        k = samples_needed(wanted, 0.05, 0.05, 2.0, 1.0)
        assert stability_guarantee(0.05, k, 0.05, 2.0, 1.0) >= wanted
        assert k == 1 or stability_guarantee(0.05, k - 1, 0.05, 2.0, 1.0) < wanted
    for broken in ((0.0, 10, 0.05, 1, 1), (0.1, 0, 0.05, 1, 1), (0.1, 10, 0.0, 1, 1), (0.1, 10, 0.05, -1, 1)):
        with pytest.raises(ValueError, match=r"epsilon|k must"):
            stability_guarantee(*broken)
    with pytest.raises(ValueError, match="probability"):
        samples_needed(1.0, 0.1, 0.05, 1, 1)


# ---- searches


def test_trex_reaches_tau_at_the_least_distance_of_a_line():
    net = nn.Linear(2, 1).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[12.0, 0.0]]))
        net.bias.fill_(-6.0)
    box = np.array([[0.0, 0.0], [1.0, 1.0]])
    grid = np.c_[np.linspace(0, 1, 2001), np.full(2001, 0.5)]
    rated = stability(net, grid, k=20_000)
    for tau in (0.6, 0.75, 0.9):
        found = TRex(tau=tau, search_k=1000).fit(net, box).generate([[0.2, 0.5]])
        exact = grid[np.argmax(rated >= tau), 0] - 0.2
        assert found.reached.all()
        assert exact - 0.01 <= found.cost[0] <= exact + 0.03  # a step is 0.01, the margin of two errors about as much


def test_trex_is_more_stable_than_its_base_and_reports_other_draws():
    net = trained()
    x = rejected(net)
    base = ClosestCounterfactual(steps=100).fit(net, rows()).generate(x)
    found = TRex(base=ClosestCounterfactual(steps=100), tau=0.8).fit(net, rows()).generate(x)
    assert (found.valid & base.valid).all()
    assert (found.stability > base.stability).all()
    assert found.reached.mean() >= 0.8
    assert (found.reached == (found.stability >= 0.8)).all()
    assert (found.steps > 0).all()
    assert (found.cost >= base.cost - 1e-6).all()
    again = TRex(base=ClosestCounterfactual(steps=100), tau=0.8).fit(net, rows()).generate(x)
    assert (again.counterfactuals == found.counterfactuals).all()
    alone = TRex(base=ClosestCounterfactual(steps=100), tau=0.8).fit(net, rows()).generate(x[:1])
    assert np.allclose(alone.counterfactuals, found.counterfactuals[:1], atol=1e-5)


def test_an_unreachable_tau_is_flagged_and_the_ball_is_kept():
    net = trained()
    x = rejected(net)
    near = ClosestCounterfactual(steps=100)
    base = near.fit(net, rows()).generate(x)
    found = TRex(base=near, tau=0.999, radius=0.05, k=100).fit(net, rows()).generate(x)
    assert found.valid.all()
    assert not found.reached.any()
    span = np.ptp(rows(), axis=0)
    assert (np.linalg.norm((found.counterfactuals - base.counterfactuals) / span, axis=1) <= 0.051).all()


ALL = [
    ClosestCounterfactual(steps=60, k=50),
    NearestNeighbour(k=50),
    StableNeighbourSearch(base=ClosestCounterfactual(steps=60), steps=30, k=50),
    ConfidenceThreshold(base=ClosestCounterfactual(steps=60), k=50),
    TRex(base=ClosestCounterfactual(steps=60), search_k=32, k=50),
    TRexNearest(k=50),
    Wachter(k=50, steps=300),
    Roar(k=50, steps=300, delta_max=0.01),
]


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("target", [0, 1])
def test_every_method_gives_the_class_asked_for(method, target):
    net = trained()
    x = rows(15, seed=9)
    found = method.fit(net, rows()).generate(x, target)
    assert found.valid.all()
    answers = net(torch.as_tensor(found.counterfactuals).float()).argmax(dim=1).numpy()
    assert (answers == target).all()
    assert (found.counterfactuals[found.unchanged] == x[found.unchanged]).all()
    assert (found.cost[found.unchanged] == 0).all()
    span = np.ptp(rows(), axis=0)
    assert np.allclose(found.cost, np.linalg.norm((found.counterfactuals - x) / span, axis=1), atol=1e-6)


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_three_classes_are_told_apart_by_the_wanted_one(method):
    x = rows()
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[9.0, 0, 0, 0], [0.0, 9, 0, 0], [0.0, 0, 9, 0]]))
    with pytest.raises(ValueError, match="target="):
        method.fit(net, x).generate(x[:2])
    found = method.fit(net, x).generate(x[:10], 2)
    there = torch.as_tensor(found.counterfactuals[found.valid]).float()
    assert found.valid.any()
    assert (net(there).argmax(dim=1) == 2).all()


def test_confidence_stops_at_tau_and_roar_is_farther_than_wachter():
    net = trained()
    x = rejected(net)
    sure = ConfidenceThreshold(tau=0.8, base=ClosestCounterfactual(steps=60)).fit(net, rows()).generate(x)
    m = torch.softmax(net(torch.as_tensor(sure.counterfactuals).float()), dim=1)[:, 1].detach().numpy()
    assert (m >= 0.8 - 1e-6).all()
    assert m.mean() < 0.93
    plain = Wachter().fit(net, rows()).generate(x)
    robust = Roar(delta_max=0.2).fit(net, rows()).generate(x)
    assert robust.cost.mean() > plain.cost.mean()


def test_one_hot_groups_and_immutable_columns_hold_in_trex():
    x = rows(200, 6)
    x[:, 3:] = np.eye(3)[np.arange(200) % 3]
    net = trained(d=6)
    found = (
        TRex(
            immutable=[2], groups=[(3, 4, 5)], increasing=[0], search_k=32, k=100, base=ClosestCounterfactual(steps=60)
        )
        .fit(net, x)
        .generate(x[:20])
    )
    good = found.counterfactuals[found.valid]
    assert found.valid.mean() > 0.8
    assert np.isin(good[:, 3:], (0, 1)).all()
    assert (good[:, 3:].sum(axis=1) == 1).all()
    assert (good[:, 2] == x[:20][found.valid, 2]).all()
    assert (good[:, 0] >= x[:20][found.valid, 0]).all()


def kinds(n=200):
    """Two numbers and a one-hot group of three."""
    x = rows(n, 5)
    x[:, 2:] = np.eye(3)[np.arange(n) % 3]
    return x


@pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
def test_a_class_that_only_another_kind_has_is_found(method):
    """Half of one kind and half of another would do, and rounds back to the row's own; the numbers may not change."""
    net = nn.Linear(5, 1).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 10.0, 8.0]]))
        net.bias.fill_(-3.0)
    x = np.array([[0.5, 0.5, 1.0, 0.0, 0.0]])
    train = np.vstack([kinds(), x, x + np.array([0, 0, -1, 1, 0]), x + np.array([0, 0, -1, 0, 1])])
    made = replace(method, immutable=[0, 1], groups=[(2, 3, 4)])
    found = made.fit(net, train).generate(x)
    assert found.valid.all()
    assert found.reached.all()
    assert found.counterfactuals[0, :2].tolist() == [0.5, 0.5]
    assert found.counterfactuals[0, 2:].tolist() in ([0, 1, 0], [0, 0, 1])


def test_groups_are_swapped_until_the_point_is_stable():
    """One swap gives the class, both give the stability asked for, and numbers that cannot change do not help."""
    x = rows(300, 5)
    x[:, 1:3], x[:, 3:] = np.eye(2)[np.arange(300) % 2], np.eye(2)[np.arange(300) // 2 % 2]
    net = nn.Linear(5, 1).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0, 2.0, 0.0, 2.0]]))
        net.bias.fill_(-1.6)
    row = np.array([[0.5, 1.0, 0.0, 1.0, 0.0]])
    near_first = ClosestCounterfactual(steps=40, binary_search_steps=3)
    options = {"immutable": [0], "groups": [(1, 2), (3, 4)], "k": 200, "search_k": 64, "base": near_first}
    near = TRex(tau=0.52, **options).fit(net, x).generate(row)
    far = TRex(tau=0.8, **options).fit(net, x).generate(row)
    assert near.reached.all()
    assert far.reached.all()
    assert near.counterfactuals[0, [2, 4]].sum() == 1
    assert far.counterfactuals[0, [2, 4]].sum() == 2


def test_the_nearest_stable_row_is_found_by_brute_force():
    x = rows(150)
    forest = RandomForestClassifier(20, random_state=0).fit(x, (x[:, 0] + x[:, 1] > 1).astype(int))
    found = TRexNearest(tau=0.6, k=60, seed=3).fit(forest, x).generate(rows(10, seed=2))
    span = np.ptp(x, axis=0)
    rated = stability(forest, x, k=60, seed=3, units=span)
    passing = x[(forest.predict_proba(x)[:, 1] >= 0.5) & (rated >= 0.6)]
    for row, point, same in zip(rows(10, seed=2), found.counterfactuals, found.unchanged, strict=True):
        if not same:
            assert np.allclose(point, passing[np.argmin(np.linalg.norm((passing - row) / span, axis=1))])
    smooth = LogisticRegression().fit(x, x[:, 0] + x[:, 1] > 1)
    none = TRexNearest(tau=0.9999, k=60).fit(smooth, x).generate(rows(10, seed=2))
    assert none.valid.all()
    assert not none.reached[~none.unchanged].any()


def test_failures_are_nan_or_raised_and_black_boxes_have_no_gradient():
    net = network(seed=1)
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.copy_(torch.tensor([5.0, -5.0]))
    for method in (
        TRex(k=20, search_k=8),
        TRexNearest(k=20),
        StableNeighbourSearch(k=20, steps=3),
        Wachter(k=20, steps=5),
    ):
        found = method.fit(net, rows()).generate(rows(2))
        assert not found.valid.any()
        assert not found.reached.any()
        assert np.isnan(found.counterfactuals).all()
    with pytest.raises(CounterfactualNotFoundError):
        TRexNearest(k=20, on_failure="raise").fit(net, rows()).generate(rows(2))
    forest = RandomForestClassifier(5, random_state=0).fit(rows(), rows()[:, 0] > 0.5)
    with pytest.raises(ModelError, match="TRexNearest"):
        TRex().fit(forest, rows()).generate(rows(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 0.0}, "tau"), ({"tau": 1.0}, "tau"), ({"radius": 0.0}, "radius"), ({"base": "far"}, "base"),
        ({"search_k": 1}, "search_k"), ({"sigma": -1.0}, "sigma"),
    ],
)  # fmt: skip
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        TRex(**options)
    if "tau" in options:
        with pytest.raises(ValueError, match="tau"):
            TRexNearest(**options)


def test_the_table_of_methods():
    net = trained()
    methods = {"closest": ClosestCounterfactual(steps=60, k=50), "stable": TRexNearest(k=50)}
    frame = benchmark(methods, net, [trained(1), trained(2)], rejected(net), rows())
    assert frame["method"].tolist() == ["closest", "stable"]
    assert (frame["base_validity"] == 1).all()
    assert frame["lof"][1] == 1
    assert frame["robust_validity"][1] >= frame["robust_validity"][0]


def test_two_methods_of_one_kind_need_names():
    net = trained()
    with pytest.raises(InputError, match="name them"):
        benchmark([TRexNearest(tau=0.6), TRexNearest(tau=0.9)], net, [net], rejected(net, 2), rows())


def test_confidence_that_is_not_reached_is_told():
    def shy(x):
        return torch.sigmoid(0.6 * (x[:, 0] - 0.2))  # at most 0.62 where the column ends at 1

    found = ConfidenceThreshold(tau=0.9, k=50).fit(shy, rows()).generate([[0.1, 0.5, 0.5, 0.5]])
    assert found.valid.tolist() == [True]
    assert found.reached.tolist() == [False]
    assert ConfidenceThreshold(tau=0.55, k=50).fit(shy, rows()).generate([[0.1, 0.5, 0.5, 0.5]]).reached.all()


def test_tables_and_tensors_are_taken_without_a_warning():
    x, frame = rows(), pd.DataFrame(rows(), columns=list("abcd"))
    y = (x[:, 0] > 0.5).astype(int)
    model = LogisticRegression(C=100).fit(frame, y)
    found = TRexNearest(k=50).fit(model, frame).generate(frame.iloc[:3])
    assert found.valid.all()
    same = (
        TRexNearest(k=50).fit(LogisticRegression(C=100).fit(x, y), torch.as_tensor(x)).generate(torch.as_tensor(x[:3]))
    )
    assert np.array_equal(found.counterfactuals, same.counterfactuals)
    assert np.array_equal(stability(model, frame.iloc[:3], k=20), stability(model, x[:3], k=20))


def test_answers_that_cannot_be_used_are_told():
    x = rows()
    with pytest.raises(ModelError, match="cannot be differentiated"):
        TRex().fit(lambda x: torch.full((len(x),), 0.2), x).generate(x[:2])
    with pytest.raises(ModelError, match="a tensor, got ndarray"):
        stability(lambda x: np.full(len(x), 0.2), x[:2])


def test_the_command_takes_costs_by_column_and_by_category(tmp_path):
    rng = np.random.default_rng(0)
    age, kind = rng.uniform(20, 70, size=300), rng.choice(["a", "b", "c"], size=300)
    saved = rng.uniform(0, 100, size=300)
    label = np.where(
        (age - 45) / 25 + (saved - 50) / 50 + (kind == "a") + 0.3 * rng.normal(size=300) > 0.3, "yes", "no"
    )
    pd.DataFrame({"age": age, "kind": kind, "saved": saved, "label": label}).to_csv(tmp_path / "t.csv", index=False)

    def run(*more):
        return CliRunner().invoke(
            app,
            [
                "run",
                "robust-counterfactuals",
                "--data",
                str(tmp_path / "t.csv"),
                "--target",
                "label",
                "--rows",
                "4",
                *more,
            ],
        )

    plain, dear = (
        json.loads(run(*more, "--json").stdout)["counterfactuals"]
        for more in ((), ("--cost", "age=50", "--cost", "kind=50"))
    )
    assert all(one["reached"] for one in dear)
    assert not any(name.startswith("kind=") for one in dear for name in one["changes"])
    for one, other in zip(dear, plain, strict=True):
        assert one["changes"]["age"] < other["changes"]["age"]
        assert one["changes"]["saved"] > other["changes"]["saved"]
    assert isinstance(run("--cost", "age").exception, InputError)
    assert isinstance(run("--cost", "height=3").exception, DataError)
