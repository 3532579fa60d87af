"""Fit, weigh, select and write: DSIR on corpora of any size."""

__all__ = ["Feature", "FingerprintMismatch", "ImportanceResampler", "NotEnoughDocumentsError", "Selection"]

import io
import json
import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from theodolite.core.errors import DataError, InputError
from theodolite.core.files import make_folder, write_bytes
from theodolite.core.ngrams import HashedNgrams
from theodolite.core.parallel import open_pool, spread
from theodolite.data.importance_resampling.keys import (
    Cut,
    Draw,
    Method,
    Weights,
    as_float,
    find_cut,
    histogram,
    taken,
    ties,
)
from theodolite.data.importance_resampling.measures import Feature, kl_gain, shares, top_features
from theodolite.data.importance_resampling.output import plan_output, write_part
from theodolite.data.importance_resampling.passes import (
    Counted,
    Shard,
    count_rows,
    count_shard,
    moments,
    stem,
    weigh_shard,
)
from theodolite.data.shards import Corpus

Normalize = Literal["sum", "per_token"]
_FEWEST_GRAMS = 1000  # of a target, below which most n-grams of the raw corpus are not in it
_AT_ONCE = 256  # results of shards that are held at the same time
_GROUPS = 32  # tasks that the light passes over weights are put together to
_NAMED = 16  # shards in which the commonest n-grams are looked for
_GUMBEL_SD = math.pi / math.sqrt(6)


class NotEnoughDocumentsError(DataError):
    """More documents are asked for than may be taken; the text says how many each filter left out."""


class FingerprintMismatch(DataError):
    """What was saved was fitted with other settings of the features."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Which documents were selected, and what that does to the corpus.

    indices: row numbers (k,), ascending: a blank line has none. threshold: the smallest key that was taken, for each target
    where there are several. target_of: (k,) which target took each. n_filtered: documents that could not be taken; left_out:
    by reason. n_eligible: those that could.

    kl_reduction: mean over targets of KL(target || raw) - KL(target || selected) in nats: above 0 the selection is closer to
    the target than the raw corpus is. top_features: n-grams whose share changed most, up to 20 gained and 20 lost. Both are
    None and empty for k = 0.

    overlap_with_top_k: share of the selection that taking the k largest weights gives too. spread_over_noise: standard
    deviation of the log weights over that of the noise (1.28), mean over targets; where it is large the noise changes nothing.
    length_correlation: of log weight and number of words. normalize: as of the resampler.
    """

    indices: Int[np.ndarray, " chosen"]
    threshold: float | tuple[float, ...]
    target_of: Int[np.ndarray, " chosen"]
    n_eligible: int
    n_filtered: int
    left_out: Mapping[str, int]
    kl_reduction: float | None
    overlap_with_top_k: float | None
    spread_over_noise: float
    length_correlation: float
    top_features: tuple[Feature, ...]
    method: Method
    normalize: Normalize = "sum"

    @property
    def note(self) -> str:
        """What to know before relying on it, in one or two sentences."""
        if self.overlap_with_top_k is None:
            return "Nothing was selected."
        if self.method == "top_k":
            text = "Taken are the documents with the largest weights; none is drawn."
        elif self.method == "random":
            return "Drawn with equal chances, whatever the weights."
        else:
            text = (
                f"{self.overlap_with_top_k:.1%} of the sample are the documents with the largest weights: the weights vary "
                f"{self.spread_over_noise:.3g} times as much as the noise"
            )
            text += ", so that sampling is nearly taking the top." if self.overlap_with_top_k >= 0.9 else "."
        if abs(self.length_correlation) >= 0.5:
            what = "longer" if self.length_correlation > 0 else "shorter"
            text += (
                f" Weights go with length (correlation {self.length_correlation:.2f}): {what} documents are preferred; cut "
                "documents into chunks of equal length"
            )
            text += ', or use normalize="per_token".' if self.normalize == "sum" else "."
        return text


