"""How good a surrogate, a set of candidates and a whole search are."""

__all__ = [
    "CandidateReport",
    "SurrogateReport",
    "evaluate_candidates",
    "evaluate_surrogate",
    "normalized_regret",
    "rank_agreement",
]

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy import stats
from sklearn.neighbors import KernelDensity

from theodolite.core.errors import DataError, InputError
from theodolite.core.estimate import Estimate
from theodolite.hyperparameters.llm_bayesian_optimization.surrogate import most_promising
from theodolite.hyperparameters.space import SearchSpace, best_so_far

Configs = Sequence[Mapping[str, Any]]


@runtime_checkable
class Predictor(Protocol):
    """What `evaluate_surrogate` takes: fit(configs, scores), predict(configs) -> (mean, sd)."""

    def fit(self, configs: Configs, scores: Any) -> Any:
        """Learn."""
        ...

    def predict(self, configs: Configs) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation."""
        ...


def normalized_regret(
    scores: Iterable[float], best: float, worst: float, lower_is_better: bool = False
) -> Float[np.ndarray, " trial"]:
    """(best possible - best so far) / (best - worst possible) after each trial, 0 for the best and 1 for the worst.

    best, worst: over all methods on the task, never over one method's own scores, and the same for each that is compared.
    """
    if best == worst or (best < worst) != lower_is_better:
        raise InputError(f"need a best score that is better than the worst, got {best} and {worst}")
    return (best - best_so_far(scores, lower_is_better=lower_is_better)) / (best - worst)


@dataclass(frozen=True, eq=False)
class SurrogateReport:
    """On configurations that were held out. nrmse: root mean squared error over the range of the true scores. r2. log_density:
    mean log predictive density of a normal. coverage: share within mean +- sd (68 % is right). calibration_error: mean over
    levels 5 %, ..., 95 % of |share inside the central interval - level|. sharpness: mean sd. spearman: rank correlation with
    an interval by Fisher's transform; None where all predictions or all scores are equal. regret: of the configuration with
    the largest expected improvement, over the range of the true scores. mean, sd, truth (n,).
    """

    nrmse: float
    r2: float
    log_density: float
    coverage: float
    calibration_error: float
    sharpness: float
    spearman: Estimate | None
    regret: float
    mean: Float[np.ndarray, " config"]
    sd: Float[np.ndarray, " config"]
    truth: Float[np.ndarray, " config"]

    @property
    def verdict(self) -> str:
        """ "usable" where the ranks agree with the truth at all, otherwise "model too weak"."""
        return "usable" if self.spearman is not None and self.spearman.value > 0 else "model too weak"


def evaluate_surrogate(
    surrogate: Predictor,
    configs: Configs,
    scores: Any,
    held_out: Configs,
    truth: Any,
    *,
    lower_is_better: bool = False,
) -> SurrogateReport:
    """Fit on observed configurations and scores, predict the held-out ones, and compare with their true scores.

    Raises DataError where fewer than 3 are held out or their scores are all equal.
    """
    y = np.asarray(truth, dtype=np.float64)
    if len(held_out) != len(y) or len(y) < 3 or not np.isfinite(y).all() or np.ptp(y) == 0:
        raise DataError("need at least 3 held-out configurations with finite scores that are not all equal")
    surrogate.fit(configs, scores)
    mean, sd = surrogate.predict(held_out)
    observed = np.asarray(scores, dtype=np.float64)
    best = float(np.nanmin(observed) if lower_is_better else np.nanmax(observed))
    pick = most_promising(mean, sd, best, lower_is_better)
    gap = y[pick] - y.min() if lower_is_better else y.max() - y[pick]
    levels = np.arange(0.05, 1, 0.05)
    inside = np.abs(y - mean)[:, None] <= stats.norm.ppf(0.5 + levels / 2) * sd[:, None]
    return SurrogateReport(
        nrmse=float(np.sqrt(np.mean((y - mean) ** 2)) / np.ptp(y)),
        r2=float(1 - ((y - mean) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        log_density=float(stats.norm.logpdf(y, mean, sd).mean()),
        coverage=float((np.abs(y - mean) <= sd).mean()),
        calibration_error=float(np.abs(inside.mean(axis=0) - levels).mean()),
        sharpness=float(sd.mean()),
        spearman=rank_agreement(mean, y),
        regret=float(gap / np.ptp(y)),
        mean=mean,
        sd=sd,
        truth=y,
    )


def rank_agreement(predicted: Any, truth: Any) -> Estimate | None:
    """Spearman's correlation with its interval by Fisher's transform; None where there is no order to compare.

    Source: Bonett and Wright, 2000, Psychometrika 65 (variance (1 + r^2 / 2) / (n - 3)).
    """
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    there = np.isfinite(a) & np.isfinite(b)
    a, b = a[there], b[there]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    r = float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
    if len(a) < 4 or abs(r) >= 1:
        return Estimate(r, min(r, -1.0), max(r, 1.0), "", len(a))
    half = 1.96 * math.sqrt((1 + r * r / 2) / (len(a) - 3))
    return Estimate(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), "", len(a))


@dataclass(frozen=True)
class CandidateReport:
    """mean_regret, best_regret: of the candidates' true scores, as `normalized_regret`. generalised_variance: determinant of
    their covariance in the unit cube. mahalanobis: mean distance to the observed configurations under the observed
    covariance (ridge 1e-6). log_density: mean log-likelihood under a Gaussian kernel density of the observed ones.
    """

    mean_regret: float
    best_regret: float
    generalised_variance: float
    mahalanobis: float
    log_density: float


def evaluate_candidates(
    space: SearchSpace,
    candidates: Configs,
    scores: Any,
    observed: Configs,
    best: float,
    worst: float,
    *,
    lower_is_better: bool = False,
) -> CandidateReport:
    """Of candidates with their true scores, and the observed configurations that they were drawn from (at least 2 of each)."""
    if len(candidates) != len(scores) or len(candidates) < 2 or len(observed) < 2:
        raise DataError("need at least two candidates with their scores and two observed configurations")
    regrets = [float(normalized_regret([score], best, worst, lower_is_better)[0]) for score in scores]
    new, old = space.encode(candidates), space.encode(observed)
    covariance = np.atleast_2d(np.cov(old, rowvar=False)) + 1e-6 * np.eye(old.shape[1])
    apart = new - old.mean(axis=0)
    distance = np.sqrt(np.einsum("ij,ij->i", apart @ np.linalg.inv(covariance), apart))
    # Scott's rule for the width
    width = max(1e-3, len(old) ** (-1 / (old.shape[1] + 4)) * float(old.std(axis=0).mean()))
    density = KernelDensity(bandwidth=width).fit(old).score_samples(new)
    return CandidateReport(
        float(np.mean(regrets)), float(np.min(regrets)), float(np.linalg.det(np.atleast_2d(np.cov(new, rowvar=False)))),
        float(distance.mean()), float(density.mean()),
    )  # fmt: skip
