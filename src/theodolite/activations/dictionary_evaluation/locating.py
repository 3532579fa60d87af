"""Where in a decoder an attribute acts: heads by what patching them changes, and by what they write."""

__all__ = ["head_location", "locate", "writing_heads"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from theodolite.activations.dictionary_evaluation.runs import Location, PatchedRuns
from theodolite.activations.dictionary_evaluation.task import Task
from theodolite.core.errors import InputError
from theodolite.core.transformer import DecoderParts, decoder_parts

_KINDS = {"head_output": "", "query": "q_proj", "key": "k_proj", "value": "v_proj"}


def head_location(
    model: Any, layer: int, head: int, *, kind: str = "head_output", position: int | str = -1
) -> Location:
    """The location of one head: its output before the output projection, or its query, key or value.

    head counts the groups for keys and values. Raises InputError for a head that is not there, ModelError for a model of
    unknown layout.
    """
    return _head(decoder_parts(model), layer, head, kind, position)


def _head(parts: DecoderParts, layer: int, head: int, kind: str, position: int | str) -> Location:
    if kind not in _KINDS:
        raise InputError(f"kind is one of {', '.join(_KINDS)}, got {kind!r}")
    if not 0 <= layer < len(parts):
        raise InputError(f"the model has blocks 0..{len(parts) - 1}, so no {layer}")
    attention = parts.blocks[layer].attention
    heads = attention.heads if kind in ("head_output", "query") else attention.kv_heads
    if not 0 <= head < heads:
        raise InputError(f"block {layer} has {heads} heads of the kind {kind!r}, so no {head}")
    name = f"{attention.output_name}:input"
    if kind != "head_output":
        if _KINDS[kind] not in dict(attention.module.named_children()):
            raise InputError(
                f"{attention.name} has no map {_KINDS[kind]} of its own; give a Location with its name and columns"
            )
        name = f"{attention.name}.{_KINDS[kind]}"
    width = attention.head_width
    label = f"{layer}.{head}" + ("" if kind == "head_output" else f" {kind}")
    return Location(name, position, (head * width, (head + 1) * width), label)


def locate(
    model: Any,
    task: Task,
    attribute: str,
    *,
    kind: str = "head_output",
    top: int = 8,
    position: int | str = -1,
    prompts: int = 16,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    memory: int | None = None,
) -> list[Location]:
    """The heads whose output at ``position`` changes the outcome most when it alone is that of the counterfactual.

    By the absolute mean change over the first ``prompts`` prompts, largest first; each location's ``score`` is the mean change,
    clean less patched. All heads of a block run together. layers: only these blocks.

    Raises InputError for an attribute or layer that is not there, ModelError for a model of unknown layout.
    """
    parts = decoder_parts(model)
    if attribute not in task.attributes.columns:
        raise InputError(
            f"there is no attribute {attribute!r}; there are: {', '.join(map(str, task.attributes.columns))}"
        )
    if top < 1 or prompts < 1:
        raise InputError(f"need at least one head and one prompt, got top={top}, prompts={prompts}")
    few = _first(task, prompts)
    changed = few.counterfactual(attribute, seed)
    other = Task(changed[0], few.attributes, few.counterfactual, few.outcome, few.positions)
    chosen = range(len(parts)) if layers is None else layers
    places = {layer: _head(parts, layer, 0, kind, position) for layer in chosen}
    whole = [Location(place.name, position, None, str(layer)) for layer, place in places.items()]
    attention = parts.blocks[0].attention
    heads = attention.heads if kind in ("head_output", "query") else attention.kv_heads
    runs = PatchedRuns(model, few, whole, repeat=heads, memory=memory)
    theirs = PatchedRuns(model, other, whole, memory=memory).states
    found = []
    for one in whole:
        layer, state = int(one.label), runs.states[one]
        mine = (
            state.unflatten(0, (len(few), heads)).unflatten(2, (heads, -1)).clone()
        )  # prompt, patched head, head, width
        new = theirs[one].unflatten(1, (heads, -1))
        for head in range(heads):
            mine[:, head, head] = new[:, head]
        answer = runs.run({one: mine.flatten(2).flatten(0, 1)}).outcome
        change = (runs.clean.outcome - answer).unflatten(0, (len(few), heads)).mean(dim=0)
        found += [_scored(_head(parts, layer, head, kind, position), float(change[head])) for head in range(heads)]
    return sorted(found, key=lambda one: -abs(one.score))[:top]


def _scored(one: Location, score: float) -> Location:
    return Location(one.name, one.position, one.columns, one.label, score)


def _first(task: Task, count: int) -> Task:
    """The first prompts, or more where an attribute would have a single value in them."""
    for n in range(min(count, len(task)), len(task)):
        if (task.attributes.iloc[:n].nunique() >= 2).all():
            return task.subset(range(n))
    return task


def writing_heads(
    model: Any, task: Task, *, top: int = 8, prompts: int = 32, memory: int | None = None
) -> list[Location]:
    """The heads that write most towards the outcome at the last token, by direct attribution.

    The score of a head is the mean over prompts of z W_O . g, where g is the gradient of the outcome by the stream before the
    final norm; largest first. What a head does through later blocks is not counted.
    """
    parts = decoder_parts(model)
    if top < 1 or prompts < 1:
        raise InputError(f"need at least one head and one prompt, got top={top}, prompts={prompts}")
    few = _first(task, prompts)
    outputs = [Location(f"{block.attention.output_name}:input", -1, None, str(block.index)) for block in parts.blocks]
    last = parts.blocks[-1]
    stream = Location(last.name, -1, None, "stream")
    states = PatchedRuns(model, few, [*outputs, stream], memory=memory).states
    slope = _outcome_slope(parts, few, states[stream])
    found = []
    for block, one in zip(parts.blocks, outputs, strict=True):
        z = states[one].unflatten(1, (block.attention.heads, -1))
        back = torch.einsum("nd,dhs->nhs", slope, block.attention.output_weight.float().cpu())
        for head, score in enumerate((z * back).sum(dim=2).mean(dim=0).tolist()):
            found.append(_scored(_head(parts, block.index, head, "head_output", -1), score))
    return sorted(found, key=lambda one: -one.score)[:top]


def _outcome_slope(parts: DecoderParts, task: Task, stream: Tensor) -> Tensor:
    """Gradient of the outcome by the stream before the final norm, (n, width)."""
    x = stream.to(parts.device).requires_grad_()
    with torch.enable_grad():
        logits = parts.unembedding(parts.final_norm.module(x[:, None].to(parts.unembedding_weight.dtype)))[:, 0].float()
        total = task.outcome(logits, torch.arange(len(task))).sum()
    (slope,) = torch.autograd.grad(total, x)
    return slope.cpu()
