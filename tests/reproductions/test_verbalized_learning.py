import re

import numpy as np
import pytest

from language_server import protocol_server
from quick_claims import quick_claims
from theodolite.reproductions import verbalized_learning as paper
from theodolite.reproductions.claim import Scale

TOPICS = [
    "through words", "second wording", "training loop", "it fits", "interpretable", "selection", "resumable", "linear",
    "polynomial", "sine", "periodic",
]  # fmt: skip


def test_quick():
    if missing := paper._missing():
        pytest.skip(missing)
    claims = quick_claims("verbalized-learning", TOPICS)
    assert {topic for topic, claim in claims.items() if claim.holds is None} == {"it fits", *TOPICS[7:]}
    assert all("THEODOLITE_ENDPOINT" in claims[topic].scaled for topic in TOPICS[7:])
    for topic in ("training loop", "interpretable", "resumable"):
        assert claims[topic].holds is True


def test_without_the_data_or_the_model_it_says_so(monkeypatch):
    monkeypatch.delenv("THEODOLITE_DATA", raising=False)
    monkeypatch.delenv("THEODOLITE_ENDPOINT", raising=False)
    found = list(paper.claims(Scale.QUICK, 0))
    assert [claim.holds for claim in found] == [None] * 11
    assert all(topic in claim.claim for topic, claim in zip(TOPICS, found, strict=True))
    assert "rt-polarity" in found[0].scaled


@pytest.mark.parametrize("kind", ["linear", "polynomial", "sine"])
def test_the_examples_are_those_of_the_paper(kind):
    about = paper.example(kind, 0)
    assert about.X.shape == (100, 1)
    assert len(about.inside) + len(about.outside) == 40
    assert about.X.min() <= about.inside.min() + 0.5
    assert not ((about.outside >= about.X.min()) & (about.outside <= about.X.max())).any()
    noise = about.y - about.truth(about.X[:, 0])
    assert noise.std() == pytest.approx({"linear": 0.1, "polynomial": 1.0, "sine": 0.01}[kind], rel=0.3)
    assert np.array_equal(about.y, about.y.round(2))


def test_the_endpoint_claims_run_where_one_is_named(monkeypatch):
    """The server answers by a straight line: what holds here says nothing of a language model."""

    def answer(messages):
        if messages[0]["role"] == "system":
            return "Reasoning: r\nNew Pattern Descriptions: d"
        x = float(re.search(r"\*\* Input: \*\*\n\[(.*?)\]", messages[0]["content"])[1])
        return f"Explanations: e\nOutput: [{4 + 3 * x:.2f}]"

    with protocol_server(answer=answer) as server:
        monkeypatch.setenv("THEODOLITE_ENDPOINT", server.url)
        monkeypatch.setenv("THEODOLITE_LANGUAGE_MODEL", "m")
        monkeypatch.setattr(paper, "connect", lambda *a, **k: _connect(*a, cache=False, **k))
        found = list(paper._regressions(Scale.QUICK, 0))
    assert [claim.holds for claim in found] == [True, False, False, False]
    assert found[0].measured.value < 0.01
    assert all(claim.comparator is not None for claim in found)


_connect = paper.connect
