"""A network in two parts at a named layer, and the layers at which it can be split."""

__all__ = ["SplitError", "SplitModel", "feature_layers", "head_input"]

import difflib
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.capture import CaptureError, forward_nodes, main_tensor
from theodolite.core.errors import ModelError
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import evaluation_mode

_TRIED = 60  # layers that are tried as a split, from the end


class SplitError(ModelError):
    """The network is not a function of what this layer gives alone, or has no such layer."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Activations as (row, channel, position ...): the one layout in which baselines are drawn and maps are summed.

    extra: tokens before the grid that are no place in the image (a class token), (row, channel, extra).
    """

    values: Float[Tensor, "row channel ..."]
    extra: Float[Tensor, "row channel extra"] | None
    kind: str

    @classmethod
    def of(cls, a: Tensor, *, channels_last: bool = False) -> "Grid":
        """From (n, C, H, W), (n, H, W, C) with ``channels_last``, tokens (n, T, D) with T or T - 1 a square, or (n, d)."""
        if a.ndim == 2:
            return cls(a, None, "table")
        if a.ndim == 4:
            return cls(a.permute(0, 3, 1, 2) if channels_last else a, None, "last" if channels_last else "first")
        if a.ndim == 3:
            tokens = a.transpose(1, 2)
            for extra in (0, 1):
                side = math.isqrt(tokens.shape[2] - extra)
                if side > 0 and side * side == tokens.shape[2] - extra:
                    places = tokens[:, :, extra:].unflatten(2, (side, side))
                    return cls(places, tokens[:, :, :extra] if extra else None, "tokens")
            raise SplitError(f"{a.shape[1]} tokens are no square grid, with or without a class token; split elsewhere")
        raise SplitError(f"activations must be (n, C, H, W), (n, T, D) or (n, d), got shape {tuple(a.shape)}")

    def back(self, values: Tensor, extra: Tensor | None = None) -> Tensor:
        """Values in this layout as activations again; the class token as it was, or ``extra``."""
        if self.kind == "table" or self.kind == "first":
            return values
        if self.kind == "last":
            return values.permute(0, 2, 3, 1)
        flat = values.flatten(2)
        head = self.extra if extra is None else extra
        return (flat if head is None else torch.cat([head, flat], dim=2)).transpose(1, 2)


