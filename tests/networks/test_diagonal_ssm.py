import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from scipy.linalg import block_diag, expm

from theodolite.core.errors import InputError, ModelError
from theodolite.networks.diagonal_ssm import (
    INITS,
    S4D,
    DiagonalSSMKernel,
    initial_input,
    initial_spectrum,
    kernel_summary,
    ssm_parameter_groups,
)
from theodolite.networks.hippo import normal_plus_low_rank


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(layer, channel):
    """The channel as a real state space model (A, B, C, D): a 2 x 2 block for each conjugate pair."""
    kernel = layer.kernel
    A, B, C = (
        value[channel].detach().numpy()
        for value in (kernel.eigenvalues(), torch.view_as_complex(kernel.B), torch.view_as_complex(kernel.C))
    )
    blocks = block_diag(*[np.array([[a.real, -a.imag], [a.imag, a.real]]) for a in A])
    return (
        blocks,
        np.stack([B.real, B.imag], axis=1).reshape(-1, 1),
        2 * np.stack([C.real, -C.imag], axis=1).reshape(1, -1),
        layer.D[channel].detach().numpy().reshape(1, 1),
    )


def by_scipy(layer, u):
    """Outputs (L, H) for one series (L, H): scipy's recurrence outputs C x_k before u_k is in, so it reads x one step on."""
    out = np.empty(u.shape)
    for h in range(u.shape[1]):
        A, B, C, D = dense(layer, h)
        dt = layer.kernel.dt[h].item()
        Ad, Bd, *_ = signal.cont2discrete((A, B, C, D), dt, method=layer.kernel.discretization)
        _, y, _ = signal.dlsim((Ad, Bd, C @ Ad, C @ Bd + D, dt), u[:, h])
        out[:, h] = y[:, 0]
    return out


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", INITS)
def test_convolution_recurrence_and_scipys_state_space_are_one(init, discretization):
    layer = S4D(3, n_state=16, init=init, discretization=discretization, train_B=True, seed=1).double()
    u = noise(1, 512, 3)
    with torch.no_grad():
        y, final = layer(u)
        state, steps = layer.initial_state(1), []
        for sample in u.unbind(dim=1):
            out, state = layer.step(sample, state)
            steps.append(out)
    wanted = by_scipy(layer, u[0].numpy())
    assert np.abs(y[0].numpy() - wanted).max() <= 1e-10
    assert float((torch.stack(steps, dim=1) - y).abs().max()) <= 1e-10
    assert float((state - final).abs().max()) <= 1e-10
    with torch.no_grad():
        single, _ = layer.float()(u.float())
    assert np.abs(single[0].numpy() - wanted).max() <= 1e-4


def test_real_states_are_n_single_decays():
    layer = S4D(2, n_state=6, init="real", real_states=True, seed=0).double()
    with torch.no_grad():
        kernel, (Abar, Bbar) = layer.kernel(40), layer.kernel.discretize()
    rates = np.arange(1, 7)[None] * layer.kernel.dt.detach().numpy()[:, None]
    assert np.allclose(Abar.numpy(), np.exp(-rates), rtol=1e-6)
    assert np.allclose(Bbar.numpy(), (1 - np.exp(-rates)) / np.arange(1, 7), rtol=1e-6)
    C = layer.kernel.C[..., 0].detach()
    wanted = torch.einsum("hn,hnl->hl", C * Bbar.real, Abar.real[..., None] ** torch.arange(40))
    assert torch.allclose(kernel, wanted, atol=1e-12)
    assert "kernel.imag" not in dict(layer.named_parameters())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.sampled_from(INITS), st.sampled_from(["zoh", "bilinear"]), st.floats(0.1, 10))
def test_two_levels_of_powers_are_the_powers(length, init, discretization, rate):
    kernel = DiagonalSSMKernel(3, n_state=8, init=init, discretization=discretization, seed=length).double()
    with torch.no_grad():
        Abar, Bbar = kernel.discretize(rate)
        table = Abar[..., None] ** torch.arange(length)
        wanted = 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(kernel.C) * Bbar, table).real
        assert torch.allclose(kernel(length, rate), wanted, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 70), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_chunks_with_their_state_are_the_series_at_once(batch, sizes, transposed, seed):
    layer = S4D(2, n_state=6, transposed=transposed, seed=seed).double()
    along = 2 if transposed else 1
    u = noise(batch, 2, sum(sizes), seed=seed) if transposed else noise(batch, sum(sizes), 2, seed=seed)
    with torch.no_grad():
        whole, final = layer(u)
        state, parts = None, []
        for part in u.split(sizes, dim=along):
            y, state = layer(part, state)
            parts.append(y)
    assert torch.allclose(torch.cat(parts, dim=along), whole, atol=1e-11)
    assert torch.allclose(state, final, atol=1e-11)


