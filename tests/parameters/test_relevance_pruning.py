import copy
import itertools
import sys
import types
import warnings
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.masks import apply_mask
from theodolite.core.train import Recipe, train
from theodolite.parameters.relevance_pruning import (
    CRITERIA,
    RelevanceError,
    RelevancePruner,
    UnsupportedLayerError,
    compare_criteria,
    draw_reference,
    prune_units,
    rank_agreement,
    relevance,
    unit_scores,
)

LABELS = torch.arange(50) % 10


def classifier(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        *([nn.BatchNorm2d(8)] if norm else []),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]
    layers += [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if norm:
        net(torch.randn(200, 1, 16, 16))
    return net.eval()


def images(n=50, seed=1):
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def by_hand(W, a, R):
    """Alpha 1, beta 0 with a loop over every pair, in double precision."""
    out = np.zeros_like(a)
    for j in range(len(R)):
        share = [max(a[i] * W[j, i], 0.0) for i in range(len(a))]
        if (total := sum(share)) > 0:
            out += np.array(share) / total * R[j]
    return out


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=4), seed=st.integers(0, 999))
def test_dense_relevance_is_the_sum_over_every_pair(sizes, seed):
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())][:-1]
    net, x = nn.Sequential(*layers), torch.randn(1, sizes[0])
    y = seed % sizes[-1]
    inputs, h = [], x
    for layer in net:
        if isinstance(layer, nn.Linear):
            inputs.append(h[0].detach().double().numpy())
        h = layer(h)
    last = h[0].detach().double().numpy()
    R = np.where(np.arange(sizes[-1]) == y, last, 0) if sizes[-1] > 1 else last
    found = relevance(net, x, [y])
    dense = [i for i, layer in enumerate(net) if isinstance(layer, nn.Linear)]
    for i, a in zip(reversed(dense), reversed(inputs), strict=True):
        assert np.allclose(found[str(i)][0], R, atol=1e-4 * max(1.0, np.abs(R).max()))
        R = by_hand(net[i].weight.detach().double().numpy(), a, R)
    assert np.allclose(found["input"][0], R, atol=1e-4 * max(1.0, np.abs(R).max()))


def test_a_convolution_is_the_dense_layer_that_it_is():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(1, 2, 5, 5)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    found = relevance(net, x, [2])
    basis = torch.eye(50).view(50, 2, 5, 5)
    W = F.conv2d(basis, conv.weight, stride=2, padding=1).flatten(1).T.detach().double().numpy()
    wanted = by_hand(W, x.flatten().double().numpy(), found["0"].flatten().double().numpy())
    assert np.allclose(found["input"].flatten(), wanted, atol=1e-5)


def test_relevance_is_conserved_in_every_layer():
    net, x = classifier(), images()
    start = net(x).detach().gather(1, LABELS[:, None]).sum()
    found = relevance(net, x, LABELS)
    assert set(found) == {"input", "0", "3", "8", "10"}
    for R in found.values():
        assert float((R.sum() - start).abs() / start.abs()) <= 1e-4
        assert torch.allclose(R.flatten(1).sum(1), net(x).detach().gather(1, LABELS[:, None])[:, 0], atol=1e-5)
    one = relevance(net, x, LABELS, start="one")
    assert all(abs(float(R.sum()) - 50) <= 5e-3 for R in one.values())


def test_a_batch_norm_counts_as_a_part_of_its_layer():
    net, x = classifier(norm=True), images()
    folded = nn.Sequential(nn.utils.fuse_conv_bn_eval(net[0], net[1]), *list(net)[2:]).eval()
    ours, wanted = relevance(net, x, LABELS), relevance(folded, x, LABELS)
    assert torch.allclose(ours["0"], wanted["0"], atol=1e-6)
    assert torch.allclose(ours["input"], wanted["input"], atol=1e-6)
    for criterion in ("lrp", "taylor", "gradient"):
        a, b = (unit_scores(model, (x, LABELS), criterion=criterion) for model in (net, folded))
        assert torch.allclose(a["0"], b["0"], rtol=1e-4, atol=1e-5)


