"""The chart of pruning for a language model: how much worse it predicts without the units that it uses least."""

__all__ = ["forecast", "not_followed", "units_of_a_language_model"]

import time

import numpy as np
import torch
from torch import Tensor

from theodolite.core.errors import TheodoliteError
from theodolite.core.estimate import Comparison, Control, Estimate, bootstrap
from theodolite.core.masks import apply_mask, prune_units
from theodolite.core.next_token import next_tokens
from theodolite.core.subject import Rows, Subject
from theodolite.core.view import evaluation_mode
from theodolite.parameters.relevance_pruning import relevance, unit_scores
from theodolite.survey.chart import Budget
from theodolite.survey.figures import INKS, band_line, blank, level_line
from theodolite.survey.finding import Finding

_AMOUNTS, _SHOWN = (0.1, 0.2, 0.4), 0.2
_REFERENCES, _TESTED = 8, 12  # rows
_WORDS = {
    "lrp": "relevance", "taylor": "Taylor expansion", "weight": "size of the weights", "random": "chance",
}  # fmt: skip


def not_followed(subject: Subject) -> str | None:
    """Why relevance cannot be followed through this language model, None where it can."""
    short = subject.data.train.x[:1, :8]
    try:
        relevance(subject.predictor, short, short)
    except (TheodoliteError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"needs layers that relevance can be followed through: {str(error)[:160]}"
    return None


def forecast(subject: Subject) -> float:
    """Seconds: forward passes over the tested rows, and two passes with gradients over the reference rows."""
    rows = subject.data.validation.x[:2]
    with evaluation_mode(subject.predictor), torch.no_grad():
        subject.predictor(rows)
        started = time.perf_counter()
        subject.predictor(rows)
    each = (time.perf_counter() - started) / len(rows)
    return each * (_TESTED * (1 + len(_WORDS) * len(_AMOUNTS)) + 2 * (3 * _REFERENCES + 3))


def units_of_a_language_model(subject: Subject, budget: Budget) -> Finding:
    """Loss of the next token on test rows without a share of the MLPs' units, by four criteria; nothing is selected by it."""
    model, references, rows = subject.predictor, subject.data.train.head(_REFERENCES).x, subject.data.test.head(_TESTED)
    scores = {
        name: unit_scores(
            model, (references, references), criterion=name, abs=name == "lrp", seed=budget.seed, memory=budget.memory
        )
        for name in _WORDS
    }
    whole = _losses(subject, rows, budget)
    lost = {(name, 0.0): np.zeros(len(whole)) for name in _WORDS}
    for name, amount in ((name, amount) for name in _WORDS for amount in _AMOUNTS):
        with apply_mask(model, prune_units(model, scores[name], amount=amount)):
            lost[name, amount] = _losses(subject, rows, budget) - whole
    told = {at: _mean(values, rows.y, budget, "nats a token") for at, values in lost.items()}
    shown = {name: told[name, _SHOWN] for name in _WORDS}
    units = sum(len(values) for values in scores["lrp"].values())
    comparison = Comparison(
        f"loss of the next token that is added on test rows with {_SHOWN:.0%} of the MLPs' units removed",
        shown["lrp"],
        (
            *(Control(f"by {_WORDS[name]}", shown[name], "closed-form") for name in ("weight", "taylor")),
            Control("by chance", shown["random"], "random"),
        ),
        larger_is_better=False,
    )
    numbers = {f"loss added by {_WORDS[name]}, {_SHOWN:.0%} of the units removed": shown[name] for name in _WORDS}
    numbers |= {f"loss added by relevance, {a:.0%} removed": told["lrp", a] for a in _AMOUNTS if a != _SHOWN}
    numbers["loss of the whole model"] = _mean(whole, rows.y, budget, "nats a token")
    numbers["units in the MLPs"] = Estimate.exact(units)
    figure = blank("share of the MLPs' units removed", "loss of the next token, nats")
    level, places = float(whole.mean()), (0.0, *_AMOUNTS)
    for name, ink in zip(_WORDS, (INKS[0], INKS[2], INKS[1], INKS[6]), strict=True):
        line = [told[name, amount] for amount in places]
        band_line(
            figure, places, [level + one.value for one in line], name=_WORDS[name], ink=ink,
            low=[level + one.low for one in line], high=[level + one.high for one in line],
            dash="dot" if name == "random" else None,
        )  # fmt: skip
    level_line(figure, level, "whole model")
    figure.update_xaxes(tickformat=".0%")
    best = min(_WORDS, key=lambda name: shown[name].value)
    return Finding(
        slug="relevance-pruning",
        headline=f"Without {_SHOWN:.0%} of its {units:,} MLP units the model loses {shown['lrp'].value:.2f} nats a token where "
        f"{_REFERENCES} rows of text say which ones (relevance), {shown['taylor'].value:.2f} by the slope of the loss (Taylor), "
        f"{shown['random'].value:.2f} by chance and {shown['weight'].value:.2f} by the size of the weights.",
        numbers=numbers,
        comparison=comparison,
        figure=figure,
        reading="Units are the hidden numbers of the MLPs. All layers' units are ranked together by each criterion, and the "
        "lowest share is switched off at once, without training again. Relevance is how much of the true next tokens' scores "
        "flows through a unit. Bands are 95 % intervals of what is added, over whole texts.",
        advice=f"Of these criteria {_WORDS[best]} does least harm here. remove_units(model, prune_units(model, scores, "
        "amount=0.1, scope='layer')) gives a smaller model that can be saved; train it a little before it is used.",
        seed=budget.seed,
        caveats=(
            f"{len(rows)} test rows and {_REFERENCES} reference rows of {rows.x.shape[1]} tokens; one draw of chance.",
            "Relevance is summed as |R|: hidden numbers have both signs, and in plain sums they cancel.",
        ),
    )


def _losses(subject: Subject, rows: Rows, budget: Budget) -> np.ndarray:
    """Mean loss of each row's next tokens."""
    return next_tokens(subject.predictor, rows.x, memory=budget.memory).loss.double().mean(dim=1).numpy()


def _mean(values: np.ndarray, texts: Tensor, budget: Budget, unit: str) -> Estimate:
    several = len(texts.unique()) > 1  # of a single text the rows are all that varies
    return bootstrap(values, groups=texts.numpy() if several else None, seed=budget.seed, unit=unit)
