"""Which weights of a network get an update, of what ranks, and all that can be wrong with that.

Source: Si et al., 2024, arXiv:2405.14739.
"""

__all__ = ["adapt"]

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from theodolite.core.errors import InputError, ModelError
from theodolite.core.parallel import seeds_for
from theodolite.parameters.tucker.adapters import Adapted, Site, TuckerAdapters
from theodolite.parameters.tucker.decomposition import budget_ranks, check_ranks, sensible_ranks
from theodolite.parameters.tucker.deltas import INITS, CPDelta, Delta, FullDelta, LoraDelta, TuckerDelta, check_scale
from theodolite.parameters.weights import WeightTensor, as_patterns, matches, weight_tensors

_KINDS = ("tucker", "lora", "cp", "full", "bias")
_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def adapt(
    model: nn.Module,
    *,
    ranks: object = 8,
    include: Iterable[str] | str = ("*",),
    types: Iterable[type[nn.Module]] = _TYPES,
    scale: object = 4.0,
    dropout: float = 0.0,
    init: str = "kaiming",
    group: Mapping[str, Any] | None = None,
    exclude: Iterable[str] | str | None = None,
    kind: str = "tucker",
    statistics: str = "freeze",
    tied: str = "refuse",
    clip: bool = False,
    seed: int = 0,
) -> TuckerAdapters:
    """Freeze a network and put a small trainable update, zero at the start, on each of the chosen weights.

    ranks: an int is the most for each channel mode, kernels at full rank; a tuple is one rank per axis in the weight's own
    order (out, in / groups, kernel); a float is the share of the weight's numbers that may train; a function of (name,
    module) gives any of these. include, exclude: patterns of layers (`theodolite.parameters.weights.matches`). types: of
    modules whose ``weight`` is adapted; an axis alone (a LayerNorm's gain) takes a full update. scale: s.
    dropout: of the update's input, in training, for linear and convolution layers; it costs a second call of the layer.
    init: of the factors (`TuckerDelta`). group: name -> patterns; the matching weights, of one shape, are stacked to one tensor
    (number, out, in, ...) that has one update. kind: "tucker"; to compare with "lora" (ranks: an int, scale = alpha / rank),
    "cp" (ranks: an int), "full", or "bias" (a full update of the modules' biases alone). statistics: running means and
    variances of normalisation layers are left as they are ("freeze": such layers work as in eval mode) or trained and put
    into the adapter's state ("save"). tied: a weight under two names is refused, or gets one update for both ("share").
    clip: cut ranks that are larger than their axis. seed: of the factors.

    The row of an embedding's padding_idx is not changed. Raises InputError for ranks that do not fit and ModelError where no
    layer matches, a weight is not of floats, is tied or has another parametrization already.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.LazyLinear(10))
    >>> out = net(torch.randn(2, 3, 8, 8))
    >>> adapters = adapt(net, ranks=4, include="0")
    >>> adapters.report().values.tolist()
    [['0', (16, 3, 3, 3), (4, 3, 3, 3), 199]]
    >>> len(adapters.state_dict()), adapters.merge() is net
    (6, True)
    """
    _check_options(kind, init, dropout, statistics, tied, group)
    checked_scale = check_scale(scale)
    attribute = "bias" if kind == "bias" else "weight"
    found = _targets(model, attribute, as_patterns(include) or [], as_patterns(exclude) or [], tuple(types))
    for weight in found:
        _check_weight(weight, tied)
    stacks = _stacks(found, group or {})
    plans = [
        _plan(name, members, ranks, kind, clip) for name, members in stacks.items()
    ]  # all is checked before any change
    updates = [
        _make(members, plan, kind, seed=one, scale=checked_scale, init=init)
        for members, plan, one in zip(stacks.values(), plans, seeds_for(seed, len(stacks)), strict=True)
    ]
    everywhere, sites = _owners(model), list[Site]()
    for (name, members), update in zip(stacks.items(), updates, strict=True):
        for row, weight in enumerate(members):
            owners = [(weight.module, attribute), *(everywhere[other] for other in weight.tied)]
            adapted = Adapted(update, row if name in (group or {}) else None)
            sites.append(Site(_layer(weight), name, owners, adapted, weight.parameter))
    frozen = _freeze(model)
    return TuckerAdapters(model, sites, dropout=dropout, statistics=statistics, frozen=frozen)


