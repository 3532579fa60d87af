"""Baselines by their moments, paths by completeness, the bandit's update by scipy, and every error and trap."""

import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from theodolite.core.builtin import builtin
from theodolite.core.errors import InputError
from theodolite.explanations import baseline_bandit as bb


def net(classes=3, seed=0, channels=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(channels * 16, 8), nn.ReLU(), nn.Linear(8, classes),
    )  # fmt: skip


def images(n=4, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return builtin("digits")


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 12, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True) for _ in range(3))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 0])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.unused, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        a = self.stem(x).relu()
        self.unused(x)
        return self.head((a + self.inner(a).relu()).mean(dim=(2, 3)))


# ---- splits


@pytest.mark.parametrize("layer", ["input", "1", "2", "4", "4:input", "7"])
def test_a_network_is_its_two_parts(layer):
    network, x = net(), images(6)
    split = bb.SplitModel(network, layer)
    a = split.lower(x)
    assert torch.allclose(split.upper(a), network(x), atol=1e-6)
    assert not a.requires_grad


def test_the_lower_part_runs_on_one_row_however_many_go_on():
    network, seen = net(), []
    network[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    split = bb.SplitModel(network, "4")
    a = split.lower(images(1))
    seen.clear()
    split.upper(a.expand(50, -1, -1, -1))
    assert seen == [1]


def test_a_network_that_reads_its_batch_size_gets_as_many_rows():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(72, 3)

        def forward(self, x):
            return self.head(self.conv(x).reshape(x.shape[0], -1))

    network, x = Reads(), images(5)
    split = bb.SplitModel(network, "conv")
    assert torch.allclose(split.upper(split.lower(x)), network(x), atol=1e-6)
    assert bb.path_map(split, x, 0, torch.zeros(2, 6, 6)).shape == (5, 8, 8)


def test_modes_come_back():
    network = net().train()
    split = bb.SplitModel(network, "1")
    bb.path_map(split, images(), 0, torch.zeros(4, 8, 8))
    assert all(module.training for module in network.modules())


def test_what_cannot_be_split_is_named():
    with pytest.raises(bb.SplitError, match="'convv'"):
        bb.SplitModel(Residual(), "convv")
    for layer in ("inner", "unused"):
        with pytest.raises(bb.SplitError, match=layer):
            bb.SplitModel(Residual(), layer).lower(images())
    with pytest.raises(bb.SplitError, match="only a network"):
        bb.SplitModel(lambda x: x, "input")
    with pytest.raises(bb.SplitError, match="call lower"):
        bb.SplitModel(net(), "1").upper(torch.zeros(1, 4, 8, 8))


def test_feature_layers_are_the_ends_of_the_last_two_stages():
    assert bb.feature_layers(net(), images(1)) == ("4", "1")
    assert bb.feature_layers(Residual(), images(1)) == ("stem",)
    assert bb.feature_layers(nn.Linear(5, 2), torch.ones(1, 5)) == ("input",)
    torch.manual_seed(0)
    # the last block reaches the output through the class token alone, so the one before it is taken
    assert bb.feature_layers(Transformer().eval(), images(1)) == ("blocks.1", "patch")


# ---- paths


@pytest.mark.parametrize("family", [*bb.FAMILIES, "zero"])
def test_contributions_add_up_to_the_difference_of_outputs(digits, family):
    network, x = digits.predictor, digits.data.test.x[:3]
    split, bank = bb.SplitModel(network, "input"), digits.data.train.x[:5]
    b = bb.draw_baselines(family, x, rng(), bank)
    found = bb.path_attributions(split, x, 1, b, 256, "integrated", rule="midpoint").flatten(1).sum(dim=1)
    expected = (network(x) - network(b))[:, 1].detach()
    assert torch.allclose(found, expected, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("layer", ["5", "4"])
def test_a_linear_upper_part_gives_its_weights_times_the_difference(n, layer):
    torch.manual_seed(0)
    network = nn.Sequential(*net()[:6], nn.Linear(64, 3))
    split = bb.SplitModel(network, layer)
    a = split.lower(images(2))
    b = torch.rand(a.shape, generator=rng(3))
    expected = network[6].weight[2].reshape(a.shape[1:]) * (a - b)
    assert torch.allclose(bb.path_attributions(split, a, 2, b, n, "integrated"), expected, atol=1e-5)


@pytest.mark.parametrize("combine", ["relu-product", "integrated", "product"])
def test_one_batch_gives_what_one_point_at_a_time_gives(combine):
    network, x, n = net(), images(3), 5
    split = bb.SplitModel(network, "1")
    a, target = split.lower(x), torch.tensor([0, 2, 1])
    b = torch.rand(a.shape, generator=rng(1))
    total = torch.zeros_like(a)
    for j in range(1, n + 1):
        v = (b + j / n * (a - b)).requires_grad_()
        (g,) = torch.autograd.grad(network[2:](v).gather(1, target[:, None]).sum(), v)
        v = v.detach()
        total += {"relu-product": g.relu() * v.relu(), "integrated": g * (a - b), "product": g * v}[combine] / n
    found = bb.path_attributions(split, a, target, b, n, combine)
    assert torch.allclose(found, total, atol=1e-5)
    small = bb.path_attributions(split, a, target, b, n, combine, memory=10_000)
    assert torch.allclose(small, total, atol=1e-5)


def test_a_linear_head_makes_the_path_decoration_for_logits_but_not_for_probabilities():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    split = bb.SplitModel(network, "1")
    a, zero = split.lower(images(1)), torch.zeros(4, 6, 6)
    one, ten = (bb.path_attributions(split, a, 0, zero, n, "integrated") for n in (1, 10))
    assert torch.allclose(one, ten, atol=1e-6)
    one, ten = (bb.path_attributions(split, 20 * a, 0, zero, n, "integrated", output="probability") for n in (1, 10))
    assert not torch.allclose(one, ten, rtol=1e-2, atol=0)


def test_maps_are_of_the_image_and_of_tokens_too():
    torch.manual_seed(0)
    transformer = Transformer().eval()
    split = bb.SplitModel(transformer, "blocks.1")
    a = split.lower(images(2))
    for family in bb.FAMILIES:
        b = bb.draw_baselines(family, a, rng(), a)
        maps = bb.path_map(split, images(2), 0, b, combine="product")
        assert maps.shape == (2, 8, 8)
        assert torch.allclose(maps.amax(dim=(1, 2)), torch.ones(2))
    assert torch.equal(bb.draw_baselines("blur", a, rng())[:, 0], a[:, 0])  # the class token is no place


def test_channels_last_is_the_same_map():
    class Last(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.turn = inner, nn.Identity()

        def forward(self, x):
            a = self.turn(self.inner[:2](x).permute(0, 2, 3, 1))
            return self.inner[2:](a.permute(0, 3, 1, 2))

    first = bb.SplitModel(net(), "1")
    last = bb.SplitModel(Last(net()), "turn", channels_last=True)
    x = images(2)
    a, b = first.lower(x), last.lower(x)
    drawn = bb.draw_baselines("constant", a, rng())
    turned = bb.draw_baselines("constant", b, rng(), channels_last=True)
    assert torch.allclose(drawn, turned.permute(0, 3, 1, 2))
    assert torch.allclose(bb.path_map(first, x, 0, drawn), bb.path_map(last, x, 0, turned), atol=1e-5)


def test_one_logit_is_binary():
    torch.manual_seed(0)
    one = nn.Linear(4, 1)
    split = bb.SplitModel(one, "input")
    x = torch.rand(2, 4)
    up, down = (bb.path_attributions(split, x, target, torch.zeros(4), 2, "integrated") for target in (1, 0))
    assert torch.allclose(up, -down)
    assert torch.allclose(up, one.weight * x, atol=1e-6)


def test_a_map_without_differences_is_zeros_and_told():
    network = net()
    nn.init.zeros_(network[8].weight)
    with pytest.warns(bb.ConstantMapWarning, match="4 of 4"):
        maps = bb.path_map(bb.SplitModel(network, "1"), images(), 0, torch.zeros(4, 8, 8))
    assert float(maps.abs().max()) == 0
    assert bb.adp(network, images(), maps) >= 0


def test_grad_cam_by_hand():
    network, x = net(seed=4), images(1)
    split = bb.SplitModel(network, "4")
    a = split.lower(x).requires_grad_()
    (g,) = torch.autograd.grad(network[5:](a)[0, 1], a)
    cam = (g.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1).relu().detach()
    found = bb.grad_cam(split, x, 1, (4, 4))
    assert torch.allclose(found, (cam - cam.min()) / (cam.max() - cam.min()), atol=1e-5)


# ---- baselines


def test_families_have_the_moments_they_should_have():
    torch.manual_seed(0)
    a = torch.rand(1, 3, 64, 64) * torch.tensor([1.0, 2.0, 4.0])[:, None, None] + 1
    a[:, 2] = 5.0  # a channel without differences
    flat = a.flatten(2)
    normal = bb.draw_baselines("normal", a, rng()).flatten(2)
    assert torch.allclose(normal.mean(dim=2), flat.mean(dim=2), atol=0.05)
    assert torch.allclose(normal.std(dim=2), flat.std(dim=2), atol=0.05)
    uniform = bb.draw_baselines("uniform", a, rng()).flatten(2)
    assert torch.allclose(uniform.mean(dim=2), (flat.amin(dim=2) + flat.amax(dim=2)) / 2, atol=0.05)
    assert torch.allclose(uniform.std(dim=2), (flat.amax(dim=2) - flat.amin(dim=2)) / math.sqrt(12), atol=0.05)
    many = bb.draw_baselines("constant", a.expand(500, -1, -1, -1), rng())
    assert bool((many == many[:, :, :1, :1]).all())
    assert torch.allclose(many[:, :, 0, 0].mean(dim=0), (flat.amin(dim=2) + flat.amax(dim=2))[0] / 2, atol=0.15)
    blur = bb.draw_baselines("blur", a, rng()).flatten(2)
    assert bool((blur.std(dim=2)[:, :2] < flat.std(dim=2)[:, :2]).all())
    assert torch.allclose(blur[:, 2], flat[:, 2], atol=1e-4)
    assert float(bb.draw_baselines("zero", a, rng()).abs().max()) == 0
    bank = torch.arange(4.0)[:, None, None, None].expand(4, 3, 64, 64)
    assert float(bb.draw_baselines("train", a, rng(), bank)[0, 0, 0, 0]) in (0, 1, 2, 3)
    means = bb.draw_baselines("train", a.expand(50, -1, -1, -1), rng(), bank, train_mean=100)[:, 0, 0, 0]
    assert torch.allclose(means, torch.full((50,), 1.5), atol=0.5)


def test_tables_take_their_statistics_from_the_bank():
    bank = torch.randn(500, 4, generator=rng()) * torch.tensor([1.0, 2.0, 3.0, 0.0]) + 7
    a = torch.zeros(2000, 4)
    normal = bb.draw_baselines("normal", a, rng(), bank)
    assert torch.allclose(normal.mean(dim=0), bank.mean(dim=0), atol=0.3)
    assert torch.allclose(normal.std(dim=0), bank.std(dim=0), atol=0.2)
    uniform = bb.draw_baselines("uniform", a, rng(), bank)
    assert bool((uniform >= bank.amin(dim=0)).all())
    assert bool((uniform <= bank.amax(dim=0)).all())
    for family in ("blur", "constant"):
        with pytest.raises(InputError, match="tables have no"):
            bb.draw_baselines(family, a, rng(), bank)


def test_families_that_cannot_be_drawn():
    a = torch.rand(1, 2, 4, 4)
    with pytest.raises(ValueError, match="needs a bank"):
        bb.draw_baselines("train", a, rng())
    with pytest.raises(ValueError, match="on tables"):
        bb.draw_baselines("normal", torch.rand(1, 2), rng())
    with pytest.raises(InputError, match="no baseline family 'grey'"):
        bb.draw_baselines("grey", a, rng())
    with pytest.raises(InputError, match="train_mean"):
        bb.draw_baselines("train", a, rng(), a, train_mean=0)
    with pytest.raises(InputError, match="half gave"):
        bb.draw_baselines(half, a, rng())


def half(a, rng, bank):
    return a[:, :1]


def middle(a, rng, bank):
    return torch.full_like(a, 0.5)


# ---- the bandit's posterior


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([-1.0, 1.0]), st.integers(1, 6), st.floats(0.1, 10))
def test_an_update_is_the_minimum_that_scipy_finds(seed, reward, dim, precision):
    generator = np.random.default_rng(seed)
    bandit = bb.ThompsonLogistic(2, dim, precision)
    for _ in range(3):
        c = generator.normal(size=dim)
        m, q = bandit.mean[1].copy(), bandit.precision[1].copy()

        def objective(w, m=m, q=q, c=c):
            return 0.5 * q @ (w - m) ** 2 + np.logaddexp(0, -reward * w @ c)

        def slope(w, m=m, q=q, c=c):
            return q * (w - m) - reward * c / (1 + np.exp(reward * w @ c))

        best = minimize(objective, m, jac=slope, method="BFGS", options={"gtol": 1e-10}).x
        bandit.update(1, c, reward)
        assert np.allclose(bandit.mean[1], best, atol=1e-6)
        p = 1 / (1 + np.exp(-bandit.mean[1] @ c))
        assert np.allclose(bandit.precision[1], q + c**2 * p * (1 - p), atol=1e-12)
    assert np.array_equal(bandit.mean[0], np.zeros(dim))


def test_exploration_has_the_deviation_of_the_posterior_not_its_variance():
    """The trap: a normal that is given 1/q instead of its root explores too little."""
    bandit = bb.ThompsonLogistic(1, 1, 100.0)
    drawn = bandit._values(np.ones(1), 20_000, np.random.default_rng(0))
    assert drawn.std() == pytest.approx(0.1, rel=0.03)


def test_probabilities_are_those_of_choosing_and_leave_the_state():
    bandit = bb.ThompsonLogistic(3, 2, seed=1)
    c = np.array([1.0, 0.5])
    for arm, reward in itertools.product(range(3), (1.0, -1.0)):
        bandit.update(arm, c, 1.0 if arm == 2 else reward)
    p = bandit.probabilities(c)
    assert np.array_equal(p, bandit.probabilities(c))
    chosen = np.bincount([bandit.choose(c) for _ in range(2000)], minlength=3) / 2000
    assert np.allclose(p, chosen, atol=0.06)
    assert p[2] > p[:2].max()


def test_the_planted_bandit_is_learned_with_context_only():
    def last_share(make):
        shares = []
        for seed in range(2):
            generator, policy, best = np.random.default_rng(seed), make(seed), []
            for _ in range(1000):
                c = generator.normal(size=10)
                c = np.append(c / np.linalg.norm(c), 1.0)
                right = int(c[0] < 0)
                arm = policy.choose(c)
                p = 0.4 if arm > 1 else 0.9 if arm == right else 0.2
                policy.update(arm, c, 1.0 if generator.random() < p else -1.0)
                best.append(arm == right)
            shares.append(np.mean(best[-200:]))
        return np.mean(shares)

    contextual = last_share(lambda seed: bb.ThompsonLogistic(5, 11, seed=seed))
    assert contextual > 0.75
    assert last_share(lambda seed: bb.BetaBernoulli(5, seed=seed)) < 0.65
    assert last_share(lambda seed: bb.UniformChoice(5, seed=seed)) < 0.3


def test_policies_refuse_what_they_cannot_learn_from():
    for policy in (bb.ThompsonLogistic(2, 3), bb.BetaBernoulli(2), bb.UniformChoice(2)):
        with pytest.raises(InputError, match="arm must be"):
            policy.update(2, np.ones(3), 1.0)
        with pytest.raises(InputError, match="reward"):
            policy.update(0, np.ones(3), 0.5)
    for broken in (np.ones(2), np.full(3, np.nan)):
        with pytest.raises(InputError, match="context is 3"):
            bb.ThompsonLogistic(2, 3).choose(broken)
    for arguments in ((0, 3), (2, 0), (2, 3, 0.0)):
        with pytest.raises(InputError, match="need"):
            bb.ThompsonLogistic(*arguments)


# ---- the bandit


def test_the_best_of_its_maps_comes_back(digits):
    data = digits.data
    bandit = bb.BaselineBandit("adp", draws=8, seed=3).fit(digits.predictor, data.train.x[:60])
    assert [arm.layer for arm in bandit.arms_] == ["relu2"] * 5 + ["relu1"] * 5
    x = data.test.x[0]
    found = bandit.explain(x)
    assert (found.map.shape, found.map.dtype, found.scores.shape, found.arms.shape) == (
        (8, 8),
        torch.float32,
        (8,),
        (8,),
    )
    assert (
        found.score
        == found.scores.min()
        == pytest.approx(bb.adp(digits.predictor, x, found.map, found.target), abs=1e-3)
    )
    best = found.arm_names[found.arms[found.scores.argmin()]]
    assert (found.layer, found.family) == (best.layer, best.family)
    again = bandit.explain(x)
    assert torch.equal(found.map, again.map)
    assert np.array_equal(found.scores, again.scores)
    assert bandit.explain(x, draws=3).scores.shape == (3,)
    for mixture in (bandit.mixture(x), found.mixture(), found.mixture(data.test.x[1])):
        assert set(mixture) == set(bb.FAMILIES)
        assert sum(mixture.values()) == pytest.approx(1)
    fresh, score = bandit.fresh(x, found, seed=1)
    assert fresh.shape == (8, 8)
    assert score >= found.score - 1e-9 or score == pytest.approx(found.score, abs=20)
    # p(x) and its class, the layers, nine paths of ten points and nine scores
    assert found.n_forward == 2 + len({found.arm_names[arm].layer for arm in found.arms} | {"relu2"}) + 90 + 9


def test_rewards_are_what_beats_the_zero_baseline(digits):
    x = digits.data.train.x[:40]
    bandit = bb.BaselineBandit("insertion", families=("zero",), layers="relu1", context="none").fit(digits.predictor, x)
    assert set(bandit.rewards_) == {-1.0}  # the same map never beats itself
    assert bandit.policy_.counts.tolist() == [[1.0, 41.0]]


def test_without_learning_the_posterior_stays(digits):
    x = digits.data.train.x[:30]
    kept = bb.BaselineBandit("deletion", finetune=False, draws=5).fit(digits.predictor, x)
    assert kept.explain(x[0]).mixture() == pytest.approx(
        kept._by_family(kept.policy_.reseeded([0, 2]).probabilities(kept._contexts(x[:1])[0])), abs=0.15
    )
    before = kept.policy_.mean.copy()
    taught = bb.BaselineBandit("deletion", draws=5).fit(digits.predictor, x)
    taught.explain(x[0])
    assert np.array_equal(taught.policy_.mean, before)  # explaining teaches a copy


@pytest.mark.parametrize("context", ["penultimate", "none", "uniform"])
@pytest.mark.parametrize("metric", ["INS", "sic", "negative"])
def test_every_variant_runs(digits, context, metric):
    bandit = bb.BaselineBandit(metric, context=context, draws=3, steps=3).fit(
        digits.predictor, digits.data.train.x[:12]
    )
    assert bandit.explain(digits.data.test.x[:1], target=4).target == 4


def test_own_baselines_and_transformers():
    torch.manual_seed(0)
    transformer = Transformer()
    bandit = bb.BaselineBandit("deletion", families=["blur", middle], draws=4, combine="product")
    found = bandit.fit(transformer, images(10)).explain(images(1)[0])
    assert found.family in ("blur", "middle")
    assert found.map.shape == (8, 8)


def test_a_table_is_explained_at_the_input():
    subject = builtin("breast-cancer")
    bandit = bb.BaselineBandit("adp", combine="integrated", draws=6)
    bandit.fit(subject.predictor, subject.data.train.x[:40])
    found = bandit.explain(subject.data.test.x[0])
    assert found.map.shape == (30,)
    assert (found.layer, set(found.mixture())) == ("input", set(bb.TABLE_FAMILIES))


def test_a_draw_without_a_finite_gradient_is_left_out_and_counted(digits):
    def broken(a, rng, bank):
        return a * math.nan

    x = digits.data.train.x[:12]
    bandit = bb.BaselineBandit("adp", families=["uniform", broken], draws=12, context="uniform").fit(
        digits.predictor, x
    )
    assert 0 < bandit.n_dropped_ < 12
    assert len(bandit.rewards_) == 12 - bandit.n_dropped_
    found = bandit.explain(x[0])
    assert found.family == "uniform"
    assert 0 < found.n_dropped == np.isnan(found.scores).sum() < 12
    with pytest.raises(InputError, match="no draw had a finite gradient"):
        bb.BaselineBandit("adp", families=[broken]).fit(digits.predictor, x)


class AboveAFloor(nn.Module):
    """Has an answer for bright images alone, so none at most points of a path from zero."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Identity()

    def forward(self, x):
        light = self.turn(x).mean(dim=(1, 2, 3))
        return torch.stack([(light - 0.3).sqrt(), light, -light], dim=1)


def test_a_zero_baseline_without_a_finite_gradient_takes_nothing_from_the_others():
    bright, dim = 0.9 + 0.1 * images(8), 0.45 + 0.1 * images(1, 1)
    bandit = bb.BaselineBandit(
        "pic", layers="turn", families=["train", "zero"], context="uniform", draws=8, steps=2, removed=1.0
    )
    found = bandit.fit(AboveAFloor(), bright, bank=bright).explain(dim[0], target=0)
    assert math.isnan(found.baseline_score)
    assert found.n_dropped == int((found.arms == 1).sum()) > 0
    assert (found.family, math.isfinite(found.score)) == ("train", True)


def test_what_is_found_can_be_kept_and_sent(digits):
    bandit = bb.BaselineBandit("adp", draws=2).fit(digits.predictor, digits.data.train.x[:6])
    found = bandit.explain(digits.data.test.x[0])
    assert pickle.loads(pickle.dumps(found)).mixture() == found.mixture()


def test_inputs_of_another_precision_are_taken_as_the_network_takes_them(digits):
    x = digits.data.train.x[:8]
    one, other = (bb.BaselineBandit("adp", draws=2).fit(digits.predictor, rows) for rows in (x, x.double()))
    assert torch.equal(one.explain(x[0]).map, other.explain(x[0].double()).map)
    maps = torch.rand(8, 8, generator=rng())
    assert bb.adp(digits.predictor, x[0].double().numpy(), maps) == bb.adp(digits.predictor, x[0], maps)
    assert bb.compare_families(digits.predictor, x.double(), None, ["adp"], 1).equals(
        bb.compare_families(digits.predictor, x, None, ["adp"], 1)
    )


def test_a_constant_map_is_rewarded_with_minus_one():
    network = net()
    nn.init.zeros_(network[8].weight)
    bandit = bb.BaselineBandit("adp", layers="1", draws=3).fit(network, images(6))
    assert set(bandit.rewards_) == {-1.0}
    with pytest.warns(bb.ConstantMapWarning):
        found = bandit.explain(images(1)[0])
    assert found.n_constant == 3
    assert float(found.map.max()) == 0


def test_errors_come_before_any_work(digits):
    x, model = digits.data.train.x[:10], digits.predictor
    with pytest.raises(ValueError, match="draws"):
        bb.BaselineBandit("adp", draws=0).fit(model, x)
    with pytest.raises(ValueError, match="target must be"):
        bb.BaselineBandit("adp").fit(model, x, targets=10)
    with pytest.raises(ValueError, match="needs a bank"):
        bb.BaselineBandit("adp", families=["train"]).fit(model, x)
    with pytest.raises(InputError, match="no metric called"):
        bb.BaselineBandit("best").fit(model, x)
    with pytest.raises(InputError, match="families must be"):
        bb.BaselineBandit("adp", families=9).fit(model, x)
    with pytest.raises(InputError, match="context must be"):
        bb.BaselineBandit("adp", context="resnet").fit(model, x)
    with pytest.raises(InputError, match="an nn"):
        bb.BaselineBandit("adp").fit(lambda x: x, x)
    with pytest.raises(InputError, match="finite"):
        bb.BaselineBandit("adp").fit(model, x * math.nan)
    with pytest.raises(InputError, match="combine"):
        bb.BaselineBandit("adp", combine="sum").fit(model, x)
    with pytest.raises(bb.SplitError, match="relu9"):
        bb.BaselineBandit("adp", layers="relu9").fit(model, x)
    with pytest.raises(InputError, match="call fit"):
        bb.BaselineBandit("adp").explain(x[0])
    bandit = bb.BaselineBandit("adp", steps=2).fit(model, x)
    for call in (
        lambda: bandit.explain(x[0], draws=0),
        lambda: bandit.explain(x[0], target=10),
        lambda: bandit.explain(x),
    ):
        with pytest.raises(ValueError, match=r"draws|target|one input"):
            call()
    with pytest.raises(InputError, match="n_steps"):
        bb.path_map(bb.SplitModel(model, "relu1"), x, 0, torch.zeros(16, 8, 8), 0)
    with pytest.raises(InputError, match="the baseline is"):
        bb.path_map(bb.SplitModel(model, "relu1"), x, 0, torch.zeros(3, 8, 8))
    with pytest.raises(InputError, match="NaN or infinite"):
        bb.path_map(bb.SplitModel(model, "relu1"), x, 0, torch.full((16, 8, 8), math.nan))


# ---- comparing families


def test_a_table_of_families(digits):
    x, metrics = digits.data.test.x[:5], ("adp", "insertion", "positive")
    scores = bb.family_scores(digits.predictor, x, None, metrics, 3, steps=4)
    table = bb.compare_families(digits.predictor, x, None, metrics, 3, steps=4)
    assert table.equals(scores.table())
    assert list(table.columns) == ["mean", "best", "win_share"]
    for metric in metrics:
        part = table.loc[metric]
        assert list(part.index) == list(bb.FAMILIES)
        assert part["win_share"].sum() == pytest.approx(1)
        better = part["best"] >= part["mean"] if bb.HIGHER_IS_BETTER[metric] else part["best"] <= part["mean"]
        assert bool(better.all())
        assert scores.winner(metric) == (
            part["mean"].idxmax() if bb.HIGHER_IS_BETTER[metric] else part["mean"].idxmin()
        )
    own = scores.best_draw("insertion")[1]
    assert np.allclose(own, scores.of("insertion").max(axis=(0, 1)))
    assert bool((scores.best_draw("adp")[1] <= own + 1e-12).all())
    with pytest.raises(InputError, match="draws"):
        bb.family_scores(digits.predictor, x, None, metrics, 0)


def test_maps_that_know_nothing():
    maps = bb.random_smooth_maps(6, (12, 10), seed=1)
    assert maps.shape == (6, 12, 10)
    assert torch.allclose(maps.amax(dim=(1, 2)), torch.ones(6))
    assert torch.equal(maps, bb.random_smooth_maps(6, (12, 10), seed=1))
    near = (maps[:, :, 1:] - maps[:, :, :-1]).abs().mean()
    assert float(near) < 0.25
    assert bb.random_smooth_maps(2, (5,)).shape == (2, 5)


def test_nothing_is_warned_of_in_ordinary_use(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = bb.BaselineBandit("aic", draws=2).fit(digits.predictor, digits.data.train.x[:5])
        found = made.explain(digits.data.test.x[0])
    assert found.map.shape == (8, 8)
    assert len(found.scores) == 2
