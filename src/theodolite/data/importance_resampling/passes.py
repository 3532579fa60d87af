"""What is done with one shard: counted, weighed, measured. Each function runs anywhere and returns something small."""

__all__ = ["Counted", "Spread", "count_rows", "count_shard", "document_weights", "moments", "stem", "weigh_shard"]

import copy
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from theodolite.core.errors import DataError
from theodolite.core.files import disk_errors, read_json, write_bytes, write_json
from theodolite.core.ngrams import Grams, HashedNgrams, text_blocks
from theodolite.data.importance_resampling.keys import Draw, Weights
from theodolite.data.shards import FileShard, MemoryShard

Shard = FileShard | MemoryShard
_OWN = threading.local()
ALSO_TARGET, UNREADABLE = -1, -2
LEFT_OUT = {ALSO_TARGET: "also in the target", UNREADABLE: "cannot be read"}


@dataclass(frozen=True, eq=False)
class Counted:
    """Counts of buckets (B,), number of documents, and the commonest n-gram of each bucket with how often it was seen.

    often and names are empty where none was looked for. digests: of the texts, where they were asked for, ascending.
    """

    counts: np.ndarray
    documents: int
    often: np.ndarray
    names: list[str]
    digests: np.ndarray

    def __add__(self, other: "Counted") -> "Counted":
        often, names = (self.often, self.names) if self.names else (other.often, other.names)
        if self.names and other.names:
            more = other.often > self.often
            often = np.maximum(self.often, other.often)
            names = [b if m else a for a, b, m in zip(self.names, other.names, more.tolist(), strict=True)]
        return Counted(
            self.counts + other.counts,
            self.documents + other.documents,
            often,
            names,
            np.union1d(self.digests, other.digests),
        )

    @classmethod
    def none(cls, buckets: int) -> "Counted":
        """Of no documents."""
        return cls(np.zeros(buckets, np.int64), 0, np.empty(0, np.int64), [], np.empty(0, np.uint64))

    def name(self, bucket: int) -> str:
        """The commonest n-gram of a bucket, "" where none was seen."""
        return self.names[bucket] if self.names else ""


def digest(text: str) -> int:
    """64 bits that two different texts practically never share."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _own(featurizer: HashedNgrams) -> HashedNgrams:
    """This worker's copy, which remembers from shard to shard and from pass to pass the n-grams that it has hashed."""
    kept: HashedNgrams | None = getattr(_OWN, "featurizer", None)
    if kept is None or (kept.fingerprint, kept.cache_size) != (featurizer.fingerprint, featurizer.cache_size):
        kept = _OWN.featurizer = copy.copy(featurizer)
    return kept


def stem(number: int, shard: Shard, *settings: Any) -> str:
    """The beginning of the names of a shard's files: its number, and what its numbers depend on."""
    digest = hashlib.sha256(shard.identity.encode("utf-8", "surrogatepass"))
    for setting in settings:
        digest.update(setting.tobytes() if isinstance(setting, np.ndarray) else repr(setting).encode())
    return f"{number:05d}-{digest.hexdigest()[:16]}"


# ---- pass 1


def count_shard(
    shard: Shard, featurizer: HashedNgrams, most: int | None, named: bool, digested: bool, path: Path | None
) -> Counted:
    """Counts of a shard, up to the document with which they exceed ``most``; read from ``path`` where they are there.

    named: look for the commonest n-gram of each bucket in the first block. digested: note the texts.
    """
    if path is not None and path.exists():
        return _read_counts(path)
    found = _count(shard.texts(), _own(featurizer), most, named, digested)
    if path is not None:
        _write_counts(path, found)
    return found


def count_rows(shard: Shard, rows: np.ndarray, featurizer: HashedNgrams, named: bool) -> Counted:
    """Counts of some rows of a shard, numbered within it."""
    return _count(shard.texts(rows), _own(featurizer), None, named, False)


def _count(
    texts: Iterable[str | None], featurizer: HashedNgrams, most: int | None, named: bool, digested: bool
) -> Counted:
    none = Counted.none(featurizer.buckets)
    counts, documents, often, names, digests = none.counts, 0, none.often, none.names, set[int]()
    total = 0
    for block in text_blocks(text for text in texts if text is not None):
        if named and documents == 0:
            often, names = featurizer.frequent(block)
        grams = featurizer.grams(block)
        buckets, kept = grams.buckets, len(block)
        ends = total + np.cumsum(grams.sizes)
        if most is not None and ends[-1] > most:
            kept = int(np.argmax(ends > most)) + 1
            buckets = buckets[grams.rows < kept]
        counts += np.bincount(buckets, minlength=featurizer.buckets)
        documents, total = documents + kept, int(ends[kept - 1])
        if digested:
            digests.update(map(digest, block[:kept]))
        if most is not None and total > most:
            break
    return Counted(counts, documents, often, names, np.array(sorted(digests), np.uint64))


def _read_counts(path: Path) -> Counted:
    with np.load(path, allow_pickle=False) as found:
        names = json.loads(found["names"].tobytes())
        return Counted(found["counts"], int(found["documents"]), found["often"], names, np.empty(0, np.uint64))


def _write_counts(path: Path, found: Counted) -> None:
    buffer = io.BytesIO()
    names = np.frombuffer(json.dumps(found.names).encode(), np.uint8)
    np.savez(buffer, counts=found.counts, documents=np.array(found.documents), often=found.often, names=names)
    write_bytes(path, buffer.getvalue())


