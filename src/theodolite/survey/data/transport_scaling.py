"""The chart of transport scaling: which mix of sources to buy, and how well a mix's score is told from its distance."""

import warnings
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.core.train import train
from theodolite.core.view import ModelView
from theodolite.data.transport_scaling import MixSelection, Source, TransportScaling, simplex_grid
from theodolite.data.transport_scaling.forms import FORMS_WITHOUT_TRANSPORT, Law
from theodolite.data.transport_scaling.mixes import design
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding

_MOST_ROWS = 300  # of a pilot sample
_FEWEST_ROWS = 30
_MOST_SOURCES = 6
_REPEATS, _NEW = 2, 10
_LARGER = 10  # times the pilot
_STRAY = 0.1  # share of rows that go to a source that is not their class's
_NAMED = (
    "source",
    "domain",
    "site",
    "origin",
    "provider",
    "vendor",
    "supplier",
    "batch",
    "center",
    "centre",
    "hospital",
    "island",
)


def make_sources(X: np.ndarray, y: np.ndarray, classes: int, seed: int) -> tuple[list[Source], str]:
    """Two or three sources of one set of rows, each with the rows of some classes and a tenth strays, and how in words."""
    rng = np.random.default_rng(seed)
    m = min(3, classes)
    home = rng.permutation(classes) % m
    of = np.where(rng.random(len(y)) < _STRAY, rng.integers(0, m, len(y)), home[y])
    return [Source("ABC"[i], X[of == i], y[of == i]) for i in range(m)], f"{m} groups of classes with a tenth of strays"


def find_column(subject: Subject) -> tuple[str, dict[str, np.ndarray]] | None:
    """A column of 2 to 6 categories and, by category, which training rows have it; categories of few rows are left out.

    The column of domains comes first, with its six largest ones, then one whose name says that it is a source, then any.
    """
    data = subject.data
    features = list(data.features)
    if data.domains is not None and data.train.domain is not None:
        of = data.train.domain.numpy()
        largest = np.argsort(-np.bincount(of, minlength=len(data.domains.levels)), kind="stable")[:_MOST_SOURCES]
        kept = {data.domains.levels[i]: of == i for i in sorted(largest) if (of == i).sum() >= _FEWEST_ROWS}
        if len(kept) >= 2:
            return data.domains.name, kept
    found: dict[str, dict[str, np.ndarray]] = {}
    for column in data.columns:
        names = column.features
        if column.kind == "category" and 2 <= len(names) <= _MOST_SOURCES and all(name in features for name in names):
            of = subject.flat("train")[:, [features.index(name) for name in names]].argmax(axis=1)
            kept = {level: of == i for i, level in enumerate(column.levels) if (of == i).sum() >= _FEWEST_ROWS}
            if len(kept) >= 2:
                found[column.name] = kept
    for name, kept in found.items():
        if any(word in name.lower() for word in _NAMED):
            return name, kept
    return next(iter(found.items()), None)


def _sources(subject: Subject, seed: int) -> tuple[list[Source], str]:
    """The sources, and a sentence about what they are."""
    data = subject.data
    X, y = data.train.x.numpy(), data.train.y.numpy()
    found = find_column(subject)
    if found is None:
        sources, words = make_sources(X, y, len(data.classes), seed)
        return sources, f"The sources are parts of one data set: {words}. Real sources differ in more than that."
    name, kept = found
    columns = data.columns if data.domains is None else (data.domains, *data.columns)
    column = next(column for column in columns if column.name == name)
    few = [level for level in column.levels if level not in kept]
    left = f" but for {', '.join(few[:_MOST_SOURCES])}, which have fewer rows" if few else ""
    return [Source(level, X[rows], y[rows]) for level, rows in kept.items()], (
        f"The sources are the values of {name!r}{left}; validation and test rows are drawn from the whole file."
    )


def _step(m: int) -> float:
    """Step of the grid of mixes: 11 mixes of two sources, 15 of three, 35 of four."""
    return 0.1 if m == 2 else 0.25


