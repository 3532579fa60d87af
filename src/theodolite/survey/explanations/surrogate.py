"""The chart of surrogates: which columns a black box uses, by what rules, and how far a small copy follows it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from theodolite.core.curve import QualityCurve
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, mean_of_runs
from theodolite.core.subject import Dataset, Subject
from theodolite.explanations.surrogate import BlackBox, OverlapWarning, Rule, SurrogateExplainer, fit_surrogate
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_ROWS = {"train": 2000, "validation": 300, "test": 2000}
"""Rows looked at of each part: enough for a tree, for the scores of columns, and for an interval."""

_SIZES = (1, 2, 3, 5, 10, 20, 50)
_DRAWS = 5
_BARS, _RULES = 20, 10


def _model(subject: Subject) -> Any:
    """The network itself, or a black box as a function of arrays."""
    if subject.is_network:
        return subject.predictor
    view = subject.view("probability" if subject.data.task == "classification" else "value")
    return lambda x: view(x).numpy()


def _logits(subject: Subject) -> bool | None:
    """Whether outputs are scores; a single one is a value only in a regression."""
    return True if subject.is_network and subject.data.task == "classification" else None


def _part(subject: Subject, part: Any) -> np.ndarray:
    return subject.flat(part)[: _ROWS[part]]


def _constant(subject: Subject) -> str | None:
    box = BlackBox(_model(subject), logits=_logits(subject))
    for part in ("train", "validation", "test"):
        if float(box(_part(subject, part)).var(axis=0).sum()) < 1e-8:
            return f"needs a model whose answers differ; this one gives all {part} rows the same"
    return None


def _forecast(subject: Subject) -> float:
    d = int(np.prod(subject.data.shape))
    columns, rows = min(d, 200), min(len(subject.data.validation), _ROWS["validation"])
    return 2 + columns * 6 * rows * (2e-7 * d if subject.is_network else 2e-5)


class _Copies:
    """Trees of one size fitted to the training answers, and how near each comes to the answers on the test rows."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.box = BlackBox(_model(subject), logits=_logits(subject))
        self.x, self.x_test, self.seed = _part(subject, "train"), _part(subject, "test"), seed
        self.p, self.p_test = self.box(self.x), self.box(self.x_test)
        self.truth = subject.data.train.y.numpy()[: len(self.x)]

    def answers(self, columns: np.ndarray, *, depth: int = 10, labels: bool = False) -> np.ndarray:
        """What a tree on ``columns`` answers to the test rows; ``labels``: fitted to the true labels instead."""
        p = self.p
        if labels:
            classes = p.shape[1]
            p = np.eye(classes)[self.truth] if classes > 1 else self.truth.astype(np.float64)[:, None]
        tree = fit_surrogate("tree", self.x, p, columns, max_depth=depth, seed=self.seed)
        return tree.predict(self.x_test)

    def r2(self, q: np.ndarray) -> Estimate:
        """Share of the variance of the answers, with its bootstrap interval over test rows."""
        width = q.shape[1]
        pairs = np.hstack([self.p_test, q])
        return bootstrap(pairs, lambda rows: _share(rows[:, :width], rows[:, width:]), seed=self.seed, unit="R2")


def _share(p: np.ndarray, q: np.ndarray) -> float:
    spread = float(((p - p.mean(axis=0)) ** 2).sum())
    return float(1 - ((q - p) ** 2).sum() / spread) if spread > 0 else 0.0


