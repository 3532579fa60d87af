"""Matrices, bases, kernels and discretisations against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.legendre import leggauss
from scipy.linalg import expm
from scipy.signal import cont2discrete
from scipy.special import eval_laguerre, eval_legendre

from theodolite.core.errors import InputError
from theodolite.networks.hippo import (
    HippoMemory,
    basis,
    discretize,
    hippo_matrix,
    low_rank_correction,
    normal_plus_low_rank,
    ssm_kernel,
    weight,
)
from theodolite.networks.hippo.matrices import MEASURES

FEW = settings(max_examples=25, deadline=None)
SHIFT = {"legs": -0.5, "foud": -0.5, "legt": 0.0, "fout": 0.0, "lagt": 0.0}
RANK = {"legs": 1, "legt": 2, "fout": 1, "foud": 0, "lagt": 1}


# ---- matrices


def test_small_matrices_by_hand():
    r3, r5, r15 = np.sqrt([3, 5, 15])
    A, B = hippo_matrix("legs", 3)
    assert np.allclose(A, [[-1, 0, 0], [-r3, -2, 0], [-r5, -r15, -3]])
    assert np.allclose(B, [1, r3, r5])
    A, B = hippo_matrix("legt", 3)
    assert np.allclose(A, [[-1, r3, -r5], [-r3, -3, r15], [-r5, -r15, -5]])
    assert np.allclose(B, [1, r3, r5])
    A, B = hippo_matrix("fout", 6)
    r2, pi = np.sqrt(2), np.pi
    assert np.allclose(A[0], [-2, 0, -2 * r2, 0, -2 * r2, 0])
    assert np.allclose(A[:, 0], [-2, 0, -2 * r2, 0, -2 * r2, 0])
    assert np.allclose(A[2:4, 2:4], [[-4, -2 * pi], [2 * pi, 0]])
    assert np.allclose(A[4:6, 4:6], [[-4, -4 * pi], [4 * pi, 0]])
    assert np.allclose(A[2, 4], -4)
    assert np.allclose(B, [2, 0, 2 * r2, 0, 2 * r2, 0])
    A, B = hippo_matrix("foud", 4)
    assert np.allclose(A, [[-0.5, 0, 0, 0], [0, -0.5, 0, 0], [0, 0, -0.5, -2 * pi], [0, 0, 2 * pi, -0.5]])
    assert np.allclose(B, [1, 0, r2, 0])
    A, B = hippo_matrix("lagt", 3)
    assert np.allclose(A, [[-0.5, 0, 0], [-1, -0.5, 0], [-1, -1, -0.5]])
    assert np.allclose(B, 1)
    assert hippo_matrix("legs", 3, np.float32)[0].dtype == np.float32


@FEW
@given(measure=st.sampled_from(MEASURES), half=st.integers(1, 40))
def test_every_matrix_is_normal_plus_low_rank(measure, half):
    n = 2 * half
    A, B = hippo_matrix(measure, n)
    P = low_rank_correction(measure, n)
    assert P.shape == (RANK[measure], n)
    normal = A + P.T @ P
    assert np.allclose(normal + normal.T, 2 * SHIFT[measure] * np.eye(n), atol=1e-11 * n)
    found = normal_plus_low_rank(measure, n)
    assert np.abs(found.eigenvalues.real - SHIFT[measure]).max() == 0
    V = found.V
    assert np.allclose(V.conj().T @ V, np.eye(n), atol=1e-11)
    again = V @ (np.diag(found.eigenvalues) - found.P.T @ found.P.conj()) @ V.conj().T
    assert np.allclose(again, A, atol=1e-12 * np.abs(A).max() * n)
    assert np.allclose(V @ found.B, B, atol=1e-11 * n)
    # halves are conjugate, so that the last N/2 tell the rest
    assert np.array_equal(V[:, ::-1].conj(), V)
    assert np.array_equal(found.eigenvalues[::-1].conj(), found.eigenvalues)
    assert (np.diff(found.eigenvalues.imag) >= 0).all()


@pytest.mark.parametrize("n", [64, 256])
def test_spectrum_of_legs_stays_clean_where_a_general_solver_does_not(n):
    found = normal_plus_low_rank("legs", n)
    assert abs(found.eigenvalues.imag.max() / (n**2 / np.pi) - 1) < 1e-3
    assert np.abs(found.V.conj().T @ found.V - np.eye(n)).max() < 1e-10
    assert normal_plus_low_rank("legs", n) is found
    with pytest.raises(ValueError, match="read-only"):
        found.P[0, 0] = 1


def test_odd_sizes_have_one_real_eigenvector():
    found = normal_plus_low_rank("legs", 5)
    assert found.eigenvalues[2] == -0.5
    assert np.allclose(found.V[:, 2].imag, 0)


@FEW
@given(measure=st.sampled_from(MEASURES), half=st.integers(1, 30))
def test_every_matrix_is_stable(measure, half):
    A, _ = hippo_matrix(measure, 2 * half)
    assert np.linalg.eigvalsh(A + A.T).max() < 1e-9 * np.abs(A).max()


# ---- what the states hold


def test_legs_is_the_warped_legendre_basis():
    t = np.linspace(0.01, 5, 300)
    A, B = hippo_matrix("legs", 32)
    closed = [np.sqrt(2 * n + 1) * eval_legendre(n, 2 * np.exp(-t) - 1) * np.exp(-t) for n in range(32)]
    assert np.abs(ssm_kernel(A, B, t) - np.transpose(closed)).max() <= 1e-10
    assert np.abs(basis("legs", 32, t) * weight("legs", t)[:, None] - np.transpose(closed)).max() <= 1e-10


def test_lagt_has_laguerre_functions_without_an_exponential_weight():
    t = np.linspace(0, 6, 200)
    A, B = hippo_matrix("lagt", 24)
    closed = np.transpose([np.exp(-t / 2) * eval_laguerre(n, t) for n in range(24)])
    assert np.abs(ssm_kernel(A, B, t) - closed).max() <= 1e-10
    assert np.abs(basis("lagt", 24, t) - closed).max() <= 1e-10
    assert (weight("lagt", t) == 1).all()


def test_foud_has_decaying_waves():
    t = np.linspace(0, 4, 200)
    kernel = ssm_kernel(*hippo_matrix("foud", 8), t)
    assert np.allclose(kernel[:, 4], np.sqrt(2) * np.exp(-t / 2) * np.cos(4 * np.pi * t))
    assert np.allclose(kernel[:, 5], np.sqrt(2) * np.exp(-t / 2) * np.sin(4 * np.pi * t))
    assert np.allclose(kernel, basis("foud", 8, t) * weight("foud", t)[:, None])


@pytest.mark.parametrize("measure", ["legt", "fout"])
def test_windows_end_at_one_and_not_at_two(measure):
    t = np.linspace(0, 2, 2001)
    wanted = basis(measure, 64, t) * weight(measure, t)[:, None]
    assert not wanted[t > 1].any()
    found = ssm_kernel(*hippo_matrix(measure, 64), t)
    alive = np.setdiff1d(np.arange(6), [1] if measure == "fout" else [])
    energy = (found[:, alive] ** 2).sum(axis=0)
    assert ((found[t > 1.05][:, alive] ** 2).sum(axis=0) / energy < 1e-3).all()
    apart = np.sqrt(((found - wanted)[:, alive] ** 2).sum(axis=0) / (wanted[:, alive] ** 2).sum(axis=0))
    assert (apart < 0.2).all()
    nearer = ssm_kernel(*hippo_matrix(measure, 256), t)[:, :6][:, alive]
    wanted = wanted[:, :6][:, alive]
    assert (np.sqrt(((nearer - wanted) ** 2).sum(axis=0) / (wanted**2).sum(axis=0)) < apart).all()
    if measure == "fout":
        assert not found[:, 1].any()


def test_the_size_of_outputs_does_not_depend_on_the_number_of_states():
    """With C ~ N(0, 1) the outputs' variance is the mean of |x|^2: the input's, for a band that the basis resolves.

    LagT's functions have no weight of size 1, and its outputs grow with N.
    """
    steps, length = 500, 30_000
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=length))
    spectrum[np.fft.rfftfreq(length) * steps > 1.5] = 0
    u = np.fft.irfft(spectrum, length)
    u /= u[2500:].std()
    size = {
        (measure, n): float((HippoMemory(measure, n, memory_steps=steps).transform(u)[2500:, 0] ** 2).sum(1).mean())
        for measure in ("legs", "legt", "fout", "lagt")
        for n in (16, 32, 64)
    }
    for measure in ("legs", "legt", "fout"):
        assert [size[measure, n] for n in (16, 32, 64)] == pytest.approx([1.0] * 3, abs=0.12)
        assert size[measure, 64] / size[measure, 32] == pytest.approx(1.0, abs=0.03)
    assert size["lagt", 64] > 2 * size["lagt", 16]


def test_orthonormal_by_gauss_quadrature():
    nodes, weights = leggauss(40)
    y, w = (nodes + 1) / 2, weights / 2
    # legs: y = e^-t turns the weight e^-t dt into dy
    for measure, t in (("legs", -np.log(y)), ("legt", y)):
        p = basis(measure, 16, t)
        assert np.abs(p.T @ (p * w[:, None]) - np.eye(16)).max() <= 1e-10
    even = (np.arange(64) + 0.5) / 64
    gram = basis("fout", 16, even).T @ basis("fout", 16, even) / 64
    assert np.allclose(gram, np.diag([1, 0, *[1] * 14]))


def test_kernels_on_uneven_and_unsorted_times_are_exponentials():
    A, B = hippo_matrix("legt", 8)
    for times in ([0.3, 0.1, 2.0, 0.1], [0.7], np.arange(20) * 0.05 + 0.2):
        wanted = np.stack([expm(A * t) @ B for t in times])
        assert np.allclose(ssm_kernel(A, B, np.array(times)), wanted, atol=1e-11)
    assert ssm_kernel(A, B, np.array([])).shape == (0, 8)


@FEW
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), dt=st.floats(0.01, 0.3))
def test_discretisations_are_scipys(seed, n, dt):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(n, n)) - 3 * np.eye(n), rng.normal(size=n)
    system = (A, B[:, None], np.eye(n), np.zeros((n, 1)))
    for method, alpha, name in (("zoh", 0.5, "zoh"), ("bilinear", 0.5, "bilinear"), ("bilinear", 0.8, "gbt")):
        found = discretize(A, B, dt, method, alpha)
        wanted = cont2discrete(system, dt, name, alpha=alpha)[:2]
        assert np.allclose(found[0], wanted[0])
        assert np.allclose(found[1], wanted[1][:, 0])


def test_the_exponential_of_legs_at_64_in_float32_is_not_used():
    A, B = hippo_matrix("legs", 64, np.float32)
    exact = discretize(*hippo_matrix("legs", 64), 0.01)[0]
    found = discretize(A, B, 0.01)[0]
    assert found.dtype == np.float64
    assert np.abs(found - exact).max() < 1e-4


def test_too_coarse_a_step_is_warned_of():
    A, B = hippo_matrix("legs", 64)
    with pytest.warns(UserWarning, match="too coarse for .* of the 64 states"):
        discretize(A, B, 0.2)
    discretize(A, B, 1 / 50)


# ---- errors


@pytest.mark.parametrize("call", [hippo_matrix, low_rank_correction, normal_plus_low_rank])
def test_measures_and_sizes_are_checked(call):
    with pytest.raises(InputError, match="there are legs, legt, fout, foud, lagt"):
        call("legz", 4)
    with pytest.raises(InputError, match="whole number of at least 1, got 0"):
        call("legs", 0)
    for measure in ("fout", "foud"):
        with pytest.raises(InputError, match="must be even, got 5"):
            call(measure, 5)


@pytest.mark.parametrize("times", [[-0.1, 1.0], [np.nan], [[1.0]]])
def test_times_are_checked(times):
    with pytest.raises(InputError, match="times must be"):
        basis("legs", 4, np.array(times))


def test_discretize_checks_what_it_is_given():
    A, B = hippo_matrix("legs", 4)
    for dt in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="dt must be a positive number"):
            discretize(A, B, dt)
    with pytest.raises(InputError, match="finite"):
        discretize(np.where(A < -1, np.nan, A), B, 0.1)
    with pytest.raises(InputError, match="zoh and bilinear"):
        discretize(A, B, 0.1, "euler")
    with pytest.raises(InputError, match="alpha must be in"):
        discretize(A, B, 0.1, "bilinear", 1.5)
