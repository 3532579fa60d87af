import numpy as np
import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import novel_class_discovery as paper

TOPICS = [
    "Letter, number of classes known", "new classes: pen digits", "new classes: digits", "gives the number", "hiding known ones",
    "easy data", "is k-means", "avoid the known", "bandwidth and embedding", "one-to-one maps",
]  # fmt: skip
EXACT = TOPICS[6:]
ON_FILES = ("Letter, number of classes known", "new classes: pen digits", "hiding known ones")


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data(paper._LETTER) is None or find_data(paper._PEN) is None:
        pytest.skip(f"needs {paper._LETTER} and {paper._PEN}: set THEODOLITE_DATA")
    claims = quick_claims("novel-class-discovery", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in (*EXACT, "Letter, number of classes known", "new classes: digits", "easy data"):
        assert claims[topic].holds is True, topic


def test_without_files_claims_name_them(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    scale = paper.Scale.QUICK
    claims = [paper._best(scale, 0), paper._collapse("pen digits", scale, 0), paper._tuning(scale, 0)]
    for topic, claim in zip(ON_FILES, claims, strict=True):
        assert topic in claim.claim
        assert (claim.measured, claim.holds) == (None, None)
        assert "in the folder THEODOLITE_DATA" in claim.scaled


def test_the_scores_that_tuning_had_to_go_by_are_told():
    hidden = [[(0.4, 0.6), (0.7, 0.5)], [(0.5, 0.5), (0.7, 0.7)]]  # seed, setting, split
    told = paper._hidden_scores((0.0, 0.5), hidden)
    # the settings' differences are -0.3 and 0.1 in one seed, -0.2 twice in the other
    assert "0: 0.500, 0.5: 0.650" in told
    assert "standard error of about 0.10 a seed" in told


def test_new_classes_have_no_label_and_test_rows_are_others():
    table = paper._read("digits", None, 3)
    assert set(table.labels) == {"-1", *"12789"} == {"-1"} | (set(map(str, range(10))) - set(table.novel))
    assert (len(table.y), len(table.y_test)) == (1257, 540)
    rows, names = table.new()
    assert set(names) == set("03456")
    assert len(rows) == np.isin(table.y_test, list("03456")).sum()
    assert np.allclose(table.scaled.x.mean(axis=0), 0, atol=1e-9)
    assert np.abs(table.scaled.x_test.mean(axis=0)).max() > 1e-3  # scaled by the training rows
