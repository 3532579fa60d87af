"""What a selection has to beat: chance, a classifier of the target, and knowing the domain."""

__all__ = ["select_heuristic", "select_oracle_domain", "select_random"]

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int

from theodolite.core.errors import DataError, InputError
from theodolite.core.ngrams import HashedNgrams
from theodolite.data.importance_resampling.resampler import NotEnoughDocumentsError
from theodolite.data.shards import Corpus

_PARETO = 9.0


def select_random(raw: Any, k: int, *, seed: int = 0) -> Int[np.ndarray, " chosen"]:
    """k row numbers, all equally likely, ascending. raw: a list of strings, a `Corpus` or a ``datasets.Dataset``."""
    n = sum(1 for _ in Corpus.of(raw).texts())
    return _some(np.arange(n), k, seed)


def select_oracle_domain(domains: Iterable[Any], domain: Any, k: int, *, seed: int = 0) -> Int[np.ndarray, " chosen"]:
    """k row numbers of the documents whose domain is ``domain``, ascending: what can be had where domains are known.

    >>> select_oracle_domain(["news", "code", "news"], "news", 2).tolist()
    [0, 2]
    """
    return _some(np.flatnonzero([one == domain for one in domains]), k, seed)


def select_heuristic(
    raw: Any, target: Any, k: int, *, noisy: bool = True, featurizer: HashedNgrams | None = None, seed: int = 0
) -> Int[np.ndarray, " chosen"]:
    """k row numbers by a classifier that tells the target from as many random raw documents, ascending.

    noisy: a document is kept where a Pareto(9) draw exceeds 1 - its score; draws are repeated until k are kept, of which k are
    taken at random (as for GPT-3's data). Otherwise the k with the highest scores are taken.

    Source: the comparator of Xie, Santurkar, Ma, Liang, 2023, arXiv:2302.03169; Brown et al., 2020, arXiv:2005.14165.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    featurizer = HashedNgrams() if featurizer is None else featurizer
    rng = np.random.default_rng(seed)
    raw_rows, target_rows = (featurizer.transform(Corpus.of(part).texts()) for part in (raw, target))
    (n, _), (size, _) = raw_rows.get_shape(), target_rows.get_shape()
    if min(n, size) == 0:
        raise DataError(f"a classifier needs documents of both kinds; there are {n} raw and {size} target ones")
    _enough(n, k)
    negative = rng.choice(n, min(n, size), replace=False)
    x = normalize(_stacked(target_rows, raw_rows[negative]))
    y = np.repeat([1, 0], [size, len(negative)])
    scores = LogisticRegression(max_iter=1000).fit(x, y).predict_proba(normalize(raw_rows))[:, 1]
    if not noisy:
        return np.sort(np.argsort(-scores, kind="stable")[:k])
    kept = np.zeros(n, dtype=bool)
    while kept.sum() < k:
        kept |= rng.pareto(_PARETO, n) > 1 - scores
    return np.sort(rng.choice(np.flatnonzero(kept), k, replace=False))


def _stacked(*parts: Any) -> Any:
    from scipy import sparse

    return sparse.vstack(parts, format="csr")


def _some(rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    _enough(len(rows), k)
    return np.sort(np.random.default_rng(seed).choice(rows, k, replace=False)).astype(np.int64)


def _enough(n: int, k: int) -> None:
    if k < 0:
        raise InputError(f"k must not be negative, got {k}")
    if k > n:
        raise NotEnoughDocumentsError(f"{k:,} documents are asked for and there are {n:,}")
