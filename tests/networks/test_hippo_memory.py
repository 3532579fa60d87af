"""The recurrence, its reconstruction and its readout, against step loops and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from theodolite.core.errors import DataError, InputError
from theodolite.networks.hippo import HippoMemory, discretize, hippo_matrix
from theodolite.networks.hippo.matrices import MEASURES

FEW = settings(max_examples=25, deadline=None)


def band_limited(length, seed=0, cut=0.05):
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=length))
    spectrum[np.fft.rfftfreq(length) > cut] = 0
    series = np.fft.irfft(spectrum, length)
    return series / series.std()


def stepped(measure, n, dt, u):
    A, B = discretize(*hippo_matrix(measure, n), dt)
    x, states = np.zeros((u.shape[1], n)), []
    for sample in u:
        x = x @ A.T + np.outer(sample, B)
        states.append(x)
    return np.array(states)


@FEW
@given(
    measure=st.sampled_from(MEASURES),
    length=st.integers(1, 1200),
    channels=st.integers(1, 3),
    seed=st.integers(0, 1000),
    memory=st.floats(20, 500),
)
def test_blocks_give_the_step_loop(measure, length, channels, seed, memory):
    u = np.random.default_rng(seed).normal(size=(length, channels))
    found = HippoMemory(measure, 8, memory_steps=memory).transform(u)
    assert np.allclose(found, stepped(measure, 8, 1 / memory, u), atol=1e-10)


def time_varying(u, n):
    A, B = hippo_matrix("legs", n)
    x, states = np.zeros(n), []
    for k, sample in enumerate(u, 1):
        x = np.linalg.solve(np.eye(n) - A / (2 * k), (np.eye(n) + A / (2 * k)) @ x + B * sample / k)
        states.append(x)
    return np.array(states)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 40), length=st.integers(1, 300), seed=st.integers(0, 1000))
def test_stretch_is_the_paper_update(n, length, seed):
    u = np.random.default_rng(seed).normal(size=length)
    memory = HippoMemory("legs", n, scaling="stretch")
    assert np.allclose(memory.transform(u)[:, 0], time_varying(u, n), atol=1e-9)


def test_stretch_with_many_states_stays_in_range():
    u = np.random.default_rng(0).normal(size=900)
    found = HippoMemory("legs", 300, scaling="stretch").transform(u)
    stream = HippoMemory("legs", 300, scaling="stretch")
    for sample in u[:350]:
        last = stream.update(sample)
    assert np.allclose(last, found[349], atol=1e-8)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("options", [{"memory_steps": 50}, {"scaling": "stretch"}])
def test_a_stream_goes_on_where_the_series_ended(options):
    u = np.random.default_rng(1).normal(size=(120, 2))
    whole = HippoMemory("legs", 12, **options).transform(u)
    memory = HippoMemory("legs", 12, **options)
    memory.transform(u[:70])
    live = np.stack([memory.update(sample) for sample in u[70:]])
    assert np.allclose(live, whole[70:], atol=1e-10)
    assert memory.steps_ == 120
    fresh = HippoMemory("legs", 12, **options)
    assert np.allclose(fresh.update(u[0]), whole[0])


def test_it_is_a_scikit_learn_transformer():
    memory = HippoMemory("legt", 8, memory_steps=30)
    u = np.sin(np.arange(100) / 9)
    assert memory.fit(u) is memory
    assert memory.n_features_in_ == 1
    assert np.array_equal(memory.fit_transform(u), clone(memory).transform(u))
    assert clone(memory).get_params() == {
        "measure": "legt", "n_state": 8, "dt": None, "memory_steps": 30, "scaling": "fixed"
    }  # fmt: skip


def test_dt_is_one_over_memory_steps():
    u = np.sin(np.arange(200) / 9)
    assert np.array_equal(
        HippoMemory("legs", 8, dt=0.02).transform(u), HippoMemory("legs", 8, memory_steps=50).transform(u)
    )


# ---- what is rebuilt


def test_a_polynomial_in_the_window_is_rebuilt_exactly():
    # legt's N states hold polynomials of degree < N; samples are held for a step, so the middle of each is read
    t = np.arange(3000) / 200
    u = 1 + 0.3 * t - 0.02 * t**2
    memory = HippoMemory("legt", 8, memory_steps=200)
    lags = np.arange(0, 200, 7)
    assert np.abs(memory.reconstruct(memory.transform(u)[-1], lags)[0] - u[-1 - lags]).max() < 1e-3


def test_stretched_memory_rebuilds_all_of_the_past_whatever_the_rate():
    states = []
    for length in (2000, 6000):
        t = (np.arange(length) + 0.5) / length
        u = np.cos(7 * t) + 0.5 * np.sin(19 * t + 1)
        memory = HippoMemory("legs", 16, scaling="stretch")
        states.append(memory.transform(u)[-1, 0])
        back = memory.reconstruct(states[-1], np.arange(length))
        assert np.sqrt(((back - u[::-1]) ** 2).mean()) / u.std() <= 0.02
        half = memory.reconstruct(memory.transform(u)[length // 2 - 1], np.arange(length // 2), elapsed=length // 2)
        assert np.sqrt(((half[0] - u[length // 2 - 1 :: -1]) ** 2).mean()) / u.std() <= 0.02
    assert np.abs(states[0] - states[1]).max() / np.abs(states[0]).max() <= 0.01


def test_delays_are_recalled_within_the_window_and_not_beyond():
    u = band_limited(8000)
    assert HippoMemory("legt", 64, memory_steps=200).delay_readout(u, 200).error <= 0.02
    assert HippoMemory("legt", 64, memory_steps=100).delay_readout(u, 200).error >= 0.95
    assert HippoMemory("legs", 64, memory_steps=100).delay_readout(u, 200).error <= 0.08


def test_white_noise_before_the_window_cannot_be_recalled():
    u = np.random.default_rng(0).normal(size=6000)
    assert HippoMemory("legt", 16, memory_steps=100).delay_readout(u, 50).error > 0.8


def test_a_readout_answers_with_its_weights():
    u = band_limited(4000)
    memory = HippoMemory("legt", 32, memory_steps=100)
    found = memory.delay_readout(u, 60)
    assert found.delay == 60
    states = memory.transform(u)[60:, 0]
    answer, past = states @ found.weights + found.intercept, u[:-60]
    half = len(past) // 2
    assert np.isclose(np.sqrt(((answer - past)[half:] ** 2).mean()) / past[half:].std(), found.error)


# ---- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "legz"}, "there are legs, legt, fout, foud, lagt"),
        ({"n_state": 0}, "n_state must be a whole number of at least 1"),
        ({"measure": "fout", "n_state": 5}, "must be even"),
        ({"dt": -0.1, "memory_steps": None}, "dt must be a positive number"),
        ({"dt": 0.0, "memory_steps": None}, "dt must be a positive number"),
        ({"memory_steps": 0}, "memory_steps must be a positive number"),
        ({"memory_steps": None}, "give either memory_steps"),
        ({"dt": 0.1}, "give either memory_steps"),
        ({"scaling": "warp"}, "there are fixed and stretch"),
        ({"scaling": "stretch"}, "has no time step"),
        ({"scaling": "stretch", "measure": "legt", "memory_steps": None}, "is for measure legs"),
    ],
)
def test_parameters_are_checked_before_work(options, words):
    memory = HippoMemory(**{"measure": "legs", "n_state": 4, "memory_steps": 30, **options})
    for call in (
        memory.fit,
        memory.transform,
        lambda u: memory.update(u[0]),
        lambda u: memory.reconstruct(np.zeros(4), [0]),
    ):
        with pytest.raises(InputError, match=words):
            call(np.zeros(9))


def test_broken_series_are_told():
    memory = HippoMemory("legs", 4, memory_steps=30)
    u = np.zeros((9, 2))
    u[5, 1] = np.nan
    with pytest.raises(DataError, match="1 values that are NaN or infinite, the first at sample 5 of channel 1"):
        memory.transform(u)
    for empty in (np.zeros(0), np.zeros((3, 0)), np.zeros((2, 2, 2))):
        with pytest.raises(DataError, match="at least one sample"):
            memory.transform(empty)
    for no_numbers in (["a", "b"], [[1.0], [1.0, 2.0]]):
        with pytest.raises(DataError, match="rows of numbers"):
            memory.transform(no_numbers)
    memory.update(1.0)
    with pytest.raises(InputError, match="the stream has 1 channels of 4 states, this sample 2 of 4"):
        memory.update(np.zeros(2))


def test_lags_that_are_not_held_are_told():
    for measure in ("legt", "fout"):
        memory = HippoMemory(measure, 8, memory_steps=50)
        memory.reconstruct(np.zeros(8), np.arange(50))
        with pytest.raises(InputError, match=f"lag 50 is not held: {measure} reaches lags up to 49"):
            memory.reconstruct(np.zeros(8), np.arange(51))
    HippoMemory("legs", 8, memory_steps=50).reconstruct(np.zeros(8), np.arange(500))
    stretched = HippoMemory("legs", 8, scaling="stretch")
    with pytest.raises(InputError, match="lag 0 is not held"):
        stretched.reconstruct(np.zeros(8), np.arange(1))
    for lags in (np.array([-1.0]), np.array([np.nan]), np.zeros((2, 2))):
        with pytest.raises(InputError, match="lags must be"):
            memory.reconstruct(np.zeros(8), lags)
    with pytest.raises(InputError, match="must end in n_state = 8"):
        memory.reconstruct(np.zeros(7), np.arange(2))


def test_delays_that_are_too_long_are_told():
    memory = HippoMemory("legs", 8, memory_steps=50)
    with pytest.raises(InputError, match=r"at least 2 \(delay \+ n_state\) = 216 samples"):
        memory.delay_readout(np.zeros(200), 100)
    with pytest.raises(InputError, match="from one series, got 2 channels"):
        memory.delay_readout(np.zeros((200, 2)), 1)


def test_too_short_a_memory_for_its_states_is_warned_of():
    with pytest.warns(UserWarning, match="not resolved"):
        HippoMemory("legs", 64, memory_steps=4.5).transform(np.zeros(3))
