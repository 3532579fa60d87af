"""The loop: predict a batch, show the optimizer what came out, read the descriptions that it writes."""

__all__ = ["Account", "Update", "VerbalizedModel"]

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils import Tags

from theodolite.core.errors import BudgetExhausted, DataError, InputError
from theodolite.hyperparameters.verbalized.answers import LearnerFormatError, OptimizerFormatError, read_description
from theodolite.hyperparameters.verbalized.prompts import (
    described,
    learner_prompt,
    optimizer_batch,
    optimizer_instructions,
    render,
    repair,
    scored_prompt,
)
from theodolite.language.model import LanguageModel, Message

_TRIES = 3  # answers of the optimizer in a row that cannot be read


@dataclass(frozen=True)
class Update:
    """One step of training; steps and epochs are counted from 1.

    batch: positions of its rows in X. theta_before, theta_after: the descriptions before and after it; they are the same where
    the new ones could not be read or were not accepted. reasoning: the optimizer's, or its whole answer where that could not
    be read. loss_before: of the batch, before the step. loss_after_validation: on the rows set aside, of what the optimizer
    wrote, or of what stays where that could not be read; None without such rows. calls, tokens: of this step, whether the
    model or its cache answered, so that a run that is repeated counts alike.
    """

    step: int
    epoch: int
    batch: tuple[int, ...]
    theta_before: str
    theta_after: str
    reasoning: str
    loss_before: float
    loss_after_validation: float | None
    accepted: bool
    calls: int
    tokens: int


class Account:
    """Requests and tokens so far, and the most requests there may be."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.calls, self.tokens = limit, 0, 0

    def spend(self, calls: int) -> None:
        """Count requests before they are made; BudgetExhausted where they are too many."""
        if self.limit is not None and self.calls + calls > self.limit:
            raise BudgetExhausted(f"{self.calls} of {self.limit} calls are spent, and {calls} more are needed")
        self.calls += calls

    def chat(self, model: LanguageModel, conversations: Sequence[Sequence[Message]], **options: Any) -> list[str]:
        """The answers' texts; as many requests at a time as the model was connected for."""
        self.spend(len(conversations))
        made = model.chat_many(conversations, **options)
        self.tokens += sum(one.prompt_tokens + one.completion_tokens for one in made)
        return [one.text for one in made]

    def score(self, model: LanguageModel, prompts: Sequence[str], continuations: Sequence[str]) -> np.ndarray:
        """log p of each continuation after each prompt, (prompts, continuations)."""
        self.spend(len(prompts))
        made = model.score_many(prompts, continuations)
        self.tokens += sum(one.tokens for one in made)
        return np.array([one.logprobs for one in made])


