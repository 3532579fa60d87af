"""First names and templates: prompts in which a pronoun has to agree with a name."""

__all__ = ["NAMES", "OBJECT_TEMPLATES", "SUBJECT_TEMPLATES", "NamedPrompts", "named_prompts"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theodolite.core.errors import DataError, InputError

NAMES: dict[str, tuple[str, ...]] = {
    "female": (
        "Mary", "Elizabeth", "Anna", "Sarah", "Emily", "Jane", "Laura", "Rachel", "Julia", "Emma", "Helen", "Susan", "Margaret",
        "Alice", "Karen", "Linda", "Nancy", "Jessica", "Amy", "Lisa", "Barbara", "Ruth", "Rebecca", "Kate", "Lucy", "Maria",
        "Catherine", "Victoria", "Jennifer", "Hannah", "Patricia", "Michelle", "Diana", "Rose", "Caroline", "Martha",
    ),
    "male": (
        "John", "James", "Robert", "Michael", "William", "David", "Richard", "Joseph", "Thomas", "Charles", "Daniel", "Matthew",
        "Mark", "Paul", "George", "Kevin", "Peter", "Henry", "Edward", "Jack", "Adam", "Andrew", "Stephen", "Brian", "Eric",
        "Frank", "Harry", "Steven", "Samuel", "Benjamin", "Philip", "Simon", "Ben", "Walter", "Arthur", "Albert",
    ),
}  # fmt: skip
"""Common English first names, by the pronoun that most texts use for their bearers."""

SUBJECT_TEMPLATES: tuple[str, ...] = (
    "Well, {} truly is a kind neighbour, isn't",
    "Look, {} is very clever, isn't",
    "Honestly, {} always tries so hard, doesn't",
)
"""Next comes " she" or " he"."""

OBJECT_TEMPLATES: tuple[str, ...] = (
    "My opinion of {}? To tell the truth, I admire",
    "If you ask me about {}, I must say I cannot stand",
    "The parcel is for {}. Tomorrow I will hand it to",
)
"""Next comes " her" or " him"."""


@dataclass(frozen=True, eq=False)
class NamedPrompts:
    """Prompts as token ids, whether the name is of the first group, the name's token in each, and which name and template."""

    prompts: list[Tensor]
    labels: np.ndarray
    tokens: list[int]
    names: list[str]
    templates: list[int]

    def pair(self, template: int, positive: str, negative: str) -> tuple[Tensor, Tensor]:
        """The prompts of two names in one template."""
        found = {(name, at): prompt for name, at, prompt in zip(self.names, self.templates, self.prompts, strict=True)}
        missing = [name for name in (positive, negative) if (name, template) not in found]
        if missing:
            raise InputError(f"no prompt of template {template} holds {' or '.join(missing)}")
        return found[positive, template], found[negative, template]


def named_prompts(
    templates: Sequence[str], groups: Sequence[Sequence[str]], tokenizer: Any, *, per_group: int | None = None
) -> NamedPrompts:
    """Every name of two groups put into every template (at "{}"), of the names that are one token of ``tokenizer``.

    per_group: so many of each group, the first ones. Raises DataError where a group has fewer.
    """
    if len(groups) != 2 or isinstance(templates, str) or not all("{}" in template for template in templates):
        raise InputError('give two groups of names, and templates that hold "{}" where the name stands')
    chosen = [[name for name in group if _one_token(name, tokenizer)][:per_group] for group in groups]
    fewest = min(map(len, chosen))
    if fewest < (per_group or 1):
        raise DataError(
            f"only {fewest} of the names of a group are one token of this tokenizer, {per_group or 1} are needed"
        )
    made = NamedPrompts([], np.empty(0), [], [], [])
    labels = list[int]()
    for at, template in enumerate(templates):
        before, _, _ = template.partition("{}")
        for label, group in zip((1, 0), chosen, strict=True):
            for name in group:
                ids = torch.tensor(tokenizer(template.format(name)).input_ids)
                made.prompts.append(ids)
                made.tokens.append(_place(ids, before, name, tokenizer))
                made.names.append(name)
                made.templates.append(at)
                labels.append(label)
    return NamedPrompts(made.prompts, np.array(labels), made.tokens, made.names, made.templates)


def _form(name: str) -> str:
    return f" {name}"


def _one_token(name: str, tokenizer: Any) -> bool:
    return len(tokenizer.encode(_form(name), add_special_tokens=False)) == 1


def _place(ids: Tensor, before: str, name: str, tokenizer: Any) -> int:
    (wanted,) = tokenizer.encode(_form(name), add_special_tokens=False)
    places = (ids == wanted).nonzero()[:, 0].tolist()
    if not places:
        raise DataError(f"the name {name!r} is not one token after {before!r}; let a space stand before it")
    return places[0]
