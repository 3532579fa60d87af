"""Words and word pairs of texts as numbered buckets, the same on every machine.

A text is lower-cased and cut into tokens; its m-grams for m = 1 .. n, joined by one blank, are hashed into B buckets:

    bucket(g) = SHA-256 of the UTF-8 bytes of g, read as a big-endian whole number, modulo B
"""

__all__ = ["Grams", "HashedNgrams", "check_texts", "text_blocks", "tokenize_with"]

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int
from scipy import sparse

from theodolite.core.errors import DataError, InputError, require

Text = TypeVar("Text", str, str | None)
_BLOCK = 1 << 21  # characters that are worked on at once
_TOKEN_COST = 8  # entries of the cache that a token stands for: it is a Python object, a pair is two numbers
_NAME = 60  # characters of an n-gram that are shown
_HALF = 32  # bits of a token's number in the key of a pair
_WORDPUNCT = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True, eq=False)
class Grams:
    """All n-grams of a block of texts: bucket and text number of each, and how many each text has."""

    buckets: Int[np.ndarray, " gram"]
    rows: Int[np.ndarray, " gram"]
    sizes: Int[np.ndarray, " text"]


@dataclass(frozen=True, eq=False)
class _Level:
    """The m-grams of a block: bucket and text of each; of the different ones the bucket, the place, and which each is."""

    buckets: np.ndarray
    rows: np.ndarray
    of_each: np.ndarray
    inverse: np.ndarray
    starts: np.ndarray