def _refusal(subject: Subject) -> str | None:
    sources, _ = _sources(subject, 0)
    least = min(len(source.X) for source in sources)
    if least < _FEWEST_ROWS:
        return f"needs sources of at least {_FEWEST_ROWS} training rows; the smallest that could be made has {least}"
    return None


def _cost(subject: Subject) -> float:
    m = len(_sources(subject, 0)[0])
    mixes = len(design(m, _step(m), 0))
    trainings = (2 * mixes + _NEW) * _REPEATS
    return 15 + trainings * (subject.training_seconds * min(1.0, _MOST_ROWS / len(subject.data.train)) + 0.05)


@chart(
    "transport-scaling",
    needs=Needs(retrainable=True, modalities=("tabular",), task="classification", test=_refusal),
    cost=_cost,
)
def transport_scaling(subject: Subject, budget: Budget) -> Finding:
    """The mix to buy, and the error of predicted scores on new mixes, beside laws that do not see the data."""
    data = subject.data
    whole, words = _sources(subject, budget.seed)
    size = min(_MOST_ROWS, *(len(source.X) for source in whole))
    sources = [Source(source.name, source.X[:size], source.y[:size]) for source in whole]
    build, recipe = subject.build, subject.recipe
    assert build is not None  # the chart's needs hold
    assert recipe is not None

    def score(X: Any, y: Any, X_val: Any, y_val: Any) -> float:
        model = build(budget.seed)
        train(model, torch.as_tensor(X), torch.as_tensor(y), recipe=recipe.with_seed(budget.seed))
        return float(
            (ModelView(model, output="logit").predict(torch.as_tensor(X_val)) == torch.as_tensor(y_val)).double().mean()
        )

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        scaling = TransportScaling(
            score, sizes=(size // 2, size), grid_step=_step(len(sources)), n_repeats=_REPEATS, seed=budget.seed
        ).fit(sources, data.validation.x.numpy(), data.validation.y.numpy())
    rng = np.random.default_rng(budget.seed + 1)
    new = rng.dirichlet(np.ones(len(sources)), size=_NEW)
    test_x, test_y = data.test.x.numpy(), data.test.y.numpy()
    pool = scaling.pool_
    measured = np.empty(_NEW)
    for i, p in enumerate(new):
        drawn = [pool.draw(p, size, rng) for _ in range(_REPEATS)]
        measured[i] = np.median([score(pool.X[rows], pool.y[rows], test_x, test_y) for rows in drawn])
    predicted = scaling.predict(new, size)
    table = scaling.tables_[1]
    plain = scaling.errors_.iloc[:, 1].reindex(list(FORMS_WITHOUT_TRANSPORT)).dropna()
    form = str(plain.idxmin()) if len(plain) else "linear"
    law = Law.fit(form, table.p, table.transport, table.score, seed=budget.seed)

    def error(guess: Any) -> Estimate:
        return mean_of_runs(100 * np.abs(guess - measured), unit="points", within=(0, 100))

    comparison = Comparison(
        f"mean absolute error of the predicted accuracy on {_NEW} mixes that were not trained, on test rows",
        error(predicted),
        (
            Control(f"the mix alone ({form})", error(law(new, np.zeros(_NEW))), "closed-form"),
            Control("the mean of the trained mixes", error(table.score.mean()), "null"),
        ),
        larger_is_better=False,
    )
    larger = _LARGER * size
    chosen = scaling.select(larger)

    def predicted_at(p: np.ndarray) -> Estimate:
        low, high = scaling.predict_interval(p, larger)
        return Estimate(100 * scaling.predict(p, larger), 100 * low, 100 * high, "%")

    tracks = float(np.corrcoef(table.transport, table.score)[0, 1])
    slope = 100 * float(Law.fit("ot", table.p, table.transport, table.score).coefficients[1])
    shares = "/".join(f"{100 * share:.0f}" for share in chosen.p)
    names = "/".join(source.name for source in sources)
    even = chosen.baselines["uniform"].predicted_score
    gain = 100 * (chosen.predicted_score - even)
    error_of_law, plain_error = comparison.estimate.value, comparison.controls[0].estimate.value
    if gain >= error_of_law:
        advice = f"Buy {shares} from {names}. "
    else:
        advice = (
            f"The chosen mix is predicted {gain:.1f} points above the even one, less than the law's error on new mixes: "
            "either will do. "
        )
    return Finding(
        slug="transport-scaling",
        headline=f"At {larger:,} rows buy {shares} from {names}: predicted {chosen.predicted_score:.1%}, even mix {even:.1%}; "
        f"the accuracy {'falls' if slope < 0 else 'rises'} {abs(slope):.2g} points per unit of transport distance (r = "
        f"{tracks:.2f}) and is told within {error_of_law:.1f} points on new mixes ({plain_error:.1f} from the mix alone).",
        numbers={
            "error of the prediction": comparison.estimate,
            "error from the mix alone": comparison.controls[0].estimate,
            "correlation of distance and accuracy over the trained mixes": Estimate.exact(tracks),
            f"predicted accuracy of the chosen mix at {larger:,} rows": predicted_at(chosen.p),
            f"predicted accuracy of the uniform mix at {larger:,} rows": predicted_at(chosen.baselines["uniform"].p),
            "points of accuracy for a unit of distance": Estimate.exact(slope, "points"),
            "models trained on pilot rows": Estimate.exact(scaling.n_trainings_, "trainings"),
        },
        comparison=comparison,
        figure=_figure(scaling, chosen, predicted, measured, larger),
        reading="Left, each point is a mix that the law was not fitted on: across what the law predicts from the distance "
        "between the mix and the validation rows, up what the model reached on test rows; on the dotted line both are equal. "
        f"Right, the accuracy predicted at {larger:,} rows over the mixes, with the chosen one. Below, the accuracy against the "
        "number of rows: measured where both pilot samples end, projected beyond, with a 95 % interval for the chosen mix.",
        advice=advice + "With samples of your own sources: theodolite run transport-scaling DATA.csv --source-column COLUMN "
        "--target LABEL --val VAL.csv --size ROWS.",
        seed=budget.seed,
        caveats=(
            words,
            f"The predicted accuracies at {larger:,} rows were not measured; they are projected from {size // 2} and {size}.",
            "The law predicts accuracy on validation rows and is scored on test rows, so their difference is in the error.",
            *(f"{str(one.message)[:1].upper()}{str(one.message)[1:]}." for one in said if one.category is UserWarning),
        ),
    )  # fmt: skip


def _figure(
    scaling: TransportScaling, chosen: MixSelection, predicted: np.ndarray, measured: np.ndarray, larger: int
) -> go.Figure:
    """New mixes predicted and measured; the predicted score over all mixes; scores against rows with their projection."""
    names = [source.name for source in scaling.sources_]
    three = len(names) == 3
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {"type": "ternary" if three else "xy"}], [{"colspan": 2}, None]],
        row_heights=[0.55, 0.45],
        column_widths=[0.45, 0.55],
        vertical_spacing=0.16,
        horizontal_spacing=0.14,
        # above a triangle the name of its corner stands
        subplot_titles=("new mixes", "" if three else f"predicted at {larger:,} rows", "accuracy against rows"),
    )
    figure.add_scatter(
        x=predicted.round(4).tolist(), y=measured.round(4).tolist(), mode="markers", name="new mixes",
        marker={"color": INKS[0]}, showlegend=False, row=1, col=1,
    )  # fmt: skip
    ends = [float(min(predicted.min(), measured.min())), float(max(predicted.max(), measured.max()))]
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        name="equal",
        line={"color": INKS[6], "dash": "dot"},
        showlegend=False,
        row=1,
        col=1,
    )
    figure.update_xaxes(title_text="predicted accuracy", tickformat=".0%", row=1, col=1)
    figure.update_yaxes(title_text="accuracy on test rows", tickformat=".0%", row=1, col=1)
    if three:
        _triangle(figure, scaling, chosen, larger, names)
    else:
        mixes = {"chosen": chosen.predicted_score, "even": chosen.baselines["uniform"].predicted_score}
        mixes |= {f"{name} alone": float(scaling.predict(p, larger)) for name, p in zip(names, np.eye(len(names)))}
        inks = [INKS[1], *[INKS[0]] * (len(mixes) - 1)]
        figure.add_bar(
            x=list(mixes), y=[round(score, 4) for score in mixes.values()], marker={"color": inks}, name="predicted",
            showlegend=False, row=1, col=2,
        )  # fmt: skip
        figure.update_yaxes(title_text="accuracy", tickformat=".0%", row=1, col=2)
    _against_rows(figure, scaling, chosen, larger)
    figure.update_layout(
        margin={"l": 60, "r": 40, "t": 40, "b": 50}, height=760, legend={"orientation": "h", "y": -0.12}
    )
    return figure


