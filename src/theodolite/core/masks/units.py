"""Masks of units: choosing them by score, switching them off, and taking them out of the network."""

__all__ = ["Footprint", "UnitMask", "apply_mask", "footprint", "prune_units", "remove_units"]

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Integral, Real
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.masks.coupling import Coupling, coupled_units
from theodolite.core.masks.trace import LAYERS, NORMS
from theodolite.core.masks.transformers import answer, is_transformer, set_config_width
from theodolite.core.view import evaluation_mode


@dataclass(frozen=True, eq=False)
class UnitMask:
    """Which units of a network stay.

    rows: for every layer and batch norm that loses something, or could, a boolean for each output (True stays). columns:
    for every layer that reads such outputs a boolean for each input column. removed, total: units, coupled ones counted
    once.
    """

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    removed: int
    total: int

    @property
    def fraction(self) -> float:
        """Share of the units that go."""
        return self.removed / self.total

    def then(self, later: "UnitMask") -> "UnitMask":
        """This mask, and after it a mask of the network that it left."""

        def both(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
            joined = {name: keep.clone() for name, keep in first.items()}
            for name, keep in second.items():
                if name not in joined or int(joined[name].sum()) != len(keep):
                    raise InputError(f"the later mask does not fit what the first one leaves of {name}")
                joined[name][joined[name].clone()] = keep
            return joined

        rows, columns = both(self.rows, later.rows), both(self.columns, later.columns)
        return UnitMask(rows, columns, self.removed + later.removed, self.total)


def prune_units(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    amount: float,
    scope: str = "global",
    max_layer_fraction: float = 1.0,
    example_input: Tensor | None = None,
) -> UnitMask:
    """The mask without the ``amount`` units of the lowest score.

    scores: for each layer (n_units,) finite numbers. A unit with members in several layers (residual sums, depthwise
    convolutions) has the sum of their scores; one without a score stays. amount: a number of units (int), or a share of
    those that have a score (float below 1). scope: "global" ranks the units of all layers together, "layer" takes the
    amount from every layer. Ties are settled by layer, then by index. At least one output of every layer stays, and no
    layer loses more than max_layer_fraction of its outputs. example_input: needed where the forward asks for shapes.

    Raises InputError for scores that do not fit, and where so many cannot go, with the largest number that can.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> prune_units(net, {"0": torch.tensor([3.0, 1.0, 2.0])}, amount=1).rows["0"]
    tensor([ True, False,  True])
    """
    if scope not in ("global", "layer"):
        raise InputError(f"scope must be 'global' or 'layer', got {scope!r}")
    if not 0 < max_layer_fraction <= 1:
        raise InputError(f"max_layer_fraction must lie in (0, 1], got {max_layer_fraction}")
    coupling = coupled_units(model, example_input)
    total, scored = _unit_scores(coupling, scores)
    order = scored[np.argsort(total[scored], kind="stable")]
    if scope == "global":
        wanted = _how_many(amount, len(order))
        chosen = _lowest(coupling, order, wanted, max_layer_fraction)
    else:
        home = _home(coupling)
        per_layer = [order[home[order] == layer] for layer in np.unique(home[scored])]
        parts = [_lowest(coupling, o, _how_many(amount, len(o)), max_layer_fraction) for o in per_layer]
        chosen = np.concatenate(parts)
    return _mask(coupling, chosen)


def _unit_scores(coupling: Coupling, scores: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Summed score of every unit, and the numbers of the units that have one."""
    total, has = np.zeros(coupling.units), np.zeros(coupling.units, dtype=bool)
    for name, given in scores.items():
        if name not in coupling.layers:
            raise InputError(
                f"{name} is no linear or convolutional layer of the model; it has {', '.join(coupling.layers)}"
            )
        ids, values = coupling.rows[name].numpy(), torch.as_tensor(given).detach().double().cpu().numpy()
        if values.shape != ids.shape:
            raise InputError(f"{name} has {len(ids)} outputs, got scores of shape {values.shape}")
        if not np.isfinite(values).all():
            raise InputError(f"the scores of {name} must be finite")
        np.add.at(total, ids[ids >= 0], values[ids >= 0])
        has[ids[ids >= 0]] = True
    if not has.any():
        why = "; ".join(f"{name}: {reason}" for name, reason in coupling.fixed.items())
        raise InputError(f"no unit of the scored layers can be removed ({why or 'no scores were given'})")
    return total, np.flatnonzero(has)


def _how_many(amount: object, n: int) -> int:
    number = float(amount) if isinstance(amount, Real) and not isinstance(amount, bool) else math.nan
    if not 0 <= number < math.inf:
        raise InputError(f"amount must be a number of units or a share below 1, got {amount!r}")
    if isinstance(amount, Integral):
        if number >= n:
            raise InputError(f"amount={amount} units, but there are {n} to choose from; at most {n - 1} can go")
        return int(number)
    if number >= 1:
        raise InputError(f"a share must lie below 1, got {amount}; give an int to remove so many of {n} units")
    return round(number * n)


def _lowest(coupling: Coupling, order: np.ndarray, wanted: int, most: float) -> np.ndarray:
    """The first units of ``order`` that leave every layer enough outputs."""
    rank = np.full(coupling.units, -1)
    rank[order] = np.arange(len(order))
    allowed = np.ones(len(order), dtype=bool)
    for name in coupling.layers:
        ids = coupling.rows[name].numpy()
        at = rank[ids[ids >= 0]]
        at = np.sort(at[at >= 0])
        allowed[at[min(len(ids) - 1, math.floor(most * len(ids))) :]] = False
    chosen = order[allowed][:wanted]
    if len(chosen) < wanted:
        raise InputError(
            f"{wanted} of {len(order)} units cannot go, because every layer keeps at least one output and "
            f"max_layer_fraction is {most}; at most {len(chosen)} can"
        )
    return chosen


def _home(coupling: Coupling) -> np.ndarray:
    """The first layer of every unit."""
    home = np.full(coupling.units, -1)
    for i, name in reversed(list(enumerate(coupling.layers))):
        ids = coupling.rows[name].numpy()
        home[ids[ids >= 0]] = i
    return home


def _mask(coupling: Coupling, removed: np.ndarray) -> UnitMask:
    gone = torch.zeros(coupling.units + 1, dtype=torch.bool)  # the last stands for -1: what cannot go
    gone[torch.from_numpy(removed)] = True

    def keep(ids: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: ~gone[found] for name, found in ids.items() if bool((found >= 0).any())}

    return UnitMask(keep(coupling.rows), keep(coupling.columns), len(removed), coupling.units)


class apply_mask(AbstractContextManager[nn.Module]):
    """Switch the masked units off in place: their weights, biases and norms are 0, and so are the columns that read them.

    At once and for good; as a context manager until the block ends. The same function as the network of `remove_units`.

    Raises ModelError where the mask is of another network.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with apply_mask(net, prune_units(net, {"0": torch.arange(3.0)}, amount=1)):
    ...     net[0].bias[0].item()
    0.0
    """

    def __init__(self, model: nn.Module, mask: UnitMask) -> None:
        self.model = model
        self._before: list[tuple[Tensor, Tensor]] = []
        modules = _fitting(model, mask)
        with torch.no_grad():
            for name, keep in mask.rows.items():
                for tensor in (modules[name].weight, modules[name].bias):
                    if tensor is not None:
                        self._zero(tensor, ~keep.to(tensor.device))
                if isinstance(modules[name], NORMS) and modules[name].weight is None:
                    self._zero(modules[name].running_mean, ~keep)
            for name, keep in mask.columns.items():
                weight = modules[name].weight
                self._before.append((weight, weight.detach().clone()))
                weight[:, ~keep.to(weight.device)] = 0

    def _zero(self, tensor: Tensor, gone: Tensor) -> None:
        self._before.append((tensor, tensor.detach().clone()))
        tensor[gone] = 0

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with torch.no_grad():
            for tensor, before in reversed(self._before):
                tensor.copy_(before)


def _fitting(model: nn.Module, mask: UnitMask) -> dict[str, Any]:
    modules: dict[str, Any] = dict(model.named_modules())
    for axis, found in enumerate((mask.rows, mask.columns)):
        for name, keep in found.items():
            module = modules.get(name)
            if isinstance(module, NORMS):
                size = module.num_features
            elif isinstance(module, LAYERS):
                size = module.weight.shape[axis]
            else:
                raise ModelError(f"the mask is of another network: this one has no layer {name!r}")
            if size != len(keep):
                what = "input columns" if axis else "outputs"
                raise ModelError(f"the mask is of another network: {name} has {size} {what}, the mask {len(keep)}")
    return modules


def remove_units(model: nn.Module, mask: UnitMask, example_input: Tensor | None = None) -> nn.Module:
    """A smaller copy of ``model`` without the masked units; one selection of rows and columns for each layer.

    example_input: a batch on which the smaller network is compared with the masked one, None for no comparison. A Hugging
    Face transformer can be saved and loaded again where all its MLPs are left equally wide (scope="layer").

    Raises ModelError where the mask is of another network, and where the two give different outputs (a forward with
    widths written into it).

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> remove_units(net, prune_units(net, {"0": torch.arange(3.0)}, amount=2), torch.ones(1, 2))
    Sequential(
      (0): Linear(in_features=2, out_features=1, bias=True)
      (1): ReLU()
      (2): Linear(in_features=1, out_features=2, bias=True)
    )
    """
    _fitting(model, mask)
    smaller = copy.deepcopy(model)
    modules: dict[str, Any] = dict(smaller.named_modules())
    for name in dict.fromkeys([*mask.rows, *mask.columns]):
        rows, columns = mask.rows.get(name), mask.columns.get(name)
        if rows is not None and isinstance(modules[name], NORMS):
            _shrink_norm(modules[name], rows)
        else:
            _shrink_layer(modules[name], rows, columns)
    if is_transformer(smaller):
        set_config_width(smaller)
    if example_input is not None:
        _compare(model, smaller, mask, example_input)
    return smaller


def _select(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    chosen = tensor.detach().index_select(axis, keep.nonzero()[:, 0].to(tensor.device))
    return nn.Parameter(chosen, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else chosen


def _shrink_layer(layer: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    if rows is not None:
        layer.weight = _select(layer.weight, 0, rows)
        if layer.bias is not None:
            layer.bias = _select(layer.bias, 0, rows)
    if columns is not None:
        layer.weight = _select(layer.weight, 1, columns)
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = outputs, inputs
        return
    depthwise = layer.groups > 1 and rows is not None
    if depthwise:
        each = layer.out_channels // layer.groups
        layer.in_channels = layer.groups = outputs // each
    elif layer.groups == 1:
        layer.in_channels = inputs
    layer.out_channels = outputs


def _shrink_norm(norm: Any, rows: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        if tensor is not None:
            setattr(norm, name, _select(tensor, 0, rows))
    norm.num_features = int(rows.sum())


def _compare(model: nn.Module, smaller: nn.Module, mask: UnitMask, example: Tensor) -> None:
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(smaller):
        with apply_mask(model, mask):
            wanted = answer(model, example)
        try:
            found = answer(smaller, example)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"the smaller network does not run, because its forward has widths written into it: {error}"
            ) from error
    off = float((wanted - found).abs().max()) if found.shape == wanted.shape else math.inf
    if not off <= 1e-3 * max(1.0, float(wanted.abs().max())):
        raise ModelError(
            f"the smaller network gives other outputs than the masked one (off by {off:.3g}); its forward treats "
            "channels by their position"
        )


@dataclass(frozen=True)
class Footprint:
    """Parameters of a network, tied ones once, and multiply-adds of its linear and convolutional layers for one row."""

    parameters: int
    macs: int


def footprint(model: nn.Module, example_input: Tensor) -> Footprint:
    """Size and cost of ``model`` on one row like those of ``example_input``.

    >>> footprint(nn.Linear(3, 2), torch.ones(5, 3))
    Footprint(parameters=8, macs=6)
    """
    counted = [0]

    def count(layer: Any, _: object, out: Tensor) -> None:
        each = layer.weight.numel() // layer.weight.shape[0]
        counted[0] += out.numel() * each

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, LAYERS)]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(example_input[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return Footprint(sum(p.numel() for p in model.parameters()), counted[0])
