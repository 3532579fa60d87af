"""A module as a function of its tensors, whatever stands in it twice."""

__all__ = ["call_with", "tensor_places"]

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from theodolite.core.errors import ModelError


def tensor_places(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """All places of each parameter and buffer, by the name that ``named_parameters`` or ``named_buffers`` gives it.

    A tensor that two modules share has a place in each; a module that has several names is taken once.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> net[1].weight = net[0].weight
    >>> tensor_places(net)
    {'0.weight': ('0.weight', '1.weight')}
    """
    places: dict[int, list[str]] = {}  # a literal: torch.compile cannot trace a call of dict[...]
    for holder, inner in module.named_modules():
        for named in (inner.named_parameters, inner.named_buffers):
            for name, tensor in named(holder, recurse=False, remove_duplicate=False):
                places.setdefault(id(tensor), []).append(name)
    return {names[0]: tuple(names) for names in places.values()}


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    places: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """What ``module`` gives with ``tensors`` in place of its own of these names; the module stays as it is.

    places: of `tensor_places`, worked out before (torch.compile cannot trace that walk). `torch.func.functional_call` alone
    takes the second name of a shared module for a place of its own, puts the tensor in twice, and so leaves it there.
    Raises ModelError for a name that the module does not have.
    """
    places = tensor_places(module) if places is None else places
    unknown = [name for name in tensors if name not in places]
    if unknown:
        raise ModelError(
            f"the module has no tensors called {', '.join(unknown[:5])}; it has: {', '.join(list(places)[:8])}"
        )
    moved = {place: tensor for name, tensor in tensors.items() for place in places[name]}
    return functional_call(module, moved, tuple(args), dict(kwargs or {}), tie_weights=False)
