import numpy as np
import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import transport_scaling as paper

TOPICS = [
    "than the composition alone", "laws of the composition", "between mixes",
    "tracks the score", "gradient of the distance", "exact on a line", "Bures",
    "gives both pilot", "log of the error", "random labels", "selection trains nothing",
]  # fmt: skip
EXACT = ("gradient of the distance", "exact on a line", "Bures", "gives both pilot", "selection trains nothing")


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    pytest.importorskip("ot", reason="needs POT: pip install 'theodolite[data]'")
    if find_data(paper._PEN) is None:
        pytest.skip(f"needs {paper._PEN}: set THEODOLITE_DATA")
    claims = quick_claims("transport-scaling", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in EXACT:
        assert claims[topic].holds is True, topic


def test_without_the_file_digits_stand_in_and_are_named(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    name, X, y = paper._data()
    assert "THEODOLITE_DATA" in name
    assert (X.shape, len(np.unique(y))) == ((1797, 64), 10)


def test_sources_have_the_classes_they_are_meant_to_have_and_no_validation_row():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6000, 3))
    y = rng.integers(0, 10, 6000)
    rows = paper._Rows.split(X, y, rng)
    assert len(rows.validation) == 1500
    assert not np.intersect1d(rows.validation, rows.rest).size
    for source, heavy in zip(paper._by_class(rows, 500, rng), (4, 3, 3), strict=True):
        counts = np.sort(np.bincount(source.y, minlength=10))[::-1]
        assert counts[:heavy].sum() > 0.8 * 500
    noisy = paper._half_and_noise(rows, 500, rng)[2]
    place = {tuple(row): label for row, label in zip(X.tolist(), y.tolist())}
    wrong = np.mean([place[tuple(row)] != label for row, label in zip(noisy.X.tolist(), noisy.y.tolist())])
    assert 0.45 < wrong < 0.63  # a tenth of the random labels is right
