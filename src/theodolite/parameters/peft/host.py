"""Puts changes into a frozen model and takes them out again, leaving nothing behind.

Linear maps get hooks (one that reads, one that composes); an attention module gets an attention function with a prefix, by a
copy of its config that names it; the model that embeds tokens gets a hook that adds prompts and one that cuts them off.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366, section 4.1.
"""

__all__ = [
    "Handles",
    "attach",
    "attach_prefix",
    "attach_prompt",
    "backbone",
    "check_attention",
    "register_attention",
    "site",
]

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import ModelError, require
from theodolite.parameters.peft.blocks import Block, Slot
from theodolite.parameters.peft.changes import Bottleneck, Prefix, Prompt, with_prefix

Handles = list[Callable[[], Any]]
"""What undoes an attachment, in order."""

_ATTENTION = "theodolite-prefix"
ATTENTION_READS = ("query", "fused", "key", "value")
"""Maps whose input is what the attention reads; the first that a block has is asked."""


def site(block: Block, where: str, insertion: str) -> tuple[nn.Module | None, Slot, bool]:
    """What is read (None: h itself), where h is, and whether h is the input of that map rather than its output."""
    output = block.slots["output"]
    if where == "ffn":
        return (block.ffn_reads if insertion == "parallel" else None), block.slots["ffn_out"], False
    if where in ("attention", "heads"):
        if insertion != "parallel":
            return None, output, False
        reads = next(block.slots[name] for name in ATTENTION_READS if name in block.slots).module
        # where norms come first, the branch adds to the sub-block's output; else to the heads side by side
        return reads, output, where == "heads" or not block.pre_norm
    slot = block.slots[where]
    return (slot.module if insertion == "parallel" else None), slot, False


def attach(change: Bottleneck, block: Block) -> Handles:
    """Hook a change into its place in a block."""
    m = change.modification
    if m.insertion == "after_norm":
        return [block.norms[m.where].register_forward_hook(partial(_normalise_again, change)).remove]
    reads, slot, before = site(block, m.where, m.insertion)
    handles: Handles = []
    if reads is not None:
        handles.append(reads.register_forward_pre_hook(partial(_read, change)).remove)
    if before:
        handles.append(slot.module.register_forward_pre_hook(partial(_change_input, change)).remove)
    else:
        handles.append(slot.module.register_forward_hook(partial(_change_output, change, slot, reads is None)).remove)
    return handles


# Hooks are functions with their change bound to them, and no closures, so that a copied or pickled model has its own changes.