class VerbalizedModel(BaseEstimator, ABC):
    """What regression and classification share. Answers and targets are floats (of a class its number), NaN: not readable."""

    # constructor arguments of both subclasses
    learner: LanguageModel
    optimizer: LanguageModel | None
    task: str
    prior: str
    batch_size: int
    epochs: int
    history: int
    accept: str
    validation: float
    mode: str
    instructions: str
    show_loss: bool
    max_calls: int | None
    max_theta_chars: int
    max_tokens: int
    seed: int

    _default_task: str

    @abstractmethod
    def _targets(self, y: Any, n: int) -> np.ndarray:
        """Targets (n,) that were checked."""

    @abstractmethod
    def _form(self) -> str:
        """What the learner is told that an output is."""

    @abstractmethod
    def _read(self, text: str) -> float | None:
        """The answer in the learner's text."""

    @abstractmethod
    def _write(self, value: float) -> str:
        """An answer or a target as the optimizer reads it."""

    @abstractmethod
    def _losses(self, answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Loss of each row, (n,); answers that could not be read cost as much as knowing nothing of the row."""

    @abstractmethod
    def _label_words(self) -> tuple[str, ...]:
        """What scoring compares."""

    def fit(self, X: Any, y: Any) -> Any:
        """Train on rows X (an array or DataFrame of rows x columns, or a list of texts) with targets y (n,).

        Batches are taken in the order of the rows. With ``validation`` the share of rows set aside is drawn from ``seed``, and
        theta_ ends as best_theta_, the descriptions of least loss on them; without it both are the last ones.

        Raises DataError for rows or targets that cannot be used, LearnerFormatError, OptimizerFormatError, and what the
        language model raises.
        """
        self._check_options()
        rows, form = render(X)
        targets = self._targets(y, len(rows))
        kept, aside = self._split(targets)
        self._rows_form = form
        self.theta_initial_ = self.theta_ = self.best_theta_ = self._first()
        self.history_: list[Update] = []
        self.unparsed_ = self.failed_updates_ = 0
        self.stopped_ = "finished"
        account = Account(self.max_calls)
        try:
            for update in self._steps(rows, targets, kept, aside, account):
                self.history_.append(update)
        except BudgetExhausted:
            self.stopped_ = "budget"
        finally:
            self.theta_ = self.best_theta_
            self.calls_, self.tokens_ = account.calls, account.tokens
        return self

    def _steps(
        self, rows: list[str], targets: np.ndarray, kept: np.ndarray, aside: np.ndarray, account: Account
    ) -> Iterator[Update]:
        """Every step, done when it is given."""
        optimizer = self.learner if self.optimizer is None else self.optimizer
        psi = optimizer_instructions(self.instructions)
        earlier: list[Message] = []
        failed = 0

        def ask(at: np.ndarray, theta: str) -> np.ndarray:
            answers = self._ask([rows[i] for i in at], theta, account)
            self.unparsed_ += int(np.isnan(answers).sum())
            return answers

        def judge(theta: str) -> float | None:
            return float(self._losses(ask(aside, theta), targets[aside]).mean()) if len(aside) else None

        now = least = self.loss_initial_validation_ = judge(self.theta_)
        for step, (epoch, batch) in enumerate(self._batches(kept), 1):
            calls, tokens, before = account.calls, account.tokens, self.theta_
            answers = ask(batch, before)
            there = ~np.isnan(answers)
            loss = float(self._losses(answers[there], targets[batch][there]).mean())
            shown = optimizer_batch(
                self._described(before), [rows[i] for i in batch[there]],
                [self._write(value) for value in answers[there]], [self._write(value) for value in targets[batch][there]],
                loss if self.show_loss else None,
            )  # fmt: skip
            (text,) = account.chat(optimizer, [[psi, *earlier, shown]], max_tokens=self.max_tokens, seed=self.seed)
            read = read_description(text)
            after, accepted = now, False
            if read is None:
                failed, reasoning = failed + 1, text
                self.failed_updates_ += 1
                if failed == _TRIES:
                    raise OptimizerFormatError(
                        f"{optimizer.name} gave no section 'New Pattern Descriptions:' {_TRIES} times in a row; use a stronger "
                        f"model as the optimizer, or more max_tokens. Its last answer began: {text[:200]!r}"
                    )
            else:
                failed, reasoning, written = 0, read[0], self._cut(read[1])
                if self.history:
                    earlier = [*earlier, shown, {"role": "assistant", "content": text}][-2 * self.history :]
                after = now if written == before else judge(written)
                accepted = self.accept == "always" or (after is not None and now is not None and after < now)
                if accepted:
                    self.theta_, now = written, after
                if after is None or least is None or after < least:
                    self.best_theta_, least = written, after
            yield Update(
                step, epoch, tuple(batch.tolist()), before, self.theta_, reasoning, loss, after, accepted,
                account.calls - calls, account.tokens - tokens,
            )  # fmt: skip

    def loss(self, X: Any, y: Any) -> float:
        """Mean squared error, or share of wrong classes, of the descriptions theta_; what could not be read counts as wrong."""
        return self._loss(X, y, Account())

    def _loss(self, X: Any, y: Any, account: Account) -> float:
        rows = self._known_rows(X)
        targets = self._targets(y, len(rows))
        return float(self._losses(self._ask(rows, self._current(), account), targets).mean())

    def forecast_calls(self, rows: int) -> int:
        """Requests that `fit` makes for so many rows, without repairs: to learner and optimizer together."""
        aside = round(self.validation * rows)
        kept = rows - aside
        steps = self.epochs * math.ceil(kept / self.batch_size)
        return self.epochs * kept + steps + aside * (1 + steps)

    def _batches(self, kept: np.ndarray) -> list[tuple[int, np.ndarray]]:
        starts = range(0, len(kept), self.batch_size)
        return [(epoch, kept[i : i + self.batch_size]) for epoch in range(1, self.epochs + 1) for i in starts]

    def _split(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions to train on, in order, and positions set aside."""
        n, aside = len(targets), round(self.validation * len(targets))
        if self.validation and not 0 < aside < n:
            raise DataError(f"validation={self.validation} of {n} rows leaves a part empty; give more rows")
        drawn = np.sort(np.random.default_rng(self.seed).permutation(n)[:aside])
        return np.setdiff1d(np.arange(n), drawn), drawn

    def _ask(self, rows: list[str], theta: str, account: Account) -> np.ndarray:
        """Answers of the learner under ``theta``, (n,)."""
        if self.mode == "score":
            return self._scores(rows, theta, account).argmax(axis=1).astype(np.float64)
        read = self._described(theta)
        asked = [learner_prompt(read, row, self._form()) for row in rows]
        options = {"max_tokens": self.max_tokens, "seed": self.seed}
        texts = account.chat(self.learner, asked, **options)
        found = [self._read(text) for text in texts]
        bad = [i for i, value in enumerate(found) if value is None]
        if bad:
            again = account.chat(self.learner, [repair(asked[i], texts[i], self._form()) for i in bad], **options)
            for i, text in zip(bad, again, strict=True):
                found[i], texts[i] = self._read(text), text
        unread = [i for i in bad if found[i] is None]
        if 2 * len(unread) > len(rows):
            examples = " and ".join(repr(texts[i][:200]) for i in unread[:2])
            raise LearnerFormatError(
                f"{len(unread)} of {len(rows)} answers of {self.learner.name} could not be read, after one repair of each: "
                f"{examples}. Expected 'Output: [{self._form()}]'; use a stronger model or more max_tokens"
                + (", or mode='score'" if self._label_words() else "")
            )
        return np.array([math.nan if value is None else value for value in found])

    def _scores(self, rows: list[str], theta: str, account: Account) -> np.ndarray:
        """log p(label | prompt) for each label, (n, classes): the sum over all its tokens, each with one space before it."""
        read = self._described(theta)
        words = [f" {word}" for word in self._label_words()]
        return account.score(self.learner, [scored_prompt(read, row, getattr(self, "cue", "")) for row in rows], words)

    def _described(self, theta: str) -> str:
        return described(getattr(self, "theta_initial_", self._first()), theta)

    def _first(self) -> str:
        """theta_0: the task, and what is known beforehand."""
        return f"{self.task or self._default_task} {self.prior}".strip()

    def _current(self) -> str:
        theta = getattr(self, "theta_", None)
        if theta is None and not (self.task or self.prior):
            raise NotFittedError("fit first, or say in words what is known (task or prior), to predict with that alone")
        return self._first() if theta is None else theta

    def _known_rows(self, X: Any) -> list[str]:
        """Rows as text, of the form that was fitted."""
        self._check_options()
        rows, form = render(X)
        if form != (known := getattr(self, "_rows_form", form)):
            raise DataError(f"X has another form than in fit: {_form_words(form)}, expected {_form_words(known)}")
        return rows

    def _cut(self, theta: str) -> str:
        if len(theta) <= self.max_theta_chars:
            return theta
        warnings.warn(
            f"new descriptions of {len(theta):,} characters are cut to max_theta_chars={self.max_theta_chars:,}",
            stacklevel=4,
        )
        return theta[: self.max_theta_chars]

    def _warn_unread(self, answers: np.ndarray) -> None:
        if unread := int(np.isnan(answers).sum()):
            warnings.warn(f"{unread} of {len(answers)} answers could not be read and are missing", stacklevel=3)

    def _check_options(self) -> None:
        for name in ("learner", "optimizer"):
            given = getattr(self, name)
            if not isinstance(given, LanguageModel) and not (name == "optimizer" and given is None):
                raise InputError(f"{name} must be a language model (theodolite.language.connect), got {given!r}")
        for name, least in (("batch_size", 1), ("epochs", 0), ("max_theta_chars", 1), ("max_tokens", 1)):
            given = getattr(self, name)
            if not isinstance(given, Integral) or given < least:
                raise InputError(f"{name} must be a whole number, at least {least}, got {given!r}")
        if self.history not in (0, 1, 2):
            raise InputError(f"history is how many last steps the optimizer sees: 0, 1 or 2, got {self.history}")
        if self.accept not in ("always", "if-better"):
            raise InputError(f'accept is "always" or "if-better", got {self.accept!r}')
        if not 0 <= self.validation < 1:
            raise InputError(f"validation is a share of the rows, at least 0 and below 1, got {self.validation}")
        if self.accept == "if-better" and not self.validation:
            raise InputError('accept="if-better" needs rows to judge by: give validation, such as .2')
        if self.mode not in ("generate", "score"):
            raise InputError(f'mode is "generate" or "score", got {self.mode!r}')
        if self.max_calls is not None and self.max_calls < 1:
            raise InputError(f"max_calls must be at least 1, got {self.max_calls}")

    def __sklearn_clone__(self) -> Any:
        """Language models are shared, not copied: they hold connections."""
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.categorical = True
        tags.non_deterministic = True  # an endpoint may be
        return tags


def _form_words(form: tuple[str, ...] | int | None) -> str:
    if form is None:
        return "texts"
    if isinstance(form, int):
        return f"an array of {form} columns"
    return f"the columns {', '.join(form[:8])}"