@dataclass(eq=False)
class ImportanceResampler:
    """Selects documents of a raw corpus so that together they look like a target, by hashed n-grams.

        log w(x) = sum over buckets b of  c_b(x) [log(p_T,b + eps) - log(p_R,b + eps)]

    c(x) are the counts of a document, p_T and p_R the shares of buckets in target and raw corpus; k documents are drawn
    without replacement with probabilities proportional to w.

    smoothing: added to the target's counts. max_ngrams_to_fit: of the raw corpus, spread evenly over its shards ("auto":
    100,000 a bucket; "all"); where this limit is reached, weights depend on how files are cut into shards. min_words: shorter
    documents are not selected. separate_targets: weights and a share of k for each target, in order; target_proportions: those
    shares, else by the targets' n-grams. normalize: "per_token" divides log weights by the number of words. temperature:
    divides log weights before sampling. executor: as `theodolite.core.parallel.spread` takes it. folder: where weights are
    kept, so that a stopped run is continued (on a cluster one that all machines share); else a temporary one.
    on_shard(pass, done, of): called after each shard of a pass over documents (progress).

    Documents of the raw corpus that are also in the target are not selected. For one seed the selection is the same for every
    executor and every size of shards. Memory does not grow with the corpus, but a document is worked on whole, in about 27
    times its own size; cut very long ones with `chunk_words`.

    Source: Xie, Santurkar, Ma, Liang, 2023, arXiv:2302.03169.

    >>> raw = ["the cat sat on the mat", "stocks fell on Monday", "a cat and a dog"] * 5
    >>> made = ImportanceResampler(min_words=1, smoothing=1.0).fit(raw, ["a dog sat with a cat"] * 200)
    >>> made.select(5, "top_k").indices.tolist()
    [2, 5, 8, 11, 14]
    """

    featurizer: HashedNgrams = field(default_factory=HashedNgrams)
    smoothing: float = 0.0
    eps: float = 1e-8
    max_ngrams_to_fit: int | Literal["auto", "all"] = "auto"
    min_words: int = 100
    separate_targets: bool = False
    target_proportions: Sequence[float] | None = None
    normalize: Normalize = "sum"
    temperature: float = 1.0
    executor: Executor | int | None = None
    seed: int = 0
    folder: str | Path | None = None
    on_shard: Callable[[str, int, int], None] | None = None

    def __post_init__(self) -> None:
        if not (self.smoothing >= 0 and self.eps >= 0 and self.min_words >= 0):
            raise InputError(
                f"smoothing, eps and min_words must not be negative; got {self.smoothing}, {self.eps}, {self.min_words}"
            )
        if self.normalize not in ("sum", "per_token"):
            raise InputError(f'normalize is "sum" or "per_token", got {self.normalize!r}')
        most = self.max_ngrams_to_fit
        if most not in ("auto", "all") and not (isinstance(most, int) and most >= 1):
            raise InputError(f'max_ngrams_to_fit is "auto", "all" or a number above 0, got {most!r}')
        Draw(temperature=self.temperature)
        self._raw: Corpus | None = None
        self._given: Any = None
        self._parts: list[Weights] | None = None  # of the corpus that was fitted
        self._temporary: Path | None = None

    # ---- pass 1

    def fit(self, raw: Any, target: Any) -> "ImportanceResampler":
        """Shares of the buckets in raw corpus and target.

        raw, target: a list of strings, a `Corpus`, or a ``datasets.Dataset`` with a column "text"; with separate_targets a
        sequence of such targets. Sets ``log_ratio_`` (B, targets), ``raw_`` (B,) and ``target_`` (B, targets), which are
        shares, and ``proportions_`` (targets,). Raises DataError where one of them has no n-grams; warns where a target has
        fewer than 1,000 and is not smoothed.
        """
        corpora = [Corpus.of(one) for one in target] if self.separate_targets else [Corpus.of(target)]
        of_raw = Corpus.of(raw)
        with open_pool(self.executor) as pool:
            counted = [self._count(corpus, None, pool, "reading the target", digested=True) for corpus in corpora]
            whole = self._count(of_raw, self._most(len(of_raw.shards)), pool, "counting n-grams", kept=True)
        for name, found in [("the raw corpus", whole), *((f"target {i}", one) for i, one in enumerate(counted))]:
            if found.counts.sum() == 0:
                raise DataError(f"{name} has no n-grams: {found.documents} documents, all of them empty")
        totals = np.array([one.counts.sum() for one in counted])
        if self.smoothing == 0 and totals.min() < _FEWEST_GRAMS:
            warnings.warn(
                f"a target has {totals.min()} n-grams only, so that most n-grams of the raw corpus are not in it, and each "
                f"counts log({self.eps:g} / its share) against a document; give more texts or smoothing=1",
                UserWarning,
                stacklevel=2,
            )
        self.raw_ = shares(whole.counts)
        self.target_ = np.stack([shares(one.counts + self.smoothing) for one in counted], axis=1)
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # eps = 0: the weights that are not finite are told by name
            self.log_ratio_ = np.log(self.target_ + self.eps) - np.log(self.raw_ + self.eps)[:, None]
        self.proportions_ = self._proportions(totals)
        self._named, self._digests = whole, np.unique(np.concatenate([one.digests for one in counted]))
        self._given, self._raw, self._parts = raw, of_raw, None
        return self

    def _most(self, shards: int) -> int | None:
        if self.max_ngrams_to_fit == "all":
            return None
        most = 100_000 * self.featurizer.buckets if self.max_ngrams_to_fit == "auto" else self.max_ngrams_to_fit
        return most // max(1, shards)

    def _count(
        self,
        corpus: Corpus,
        most: int | None,
        pool: Executor | None,
        what: str,
        *,
        kept: bool = False,
        digested: bool = False,
    ) -> Counted:
        shards = corpus.shards
        every = -(-len(shards) // _NAMED) if shards else 1
        tasks = [
            (shard, self.featurizer, most, kept and i % every == 0, digested, self._path(kept, i, shard, most))
            for i, shard in enumerate(shards)
        ]
        return _summed(count_shard, tasks, pool, Counted.none(self.featurizer.buckets), self._told(what))

    def _told(self, what: str) -> Callable[[int, int], None] | None:
        """What is called after each shard of the pass ``what``."""
        return None if self.on_shard is None else partial(self.on_shard, what)

    def _path(self, kept: bool, number: int, shard: Shard, most: int | None) -> Path | None:
        if self.folder is None or not kept:
            return None
        return make_folder(Path(self.folder)) / f"counts-{stem(number, shard, self.featurizer.fingerprint, most)}.npz"

    def _proportions(self, totals: np.ndarray) -> np.ndarray:
        given = totals if self.target_proportions is None else np.asarray(self.target_proportions, dtype=np.float64)
        if given.shape != totals.shape or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
            raise InputError(f"target_proportions must be one number a target, not negative; got {given.tolist()}")
        return given / given.sum()

    # ---- pass 2

    def log_weights(self, raw: Any) -> Float[np.ndarray, "..."]:
        """Log weight of every document: (N,), or (N, targets) with separate_targets. One that cannot be read has 0."""
        corpus = self._corpus(raw)
        found = [weights for part in self._weigh(corpus) for _, weights, _ in part.blocks()]
        whole = np.concatenate(found) if found else np.empty((0, self._fitted().shape[1]))
        return whole if self.separate_targets else whole[:, 0]

    def _fitted(self) -> np.ndarray:
        if not hasattr(self, "log_ratio_"):
            raise InputError("fit a raw corpus and a target first, or load what was saved")
        return self.log_ratio_

    def _corpus(self, raw: Any) -> Corpus:
        """The corpus that is meant: the one that was fitted where None."""
        if self._raw is not None and (raw is None or raw is self._given):
            return self._raw
        if raw is None:
            raise InputError("which corpus? give it as raw=; fit one first, and what was loaded holds none")
        return Corpus.of(raw)

    def _weigh(self, corpus: Corpus) -> list[Weights]:
        """Weights of all shards; kept for the corpus that was fitted."""
        ratio = self._fitted()
        if corpus is self._raw and self._parts is not None:
            return self._parts
        folder = self._work_folder()
        settings = (self.featurizer.fingerprint, self.normalize, ratio, self._digests)
        names = [stem(i, shard, *settings) for i, shard in enumerate(corpus.shards)]
        tasks = [
            (shard, self.featurizer, ratio, self.normalize, self._digests, folder, name)
            for shard, name in zip(corpus.shards, names, strict=True)
        ]
        with open_pool(self.executor) as pool:
            rows = spread(weigh_shard, tasks, executor=pool, on_result=self._told("weighing documents"))
        starts = np.cumsum([0, *rows]).tolist()
        parts = [
            Weights(folder / f"weights-{name}.npy", folder / f"words-{name}.npy", start, n)
            for name, start, n in zip(names, starts, rows, strict=False)
        ]
        if not all(isinstance(part.weights, Path) and part.weights.exists() for part in parts):
            raise DataError(
                f"the workers wrote weights into {folder}, and they are not there: give a folder that all machines share"
            )
        if corpus is self._raw:
            self._parts = parts
        return parts

    def _work_folder(self) -> Path:
        if self.folder is not None:
            return make_folder(Path(self.folder))
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="theodolite-dsir-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, True)
        return self._temporary

    # ---- pass 3

    def select(self, k: int, method: Method = "gumbel", *, raw: Any = None) -> Selection:
        """k documents of the raw corpus (``raw``: of another one, needed after `load`).

        method "top_k" leaves the noise out, "random" the weights: the control of every selection.

        Raises NotEnoughDocumentsError where fewer may be taken.
        """
        if not isinstance(k, (int, np.integer)) or k < 0:
            raise InputError(f"k must be a whole number, 0 or more; got {k!r}")
        corpus = self._corpus(raw)
        draw = Draw(method, self.seed, self.temperature, self.min_words)
        parts = self._weigh(corpus)
        wanted = [int(k * share) for share in self.proportions_]
        wanted[-1] += int(k) - sum(wanted)
        with open_pool(self.executor) as pool:
            told = _summed(moments, [(group, draw, len(wanted)) for group in _groups(parts)], pool)
            if k > told.n:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in told.left_out.items())
                raise NotEnoughDocumentsError(
                    f"{k:,} documents are asked for and {told.n:,} may be taken; left out: {reasons}"
                )
            cuts = _find_cuts(parts, draw, wanted, pool)
            of_part = spread(taken, [(part, draw, cuts) for part in parts], executor=pool)
            rows = np.concatenate([one for one, _ in of_part]) if of_part else np.empty(0, np.int64)
            targets = np.concatenate([one for _, one in of_part]) if of_part else np.empty(0, np.int64)
            overlap = None
            if k and method == "top_k":
                overlap = 1.0
            elif k:
                plain = Draw("top_k", self.seed, self.temperature, self.min_words)
                top_cuts = _find_cuts(parts, plain, wanted, pool)
                top = spread(taken, [(part, plain, top_cuts) for part in parts], executor=pool)
                both = [np.isin(a, b, assume_unique=True).sum() for (a, _), (b, _) in zip(of_part, top, strict=True)]
                overlap = float(sum(both) / k)
            chosen = self._count_selected(corpus, parts, rows, pool) if k else None
        threshold = tuple(as_float(cut.key) if n else math.inf for cut, n in zip(cuts, wanted, strict=True))
        return Selection(
            indices=rows,
            threshold=threshold if self.separate_targets else threshold[0],
            target_of=targets,
            n_eligible=told.n,
            n_filtered=sum(told.left_out.values()),
            left_out=told.left_out,
            kl_reduction=None if chosen is None else kl_gain(chosen.counts, self.raw_, self.target_, self.eps),
            overlap_with_top_k=overlap,
            spread_over_noise=told.deviation / self.temperature / _GUMBEL_SD,
            length_correlation=told.correlation,
            top_features=() if chosen is None else top_features(chosen, self._named, self.raw_),
            method=method,
            normalize=self.normalize,
        )

    def _count_selected(self, corpus: Corpus, parts: list[Weights], rows: np.ndarray, pool: Executor | None) -> Counted:
        every = -(-len(parts) // _NAMED)
        tasks = [
            (shard, own, self.featurizer, i % every == 0)
            for i, (shard, own) in enumerate(zip(corpus.shards, _rows_of(parts, rows), strict=True))
            if len(own)
        ]
        none = Counted.none(self.featurizer.buckets)
        return _summed(count_rows, tasks, pool, none, self._told("reading what was selected"))

    # ---- pass 4

    def write(self, selection: Selection, out: str | Path, *, raw: Any = None) -> list[str]:
        """Write the selected documents as they are in the raw corpus; the names of the files.

        out: a file ending in .jsonl, .ndjson, .json, .txt or .parquet, or a folder, which gets a file for each shard. JSON
        Lines are made of every corpus; the other forms need a corpus of that form. Each file is there when it is whole.

        Raises InputError for a form that the corpus does not have, a compressed one, and where a file of the corpus would be
        written over; DataError for a folder that holds other parts or cannot be written into.
        """
        corpus = self._corpus(raw)
        planned = plan_output(corpus, out)
        planned.prepare()
        parts = self._weigh(corpus)
        own = _rows_of(parts, selection.indices)
        tasks = [
            (shard, rows, planned.folder, name, form)
            for shard, rows, name, form in zip(corpus.shards, own, planned.names, planned.forms, strict=True)
        ]
        with open_pool(self.executor) as pool:
            spread(write_part, tasks, executor=pool, on_result=self._told("writing"))
        return planned.finish()

    # ---- saving

    def save(self, path: str | Path) -> None:
        """Write what was fitted as .npz with the settings as JSON in it; the corpus is not in it."""
        arrays = {"log_ratio": self._fitted(), "raw": self.raw_, "target": self.target_, "digests": self._digests}
        about = {
            "featurizer": self.featurizer.settings,
            "eps": self.eps,
            "smoothing": self.smoothing,
            "separate_targets": self.separate_targets,
            "proportions": self.proportions_.tolist(),
            "names": self._named.names,
        }
        buffer = io.BytesIO()
        np.savez(buffer, about=np.frombuffer(json.dumps(about).encode(), np.uint8), often=self._named.often, **arrays)
        write_bytes(Path(path), buffer.getvalue())

    def load(self, path: str | Path) -> "ImportanceResampler":
        """Take what `save` wrote in place of fitting; FingerprintMismatch where the features' settings are other ones."""
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[name] for name in ("log_ratio", "raw", "target", "digests", "often")}
                about = json.loads(found["about"].tobytes())
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is not what ImportanceResampler.save writes: {error}") from error
        for what, theirs, ours in (
            ("features", about["featurizer"], self.featurizer.settings),
            ("separate_targets", about["separate_targets"], self.separate_targets),
        ):
            if theirs != ours:
                raise FingerprintMismatch(f"{path} was fitted with {what} {theirs}; this resampler has {ours}")
        self.log_ratio_, self.raw_, self.target_ = arrays["log_ratio"], arrays["raw"], arrays["target"]
        self.eps, self.smoothing, self.proportions_ = about["eps"], about["smoothing"], np.array(about["proportions"])
        none = Counted.none(self.featurizer.buckets)
        self._named = Counted(none.counts, 0, arrays["often"], about["names"], none.digests)
        self._digests, self._given, self._raw, self._parts = arrays["digests"], None, None, None
        return self