def _normalise_again(change: Bottleneck, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return module.forward(change.compose(args[0], out))


def _read(change: Bottleneck, module: nn.Module, args: tuple[Any, ...]) -> None:
    change.seen = args[0]


def _taken(change: Bottleneck) -> Tensor:
    x, change.seen = change.seen, None
    if x is None:
        raise ModelError(
            f"the {change.modification.where} change was reached before what it reads; this model does not run its parts in "
            "order"
        )
    return x


def _change_input(change: Bottleneck, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (change.compose(args[0], _taken(change)), *args[1:])


def _change_output(
    change: Bottleneck, slot: Slot, sequential: bool, module: nn.Module, args: tuple[Any, ...], out: Tensor
) -> Tensor:
    h = slot.view(out)
    new = change.compose(h, h if sequential else _taken(change))
    return new if slot.stop is None else torch.cat((out[..., : slot.start], new, out[..., slot.stop :]), dim=-1)


def check_attention(block: Block) -> None:
    """Refuse prefixes where the attention does not call a function that can be replaced."""
    config = getattr(block.attention, "config", None)
    name = getattr(config, "_attn_implementation", None)
    home = vars(sys.modules[type(block.attention).__module__])
    if config is None or name not in ("sdpa", "eager") or "ALL_ATTENTION_FUNCTIONS" not in home:
        raise ModelError(
            f"prefixes need a transformers model that attends by 'sdpa' or 'eager', {type(block.attention).__name__} "
            f"attends by {name!r}; load it with attn_implementation='sdpa', or use a method without prefixes"
        )


def attach_prefix(prefix: Prefix, block: Block) -> Handles:
    """Give a block's attention the keys and values of a prefix.

    The attention module alone gets a copy of the config, so that masks are still made for the original function.
    """
    register_attention()
    attention: Any = block.attention
    original = attention.config
    changed = copy.copy(original)
    changed._attn_implementation_internal = _ATTENTION
    changed.theodolite_prefix = (prefix, original._attn_implementation)
    attention.config = changed
    return [partial(setattr, attention, "config", original)]


def register_attention() -> None:
    """Tell transformers of the attention function with prefixes; it is known by name, once in each process."""
    require("transformers", "language").AttentionInterface.register(_ATTENTION, _attend)


def _attend(module: Any, *args: Any, **more: Any) -> Any:
    """What transformers calls instead of the model's own attention function."""
    home = vars(sys.modules[type(module).__module__])
    prefix, name = module.config.theodolite_prefix
    plain = home["ALL_ATTENTION_FUNCTIONS"].get_interface(name, home.get("eager_attention_forward"))
    return with_prefix(prefix, plain, module, *args, **more)


def backbone(model: nn.Module) -> Any:
    """The innermost transformers model that embeds tokens: where prompts go in. ModelError where there is none."""
    for module in model.modules():
        inner = getattr(module, "base_model", None)
        if inner is None or not hasattr(inner, "get_input_embeddings") or not hasattr(inner, "config"):
            continue
        if isinstance(inner.get_input_embeddings(), nn.Embedding) and not inner.config.is_encoder_decoder:
            return inner
    raise ModelError(
        "prompts need a transformers encoder or decoder that embeds tokens; use a method that changes its blocks instead"
    )


def attach_prompt(prompt: Prompt, model: nn.Module) -> Handles:
    """Put trained vectors beside the embedded tokens, and cut their states off the last hidden states.

    A decoder reads them before the tokens, once: later steps find them in the cache. An encoder, which sees the order by
    positions alone, gets them behind the tokens at the first position, so that the tokens keep theirs and so does [CLS].
    """
    inner = backbone(model)
    decoder = bool(getattr(inner.config, "is_decoder", False)) or any(
        getattr(module, "is_causal", False) for module in inner.modules()
    )
    return [
        inner.register_forward_pre_hook(partial(_add_prompt, prompt, decoder), with_kwargs=True).remove,
        inner.register_forward_hook(partial(_cut_prompt, prompt, decoder), with_kwargs=True).remove,
    ]


def _add_prompt(
    prompt: Prompt, decoder: bool, inner: Any, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    length, given = prompt.modification.bottleneck, dict(given)
    if args:
        given["input_ids"] = args[0]
        if len(args) > 1:
            given["attention_mask"] = args[1]
    ids = given.pop("input_ids", None)
    embedded = given.get("inputs_embeds")
    embedded = inner.get_input_embeddings()(ids) if embedded is None else embedded
    cache = given.get("cache", given.get("past_key_values"))
    first = cache is None or cache.get_seq_length() == 0
    rows, tokens = embedded.shape[:2]
    parts = [prompt(embedded), embedded] if decoder else [embedded, prompt(embedded)]
    given["inputs_embeds"] = torch.cat(parts, dim=1) if first else embedded
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ModelError(
                "prompts need a mask of shape (rows, tokens) and a cache that grows; generate without a static one"
            )
        ones = mask.new_ones(rows, length)
        given["attention_mask"] = torch.cat([ones, mask] if decoder else [mask, ones], dim=1)
    positions = given.get("position_ids")
    if decoder and positions is not None:
        before = torch.arange(length, device=positions.device).expand(len(positions), -1)
        given["position_ids"] = torch.cat([before, positions + length], dim=1) if first else positions + length
    elif not decoder:
        start = _first_position(inner)
        if positions is None:
            positions = torch.arange(start, start + tokens, device=embedded.device)[None].expand(rows, -1)
        given["position_ids"] = torch.cat([positions, positions.new_full((len(positions), length), start)], dim=1)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = nn.functional.pad(given["token_type_ids"], (0, length))
    return (), given


def _cut_prompt(prompt: Prompt, decoder: bool, inner: Any, args: Any, given: dict[str, Any], out: Any) -> Any:
    length, total, hidden = prompt.modification.bottleneck, given["inputs_embeds"].shape[1], out[0]
    if hidden.shape[1] != total:
        raise ModelError("this model gives another number of states than tokens, so its prompts cannot be cut off")
    cache = given.get("cache", given.get("past_key_values"))
    past = cache.get_seq_length() - total if cache is not None else 0
    if decoder and past > 0:
        return out
    shorter = hidden[:, length:] if decoder else hidden[:, :-length]
    if isinstance(out, tuple):
        return (shorter, *out[1:])
    out.last_hidden_state = shorter
    return out


def _first_position(inner: Any) -> int:
    """Where the table of positions starts: after the padding token's in RoBERTa, at 0 elsewhere."""
    table = getattr(getattr(inner, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1
