import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.masks import apply_mask, coupled_units, footprint, prune_units, remove_units
from theodolite.core.masks.trace import record


class Block(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(width, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.depth, self.norm2 = nn.Conv2d(10, 20, 3, padding=1, groups=10), nn.BatchNorm2d(20)
        self.two, self.norm3 = nn.Conv2d(20, width, 1), nn.BatchNorm2d(width)
        self.activation = activation

    def forward(self, x):
        h = self.activation(self.norm1(self.one(x)))
        h = self.activation(self.norm2(self.depth(h)))
        return self.activation(x + self.norm3(self.two(h)))


class Residual(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.stem, self.block = nn.Conv2d(2, 6, 3, padding=1), Block(6, activation)
        self.side = nn.Conv2d(2, 5, 3, padding=1)
        self.pool, self.dense, self.out = nn.MaxPool2d(2), nn.Linear(11 * 9, 8), nn.Linear(8, 3)
        self.activation = activation

    def forward(self, x, scale=None):
        h = self.block(self.activation(self.stem(x)))
        h = torch.cat([h, self.activation(self.side(x))], dim=1)
        if scale is not None:
            h = h * scale
        h = self.pool(h)
        assert h.shape[1] == self.block.one.in_channels + self.side.out_channels
        return self.out(self.activation(self.dense(h.view(h.size(0), -1))))


def trained(model, *shape):
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(40, *shape) + 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1, 1)
                module.bias.uniform_(-1, 1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Sigmoid(), nn.ReLU6()])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_masked_and_the_reduced_network_are_the_same_function(activation, scope):
    torch.manual_seed(0)
    model, x = trained(Residual(activation), 2, 6, 6), torch.randn(7, 2, 6, 6)
    scores = {name: torch.rand(len(rows)) for name, rows in coupled_units(model, x).rows.items() if "norm" not in name}
    scores.pop("out")
    mask = prune_units(model, scores, amount=0.4, scope=scope, example_input=x)
    before = model(x)
    with apply_mask(model, mask):
        masked = model(x)
    smaller = remove_units(model, mask, x)
    assert float((smaller(x) - masked).abs().max()) <= 1e-5
    assert float((masked - before).abs().max()) > 1e-3
    assert torch.equal(model(x), before)
    assert mask.removed == round(0.4 * mask.total) or scope == "layer"
    assert footprint(smaller, x).parameters < footprint(model, x).parameters
    assert smaller.block.depth.groups == smaller.block.one.out_channels
    assert smaller.stem.out_channels == smaller.block.two.out_channels == smaller.block.norm3.num_features
    assert smaller.training == model.training


def test_what_is_added_or_depthwise_is_one_unit():
    model = trained(Residual(nn.ReLU()), 2, 6, 6)
    found = coupled_units(model, torch.randn(1, 2, 6, 6))
    assert torch.equal(found.rows["stem"], found.rows["block.two"])
    assert torch.equal(found.rows["block.depth"], found.rows["block.one"].repeat_interleave(2))
    assert found.units == 6 + 10 + 5 + 8
    assert found.columns["dense"].tolist() == [
        unit for unit in [*found.rows["stem"].tolist(), *found.rows["side"].tolist()] for _ in range(9)
    ]
    assert (found.rows["out"] == -1).all()
    assert "output" in found.fixed["out"]
    assert (found.columns["stem"] == -1).all()


def test_a_coupled_unit_has_the_sum_of_its_scores_and_ties_go_by_layer_and_index():
    model = trained(Residual(nn.ReLU()), 2, 6, 6)
    x = torch.randn(1, 2, 6, 6)
    scores = {"stem": torch.tensor([5.0, 1, 1, 1, 1, 1]), "block.two": torch.tensor([-5.0, 1, 1, 1, 1, 0])}
    mask = prune_units(model, scores, amount=3, example_input=x)
    assert mask.rows["stem"].tolist() == [False, False, True, True, True, False]
    assert mask.rows["side"].all()


def test_amounts_are_exact_and_a_layer_keeps_one_output():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    scores = {"0": torch.zeros(4), "2": torch.ones(6)}
    mask = prune_units(net, scores, amount=5)
    assert mask.removed == 5
    assert mask.rows["0"].tolist() == [False, False, False, True]
    assert int((~mask.rows["2"]).sum()) == 2
    half = prune_units(net, scores, amount=5, max_layer_fraction=0.5)
    assert [int((~half.rows[name]).sum()) for name in ("0", "2")] == [2, 3]
    assert prune_units(net, scores, amount=0).removed == 0
    for amount, message in [(10, "at most 9"), (9, "at most 8"), (1.0, "below 1"), (-1, "amount"), (True, "amount")]:
        with pytest.raises(InputError, match=message):
            prune_units(net, scores, amount=amount)
    assert prune_units(net, scores, amount=8).removed == 8


@settings(max_examples=30, deadline=None)
@given(widths=st.lists(st.integers(2, 7), min_size=1, max_size=3), seed=st.integers(0, 99), share=st.floats(0, 0.6))
def test_any_chain_is_reduced_to_its_masked_self(widths, seed, share):
    torch.manual_seed(seed)
    sizes = [3, *widths, 2]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    net, x = nn.Sequential(*layers[:-1]), torch.randn(5, 3)
    scores = {str(2 * i): torch.rand(width) for i, width in enumerate(widths)}
    removable = sum(width - 1 for width in widths)
    amount = min(round(share * sum(widths)), removable)
    mask = prune_units(net, scores, amount=amount)
    smaller = remove_units(net, mask, x)
    with apply_mask(net, mask), torch.no_grad():
        assert torch.allclose(net(x), smaller(x), atol=1e-5)
    assert sum(m.out_features for m in smaller if isinstance(m, nn.Linear)) == sum(widths) - amount + 2
    kept = [m.out_features for m in smaller if isinstance(m, nn.Linear)]
    assert min(kept) >= 1


def test_masks_in_a_row_are_one_mask_of_the_first_network():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2)), torch.randn(5, 3)
    first = prune_units(net, {"0": torch.rand(9), "2": torch.rand(7)}, amount=5)
    smaller = remove_units(net, first)
    second = prune_units(smaller, {name: torch.rand(int(first.rows[name].sum())) for name in ("0", "2")}, amount=4)
    both = first.then(second)
    assert both.removed == 9
    assert both.fraction == 9 / 16
    assert torch.equal(remove_units(net, both)(x), remove_units(smaller, second)(x))
    with pytest.raises(InputError, match="does not fit"):
        second.then(first)


