import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import bytes_per_row, chunk_rows, chunks, peak_memory
from theodolite.core.view import ModelView, evaluation_mode, model_input


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.floats(1, 1e6), st.integers(1, 10**7))
def test_chunks_cover_every_row_once_and_fit(n, row_bytes, budget):
    parts = list(chunks(n, row_bytes, budget))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    largest = max((part.stop - part.start for part in parts), default=0)
    assert largest <= chunk_rows(row_bytes, budget)


def test_a_gradient_costs_more_than_a_forward_pass():
    model = nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 2))
    row = torch.randn(1, 100)
    assert bytes_per_row(model, row, gradients=True) > 8000
    assert bytes_per_row(model, row, gradients=True) > bytes_per_row(model, row, gradients=False)


def test_weights_made_on_the_fly_are_no_cost_of_a_row():
    class Made(nn.Module):
        def forward(self, x):
            return x @ (torch.ones(1000, 1000) * 2)

    row = torch.randn(1, 1000)
    assert bytes_per_row(Made(), row, gradients=False) < 30_000


def test_peak_memory_sees_an_array_that_is_gone_again():
    with peak_memory() as peak:
        block = np.ones(400_000_000 // 8)
        del block
    assert peak.bytes is None or peak.bytes > 200_000_000


def test_view_restores_every_mode_and_gives_probabilities():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    x = torch.randn(7, 3)
    first = ModelView(model)(x)
    assert torch.equal(first, ModelView(model, memory=1)(x)) or torch.allclose(first, ModelView(model, memory=1)(x))
    assert first.sum(dim=1).tolist() == pytest.approx([1.0] * 7, abs=1e-5)
    assert model.training
    assert not model[1].training


def test_gradients_equal_autograd_row_by_row():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(6, 3)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    ours = ModelView(model, memory=2000).gradients(x, target)
    for i in range(6):
        row = x[i : i + 1].clone().requires_grad_(True)
        torch.softmax(model(row), dim=1)[0, target[i]].backward()
        torch.testing.assert_close(ours[i], row.grad[0])


def test_view_of_an_estimator_is_its_predict_proba():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    clf = LogisticRegression().fit(x, x[:, 0] > 0)
    ours = ModelView(clf)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, clf.predict_proba(x))
    assert not ModelView(clf).differentiable


@pytest.mark.parametrize(("call", "error"), [
    (lambda: ModelView(3), ModelError),
    (lambda: ModelView(nn.Linear(2, 2))(torch.empty(0, 2)), InputError),
    (lambda: ModelView(nn.Linear(2, 2)).targets(torch.zeros(3, 2), 2), InputError),
    (lambda: ModelView(nn.Linear(2, 2)).targets(torch.zeros(3, 2), torch.tensor([0, 1])), InputError),
    (lambda: chunk_rows(1, 0), InputError),
])  # fmt: skip
def test_bad_input_is_told(call, error):
    with pytest.raises(error):
        call()


def test_evaluation_mode_comes_back_after_an_error():
    model = nn.Dropout()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        raise ZeroDivisionError
    assert model.training


def test_a_function_is_bounded_like_the_network_in_it():
    model = nn.Sequential(nn.Linear(10, 100_000), nn.ReLU(), nn.Linear(100_000, 2))
    sizes = []

    def function(x):
        sizes.append(len(x))
        return model(x)

    x = torch.randn(50, 10)
    assert torch.allclose(ModelView(function, memory=8_000_000)(x), model(x), atol=1e-6)
    assert max(sizes) < 10


def test_arrays_are_taken_however_they_lie_in_memory():
    model = torch.nn.Linear(3, 1)
    x = np.arange(12.0).reshape(4, 3)
    held = x.copy()
    held.setflags(write=False)
    for one in (x[::-1], np.asfortranarray(x), held, x[:, ::-1]):
        assert torch.equal(model_input(model, one), torch.tensor(one.tolist()))
