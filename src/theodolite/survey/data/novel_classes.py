"""The chart of novel classes: had some classes no name yet, would their rows fall into the right groups?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from plotly.subplots import make_subplots
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from theodolite.core.clustering import match_labels
from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.core.subject import Subject
from theodolite.data.novel_classes import (
    PBN,
    ClusterCount,
    HiddenClassKFold,
    describe_clusters,
    estimate_n_clusters,
    tune_hidden,
)
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line
from theodolite.survey.finding import Finding

_MOST_ROWS = 3000
_MOST_COLUMNS = 300
_WEIGHTS = (0.1, 0.5, 0.85)
_STEPS = 300  # of one training
_BATCH = 256
_POINTS = 400  # of the map


def _refusal(subject: Subject) -> str | None:
    data = subject.data
    columns = int(np.prod(data.shape))
    if columns > _MOST_COLUMNS:
        return f"needs at most {_MOST_COLUMNS} columns; these rows have {columns} numbers"
    train, test = (
        np.sort(np.bincount(part.y.numpy()[:_MOST_ROWS], minlength=len(data.classes)))
        for part in (data.train, data.test)
    )
    hidden = _hidden_count(len(data.classes))
    if train[0] < 10 or train[:hidden].sum() < 40 or test[:hidden].sum() < 20:
        return "needs at least 10 training rows of each class, and 20 test rows of the classes that are hidden"
    return None


def _hidden_count(classes: int) -> int:
    """Half of the classes, but no more than leave three known ones, which tuning needs."""
    return min(classes // 2, classes - 3)


def _cost(subject: Subject) -> float:
    return 6.0 + 0.01 * int(np.prod(subject.data.shape)) + 0.002 * min(len(subject.data.train), _MOST_ROWS)


@dataclass(frozen=True, eq=False)
class _Hidden:
    """Training rows with the labels that a method may see (-1: hidden), and test rows of the hidden classes."""

    x: np.ndarray
    y: np.ndarray
    truth: np.ndarray
    x_test: np.ndarray
    truth_test: np.ndarray
    names: list[str]

    @property
    def new(self) -> np.ndarray:
        """Whether a training row is of a hidden class."""
        return self.y == -1


def _hide(subject: Subject, seed: int) -> _Hidden:
    data = subject.data
    hidden = np.random.default_rng(seed).permutation(len(data.classes))[: _hidden_count(len(data.classes))]
    truth = data.train.y.numpy()[:_MOST_ROWS]
    inside = np.isin(data.test.y.numpy(), hidden)
    return _Hidden(
        subject.flat("train")[:_MOST_ROWS], np.where(np.isin(truth, hidden), -1, truth), truth,
        subject.flat("test")[inside], data.test.y.numpy()[inside], [data.classes[c] for c in np.sort(hidden)],
    )  # fmt: skip


def _right(labels: np.ndarray, answers: np.ndarray, rows: _Hidden) -> Estimate:
    """Share of test rows in the group of their class; groups are matched to classes on the training rows."""
    group = match_labels(labels, rows.truth[rows.new]).permutation
    right = [group.get(answer) == truth for answer, truth in zip(answers.tolist(), rows.truth_test.tolist())]
    return proportion(int(np.sum(right)), len(right), unit="of the test rows in the right group")


@chart("novel-class-discovery", needs=Needs(task="classification", classes=5, test=_refusal), cost=_cost)
def novel_class_discovery(subject: Subject, budget: Budget) -> Finding:
    """How well rows of classes whose names are hidden fall into groups, beside k-means, on test rows."""
    rows = _hide(subject, budget.seed)
    k = len(rows.names)
    epochs = max(5, round(_STEPS * _BATCH / len(rows.x)))
    base = PBN(n_novel=k, epochs=epochs, batch_size=_BATCH, lr=3e-3, seed=budget.seed)
    folds = HiddenClassKFold(min(2, (len(subject.data.classes) - k) // 2), seed=budget.seed)
    made: PBN = tune_hidden(base, {"w": list(_WEIGHTS)}, rows.x, rows.y, folds=folds, seed=budget.seed).refit
    shift, scale = rows.x.mean(axis=0), rows.x.std(axis=0)
    moves = scale > 0
    inputs, inputs_test = ((x[:, moves] - shift[moves]) / scale[moves] for x in (rows.x, rows.x_test))
    options: dict[str, Any] = {"n_init": 10, "random_state": budget.seed}
    plain: Any = KMeans(k, **options).fit(inputs[rows.new])
    ours = _right(made.labels_, made.predict(rows.x_test), rows)
    theirs = _right(plain.labels_, plain.predict(inputs_test), rows)
    common = np.bincount(rows.truth[rows.new]).argmax()
    one = proportion(
        int((rows.truth_test == common).sum()), len(rows.truth_test), unit="of the test rows in the right group"
    )
    codes = made.transform(rows.x[rows.new])
    tried = range(2, min(16, 2 * k + 4))
    counts = {
        "latent space": estimate_n_clusters(_unit(codes), tried, seed=budget.seed),
        "input columns": estimate_n_clusters(inputs[rows.new], tried, seed=budget.seed),
    }
    comparison = Comparison(
        f"test rows of {k} hidden classes in the right group, number of classes known",
        ours,
        (Control("k-means on the input columns", theirs, "closed-form"), Control("all in one group", one, "null")),
    )
    verdict = "more than" if comparison.beats(comparison.controls[0]) else "not told apart from"
    if theirs.low > ours.high:
        verdict = "fewer than"
    one_column_each = len(subject.data.features) == rows.x.shape[1]  # of a series, features names the channels
    names = subject.data.features if one_column_each else tuple(f"column {i}" for i in range(rows.x.shape[1]))
    cards = describe_clusters(
        rows.x[rows.new], made.labels_, names, known=(rows.x[~rows.new], rows.y[~rows.new]), seed=budget.seed
    )
    found = counts["latent space"].k
    return Finding(
        slug="novel-class-discovery",
        headline=f"With {k} of {len(subject.data.classes)} classes made nameless here as a trial, discovery puts "
        f"{100 * ours.value:.0f} % of their unseen rows into the right group, {verdict} k-means' {100 * theirs.value:.0f} %; "
        f"the silhouette counts {found} group{'s' if found != 1 else ''}.",
        numbers={
            "test rows in the right group, PBN": ours,
            "test rows in the right group, k-means on the input columns": theirs,
            "number of groups by the silhouette, latent space": Estimate.exact(found, "groups"),
            "number of groups by the silhouette, input columns": Estimate.exact(counts["input columns"].k, "groups"),
            "true number of hidden classes": Estimate.exact(k, "classes"),
            "weight of the known labels, chosen by hiding known classes": Estimate.exact(made.w, "w"),
        },
        comparison=comparison,
        figure=_figure(made, rows, counts, subject.data.classes, budget.seed),
        reading=f"The classes {', '.join(rows.names)} were treated as if they had no name. Left: the learnt space, test rows "
        "of these classes in colour over training rows of the known ones in grey; groups that stand apart can be found. Right: "
        f"the silhouette for each number of groups, best where it is largest; {k} is the truth (dotted).",
        advice="With rows of your own that have no label: theodolite run novel-class-discovery DATA.csv --label COLUMN. "
        f"The largest group here, in words: {max(cards, key=lambda card: card.rows)}.",
        seed=budget.seed,
        caveats=(
            "This subject has no unlabelled rows, so some of its classes were hidden, at random; other classes may be easier or "
            "harder to find. Groups were matched to classes on training rows and counted on test rows.",
            f"w was chosen among {', '.join(map(str, _WEIGHTS))} without the hidden labels; the other settings are defaults. "
            f"At most {_MOST_ROWS:,} training rows. Intervals are over test rows, not over trainings.",
        ),
    )  # fmt: skip


def _unit(codes: np.ndarray) -> np.ndarray:
    return codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)


def _figure(made: PBN, rows: _Hidden, counts: dict[str, ClusterCount], classes: tuple[str, ...], seed: int):
    figure = make_subplots(1, 2, column_widths=[0.55, 0.45], horizontal_spacing=0.12)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.15})
    known, new = made.transform(rows.x[~rows.new][:_POINTS]), made.transform(rows.x_test[:_POINTS])
    flat = PCA(min(2, known.shape[1]), random_state=seed).fit(np.concatenate([known, new]))

    def dots(codes: np.ndarray, name: str, ink: str, size: int) -> None:
        at = flat.transform(codes)
        second = at[:, 1] if at.shape[1] > 1 else np.zeros(len(at))
        figure.add_scatter(
            x=at[:, 0].round(4).tolist(), y=second.round(4).tolist(), mode="markers", name=name,
            marker={"color": ink, "size": size, "opacity": 0.7}, row=1, col=1,
        )  # fmt: skip

    dots(known, "known classes", INKS[6], 4)
    for i, c in enumerate(np.unique(rows.truth_test).tolist()):
        mine = rows.truth_test[:_POINTS] == c
        if mine.any():
            dots(new[mine], f"hidden: {classes[c]}", INKS[i % 6], 6)
    for (name, count), ink in zip(counts.items(), (INKS[0], INKS[1]), strict=True):
        band_line(
            figure, count.tried, count.scores.mean(axis=1).tolist(), name=f"silhouette, {name}", ink=ink,
            low=count.scores.min(axis=1).tolist(), high=count.scores.max(axis=1).tolist(), row=1, col=2,
        )  # fmt: skip
    panel: dict[str, Any] = {"row": 1, "col": 2}
    figure.add_vline(x=len(rows.names), line_dash="dot", line_width=1, line_color=INKS[6], **panel)
    figure.update_xaxes(title_text="first direction", row=1, col=1)
    figure.update_yaxes(title_text="second direction", row=1, col=1)
    figure.update_xaxes(title_text="number of groups", row=1, col=2)
    figure.update_yaxes(title_text="silhouette", row=1, col=2)
    return figure
