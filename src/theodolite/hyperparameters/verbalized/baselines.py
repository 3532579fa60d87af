"""What training by words is compared with: examples in the prompt, a search among descriptions, and ordinary models."""

__all__ = ["Candidate", "CandidateSearch", "candidate_search", "in_context", "reference_scores"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from theodolite.core.errors import DataError, InputError
from theodolite.core.estimate import Estimate, bootstrap, proportion
from theodolite.hyperparameters.verbalized.answers import OptimizerFormatError, read_description
from theodolite.hyperparameters.verbalized.estimators import VerbalizedClassifier, VerbalizedRegressor
from theodolite.hyperparameters.verbalized.prompts import optimizer_batch, optimizer_instructions, render
from theodolite.hyperparameters.verbalized.training import Account


@dataclass(frozen=True)
class Candidate:
    """A description, and for a classifier how it calls the classes (in sorted order) and the cue; its own where left out."""

    theta: str
    labels: tuple[str, ...] = ()
    cue: str = ""


@dataclass(frozen=True, eq=False)
class CandidateSearch:
    """candidates with the loss of each on the rows that chose, the position of the chosen one (the first of the best), the
    model with it, and the requests and tokens that it took.
    """

    candidates: tuple[Candidate, ...]
    losses: np.ndarray
    chosen: int
    model: VerbalizedClassifier | VerbalizedRegressor
    calls: int
    tokens: int = 0


def candidate_search(
    model: VerbalizedClassifier | VerbalizedRegressor,
    X: Any,
    y: Any,
    candidates: Sequence[str | Candidate] | None = None,
    *,
    k: int = 8,
) -> CandidateSearch:
    """The best of several descriptions on rows X with targets y; the optimizer is not asked twice.

    candidates: the descriptions, without theta_0, which stands before each; all rows then choose. Where None, the optimizer
    writes ``k`` of them, at temperature 1, from the first batch_size rows, and the other rows choose.

    Raises InputError for no candidates, DataError for too few rows, OptimizerFormatError where none of the k could be read.
    """
    base: Any = clone(model)
    y = np.asarray(y)
    base.set_params(epochs=0, validation=0.0, accept="always").fit(X, y)
    account = Account()
    if candidates is None:
        if k < 1:
            raise InputError(f"k is how many descriptions are written, at least 1; got {k}")
        if len(y) <= model.batch_size:
            raise DataError(
                f"need more than batch_size={model.batch_size} rows: a batch to write from, others to choose by"
            )
        candidates = _written(base, X, y, k, account)
        X, y = _rows(X, slice(model.batch_size, None)), y[model.batch_size :]
    given = tuple(one if isinstance(one, Candidate) else Candidate(one) for one in candidates)
    if not given:
        raise InputError("there are no candidates to choose from")
    models = [_with(base, one) for one in given]
    losses = np.array([one._loss(X, y, account) for one in models])
    best = int(losses.argmin())
    return CandidateSearch(given, losses, best, models[best], account.calls, account.tokens)


def _with(base: Any, candidate: Candidate) -> Any:
    changed = {"labels": candidate.labels, "cue": candidate.cue}
    made: Any = clone(base)
    made.set_params(**{name: value for name, value in changed.items() if value})
    for name, value in vars(base).items():  # what fit found out about the data
        if name not in base.get_params(deep=False):
            setattr(made, name, value)
    made.theta_ = candidate.theta
    return made


def _written(base: Any, X: Any, y: Any, k: int, account: Account) -> list[str]:
    rows = render(X)[0][: base.batch_size]
    targets = base._targets(y, len(y))[: base.batch_size]
    answers = base._ask(rows, base.theta_, account)
    there = np.flatnonzero(~np.isnan(answers))
    shown = optimizer_batch(
        base._described(base.theta_), [rows[i] for i in there], [base._write(answers[i]) for i in there],
        [base._write(targets[i]) for i in there], None,
    )  # fmt: skip
    optimizer = base.learner if base.optimizer is None else base.optimizer
    asked = [optimizer_instructions(base.instructions), shown]
    options = {"temperature": 1.0, "max_tokens": base.max_tokens}
    texts = [account.chat(optimizer, [asked], seed=base.seed + i, **options)[0] for i in range(k)]
    read = [found[1] for text in texts if (found := read_description(text)) is not None]
    if not read:
        raise OptimizerFormatError(f"none of {k} descriptions of {optimizer.name} could be read: {texts[:1]}")
    return [text[: base.max_theta_chars] for text in read]


def in_context(model: VerbalizedClassifier | VerbalizedRegressor, X: Any, y: Any) -> Any:
    """The learner with all rows X and their targets in its prompt as examples, in place of descriptions: a fitted model."""
    made: Any = clone(model)
    made.set_params(epochs=0, validation=0.0, accept="always").fit(X, y)
    rows, targets = render(X)[0], made._targets(y, len(y))
    word = made.cue if made.mode == "score" else "Output"
    shots = [f"Input: {row}\n{word}: {made._write(value)}" for row, value in zip(rows, targets, strict=True)]
    made.theta_ = made.best_theta_ = "\n".join(["Examples:", *shots])
    return made


def reference_scores(
    X: Any, y: Any, X_test: Any, y_test: Any, *, regression: bool = False, seed: int = 0
) -> dict[str, Estimate]:
    """What ordinary models reach on the same rows, by name: accuracy, or mean squared error for a ``regression``.

    Texts: logistic regression on word counts. Tables: logistic or linear and polynomial (cubic) regression, and gradient
    boosting. And the answer without learning, the commonest class or the mean.
    """
    texts = render(X)[1] is None
    code: Any = (
        CountVectorizer(token_pattern=r"\S+")
        if texts
        else make_pipeline(DictVectorizer(sparse=False), StandardScaler())
    )
    made: dict[str, Any]
    if regression:
        made = {"mean": DummyRegressor(), "linear regression": LinearRegression()}
        if not texts:
            made["polynomial regression"] = make_pipeline(PolynomialFeatures(3), LinearRegression())
            made["gradient boosting"] = GradientBoostingRegressor(random_state=seed)
    else:
        named = "logistic regression on word counts" if texts else "logistic regression"
        made = {"commonest class": DummyClassifier(), named: LogisticRegression(max_iter=2000)}
        if not texts:
            made["gradient boosting"] = GradientBoostingClassifier(random_state=seed)
    seen, asked = (list(part) if texts else _records(part) for part in (X, X_test))
    truth = np.asarray(y_test, dtype=np.float64) if regression else np.array([str(one) for one in y_test])
    known = np.asarray(y, dtype=np.float64) if regression else np.array([str(one) for one in y])
    found = {}
    for name, model in made.items():
        said = make_pipeline(clone(code), model).fit(seen, known).predict(asked)
        found[name] = (
            bootstrap((said - truth) ** 2, seed=seed, unit="squared error")
            if regression
            else proportion(int((said == truth).sum()), len(truth), unit="accuracy")
        )
    return found


def _records(X: Any) -> list[dict[str, Any]]:
    frame = X if isinstance(X, pd.DataFrame) else pd.DataFrame(np.asarray(X))
    frame = frame.rename(columns=str)
    return frame.to_dict("records")  # type: ignore[return-value]


def _rows(X: Any, part: slice) -> Any:
    return X.iloc[part] if isinstance(X, (pd.DataFrame, pd.Series)) else X[part]
