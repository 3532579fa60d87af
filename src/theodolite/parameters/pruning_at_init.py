"""Which weights of an untrained network to keep: random, magnitude, SNIP, GraSP and SynFlow masks, and lottery tickets.

    random      uniform numbers                                magnitude   |w|
    snip        |w dL/dw|                                      grasp       w (H g),  g = dL/dw and H of the loss at scores / 200
    synflow     |w| dR/d|w|,  R = the sum of the scores of |W| without biases on an input of ones, again after each of many
                rounds

The largest scores of all tensors together are kept, an exact number of them. Networks are scored in eval mode and in double
precision. Comparators of parameter sharing (`theodolite.parameters.sharing`) at equal stored weights.

Source: Desai, Shrivastava, 2023, arXiv:2310.11611; Lee et al., 2019, arXiv:1810.02340 (SNIP); Wang et al., 2020,
arXiv:2002.07376 (GraSP); Tanaka et al., 2020, arXiv:2006.05467 (SynFlow); Frankle et al., 2019, arXiv:1903.01611 (rewinding).
"""

__all__ = [
    "METHODS",
    "LayerCollapseWarning",
    "LotteryTicket",
    "apply_masks",
    "lottery_ticket",
    "prune_at_init",
    "pruning_scores",
]

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import bytes_per_row, chunks
from theodolite.core.view import model_input
from theodolite.parameters.weights import weight_tensors

METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
"""The ways to score weights without training them."""

_TEMPERATURE = 200.0

Loss = Callable[[Tensor, Tensor], Tensor]
Rows = tuple[Any, Any]


class LayerCollapseWarning(UserWarning):
    """A layer has lost all its weights, so that no signal passes it."""


class _Mask(nn.Module):
    """A weight with some entries always 0."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def prune_at_init(
    model: nn.Module,
    method: str,
    compression: float,
    *,
    data: Rows | None = None,
    loss: Loss | None = None,
    rounds: int = 100,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A mask (bool, True = keep) for each Linear, Conv and Embedding weight, with floor(n / compression) kept in all.

    method: of `METHODS`. data: (x, y), tensors or arrays, needed by snip and grasp (all rows are used) and
    synflow (for the shape of a row). loss: mean loss of (scores, y), cross-entropy by default. rounds: of synflow, which
    keeps compression^(-t / rounds) after round t. seed: of random.

    Warns (`LayerCollapseWarning`) where a layer keeps no weight. Raises InputError for an unknown method, a compression
    below 1 or missing data, and ModelError where scores are not finite.

    >>> masks = prune_at_init(nn.Linear(10, 3), "magnitude", 5)
    >>> int(masks["weight"].sum())
    6
    """
    if method not in METHODS:
        raise InputError(f"method is one of {', '.join(METHODS)}, got {method!r}")
    if not (math.isfinite(compression) and compression >= 1):
        raise InputError(f"compression must be at least 1 (1 keeps everything), got {compression}")
    if rounds < 1:
        raise InputError(f"synflow needs at least one round, got {rounds}")
    steps = rounds if method == "synflow" else 1
    masks = {w.name: torch.ones_like(w.parameter, dtype=torch.bool) for w in weight_tensors(model)}
    n = sum(mask.numel() for mask in masks.values())
    last = max(1, int(n / compression))
    for step in range(1, steps + 1):
        scores = pruning_scores(model, method, data=data, loss=loss, seed=seed, masks=masks)
        kept = last if step == steps else max(last, round(n * compression ** (-step / steps)))
        masks = _largest(scores, masks, kept)
    _tell_collapse(masks)
    return masks


def pruning_scores(
    model: nn.Module,
    method: str,
    *,
    data: Rows | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """How much each weight matters by one method, float64 in the shape of the weight; options as in `prune_at_init`.

    masks: weights that are gone already.

    >>> pruning_scores(nn.Linear(2, 1), "magnitude")["weight"].shape
    torch.Size([1, 2])
    """
    names = [weight.name for weight in weight_tensors(model)]
    net = copy.deepcopy(model).double().eval()
    net.requires_grad_(True)
    weights = {name: net.get_parameter(name) for name in names}
    with torch.no_grad():
        for name, mask in (masks or {}).items():
            weights[name].mul_(mask)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(w.shape, generator=generator, dtype=torch.float64).to(w.device)
            for name, w in weights.items()
        }
    if method == "magnitude":
        return {name: weight.detach().abs() for name, weight in weights.items()}
    if data is None or len(data[0]) == 0:
        raise InputError(f"{method} looks at data: give data=(x, y) with at least one row")
    x = model_input(net, data[0])
    if method == "synflow":
        scores = _synflow(net, weights, x)
    else:
        y = model_input(None, data[1])
        if len(x) != len(y):
            raise InputError(f"need as many targets as rows, got {len(x)} rows and {len(y)} targets")
        scores = (_snip if method == "snip" else _grasp)(net, weights, x, y, loss or nn.functional.cross_entropy)
    broken = [name for name, score in scores.items() if not bool(torch.isfinite(score).all())]
    if broken:
        raise ModelError(f"the {method} scores of {', '.join(broken)} are not finite; check the weights and the data")
    return scores


