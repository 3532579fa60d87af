"""Pruning by a criterion in steps, and all criteria side by side."""

__all__ = ["CriteriaComparison", "PruningResult", "RelevancePruner", "compare_criteria", "draw_reference"]

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.masks import UnitMask, coupled_units, footprint, prune_units, remove_units
from theodolite.core.masks.transformers import is_transformer
from theodolite.core.parallel import seeds_for
from theodolite.core.train import Recipe, train
from theodolite.core.view import ModelView, model_input
from theodolite.parameters.relevance_pruning.relevance import first_scores
from theodolite.parameters.relevance_pruning.scores import CRITERIA, unit_scores
from theodolite.parameters.relevance_pruning.targets import as_targets, read_targets
from theodolite.parameters.weights import as_patterns, matches

_COLUMNS = ["criterion", "fraction_units", "fraction_params", "fraction_macs", "accuracy", "loss"]


@dataclass(frozen=True, eq=False)
class PruningResult:
    """What is left of a network.

    model: the smaller network, in eval mode. mask: the same in the original's numbers. curve: one row a step with
    criterion, fractions of units, parameters and multiply-adds that are gone, accuracy and loss (of a regression R2 and
    half the mean squared error). scores: of the original's units. reference: indices of the rows that were scored on;
    n_reference: how many. was_training: the network was given in train mode (it was scored in eval mode). seconds: taken.
    """

    model: nn.Module
    mask: UnitMask
    curve: pd.DataFrame
    scores: dict[str, Tensor]
    reference: np.ndarray
    n_reference: int
    was_training: bool
    seconds: float

    def quality_curve(self, *, chance: float) -> QualityCurve:
        """Quality against the number of units kept, with that of the whole network as the reference."""
        total = self.mask.total
        kept = [round(total * (1 - gone)) for gone in self.curve["fraction_units"]]
        runs = {k: [q] for k, q in zip(kept, self.curve["accuracy"], strict=True)}
        reference = float(self.curve["accuracy"].iloc[0])
        return QualityCurve.from_runs(runs, chance=chance, reference=reference, name="units", total_dimension=total)


