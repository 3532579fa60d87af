import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.core.convolution import causal_convolution

# torch itself warns of its own scripts when forward mode is used for the first time
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 40), channels=st.integers(1, 3))
def test_it_is_the_sum_over_the_past(seed, length, channels):
    rng = np.random.default_rng(seed)
    u, kernel = rng.normal(size=(2, channels, length)), rng.normal(size=(channels, length))
    found = causal_convolution(torch.from_numpy(u), torch.from_numpy(kernel)).numpy()
    for b in range(2):
        for c in range(channels):
            assert found[b, c] == pytest.approx(np.convolve(u[b, c], kernel[c])[:length], abs=1e-12)


@forward_mode
def test_its_gradients_are_right_to_the_second_order_and_forwards():
    made = torch.Generator().manual_seed(0)
    u = torch.randn(2, 3, 7, dtype=torch.float64, generator=made, requires_grad=True)
    kernel = torch.randn(3, 7, dtype=torch.float64, generator=made, requires_grad=True)
    assert torch.autograd.gradcheck(causal_convolution, (u, kernel), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(causal_convolution, (u, kernel))


@forward_mode
def test_it_maps_over_kernels_and_has_a_hessian_by_torch_func():
    made = torch.Generator().manual_seed(0)
    u, kernels = (torch.randn(2, 3, 5, dtype=torch.float64, generator=made) for _ in range(2))
    several = torch.func.vmap(causal_convolution, in_dims=(None, 0))(u, kernels)
    assert torch.allclose(several[1], causal_convolution(u, kernels[1]))
    # half the sum of the squares is quadratic in the kernel, so its Hessian gives the gradient back
    hessian = torch.func.hessian(lambda k: causal_convolution(u, k).square().sum() / 2)(kernels[0])
    found = causal_convolution(u, kernels[0])
    wanted = torch.stack([(found[:, :, m:] * u[:, :, : 5 - m]).sum(dim=(0, 2)) for m in range(5)], dim=1)
    assert torch.allclose(torch.einsum("abcd,cd->ab", hessian, kernels[0]), wanted)


def test_groups_of_channels_give_what_all_of_them_at_once_give(monkeypatch):
    made = torch.Generator().manual_seed(0)
    u, kernel = torch.randn(2, 5, 9, generator=made), torch.randn(5, 9, generator=made).requires_grad_()
    (whole,) = torch.autograd.grad(causal_convolution(u, kernel).square().sum(), kernel)
    monkeypatch.setattr("theodolite.core.convolution._SPECTRA", 3000)
    (grouped,) = torch.autograd.grad(causal_convolution(u, kernel).square().sum(), kernel)
    assert torch.allclose(whole, grouped, atol=1e-5)
