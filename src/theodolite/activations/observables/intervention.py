"""Edits of the activations along a feature while a model runs, and what they do to its answers."""

__all__ = ["Effect", "ablate", "measure_effect", "projection_patch", "steer"]

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.activations.observables.feature import FeatureVector
from theodolite.activations.observables.observable import Observable, Prompts, as_prompts
from theodolite.core.capture import main_tensor
from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.core.transformer import decoder_parts, run_decoder

Where = int | Literal["all"] | None
Change = Callable[[Tensor], Tensor]


def steer(model: Any, feature: FeatureVector, amount: float, *, token: Where = None) -> AbstractContextManager[None]:
    """Inside the block the model runs with x + amount * y/||y|| at the feature's place.

    token: which token of each prompt (negative from the end, by default the feature's), or "all". Not for more than one at a
    time on the same model and place. Weights are not touched, and the hook is gone after the block.
    """
    direction = feature.direction
    return _edit(model, feature, lambda x: x + amount * direction.to(x), token)


def ablate(
    model: Any, feature: FeatureVector, *, mean: float = 0.0, token: Where = None
) -> AbstractContextManager[None]:
    """Inside the block the model runs with x - y y^T x / ||y||^2 and ``mean`` (of y . x / ||y|| elsewhere) in its place."""
    direction = feature.direction
    return _edit(model, feature, lambda x: x + (mean - x @ direction.to(x))[..., None] * direction.to(x), token)


def projection_patch(
    model: Any,
    feature: FeatureVector,
    positive: Float[Tensor, "*prompt width"],
    *,
    kappa: float = 1.0,
    token: Where = None,
) -> AbstractContextManager[None]:
    """Inside the block the model runs with x + kappa * y y^T (positive - x) / ||y||^2 at the feature's place.

    positive: activations of other prompts there (`read`), one row for all prompts or one for each prompt of the batch.
    """
    direction = feature.direction
    if positive.ndim not in (1, 2) or positive.shape[-1] != len(direction):
        raise InputError(
            f"positive must be (width,) or (prompts, width) of width {len(direction)}, got {tuple(positive.shape)}"
        )

    def change(x: Tensor) -> Tensor:
        theirs = positive.to(x)
        if theirs.ndim == 2 and len(theirs) != len(x):
            raise InputError(
                f"{len(theirs)} activations for a batch of {len(x)} prompts; give one for each, or one for all"
            )
        if theirs.ndim == 2 and x.ndim == 3:
            theirs = theirs[:, None]
        return x + kappa * ((theirs - x) @ direction.to(x))[..., None] * direction.to(x)

    return _edit(model, feature, change, token)


@contextmanager
def _edit(model: Any, feature: FeatureVector, change: Change, token: Where) -> Iterator[None]:
    where = feature.token if token is None else token
    handles = list[Any]()

    def edited(x: Tensor) -> Tensor:
        if feature.stream == "input":
            return change(x.flatten(1)).view_as(x)
        if where == "all":
            return change(x)
        if not -x.shape[1] <= where < x.shape[1]:
            raise InputError(
                f"cannot edit token {where} of prompts of {x.shape[1]} tokens; give token=, or token='all'"
            )
        new = x.clone()
        new[:, where] = change(x[:, where])
        return new

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, kwargs | {name: edited(kwargs[name])}

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = main_tensor(output)
        whole = stream[0] + x
        new = x + (edited(whole) - whole)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    stream = list[Tensor]()
    if feature.stream == "input":
        module = model.get_submodule(str(feature.layer))
        handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
    else:
        parts, layer = decoder_parts(model), int(feature.layer)
        if feature.stream == "middle":
            # the stream between attention and MLP is no module's: the attention's output carries the change into it
            block = parts.blocks[layer]
            handles.append(
                block.module.register_forward_pre_hook(lambda _, args: stream.__setitem__(slice(None), args[:1]))
            )
            handles.append(block.attention.module.register_forward_hook(on_output))
        else:
            module = parts.final_norm.module if layer == len(parts) else parts.blocks[layer].module
            handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Effect:
    """The observable of each prompt before and after an edit, and how far its next-token distribution moved (KL, nats)."""

    before: Float[Tensor, " prompt"]
    after: Float[Tensor, " prompt"]
    kl: Float[Tensor, " prompt"]

    @property
    def change(self) -> Float[Tensor, " prompt"]:
        """After minus before."""
        return self.after - self.before


def measure_effect(
    model: Any,
    observable: Observable,
    prompts: Prompts,
    edit: Callable[[slice], AbstractContextManager[None]],
    *,
    memory: int | None = None,
) -> Effect:
    """What ``edit(rows)``, an edit for those rows of ``prompts``, does to the observable and to the next token of each.

    For instance ``lambda rows: projection_patch(model, feature, positive[rows])``. Prompts must have the same number of tokens.
    """
    parts = decoder_parts(model)
    ids = as_prompts(prompts, observable.tokenizer)
    if len({len(one) for one in ids}) > 1:
        raise InputError("prompts must have the same number of tokens; measure those of each length by themselves")
    table = torch.stack(ids)
    before, after, divergence = [], [], []
    for rows in chunks(len(table), 40.0 * (parts.vocabulary + table.shape[1] * parts.width), memory):
        whole = run_decoder(parts, table[rows], memory=1 << 62).logits
        with edit(rows):
            changed = run_decoder(parts, table[rows], memory=1 << 62).logits
        before.append(observable.score(whole))
        after.append(observable.score(changed))
        p, q = whole.log_softmax(dim=1), changed.log_softmax(dim=1)
        divergence.append((p.exp() * (p - q)).sum(dim=1).clamp(min=0))
    return Effect(torch.cat(before), torch.cat(after), torch.cat(divergence))
