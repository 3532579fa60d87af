"""The method on arrays: rows and the domain of each in, classes out."""

__all__ = ["LatentLabelShift"]

import copy
import warnings
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from theodolite.core.binomial import binomial_interval
from theodolite.core.errors import DataError, InputError
from theodolite.core.train import Recipe, train
from theodolite.core.view import ModelView
from theodolite.data.latent_label_shift.checks import shift_test
from theodolite.data.latent_label_shift.factors import METHODS, factorize_shares
from theodolite.data.latent_label_shift.posterior import (
    SOLVERS,
    class_posterior,
    domain_posterior,
    nonnegative_least_squares,
    reweighted,
)
from theodolite.data.latent_label_shift.shares import DomainsAlikeError, NotIdentifiableError, cluster_shares

_FEWEST = 10
_WORST_CONDITION = 50.0
_LOGISTIC_TOLERANCE = (
    1e-3  # ten times scikit-learn's: where one column gives the domain away it takes minutes otherwise
)
_TORCH_RECIPE = Recipe(epochs=100, batch_size=32, lr=1e-3, schedule="constant", patience=8)


class LatentLabelShift(BaseEstimator):
    """Classes of rows without labels from several domains, which mix the same classes in different shares.

    n_classes: k, at most the number r of domains (`count_classes` helps). domain_classifier: any scikit-learn classifier with
    calibrated predict_proba, or an untrained nn.Module (rows -> r scores; trained by Adam until a fifth of its rows gets no
    better); logistic regression on standardised columns where not given. n_clusters: m, 3 k where not given (the paper has 30
    for 10 classes, 60 for 20). factorizer, n_init: see `factorize_shares`. solver: see `class_posterior`. cv: folds.

    Every fold's rows are scored by the classifier that was trained on the other folds; a classifier's scores on its own
    training rows point at the domains they came from, and the classes found would be the domains. `predict` keeps to that: a
    row that was fitted on is scored by the one classifier that has not seen it, a new row by the mean of all.

    With k = r the domains themselves explain any difference between them, so ``shift_test_`` cannot fail; with k < r it can.

    Classes are numbered by falling share over all rows. Attributes: ``domains_`` (r,) names in the order of all columns;
    ``class_shares_`` (k, r) p_d(y); ``cluster_given_class_`` (m, k); ``domain_given_class_`` (r, k); ``domain_shares_`` (r,)
    p(d); ``domain_rows_`` (r,); ``cluster_shares_`` (m, r), what was factorised; ``out_of_fold_`` (n, r); ``labels_`` (n,)
    classes of the rows fitted on; ``condition_number_`` of class_shares_; ``reconstruction_error_``; ``shift_test_``;
    ``factorization_``; ``log_loss_`` and ``prior_log_loss_`` of the domains, out of fold and of their shares alone.

    Source: Roberts et al., 2022, arXiv:2207.13179.

    >>> rng = np.random.default_rng(0)
    >>> domains = np.repeat(["north", "east", "west"], 200)
    >>> y = rng.binomial(1, np.repeat([0.05, 0.5, 0.95], 200))
    >>> X = rng.normal(size=(600, 2)) * 0.3 + np.array([[0, 0], [2, 2]])[y]
    >>> found = LatentLabelShift(2).fit(X, domains)
    >>> bool(max((found.labels_ == y).mean(), (found.labels_ != y).mean()) > 0.95)
    True
    """

    def __init__(
        self,
        n_classes: int,
        domain_classifier: Any = None,
        *,
        n_clusters: int | None = None,
        factorizer: str = "nmf",
        solver: str = "nnls",
        n_init: int = 10,
        cv: int = 5,
        seed: int = 0,
    ) -> None:
        self.n_classes = n_classes
        self.domain_classifier = domain_classifier
        self.n_clusters = n_clusters
        self.factorizer = factorizer
        self.solver = solver
        self.n_init = n_init
        self.cv = cv
        self.seed = seed

    def fit(self, X: Any, domains: Any) -> "LatentLabelShift":
        """Find the classes of rows X (n, p) from domains (n,), any names."""
        rows = self._rows(X, reset=True)
        names, column, sizes = self._checked_domains(domains, len(rows))
        self._check_options()
        m = 3 * self.n_classes if self.n_clusters is None else self.n_clusters
        self._check_sizes(m, len(rows), names, sizes)
        self._score_out_of_fold(rows, column, len(names))
        self.domains_, self.domain_rows_ = names, sizes
        self.domain_shares_ = sizes / sizes.sum()
        self._check_scores(column)
        starts: Any = 5
        self._kmeans: Any = KMeans(m, n_init=starts, max_iter=100, random_state=self.seed).fit(self.out_of_fold_)
        Q = self.cluster_shares_ = cluster_shares(self._kmeans.labels_, column, m)
        found = factorize_shares(Q, self.n_classes, self.factorizer, self.n_init, self.seed)
        order = np.argsort(-(found.W @ self.domain_shares_), kind="stable")
        self.factorization_ = found
        self.cluster_given_class_, self.class_shares_ = found.C[:, order], found.W[order]
        joint = self.class_shares_ * self.domain_shares_
        self.domain_given_class_ = (joint / joint.sum(axis=1, keepdims=True)).T
        self.reconstruction_error_ = found.error
        self.condition_number_ = float(np.linalg.cond(self.class_shares_))
        self._check_rank()
        self.shift_test_ = shift_test(Q, self.cluster_given_class_, self.class_shares_, sizes, seed=self.seed)
        self._added: dict[Hashable, np.ndarray] = {}
        self.labels_ = self._own_domain(self._posterior(self.out_of_fold_), column).argmax(axis=1)
        return self

    def predict(self, X: Any, domains: Any = None) -> Int[np.ndarray, " row"]:
        """Class (n,) of each row in its own domain; without domains by p(y | x) over all domains together."""
        return self.predict_proba(X, domains).argmax(axis=1)

    def predict_proba(self, X: Any, domains: Any = None) -> Float[np.ndarray, "row k"]:
        """p_d(y | x) (n, k) of each row in its own domain, fitted on or added; p(y | x) without domains."""
        p = self._posterior(self.predict_proba_domain(X))
        if domains is None:
            return p
        names, which = np.unique(_as_names(domains, len(p)), return_inverse=True)
        known = dict(zip(self.domains_.tolist(), self.class_shares_.T)) | self._added
        unknown = [name for name in names.tolist() if name not in known]
        if unknown:
            raise InputError(
                f"{len(unknown)} domains were not fitted on (the first is {unknown[0]}); estimate the class shares of each by "
                "add_domain(X, name=...) first, or leave domains out"
            )
        own = np.stack([known[name] for name in names.tolist()])
        return reweighted(p, own[which], self.class_shares_ @ self.domain_shares_)

    def predict_proba_domain(self, X: Any) -> Float[np.ndarray, "row r"]:
        """p(d | x) (n, r) over the domains fitted on; rows fitted on are scored by the classifier that has not seen them."""
        check_is_fitted(self)
        rows = self._rows(X, reset=False)
        fold = self._fold_of(rows)
        out = np.empty((len(rows), len(self.domains_)))
        new = fold < 0
        if new.any():
            out[new] = np.mean([_scores(model, rows[new], out.shape[1]) for model in self._models], axis=0)
        for i, model in enumerate(self._models):
            if (fold == i).any():
                out[fold == i] = _scores(model, rows[fold == i], out.shape[1])
        return out

    def add_domain(self, X: Any, name: Hashable = None) -> Float[np.ndarray, " k"]:
        """Class shares (k,) of a new domain from its rows, nothing fitted again: min ||h - C w||, w >= 0, scaled to sum 1.

        h: the shares of its rows in the clusters. With a name, `predict` takes rows of that domain from then on.
        """
        scores = self.predict_proba_domain(X)
        if name is not None and name in self.domains_.tolist():
            raise InputError(f"domain {name!r} was fitted on; choose another name")
        if len(scores) < _FEWEST:
            raise DataError(f"a domain needs at least {_FEWEST} rows, got {len(scores)}")
        m = len(self.cluster_given_class_)
        h = np.bincount(self._kmeans.predict(scores), minlength=m) / len(scores)
        w = nonnegative_least_squares(self.cluster_given_class_, h[None])[0]
        if not w.sum() > 0:
            raise DataError("none of the new domain's rows lies in a cluster of a known class; fit again with it")
        shares = w / w.sum()
        if name is not None:
            self._added[name] = shares
        return shares

    # ---- inside

    def _posterior(self, scores: np.ndarray) -> np.ndarray:
        return class_posterior(scores, self.class_shares_, self.domain_shares_, self.solver)

    def _own_domain(self, p: np.ndarray, column: np.ndarray) -> np.ndarray:
        return domain_posterior(p, self.class_shares_, self.domain_shares_, column)

    def _rows(self, X: Any, *, reset: bool) -> np.ndarray:
        try:
            rows: Any = validate_data(self, X, dtype=np.float64, reset=reset)
        except (ValueError, TypeError) as error:
            raise DataError(str(error)) from error
        return rows

    def _checked_domains(self, domains: Any, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        names, column, sizes = np.unique(_as_names(domains, n), return_inverse=True, return_counts=True)
        return names, column, sizes

    def _check_options(self) -> None:
        for name, allowed in (("factorizer", METHODS), ("solver", SOLVERS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        given = {"n_classes": self.n_classes, "n_clusters": self.n_clusters, "n_init": self.n_init, "cv": self.cv}
        for name, value in given.items():
            if not (isinstance(value, (int, np.integer)) or (value is None and name == "n_clusters")):
                raise InputError(f"{name} must be a whole number, got {value!r}")

    def _check_sizes(self, m: int, n: int, names: np.ndarray, sizes: np.ndarray) -> None:
        k, r = self.n_classes, len(names)
        if k < 1 or self.cv < 2 or self.n_init < 1:
            raise InputError(f"need n_classes >= 1, n_init >= 1 and cv >= 2, got {k}, {self.n_init} and {self.cv}")
        if r == 1:
            raise NotIdentifiableError(
                f"all rows are of one domain, {names[0]!s}; classes show in what differs between domains"
            )
        if r < k:
            raise NotIdentifiableError(
                f"k = {k} classes cannot be told apart with r = {r} domains; give domains or ask for fewer"
            )
        if sizes.min() < max(_FEWEST, self.cv):
            small = names[sizes.argmin()]
            raise DataError(
                f"domain {small} has {sizes.min()} rows; each needs at least {max(_FEWEST, self.cv)}. Leave it out of the fit "
                "and give it to add_domain with more rows, or merge domains"
            )
        if not k <= m <= n:
            raise InputError(f"n_clusters must lie between the {k} classes and the {n} rows, got {m}")

    def _score_out_of_fold(self, rows: np.ndarray, column: np.ndarray, r: int) -> None:
        base = self.domain_classifier
        if base is None:
            base = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=_LOGISTIC_TOLERANCE, max_iter=1000))
        elif isinstance(base, nn.Module):
            base = _Network(base, seed=self.seed)
        elif not hasattr(base, "predict_proba"):
            raise InputError(
                f"{type(base).__name__} has no predict_proba; give a classifier with calibrated probabilities"
            )
        self.out_of_fold_ = np.empty((len(rows), r))
        fold, self._models = np.empty(len(rows), dtype=np.int64), []
        splits = StratifiedKFold(self.cv, shuffle=True, random_state=self.seed).split(rows, column)
        for i, (train_rows, test_rows) in enumerate(splits):
            model: Any = base.copy() if isinstance(base, _Network) else clone(base)
            self._models.append(model.fit(rows[train_rows], column[train_rows]))
            self.out_of_fold_[test_rows] = _scores(model, rows[test_rows], r)
            fold[test_rows] = i
        keys = _row_keys(rows)
        order = np.argsort(keys, kind="stable")
        self._keys, self._folds = keys[order], fold[order]

    def _fold_of(self, rows: np.ndarray) -> Int[np.ndarray, " row"]:
        """The fold of each row that was fitted on, -1 for a new row."""
        keys = _row_keys(rows)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._folds[at], -1)

    def _check_scores(self, column: np.ndarray) -> None:
        """Refuse domains that look alike, and warn of probabilities that are worse than none."""
        p = self.domain_shares_
        own = self.out_of_fold_[np.arange(len(column)), column]
        self.log_loss_ = float(-np.log(np.maximum(own, 1e-15)).mean())
        self.prior_log_loss_ = float(-(p * np.log(p)).sum())
        if self.log_loss_ < self.prior_log_loss_:
            return
        right = int((self.out_of_fold_.argmax(axis=1) == column).sum())
        numbers = f"log loss {self.log_loss_:.3f}, of the domains' shares alone {self.prior_log_loss_:.3f}"
        if binomial_interval(right, len(column))[0] <= p.max():
            raise DomainsAlikeError(
                f"domains look identical to the domain classifier ({numbers}; it is right for {right / len(column):.1%} of the "
                f"rows, the largest domain has {p.max():.1%}): nothing to learn. Give more rows, other columns or another "
                "domain_classifier"
            )
        warnings.warn(
            f"the domain classifier's probabilities are worse than none ({numbers}), so classes may be wrong; calibrate it "
            "(sklearn.calibration.CalibratedClassifierCV) or regularise it more",
            UserWarning,
            stacklevel=3,
        )

    def _check_rank(self) -> None:
        k = self.n_classes
        rank = int(np.linalg.matrix_rank(self.class_shares_))
        if rank < k or self.condition_number_ > _WORST_CONDITION:
            warnings.warn(
                f"the class shares have rank {rank} for {k} classes and condition number {self.condition_number_:.3g} (reliable "
                f"up to about {_WORST_CONDITION:g}): some classes hardly differ in where they occur; ask for fewer",
                UserWarning,
                stacklevel=3,
            )


