"""The chart of neural clustering: the groups that a model's last hidden layer (or the inputs) fall into, and what they are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score

from theodolite.core.capture import activations
from theodolite.core.clustering import match_labels
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap, proportion
from theodolite.core.subject import Subject
from theodolite.networks.clustering import TELL
from theodolite.survey.activations.interaction_basis import flat_nodes
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding

_ROWS, _TEST = 4_000, 2_000
_GROUPS = 5  # of a regression
_MOST_GROUPS = 50
_FROZEN_EPOCHS = 20
_BATCH = 64
_STEPS = 600  # of the convolutional encoder on 8 x 8 images; fewer on larger ones
_SHOWN = 5  # nearest rows of a cluster
_WALL, _COLUMNS, _SIDE = 12, 8, 32
_MIXED = 0.2
_RESAMPLES = 200


def _groups(subject: Subject) -> int:
    return len(subject.data.classes) or _GROUPS


def _refusal(subject: Subject) -> str | None:
    k = _groups(subject)
    if k > _MOST_GROUPS:
        return f"needs at most {_MOST_GROUPS} classes, each of which gets a cluster; there are {k}"
    if len(subject.data.train) < 10 * k:
        return f"needs at least 10 training rows for each of {k} clusters; there are {len(subject.data.train)}"
    return None


def _learns(subject: Subject) -> bool:
    """Whether an encoder is trained: for images of a black box. A network's own hidden layer serves as it is."""
    shape = subject.data.shape
    return not subject.is_network and subject.data.modality == "image" and not (shape[-1] % 4 or shape[-2] % 4)


def _steps(subject: Subject) -> int:
    return int(np.clip(_STEPS * 64 / np.prod(subject.data.shape[-2:]), 100, _STEPS))


def _cost(subject: Subject) -> float:
    if not _learns(subject):
        return 4.0
    return 4.0 + 0.015 * _steps(subject) * max(1.0, float(np.prod(subject.data.shape)) / 64)


@dataclass(frozen=True, eq=False)
class _Space:
    """What is clustered, in words, on training and test rows; flat inputs of both, and their name, for the control."""

    name: str
    inputs: str
    train: np.ndarray
    test: np.ndarray
    flat: np.ndarray
    flat_test: np.ndarray


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in units of the training rows' deviation about their mean; what does not vary there is left out."""
    mean, scale = train.mean(axis=0), train.std(axis=0)
    moves = scale > 1e-9 * (1 + np.abs(mean))
    return (train[:, moves] - mean[moves]) / scale[moves], (test[:, moves] - mean[moves]) / scale[moves]


def _space(subject: Subject, budget: Budget) -> _Space:
    data = subject.data
    x, x_test = data.train.head(_ROWS).x, data.test.head(_TEST).x
    flat, flat_test = subject.flat("train")[:_ROWS], subject.flat("test")[:_TEST]
    inputs = "the inputs"
    if data.modality == "tabular":
        flat, flat_test = _standardised(flat, flat_test)
    elif data.forecasts:  # levels drift, and later ones would all be in the cluster of the last
        flat, flat_test = ((part - part[:, -1:]).flatten(1).double().numpy() for part in (x, x_test))
        inputs = "the windows less their last values"
    nodes = flat_nodes(subject) if subject.is_network else ()
    if nodes:
        held = [
            activations(subject.predictor, rows, [nodes[-1]], memory=budget.memory)[nodes[-1]] for rows in (x, x_test)
        ]
        train, test = _standardised(*(one.double().numpy() for one in held))
        return _Space(f"the hidden layer {nodes[-1]}", inputs, train, test, flat, flat_test)
    if _learns(subject):
        return _Space("codes that a convolutional encoder learnt", inputs, x.numpy(), x_test.numpy(), flat, flat_test)
    train, test = _standardised(flat, flat_test)
    return _Space(inputs, inputs, train, test, flat, flat_test)


