"""The parts of a decoder by what they do: blocks, heads, norms, embeddings, of any layout with names like Llama's or GPT's.

A pre-norm decoder keeps one residual stream. With x the stream, block l adds to it

    x <- x + sum_h  A_h  (norm_1(x) W_V^g(h)) W_O^h,      x <- x + MLP(norm_2(x))

where head h of H reads the values of group g(h) = h // (H / KV). `decoder_parts` finds the modules and gives the weights of
each head as views (nothing is copied); `run_decoder` runs prompts of one length and keeps what was asked for: the stream
before each norm, attention maps, the last logits. Llama (SmolLM2, Qwen, Mistral), Phi-3, GPT-2, GPT-Neo and GPT-NeoX (with
its parallel blocks) are known by their names.
"""

__all__ = [
    "Attention",
    "DecoderBlock",
    "DecoderParts",
    "DecoderRun",
    "Norm",
    "attention_maps_on",
    "decoder_parts",
    "is_decoder",
    "run_decoder",
    "same_length",
]

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.capture import CaptureError, main_tensor
from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import chunks
from theodolite.core.view import evaluation_mode

_FAMILIES: tuple[dict[str, str], ...] = (
    {  # Llama, SmolLM2, Qwen, Mistral
        "attention": "self_attn", "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "output": "self_attn.o_proj", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "mlp": "mlp", "final_norm": "norm",
    },
    {  # Phi-3: one map makes query, key and value, one after the other
        "attention": "self_attn", "fused": "self_attn.qkv_proj", "output": "self_attn.o_proj",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp": "mlp", "final_norm": "norm",
    },
    {  # GPT-2: the same
        "attention": "attn", "fused": "attn.c_attn", "output": "attn.c_proj", "attention_norm": "ln_1", "mlp_norm": "ln_2",
        "mlp": "mlp", "final_norm": "ln_f",
    },
    {  # GPT-NeoX, Pythia: one map makes them, head by head
        "attention": "attention", "by_head": "attention.query_key_value", "output": "attention.dense",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp": "mlp",
        "final_norm": "final_layer_norm",
    },
    {  # GPT-Neo
        "attention": "attn.attention", "query": "attn.attention.q_proj", "key": "attn.attention.k_proj",
        "value": "attn.attention.v_proj", "output": "attn.attention.out_proj", "attention_norm": "ln_1", "mlp_norm": "ln_2",
        "mlp": "mlp", "final_norm": "ln_f",
    },
)  # fmt: skip
_POST_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")  # Gemma 2 and later, OLMo 2
_KNOWN = "Llama, SmolLM2, Qwen, Mistral, Phi-3, GPT-2, GPT-Neo and GPT-NeoX"
_TOLERANCE = 1e-3  # of float32; what is kept in fewer digits is checked to 3 %


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm layer as  scale(x) * weight * (x - mean) + bias  (kind "layer"), without the mean ("rms"), or none ("none").

    Found by asking the module, so that one that keeps weight - 1 (Gemma) is no special case.
    """

    module: Any
    kind: Literal["layer", "rms", "none"]
    weight: Float[Tensor, " width"]

    def centred(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """x without what the norm takes off before it scales: its mean over the width, or nothing."""
        return x - x.mean(dim=-1, keepdim=True) if self.kind == "layer" else x

    def direction(self, y: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
        """Direction before the norm that stands for ``y`` after it where the scale is held fixed: weight * y, centred."""
        return self.centred(y * self.weight)

    def scale(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row 1"]:
        """sqrt(width) / ||centred x||, what the norm multiplies by (up to its epsilon); 1 where there is no norm."""
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        return x.shape[-1] ** 0.5 / self.centred(x).norm(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of one block. name: of its module; output_name: of its output projection, whose input are the heads.

    Weights are views into the model's own parameters, in its precision.
    """

    module: nn.Module
    name: str
    output_name: str
    heads: int
    kv_heads: int
    head_width: int
    _maps: dict[str, nn.Module]

    def kv_head(self, head: int) -> int:
        """The group whose keys and values ``head`` reads."""
        return head // (self.heads // self.kv_heads)

    @property
    def query_weight(self) -> Float[Tensor, "head head_width width"]:
        """Queries of head h at x: query_weight[h] @ x."""
        return self._part("query")

    @property
    def key_weight(self) -> Float[Tensor, "kv_head head_width width"]:
        """Keys of group g at x: key_weight[g] @ x."""
        return self._part("key")

    @property
    def value_weight(self) -> Float[Tensor, "kv_head head_width width"]:
        """Values of group g at x: value_weight[g] @ x (and `value_bias`)."""
        return self._part("value")

    @property
    def value_bias(self) -> Float[Tensor, "kv_head head_width"] | None:
        """What is added to the values, None where nothing is."""
        return self._part("value", bias=True) if self._source("value").bias is not None else None

    @property
    def output_weight(self) -> Float[Tensor, "width head head_width"]:
        """What head h with mixed values z adds to the stream: output_weight[:, h] @ z."""
        weight = _out_by_in(self._maps["output"])
        return weight.view(len(weight), self.heads, self.head_width)

    def back(self, y: Float[Tensor, "*row width"]) -> Float[Tensor, "*row head width"]:
        """(W_O^h W_V^g(h))^T y for every head h: the direction before the attention (after its norm) that it reads as y."""
        inner = torch.einsum("...d,dhs->...hs", y, self.output_weight.to(y.dtype))
        grouped = inner.unflatten(-2, (self.kv_heads, self.heads // self.kv_heads))
        return torch.einsum("...kgs,ksd->...kgd", grouped, self.value_weight.to(y.dtype)).flatten(-3, -2)

    def _source(self, kind: str) -> Any:
        return self._maps.get("fused") or self._maps.get("by_head") or self._maps[kind]

    def _part(self, kind: str, *, bias: bool = False) -> Tensor:
        source = self._source(kind)
        rows = source.bias if bias else _out_by_in(source)
        width = self.head_width
        if "by_head" in self._maps:
            at = ("query", "key", "value").index(kind)
            return rows.unflatten(0, (self.heads, 3, width))[:, at]
        heads = self.heads if kind == "query" else self.kv_heads
        if "fused" in self._maps:
            start = {"query": 0, "key": self.heads, "value": self.heads + self.kv_heads}[kind] * width
            rows = rows[start : start + heads * width]
        return rows.unflatten(0, (heads, width))


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """One block. name + ":input" is the residual stream before it, for `theodolite.core.capture`.

    parallel: attention and MLP both read the stream before the block, as GPT-NeoX's do.
    """

    index: int
    name: str
    module: nn.Module
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: nn.Module
    parallel: bool


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """A decoder taken apart; made by `decoder_parts`."""

    model: Any
    embedding: nn.Module
    blocks: tuple[DecoderBlock, ...]
    final_norm: Norm
    unembedding: Any

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def unembedding_weight(self) -> Float[Tensor, "vocabulary width"]:
        """Logits are unembedding_weight @ final_norm(x)."""
        return _out_by_in(self.unembedding)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.unembedding_weight.shape[1])

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.unembedding_weight.shape[0])

    @property
    def heads(self) -> int:
        """Heads of one block."""
        return self.blocks[0].attention.heads

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unembedding_weight.device

    @cached_property
    def keeps_last(self) -> bool:
        """Whether the model can be asked for the last position's logits alone."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters


def _out_by_in(module: Any) -> Tensor:
    """The weight as (out, in), also of transformers' Conv1D, which keeps (in, out)."""
    weight = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _norm(module: Any, width: int, like: Tensor) -> Norm:
    """What a norm module does, found from its answers to a few rows."""
    signs = torch.ones(width, dtype=like.dtype, device=like.device)
    signs[1::2] = -1  # mean 0 and mean square 1 for an even width, so that the answer is weight * signs (and a bias)
    with torch.no_grad():
        zero, one, two = (module(row[None])[0] for row in (torch.zeros_like(signs), signs, 3 * signs))
        if _close(two - zero, 3 * (one - zero)):
            return Norm(module, "none", torch.ones(width, device=like.device))
        moved = module((signs + 2)[None])[0]
        kind: Literal["layer", "rms"] = "layer" if _close(moved, one) else "rms"
        if not _close(two, one):
            raise ModelError(f"{type(module).__name__} is neither a layer norm nor an RMS norm, and not the identity")
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == signs.shape and width % 2 == 0:
        plain = weight.detach()
        for found in (plain, plain + 1):  # the module's own numbers, without the probe's rounding
            if _close(found * signs, one - zero):
                return Norm(module, kind, found.float())
    x = signs if kind == "rms" else signs - signs.mean()
    return Norm(module, kind, ((one - zero) * x.square().mean().sqrt() / x).float())


