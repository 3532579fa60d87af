"""Attribution metrics: values by hand, directions, what all-ones maps give, and broken input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import nn

from theodolite.core import attribution_metrics as am
from theodolite.core.errors import InputError
from theodolite.core.view import ModelView

NAMES = ("adp", "pic", "add", "insertion", "deletion", "positive", "negative", "sic", "aic")
BETTER_HIGH = {"pic", "add", "insertion", "negative", "sic", "aic"}


def share(x):
    """The share of pixels that are 1: a model that counts what is shown."""
    return x.flatten(1).mean(dim=1, keepdim=True)


def net(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))


def images(n=3, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_one_table_holds_every_metric_and_its_direction():
    assert set(am.HIGHER_IS_BETTER) == set(NAMES)
    assert {name for name, high in am.HIGHER_IS_BETTER.items() if high} == BETTER_HIGH
    assert [am.metric_name(name) for name in ("INS", "Del", "pos", "NEG", "ADP")] == [
        "insertion", "deletion", "positive", "negative", "adp",
    ]  # fmt: skip


def test_the_whole_image_kept_changes_nothing():
    x = images()
    for removed in (0.0, -1.0, "blur"):
        ones = torch.ones(3, 8, 8)
        assert am.adp(net(), x, ones, removed=removed) == 0
        assert am.pic(net(), x, ones, removed=removed) == 0
    p = am.target_probabilities(net(), x)[1]
    empty = am.target_probabilities(net(), torch.zeros_like(x), net()(x).argmax(dim=1))[1]
    by_hand = (100 * (p - empty) / p).mean()
    assert am.add(net(), x, torch.ones(3, 8, 8)) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 7, 10, 64])
def test_a_model_that_counts_pixels_gives_one_half(steps):
    x, m = torch.ones(1, 1, 8, 8), torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(steps))
    assert am.insertion(share, x, m, 0, steps=steps) == pytest.approx(0.5, abs=1 / steps if steps > 1 else 1e-9)
    assert am.deletion(share, x, m, 0, steps=steps) == pytest.approx(0.5, abs=1 / steps if steps > 1 else 1e-9)
    if 64 % steps == 0:
        assert am.insertion(share, x, m, 0, steps=steps) == pytest.approx(0.5, abs=1e-6)


def test_fading_metrics_by_hand():
    weights = torch.tensor([0.5, 0.3, 0.2, 0.0])
    model = lambda x: (x @ weights)[:, None]
    x, m = torch.ones(4), torch.tensor([1.0, 0.0, 0.5, 1.0])
    assert am.adp(model, x, m, 0) == pytest.approx(40.0, abs=1e-4)
    assert am.add(model, x, m, 0) == pytest.approx(60.0, abs=1e-4)
    assert am.pic(model, x, m, 0) == 0
    assert am.pic(model, x, m, 0, removed=torch.tensor([0.0, 2.0, 0.0, 0.0])) == 100
    assert am.adp(model, x, m, 0, removed=torch.tensor([0.0, 2.0, 0.0, 0.0])) == 0


def test_curves_take_the_most_relevant_first():
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    model = lambda x: torch.stack([x @ weights, 1 - x @ weights], dim=1)
    x, right, wrong = torch.ones(4), torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = np.array([0, 0.4, 0.7, 0.9, 1.0])
    assert am.insertion(model, x, right, 0, steps=4) == pytest.approx(np.trapezoid(found) / 4)
    assert am.deletion(model, x, right, 0, steps=4) == pytest.approx(np.trapezoid(1 - found) / 4)
    assert am.positive(model, x, right, 0, steps=4) == pytest.approx((0.5 + 1 + 0) / 4)  # 1, .6 | .3, .1, 0
    assert am.negative(model, x, right, 0, steps=4) == pytest.approx((0.5 + 1 + 1 + 0) / 4)  # 1, .9, .7 | .4, 0
    for name, high in am.HIGHER_IS_BETTER.items():
        if name not in ("adp", "pic", "add", "sic", "aic"):
            score = getattr(am, name)
            good, bad = score(model, x, right, 0, steps=4), score(model, x, wrong, 0, steps=4)
            assert (good > bad) is high, name


def test_normalised_images_fade_to_black_only_where_told():
    """The trap: 0 after normalisation is grey, and ADP is another number."""
    network, pixels = net(seed=3), images(1, seed=5)
    normalised = (pixels - 0.5) / 0.1
    m = torch.linspace(0, 1, 64).reshape(1, 8, 8)

    class Normalised(nn.Module):
        def forward(self, x):
            return network((x - 0.5) / 0.1)

    in_pixels = am.add(Normalised(), pixels, m)
    assert am.add(network, normalised, m, removed=-0.5 / 0.1) == pytest.approx(in_pixels, rel=1e-3)
    assert abs(am.add(network, normalised, m) - in_pixels) > 1


def test_information_curves():
    network, x = net(seed=1), images(4, seed=1)
    maps = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(2))
    target = network(x).argmax(dim=1)
    for name in ("sic", "aic"):
        found = am.attribution_scores(name, network, x, maps, target)
        assert found.shape == (4,)
        assert bool(((found >= 0) & (found <= 1 + 1e-9)).all())
    flat = torch.full((1, 1, 8, 8), 0.3)
    assert am.aic(network, flat, torch.rand(1, 8, 8)) == pytest.approx(1.0)  # nothing is ever hidden
    with pytest.raises(InputError, match="no images"):
        am.sic(share, torch.ones(4), torch.ones(4), 0)


def test_what_one_logit_means():
    torch.manual_seed(0)
    one = nn.Linear(4, 1)
    two = nn.Linear(4, 2)
    with torch.no_grad():
        two.weight.copy_(torch.cat([-one.weight / 2, one.weight / 2]))
        two.bias.copy_(torch.cat([-one.bias / 2, one.bias / 2]))
    x, m = torch.rand(5, 4), torch.rand(5, 4)
    for target in (None, 0, 1):
        for name in ("adp", "insertion", "positive"):
            assert getattr(am, name)(one, x, m, target) == pytest.approx(getattr(am, name)(two, x, m, target), abs=1e-4)


def test_a_batch_is_the_mean_of_its_rows_and_memory_changes_nothing():
    network, x, m = net(), images(), torch.rand(3, 8, 8)
    for name in NAMES:
        score = getattr(am, name)
        each = [score(network, x[i], m[i], 1) for i in range(3)]
        assert score(network, x, m, 1) == pytest.approx(np.mean(each), abs=1e-4)
        assert score(network, x, m, 1, memory=20_000) == pytest.approx(np.mean(each), abs=1e-4)
        assert score(network, x[:1], m[0], 1) == pytest.approx(each[0], abs=1e-4)
        assert score(network, x[0], m[:1], 1) == pytest.approx(each[0], abs=1e-4)


def test_how_many_rows_a_score_costs():
    for name in NAMES:
        asked = []

        def model(x, asked=asked):
            asked.append(len(x))
            return torch.cat([share(x), 1 - share(x)], dim=1)

        view = ModelView(model)
        target, plain = am.target_probabilities(view, images(1), 0)
        asked.clear()
        am.attribution_scores(name, view, images(1), torch.rand(1, 8, 8), target, steps=6, plain=plain)
        assert sum(asked) == am.rows_per_score(name, 6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(("insertion", "deletion", "positive", "negative", "adp", "pic")))
def test_any_map_of_any_table(seed, name):
    generator = torch.Generator().manual_seed(seed)
    x, m = torch.randn(3, 6, generator=generator), torch.rand(3, 6, generator=generator)
    model = nn.Linear(6, 3)
    found = am.attribution_scores(name, model, x, m, steps=6)
    limit = 100 if name in ("adp", "pic") else 1
    assert bool(((found >= 0) & (found <= limit + 1e-6)).all())
    if name not in ("adp", "pic"):  # only ranks matter
        assert torch.equal(found, am.attribution_scores(name, model, x, m.exp(), steps=6))


def test_errors_say_what_was_given():
    x, m = images(), torch.rand(3, 8, 8)
    with pytest.raises(InputError, match="no metric called 'road'"):
        am.attribution_scores("road", net(), x, m)
    with pytest.raises(InputError, match="maps must be"):
        am.adp(net(), x, torch.rand(3, 4, 4))
    with pytest.raises(InputError, match="NaN"):
        am.adp(net(), x, m * math.nan)
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        am.pic(net(), x, m + 1)
    with pytest.raises(InputError, match="target must be"):
        am.adp(net(), x, m, 7)
    with pytest.raises(InputError, match="steps"):
        am.insertion(net(), x, m, steps=0)
    with pytest.raises(InputError, match="removed"):
        am.adp(net(), x, m, removed="grey")
    with pytest.raises(InputError, match="removed has shape"):
        am.adp(net(), x, m, removed=torch.ones(5))
    with pytest.raises(InputError, match="finite"):
        am.adp(net(), x, m, removed=math.nan)
    with pytest.raises(InputError, match="can be blurred"):
        am.adp(share, torch.ones(2, 4), torch.ones(2, 4), 0, removed="blur")


def test_classes_by_name_and_whole_numbers_are_taken():
    x, y = load_iris(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    model, maps = LogisticRegression(max_iter=500).fit(x, names), np.random.default_rng(0).random((5, 4))
    assert am.deletion(model, x[:5], maps, "b") == am.deletion(model, x[:5], maps, 1)
    assert am.deletion(model, x[48:53], maps, names[48:53]) == am.deletion(
        model, x[48:53], maps, torch.as_tensor(y[48:53])
    )
    with pytest.raises(InputError, match="target names z; the model's classes are a, b, c"):
        am.deletion(model, x[:5], maps, "z")
    with pytest.raises(InputError, match="not named"):
        am.deletion(nn.Linear(4, 3), torch.ones(2, 4), torch.rand(2, 4), ["a", "b"])
    whole = torch.randint(0, 4, (3, 4))  # a half-kept 3 is 1.5, not 0
    weight = nn.Linear(4, 3)
    assert am.adp(weight, whole, torch.full((3, 4), 0.5)) == am.adp(weight, whole.float(), torch.full((3, 4), 0.5))