class _Network:
    """A torch module as a classifier: fit, predict_proba."""

    def __init__(self, module: nn.Module, *, seed: int) -> None:
        self.module, self.seed = module, seed

    def copy(self) -> "_Network":
        return _Network(copy.deepcopy(self.module), seed=self.seed)

    def fit(self, rows: np.ndarray, column: np.ndarray) -> "_Network":
        self.classes_ = np.unique(column)
        x, y = torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(column)
        if (width := self._try(x[:2])) != len(self.classes_):
            raise InputError(f"the module gives {width} scores a row, but there are {len(self.classes_)} domains")
        kept, watched = train_test_split(np.arange(len(x)), test_size=0.2, random_state=self.seed, stratify=column)
        recipe = _TORCH_RECIPE.with_seed(self.seed)
        train(self.module, x[kept], y[kept], recipe=recipe, validation=(x[watched], y[watched]))
        return self

    def _try(self, x: torch.Tensor) -> int:
        try:
            return ModelView(self.module, output="raw")(x).shape[1]
        except (RuntimeError, IndexError) as error:
            raise InputError(f"the module cannot take rows of shape {tuple(x.shape[1:])}: {error}") from error

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
        return ModelView(self.module)(torch.as_tensor(rows, dtype=torch.float32)).double().numpy()


