"""The chart of syntax: in which layer, and in how many dimensions, a language model holds the tree of Python code."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from theodolite.activations.ast_probe import (
    ASTProbe,
    SyntaxTree,
    TreeScores,
    majority_tree,
    python_functions,
    random_weights_like,
    score_trees,
    word_states,
)
from theodolite.activations.ast_probe.states import layer_count
from theodolite.activations.ast_probe.study import curve_of
from theodolite.core.curve import QualityCurve
from theodolite.core.errors import TheodoliteError
from theodolite.core.estimate import Comparison, Control, Estimate, proportion
from theodolite.core.subject import Subject
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, level_line
from theodolite.survey.finding import Finding

_RANKS = (4, 16, 32, 64)
_ENOUGH = 0.9
_WORDS = (8, 30)  # of a snippet
_SUBWORDS = 28  # of such a snippet, about
_SNIPPETS = (100, 480)  # at least and at most
_SHARES = (0.62, 0.13, 0.25)  # to learn from, to choose by, to report on
_STEPS = 400
_TRAINING_SECONDS = 25.0
_FLOPS = 4e10  # what one core does; only the number of snippets hangs on it, so that it is the same on every machine
_LABELS = 3


@dataclass(frozen=True, eq=False)
class _Part:
    """Snippets of one set: trees, files, vectors by layer, and those of random weights."""

    trees: list[SyntaxTree]
    files: np.ndarray
    states: Mapping[int, list[Tensor]]
    random: list[Tensor]


def _not_probed(subject: Subject) -> str | None:
    if subject.tokenizer is None:
        return "needs the language model's tokenizer, to give it the words of code; this subject has none"
    try:
        word_states(subject.predictor, subject.tokenizer, [["x", "=", "1"]], [0, 1])
    except (TheodoliteError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"needs a transformer whose blocks can be looked into: {str(error)[:160]}"
    return None


def _token_seconds(subject: Subject) -> float:
    """Of one token through the layers that are looked at: four fifths of all, random weights included."""
    return 2 * 0.8 * (subject.parameter_count or 0) / _FLOPS


def _snippets(subject: Subject, seconds: float) -> int:
    affordable = 0.8 * seconds / (_token_seconds(subject) * _SUBWORDS)
    return int(min(_SNIPPETS[1], max(_SNIPPETS[0], affordable)))


def _forecast(subject: Subject) -> float:
    """Seconds with as few snippets as there must be."""
    return _TRAINING_SECONDS + _SNIPPETS[0] * _SUBWORDS * _token_seconds(subject)


def _parts(subject: Subject, layers: list[int], random_layer: int, budget: Budget) -> list[_Part]:
    count = _snippets(subject, budget.seconds)
    found = python_functions(
        count=round(1.15 * count), min_leaves=_WORDS[0], max_leaves=_WORDS[1], per_file=2, seed=budget.seed
    )
    chosen = found.split([round(share * count) for share in _SHARES], seed=budget.seed)
    words = [found.trees[i].leaves for part in chosen for i in part]
    states = word_states(subject.predictor, subject.tokenizer, words, layers)
    untrained = random_weights_like(subject.predictor, seed=budget.seed)
    random = word_states(untrained, subject.tokenizer, words, [random_layer])[random_layer]
    made, start = [], 0
    for part in chosen:
        own = slice(start, start + len(part))
        by_layer = {layer: vectors[own] for layer, vectors in states.items()}
        trees, files = [found.trees[i] for i in part], np.array([found.files[i] for i in part])
        made.append(_Part(trees, files, by_layer, random[own]))
        start += len(part)
    return made


@chart("ast-probe", needs=Needs(network=True, language_model=True, rows=1, test=_not_probed), cost=_forecast)
def ast_probe(subject: Subject, budget: Budget) -> Finding:
    """How much of the syntax tree of Python functions each of three layers holds, and how few dimensions are enough."""
    blocks = layer_count(subject.predictor)
    layers = sorted({0, max(1, round(blocks / 3)), max(1, round(0.6 * blocks))})
    random_layer = max(1, round(0.2 * blocks))
    train, held, test = _parts(subject, layers, random_layer, budget)
    width = train.states[0][0].shape[1]
    ranks = sorted({min(rank, width) for rank in _RANKS})

    def probe(states: list[Tensor], chooses: list[Tensor], rank: int) -> ASTProbe:
        made = ASTProbe(rank, lr=3e-3, batch_size=32, max_epochs=1, min_steps=_STEPS, random_state=budget.seed)
        return made.fit(states, train.trees, (chooses, held.trees))

    probes = {layer: probe(train.states[layer], held.states[layer], ranks[-1]) for layer in layers}
    chosen = {layer: probes[layer].score(held.states[layer], held.trees).f1 for layer in layers[1:]}
    best = max(chosen, key=chosen.__getitem__)
    by_rank = {rank: probe(train.states[best], held.states[best], rank) for rank in ranks[:-1]} | {
        ranks[-1]: probes[best]
    }
    curve = curve_of(
        {rank: one.score_snippets(held.states[best], held.trees).f1 for rank, one in by_rank.items()},
        train.trees, held.trees, width,
    )  # fmt: skip
    enough = curve.smallest(_ENOUGH).dimension or ranks[-1]
    scores = {layer: probes[layer].score_snippets(test.states[layer], test.trees) for layer in layers}
    random = probe(train.random, held.random, ranks[-1]).score_snippets(test.random, test.trees)
    majority = score_trees(test.trees, [majority_tree(train.trees, tree.leaves) for tree in test.trees])
    on_test = {layer: found.estimate(groups=test.files, seed=budget.seed) for layer, found in scores.items()}
    untrained = random.estimate(groups=test.files, seed=budget.seed)
    small = by_rank[enough].score_snippets(test.states[best], test.trees)
    comparison = Comparison(
        f"F1 of labelled constituents on test functions, layer {best}, {ranks[-1]} dimensions",
        on_test[best],
        (
            Control(f"the same model with random weights in its blocks, layer {random_layer}", untrained, "random"),
            Control("embeddings, without context", on_test[0], "null"),
            Control("right-branching tree, commonest labels", majority.estimate(groups=test.files), "closed-form"),
        ),
    )
    beats = on_test[best].value > max(on_test[0].value, untrained.value)
    return Finding(
        slug="ast-probe",
        headline=f"Layer {best} of {blocks} holds the syntax tree of Python code with F1 {on_test[best].value:.2f}, against "
        f"{on_test[0].value:.2f} for the embeddings and {untrained.value:.2f} with random weights; {enough} of {width} "
        f"dimensions keep {_ENOUGH:.0%} of it.",
        numbers=_numbers(scores[best], on_test, small, enough, test, budget)
        | {"largest |B B^T - 1| of the basis": Estimate.exact(probes[best].orthogonality_error_)},
        comparison=comparison,
        figure=_figure(on_test, untrained, curve, probes[best], test, best),
        reading="Left: F1 of the whole labelled tree, read from one layer's word vectors by an orthogonal projection, on "
        "functions from files that neither taught nor chose it. What embeddings and random weights reach, the words alone tell. "
        "Right: F1 against the dimensions of the projection, on the functions that chose the layer. Below: one test "
        "function's true tree; constituents that the probe finds are green, those it misses red.",
        advice=_advice(comparison, beats, best, enough)
        + "theodolite run ast-probe --model NAME --sources FOLDER measures every layer on your own code.",
        seed=budget.seed,
        caveats=(
            f"{len(train.trees)} functions of Python's standard library to learn from, {len(held.trees)} to choose by, "
            f"{len(test.trees)} to report on ({_WORDS[0]} to {_WORDS[1]} words, no file in two sets), {_STEPS} steps a probe: F1 "
            "grows with both, and the model may have seen this code.",
            "A causal model's vector of a word has not seen the words after it, so the first of a pair never knows the second.",
            f"Layers {', '.join(map(str, layers))} of {blocks} were looked at; random weights at one layer, one draw.",
        ),
    )  # fmt: skip


def _advice(comparison: Comparison, beats: bool, best: int, enough: int) -> str:
    if not beats:
        return (
            "On these few functions the trained layers hold no more of the tree than the words do; give more time "
            "(--seconds), or take syntax from a parser. "
        )
    sure = (
        "" if not comparison.loses_to else "The intervals overlap on these few functions: give more time (--seconds). "
    )
    return (
        f"{sure}For what depends on syntax (code search, edits, vulnerability probes) read layer {best}: "
        f"ASTProbe(rank={enough}).fit(word_states(...)[{best}], trees).encode(x) are its syntactic coordinates. "
    )


def _numbers(
    best: TreeScores,
    by_layer: Mapping[int, Estimate],
    small: TreeScores,
    enough: int,
    test: _Part,
    budget: Budget,
) -> dict[str, Estimate]:
    numbers = {f"F1 at layer {layer}": found for layer, found in by_layer.items()}
    numbers[f"F1 with {enough} dimensions"] = small.estimate(groups=test.files, seed=budget.seed)
    for label, (found, there) in list(best.by_label.items())[:_LABELS]:
        numbers[f"recall of {label}"] = proportion(found, there, unit="of the constituents")
    return numbers


def _figure(
    by_layer: Mapping[int, Estimate],
    untrained: Estimate,
    curve: QualityCurve,
    probe: ASTProbe,
    test: _Part,
    best: int,
) -> go.Figure:
    figure = make_subplots(
        rows=2, cols=2, specs=[[{}, {}], [{"colspan": 2}, None]], row_heights=[0.5, 0.5], vertical_spacing=0.16
    )
    layers, found = list(by_layer), list(by_layer.values())
    band_line(
        figure, layers, [one.value for one in found], name="trained", ink=INKS[0], row=1, col=1,
        low=[one.low for one in found], high=[one.high for one in found],
    )  # fmt: skip
    for value, name in ((by_layer[0].value, "embeddings"), (untrained.value, "random weights")):
        level_line(figure, value, name, row=1)
    ranks, runs = list(curve.dimensions), curve.runs
    band_line(
        figure, ranks, curve.mean.tolist(), name="by dimensions", ink=INKS[2], row=1, col=2,
        low=np.nanmin(runs, axis=1).tolist(), high=np.nanmax(runs, axis=1).tolist(),
    )  # fmt: skip
    figure.update_xaxes(title_text="layer", row=1, col=1)
    figure.update_xaxes(title_text="dimensions of the probe", type="log", row=1, col=2)
    figure.update_yaxes(title_text="F1", range=[0, 1], row=1, col=1)
    figure.update_yaxes(range=[0, 1], row=1, col=2)
    shortest = min(range(len(test.trees)), key=lambda i: len(test.trees[i].labels))
    (predicted,) = probe.predict([test.states[best][shortest]], [test.trees[shortest].leaves])
    _draw_tree(figure, test.trees[shortest], predicted)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 30}, legend={"orientation": "h", "y": 1.1}, height=720)
    return figure


def _draw_tree(figure: go.Figure, true: SyntaxTree, predicted: SyntaxTree) -> None:
    """The true tree in the lower panel, each constituent in the colour of whether it was found."""
    graph, left = true.to_networkx(), predicted.constituents()
    spans = {node: (first, end) for node, first, end in true.spans()}
    depth, place, word = {0: 0}, dict[int, float](), 0
    for parent, child in graph.edges:  # in preorder, so a parent's depth is known
        depth[child] = depth[parent] + 1
    for node in graph:
        if graph.nodes[node]["word"]:
            place[node], word = float(word), word + 1
        else:
            first, end = spans[node]
            place[node] = (first + end - 1) / 2
    x: list[float | None] = []
    y: list[float | None] = []
    for parent, child in graph.edges:
        x += [place[parent], place[child], None]
        y += [-depth[parent], -depth[child], None]
    figure.add_trace(
        go.Scatter(x=x, y=y, mode="lines", line={"color": INKS[6], "width": 1}, hoverinfo="skip", showlegend=False),
        row=2,
        col=1,
    )
    kinds: dict[str, list[int]] = {"word": [], "found": [], "missed": []}
    for node in graph:
        if graph.nodes[node]["word"]:
            kinds["word"].append(node)
            continue
        key = (true.labels[node], tuple(range(*spans[node])))
        kinds["found" if left[key] else "missed"].append(node)
        left[key] -= 1 if left[key] else 0
    for (kind, nodes), ink in zip(kinds.items(), (INKS[6], INKS[2], INKS[1]), strict=True):
        trace = go.Scatter(
            x=[place[node] for node in nodes], y=[-depth[node] for node in nodes], mode="markers+text", name=kind,
            text=[true.labels[node][:24] for node in nodes], textposition="bottom center", textfont={"size": 9},
            marker={"color": ink, "size": 4 if kind == "word" else 8},
        )  # fmt: skip
        figure.add_trace(trace, row=2, col=1)
    figure.update_xaxes(visible=False, row=2, col=1)
    figure.update_yaxes(visible=False, row=2, col=1)
