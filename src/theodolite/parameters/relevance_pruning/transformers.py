"""Relevance and gradients at the units of a Hugging Face transformer's MLPs.

    R_u = h_u dS/dh_u,     S = sum over rows and positions of the true token's (or class's) score

with what only weighs the signal taken as constant: attention weights, the denominators of norms, and of an MLP the activated
gate, or the ratio of an activation's output to its input. Where a network has no biases, R then has the sum S at every depth.

Source: Ali et al., 2022, arXiv:2202.07304 (attention and norms); Arras et al., 2017, arXiv:1706.07206 (gates); the sums over
reference rows as in Yeom et al., 2021, arXiv:1912.08881.
"""

__all__ = ["transformer_gradients", "transformer_relevance"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.masks.transformers import Mlp, answer, mlps
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import evaluation_mode
from theodolite.parameters.relevance_pruning.rules import UnsupportedLayerError
from theodolite.parameters.relevance_pruning.targets import RelevanceError, Target, read_targets

_WEIGHING = ("q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "q", "k")
"""Layers that only decide on attention weights."""
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv", "in_proj")
_IGNORED = -100


def transformer_relevance(
    model: nn.Module, x: Any, y: object, *, start: str, memory: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Relevance (rows, length, width) of the hidden numbers of each MLP, and of the embeddings as "input", chunk by chunk.

    A key is the name of the layer that writes the hidden numbers linearly ("...up_proj", "...fc1", "...intermediate.dense").

    Raises UnsupportedLayerError where queries and keys come out of one layer with the values, or for a norm of another kind.
    """
    found = mlps(model)
    held = dict[str, Tensor]()
    with _constant_weights(model, found, held):
        for scores, target in _passes(model, x, y, memory):
            start_scores = scores.gather(1, target.labels[:, None]) if target.labels is not None else scores
            total = (start_scores / start_scores.detach() if start == "one" else start_scores).sum()
            gradients = torch.autograd.grad(total, list(held.values()))
            shares = {name: h.detach() * g for (name, h), g in zip(held.items(), gradients, strict=True)}
            wrong = [name for name, R in shares.items() if not bool(torch.isfinite(R.sum()))]
            if wrong:
                raise RelevanceError(f"relevance is not finite at {wrong[-1]}; check the weights for NaN and overflow")
            held.clear()  # with it goes the graph of these rows
            yield shares


def transformer_gradients(
    model: nn.Module, x: Any, y: object, *, memory: int | None = None
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Output z and dL/dz of the layer that writes each MLP's hidden numbers linearly, chunk by chunk."""
    held, modules = dict[str, Tensor](), dict(model.named_modules())
    signals = [mlp.writers[-1] for mlp in mlps(model)]
    handles = [modules[name].register_forward_hook(partial(_hold, held=held, name=name)) for name in signals]
    try:
        for scores, target in _passes(model, x, y, memory):
            gradients = torch.autograd.grad(target.loss(scores), list(held.values()))
            pairs = {name: (z.detach(), g) for (name, z), g in zip(held.items(), gradients, strict=True)}
            held.clear()
            yield pairs
    finally:
        for handle in handles:
            handle.remove()


# ---- rows and targets


def _passes(model: nn.Module, x: Any, y: object, memory: int | None) -> Iterator[tuple[Tensor, Target]]:
    """Scores (m, tokens or classes) of every prediction that has a target, and the targets, chunk by chunk."""
    batch = dict(x) if isinstance(x, Mapping) else {"input_ids": torch.as_tensor(x)}
    ids, labels = batch.get("input_ids"), torch.as_tensor(y)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or len(ids) == 0:
        shape = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(f"a transformer needs token ids, whole numbers (n, length), got {shape}")
    if labels.ndim > 1 and labels.shape == ids.shape and "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, _IGNORED)
    _check(model, ids, labels)
    with evaluation_mode(model):
        cost = 2 * bytes_per_row(lambda rows: answer(model, rows), ids[:1], gradients=True) if len(ids) > 1 else 1
        for part in chunks(len(ids), cost, memory):
            with torch.enable_grad():
                logits = answer(model, {name: value[part] for name, value in batch.items()})
                yield _with_targets(model, logits, labels[part])


def _check(model: nn.Module, ids: Tensor, labels: Tensor) -> None:
    config: Any = model.config
    tokens = int(config.get_text_config().vocab_size)
    if bool((ids < 0).any()) or bool((ids >= tokens).any()):
        raise DataError(f"token ids must be 0..{tokens - 1}; they range over {int(ids.min())}..{int(ids.max())}")
    if labels.ndim != 2:
        return
    if labels.shape != ids.shape:
        raise DataError(f"need one target a token, (n, length) = {tuple(ids.shape)}, got {tuple(labels.shape)}")
    given = labels[labels != _IGNORED]
    if labels.is_floating_point() or bool((given < 0).any()) or bool((given >= tokens).any()):
        raise DataError(f"targets must be tokens 0..{tokens - 1}, or {_IGNORED} where there is none")


def _with_targets(model: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Target]:
    """Of a causal model token t + 1 is the target at position t, as with the labels that it takes itself."""
    if logits.ndim == 2:
        return logits, read_targets(labels, logits, len(logits))
    if labels.ndim != 2 or logits.shape[:2] != labels.shape:
        raise DataError(
            f"{type(model).__name__} gives scores {tuple(logits.shape)} for each token, so the targets must be tokens "
            f"(n, length); got {tuple(labels.shape)}. A model without a head has no scores to explain"
        )
    if getattr(model, "loss_type", None) not in ("ForMaskedLM", "ForTokenClassification"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    valid = labels != _IGNORED
    if not bool(valid.any()):
        raise DataError(f"no position has a target: all are {_IGNORED}, or the rows are one token long")
    return logits[valid], Target(labels[valid].long(), None)


# ---- what is held and what is constant


def _hold(module: nn.Module, args: object, out: Tensor, *, held: dict[str, Tensor], name: str) -> Tensor:
    held[name] = out if out.requires_grad else out.requires_grad_(True)
    return held[name]


@contextmanager
def _constant_weights(model: nn.Module, found: list[Mlp], held: dict[str, Tensor]) -> Iterator[None]:
    """Hooks that hold the hidden numbers and the embeddings, and take constant what only weighs them."""
    modules: dict[str, Any] = dict(model.named_modules())
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
    for name, module in modules.items():
        kind, last = type(module).__name__, name.rsplit(".", 1)[-1]
        if last in _FUSED:
            raise UnsupportedLayerError(
                f"no relevance rule for {kind} at {name}, which makes queries, keys and values in one layer; use "
                "criterion='taylor'"
            )
        if isinstance(module, nn.LayerNorm) or kind.endswith("RMSNorm"):
            hooks.append((module, _scaled_only))
        elif "norm" in kind.lower():
            raise UnsupportedLayerError(f"no relevance rule for {kind} at {name}; use criterion='taylor'")
        elif last in _WEIGHING:
            hooks.append((module, _detached))
    if not any(hook is _detached for _, hook in hooks):
        raise UnsupportedLayerError(
            f"{type(model).__name__} has no attention with layers of known names ({', '.join(_WEIGHING)}); use "
            "criterion='taylor'"
        )
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        raise ModelError(f"{type(model).__name__} has no embeddings of tokens")
    hooks.append((embeddings, partial(_hold, held=held, name="input")))
    signals = dict[str, Tensor]()
    for mlp in found:
        hooks.append((modules[mlp.writers[-1]], partial(_hold, held=signals, name=mlp.reader)))
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    for mlp in found:
        reads = partial(_weighed_signal, held=held, signals=signals, mlp=mlp)
        handles.append(modules[mlp.reader].register_forward_pre_hook(reads))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detached(module: nn.Module, args: object, out: Tensor) -> Tensor:
    return out.detach()


def _scaled_only(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """The same numbers, as if the norm's denominator did not depend on its input."""
    x = args[0]
    if isinstance(module, nn.LayerNorm):
        axes = tuple(range(-len(module.normalized_shape), 0))
        x = x - x.mean(dim=axes, keepdim=True)
        scale = torch.rsqrt(x.detach().square().mean(dim=axes, keepdim=True) + module.eps)
        scale = scale if module.weight is None else scale * module.weight.detach()
    else:
        scale = _ratio(out, x)
    return _same_value(out, x * scale)


def _weighed_signal(
    module: nn.Module, args: tuple[Tensor, ...], *, held: dict[str, Tensor], signals: dict[str, Tensor], mlp: Mlp
) -> tuple[Tensor, ...]:
    """The hidden numbers as the linear branch times a constant."""
    signal = signals.pop(mlp.reader)
    if signal.shape != args[0].shape:
        raise InputError(f"{mlp.reader} does not read what {mlp.writers[-1]} writes")
    held[mlp.writers[-1]] = _same_value(args[0], signal * _ratio(args[0], signal))
    return held[mlp.writers[-1]], *args[1:]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    above, below = above.detach(), below.detach()
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))


def _same_value(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with the derivative of ``like``."""
    return value.detach() + (like - like.detach())
