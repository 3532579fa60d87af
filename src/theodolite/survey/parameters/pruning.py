"""The chart of pruning: how many units a trained network can do without, by what it is decided which."""

import time
import warnings
from typing import Any

import numpy as np
import torch

from theodolite.core.errors import TheodoliteError
from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.core.view import evaluation_mode
from theodolite.parameters.relevance_pruning import CRITERIA, compare_criteria, draw_reference, prune_units, unit_scores
from theodolite.survey.chart import Budget, Needs, chart
from theodolite.survey.figures import INKS, band_line, blank, level_line
from theodolite.survey.finding import Finding
from theodolite.survey.parameters import pruning_language

_AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_DRAWS = 5
_REFERENCES = 10  # rows of each class: the paper's few-shot setting
_LOST = 0.01  # of accuracy that may go with the units
_WORDS = {
    "lrp": "relevance", "weight": "size of the weights", "taylor": "Taylor expansion", "gradient": "gradient",
    "random": "chance",
}  # fmt: skip


def _not_followed(subject: Subject) -> str | None:
    """Why relevance cannot be followed through this network, None where it can."""
    if subject.is_language_model:
        return pruning_language.not_followed(subject)
    train = subject.data.train
    one = draw_reference(train.y, 1, seed=0)
    try:
        scores = unit_scores(subject.predictor, (train.x[one], train.y[one]), criterion="lrp")
        prune_units(subject.predictor, scores, amount=1, example_input=train.x[:1])
    except (TheodoliteError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"needs layers that relevance can be followed through: {str(error)[:160]}"
    return None


def _forecast(subject: Subject) -> float:
    """Seconds for all criteria and amounts, from the time of one pass over a batch."""
    if subject.is_language_model:
        return pruning_language.forecast(subject)
    rows = subject.data.validation.x[:128]
    with evaluation_mode(subject.predictor), torch.no_grad():
        subject.predictor(rows)
        started = time.perf_counter()
        subject.predictor(rows)
    passes = len(CRITERIA) * _DRAWS * (len(_AMOUNTS) + 1)
    return (time.perf_counter() - started) * passes * (2 + len(subject.data.validation) / len(rows)) + 0.02 * passes


def _measured(subject: Subject, part: str, amounts: list[float], seed: int) -> list[dict[str, Any]]:
    """One record for each criterion, amount and draw of the reference rows."""
    train, rows = subject.data.train, subject.data.parts[part]
    with warnings.catch_warnings():
        # a class without reference rows is one that the training rows lack, which the page shows
        warnings.filterwarnings("ignore", message=".*no reference row.*")
        found = compare_criteria(
            subject.predictor, (train.x, train.y), (rows.x, rows.y), amounts, _DRAWS, n_per_class=_REFERENCES, seed=seed
        )
    return found.runs.to_dict("records")


def _of(records: list[dict[str, Any]], column: str, criterion: str, amount: float) -> np.ndarray:
    return np.array([r[column] for r in records if r["criterion"] == criterion and r["amount"] == amount])


@chart(
    "relevance-pruning",
    needs=Needs(network=True, language_model=None, task="classification", test=_not_followed),
    cost=_forecast,
)
def relevance_pruning(subject: Subject, budget: Budget) -> Finding:
    """How many units can go at once without training again, by five criteria; chosen on validation, told on test rows."""
    if subject.is_language_model:
        return pruning_language.units_of_a_language_model(subject, budget)
    validation = _measured(subject, "validation", list(_AMOUNTS), budget.seed)
    whole = subject.quality(part="validation").value
    enough = [amount for amount in _AMOUNTS if _of(validation, "accuracy", "lrp", amount).mean() >= whole - _LOST]
    amount = max(enough, default=_AMOUNTS[0])
    best = max(CRITERIA, key=lambda criterion: _of(validation, "accuracy", criterion, amount).mean())
    told = _measured(subject, "test", [amount], budget.seed)

    def mean(column: str, criterion: str) -> Estimate:
        unit = "accuracy" if column == "accuracy" else ""
        return mean_of_runs(_of(told, column, criterion, amount), unit=unit, within=(0, 1))

    kept = {criterion: mean("accuracy", criterion) for criterion in CRITERIA}
    full = subject.quality()
    comparison = Comparison(
        f"accuracy on the test rows with {amount:.0%} of the units removed",
        kept["lrp"],
        (
            *(Control(f"by {_WORDS[name]}", kept[name], "closed-form") for name in ("weight", "taylor", "gradient")),
            Control("by chance", kept["random"], "random"),
            Control("the whole network", full, "reference"),
        ),
    )
    numbers = {f"accuracy by {_WORDS[name]}, {amount:.0%} of the units removed": kept[name] for name in CRITERIA}
    numbers["accuracy of the whole network"] = full
    numbers["share of the weights that go with them, by relevance"] = mean("fraction_params", "lrp")
    numbers["share of the multiplications that go with them, by relevance"] = mean("fraction_macs", "lrp")
    numbers["largest share that relevance may remove for one point of accuracy (validation)"] = Estimate.exact(
        max(enough, default=0.0), "of the units"
    )
    change = {name: f"{100 * (estimate.value - full.value):+.1f}" for name, estimate in kept.items()}
    figure = blank("share of the units removed", "accuracy on validation rows")
    inks = (INKS[0], INKS[1], INKS[2], INKS[3], INKS[6])
    for name, ink in zip(("lrp", "weight", "taylor", "gradient", "random"), inks, strict=True):
        runs = [_of(validation, "accuracy", name, amount) for amount in _AMOUNTS]
        band_line(
            figure, _AMOUNTS, [float(run.mean()) for run in runs], name=_WORDS[name], ink=ink,
            low=[float(run.min()) for run in runs], high=[float(run.max()) for run in runs],
            dash="dot" if name == "random" else None,
        )  # fmt: skip
    level_line(figure, whole, "whole network")
    figure.update_xaxes(tickformat=".0%")
    return Finding(
        slug="relevance-pruning",
        headline=f"{amount:.0%} of the units can go at {change['lrp']} points without training again when {_REFERENCES} rows a "
        f"class say which (relevance); by the size of the weights at {change['weight']}, by chance at {change['random']}. "
        f"Best on validation rows: {_WORDS[best]}.",
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading="Units (neurons and filters) of all layers are ranked together by each criterion and the lowest share is cut out "
        f"of the network at once. Bands span {_DRAWS} draws of the reference rows; a criterion that needs luck has a wide band.",
        advice=f"RelevancePruner(amount={amount}, criterion={best!r}, step=None).fit(network, x, y) gives the smaller network; "
        "training it a little afterwards allows more.",
        seed=budget.seed,
        caveats=(
            "One cut without training again; beyond about 40 % of the units relevance can be worse than the size of the weights, "
            "because wide late layers lose units first.",
            f"Intervals are over {_DRAWS} draws of the reference rows, on the same test rows.",
        ),
    )