@chart(
    "high-dimensional-surrogate",
    needs=Needs(modalities=("tabular",), test=_constant),
    cost=_forecast,
)
def high_dimensional_surrogate(subject: Subject, budget: Budget) -> Finding:
    """How many columns a small tree needs to follow the model on held-out rows, and the rules that it reads off."""
    data, copies = subject.data, _Copies(subject, budget.seed)
    d = copies.x.shape[1]
    explainer = SurrogateExplainer(
        feature_names=data.features or None, class_names=data.classes or None, logits=_logits(subject),
        seed=budget.seed,
    )  # fmt: skip
    labels = data.validation.y.numpy()[: _ROWS["validation"]]
    with warnings.catch_warnings():
        # tables of few distinct rows repeat them by nature, and all that is shown comes from test rows
        warnings.simplefilter("ignore", OverlapWarning)
        explainer.fit(_model(subject), copies.x, _part(subject, "validation"), labels)
    k, columns = explainer.k_, explainer.columns_
    sizes = sorted({k} | {size for size in (*_SIZES, d) if size <= min(d, max(_SIZES))})
    order = explainer.picks(max(sizes))
    ours = {size: copies.answers(order[:size]) for size in sizes}
    rng = np.random.default_rng([budget.seed, d])
    random = {
        size: [_share(copies.p_test, copies.answers(rng.choice(d, size, replace=False))) for _ in range(_DRAWS)]
        for size in sizes
    }
    reached, whole = copies.r2(ours[k]), copies.r2(copies.answers(np.arange(d)))
    curve = QualityCurve.from_runs(
        {size: [_share(copies.p_test, q)] for size, q in ours.items()}, chance=0.0, reference=whole.value,
        name="columns of a tree", metric="R2", total_dimension=d,
    )  # fmt: skip
    on_labels, one_rule = (
        copies.r2(copies.answers(np.arange(d), labels=True)),
        copies.r2(copies.answers(columns, depth=1)),
    )
    comparison = Comparison(
        f"R2 of a tree on {k} of {d} columns with the model's answers, {len(copies.x_test)} test rows",
        reached,
        (
            Control(f"a tree on {k} random columns", mean_of_runs(random[k], unit="R2"), "random"),
            Control("one split of one column", one_rule, "closed-form"),
            Control("a tree fitted to the true labels, all columns", on_labels, "closed-form"),
            Control("one constant answer", Estimate.exact(0.0, "R2"), "null"),
            Control("a tree on all columns", whole, "reference"),
        ),
    )
    numbers: dict[str, Estimate] = {f"R2 with {k} columns": reached, "R2 with all columns": whole}
    if copies.p.shape[1] > 1:
        same = (ours[k].argmax(axis=1) == copies.p_test.argmax(axis=1)).astype(np.float64)
        numbers["rows given the model's class"] = bootstrap(same, seed=budget.seed, unit="of test rows")
    if whole.value > 0 and (d90 := curve.smallest().estimate) is not None:
        numbers["columns for 90 % of what a tree on all reaches"] = Estimate.exact(d90.value, "columns")
    drop, error = explainer.comprehensiveness(copies.x_test)
    if np.isfinite(error):
        what = "fall of the predicted class's probability" if copies.p.shape[1] > 1 else "change of the answer"
        numbers[f"{what} when the top {k} are set to their medians"] = Estimate(
            drop, drop - 1.96 * error, drop + 1.96 * error, n=len(copies.x_test)
        )
    rules = explainer.rules()
    if explainer.is_classifier_:
        listed = explainer.rule_list(_RULES)
        rules, given = list(listed.rules) or rules, copies.p_test.argmax(axis=1)
        followed = (listed.predict(copies.x_test) == given).astype(np.float64)
        told = f"by its {len(listed.rules)} rules" if len(listed.rules) != 1 else "by its one rule"
        numbers[f"rows given the model's class {told}"] = bootstrap(followed, seed=budget.seed, unit="of test rows")
        commonest = (given == np.bincount(copies.p.argmax(axis=1)).argmax()).astype(np.float64)
        numbers["rows given the model's class by its commonest one"] = bootstrap(
            commonest, seed=budget.seed, unit="of test rows"
        )
    if data.scaling:
        rules = [rule.rescaled(data.scaling) for rule in rules]
    said = [_said(rule, data) for rule in rules]
    return Finding(
        slug="high-dimensional-surrogate",
        headline=_headline(reached, k, d, said),
        numbers=numbers,
        comparison=comparison,
        figure=_figure(explainer, sizes, curve, random, whole, on_labels),
        reading="Left: how much of the model's answers a tree gives on test rows when it may look at the best columns only, "
        "beside as many random ones (band: lowest to highest of the draws); above the dotted line the copy tells more than a "
        "tree that never saw the model. Right: how much the model uses each column, each score in units of its largest, "
        "averaged, with standard errors over validation rows.",
        advice=_advice(reached, said),
        seed=budget.seed,
        caveats=(
            f"Columns were ranked on {len(labels)} validation rows and the tree was fitted on {len(copies.x)} training rows; the "
            "figures are from test rows. Fidelity to the model is not being right.",
            *explainer.notes_,
            *_groups(explainer),
        ),
    )  # fmt: skip


