"""The fewest coordinates in which a pretrained network can be fine-tuned to 90 % of its quality, arXiv:2012.13255, section 4."""

__all__ = ["FineTuningDimension", "fine_tuning_dimension", "pretraining_trajectory"]

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, SupportsInt

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import DataError, InputError, TrainingCollapsedError
from theodolite.core.parallel import open_pool, spread
from theodolite.core.subject import Dataset
from theodolite.parameters.finetuning_dimension.subspace import FineTuningSubspace, _heads, _inside
from theodolite.parameters.finetuning_dimension.training import (
    chance_level,
    check_fit,
    fine_tune,
    quality,
    read_part,
    scores,
)

Build = Callable[..., nn.Module]
Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class FineTuningDimension:
    """Result of `fine_tuning_dimension`; every quality is on the test rows, every choice was made on the validation rows.

    d90: the smallest tried d whose validation quality reaches threshold x that of full fine-tuning, as in the paper; None
    where none does. d90_above_chance: the smallest that reaches chance + threshold x (full - chance), which alone means
    something where a constant answer is near the first. full: full fine-tuning. head_only: the head alone trained, with
    head_parameters numbers. chance: the best constant answer. curve: test quality at each d with its best step size.
    selection: the same on the validation rows. best_learning_rate: of each d. total_dimension: parameters of the model;
    projected_parameters: those in the subspace. scales, movement: of each group at d90 (or the largest d), mean over seeds:
    lambda, and the length of its step relative to its start. random_curve, random_d90_above_chance: of the network that
    ``random_build`` made, in the same dimensions, against the same reference; None where it was not given.
    """

    d90: int | None
    d90_above_chance: int | None
    full: float
    head_only: float
    chance: float
    curve: QualityCurve
    best_learning_rate: dict[int, float]
    method: str
    groups: str
    total_dimension: int
    projected_parameters: int
    selection: QualityCurve
    head_parameters: int
    scales: dict[str, float]
    movement: dict[str, float]
    threshold: float
    metric: str
    seeds: tuple[int, ...]
    random_curve: QualityCurve | None = None
    random_d90_above_chance: int | None = None


@dataclass(frozen=True)
class _Plan:
    """What all runs of one search share."""

    parts: Parts
    metric: str
    epochs: int
    batch_size: int
    warmup: float
    options: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    validation: float
    test: float
    scales: tuple[float, ...] = ()
    movement: tuple[float, ...] = ()


