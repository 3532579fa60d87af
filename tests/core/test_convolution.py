import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.core.convolution import causal_convolution


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 40), channels=st.integers(1, 3))
def test_it_is_the_sum_over_the_past(seed, length, channels):
    rng = np.random.default_rng(seed)
    u, kernel = rng.normal(size=(2, channels, length)), rng.normal(size=(channels, length))
    found = causal_convolution(torch.from_numpy(u), torch.from_numpy(kernel)).numpy()
    for b in range(2):
        for c in range(channels):
            assert found[b, c] == pytest.approx(np.convolve(u[b, c], kernel[c])[:length], abs=1e-12)