def test_flattened_positions_of_linear_layers_are_read_in_their_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2))  # five positions of four units
    x = torch.randn(6, 5, 3)
    mask = prune_units(net, {"0": torch.tensor([1.0, 0, 3, 2])}, amount=2, example_input=x)
    assert mask.columns["3"].tolist() == [False, False, True, True] * 5
    smaller = remove_units(net, mask, x)
    with apply_mask(net, mask):
        assert torch.allclose(net(x), smaller(x), atol=1e-6)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 2, 1)
        self.wide, self.shift = nn.Conv2d(6, 6, 1), nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x):
        h = self.wide(self.two(self.one(x))) + self.shift
        return self.out(h).mean((2, 3))


def test_what_is_not_understood_stays_and_says_why():
    found = coupled_units(Gated(), torch.randn(1, 1, 6, 6))
    assert found.units == 0
    assert found.prunable == ()
    assert "groups" in found.fixed["one"]
    assert "groups" in found.fixed["two"]
    assert "add" in found.fixed["wide"]
    normed = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    assert "LayerNorm" in coupled_units(normed).fixed["0"]
    assert coupled_units(normed).prunable == ("2",)
    with pytest.raises(InputError, match="LayerNorm"):
        prune_units(normed, {"0": torch.ones(4)}, amount=1)
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    tied[2].weight = tied[0].weight
    assert "shared" in coupled_units(tied).fixed["0"]
    assert coupled_units(tied).units == 0
    weighed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    assert "parametrization" in coupled_units(weighed).fixed["0"]


def test_a_layer_that_is_used_twice_is_cut_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.loop, self.out = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.out(self.loop(self.loop(self.first(x).relu()).relu()).relu())

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(4, 3)
    assert coupled_units(net).units == 5
    mask = prune_units(net, {"loop": torch.rand(5)}, amount=2)
    smaller = remove_units(net, mask, x)
    assert smaller.loop.weight.shape == (3, 3)


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Linear(16, 2)

    def forward(self, x):
        return self.out(self.conv(x).relu().view(-1, 16))


def test_errors_say_what_is_wrong():
    net, x = Written(), torch.randn(2, 1, 4, 4)
    mask = prune_units(net, {"conv": torch.rand(4)}, amount=1)
    with pytest.raises(ModelError, match="widths written into it"):
        remove_units(net, mask, x)
    other = nn.Sequential(nn.Linear(2, 2))
    for act in (apply_mask, remove_units):
        with pytest.raises(ModelError, match="another network"):
            act(other, mask)
    wider = Written()
    wider.conv = nn.Conv2d(1, 5, 3)
    with pytest.raises(ModelError, match="5 outputs, the mask 4"):
        apply_mask(wider, mask)
    for scores, message in [
        ({"no": torch.ones(4)}, "is no linear"),
        ({"conv": torch.ones(5)}, "4 outputs"),
        ({"conv": torch.full((4,), torch.nan)}, "finite"),
        ({"out": torch.ones(2)}, "network's output"),
        ({}, "can be removed"),
    ]:
        with pytest.raises(InputError, match=message):
            prune_units(net, scores, amount=1)
    for option in ({"scope": "all"}, {"max_layer_fraction": 0.0}, {"max_layer_fraction": 2.0}):
        with pytest.raises(InputError, match=next(iter(option))):
            prune_units(net, {"conv": torch.ones(4)}, amount=1, **option)
    with pytest.raises(ModelError, match="no linear or convolutional"):
        coupled_units(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match="example_input"):
        coupled_units(Residual(nn.ReLU()))

    class Counts(nn.Module):
        def forward(self, x):
            return x * float(x.mean())

    with pytest.raises(ModelError, match="cannot be followed"):
        record(Counts(), x)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ModelError, match="one tensor"):
        record(Pair(), x)


def test_a_mask_for_good_keeps_a_batch_norm_silent():
    torch.manual_seed(0)
    net = trained(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)), 1, 4, 4)
    x = torch.randn(3, 1, 4, 4)
    apply_mask(net, prune_units(net, {"0": torch.arange(4.0)}, amount=2))
    assert torch.equal(net[1](net[0](x))[:, :2], torch.zeros(3, 2, 2, 2))
    assert (net[3].weight[:, :8] == 0).all()


def test_sizes_are_counted():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    found = footprint(net, torch.randn(3, 2, 4, 4))
    assert found.parameters == 4 * 9 + 4 + 8 + 16 * 5 + 5
    assert found.macs == 4 * 4 * 9 + 16 * 5


def test_recording_leaves_the_network_as_it_is():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    found = record(net, x)
    assert net[1].inplace
    assert [operation.kind for operation in found.operations] == ["input", "linear", "relu", "linear"]
    assert torch.equal(found.operations[1].value, net[0](x))
    assert torch.equal(found.output.meta["value"], net(x))
