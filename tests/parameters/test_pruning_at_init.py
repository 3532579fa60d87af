import itertools
import warnings

import pytest
import torch
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.train import Recipe, train, train_ensemble
from theodolite.parameters.pruning_at_init import (
    METHODS,
    LayerCollapseWarning,
    apply_masks,
    lottery_ticket,
    prune_at_init,
    pruning_scores,
)

F64 = torch.float64


def linear_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((4, 5, 3, 2))]).double()


def relu_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def rows(n=20, shape=(1, 6, 6), classes=3):
    torch.manual_seed(5)
    return torch.randn(n, *shape), torch.randint(0, classes, (n,))


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


# ---- scores


def test_snip_is_weight_times_gradient_of_the_mean_loss():
    net, (x, y) = linear_net(), rows(9, (4,), 2)
    x = x.double()
    one, two, three = (layer.weight.detach() for layer in net)
    hidden = [x, x @ one.T, x @ one.T @ two.T]
    error = (torch.softmax(hidden[2] @ three.T, dim=1) - nn.functional.one_hot(y, 2)) / len(x)
    by_hand = {
        "2.weight": error.T @ hidden[2],
        "1.weight": (error @ three).T @ hidden[1],
        "0.weight": (error @ three @ two).T @ hidden[0],
    }
    scores = pruning_scores(net, "snip", data=(x, y))
    for name, gradient in by_hand.items():
        assert torch.allclose(scores[name], (net.get_parameter(name).detach() * gradient).abs(), rtol=1e-12)
    of_arrays = pruning_scores(net, "snip", data=(x.numpy(), y.tolist()))
    assert all(torch.equal(of_arrays[name], scores[name]) for name in scores)


def test_synflow_is_the_sum_over_all_paths_through_a_weight():
    net, (x, y) = linear_net(), rows(9, (4,), 2)
    weights = [layer.weight.detach().abs() for layer in net]
    wanted = [torch.zeros_like(weight) for weight in weights]
    for i, j, k, o in itertools.product(range(4), range(5), range(3), range(2)):
        path = weights[0][j, i] * weights[1][k, j] * weights[2][o, k]
        wanted[0][j, i] += path
        wanted[1][k, j] += path
        wanted[2][o, k] += path
    scores = pruning_scores(net, "synflow", data=(x, y))
    for found, paths in zip(scores.values(), wanted, strict=True):
        assert torch.allclose(found, paths, rtol=1e-12)
    # its conservation law: every layer carries the whole flow
    assert len({round(float(score.sum()), 9) for score in scores.values()}) == 1


def test_grasp_is_weight_times_hessian_times_gradient():
    net, (x, y) = linear_net(), rows(9, (4,), 2)
    x, names = x.double(), [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        out = x
        for piece, shape in zip(pieces, shapes, strict=True):
            out = out @ piece.view(shape).T
        return nn.functional.cross_entropy(out / 200, y)

    g, H = torch.autograd.functional.jacobian(loss, flat), torch.autograd.functional.hessian(loss, flat)
    wanted = flat * (H @ g)
    scores = pruning_scores(net, "grasp", data=(x, y))
    assert torch.allclose(torch.cat([scores[name].flatten() for name in names]), wanted, rtol=1e-9, atol=1e-18)


def test_batch_norm_is_scored_in_eval_mode_and_left_alone():
    net, data = relu_net().train(), rows()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for method in ("snip", "grasp", "synflow"):
        trained = pruning_scores(net, method, data=data)
        evaluated = pruning_scores(net.eval(), method, data=data)
        assert all(torch.equal(trained[name], evaluated[name]) for name in trained), method
        net.train()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_rows_are_summed_in_parts_within_the_memory(monkeypatch):
    net, data = relu_net(), rows()
    whole = {method: pruning_scores(net, method, data=data) for method in ("snip", "grasp")}
    monkeypatch.setattr("theodolite.core.memory.DEFAULT_BUDGET", 40_000)
    for method, scores in whole.items():
        parts = pruning_scores(net, method, data=data)
        assert all(torch.allclose(parts[name], score, rtol=1e-9, atol=1e-15) for name, score in scores.items())


# ---- masks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compression", [1, 1.7, 10])
def test_the_kept_count_is_exact_and_global(method, compression):
    net = relu_net()
    n = 36 + 640 + 30
    masks = prune_at_init(net, method, compression, data=rows(), rounds=7)
    assert kept(masks) == int(n / compression)
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: net.get_parameter(name).shape for name in ("0.weight", "4.weight", "6.weight")
    }
    if method in ("magnitude", "snip"):
        scores = pruning_scores(net, method, data=rows())
        inside = torch.cat([scores[name][mask] for name, mask in masks.items()])
        outside = torch.cat([scores[name][~mask] for name, mask in masks.items()])
        assert outside.numel() == 0 or float(inside.min()) >= float(outside.max())


