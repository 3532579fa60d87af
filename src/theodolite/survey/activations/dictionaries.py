"""The chart of dictionaries: how much of a hidden layer, and of what the model does with it, a few directions keep."""

import math
import time
from typing import Any

import plotly.graph_objects as go
import torch

from theodolite.activations.dictionary_evaluation import DictionaryTable, compare_dictionaries
from theodolite.core.errors import TheodoliteError
from theodolite.core.estimate import Comparison, Control, Estimate
from theodolite.core.subject import Subject
from theodolite.core.transformer import decoder_parts
from theodolite.core.view import evaluation_mode
from theodolite.survey.activations.dictionary_layer import (
    BATCH,
    FIT_TEXTS,
    STEPS,
    TEST_TEXTS,
    Layer,
    dictionaries_of,
    layer_of,
)
from theodolite.survey.activations.interaction_basis import flat_nodes
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, blank
from theodolite.survey.finding import Finding

_SAE, _PCA, _NEURONS, _RANDOM = "sparse autoencoder", "principal components", "single neurons", "random directions"
_WIDEST = 2_048
_MOVED = 4
_COLUMNS = {
    "explained": ("variance explained", "of the variance"),
    "recovered": ("loss recovered", "of the loss"),
    "control": (f"effect of moving {_MOVED} codes", "of the patch's effect"),
    "active": ("codes on", ""),
    "d90": ("codes that keep 90 % of what it keeps", ""),
    "stability": ("cosine of two seeds", ""),
}
_NO_PROBE = (
    "The subspace of a syntax probe is a dictionary too; it takes words with their trees, see the chart ast-probe."
)
_FIRST_TOKEN = "The first token of each text is left out and left as it is: its state is often larger than all others."


def _not_applicable(subject: Subject) -> str | None:
    if not subject.is_language_model:
        if flat_nodes(subject):
            return None
        return f"needs a hidden layer with activations (rows, width) of at most {_WIDEST:,}; this network has none"
    try:
        width = decoder_parts(subject.predictor).width
    except TheodoliteError as error:
        return f"needs a decoder whose residual stream can be named: {str(error)[:200]}"
    return None if width <= _WIDEST else f"needs a stream of width at most {_WIDEST:,}; this one has {width:,}"


def _forecast(subject: Subject) -> float:
    """Seconds, from the time of a few rows and of the products that a step of training takes."""
    x = subject.data.train.x[:4]
    with evaluation_mode(subject.predictor), torch.no_grad():
        subject.predictor(x)
        started = time.perf_counter()
        subject.predictor(x)
    each = (time.perf_counter() - started) / len(x)
    width = decoder_parts(subject.predictor).width if subject.is_language_model else 64
    rows = FIT_TEXTS + 10 * TEST_TEXTS if subject.is_language_model else 20_000 / 100
    return 2 + each * rows + 2 * STEPS * BATCH * 12 * width * 2 * width / 4e10


