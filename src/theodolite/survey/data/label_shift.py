"""The chart of latent label shift: what a column of sites tells about the classes without any label."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from sklearn.cluster import KMeans

from theodolite.core.errors import DataError
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs, proportion
from theodolite.core.subject import Column, Dataset, Subject
from theodolite.data.latent_label_shift import LatentLabelShift, cluster_shares, match_labels, share_error
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import blank
from theodolite.survey.finding import Finding

_NAMES = ("site", "domain", "group", "hospital", "clinic", "center", "centre", "batch", "camera", "shop", "store")
_NEEDED = f"needs a column of categories that names each row's domain, called {', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
_FEWEST = 10
_LEVEL = 0.05


def domain_column(data: Dataset) -> Column | None:
    """The first column of categories that is called like a site, and that the model's inputs hold level by level."""
    for column in data.columns:
        words = column.name.lower().replace("_", " ").replace("-", " ").split()
        as_features = all(f"{column.name}={level}" in data.features for level in column.levels)
        if column.kind == "category" and as_features and any(name in words for name in _NAMES):
            return column
    return None


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows (n, p) without the column of sites, the number of each row's site (n,), classes (n,)."""

    x: np.ndarray
    site: np.ndarray
    y: np.ndarray


def _part(subject: Subject, column: Column, name: Any, kept: np.ndarray | None = None) -> _Part:
    features = list(subject.data.features)
    places = [features.index(f"{column.name}={level}") for level in column.levels]
    x, y = subject.flat(name), subject.data.parts[name].y.numpy()
    site = x[:, places].argmax(axis=1)
    rows = np.ones(len(x), dtype=bool) if kept is None else np.isin(site, kept)
    return _Part(np.delete(x, places, axis=1)[rows], site[rows], y[rows])


def _usable_sites(subject: Subject, column: Column) -> np.ndarray:
    """Sites with at least 10 training rows."""
    sites, counts = np.unique(_part(subject, column, "train").site, return_counts=True)
    return sites[counts >= _FEWEST]


def _without_sites(subject: Subject) -> str | None:
    data = subject.data
    column = domain_column(data)
    if column is None:
        return _NEEDED
    needed = max(3, len(data.classes))
    sites = _usable_sites(subject, column)
    if len(sites) < needed:
        return (
            f"needs at least {needed} domains of {_FEWEST} training rows for {len(data.classes)} classes; column {column.name!r} "
            f"has {len(sites)}"
        )
    if len(data.features) == len(column.levels):
        return f"needs columns besides {column.name!r}"
    return None


@chart(
    "latent-label-shift",
    needs=Needs(modalities=("tabular",), task="classification", test=_without_sites),
    cost=seconds(15),
)
def latent_label_shift(subject: Subject, budget: Budget) -> Finding:
    """Classes found without labels from the sites' differences, beside the labels and k-means on new rows."""
    data = subject.data
    column = domain_column(data)
    if column is None:
        raise DataError(_NEEDED)
    kept = _usable_sites(subject, column)
    train, test = (_part(subject, column, name, kept) for name in ("train", "test"))
    k, names = len(data.classes), [column.levels[i] for i in kept]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        model = LatentLabelShift(k, seed=budget.seed).fit(train.x, train.site)
    mapped = match_labels(model.labels_, train.y).permutation
    right = np.array([mapped.get(c, -1) for c in model.predict(test.x, test.site).tolist()]) == test.y
    scale = np.where((deviation := train.x.std(axis=0)) > 0, deviation, 1.0)
    starts: Any = 10
    plain: Any = KMeans(k, n_init=starts, random_state=budget.seed).fit(train.x / scale)
    clusters = match_labels(plain.labels_, train.y).permutation
    plain_right = np.array([clusters.get(c, -1) for c in plain.predict(test.x / scale).tolist()]) == test.y
    commonest = np.bincount(train.y).argmax()
    n = len(test.y)
    comparison = Comparison(
        "accuracy of the classes found, on test rows, named by the training rows' labels",
        proportion(int(right.sum()), n, unit="accuracy"),
        (
            Control("k-means on the columns", proportion(int(plain_right.sum()), n, unit="accuracy"), "closed-form"),
            Control("the commonest class", proportion(int((test.y == commonest).sum()), n, unit="accuracy"), "null"),
        ),
    )
    truth = cluster_shares(train.y, train.site, k)
    check = model.shift_test_
    explained = "explains" if check.p_value >= _LEVEL else "does not explain"
    kind, site = np.unravel_index(model.class_shares_.argmax(), model.class_shares_.shape)
    found_names = [data.classes[mapped[c]] if c in mapped else "no class" for c in range(k)]
    figure = blank(column.name, "class found (nearest label)")
    figure.add_trace(
        go.Heatmap(
            x=names, y=[f"{c + 1} ({name})" for c, name in enumerate(found_names)], z=model.class_shares_.round(4).tolist(),
            zmin=0, zmax=1, colorscale="Blues", colorbar={"title": {"text": "share"}},
        )
    )  # fmt: skip
    figure.update_xaxes(type="category")
    return Finding(
        slug="latent-label-shift",
        headline=f"Without labels, the {len(kept)} values of {column.name!r} show {k} hidden classes that match "
        f"{100 * comparison.estimate.value:.0f} % of the labels of new rows (k-means: {100 * plain_right.mean():.0f} %); label "
        f"shift {explained} the differences (p = {check.p_value:.2g}).",
        numbers={
            "accuracy, k-means": comparison.controls[0].estimate,
            "L1 error of the class shares, mean over domains": mean_of_runs(
                share_error(model.class_shares_, truth), unit="(0 to 2)", within=(0, 2)
            ),
            "p-value of label shift": Estimate.exact(check.p_value),
            "condition number of the class shares": Estimate.exact(model.condition_number_),
        },
        comparison=comparison,
        figure=figure,
        reading=f"Each column is a value of {column.name!r}, each row a class found from how rows differ between them; colour is "
        f"the class's share there. The largest is {100 * model.class_shares_[kind, site]:.0f} % of class {kind + 1} in "
        f"{names[int(site)]!r}. Labels were used only to name the classes and to score them.",
        advice=_advice(comparison, explained),
        seed=budget.seed,
        caveats=(
            "The number of classes is that of the labels; in data without labels count_classes tells how many the domains show.",
            f"The inputs are the columns without {column.name!r}, not the model's activations, which know it.",
            *(str(one.message) for one in told if issubclass(one.category, UserWarning)),
        ),
    )  # fmt: skip


def _advice(comparison: Comparison, explained: str) -> str:
    if explained != "explains":
        return (
            "The domains differ in more than their shares of the classes: look for a measurement that differs between them "
            "before trusting either the classes found or one model for all domains."
        )
    if comparison.loses_to:
        return "The domains do not show these classes better than plain clusters do; label a few rows instead."
    return "Label shift explains the domains: reweight the model's probabilities by each domain's own class shares."
