"""Where the parts of a transformer block are found: attention, its projections, the FFN's input and output, the norms.

A table of the names that model families use is enough: a family is recognised by its names, so models that keep to one
(RoBERTa and MiniLM to BERT's; SmolLM2, Qwen, Mistral and Gemma to Llama's) need no entry of their own.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366, section 4.1 and the official code.
"""

__all__ = ["Block", "Slot", "find_blocks"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from theodolite.core.errors import ModelError


@dataclass(frozen=True, eq=False)
class Slot:
    """One linear map of a block, or the columns [start, stop) of the output of one that does several things at once."""

    module: nn.Module
    start: int = 0
    stop: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out) of this slot."""
        width_in, width_out = linear_shape(self.module)
        return width_in, (width_out if self.stop is None else self.stop) - self.start

    def view(self, output: Tensor) -> Tensor:
        """The slot's columns of the module's output."""
        return output if self.stop is None else output[..., self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block.

    attention: the module that calls the attention function. slots: linear maps by the names of `Modification.where`.
    ffn_reads: the module whose input is what the FFN reads. norms: LayerNorm after the residual of "attention" and "ffn"
    where there is one (post-norm). pre_norm: norms stand before the sub-blocks.
    """

    module: nn.Module
    attention: nn.Module
    slots: Mapping[str, Slot]
    ffn_reads: nn.Module
    norms: Mapping[str, nn.Module]
    pre_norm: bool
    heads: int
    kv_heads: int
    head_width: int

    @property
    def width(self) -> int:
        """d of the hidden states."""
        return self.slots["output"].shape[1]


_FAMILIES: tuple[dict[str, str], ...] = (
    {  # BERT, RoBERTa, ELECTRA, MiniLM
        "attention": "attention.self", "query": "attention.self.query", "key": "attention.self.key",
        "value": "attention.self.value", "output": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        "ffn_in": "intermediate.dense", "ffn_out": "output.dense", "ffn_norm": "output.LayerNorm",
    },
    {  # DistilBERT
        "attention": "attention", "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
        "output": "attention.out_lin", "attention_norm": "sa_layer_norm",
        "ffn_in": "ffn.lin1", "ffn_out": "ffn.lin2", "ffn_norm": "output_layer_norm",
    },
    {  # Llama, SmolLM2, Qwen, Mistral
        "attention": "self_attn", "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "output": "self_attn.o_proj", "ffn_in": "mlp.up_proj", "ffn_gate": "mlp.gate_proj", "ffn_out": "mlp.down_proj",
    },
    {  # GPT-2: one map makes query, key and value
        "attention": "attn", "fused": "attn.c_attn", "output": "attn.c_proj", "ffn_in": "mlp.c_fc", "ffn_out": "mlp.c_proj",
    },
    {  # BART and mBART, encoder and decoder
        "attention": "self_attn", "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "output": "self_attn.out_proj", "attention_norm": "self_attn_layer_norm",
        "ffn_in": "fc1", "ffn_out": "fc2", "ffn_norm": "final_layer_norm",
    },
    {  # ViT since transformers 5
        "attention": "attention", "query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj",
        "output": "attention.o_proj", "ffn_in": "mlp.fc1", "ffn_out": "mlp.fc2",
    },
    {  # ViT before
        "attention": "attention.attention", "query": "attention.attention.query", "key": "attention.attention.key",
        "value": "attention.attention.value", "output": "attention.output.dense",
        "ffn_in": "intermediate.dense", "ffn_out": "output.dense",
    },
)  # fmt: skip
_PRE_NORM = ("MBart", "Whisper", "OPT", "Pegasus", "XGLM")  # BART's names, with the norms before the sub-blocks
_NEEDED = ("attention", "output", "ffn_in", "ffn_out")
_PARTS = ("attention", "query", "key", "value", "fused", "output", "ffn_in", "ffn_gate", "ffn_out")
_HELP = (
    "pass blocks= by hand, one dict of modules per block: {'attention': ..., 'query': ..., 'key': ..., 'value': ..., "
    "'output': ..., 'ffn_in': ..., 'ffn_out': ...}, with 'attention_norm' and 'ffn_norm' where a norm follows the residual "
    "and 'heads' (a number)"
)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an nn.Linear or of a map that keeps its weight as (in, out), as GPT-2's Conv1D does."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return int(weight.shape[0]), int(weight.shape[1])
    raise ModelError(f"expected a linear map (nn.Linear, or transformers' Conv1D), got {type(module).__name__}")


