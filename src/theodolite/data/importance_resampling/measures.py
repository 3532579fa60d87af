"""How much closer to a target a selection is than the corpus it comes from, and which n-grams make the difference."""

__all__ = ["Feature", "kl_gain", "kl_reduction", "shares", "top_features"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import DataError
from theodolite.core.ngrams import HashedNgrams, text_blocks
from theodolite.data.importance_resampling.passes import Counted
from theodolite.data.shards import Corpus

_EPS, _MOST = 1e-8, 20


@dataclass(frozen=True)
class Feature:
    """An n-gram (the commonest of its bucket) and the bucket's share of all n-grams in the selection and in the raw corpus."""

    ngram: str
    selected: float
    raw: float


def shares(counts: np.ndarray) -> Float[np.ndarray, " bucket"]:
    """Counts over their sum."""
    return counts / counts.sum()


def _divergence(p: np.ndarray, q: np.ndarray, eps: float) -> float:
    """KL(p || q) in nats with eps inside both logarithms; buckets that p does not have count 0."""
    there = p > 0
    return float((p[there] * (np.log(p[there] + eps) - np.log(q[there] + eps))).sum())


def kl_gain(selected: np.ndarray, raw: np.ndarray, targets: np.ndarray, eps: float = _EPS) -> float:
    """Mean over targets (columns, shares) of KL(target || raw) - KL(target || selected), of counts of the selection."""
    chosen = shares(selected)
    return float(np.mean([_divergence(t, raw, eps) - _divergence(t, chosen, eps) for t in targets.T]))


def kl_reduction(selected: Any, raw: Any, targets: Any, featurizer: HashedNgrams | None = None) -> float:
    """Nats by which a selection is closer to the targets than the raw corpus is, mean over targets (the paper's data metric).

        mean over t of  KL(p_t || p_raw) - KL(p_t || p_selected)

    selected, raw: a list of strings or a `Corpus`. targets: one of those, or a list of them. Raises DataError where one has no
    n-grams.

    >>> kl_reduction(["a b c d"], ["a b c d", "w x y z"], ["a b c d"]) > 0
    True
    """
    featurizer = HashedNgrams() if featurizer is None else featurizer
    one = not isinstance(targets, (list, tuple)) or all(isinstance(t, str) for t in targets)
    counts = [_counts(name, part, featurizer) for name, part in (("the selection", selected), ("the raw corpus", raw))]
    of_targets = [shares(_counts("a target", t, featurizer)) for t in ([targets] if one else targets)]
    return kl_gain(counts[0], shares(counts[1]), np.stack(of_targets, axis=1))


def _counts(name: str, source: Any, featurizer: HashedNgrams) -> np.ndarray:
    counts = np.zeros(featurizer.buckets, np.int64)
    for block in text_blocks(Corpus.of(source).texts()):
        counts += np.bincount(featurizer.grams(block).buckets, minlength=featurizer.buckets)
    if not counts.any():
        raise DataError(f"{name} has no n-grams: it is empty")
    return counts


def top_features(selected: Counted, raw: Counted, raw_shares: np.ndarray) -> tuple[Feature, ...]:
    """The buckets that add most to the symmetric divergence of selection and raw corpus, from most gained to most lost."""
    chosen = shares(selected.counts)
    change = (chosen - raw_shares) * (np.log(chosen + _EPS) - np.log(raw_shares + _EPS)) * np.sign(chosen - raw_shares)
    order = np.argsort(-change, kind="stable")
    gained = [b for b in order[:_MOST].tolist() if change[b] > 0]
    lost = [b for b in order[-_MOST:].tolist() if change[b] < 0]
    return tuple(_feature(b, selected, raw, chosen, raw_shares) for b in gained + lost)


def _feature(bucket: int, selected: Counted, raw: Counted, chosen: np.ndarray, raw_shares: np.ndarray) -> Feature:
    up = chosen[bucket] > raw_shares[bucket]
    sides: Sequence[Counted] = (selected, raw) if up else (raw, selected)
    name = sides[0].name(bucket) or sides[1].name(bucket)
    return Feature(name, float(chosen[bucket]), float(raw_shares[bucket]))
