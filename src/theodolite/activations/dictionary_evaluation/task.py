"""Inputs with known attributes, a way to change one of them, and the outcome that counts."""

__all__ = ["Task", "tabular_task"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks


@dataclass(frozen=True, eq=False)
class Task:
    """n inputs and what is known of them.

    prompts: token ids (n, length), long, of one length and without padding; or rows (n, ...) of any network's input.
    attributes: a column for each attribute, n rows. counterfactual(attribute, seed): prompts in which that attribute has
    another value and, as far as it can be, nothing else has, with their attributes; n of each. outcome(output, rows): one number
    for each row of ``output``, what the model gives for the prompts ``rows`` (indices); of a decoder its last logits.
    positions: token positions by name, (n,) each, that a `Location` may refer to.

    Raises DataError where lengths do not agree or an attribute has one value only.
    """

    prompts: Tensor
    attributes: pd.DataFrame
    counterfactual: Callable[[str, int], tuple[Tensor, pd.DataFrame]]
    outcome: Callable[[Tensor, Tensor], Tensor]
    positions: Mapping[str, Int[Tensor, " prompt"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.attributes) or len(self.prompts) == 0:
            raise DataError(f"{len(self.prompts)} prompts but {len(self.attributes)} rows of attributes")
        need_values(self.attributes)
        for name in self.attributes.columns:
            column: Any = self.attributes[name]
            if column.nunique() < 2:
                raise DataError(
                    f"attribute {name!r} has a single value, {column.iloc[0]!r}, so there is nothing to tell apart; leave it out"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, rows: Sequence[int] | np.ndarray | Tensor) -> "Task":
        """The prompts ``rows``, in that order."""
        index = torch.as_tensor(np.array(rows), dtype=torch.long)
        whole = self

        def counterfactual(attribute: str, seed: int) -> tuple[Tensor, pd.DataFrame]:
            prompts, attributes = whole.counterfactual(attribute, seed)
            return prompts[index], attributes.iloc[index.numpy()].reset_index(drop=True)

        def outcome(output: Tensor, part: Tensor) -> Tensor:
            return whole.outcome(output, index[part])

        return Task(
            self.prompts[index], self.attributes.iloc[index.numpy()].reset_index(drop=True), counterfactual, outcome,
            {name: places[index] for name, places in self.positions.items()},
        )  # fmt: skip

    def split(self, share: float = 0.5, *, seed: int = 0, by: Sequence[str] = ()) -> tuple["Task", "Task"]:
        """About ``share`` of the prompts to fit on, and the others; combinations of the attributes ``by`` in one part only."""
        rng = np.random.default_rng(seed)
        if not 0 < share < 1:
            raise InputError(f"a share must lie between 0 and 1, got {share}")
        if by:
            group = self.attributes.groupby(list(by), sort=True, observed=True).ngroup().to_numpy()
        else:
            group = np.arange(len(self))
        order = rng.permutation(int(group.max()) + 1)
        filled = np.cumsum(np.bincount(group)[order])
        first = order[filled <= share * len(self)]
        chosen = np.isin(group, first)
        if not chosen.any() or chosen.all():
            raise DataError(f"{len(self)} prompts in {len(order)} groups cannot be split at {share}")
        return self.subset(np.flatnonzero(chosen)), self.subset(np.flatnonzero(~chosen))


def need_values(attributes: pd.DataFrame) -> None:
    """Raise DataError naming an attribute that not every row has."""
    for name in attributes.columns:
        if bool(np.asarray(pd.isna(attributes[name])).any()):
            raise DataError(f"attribute {name!r} has missing values; every row needs a value")


def tabular_task(
    x: Tensor | np.ndarray, attributes: pd.DataFrame | Mapping[str, Sequence], *, target: Sequence[int] | None = None
) -> Task:
    """Rows of a table (or images) as a task of a network.

    The counterfactual of a row is another row, with another value of the attribute (drawn) that agrees with it in as many other
    attributes as any does, the nearest one of these. The outcome is the score of the row's target less the mean of the other
    scores; for a single score, that score. target: (n,) the column of each row; by default the place of its value of the first
    attribute among that attribute's sorted values.
    """
    rows = x if isinstance(x, Tensor) else torch.as_tensor(np.array(x))
    table = pd.DataFrame(attributes).reset_index(drop=True)
    if target is None:
        target = table.iloc[:, 0].astype("category").cat.codes.to_numpy()
    columns = torch.as_tensor(np.array(target), dtype=torch.long)

    def outcome(output: Float[Tensor, "row score"], part: Tensor) -> Tensor:
        if output.shape[1] == 1:
            return output[:, 0]
        wanted = columns[part]
        if int(columns.max()) >= output.shape[1]:
            raise InputError(
                f"targets go up to {int(columns.max())}, the model has {output.shape[1]} scores; give target="
            )
        own = output.gather(1, wanted[:, None].to(output.device))[:, 0]
        return own - (output.sum(dim=1) - own) / (output.shape[1] - 1)

    def counterfactual(attribute: str, seed: int) -> tuple[Tensor, pd.DataFrame]:
        found = _partners(rows.reshape(len(rows), -1).float(), table, attribute, seed)
        return rows[found], table.iloc[found.numpy()].reset_index(drop=True)

    return Task(rows, table, counterfactual, outcome)


def _partners(flat: Tensor, table: pd.DataFrame, attribute: str, seed: int) -> Tensor:
    """For each row the row that stands in for it with another value of ``attribute``."""
    if attribute not in table.columns:
        raise InputError(f"there is no attribute {attribute!r}; there are: {', '.join(map(str, table.columns))}")
    rng = np.random.default_rng(seed)
    codes = table[attribute].astype("category").cat.codes.to_numpy()
    count = int(codes.max()) + 1
    wanted = torch.as_tensor((codes + rng.integers(1, count, len(codes))) % count)
    own = torch.as_tensor(codes.copy())
    rest = [
        torch.as_tensor(table[name].astype("category").cat.codes.to_numpy().copy())
        for name in table.columns
        if name != attribute
    ]
    found = []
    for part in chunks(len(flat), 32.0 * len(flat)):
        away = torch.cdist(flat[part], flat)
        away = away / (1 + away.max())  # under 1, so that one attribute more in common always counts for more
        agree = torch.zeros_like(away)
        for other in rest:
            agree += (other[part, None] == other).float()
        score = agree - away
        found.append(score.masked_fill(wanted[part, None] != own, -torch.inf).argmax(dim=1))
    return torch.cat(found)
