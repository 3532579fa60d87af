"""The chart of sparse interactions: how few edges between two hidden layers are enough, in which coordinates."""

import time
import warnings
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from theodolite.activations._basis import DegenerateLayerError, RankWarning
from theodolite.activations.local_interaction_basis import (
    AblationCurve,
    LocalInteractionBasis,
    NotMonotoneWarning,
    ResolutionWarning,
    ablate_edges,
    edges,
    edges_required,
)
from theodolite.core.errors import DataError
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs, proportion
from theodolite.core.sections import SectionError
from theodolite.core.subject import Rows, Subject
from theodolite.core.view import evaluation_mode
from theodolite.survey.activations.interaction_basis import flat_nodes
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_ROWS = 1_000
_WIDEST = 256
_DROP = 0.01
_RESAMPLES = 500
_NAMES = {
    "lib": "local interaction basis",
    "pca": "principal components",
    "neuron": "neurons",
    "random": "random rotation",
}


def _hidden_pair(subject: Subject) -> tuple[str, ...]:
    """The last two flat hidden layers one after the other, where both are narrow enough and everything passes through them."""
    names = flat_nodes(subject)[-2:]
    if len(names) < 2:
        return ()
    x = subject.data.train.x[:32]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankWarning)
            basis = LocalInteractionBasis.from_module(subject.predictor, names, n_probes=1).fit(x)
    except (SectionError, DegenerateLayerError):
        return ()
    return names if max(layer.width for layer in basis.layers_[:2]) <= _WIDEST else ()


def _no_pair(subject: Subject) -> str | None:
    if _hidden_pair(subject):
        return None
    return (
        f"needs two consecutive hidden layers with activations (rows, width) of at most {_WIDEST}, with no connection around "
        "them; this network has none"
    )


def _forecast(subject: Subject) -> float:
    """Seconds, from the time of a forward pass: about one for each next feature and step of the bisection, in four bases."""
    x = subject.data.validation.x[:64]
    with evaluation_mode(subject.predictor), torch.no_grad():
        started = time.perf_counter()
        subject.predictor(x)
    rows = (len(subject.data.validation) + len(subject.data.test)) / len(x)
    return 2 + 4 * 64 * 20 * rows * (time.perf_counter() - started) / 4


class _Quality:
    """The subject's measure of quality of outputs on rows with answers; ``seen`` keeps it row by row, call by call."""

    def __init__(self, subject: Subject, rows: Rows) -> None:
        self.subject, self.rows = subject, rows
        self.seen = list[np.ndarray]()

    def __call__(self, outputs: Tensor) -> float:
        self.seen.append(self.subject.correct(nn.Identity(), Rows(outputs, self.rows.y)))
        return float(self.seen[-1].mean())


