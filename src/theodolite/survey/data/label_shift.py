"""The chart of latent label shift: what a column of domains tells about the classes without any label."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from theodolite.core.errors import DataError
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs, proportion
from theodolite.core.subject import Column, Dataset, Subject
from theodolite.data.latent_label_shift import (
    ClassCount,
    DomainsAlikeError,
    LatentLabelShift,
    cluster_shares,
    count_classes,
    match_labels,
    share_error,
)
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS, band_line, blank
from theodolite.survey.finding import Finding

_NAMES = ("site", "domain", "group", "hospital", "clinic", "center", "centre", "batch", "camera", "shop", "store")
_NEEDED = (
    "needs a column that names each row's domain: --domain COLUMN, or a column of categories called "
    f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
)
_FEWEST = 10
_LEVEL = 0.05
_POINTS = 600  # of the map


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows (n, p) without the column of domains, the number of each row's domain (n,), classes (n,)."""

    x: np.ndarray
    domain: np.ndarray
    y: np.ndarray

    def of(self, kept: np.ndarray) -> "_Part":
        """The rows of some domains, which are numbered by their place among them."""
        rows = np.isin(self.domain, kept)
        return _Part(self.x[rows], np.searchsorted(kept, self.domain[rows]), self.y[rows])


def domain_column(data: Dataset) -> Column | None:
    """The column that the user named, else the first one of categories that is called like a site and that the model's
    inputs hold level by level.
    """
    if data.domains is not None:
        return data.domains
    for column in data.columns:
        words = column.name.lower().replace("_", " ").replace("-", " ").split()
        as_features = all(feature in data.features for feature in column.features)
        if column.kind == "category" and as_features and any(name in words for name in _NAMES):
            return column
    return None


def _part(subject: Subject, column: Column, name: Any) -> _Part:
    x, rows = subject.flat(name), subject.data.parts[name]
    own = [i for i, one in enumerate(subject.data.features) if one == column.name or one.startswith(f"{column.name}=")]
    domain = x[:, own].argmax(axis=1) if rows.domain is None else rows.domain.numpy()
    return _Part(np.delete(x, own, axis=1), domain, rows.y.numpy())


def _usable_domains(train: _Part) -> np.ndarray:
    """Domains with at least 10 training rows."""
    domains, counts = np.unique(train.domain, return_counts=True)
    return domains[counts >= _FEWEST]


def _without_domains(subject: Subject) -> str | None:
    column, k = domain_column(subject.data), len(subject.data.classes)
    if column is None:
        return _NEEDED
    train = _part(subject, column, "train")
    needed, found = max(3, k), len(_usable_domains(train))
    if found < needed:
        return f"needs at least {needed} domains of {_FEWEST} training rows for {k} classes; column {column.name!r} has {found}"
    if not train.x.shape[1]:
        return f"needs columns besides {column.name!r}"
    return None