def _targets(
    model: nn.Module, attribute: str, include: list[str], exclude: list[str], types: tuple[type, ...]
) -> list[WeightTensor]:
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ModelError(f"{', '.join(lazy)} is not initialised yet; run one batch through the network first")

    def chosen(module: nn.Module, names: Iterable[str]) -> bool:
        asked = any(matches(name, include) for name in names) and not any(matches(name, exclude) for name in names)
        return asked and isinstance(module, types)

    owned = [(f"{name}.{attribute}" if name else attribute, module) for name, module in model.named_modules()]
    taken = [
        name for name, module in owned if chosen(module, [name]) and parametrize.is_parametrized(module, attribute)
    ]
    if taken:
        raise ModelError(
            f"{', '.join(taken[:10])} has a parametrization already, and one weight can have only one; "
            "merge() or remove() it, or leave these layers out with include= or exclude="
        )
    every = _vectors(model)
    if any(parameter.ndim >= 2 for parameter in model.parameters()):
        every += weight_tensors(model, kinds=("linear", "conv", "embedding", "other"))
    order = {name: place for place, (name, _) in enumerate(owned)}
    found = [one for one in every if one.attribute == attribute and chosen(one.module, (one.name, *one.tied))]
    if not found:
        there = ", ".join(
            f"{name} ({type(one).__name__})" for name, one in model.named_modules() if not list(one.children())
        )
        raise ModelError(
            f"no {attribute} matches include={include}, exclude={exclude} and types={[one.__name__ for one in types]}; "
            f"the network has: {there}"
        )
    return sorted(found, key=lambda one: order[one.name])


