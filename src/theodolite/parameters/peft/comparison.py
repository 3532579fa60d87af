"""Methods beside each other at equal budgets, and what each design choice was worth.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366, section 4.
"""

__all__ = [
    "LabelledTexts",
    "Task",
    "compare",
    "design_effects",
    "pareto_front",
    "quality_against_parameters",
    "tokenized",
    "train_steps",
]

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.estimate import mean_of_runs
from theodolite.core.view import evaluation_mode
from theodolite.parameters.peft.model import apply
from theodolite.parameters.peft.modification import Modification, named, resolve


@runtime_checkable
class Task(Protocol):
    """What methods are compared on: how to train on it and how good a model is at it, larger is better."""

    def fit(self, model: nn.Module, *, epochs: int, learning_rate: float, seed: int) -> Any:
        """Train the parameters of ``model`` that require gradients, in place."""
        ...

    def quality(self, model: nn.Module, part: str) -> float:
        """Quality on the part "validation" or "test"."""
        ...


def train_steps(
    model: nn.Module, loss: Callable[[int], Tensor], steps: int, *, learning_rate: float, warmup: float = 0.06,
    weight_decay: float = 0.0, clip: float | None = 1.0, decay: bool = True,
) -> list[float]:  # fmt: skip
    """Train what requires gradients, by AdamW with warm-up and, where ``decay``, linear decay to 0.

    loss(step) is the loss of that step's batch.

    Returns the losses. Raises TrainingCollapsedError where one is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    losses = list[float]()
    for step in range(steps):
        rate = min(1.0, (step + 1) / max(1.0, warmup * steps)) * ((1 - step / steps) if decay else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainingCollapsedError(
                f"the loss became {losses[-1]} at step {step + 1}; try a smaller step size than {learning_rate}"
            )
    return losses


def tokenized(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> dict[str, Tensor]:
    """input_ids and attention_mask of texts, padded to the longest and cut at ``max_length`` tokens.

    Warns where more than a fifth of all tokens is cut.
    """
    whole = tokenizer(list(texts), truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    lengths = np.array([len(ids) for ids in whole])
    cut = float(np.maximum(lengths - max_length, 0).sum() / max(1, lengths.sum()))
    if cut > 0.2:
        warnings.warn(f"max_length={max_length} cuts {cut:.0%} of the tokens", UserWarning, stacklevel=2)
    batch = tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Inputs of a model with their classes in three disjoint parts, and how they are trained on: the `Task` of classifiers.

    train, validation, test: (dict of inputs with one row per example, classes (n,)). The model gives scores (n, classes),
    as a tensor or as ``logits``. Quality is accuracy. The paper's settings are the defaults but for the batch size.

    Raises InputError for missing or wrong labels, DataError for empty parts.
    """

    train: tuple[Mapping[str, Tensor], Any]
    validation: tuple[Mapping[str, Tensor], Any]
    test: tuple[Mapping[str, Tensor], Any]
    batch_size: int = 16
    weight_decay: float = 0.1
    warmup: float = 0.06

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            inputs, labels = getattr(self, part)
            if not isinstance(labels, Tensor) or labels.dtype != torch.long or labels.ndim != 1:
                raise InputError(f"the {part} part needs its labels as class numbers (n,), torch.long; got {labels!r}")
            if len(labels) == 0:
                raise DataError(f"the {part} part has no rows")
            if any(len(value) != len(labels) for value in inputs.values()):
                raise InputError(f"the {part} part has {len(labels)} labels but another number of inputs")

    def fit(self, model: nn.Module, *, epochs: int, learning_rate: float, seed: int) -> list[float]:
        """Train by cross-entropy; the losses of all steps."""
        inputs, labels = self.train
        order = torch.Generator().manual_seed(seed)
        rows = [
            part for _ in range(epochs) for part in torch.randperm(len(labels), generator=order).split(self.batch_size)
        ]

        def loss(step: int) -> Tensor:
            at = rows[step]
            return F.cross_entropy(_logits(model(**_rows(inputs, at))), labels[at])

        model.train()
        with torch.random.fork_rng(devices=[]):  # dropout of the model
            torch.manual_seed(seed)
            losses = train_steps(
                model, loss, len(rows), learning_rate=learning_rate, warmup=self.warmup, weight_decay=self.weight_decay
            )
        model.eval()
        return losses

    def quality(self, model: nn.Module, part: str) -> float:
        """Accuracy on a part."""
        inputs, labels = getattr(self, part)
        with torch.no_grad(), evaluation_mode(model):
            right = [
                (_logits(model(**_rows(inputs, at))).argmax(dim=1) == labels[at])
                for at in torch.arange(len(labels)).split(64)
            ]
        return float(torch.cat(right).double().mean())


