"""A walk over the weight tensors of any network: which there are, of what kind, who owns them, each tied one once."""

__all__ = ["KINDS", "WeightTensor", "as_patterns", "matches", "weight_tensors"]

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from theodolite.core.errors import ModelError

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "embedding": (nn.Embedding,),
}
"""Kinds of weight tensors by the modules that own them; every other tensor of two or more axes is "other"."""


@dataclass(frozen=True)
class WeightTensor:
    """One weight tensor of a network.

    name: as in ``named_parameters``. module, attribute: the owner and the name there. kind: of `KINDS`, or "other".
    tied: the other names under which the same tensor stands in the network.
    """

    name: str
    module: nn.Module
    attribute: str
    kind: str
    tied: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor as it is now (a parametrization replaces it)."""
        return getattr(self.module, self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """In the owner's own order: (out, in), (out, in / groups, kernel ...) or (number, width)."""
        return tuple(self.parameter.shape)


def as_patterns(given: Iterable[str] | str | None) -> list[str] | None:
    """A list of patterns of one, of several or of none."""
    if given is None:
        return None
    return [given] if isinstance(given, str) else list(given)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern ("head", "conv*") fits the parameter ``name`` or a module that holds it.

    >>> matches("encoder.layer.0.weight", ["encoder.*.0"]), matches("head.weight", ["encoder"])
    (True, False)
    """
    parts = name.split(".")
    holders = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(holder, pattern) for holder in holders for pattern in patterns)


def weight_tensors(
    model: nn.Module,
    *,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    kinds: Iterable[str] = ("linear", "conv", "embedding"),
    min_size: int = 0,
) -> list[WeightTensor]:
    """The weight tensors of ``model``, in its order; of a tied tensor the first name, with the others beside it.

    include, exclude: patterns of parameters or modules (`matches`). kinds: of `KINDS`, and "other" for every further
    parameter of two or more axes. min_size: entries from which a tensor counts.

    Raises ModelError where none is left, naming what there is.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    >>> [(weight.name, weight.kind, weight.shape) for weight in weight_tensors(net)]
    [('0.weight', 'conv', (4, 1, 3, 3)), ('2.weight', 'linear', (2, 4))]
    """
    include, exclude, wanted = as_patterns(include), as_patterns(exclude), set(kinds)
    owners = dict[int, list[tuple[str, nn.Module, str]]]()
    for module_name, module in model.named_modules(remove_duplicate=True):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{module_name}.{attribute}" if module_name else attribute
            if parameter.ndim >= 2:
                owners.setdefault(id(parameter), []).append((name, module, attribute))
    every = [
        WeightTensor(name, module, attribute, _kind(module, attribute), tuple(other for other, _, _ in rest))
        for (name, module, attribute), *rest in owners.values()
    ]
    found = [
        weight
        for weight in every
        if weight.kind in wanted
        and weight.parameter.numel() >= min_size
        and (include is None or any(matches(name, include) for name in (weight.name, *weight.tied)))
        and not (exclude is not None and any(matches(name, exclude) for name in (weight.name, *weight.tied)))
    ]
    if not found:
        there = ", ".join(f"{weight.name} ({type(weight.module).__name__})" for weight in every[:20]) or "none"
        raise ModelError(
            f"no weight tensor is left after include={include}, exclude={exclude}, kinds={sorted(wanted)}, "
            f"min_size={min_size}; the model has: {there}"
        )
    return found


def _kind(module: nn.Module, attribute: str) -> str:
    if attribute != "weight":
        return "other"
    return next((kind for kind, types in KINDS.items() if isinstance(module, types)), "other")