# ---- pass 2


def weigh_shard(
    shard: Shard,
    featurizer: HashedNgrams,
    log_ratio: np.ndarray,
    normalize: Literal["sum", "per_token"],
    target_digests: np.ndarray,
    folder: Path,
    name: str,
) -> int:
    """Write the log weights (n, targets) and the words (n,) of a shard into ``folder``; the number of its documents.

    Where the manifest is there the shard was done before, and nothing is read. Raises DataError for a weight that is not
    finite, naming the document, and DiskError where the disk is full.
    """
    manifest = folder / f"manifest-{name}.json"
    if manifest.exists():
        return int(read_json(manifest)["rows"])
    featurizer = _own(featurizer)
    with (
        disk_errors(folder),
        _GrowingArray(folder / f"weights-{name}.npy", np.float64, log_ratio.shape[1]) as weights,
        _GrowingArray(folder / f"words-{name}.npy", np.int32) as words,
    ):
        for block in text_blocks(shard.texts()):
            texts = ["" if text is None else text for text in block]
            grams = featurizer.grams(texts)
            length = featurizer.words(grams.sizes)
            found = document_weights(grams, log_ratio)
            if normalize == "per_token":
                found /= np.maximum(length, 1)[:, None]
            bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
            if len(bad):
                row = weights.rows + int(bad[0])
                raise DataError(
                    f"the log weight of {shard.place(row)} is {found[bad[0]].tolist()}; weights must be finite (eps above 0)"
                )
            if len(target_digests):
                digests = np.array([digest(text) for text in texts], np.uint64)
                length[np.isin(digests, target_digests)] = ALSO_TARGET
            length[[row for row, text in enumerate(block) if text is None]] = UNREADABLE
            weights.append(found)
            words.append(length.astype(np.int32))
    write_json(manifest, {"rows": weights.rows})
    return weights.rows


def document_weights(grams: Grams, log_ratio: np.ndarray) -> np.ndarray:
    """Sum of the log ratios (B, targets) of each document's n-grams: (documents, targets).

    bincount adds in the order of the n-grams, so that a document's weight does not depend on its neighbours to the last bit.
    """
    n = len(grams.sizes)
    columns = [np.bincount(grams.rows, column[grams.buckets], minlength=n) for column in log_ratio.T]
    return np.stack(columns, axis=1)


class _GrowingArray:
    """A .npy file that rows are added to; it gets its name, and the number of rows in its header, when it is whole."""

    def __init__(self, path: Path, dtype: Any, width: int | None = None) -> None:
        self._path, self._unfinished = path, path.with_name(f".{path.name}.unfinished")
        self._dtype, self._width, self.rows = np.dtype(dtype), width, 0

    def __enter__(self) -> "_GrowingArray":
        self._file = open(self._unfinished, "wb")
        self._header()
        return self

    def append(self, rows: np.ndarray) -> None:
        """Add rows at the end."""
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self.rows += len(rows)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with self._file:  # closing writes what is left, for which the disk may be too full
                if kind is None:
                    self._file.seek(0)
                    self._header()  # as long as before: numpy leaves room for the number of rows to grow
            if kind is None:
                os.replace(self._unfinished, self._path)
        finally:
            self._unfinished.unlink(missing_ok=True)

    def _header(self) -> None:
        shape = (self.rows,) if self._width is None else (self.rows, self._width)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})


# ---- pass 3


@dataclass(frozen=True, eq=False)
class Spread:
    """Of the documents that may be taken: how many, means of [log weights (targets,), words], and their scatter matrix.

    left_out: how many may not be taken, by reason.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray
    left_out: dict[str, int]

    def __add__(self, other: "Spread") -> "Spread":
        n = self.n + other.n
        step = other.mean - self.mean
        share = other.n / n if n else 0.0
        return Spread(
            n,
            self.mean + share * step,
            self.scatter + other.scatter + self.n * share * np.outer(step, step),
            {reason: count + other.left_out[reason] for reason, count in self.left_out.items()},
        )

    @property
    def deviation(self) -> float:
        """Standard deviation of the log weights, mean over targets; 0 where there are no two."""
        return float(np.sqrt(np.diag(self.scatter)[:-1] / self.n).mean()) if self.n > 1 else 0.0

    @property
    def correlation(self) -> float:
        """Of log weights and words, mean over targets; 0 where one of them does not vary."""
        squares = np.diag(self.scatter)
        scale = np.sqrt(squares[:-1] * squares[-1])
        return float(np.divide(self.scatter[:-1, -1], scale, out=np.zeros_like(scale), where=scale > 0).mean())


def moments(parts: Sequence[Weights], draw: Draw, targets: int) -> Spread:
    """What the parts hold, without their documents."""
    short = f"shorter than {draw.min_words} words"
    whole = Spread(
        0,
        np.zeros(targets + 1),
        np.zeros((targets + 1, targets + 1)),
        dict.fromkeys([short, *LEFT_OUT.values()], 0),
    )
    for part in parts:
        for _, weights, words in part.blocks():
            free = words >= draw.min_words
            values = np.c_[weights[free], words[free]]
            mean = values.mean(axis=0) if len(values) else np.zeros(targets + 1)
            left_out = {reason: int((words == code).sum()) for code, reason in LEFT_OUT.items()}
            left_out[short] = int((~free).sum()) - sum(left_out.values())
            whole += Spread(len(values), mean, (values - mean).T @ (values - mean), left_out)
    return whole
