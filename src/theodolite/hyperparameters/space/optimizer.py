"""The ask/tell protocol, the loop that runs it and can be continued, and what comes out."""

__all__ = ["Optimizer", "SearchResult", "Trial", "best_so_far"]

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import Float as Floats

from theodolite.core.errors import DataError, InputError
from theodolite.core.files import read_json, write_json
from theodolite.hyperparameters.space.search_space import Config, SearchSpace


@dataclass(frozen=True)
class Trial:
    """One evaluation. score: NaN where it failed. predicted: what the optimiser expected, NaN where it did not say."""

    config: Config
    score: float
    predicted: float = math.nan


def best_so_far(scores: Iterable[float], *, lower_is_better: bool = False) -> Floats[np.ndarray, " trial"]:
    """Best of the first k scores for each k; failed ones (NaN) are passed over, NaN as long as all failed.

    >>> best_so_far([0.2, float("nan"), 0.5, 0.4]).tolist()
    [0.2, 0.2, 0.5, 0.5]
    """
    values = np.asarray(list(scores), dtype=np.float64)
    return np.fmin.accumulate(values) if lower_is_better else np.fmax.accumulate(values)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """How a search went: configs in the order of evaluation, scores (n,) with NaN for failed ones, best_so_far (n,).

    predicted (n,): the score that the optimiser expected, NaN where it made no forecast. seconds: in all. For an optimiser
    that asks a language model: calls and tokens of it that were paid for (answers from its cache are not counted again),
    n_rejected (answers that were no new configuration; n_unreadable of them could not be read), n_fallback (times that a
    random choice stood in) and, where they were kept, the prompts.
    """

    configs: tuple[Config, ...]
    scores: Floats[np.ndarray, " trial"]
    best_so_far: Floats[np.ndarray, " trial"]
    predicted: Floats[np.ndarray, " trial"]
    lower_is_better: bool
    seconds: float
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    n_rejected: int = 0
    n_unreadable: int = 0
    n_fallback: int = 0
    prompts: tuple[str, ...] = ()

    @property
    def best(self) -> Trial:
        """The best trial; DataError where all failed."""
        if np.isnan(self.scores).all():
            raise DataError("every evaluation failed, so there is no best configuration")
        at = int(np.nanargmin(self.scores) if self.lower_is_better else np.nanargmax(self.scores))
        return Trial(self.configs[at], float(self.scores[at]), float(self.predicted[at]))

    @property
    def tokens(self) -> int:
        """Tokens read and written by the language model."""
        return self.prompt_tokens + self.completion_tokens

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """What the tokens cost, at prices for a million of them."""
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6


class Optimizer(ABC):
    """Base of the optimisers. space: a `SearchSpace`. seed: the same one gives the same configurations for the same scores.

    `ask` is a function of what was told: asked twice in a row it answers the same. A score that is NaN marks a failed trial.
    """

    def __init__(self, space: SearchSpace, *, lower_is_better: bool = False, seed: int = 0) -> None:
        self.space, self.lower_is_better, self.seed = space, lower_is_better, seed
        self.trials: list[Trial] = []

    @abstractmethod
    def ask(self) -> Config:
        """The configuration to evaluate next."""

    def tell(self, config: Mapping[str, Any], score: float) -> None:
        """The score of a configuration; InputError where it is not of the space or the score is infinite."""
        if math.isinf(score):
            raise InputError(f"a score is a finite number, or NaN where the evaluation failed; got {score}")
        self.trials.append(Trial(self.space.check(config), float(score), self._expected(config)))

    def _expected(self, config: Mapping[str, Any]) -> float:
        return math.nan

    @property
    def observed(self) -> list[Trial]:
        """The trials that did not fail."""
        return [trial for trial in self.trials if not math.isnan(trial.score)]

    def _rng(self, *more: int) -> np.random.Generator:
        """Random numbers of this point of the search, so that a search that is continued goes the same way."""
        return np.random.default_rng([self.seed, len(self.trials), *more])

    def optimize(
        self,
        objective: Callable[[Config], float],
        n_trials: int = 25,
        *,
        file: str | Path | None = None,
    ) -> SearchResult:
        """Ask, evaluate and tell until there are as many trials as the initial design has and n_trials more.

        objective: configuration -> score; NaN where it failed. file: kept up to date after every trial, whole at any time;
        where it is there already, the search goes on from it. Raises DataError for a file of another search.
        """
        if n_trials < 0:
            raise InputError(f"n_trials must not be negative, got {n_trials}")
        path = None if file is None else Path(file)
        spent = self._load(path) if path is not None and path.exists() else 0.0
        began = time.perf_counter()
        while len(self.trials) < self._initial_count() + n_trials:
            config = self.ask()
            score = objective(dict(config))
            if not isinstance(score, SupportsFloat):
                raise InputError(f"the objective gives a score, NaN where the evaluation failed; got {score!r}")
            self.tell(config, float(score))
            if path is not None:
                state = self._state() | {"seconds": spent + time.perf_counter() - began}
                write_json(path, state)
        return self._result(spent + time.perf_counter() - began)

    def _initial_count(self) -> int:
        return 0

    def _result(self, seconds: float) -> SearchResult:
        scores = np.array([trial.score for trial in self.trials], dtype=np.float64)
        return SearchResult(
            tuple(trial.config for trial in self.trials), scores,
            best_so_far(scores, lower_is_better=self.lower_is_better),
            np.array([trial.predicted for trial in self.trials], dtype=np.float64), self.lower_is_better, seconds,
        )  # fmt: skip

    def _state(self) -> dict[str, Any]:
        """All that a continued search needs; JSON writes NaN as null."""
        return {
            "optimizer": type(self).__name__, "space": self.space.to_spec(), "lower_is_better": self.lower_is_better,
            "seed": self.seed, "trials": [[t.config, t.score, t.predicted] for t in self.trials],
        }  # fmt: skip

    def _load(self, path: Path) -> float:
        state = read_json(path)
        ours = SearchSpace.from_spec(self.space.to_spec()).to_spec()
        wanted = {"optimizer": type(self).__name__, "lower_is_better": self.lower_is_better, "seed": self.seed}
        other = [name for name, value in wanted.items() if not isinstance(state, dict) or state.get(name) != value]
        if other or state.get("space") != ours:
            raise DataError(
                f"{path} is of another search ({', '.join(other) or 'space'} differs); choose another file, or the same settings"
            )
        try:
            self.trials = [
                Trial(self.space.check(config), *(math.nan if x is None else float(x) for x in (score, predicted)))
                for config, score, predicted in state["trials"]
            ]
            self._restore(state)
            return float(state["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a whole record of a search: {error}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over what a subclass added to the state."""
        return