def _rows(inputs: Mapping[str, Tensor], at: Tensor) -> dict[str, Tensor]:
    """Rows of a batch, without columns that are padding in all of them."""
    batch = {name: value[at] for name, value in inputs.items()}
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return batch
    used = mask.any(dim=0)
    return {name: value[:, used] if value.shape == mask.shape else value for name, value in batch.items()}


def _logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def compare(
    model_factory: Callable[..., nn.Module],
    data: Task,
    methods: Sequence[object] | Mapping[str, object],
    *,
    budgets: Sequence[float | int | None] = (None,),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 3,
    learning_rates: Sequence[float] | Mapping[str, Sequence[float]] = (1e-3,),
    on_run: Callable[[str, float | int | None, int, float], Any] | None = None,
) -> pd.DataFrame:
    """Train each method at each budget and seed, at the step size that validates best, and test it.

    model_factory(seed): the pretrained model with a fresh head. methods: names, modifications or lists, or {name: method}. A
    method may also be a function (model, budget, seed) -> model, so that a low-rank, shared, pruned or random-subspace model
    is trained and drawn beside the others: what requires gradients in what it returns is trained and counted; where fewer
    numbers are kept than trained, it returns (model, numbers kept).
    budgets: as in `apply`; None is the method's own size; methods without a bottleneck run once. learning_rates: for all, or
    {method: rates, "": rates of the others}. on_run(method, budget, seed, rate) is called before each training.

    Columns: method, budget, parameters (of `apply` without the head), share, quality and std over seeds on the test part,
    seconds of one training, learning_rate, runs (one test quality per seed), modifications (() for a function).
    """
    if not isinstance(methods, Mapping):
        methods = {getattr(one, "__name__", "function") if callable(one) else named(one): one for one in methods}
    named_methods = dict(methods)
    if not named_methods or not len(seeds):
        raise InputError("need at least one method and one seed")
    rows = []
    for name, method in named_methods.items():
        rates = learning_rates
        if isinstance(rates, Mapping):
            rates = rates.get(name, rates.get("", ()))
        if not len(rates):
            raise InputError(f"no learning rate is given for {name}; add learning_rates[''] for all that are not named")
        sized = callable(method) or any(m.hidden or m.where == "input" for m in resolve(method))
        for budget in budgets if sized else (None,):
            rows.append(_compared(model_factory, data, name, method, budget, list(seeds), epochs, list(rates), on_run))
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class _Made:
    """A model that is ready to be trained, and what its method keeps."""

    model: nn.Module
    parameters: int
    share: float
    modifications: tuple[Modification, ...] = ()


def _made(model: nn.Module, method: Any, budget: float | int | None, seed: int, *, check: bool) -> _Made:
    if not callable(method):
        made = apply(model, method, budget=budget, seed=seed, probe=None if check else False)
        return _Made(made, made.parameter_count.method, made.parameter_count.share, made.modifications)
    total = sum(p.numel() for p in model.parameters())
    found = method(model, budget, seed)
    made, kept = found if isinstance(found, tuple) else (found, None)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"a method's function must return a model, or (model, numbers kept); got {type(made).__name__}"
        )
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    if trained == 0:
        raise ModelError("a method's function returned a model in which nothing requires gradients")
    kept = trained if kept is None else int(kept)
    return _Made(made, kept, kept / total)


def _compared(
    factory: Callable[..., nn.Module], data: Task, name: str, method: object, budget: float | int | None,
    seeds: list[int], epochs: int, rates: list[float], on_run: Callable[..., Any] | None,
) -> dict[str, Any]:  # fmt: skip
    checked, tested, seconds = [], [], []
    made = None
    for rate in rates:
        checked.append([])
        tested.append([])
        for seed in seeds:
            if on_run is not None:
                on_run(name, budget, seed, rate)
            made = _made(factory(seed), method, budget, seed, check=seed == seeds[0])
            began = time.perf_counter()
            data.fit(made.model, epochs=epochs, learning_rate=rate, seed=seed)
            seconds.append(time.perf_counter() - began)
            if len(rates) > 1:
                checked[-1].append(data.quality(made.model, "validation"))
            tested[-1].append(data.quality(made.model, "test"))
    best = int(np.argmax([np.mean(one) for one in checked])) if len(rates) > 1 else 0
    if made is None:
        raise InputError("nothing was trained")
    return {
        "method": name, "budget": budget, "parameters": made.parameters, "share": made.share,
        "quality": float(np.mean(tested[best])), "std": float(np.std(tested[best])), "seconds": float(np.mean(seconds)),
        "learning_rate": rates[best], "runs": tuple(tested[best]), "modifications": made.modifications,
    }  # fmt: skip


