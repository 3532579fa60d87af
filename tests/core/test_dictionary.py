"""Dictionaries of hidden space: known answers for neurons, principal components, random and overcomplete directions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.core.dictionary import (
    Dictionary,
    LinearDictionary,
    explained_variance,
    kept_codes_curve,
    measure,
    stability,
)
from theodolite.core.errors import InputError


def rows(n=400, seed=0):
    """Width 6, variances 36, 25, .. 1 along rotated axes, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(9))).Q
    return torch.randn(n, 6, generator=generator) * torch.arange(6.0, 0.0, -1.0) @ turned.mT + 100


def test_principal_components_keep_the_share_of_the_largest_eigenvalues():
    x = rows()
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True)))[::-1]
    for k in (1, 3, 6):
        made = LinearDictionary.principal_components(x, k)
        assert isinstance(made, Dictionary)
        assert torch.allclose(made.directions @ made.directions.mT, torch.eye(k), atol=1e-5)
        assert explained_variance(made, x) == pytest.approx(spectrum[:k].sum() / spectrum.sum(), abs=1e-5)


def test_the_table_counts_codes_that_are_on_and_codes_that_never_are():
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [3.0, 1.0, 0.0]])
    table = measure({"neurons": LinearDictionary.neurons(3)}, x)
    (row,) = table
    assert (row.name, row.codes, row.explained) == ("neurons", 3, 1.0)
    assert row.active == pytest.approx(4 / 3)
    assert row.dead == pytest.approx(1 / 3)


def test_the_answer_does_not_depend_on_the_memory():
    x = rows()
    made = LinearDictionary.random(6, 4, seed=1, centre=x.mean(dim=0))
    assert explained_variance(made, x) == pytest.approx(explained_variance(made, x, memory=1), abs=1e-6)


def test_principal_components_need_no_more_codes_than_neurons_or_random_directions():
    x = rows(2000)
    fit, shown = x[:1000], x[1000:]
    counts = [1, 2, 3, 4, 5, 6]
    curves = [
        kept_codes_curve(made, shown, counts)
        for made in (
            LinearDictionary.principal_components(fit),
            LinearDictionary.neurons(6),
            LinearDictionary.random(6, 6, seed=0),
        )
    ]
    assert all(curve.mean[-1] == pytest.approx(1.0, abs=1e-4) for curve in curves)
    assert all((curves[0].mean >= other.mean - 0.02).all() for other in curves[1:])
    assert curves[0].smallest().dimension == 4  # 36 + 25 + 16 + 9 of 91


@given(st.permutations(range(5)), st.lists(st.sampled_from([-2.0, -1.0, 0.5, 3.0]), min_size=5, max_size=5))
@settings(max_examples=25, deadline=None)
def test_order_sign_and_length_of_directions_do_not_count(order, scales):
    made = LinearDictionary.random(8, 5, seed=3)
    moved = made.directions[list(order)] * torch.tensor(scales)[:, None]
    assert stability(made, LinearDictionary(moved, made.encoder, made.centre)) == pytest.approx(1.0, abs=1e-6)
    assert stability(made, LinearDictionary.random(8, 5, seed=4)) < 0.95


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LinearDictionary.principal_components(rows(), 7), "1 to that many"),
        (lambda: LinearDictionary.random(4, 5, seed=0), "at most 4"),
        (lambda: explained_variance(LinearDictionary.neurons(3), rows()), "width 3"),
        (lambda: explained_variance(LinearDictionary.neurons(6), torch.ones(5, 6)), "no variance"),
        (lambda: measure({"x": LinearDictionary.neurons(6)}, rows(1)), "at least two"),
        (lambda: kept_codes_curve(LinearDictionary.neurons(6), rows(10), [1]), "at least 10"),
        (lambda: stability(LinearDictionary.neurons(3), LinearDictionary.neurons(4)), "do not compare"),
    ],
)
def test_what_cannot_be_measured_is_told(call, text):
    with pytest.raises(InputError, match=text):
        call()
