"""Regression and classification by descriptions, as scikit-learn estimators."""

__all__ = ["VerbalizedClassifier", "VerbalizedRegressor"]

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.exceptions import NotFittedError
from sklearn.metrics import r2_score
from sklearn.utils.metaestimators import available_if

from theodolite.core.errors import DataError, InputError
from theodolite.hyperparameters.verbalized.answers import read_label, read_number
from theodolite.hyperparameters.verbalized.prompts import CLASSIFICATION, REGRESSION
from theodolite.hyperparameters.verbalized.training import Account, VerbalizedModel


class VerbalizedRegressor(RegressorMixin, VerbalizedModel):
    """Real numbers predicted by a language model that reads a description.

    learner, optimizer: language models (`theodolite.language.connect`); the learner is its own optimizer where that is None.
    task: the statement of the task; a general one where it is "". prior: what is known beforehand, in words; both are always
    before what is learned. batch_size, epochs: as in the paper; 0 epochs leave theta_0. history: last steps that the optimizer
    sees. accept: new descriptions "always", or "if-better" on the share ``validation`` of the rows. instructions: a sentence
    more for the optimizer (`NO_FORMULA`, `ONE_DECIMAL`). show_loss: tell the optimizer the batch's loss. decimals: of answers
    and targets. max_calls: requests of a fit, after which it stops with the best descriptions so far. max_tokens: of an answer.

    Fitted: theta_ (may be edited), theta_initial_, best_theta_, history_ (`Update`), unparsed_ (answers of the learner that
    could not be read), failed_updates_ (answers of the optimizer), loss_initial_validation_, stopped_ ("finished", "budget"),
    calls_, tokens_. An answer that cannot be read is asked for once more; then it is NaN, is not shown to the optimizer, and
    counts as if the mean of the targets had been answered.
    """

    _default_task = REGRESSION

    def __init__(
        self,
        learner: Any,
        optimizer: Any = None,
        *,
        task: str = "",
        prior: str = "",
        batch_size: int = 10,
        epochs: int = 5,
        history: int = 1,
        accept: str = "always",
        validation: float = 0.0,
        mode: str = "generate",
        instructions: str = "",
        show_loss: bool = False,
        decimals: int = 2,
        max_calls: int | None = None,
        max_theta_chars: int = 8000,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        self.learner, self.optimizer, self.task, self.prior = learner, optimizer, task, prior
        self.batch_size, self.epochs, self.history = batch_size, epochs, history
        self.accept, self.validation, self.mode = accept, validation, mode
        self.instructions, self.show_loss, self.decimals = instructions, show_loss, decimals
        self.max_calls, self.max_theta_chars, self.max_tokens, self.seed = max_calls, max_theta_chars, max_tokens, seed

    def predict(self, X: Any) -> np.ndarray:
        """Numbers (n,), NaN with a warning where an answer cannot be read; LearnerFormatError where more than half cannot.

        Not fitted, theta_0 answers, if task or prior is given.
        """
        rows = self._known_rows(X)
        answers = self._ask(rows, self._current(), Account())
        self._warn_unread(answers)
        return answers

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R2; an answer that cannot be read counts as the mean of ``y``."""
        answers, targets = self.predict(X), np.asarray(y, dtype=np.float64)
        return float(
            r2_score(targets, np.where(np.isnan(answers), targets.mean(), answers), sample_weight=sample_weight)
        )

    def _check_options(self) -> None:
        super()._check_options()
        if self.mode == "score":
            raise InputError('mode="score" compares labels; a regression has none, use mode="generate"')
        if not 0 <= self.decimals <= 12:
            raise InputError(f"decimals must be between 0 and 12, got {self.decimals}")

    def _targets(self, y: Any, n: int) -> np.ndarray:
        try:
            targets = np.asarray(y, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError("the targets of a regression are numbers") from error
        if targets.shape != (n,) or not np.isfinite(targets).all():
            bad = f", {(~np.isfinite(targets)).sum()} of them missing or infinite" if targets.size else ""
            raise DataError(f"y must be {n} finite numbers, one a row, got shape {targets.shape}{bad}")
        return targets

    def _form(self) -> str:
        return f"one real number rounded to {self.decimals} decimals"

    def _read(self, text: str) -> float | None:
        return read_number(text)

    def _write(self, value: float) -> str:
        return f"[{value:.{self.decimals}f}]"

    def _losses(self, answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return (np.where(np.isnan(answers), targets.mean(), answers) - targets) ** 2

    def _label_words(self) -> tuple[str, ...]:
        return ()


class VerbalizedClassifier(ClassifierMixin, VerbalizedModel):
    """Classes predicted by a language model that reads a description.

    mode: "generate" reads the class out of an answer; "score" compares p(label | prompt), the sum over the label's tokens, for
    the prompt "theta, Input: x, cue:", which works with weak models and needs no format. labels: how each class of y, in
    sorted order, is called in the prompt; str(class) where left out. cue: the word before the label. All else is as in
    `VerbalizedRegressor`; an answer that cannot be read is wrong, and `predict` gives None for it.

    >>> model = VerbalizedClassifier(connect(), prior="Film reviews.", mode="score")  # doctest: +SKIP
    >>> model.fit(["a joy", "dull"], ["good", "bad"]).predict(["great fun"])  # doctest: +SKIP
    array(['good'], dtype='<U4')
    """

    _default_task = CLASSIFICATION

    def __init__(
        self,
        learner: Any,
        optimizer: Any = None,
        *,
        task: str = "",
        prior: str = "",
        batch_size: int = 10,
        epochs: int = 5,
        history: int = 1,
        accept: str = "always",
        validation: float = 0.0,
        mode: str = "generate",
        labels: Sequence[str] = (),
        cue: str = "Label",
        instructions: str = "",
        show_loss: bool = False,
        max_calls: int | None = None,
        max_theta_chars: int = 8000,
        max_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        self.learner, self.optimizer, self.task, self.prior = learner, optimizer, task, prior
        self.batch_size, self.epochs, self.history = batch_size, epochs, history
        self.accept, self.validation, self.mode = accept, validation, mode
        self.labels, self.cue, self.instructions, self.show_loss = labels, cue, instructions, show_loss
        self.max_calls, self.max_theta_chars, self.max_tokens, self.seed = max_calls, max_theta_chars, max_tokens, seed

    def fit(self, X: Any, y: Any) -> Any:
        """As `VerbalizedRegressor.fit`; the classes of y, sorted, become classes_."""
        names = np.asarray(y)
        if names.ndim != 1 or len(names) == 0 or pd.isna(names).any():
            raise DataError(f"y must be one class a row, none of them missing, got shape {names.shape}")
        classes = np.unique(names.astype(str) if names.dtype == object else names)
        if len(classes) < 2:
            raise DataError(f"all rows are of one class, {classes[0]}; a classification needs two at least")
        if self.labels and len(self.labels) != len(classes):
            raise InputError(
                f"{len(self.labels)} labels for {len(classes)} classes ({', '.join(map(str, classes[:5]))})"
            )
        self.classes_ = classes
        return super().fit(X, y)

    def predict(self, X: Any) -> np.ndarray:
        """Classes (n,), None with a warning where an answer cannot be read; LearnerFormatError where more than half cannot.

        Not fitted, theta_0 answers with ``labels``, if those and task or prior are given.
        """
        rows, classes = self._known_rows(X), self._known_classes()
        answers = self._ask(rows, self._current(), Account())
        self._warn_unread(answers)
        unread = np.isnan(answers)
        found = classes[np.where(unread, 0, answers).astype(int)]
        return np.where(unread, None, found.astype(object)) if unread.any() else found  # type: ignore[return-value]

    @available_if(lambda self: self.mode == "score")
    def predict_proba(self, X: Any) -> np.ndarray:
        """p(label) in proportion to exp(log p(label | prompt)), (n, classes); with mode="score" only."""
        rows = self._known_rows(X)
        self._known_classes()
        return softmax(self._scores(rows, self._current(), Account()), axis=1)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy; an answer that cannot be read is wrong."""
        right = [said is not None and str(said) == str(true) for said, true in zip(self.predict(X), y, strict=True)]
        return float(np.average(right, weights=sample_weight))

    def _check_options(self) -> None:
        super()._check_options()
        words = [str(word).strip() for word in self.labels]
        if isinstance(self.labels, str) or not all(words) or len({word.casefold() for word in words}) < len(words):
            raise InputError(f"labels are words, all different, one for each class; got {self.labels!r}")
        if not self.cue.strip():
            raise InputError("cue is the word before the label, such as Label; got none")

    def _known_classes(self) -> np.ndarray:
        if not hasattr(self, "classes_"):
            if not self.labels:
                raise NotFittedError("fit first, or give labels, to predict without rows to learn from")
            return np.array(self.labels)
        return self.classes_

    def _targets(self, y: Any, n: int) -> np.ndarray:
        names, known = [str(name) for name in y], {str(name): float(i) for i, name in enumerate(self._known_classes())}
        if len(names) != n or not set(names) <= set(known):
            raise DataError(f"y must be {n} classes of {', '.join(list(known)[:8])}; got {len(names)}: {names[:3]}")
        return np.array([known[name] for name in names])

    def _form(self) -> str:
        return f"exactly one of: {', '.join(self._label_words())}"

    def _read(self, text: str) -> float | None:
        place = read_label(text, self._label_words())
        return None if place is None else float(place)

    def _write(self, value: float) -> str:
        return self._label_words()[int(value)]

    def _losses(self, answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return (answers != targets).astype(np.float64)

    def _label_words(self) -> tuple[str, ...]:
        return tuple(str(word).strip() for word in (self.labels or self._known_classes()))