@chart(
    "latent-label-shift",
    needs=Needs(modalities=("tabular",), task="classification", test=_without_domains),
    cost=seconds(15),
)
def latent_label_shift(subject: Subject, budget: Budget) -> Finding:
    """Classes found without labels from the domains' differences, beside the labels and k-means on new rows."""
    data = subject.data
    column = domain_column(data)
    if column is None:
        raise DataError(_NEEDED)
    kept = _usable_domains(_part(subject, column, "train"))
    train, test = (_part(subject, column, name).of(kept) for name in ("train", "test"))
    k, names = len(data.classes), [column.levels[i] for i in kept]
    model = LatentLabelShift(k, seed=budget.seed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            model.fit(train.x, train.domain)
        except DomainsAlikeError:
            return _alike(model, train, column.name, names, budget.seed)
    mapped = match_labels(model.labels_, train.y).permutation
    right = np.array([mapped.get(c, -1) for c in model.predict(test.x, test.domain).tolist()]) == test.y
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
    truth = cluster_shares(train.y, train.domain, k)
    check = model.shift_test_
    explained = "explains" if check.p_value >= _LEVEL else "does not explain"
    verdict = f"label shift {explained} the differences (p = {check.p_value:.2g})"
    if k == len(kept):
        explained, verdict = "cannot be tested", "label shift cannot be tested with as many classes as values"
    kind, domain = np.unravel_index(model.class_shares_.argmax(), model.class_shares_.shape)
    classes = [f"{c + 1} ({data.classes[mapped[c]] if c in mapped else 'no class'})" for c in range(k)]
    count = count_classes(model.cluster_shares_, model.domain_rows_, seed=budget.seed)
    return Finding(
        slug="latent-label-shift",
        headline=f"Without labels, the {len(kept)} values of {column.name!r} show {k} hidden classes that match "
        f"{100 * comparison.estimate.value:.0f} % of the labels of new rows (k-means: {100 * plain_right.mean():.0f} %); "
        f"{verdict}.",
        numbers={
            "accuracy, k-means": comparison.controls[0].estimate,
            "L1 error of the class shares, mean over domains": mean_of_runs(
                share_error(model.class_shares_, truth), unit="(0 to 2)", within=(0, 2)
            ),
            **({} if k == len(kept) else {"p-value of label shift": Estimate.exact(check.p_value)}),
            "condition number of the class shares": Estimate.exact(model.condition_number_),
            "classes that stand out of sampling noise": Estimate.exact(count.rank, "singular values"),
        },
        comparison=comparison,
        figure=_figure(model, count, column.name, names, classes, budget.seed),
        reading=f"Top: each column is a value of {column.name!r}, each row a class found from how rows differ between them "
        f"(with the nearest label); colour is the class's share there. The largest is "
        f"{100 * model.class_shares_[kind, domain]:.0f} % of class {kind + 1} in {names[int(domain)]!r}. Lower left: the "
        "probabilities of a row's domain, flattened to two directions; a row that can be of one class only lies at that class's "
        "corner (cross). Lower right: singular values of the shares of clusters in domains; as many classes show as are above "
        "the noise (dotted). Labels were used only to name the classes and to score them.",
        advice=_advice(comparison, explained),
        seed=budget.seed,
        caveats=(
            "The number of classes is that of the labels; in data without labels count_classes tells how many the domains show.",
            f"The inputs are the columns without {column.name!r}, not the model's activations, which labels have shaped.",
            *(str(one.message) for one in told if issubclass(one.category, UserWarning)),
        ),
    )


def _figure(
    model: LatentLabelShift, count: ClassCount, column: str, names: list[str], classes: list[str], seed: int
) -> go.Figure:
    figure = make_subplots(
        2,
        2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=[0.42, 0.58],
        vertical_spacing=0.2,
        horizontal_spacing=0.12,
    )
    figure.update_layout(
        height=620, margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": -0.12}
    )
    bar = {"title": {"text": "share"}, "len": 0.4, "y": 0.8}
    figure.add_trace(
        go.Heatmap(
            x=names, y=classes, z=model.class_shares_.round(4).tolist(), zmin=0, zmax=1, colorscale="Blues", colorbar=bar
        ),
        row=1, col=1,
    )  # fmt: skip
    shown = np.sort(np.random.default_rng(seed).permutation(len(model.labels_))[:_POINTS])
    corners = model.domain_given_class_.T
    flat = PCA(2, random_state=seed).fit(model.out_of_fold_)
    at, corner = flat.transform(model.out_of_fold_[shown]).round(4), flat.transform(corners).round(4)
    for c, name in enumerate(classes):
        mine, ink = model.labels_[shown] == c, INKS[c % 6]
        figure.add_scatter(
            x=at[mine, 0].tolist(), y=at[mine, 1].tolist(), mode="markers", name=f"class {name}", legendgroup=name,
            marker={"color": ink, "size": 4, "opacity": 0.6}, row=2, col=1,
        )  # fmt: skip
        figure.add_scatter(
            x=[corner[c, 0].item()], y=[corner[c, 1].item()], mode="markers", name=f"corner of class {name}", legendgroup=name,
            showlegend=False, marker={"color": ink, "size": 13, "symbol": "x", "line": {"width": 1, "color": "white"}},
            row=2, col=1,
        )  # fmt: skip
    values = count.singular_values
    band_line(
        figure,
        list(range(1, len(values) + 1)),
        values.round(5).tolist(),
        name="singular values",
        ink=INKS[6],
        row=2,
        col=2,
        legend=False,
    )
    panel: dict[str, Any] = {"row": 2, "col": 2}
    figure.add_hline(
        y=count.noise_floor, line_dash="dot", line_width=1, line_color=INKS[6], annotation_text="sampling noise",
        annotation_position="top right", **panel,
    )  # fmt: skip
    figure.update_xaxes(title_text=column, type="category", row=1, col=1)
    figure.update_yaxes(title_text="class found", type="category", dtick=1, row=1, col=1)
    figure.update_xaxes(title_text="first direction of p(domain | row)", row=2, col=1)
    figure.update_yaxes(title_text="second direction", row=2, col=1)
    figure.update_xaxes(title_text="number", dtick=1 if len(values) <= 12 else None, row=2, col=2)
    figure.update_yaxes(title_text="singular value", rangemode="tozero", row=2, col=2)
    return figure


def _alike(model: LatentLabelShift, train: _Part, column: str, names: list[str], seed: int) -> Finding:
    """What can be said where the domains do not differ."""
    scores, n = model.out_of_fold_, len(train.domain)
    right = int((scores.argmax(axis=1) == train.domain).sum())
    largest = int(np.bincount(train.domain).max())
    comparison = Comparison(
        f"training rows whose {column!r} a classifier names, out of fold",
        proportion(right, n, unit="of the rows"),
        (Control("always the largest one", proportion(largest, n, unit="of the rows"), "null"),),
    )
    figure = blank(f"{column}, as scored", column)
    mean = np.stack([scores[train.domain == d].mean(axis=0) for d in range(len(names))])
    figure.add_trace(go.Heatmap(x=names, y=names, z=mean.round(4).tolist(), zmin=0, colorscale="Blues"))
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    return Finding(
        slug="latent-label-shift",
        headline=f"The {len(names)} values of {column!r} look alike: a classifier names the right one for "
        f"{100 * right / n:.0f} % of the rows, always the largest is right for {100 * largest / n:.0f} %; so they show no hidden "
        "classes.",
        numbers={
            "log loss of the domains, out of fold": Estimate.exact(model.log_loss_, "nats"),
            "log loss of the domains' shares alone": Estimate.exact(model.prior_log_loss_, "nats"),
        },
        comparison=comparison,
        figure=figure,
        reading=f"Mean probability that rows of each value of {column!r} (up) are given for each value (across); columns of one "
        "colour mean that the rows do not tell where they come from.",
        advice=f"One model for all values of {column!r} is safe as far as these columns show; nothing about classes can be "
        "learnt from their differences.",
        seed=seed,
        caveats=("A linear classifier of the columns was asked; differences that it cannot see may be there.",),
    )


def _advice(comparison: Comparison, explained: str) -> str:
    if explained == "cannot be tested":
        return (
            "Give more values of the domain than there are classes: with as many, each value can be taken for a class of its "
            "own, and nothing in the data can speak against it."
        )
    if explained != "explains":
        return (
            "The domains differ in more than their shares of the classes: look for a measurement that differs between them "
            "before trusting either the classes found or one model for all domains."
        )
    if comparison.loses_to:
        return "The domains do not surely show these classes better than plain clusters do; label a few rows instead."
    return "Label shift explains the domains: reweight the model's probabilities by each domain's own class shares."