class SplitModel:
    """``model`` as upper(lower(x)), cut behind the module ``layer`` ("NAME:input": before it; "input": before the network).

    channels_last: the layer gives (n, H, W, C). The first call of `lower` checks on one row that upper(lower(x)) is
    model(x) (SplitError names the layer: not there, not on the path to the output, or with a connection around it). `upper`
    runs the lower part on one row only, however many activations it is given. Modules run in eval mode and are put back.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> split = SplitModel(net, "1")
    >>> x = torch.ones(5, 4)
    >>> torch.allclose(split.upper(split.lower(x)), net(x))
    True
    """

    def __init__(self, model: Any, layer: str, *, channels_last: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise SplitError(f"only a network (nn.Module) can be split, got {type(model).__name__}")
        modules = dict(model.named_modules())
        stem, _, side = layer.rpartition(":")
        self._before = side == "input" and stem in modules
        if layer != "input" and layer not in modules and not self._before:
            near = difflib.get_close_matches(layer, [name for name in modules if name], n=3, cutoff=0.3)
            raise SplitError(
                f"the network has no module called {layer!r}; near it: {', '.join(near) or 'none'}. Name a module, "
                "'NAME:input' for what goes into it, or 'input'"
            )
        self.model, self.layer, self.channels_last = model, layer, channels_last
        self._module = model if layer == "input" else modules[stem if self._before else layer]
        self._surroundings: Tensor | None = None
        self._one_row = True
        self._bytes: float | None = None
        self._lower_bytes: float | None = None

    def lower(self, x: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        """a = f_low(x), without gradients."""
        if self._surroundings is None or self._surroundings.shape[1:] != x.shape[1:]:
            self.check(x[:1])
        return self._lower(x)

    def _lower(self, x: Tensor) -> Tensor:
        if self.layer == "input":
            return x
        try:
            return forward_nodes(self.model, x, [self.layer])[self.layer]
        except CaptureError as error:
            raise SplitError(f"cannot split at {self.layer!r}: {error}") from error

    def upper(self, a: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        """f_up(a): the network's raw output, (n, classes); gradients are recorded where the caller has them on."""
        if self.layer == "input":
            with evaluation_mode(self.model):
                return main_tensor(self.model(a))
        if self._surroundings is None:
            raise SplitError(f"call lower(x) before upper(a), so that the split at {self.layer!r} is checked")
        return self._upper(a)

    def _upper(self, a: Tensor) -> Tensor:
        recording = torch.is_grad_enabled()
        rows = 1 if self._one_row else len(a)
        x = self._surroundings
        assert x is not None  # both callers see to it

        def put(module: nn.Module, args: Any, output: Any) -> Any:
            torch.set_grad_enabled(recording)  # what runs before the layer needs no graph
            new = a.clone()  # an operation in place further on must not change what was given
            if isinstance(output, Tensor):
                return new
            if isinstance(output, tuple):
                return (new, *output[1:])
            raise SplitError(f"{self.layer!r} gives {type(output).__name__}; split behind a module that gives a tensor")

        def put_before(module: nn.Module, args: Any) -> Any:
            torch.set_grad_enabled(recording)
            return (a.clone(), *args[1:])

        before, module = self._before, self._module
        handle = module.register_forward_pre_hook(put_before) if before else module.register_forward_hook(put)
        try:
            with torch.no_grad(), evaluation_mode(self.model):
                return main_tensor(self.model(x.expand(rows, *x.shape[1:])))
        finally:
            handle.remove()
            torch.set_grad_enabled(recording)

    def check(self, x: Float[Tensor, "row ..."]) -> None:
        """Raise SplitError where upper(lower(x)) is not model(x); the lower part then runs on other inputs than ``x``."""
        noise = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(0)).to(x)
        deviation = x.std(correction=0)
        self._surroundings = x.mean() + (deviation if float(deviation) > 0 else 1.0) * noise
        self._bytes = self._lower_bytes = None
        pair = torch.cat([x[:1], self._surroundings])
        a = self._lower(pair)
        with torch.no_grad(), evaluation_mode(self.model):
            whole = main_tensor(self.model(pair))
        # a network that reads the batch size off its input needs as many rows there as activations are put in
        for self._one_row in (True, False):
            with suppress(RuntimeError, ValueError), torch.no_grad():
                made = self._upper(a) if self.layer != "input" else whole
                if made.shape == whole.shape:
                    break
        else:
            self._surroundings = None
            raise SplitError(f"the network cannot go on from the activations of {self.layer!r} alone")
        worst = float((made - whole).abs().max())
        if not worst <= 1e-4 * max(float(whole.abs().max()), 1e-30):
            self._surroundings = None
            raise SplitError(
                f"the output is not a function of {self.layer!r} alone (off by {worst:.3g}): it is not on the path to the "
                "output, or a connection goes around it; split behind a whole block"
            )

    def row_bytes(self, a: Tensor) -> float:
        """Bytes that one more row costs in a forward and backward pass of the upper part."""
        if self._bytes is None:
            with torch.no_grad():
                self._bytes = bytes_per_row(self.upper, a[:1].detach(), gradients=True)
        return self._bytes

    def grid(self, a: Tensor) -> Grid:
        """Activations of this layer by channel and position."""
        return Grid.of(a, channels_last=self.channels_last)

    def lower_all(self, x: Tensor, *, memory: int | None = None) -> Tensor:
        """Activations of all rows, in chunks that fit ``memory`` bytes."""
        if len(x) == 1:
            return self.lower(x)
        self.lower(x[:1])
        if self._lower_bytes is None:
            with evaluation_mode(self.model):
                self._lower_bytes = bytes_per_row(self.model, x[:1], gradients=False)
        return torch.cat([self._lower(x[rows]) for rows in chunks(len(x), self._lower_bytes, memory)])


def _trace(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, module and output shape of every module, in the order in which they end."""
    found: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                found.append((name, module, tuple(first.shape)))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def feature_layers(model: Any, x: Float[Tensor, "row ..."]) -> tuple[str, ...]:
    """The layers to explain at: the ends of the last two feature stages for images (the last first), "input" for tables.

    A stage is a run of activations of one resolution; its end is the last module that the output is a function of alone and
    whose gradient reaches more than one position (of a transformer that reads a class token: not the last block).
    """
    if not isinstance(model, nn.Module):
        raise SplitError(f"only a network (nn.Module) can be split, got {type(model).__name__}")
    if x.ndim == 2:
        return ("input",)
    places: list[str] = []
    seen: set[tuple[int, ...]] = set()
    for name, _, shape in _trace(model, x)[: -_TRIED - 1 : -1]:
        stage = shape[2:] if len(shape) == 4 else shape[1:2]
        if len(shape) not in (3, 4) or min(stage) < 2 or stage in seen:
            continue
        try:
            split = SplitModel(model, name)
            a = split.lower(x[:1])
            reaches = _reached(split, a)
        except (SplitError, CaptureError):
            continue
        if reaches > 1:
            seen.add(stage)
            places.append(name)
            if len(places) == 2:
                break
    if not places:
        raise SplitError("found no layer with positions that everything passes through; name one or more layers")
    return tuple(places)


def _reached(split: SplitModel, a: Tensor) -> int:
    """At how many positions the output changes with the activation."""
    a = a.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(split.upper(a).square().sum(), a, allow_unused=True)
    return 0 if slope is None else int((split.grid(slope).values.abs().sum(dim=1) > 0).sum())


def head_input(model: nn.Module, x: Float[Tensor, "row ..."]) -> str | None:
    """The node that goes into the last linear layer, "NAME:input"; None where the network has none."""
    linear = [name for name, module, _ in _trace(model, x) if isinstance(module, nn.Linear)]
    return f"{linear[-1]}:input" if linear else None
