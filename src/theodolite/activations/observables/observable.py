"""Observables: linear functionals of a model's scores, and the prompts that they are measured on."""

__all__ = ["Observable", "Prompt", "Prompts", "as_prompts", "check_pair", "varying_tokens"]

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.transformer import same_length

Prompt = str | Sequence[int] | Tensor | np.ndarray
Prompts = Sequence[Prompt] | Tensor | np.ndarray | pd.DataFrame


@dataclass(frozen=True, eq=False)
class Observable:
    """n in R^scores: what is measured is n . logits. Made by `from_tokens`, `from_classes` or of a vector of your own.

    tokenizer: reads prompts that are given as text. Raises InputError for a vector that is zero, not finite or not flat.

    >>> bool(Observable.from_classes(3, 8, 10).score(torch.eye(10))[8] == -1)
    True
    """

    vector: Float[Tensor, " score"]
    name: str = "observable"
    tokenizer: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        vector = torch.as_tensor(self.vector).detach()
        if vector.ndim != 1 or vector.numel() == 0:
            raise InputError(f"an observable is one number for each score, got shape {tuple(vector.shape)}")
        vector = vector.float()
        if not bool(torch.isfinite(vector).all()):
            raise InputError("an observable must be finite, got NaN or infinite numbers")
        if not bool(vector.any()):
            raise InputError("an observable of zeros measures nothing; give two different sets of tokens or classes")
        object.__setattr__(self, "vector", vector)

    @classmethod
    def from_tokens(
        cls, positive: Sequence[str], negative: Sequence[str], tokenizer: Any, *, first_token: bool = False
    ) -> "Observable":
        """Mean logit of the ``positive`` tokens minus mean logit of the ``negative`` ones; either may be empty.

        Each string must be one token of ``tokenizer`` (mind the space: " she"); with ``first_token`` the first of several
        stands for it. Raises InputError with the pieces otherwise.
        """
        if isinstance(positive, str) or isinstance(negative, str):
            raise InputError("give lists of tokens: from_tokens([' she'], [' he'], tokenizer)")
        ids = [[_token(text, tokenizer, first_token) for text in side] for side in (positive, negative)]
        vector = torch.zeros(max([len(tokenizer), *(i + 1 for side in ids for i in side)]))
        for side, sign in zip(ids, (1.0, -1.0), strict=True):
            for i in side:
                vector[i] += sign / len(side)
        names = [" + ".join(text.strip() or repr(text) for text in side) for side in (positive, negative)]
        return cls(vector, " − ".join(name for name in names if name), tokenizer)

    @classmethod
    def from_classes(cls, i: int, j: int, n_classes: int) -> "Observable":
        """Score of class i minus score of class j."""
        if not 0 <= i < n_classes or not 0 <= j < n_classes:
            raise InputError(f"classes lie in 0..{n_classes - 1}, got {i} and {j}")
        vector = torch.zeros(n_classes)
        vector[i] += 1
        vector[j] -= 1
        return cls(vector, f"class {i} − class {j}")

    def __str__(self) -> str:
        return self.name

    def score(self, logits: Float[Tensor, "*row score"]) -> Float[Tensor, "*row"]:
        """n . logits of each row; scores beyond the vector's length (padding of a vocabulary) count nothing."""
        self.check(logits.shape[-1])
        return logits[..., : len(self.vector)].float() @ self.vector.to(logits.device)

    def check(self, scores: int) -> None:
        """Raise InputError where a model with that many scores cannot be measured."""
        used = int(self.vector.nonzero().max()) + 1
        if used > scores:
            raise InputError(f"the observable {self.name!r} uses score {used - 1}, but the model gives {scores} scores")

    def read_back(self, weight: Float[Tensor, "score width"]) -> Float[Tensor, " width"]:
        """weight^T n: the direction whose product with what the last linear map reads is the observable."""
        self.check(len(weight))
        used = self.vector.nonzero()[:, 0]
        return self.vector[used].to(weight.device) @ weight[used.to(weight.device)].detach().float()


def _token(text: str, tokenizer: Any, first: bool) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 or (first and len(ids)):
        return int(ids[0])
    pieces = [tokenizer.decode([i]) for i in ids]
    raise InputError(
        f"{text!r} is not one token of this tokenizer but {len(ids)}: {pieces}. Give a token that is whole (often one with a "
        "space before it), or first_token=True to let the first piece stand for it"
    )


def as_prompts(prompts: Prompts, tokenizer: Any = None) -> list[Tensor]:
    """Prompts as 1-d token ids; text is read with ``tokenizer``, with the special tokens that the model expects."""
    if isinstance(prompts, str):
        raise InputError("give a list of prompts, not one string")
    made = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise InputError(
                    "prompts in words need a tokenizer: make the observable with Observable.from_tokens, or give token ids"
                )
            prompt = tokenizer(prompt).input_ids
        ids = torch.as_tensor(prompt)
        if ids.ndim != 1 or ids.numel() == 0 or ids.is_floating_point():
            raise InputError(f"a prompt is a text or its token ids (whole numbers, at least one), got {prompt!r}")
        made.append(ids.long())
    if not made:
        raise InputError("need at least one prompt")
    return made


def check_pair(prompts: Any, tokenizer: Any = None) -> tuple[Tensor, Tensor]:
    """The positive and the negative prompt as token ids of one length; InputError names the span where they part."""
    if isinstance(prompts, str) or len(prompts) != 2:
        raise InputError("give a pair of prompts: one where the observable is high, one where it is low")
    positive, negative = as_prompts(prompts, tokenizer)
    if len(positive) == len(negative):
        return positive, negative
    ours, theirs = positive.tolist(), negative.tolist()
    start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    end = next(
        (i for i, (a, b) in enumerate(zip(ours[:start:-1], theirs[:start:-1], strict=False)) if a != b),
        min(len(ours), len(theirs)) - start - 1,
    )
    spans = [ids[start : len(ids) - max(0, end)] for ids in (ours, theirs)]
    shown = [repr(tokenizer.decode(span)) if tokenizer is not None else str(span) for span in spans]
    raise InputError(
        f"the pair has {len(ours)} and {len(theirs)} tokens: from token {start} on {shown[0]} ({len(spans[0])} tokens) stands "
        f"against {shown[1]} ({len(spans[1])}). Choose words of as many tokens, so that token stands beside token"
    )


def varying_tokens(prompts: Sequence[Tensor]) -> list[int | None]:
    """In each prompt the last token of the one stretch in which it differs from its nearest prompt of the same length.

    Prompts that are made of templates and names differ in the name. None where there is no other prompt of that length, or
    where the nearest one differs in several places or in more than half of its tokens: then it has another template.

    >>> varying_tokens([torch.tensor([7, 1, 9]), torch.tensor([7, 2, 9]), torch.tensor([5])])
    [1, 1, None]
    """
    found: list[int | None] = [None] * len(prompts)
    for places in same_length(prompts).values():
        table = torch.stack([prompts[place] for place in places])
        for row, place in enumerate(places):
            apart = table != table[row]
            count = apart.sum(dim=1)
            count[count == 0] = table.shape[1] + 1  # itself, and the same prompt again
            nearest = apart[int(count.argmin())].nonzero()[:, 0]
            one_stretch = len(nearest) and int(nearest[-1] - nearest[0]) == len(nearest) - 1
            if one_stretch and 2 * len(nearest) <= table.shape[1]:
                found[place] = int(nearest[-1])
    return found