@chart("sae-evaluation", needs=Needs(network=True, language_model=None, test=_not_applicable), cost=_forecast)
def dictionaries(subject: Subject, budget: Budget) -> Finding:
    """Every dictionary of one hidden layer: what it keeps, what moving its codes does, how stable it is."""
    layer = layer_of(subject, budget)
    k = max(1, min(16, layer.fit.shape[1] // 8))
    made, again, missing = dictionaries_of(layer, k, budget.seed)
    table = compare_dictionaries(
        made, layer.fit, layer.states, layer.loss, again=again, moved=_MOVED, groups=layer.groups, seed=budget.seed,
        memory=budget.memory,
    )  # fmt: skip
    frame = table.frame
    leads = "recovered" if _measured(table, _SAE, "recovered") else "explained"
    numbers = _numbers(table, subject)
    dead = round(float(frame.loc[_SAE, "dead"]) * int(frame.loc[_SAE, "codes"]))
    numbers[f"codes of the {_SAE} that are never on"] = Estimate.exact(dead, f"of {frame.loc[_SAE, 'codes']}")
    comparison = Comparison(
        f"{_COLUMNS[leads][0]} at {layer.name} by a {_SAE} with {k} codes on",
        _told(table, _SAE, leads),
        (
            Control(_RANDOM, _told(table, _RANDOM, leads), "random"),
            *(Control(one, _told(table, one, leads), "closed-form") for one in (_PCA, _NEURONS)),
            Control("the layer's mean in its place", Estimate.exact(0.0), "null"),
        ),
    )
    return Finding(
        slug="sae-evaluation",
        headline=_headline(table, layer, k, leads, dead),
        numbers=numbers,
        comparison=comparison,
        figure=_figure(table),
        reading="For each dictionary of the layer: the share of the variance of held-out states that it keeps; how much of the "
        "loss is kept when the layer holds its reconstruction (0: the layer's mean in its place, 1: the layer untouched); and "
        f"how far moving {_MOVED} codes of each state to another input's makes the model answer as for that input (1: its whole "
        "state in place). A dictionary can keep the variance and lose what the model uses.",
        advice="With a task whose attributes are known, score edits with "
        "theodolite.activations.dictionary_evaluation.evaluate_dictionary; dictionaries of your own come into the same table "
        "with compare_dictionaries there.",
        seed=budget.seed,
        caveats=(
            _codes(table, k),
            f"The autoencoder was trained on {len(layer.fit):,} states in {STEPS} steps; a dictionary for use takes far more of "
            "both.",
            "Over two seeds: what nothing is drawn for is the same, so its cosine is 1.",
            *((_FIRST_TOKEN, _NO_PROBE) if layer.is_text else ()),
            *missing,
            *table.notes,
        ),
    )  # fmt: skip


def _headline(table: DictionaryTable, layer: Layer, k: int, leads: str, dead: int) -> str:
    frame = table.frame
    what = "the loss" if leads == "recovered" else "the variance of held-out states"

    def kept(name: str) -> str:
        return f"{100 * float(frame.loc[name, leads]):.0f} %"

    best = str(frame[leads].astype(float).idxmax())
    first = f"With {k} of {frame.loc[_SAE, 'codes']} codes on, a sparse autoencoder of {layer.name} keeps {kept(_SAE)} of {what}"
    other = "" if best in (_SAE, _PCA) else f", most of all {_singular(best)}, {kept(best)}"
    return f"{first}; {k} principal components keep {kept(_PCA)}{other}; {dead} of its codes are never on."


def _singular(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else name if name.endswith("s") else f"a {name}"


def _told(table: DictionaryTable, name: str, column: str) -> Estimate:
    number = table.estimate(name, column)
    return Estimate(number.value, number.low, number.high, _COLUMNS[column][1])


def _measured(table: DictionaryTable, name: str, column: str) -> bool:
    number: Any = table.frame.loc[name, column]
    return math.isfinite(number)


def _numbers(table: DictionaryTable, subject: Subject) -> dict[str, Estimate]:
    """Every number of the table, "dictionary: column", and the losses that shares are of."""
    numbers = {
        f"{name}: {words}": _told(table, name, column)
        for name in table.frame.index
        for column, (words, _) in _COLUMNS.items()
        if _measured(table, name, column)
    }
    unit = "nats" if subject.data.task != "regression" else ""
    for name, value in zip(("as the model is", "with the layer's mean in its place"), table.loss or (), strict=False):
        numbers[f"loss on these inputs, {name}"] = Estimate(value.value, value.low, value.high, unit)
    return numbers


def _codes(table: DictionaryTable, k: int) -> str:
    """Which dictionaries have as many codes on as the others, and which have not."""
    active = {name: table.estimate(name, "active").value for name in table.frame.index}
    fewer = [f"{name} ({number:.3g})" for name, number in active.items() if round(number) != k]
    told = f"Codes on for each state: {k}"
    told += f", but for {', '.join(fewer)}, whose kind does not allow it" if fewer else ""
    return f"{told}. The autoencoder chooses its own anew for each state out of more, linear ones always use the same."


def _figure(table: DictionaryTable) -> go.Figure:
    figure = blank("", "share")
    for i, column in enumerate(("explained", "recovered", "control")):
        told = {name: table.estimate(name, column) for name in table.frame.index if _measured(table, name, column)}
        if not told:
            continue
        values = list(told.values())
        figure.add_trace(
            go.Bar(
                x=list(told), y=[one.value for one in values], name=_COLUMNS[column][0], marker_color=INKS[i],
                error_y={
                    "type": "data", "symmetric": False, "array": [one.high - one.value for one in values],
                    "arrayminus": [one.value - one.low for one in values],
                },
            )
        )  # fmt: skip
    figure.update_layout(barmode="group")
    figure.update_yaxes(tickformat=".0%")
    return figure