def _close(a: Tensor, b: Tensor) -> bool:
    slack = _TOLERANCE if a.dtype in (torch.float32, torch.float64) else 30 * _TOLERANCE
    return float((a - b).abs().max()) <= slack * max(1.0, float(b.abs().max()))


def is_decoder(model: object) -> bool:
    """Whether `decoder_parts` can take ``model`` apart."""
    try:
        decoder_parts(model)
    except ModelError:
        return False
    return True


def decoder_parts(model: Any) -> DecoderParts:
    """Take a causal language model apart by the names of its modules; no weight is copied.

    Raises ModelError where the model is no decoder with a language-model head, where norms follow the sub-blocks (Gemma 2),
    and where its names are unknown.
    """
    name = type(model).__name__
    decoder: Any = model  # kept apart from what the type checker makes of the next line
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise ModelError(f"expected a Hugging Face causal language model, got {name}")
    unembedding = decoder.get_output_embeddings()
    config: Any = getattr(model, "config", None)
    if unembedding is None or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} has no language-model head that predicts the next token. Load it with AutoModelForCausalLM; of an "
            "encoder with a classifier take the difference of two class scores instead"
        )
    for stack_name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or len(stack) == 0:
            continue
        parent = model.get_submodule(stack_name.rpartition(".")[0])
        for family in _FAMILIES:
            wanted = [path for part, path in family.items() if part != "final_norm"]
            if all(_has(layer, path) for layer in stack for path in wanted) and _has(parent, family["final_norm"]):
                if any(_has(layer, path) for layer in stack for path in _POST_NORMS):
                    raise ModelError(
                        f"{name} has norms after its sub-blocks; only decoders with norms before them are known: {_KNOWN}"
                    )
                like = _out_by_in(unembedding)
                blocks = tuple(
                    _block(i, f"{stack_name}.{i}", layer, family, config, like) for i, layer in enumerate(stack)
                )
                final = _norm(parent.get_submodule(family["final_norm"]), like.shape[1], like)
                return DecoderParts(model, decoder.get_input_embeddings(), blocks, final, unembedding)
    raise ModelError(f"{name} has no blocks with names that are known: those of {_KNOWN}")