class HashedNgrams:
    """Counts of hashed n-grams, for texts of any number.

    ngrams: longest n-gram. buckets: B. tokenizer: "wordpunct" (runs of word characters, runs of other visible ones) or
    "word_tokenize" (NLTK's, which needs the package nltk and its data). hash: "sha256" as published, or "murmur3", the one of
    scikit-learn's HashingVectorizer: faster, and weights cannot be compared with published ones. cache_size: pairs of tokens
    whose bucket is remembered, so that a repeated pair is not hashed again; results do not depend on it.

    Source: Xie, Santurkar, Ma, Liang, 2023, arXiv:2302.03169 (hashed n-gram features).

    >>> HashedNgrams().indices("Alice sleeps").tolist()
    [6720, 25, 1969]
    """

    def __init__(
        self,
        ngrams: int = 2,
        buckets: int = 10_000,
        tokenizer: str = "wordpunct",
        hash: str = "sha256",
        cache_size: int = 2_000_000,
    ) -> None:
        if ngrams < 1 or not 1 <= buckets < 1 << 31 or cache_size < 0:
            raise InputError(
                f"need ngrams >= 1, buckets from 1 to 2^31 - 1 and cache_size >= 0; got {ngrams}, {buckets}, {cache_size}"
            )
        self.ngrams, self.buckets, self.tokenizer, self.hash, self.cache_size = (
            ngrams, buckets, tokenizer, hash, cache_size
        )  # fmt: skip
        self._tokens = tokenize_with(tokenizer)
        self._hashed = _hash_function(hash, buckets)
        self._forget()

    def _forget(self) -> None:
        self._ids: defaultdict[str, int] = defaultdict(count().__next__)
        self._names: list[bytes] = []
        self._token_buckets = np.empty(0, np.int64)
        self._pairs, self._pair_buckets = np.empty(0, np.int64), np.empty(0, np.int32)

    @property
    def settings(self) -> dict[str, Any]:
        """What the buckets depend on."""
        return {name: getattr(self, name) for name in ("ngrams", "buckets", "tokenizer", "hash")}

    def __repr__(self) -> str:
        return f"HashedNgrams({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return self.settings | {"cache_size": self.cache_size}  # what is remembered stays where it was made

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def fingerprint(self) -> str:
        """The settings as text; equal where the buckets are."""
        return json.dumps(self.settings, sort_keys=True)

    def bucket(self, gram: str) -> int:
        """The bucket of one n-gram, taken as it is.

        >>> HashedNgrams().bucket("alice")
        6720
        """
        return self._hashed(_bytes(gram))

    def indices(self, text: str) -> Int[np.ndarray, " gram"]:
        """The bucket of every n-gram of a text: its tokens in order, then its pairs, and so on."""
        return self.grams([text]).buckets

    def transform(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """How often each bucket occurs in each text: (N, B), int32."""
        parts = [
            sparse.csr_matrix(
                (np.ones(len(g.buckets), np.int32), (g.rows, g.buckets)), shape=(len(g.sizes), self.buckets)
            )
            for g in self.blocks(texts)
        ]
        made = sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, self.buckets), dtype=np.int32)
        return sparse.csr_matrix(made, dtype=np.int32)

    def blocks(self, texts: Iterable[str]) -> Iterator[Grams]:
        """The n-grams of texts that are too many for memory, block after block, in order."""
        for block in text_blocks(texts):
            yield self.grams(block)

    def grams(self, texts: Sequence[Any]) -> Grams:
        """The n-grams of texts that fit in memory together; DataError for what is no string."""
        ids, lengths = self._encode(texts)
        levels = list(self._levels(ids, lengths))
        return Grams(
            np.concatenate([level.buckets for level in levels]),
            np.concatenate([level.rows for level in levels]),
            sum((np.maximum(lengths - m, 0) for m in range(self.ngrams)), np.zeros_like(lengths)),
        )

    def words(self, sizes: Int[np.ndarray, " text"]) -> Int[np.ndarray, " text"]:
        """Number of tokens of texts that have so many n-grams: (sizes + n (n - 1) / 2) // n, as published."""
        return (sizes + self.ngrams * (self.ngrams - 1) // 2) // self.ngrams

    def frequent(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, " bucket"], list[str]]:
        """For every bucket its commonest n-gram in ``texts``, cut at 60 characters, and its count; 0 and "" for none."""
        ids, lengths = self._encode(texts)
        often, names = np.zeros(self.buckets, np.int64), [""] * self.buckets
        for m, level in enumerate(self._levels(ids, lengths), 1):
            counts = np.bincount(level.inverse, minlength=len(level.of_each))
            order = np.lexsort((counts, level.of_each))
            last = order[np.flatnonzero(np.diff(level.of_each[order], append=-1))]
            for at in last[counts[last] > often[level.of_each[last]]].tolist():
                tokens = [at] if m == 1 else ids[level.starts[at] : level.starts[at] + m].tolist()
                bucket = int(level.of_each[at])
                often[bucket] = counts[at]
                gram = b" ".join([self._names[i] for i in tokens]).decode("utf-8", "replace")
                names[bucket] = gram if len(gram) <= _NAME else f"{gram[:_NAME]}…"
        return often, names

    def _encode(self, texts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Number of every token of the block, and how many tokens each text has."""
        if len(self._ids) * _TOKEN_COST > self.cache_size:
            self._forget()
        number, tokens = self._ids.__getitem__, self._tokens
        found, lengths = [], np.empty(len(texts), np.int64)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"a document must be a string; number {row} of these is a {type(text).__name__}")
            words = tokens(text.lower())
            lengths[row] = len(words)
            # a subclass's missing keys are numbered by the look-up itself
            found.append(np.fromiter(map(number, words), np.int64, len(words)))
        new = [_bytes(token) for token in islice(self._ids, len(self._names), None)]
        self._names += new
        self._token_buckets = np.append(self._token_buckets, np.array([self._hashed(name) for name in new], np.int64))
        return np.concatenate(found) if found else np.empty(0, np.int64), lengths

    def _levels(self, ids: np.ndarray, lengths: np.ndarray) -> Iterator[_Level]:
        rows = np.repeat(np.arange(len(lengths)), lengths)
        # all tokens known, not only those of this block; where in the block they are is then of no use, and not worked out
        yield _Level(self._token_buckets[ids], rows, self._token_buckets, ids, np.empty(0, np.int64))
        group = ids
        for m in range(2, self.ngrams + 1):
            at = np.flatnonzero(rows[: len(rows) - m + 1] == rows[m - 1 :])
            different, inverse = np.unique((group[at] << _HALF) | ids[at + m - 1], return_inverse=True)
            starts = np.empty(len(different), np.int64)
            starts[inverse] = at
            # from triples on the first part of a key is numbered within the block, so that only pairs can be remembered
            of_each = self._pair(different, ids, starts) if m == 2 else self._hash_at(ids, starts, m)
            yield _Level(of_each[inverse], rows[at], of_each, inverse, starts)
            group = np.zeros(len(ids), np.int64)
            group[at] = inverse

    def _hash_at(self, ids: np.ndarray, starts: np.ndarray, m: int) -> np.ndarray:
        name = self._names.__getitem__
        grams = zip(*(map(name, ids[starts + j].tolist()) for j in range(m)))
        return np.fromiter(map(self._hashed, map(b" ".join, grams)), np.int64, len(starts))

    def _pair(self, keys: np.ndarray, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Buckets of different pairs in ascending order of their keys, those not seen before by hashing."""
        at = np.searchsorted(self._pairs, keys)
        known = np.zeros(len(keys), bool)
        inside = at < len(self._pairs)
        known[inside] = self._pairs[at[inside]] == keys[inside]
        found = np.empty(len(keys), np.int64)
        found[known] = self._pair_buckets[at[known]]
        found[~known] = new = self._hash_at(ids, starts[~known], 2)
        if len(self._pairs) + len(new) <= self.cache_size:
            self._pairs = np.insert(self._pairs, at[~known], keys[~known])
            self._pair_buckets = np.insert(self._pair_buckets, at[~known], new.astype(np.int32))
        elif len(keys) <= self.cache_size:  # start again with what this block holds
            self._pairs, self._pair_buckets = keys, found.astype(np.int32)
        return found


def text_blocks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Lists of consecutive texts of about 2 million characters, so that work is done on many at once; a text may be None."""
    check_texts(texts)
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text) if text is not None else 0
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def check_texts(texts: Any) -> None:
    """InputError for one text where several are asked for: its characters would count as texts."""
    if isinstance(texts, (str, bytes)):
        raise InputError(f"several texts are needed, got one: {texts[:40]!r}; put it into a list")


def tokenize_with(name: str) -> Callable[[str], list[str]]:
    """The function of the tokenizer ``name``: text to tokens."""
    if name == "wordpunct":
        return _WORDPUNCT.findall
    if name != "word_tokenize":
        raise InputError(f'the tokenizer is "wordpunct" or "word_tokenize", got {name!r}')
    try:
        word_tokenize = require("nltk", "dev").word_tokenize
        word_tokenize("try")
    except LookupError as error:
        raise DataError(
            "word_tokenize needs NLTK's data file punkt_tab, which is not here: python -m nltk.downloader punkt_tab"
        ) from error
    return word_tokenize


def _bytes(gram: str) -> bytes:
    return gram.encode("utf-8", "surrogatepass")  # half a surrogate pair is no UTF-8, but does occur in JSON


def _hash_function(name: str, buckets: int) -> Callable[[bytes], int]:
    if name == "sha256":
        sha256, number = hashlib.sha256, int.from_bytes
        return lambda gram: number(sha256(gram).digest(), "big") % buckets
    if name != "murmur3":
        raise InputError(f'the hash is "sha256" or "murmur3", got {name!r}')
    from sklearn.utils import murmurhash3_32

    return lambda gram: abs(murmurhash3_32(gram)) % buckets