def _triangle(
    figure: go.Figure, scaling: TransportScaling, chosen: MixSelection, larger: int, names: list[str]
) -> None:
    grid = simplex_grid(3)
    scores = scaling.predict(grid, larger)

    def corners(mixes: np.ndarray) -> dict[str, list[float]]:
        return {corner: (100 * mixes[:, i]).round(1).tolist() for i, corner in enumerate("abc")}

    figure.add_scatterternary(
        **corners(grid), mode="markers", name="mixes", showlegend=False, text=[f"{score:.1%}" for score in scores],
        marker={
            "color": scores.round(4).tolist(), "colorscale": "Viridis", "size": 9, "showscale": True,
            "colorbar": {
                "len": 0.5, "y": 0.78, "thickness": 12, "tickformat": ".0%", "title": {"text": f"predicted at<br>{larger:,} rows"}
            },
        },
        row=1, col=2,
    )  # fmt: skip
    figure.add_scatterternary(
        **corners(chosen.p[None]), mode="markers", name="chosen mix", showlegend=False, text=[f"{chosen.predicted_score:.1%}"],
        marker={"color": INKS[1], "size": 15, "symbol": "star", "line": {"color": "white", "width": 1}}, row=1, col=2,
    )  # fmt: skip
    figure.update_ternaries(
        sum=100,
        aaxis={"title": {"text": names[0]}},
        baxis={"title": {"text": names[1]}},
        caxis={"title": {"text": names[2]}},
    )


