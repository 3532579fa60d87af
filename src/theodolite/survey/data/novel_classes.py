"""The chart of novel classes: the groups of the rows that nobody has labelled, and a trial on classes made nameless."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from theodolite.core.clustering import match_labels
from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.core.subject import Dataset, Subject
from theodolite.data.novel_classes import (
    PBN,
    ClusterCount,
    ClusterDescription,
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
_FEWEST = 20  # rows without a label, below which there is nothing to group
_CARDS = 5  # groups that are told in words
_DEFAULT = 0.5  # weight of the known labels where too few classes are known to choose it


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
    """Half of the classes, but no more than leave three known ones, which tuning needs; two of four."""
    return min(classes // 2, max(2, classes - 3))


def _cost(subject: Subject) -> float:
    data = subject.data
    rows = min(len(data.train), _MOST_ROWS) + (0 if data.unlabelled is None else min(len(data.unlabelled), _MOST_ROWS))
    return 6.0 + 0.01 * int(np.prod(data.shape)) + 0.002 * rows


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


@dataclass(frozen=True, eq=False)
class _Groups:
    """What was found in rows without a known class: the model, its cards, the numbers of groups in two spaces."""

    made: PBN
    known: np.ndarray
    new: np.ndarray
    cards: list[ClusterDescription]
    counts: dict[str, ClusterCount]


def _groups(subject: Subject, made: PBN, known: tuple[np.ndarray, np.ndarray], new: np.ndarray, most: int) -> _Groups:
    """``made`` was fitted on rows ``known`` with their labels and on rows ``new`` without; up to ``most`` groups are tried."""
    data, x = subject.data, np.concatenate([known[0], new])
    moves = (scale := x.std(axis=0)) > 0
    inputs = (new[:, moves] - x[:, moves].mean(axis=0)) / scale[moves]
    tried = range(2, most)
    counts = {
        "latent space": estimate_n_clusters(_unit(made.transform(new)), tried, seed=made.seed),
        "input columns": estimate_n_clusters(inputs, tried, seed=made.seed),
    }
    one_column_each = len(data.features) == x.shape[1]  # of a series, features names the channels
    names = data.features if one_column_each else tuple(f"column {i}" for i in range(x.shape[1]))
    cards = describe_clusters(
        _in_units(data, new), made.labels_, names, known=(_in_units(data, known[0]), known[1]), seed=made.seed
    )
    return _Groups(made, known[0], new, cards, counts)


def _in_units(data: Dataset, x: np.ndarray) -> np.ndarray:
    """Rows in the units of the file."""
    if not data.scaling:
        return x
    shift, scale = np.array(data.scaling).T
    return shift + scale * x


def _unlabelled(subject: Subject, base: PBN, w: float) -> _Groups | None:
    """The groups of the rows that nobody has labelled, None where there are hardly any."""
    data = subject.data
    if data.unlabelled is None or len(data.unlabelled) < _FEWEST:
        return None
    new = data.unlabelled[:_MOST_ROWS].double().numpy()
    known, y = subject.flat("train")[:_MOST_ROWS], data.train.y.numpy()[:_MOST_ROWS]
    made = PBN(w=w, epochs=base.epochs, batch_size=_BATCH, lr=base.lr, seed=base.seed)
    made.fit(np.concatenate([known, new]), np.concatenate([y, np.full(len(new), -1)]))
    named = np.array(data.classes)[y]
    return _groups(subject, made, (known, named), new, 2 * len(data.classes) + 4)


@chart("novel-class-discovery", needs=Needs(task="classification", classes=4, test=_refusal), cost=_cost)
def novel_class_discovery(subject: Subject, budget: Budget) -> Finding:
    """How well rows of classes whose names are hidden fall into groups, beside k-means; and groups of unlabelled rows."""
    rows, classes = _hide(subject, budget.seed), subject.data.classes
    k = len(rows.names)
    epochs = max(5, round(_STEPS * _BATCH / len(rows.x)))
    made = PBN(w=_DEFAULT, n_novel=k, epochs=epochs, batch_size=_BATCH, lr=3e-3, seed=budget.seed)
    chosen = f"w is {_DEFAULT}, the default: choosing it takes three known classes beside the hidden ones"
    if len(classes) - k >= 3:
        folds = HiddenClassKFold(min(2, (len(classes) - k) // 2), seed=budget.seed)
        made = tune_hidden(made, {"w": list(_WEIGHTS)}, rows.x, rows.y, folds=folds, seed=budget.seed).refit
        chosen = f"w was chosen among {', '.join(map(str, _WEIGHTS))} without the hidden labels"
    else:
        made.fit(rows.x, rows.y)
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
    named = np.array(classes)[rows.truth[~rows.new]]
    trial = _groups(subject, made, (rows.x[~rows.new], named), rows.x[rows.new], min(16, 2 * k + 4))
    comparison = Comparison(
        f"test rows of {k} hidden classes in the right group, number of classes known",
        ours,
        (Control("k-means on the input columns", theirs, "closed-form"), Control("all in one group", one, "null")),
    )
    lost = theirs.low > ours.high
    verdict = "more than" if comparison.beats(comparison.controls[0]) else "not told apart from"
    if lost:
        verdict = "fewer than"
    told = f"{100 * ours.value:.0f} % of their unseen rows into the right group, {verdict} k-means' {100 * theirs.value:.0f} %"
    found, real = trial.counts["latent space"].k, _unlabelled(subject, made, made.w)
    headline = (
        f"With {k} of {len(classes)} classes made nameless here as a trial, discovery puts {told}; the silhouette counts "
        f"{_groups_in_words(found)}."
    )
    if real is not None:
        headline = (
            f"{len(real.new):,} rows without a label form {_groups_in_words(real.made.n_novel_)} (silhouette "
            f"{_silhouette(real):.2f}); in a trial with {k} of {len(classes)} classes made nameless, discovery puts {told}."
        )
    return Finding(
        slug="novel-class-discovery",
        headline=headline,
        numbers={
            "test rows in the right group, PBN": ours,
            "test rows in the right group, k-means on the input columns": theirs,
            "number of groups by the silhouette, latent space": Estimate.exact(found, "groups"),
            "number of groups by the silhouette, input columns": Estimate.exact(trial.counts["input columns"].k, "groups"),
            "true number of hidden classes": Estimate.exact(k, "classes"),
            "weight of the known labels": Estimate.exact(made.w, "w"),
            **({} if real is None else _real_numbers(real)),
        },
        comparison=comparison,
        figure=_figure(trial, rows, classes, budget.seed) if real is None else _real_figure(real, budget.seed),
        reading=_reading(rows, k) if real is None else _real_reading(real),
        advice=("Here k-means on the columns found hidden classes better; try it on the rows without a label. " if lost else "")
        + _advice(trial if real is None else real, real is not None),
        seed=budget.seed,
        caveats=(
            (
                "This subject has no unlabelled rows, so some of its classes were hidden, at random; other classes may be easier "
                "or harder to find."
                if real is None
                else f"In the trial the classes {', '.join(rows.names)} were hidden, chosen at random; how well the groups of "
                "the rows without a label fit cannot be told without labels."
            )
            + " Groups were matched to classes on training rows and counted on test rows.",
            f"{chosen}; the other settings are defaults. At most {_MOST_ROWS:,} rows of a kind. Intervals are over test rows, "
            "not over trainings.",
        ),
    )  # fmt: skip


def _groups_in_words(n: int) -> str:
    return f"{n} group{'s' if n != 1 else ''}"


def _silhouette(found: _Groups) -> float:
    return float(found.counts["latent space"].scores.mean(axis=1).max())


def _real_numbers(real: _Groups) -> dict[str, Estimate]:
    return {
        "rows without a label": Estimate.exact(len(real.new), "rows"),
        "groups of rows without a label, latent space": Estimate.exact(real.made.n_novel_, "groups"),
        "groups of rows without a label, input columns": Estimate.exact(real.counts["input columns"].k, "groups"),
        "silhouette of these groups": Estimate.exact(_silhouette(real)),
    }


def _reading(rows: _Hidden, k: int) -> str:
    return (
        f"The classes {', '.join(rows.names)} were treated as if they had no name. Left: the learnt space, test rows of these "
        "classes in colour over training rows of the known ones in grey; groups that stand apart can be found. Right: the "
        f"silhouette for each number of groups, best where it is largest; {k} is the truth (dotted)."
    )


def _real_reading(real: _Groups) -> str:
    return (
        "Left: the learnt space, rows without a label in the colour of their group over training rows of the known classes in "
        "grey; a group that stands apart from the grey is new. Right: the silhouette for each number of groups, best where it is "
        f"largest; {real.made.n_novel_} were taken (dotted)."
    )


def _advice(found: _Groups, real: bool) -> str:
    cards = sorted(found.cards, key=lambda card: -card.rows)
    if real:
        more = f" and {len(cards) - _CARDS} smaller groups" if len(cards) > _CARDS else ""
        return (
            f"Look at some rows of each group and name it: {'; '.join(map(str, cards[:_CARDS]))}{more}. Each row's group is "
            "written by: theodolite run novel-class-discovery DATA.csv --label COLUMN --out FILE."
        )
    return (
        "With rows of your own that have no label: theodolite survey --data DATA.csv --target COLUMN --missing drop, or "
        f"theodolite run novel-class-discovery DATA.csv --label COLUMN. The largest group here, in words: {cards[0]}."
    )


def _unit(codes: np.ndarray) -> np.ndarray:
    return codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)


def _map(found: _Groups, new: np.ndarray, colours: dict[str, np.ndarray], truth: int, seed: int) -> go.Figure:
    """Rows ``new`` by colour over the known ones, and the silhouette against the number of groups."""
    figure = make_subplots(1, 2, column_widths=[0.55, 0.45], horizontal_spacing=0.12)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.15})
    known, codes = found.made.transform(found.known[:_POINTS]), found.made.transform(new)
    flat = PCA(min(2, known.shape[1]), random_state=seed).fit(np.concatenate([known, codes]))

    def dots(codes: np.ndarray, name: str, ink: str, size: int) -> None:
        at = flat.transform(codes)
        second = at[:, 1] if at.shape[1] > 1 else np.zeros(len(at))
        figure.add_scatter(
            x=at[:, 0].round(4).tolist(), y=second.round(4).tolist(), mode="markers", name=name,
            marker={"color": ink, "size": size, "opacity": 0.7}, row=1, col=1,
        )  # fmt: skip

    dots(known, "known classes", INKS[6], 4)
    for i, (name, mine) in enumerate(colours.items()):
        if mine.any():
            dots(codes[mine], name, INKS[i % 6], 6)
    for (name, count), ink in zip(found.counts.items(), (INKS[0], INKS[1]), strict=True):
        band_line(
            figure, count.tried, count.scores.mean(axis=1).tolist(), name=f"silhouette, {name}", ink=ink,
            low=count.scores.min(axis=1).tolist(), high=count.scores.max(axis=1).tolist(), row=1, col=2,
        )  # fmt: skip
    panel: dict[str, Any] = {"row": 1, "col": 2}
    figure.add_vline(x=truth, line_dash="dot", line_width=1, line_color=INKS[6], **panel)
    figure.update_xaxes(title_text="first direction", row=1, col=1)
    figure.update_yaxes(title_text="second direction", row=1, col=1)
    figure.update_xaxes(title_text="number of groups", row=1, col=2)
    figure.update_yaxes(title_text="silhouette", row=1, col=2)
    return figure


def _figure(trial: _Groups, rows: _Hidden, classes: tuple[str, ...], seed: int) -> go.Figure:
    shown, truth = rows.x_test[:_POINTS], rows.truth_test[:_POINTS]
    colours = {f"hidden: {classes[c]}": truth == c for c in np.unique(rows.truth_test).tolist()}
    return _map(trial, shown, colours, len(rows.names), seed)


def _real_figure(real: _Groups, seed: int) -> go.Figure:
    shown = np.sort(np.random.default_rng(seed).permutation(len(real.new))[:_POINTS])
    colours = {f"group {c}": real.made.labels_[shown] == c for c in range(real.made.n_novel_)}
    return _map(real, real.new[shown], colours, real.made.n_novel_, seed)
