"""What relevance starts from and a loss is taken of."""

__all__ = ["RelevanceError", "Target", "as_targets", "read_targets"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, TheodoliteError
from theodolite.core.view import model_input


class RelevanceError(TheodoliteError, FloatingPointError):
    """Relevance became infinite or NaN on its way through the network."""


@dataclass(frozen=True, eq=False)
class Target:
    """What relevance starts from and the loss is taken of: class indices, or None of values for a single output."""

    labels: Tensor | None
    values: Tensor | None

    def start(self, scores: Tensor, how: str) -> Tensor:
        """R of the output: the score of the true class (or the one score), or 1, and 0 elsewhere."""
        one = torch.ones_like(scores)
        if self.labels is not None and scores.ndim == 2 and scores.shape[1] > 1:
            one = torch.zeros_like(scores).scatter_(1, self.labels[:, None], 1.0)
        return one if how == "one" else one * scores

    def loss(self, scores: Tensor) -> Tensor:
        """Sum over rows of cross-entropy, or half the squared error of a regression."""
        if self.labels is not None and scores.ndim == 2 and scores.shape[1] > 1:
            return nn.functional.cross_entropy(scores, self.labels, reduction="sum")
        if self.labels is not None:
            given = self.labels.to(scores).reshape(scores.shape)
            return nn.functional.binary_cross_entropy_with_logits(scores, given, reduction="sum")
        if self.values is None:
            raise InputError("a loss needs targets")
        return 0.5 * (scores - self.values.to(scores).reshape(scores.shape)).square().sum()

    def __getitem__(self, rows: slice) -> "Target":
        """The targets of some rows."""
        return Target(
            None if self.labels is None else self.labels[rows], None if self.values is None else self.values[rows]
        )


def as_targets(targets: object) -> Tensor:
    """Targets as a tensor; DataError for what holds no numbers, such as names of classes."""
    try:
        return model_input(None, targets)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"targets must be numbers, of classes their indices 0, 1, ...; turn names into indices first ({error})"
        ) from error


def read_targets(targets: Any, scores: Tensor, n: int) -> Target:
    """Targets for ``n`` rows whose scores look like ``scores``.

    Raises DataError for a wrong number of them, for labels that are no class and for classes given as fractions.
    """
    given = as_targets(targets).to(scores.device)
    if len(given) != n or given.numel() != n:
        raise DataError(f"need one target a row, got {tuple(given.shape)} for {n} rows")
    given = given.reshape(n)
    classes = scores.shape[1] if scores.ndim == 2 else 1
    if scores.ndim > 2:
        raise DataError(f"the network must give a row of scores for each input, it gives {tuple(scores.shape[1:])}")
    if given.is_floating_point():
        if classes > 1:
            raise DataError(f"the network gives {classes} scores, so targets must be whole numbers 0..{classes - 1}")
        return Target(None, given)
    highest = max(classes - 1, 1)
    if bool((given < 0).any()) or bool((given > highest).any()):
        raise DataError(
            f"labels must be 0..{highest}, as the network gives {classes} scores; "
            f"they range over {int(given.min())}..{int(given.max())}"
        )
    return Target(given.long(), None)
