"""What a language model expects of a configuration: its score with uncertainty, or the chance that it is among the best.

    EI(h) = d Phi(d / sd) + sd phi(d / sd),   d = mean - best   (best - mean where lower is better)

The discriminative surrogate p(s | h) writes all trials as (configuration, score) and lets the model write the score of one more
(section 5.1). Two ways to read it: "sample" draws several answers; "logprob" reads the probabilities of the ten digits as the
next token, so nothing is drawn, what all candidates share is run once and all candidates go in one batch. The generative
surrogate p(s better than tau | h) writes whether a trial was among the best and reads p("1") (section 5.2).

Source: Liu, Astorga, Seedat, van der Schaar, 2024, arXiv:2402.03921.
"""

__all__ = ["DiscriminativeSurrogate", "GenerativeSurrogate", "expected_improvement", "most_promising", "recalibration"]

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from theodolite.core.errors import DataError, InputError
from theodolite.hyperparameters.llm_bayesian_optimization.asking import Asker, seed_of
from theodolite.hyperparameters.llm_bayesian_optimization.wording import FENCE, decimals, read_answer, read_score
from theodolite.hyperparameters.space import Trial
from theodolite.language.local import LocalModel
from theodolite.language.model import ScoringUnavailable

Values = Float[np.ndarray, " config"]
_FLOOR = 1e-5  # of a standard deviation
_SURE = 1e3  # deviations, beyond which a normal distribution has nothing
_FEWEST = 3  # answers of each template
_ANSWER = 12  # tokens: a score of six decimals and its fence, for tokenizers that split it into digits
_DIGITS = tuple(f" {digit}" for digit in range(10))
_ENDS = (1.0, 9.0)  # where the worst and the best observed score stand on the scale that digits are read from
_COVERED = 0.68


def expected_improvement(mean: Any, sd: Any, best: float, lower_is_better: bool = False) -> Any:
    """Mean of max(0, improvement over ``best``) of a normal score; max(0, d) where sd is 0.

    >>> round(float(expected_improvement(0.0, 1.0, 0.0)), 4)
    0.3989
    """
    gain = np.asarray(best - np.asarray(mean) if lower_is_better else np.asarray(mean) - best, dtype=np.float64)
    spread = np.broadcast_to(np.asarray(sd, dtype=np.float64), gain.shape)
    if (spread < 0).any():
        raise InputError("a standard deviation is not negative")
    with np.errstate(over="ignore"):
        z = np.clip(gain / np.where(spread > 0, spread, 1.0), -_SURE, _SURE)
    return np.where(spread > 0, gain * stats.norm.cdf(z) + spread * stats.norm.pdf(z), np.maximum(gain, 0.0))


def most_promising(mean: Values, sd: Values, best: float, lower_is_better: bool = False) -> int:
    """The place of the largest expected improvement; of several (all may be 0 for a sure model) that with the better mean."""
    gain = expected_improvement(mean, sd, best, lower_is_better)
    return int(np.lexsort((-mean if lower_is_better else mean, gain))[-1])


def recalibration(mean: Values, sd: Values, truth: Values) -> float:
    """The factor by which sd has to be multiplied so that mean +- sd covers 68 % of the true scores."""
    factor = float(np.quantile(np.abs(np.asarray(truth) - mean) / np.asarray(sd), _COVERED, method="higher"))
    return factor if factor > 0 else 1.0