def _has(layer: nn.Module, path: str) -> bool:
    for name in path.split("."):
        child = layer._modules.get(name)
        if child is None:
            return False
        layer = child
    return True


def _block(index: int, name: str, layer: nn.Module, family: dict[str, str], config: Any, like: Tensor) -> DecoderBlock:
    maps = {
        part: layer.get_submodule(family[part])
        for part in ("query", "key", "value", "fused", "by_head", "output")
        if part in family
    }
    for module in maps.values():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise ModelError(
                f"{name} has a {type(module).__name__} where a plain linear map is expected; load the model without "
                "quantisation and merge its adapters"
            )
    heads = int(config.num_attention_heads)
    inner = int(_out_by_in(maps["output"]).shape[1])
    if inner % heads:
        raise ModelError(f"{heads} heads do not divide the {inner} columns that the output projection of {name} reads")
    head_width = inner // heads
    made = sum(int(_out_by_in(maps[part]).shape[0]) for part in ("value", "fused") if part in maps)
    kv_heads = (
        heads if "by_head" in maps else made // head_width if "value" in maps else (made // head_width - heads) // 2
    )
    attention = Attention(
        layer.get_submodule(family["attention"]), f"{name}.{family['attention']}", f"{name}.{family['output']}",
        heads, kv_heads, head_width, maps,
    )  # fmt: skip
    first, second = (
        _norm(layer.get_submodule(family[part]), like.shape[1], like) for part in ("attention_norm", "mlp_norm")
    )
    parallel = bool(getattr(layer, "use_parallel_residual", False))
    return DecoderBlock(index, name, layer, first, attention, second, layer.get_submodule(family["mlp"]), parallel)


# ---- running it


@contextmanager
def attention_maps_on(model: Any) -> Iterator[str]:
    """Run with the attention function that gives its weights, and put back the one that was there; gives its name."""
    before = str(getattr(model.config, "_attn_implementation", "eager"))
    if before == "eager":
        yield before
        return
    model.set_attn_implementation("eager")
    try:
        yield before
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True, eq=False)
class DecoderRun:
    """What a decoder held at B prompts of T tokens; only what was asked for.

    before[l]: stream before block l, l = len(parts) before the final norm; between[l]: stream before the MLP's norm of block
    l; maps[l]: attention from each token (row) to each earlier one. logits: of the last position.
    """

    before: dict[int, Float[Tensor, "prompt token width"]]
    between: dict[int, Float[Tensor, "prompt token width"]]
    maps: dict[int, Float[Tensor, "prompt head token token"]]
    logits: Float[Tensor, "prompt vocabulary"]


