"""The chart of robust counterfactuals: what would have to change, and whether a retrained model still agrees."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, proportion
from theodolite.core.parallel import one_thread, seeds_for
from theodolite.core.subject import Dataset, Subject
from theodolite.explanations.counterfactuals import ClosestCounterfactual, Generator, NearestNeighbour
from theodolite.explanations.model_changes import retrain, robust_validity
from theodolite.explanations.robust_counterfactuals import ConfidenceThreshold, CounterfactualSet, TRex, TRexNearest
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, blank
from theodolite.survey.finding import Finding

_TAUS = (0.6, 0.75, 0.9)
_TAU = 0.75
_CONFIDENCES = (0.6, 0.75, 0.9, 0.97)
_ROWS = 20
_SHOWN = 3
_RETRAINED = 8
_MOST_FEATURES = 300
_MOST_TRAINING_ROWS = 2000


@dataclass(frozen=True, eq=False)
class _Run:
    """All methods on the same rows: what they gave, and what survived of each row."""

    found: dict[str, CounterfactualSet]
    survive: dict[str, np.ndarray] | None
    target: int
    rows: np.ndarray

    def score(self, name: str) -> np.ndarray:
        """Per row the share of retrained models that accept, or the stability (-1 for no counterfactual) where there are none."""
        if self.survive is not None:
            return self.survive[name]
        return np.nan_to_num(self.found[name].stability, nan=-1.0)


def one_hot_groups(data: Dataset) -> list[list[int]]:
    """Feature numbers of each column of categories that is one feature per level, in the order of the file."""
    at = {name: i for i, name in enumerate(data.features)}
    found = [
        [at[feature] for feature in column.features if feature in at]
        for column in data.columns
        if column.kind == "category"
    ]
    return [group for group in found if len(group) >= 2]


def _refusal(subject: Subject) -> str | None:
    features = int(np.prod(subject.data.shape))
    if features > _MOST_FEATURES:
        return f"explains up to {_MOST_FEATURES} features; these data have {features}"
    if not subject.is_network and not hasattr(subject.predictor, "predict_proba"):
        return f"needs probabilities; {subject.model_name} gives classes alone"
    target, rows = _factuals(subject, 0)
    if len(rows) < _SHOWN:
        name = subject.data.classes[target]
        return f"needs at least {_SHOWN} test rows that the model answers with another class than {name}; there are {len(rows)}"
    return None


def _factuals(subject: Subject, seed: int) -> tuple[int, np.ndarray]:
    """The class asked for (the one that the model answers with most in training) and test rows that it answers otherwise."""
    view = subject.view("probability")
    target = int(torch.bincount(view.predict(subject.data.train.x)).argmax())
    other = (view.predict(subject.data.test.x) != target).nonzero().ravel().numpy()
    order = np.random.default_rng(seed).permutation(other)[:_ROWS]
    return target, subject.flat("test")[order]


def _forecast(subject: Subject) -> float:
    view, x = subject.view("probability"), subject.data.train.x[:128]
    view(x)
    began = time.perf_counter()
    view(x)
    one = time.perf_counter() - began
    if not subject.is_network:
        return 1 + 300 * one * len(_TAUS)
    again = _RETRAINED * subject.training_seconds if subject.retrainable else 0.0
    return 2 + again + (27_000 if one_hot_groups(subject.data) else 9000) * one


def _methods(subject: Subject, budget: Budget) -> dict[str, Generator]:
    share: dict[str, Any] = {
        "seed": budget.seed, "k": 500, "memory": budget.memory, "groups": one_hot_groups(subject.data),
    }  # fmt: skip
    if not subject.is_network:
        return {
            "nearest neighbour": NearestNeighbour(**share),
            **{f"T-Rex:NN, τ = {tau}": TRexNearest(tau=tau, **share) for tau in _TAUS},
        }
    base = ClosestCounterfactual(steps=150, binary_search_steps=5)
    return {
        "closest": ClosestCounterfactual(steps=150, binary_search_steps=5, **share),
        **{f"T-Rex, τ = {tau}": TRex(base=base, tau=tau, **share) for tau in _TAUS},
        **{f"confidence, τ = {tau}": ConfidenceThreshold(base=base, tau=tau, **share) for tau in _CONFIDENCES},
    }


def _run(subject: Subject, budget: Budget) -> _Run:
    target, rows = _factuals(subject, budget.seed)
    train = subject.flat("train")[:_MOST_TRAINING_ROWS]
    with one_thread(subject.is_small):
        found = {
            name: method.fit(subject.predictor, train).generate(rows, target)
            for name, method in _methods(subject, budget).items()
        }
        survive = None
        if subject.is_network and subject.build is not None and subject.recipe is not None:
            (seed,) = seeds_for(budget.seed + 1, 1)
            models = retrain(
                subject.build, subject.flat("train"), subject.data.train.y, _RETRAINED, recipe=subject.recipe, seed=seed
            )
            survive = {name: robust_validity(one, models, target=target) for name, one in found.items()}
    return _Run(found, survive, target, rows)


@chart(
    "robust-counterfactuals",
    needs=Needs(modalities=("tabular",), task="classification", test=_refusal),
    cost=_forecast,
)
def robust_counterfactuals(subject: Subject, budget: Budget) -> Finding:
    """What three rows would have to change for another answer, and how many retrained models would keep the promise."""
    run = _run(subject, budget)
    wanted = subject.data.classes[run.target]
    network = subject.is_network
    first, ours = ("closest", f"T-Rex, τ = {_TAU}") if network else ("nearest neighbour", f"T-Rex:NN, τ = {_TAU}")
    unit = "of the retrained models" if run.survive is not None else "stability"
    shown = {name: bootstrap(run.score(name), seed=budget.seed, unit=unit) for name in run.found}
    controls = [
        Control(f"the {first} counterfactual" if network else "the nearest neighbour", shown[first], "closed-form")
    ]
    if network:
        name = _as_dear(run, ours)
        prices = f"cost {_mean_cost(run, name):.3g} beside {_mean_cost(run, ours):.3g}"
        controls.append(Control(f"raising the probability alone, {name} ({prices})", shown[name], "closed-form"))
    what = "robust validity" if run.survive is not None else "local stability"
    numbers: dict[str, Estimate] = {f"{what}, {name}": estimate for name, estimate in shown.items()}
    for name, found in run.found.items():
        costs = found.cost[found.valid]
        if len(costs):
            numbers[f"cost, {name}"] = bootstrap(costs, seed=budget.seed, unit="ranges of the training rows (L2)")
    numbers[f"rows that reach τ = {_TAU}"] = Estimate.exact(float(run.found[ours].reached.sum()), f"of {len(run.rows)}")
    for i in range(min(_SHOWN, len(run.rows))):
        value = run.found[ours].stability[i]
        if np.isfinite(value):
            numbers[f"stability of the counterfactual of row {i + 1}"] = Estimate.exact(float(value))
            if run.survive is not None:
                kept = round(float(run.survive[ours][i]) * _RETRAINED)
                numbers[f"retrained models that accept the counterfactual of row {i + 1}"] = proportion(
                    kept, _RETRAINED, unit=f"of {_RETRAINED} retrainings"
                )
    return Finding(
        slug="robust-counterfactuals",
        headline=_headline(run, shown, first, ours, wanted),
        numbers=numbers,
        comparison=Comparison(f"{what} of {ours}", shown[ours], tuple(controls)),
        figure=_figure(run, shown, what),
        reading=f"Each point is a method at one threshold: how far its counterfactuals for the class {wanted} are from the rows "
        f"(along), and their {what} (up), with the interval over rows. Up and to the left is better; where the lines of T-Rex "
        "and of confidence meet, plain confidence does as well.",
        advice=_advice(subject, run, ours),
        seed=budget.seed,
        caveats=_caveats(subject, run),
    )


def _mean_cost(run: _Run, name: str) -> float:
    found = run.found[name]
    return float(found.cost[found.valid].mean()) if found.valid.any() else float("nan")


def _as_dear(run: _Run, ours: str) -> str:
    """The cheapest confidence threshold that costs at least what ``ours`` does, or the dearest: the fair one to compare."""
    names = [f"confidence, τ = {tau}" for tau in _CONFIDENCES]
    return next((name for name in names if _mean_cost(run, name) >= _mean_cost(run, ours)), names[-1])


def _headline(run: _Run, shown: dict[str, Estimate], first: str, ours: str, wanted: str) -> str:
    before, after = (shown[name].value for name in (first, ours))
    pair = [run.found[name].cost for name in (first, ours)]
    both = np.isfinite(pair[0]) & np.isfinite(pair[1])
    if not both.any():
        return f"No counterfactual for the class {wanted} was found for any of {len(run.rows)} rows."
    base = float(pair[0][both].mean())
    price = f" for {float(pair[1][both].mean()) / base:.1f} times the cost" if base > 0 else ""
    if run.survive is not None:
        return (
            f"The {first} counterfactuals for the class {wanted} survive {before:.0%} of {_RETRAINED} retrainings, those of "
            f"{ours}, {after:.0%}{price}."
        )
    return f"The local stability of a counterfactual is {before:.2f} by {first} and {after:.2f} by {ours}{price}."


def _figure(run: _Run, shown: dict[str, Estimate], what: str) -> Any:
    figure = blank("mean cost, in ranges of the training rows", what)
    families: dict[str, list[str]] = {}
    for name in run.found:
        if run.found[name].valid.any():
            families.setdefault(name.split(",")[0], []).append(name)
    for ink, (family, names) in zip(INKS, families.items(), strict=False):
        band_line(
            figure,
            [_mean_cost(run, name) for name in names],
            [shown[name].value for name in names],
            name=family, ink=ink, low=[shown[name].low for name in names], high=[shown[name].high for name in names],
        )  # fmt: skip
    if run.survive is not None:
        figure.update_yaxes(tickformat=".0%")
    return figure


def _advice(subject: Subject, run: _Run, ours: str) -> str:
    names = subject.data.features or tuple(f"column {i}" for i in range(run.rows.shape[1]))
    found = run.found[ours]
    span = np.ptp(subject.flat("train"), axis=0)
    scale = [scale for _, scale in subject.data.scaling] or [1.0] * len(names)
    levels = subject.data.levels
    told = []
    for i in range(min(_SHOWN, len(run.rows))):
        if not found.valid[i]:
            told.append(f"row {i + 1}: none found")
            continue
        change = found.counterfactuals[i] - run.rows[i]
        largest = np.argsort(-np.abs(change) / np.where(span > 0, span, 1.0), kind="stable")
        moves = [
            f"{levels[names[c]][0]} becomes {levels[names[c]][1]}" if names[c] in levels
            else f"{names[c]} {scale[c] * change[c]:+.3g}"
            for c in largest
            if change[c] > 0 or (change[c] < 0 and names[c] not in levels)  # a level left is told by the one entered
        ]  # fmt: skip
        told.append(f"row {i + 1} (stability {found.stability[i]:.2f}): {', '.join(moves[:3])}")
    return (
        f"Largest changes that make the answer {subject.data.classes[run.target]}, by {ours}: {'; '.join(told)}. Say what may "
        "not change with immutable=, increasing=, groups= and bounds= of theodolite.explanations.robust_counterfactuals."
    )


def _caveats(subject: Subject, run: _Run) -> tuple[str, ...]:
    out = [
        f"{len(run.rows)} test rows that the model answers otherwise; intervals are over these rows, for this one model. Nothing "
        "is held fixed here, not even what nobody can change.",
        "The stability is an average around the point, without a proof.",
    ]
    if run.survive is None:
        why = "a black box is not trained again here" if not subject.is_network else "the model cannot be trained again"
        out.append(f"Local stability only, on the draws of the answer's own model: {why}.")
    else:
        out.append(
            f"{_RETRAINED} retrained models with other initial weights and order of rows, on the same training rows. The "
            "interval of a single row's share is exact (Clopper-Pearson): with 97.5 % confidence at least its lower end of all "
            "such retrainings accept that counterfactual."
        )
    return tuple(out)