def test_random_follows_its_seed():
    net = relu_net()
    one, same, other = (prune_at_init(net, "random", 2, seed=seed)["4.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_synflow_in_many_rounds_avoids_the_collapse_of_one():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise((300, 100, 100, 10))])
    data = (torch.randn(4, 300), torch.zeros(4).long())
    with pytest.warns(LayerCollapseWarning, match="no weight is left in 0.weight"):
        prune_at_init(net, "synflow", 1000, data=data, rounds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = prune_at_init(net, "synflow", 1000, data=data, rounds=100)
    assert kept(masks) == 41
    assert all(bool(mask.any()) for mask in masks.values())


def test_biases_take_no_part_in_synflow():
    torch.manual_seed(0)
    deep = nn.Sequential(*[layer for _ in range(40) for layer in (nn.Linear(20, 20), nn.ReLU())])
    data = (torch.randn(2, 20), torch.zeros(2).long())
    scores = pruning_scores(deep, "synflow", data=data)
    totals = [float(score.sum()) for score in scores.values()]
    assert max(totals) == pytest.approx(min(totals), rel=1e-9)  # every layer carries the whole flow
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept(prune_at_init(deep, "synflow", 20, data=data)) == 800


def test_pruned_weights_stay_zero_in_any_training_and_ensemble():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    masks = [prune_at_init(plain, "random", 3, seed=seed) for seed in (0, 1)]
    x, y = rows(40, (6,))
    recipe = Recipe(epochs=3, batch_size=8, lr=0.2, optimizer="sgd", seed=1)
    nets = [apply_masks(plain, mask) for mask in masks]
    together = train_ensemble(nets, x, y, recipe=recipe)
    alone = apply_masks(plain, masks[0])
    train(alone, x, y, recipe=Recipe(epochs=3, batch_size=8, lr=0.2, momentum=0.9, l2=0.01, optimizer="sgd", seed=1))
    train(nets[0], x, y, recipe=recipe)
    for name in ("0", "2"):
        weight, mask = alone.get_submodule(name).weight.detach(), masks[0][f"{name}.weight"]
        assert float(weight[~mask].abs().max()) == 0
        assert float((weight - plain.get_submodule(name).weight)[mask].detach().abs().min()) > 0
    assert torch.allclose(together.scores(x)[0], nets[0](x), atol=1e-5)


def test_tied_weights_share_mask_and_values():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    masks = prune_at_init(Tied(), "magnitude", 2)
    assert list(masks) == ["one.weight"]
    net = apply_masks(Tied(), masks)
    assert sum(p.numel() for p in net.parameters()) == 25
    assert torch.equal(net.one.weight, net.two.weight)
    assert int((net.two.weight != 0).sum()) == 12


# ---- lottery tickets


def test_a_ticket_keeps_the_largest_trained_weights_at_their_rewound_values():
    calls = []

    def fit(net, steps):
        calls.append(steps)
        with torch.no_grad():
            for p in net.parameters():
                p += 1.0 if steps is None else 0.25 * steps

    torch.manual_seed(0)
    plain = nn.Linear(10, 4, bias=False)
    ticket = lottery_ticket(plain, fit, 4, rounds=2, rewind_step=3)
    assert calls == [3, None, None]
    assert kept(ticket.masks) == 10
    rewound = plain.weight.detach() + 0.75
    order = (rewound + 1).abs().flatten().argsort(descending=True)[:10]
    assert set(ticket.masks["weight"].flatten().nonzero().ravel().tolist()) == set(order.tolist())
    assert torch.allclose(ticket.model.weight, rewound * ticket.masks["weight"])


# ---- errors


@pytest.mark.parametrize(
    ("method", "compression", "options", "said"),
    [
        ("best", 2, {}, "method is one of"),
        ("random", 0.5, {}, "at least 1"),
        ("random", float("nan"), {}, "at least 1"),
        ("synflow", 2, {"rounds": 0}, "at least one round"),
        ("snip", 2, {}, "looks at data"),
        ("synflow", 2, {}, "looks at data"),
        ("grasp", 2, {"data": (torch.ones(2, 1, 6, 6), torch.zeros(3).long())}, "2 rows and 3 targets"),
        ("synflow", 2, {"data": (torch.ones(2, 1, 6, 6).long(), torch.zeros(2).long())}, "real-valued"),
        ("snip", 2, {"data": (torch.full((2, 1, 6, 6), torch.nan), torch.zeros(2).long())}, "not finite"),
    ],
)
def test_what_cannot_be_pruned_is_told(method, compression, options, said):
    with pytest.raises(InputError, match=said):
        prune_at_init(relu_net(), method, compression, **options)


def test_other_mistakes_are_told():
    with pytest.raises(ModelError, match="no weight tensor"):
        prune_at_init(nn.ReLU(), "random", 2)
    with pytest.raises(InputError, match=r"mask of weight has shape \(2, 2\), the model has shape \(1, 2\)"):
        apply_masks(nn.Linear(2, 1), {"weight": torch.ones(2, 2)})
    with pytest.raises(InputError, match="the model has only weight"):
        apply_masks(nn.Linear(2, 1), {"bias": torch.ones(1)})
    with pytest.raises(InputError, match="at least 1"):
        lottery_ticket(nn.Linear(2, 1), lambda net, steps: None, 0.1)
    with pytest.raises(InputError, match="rounds >= 1"):
        lottery_ticket(nn.Linear(2, 1), lambda net, steps: None, 2, rounds=0)
