"""The chart of text selection: which training texts of a language model look like the texts it is wanted for."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.subject import Rows, Subject
from theodolite.data.importance_resampling import (
    HashedNgrams,
    ImportanceResampler,
    Selection,
    select_heuristic,
    select_random,
)
from theodolite.data.importance_resampling.measures import kl_gain, shares
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)
_SHOWN, _BUCKETS, _DRAWS = 8, 2000, 10
_OURS, _CLASSIFIER, _RANDOM = "DSIR", "classifier, top scores", "random rows"


def _texts(subject: Subject, rows: Rows) -> list[str]:
    return [subject.tokenizer.decode(ids) for ids in rows.x.tolist()]


def _refusal(subject: Subject) -> str | None:
    if not hasattr(subject.tokenizer, "decode"):
        return "needs the model's tokenizer, to read the texts that the rows are made of"
    return None


@chart("dsir", needs=Needs(language_model=True, rows=20, test=_refusal), cost=seconds(10))
def text_selection(subject: Subject, budget: Budget) -> Finding:
    """How much closer to texts that were not looked at a selection of the training rows gets than random rows."""
    data, featurizer = subject.data, HashedNgrams(buckets=_BUCKETS)
    raw, target, held = (_texts(subject, rows) for rows in (data.train, data.validation, data.test))
    made = ImportanceResampler(featurizer, smoothing=1.0, min_words=0, seed=budget.seed)
    made.fit(raw, target)
    may_be_taken = made.select(0).n_eligible
    sizes = sorted({max(1, round(share * may_be_taken)) for share in _SHARES})
    quarter = sizes[len(sizes) // 2]
    counts, wanted = featurizer.transform(raw), featurizer.transform(held)
    names, place = np.unique(data.test.y.numpy(), return_inverse=True)
    # each held-out text is a target of its own, so that the mean over them has an interval
    targets = np.stack([np.asarray(wanted[place == i].sum(axis=0)).ravel() for i in range(len(names))])
    targets = targets[targets.sum(axis=1) > 0] / targets.sum(axis=1, keepdims=True)[targets.sum(axis=1) > 0]
    whole = shares(np.asarray(counts.sum(axis=0)).ravel())

    def gains(rows: np.ndarray) -> np.ndarray:
        """KL reduction for each held-out text."""
        chosen = np.asarray(counts[rows].sum(axis=0)).ravel()
        return np.array([kl_gain(chosen, whole, one[:, None]) for one in targets])

    chosen = {k: made.select(k) for k in sizes}
    curves = {
        _OURS: {k: gains(one.indices) for k, one in chosen.items()},
        _CLASSIFIER: {
            k: gains(select_heuristic(raw, target, k, noisy=False, featurizer=featurizer, seed=budget.seed))
            for k in sizes
        },
        _RANDOM: {
            k: np.mean([gains(select_random(raw, k, seed=budget.seed * _DRAWS + i)) for i in range(_DRAWS)], axis=0)
            for k in sizes
        },
    }
    # differences on the same held-out texts, so that what all selections of this size lose does not hide them
    over = {name: curves[name][quarter] - curves[_RANDOM][quarter] for name in (_OURS, _CLASSIFIER)}
    estimates = {name: bootstrap(values, seed=budget.seed, unit="nats") for name, values in over.items()}
    first = estimates[_OURS]
    comparison = Comparison(
        f"nats by which {quarter} selected rows are closer to the held-out texts than random ones",
        first,
        (
            Control(f"{_RANDOM}, mean of {_DRAWS} draws", Estimate.exact(0.0, "nats"), "random"),
            Control(_CLASSIFIER, estimates[_CLASSIFIER], "closed-form"),
        ),
    )
    selection = chosen[quarter]
    told = "closer to" if first.value > 0 else "farther from"
    headline = (
        f"{quarter} of {len(raw)} training rows, chosen by their n-grams, are {abs(first.value):.3f} nats {told} texts that "
        f"were not looked at than {quarter} random rows (95 % interval {first.low:+.3f} to {first.high:+.3f})."
    )
    gained, lost = _changes(selection)
    return Finding(
        slug="dsir",
        headline=headline,
        numbers={
            "DSIR over random rows": first,
            "classifier over random rows": estimates[_CLASSIFIER],
            "KL reduction of DSIR's rows": bootstrap(curves[_OURS][quarter], seed=budget.seed, unit="nats"),
            "KL reduction of random rows": bootstrap(curves[_RANDOM][quarter], seed=budget.seed, unit="nats"),
            "share of the selection that the largest weights give too": Estimate.exact(
                selection.overlap_with_top_k or 0.0
            ),
            "correlation of weight and number of words": Estimate.exact(selection.length_correlation),
        },
        comparison=comparison,
        figure=_figure(sizes, curves, [*gained, *lost]),
        reading="Left: KL divergence from the held-out (test) texts to all training rows, minus that to the rows selected for "
        "the validation texts; higher is closer, and few rows are far from everything because they lack most n-grams, so "
        "compare the lines at the same size. Right: how the share of n-grams changes from the training rows to the selection.",
        advice=_advice(first) + f" {selection.note}",
        seed=budget.seed,
        caveats=(
            f"The target is {len(target)} rows of validation texts, smoothed by 1, with {_BUCKETS:,} buckets, and the pool is "
            f"the subject's own {len(raw)} training rows: the method on a small scale. A real corpus is given by: theodolite run "
            "dsir --raw FILES --target FILES --select N --out FILE.",
            "The interval is over held-out texts; closeness in n-grams is not quality, and no model was trained on the rows.",
        ),
    )  # fmt: skip


def _changes(selection: Selection) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    changes = [(one.ngram, 100 * (one.selected - one.raw)) for one in selection.top_features]
    return [one for one in changes if one[1] > 0][:_SHOWN], [one for one in changes if one[1] < 0][-_SHOWN:]


def _figure(sizes: list[int], curves: dict[str, dict[int, np.ndarray]], changes: list[tuple[str, float]]) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.2)
    for (name, by), ink in zip(curves.items(), (INKS[0], INKS[1], INKS[6]), strict=True):
        band_line(figure, sizes, [float(by[k].mean()) for k in sizes], name=name, ink=ink, row=1, col=1)
    level_line(figure, 0, "all training rows", row=1)
    figure.add_trace(
        go.Bar(
            x=[change for _, change in changes][::-1], y=[f"“{name}”" for name, _ in changes][::-1], orientation="h",
            showlegend=False, marker={"color": [INKS[2] if change > 0 else INKS[3] for _, change in changes][::-1]},
        ),
        row=1, col=2,
    )  # fmt: skip
    figure.update_xaxes(title_text="rows selected", row=1, col=1)
    figure.update_yaxes(title_text="KL reduction, nats", row=1, col=1)
    figure.update_xaxes(title_text="change of share, points", row=1, col=2)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.12})
    return figure


def _advice(first: Estimate) -> str:
    if first.low > 0:
        return (
            "Select from your raw corpus with the texts you care about as the target before you continue training; read the "
            "n-grams that gain and lose, and keep random rows in the mix where the model must stay broad."
        )
    if first.high < 0:
        return (
            "Do not select among these rows: the validation texts are of the same mix as the rows, the largest weights go to "
            "few kinds of them, and random rows stand for it better. Selection pays where the target is a part of the raw corpus."
        )
    return (
        "Among these rows the choice does not surely matter: they are nearly one kind of text. Selection pays where the raw "
        "corpus mixes kinds and only some look like what you want."
    )