def test_the_padding_keeps_the_end_out_of_the_start():
    layer = S4D(2, n_state=8, dt_min=1e-4, dt_max=1e-3, seed=0).double()
    u = noise(1, 64, 2)
    changed = u.clone()
    changed[:, 40:] += 5
    with torch.no_grad():
        assert torch.allclose(layer(u)[0][:, :40], layer(changed)[0][:, :40], atol=1e-12)


def test_a_second_kernel_reads_backwards():
    layer = S4D(3, n_state=8, bidirectional=True, seed=0).double()
    u = noise(2, 50, 3)
    with torch.no_grad():
        forth, back = layer.kernel(50).numpy(), layer.backward_kernel(50).numpy()
        y = layer(u)[0].numpy()
    assert not np.allclose(forth, back)
    for b in range(2):
        for h in range(3):
            x = u[b, :, h].numpy()
            wanted = np.convolve(x, forth[h])[:50] + np.convolve(x[::-1], back[h])[:50][::-1] + layer.D[h].item() * x
            assert np.allclose(y[b, :, h], wanted, atol=1e-10)


def test_zero_order_hold_has_its_limit_where_a_is_zero():
    kernel = DiagonalSSMKernel(1, n_state=4, real_transform="relu", seed=0).double()
    with torch.no_grad():
        kernel.real.zero_()
        kernel.imag.copy_(torch.tensor([[0.0, 1e-9]]))
        _, Bbar = kernel.discretize()
    assert torch.allclose(Bbar.real, kernel.dt[:, None].expand(1, 2), rtol=1e-8)
    kernel(20).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in kernel.parameters() if p.grad is not None)


def test_small_steps_lose_no_digits_in_float32():
    kernel = DiagonalSSMKernel(64, n_state=32, dt_min=1e-6, dt_max=1e-5, seed=0)
    with torch.no_grad():
        single, double = kernel.discretize()[1], copy.deepcopy(kernel).double().discretize()[1]
    assert float(((single - double) / double).abs().max()) < 1e-6


def test_dss_is_a_row_softmax():
    kernel = DiagonalSSMKernel(3, n_state=8, discretization="dss", init="legs", seed=2).double()
    with torch.no_grad():
        A, times = kernel.eigenvalues(), torch.arange(37)
        table = torch.exp(kernel.dt[:, None, None] * A[..., None] * times)
        rows = table / table.sum(dim=-1, keepdim=True)
        weights = torch.view_as_complex(kernel.C) * torch.view_as_complex(kernel.B) / A
        assert torch.allclose(kernel(37), 2 * torch.einsum("hn,hnl->hl", weights, rows).real, atol=1e-11)


def test_dss_has_no_state():
    layer = S4D(2, n_state=4, discretization="dss", seed=0)
    y, state = layer(noise(1, 10, 2, dtype=torch.float32))
    assert state is None
    for ask in (
        lambda: layer.step(y[:, 0], layer.initial_state(1)),
        layer.recurrence,
        lambda: layer(y, layer.initial_state(1)),
    ):
        with pytest.raises(InputError, match="no recurrence"):
            ask()


@pytest.mark.parametrize("transform", ["exp", "softplus", "relu", "none"])
@pytest.mark.parametrize("init", INITS)
def test_every_transform_starts_at_the_spectrum(init, transform):
    kernel = DiagonalSSMKernel(2, n_state=16, init=init, real_transform=transform, seed=0)
    found = kernel.eigenvalues().detach().numpy()
    if init == "random":
        assert np.allclose(found.real, -0.5)
        assert not np.allclose(found[0], found[1])
    else:
        assert np.allclose(found, initial_spectrum(init, 16)[None], rtol=1e-5)


def test_the_named_spectra():
    n = np.arange(4)
    assert np.allclose(initial_spectrum("lin", 8), -0.5 + 1j * np.pi * n)
    assert np.allclose(initial_spectrum("inv", 8), -0.5 + 1j * 8 / np.pi * (8 / (2 * n + 1) - 1))
    assert np.allclose(initial_spectrum("quad", 8), -0.5 + 1j * (1 + 2 * n) ** 2 / np.pi)
    assert np.allclose(initial_spectrum("real", 8), -(n + 1))
    drawn = initial_spectrum("random", 4000, seed=1)
    assert np.allclose([np.log(drawn.imag).mean(), np.log(drawn.imag).std()], [0, 1], atol=0.1)
    assert np.array_equal(drawn, initial_spectrum("random", 4000, seed=1))
    assert np.allclose(initial_spectrum("lin", 8, frequency_scale=10).imag, 10 * np.pi * n)
    assert initial_spectrum("lin", 8, np.complex64).dtype == np.complex64


