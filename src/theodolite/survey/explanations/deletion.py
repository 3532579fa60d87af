"""The chart of counterfactuals under deletion: which promises break when training rows are withdrawn, and what safety costs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor, nn

from theodolite.core.errors import ModelError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, proportion
from theodolite.core.influence import ExactRetrainer
from theodolite.core.subject import Subject
from theodolite.explanations.deletion_robust import (
    DeletionCounterfactualSet,
    DeletionRobustCounterfactual,
    validity_under_deletion,
)
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.explanations.counterfactuals import one_hot_groups
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding

_SHARE = 0.01
_SHARES = (0.005, 0.01, 0.02, 0.05)
_MOST_COLUMNS = 300
_MOST_QUERIES = 40
_FEWEST_QUERIES = 10
_DRAWS = 20
_SHOWN = 10
_WORK = 2e7  # rows x columns squared of one Newton step, a fraction of a second


@dataclass(frozen=True, eq=False)
class _Table:
    """Training rows (n, d) in deviations from their mean, labels, the row numbers that were kept, and rejected test rows."""

    x: np.ndarray
    y: np.ndarray
    kept: np.ndarray
    shift: np.ndarray
    scale: np.ndarray
    queries: np.ndarray
    agreement: Estimate

    @classmethod
    def of(cls, subject: Subject, seed: int) -> "_Table":
        """A logistic regression on the subject's rows stands in; queries are test rows that both models reject."""
        raw, y = subject.flat("train"), subject.data.train.y.numpy()
        rng = np.random.default_rng(seed)
        most = max(400, int(_WORK / (raw.shape[1] + 1) ** 2))
        kept = np.arange(len(raw)) if len(raw) <= most else np.sort(rng.choice(len(raw), most, replace=False))
        shift, scale = raw.mean(axis=0), raw.std(axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        x, test = (raw[kept] - shift) / scale, (subject.flat("test") - shift) / scale
        w = ExactRetrainer(x, y[kept]).weights
        stand_in = test @ w[:-1] + w[-1] >= 0
        answers = subject.view("probability").predict(subject.data.test.x).numpy() == 1
        rejected = np.flatnonzero(~stand_in & ~answers)
        chosen = rng.permutation(rejected)[:_MOST_QUERIES]
        same = proportion(int((stand_in == answers).sum()), len(test), unit="test rows")
        return cls(x, y[kept], kept, shift, scale, test[chosen], same)


def _refusal(subject: Subject) -> str | None:
    data = subject.data
    if len(data.classes) != 2:
        return f"needs exactly two classes, of which one is to be reached; there are {len(data.classes)}"
    if int(np.prod(data.shape)) > _MOST_COLUMNS:
        return f"works with up to {_MOST_COLUMNS} columns; these data have {int(np.prod(data.shape))}"
    smaller = int(torch.bincount(data.train.y, minlength=2).min())
    if smaller < 20 or smaller <= 2 * max(1, int(_SHARE * len(data.train))):
        return f"needs more training rows of the smaller class, which has {smaller}, than deletions could take"
    found = len(_Table.of(subject, 0).queries)
    if found < _FEWEST_QUERIES:
        return f"needs at least {_FEWEST_QUERIES} test rows that are answered with {data.classes[0]}; there are {found}"
    return None


def _forecast(subject: Subject) -> float:
    rows, columns = len(subject.data.train), int(np.prod(subject.data.shape)) + 1
    return 2 + 400 * min(rows * columns**2, max(_WORK, 400 * columns**2)) / 1e9


@dataclass(frozen=True, eq=False)
class _AtShare:
    """What happens to plain and to verified counterfactuals at one k."""

    k: int
    found: DeletionCounterfactualSet
    random: dict[str, np.ndarray]
    worst: dict[str, np.ndarray]


def _at(table: _Table, plain: np.ndarray, k: int, seed: int, others: bool = False) -> _AtShare:
    found = DeletionRobustCounterfactual(k, verify=True).fit(table.x, table.y).generate(table.queries)
    points = {"plain": plain, "robust": found.counterfactuals}
    if others:
        points |= _controls(table, plain, found, seed)
    stacked = np.concatenate(list(points.values()))
    told: dict[str, dict[str, np.ndarray]] = {}
    for mode in ("random", "worst"):
        share = validity_under_deletion(stacked, table.x, table.y, k, mode, _DRAWS, seed=seed)
        told[mode] = dict(zip(points, share.reshape(len(points), -1), strict=True))
    return _AtShare(k, found, told["random"], told["worst"])


def _controls(table: _Table, plain: np.ndarray, found: DeletionCounterfactualSet, seed: int) -> dict[str, np.ndarray]:
    """Points of the same mean cost: a further step in a random direction, and one margin of the score for all."""
    rng = np.random.default_rng([seed, 1])
    away = plain - table.queries
    direction = rng.standard_normal(away.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    # |away + s direction| = cost, the positive root
    along = (away * direction).sum(axis=1)
    rest = np.maximum(np.nan_to_num(found.cost) ** 2 - (away**2).sum(axis=1), 0)
    s = -along + np.sqrt(along**2 + rest)
    w = ExactRetrainer(table.x, table.y).weights
    there = np.isfinite(found.cost)
    further = float((found.cost - found.plain_cost)[there].mean()) if there.any() else 0.0
    return {
        "random": plain + s[:, None] * direction,
        "margin": plain + further * w[:-1] / np.linalg.norm(w[:-1]),
    }


class _InUnits(nn.Module):
    """A network as a function of inputs in deviations from the training rows' mean."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, table: _Table) -> None:
        super().__init__()
        self.model = model
        like = next(model.parameters())
        self.register_buffer("shift", torch.as_tensor(table.shift).to(like))
        self.register_buffer("scale", torch.as_tensor(table.scale).to(like))

    def forward(self, z: Tensor) -> Tensor:
        return self.model(z * self.scale + self.shift)


def _of_network(subject: Subject, table: _Table, k: int) -> tuple[Estimate | None, str]:
    """Cost over plain cost for the network itself by the influence on its last layer, and what to know of it."""
    made = DeletionRobustCounterfactual(k, damping=1e-3)
    try:
        made.fit(table.x, table.y, _InUnits(subject.predictor, table), route="last-layer")
    except ModelError as error:
        return None, f"The network itself was not charted: {error}."
    found = made.generate(table.queries)
    ratio = _ratio(found, 0)
    if ratio is None:
        return (
            None,
            "For the network itself no counterfactual was found that survives deletion by last-layer influence.",
        )
    return ratio, (
        "The number for the network itself is the influence model's own answer on its last layer; no network was retrained."
    )


@chart(
    "explanations-under-deletion",
    needs=Needs(modalities=("tabular",), task="classification", test=_refusal),
    cost=_forecast,
)
def explanations_under_deletion(subject: Subject, budget: Budget) -> Finding:
    """The share of closest counterfactuals that break when 1 % of the training rows withdraw, and the cost of safety."""
    table = _Table.of(subject, budget.seed)
    smaller = int(min(table.y.sum(), (1 - table.y).sum()))
    maker = DeletionRobustCounterfactual(0).fit(table.x, table.y)
    plain = maker.generate(table.queries).counterfactuals
    k = max(1, int(_SHARE * len(table.y)))
    counts = sorted({max(1, int(share * len(table.y))) for share in _SHARES} | {k})
    runs = {m: _at(table, plain, m, budget.seed, others=m == k) for m in counts if m < smaller / 2}
    main, reached = runs[k], subject.data.classes[1]
    m = len(table.queries)

    def survive(name: str) -> Estimate:
        return proportion(int(main.worst[name].sum()), m, unit="still accepted")

    ratio = _ratio(main.found, budget.seed)
    broken = proportion(m - int(main.worst["plain"].sum()), m, unit="broken")
    comparison = Comparison(
        f"counterfactuals still accepted after the worst deletion of {k} rows and retraining",
        survive("robust"),
        (
            Control("closest counterfactuals", survive("plain"), "null"),
            Control("a further step in a random direction, at the same cost", survive("random"), "random"),
            Control("one margin of confidence for all, at the same mean cost", survive("margin"), "closed-form"),
        ),
    )
    numbers = {
        f"closest counterfactuals that break, worst {k} rows": broken,
        f"closest counterfactuals that break, {k} random rows": _share(1 - main.random["plain"], "broken", budget.seed),
        f"robust counterfactuals that break, {k} random rows": _share(1 - main.random["robust"], "broken", budget.seed),
        "stand-in gives the same class as the model": table.agreement,
        "robust counterfactuals that the model itself accepts": _accepted(subject, table, main.found.counterfactuals),
        "closest counterfactuals that the model itself accepts": _accepted(subject, table, plain),
    }
    if ratio is not None:
        numbers[f"cost of the robust over the closest, {k} rows"] = ratio
    caveats = [
        "Deletions are followed here in a logistic regression (C = 1, columns in standard deviations) that is fitted to the "
        "subject's own training rows and labels and stands in for the model; for any other model the result is a guide and no "
        "certificate.",
        "The certificate is for the sets of rows that were visited: the worst that influence finds, each followed by an exact "
        "retraining. A set that influence overlooks may be worse. All columns may change; give what may not to "
        "DeletionRobustCounterfactual(immutable=..., bounds=...).",
        "Costs are distances in standard deviations of the training rows; the scaler stays the one of all rows.",
    ]
    if one_hot_groups(subject.data):
        caveats.append(
            "Categories move as numbers here, so that a point may lie between two of them; with groups=... of "
            "DeletionRobustCounterfactual, on columns that are not rescaled, they stay whole."
        )
    if len(table.y) < len(subject.data.train):
        caveats.append(f"{len(table.y):,} of {len(subject.data.train):,} training rows were used, drawn at random.")
    if subject.is_network:
        own, words = _of_network(subject, table, k)
        caveats.append(words)
        if own is not None:
            numbers[f"cost of the robust over the closest for the network itself, {k} rows, last-layer influence"] = own
    safety = (
        "no point was found that stays accepted"
        if ratio is None
        else f"points made to last ({100 * survive('robust').value:.0f} % do) cost {ratio.value:.2f} times as much"
    )
    falls = -(np.column_stack([plain, np.ones(m)]) @ maker.directions_.T).mean(axis=0)
    first = np.argsort(-falls, kind="stable")[:_SHOWN]
    rows = ", ".join(str(table.kept[i]) for i in first)
    return Finding(
        slug="explanations-under-deletion",
        headline=f"If the worst {k} of {len(table.y):,} training rows withdrew, {100 * broken.value:.0f} % of the closest "
        f"counterfactuals toward class {reached} would break in a logistic regression on these rows; {safety}.",
        numbers=numbers,
        comparison=comparison,
        figure=_figure(runs, len(table.y), falls[first], [f"row {table.kept[i]}" for i in first], budget.seed),
        reading="Above, the share of counterfactuals that are still accepted when the model is trained again without some rows: "
        "random ones (dotted) or the worst ones that influence finds at each point. A closest point lies on the boundary, so any "
        "set that lowers its score breaks it. In the middle, what the robust points cost, as a multiple "
        "of the closest ones. Below, the training rows whose withdrawal alone lowers the scores of the closest "
        "counterfactuals most.",
        advice="Promise the robust points, from theodolite.explanations.deletion_robust.DeletionRobustCounterfactual(verify="
        f"True), and plan for the training rows most able to break promises (numbers in the train part): {rows}.",
        seed=budget.seed,
        caveats=tuple(caveats),
    )  # fmt: skip


def _ratio(found: DeletionCounterfactualSet, seed: int) -> Estimate | None:
    """Cost over plain cost, over the queries that have a robust point; None where none has."""
    there = found.valid & (found.plain_cost > 0)
    return bootstrap(found.cost[there] / found.plain_cost[there], seed=seed, unit="times") if there.any() else None


def _share(values: np.ndarray, unit: str, seed: int) -> Estimate:
    return bootstrap(values, seed=seed, unit=unit)


def _accepted(subject: Subject, table: _Table, points: np.ndarray) -> Estimate:
    there = np.isfinite(points).all(axis=1)
    if not there.any():
        return proportion(0, len(points), unit="accepted")
    rows = torch.as_tensor(points[there] * table.scale + table.shift, dtype=subject.data.train.x.dtype)
    rows = rows.reshape(len(rows), *subject.data.shape)
    answers = subject.view("probability").predict(rows)
    return proportion(int((answers == 1).sum()), len(points), unit="accepted")


def _figure(runs: dict[int, _AtShare], n: int, falls: np.ndarray, names: list[str], seed: int) -> go.Figure:
    figure = make_subplots(
        rows=3, cols=1, vertical_spacing=0.12, row_heights=[0.36, 0.28, 0.36],
        subplot_titles=("still accepted", "cost of the robust, times the closest", "rows most able to break promises"),
    )  # fmt: skip
    shares = [100 * k / n for k in runs]
    for name, ink in (("plain", INKS[1]), ("robust", INKS[0])):
        words = "closest" if name == "plain" else "robust"
        for mode, dash in (("worst", None), ("random", "dot")):
            tables: list[Any] = [run.worst[name] if mode == "worst" else run.random[name] for run in runs.values()]
            band_line(
                figure, shares, [float(values.mean()) for values in tables], name=f"{words}, {mode} rows", ink=ink,
                dash=dash, row=1, col=1,
            )  # fmt: skip
    ratios = {100 * k / n: ratio for k, run in runs.items() if (ratio := _ratio(run.found, seed)) is not None}
    band_line(
        figure, list(ratios), [r.value for r in ratios.values()], name="cost", ink=INKS[2],
        low=[r.low for r in ratios.values()], high=[r.high for r in ratios.values()], row=2, col=1, legend=False,
    )  # fmt: skip
    bars = go.Bar(x=falls[::-1], y=names[::-1], orientation="h", marker_color=INKS[3], showlegend=False)
    figure.add_trace(bars, row=3, col=1)
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], row=1, col=1)
    figure.update_xaxes(title_text="training rows deleted, %", row=2, col=1)
    figure.update_xaxes(title_text="fall of the score when the row alone is deleted, logits", row=3, col=1)
    figure.update_layout(
        height=820, margin={"l": 80, "r": 20, "t": 40, "b": 50}, legend={"orientation": "h", "y": 1.08}
    )
    return figure
