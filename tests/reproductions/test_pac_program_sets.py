import gzip
import json

import numpy as np
import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.predictions.program_sets import parse_program
from theodolite.reproductions import pac_program_sets as paper
from theodolite.reproductions.claim import Scale
from theodolite.reproductions.pac_program_sets_copy import CopyTransformer, train_text_to_sql

TOPICS = [
    "all but a share epsilon", "optimisation is exact", "are nested", "greedy baseline", "more holes", "real mistakes", "add up",
    "removed (epsilon = 0.2), ATIS", "held-out questions, ATIS",
]  # fmt: skip
ON_QUESTIONS, FULL_ONLY = TOPICS[4:], TOPICS[7:]


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    for file in (paper._FILE, paper._ATIS):
        if find_data(file) is None:
            pytest.skip(f"needs {file}: set THEODOLITE_DATA")
    claims = quick_claims("pac-program-sets", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == FULL_ONLY
    assert all("full reproduction only" in claims[topic].scaled for topic in FULL_ONLY)
    for topic in ("all but a share epsilon", "optimisation is exact", "are nested", "add up"):
        assert claims[topic].holds is True, topic


def test_without_the_questions_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(paper, "find_data", lambda name: None)
    for name in ("_guarantee", "_exact", "_nested", "_compact"):
        monkeypatch.setattr(paper, name, lambda scale, seed: "measured")
    told = list(paper.claims(Scale.QUICK, 1))
    assert told[:4] == ["measured"] * 4
    for topic, claim in zip(ON_QUESTIONS, told[4:], strict=True):
        assert topic in claim.claim
        assert (claim.measured, claim.holds) == (None, None)
        assert ("text2sql/atis.json.gz" if topic in FULL_ONLY else "text2sql/geography.json") in claim.scaled


def test_brute_force_by_hand():
    tree = parse_program("[[[]], []]")
    costs = np.array([0.1, 0.2, 0.4, 0.8])
    assert paper._brute_force(tree, costs, 2.0, 1) == 4
    assert paper._brute_force(tree, costs, 0.7, 1) == 3  # without the last leaf
    assert paper._brute_force(tree, costs, 0.35, 2) == 2
    assert paper._brute_force(tree, costs, 0.35, 1) == 0  # two leaves would be two holes
    assert paper._brute_force(tree, costs, 0.05, 3) == 0


def test_splits_calibrate_on_one_half_and_test_on_the_other():
    errors = np.zeros((400, 25), dtype=bool)
    errors[:80, :10] = True  # a fifth of the questions is missed by the smaller sets
    removed = np.tile(np.linspace(0, 1, 25), (400, 1))
    sets = paper._Sets(errors, removed)
    coverage, share = sets.on_splits(0.1, 0)
    assert np.allclose(coverage, 1.0)
    assert np.allclose(share, 10 / 24)
    coverage, share = sets.on_splits(0.4, 0)
    assert (coverage < 1).all()
    assert np.allclose(share, 0)
    nothing = paper._Sets(np.ones((400, 25), dtype=bool), removed).on_splits(0.1, 0)
    assert np.allclose(nothing, 1.0)  # holes at the root


def test_the_copying_model_tells_probabilities():
    torch.manual_seed(0)
    model = CopyTransformer(6, 9, torch.tensor([-1, -1, 4, -1, 5, 4]), width=8, layers=1).eval()
    source, target = torch.tensor([[2, 4, 5, 0], [3, 3, 1, 1]]), torch.tensor([[1, 4, 5], [1, 7, 2]])
    told = model(source, model.encode(source), target)
    assert told.shape == (2, 3, 9)
    assert torch.allclose(told.exp().sum(dim=-1), torch.ones(2, 3), atol=1e-4)
    later = target.clone()
    later[:, 2] = 8
    assert torch.allclose(model(source, model.encode(source), later)[:, :2], told[:, :2], atol=1e-6)  # causal


def test_questions_are_learned_and_written(tmp_path):
    queries = [
        {"sql": [f"SELECT {name} FROM t WHERE s = \"v0\" ;"],
         "sentences": [{"text": f"what is the {name} of v0", "question-split": part} for part in ("train", "train", "test")]}
        for name in ("area", "size")
    ]  # fmt: skip
    path = tmp_path / "questions.json.gz"
    too_long = {"sql": ["SELECT " + "a , " * 20 + "b ;"], "sentences": [{"text": "all", "question-split": "train"}]}
    path.write_bytes(gzip.compress(json.dumps([*queries, too_long]).encode()))
    made = train_text_to_sql(path, width=16, layers=1, epochs=150, longest=20)
    assert made.trained_on == 4
    assert [one.text for one in made.generations] == made.references
    for one in made.generations:
        assert "".join(token.text for token in one.tokens) == one.text
        assert one.logprob < 0