@pytest.mark.parametrize("n_state", [64, 256])
def test_the_normal_part_of_legs(n_state):
    found = initial_spectrum("legs", n_state)
    assert np.abs(found.real + 0.5).max() <= 1e-10
    assert abs(found.imag.max() / (n_state**2 / math.pi) - 1) <= 1e-3
    assert (np.diff(found.imag) > 0).all()
    assert (found.imag > 0).all()
    n = np.arange(n_state)
    root = np.sqrt(2 * n + 1)
    normal = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0) + np.outer(root, root) / 2
    both = np.sort_complex(np.concatenate([found, found.conj()]).round(6))
    assert np.allclose(np.sort(both.imag), np.sort(np.linalg.eigvals(normal).imag), rtol=1e-6, atol=1e-6)


def test_half_of_the_input_of_legs_and_the_official_scaling():
    """2 Re sum_n V_kn B_n e^(t lambda_n) over the half is the k-th kernel of (A_N, B_LegS / 2)."""
    size, times = 16, (0.0, 0.3, 1.1)
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    normal = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0) + np.outer(root, root) / 2
    V, B, A = normal_plus_low_rank("legs", size).V[:, 8:], initial_input("legs", size), initial_spectrum("legs", size)
    for t in times:
        wanted = expm(t * normal) @ root / 2
        assert np.allclose(2 * (V @ (B * np.exp(t * A))).real, wanted, atol=1e-10)
    theirs = initial_input("legs", size, official_scaling=True)
    assert np.allclose(theirs.real, 2 * B.real)
    assert np.abs(theirs.imag).max() <= 2
    assert np.array_equal(initial_input("quad", 8), np.ones(4))


def binned(values, width):
    return values.reshape(-1, width).mean(axis=1)


