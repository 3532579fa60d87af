"""What the paper does to texts before it weighs them: chunks of equal length, and a filter of quality."""

__all__ = ["chunk_words", "quality_mask"]

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Bool

from theodolite.core.errors import InputError
from theodolite.core.ngrams import check_texts, tokenize_with

_WORDS = """
a about above after again against ain all am an and any are aren as at be because been before being below between both but by can
couldn d did didn do does doesn doing don down during each few for from further had hadn has hasn have haven having he her here
hers herself him himself his how i if in into is isn it its itself just ll m ma me mightn more most mustn my myself needn no nor
not now o of off on once only or other our ours ourselves out over own re s same shan she should shouldn so some such t than that
the their theirs them themselves then there these they this those through to too under until up ve very was wasn we were weren
what when where which while who whom why will with won wouldn y you your yours yourself yourselves n't 's 'm 're 've 'll 'd
"""
_STOP_WORDS = frozenset(_WORDS.split())
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def chunk_words(texts: Iterable[str], words: int = 128) -> list[str]:
    """Consecutive chunks of so many words (between blanks) of each text; the last one of a text may be shorter.

    >>> chunk_words(["a b c d e"], 2)
    ['a b', 'c d', 'e']
    """
    if words < 1:
        raise InputError(f"a chunk must have at least one word, got {words}")
    check_texts(texts)
    split = (text.split() for text in texts)
    return [" ".join(found[i : i + words]) for found in split for i in range(0, len(found), words)]


def quality_mask(
    texts: Iterable[str], *, tokenizer: Literal["wordpunct", "word_tokenize"] = "wordpunct"
) -> Bool[np.ndarray, " text"]:
    """Which texts pass the paper's filter of quality; of lower-case tokens, bounds not included:

    number 40 to 500; share of the commonest one 0.02 to 0.2; share of those that are neither stop words nor punctuation 0.3 to
    0.7; share of those that are not single digits above 0.8. tokenizer: the paper's is "word_tokenize" (NLTK and its data).

    Source: Xie, Santurkar, Ma, Liang, 2023, arXiv:2302.03169, appendix.

    >>> quality_mask(["too short", "word " * 100]).tolist()
    [False, False]
    """
    check_texts(texts)
    tokens = tokenize_with(tokenizer)
    return np.array([_passes(tokens(text.lower())) for text in texts], dtype=bool)


def _passes(tokens: list[str]) -> bool:
    n = len(tokens)
    if not 40 < n < 500:
        return False
    commonest = Counter(tokens).most_common(1)[0][1] / n
    informative = sum(token not in _STOP_WORDS and not set(token) <= _PUNCTUATION for token in tokens) / n
    not_digits = sum(not (len(token) == 1 and token.isdigit()) for token in tokens) / n
    return 0.02 < commonest < 0.2 and 0.3 < informative < 0.7 and not_digits > 0.8
