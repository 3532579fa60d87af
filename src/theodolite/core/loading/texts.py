"""Texts: which column holds them, and the vectors that a small network takes."""

__all__ = ["TermWeights", "find_text"]

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from theodolite.core.errors import DataError
from theodolite.core.loading.labels import numbers
from theodolite.core.loading.options import DataOptions

_TEXT_NAMES = frozenset({"text", "texts", "sentence", "review", "document", "content", "raw"})
_TERMS = 2_000


def find_text(frame: Any, options: DataOptions) -> str | None:
    """Name of the column of texts: the named one, one with a usual name, or the only column if it is free text."""
    names = [str(name) for name in frame.columns]
    if options.text is not None:
        if options.text not in names:
            raise DataError(f"--text {options.text}: there is no such column beside the label; there are: {names[:8]}")
        return options.text
    free = [name for name in names if _is_free_text(frame[name])]
    usual = [name for name in free if name.lower() in _TEXT_NAMES]
    if len(usual) > 1:
        raise DataError(f"columns {', '.join(usual)} may each be the text; say which with --text NAME")
    return usual[0] if usual else free[0] if len(names) == 1 and free else None


def _is_free_text(values: Any) -> bool:
    """Whether cells are texts, mostly of several words and mostly different."""
    there = values[values.notna()]
    if numbers(values) is not None or len(there) == 0 or not there.map(lambda cell: isinstance(cell, str)).all():
        return False
    return bool(there.str.contains(r"\S\s+\S").mean() > 0.5) and there.nunique() > len(there) / 5


class TermWeights:
    """Frequencies of the terms of a text weighted by how rare the term is (TF-IDF), of the commonest terms."""

    def __init__(self) -> None:
        self._vectorizer = TfidfVectorizer(max_features=_TERMS, sublinear_tf=True)
        self.note = f"texts as TF-IDF of the {_TERMS:,} commonest terms of the training texts"

    def fit(self, texts: Sequence[str]) -> None:
        """Choose the terms."""
        try:
            self._vectorizer.fit(texts)
        except ValueError as error:
            raise DataError(f"the texts hold no words that can be counted: {error}") from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Weights (n, terms), float32."""
        return np.asarray(self._vectorizer.transform(texts).todense(), dtype=np.float32)

    def features(self) -> tuple[str, ...]:
        """The terms."""
        return tuple(self._vectorizer.get_feature_names_out())
