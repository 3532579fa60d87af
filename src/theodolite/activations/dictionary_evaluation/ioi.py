"""Indirect object identification: who is given something, of two people of whom one gives it."""

__all__ = ["IOI_TEMPLATES", "ioi_task", "single_token_names"]

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from theodolite.activations.dictionary_evaluation.task import Task
from theodolite.activations.observables import NAMES
from theodolite.core.errors import DataError, InputError

IOI_TEMPLATES: tuple[str, ...] = (
    "Then, [A] and [B] went to the store. [S] gave a drink to",
    "Then, [A] and [B] went to the park. [S] gave a ball to",
    "Then, [A] and [B] went to the school. [S] gave a book to",
    "Then, [A] and [B] went to the office. [S] gave a ring to",
    "Then, [A] and [B] went to the garden. [S] gave a flower to",
)
"""[A] and [B] are the two people in their order, [S] the one of them that acts; next comes the other."""
_FIRST = ("IO first", "S first")


def ioi_task(
    tokenizer: Any, names: Sequence[str] | None, n: int, templates: Sequence[str] | None = None, *, seed: int = 0
) -> Task:
    """``n`` different prompts with the attributes IO, S (names) and Pos (which of them comes first).

    names: each one token with a space before it; None: common English names that are. templates: hold [A], [B] and [S]; those
    of `IOI_TEMPLATES` that have one length where None. The outcome is the logit of IO less that of S. Positions: "IO", "S1",
    "S2", "end". Counterfactuals draw another name, or exchange the order.

    Raises InputError for names of several tokens and for templates without the three marks, DataError for prompts of unequal
    length and for more prompts than there are.
    """
    chosen = list(names) if names is not None else single_token_names(tokenizer)
    several = [name for name in chosen if _tokens(tokenizer, name) != 1]
    if several:
        raise InputError(f"names must be one token each; of several tokens here: {', '.join(several)}")
    if len(set(chosen)) < max(4, len(chosen)):
        raise InputError(f"need at least 4 different names, each once; got {', '.join(chosen)}")
    kept = _templates(tokenizer, chosen, templates)
    rng = np.random.default_rng(seed)
    every = len(kept) * 2 * len(chosen) * (len(chosen) - 1)
    if not 2 <= n <= every:
        raise DataError(
            f"{len(chosen)} names and {len(kept)} templates make {every} prompts, so 2 to that many; got {n}"
        )
    drawn = rng.choice(every, n, replace=False)
    drawn, template = np.divmod(drawn, len(kept))
    drawn, first = np.divmod(drawn, 2)
    io, other = np.divmod(drawn, len(chosen) - 1)
    s = other + (other >= io)
    ids, attributes = _write(tokenizer, chosen, kept, io, s, first, template)
    tokens = torch.tensor([tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in chosen])
    places = _places(ids, tokens[torch.as_tensor(io)], tokens[torch.as_tensor(s)])

    def counterfactual(attribute: str, seed: int) -> tuple[Tensor, pd.DataFrame]:
        if attribute not in attributes.columns:
            raise InputError(f"there is no attribute {attribute!r}; there are IO, S and Pos")
        again = np.random.default_rng([seed, 1])
        if attribute == "Pos":
            return _write(tokenizer, chosen, kept, io, s, 1 - first, template)
        free = np.stack([_another(again, len(chosen), int(a), int(b)) for a, b in zip(io, s, strict=True)])
        new_io, new_s = (free, s) if attribute == "IO" else (io, free)
        return _write(tokenizer, chosen, kept, new_io, new_s, first, template)

    def outcome(output: Tensor, rows: Tensor) -> Tensor:
        wanted, not_wanted = (tokens[torch.as_tensor(who)[rows]].to(output.device)[:, None] for who in (io, s))
        return (output.gather(1, wanted) - output.gather(1, not_wanted))[:, 0]

    return Task(ids, attributes, counterfactual, outcome, places)


def single_token_names(tokenizer: Any) -> list[str]:
    """The common English names that are one token with a space before them, female and male in turn."""
    pairs = zip(NAMES["female"], NAMES["male"], strict=True)
    return [name for pair in pairs for name in pair if _tokens(tokenizer, name) == 1]


def _tokens(tokenizer: Any, name: str) -> int:
    return len(tokenizer.encode(f" {name}", add_special_tokens=False))


def _another(rng: np.random.Generator, count: int, a: int, b: int) -> int:
    """A number under ``count`` that is neither a nor b."""
    drawn = int(rng.integers(0, count - 2))
    for taken in sorted((a, b)):
        drawn += drawn >= taken
    return drawn


def _fill(template: str, a: str, b: str, s: str) -> str:
    return template.replace("[A]", a).replace("[B]", b).replace("[S]", s)


def _templates(tokenizer: Any, names: list[str], given: Sequence[str] | None) -> list[str]:
    templates = list(IOI_TEMPLATES if given is None else given)
    bad = [text for text in templates if any(text.count(mark) != 1 for mark in ("[A]", "[B]", "[S]"))]
    if bad or not templates:
        raise InputError(
            f"a template holds each of [A], [B] and [S] once; this does not: {bad[0] if bad else '(none given)'}"
        )
    lengths = [len(tokenizer(_fill(text, names[0], names[1], names[0]))["input_ids"]) for text in templates]
    if given is None:
        common = Counter(lengths).most_common(1)[0][0]
        return [text for text, length in zip(templates, lengths, strict=True) if length == common]
    if len(set(lengths)) > 1:
        raise DataError(
            "templates have unequal lengths after tokenisation: "
            + "; ".join(f"{length} tokens: {text!r}" for text, length in zip(templates, lengths, strict=True))
        )
    return templates


def _write(
    tokenizer: Any,
    names: list[str],
    templates: list[str],
    io: np.ndarray,
    s: np.ndarray,
    first: np.ndarray,
    template: np.ndarray,
) -> tuple[Tensor, pd.DataFrame]:
    """The prompts with these people, as token ids, and their attributes."""
    texts = []
    for who, by, later, which in zip(io, s, first, template, strict=True):
        a, b = (names[by], names[who]) if later else (names[who], names[by])
        texts.append(_fill(templates[which], a, b, names[by]))
    ids = tokenizer(texts)["input_ids"]
    lengths = Counter(map(len, ids))
    if len(lengths) > 1:
        odd = next(text for text, row in zip(texts, ids, strict=True) if len(row) != lengths.most_common(1)[0][0])
        raise DataError(
            f"prompts have unequal lengths after tokenisation ({dict(lengths)}); one that stands out: {odd!r}"
        )
    table = pd.DataFrame(
        {"IO": np.array(names)[io], "S": np.array(names)[s], "Pos": np.array(_FIRST)[first]}
    ).astype(object)  # fmt: skip
    return torch.tensor(ids), table


def _places(ids: Tensor, io: Tensor, s: Tensor) -> dict[str, Tensor]:
    is_s = ids == s[:, None]
    if not bool((is_s.sum(dim=1) == 2).all()) or not bool(((ids == io[:, None]).sum(dim=1) == 1).all()):
        raise DataError(
            "a name does not stand as one token where the template has it; let a space stand before each mark"
        )
    first = is_s.long().argmax(dim=1)
    second = ids.shape[1] - 1 - is_s.long().flip(1).argmax(dim=1)
    return {
        "IO": (ids == io[:, None]).long().argmax(dim=1), "S1": first, "S2": second,
        "end": torch.full((len(ids),), ids.shape[1] - 1),
    }  # fmt: skip
