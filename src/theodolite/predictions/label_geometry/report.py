"""What swapping argmax for the Frechet mean does to a classifier's mistakes."""

__all__ = ["AdaptationReport", "adaptation_report", "nearest_observed"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from theodolite.core.errors import InputError
from theodolite.core.estimate import bootstrap
from theodolite.predictions.label_geometry.metric import Label, LabelMetric
from theodolite.predictions.label_geometry.predictor import FrechetPredictor


@dataclass(frozen=True)
class AdaptationReport:
    """Mean squared label distance of argmax and of the Frechet mean on the same rows.

    relative_improvement: 1 - msd_frechet / msd_argmax, with ci its paired bootstrap interval over rows (95 %).
    msd_oracle: always answering the observed label nearest to the truth, the least any rule without unseen labels reaches.
    accuracy_observed and accuracy_unseen: share of exact answers where the true label was observed or not (None: no such
    rows); argmax_accuracy_observed beside it. best_temperature: chosen with the true label left out, None where no row's
    label is observed. squared_argmax and squared_frechet: (n,) the rows' squared distances.
    """

    msd_argmax: float
    msd_frechet: float
    msd_oracle: float
    relative_improvement: float
    ci: tuple[float, float]
    accuracy_observed: float | None
    argmax_accuracy_observed: float | None
    accuracy_unseen: float | None
    share_unseen_predictions: float
    best_temperature: float | None
    metric_spread: float
    squared_argmax: np.ndarray
    squared_frechet: np.ndarray


def adaptation_report(
    probabilities: Any,
    y: Iterable[Label],
    metric: LabelMetric,
    observed: Sequence[Label],
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> AdaptationReport:
    """Compare both rules on rows (n, K) with true labels y (n,), which may be labels that were not observed."""
    p = np.asarray(probabilities, dtype=np.float64)
    truth = metric.index(y)
    predictor = FrechetPredictor(metric, observed, temperature)
    columns = metric.index(observed)
    if len(p) != len(truth) or len(p) == 0:
        raise InputError(f"need as many labels as rows and at least one, got {len(p)} rows and {len(truth)} labels")
    ours = predictor.predict_indices(p)
    plain = columns[p.argmax(axis=1)]
    to_truth = SquaredTo(metric, truth)
    before, after = to_truth(plain), to_truth(ours)
    oracle = to_truth(nearest_observed(truth, metric, observed))
    seen = np.isin(truth, columns)

    def improvement(rows: np.ndarray) -> float:
        total = rows[:, 0].sum()
        return float(1 - rows[:, 1].sum() / total) if total > 0 else 0.0

    found = bootstrap(np.stack([before, after], axis=1), improvement, seed=seed)
    best = None
    if seen.any() and len(columns) > 1:
        with np.errstate(divide="ignore"):
            logits = np.log(p[seen])
        tuned = FrechetPredictor(metric, observed).fit_temperature(logits, [metric.labels[t] for t in truth[seen]])
        best = tuned.temperature
    return AdaptationReport(
        msd_argmax=float(before.mean()),
        msd_frechet=float(after.mean()),
        msd_oracle=float(oracle.mean()),
        relative_improvement=found.value,
        ci=(found.low, found.high),
        accuracy_observed=float((ours == truth)[seen].mean()) if seen.any() else None,
        argmax_accuracy_observed=float((plain == truth)[seen].mean()) if seen.any() else None,
        accuracy_unseen=float((ours == truth)[~seen].mean()) if not seen.all() else None,
        share_unseen_predictions=float((~np.isin(ours, columns)).mean()),
        best_temperature=best,
        metric_spread=metric.spread(),
        squared_argmax=before,
        squared_frechet=after,
    )


class SquaredTo:
    """Squared distance of a prediction (n,) to each row's true label, from the rows of the labels that occur."""

    def __init__(self, metric: LabelMetric, truth: np.ndarray) -> None:
        names, self._row = np.unique(truth, return_inverse=True)
        self._squared = metric.squared([metric.labels[i] for i in names])

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        return self._squared[self._row, predicted]


def nearest_observed(truth: np.ndarray, metric: LabelMetric, observed: Sequence[Label]) -> np.ndarray:
    """Position of the observed label nearest to each true one (positions (n,) in ``metric.labels``)."""
    squared = metric.squared(observed)
    return metric.index(observed)[squared[:, truth].argmin(axis=0)]
