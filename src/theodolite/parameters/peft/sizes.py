"""What a method's changes hold, before any is made: widths, counts, the head, and whether they fit the model.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366.
"""

__all__ = ["check", "chosen_layers", "count", "head_names", "needs_blocks", "widths", "with_bottleneck"]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from theodolite.core.errors import InputError, ModelError
from theodolite.parameters.peft.blocks import Block, linear_shape
from theodolite.parameters.peft.changes import Bottleneck
from theodolite.parameters.peft.host import ATTENTION_READS, backbone, check_attention, site
from theodolite.parameters.peft.modification import Modification, resolve
from theodolite.parameters.weights import as_patterns, matches


def needs_blocks(modifications: Sequence[Modification]) -> bool:
    """Whether the blocks have to be found at all: not for biases, prompts or a head alone."""
    return any(m.hidden or m.where == "weights" for m in modifications)


def chosen_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Numbers of the changed blocks, negative ones counted from the end."""
    if layers is None:
        return tuple(range(count))
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise InputError(f"layers must be different numbers of the {count} blocks, as in [0, -1]; got {layers!r}")
    chosen = tuple(int(one) + count * (int(one) < 0) for one in layers)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= count:
        raise InputError(f"layers must be different numbers of the {count} blocks, got {list(layers)}")
    return tuple(sorted(chosen))


def widths(m: Modification, block: Block) -> tuple[int, int, int]:
    """(input, output, heads) of a bottleneck at its place in a block."""
    if m.insertion == "after_norm":
        return block.width, block.width, 1
    reads, slot, before = site(block, m.where, m.insertion)
    out = slot.shape[0] if before else slot.shape[1]
    return (out if reads is None else linear_shape(reads)[0]), out, block.heads if m.where == "heads" else 1


def count(
    model: nn.Module, modifications: Sequence[Modification], blocks: Sequence[Block], layers: Sequence[int]
) -> int:
    """How many numbers the changes hold, a prefix as its plain keys and values, without the head."""
    total = 0
    for m in modifications:
        if m.where == "input":
            total += m.bottleneck * backbone(model).get_input_embeddings().embedding_dim
        elif not m.hidden:
            named = dict(model.named_parameters())
            total += sum(named[name].numel() for name in own_weights(model, m, blocks, layers))
        elif m.prefix:
            total += sum(2 * blocks[at].kv_heads * blocks[at].head_width * m.bottleneck for at in layers)
        else:
            total += sum(Bottleneck.size(m, *widths(m, blocks[at])) for at in layers)
    return total


def own_weights(model: nn.Module, m: Modification, blocks: Sequence[Block], layers: Sequence[int]) -> list[str]:
    """Names of the model's own parameters that train: biases outside the head, or all of the chosen blocks."""
    if m.where == "bias":
        head = set(head_names(model, True, blocks))
        return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias" and name not in head]
    inside = {id(p) for at in layers for p in blocks[at].module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in inside]


def with_bottleneck(method: object, bottleneck: int, **options: Any) -> tuple[Modification, ...]:
    """The method's modifications, all of that bottleneck where it is no preset."""
    if isinstance(method, str):
        return resolve(method, bottleneck=bottleneck, **options)
    return tuple(replace(m, bottleneck=bottleneck) for m in resolve(method, **options))


def largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of ``step`` up to ``most`` that fits; 0 where none does. Sizes grow with the bottleneck."""
    low, high = 0, most // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def check(
    model: nn.Module, modifications: Sequence[Modification], blocks: Sequence[Block], layers: Sequence[int]
) -> None:
    """Refuse modifications that the model has no place for."""
    for m in modifications:
        if m.where == "bias" and not own_weights(model, m, blocks, layers):
            raise ModelError(f"{type(model).__name__} has no bias parameters; choose another method than bitfit")
        if m.where == "input":
            _check_limit(backbone(model), m)
        for block in (blocks[at] for at in layers) if m.hidden else ():
            _check_place(m, block)
            if m.prefix:
                check_attention(block)
                _check_limit(block.attention, m)
                continue
            width_in, width_out, heads = widths(m, block)
            if m.bottleneck > min(width_in, width_out):
                raise InputError(
                    f"a bottleneck of {m.bottleneck} is wider than the states it changes ({width_in} in, {width_out} out)"
                )
            if m.bottleneck % heads:
                raise InputError(
                    f"{heads} heads do not divide a bottleneck of {m.bottleneck}; take a multiple of {heads}"
                )
    prefixes = [m for m in modifications if m.prefix]
    if len(prefixes) > 1:
        raise InputError("one prefix is enough: give one modification with a softmax, with a larger bottleneck")


def _check_place(m: Modification, block: Block) -> None:
    if m.insertion == "after_norm" and m.where not in block.norms:
        raise InputError(
            f"after_norm needs a LayerNorm behind the residual of {m.where!r}, and this model has its norms before the "
            'sub-blocks; use insertion="parallel" or "sequential"'
        )
    if m.where == "heads" and m.insertion != "parallel":
        raise InputError('heads are changed in parallel: use insertion="parallel", or where="attention"')
    reads = m.where in ("attention", "heads") and m.insertion == "parallel" and not m.prefix
    if reads and not set(ATTENTION_READS) & block.slots.keys():
        raise InputError(
            f"what {m.where!r} reads is not known: name one of {', '.join(ATTENTION_READS)} in blocks=, or use "
            'insertion="sequential"'
        )
    needed = {"ffn": "ffn_out", "attention": "output", "heads": "output"}.get(m.where, m.where)
    if needed not in block.slots:
        raise InputError(f"these blocks have no {m.where!r}; they have {', '.join(block.slots)}")


def _check_limit(module: Any, m: Modification) -> None:
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if limit is not None and m.bottleneck > limit:
        raise InputError(f"{m.bottleneck} prefixes are more than the model's {limit} positions")


def _is_pretrained(module: nn.Module) -> bool:
    return hasattr(module, "base_model") and hasattr(module, "config")


def head_names(model: nn.Module, train_head: object = True, blocks: Sequence[Block] = ()) -> list[str]:
    """Names of the parameters behind the blocks, or of those that patterns name. A language model's output embedding is
    part of what was pretrained, not a head.
    """
    if not isinstance(train_head, bool):
        patterns = as_patterns(train_head) or []  # type: ignore[arg-type]
        found = [name for name, _ in model.named_parameters() if matches(name, patterns)]
        if not found:
            children = ", ".join(name for name, _ in model.named_children())
            raise ModelError(f"no parameter is called {' or '.join(patterns)}; the model consists of {children}")
        return found
    if not train_head:
        return []
    children = dict(model.named_children())
    if _is_pretrained(model):
        inner: Any = model
        embedding = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        skipped = {id(inner.base_model)} | ({id(embedding)} if embedding is not None else set())
        if inner.base_model is model:
            return []
        heads = [name for name, child in children.items() if not any(id(part) in skipped for part in child.modules())]
        nested = list[str]()
    else:
        block = {id(one.module) for one in blocks}
        holders = [
            name
            for name, child in children.items()
            if any(_is_pretrained(part) or id(part) in block for part in child.modules())
        ]
        if not holders:
            return []
        order = list(children)
        heads = order[order.index(holders[-1]) + 1 :]
        nested = [f"{name}.{inside}" for name in holders for inside in head_names(children[name], True, blocks)]
    return nested + [name for name, _ in model.named_parameters() if name.split(".")[0] in heads]
