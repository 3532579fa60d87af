"""Small trainable updates on the weights of a network: saved, merged and taken off again.

Source: Si et al., 2024, arXiv:2405.14739.
"""

__all__ = ["Adapted", "Site", "TuckerAdapters"]

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from theodolite.core.errors import ModelError
from theodolite.parameters.tucker.deltas import Delta

_LINEAR_IN_INPUT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapted(nn.Module):
    """The parametrization of one weight: W + Delta W; while a layer works with dropout, W and then Delta W on their own.

    update: may be shared by tied weights, or by a stack of weights of which this is row ``index``. In eval mode without
    gradients the update is computed once and kept until its numbers change.
    """

    def __init__(self, update: Delta, index: int | None = None) -> None:
        super().__init__()
        self.update, self.index = update, index
        self.part: Literal["both", "base", "update"] = "both"
        self._kept: tuple[list[Tensor], Tensor] | None = None

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The weight that the layer works with."""
        if self.part == "base":
            return weight
        change = self._change().to(weight.dtype)
        return change if self.part == "update" else weight + change

    def _change(self) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.update(self.index)
        numbers: list[Tensor] = list(self.update.parameters())
        if not all(isinstance(one, nn.Parameter) for one in numbers):
            return self.update(self.index)  # put in place by functional_call or vmap: not the update's own
        numbers += self.update.buffers()
        # compared by value: what is written through .data changes no version counter
        if self._kept is None or not all(map(_same, self._kept[0], numbers)):
            self._kept = [number.detach().clone() for number in numbers], self.update(self.index)
        return self._kept[1]

    def train(self, mode: bool = True) -> "Adapted":
        """As ever; the kept update is let go of."""
        self._kept = None
        return super().train(mode)


def _same(kept: Tensor, now: Tensor) -> bool:
    return kept.device == now.device and kept.dtype == now.dtype and torch.equal(kept, now)


@dataclass(eq=False)
class Site:
    """One adapted weight: its owners, its parametrization and the weight itself.

    name: of the layer. update: name of its update, the layer's own or that of its stack. owners: (module, attribute), more
    than one where it is tied.
    """

    name: str
    update: str
    owners: list[tuple[nn.Module, str]]
    adapted: Adapted
    weight: nn.Parameter

    def __post_init__(self) -> None:
        names = [(attribute, list(module._parameters)) for module, attribute in self.owners]
        self._later = [every[every.index(attribute) + 1 :] for attribute, every in names]

    def attach(self) -> None:
        """Put the parametrization on every owner."""
        for module, attribute in self.owners:
            self.adapted.train(module.training)
            _own_class(module)
            parametrize.register_parametrization(module, attribute, self.adapted)

    def detach(self, weight: nn.Parameter) -> None:
        """Take it off, leaving ``weight`` as the plain parameter of every owner."""
        for module, attribute in self.owners:
            _own_class(module)
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        self.put(weight)

    def put(self, weight: nn.Parameter) -> None:
        """``weight`` as the plain parameter of every owner, in its old place among the parameters."""
        for (module, attribute), later in zip(self.owners, self._later, strict=True):
            setattr(module, attribute, weight)
            for name in later:  # optimisers and vectors of weights go by the order
                if name in module._parameters:
                    module._parameters[name] = module._parameters.pop(name)

    def check(self) -> None:
        """Raise ModelError where the owners have any other parametrizations than this one."""
        for module, attribute in self.owners:
            lists: Any = module.parametrizations if parametrize.is_parametrized(module, attribute) else {attribute: []}
            if list(lists[attribute]) != [self.adapted]:
                raise ModelError(
                    f"{self.name} has other parametrizations than its adapter's by now; take off first what came later"
                )


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: a deep copy shares it, and loses the weight when torch edits the class."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        body = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        own: Any = type(shared.__name__, shared.__bases__, body)
        module.__class__ = own


class TuckerAdapters:
    """The trainable updates of a network, made by `adapt`; the network itself is changed in place and goes on as before.

    model: the network. merged: whether the updates are written into its weights at present. statistics: "freeze" or "save",
    what happens to the running statistics of normalisation layers. updates: `Delta` modules by layer or stack name.
    """

    def __init__(
        self, model: nn.Module, sites: list[Site], *, dropout: float, statistics: str, frozen: list[nn.Parameter]
    ) -> None:
        self.model, self.dropout, self.statistics, self.merged = model, dropout, statistics, False
        self.updates: dict[str, Delta] = {site.update: site.adapted.update for site in sites}
        self._sites, self._frozen, self._removed = sites, frozen, False
        norms = [(name, one) for name, one in model.named_modules() if isinstance(one, _NormBase)]
        self._norms: list[tuple[str, nn.Module]] = [(name, one) for name, one in norms if one.running_mean is not None]
        self._before = {key: buffer.clone() for key, buffer in self._buffers().items()}
        self._hooks: list[RemovableHandle] = []
        self._attach()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every number that trains, for an optimiser; a shared update once."""
        return [parameter for update in self.updates.values() for parameter in update.parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter alone, kilobytes: "LAYER.core", "LAYER.factors.0", ..., "LAYER.scale", and saved running statistics."""
        return {key: value.detach().clone() for key, value in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the numbers of a saved adapter, its scales too; ModelError where names or shapes differ, before any changes."""
        if self.merged:
            raise ModelError("the updates are merged into the weights; call unmerge() before other ones are loaded")
        mine = self._state()
        missing, surplus = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if missing or surplus:
            raise ModelError(
                f"the saved adapter does not fit this one: it lacks {missing[:5] or 'nothing'} and has besides "
                f"{surplus[:5] or 'nothing'}; adapt the same layers with the same kind, groups and statistics"
            )
        for key, value in mine.items():
            if value.shape != state[key].shape:
                raise ModelError(
                    f"{key} was saved with shape {tuple(state[key].shape)} and is {tuple(value.shape)} here; use its ranks"
                )
        with torch.no_grad():
            for key, value in mine.items():
                value.copy_(state[key])

    def merge(self) -> nn.Module:
        """Write W + Delta W into the weights and take everything off; the network then costs what it cost before.

        The old weights are kept for `unmerge`, until this object is let go of. Merging twice changes nothing more.
        """
        if self.merged:
            return self.model
        self._check()
        for site in self._sites:
            with torch.no_grad():
                merged = site.adapted(site.weight).detach().clone()
            site.detach(nn.Parameter(merged, requires_grad=False))
        self._unhook()
        self.merged = True
        return self.model

    def unmerge(self) -> nn.Module:
        """The old weights, bit for bit, with the updates beside them as before `merge`."""
        if self.merged:
            for site in self._sites:
                site.put(site.weight)
            self._attach()
            self.merged = False
        return self.model

    def remove(self) -> nn.Module:
        """The network as it was: old weights and running statistics, without hooks, trainable as before.

        Where another adapter is still on the network its parameters stay frozen; remove the last one made first.
        """
        if self._removed:
            return self.model
        if not self.merged:
            self._check()
        for site in self._sites:
            (site.put if self.merged else site.detach)(site.weight)
        self._unhook()
        with torch.no_grad():
            for key, buffer in self._buffers().items():
                buffer.copy_(self._before[key])
        if not any(isinstance(module, Adapted) for module in self.model.modules()):
            for parameter in self._frozen:
                parameter.requires_grad_(True)
        self.merged, self._removed = False, True
        return self.model

    def report(self) -> pd.DataFrame:
        """One row per adapted weight or stack: layer, shape, ranks, params; .attrs["statistics"] says how norms are kept."""
        rows = [(name, update.shape, update.ranks, update.parameter_count) for name, update in self.updates.items()]
        table = pd.DataFrame(rows, columns=["layer", "shape", "ranks", "params"])
        kept = {"freeze": "frozen", "save": "trained and saved with the adapter"}[self.statistics]
        table.attrs["statistics"] = f"running statistics of {len(self._norms)} normalisation layers: {kept}"
        return table

    def _buffers(self) -> dict[str, Tensor]:
        """Running statistics that train with the adapter, by name."""
        if self.statistics != "save":
            return {}
        return {
            f"{name}.{key}": value for name, norm in self._norms for key, value in norm.named_buffers(recurse=False)
        }

    def _state(self) -> dict[str, Tensor]:
        own = {
            f"{name}.{key}": value
            for name, update in self.updates.items()
            for key, value in update.state_dict().items()
        }
        return own | self._buffers()

    def _attach(self) -> None:
        for site in self._sites:
            site.attach()
        if self.statistics == "freeze":
            self._hooks += [norm.register_forward_pre_hook(_keep_statistics) for _, norm in self._norms]
        if self.dropout > 0:
            drop = partial(_drop, dropout=self.dropout)
            for module in [owner for site in self._sites for owner, attribute in site.owners if attribute == "weight"]:
                if isinstance(module, _LINEAR_IN_INPUT):
                    self._hooks.append(module.register_forward_pre_hook(_hold_back))
                    self._hooks.append(module.register_forward_hook(drop, always_call=True))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _check(self) -> None:
        if self._removed:
            raise ModelError("these adapters were removed from the network; adapt it again")
        for site in self._sites:
            site.check()


def _keep_statistics(module: nn.Module, args: object) -> None:
    module.eval()


def _hold_back(module: nn.Module, args: object) -> None:
    """Before a layer works in training: the update waits for its own call. A layer that is not called has both at once."""
    adapted = _adapted(module)
    if module.training and adapted.part == "both":
        adapted.part = "base"


def _drop(module: nn.Module, args: tuple[Any, ...], output: Tensor | None, *, dropout: float) -> Tensor | None:
    """The layer's answer with dropout on the input x of the update alone: f(x; W) + f(drop(x); Delta W), f linear in both."""
    adapted = _adapted(module)
    if adapted.part != "base":
        return None
    adapted.part = "both"
    if output is None:  # the layer failed
        return None
    bias = module.bias
    adapted.part = "update"
    try:
        change = module(functional.dropout(args[0], dropout))
    finally:
        adapted.part = "both"
    if isinstance(bias, Tensor):  # the second call added it once more; its axis is that of the channels, from the end
        change = change - bias.view(-1, *[1] * (len(adapted.update.shape) - (2 if adapted.index is None else 3)))
    return output + change


def _adapted(module: nn.Module) -> Adapted:
    lists: Any = module.parametrizations
    return lists.weight[0]
