import numpy as np
import pytest
import torch

from quick_claims import quick_claims
from theodolite.reproductions import diagonal_state_space as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "float32", "float64", "as N grows", "normal part", "structured initialisation remember", "real eigenvalues",
    "random frequencies", "trained, all", "trained, every", "hardly matter", "costs little",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_all_but_the_trained_ones_are_measured():
    claims = quick_claims("diagonal-state-space", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == TOPICS[7:10]
    for topic in TOPICS[:7]:
        assert claims[topic].holds is True, topic


def test_the_trained_claims_are_told_from_what_was_measured(monkeypatch):
    monkeypatch.setattr(
        paper, "_trained_accuracy", lambda seed, **options: 0.5 if options.get("init") == "real" else 0.9
    )
    trained, above, ablated = paper._trained(Scale.FULL, 0)
    assert (trained.measured.value, trained.holds) == (0.9, True)
    assert (round(above.measured.value, 6), above.holds) == (0.4, True)
    assert (ablated.measured.value, ablated.holds) == (0.0, True)
    monkeypatch.setattr(paper, "_trained_accuracy", lambda seed, **options: 0.7 if "train_B" in options else 0.79)
    assert [claim.holds for claim in paper._trained(Scale.FULL, 0)] == [False, False, False]


def test_digits_are_series_of_pixels():
    x, y, x_test, y_test = paper._digits(0)
    assert (tuple(x.shape[1:]), len(x) + len(x_test), len(y), len(y_test)) == ((256, 1), 1797, len(x), 360)
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1) < 1e-4


def test_band_limited_noise_ends_at_the_cut():
    u = paper._band_limited(4000, 0)
    spectrum = np.abs(np.fft.rfft(u))
    assert spectrum[np.fft.rfftfreq(4000) > paper._CUT].max() < 1e-9 * spectrum.max()


def test_the_direct_formula_is_the_kernel():
    kernel = paper.DiagonalSSMKernel(3, 8, seed=0).double()
    with torch.no_grad():
        assert torch.allclose(paper._direct(kernel, 50), kernel(50), atol=1e-11)