def _fitted(subject: Subject, space: _Space, seed: int) -> TELL:
    n, k = len(space.train), _groups(subject)
    batch = min(_BATCH, n)
    if not _learns(subject):
        return TELL(k, encoder=None, init="kmeans", epochs=_FROZEN_EPOCHS, batch_size=batch, seed=seed).fit(space.train)
    epochs = max(3, round(_steps(subject) / (n // batch)))
    warm_up = epochs // 3
    return TELL(
        k, init="kmeans", warmup_epochs=warm_up, epochs=epochs - warm_up, batch_size=batch, seed=seed
    ).fit(space.train)  # fmt: skip


class _Told:
    """What clusters tell of the target: classes matched one to one, or the target's mean in each, by the training rows.

    The target of a forecast is read as the change from the last value: levels drift, and no cluster knows later ones.
    """

    def __init__(self, subject: Subject) -> None:
        self.classifies, self.forecasts = subject.data.task == "classification", subject.data.forecasts
        train, test = subject.data.train.head(_ROWS), subject.data.test.head(_TEST)
        self.y, self.y_test = (
            (part.y - part.x[:, -1, 0] if self.forecasts else part.y).numpy() for part in (train, test)
        )
        self.blocks = test.blocks

    @property
    def target(self) -> str:
        """What a regression tells, in words."""
        return "the next change" if self.forecasts else "the target"

    @property
    def words(self) -> str:
        """What is measured."""
        if self.classifies:
            return "test rows in the cluster of their class"
        return f"variance of {self.target} on test rows told"

    def measure(self, labels: np.ndarray, labels_test: np.ndarray) -> Estimate:
        """On test rows, with its interval."""
        if self.classifies:
            classes = match_labels(labels, self.y).permutation
            right = sum(classes.get(j) == c for j, c in zip(labels_test.tolist(), self.y_test.tolist()))
            return proportion(right, len(self.y_test), unit="of the test rows")
        means = {j: float(self.y[labels == j].mean()) for j in np.unique(labels).tolist()}
        whole = float(self.y.mean())
        error = (self.y_test - np.array([means.get(j, whole) for j in labels_test.tolist()])) ** 2
        return bootstrap(1 - error / (float(self.y_test.var()) or 1.0), unit="R2", groups=self.blocks)

    def null(self) -> Estimate:
        """All rows in one cluster."""
        return self.measure(np.zeros(len(self.y), dtype=int), np.zeros(len(self.y_test), dtype=int))

    def nmi(self, labels_test: np.ndarray, seed: int) -> Estimate:
        """Normalised mutual information with the classes of test rows."""
        pairs = np.stack([self.y_test, labels_test], axis=1)
        return bootstrap(
            pairs, lambda p: float(normalized_mutual_info_score(p[:, 0], p[:, 1])), seed=seed, resamples=_RESAMPLES, unit="NMI"
        )  # fmt: skip


@chart("tell-clustering", needs=Needs(test=_refusal), cost=_cost)
def tell_clustering(subject: Subject, budget: Budget) -> Finding:
    """How well clusters of the hidden layer or the inputs agree with the target on test rows, and what each is."""
    k, space, told = _groups(subject), _space(subject, budget), _Told(subject)
    model = _fitted(subject, space, budget.seed)
    labels, labels_test = model.labels_, model.predict(space.test)
    codes, codes_test = model.transform(space.train), model.transform(space.test)
    options: dict[str, Any] = {"n_init": 10, "random_state": budget.seed}
    raw: Any = KMeans(k, **options).fit(space.flat)
    two_step: Any = KMeans(k, **options).fit(codes)
    ours = told.measure(labels, labels_test)
    on_inputs = told.measure(raw.labels_, raw.predict(space.flat_test))
    on_codes = told.measure(two_step.labels_, two_step.predict(codes_test))
    comparison = Comparison(
        f"{told.words}, {k} clusters of {space.name}",
        ours,
        (
            Control(f"k-means on {space.inputs}", on_inputs, "closed-form"),
            Control("all rows in one cluster", told.null(), "null"),
            Control("k-means on the same codes", on_codes, "reference"),
        ),
    )
    numbers = {
        f"{told.words}, neural clustering": ours,
        f"{told.words}, k-means on {space.inputs}": on_inputs,
        f"{told.words}, k-means on the same codes": on_codes,
        "clusters with test rows": Estimate.exact(len(np.unique(labels_test)), f"of {k}"),
    }
    mixed = ""
    if told.classifies:
        numbers["NMI with the classes on test rows"] = nmi = told.nmi(labels_test, budget.seed)
        mixed = _mixed(labels_test, told.y_test, subject.data.classes)
        headline = (
            f"In {k} clusters of {space.name} {100 * ours.value:.0f} % of test rows are in the cluster of their class "
            f"(k-means on {space.inputs} {100 * on_inputs.value:.0f} %), NMI {nmi.value:.2f}; "
            f"{mixed or 'no cluster mixes two classes'}."
        )
    else:
        headline = (
            f"{k} clusters of {space.name} tell {_share(ours)} of the variance of {told.target} on test rows (k-means on "
            f"{space.inputs} {_share(on_inputs)})."
        )
    if model.reconstruction_r2_ is not None:
        numbers["variance of the inputs that the decoder gives back"] = Estimate.exact(model.reconstruction_r2_, "R2")
    return Finding(
        slug="tell-clustering",
        headline=headline,
        numbers=numbers,
        comparison=comparison,
        figure=_figure(subject, model, space, told, codes_test, labels_test),
        reading="Top left: test rows by their codes, in the two directions of largest variance, with the centres as crosses. Top "
        f"right: {'which classes' if told.classifies else f'which values of {told.target}'} each cluster holds. Bottom left: "
        f"{_third(subject)[1]}. Bottom right: squared distance of codes to their centres while training.",
        advice=_advice(comparison, mixed),
        seed=budget.seed,
        caveats=(
            "Clusters were found without labels on training rows, matched to the target by training rows and counted on test "
            "rows; intervals are over test rows, not over starts of the clustering.",
            _made(model, space),
        ),
    )  # fmt: skip


def _share(told: Estimate) -> str:
    """A share of variance in words; below 0 the clusters' means are worse than the mean of the test rows."""
    return f"{100 * max(told.value, 0.0):.0f} %" if told.value > -0.005 else f"none (R2 {told.value:.2f})"


def _made(model: TELL, space: _Space) -> str:
    if model.encoder is None:
        return (
            f"Here {space.name} served as the code, standardised and scaled to length 1, and only the centres were learnt; up to "
            f"{_ROWS:,} training rows. A hidden layer was itself trained with the target, which the inputs were not."
        )
    return f"The encoder was trained here for {len(model.history_)} epochs, few beside the paper's 3,000; up to {_ROWS:,} rows."


def _mixed(labels: np.ndarray, y: np.ndarray, classes: tuple[str, ...]) -> str:
    """The cluster in whose rows a second class has the largest share, in words; "" where none has a fifth."""
    best = (_MIXED, "")
    for j in np.unique(labels).tolist():
        counts = np.bincount(y[labels == j], minlength=len(classes))
        first, second = np.argsort(-counts, kind="stable")[:2].tolist()
        share = counts[second] / counts.sum()
        if counts.sum() >= 5 and share >= best[0]:
            best = (share, f"cluster {j} mixes {classes[first]} and {classes[second]}")
    return best[1]


def _advice(comparison: Comparison, mixed: str) -> str:
    name = comparison.controls[0].name
    if comparison.beats(comparison.controls[0]):
        text = f"These groups follow the target better than {name} does: use TELL.predict for rows without a label"
    else:
        text = f"These groups do not follow the target surely better than {name}, which is cheaper: use that"
    if mixed:
        text += f", and look at the rows of the mixed one ({mixed}) by TELL.explain: they may need another label or more clusters"
    return f"{text}. Try other numbers of clusters: the one used here is the number of classes, or {_GROUPS} for a regression."


# ---- the figure


def _third(subject: Subject) -> tuple[str, str]:
    """Kind of the panel that shows what clusters are, and how to read it."""
    if subject.data.modality == "image":
        return (
            "wall",
            "a column of test images for each cluster, those nearest to its centre first (the decoded centre on top, if any)",
        )
    if subject.data.modality == "tabular" and subject.data.features:
        return (
            "columns",
            "mean of each cluster's rows less the mean of all, in deviations, for the columns that differ most",
        )
    if subject.data.modality == "series":
        less = " less its last value" if subject.data.forecasts else ""
        return "series", f"mean of each cluster's series, first channel{less}, in the units of the data"
    return "distances", "distances of test rows to their own centre"


def _figure(
    subject: Subject, model: TELL, space: _Space, told: _Told, codes: np.ndarray, labels: np.ndarray
) -> go.Figure:
    figure = make_subplots(2, 2, horizontal_spacing=0.14, vertical_spacing=0.16)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, height=820, showlegend=False)
    flat = PCA(min(2, codes.shape[1]), random_state=0).fit(codes)
    for j in np.unique(labels).tolist():
        _dots(
            figure,
            flat.transform(codes[labels == j][:200]),
            f"cluster {j}",
            {"color": INKS[j % 6], "size": 4, "opacity": 0.6},
        )
    crosses: dict[str, Any] = {"color": "black", "size": 9, "symbol": "x"}
    _dots(figure, flat.transform(model.cluster_centers_), "centres", crosses)
    names = [f"cluster {j}" for j in range(model.n_clusters)]
    if told.classifies:
        table = np.zeros((model.n_clusters, len(subject.data.classes)))
        np.add.at(table, (labels, told.y_test), 1)
        _heat(figure, table, list(subject.data.classes), names, (1, 2), "Blues")
        figure.update_xaxes(title_text="class", row=1, col=2)
    else:
        for j in np.unique(labels).tolist():
            _box(figure, told.y_test[labels == j], names[j], INKS[j % 6], (1, 2))
        figure.update_yaxes(title_text=told.target, row=1, col=2)
    kind = _third(subject)[0]
    if kind == "wall":
        _heat(figure, _wall(subject, model, space, codes), None, None, (2, 1), "Greys_r")
        figure.update_yaxes(scaleanchor="x3", constrain="domain", row=2, col=1)  # pixels are square
    elif kind == "columns":
        x, x_test = _scaled_inputs(subject)
        means = np.stack(
            [x_test[labels == j].mean(axis=0) if (labels == j).any() else 0 * x[0] for j in range(model.n_clusters)]
        )
        top = np.argsort(-means.std(axis=0), kind="stable")[:_COLUMNS]
        _heat(figure, means[:, top], [subject.data.features[i] for i in top.tolist()], names, (2, 1), "RdBu")
    elif kind == "series":
        first = subject.data.test.x[:_TEST, :, 0].numpy()
        first = first - first[:, -1:] if told.forecasts else first
        for j in np.unique(labels).tolist():
            mean = first[labels == j].mean(axis=0).round(4).tolist()
            line = {"color": INKS[j % 6], "dash": "solid" if j < 6 else "dot"}
            figure.add_scatter(x=list(range(len(mean))), y=mean, mode="lines", name=names[j], line=line, row=2, col=1)
        figure.update_xaxes(title_text="step", row=2, col=1)
        figure.update_yaxes(title_text="mean of the cluster", row=2, col=1)
    else:
        distance = np.linalg.norm(codes - model.cluster_centers_[labels], axis=1)
        for j in np.unique(labels).tolist():
            _box(figure, distance[labels == j], names[j], INKS[j % 6], (2, 1))
    losses = [epoch.cluster for epoch in model.history_ if epoch.cluster is not None]
    band_line(figure, list(range(1, len(losses) + 1)), losses, name="cluster loss", ink=INKS[0], row=2, col=2)
    figure.update_xaxes(title_text="first direction", row=1, col=1)
    figure.update_yaxes(title_text="second direction", row=1, col=1)
    figure.update_xaxes(title_text="epoch after the warm-up", row=2, col=2)
    figure.update_yaxes(title_text="squared distance to the centre", row=2, col=2)
    return figure


def _scaled_inputs(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Training and test inputs in units of the training rows' deviation, every column kept."""
    x, x_test = subject.flat("train")[:_ROWS], subject.flat("test")[:_TEST]
    scale = x.std(axis=0)
    scale[scale == 0] = 1.0
    return (x - x.mean(axis=0)) / scale, (x_test - x.mean(axis=0)) / scale


def _dots(figure: go.Figure, at: np.ndarray, name: str, marker: dict[str, Any]) -> None:
    second = at[:, 1] if at.shape[1] > 1 else np.zeros(len(at))
    figure.add_trace(
        go.Scatter(x=at[:, 0].round(4).tolist(), y=second.round(4).tolist(), mode="markers", name=name, marker=marker),
        row=1, col=1,
    )  # fmt: skip


def _heat(
    figure: go.Figure, z: np.ndarray, x: list[str] | None, y: list[str] | None, at: tuple[int, int], scale: str
) -> None:
    middle = {"zmid": 0} if scale == "RdBu" else {}
    trace = go.Heatmap(z=z.round(3).tolist(), x=x, y=y, colorscale=scale, showscale=False, **middle)
    figure.add_trace(trace, row=at[0], col=at[1])
    figure.update_yaxes(autorange="reversed", row=at[0], col=at[1])
    if x is not None:
        figure.update_xaxes(type="category", row=at[0], col=at[1])  # classes are often called by numbers
    else:
        figure.update_xaxes(visible=False, row=at[0], col=at[1])
        figure.update_yaxes(visible=False, row=at[0], col=at[1])


def _box(figure: go.Figure, values: np.ndarray, name: str, ink: str, at: tuple[int, int]) -> None:
    trace = go.Box(y=values[:500].round(4).tolist(), name=name, marker={"color": ink}, boxpoints=False)
    figure.add_trace(trace, row=at[0], col=at[1])


def _wall(subject: Subject, model: TELL, space: _Space, codes: np.ndarray) -> np.ndarray:
    """The nearest test images of the first clusters, grey, after the decoded centre where there is one."""
    images = subject.data.test.x[:_TEST].numpy()
    pictures = None if model.encoder is None else model.decoded_centers_
    between, columns = float(images.min() + images.max()) / 2, []
    for center in range(min(_WALL, model.n_clusters)):
        nearest = np.argsort(np.linalg.norm(codes - model.cluster_centers_[center], axis=1), kind="stable")[:_SHOWN]
        shown = [_grey(images[i]) for i in nearest.tolist()]
        if pictures is not None:
            shown.insert(0, _grey(pictures[center]))
        columns.append(np.concatenate([np.pad(one, 1, constant_values=between) for one in shown], axis=0))
    return np.concatenate(columns, axis=1)


def _grey(image: np.ndarray) -> np.ndarray:
    """(channels, height, width) as (height, width), no larger than 32 pixels a side."""
    every = max(1, -(-max(image.shape[-2:]) // _SIDE))
    return image.mean(axis=0)[::every, ::every]
