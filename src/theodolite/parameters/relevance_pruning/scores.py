"""One number for each unit of a network, by relevance or by a classical criterion, from one batch of reference rows."""

__all__ = ["CRITERIA", "RankAgreement", "rank_agreement", "unit_scores"]

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError
from theodolite.core.masks import Coupling, coupled_units
from theodolite.core.masks.coupling import coupling_of
from theodolite.core.masks.trace import LAYERS, Recording, record
from theodolite.core.masks.transformers import is_transformer
from theodolite.core.view import evaluation_mode, model_input
from theodolite.parameters.relevance_pruning.relevance import (
    check_options,
    first_scores,
    relevance_of,
    row_parts,
)
from theodolite.parameters.relevance_pruning.targets import Target, read_targets
from theodolite.parameters.relevance_pruning.transformers import transformer_gradients, transformer_relevance
from theodolite.parameters.weights import as_patterns, matches

CRITERIA = ("lrp", "weight", "taylor", "gradient", "random")


def unit_scores(
    model: nn.Module,
    data: object,
    *,
    criterion: str = "lrp",
    layers: Iterable[str] | str | None = None,
    rule: str | Mapping[str, str] = "zplus",
    start: str = "logit",
    abs: bool = False,
    seed: int = 0,
    memory: int | None = None,
) -> dict[str, Tensor]:
    """Scores (n_units,) of every layer that has a removable unit; the lowest is the first to go.

    data: (X, y) or a loader of such pairs; the reference rows with their true classes. criterion, with z a layer's output
    before its activation (after a batch norm that follows) and L the cross-entropy (of a regression the squared error):

        lrp       sum of the relevance R of the output over rows and positions (see `relevance`)
        taylor    | mean over rows and positions of z dL/dz |, divided by the layer's Euclidean norm
        gradient  | mean over rows and positions of dL/dz |, likewise
        weight    sum of |w| over the unit's incoming weights, divided by the layer's sum
        random    uniform numbers from ``seed``

    layers: names or patterns, None for all. rule, start: of lrp. abs: sum |R| in place of R. Runs in eval mode and puts the
    mode back. Of a Hugging Face transformer the units are the hidden numbers of its MLPs, and X and y are as in `relevance`;
    a unit's score stands at the layer that writes it linearly (with "weight" and "random" at every layer that writes it).

    Warns where a class has no reference row. Raises DataError for no rows or labels that are no class, InputError for an
    unknown criterion or layer, and what `relevance` raises.
    Source: Yeom et al., 2021, arXiv:1912.08881; Molchanov et al., 2017, arXiv:1611.06440 (taylor).

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    >>> unit_scores(net, (torch.eye(2), [0, 1]), criterion="weight")["0"]
    tensor([0.2500, 0.7500])
    """
    if criterion not in CRITERIA:
        raise InputError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    check_options(model, rule, start)
    batches = list(_batches(model, data))
    if criterion in ("weight", "random"):
        modules: dict[str, Any] = dict(model.named_modules())
        names = _chosen(coupled_units(model, None if is_transformer(model) else batches[0][0][:1]), layers)
        if criterion == "weight":
            total = {name: _incoming(modules[name]) for name in names}
            return {name: _divided(score, float(score.sum())) for name, score in total.items()}
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(len(_incoming(modules[name])), generator=generator) for name in names}
    parts = _transformer_parts if is_transformer(model) else _network_parts
    total, names = dict[str, Tensor](), None
    for coupling, found in parts(model, batches, criterion, rule=rule, start=start, absolute=abs, memory=memory):
        if coupling is not None:
            names = _chosen(coupling, layers)
        for name in found.keys() & set(names or ()):
            total[name] = total[name] + found[name] if name in total else found[name]
    in_order = {name: total[name] for name in names or () if name in total}
    if criterion == "lrp":
        return {name: score.float() for name, score in in_order.items()}
    return {name: _divided(score.abs().float(), float(score.norm())) for name, score in in_order.items()}


def _batches(model: nn.Module, data: Any) -> Iterator[tuple[Any, Any]]:
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (tuple, list))
    some = False
    for batch in [data] if pair else data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"data must be (X, y) or a loader of such pairs, got {type(batch).__name__}")
        x = batch[0] if isinstance(batch[0], Mapping) else model_input(model, batch[0])
        if len(x) > 0:
            some = True
            yield x, batch[1]
    if not some:
        raise DataError("need at least one reference row, got none")


def _chosen(coupling: Coupling, layers: Iterable[str] | str | None) -> list[str]:
    prunable, patterns = coupling.prunable, as_patterns(layers)
    names = [name for name in prunable if patterns is None or matches(name, patterns)]
    if not names:
        why = "; ".join(f"{name}: {reason}" for name, reason in coupling.fixed.items())
        raise InputError(
            f"no layer with removable units is left (layers={patterns}, there are {', '.join(prunable) or 'none'}; {why})"
        )
    return names


def _warn_of_missing_classes(model: nn.Module, batches: list[tuple[Tensor, Any]]) -> None:
    scores = first_scores(model, batches[0][0])
    targets = [read_targets(y, scores, len(x)).labels for x, y in batches]
    labels = [t for t in targets if t is not None]
    if not labels:
        return
    classes = max(2, scores.shape[1] if scores.ndim == 2 else 1)
    missing = sorted(set(range(classes)) - set(torch.cat(labels).unique().tolist()))
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        warnings.warn(f"{len(missing)} of {classes} classes have no reference row: {shown}", stacklevel=4)


def _incoming(layer: Any) -> Tensor:
    return layer.weight.detach().float().abs().flatten(1).sum(dim=1)