def find_blocks(model: nn.Module, blocks: object = None) -> tuple[Block, ...]:
    """The transformer blocks of ``model`` in order, by the names of its family or from ``blocks`` (dicts of modules).

    Raises ModelError for an unknown family, saying what to pass.

    >>> layer = nn.ModuleDict({"q": nn.Linear(8, 8), "o": nn.Linear(8, 8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
    >>> parts = {"attention": layer, "query": layer["q"], "output": layer["o"], "ffn_in": layer["up"], "ffn_out": layer["down"]}
    >>> find_blocks(layer, [parts | {"heads": 2}])[0].head_width
    4
    """
    if blocks is not None:
        given = list(blocks) if isinstance(blocks, (list, tuple)) else []
        if not given or not all(isinstance(one, Mapping) and not set(_NEEDED) - one.keys() for one in given):
            raise ModelError(f"blocks must be dicts that hold at least {', '.join(_NEEDED)}; {_HELP}")
        return _each_once([_block(one.get("block", one["attention"]), dict(one)) for one in given])
    for names in _FAMILIES:
        found = [
            _block(layer, {part: layer.get_submodule(path) for part, path in names.items() if _has(layer, path)})
            for stack in model.modules()
            if isinstance(stack, nn.ModuleList) and len(stack)
            for layer in stack
            if all(_has(layer, path) for part, path in names.items() if part != "ffn_gate")
        ]
        if found:
            return _each_once(found)
    raise ModelError(
        f"{type(model).__name__} has no blocks of a known family (BERT, DistilBERT, Llama, GPT-2, BART, ViT); {_HELP}"
    )


def _each_once(blocks: list[Block]) -> tuple[Block, ...]:
    if len({id(block.slots["ffn_out"].module) for block in blocks}) < len(blocks):
        raise ModelError(
            "the same module stands for several blocks, so each of its changes would be made several times; "
            "pass blocks= with every module once"
        )
    return tuple(blocks)


def _has(layer: nn.Module, path: str) -> bool:
    for name in path.split("."):
        child = layer._modules.get(name)
        if child is None:
            return False
        layer = child
    return True


def _block(layer: nn.Module, parts: dict[str, Any]) -> Block:
    slots = {name: Slot(parts[name]) for name in _PARTS[1:] if name in parts}
    attention, output = parts["attention"], parts["output"]
    inside = linear_shape(output)[0]  # all heads side by side
    if "fused" in slots:
        width = slots["fused"].shape[1] // 3
        for at, name in enumerate(("query", "key", "value")):
            slots[name] = Slot(parts["fused"], at * width, (at + 1) * width)
    config = getattr(attention, "config", None)
    heads = parts.get("heads") or next(
        (int(found) for name in ("num_attention_heads", "num_heads", "n_heads", "n_head")
         for found in (getattr(attention, name, None), getattr(config, name, None)) if found),
        1,
    )  # fmt: skip
    if inside % heads:
        raise ModelError(f"{heads} heads do not divide the {inside} columns that the output projection reads")
    head_width = inside // heads
    kv_heads = slots["key"].shape[1] // head_width if "key" in slots else heads
    norms = {name: parts[f"{name}_norm"] for name in ("attention", "ffn") if f"{name}_norm" in parts}
    if type(layer).__name__.startswith(_PRE_NORM):
        norms = {}
    reads = parts["ffn_in"]
    return Block(layer, attention, slots, reads, norms, not norms, heads, kv_heads, head_width)