def _against_rows(figure: go.Figure, scaling: TransportScaling, chosen: MixSelection, larger: int) -> None:
    one, two = scaling.tables_
    sizes = np.unique(np.geomspace(two.size, larger, 6).round().astype(int)).tolist()
    for name, p, ink in (("chosen mix", chosen.p, INKS[1]), ("even mix", chosen.baselines["uniform"].p, INKS[0])):
        line = [round(float(scaling.predict(p, n)), 4) for n in sizes]
        ends = [scaling.predict_interval(p, n) for n in sizes] if name == "chosen mix" else None
        band_line(
            figure, sizes, line, name=f"{name}, projected", ink=ink, dash="dash", row=2, col=1,
            low=None if ends is None else [low for low, _ in ends], high=None if ends is None else [high for _, high in ends],
        )  # fmt: skip
        nearest = int(np.abs(two.p - p).sum(axis=1).argmin())
        shares = "/".join(f"{100 * share:.0f}" for share in two.p[nearest])
        figure.add_scatter(
            x=[one.size, two.size], y=[round(float(table.score[nearest]), 4) for table in (one, two)], mode="markers",
            name=f"measured at {shares}, nearest to the {name}", marker={"color": ink, "size": 9, "symbol": "diamond"},
            row=2, col=1,
        )  # fmt: skip
    figure.update_xaxes(title_text="rows", type="log", row=2, col=1)
    figure.update_yaxes(title_text="accuracy on validation rows", tickformat=".0%", row=2, col=1)
