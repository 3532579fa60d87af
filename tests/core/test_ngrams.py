import hashlib
import pickle
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer

from theodolite.core import ngrams as module
from theodolite.core.errors import DataError, InputError, MissingExtraError
from theodolite.core.ngrams import HashedNgrams

TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.text("ab. Ä\n", max_size=40)
QUICK = settings(max_examples=60, deadline=None)


def by_hand(text, n, buckets):
    """The buckets as they are defined, one n-gram at a time."""
    tokens = re.findall(r"\w+|[^\w\s]+", text.lower())
    grams = [" ".join(tokens[i : i + m]) for m in range(1, n + 1) for i in range(len(tokens) - m + 1)]
    return [int(hashlib.sha256(g.encode("utf-8")).hexdigest(), 16) % buckets for g in grams]


def test_published_buckets():
    made = HashedNgrams()
    assert made.bucket("alice") == 6720
    assert made.indices("Alice, alice").tolist() == by_hand("Alice, alice", 2, 10_000)
    assert made.indices("Alice")[0] == 6720


@QUICK
@given(texts=st.lists(TEXT, max_size=8), n=st.integers(1, 4), buckets=st.sampled_from([1, 7, 10_000]))
def test_indices_are_the_definition(texts, n, buckets):
    made = HashedNgrams(n, buckets)
    for _ in range(2):  # the second time from what is remembered
        for text in texts:
            assert made.indices(text).tolist() == by_hand(text, n, buckets)
    dense = np.zeros((len(texts), buckets), int)
    for row, text in enumerate(texts):
        np.add.at(dense[row], by_hand(text, n, buckets), 1)
    found = made.transform(texts)
    assert found.dtype == np.int32
    assert (found.toarray() == dense).all()


@QUICK
@given(texts=st.lists(TEXT, min_size=1, max_size=12), cache=st.integers(0, 40), block=st.integers(1, 60))
def test_neither_cache_nor_block_changes_a_bucket(texts, cache, block):
    made = HashedNgrams(3, 1000, cache_size=cache)
    before = module._BLOCK
    module._BLOCK = block
    try:
        found = made.transform(texts * 2)
    finally:
        module._BLOCK = before
    assert (found != HashedNgrams(3, 1000).transform(texts * 2)).nnz == 0


def test_the_cache_is_bounded():
    made = HashedNgrams(cache_size=1000)
    rng = np.random.default_rng(0)
    for _ in range(20):
        made.grams([" ".join(f"w{i}" for i in rng.integers(0, 100_000, 200))])
        assert len(made._pairs) <= 1000
        assert len(made._ids) <= 1000 // 8 + 200


def test_a_block_is_its_documents_one_by_one():
    texts = ["a b", "", "c", "a b c d e f", "  ", "b a"]
    whole = HashedNgrams(3).grams(texts)
    assert whole.sizes.tolist() == [3, 0, 1, 15, 0, 3]
    for row, text in enumerate(texts):
        assert whole.buckets[whole.rows == row].tolist() == by_hand(text, 3, 10_000)


@pytest.mark.parametrize(("n", "tokens"), [(1, 5), (2, 1), (2, 7), (3, 2), (3, 9)])
def test_words_from_the_number_of_ngrams(n, tokens):
    made = HashedNgrams(n)
    sizes = made.grams([" ".join("abcdefghi"[:tokens])]).sizes
    assert made.words(sizes).tolist() == [tokens]


def test_murmur_is_that_of_scikit_learn():
    texts = ["The cat, the mat.", "a b c a b", "", "Ärger über Ölfarbe 12"]
    peer = HashingVectorizer(
        n_features=512, ngram_range=(1, 2), token_pattern=r"(?u)\w+|[^\w\s]+", alternate_sign=False, norm=None
    )
    found = HashedNgrams(2, 512, hash="murmur3").transform(texts)
    assert (found.toarray() == peer.transform(texts).toarray()).all()


def test_the_commonest_ngram_of_each_bucket():
    texts = ["x y x y x", "x z", "q"]
    made = HashedNgrams(2, 40)
    often, names = made.frequent(texts)
    seen = Counter(g for text in texts for g in text.split())
    seen += Counter(" ".join(p) for text in texts for p in zip(text.split(), text.split()[1:], strict=False))
    for bucket in range(40):
        here = {gram: n for gram, n in seen.items() if made.bucket(gram) == bucket}
        assert often[bucket] == max(here.values(), default=0)
        assert names[bucket] == "" if not here else here[names[bucket]] == often[bucket]


def test_a_long_ngram_is_cut_where_it_is_shown():
    _, names = HashedNgrams(1, 1).frequent(["x" * 1000])
    assert names == ["x" * 60 + "…"]


def test_it_is_sent_without_what_it_remembers():
    made = HashedNgrams(3, 77)
    made.grams(["some words to remember " * 50])
    sent = pickle.dumps(made)
    assert len(sent) < 300
    again = pickle.loads(sent)
    assert again.settings == made.settings
    assert again.fingerprint == made.fingerprint
    assert (again.indices("some words") == made.indices("some words")).all()
    assert HashedNgrams(2).fingerprint != HashedNgrams(2, hash="murmur3").fingerprint


def test_half_a_surrogate_pair_is_a_token_like_others():
    assert len(HashedNgrams().indices("a \ud800b")) > 1


def test_the_final_sigma_depends_on_its_own_text_only():
    made = HashedNgrams()
    assert made.transform(["ΟΔΟΣ", "Α"]).toarray()[0].tolist() == made.transform(["ΟΔΟΣ"]).toarray()[0].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ngrams": 0}, "ngrams >= 1"),
        ({"buckets": 0}, "buckets"),
        ({"cache_size": -1}, "cache_size"),
        ({"tokenizer": "blanks"}, "wordpunct"),
        ({"hash": "md5"}, "murmur3"),
    ],
)
def test_settings_that_cannot_be(options, words):
    with pytest.raises(InputError, match=words):
        HashedNgrams(**options)


def test_a_document_that_is_no_text():
    with pytest.raises(DataError, match="number 1 of these is a int"):
        HashedNgrams().grams(["a", 3])


def test_the_other_tokenizer_says_what_it_needs(monkeypatch):
    def absent(text):
        raise LookupError("punkt_tab")

    def missing(name, extra):
        raise MissingExtraError(f"{name} of {extra}")

    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "word_tokenize", absent)
    with pytest.raises(DataError, match="punkt_tab"):
        HashedNgrams(tokenizer="word_tokenize")
    monkeypatch.setattr(nltk, "word_tokenize", lambda text: text.split("|"))
    assert len(HashedNgrams(1, tokenizer="word_tokenize").indices("a b|c")) == 2
    monkeypatch.setattr(module, "require", missing)
    with pytest.raises(MissingExtraError, match="nltk"):
        HashedNgrams(tokenizer="word_tokenize")
