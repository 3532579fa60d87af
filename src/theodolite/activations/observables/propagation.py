"""Observables carried backwards through a decoder: along one path, or along all paths with the attention held fixed."""

__all__ = ["LogitAttribution", "Pair", "all_paths", "head_norms", "logit_attribution", "propagate"]

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.activations.observables.chain import propagate_modules
from theodolite.activations.observables.feature import Component, ComponentPath, FeatureVector
from theodolite.activations.observables.observable import (
    Observable,
    Prompt,
    Prompts,
    as_prompts,
    check_pair,
    varying_tokens,
)
from theodolite.activations.observables.segment import At, point_on_segment
from theodolite.core.capture import main_tensor
from theodolite.core.errors import InputError
from theodolite.core.transformer import DecoderBlock, DecoderParts, DecoderRun, Norm, decoder_parts, run_decoder
from theodolite.core.view import evaluation_mode

NormRule = Literal["exact", "scale", "none"]


@dataclass(frozen=True, eq=False)
class Pair:
    """A pair of prompts as the model holds them: row 0 the positive one, row 1 the negative one."""

    parts: DecoderParts
    prompts: tuple[Tensor, Tensor]
    run: DecoderRun
    at: At

    @classmethod
    def of(cls, parts: DecoderParts, prompts: tuple[Tensor, Tensor], layers: Sequence[int], at: At) -> "Pair":
        """Run both prompts and keep streams and attention of ``layers``, and the stream before the final norm."""
        kept = sorted(set(layers))
        run = run_decoder(parts, torch.stack(prompts), before=[*kept, len(parts)], between=kept, maps=kept)
        return cls(parts, prompts, run, at)

    @property
    def tokens(self) -> int:
        """Tokens of each prompt."""
        return len(self.prompts[0])

    def attention(self, layer: int) -> Float[Tensor, "head token token"]:
        """Attention of one block at the point that the path is taken at: of one prompt, or the mean of both."""
        maps = self.run.maps[layer]
        return maps[0] if self.at == "positive" else maps[1] if self.at == "negative" else maps.mean(dim=0)

    def point(self, stream: Float[Tensor, "prompt token width"]) -> Float[Tensor, "token width"]:
        """The point of the stream that norms are taken at: of one prompt, or midway."""
        return stream[0] if self.at == "positive" else stream[1] if self.at == "negative" else stream.mean(dim=0)

    @cached_property
    def varies(self) -> int | None:
        """The token that differs between the prompts (the last of the stretch); None where there is no one stretch."""
        return varying_tokens(self.prompts)[0]


def propagate(
    model: Any,
    observable: Observable,
    path: Sequence[Component] | Sequence[str],
    *,
    prompts: Prompts | None = None,
    at: At = "boundary",
    norm: NormRule = "exact",
    normalise: bool = False,
) -> FeatureVector:
    """The feature vector at the start of ``path``: the observable pushed backwards through its components, late to early.

        y <- W_U^T n,  then the final norm;   head:  y <- (W_V^g(h))^T (W_O^h)^T y;   MLP:  y <- gradient of y . MLP at x0

    and through the norm before each component; residual connections leave y as it is. Attention weights are held fixed and
    kept apart as ``gain``, so that the feature does not mix in what the queries and keys look for. Where no MLP is on the
    path, nothing but norms' scales depends on ``prompts``; without prompts these are left out (directions are right,
    lengths do not compare between layers).

    model: a Hugging Face decoder and components, or any network and the names of its modules (then prompts are two inputs).
    prompts: (positive, negative), as text or token ids, of the same number of tokens. at: where an MLP is linearised,
    "boundary" is the point between the two prompts' activations where y . MLP is zero; norms and attention weights are
    then those midway. norm: "exact" gradient at x0, "scale" (weight and scale alone), or "none" (norms left out).

    Raises InputError for a path that is not late to early or out of range, prompts that do not align, an MLP without
    prompts; ModelError for models that are not known.
    """
    if norm not in ("exact", "scale", "none") or at not in ("boundary", "positive", "negative", "mean"):
        raise InputError("norm is 'exact', 'scale' or 'none'; at is 'boundary', 'positive', 'negative' or 'mean'")
    if isinstance(path, (str, Component)):
        raise InputError(f"a path is a tuple of components, or of names of modules; for one alone give ({path!r},)")
    if not isinstance(path, ComponentPath) and len(path) and all(isinstance(one, str) for one in path):
        if prompts is None:
            raise InputError("a path of modules needs prompts: (positive input, negative input)")
        names = [one for one in path if isinstance(one, str)]
        return propagate_modules(model, observable, names, inputs=prompts, at=at, normalise=normalise)
    parts = decoder_parts(model)
    asked = [one for one in path if isinstance(one, Component)]
    if len(asked) != len(path):
        raise InputError(f"a path is a tuple of components, or of names of modules; got {path!r}")
    both = None if prompts is None else check_pair(prompts, observable.tokenizer)
    stops = resolve(parts, asked, None if both is None else len(both[0]))
    layers = [stop.layer for stop in stops if stop.kind != "embedding"]
    pair = None if both is None else Pair.of(parts, both, layers, at)
    return follow(parts, observable, stops, pair, norm=norm, normalise=normalise)