def _divided(score: Tensor, by: float) -> Tensor:
    return score / by if by > 0 else score


def _per_unit(tensor: Tensor, layer: nn.Module | None) -> Tensor:
    """Sum over positions, and in double precision over rows."""
    axis = tensor.ndim - 1 if isinstance(layer, nn.Linear) else 1
    positions = [d for d in range(1, tensor.ndim) if d != axis]
    return (tensor.sum(dim=positions) if positions else tensor).double().sum(dim=0)


_Parts = Iterator[tuple[Coupling | None, dict[str, Tensor]]]
"""For each chunk of rows the sums of each unit, in double precision; with the first chunk how the units hang together."""


def _network_parts(
    model: nn.Module,
    batches: list[tuple[Any, Any]],
    criterion: str,
    *,
    memory: int | None,
    absolute: bool,
    **options: Any,
) -> _Parts:
    _warn_of_missing_classes(model, batches)
    gradients, first = criterion != "lrp", True
    for x, y in batches:
        target = read_targets(y, first_scores(model, x), len(x))
        for part in row_parts(model, x, memory):
            with evaluation_mode(model), torch.set_grad_enabled(gradients):
                recording = record(model, x[part], leaves=gradients)
                if gradients:
                    found = _gradient_sums(recording, target[part], times_output=criterion == "taylor")
                else:
                    found = _relevance_sums(recording, target[part], absolute=absolute, **options)
            yield coupling_of(recording) if first else None, found
            first = False


def _relevance_sums(
    recording: Recording, target: Target, *, rule: str | Mapping[str, str], start: str, absolute: bool
) -> dict[str, Tensor]:
    modules = {op.name: op.module for op in recording.operations if isinstance(op.module, LAYERS)}
    total = dict[str, Tensor]()
    for key, R in relevance_of(recording, target.start(recording.output.meta["value"], start), rule).items():
        name = key.split("@")[0]
        if name in modules:
            part = _per_unit(R.abs() if absolute else R, modules[name])
            total[name] = total[name] + part if name in total else part
    return total


def _gradient_sums(recording: Recording, target: Target, *, times_output: bool) -> dict[str, Tensor]:
    """Sums of dL/dz or z dL/dz; where the mean over positions is meant the sum is the same up to a factor of the layer."""
    norms, total = recording.joined_norms(), dict[str, Tensor]()
    steps = [op for op in recording.operations if isinstance(op.module, LAYERS)]
    outputs = [norms.get(op.node, op).value for op in steps]
    loss = target.loss(recording.output.meta["value"])
    gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    for op, z, g in zip(steps, outputs, gradients, strict=True):
        g = torch.zeros_like(z) if g is None else g
        each = _per_unit(z.detach() * g if times_output else g, op.module)
        total[op.name] = total[op.name] + each if op.name in total else each
    return total


def _transformer_parts(
    model: nn.Module,
    batches: list[tuple[Any, Any]],
    criterion: str,
    *,
    rule: object,
    start: str,
    absolute: bool,
    memory: int | None,
) -> _Parts:
    coupling: Coupling | None = coupled_units(model)
    for x, y in batches:
        if criterion == "lrp":
            found = transformer_relevance(model, x, y, start=start, memory=memory)
            sums = ({name: R.abs() if absolute else R for name, R in piece.items()} for piece in found)
        else:
            pairs = transformer_gradients(model, x, y, memory=memory)
            times = criterion == "taylor"
            sums = ({name: z * g if times else g for name, (z, g) in piece.items()} for piece in pairs)
        for piece in sums:
            yield coupling, {name: value.double().flatten(0, -2).sum(dim=0) for name, value in piece.items()}
            coupling = None


@dataclass(frozen=True)
class RankAgreement:
    """How far two rankings of the same units agree.

    spearman, kendall: rank correlations. first, last: for each k the share of the k lowest (highest) units that both have.
    units: how many were ranked.
    """

    spearman: float
    kendall: float
    first: dict[int, float]
    last: dict[int, float]
    units: int


def rank_agreement(
    scores_a: Mapping[str, Tensor], scores_b: Mapping[str, Tensor], k: Iterable[int] = (125, 250, 500, 1000)
) -> RankAgreement:
    """Agreement of two sets of scores over the units of all layers together; each k below the number of units is used.

    Raises InputError where the two have other layers, or one ranks nothing because its scores are all the same.

    >>> a = {"0": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    >>> rank_agreement(a, {"0": torch.tensor([2.0, 1.0, 3.0, 4.0])}, k=[1, 2]).first
    {1: 0.0, 2: 1.0}
    """
    if scores_a.keys() != scores_b.keys() or any(scores_a[n].shape != scores_b[n].shape for n in scores_a):
        raise InputError(f"both must score the same units, got layers {list(scores_a)} and {list(scores_b)}")
    a, b = (np.concatenate([s[n].detach().cpu().double().numpy() for n in scores_a]) for s in (scores_a, scores_b))
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0 or not math.isfinite(a.sum() + b.sum()):
        raise InputError("both rankings need at least two units with different, finite scores")
    order_a, order_b = np.argsort(a, kind="stable"), np.argsort(b, kind="stable")
    sizes = [size for size in k if 0 < size < len(a)]
    return RankAgreement(
        float(np.asarray(stats.spearmanr(a, b))[0]),
        float(np.asarray(stats.kendalltau(a, b))[0]),
        {size: len(np.intersect1d(order_a[:size], order_b[:size])) / size for size in sizes},
        {size: len(np.intersect1d(order_a[-size:], order_b[-size:])) / size for size in sizes},
        len(a),
    )