def test_the_legs_kernels_are_reached_in_bins_and_not_pointwise():
    times = (np.arange(40_000) + 0.5) * 1e-4
    wanted, errors, pointwise = np.exp(-times), [], []
    for size, prototype in ((16, 0.249), (64, 0.064), (256, 0.0085)):
        V = normal_plus_low_rank("legs", size).V[0, size // 2 :]
        weights, A = V * initial_input("legs", size), initial_spectrum("legs", size)
        kernel = sum(2 * (w * np.exp(times * a)).real for w, a in zip(weights, A, strict=True))
        errors.append(np.linalg.norm(binned(kernel - wanted, 1000)) / np.linalg.norm(binned(wanted, 1000)))
        pointwise.append(np.linalg.norm(kernel - wanted) / np.linalg.norm(wanted))
        assert abs(errors[-1] / prototype - 1) <= 0.2
    assert errors == sorted(errors, reverse=True)
    assert min(pointwise) > 0.5


def test_the_continuous_kernel():
    kernel = DiagonalSSMKernel(2, n_state=8, init="legs", train_B=True, seed=0).double()
    times = torch.linspace(0, 3, 7)
    layer = S4D(2, n_state=8, init="legs", train_B=True, seed=0).double()
    layer.kernel = kernel
    found = kernel.impulse_response(times).detach().numpy()
    for h in range(2):
        A, B, C, _ = dense(layer, h)
        assert np.allclose(found[h], [(C @ expm(float(t) * A) @ B).item() for t in times], atol=1e-10)


def test_a_rate_reads_a_series_sampled_less_often():
    layer = S4D(4, n_state=16, dt_min=1e-3, dt_max=1e-2, seed=0).double()
    layer.D.data.zero_()
    u = torch.sin(torch.arange(800, dtype=torch.float64) / 40)[None, :, None].expand(1, -1, 4)
    with torch.no_grad():
        fine, coarse = layer(u)[0][:, ::2], layer(u[:, ::2], rate=2)[0]
        wrong = layer(u[:, ::2])[0]
    scale = float(fine.abs().max())
    assert float((fine - coarse).abs().max()) < 0.05 * scale
    assert float((fine - wrong).abs().max()) > 0.2 * scale


def test_the_dynamics_form_a_group_without_decay():
    layer = S4D(4, n_state=8, train_B=True, bidirectional=True)
    dynamics, rest = ssm_parameter_groups(torch.nn.Sequential(layer, torch.nn.Linear(4, 4)), lr=0.01)
    assert (dynamics["lr"], dynamics["weight_decay"], rest["lr"], rest["weight_decay"]) == (1e-3, 0.0, 0.01, 0.01)
    names = {id(p): name for name, p in layer.named_parameters()}
    found = {names[id(p)].split(".")[-1] for p in dynamics["params"]}
    assert found == {"log_dt", "real", "imag", "B"}
    assert {names.get(id(p), "linear").split(".")[-1] for p in rest["params"]} == {"C", "D", "linear"}
    frozen = S4D(4, n_state=8, train_A=False)
    assert len(ssm_parameter_groups(frozen, 0.01)[0]["params"]) == 1
    torch.optim.AdamW(ssm_parameter_groups(copy.deepcopy(layer), 0.01)).step()
    for bad in ({"lr": 0}, {"lr": 1, "ssm_lr": -1}, {"lr": 1, "weight_decay": -1}):
        with pytest.raises(InputError, match="lr > 0"):
            ssm_parameter_groups(layer, **bad)


def test_a_summary_tells_the_memory_and_frequency_of_an_oscillator():
    kernel = DiagonalSSMKernel(2, n_state=2, seed=0).double()
    with torch.no_grad():
        kernel.log_dt.copy_(torch.tensor([0.01, 0.02]).log())
        kernel.real.fill_(math.log(0.5))
        kernel.imag.copy_(torch.tensor([[0.0], [2 * math.pi]]))
        kernel.C.copy_(torch.tensor([1.0, 0.0]).expand(2, 1, 2))
    table = kernel_summary(kernel)
    assert table["channel"].tolist() == [0, 1]
    assert np.allclose(table["timescale_steps"], [100, 50])
    assert np.allclose(table["decay_steps"], [200, 100])
    # energy e^(-l/100): 95 % of it lies in the first 100 ln 20 = 299.6 steps
    assert table["effective_length"][0] == 300
    assert np.allclose(table["dominant_frequency"], [0, 0.02], atol=1 / 1600)
    with pytest.raises(InputError, match="takes an S4D layer"):
        kernel_summary(torch.nn.Linear(2, 2))


def test_a_layer_is_copied_saved_and_seeded():
    layer = S4D(3, n_state=8, seed=4, bidirectional=True, dropout=0.5)
    again, other = S4D(3, n_state=8, seed=4, bidirectional=True), S4D(3, n_state=8, seed=5, bidirectional=True)
    u = noise(2, 20, 3, dtype=torch.float32)
    layer.eval()
    assert torch.equal(layer(u)[0], again(u)[0])
    assert not torch.equal(layer(u)[0], other(u)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(u)[0], copy.deepcopy(layer)(u)[0])
    layer.train()
    assert float((layer(u)[0] == 0).float().mean()) > 0.3
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    S4D(3, seed=1)
    assert torch.equal(before, torch.rand(1))


def test_under_autocast_the_kernel_keeps_its_digits():
    layer, u = S4D(4, n_state=16, seed=0), noise(2, 200, 4, dtype=torch.float32)
    plain = layer(u)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(u)
    assert torch.allclose(y, plain, atol=1e-6)
    assert state.dtype == torch.complex64


def test_gradients_reach_everything_that_is_trained():
    layer = S4D(2, n_state=4, train_B=True, seed=0).double()
    u = noise(1, 12, 2).requires_grad_()
    state = torch.complex(noise(1, 2, 2, seed=1), noise(1, 2, 2, seed=2)).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def answer(u, state, *parameters):
        y, final = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (u, state))
        return y, torch.view_as_real(final)

    assert torch.autograd.gradcheck(answer, (u, state, *values))