def resolve(parts: DecoderParts, path: Sequence[Component], tokens: int | None) -> ComponentPath:
    """The path with every token settled, or InputError with the range that is allowed."""
    found, here, ceiling = list[Component](), -1 if tokens is None else tokens - 1, 2 * len(parts)
    for place, stop in enumerate(path):
        token = stop.token
        if tokens is not None:
            if not -tokens <= token < tokens:
                raise InputError(f"{stop} reads token {token}, but the prompts have tokens 0..{tokens - 1}")
            token %= tokens
        if stop.kind == "embedding":
            if place != len(path) - 1:
                raise InputError(f"the embedding is where a path ends, but {path[place + 1]} comes after it")
            found.append(Component("embedding", 0, None, here))
            break
        if stop.kind not in ("attn", "mlp"):
            raise InputError(f"a component is 'attn', 'mlp' or 'embedding', got {stop.kind!r}")
        if not 0 <= stop.layer < len(parts):
            raise InputError(f"{stop}: layers lie in 0..{len(parts) - 1}")
        parallel = parts.blocks[stop.layer].parallel
        height = 2 * stop.layer + (stop.kind == "mlp" and not parallel)
        if height >= ceiling:
            raise InputError(f"a path runs from late to early, but {stop} does not come before {path[place - 1]}")
        ceiling = height
        if stop.kind == "attn":
            if stop.head is None or not 0 <= stop.head < parts.heads:
                raise InputError(f"{stop}: a head in 0..{parts.heads - 1} is needed")
            if tokens is not None and token > here:
                raise InputError(f"{stop} reads token {token}, which lies after token {here} where the path is")
            here = token
        elif stop.head is not None:
            raise InputError(f"{stop}: an MLP has no heads")
        elif stop.token != -1 and token != here:
            raise InputError(f"{stop}: an MLP reads where the path is, at token {here}")
        found.append(Component(stop.kind, stop.layer, stop.head, here))
    return ComponentPath(found)


def start(parts: DecoderParts, observable: Observable, pair: Pair | None, norm: NormRule) -> Tensor:
    """The observable in the residual stream before the final norm."""
    y = observable.read_back(parts.unembedding_weight)
    x0 = None if pair is None else pair.point(pair.run.before[len(parts)])[-1]
    return through_norm(parts.final_norm, y, x0, norm)


def through_norm(norm: Norm, y: Tensor, x0: Tensor | None, rule: NormRule) -> Tensor:
    """Directions y (..., d) after a norm as directions before it, at one point x0 (d,)."""
    if rule == "none":
        return y
    along = norm.direction(y)
    if x0 is None:
        return along
    along = along * norm.scale(x0)
    if rule == "scale" or norm.kind == "none":
        return along
    return _norm_gradient(norm, y, x0)


def _norm_gradient(norm: Norm, y: Tensor, x0: Tensor) -> Tensor:
    """Exact gradients of y . norm(x) at x0, for many y at once; x0 (..., d) broadcasts against y."""
    shape = torch.broadcast_shapes(y.shape, x0.shape)
    dtype = next((p.dtype for p in norm.module.parameters()), y.dtype)
    with torch.enable_grad():
        x = x0.expand(shape).detach().to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(main_tensor(norm.module(x)), x, y.expand(shape).to(dtype))
    return slope.float()


def follow(
    parts: DecoderParts,
    observable: Observable,
    path: ComponentPath,
    pair: Pair | None,
    *,
    norm: NormRule = "exact",
    normalise: bool = False,
) -> FeatureVector:
    """`propagate` along a path whose tokens are settled, with a pair that was run already."""
    token = -1 if pair is None else pair.tokens - 1
    feature = FeatureVector(
        start(parts, observable, pair, norm),
        len(parts),
        token=token,
        weights_only=pair is None,
        pair=None if pair is None else pair.prompts,
    )
    for stop in path:
        feature = extend(parts, feature, stop, pair, norm)
    vector = feature.vector
    return replace(
        feature,
        vector=vector / vector.norm() if normalise else vector,
        normalised=normalise,
        notes=_notes(parts, path, pair),
    )


