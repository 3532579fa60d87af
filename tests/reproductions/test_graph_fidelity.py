import pytest

from quick_claims import quick_claims
from theodolite.core.sources import find_data
from theodolite.reproductions import graph_fidelity as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "learned the motif", "robust FidΔ agrees", "robust Fid+ falls", "robust Fid− rises", "special case", "torch_geometric",
    "all subsets", "complement", "constant network", "real molecules",
]  # fmt: skip
EXACT = TOPICS[4:9]


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data(paper._MUTAG) is None:
        pytest.skip(f"needs {paper._MUTAG}: set THEODOLITE_DATA")
    if paper.importlib.util.find_spec("torch_geometric") is None:
        pytest.skip("needs torch_geometric: pip install 'theodolite[graphs]'")
    claims = quick_claims("graph-fidelity", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == []
    for topic in (*EXACT, *TOPICS[:4]):
        assert claims[topic].holds is True, topic


def test_the_exact_claims_hold_for_another_seed():
    for claim in (paper._direct_deletion(5), paper._enumeration(5), paper._complement(5), paper._nothing_moves(5)):
        assert claim.holds is True, claim.claim
        assert claim.comparator.measured >= 0


def test_without_data_or_package_claims_say_what_is_missing(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claim = paper._molecules(Scale.QUICK, 0)
    assert (claim.measured, claim.holds) == (None, None)
    assert "MUTAG.txt" in claim.scaled
    monkeypatch.setattr(paper.importlib.util, "find_spec", lambda name: None)
    claim = paper._beside_pyg(0)
    assert (claim.measured, claim.holds) == (None, None)
    assert "theodolite[graphs]" in claim.scaled


def test_networks_that_do_not_learn_give_no_number(monkeypatch):
    monkeypatch.setattr(paper, "_run", lambda seed, tests: None)
    claims = list(paper._known_motifs(Scale.QUICK, 0))
    assert len(claims) == 4
    assert all(claim.measured is None and "less than 95 %" in claim.scaled for claim in claims)
