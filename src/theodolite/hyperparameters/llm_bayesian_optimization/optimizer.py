"""The loop: start from a design, draw candidates for a wanted score, evaluate the one that the surrogate likes best."""

__all__ = ["LLAMBO"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.core.errors import InputError
from theodolite.hyperparameters.llm_bayesian_optimization.asking import Account
from theodolite.hyperparameters.llm_bayesian_optimization.context import TaskContext
from theodolite.hyperparameters.llm_bayesian_optimization.sampler import CandidateSampler, desired_score
from theodolite.hyperparameters.llm_bayesian_optimization.surrogate import (
    DiscriminativeSurrogate,
    GenerativeSurrogate,
    most_promising,
)
from theodolite.hyperparameters.llm_bayesian_optimization.warm_start import warm_start
from theodolite.hyperparameters.space import Config, Optimizer, SearchResult, SearchSpace, Trial
from theodolite.language import LanguageModel
from theodolite.language.model import EndpointUnavailable


class LLAMBO(Optimizer):
    """Bayesian optimisation with a language model as its starting design, its sampler and its surrogate.

    context: the task in words; context.lower_is_better says which way is better. llm: of `theodolite.language.connect`.
    surrogate: "discriminative" (expected improvement of the predicted score) or "generative" (the chance to be among the best
    top_fraction; needs probabilities of texts). warm_start: "full", "partial", "none" (what the model is told), "random",
    "sobol" or "latin_hypercube". initial: starting points of one's own instead, n_initial of them. alpha: how far beyond the
    best the sampler aims, see `desired_score`. jitter: the aim is drawn between the best and that. method, bootstrap,
    recalibrate: of the discriminative surrogate. context_level, anonymize, log10, context_window: what is told, see `Wording`
    and `Asker`. fallback: "random" goes on with a random configuration, and counts it, where the model does not answer;
    "raise" stops; what is refused (wrong key, wrong name) always stops. keep_prompts: the result holds all prompts.

    Raises InputError for an initial configuration outside the space; EndpointError as the fallback says.

    Source: Liu, Astorga, Seedat, van der Schaar, 2024, arXiv:2402.03921.

    >>> from theodolite.hyperparameters.space import Float
    >>> from theodolite.language.scripted import ScriptedLanguageModel
    >>> llm = ScriptedLanguageModel(lambda prompt: "x: 0.50 ##" if "Recommend" in prompt else "0.9 ##")
    >>> search = LLAMBO(SearchSpace({"x": Float(0.0, 1.0)}), TaskContext("a parabola", "test", "height"), llm, n_initial=2)
    >>> search.warm_start = "sobol"
    >>> search.optimize(lambda config: 1 - (config["x"] - 0.5) ** 2, n_trials=1).best.config
    {'x': 0.5}
    """

    def __init__(
        self,
        space: SearchSpace,
        context: TaskContext,
        llm: LanguageModel,
        *,
        surrogate: str = "discriminative",
        warm_start: str = "full",
        n_initial: int = 5,
        n_candidates: int = 10,
        n_templates: int = 2,
        n_samples: int = 10,
        alpha: float = 0.1,
        top_fraction: float = 0.25,
        context_level: str = "full",
        anonymize: bool = False,
        fallback: str = "random",
        method: str = "auto",
        jitter: bool = False,
        bootstrap: bool = False,
        recalibrate: bool = False,
        log10: bool = False,
        context_window: int | None = None,
        initial: Sequence[Mapping[str, Any]] | None = None,
        keep_prompts: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(space, SearchSpace):
            raise InputError(f"space is a SearchSpace, got {type(space).__name__}")
        super().__init__(space, lower_is_better=context.lower_is_better, seed=seed)
        if surrogate not in ("discriminative", "generative"):
            raise InputError(f"surrogate is discriminative or generative; got {surrogate!r}")
        if fallback not in ("random", "raise"):
            raise InputError(f"fallback is random or raise; got {fallback!r}")
        if n_initial < 1:
            raise InputError(f"n_initial must be at least 1, got {n_initial}")
        desired_score([0.0], alpha)  # an alpha out of range is told now
        self.context, self.llm, self.alpha, self.jitter, self.fallback = context, llm, alpha, jitter, fallback
        self.warm_start = warm_start
        self.anonymize = anonymize
        self.account = Account(keep=keep_prompts)
        self.initial = None if initial is None else [space.check(config) for config in initial]
        self.n_initial = n_initial if self.initial is None else len(self.initial)
        asking: dict[str, Any] = {
            "n_templates": n_templates, "context_level": context_level, "anonymize": anonymize, "log10": log10,
            "context_window": context_window, "account": self.account, "seed": seed,
        }  # fmt: skip
        self.sampler = CandidateSampler(space, context, llm, n_candidates=n_candidates, **asking)
        self.surrogate: DiscriminativeSurrogate | GenerativeSurrogate
        if surrogate == "discriminative":
            self.surrogate = DiscriminativeSurrogate(
                space,
                context,
                llm,
                n_samples=n_samples,
                method=method,
                bootstrap=bootstrap,
                recalibrate=recalibrate,
                **asking,
            )
        else:
            self.surrogate = GenerativeSurrogate(
                space, context, llm, top_fraction=top_fraction, bootstrap=bootstrap, **asking
            )
        self._forecast: tuple[Any, float] | None = None
        self._asked: tuple[int, Config] | None = None
        self._before, self._start = llm.usage, {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def ask(self) -> Config:
        """The configuration to evaluate next; the model is asked once for it, however often this is called."""
        if self._asked is None or self._asked[0] != len(self.trials):
            self._asked = (len(self.trials), self._next())
        return dict(self._asked[1])

    def _next(self) -> Config:
        try:
            if len(self.trials) < self.n_initial:
                if self.initial is None:
                    self.initial = warm_start(
                        self.space, self.context, self.llm, self.n_initial, self.warm_start,
                        anonymize=self.anonymize, account=self.account, seed=self.seed,
                    )  # fmt: skip
                return self.initial[len(self.trials)]
            if self.observed:
                return self._best_candidate()
        except EndpointUnavailable:
            if self.fallback == "raise":
                raise
        self.account.fallbacks += 1
        return self.space.sample(1, seed=self._rng())[0]

    def _best_candidate(self) -> Config:
        trials = self.observed
        scores = [trial.score for trial in trials]
        best = min(scores) if self.lower_is_better else max(scores)
        target = desired_score(scores, self.alpha, self.lower_is_better, self.context.bounds)
        if self.jitter:
            target = best + float(self._rng().random()) * (target - best)
        configs = self.sampler.propose(trials, target)
        self.surrogate.fit([trial.config for trial in trials], scores)
        if isinstance(self.surrogate, GenerativeSurrogate):
            return configs[int(np.argmax(self.surrogate.predict_proba(configs)))]
        mean, sd = self.surrogate.predict(configs)
        at = most_promising(mean, sd, best, self.lower_is_better)
        self._forecast = (self.space.key(configs[at]), float(mean[at]))
        return configs[at]

    def _expected(self, config: Mapping[str, Any]) -> float:
        return self._forecast[1] if self._forecast and self._forecast[0] == self.space.key(config) else math.nan

    def tell(self, config: Mapping[str, Any], score: float) -> None:
        """The score of a configuration; NaN where its evaluation failed: it is kept, and in no prompt."""
        super().tell(config, score)
        self._forecast = None

    def optimize(self, objective: Any, n_trials: int = 25, *, file: str | Path | None = None) -> SearchResult:
        """n_initial trials of the starting design, then n_trials of the method; see `Optimizer.optimize`."""
        return super().optimize(objective, n_trials, file=file)

    def _initial_count(self) -> int:
        return self.n_initial

    def _spent(self) -> dict[str, int]:
        now = self.llm.usage
        return {name: start + getattr(now, name) - getattr(self._before, name) for name, start in self._start.items()}

    def _result(self, seconds: float) -> SearchResult:
        return replace(
            super()._result(seconds), n_rejected=self.account.rejected, n_unreadable=self.account.unreadable,
            n_fallback=self.account.fallbacks,
            prompts=tuple(self.account.prompts), **self._spent(),
        )  # fmt: skip

    def _state(self) -> dict[str, Any]:
        return super()._state() | {
            "initial": self.initial, "rejected": self.account.rejected, "unreadable": self.account.unreadable,
            "fallbacks": self.account.fallbacks, **self._spent(),
        }  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        self.initial = None if state["initial"] is None else [self.space.check(config) for config in state["initial"]]
        self.account.rejected, self.account.fallbacks = int(state["rejected"]), int(state["fallbacks"])
        self.account.unreadable = int(state["unreadable"])
        self._before, self._start = self.llm.usage, {name: int(state[name]) for name in self._start}

    def as_optuna_sampler(self) -> Any:
        """A sampler for ``optuna.create_study(sampler=...)``, which asks the model for each trial given those that are done.

        The objective suggests the space's parameters by their names, bounds and log scales (ordered and unordered values by
        ``suggest_categorical``). The study's direction must be the context's.
        """
        from theodolite.hyperparameters.llm_bayesian_optimization.optuna_sampler import make_sampler

        return make_sampler(self)

    def after(self, trials: Sequence[Trial]) -> Config:
        """What is to be evaluated next where exactly these trials were made."""
        self.trials = [replace(trial, config=self.space.check(trial.config)) for trial in trials]
        return self.ask()