class _Surrogate(Asker):
    """Keeps the trials and writes the prompts; what an example says beside its configuration is up to the subclass."""

    def __init__(self, *args: Any, bootstrap: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.bootstrap = bootstrap
        self._trials: list[Trial] = []

    def fit(self, configs: Sequence[Mapping[str, Any]], scores: Any) -> Any:
        """Take the observed configurations and scores; failed ones (NaN) are left out."""
        if len(configs) != len(scores):
            raise DataError(f"{len(configs)} configurations but {len(scores)} scores")
        trials = [Trial(self.space.check(c), float(s)) for c, s in zip(configs, scores, strict=True)]
        self._trials = [trial for trial in trials if not math.isnan(trial.score)]
        if not self._trials or not all(math.isfinite(trial.score) for trial in self._trials):
            raise DataError("need at least one observed configuration, and finite scores")
        return self

    def _check(self, configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if not self._trials:
            raise InputError("fit the surrogate with observed configurations first")
        if not configs:
            raise InputError("need at least one configuration to predict")
        return [self.space.check(config) for config in configs]

    def _prompts(self, configs: Sequence[Mapping[str, Any]], head: str, label: str, said: Any) -> list[list[str]]:
        """For each template the prompts of all configurations; ``said(trial)`` is what stands inside an example's fence."""
        wording = self.wording

        def examples(trials: Sequence[Trial]) -> str:
            return head + "".join(
                f"Configuration: {wording.sentence(trial.config)}\n{label}: {FENCE} {said(trial)} {FENCE}\n\n"
                for trial in trials
            )

        ends = [f"Configuration: {wording.sentence(config)}\n{label}: {FENCE}" for config in configs]
        longest = max(ends, key=len)
        told = self._fitting(self._trials, lambda trials: examples(trials) + longest, _ANSWER)
        made = [
            [examples(wording.shuffled(told, template, bootstrap=self.bootstrap)) + end for end in ends]
            for template in range(self.n_templates)
        ]
        for prompts in made:
            self.account.note(prompts)
        return made


class DiscriminativeSurrogate(_Surrogate):
    """n_samples: answers drawn for a configuration, split over the templates, at least 3 of each. method: "sample",
    "logprob", or "auto": logprob for a local model, sample for others.

    bootstrap: each template's trials are drawn with replacement. recalibrate: sd is scaled so that mean +- sd covers 68 % of
    the observed scores, each predicted from the others (as many predictions more as there are trials). Other options: as
    in `Asker`. With "logprob" the scores are told on a scale from 0 to 10 on which the worst observed one is 1 and the best is
    9, so that the first digit has the information; inside a digit the score is taken as uniform.
    """

    def __init__(
        self,
        *args: Any,
        n_samples: int = 10,
        method: str = "auto",
        temperature: float = 0.7,
        top_p: float = 0.95,
        recalibrate: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if n_samples < 1:
            raise InputError(f"n_samples must be at least 1, got {n_samples}")
        if method not in ("auto", "sample", "logprob"):
            raise InputError(f"method is auto, sample or logprob; got {method!r}")
        if method == "auto":
            method = "logprob" if isinstance(self.llm, LocalModel) else "sample"
        self.n_samples, self.method, self.recalibrate = n_samples, method, recalibrate
        self.temperature, self.top_p = temperature, top_p

    def predict(self, configs: Sequence[Mapping[str, Any]]) -> tuple[Values, Values]:
        """Expected score and its standard deviation (population), each (n,).

        A configuration without a readable answer has the mean of the others' (of the observed scores where there is none);
        sd is at least 1e-5. Raises ScoringUnavailable where "logprob" is wanted of a model that cannot tell.
        """
        wanted = self._check(configs)
        mean, sd = self._by_digits(wanted) if self.method == "logprob" else self._by_samples(wanted)
        if self.recalibrate and len(self._trials) > 2:
            sd = sd * self._factor()
        return mean, np.maximum(sd, _FLOOR)

    def _factor(self) -> float:
        """By leaving out each observed trial in turn."""
        trials, self.recalibrate = self._trials, False
        try:
            told = []
            for i, trial in enumerate(trials):
                self._trials = trials[:i] + trials[i + 1 :]
                told.append([float(value[0]) for value in self.predict([trial.config])])
        finally:
            self._trials, self.recalibrate = trials, True
        mean, sd = np.array(told).T
        return recalibration(mean, sd, np.array([trial.score for trial in trials]))

    def _head(self, scale: str) -> str:
        return (
            f"Below are configurations of {self.wording.subject()} with their scores, measured as {self.wording.metric} "
            f"({self.wording.direction}){scale}. Predict the score of the last configuration. Answer with the number alone, "
            f"between {FENCE} and {FENCE}.\n\n"
        )

    def _by_samples(self, configs: list[dict[str, Any]]) -> tuple[Values, Values]:
        digits = decimals(self._trials)
        templates = self._prompts(configs, self._head(""), "Score", lambda trial: f"{trial.score:.{digits}f}")
        # few trials have few orders: equal prompts would have equal answers
        templates = [list(prompts) for prompts in dict.fromkeys(map(tuple, templates))]
        each = max(_FEWEST, -(-self.n_samples // len(templates)))
        made = self.llm.generate_many(
            [prompt for prompts in templates for prompt in prompts], each, temperature=self.temperature, top_p=self.top_p,
            max_tokens=_ANSWER + digits - 6, stop=["\n\n"], seed=seed_of(self.seed, len(self._trials), 7),
        )  # fmt: skip
        read = [
            [read_answer(one.text, read_score, whole=one.finish != "length") for one in answers] for answers in made
        ]
        n = len(configs)
        values = [[x for row in read[i::n] for x in row if x is not None] for i in range(n)]
        lost = sum(x is None for row in read for x in row)
        self.account.rejected += lost
        self.account.unreadable += lost
        known = [row for row in values if row]
        if not known:
            scores = np.array([trial.score for trial in self._trials])
            return np.full(n, scores.mean()), np.full(n, scores.std())
        mean_of, sd_of = float(np.mean([np.mean(row) for row in known])), float(np.mean([np.std(row) for row in known]))
        mean = np.array([np.mean(row) if row else mean_of for row in values])
        return mean, np.array([np.std(row) if row else sd_of for row in values])

    def _by_digits(self, configs: list[dict[str, Any]]) -> tuple[Values, Values]:
        scores = np.array([trial.score for trial in self._trials])
        low, spread = float(scores.min()), float(scores.max() - scores.min())
        spread = spread or 0.1 * float(np.abs(scores).max()) or 1.0
        step = spread / (_ENDS[1] - _ENDS[0])
        templates = self._prompts(
            configs, self._head(" and given on a scale from 0 to 10"), "Score",
            lambda trial: f"{_ENDS[0] + (trial.score - low) / step:.1f}",
        )  # fmt: skip
        p = np.mean([_shares(self.llm.score_table(prompts, _DIGITS)) for prompts in templates], axis=0)
        middle = np.arange(10) + 0.5
        mean = p @ middle
        variance = p @ middle**2 - mean**2 + 1 / 12
        return low + (mean - _ENDS[0]) * step, np.sqrt(variance) * step


class GenerativeSurrogate(_Surrogate):
    """top_fraction: the share of observed trials that count as the best. Other options: as in `Asker`."""

    def __init__(self, *args: Any, top_fraction: float = 0.25, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0 < top_fraction < 1:
            raise InputError(f"top_fraction must lie between 0 and 1, got {top_fraction}")
        self.top_fraction = top_fraction

    def labels(self) -> list[int]:
        """1 for the observed trials that are strictly beyond the percentile, else 0."""
        scores = np.array([trial.score for trial in self._trials])
        if self.context.lower_is_better:
            return (scores < np.quantile(scores, self.top_fraction)).astype(int).tolist()
        return (scores > np.quantile(scores, 1 - self.top_fraction)).astype(int).tolist()

    def predict_proba(self, configs: Sequence[Mapping[str, Any]]) -> Values:
        """p("1") / (p("0") + p("1")) for each configuration (n,), averaged over the templates.

        Raises ScoringUnavailable where the model does not tell the probability of a text.
        """
        wanted = self._check(configs)
        label = dict(zip(map(id, self._trials), self.labels(), strict=True))
        share = f"{100 * self.top_fraction:g} %"
        head = (
            f"Below are configurations of {self.wording.subject()}, each with 1 where its score, measured as "
            f"{self.wording.metric} ({self.wording.direction}), is among the best {share}, and with 0 where it is not. Say 1 "
            f"or 0 for the last configuration, between {FENCE} and {FENCE}.\n\n"
        )
        templates = self._prompts(wanted, head, "Among the best", lambda trial: label[id(trial)])
        try:
            return np.mean(
                [_shares(self.llm.score_table(prompts, (" 0", " 1")))[:, 1] for prompts in templates], axis=0
            )
        except ScoringUnavailable as error:
            raise ScoringUnavailable(
                f"the generative surrogate needs the probabilities of 0 and 1; use the discriminative one: {error}"
            ) from error


def _shares(logp: np.ndarray) -> np.ndarray:
    """Rows of log-probabilities as shares of the options."""
    p = np.exp(logp - logp.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
