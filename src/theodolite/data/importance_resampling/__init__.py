"""Selects from a huge raw corpus the documents that together look like a small target (DSIR): one CPU pass, nothing to tune.

    log w(x) = sum over buckets b of  c_b(x) [log(p_T,b + eps) - log(p_R,b + eps)]

c(x) counts the hashed n-grams of a document, p_T and p_R are their shares in target and raw corpus. k documents are drawn
without replacement with probabilities proportional to w, by adding Gumbel noise to log w and keeping the k largest. The KL
reduction of a selection tells, before any model is trained, how well it will do. Corpora may be larger than memory, and the
work can be spread over processes or a cluster: the selection is the same to the last document.

Source: Xie, Santurkar, Ma, Liang, 2023, arXiv:2302.03169 (Data Selection for Language Models via Importance Resampling).
"""

__all__ = [
    "Corpus",
    "Feature",
    "FingerprintMismatch",
    "HashedNgrams",
    "ImportanceResampler",
    "NotEnoughDocumentsError",
    "Selection",
    "chunk_words",
    "kl_reduction",
    "quality_mask",
    "resample",
    "select_heuristic",
    "select_oracle_domain",
    "select_random",
]

from theodolite.core.ngrams import HashedNgrams
from theodolite.data.importance_resampling.baselines import select_heuristic, select_oracle_domain, select_random
from theodolite.data.importance_resampling.keys import resample
from theodolite.data.importance_resampling.measures import Feature, kl_reduction
from theodolite.data.importance_resampling.resampler import (
    FingerprintMismatch,
    ImportanceResampler,
    NotEnoughDocumentsError,
    Selection,
)
from theodolite.data.importance_resampling.texts import chunk_words, quality_mask
from theodolite.data.shards import Corpus