def fine_tuning_dimension(
    build: Build,
    data: Dataset | Mapping[str, Mapping[str, Any]],
    *,
    method: str = "said",
    dimensions: Iterable[SupportsInt] = (10, 20, 50, 100, 200, 500, 1000, 2000),
    threshold: float = 0.9,
    metric: str = "accuracy",
    learning_rates: Sequence[float] = (1e-2, 3e-2, 1e-1, 3e-1),
    epochs: int = 20,
    batch_size: int = 16,
    seeds: Iterable[SupportsInt] = (0, 1),
    reference: float | None = None,
    full_learning_rates: Sequence[float] = (3e-5, 1e-4),
    head_learning_rates: Sequence[float] = (1e-3, 1e-2),
    warmup: float = 0.06,
    groups: str = "layer",
    projection: str = "hashed",
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = ("*embeddings*",),
    head: str | None = "classifier",
    random_build: Build | None = None,
    executor: Executor | int | None = None,
) -> FineTuningDimension:
    """Find d90: how many free directions fine-tuning this pretrained network on these data needs.

    build(seed) or build(): the pretrained network with a fresh head. data: {"train", "validation", "test"} with columns of
    tensors or arrays each, among them "labels", or a `Dataset`. Columns that ``forward`` names go in by name, others by place.
    Every d is trained with every learning rate and seed (of head, P, order and dropout); the learning rate of each d, of
    full fine-tuning and of the head alone is the one with the best mean validation quality. The hashed map's columns have
    length 1 over all tensors together, so it needs larger steps than a map for each tensor, by about the square root of
    their number. reference: a quality to stand
    for full fine-tuning, which then is not run. random_build: the same network without pretraining, as a control.
    method, groups, projection, include, exclude, head: of `FineTuningSubspace`. executor: `theodolite.core.parallel.spread`.

    Raises InputError for options that cannot be, DataError for labels that cannot be or fewer than two classes, ModelError
    for a network that cannot take the rows, and TrainingCollapsedError where full fine-tuning does not beat a constant
    answer or a loss is not finite. All but the last before any training.

    >>> from sklearn.datasets import load_iris
    >>> x, y = (torch.from_numpy(array) for array in load_iris(return_X_y=True))
    >>> rows = torch.randperm(150, generator=torch.Generator().manual_seed(0)).split(50)
    >>> columns = [{"input": x[r].float(), "labels": y[r]} for r in rows]
    >>> def build(seed):
    ...     torch.manual_seed(seed)
    ...     return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> found = fine_tuning_dimension(
    ...     build, dict(zip(("train", "validation", "test"), columns)), method="did", dimensions=(1, 20), head="2",
    ...     learning_rates=(0.1,), full_learning_rates=(0.01,), epochs=30, seeds=(0,),
    ... )
    >>> found.d90, found.projected_parameters
    (20, 131)
    """
    grid, seeds = _grid(dimensions), tuple(int(seed) for seed in seeds)
    if not 0 < threshold <= 1 or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"need 0 < threshold <= 1 and at least one seed, each once; got {threshold} and {seeds}")
    for name, rates in (
        ("learning_rates", learning_rates),
        ("full_learning_rates", full_learning_rates),
        ("head_learning_rates", head_learning_rates),
    ):
        if not rates or min(rates) <= 0:
            raise InputError(f"{name} must be at least one number above 0, got {rates}")
    options = {
        "method": method, "groups": groups, "projection": projection, "include": include, "exclude": exclude, "head": head,
    }  # fmt: skip
    plan = _Plan(_parts(data, metric), metric, epochs, batch_size, warmup, options)
    first = _start(build, seeds[0])
    for d in (grid[0], grid[-1]):  # whatever cannot be built fails before anything is trained
        wrapped = FineTuningSubspace(first, d, seed=seeds[0], **options)
    check_fit(first, plan.parts, metric)
    if random_build is not None:
        check_fit(_start(random_build, seeds[0]), plan.parts, metric)
    labels = {name: part["labels"] for name, part in plan.parts.items()}
    chance = {name: chance_level(labels[name], metric) for name in ("validation", "test")}

    with open_pool(executor) as pool:

        def best(make: Build, d: int | str, rates: Sequence[float]) -> tuple[float, list[_Run]]:
            """The learning rate with the best mean validation quality, and its runs."""
            tasks = [(make, plan, d, rate, seed) for rate in rates for seed in seeds]
            runs = spread(_run, tasks, executor=pool)
            each = [runs[i * len(seeds) : (i + 1) * len(seeds)] for i in range(len(rates))]
            found = max(range(len(rates)), key=lambda i: float(np.mean([run.validation for run in each[i]])))
            return rates[found], each[found]

        if reference is None:
            _, runs = best(build, "full", full_learning_rates)
            full = {name: float(np.mean([getattr(run, name) for run in runs])) for name in ("validation", "test")}
        else:
            full = {"validation": float(reference), "test": float(reference)}
        if not full["validation"] > chance["validation"]:
            raise TrainingCollapsedError(
                f"d90 is undefined: full fine-tuning reaches {full['validation']:.4f} and a constant answer "
                f"{chance['validation']:.4f} on the validation rows, so the reference learned nothing; try other "
                "full_learning_rates or more epochs"
            )
        head_parameters = _head_size(first, head)
        head_only = math.nan
        if head_parameters:
            head_only = float(np.mean([run.test for run in best(build, "head", head_learning_rates)[1]]))
        found = {d: best(build, d, learning_rates) for d in grid}
        controls = {} if random_build is None else {d: best(random_build, d, learning_rates) for d in grid}

    def curve(runs: dict[int, tuple[float, list[_Run]]], part: str, name: str) -> QualityCurve:
        return QualityCurve.from_runs(
            {d: [getattr(run, part) for run in made] for d, (_, made) in runs.items()},
            chance=chance[part], reference=full[part], name=name, metric=metric,
            total_dimension=wrapped.projected_parameters,
        )  # fmt: skip

    selection = curve(found, "validation", f"{method} subspace")
    d90 = selection.smallest(threshold).dimension
    at = found[grid[-1] if d90 is None else d90][1]
    control = curve(controls, "validation", "of a random start") if controls else None
    return FineTuningDimension(
        d90=d90,
        d90_above_chance=selection.smallest(threshold, above_chance=True).dimension,
        full=full["test"],
        head_only=head_only,
        chance=chance["test"],
        curve=curve(found, "test", f"{method} subspace"),
        best_learning_rate={d: rate for d, (rate, _) in found.items()},
        method=method,
        groups=groups,
        total_dimension=wrapped.total_parameters,
        projected_parameters=wrapped.projected_parameters,
        selection=selection,
        head_parameters=head_parameters,
        scales=_by_group(wrapped, [run.scales for run in at]) if method == "said" else {},
        movement=_by_group(wrapped, [run.movement for run in at]),
        threshold=threshold,
        metric=metric,
        seeds=seeds,
        random_curve=curve(controls, "test", "of a random start") if controls else None,
        random_d90_above_chance=None if control is None else control.smallest(threshold, above_chance=True).dimension,
    )