def extend(
    parts: DecoderParts, feature: FeatureVector, stop: Component, pair: Pair | None, norm: NormRule = "exact"
) -> FeatureVector:
    """The feature carried back through one component more, which comes before its path."""
    path = ComponentPath([*feature.path, stop])  # type: ignore[list-item]
    if stop.kind == "embedding":
        return replace(feature, layer=0, stream="residual", path=path)
    block = parts.blocks[stop.layer]
    if stop.kind == "mlp":
        if pair is None:
            raise InputError(f"{stop}: an MLP is linearised between two prompts; give prompts=(positive, negative)")
        y, crossed = _through_mlp(block, feature.vector, pair, feature.token, norm)
        found = feature.boundary_found and crossed
        stream = "residual" if block.parallel else "middle"
        return replace(feature, vector=y, layer=stop.layer, stream=stream, path=path, boundary_found=found)
    y, gain, token, x0 = block.attention.back(feature.vector)[stop.head or 0], 1.0, stop.token, None
    offset = None
    if pair is not None:
        gain = float(pair.attention(stop.layer)[stop.head or 0, feature.token, token])
        x0 = pair.point(pair.run.before[stop.layer])[token]
        varies = pair.varies
        offset = None if token == pair.tokens - 1 or varies is None else token - varies
    y = through_norm(block.attention_norm, y, x0, norm)
    return replace(
        feature,
        vector=y,
        layer=stop.layer,
        stream="residual",
        token=token,
        gain=feature.gain * gain,
        path=path,
        offset=offset,
    )


def _notes(parts: DecoderParts, path: ComponentPath, pair: Pair | None) -> tuple[str, ...]:
    kind = str(getattr(parts.model.config, "_attn_implementation", "eager"))
    if pair is None or kind == "eager" or not any(stop.kind == "attn" for stop in path):
        return ()
    return (
        f"the pair was run with eager attention, since {kind} gives no attention weights; the model is back on {kind}",
    )


def _through_mlp(block: DecoderBlock, y: Tensor, pair: Pair, token: int, rule: NormRule) -> tuple[Tensor, bool]:
    """Gradient of y . MLP(norm(x)) by x on the segment between the two prompts' streams, and whether it crosses zero."""
    stream = (pair.run.between[block.index])[:, token]
    dtype = next(block.mlp.parameters()).dtype

    def value(x: Tensor) -> Tensor:
        return main_tensor(block.mlp(block.mlp_norm.module(x.to(dtype))[:, None]))[:, 0].float() @ y

    with evaluation_mode(pair.parts.model):
        x0, crossed = point_on_segment(value, stream[1], stream[0], pair.at)
        with torch.no_grad():
            inside = block.mlp_norm.module(x0.to(dtype)[None])
        with torch.enable_grad():
            inside = inside.detach().requires_grad_()
            out = main_tensor(block.mlp(inside[:, None]))
            (slope,) = torch.autograd.grad(out, inside, y.to(dtype)[None, None])
    return through_norm(block.mlp_norm, slope[0].float(), x0, rule), crossed


def head_norms(model: Any, observable: Observable, *, fold_norm: bool = True) -> Float[Tensor, "layer head"]:
    """||(W_V^g(h))^T (W_O^h)^T y|| of every head, from the weights alone: which heads could move the observable.

    fold_norm: with the weights of the final norm and of the norm before each block. All heads of a block in one product.
    """
    parts = decoder_parts(model)
    with torch.no_grad():
        y = observable.read_back(parts.unembedding_weight)
        y = parts.final_norm.direction(y) if fold_norm else y
        rows = []
        for block in parts.blocks:
            back = block.attention.back(y)
            rows.append((block.attention_norm.direction(back) if fold_norm else back).norm(dim=-1))
    return torch.stack(rows)