def test_relevance_is_that_of_zennit(monkeypatch):
    if find_spec("torchvision") is None:  # zennit names its blocks on import, and nothing here uses them
        for name in ("torchvision", "torchvision.models", "torchvision.models.resnet"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for block in ("Bottleneck", "BasicBlock"):
            monkeypatch.setattr(sys.modules["torchvision.models.resnet"], block, type(block, (), {}), raising=False)
    pytest.importorskip("zennit", reason="the peer zennit is not installed")
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon, Norm, Pass, ZPlus

    net, x = classifier(), images()
    for rule, dense in (("zplus", ZPlus(stabilizer=1e-9, zero_params="bias")), ("epsilon", Epsilon(1e-6))):
        layer_map = [
            (nn.ReLU, Pass()),
            (nn.AvgPool2d, Norm(stabilizer=1e-9)),
            (nn.Conv2d, ZPlus(stabilizer=1e-9, zero_params="bias")),
            (nn.Linear, dense),
        ]
        plain = copy.deepcopy(net)
        plain[1].inplace = False
        caught = {}
        with LayerMapComposite(layer_map).context(plain) as modified:
            given = x.clone().requires_grad_(True)
            hooks = [
                plain[i].register_forward_hook(
                    lambda m, a, out, i=i, caught=caught: (out.register_hook(lambda g: caught.update({i: g})), None)[1]
                )
                for i in (0, 3, 8, 10)
            ]
            out = modified(given)
            out.backward(gradient=out.detach() * F.one_hot(LABELS, 10))
            for hook in hooks:
                hook.remove()
        found = relevance(net, x, LABELS, rule={"linear": rule})
        largest = max(float(R.abs().max()) for R in found.values())
        assert float((found["input"] - given.grad).abs().max()) <= 1e-6 * largest
        assert set(caught) == {0, 3, 8, 10}
        for i, R in caught.items():
            assert float((found[str(i)] - R).abs().max()) <= 1e-6 * largest


def test_epsilon_is_its_formula_with_the_bias():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    found = relevance(net, x, [0, 2], rule="epsilon")["input"]
    z = net(x).detach()
    for row, y in enumerate((0, 2)):
        wanted = x[row] * net[0].weight[y].detach() / z[row, y] * z[row, y]
        assert torch.allclose(found[row], wanted, atol=1e-5)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        h = self.stem(x).relu()
        h = torch.cat([h + self.one(h).relu_(), self.two(h).relu()], dim=1)
        return self.out(h.mean(dim=(2, 3)))


def test_branches_share_what_arrives_and_do_not_double_it():
    torch.manual_seed(0)
    net, x = Branches().eval(), images(6)
    for layer in (net.one, net.two):
        layer.weight.data.abs_()  # relevance is lost where a unit is active by its bias alone
        layer.bias.data.zero_()
    start = net(x).detach()[:, 1].sum()
    found = relevance(net, x, torch.ones(6, dtype=torch.long))
    assert torch.allclose(found["stem"].sum(), start, rtol=1e-4)
    assert torch.allclose(found["input"].sum(), start, rtol=1e-4)
    h = net.stem(x).relu().detach()
    branch, other = net.one(h).relu().detach(), net.two(h).relu().detach()
    features = torch.cat([h + branch, other], dim=1).mean((2, 3))
    positive = features * net.out.weight[1].detach().clamp(min=0)
    R = positive / positive.sum(1, keepdim=True) * net(x).detach()[:, 1:2]  # at the pooled features
    spread = torch.cat([h + branch, other], dim=1) / features[:, :, None, None] / 196 * R[:, :, None, None]
    assert torch.allclose(found["two"], spread[:, 4:].nan_to_num(), atol=1e-5)
    assert torch.allclose(found["one"], spread[:, :4].nan_to_num() * (branch / (h + branch)).nan_to_num(), atol=1e-5)


def test_the_mode_the_numbers_and_the_chunks_do_not_matter():
    net, x = classifier(norm=True).train(), images()
    state = copy.deepcopy(net.state_dict())
    whole = relevance(net, x, LABELS)
    parts = relevance(net, x, LABELS, memory=300_000)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    for criterion in CRITERIA:
        once = unit_scores(net, (x, LABELS), criterion=criterion)
        loader = [(x[:20], LABELS[:20]), (x[20:], LABELS[20:])]
        again = unit_scores(net, loader, criterion=criterion, memory=300_000)
        assert all(torch.allclose(once[name], again[name], rtol=1e-4, atol=1e-6) for name in once)
        assert list(once) == ["0", "4", "9"]
    assert all(not R.requires_grad for R in whole.values())


def test_scores_are_their_formulas():
    net, x = classifier(), images()
    kept = {}
    for i in (0, 3, 8):
        net[i].register_forward_hook(lambda m, a, out, i=i: (kept.update({i: out}), out.clone())[1])
    loss = F.cross_entropy(net(x), LABELS)
    gradients = dict(zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True))
    for layer in net:
        layer._forward_hooks.clear()
    found = {criterion: unit_scores(net, (x, LABELS), criterion=criterion) for criterion in CRITERIA}
    for i, g in gradients.items():
        axes = [d for d in range(g.ndim) if d != 1]
        for criterion, value in (("taylor", kept[i].detach() * g), ("gradient", g)):
            wanted = value.mean(axes).abs()
            assert torch.allclose(found[criterion][str(i)], wanted / wanted.norm(), rtol=1e-4, atol=1e-6)
        incoming = net[i].weight.detach().abs().flatten(1).sum(1)
        assert torch.allclose(found["weight"][str(i)], incoming / incoming.sum())
        R = relevance(net, x, LABELS)[str(i)]
        assert torch.allclose(found["lrp"][str(i)], R.sum(axes), rtol=1e-4, atol=1e-5)
        absolute = unit_scores(net, (x, LABELS), abs=True)[str(i)]
        assert torch.allclose(absolute, R.abs().sum(axes), rtol=1e-4, atol=1e-5)
    for frozen in (net.requires_grad_(False), net.requires_grad_(True)):
        again = unit_scores(frozen, (x, LABELS), criterion="taylor")
        assert torch.allclose(again["0"], found["taylor"]["0"], atol=1e-6)
    other = unit_scores(net, (x, LABELS), criterion="random", seed=1)
    assert not torch.equal(other["0"], found["random"]["0"])


