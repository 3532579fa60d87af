"""Optimisers that ask no language model, with the same ask and tell: random, Sobol, TPE and a Gaussian process.

Source: Bergstra, Bardenet, Bengio, Kégl, 2011, NeurIPS (TPE, by optuna); Snoek, Larochelle, Adams, 2012, arXiv:1206.2944
(Gaussian process with a Matérn 5/2 kernel and expected improvement, by scikit-learn).
"""

__all__ = [
    "GaussianProcessSearch",
    "GaussianProcessSurrogate",
    "RandomSearch",
    "SobolSearch",
    "TPESearch",
    "distributions",
]

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float as Floats
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from theodolite.core.errors import DataError, InputError, require
from theodolite.hyperparameters.llm_bayesian_optimization.surrogate import most_promising
from theodolite.hyperparameters.space import Config, Float, Int, Optimizer, SearchSpace

_CANDIDATES = 300


class _WithStart(Optimizer):
    """initial: the configurations to begin with; n_initial random ones where None."""

    def __init__(
        self,
        space: SearchSpace,
        *,
        lower_is_better: bool = False,
        n_initial: int = 5,
        initial: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(space, lower_is_better=lower_is_better, seed=seed)
        if n_initial < 1 and initial is None:
            raise InputError(f"n_initial must be at least 1, got {n_initial}")
        self.initial = space.sample(n_initial, seed=seed) if initial is None else [space.check(c) for c in initial]

    def _initial_count(self) -> int:
        return len(self.initial)

    def ask(self) -> Config:
        """The next of the initial configurations, then what the method chooses."""
        if len(self.trials) < len(self.initial):
            return dict(self.initial[len(self.trials)])
        return self._choose()

    @abstractmethod
    def _choose(self) -> Config:
        """The configuration after the initial ones."""


class RandomSearch(_WithStart):
    """Each parameter uniform on its scale."""

    def _choose(self) -> Config:
        return self.space.sample(1, seed=self._rng())[0]


class SobolSearch(_WithStart):
    """A scrambled Sobol sequence."""

    def _choose(self) -> Config:
        at = len(self.trials) - len(self.initial)
        return self.space.sobol(at + 1, seed=self.seed)[at]


class TPESearch(_WithStart):
    """optuna's tree-structured Parzen estimator with its defaults, all parameters together, after the initial design."""

    def _choose(self) -> Config:
        optuna = require("optuna", "search")
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=len(self.initial), seed=int(self._rng().integers(2**31)), multivariate=False
            )
            study = optuna.create_study(direction="minimize" if self.lower_is_better else "maximize", sampler=sampler)
            known = distributions(self.space)
            for trial in self.observed:
                study.add_trial(
                    optuna.trial.create_trial(
                        params=_to_optuna(self.space, trial.config), distributions=known, value=trial.score
                    )
                )
            return _from_optuna(self.space, study.ask(known).params)
        finally:
            optuna.logging.set_verbosity(before)


def distributions(space: SearchSpace) -> dict[str, Any]:
    """The space as optuna's distributions: a logit scale by its unit coordinate, ordered and unordered values by their place."""
    known = require("optuna", "search").distributions
    made: dict[str, Any] = {}
    for name, one in space.items():
        if isinstance(one, Int):
            made[name] = known.IntDistribution(one.low, one.high, log=one.scale == "log")
        elif isinstance(one, Float) and one.scale == "logit":
            made[name] = known.FloatDistribution(0.0, 1.0)
        elif isinstance(one, Float):
            made[name] = known.FloatDistribution(one.low, one.high, log=one.scale == "log")
        else:
            made[name] = known.CategoricalDistribution(tuple(range(len(one.values))))
    return made


def _to_optuna(space: SearchSpace, config: Mapping[str, Any]) -> Config:
    out = {}
    for name, one in space.items():
        if isinstance(one, Float) and one.scale == "logit":
            out[name] = one.to_unit(config[name])
        elif isinstance(one, (Int, Float)):
            out[name] = config[name]
        else:
            out[name] = one.index(config[name])
    return out


def _from_optuna(space: SearchSpace, params: Mapping[str, Any]) -> Config:
    out = {}
    for name, one in space.items():
        if isinstance(one, Float) and one.scale == "logit":
            out[name] = one.from_unit(params[name])
        elif isinstance(one, (Int, Float)):
            out[name] = params[name]
        else:
            out[name] = one.values[params[name]]
    return space.check(out)


class GaussianProcessSurrogate:
    """A Gaussian process on the unit cube (one-hot for categories): Matérn 5/2 with one length, and noise."""

    def __init__(self, space: SearchSpace, *, seed: int = 0) -> None:
        self.space, self.seed = space, seed

    def fit(self, configs: Sequence[Mapping[str, Any]], scores: Any) -> "GaussianProcessSurrogate":
        """Fit the kernel by the marginal likelihood; failed trials (NaN) are left out."""
        y = np.asarray(scores, dtype=np.float64)
        if len(configs) != len(y) or not np.isfinite(y).any() or np.isinf(y).any():
            raise DataError("need a score for each configuration, and finite ones")
        x, y = self.space.encode(configs)[~np.isnan(y)], y[~np.isnan(y)]
        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(0.5, (0.05, 20.0), nu=2.5)
        self._model = GaussianProcessRegressor(
            kernel + WhiteKernel(1e-3, (1e-6, 1.0)), normalize_y=True, random_state=self.seed
        )
        with warnings.catch_warnings():
            # with a few trials the length ends at a bound, which is what bounds are for
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(x, y)
        return self

    def predict(
        self, configs: Sequence[Mapping[str, Any]]
    ) -> tuple[Floats[np.ndarray, " config"], Floats[np.ndarray, " config"]]:
        """Mean and standard deviation of the score."""
        mean, sd = self._model.predict(self.space.encode(configs), return_std=True)
        return mean, np.maximum(sd, 1e-5)


class GaussianProcessSearch(_WithStart):
    """The largest expected improvement under `GaussianProcessSurrogate` among 300 random configurations."""

    def _choose(self) -> Config:
        observed = self.observed
        candidates = self.space.sample(_CANDIDATES, seed=self._rng())
        if not observed:
            return candidates[0]
        scores = [trial.score for trial in observed]
        model = GaussianProcessSurrogate(self.space, seed=self.seed).fit([t.config for t in observed], scores)
        best = min(scores) if self.lower_is_better else max(scores)
        mean, sd = model.predict(candidates)
        return candidates[most_promising(mean, sd, best, self.lower_is_better)]
