"""The chart of transport scaling: how well the model's score on mixes of sources is told from the mixes' distance."""

from typing import Any

import numpy as np
import torch

from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.core.train import train
from theodolite.core.view import ModelView
from theodolite.data.transport_scaling import Source, TransportScaling, simplex_grid
from theodolite.data.transport_scaling.forms import FORMS_WITHOUT_TRANSPORT, Law
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, blank
from theodolite.survey.finding import Finding

_MOST_ROWS = 300  # of a pilot sample
_FEWEST_ROWS = 30
_STEP, _REPEATS, _NEW = 0.25, 2, 10
_STRAY = 0.1  # share of rows that go to a source that is not their class's


def make_sources(X: np.ndarray, y: np.ndarray, classes: int, seed: int) -> tuple[list[Source], str]:
    """Two or three sources of one set of rows, each with the rows of some classes and a tenth strays, and how in words."""
    rng = np.random.default_rng(seed)
    m = min(3, classes)
    home = rng.permutation(classes) % m
    of = np.where(rng.random(len(y)) < _STRAY, rng.integers(0, m, len(y)), home[y])
    return [Source("ABC"[i], X[of == i], y[of == i]) for i in range(m)], f"{m} groups of classes with a tenth of strays"


def _column(subject: Subject) -> tuple[str, np.ndarray] | None:
    """Name of the first column of 2 or 3 categories with rows enough in each, and the category of each training row."""
    data = subject.data
    features = list(data.features)
    for column in data.columns:
        names = [f"{column.name}={level}" for level in column.levels]
        if column.kind == "category" and 2 <= len(names) <= 3 and all(name in features for name in names):
            of = subject.flat("train")[:, [features.index(name) for name in names]].argmax(axis=1)
            if np.bincount(of, minlength=len(names)).min() >= _FEWEST_ROWS:
                return column.name, of
    return None


def _sources(subject: Subject, seed: int) -> tuple[list[Source], str]:
    X, y = subject.data.train.x.numpy(), subject.data.train.y.numpy()
    found = _column(subject)
    if found is None:
        return make_sources(X, y, len(subject.data.classes), seed)
    name, of = found
    return [Source(f"{name} {i + 1}", X[of == i], y[of == i]) for i in range(of.max() + 1)], f"the values of {name!r}"


def _refusal(subject: Subject) -> str | None:
    sources, _ = _sources(subject, 0)
    least = min(len(source.X) for source in sources)
    if least < _FEWEST_ROWS:
        return f"needs sources of at least {_FEWEST_ROWS} training rows; the smallest that could be made has {least}"
    return None


def _cost(subject: Subject) -> float:
    mixes = len(simplex_grid(len(_sources(subject, 0)[0]), _STEP))
    trainings = (2 * mixes + _NEW) * _REPEATS
    return 5 + trainings * (subject.training_seconds * min(1.0, _MOST_ROWS / len(subject.data.train)) + 0.05)


@chart(
    "transport-scaling",
    needs=Needs(retrainable=True, modalities=("tabular",), task="classification", test=_refusal),
    cost=_cost,
)
def transport_scaling(subject: Subject, budget: Budget) -> Finding:
    """Error of predicted scores on new mixes of sources, beside laws that do not see the data."""
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

    scaling = TransportScaling(
        score, sizes=(size // 2, size), grid_step=_STEP, n_repeats=_REPEATS, response="log_error", seed=budget.seed
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
    larger = 10 * size
    chosen = scaling.select(larger)
    tracks = float(np.corrcoef(table.transport, table.score)[0, 1])
    shares = "/".join(f"{100 * share:.0f}" for share in chosen.p)
    names = "/".join(source.name for source in sources)
    even = chosen.baselines["uniform"].predicted_score
    figure = blank("predicted accuracy", "accuracy on test rows")
    figure.add_scatter(
        x=predicted.round(4).tolist(),
        y=measured.round(4).tolist(),
        mode="markers",
        name="new mixes",
        marker={"color": INKS[0]},
    )
    ends = [float(min(predicted.min(), measured.min())), float(max(predicted.max(), measured.max()))]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line={"color": INKS[6], "dash": "dot"})
    return Finding(
        slug="transport-scaling",
        headline=f"With {words} as sources, the accuracy on new mixes is told within "
        f"{comparison.estimate.value:.1f} points at {size} rows ({comparison.controls[0].estimate.value:.1f} from the mix "
        f"alone); for {larger:,} rows the law picks {shares} from {names}.",
        numbers={
            "error of the prediction": comparison.estimate,
            "error from the mix alone": comparison.controls[0].estimate,
            "correlation of distance and accuracy over the trained mixes": Estimate.exact(tracks),
            f"predicted accuracy of the chosen mix at {larger:,} rows": Estimate.exact(100 * chosen.predicted_score, "%"),
            f"predicted accuracy of the uniform mix at {larger:,} rows": Estimate.exact(100 * even, "%"),
            "models trained on pilot rows": Estimate.exact(scaling.n_trainings_, "trainings"),
        },
        comparison=comparison,
        figure=figure,
        reading="Each point is a mix of the sources that the law was not fitted on: across what the law predicts from the "
        "transport distance between the mix and the validation rows, up what the model reached on test rows. On the "
        "dotted line both are equal.",
        advice="With samples of your own sources: theodolite run transport-scaling DATA.csv --source-column COLUMN "
        "--target LABEL --val VAL.csv --size ROWS.",
        seed=budget.seed,
        caveats=(
            f"The sources were made of one data set: {words}. Real sources differ in more than that.",
            f"The predicted accuracies at {larger:,} rows were not measured; they are projected from {size // 2} and {size}.",
            "The law predicts accuracy on validation rows and is scored on test rows, so their difference is in the error.",
        ),
    )  # fmt: skip