@dataclass(frozen=True)
class RelevancePruner:
    """Removes the units of the lowest score, a few at a time, and scores anew after each step.

    criterion: of `unit_scores`. amount: units to remove, a number or a share. step: share of the original units that go
    before they are scored again, None for all at once. n_per_class: reference rows of each class (of a regression: rows).
    fine_tune: a training recipe, or a function of the smaller network, used after each step; None for no training.
    seed: draw of the reference rows. layers: that may lose units, by name or pattern (amount and step count the units of
    these). rule, start, abs: of lrp.

    Source: Yeom et al., 2021, arXiv:1912.08881, algorithm 1.

    >>> import torch
    >>> torch.manual_seed(0) and None
    >>> net = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 2))
    >>> x = torch.randn(100, 2)
    >>> result = RelevancePruner(amount=0.5, step=0.25).fit(net, x, (x[:, 0] > 0).long())
    >>> result.model[0].out_features, result.curve["fraction_units"].tolist()
    (10, [0.0, 0.25, 0.5])
    """

    criterion: str = "lrp"
    amount: float = 0.3
    step: float | None = 0.05
    n_per_class: int = 10
    fine_tune: Recipe | Callable[[nn.Module], object] | None = None
    seed: int = 0
    layers: Sequence[str] | str | None = None
    rule: Any = "zplus"
    start: str = "logit"
    abs: bool = False

    def fit(self, model: nn.Module, X: object, y: object, *, test: tuple[Any, Any] | None = None) -> PruningResult:
        """Prune a copy of ``model``; X: (n, ...) rows, y: (n,) classes or values.

        The reference rows (and with fine_tune the training rows) come from X; accuracy is measured on test, or on the
        rows of X that are no reference rows.
        """
        began = time.perf_counter()
        if self.step is not None and not 0 < self.step < 1:
            raise InputError(f"step must be a share between 0 and 1, or None, got {self.step}")
        if self.fine_tune is not None and test is None:
            raise InputError("with fine_tune the accuracy needs rows of its own; give test=(X, y)")
        _refuse_transformers(model)
        x, labels = _read(model, X, y)
        chosen = draw_reference(labels, self.n_per_class, seed=self.seed)
        rest = np.setdiff1d(np.arange(len(x)), chosen)
        if test is None and len(rest) == 0:
            raise DataError("every row is a reference row, so none is left to measure accuracy on; give test=(X, y)")
        held_out = (x[rest], labels[rest]) if test is None else _read(model, *test)
        steps = self._steps(_candidates(model, x[:1], self.layers))
        reference = (x[chosen], labels[chosen])
        smaller: nn.Module = model
        mask, first, rows = None, dict[str, Tensor](), [_measured(model, model, self.criterion, 0.0, held_out)]
        for i, n in enumerate(steps):
            scores = self._scores(smaller, reference, seed=self.seed + i, warn=i == 0)
            first = first or scores
            found = prune_units(smaller, scores, amount=n, example_input=x[:1])
            smaller = remove_units(smaller, found, x[:1])
            mask = found if mask is None else mask.then(found)
            self._train(smaller, x, labels)
            rows.append(_measured(model, smaller, self.criterion, mask.fraction, held_out))
        if mask is None:
            raise InputError(f"amount={self.amount} removes no unit")
        curve = pd.DataFrame(rows, columns=pd.Index(_COLUMNS))
        seconds = time.perf_counter() - began
        return PruningResult(smaller.eval(), mask, curve, first, chosen, len(chosen), model.training, seconds)

    def _steps(self, units: int) -> list[int]:
        """How many units go in each step."""
        number = isinstance(self.amount, Integral)
        target = int(self.amount) if number else round(self.amount * units)
        if not 0 < target < units or (not number and self.amount >= 1):
            raise InputError(
                f"amount={self.amount} of {units} units; give a number from 1 to {units - 1}, or a share below 1"
            )
        each = target if self.step is None else max(1, round(self.step * units))
        return [min(each, target - done) for done in range(0, target, each)]

    def _scores(
        self, model: nn.Module, reference: tuple[Tensor, Tensor], *, seed: int, warn: bool
    ) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            if not warn:
                warnings.filterwarnings("ignore", message=".*no reference row.*")
            return unit_scores(
                model, reference, criterion=self.criterion, layers=self.layers, rule=self.rule, start=self.start,
                abs=self.abs, seed=seed,
            )  # fmt: skip

    def _train(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(self.fine_tune, Recipe):
            train(model, x, y, recipe=self.fine_tune)
        elif self.fine_tune is not None:
            self.fine_tune(model)


def _refuse_transformers(model: nn.Module) -> None:
    if is_transformer(model):
        raise ModelError(
            f"{type(model).__name__} is a transformer, which is pruned with unit_scores, prune_units and remove_units; what "
            "is left of it is measured by its own loss"
        )


def _read(model: nn.Module, X: object, y: object) -> tuple[Tensor, Tensor]:
    """Rows and their targets as tensors, once the network is seen to take them."""
    x = model_input(model, X)
    first_scores(model, x)
    return x, as_targets(y)


def _candidates(model: nn.Module, example: Tensor, layers: Iterable[str] | str | None) -> int:
    """How many units have a member in the chosen layers."""
    coupling, patterns = coupled_units(model, example), as_patterns(layers)
    chosen = [coupling.rows[name] for name in coupling.prunable if patterns is None or matches(name, patterns)]
    return len({unit for rows in chosen for unit in rows.tolist() if unit >= 0})


def draw_reference(y: object, n_per_class: int, *, seed: int) -> np.ndarray:
    """Indices of n_per_class rows of each class (all where there are fewer), or of that many rows of a regression.

    >>> len(draw_reference([0, 0, 0, 1], 2, seed=0))
    3
    """
    labels = as_targets(y).cpu()
    if n_per_class < 1 or len(labels) == 0:
        raise DataError(f"need at least one reference row a class, got {n_per_class} of {len(labels)} rows")
    rng = np.random.default_rng(seed)
    groups = [np.arange(len(labels))]
    if not labels.is_floating_point():
        groups = [np.flatnonzero(labels.numpy() == c) for c in np.unique(labels.numpy())]
    return np.sort(np.concatenate([rng.permutation(rows)[:n_per_class] for rows in groups]))


def _measured(
    original: nn.Module, smaller: nn.Module, criterion: str, gone: float, rows: tuple[Tensor, ...]
) -> tuple[str, float, float, float, float, float]:
    """One row of the curve."""
    x, y = rows
    scores = ModelView(smaller, output="raw")(x)
    target = read_targets(y, scores, len(x))
    loss = float(target.loss(scores)) / len(x)
    if target.labels is None:
        wrong, spread = (scores[:, 0] - y).square().sum(), (y - y.mean()).square().sum()
        quality = 1 - float(wrong) / float(spread) if float(spread) > 0 else 0.0
    else:
        predicted = scores.argmax(dim=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()
        quality = float((predicted == target.labels).double().mean())
    before, after = footprint(original, x[:1]), footprint(smaller, x[:1])
    parameters, macs = 1 - after.parameters / before.parameters, 1 - after.macs / before.macs
    return criterion, gone, parameters, macs, quality, loss


@dataclass(frozen=True, eq=False)
class CriteriaComparison:
    """Criteria side by side.

    table: a row for each criterion and amount: means over draws of the columns of `PruningResult.curve`, accuracy_sd and
    loss_sd (NaN for one draw). runs: a row for each draw.
    """

    table: pd.DataFrame
    runs: pd.DataFrame

    def winner(self, amount: float) -> str:
        """The criterion of the highest mean accuracy at one amount; the first in order among equals."""
        rows = [row for row in self.table.to_dict("records") if row["amount"] == amount]
        if not rows:
            raise InputError(f"amount {amount} was not compared; there are {sorted(set(self.table['amount']))}")
        return str(max(rows, key=lambda row: row["accuracy"])["criterion"])


def compare_criteria(
    model: nn.Module,
    reference: tuple[Any, Any],
    test: tuple[Any, Any],
    amounts: Iterable[float],
    repeats: int = 5,
    *,
    criteria: Sequence[str] = CRITERIA,
    n_per_class: int = 10,
    layers: Iterable[str] | str | None = None,
    rule: Any = "zplus",
    start: str = "logit",
    seed: int = 0,
) -> CriteriaComparison:
    """Every criterion at every amount, removed at once, over ``repeats`` draws of the reference rows.

    reference: rows to draw n_per_class of each class from; test: rows that accuracy is measured on. The draws are the same
    for all criteria. layers: that may lose units; an amount counts theirs. Amount 0 is the whole network.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y = torch.randn(40, 2), torch.arange(40) % 2
    >>> compared = compare_criteria(net, (x, y), (x, y), [0.25, 0.5], repeats=2, criteria=["lrp", "weight"])
    >>> len(compared.table), len(compared.runs)
    (4, 8)
    """
    amounts = list(amounts)
    unknown = [name for name in criteria if name not in CRITERIA]
    if unknown or repeats < 1 or not amounts:
        raise InputError(
            f"need criteria from {', '.join(CRITERIA)}, at least one amount and repeats >= 1; "
            f"got {list(criteria)}, {amounts}, {repeats}"
        )
    _refuse_transformers(model)
    x, y = _read(model, *reference)
    held_out = _read(model, *test)
    rows, weight = [], list[tuple[Any, ...]]()
    for draw, draw_seed in enumerate(seeds_for(seed, repeats)):
        chosen = draw_reference(y, n_per_class, seed=draw_seed)
        for criterion in criteria:
            if criterion == "weight" and weight:  # it looks at no row, so every draw is as the first
                rows += [(*row[:-1], draw) for row in weight]
                continue
            with warnings.catch_warnings():
                if draw > 0:
                    warnings.filterwarnings("ignore", message=".*no reference row.*")
                scores = unit_scores(
                    model,
                    (x[chosen], y[chosen]),
                    criterion=criterion,
                    layers=layers,
                    rule=rule,
                    start=start,
                    seed=draw_seed,
                )
            found = []
            for amount in amounts:
                mask = prune_units(model, scores, amount=amount, example_input=x[:1])
                smaller = remove_units(model, mask)
                found.append((*_measured(model, smaller, criterion, mask.fraction, held_out), amount, draw))
            rows += found
            weight = found if criterion == "weight" else weight
    runs = pd.DataFrame(rows, columns=pd.Index([*_COLUMNS, "amount", "draw"]))
    grouped = runs.groupby(["criterion", "amount"], sort=False)
    table: Any = grouped[_COLUMNS[1:]].mean()
    for name in ("accuracy", "loss"):  # of one draw there is no deviation, and none is made up
        table[f"{name}_sd"] = grouped[name].std(ddof=1)
    return CriteriaComparison(table.reset_index(), runs)