def _vectors(model: nn.Module) -> list[WeightTensor]:
    """Parameters of one axis (biases, gains), each tied one once."""
    names = dict[int, list[str]]()
    owners = _owners(model)
    for name, (module, attribute) in owners.items():
        parameter = getattr(module, attribute)
        if parameter.ndim == 1:
            names.setdefault(id(parameter), []).append(name)
    return [WeightTensor(first, *owners[first], "other", tuple(rest)) for first, *rest in names.values()]


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    return {
        (f"{name}.{attribute}" if name else attribute): (module, attribute)
        for name, module in model.named_modules()
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _layer(weight: WeightTensor) -> str:
    """The name of the layer, or of the parameter where the network is the layer itself."""
    return weight.name.rpartition(".")[0] or weight.name


def _stacks(found: list[WeightTensor], group: Mapping[str, Any]) -> dict[str, list[WeightTensor]]:
    """Weights by the name of their update: a stack's, or the layer's own."""
    stacks, of = dict[str, list[WeightTensor]](), dict[str, str]()
    for name, given in group.items():
        members = [weight for weight in found if matches(weight.name, as_patterns(given) or [])]
        if len(members) < 2 or len({weight.shape for weight in members}) > 1:
            raise InputError(
                f"the group {name} ({given}) must match two or more of the chosen weights, all of one shape; it matches "
                f"{[(weight.name, weight.shape) for weight in members]}"
            )
        twice = [weight.name for weight in members if weight.name in of]
        if twice:
            raise InputError(
                f"{', '.join(twice)} is in the groups {of[twice[0]]} and {name}; each weight can be in one"
            )
        of |= {weight.name: name for weight in members}
        stacks[name] = members
    alone = {_layer(weight): [weight] for weight in found if weight.name not in of}
    if stacks.keys() & alone.keys():
        raise InputError(f"{sorted(stacks.keys() & alone.keys())} are names of layers; give the groups other names")
    return stacks | alone


def _plan(name: str, members: list[WeightTensor], ranks: object, kind: str, clip: bool) -> Any:
    """Ranks of one update as its `Delta` takes them; None for a full one."""
    first = members[0]
    shape = first.shape if len(members) == 1 else (len(members), *first.shape)
    if kind in ("full", "bias") or len(shape) == 1:
        return None
    asked: Any = ranks(name, first.module) if isinstance(ranks, Callable) else ranks
    if isinstance(asked, bool) or not isinstance(asked, (Integral, Real, Iterable)):
        raise InputError(f"ranks for {name} must be an int, a float, a tuple or a function of these, got {asked!r}")
    if kind in ("lora", "cp"):
        if not isinstance(asked, Integral) or asked < 1:
            raise InputError(f'kind="{kind}" has one rank, a whole number of at least 1; got {asked!r} for {name}')
        return int(asked)
    if isinstance(asked, Integral):
        if asked < 1:
            raise InputError(f"ranks={asked} for {name}: a rank must be at least 1")
        channels = len(shape) - len(first.shape) + 2
        return sensible_ranks(shape, int(asked), shape[channels:])
    if isinstance(asked, Real):
        if not 0 < float(asked) <= 1:
            raise InputError(f"a share of the weight's numbers must be above 0 and at most 1, got {asked} for {name}")
        size = torch.Size(shape).numel()
        try:
            return budget_ranks(shape, int(float(asked) * size))
        except InputError as error:
            raise InputError(f"{name}: ranks={asked} of {size:,} numbers: {error}") from error
    try:
        return check_ranks(shape, asked, clip=clip)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _make(members: list[WeightTensor], plan: Any, kind: str, *, seed: int, scale: float, init: str) -> Delta:
    weights = [weight.parameter.detach() for weight in members]
    base = weights[0] if len(members) == 1 else torch.stack(weights)
    shape = tuple(base.shape)
    if plan is None:
        update: Delta = FullDelta(shape)
    elif kind == "lora":
        rank = min(plan, shape[0], base[0].numel())
        update = LoraDelta(shape, rank, alpha=scale * rank, seed=seed)
    elif kind == "cp":
        update = CPDelta(shape, plan, scale=scale, seed=seed)
    else:
        update = TuckerDelta(shape, plan, scale=scale, init=init, base=base, seed=seed)
    padding = getattr(members[0].module, "padding_idx", None)
    if padding is not None and len(members) == 1:
        update.silence(padding)
    return update.to(device=base.device, dtype=torch.promote_types(base.dtype, torch.float32))


def _freeze(model: nn.Module) -> list[nn.Parameter]:
    """Stop the gradients of all but other adapters' parameters; those that had one."""
    others = {id(p) for module in model.modules() if isinstance(module, Adapted) for p in module.update.parameters()}
    open_ = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    for parameter in open_:
        parameter.requires_grad_(False)
    return open_


def _check_weight(weight: WeightTensor, tied: str) -> None:
    parameter = weight.parameter
    if not parameter.is_floating_point():
        raise ModelError(
            f"{weight.name} holds {parameter.dtype} numbers (quantised or complex?); only real floating point weights can be "
            "adapted, so load it in one or exclude it"
        )
    if parameter.is_meta:
        raise ModelError(f"{weight.name} is on the meta device and has no values; load the weights first")
    if weight.tied and tied != "share":
        raise ModelError(
            f"{weight.name} is the same tensor as {', '.join(weight.tied)}; an update would change both: say tied='share', or "
            "exclude it"
        )


def _check_options(kind: str, init: str, dropout: float, statistics: str, tied: str, group: object) -> None:
    for name, value, allowed in (
        ("kind", kind, _KINDS),
        ("init", init, INITS),
        ("statistics", statistics, ("freeze", "save")),
        ("tied", tied, ("refuse", "share")),
    ):
        if value not in allowed:
            raise InputError(f"{name} is one of {', '.join(allowed)}, got {value!r}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be at least 0 and below 1, got {dropout}")
    if group is not None and not isinstance(group, Mapping):
        raise InputError(f"group maps the name of each stack to patterns of its weights, got {group!r}")
    if group and kind not in ("tucker", "cp"):
        raise InputError(f'only kind="tucker" and "cp" know stacks of weights; got group with kind="{kind}"')