def test_the_recurrence_can_be_exported():
    layer = S4D(3, n_state=8, seed=0)
    stream, state, u = layer.recurrence(), layer.initial_state(2), noise(2, 3, dtype=torch.float32)
    program = torch.export.export(stream, (u, state)).module()
    for sample in (u, -u, 2 * u):
        wanted, after = layer.step(sample, state)
        y, again = program(sample, state)
        assert torch.allclose(y, wanted, atol=1e-6)
        assert torch.allclose(again, after, atol=1e-6)
        state = after.detach()
    assert not list(stream.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_state": 7}, "must be even"),
        ({"n_state": 0}, "at least 2"),
        ({"d_model": 0}, "d_model"),
        ({"dt_min": 0.1, "dt_max": 0.1}, "dt_min < dt_max"),
        ({"dt_min": 0.0}, "0 < dt_min"),
        ({"init": "hippo"}, "there is no initialisation 'hippo'; there are lin"),
        ({"discretization": "euler"}, "discretization is one of"),
        ({"real_transform": "tanh"}, "real_transform is one of"),
        ({"real_states": True}, "needs init 'real'"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_that_mean_nothing(options, words):
    with pytest.raises(InputError, match=words):
        S4D(**{"d_model": 2, **options})


def test_inputs_that_do_not_fit_name_both_shapes():
    layer = S4D(3, n_state=4, seed=0)
    good = torch.zeros(2, 5, 3)
    for bad, words in (
        (torch.zeros(2, 5), r"\(batch, length, 3\), got \(2, 5\)"),
        (torch.zeros(2, 3, 5), r"\(batch, length, 3\), got \(2, 3, 5\)"),
        (good.to(torch.complex64), "real numbers"),
        (good.long(), "real numbers"),
        (torch.zeros(2, 0, 3), "at least one row and one step"),
        (torch.zeros(0, 5, 3), "at least one row and one step"),
    ):
        with pytest.raises(InputError, match=words):
            layer(bad)
    with pytest.raises(InputError, match=r"\(batch, 3, length\), got \(2, 5, 3\)"):
        S4D(3, n_state=4, transposed=True)(good)
    with pytest.raises(InputError, match=r"step takes real \(batch, 3\)"):
        layer.step(good, layer.initial_state(2))
    for state in (torch.zeros(2, 3, 4, dtype=torch.complex64), torch.zeros(2, 3, 2), layer.initial_state(1)):
        with pytest.raises(InputError, match=r"the state must be \(2, 3, 2\) of torch.complex64, got"):
            layer(good, state)
        with pytest.raises(InputError, match="the state must be"):
            layer.step(good[:, 0], state)
    for rate in (0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="rate must be"):
            layer(good, rate=rate)
    with pytest.raises(InputError, match="length of at least 1"):
        layer.kernel(0)
    with pytest.raises(InputError, match="batch must be"):
        layer.initial_state(0)


def test_a_bidirectional_layer_is_not_a_stream():
    layer = S4D(3, n_state=4, bidirectional=True)
    state = S4D(3, n_state=4).initial_state(1)
    for ask in (lambda: layer.step(torch.zeros(1, 3), state), layer.recurrence, lambda: layer.initial_state(1)):
        with pytest.raises(InputError, match="reads the future"):
            ask()
    with pytest.raises(InputError, match="takes no state"):
        layer(torch.zeros(1, 5, 3), state)


def test_a_spectrum_that_grows_is_told_by_its_channels():
    layer = S4D(16, n_state=4, real_transform="none", seed=0)
    layer(torch.zeros(1, 5, 16))
    state = layer.state_dict()
    state["kernel.real"][[2, 5], 1] = 0.1
    layer.load_state_dict(state)
    with pytest.raises(ModelError, match="positive real parts in channels 2, 5"):
        layer(torch.zeros(1, 5, 16))
    state["kernel.real"][:] = 1.0
    layer.load_state_dict(state)
    with pytest.raises(ModelError, match="and 6 more"):
        layer.step(torch.zeros(1, 16), layer.initial_state(1))


@pytest.mark.parametrize("transform", ["exp", "softplus", "relu", "none"])
def test_eigenvalues_are_put_back_where_they_started(transform):
    kernel = DiagonalSSMKernel(2, n_state=8, init="inv", real_transform=transform, frequency_scale=0.1, seed=0).double()
    before, start = kernel(30).detach(), kernel.eigenvalues().detach()
    kernel.set_eigenvalues(start * 1.5)
    assert torch.allclose(kernel.eigenvalues(), start * 1.5)
    assert not torch.allclose(kernel(30), before)
    kernel.set_eigenvalues(kernel.initial_eigenvalues())
    assert torch.allclose(kernel(30), before, atol=1e-6)
    assert np.allclose(kernel.initial_eigenvalues().numpy()[1], initial_spectrum("inv", 8, frequency_scale=0.1))
    for bad in (start[:1], -start):
        with pytest.raises(InputError, match=r"A must be \(2, 4\) with negative real parts"):
            kernel.set_eigenvalues(bad)
    with pytest.raises(InputError, match="is not known"):
        DiagonalSSMKernel(2, n_state=8, init="random").initial_eigenvalues()