# ---- helpers


def _summed(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    pool: Executor | None,
    start: Any = None,
    told: Callable[[int, int], None] | None = None,
) -> Any:
    """The sum of what the tasks give; few of their results are in memory at once."""
    total = start
    for first in range(0, len(tasks), _AT_ONCE):
        here = None if told is None else lambda done, _, told=told, first=first: told(first + done, len(tasks))
        for found in spread(function, tasks[first : first + _AT_ONCE], executor=pool, on_result=here):
            total = found if total is None else total + found
    return total


def _groups(parts: list[Weights]) -> list[list[Weights]]:
    return [group for i in range(_GROUPS) if (group := parts[i::_GROUPS])] or [[]]


def _find_cuts(parts: list[Weights], draw: Draw, wanted: Sequence[int], pool: Executor | None) -> list[Cut]:
    """One cut a target, in order: what one target takes is not there for the next."""
    cuts: list[Cut] = []
    groups = _groups(parts)

    def counts(prefix: int, known: int) -> np.ndarray:
        return _summed(histogram, [(group, draw, cuts, prefix, known) for group in groups], pool)

    def equal(key: int, most: int) -> np.ndarray:
        found = spread(ties, [(part, draw, cuts, key, most) for part in parts], executor=pool)
        return np.concatenate(found)[:most]

    for k in wanted:
        cuts = [*cuts, find_cut(k, counts, equal)]
    return cuts


def _rows_of(parts: list[Weights], rows: np.ndarray) -> Iterable[np.ndarray]:
    """Of ascending row numbers those of each part, numbered within it."""
    for part in parts:
        low, high = np.searchsorted(rows, [part.first, part.first + part.rows])
        yield rows[low:high] - part.first