def _scores(model: Any, rows: np.ndarray, r: int) -> Float[np.ndarray, "row r"]:
    p = np.asarray(model.predict_proba(rows), dtype=np.float64)
    if p.shape != (len(rows), r) or not np.isfinite(p).all() or (p < 0).any():
        raise InputError(
            f"the domain classifier must give {r} finite probabilities a row, one a domain; got shape {p.shape}"
            + ("" if np.isfinite(p).all() else " with values that are not finite")
        )
    return p


def _as_names(domains: Any, n: int) -> Any:
    if domains is None:
        raise InputError("domains are needed: one name or number a row")
    names = np.asarray(domains)
    if names.ndim != 1 or len(names) != n:
        raise InputError(f"need one domain for each of {n} rows, got an array of shape {names.shape}")
    if names.dtype == object:
        if any(name is None or name != name for name in names.tolist()):
            raise DataError("some rows have no domain; name it or leave the rows out")
        names = np.asarray(names.tolist())
    elif np.issubdtype(names.dtype, np.floating) and not np.isfinite(names).all():
        raise DataError("some rows have no domain (NaN or infinite); name it or leave the rows out")
    return names


def _row_keys(rows: np.ndarray) -> np.ndarray:
    """A 64-bit number for each row of float64, the same for equal rows only (but for one chance in 2^60)."""
    bits = np.ascontiguousarray(rows + 0.0).view(np.uint64)  # + 0.0 makes -0.0 and 0.0 one
    odd = np.random.default_rng(0).integers(0, 2**63, rows.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = (bits ^ (bits >> np.uint64(32))) * odd
    return ((mixed ^ (mixed >> np.uint64(29))) * odd[::-1]).sum(axis=1, dtype=np.uint64)