def all_paths(model: Any, observable: Observable, prompt: Prompt, *, layer: int, token: int = -1) -> FeatureVector:
    """The gradient of the observable by the stream before block ``layer`` at ``token``, along all heads and MLPs at once.

    Attention weights are held fixed, so this is the sum of the features of all paths from there to the logits at the last
    token, each times its gain: what autograd gives where the attention maps are constants. layer = number of blocks means
    the stream before the final norm.
    """
    parts = decoder_parts(model)
    (ids,) = as_prompts([prompt], observable.tokenizer)
    if not 0 <= layer <= len(parts):
        raise InputError(f"layers lie in 0..{len(parts)}, got {layer}")
    if not -len(ids) <= token < len(ids):
        raise InputError(f"the prompt has tokens 0..{len(ids) - 1}, got {token}")
    later = list(range(layer, len(parts)))
    run = run_decoder(parts, ids[None], before=[*later, len(parts)], between=later, maps=later)
    y = torch.zeros(len(ids), parts.width, device=parts.device)
    y[-1] = through_norm(
        parts.final_norm, observable.read_back(parts.unembedding_weight), run.before[len(parts)][0, -1], "exact"
    )
    with evaluation_mode(parts.model):
        for block in reversed(parts.blocks[layer:]):
            y = _through_block(block, y, run)
    place = token % len(ids)
    path = ComponentPath()
    return FeatureVector(y[place].clone(), layer, "residual", place, 1.0, path, pair=(ids, ids))


def _through_block(block: DecoderBlock, y: Float[Tensor, "token width"], run: DecoderRun) -> Tensor:
    attention, dtype = block.attention, next(block.mlp.parameters()).dtype
    with torch.enable_grad():
        x = run.between[block.index][0].to(dtype).requires_grad_()
        out = main_tensor(block.mlp(block.mlp_norm.module(x)[None]))[0]
        (slope,) = torch.autograd.grad(out, x, y.to(dtype))
    through_mlp = slope.float()
    after = y if block.parallel else y + through_mlp
    with torch.no_grad():
        inner = torch.einsum("td,dhs->ths", after, attention.output_weight.float())
        mixed = torch.einsum("hts,thd->shd", run.maps[block.index][0], inner)
        grouped = mixed.unflatten(1, (attention.kv_heads, -1)).sum(dim=2)
        back = torch.einsum("skd,kdw->sw", grouped, attention.value_weight.float())
    through_heads = _norm_gradient(block.attention_norm, back, run.before[block.index][0])
    return after + through_heads + (through_mlp if block.parallel else 0)


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part of the model adds to the observable at one prompt's last token; all of it sums to the observable.

    The final norm's scale is held at what it is there. bias: of the final norm, the head, and the attention outputs.
    """

    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]
    embedding: float
    bias: float

    @property
    def total(self) -> float:
        """The observable."""
        return float(self.heads.sum() + self.mlps.sum()) + self.embedding + self.bias


def logit_attribution(model: Any, observable: Observable, prompt: Prompt) -> LogitAttribution:
    """The direct contribution of every head and MLP to the observable at the last token of ``prompt``."""
    parts = decoder_parts(model)
    (ids,) = as_prompts([prompt], observable.tokenizer)
    layers = list(range(len(parts)))
    read: dict[str, Tensor] = {}
    handles = []

    def note(name: str, inside: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            read[name] = (args[0] if inside else main_tensor(output))[0, -1].detach().float()

        return hook

    for block in parts.blocks:
        output = parts.model.get_submodule(block.attention.output_name)
        handles.append(output.register_forward_pre_hook(note(f"heads {block.index}", True)))
        handles.append(block.mlp.register_forward_hook(note(f"mlp {block.index}", False)))
    try:
        run = run_decoder(parts, ids[None], before=[0, len(parts)])
    finally:
        for handle in handles:
            handle.remove()
    y = observable.read_back(parts.unembedding_weight)
    y = parts.final_norm.direction(y)
    last = run.before[len(parts)][0, -1]
    y = y * _true_scale(parts.final_norm, last)
    heads, biases = [], 0.0
    for block in parts.blocks:
        z = read[f"heads {block.index}"].unflatten(0, (parts.heads, -1))
        heads.append(torch.einsum("d,dhs,hs->h", y, block.attention.output_weight.float(), z))
        bias = getattr(parts.model.get_submodule(block.attention.output_name), "bias", None)
        biases += 0.0 if bias is None else float(bias.detach().float() @ y)
    mlps = torch.stack([read[f"mlp {layer}"] @ y for layer in layers])
    first = float(run.before[0][0, -1] @ y)
    found = float(torch.stack(heads).sum() + mlps.sum()) + first + biases
    return LogitAttribution(torch.stack(heads), mlps, first, biases + float(observable.score(run.logits)[0]) - found)


def _true_scale(norm: Norm, x: Tensor) -> Tensor:
    """What the norm multiplies by at x with its epsilon: from its answer along the largest coordinate."""
    with torch.no_grad():
        dtype = next((p.dtype for p in norm.module.parameters()), x.dtype)
        zero = norm.module(torch.zeros_like(x).to(dtype)[None])[0].float()
        out = norm.module(x.to(dtype)[None])[0].float() - zero
        along = norm.weight * norm.centred(x)
    return (out @ along) / (along @ along)
