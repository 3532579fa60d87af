"""One vector for each text from a language model's hidden states."""

__all__ = ["embed_texts", "pool_tokens"]

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import chunk_rows
from theodolite.core.view import evaluation_mode
from theodolite.language.pretrained import Pretrained


def pool_tokens(
    hidden: Tensor, mask: Tensor, *, how: str = "mean", drop_first: bool = False
) -> Float[Tensor, "text width"]:
    """One vector for each text of hidden states (text, token, width) under a mask (text, token) of 1 for real tokens.

    how: the mean of the tokens, the first or the last one. drop_first: leave out the first real token, as is needed for
    decoders: it sees nothing but itself, and its state is often so large that it makes every text's mean alike. A text of
    one token keeps it.

    >>> hidden = torch.tensor([[[900.0], [1.0], [3.0], [7.0]]])
    >>> pool_tokens(hidden, torch.tensor([[1, 1, 1, 0]]), drop_first=True).tolist()
    [[2.0]]
    """
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise InputError(
            f"need hidden states (text, token, width) and a mask (text, token), got {tuple(hidden.shape)} and {tuple(mask.shape)}"
        )
    if how not in ("mean", "first", "last"):
        raise InputError(f"tokens are pooled by mean, first or last, got {how!r}")
    kept = mask.bool()
    if not bool(kept.any(dim=1).all()):
        raise InputError(f"text {int((~kept.any(dim=1)).nonzero()[0])} has no token under the mask")
    place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    first = place.masked_fill(~kept, kept.shape[1]).amin(dim=1, keepdim=True)
    if drop_first:
        kept = kept & ((place != first) | (kept.sum(dim=1, keepdim=True) == 1))
    if how == "mean":
        weight = kept[:, :, None].to(hidden.dtype)
        # a masked state may be anything, so it is set to 0 before it is counted with weight 0
        return hidden.masked_fill(~kept[:, :, None], 0.0).sum(dim=1) / weight.sum(dim=1)
    chosen = place.masked_fill(~kept, kept.shape[1] if how == "first" else -1)
    index = chosen.amin(dim=1) if how == "first" else chosen.amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


def embed_texts(
    pretrained: Pretrained,
    texts: Sequence[str],
    *,
    layer: int | None = None,
    how: str = "mean",
    drop_first: bool | None = None,
    longest: int = 256,
) -> Float[np.ndarray, "text width"]:
    """Pooled hidden states of texts, float32.

    pretrained: of `theodolite.language.pretrained.load_encoder` or `load_decoder`. layer: number of blocks passed through
    (0: the token embeddings; None: the last hidden states, after the model's last normalisation); blocks behind it do not
    run. drop_first: see `pool_tokens`; None drops it where the model is a decoder. longest: tokens of a text that are read.

    Raises InputError where there is no text or one is empty, ModelError for a layer that the model does not have.
    """
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if len(texts) == 0 or empty:
        raise InputError(f"text {empty[0]} is empty" if empty else "need at least one text")
    model, tokenizer = pretrained
    kinds = model.config.architectures or ()
    decoder = hasattr(model, "lm_head") or any(kind.endswith(("CausalLM", "LMHeadModel")) for kind in kinds)
    base = model.base_model
    width = int(model.config.hidden_size)
    out = np.empty((len(texts), width), dtype=np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")  # texts of like length need little padding
    size = chunk_rows(longest * 4 * (40 * width + 16 * longest), at_most=64)
    before = tokenizer.padding_side
    tokenizer.padding_side = "right"
    try:
        with torch.inference_mode(), evaluation_mode(model):
            for rows in np.array_split(order, max(1, -(-len(order) // size))):
                batch = tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=longest, return_tensors="pt"
                )
                given = {name: batch[name] for name in ("input_ids", "attention_mask")}
                hidden = base(**given).last_hidden_state if layer is None else _hidden(base, layer, given)
                pooled = pool_tokens(
                    hidden, batch["attention_mask"], how=how, drop_first=decoder if drop_first is None else drop_first
                )
                out[rows] = pooled.float().numpy()
    finally:
        tokenizer.padding_side = before
    return out


class _Reached(Exception):
    """Ends a forward pass with the states it was run for."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _hidden(base: nn.Module, layer: int, given: dict[str, Any]) -> Tensor:
    """What goes into block ``layer`` of a transformer, or comes out of its last one."""
    config: Any = base.config
    count = int(config.num_hidden_layers)
    blocks = next((m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if blocks is None or not 0 <= layer <= count:
        raise ModelError(f"the model has layers 0 (embeddings) to {count}, got {layer}")

    def stop_before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    def stop_after(_: nn.Module, __: Any, output: Any) -> None:
        raise _Reached(output if isinstance(output, Tensor) else output[0])

    if layer < count:
        handle = blocks[layer].register_forward_pre_hook(stop_before, with_kwargs=True)
    else:
        handle = blocks[-1].register_forward_hook(stop_after)
    try:
        base(**given)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise ModelError(
        "the model does not run its blocks one after the other, so its hidden states cannot be read by number"
    )
