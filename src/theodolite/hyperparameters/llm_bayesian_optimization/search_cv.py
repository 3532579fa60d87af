"""The search as a scikit-learn estimator that is fitted with the best hyperparameters it finds."""

__all__ = ["LLAMBOSearchCV", "known_space"]

import math
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import cross_val_score
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from theodolite.core.errors import DataError, InputError
from theodolite.hyperparameters.llm_bayesian_optimization.context import TaskContext
from theodolite.hyperparameters.llm_bayesian_optimization.optimizer import LLAMBO
from theodolite.hyperparameters.space import Float, Int, SearchSpace

_TREE = {
    "max_depth": Int(1, 15), "max_features": Float(0.01, 0.99, "logit"), "min_impurity_decrease": Float(0.0, 0.5),
    "min_samples_leaf": Float(0.01, 0.49, "logit"), "min_samples_split": Float(0.01, 0.99, "logit"),
    "min_weight_fraction_leaf": Float(0.01, 0.49, "logit"),
}  # fmt: skip
_SPACES: dict[str, dict[str, Any]] = {
    "DecisionTree": _TREE,
    "RandomForest": _TREE,
    "SVC": {"C": Float(1.0, 1000.0, "log"), "gamma": Float(1e-4, 1e-3, "log"), "tol": Float(1e-5, 0.1, "log")},
    "SVR": {"C": Float(1.0, 1000.0, "log"), "gamma": Float(1e-4, 1e-3, "log"), "tol": Float(1e-5, 0.1, "log")},
    "AdaBoost": {"n_estimators": Int(10, 100), "learning_rate": Float(1e-4, 10.0, "log")},
    "LogisticRegression": {"C": Float(1e-4, 1e4, "log"), "tol": Float(1e-5, 0.1, "log")},
    "KNeighbors": {"n_neighbors": Int(1, 25), "p": Int(1, 4)},
}


def known_space(estimator: Any) -> SearchSpace | None:
    """A usual space for a scikit-learn estimator (Bayesmark's, where it has one); None where none is known here.

    >>> from sklearn.tree import DecisionTreeClassifier
    >>> list(known_space(DecisionTreeClassifier()))[:2]
    ['max_depth', 'max_features']
    """
    name = type(estimator).__name__
    found = _SPACES.get(name.removesuffix("Classifier").removesuffix("Regressor"))
    return None if found is None else SearchSpace(found)


def _delegated(name: str) -> Any:
    return available_if(lambda self: hasattr(getattr(self, "best_estimator_", self.estimator), name))


class LLAMBOSearchCV(MetaEstimatorMixin, BaseEstimator):
    """Tune an estimator by `LLAMBO` on cross-validated scores, and fit it with the best on all rows.

    estimator: of scikit-learn. space: a `SearchSpace` of its parameters (of a pipeline "step__name"). scoring: a name of
    scikit-learn's (larger is better); accuracy or r2 where None. llm: of `theodolite.language.connect`. n_trials: after the
    initial design. options: of `LLAMBO`, as a dictionary. An evaluation that raises ValueError counts as failed.

    Learns best_params_, best_score_ (cross-validated), best_estimator_, result_ (a `SearchResult`), classes_ of a classifier.
    """

    def __init__(
        self,
        estimator: Any,
        space: SearchSpace,
        scoring: str | None = None,
        *,
        llm: Any = None,
        cv: Any = 5,
        n_trials: int = 25,
        options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.estimator, self.space, self.scoring, self.llm = estimator, space, scoring, llm
        self.cv, self.n_trials, self.options, self.seed = cv, n_trials, options, seed

    def fit(self, X: Any, y: Any) -> "LLAMBOSearchCV":
        """Search on the rows X (n, features) and y (n,)."""
        if self.llm is None:
            raise InputError("give a language model: LLAMBOSearchCV(..., llm=theodolite.language.connect(...))")
        if not isinstance(self.space, SearchSpace):
            raise InputError(
                f"space is a SearchSpace, got {type(self.space).__name__}: LLAMBOSearchCV(..., SearchSpace(...))"
            )
        unknown = sorted(set(self.space) - set(self.estimator.get_params()))
        if unknown:
            raise InputError(f"{type(self.estimator).__name__} has no parameters {', '.join(unknown)}")
        if self.scoring is not None and not isinstance(self.scoring, str):
            raise InputError(f"scoring is the name of a metric, which the language model is told; got {self.scoring!r}")
        scoring = self.scoring or ("accuracy" if is_classifier(self.estimator) else "r2")
        context = TaskContext.from_data(self.estimator, X, y, scoring)
        search = LLAMBO(self.space, context, self.llm, seed=self.seed, **(self.options or {}))

        strict: Any = {"error_score": "raise"}
        refused: list[ValueError] = []

        def objective(config: dict[str, Any]) -> float:
            made: Any = clone(self.estimator)
            try:
                return float(
                    np.mean(cross_val_score(made.set_params(**config), X, y, cv=self.cv, scoring=scoring, **strict))
                )
            except ValueError as error:  # parameters that do not go together; told as a failed trial in the result
                refused.append(error)
                return math.nan

        self.result_ = search.optimize(objective, self.n_trials)
        if refused and np.isnan(self.result_.scores).all():
            raise DataError(f"every evaluation failed; the last one: {str(refused[-1])[:300]}") from refused[-1]
        self.best_params_, self.best_score_ = self.result_.best.config, self.result_.best.score
        best: Any = clone(self.estimator)
        self.best_estimator_ = best.set_params(**self.best_params_).fit(X, y)
        if hasattr(self.best_estimator_, "classes_"):
            self.classes_ = self.best_estimator_.classes_
        return self

    def predict(self, X: Any) -> Any:
        """Of the best estimator."""
        check_is_fitted(self)
        return self.best_estimator_.predict(X)

    @_delegated("predict_proba")
    def predict_proba(self, X: Any) -> Any:
        """Of the best estimator."""
        check_is_fitted(self)
        return self.best_estimator_.predict_proba(X)

    def score(self, X: Any, y: Any) -> float:
        """The search's own metric."""
        check_is_fitted(self)
        scorer: Any = check_scoring(self.best_estimator_, self.scoring)
        return float(scorer(self.best_estimator_, X, y))

    def __sklearn_clone__(self) -> "LLAMBOSearchCV":
        """Not fitted, and with the same language model: its connection and cache cannot be copied."""
        given: dict[str, Any] = self.get_params(deep=False) | {"estimator": clone(self.estimator)}
        return type(self)(**given)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = self.estimator.__sklearn_tags__()
        tags.estimator_type, tags.classifier_tags, tags.regressor_tags = (
            inner.estimator_type, inner.classifier_tags, inner.regressor_tags,
        )  # fmt: skip
        return tags
