"""How a causal language model predicts the next token of texts it is given."""

__all__ = ["NextTokens", "next_tokens"]

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from theodolite.core.capture import main_tensor
from theodolite.core.errors import DataError, ModelError
from theodolite.core.memory import chunks
from theodolite.core.view import evaluation_mode

_COPIES = 4  # of the logits alive at once: themselves, their log-softmax, and what the operators in between hold


@dataclass(frozen=True, eq=False)
class NextTokens:
    """For each row and each position but the last.

    loss: -log p of the token that follows, in nats. right: whether the likeliest token is the one that follows.
    """

    loss: Float[Tensor, "row position"]
    right: Bool[Tensor, "row position"]


@torch.no_grad()
def next_tokens(model: nn.Module, ids: Int[Tensor, "row length"], *, memory: int | None = None) -> NextTokens:
    """Loss and hits of every next token of ``ids`` (n, L) without padding, in chunks that fit ``memory`` bytes.

    model: token ids (n, L) -> logits (n, L, vocabulary), or an object whose ``logits`` they are. Raises DataError for rows
    of fewer than two tokens, ModelError where what comes back are no such logits.
    """
    if ids.ndim != 2 or ids.shape[1] < 2 or len(ids) == 0:
        raise DataError(f"need token ids (rows, at least 2 tokens), got shape {tuple(ids.shape)}")
    ids = ids.to(next(model.parameters()).device)
    with evaluation_mode(model):
        first = _logits(model, ids[:1])
        losses, right = [], []
        for part in chunks(len(ids), _COPIES * 4.0 * first.numel(), memory):
            logits, after = _logits(model, ids[part])[:, :-1].float(), ids[part, 1:]
            losses.append(
                nn.functional.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="none")
                .view(after.shape)
                .cpu()
            )
            right.append((logits.argmax(dim=-1) == after).cpu())
    return NextTokens(torch.cat(losses), torch.cat(right))


def _logits(model: Any, ids: Tensor) -> Tensor:
    found = main_tensor(model(ids))
    if found.ndim != 3 or found.shape[:2] != ids.shape:
        raise ModelError(
            f"a language model gives logits (rows, tokens, vocabulary) for token ids {tuple(ids.shape)}; this one gives "
            f"{tuple(found.shape)}"
        )
    return found
