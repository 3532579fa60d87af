import importlib

import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import dsir as paper
from theodolite.reproductions.claim import Scale

TOPICS = ["predicts", "does better", "domain in the mix", "published ones", "Gumbel", "scales out", "selecting more"]
ON_TEXTS = (*TOPICS[:4], "scales out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_every_claim_is_told_and_the_exact_ones_hold():
    if any(find_data(name) is None for name in paper._FILES.values()):
        pytest.skip(f"needs {', '.join(paper._FILES.values())}: set THEODOLITE_DATA")
    pytest.importorskip("data_selection")
    claims = quick_claims("dsir", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in ("domain in the mix", "published ones", "Gumbel", "scales out"):
        assert claims[topic].holds is True, topic


def test_without_data_claims_name_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = list(paper.claims(Scale.QUICK, 1))
    assert len(claims) == len(TOPICS)
    for topic, claim in zip(TOPICS, claims, strict=True):
        assert topic in claim.claim
        if topic in ON_TEXTS:
            assert (claim.measured, claim.holds) == (None, None)
            assert "texts/huffpost.json.gz" in claim.scaled
        elif topic == "Gumbel":
            assert claim.holds is True


def test_without_a_package_its_name_is_told(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    mix = {"Reuters": ["a text"], "CLINC": ["another"]}
    assert "data-selection" in paper._published_weights(mix, "").scaled
    assert "theodolite[distributed]" in paper._scales_out(mix, "", Scale.QUICK, 0).scaled


def test_target_test_and_pool_share_no_chunk():
    mix = {name: [f"{name} {i}" for i in range(n)] for name, n in (("a", 2000), ("b", 500))}
    for domain, size in (("a", 250), ("b", 125)):
        task = paper._Task.of(mix, domain, 3)
        assert (len(task.target), len(task.test)) == (size, 150)
        parts = [set(task.target), set(task.test), set(task.pool)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 2500
        assert [text.split()[0] for text in task.pool] == task.domains.tolist()


def test_words_of_every_domain_count_the_same():
    mix = {"large": ["many " * 1000], "small": ["few rare"]}
    assert set(list(paper._vocabulary(mix))[:1]) == {"many"}
    assert set(paper._vocabulary(mix)) == {"many", "few", "rare"}
    windows = paper._windows(["few rare many x few"], paper._vocabulary(mix))
    assert windows.shape == (2, 4)
    assert windows[0, 3] == 3  # not in the vocabulary
