"""The chart of label geometry: what distances between the classes add to the answers."""

import numpy as np

from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.predictions.label_geometry import (
    FrechetPredictor,
    LabelMetric,
    Locus,
    locus,
    next_class,
    random_tree_metric,
)
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS, band_line, blank, level_line
from theodolite.survey.finding import Finding

_DRAWS = 20
_LARGEST_LOCUS = 60
_SMALLEST = 1e-12


def derived_metric(subject: Subject) -> tuple[LabelMetric, str]:
    """A metric on the class names that the subject itself suggests, and its name in words."""
    data = subject.data
    numbers = [_number(name) for name in data.classes]
    if all(number is not None for number in numbers):
        values = np.array(numbers, dtype=np.float64)
        return LabelMetric.from_matrix(
            np.abs(values[:, None] - values), data.classes
        ), "difference of the class numbers"
    x, y = subject.flat("train"), data.train.y.numpy()
    scale = np.where((deviation := x.std(axis=0)) > 0, deviation, 1.0)
    means = np.stack([(x[y == c] / scale).mean(axis=0) for c in range(len(data.classes))])
    return LabelMetric.from_embeddings(means, data.classes), "distance of the class means in the inputs"


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def _improvements(
    subject: Subject, probabilities: np.ndarray, metric: LabelMetric, observed: int, seed: int
) -> tuple[list[float], list[float], list[np.ndarray]]:
    """1 - msd(Frechet) / msd(argmax) over random choices of observed classes, by ``metric`` and by random trees."""
    names = np.array(subject.data.classes, dtype=object)
    truth = subject.data.test.y.numpy()
    squared = metric.squared(names)
    rng = np.random.default_rng([seed, observed])
    ours, random, chosen = [], [], []
    for draw in range(_DRAWS):
        kept = np.sort(rng.choice(len(names), observed, replace=False))
        p = probabilities[:, kept] + _SMALLEST
        p /= p.sum(axis=1, keepdims=True)
        before = squared[kept[p.argmax(axis=1)], truth].mean()
        if before == 0:
            continue
        trees = random_tree_metric(names.tolist(), seed=seed * _DRAWS + draw)
        for by, into in ((metric, ours), (trees, random)):
            answer = FrechetPredictor(by, names[kept].tolist()).predict_indices(p)
            into.append(float(1 - squared[answer, truth].mean() / before))
        chosen.append(kept)
    return ours, random, chosen


@chart("label-geometry", needs=Needs(task="classification", classes=4), cost=seconds(6))
def label_geometry(subject: Subject, budget: Budget) -> Finding:
    """How much smaller mistakes get when hidden classes are answered by a Frechet mean, and which can be reached."""
    classes = subject.data.classes
    metric, words = derived_metric(subject)
    p = subject.view("probability", memory=budget.memory)(subject.data.test.x).double().numpy()
    half = len(classes) // 2
    counts = sorted({2, max(2, len(classes) // 4), half, max(2, 3 * len(classes) // 4), len(classes) - 1})
    runs = {m: _improvements(subject, p, metric, m, budget.seed) for m in counts}
    ours, random, chosen = runs[half]
    observed = [classes[i] for i in chosen[0]]
    reach = locus(metric, observed) if len(classes) <= _LARGEST_LOCUS else None
    comparison = Comparison(
        f"relative improvement of the squared label distance over argmax, {half} of {len(classes)} classes observed",
        mean_of_runs(ours),
        (
            Control("argmax over the observed classes", Estimate.exact(0.0), "null"),
            Control("a random tree as the metric", mean_of_runs(random), "random"),
        ),
    )
    numbers = {
        f"improvement with {m} of {len(classes)} classes observed": mean_of_runs(found[0])
        for m, found in runs.items()
        if len(found[0]) > 1
    }
    numbers["spread of the label distances (coefficient of variation)"] = Estimate.exact(metric.spread())
    change = 100 * comparison.estimate.value
    verb = "cuts" if change > 0 else "raises"
    headline = (
        f"With half of the classes hidden, the Fréchet mean instead of argmax {verb} the mean squared label distance by "
        f"{abs(change):.1f} %"
    )
    if reach is not None:
        hidden = len(classes) - half
        reached = int(np.sum(reach.reachable)) - half
        numbers["hidden classes within reach, one choice of observed ones"] = Estimate.exact(reached, "classes")
        headline += f"; {reached} of {hidden} hidden classes are within reach"
    figure = blank("classes observed", "improvement over argmax")
    for place, (name, ink) in enumerate((("Fréchet mean", INKS[0]), ("random tree as the metric", INKS[1]))):
        table = [np.asarray(found[place]) for found in runs.values()]
        band_line(
            figure, counts, [float(row.mean()) for row in table], name=name, ink=ink,
            low=[float(np.quantile(row, 0.1)) for row in table], high=[float(np.quantile(row, 0.9)) for row in table],
        )  # fmt: skip
    level_line(figure, 0, "argmax")
    figure.update_yaxes(tickformat=".0%")
    return Finding(
        slug="label-geometry",
        headline=headline + ".",
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading="Some classes are hidden from the model's answers, at random, many times. The line is how much smaller the mean "
        f"squared distance between answer and truth gets when argmax is replaced by the Fréchet mean under the {words}; "
        "bands hold 80 % of the choices. Below the dotted line argmax is better.",
        advice=_advice(metric, observed, reach),
        seed=budget.seed,
        caveats=(
            f"The metric is derived here ({words}), so the gain holds for mistakes that are counted by it. Give your own "
            "taxonomy with: theodolite run label-geometry --probs P.npy --labels NAMES --metric TREE.",
            f"Intervals are over {_DRAWS} choices of the observed classes, on the same test rows.",
        ),
    )  # fmt: skip


def _advice(metric: LabelMetric, observed: list[str], reach: Locus | None) -> str:
    text = "Replace argmax by theodolite.predictions.label_geometry.FrechetPredictor where labels have distances."
    if reach is None or bool(np.all(reach.reachable)):
        return text
    label = next(iter(next_class(metric, observed)), None)
    if label is None:
        return text
    return f"{text} If {', '.join(observed)} were all that is labelled, label {label} next: it opens up most."