def run_decoder(
    parts: DecoderParts,
    ids: Int[Tensor, "prompt token"],
    *,
    before: Sequence[int] = (),
    between: Sequence[int] = (),
    maps: Sequence[int] = (),
    memory: int | None = None,
) -> DecoderRun:
    """Run prompts of one length, without padding, and keep the streams and attention maps of the blocks named.

    Nothing is kept for other blocks, and of the logits only the last position's. Attention maps need the eager attention
    function, which is switched on for this call where the model has another. Raises InputError for layers out of range,
    ModelError for a model whose blocks do not add up (residual multipliers, caps on the logits).
    """
    if ids.ndim != 2 or ids.numel() == 0:
        raise InputError(f"need token ids of shape (prompts, tokens), got {tuple(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= parts.vocabulary:
        raise InputError(f"token ids must lie in 0..{parts.vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}")
    depth = len(parts)
    for layer in [*before, *(layer + 1 for layer in (*between, *maps))]:
        if not 0 <= layer <= depth:
            raise InputError(f"the model has blocks 0..{depth - 1}, so no layer {layer}")
    tokens = ids.shape[1]
    kept = 4 * tokens * (parts.width * (8 + len(before) + len(between)) + len(maps) * parts.heads * tokens)
    logits_bytes = 4 * parts.vocabulary * (1 if parts.keeps_last else tokens)
    runs = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(parts.model))
        if maps:
            stack.enter_context(attention_maps_on(parts.model))
        for part in chunks(len(ids), kept + 8 * tokens * tokens * parts.heads + 2 * logits_bytes, memory):
            runs.append(_run(parts, ids[part].to(parts.device), before, between, maps))
    return DecoderRun(
        {layer: torch.cat([run.before[layer] for run in runs]) for layer in before},
        {layer: torch.cat([run.between[layer] for run in runs]) for layer in between},
        {layer: torch.cat([run.maps[layer] for run in runs]) for layer in maps},
        torch.cat([run.logits for run in runs]),
    )


def _run(
    parts: DecoderParts, ids: Tensor, before: Sequence[int], between: Sequence[int], maps: Sequence[int]
) -> DecoderRun:
    streams, middles, weighed = dict[int, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    last = dict[str, Tensor]()

    def keep(into: dict[int, Tensor], layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            into[layer] = args[0].detach().float()

        return hook

    def keep_map(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                raise CaptureError(f"the attention of block {layer} does not give its weights")
            weighed[layer] = weights.detach().float()

        return hook

    def note(name: str, inside: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            last[name] = (args[0] if inside else main_tensor(output)).detach()

        return hook

    first = parts.blocks[0]
    with ExitStack() as stack:

        def on(handle: Any) -> None:
            stack.callback(handle.remove)

        for layer in before:
            norm = parts.final_norm if layer == len(parts) else parts.blocks[layer].attention_norm
            on(norm.module.register_forward_pre_hook(keep(streams, layer)))
        for layer in between:
            on(parts.blocks[layer].mlp_norm.module.register_forward_pre_hook(keep(middles, layer)))
        for layer in maps:
            on(parts.blocks[layer].attention.module.register_forward_hook(keep_map(layer)))
        # whether the first block and the head are what `decoder_parts` takes them for
        on(first.attention_norm.module.register_forward_pre_hook(note("in", True)))
        on(first.attention.module.register_forward_hook(note("attention", False)))
        on(first.mlp.register_forward_hook(note("mlp", False)))
        on(first.module.register_forward_hook(note("out", False)))
        on(parts.final_norm.module.register_forward_hook(note("final", False)))
        options = {"logits_to_keep": 1} if parts.keeps_last else {}
        logits = main_tensor(parts.model(ids, use_cache=False, **options))[:, -1].float()
    made = last["final"][:, -1] @ parts.unembedding_weight.T
    if getattr(parts.unembedding, "bias", None) is not None:
        made = made + parts.unembedding.bias
    summed = last["in"] + last["attention"] + last["mlp"]
    for what, ours, its in (("logits", made, logits), ("first block", summed, last["out"])):
        if not _close(ours, its.to(ours.dtype)):
            raise ModelError(
                f"the {what} of {type(parts.model).__name__} are not what its parts add up to (a multiplier or a cap between "
                "them); directions taken from its weights would be wrong"
            )
    return DecoderRun(streams, middles, weighed, logits)


def same_length(prompts: Sequence[Tensor]) -> dict[int, list[int]]:
    """Places of prompts (1-d token ids) by their length, so that each group runs as one batch without padding.

    >>> same_length([torch.tensor([1, 2]), torch.tensor([1]), torch.tensor([5, 6])])
    {2: [0, 2], 1: [1]}
    """
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(place)
    return groups
