"""What swapping argmax for the Frechet mean does to a classifier's mistakes."""

__all__ = ["AdaptationReport", "adaptation_report", "nearest_observed"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from theodolite.core.errors import InputError
from theodolite.core.estimate import bootstrap
from theodolite.predictions.label_geometry.metric import Label, LabelMetric, in_order
from theodolite.predictions.label_geometry.predictor import FrechetPredictor, as_array, observed_columns


@dataclass(frozen=True, eq=False)
class AdaptationReport:
    """Mean squared label distance (msd) of argmax and of the Frechet mean on the same rows.

    relative_improvement: 1 - msd_frechet / msd_argmax, with ci its paired bootstrap interval over rows (95 %); both None
    where argmax makes no mistake at all. msd_oracle: always answering the observed label nearest to the truth, the least
    any rule without unseen labels reaches. accuracy_observed and accuracy_unseen: share of exact answers where the true
    label was observed or not (None: no such rows); argmax_accuracy_observed beside it, as the rule trades accuracy for
    distance. share_unseen_predictions: share of answers that are not observed labels. tied: rows with several nearest
    means. best_temperature: of the rows with observed labels, each one's own label left out; None where there is no such
    row. metric_spread: coefficient of variation of the distances; near 0 there is little to gain. squared_argmax and
    squared_frechet (n,): the rows' squared distances.
    """

    msd_argmax: float
    msd_frechet: float
    msd_oracle: float
    relative_improvement: float | None
    ci: tuple[float, float] | None
    accuracy_observed: float | None
    argmax_accuracy_observed: float | None
    accuracy_unseen: float | None
    share_unseen_predictions: float
    tied: int
    best_temperature: float | None
    metric_spread: float
    squared_argmax: Float[np.ndarray, " row"]
    squared_frechet: Float[np.ndarray, " row"]


def adaptation_report(
    probabilities: Any,
    y: Iterable[Label],
    metric: LabelMetric,
    observed: Sequence[Label] | np.ndarray,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> AdaptationReport:
    """Compare both rules on rows (n, K) with true labels y (n,), which may be labels that were not observed.

    Source: Roberts et al., 2023, arXiv:2307.12226, section 5 (expected squared distance).

    >>> metric = LabelMetric.from_function(lambda a, b: abs(a - b), range(5))
    >>> report = adaptation_report([[0.5, 0.5], [1.0, 0.0]], [2, 0], metric, [0, 4])
    >>> report.msd_argmax, report.msd_frechet, report.share_unseen_predictions
    (2.0, 0.0, 0.5)
    """
    p = as_array(in_order(probabilities, observed, axis=1))
    truth, columns = metric.index(y), observed_columns(metric, observed)
    if len(p) != len(truth) or len(p) == 0:
        raise InputError(f"need as many labels as rows and at least one, got {len(p)} rows and {len(truth)} labels")
    predictor = FrechetPredictor(metric, observed, temperature)
    ours = predictor.predict_indices(p)
    tied = predictor.ties_
    plain = columns[p.argmax(axis=1)]
    answers = np.concatenate([plain, ours, nearest_observed(truth, metric, observed)])
    before, after, oracle = metric.squared_pairs(np.tile(truth, 3), answers).reshape(3, -1)
    seen = np.isin(truth, columns)
    change, ci = _improvement(before, after, seed)
    return AdaptationReport(
        msd_argmax=float(before.mean()),
        msd_frechet=float(after.mean()),
        msd_oracle=float(oracle.mean()),
        relative_improvement=change,
        ci=ci,
        accuracy_observed=float((ours == truth)[seen].mean()) if seen.any() else None,
        argmax_accuracy_observed=float((plain == truth)[seen].mean()) if seen.any() else None,
        accuracy_unseen=float((ours == truth)[~seen].mean()) if not seen.all() else None,
        share_unseen_predictions=float((~np.isin(ours, columns)).mean()),
        tied=tied,
        best_temperature=_best_temperature(predictor, p, truth, columns),
        metric_spread=metric.spread(),
        squared_argmax=before,
        squared_frechet=after,
    )


def _improvement(before: np.ndarray, after: np.ndarray, seed: int) -> tuple[float | None, tuple[float, float] | None]:
    if not before.any():
        return None, None
    least = float(before[before > 0].min())

    def statistic(rows: np.ndarray) -> float:
        # a draw of rows without any mistake of argmax counts as one with its smallest mistake
        return float(1 - rows[:, 1].sum() / max(rows[:, 0].sum(), least))

    found = bootstrap(np.stack([before, after], axis=1), statistic, seed=seed)
    return found.value, (found.low, found.high)


def _best_temperature(
    predictor: FrechetPredictor, p: np.ndarray, truth: np.ndarray, columns: np.ndarray
) -> float | None:
    own = np.full(len(predictor.metric), -1)
    own[columns] = np.arange(len(columns))
    rows = np.flatnonzero(own[truth] >= 0)
    left = p[rows].astype(np.float64)
    left[np.arange(len(rows)), own[truth[rows]]] = 0.0
    rows = rows[left.any(axis=1)]  # where the true label has all the probability, nothing is left to choose by
    if not len(rows):
        return None
    with np.errstate(divide="ignore"):
        logits = np.log(p[rows].astype(np.float64))
    return predictor.fit_temperature(logits, predictor.metric.names(truth[rows])).temperature_


def nearest_observed(
    truth: Int[np.ndarray, " row"], metric: LabelMetric, observed: Sequence[Label] | np.ndarray
) -> Int[np.ndarray, " row"]:
    """Position of the observed label nearest to each true one (positions (n,) in ``metric.labels``)."""
    columns = observed_columns(metric, observed)
    names, row = np.unique(truth, return_inverse=True)
    return columns[metric.between(names, columns).argmin(axis=1)][row]