def test_conservation_makes_a_normalisation_needless():
    net, x = classifier(), images()
    scores = unit_scores(net, (x, LABELS))
    sums = torch.stack([score.sum() for score in scores.values()])
    assert torch.allclose(sums, sums[0].expand(3), rtol=1e-4)
    divided = {name: score / score.sum() * sums[0] for name, score in scores.items()}
    a, b = (prune_units(net, s, amount=18) for s in (scores, divided))
    assert all(torch.equal(a.rows[name], b.rows[name]) for name in a.rows)


def test_relevance_starts_at_the_true_class_and_not_at_the_predicted_one():
    net, x = classifier(), images(4)
    predicted = net(x).argmax(1)
    others = (predicted + 1) % 10
    assert not torch.allclose(relevance(net, x, predicted)["input"], relevance(net, x, others)["input"])
    R = relevance(net, x, others)["10"]
    assert torch.equal(R.nonzero()[:, 1], others)


def test_one_output_is_its_own_start():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(20, 3)
    for y in (torch.randn(20), torch.arange(20) % 2):
        found = relevance(net, x, y)
        assert torch.equal(found["2"], net(x).detach())
        for criterion in CRITERIA:
            assert unit_scores(net, (x, y), criterion=criterion)["0"].shape == (8,)
    result = RelevancePruner(amount=3, step=None).fit(net, x, torch.randn(20))
    assert result.model[0].out_features == 5
    assert result.n_reference == 10


def test_a_layer_that_is_used_twice_is_told_twice_and_scored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.loop, self.out = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.out(self.loop(self.loop(self.first(x).relu()).relu()).relu())

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(4, 3)
    found = relevance(net, x, [0, 1, 0, 1])
    assert {"loop", "loop@2"} <= set(found)
    scores = unit_scores(net, (x, [0, 1, 0, 1]))["loop"]
    assert torch.allclose(scores, found["loop"].sum(0) + found["loop@2"].sum(0), atol=1e-5)


# ---- pruning


def two_moons(n=300):
    from sklearn.datasets import make_moons

    x, y = make_moons(n, noise=0.1, random_state=0)
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def small_net(x, y):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    train(net, x, y, recipe=Recipe(epochs=30, batch_size=50, lr=0.05, optimizer="sgd", momentum=0.9))
    return net


