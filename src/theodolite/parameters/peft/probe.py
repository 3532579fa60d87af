"""One batch through a changed model, to see that every change is reached and matters.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366 (the changes); the check is this package's own.
"""

__all__ = ["example_batch", "run_probe"]

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.view import evaluation_mode


def example_batch(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]] | None:
    """The transformers model inside, and a batch for it: two rows of eight tokens, or one image; None where there is none."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is None or not hasattr(module, "base_model"):
            continue
        first = next(module.parameters())
        generator = torch.Generator().manual_seed(0)
        if getattr(config, "vocab_size", None):
            ids = torch.randint(1, config.vocab_size, (2, 8), generator=generator).to(first.device)
            return module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "image_size", None):
            size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
            shape = (1, int(getattr(config, "num_channels", 3)), *size)
            return module, {"pixel_values": torch.randn(shape, generator=generator).to(first)}
    return None


def run_probe(model: nn.Module, changes: Mapping[str, nn.Module], probe: object) -> None:
    """Draw the changes' weights at random, run one batch, and refuse a change without a call or without a slope.

    The weights are put back. Raises ModelError naming the change, InputError for a probe that is no batch.
    """
    if probe is None:
        made = example_batch(model)
        if made is None or not changes:
            return
        runner, batch = made
    elif isinstance(probe, Mapping):
        runner, batch = model, dict(probe)
    else:
        raise InputError(f"probe must be a dict of the model's inputs, None or False, got {type(probe).__name__}")
    generator = torch.Generator().manual_seed(0)
    weights = {name: list(change.parameters()) for name, change in changes.items()}
    unique = list({id(p): p for params in weights.values() for p in params}.values())
    before = [p.detach().clone() for p in unique]
    for change in changes.values():
        change.called = False  # type: ignore[assignment]
    with evaluation_mode(model), torch.enable_grad():
        for change in changes.values():
            change.eval()
        try:
            with torch.no_grad():
                for p in unique:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
            try:
                out = runner(**batch)
            except ModelError:
                raise
            except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
                raise ModelError(
                    f"{type(runner).__name__} cannot run {'the' if probe is not None else 'a made-up'} probe batch of "
                    f"{', '.join(batch)} ({str(error)[:200]}); pass a batch that it takes as probe=, or probe=False"
                ) from error
            loss = sum((part.float() * _like(part, generator)).sum() for part in _tensors(out))
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ModelError("none of the changes reaches the output of the probe batch")
            slopes = torch.autograd.grad(loss, unique, allow_unused=True)
        finally:
            with torch.no_grad():
                for p, old in zip(unique, before, strict=True):
                    p.copy_(old)
    live = {id(p) for p, slope in zip(unique, slopes, strict=True) if slope is not None and bool((slope != 0).any())}
    for name, change in changes.items():
        change.train(model.training)
        if not change.called:
            raise ModelError(f"the change {name} was never reached: the model does not call the part it is hooked to")
        if not any(id(p) in live for p in weights[name]):
            raise ModelError(f"the change {name} has no effect on the output: its place in the model is passed by")


def _like(part: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(part.shape, generator=generator).to(part.device)


def _tensors(out: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output, without those of a cache."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors(value)