def quality_against_parameters(
    results: object, *, chance: float, reference: float, metric: str = "accuracy", total: int | None = None
) -> dict[str, QualityCurve]:
    """One curve of quality against the numbers kept for each method of a table, so that all can be drawn on one axis.

    results: from `compare`, or any table with the columns method, parameters and runs (qualities, larger is better).
    chance: quality of no numbers at all; reference: of all of them; total: how many those are. Rows of one method with the
    same parameters are pooled; methods that keep nothing are left out, since they are what chance stands for.

    Raises InputError for another table, and where no method keeps anything.

    >>> table = pd.DataFrame({"method": ["lora", "lora"], "parameters": [8, 32], "runs": [(0.6,), (0.8,)]})
    >>> quality_against_parameters(table, chance=0.5, reference=0.8)["lora"].smallest().dimension
    32
    """
    if not isinstance(results, pd.DataFrame) or {"method", "parameters", "runs"} - set(results.columns):
        raise InputError("results must be a table with the columns method, parameters and runs, as compare makes")
    runs = dict[str, dict[int, list[float]]]()
    for row in results.to_dict("records"):
        if row["parameters"] > 0:
            runs.setdefault(str(row["method"]), {}).setdefault(int(row["parameters"]), []).extend(row["runs"])
    if not runs:
        raise InputError("no method of these results keeps any number")
    about: dict[str, Any] = {"chance": chance, "reference": reference, "metric": metric, "total_dimension": total}
    return {name: QualityCurve.from_runs(found, name=name, **about) for name, found in runs.items()}


def pareto_front(curves: Mapping[str, QualityCurve]) -> list[tuple[str, int, float]]:
    """(method, numbers kept, mean quality) of the points that no point with as few numbers reaches, from few numbers to many.

    >>> made = lambda runs: QualityCurve.from_runs(runs, chance=0.0, reference=1.0)
    >>> pareto_front({"a": made({4: [0.5], 9: [0.6]}), "b": made({4: [0.4], 8: [0.9]})})
    [('a', 4, 0.5), ('b', 8, 0.9)]
    """
    points = [(d, -q, name) for name, c in curves.items() for d, q in zip(c.dimensions, c.mean.tolist(), strict=True)]
    front = list[tuple[str, int, float]]()
    for size, loss, name in sorted(points):
        if not front or -loss > front[-1][2]:
            front.append((name, size, -loss))
    return front


_DIMENSIONS = {
    "insertion": ("parallel", "sequential", "after_norm"),
    "where": ("ffn", "attention", "heads", "query", "key", "value"),
    "composition": ("scale", "learned_scale", "gate", "add"),
    "form": ("relu", "identity", "softmax"),
}
_CLOSE = 0.05


def design_effects(results: object) -> pd.DataFrame:
    """What each design choice was worth: mean differences between methods that differ in that choice alone.

    results: from `compare`. Two rows are a pair where their parameter counts are within 5 % and all their modifications
    agree but for one dimension. Columns: dimension, level ("parallel - sequential"), effect, interval (95 %, over seeds),
    pairs. Raises InputError where no pair is found.
    """
    if not isinstance(results, pd.DataFrame) or {"modifications", "runs", "parameters"} - set(results.columns):
        raise InputError("results must be a table that compare has made")
    found = dict[tuple[str, str], list[np.ndarray]]()
    rows = [row for row in results.to_dict("records") if row["modifications"]]
    for a in rows:
        for b in rows:
            levels = [(_level(a, d), _level(b, d)) for d in _DIMENSIONS]
            changed = [at for at, (one, other) in enumerate(levels) if one != other]
            near = abs(a["parameters"] - b["parameters"]) <= _CLOSE * min(a["parameters"], b["parameters"])
            if len(changed) != 1 or not near or len(a["runs"]) != len(b["runs"]):
                continue
            dimension = list(_DIMENSIONS)[changed[0]]
            one, other = levels[changed[0]]
            order = _DIMENSIONS[dimension]
            if one in order and other in order and order.index(one) < order.index(other):
                difference = np.subtract(a["runs"], b["runs"])
                found.setdefault((dimension, f"{one} - {other}"), []).append(difference)
    if not found:
        raise InputError(
            "no two methods of about the same size differ in one choice alone; compare, for example, "
            "Modification(insertion='parallel') and Modification(insertion='sequential')"
        )
    table = []
    for (dimension, level), pairs in found.items():
        effect = mean_of_runs(np.mean(pairs, axis=0))
        table.append({
            "dimension": dimension, "level": level, "effect": effect.value, "interval": (effect.low, effect.high),
            "pairs": len(pairs),
        })  # fmt: skip
    return pd.DataFrame(table)


def _level(row: Mapping[Any, Any], dimension: str) -> Any:
    """The level that all modifications of a row share, or all of them."""
    modifications: tuple[Modification, ...] = row["modifications"]
    levels = tuple(dict.fromkeys(getattr(m, dimension) for m in modifications))
    return levels[0] if len(levels) == 1 else levels