def _said(rule: Rule, data: Dataset) -> str:
    """The rule in words; a column that stands for one level of a category is that level or is not."""
    text = str(rule)
    for condition in rule.conditions:
        if condition.feature in data.levels:
            name, level = data.levels[condition.feature]
            text = text.replace(str(condition), f"{name} is {level}" if condition.low > 0 else f"{name} is not {level}")
    return text


def _headline(reached: Estimate, k: int, d: int, rules: Sequence[str]) -> str:
    columns = f"{k} of {d} columns" if k < d else f"a small tree on all {d} columns" if d > 1 else "the one column"
    if reached.value <= 0:
        return f"A tree on {columns} follows the model no better than one constant answer (R² {reached.value:.2f})."
    carry = "carry" if 1 < k < d else "carries"
    said = f"{columns} {carry} {reached.value:.0%} of what the model does (R²)"
    return f"{said[0].upper()}{said[1:]}; rule 1: {rules[0]}."


def _advice(reached: Estimate, rules: Sequence[str]) -> str:
    text = "theodolite.explanations.surrogate.SurrogateExplainer gives all rules, the path of one row and the nearest change."
    if reached.value < 0.5:
        return f"Do not explain this model by these rules: they miss more than half of what it does. {text}"
    listed = "; ".join(rules[1:3])
    return f"{text}" + (f" Next rules: {listed}." if listed else "")


def _groups(explainer: SurrogateExplainer) -> tuple[str, ...]:
    """The groups of correlated columns that important ones belong to, in words."""
    important = set(explainer.top_.tolist())
    found = [group for group in explainer.clusters_ if important & set(group)]
    if not found:
        return ()
    names = " | ".join(", ".join(explainer.features_[j] for j in group[:4]) for group in found[:3])
    return (f"Correlated above 0.9, so that importance is shared or hidden among them: {names}.",)


def _figure(
    explainer: SurrogateExplainer,
    sizes: Sequence[int],
    curve: QualityCurve,
    random: Mapping[int, Sequence[float]],
    whole: Estimate,
    on_labels: Estimate,
) -> go.Figure:
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.22,
        subplot_titles=("fidelity on test rows", "how much the model uses a column"),
    )  # fmt: skip
    band_line(figure, sizes, curve.mean.tolist(), name="best columns", ink=INKS[0], row=1, col=1)
    band_line(
        figure, sizes, [float(np.mean(random[size])) for size in sizes], name="random columns", ink=INKS[6], dash="dot",
        low=[min(random[size]) for size in sizes], high=[max(random[size]) for size in sizes], row=1, col=1,
    )  # fmt: skip
    level_line(figure, whole.value, "all columns", dash="dash", row=1)
    level_line(figure, on_labels.value, "tree of the true labels", row=1)
    table = explainer.importance_.sort_values("rank").head(_BARS).iloc[::-1]
    scores = [name for name in ("gradient", "permutation", "sensitivity") if name in table]
    largest = {name: max(float(np.nanmax(explainer.importance_[name].to_numpy())), 1e-12) for name in scores}
    error = np.sqrt(sum((table[f"{name}_se"].fillna(0).to_numpy() / largest[name]) ** 2 for name in scores)) / len(
        scores
    )
    figure.add_trace(
        go.Bar(
            x=table["importance"].tolist(), y=table["feature"].tolist(), orientation="h", showlegend=False,
            marker_color=INKS[0], error_x={"type": "data", "array": np.asarray(error).tolist()},
        ),
        row=1, col=2,
    )  # fmt: skip
    lowest = min(curve.mean.min(), *(min(draws) for draws in random.values()), 0.0)
    figure.update_xaxes(title_text="columns", type="log", row=1, col=1)
    figure.update_xaxes(title_text="mean score, of the largest", row=1, col=2)
    figure.update_yaxes(title_text="R² with the model", range=[max(float(lowest), -0.5), 1.02], row=1, col=1)
    figure.update_layout(
        margin={"l": 60, "r": 20, "t": 40, "b": 50}, height=480, legend={"orientation": "h", "y": -0.16}
    )
    return figure