def pretraining_trajectory(
    checkpoints: Mapping[int, Build], data: Dataset | Mapping[str, Mapping[str, Any]], **options: Any
) -> pd.DataFrame:
    """d90 of each checkpoint of one pretraining run: a table with step, d90, full, d90_above_chance, head_only and chance.

    checkpoints: {step: build}, build as in `fine_tuning_dimension`, which takes the options; each checkpoint has its own
    full fine-tuning for reference unless ``reference`` is given. A d90 that no tried dimension reaches is missing (NA).
    """
    if not checkpoints:
        raise InputError("a trajectory needs at least one checkpoint")
    rows = list[dict[str, Any]]()
    for step in sorted(checkpoints):
        found = fine_tuning_dimension(checkpoints[step], data, **options)
        rows.append(
            {
                "step": step,
                "d90": found.d90,
                "full": found.full,
                "d90_above_chance": found.d90_above_chance,
                "head_only": found.head_only,
                "chance": found.chance,
                **{f"quality at {d}": float(q) for d, q in zip(found.curve.dimensions, found.curve.mean, strict=True)},
            }
        )
    return pd.DataFrame(rows).astype({"d90": "Int64", "d90_above_chance": "Int64"})


def _run(build: Build, plan: _Plan, d: int | str, lr: float, seed: int) -> _Run:
    """Fine-tune in d dimensions, or all weights ("full"), or the head alone ("head"); score what was not trained on."""
    model, what = _start(build, seed), f"d = {d}" if isinstance(d, int) else f"{d} fine-tuning"
    if isinstance(d, int):
        model = FineTuningSubspace(model, d, seed=seed, **plan.options)
    elif d == "head":
        heads = _heads(model, plan.options["head"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_inside(name, heads))
    fine_tune(
        model, plan.parts["train"], lr=lr, epochs=plan.epochs, batch_size=plan.batch_size, warmup=plan.warmup,
        metric=plan.metric, seed=seed, what=what,
    )  # fmt: skip
    validation, test = (
        quality(scores(model, part), part["labels"], plan.metric)
        for part in (plan.parts["validation"], plan.parts["test"])
    )
    if not isinstance(model, FineTuningSubspace):
        return _Run(validation, test)
    scales = () if model.scales is None else tuple(model.scales.tolist())
    return _Run(validation, test, scales, tuple(model.group_movement().values()))


def _by_group(wrapped: FineTuningSubspace, runs: Sequence[tuple[float, ...]]) -> dict[str, float]:
    return dict(zip(wrapped.group_names, np.mean(runs, axis=0).tolist(), strict=True))


def _head_size(model: nn.Module, head: str | None) -> int:
    heads = _heads(model, head)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if _inside(name, heads))


def _grid(dimensions: Iterable[SupportsInt]) -> list[int]:
    asked = list(dimensions)
    grid = [int(d) for d in asked]
    if not grid or grid != asked or sorted(set(grid)) != grid or grid[0] < 1:
        raise InputError(f"dimensions must be whole numbers from 1 that increase without repeats, got {asked}")
    return grid


def _parts(data: Any, metric: str) -> Parts:
    if isinstance(data, Dataset):
        data = {name: {"x": rows.x, "labels": rows.y} for name, rows in data.parts.items()}
    names = ("train", "validation", "test")
    if not isinstance(data, Mapping) or set(names) - set(data):
        given = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise DataError(f"data must be a Dataset or have the parts train, validation and test, got {given}")
    return {name: read_part(data[name], name, metric) for name in names}


def _start(build: Build, seed: int) -> nn.Module:
    """The network of a seed; what build draws comes from it either way."""
    try:
        inspect.signature(build).bind(seed)
    except TypeError:
        takes_seed = False
    else:
        takes_seed = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(seed) if takes_seed else build()