def _required(basis: LocalInteractionBasis, quality: _Quality, E: Tensor) -> int:
    """Edges required; all of them where even they lose more than the drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotMonotoneWarning)
        warnings.simplefilter("ignore", ResolutionWarning)
        try:
            return edges_required(basis, quality.rows.x, quality, 0, drop=_DROP, edges=E)
        except DataError:
            return E.numel()


@chart(
    "local-interaction-basis",
    needs=Needs(network=True, modalities=("tabular", "image", "text"), test=_no_pair),
    cost=_forecast,
)
def local_interaction_basis(subject: Subject, budget: Budget) -> Finding:
    """How few edges between two hidden layers keep the network's quality, in four bases."""
    data, names = subject.data, _hidden_pair(subject)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(budget.seed))[:_ROWS]
    x = data.train.x[order]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)  # the caveats say how many rows there are
        found = LocalInteractionBasis.from_module(subject.predictor, names, memory=budget.memory, seed=budget.seed).fit(
            x
        )
    held = data.validation
    needed, estimates = dict[str, int](), dict[str, Estimate]()
    curves, shapes = dict[str, AblationCurve](), dict[str, str]()
    on_test = _Quality(subject, data.test)
    for kind in _NAMES:
        basis = found if kind == "lib" else found.baseline(kind)
        E = edges(basis, x, 0)
        shapes[kind] = f"{E.shape[0]} x {E.shape[1]}"
        needed[kind] = _required(basis, _Quality(subject, held), E)
        if kind == "lib":
            ablate_edges(basis, data.test.x, on_test, 0, E, [needed[kind]])
        quality = _Quality(subject, held)
        curves[kind] = ablate_edges(basis, held.x, quality, 0, E, _steps(E.numel(), needed[kind]))
        estimates[kind] = _with_interval(needed[kind], curves[kind].k, quality.seen, budget.seed)
    tested = _on_test(subject, on_test.seen[1])
    comparison = Comparison(
        f"edges from {names[0]} to {names[1]} that keep {subject.metric} within {_DROP:g}, on validation rows",
        estimates["lib"],
        (
            Control("between principal components", estimates["pca"], "closed-form"),
            Control("between the neurons", estimates["neuron"], "closed-form"),
            Control("between the directions of a random rotation", estimates["random"], "random"),
        ),
        larger_is_better=False,
    )
    fewer = needed["lib"] < needed["pca"]
    return Finding(
        slug="local-interaction-basis",
        headline=f"{names[1]} needs {_count(needed['lib'], 'edge')} from {names[0]} in the local interaction basis to keep "
        f"{subject.metric} within {_DROP:g} (test rows: {tested.value:.3f} of {subject.quality().value:.3f}); principal "
        f"components need {needed['pca']:,}, the neurons {needed['neuron']:,}.",
        numbers={f"edges required, {_NAMES[kind]} ({shapes[kind]})": estimates[kind] for kind in _NAMES}
        | {"quality with them on the test rows": tested, "quality untouched": subject.quality()},
        comparison=comparison,
        figure=_figure(curves, needed, subject.metric),
        reading="Each line keeps only the strongest edges between the two layers and computes every feature of the second "
        "anew from the inputs it has left, the rest at their mean. The further left a line rises to the dotted level, the "
        "fewer interactions the network needs in those coordinates; the numbers of features (in brackets) differ between them.",
        advice=(
            "Read the network between these layers in this basis: interaction_graph draws its strongest edges, and "
            "LocalInteractionBasis.transform gives the features to look at."
            if fewer
            else "Principal components are as sparse here and simpler; the paper too finds that this basis does not help every "
            "network."
        ),
        seed=budget.seed,
        caveats=(
            f"Bases and the order of edges come from {len(x):,} training rows, the numbers from {len(held):,} validation rows.",
            "Intervals are a bootstrap over the validation rows, on a grid of numbers of edges; the search chose its number on "
            "those rows, so quality on the test rows can be lower by more than was allowed.",
            *(() if fewer else (f"The basis needs no fewer edges than principal components ({needed['pca']:,}).",)),
        ),
    )


def _on_test(subject: Subject, right: np.ndarray) -> Estimate:
    if subject.data.task == "classification":
        return proportion(int(right.sum()), len(right), unit=subject.metric)
    return mean_of_runs(right, unit=subject.metric, within=(0, 1))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _steps(total: int, needed: int) -> list[int]:
    """From 1 to all by factors of about the root of 2, and the number that was found."""
    powers = {round(2 ** (i / 2)) for i in range(2 * total.bit_length())}
    return sorted({m for m in powers if m < total} | {total} | ({needed} if needed else set()))


def _with_interval(value: int, steps: Sequence[int], seen: list[np.ndarray], seed: int) -> Estimate:
    """The number with the interval in which resampled rows find it; ``seen``: untouched first, then one a step."""
    rng, n = np.random.default_rng(seed), len(seen[0])
    draws = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
    base, kept = draws @ seen[0], draws @ np.stack(seen[1 : len(steps) + 1], axis=1)
    passes = kept >= base[:, None] - _DROP - 1e-12
    passes[:, -1] = True
    low, high = np.quantile(np.asarray(steps)[passes.argmax(axis=1)], [0.025, 0.975], method="nearest")
    return Estimate(float(value), float(min(low, value)), float(max(high, value)), "edges", n)


def _figure(curves: dict[str, AblationCurve], needed: dict[str, int], metric: str) -> go.Figure:
    figure = go.Figure()
    for (kind, curve), ink in zip(curves.items(), (INKS[0], INKS[1], INKS[2], INKS[6]), strict=True):
        band_line(
            figure, list(curve.k), curve.score.tolist(), name=f"{_NAMES[kind]} ({needed[kind]:,} needed)", ink=ink,
            dash="dot" if kind == "random" else None,
        )  # fmt: skip
    level_line(figure, curves["lib"].base - _DROP, "enough")
    figure.update_xaxes(title_text="edges kept", type="log")
    figure.update_yaxes(title_text=metric)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.2}, height=430)
    return figure
