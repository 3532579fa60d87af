"""The chart of the holdout: how far answers to adaptive questions about the test rows can be trusted."""

import numpy as np

from theodolite.core.estimate import Comparison, Control, Estimate, mean_of_runs
from theodolite.core.subject import Subject
from theodolite.data.reusable_holdout import adaptive_bias, freedman_attack, max_safe_queries
from theodolite.survey.chart import Budget, Needs, chart, seconds
from theodolite.survey.figures import INKS, band_line, blank, level_line
from theodolite.survey.finding import Finding

_FEWEST, _ROWS = 20, 2000
_REPEATS = 40
_TOLERANCE = 0.05


def _independent(subject: Subject) -> int:
    """How many of the test rows can stand for themselves: of rows that are neighbours in time, one."""
    rows = subject.data.test
    return len(rows) if rows.blocks is None else len(np.unique(rows.blocks))


def _refusal(subject: Subject) -> str | None:
    found = _independent(subject)
    if found < _FEWEST:
        return f"needs at least {_FEWEST} blocks of test rows that do not overlap in time; there are {found}"
    return None


@chart("adaptive-data-analysis", needs=Needs(rows=_FEWEST, test=_refusal), cost=seconds(8))
def adaptive_data_analysis(subject: Subject, budget: Budget) -> Finding:
    """What a careless search could gain from test sets of this size, and what the reusable holdout makes of it."""
    n = min(_ROWS, _independent(subject))
    rows = "test rows" if subject.data.test.blocks is None else "blocks of test rows that do not overlap in time"
    counts = sorted({max(1, round(n * share)) for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)})
    mechanisms = {"the plain test set": "standard", "noise on each answer": "gaussian", "reusable": "thresholdout"}
    runs = {
        name: freedman_attack(n, n, counts, mechanism=kind, repeats=_REPEATS, seed=budget.seed)
        for name, kind in mechanisms.items()
    }
    off = {
        name: mean_of_runs(np.abs(run.reported - run.fresh).mean(axis=1), unit="accuracy") for name, run in runs.items()
    }
    plain = runs["the plain test set"]
    worst = int(plain.reported.mean(axis=0).argmax())
    gain = mean_of_runs((plain.reported - plain.fresh)[:, worst], unit="accuracy")
    safe = max_safe_queries(n, _TOLERANCE, mechanism="empirical")
    comparison = Comparison(
        "distance of the reported accuracy from the truth",
        off["reusable"],
        (
            Control("the plain test set", off["the plain test set"], "closed-form"),
            Control("noise of 1/√n on each answer", off["noise on each answer"], "closed-form"),
        ),
        larger_is_better=False,
    )
    if comparison.loses_to:
        helps = "does not come reliably"
        advice = (
            f"Keep the number of looks at these {n:,} {rows} small, and collect more of them: with so few the reusable "
            "holdout at its published settings is no protection against a careless search."
        )
    else:
        helps = "comes"
        advice = (
            "Keep the number of looks at the test rows small, or ask them through "
            "theodolite.data.reusable_holdout.Thresholdout with a ledger file; collect more test rows where the lines stay high."
        )
    figure = blank("features that the search keeps", "accuracy on labels that are pure noise", log_x=True)
    for (name, run), ink in zip(runs.items(), (INKS[1], INKS[4], INKS[0]), strict=True):
        low, high = np.quantile(run.reported, [0.1, 0.9], axis=0)
        band_line(
            figure, counts, run.reported.mean(axis=0).tolist(), name=f"reported, {name}", ink=ink,
            low=low.tolist(), high=high.tolist(),
        )  # fmt: skip
    band_line(figure, counts, plain.fresh.mean(axis=0).tolist(), name="on new rows", ink=INKS[6], dash="dash")
    level_line(figure, 0.5, "truth: chance")
    return Finding(
        slug="adaptive-data-analysis",
        headline=f"A careless search that asks these {n:,} {rows} {n:,} questions gains {100 * gain.value:.0f} points of "
        f"accuracy out of nothing; the reusable holdout {helps} closer to the truth.",
        numbers={
            "gain out of pure noise, plain test set": gain,
            "distance from the truth, plain test set": off["the plain test set"],
            "distance from the truth, reusable holdout": off["reusable"],
            "gain in closed form, after as many questions as rows": Estimate.exact(adaptive_bias(n, n) - 0.5, "accuracy"),
            f"adaptive questions that stay within {_TOLERANCE} (order of growth)": Estimate.exact(safe, "questions"),
        },
        comparison=comparison,
        figure=figure,
        reading="Labels are coin flips, so every honest accuracy is 0.5 (dashed: what new rows say). The search keeps features "
        "that correlate with the labels on the training and on the test rows; the lines show what each way of answering "
        "reports for it, the bands where 80 % of the runs lie.",
        advice=advice,
        seed=budget.seed,
        caveats=(
            f"An attack on generated noise with as many rows as you have {rows}, {_REPEATS} runs; it says what is possible, "
            "not what happened to your model.",
            "Thresholdout has the published experiment's settings (threshold 4/√n, noise 1/√n); below about 1,000 rows that "
            "threshold is so wide that it often passes on the training rows' answer.",
        ),
    )  # fmt: skip
