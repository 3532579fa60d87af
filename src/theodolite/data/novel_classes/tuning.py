"""Tuning without one label of the new classes: some known classes are taken for unknown, again and again."""

__all__ = ["HiddenClassKFold", "Trial", "TuningResult", "default_space", "tune_hidden"]

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy import stats
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import ParameterGrid, ParameterSampler

from theodolite.core.clustering import clustering_accuracy
from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.parallel import open_pool, spread
from theodolite.data.novel_classes.labels import UNLABELLED, Labelled, labelled

_UNPRUNED = 2  # splits that every setting gets, since one split alone says little


class HiddenClassKFold(BaseEstimator):
    """Splits of the known classes: each hides the classes of one fold, and every class is hidden at most once.

    n_splits: None for min(5, half of the known classes), so that at least two classes are hidden at a time; a single split
    hides half of them (at least two) and is all that three classes allow. InputError where a fold would have fewer than two
    classes, DataError for fewer than three known classes.

    Source: Troisemaine et al., 2023, arXiv:2311.05440, hyperparameter optimisation by hidden classes (the paper does not
    say how many folds).

    >>> y = np.array([0, 0, 1, 1, 2, 2, 3, 3, -1])
    >>> [(int(train.sum()), int(hidden.sum())) for train, hidden in HiddenClassKFold().split(np.zeros((9, 1)), y)]
    [(4, 4), (4, 4)]
    """

    def __init__(self, n_splits: int | None = None, *, seed: int = 0) -> None:
        self.n_splits = n_splits
        self.seed = seed

    def split(self, X: Any, y: Any) -> Iterator[tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]]:
        """(train, hidden) masks (n,): rows whose label may be used, known rows whose label is hidden.

        Rows in neither are the real unlabelled ones. All but the train rows are to be treated as unlabelled.
        """
        data = labelled(X, y, novel=False)
        for classes in self._folds(len(data.classes)):
            hidden = np.isin(data.y, classes)
            yield data.known & ~hidden, hidden

    def _folds(self, classes: int) -> list[np.ndarray]:
        if classes < 3:
            raise DataError(
                f"tuning hides known classes, and needs at least three; there are {classes}. Use the default parameters"
            )
        folds = min(5, classes // 2) if self.n_splits is None else self.n_splits
        if folds < 1 or folds * 2 > max(classes, 2):
            raise InputError(
                f"n_splits={folds} of {classes} known classes would hide fewer than two classes at a time; use at most "
                f"{classes // 2}"
            )
        order = np.random.default_rng(self.seed).permutation(classes)
        return [order[: max(2, classes // 2)]] if folds == 1 else np.array_split(order, folds)


@dataclass(frozen=True)
class Trial:
    """One setting; scores: accuracy on the hidden rows of each split that it was tried on; pruned: not on all of them."""

    params: dict[str, Any]
    scores: tuple[float, ...]
    pruned: bool

    @property
    def score(self) -> float:
        """Mean over the splits it was tried on."""
        return float(np.mean(self.scores))


@dataclass(frozen=True, eq=False)
class TuningResult:
    """best_params of the trial with the best mean among those tried on all splits; table of all; refit: the estimator
    with the best parameters, fitted with all known classes.
    """

    best_params: dict[str, Any]
    table: tuple[Trial, ...]
    refit: Any


def default_space(n_columns: int) -> dict[str, Any]:
    """The paper's search space of PBN: lr log-uniform in 1e-4..1e-2, dropout in 0..0.6, w in 0..1, latent in p/4..1.5p.

    >>> sorted(default_space(16))
    ['dropout', 'latent_dim', 'lr', 'w']
    """
    return {
        "lr": stats.loguniform(1e-4, 1e-2),
        "dropout": stats.uniform(0, 0.6),
        "w": stats.uniform(0, 1),
        "latent_dim": stats.randint(max(1, n_columns // 4), max(3, 3 * n_columns // 2 + 1)),
    }


def tune_hidden(
    estimator: Any,
    space: Mapping[str, Any] | None,
    X: Any,
    y: Any,
    *,
    n_trials: int = 30,
    folds: HiddenClassKFold | None = None,
    prune: bool = True,
    seed: int = 0,
    executor: Executor | int | None = None,
) -> TuningResult:
    """Choose the parameters of ``estimator`` by how well it finds known classes that are hidden from it.

    In each split (`HiddenClassKFold`) rows of the hidden classes join the unlabelled ones of y (n,) (-1), and the score is
    the clustering accuracy of the hidden rows alone, in as many clusters as classes are hidden. No label of a new class is
    needed, and none is seen. estimator: a `PBN`, `NCDKMeans` or `NCDSpectralClustering`. space: for each parameter a list
    of values or a distribution with ``rvs``; None for `default_space` (of PBN). Lists whose combinations are at most
    n_trials are all tried, otherwise n_trials settings are drawn at random. prune: after the second and each later split
    settings below the median of those left are given up. executor: as in `theodolite.core.parallel.spread`; the numbers
    do not depend on it.

    ModelError for an estimator that cannot be asked so; DataError for fewer than three known classes.

    Source: Troisemaine et al., 2023, arXiv:2311.05440, hyperparameter optimisation by hidden classes.
    """
    if not hasattr(estimator, "cluster_hidden"):
        raise ModelError(
            f"{type(estimator).__name__} has no cluster_hidden; tune a PBN, NCDKMeans or NCDSpectralClustering"
        )
    if n_trials < 1:
        raise InputError(f"n_trials must be at least 1, got {n_trials}")
    data = labelled(X, y)
    splits = [hidden for _, hidden in (folds or HiddenClassKFold(seed=seed)).split(data.x, data.y)]
    trials = [Trial(params, (), False) for params in _settings(space, data.x.shape[1], n_trials, seed)]
    with open_pool(executor) as pool:
        for done, hidden in enumerate(splits):
            if prune and done >= _UNPRUNED:
                median = float(np.median([trial.score for trial in trials if not trial.pruned]))
                trials = [replace(trial, pruned=trial.pruned or trial.score < median) for trial in trials]
            left = [i for i, trial in enumerate(trials) if not trial.pruned]
            tasks = [(estimator, trials[i].params, data, hidden) for i in left]
            for i, score in zip(left, spread(_score, tasks, executor=pool), strict=True):
                trials[i] = replace(trials[i], scores=(*trials[i].scores, score))
    best = max((trial for trial in trials if not trial.pruned), key=lambda trial: trial.score)
    refit = _with(estimator, best.params).fit(X, y)
    return TuningResult(best.params, tuple(trials), refit)


def _settings(space: Mapping[str, Any] | None, columns: int, n_trials: int, seed: int) -> list[dict[str, Any]]:
    found = default_space(columns) if space is None else dict(space)
    if not found:
        raise InputError("the space holds no parameter; give for each a list of values or a distribution")
    lists = all(not hasattr(values, "rvs") for values in found.values())
    if lists and len(ParameterGrid(found)) <= n_trials:
        return list(ParameterGrid(found))
    return [
        {name: value.item() if isinstance(value, np.generic) else value for name, value in drawn.items()}
        for drawn in ParameterSampler(found, n_trials, random_state=seed)
    ]


def _with(estimator: Any, params: dict[str, Any]) -> Any:
    fresh: Any = clone(estimator)
    return fresh.set_params(**params)


def _score(estimator: Any, params: dict[str, Any], data: Labelled, hidden: Bool[np.ndarray, " row"]) -> float:
    """Clustering accuracy of the hidden rows, whose labels the estimator does not get."""
    truth = data.y[hidden]
    y = np.where(hidden, UNLABELLED, data.y)
    return clustering_accuracy(truth, _with(estimator, params).cluster_hidden(data.x, y, hidden, len(np.unique(truth))))
