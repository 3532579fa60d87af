"""S4: its kernel against dense powers, its recurrence against its convolution, its place beside S4D."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.core.errors import InputError, ModelError
from theodolite.networks.diagonal_ssm import S4D, S4DClassifier, ssm_parameter_groups
from theodolite.networks.hippo import S4, S4Kernel, hippo_matrix, normal_plus_low_rank, timescale_report
from theodolite.networks.hippo import s4_kernel as kernel_module
from theodolite.networks.hippo.matrices import MEASURES


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel(measure, n_state=32, channels=3, seed=0, **options):
    return S4Kernel(channels, n_state, measure, generator=torch.Generator().manual_seed(seed), **options)


def powers(measure, n_state, plain, dt, length):
    """K_l = C Abar^l Bbar of the named matrix itself, C (N/2,) in the coordinates of its eigenvectors."""
    A, B = hippo_matrix(measure, n_state)
    eye = np.eye(n_state)
    Abar = np.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    x = np.linalg.solve(eye - dt / 2 * A, dt * B)
    row = 2 * np.real(plain @ normal_plus_low_rank(measure, n_state).V[:, n_state // 2 :].conj().T)
    out = []
    for _ in range(length):
        out.append(row @ x)
        x = Abar @ x
    return np.array(out)


def compared(made, measure, n_state, length):
    """Largest difference of the kernel to dense powers, relative to the kernel."""
    plain = (
        torch.view_as_complex(made.C.detach().clone()).to(torch.complex128).numpy()
    )  # the first call turns C into C~
    dt = made.dt.detach().double().numpy()
    found = made(length).detach().double().numpy()
    wanted = np.stack([powers(measure, n_state, c, h, length) for c, h in zip(plain, dt, strict=True)])
    return float((np.abs(found - wanted).max(axis=1) / np.abs(wanted).max(axis=1)).max())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [1, 7, 200])
def test_the_kernel_is_that_of_dense_powers(measure, length, float64):
    assert compared(kernel(measure), measure, 32, length) <= 1e-8


@pytest.mark.parametrize("measure", MEASURES)
def test_in_float32_too(measure):
    assert compared(kernel(measure), measure, 32, 200) <= 1e-3


@pytest.mark.parametrize("measure", ["legs", "fout"])
def test_a_longer_table_than_memory_gives_the_same_kernel_and_gradients(measure, monkeypatch, float64):
    whole, parted = kernel(measure, l_max=500), kernel(measure, l_max=500)
    a = whole(500)
    for limit in ("_TABLE", "_PART"):
        monkeypatch.setattr(kernel_module, limit, 20_000)
    b = parted(500)
    (first,) = torch.autograd.grad(b.square().sum(), parted.imag, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a wrong second gradient
        first.sum().backward(retain_graph=True)
    assert torch.allclose(a, b, atol=1e-12)
    for out in (a, b):
        (out * noise(3, 500)).sum().backward()
    for p, q in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-10)
        assert p.grad.abs().max() > 0


def test_gradients_are_those_of_finite_differences(float64):
    made = kernel("legt", n_state=4, channels=2, l_max=9)
    names = [name for name, _ in made.named_parameters()]
    made.real.data -= 0.1  # away from the corner at 0

    def call(*values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (9,))

    assert torch.autograd.gradcheck(call, tuple(p.detach().clone().requires_grad_() for p in made.parameters()))


@settings(max_examples=12, deadline=None)
@given(measure=st.sampled_from(MEASURES), length=st.integers(3, 150), cut=st.floats(0, 1), seed=st.integers(0, 99))
def test_chunks_and_steps_are_the_whole(measure, length, cut, seed):
    layer = S4(3, 8, measure, seed=seed).double()
    u = noise(2, length, 3, seed=seed).double()
    first = min(length - 2, max(1, int(cut * length)))
    with torch.no_grad():
        whole, last = layer(u)
        a, state = layer(u[:, :first])
        b, after = layer(u[:, first:], state)
        assert torch.allclose(torch.cat([a, b], dim=1), whole, atol=1e-8)
        assert torch.allclose(after, last, atol=1e-8)
        assert torch.allclose(layer.convolve(u), whole)
        assert torch.allclose(layer.convolve(u[:, first:], state), b)
        state, out = layer.initial_state(2), []
        for sample in u.unbind(dim=1):
            y, state = layer.step(sample, state)
            out.append(y)
        assert torch.allclose(torch.stack(out, dim=1), whole, atol=1e-8)
        assert torch.allclose(state, last, atol=1e-8)


def test_training_changes_what_the_steps_use():
    layer = S4(2, 8, seed=0, l_max=40)
    u = noise(1, 40, 2)
    with torch.no_grad():
        layer.step(u[:, 0], layer.initial_state(1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(u)[0].square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        whole, _ = layer(u)
        state = layer.initial_state(1)
        for sample in range(40):
            y, state = layer.step(u[:, sample], state)
        assert torch.allclose(y, whole[:, -1], atol=1e-4)


def test_gradients_go_through_states_and_steps():
    layer = S4(2, 8, seed=0)
    u = noise(1, 10, 2)
    _, state = layer(u)
    y, state = layer.step(u[:, 0], state)
    (y.sum() + state.abs().sum()).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())


def test_a_longer_series_keeps_the_kernel_and_a_saved_layer_its_steps(float64):
    layer = S4(2, 8, seed=0)
    with torch.no_grad():
        short = layer.kernel(20)
        state = layer.initial_state(1)
        before, _ = layer.step(noise(1, 2), state)
        assert torch.allclose(layer.kernel(300)[:, :20], short)
        assert torch.allclose(layer.step(noise(1, 2), state)[0], before)
        again = S4(2, 8, seed=5)
        again.load_state_dict(layer.state_dict())
        assert torch.allclose(again.kernel(50), layer.kernel(50))
        assert torch.allclose(copy.deepcopy(layer).step(noise(1, 2), state)[0], before)


@pytest.mark.parametrize("seed", range(3))
def test_c_tilde_matters_where_the_length_is_short_beside_the_memory(seed, float64):
    made = kernel("legs", seed=seed, dt_min=1e-3, dt_max=2e-3)
    plain = made.C.detach().clone()
    made(16)
    assert (made.C - plain).abs().max() > 0.1 * plain.abs().max()
    row = made.dense()[2][:, :16] / 2
    assert torch.allclose(row, plain[..., 0], atol=1e-8)


def test_time_steps_spread_over_the_channels():
    dt = S4(500, 2, seed=0).kernel.dt.detach()
    assert float(dt.min()) >= 1e-3
    assert float(dt.max()) <= 0.1
    share = float((dt < 0.01).double().mean())
    assert 0.4 < share < 0.6  # log-uniform: half of them are below the middle


def test_a_wider_correction_starts_as_the_measure_and_learns(float64):
    made = kernel("legs", rank=3)
    assert made.P.shape == (3, 3, 16, 2)
    assert compared(made, "legs", 32, 100) <= 1e-6
    made(100).square().sum().backward()
    assert (made.P.grad[:, 1:].abs().amax(dim=(0, 2, 3)) > 0).all()


def test_normalised_inputs_have_unit_states():
    made, plain = kernel("legs", normalize=True), kernel("legs")
    found = torch.view_as_complex(made.B.detach())
    low = torch.complex(made.real, made.imag).detach()
    assert torch.allclose((2 * (found / low).abs() ** 2).sum(dim=1), torch.ones(3))
    ratio = (made.B / plain.B).detach()
    assert float(ratio.std()) < 1e-4 * float(ratio.mean())


def test_both_directions_read_all_of_the_series():
    layer = S4(2, 8, bidirectional=True, seed=0)
    u = noise(1, 30, 2)
    moved = u.clone()
    moved[:, 20] += 1
    with torch.no_grad():
        assert (layer(u)[0] - layer(moved)[0]).abs()[:, 3].max() > 1e-6
        one = S4(2, 8, seed=0)
        assert torch.equal(one(u)[0][:, :20], one(moved)[0][:, :20]) or torch.allclose(
            one(u)[0][:, :20], one(moved)[0][:, :20], atol=1e-5
        )
    for call in (lambda: layer.initial_state(1), lambda: layer.step(u[:, 0], torch.zeros(1, 2, 4))):
        with pytest.raises(InputError, match="bidirectional layer reads the future"):
            call()
    with pytest.raises(InputError, match="takes no state"):
        layer(u, torch.zeros(1, 2, 4, dtype=torch.complex64))


@pytest.mark.parametrize("measure", MEASURES)
def test_the_recurrence_is_the_convolution_to_rounding(measure, float64):
    layer = S4(3, 16, measure, seed=0).eval()
    u, outputs = noise(2, 150, 3).double(), []
    with torch.no_grad():
        whole, last = layer(u)
        stream, state = layer.recurrence(), layer.initial_state(2)
        for sample in u.unbind(dim=1):
            y, state = stream(sample, state)
            outputs.append(y)
    assert not list(stream.parameters())
    assert torch.allclose(torch.stack(outputs, dim=1), whole, atol=1e-10)
    assert torch.allclose(state, last, atol=1e-10)


def test_the_recurrence_is_saved_and_exported_and_keeps_the_weights_of_its_making():
    layer = S4(3, 16, seed=0)
    stream, state, u = layer.recurrence(), layer.initial_state(2), noise(2, 3)
    known, _ = stream(u, state)
    with torch.no_grad():
        layer.kernel.C.mul_(2.0)
        layer.D.mul_(2.0)
    assert torch.equal(stream(u, state)[0], known)
    program = torch.export.export(stream, (u, state)).module()
    assert torch.allclose(program(u, state)[0], known)
    other = S4(3, 16, seed=1).recurrence()
    other.load_state_dict(stream.state_dict())
    assert torch.equal(other(u, state)[0], known)
    with pytest.raises(InputError, match="bidirectional"):
        S4(3, 16, bidirectional=True).recurrence()


def test_it_takes_the_place_of_s4d():
    network = S4DClassifier(1, 3, d_model=4, n_layers=2, n_state=8, seed=0)
    for block in network.blocks:
        block.layer = S4(4, 8, seed=0)
    x = noise(2, 50, 1)
    scores = network(x)
    scores.sum().backward()
    groups = ssm_parameter_groups(network, lr=0.01)
    assert [len(group["params"]) for group in groups] == [10, 16]
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (1e-3, 0.0)
    named = {id(p): name.split(".")[-1] for name, p in network.named_parameters()}
    assert {named[id(p)] for p in groups[0]["params"]} == {"log_dt", "real", "imag", "P", "B"}
    with torch.no_grad():
        state = network.initial_state(2)
        for sample in x.unbind(dim=1):
            live, state = network.step(sample, state)
    assert torch.allclose(live, scores, atol=1e-4)


def test_timescales_of_layers_and_networks():
    layer = S4(4, 8, seed=0)
    found = timescale_report(layer, 100)
    assert list(found.columns) == ["channel", "dt", "memory_steps", "covers_sequence"]
    assert np.allclose(found.memory_steps, 1 / found.dt)
    assert (found.covers_sequence == (found.memory_steps >= 100)).all()
    assert np.allclose(found.dt, layer.kernel.dt.detach())
    assert len(timescale_report(S4D(3, 8), 10)) == 3
    assert len(timescale_report(S4DClassifier(1, 2, d_model=5, n_layers=3, n_state=4), 10)) == 15
    with pytest.raises(ModelError, match="Linear holds no state space layer"):
        timescale_report(torch.nn.Linear(2, 2), 10)
    with pytest.raises(InputError, match="sequence_length must be at least 1"):
        timescale_report(layer, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "hippo"}, "there is no measure 'hippo'"),
        ({"n_state": 7}, "must be even, got 7"),
        ({"n_state": 0}, "at least 1, got 0"),
        ({"d_model": 0}, "d_model and l_max must be at least 1"),
        ({"l_max": 0}, "d_model and l_max must be at least 1"),
        ({"dt_min": 0.2}, "need 0 < dt_min < dt_max"),
        ({"dt_min": 0.0}, "need 0 < dt_min < dt_max"),
        ({"measure": "legt", "rank": 1}, "legt needs a correction of rank 2, got rank 1"),
        ({"measure": "fout", "normalize": True}, "fout has one that is 0"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        S4(**{"d_model": 2, "n_state": 8, **options})


def test_inputs_and_states_are_checked():
    layer = S4(3, 8, l_max=20, seed=0)
    with pytest.raises(InputError, match="a length of 21 exceeds l_max = 20"):
        layer(noise(1, 21, 3))
    for wrong in (noise(1, 5, 4), noise(5, 3), noise(1, 0, 3), noise(1, 5, 3).to(torch.complex64)):
        with pytest.raises(InputError, match=r"real \(batch, length, 3\)"):
            layer(wrong)
    for state in (torch.zeros(2, 3, 4, dtype=torch.complex64), torch.zeros(1, 3, 4)):
        with pytest.raises(InputError, match=r"the state must be \(1, 3, 4\)"):
            layer(noise(1, 5, 3), state)
        with pytest.raises(InputError, match="the state must be"):
            layer.step(noise(1, 3), state)
    with pytest.raises(InputError, match=r"step takes real \(batch, 3\)"):
        layer.step(noise(1, 4), layer.initial_state(1))
    with pytest.raises(InputError, match="length of at least 1"):
        layer.kernel(0)
    with pytest.raises(InputError, match="batch must be at least 1"):
        layer.initial_state(0)
