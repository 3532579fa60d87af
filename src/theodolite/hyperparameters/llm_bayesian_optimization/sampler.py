"""New configurations, drawn by a language model for a score that is wanted (section 6)."""

__all__ = ["CandidateSampler", "desired_score"]

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from theodolite.core.errors import DataError, InputError
from theodolite.hyperparameters.llm_bayesian_optimization.asking import Asker, seed_of
from theodolite.hyperparameters.llm_bayesian_optimization.wording import FENCE, decimals, read_answer
from theodolite.hyperparameters.space import Config, Trial
from theodolite.language.local import LocalModel

_STEPS = (0.1, 0.01, 0.001, -0.001, -0.01, -0.1)
_HIGH, _LOW = 1e-4, 1e-5  # nearer than this to what a metric can be at best, no score is wanted
_ROUNDS, _ENOUGH = 4, 5
_MOST_TOKENS = 500


def desired_score(
    scores: Iterable[float],
    alpha: float = 0.1,
    lower_is_better: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> float:
    """The score to ask for: best + alpha (max - min) where higher is better, best - alpha (max - min) where lower is.

    alpha in [-1, 1]: above 0 beyond the best; 0 counts as -0.001. Where all scores are equal their range is taken as
    0.1 |score|. A score that ``bounds`` (low, high) do not allow (at or above high - 1e-4, at or below low + 1e-5 where lower is
    better) is replaced by that of the next smaller alpha of 0.1, 0.01, 0.001, -0.001, -0.01, -0.1, and after those by the
    limit itself. NaN scores are left out.

    >>> desired_score([0.5, 0.9], alpha=0.1)
    0.9400000000000001
    >>> desired_score([0.5, 1.0], alpha=0.1, bounds=(0.0, 1.0))
    0.9995
    """
    if not -1 <= alpha <= 1:
        raise InputError(f"alpha must lie between -1 and 1, got {alpha}")
    values = np.asarray(list(scores), dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values) or not np.isfinite(values).all():
        raise DataError("need at least one finite score")
    spread = float(values.max() - values.min()) or 0.1 * float(np.abs(values).max())
    best = float(values.min() if lower_is_better else values.max())
    sign = -1 if lower_is_better else 1
    limit = bounds[0] + _LOW if lower_is_better else bounds[1] - _HIGH
    first = alpha if alpha != 0 else -1e-3
    for step in (first, *(step for step in _STEPS if step < first)):
        wanted = best + sign * step * spread
        if sign * (limit - wanted) > 0:
            return wanted
    return limit


class CandidateSampler(Asker):
    """n_candidates: drawn in all, split over the templates. temperature, top_p: of the drawing. Other options: as in `Asker`."""

    def __init__(
        self, *args: Any, n_candidates: int = 10, temperature: float = 0.8, top_p: float = 0.95, **options: Any
    ):
        super().__init__(*args, **options)
        if n_candidates < 1:
            raise InputError(f"n_candidates must be at least 1, got {n_candidates}")
        self.n_candidates, self.temperature, self.top_p = n_candidates, temperature, top_p

    def prompts(self, observed: Sequence[Trial], target: float) -> list[str]:
        """The prompt of each template, equal ones once: few trials have few orders, and equal prompts have equal answers."""
        wording, digits = self.wording, decimals(observed)

        def prompt(trials: Sequence[Trial]) -> str:
            hint = (
                ""
                if wording.level == "none"
                else " Do not recommend the ends of the ranges, nor rounded values: use all the digits that help."
            )
            examples = "".join(
                f"Score: {trial.score:.{digits}f}\nConfiguration: {FENCE} {wording.pairs(trial.config)} {FENCE}\n\n"
                for trial in trials
            )
            return (
                f"Below are scores of {wording.subject()}, measured as {wording.metric} ({wording.direction}), with the "
                f"configurations that gave them. The allowed ranges:\n{wording.ranges()}\nRecommend a configuration that reaches "
                f"the last score.{hint} Answer with the configuration alone, between {FENCE} and {FENCE}.\n\n{examples}"
                f"Score: {target:.{digits}f}\nConfiguration: {FENCE}"
            )

        told = self._fitting(observed, prompt, self._answer_tokens(observed))
        made = [prompt(wording.shuffled(told, template)) for template in range(self.n_templates)]
        return list(dict.fromkeys(made))

    def _answer_tokens(self, observed: Sequence[Trial]) -> int:
        """For an answer as long as the longest of the observed, with some digits more of each value; a chat model may put words
        before it, and its tokens are not known here but are no more than characters.
        """
        longest = max((self.wording.pairs(trial.config) for trial in observed), key=len)
        if isinstance(self.llm, LocalModel):
            return min(_MOST_TOKENS, self._tokens(longest) + 4 * (1 + len(self.space)))
        return min(_MOST_TOKENS, 100 + len(longest))

    def propose(self, observed: Sequence[Trial | tuple[Config, float]], target: float) -> list[Config]:
        """New configurations inside the space that should reach ``target``, given the observed ones with their scores.

        Answers that cannot be read, are out of range, observed already or there twice are counted as rejected; while fewer
        than 5 are left the model is asked up to 3 times more, and then random ones fill up to 5 and are counted as fallbacks.

        Source: Liu et al., 2024, arXiv:2402.03921, section 6.
        """
        trials = [one if isinstance(one, Trial) else Trial(self.space.check(one[0]), float(one[1])) for one in observed]
        trials = [trial for trial in trials if not math.isnan(trial.score)]
        if not trials:
            raise DataError("need at least one observed configuration whose evaluation did not fail")
        if not math.isfinite(target):
            raise InputError(f"the wanted score must be finite, got {target}")
        known = {self.space.key(trial.config) for trial in trials}
        found: dict[tuple, Config] = {}
        prompts = self.prompts(trials, target)
        self.account.note(prompts)
        enough = min(_ENOUGH, self.n_candidates)
        for attempt in range(_ROUNDS):
            made = self.llm.generate_many(
                prompts, -(-self.n_candidates // len(prompts)), temperature=self.temperature, top_p=self.top_p,
                max_tokens=self._answer_tokens(trials), stop=[f"{FENCE}\n"], seed=seed_of(self.seed, len(observed), attempt),
            )  # fmt: skip
            for answer in (answer for answers in made for answer in answers):
                config = read_answer(answer.text, self.wording.read_pairs, whole=answer.finish != "length")
                key = None if config is None else self.space.key(config)
                self.account.unreadable += config is None
                if config is None or key is None or key in known or key in found:
                    self.account.rejected += 1
                elif len(found) < self.n_candidates:
                    found[key] = config
            if len(found) >= enough:
                break
        if len(found) < enough:
            self.account.fallbacks += 1
            for config in self.space.sample(20 * enough, seed=seed_of(self.seed, len(observed), _ROUNDS)):
                if len(found) < enough and self.space.key(config) not in known:
                    found.setdefault(self.space.key(config), config)
        # a space whose configurations were all seen has nothing new: one that is known then
        return list(found.values()) or self.space.sample(1, seed=seed_of(self.seed, len(observed)))