def _synflow(net: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    if not x.is_floating_point():
        raise InputError(
            f"synflow feeds an input of ones, which only real-valued inputs have a meaning for; got {x.dtype}"
        )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.abs_()
            if parameter.ndim == 1 and name.endswith(
                "bias"
            ):  # what enters at a bias passes no earlier layer: all would lose theirs
                parameter.zero_()
    flow = net(torch.ones_like(x[:1], dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    return {name: (w * g).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def _mean_gradient(
    net: nn.Module, weights: list[Tensor], x: Tensor, y: Tensor, loss: Loss, against: list[Tensor] | None = None
) -> list[Tensor]:
    """Gradient of the mean loss over all rows; or the Hessian of that loss times ``against``."""
    total = [torch.zeros_like(weight) for weight in weights]
    # a second derivative keeps the graph of the first as well
    row = bytes_per_row(net, x[:1], gradients=True) * (1 if against is None else 3)
    for part in chunks(len(x), row):
        share = len(x[part]) / len(x)
        value = loss(net(x[part]), y[part]) * share
        found = torch.autograd.grad(value, weights, create_graph=against is not None, materialize_grads=True)
        if against is not None:
            product = torch.stack([(a * g).sum() for a, g in zip(against, found, strict=True)]).sum()
            found = torch.autograd.grad(product, weights, materialize_grads=True)
        for sum_, one in zip(total, found, strict=True):
            sum_ += one.detach()
    return total


def _snip(net: nn.Module, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Loss) -> dict[str, Tensor]:
    gradients = _mean_gradient(net, list(weights.values()), x, y, loss)
    return {name: (w * g).detach().abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def _grasp(net: nn.Module, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: Loss) -> dict[str, Tensor]:
    every = list(weights.values())

    def cooled(scores: Tensor, target: Tensor) -> Tensor:
        return loss(scores / _TEMPERATURE, target)

    gradients = _mean_gradient(net, every, x, y, cooled)
    products = _mean_gradient(net, every, x, y, cooled, gradients)
    return {name: (w * h).detach() for (name, w), h in zip(weights.items(), products, strict=True)}


def _largest(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The ``kept`` largest scores among the weights that are still there."""
    flat = torch.cat([scores[name].masked_fill(~mask, -math.inf).flatten() for name, mask in masks.items()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(kept).indices] = True
    pieces = chosen.split([mask.numel() for mask in masks.values()])
    return {name: piece.view(mask.shape) for (name, mask), piece in zip(masks.items(), pieces, strict=True)}


def _tell_collapse(masks: Mapping[str, Tensor]) -> None:
    gone = [name for name, mask in masks.items() if not bool(mask.any())]
    if gone:
        warnings.warn(
            f"layer collapse: no weight is left in {', '.join(gone)}; the network cannot learn through it",
            LayerCollapseWarning,
            stacklevel=3,
        )


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` whose pruned weights are 0 and stay 0 in any training (a parametrization of each tensor).

    Raises InputError for a mask of another shape or of a tensor that the model does not have.

    >>> net = apply_masks(nn.Linear(2, 1), {"weight": torch.tensor([[True, False]])})
    >>> float(net.weight[0, 1].detach().abs())
    0.0
    """
    found = {weight.name: weight for weight in weight_tensors(model)}
    for name, mask in masks.items():
        if name not in found or found[name].shape != tuple(mask.shape):
            here = f"shape {found[name].shape}" if name in found else f"only {', '.join(found)}"
            raise InputError(f"the mask of {name} has shape {tuple(mask.shape)}, the model has {here}")
    masked = copy.deepcopy(model)
    for name, mask in masks.items():
        first: Any = None
        for one in (name, *found[name].tied):
            holder, _, attribute = one.rpartition(".")
            owner = masked.get_submodule(holder)
            weight = getattr(owner, attribute)
            parametrize.register_parametrization(owner, attribute, _Mask(mask.to(weight)))
            list_: Any = owner.parametrizations[attribute]  # type: ignore[index]
            first = list_.original if first is None else first
            list_.original = first
    return masked


@dataclass(frozen=True, eq=False)
class LotteryTicket:
    """A network at its rewound weights with the masks on, ready to be trained, and the masks by tensor name."""

    model: nn.Module
    masks: dict[str, Tensor]


def lottery_ticket(
    model: nn.Module,
    fit: Callable[[nn.Module, int | None], Any],
    compression: float,
    rounds: int = 5,
    rewind_step: int = 0,
) -> LotteryTicket:
    """Train, prune the smallest weights, rewind what is left, ``rounds`` times: the sparse network that trains well.

    fit(net, steps) trains ``net`` in place for that many steps, or to the end where steps is None. rewind_step: the weights
    go back to where they were after that many steps of the first training (0: the start). After round t
    compression^(-t / rounds) of the weights are left. It trains the whole network ``rounds`` times, so unlike pruning at
    initialisation it saves nothing before its end.

    Warns (`LayerCollapseWarning`) and raises InputError as `prune_at_init` does.

    >>> ticket = lottery_ticket(nn.Linear(10, 3), lambda net, steps: None, 4, rounds=2)
    >>> int(ticket.masks["weight"].sum())
    7
    """
    if not (math.isfinite(compression) and compression >= 1):
        raise InputError(f"compression must be at least 1, got {compression}")
    if rounds < 1 or rewind_step < 0:
        raise InputError(f"need rounds >= 1 and rewind_step >= 0, got {rounds} and {rewind_step}")
    start = copy.deepcopy(model)
    if rewind_step:
        fit(start, rewind_step)
    masks = {w.name: torch.ones_like(w.parameter, dtype=torch.bool) for w in weight_tensors(start)}
    n = sum(mask.numel() for mask in masks.values())
    last = max(1, int(n / compression))
    for step in range(1, rounds + 1):
        trained = apply_masks(start, masks)
        fit(trained, None)
        size = {name: _attribute_of(trained, name).detach().abs() for name in masks}
        kept = last if step == rounds else max(last, round(n * compression ** (-step / rounds)))
        masks = _largest(size, masks, kept)
    _tell_collapse(masks)
    return LotteryTicket(apply_masks(start, masks), masks)


def _attribute_of(model: nn.Module, name: str) -> Tensor:
    holder, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(holder), attribute)