def test_pruning_in_steps_gives_the_mask_of_the_smaller_network():
    x, y = two_moons()
    net = small_net(x, y)
    before = copy.deepcopy(net.state_dict())
    result = RelevancePruner(amount=0.4, step=0.1, n_per_class=5).fit(net, x, y)
    assert result.curve["fraction_units"].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert result.mask.removed == 20
    assert result.n_reference == len(result.reference) == 10
    assert result.seconds > 0
    assert not result.was_training
    with apply_mask(net, result.mask), torch.no_grad():
        assert torch.allclose(net(x), result.model(x), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    parameters = sum(p.numel() for p in result.model.parameters()) / sum(p.numel() for p in net.parameters())
    assert result.curve["fraction_params"].iloc[-1] == pytest.approx(1 - parameters)
    curve = result.quality_curve(chance=0.5)
    assert curve.dimensions == (30, 35, 40, 45, 50)
    assert curve.reference == result.curve["accuracy"].iloc[0]
    again = RelevancePruner(amount=0.4, step=0.1, n_per_class=5).fit(net, x, y)
    assert again.curve.equals(result.curve)
    with pytest.raises(AttributeError, match="cannot assign"):
        result.seconds = 0.0


def test_fine_tuning_helps_and_needs_rows_of_its_own():
    x, y = two_moons()
    net = small_net(x, y)
    plain = RelevancePruner("random", 0.8, None).fit(net, x, y, test=(x, y))
    recipe = Recipe(epochs=20, batch_size=50, lr=0.05, optimizer="sgd", momentum=0.9)
    tuned = RelevancePruner("random", 0.8, None, fine_tune=recipe).fit(net, x, y, test=(x, y))
    assert tuned.curve["loss"].iloc[-1] < plain.curve["loss"].iloc[-1]
    seen = []
    RelevancePruner(amount=0.4, step=0.2, fine_tune=seen.append).fit(net, x, y, test=(x, y))
    assert [model[0].out_features + model[2].out_features for model in seen] == [40, 30]
    with pytest.raises(InputError, match="test="):
        RelevancePruner(fine_tune=recipe).fit(net, x, y)


def test_criteria_are_compared_on_the_same_draws():
    x, y = two_moons()
    compared = compare_criteria(small_net(x, y), (x, y), (x, y), [0, 0.4], repeats=3, n_per_class=5)
    table = compared.table.set_index(["criterion", "amount"])
    assert set(compared.table["criterion"]) == set(CRITERIA)
    assert len(compared.runs) == 2 * 5 * 3
    assert table.loc[("weight", 0.4), "accuracy_sd"] == 0
    mine = compared.runs.query("criterion == 'lrp' and amount == 0.4")["accuracy"]
    assert table.loc[("lrp", 0.4), "accuracy"] == pytest.approx(mine.mean())
    assert table.loc[("lrp", 0.4), "accuracy_sd"] == pytest.approx(mine.std(ddof=1))
    assert table.loc[("lrp", 0.0), "fraction_units"] == 0
    best = compared.table[compared.table["amount"] == 0.4]["accuracy"].max()
    assert table.loc[(compared.winner(0.4), 0.4), "accuracy"] == best
    with pytest.raises(InputError, match="was not compared"):
        compared.winner(0.3)


def test_rankings_agree_with_themselves():
    a = {"0": torch.rand(200), "2": torch.rand(100)}
    same = rank_agreement(a, {name: score * 2 for name, score in a.items()})
    assert same.spearman == pytest.approx(1)
    assert same.kendall == pytest.approx(1)
    assert same.first == same.last == {125: 1.0, 250: 1.0}
    opposite = rank_agreement(a, {name: -score for name, score in a.items()}, k=[100])
    assert opposite.spearman == pytest.approx(-1)
    assert opposite.first == {100: 0.0}
    with pytest.raises(InputError, match="same units"):
        rank_agreement(a, {"0": a["0"]})
    with pytest.raises(InputError, match="different"):
        rank_agreement(a, {name: torch.ones_like(score) for name, score in a.items()})


def test_reference_rows_are_drawn_by_class():
    y = torch.tensor([0] * 30 + [1] * 3 + [2] * 30)
    rows = draw_reference(y, 5, seed=3)
    assert np.bincount(y[rows]).tolist() == [5, 3, 5]
    assert np.array_equal(rows, draw_reference(y, 5, seed=3))
    assert not np.array_equal(rows, draw_reference(y, 5, seed=4))
    assert len(draw_reference(torch.rand(40), 7, seed=0)) == 7


# ---- errors


def test_a_class_without_rows_is_named():
    net, x = classifier(), images(8)
    with pytest.warns(UserWarning, match=r"2 of 10 classes have no reference row: 8, 9"):
        unit_scores(net, (x, torch.arange(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unit_scores(net, (x, torch.arange(8)), criterion="weight")["0"].shape == (8,)


def test_arrays_and_tables_are_rows_too():
    x, y = two_moons()
    net = small_net(x, y)
    wanted = unit_scores(net, (x[:20], y[:20]))
    table = pd.DataFrame(x[:20].double().numpy())
    table.to_numpy().flags.writeable = False
    for rows, labels in (
        (x[:20].double().numpy(), y[:20].numpy()),
        (table, pd.Series(y[:20].tolist(), index=range(5, 25))),
    ):
        found = unit_scores(net, (rows, labels))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert torch.equal(relevance(net, rows, labels)["0"], relevance(net, x[:20], y[:20])["0"])
        assert RelevancePruner(amount=0.3, n_per_class=2).fit(net, rows, labels).n_reference == 4
    with pytest.raises(DataError, match="turn names into indices"):
        relevance(net, x[:2], ["left", "right"])


def test_wrong_data_are_refused():
    net, x = classifier(), images()
    cases = [
        (LABELS + 1, r"0\.\.9.*1\.\.10"), (LABELS - 1, r"-1\.\.8"), (LABELS[:5], "one target"), (LABELS * 0.5, "whole"),
    ]  # fmt: skip
    for y, message in cases:
        with pytest.raises(ValueError, match=message):
            relevance(net, x, y)
        with pytest.raises(ValueError, match=message):
            unit_scores(net, (x, y), criterion="taylor")
    for data in ((x[:0], LABELS[:0]), []):
        with pytest.raises(DataError, match="at least one"):
            unit_scores(net, data)
    with pytest.raises(DataError, match="loader"):
        unit_scores(net, [x])
    with pytest.raises(DataError, match="finite"):
        relevance(net, x * torch.nan, LABELS)
    with pytest.raises(DataError, match="reference row"):
        draw_reference(LABELS, 0, seed=0)
    with pytest.raises(DataError, match="every row"):
        RelevancePruner(n_per_class=99).fit(net, x, LABELS)


def test_wrong_options_are_refused():
    net, x = classifier(), images()
    for option, message in [
        ({"criterion": "magic"}, "lrp, weight"),
        ({"rule": "gamma"}, "zplus"),
        ({"rule": {"conv": "nothing"}}, "zplus"),
        ({"start": "two"}, "logit"),
        ({"layers": "nowhere"}, "there are 0, 3, 8"),
    ]:
        with pytest.raises(InputError, match=message):
            unit_scores(net, (x, LABELS), **option)
    with pytest.raises(InputError, match="zplus or epsilon"):
        relevance(net, x, LABELS, rule={"conv": "pass"})
    with pytest.raises(InputError, match="proportional, pass or winner"):
        relevance(net, x, LABELS, rule={"ReLU": "zplus"})
    for amount in (88, 1.0, 0, 0.0):
        with pytest.raises(InputError, match="from 1 to 87"):
            RelevancePruner(amount=amount, n_per_class=2).fit(net, x, LABELS)
    with pytest.raises(InputError, match="step"):
        RelevancePruner(step=1.5).fit(net, x, LABELS)
    with pytest.raises(InputError, match="repeats"):
        compare_criteria(net, (x, LABELS), (x, LABELS), [])


def test_a_layer_without_a_rule_is_named_and_can_be_given_one():
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=1), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with pytest.raises(UnsupportedLayerError, match=r"no relevance rule for Softmax at 1; pass rule="):
        relevance(net, x, [0, 1, 0, 1, 0])
    found = relevance(net, x, [0, 1, 0, 1, 0], rule={"Softmax": "pass"})
    assert torch.allclose(found["0"].sum(), found["2"].sum(), rtol=1e-4)
    by_name = relevance(net, x, [0, 1, 0, 1, 0], rule={"1": "pass"})
    assert torch.equal(by_name["0"], found["0"])
    with pytest.raises(UnsupportedLayerError, match="Flatten at 0 cannot be passed on"):
        relevance(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(2, 2, 2), [0, 1], rule={"Flatten": "pass"})
    halves = Halves()
    with pytest.raises(UnsupportedLayerError, match="chunk"):
        relevance(halves, torch.randn(2, 4), [0, 1])
    with pytest.raises(UnsupportedLayerError, match="one of several tensors"):
        relevance(halves, torch.randn(2, 4), [0, 1], rule={"chunk": "winner"})


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 2)

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        return self.out(a + b)


def test_relevance_that_is_not_finite_names_the_layer():
    net, x = classifier(), images()
    with torch.no_grad():
        net[3].weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="below 10"):
        relevance(net, x, LABELS)
    assert issubclass(RelevanceError, FloatingPointError)


def test_weights_under_a_parametrization_are_refused():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="remove_parametrizations"):
        relevance(net, torch.randn(2, 3), [0, 1])
