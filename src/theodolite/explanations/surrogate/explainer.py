"""The columns that a black box uses, a small copy of it on them, and rules and counterfactuals read from the copy."""

__all__ = ["SurrogateExplainer"]

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError
from theodolite.explanations.surrogate.blackbox import BlackBox
from theodolite.explanations.surrogate.copies import (
    SURROGATES,
    Fidelity,
    Surrogate,
    fit_surrogate,
    measure_fidelity,
    r2_of,
)
from theodolite.explanations.surrogate.importance import consensus, correlation_clusters, pick_apart, score_columns
from theodolite.explanations.surrogate.local import (
    LocalSurrogateExplanation,
    SurrogateCounterfactual,
    leaf_of,
    nearest_leaf,
)
from theodolite.explanations.surrogate.reading import check_apart, column_names, numbers, targets
from theodolite.explanations.surrogate.rules import Condition, LeafBoxes, Rule, RuleList, ordered_list, pruned, rule_of

METHODS = ("gradient", "permutation", "sensitivity", "attention")
_SIZES = (5, 10, 20, 50, 100)
_WITHIN = 0.02  # of the best fidelity: a smaller k that is this near is taken


class SurrogateExplainer(BaseEstimator):
    """Which k columns a black box really uses, and by what rules: a readable copy, and how faithful it is.

    k: number of columns, or "auto": the smallest of 5, 10, 20, 50, 100 whose fidelity is within 0.02 of the best one, on
    the validation rows. scores: "gradient", "permutation", "sensitivity", "attention"; the mean of their ranks orders the
    columns. surrogate: "tree", "forest", "boosting", "extra", "ridge", or "all", which takes the one that follows best on the
    validation rows. screen: with more than 500 columns, only the best max(10 k, screen) are perturbed. repeats: of each
    permutation. replacement: "median", "zero" or "random" (a training row), for columns that are taken away. redundancy:
    "penalise" picks the copy's columns apart from each other, "none" takes the top k. targets: "soft" probabilities or "hard"
    classes. logits: see `BlackBox`. class_names: of the outputs, for a model that has no ``classes_``; labels may then be
    names or positions.

    Fitted: `importance_` (a row per column), `top_` (the k most important columns), `columns_` (those of the copy), `k_`,
    `overlap_` (share of common columns in the scores' top k), `clusters_` (groups of important columns that are correlated
    above 0.9: read their importance together), `notes_` (what was left out, and why), `surrogate_`, `classes_`.

    Scores are measured on X_val, copies are fitted on X_train; judge them by `fidelity` of other rows still.

    Source: Karim et al., 2022, arXiv:2208.13405.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(400, 6))
    >>> def box(x):
    ...     p = 1 / (1 + np.exp(-8 * x[:, 2]))
    ...     return np.stack([1 - p, p], axis=1)
    >>> explainer = SurrogateExplainer(k=1).fit(box, x[:200], x[200:300])
    >>> explainer.top_.tolist(), explainer.fidelity(x[300:]).agreement > 0.9
    ([2], True)
    """

    def __init__(
        self,
        k: Any = "auto",
        scores: Sequence[str] = ("gradient", "permutation", "sensitivity"),
        surrogate: str = "tree",
        max_depth: int = 10,
        min_leaf: int = 3,
        screen: int = 200,
        repeats: int = 5,
        replacement: str = "median",
        redundancy: str = "penalise",
        feature_names: Sequence[str] | None = None,
        seed: int = 0,
        *,
        targets: str = "soft",
        logits: bool | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.k = k
        self.scores = scores
        self.surrogate = surrogate
        self.max_depth = max_depth
        self.min_leaf = min_leaf
        self.screen = screen
        self.repeats = repeats
        self.replacement = replacement
        self.redundancy = redundancy
        self.feature_names = feature_names
        self.seed = seed
        self.targets = targets
        self.logits = logits
        self.class_names = class_names

    # ---- fitting

    def _check_options(self) -> None:
        allowed = {
            "surrogate": (*SURROGATES, "all"), "replacement": ("median", "zero", "random"),
            "redundancy": ("penalise", "none"), "targets": ("soft", "hard"),
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if isinstance(self.scores, str) or not self.scores or not set(self.scores) <= set(METHODS):
            raise InputError(f"scores must be some of {', '.join(METHODS)}, got {self.scores!r}")
        if min(self.max_depth, self.min_leaf, self.screen, self.repeats) < 1:
            raise InputError("max_depth, min_leaf, screen and repeats must be at least 1")

    def _check_k(self, d: int) -> None:
        if self.k == "auto":
            return
        if (
            not isinstance(self.k, (int, float, np.integer))
            or isinstance(self.k, bool)
            or not float(self.k).is_integer()
        ):
            raise InputError(f'k must be a whole number or "auto", got {self.k!r}')
        if not 1 <= int(self.k) <= d:
            raise InputError(f"k must lie in 1..{d}, the number of columns, got {self.k}")

    def _table(self, x: Any, name: str) -> np.ndarray:
        """Rows (n, d) of float64; missing values only where the copy can take them."""
        return numbers(
            x, name, getattr(self, "features_", None), missing=self.surrogate == "boosting", frame=self._frame
        )

    def fit(self, model: Any, X_train: Any, X_val: Any, y_val: Any = None) -> "SurrogateExplainer":
        """Score the columns of ``model`` on X_val, choose k of them, and fit the copy on X_train.

        model: an nn.Module, a fitted scikit-learn estimator, or a callable (n, d) -> (n, classes) or (n, 1).
        y_val: class labels (names of the model's ``classes_`` where it has them, otherwise 0, 1, ...) or values.

        InputError for k outside 1..d, for X_val equal to X_train, for labels that the model does not know; DataError naming
        the columns with missing values (only surrogate="boosting" takes them); NotProbabilitiesError; ModelError where no
        score can be computed. Warns where more than a tenth of the validation rows are training rows.
        """
        for name in ("n_features_in_", "features_"):
            self.__dict__.pop(name, None)
        self._check_options()
        self._frame = list(map(str, X_train.columns)) if isinstance(X_train, pd.DataFrame) else None
        columns = getattr(X_train, "shape", np.shape(X_train))
        if len(columns) == 2:
            self._check_k(columns[1])
            self.features_ = column_names(X_train, columns[1], self.feature_names)
        x = self._table(X_train, "X_train")
        self.n_features_in_ = d = x.shape[1]
        held = self._table(X_val, "X_val")
        check_apart(x, held)
        box = BlackBox(model, logits=self.logits, names=self._frame or self.features_)
        p, p_held = box(x), box(held)
        known = box.classes if box.classes is not None and len(box.classes) == p.shape[1] else np.arange(p.shape[1])
        if self.class_names is not None and p.shape[1] > 1:
            known = np.array(self.class_names, dtype=object)
            if len(known) != p.shape[1]:
                raise InputError(f"{len(known)} class names for {p.shape[1]} outputs of the model")
        self._box, self._x, self._p, self._held, self._p_held = box, x, p, held, p_held
        self.is_classifier_ = p.shape[1] > 1
        self.classes_ = known if self.is_classifier_ else None
        y = None if y_val is None else self._targets(y_val, len(held))
        self._y_held = y
        self.median_, self.scale_ = np.nanmedian(x, axis=0), np.nanstd(x, axis=0)
        sizes = [size for size in _SIZES if size < d or size == _SIZES[0]]
        sizes = sorted({min(size, d) for size in (*sizes, d if d <= _SIZES[-1] else 1)} - {1} or {1})
        most = sizes[-1] if self.k == "auto" else int(self.k)
        found = score_columns(
            box, held, y, methods=self.scores, scale=self.scale_,
            keep=max(self.screen, most if self.k == "auto" else 10 * most), repeats=self.repeats, seed=self.seed,
        )  # fmt: skip
        self.notes_ = found.notes
        ranks, mean_rank, importance = consensus(found.value)
        self._order = np.lexsort((-importance, mean_rank))
        table: dict[str, Any] = {"feature": self.features_}
        for name, value in found.value.items():
            table |= {name: value, f"{name}_se": found.error[name], f"{name}_rank": ranks[name]}
        position = np.empty(d, dtype=np.int64)
        position[self._order] = np.arange(1, d + 1)
        self.importance_ = pd.DataFrame(
            table | {"importance": importance, "consensus_rank": mean_rank, "rank": position}
        )
        self._apart = self._order[:most]
        if self.redundancy == "penalise":
            self._apart = pick_apart(importance, x, self._order[: max(self.screen, 10 * most)], most)
        self._choose(sizes)
        k = self.k_
        self.top_, self.columns_ = self._order[:k], self._apart[:k]
        best = {name: set(np.argsort(rank, kind="stable")[:k].tolist()) for name, rank in ranks.items()}
        share = [[len(one & other) / k for other in best.values()] for one in best.values()]
        self.overlap_ = pd.DataFrame(share, index=list(best), columns=list(best))
        self.clusters_ = correlation_clusters(x, self._order[: max(self.screen, k)])
        self.surrogates_ = {name: self._copy(name, self.columns_) for name in self._wanted()}
        self.surrogate_ = max(
            self.surrogates_, key=lambda name: _finite(r2_of(p_held, self.surrogates_[name].predict(held)))
        )
        self._grow_tree()
        return self

    def _wanted(self) -> tuple[str, ...]:
        return SURROGATES if self.surrogate == "all" else (self.surrogate,)

    def _copy(self, name: str, columns: np.ndarray) -> Surrogate:
        return fit_surrogate(
            name, self._x, self._p, columns, max_depth=self.max_depth, min_leaf=self.min_leaf,
            hard=self.targets == "hard", seed=self.seed,
        )  # fmt: skip

    def _choose(self, sizes: list[int]) -> None:
        """k as given, or the smallest whose fidelity on the validation rows is within 0.02 of the best; ``curve_`` shows it."""
        self.curve_: QualityCurve | None = None
        if self.k != "auto":
            self.k_ = int(self.k)
            return
        name = "tree" if self.surrogate == "all" else self.surrogate
        runs = {k: [r2_of(self._p_held, self._copy(name, self._apart[:k]).predict(self._held))] for k in sizes}
        if not np.isfinite([run[0] for run in runs.values()]).all():
            self.k_ = sizes[0]  # a constant black box is followed by any column
            return
        best = max(run[0] for run in runs.values())
        self.curve_ = QualityCurve.from_runs(runs, chance=0.0, reference=best, name=f"columns of a {name}", metric="R2")
        self.k_ = int(self.curve_.smallest_reaching(best - _WITHIN, resamples=1).dimension or sizes[-1])

    def _grow_tree(self) -> None:
        """The tree that rules are read from: the copy itself, or one beside it."""
        self.tree_: Surrogate | None = None
        self._boxes: LeafBoxes | None = None
        if not np.isnan(self._x).any():
            self.tree_ = self.surrogates_.get("tree") or self._copy("tree", self.columns_)
            self._boxes = LeafBoxes.of(self.tree_)

    def _targets(self, y: Any, n: int) -> np.ndarray:
        """Class indices, or values of a regression."""
        return targets(y, n, self.classes_, positions=self.class_names is not None)

    # ---- the copy

    def predict_proba(self, X: Any) -> Float[np.ndarray, "row output"]:
        """What the copy answers, (n, classes) or (n, 1)."""
        check_is_fitted(self, "surrogate_")
        return self.surrogates_[self.surrogate_].predict(self._table(X, "X"))

    def fidelity(self, X: Any, y: Any = None, *, surrogate: str | None = None) -> Fidelity:
        """How faithful the copy is on rows that are neither in X_train nor in X_val; ``y`` adds how right both models are.

        surrogate: one of ``surrogates_``, the chosen one where left out.
        """
        check_is_fitted(self, "surrogate_")
        name = surrogate or self.surrogate_
        if name not in self.surrogates_:
            raise InputError(f"no surrogate {name!r} was fitted; there are {', '.join(self.surrogates_)}")
        x = self._table(X, "X")
        target = None if y is None or not self.is_classifier_ else self._targets(y, len(x))
        return measure_fidelity(self._box(x), self.surrogates_[name].predict(x), target, k=self.k_, surrogate=name)

    def fidelity_curve(
        self, ks: Sequence[int], *, X: Any = None, surrogates: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Fidelity of copies on the best k columns, a row per k and surrogate: k, surrogate, r2, agreement, js.

        On the validation rows, which also ranked the columns, unless other rows X are given.
        """
        check_is_fitted(self, "surrogate_")
        x = self._held if X is None else self._table(X, "X")
        p, d = self._box(x), self.n_features_in_
        if not len(ks) or min(ks) < 1 or max(ks) > d:
            raise InputError(f"every k must lie in 1..{d}, the number of columns, got {list(ks)}")
        order = self.picks(max(ks))
        rows = list[dict[str, Any]]()
        for name in surrogates or (self.surrogate_,):
            for k in ks:
                found = measure_fidelity(p, self._copy(name, order[:k]).predict(x), k=int(k), surrogate=name)
                rows.append(
                    {"k": int(k), "surrogate": name, "r2": found.r2, "agreement": found.agreement, "js": found.js}
                )
        return pd.DataFrame(rows)

    def picks(self, k: int) -> Int[np.ndarray, " k"]:
        """The k columns that a copy of this size looks at, best first; they go on where ``columns_`` stops."""
        check_is_fitted(self, "surrogate_")
        if k <= len(self._apart):
            return self._apart[:k]
        if self.redundancy == "none":
            return self._order[:k]
        pool = self._order[: max(self.screen, 10 * k)]
        return pick_apart(self.importance_["importance"].to_numpy(), self._x, pool, k)

    # ---- rules

    def _leaves(self) -> LeafBoxes:
        check_is_fitted(self, "surrogate_")
        if self._boxes is None:
            raise InputError("rules need a tree, and a tree needs rows without missing values")
        return self._boxes

    def _label(self, answer: np.ndarray) -> object:
        return float(answer[0]) if self.classes_ is None else self.classes_[int(answer.argmax())]

    def rules(self, class_: object = None, max_rules: int | None = 20, *, prune: bool = True) -> list[Rule]:
        """The tree's rules, those with the largest support x purity first; ``class_`` keeps the rules of one class.

        prune: drop conditions while less than a point of purity is lost; pruned rules may overlap. Without it every row
        meets exactly one rule and supports sum to the number of training rows (with max_rules=None).
        """
        boxes = self._leaves()
        if class_ is not None and (self.classes_ is None or class_ not in self.classes_.tolist()):
            raise InputError(
                f"class_ must be one of {'none' if self.classes_ is None else self.classes_.tolist()}, got {class_!r}"
            )
        names: list[object] = [None] if self.classes_ is None else self.classes_.tolist()
        truth = None if self._y_held is None else (self._held, self._y_held)
        found = dict[tuple[tuple[Condition, ...], object], Rule]()
        for i in range(len(boxes)):
            conditions, answer = boxes.conditions(i, self.features_), boxes.answer[i]
            if prune:
                conditions = pruned(conditions, self._x, self._p, answer)
            rule = rule_of(conditions, self._x, self._p, answer, names, truth)
            if class_ is None or rule.class_ == class_:
                found.setdefault((rule.conditions, rule.class_ if self.is_classifier_ else rule.value), rule)
        ordered = sorted(found.values(), key=lambda rule: -rule.support * rule.purity)
        return ordered if max_rules is None else ordered[:max_rules]

    def rule_list(self, max_rules: int = 20) -> RuleList:
        """Rules to be read from the top, the first that holds answering; the commonest answer to the other rows is the default.

        Each rule is the one that gives most of the rows left by those before it the black box's class, less those that it
        gives another one, on the training rows. Compare ``predict`` of the list with the black box on other rows.
        """
        if self.classes_ is None:
            raise InputError("a rule list answers with classes; this black box gives values")
        if max_rules < 1:
            raise InputError(f"max_rules must be at least 1, got {max_rules}")
        truth = None if self._y_held is None else (self._held, self._y_held)
        return ordered_list(
            self.rules(None, None), self._x, self._p, truth, max_rules=max_rules, classes=self.classes_.tolist()
        )

    # ---- one row

    def _row(self, x: Any) -> np.ndarray:
        if isinstance(x, pd.Series) and self._frame is not None and set(self._frame) <= set(map(str, x.index)):
            x = x.to_frame().T  # a row of a data frame knows its columns
        if isinstance(x, pd.DataFrame) and len(x) == 1:
            return self._table(x.infer_objects(), "x")
        row = np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x)
        row = row[0] if row.ndim == 2 and len(row) == 1 else row
        if row.ndim != 1:
            raise InputError(f"need one row, got an array of shape {row.shape}")
        return self._table(row[None], "x")

    def _agree(self, one: np.ndarray, other: np.ndarray) -> bool:
        if self.is_classifier_:
            return bool(one.argmax() == other.argmax())
        return bool(abs(one[0] - other[0]) <= self._p[:, 0].std() / 2)

    def explain(self, x: Any) -> LocalSurrogateExplanation:
        """The path that one row (d,) takes through the tree, both answers, and the next-best classes."""
        boxes = self._leaves()
        row = self._row(x)
        leaf, p = leaf_of(boxes, row[0]), self._box(row)[0]
        answer = boxes.answer[leaf]
        others: tuple[tuple[object, float], ...] = ()
        if self.classes_ is not None:
            others = tuple((self.classes_[i], float(answer[i])) for i in np.argsort(-answer, kind="stable")[1:])
        return LocalSurrogateExplanation(
            boxes.conditions(leaf, self.features_), self._label(answer), self._label(p), self._agree(answer, p), others
        )

    def counterfactual(self, x: Any, target: object = None) -> SurrogateCounterfactual:
        """The smallest change (L1 in standard deviations) that takes row x (d,) into a leaf of ``target``, or of any other class.

        InputError where the copy gives the target already, or no leaf of the tree does.
        """
        boxes = self._leaves()
        if self.classes_ is None:
            raise InputError("a counterfactual needs classes; this black box gives values")
        row = self._row(x)
        leaf, before = leaf_of(boxes, row[0]), self._box(row)[0]
        answers = boxes.answer.argmax(axis=1)
        wanted = answers != answers[leaf]
        if target is not None:
            if target not in self.classes_.tolist():
                raise InputError(f"target must be one of {self.classes_.tolist()}, got {target!r}")
            index = self.classes_.tolist().index(target)
            if answers[leaf] == index:
                raise InputError(f"the copy already answers {target} to this row")
            wanted = answers == index
        nearest, cost, new = nearest_leaf(boxes, row[0], self.scale_, wanted)
        changed = [j for j in boxes.columns.tolist() if new[j] != row[0, j]]
        after = self._box(new[None])[0].argmax()
        flips = after == answers[nearest] if target is not None else after != before.argmax()
        return SurrogateCounterfactual(
            new, {self.features_[j]: (float(row[0, j]), float(new[j])) for j in changed}, cost,
            leaf_of(boxes, new) == nearest, bool(flips),
        )  # fmt: skip

    def what_if(self, x: Any, edits: Sequence[Mapping[str, float]]) -> pd.DataFrame:
        """Both answers to row x (d,) after each edit {feature: value}; the first line is the row as it is."""
        check_is_fitted(self, "surrogate_")
        row = self._row(x)
        rows = np.repeat(row, len(edits) + 1, axis=0)
        for i, edit in enumerate(edits, start=1):
            for name, value in edit.items():
                if name not in self.features_:
                    raise InputError(f"there is no feature {name!r}")
                rows[i, self.features_.index(name)] = value
        rows = self._table(rows, "edits")
        p, q = self._box(rows), self.predict_proba(rows)
        return pd.DataFrame(
            {
                "edit": [
                    "as it is",
                    *(", ".join(f"{name} = {value:g}" for name, value in edit.items()) for edit in edits),
                ],
                "black_box": [self._label(a) for a in p],
                "surrogate": [self._label(a) for a in q],
                "black_box_score": p.max(axis=1),
                "surrogate_score": q.max(axis=1),
            }
        )

    # ---- the column set

    def _drop(self, x: np.ndarray, columns: np.ndarray) -> tuple[float, float]:
        """Mean fall of the answer when ``columns`` are replaced, and its standard error over rows."""
        p, changed = self._box(x), x.copy()
        if self.replacement == "median":
            changed[:, columns] = self.median_[columns]
        elif self.replacement == "zero":
            changed[:, columns] = 0.0
        else:
            donors = np.random.default_rng(self.seed).integers(0, len(self._x), len(x))
            changed[:, columns] = self._x[donors][:, columns]
        q = self._box(changed)
        rows = np.arange(len(x))
        y = p.argmax(axis=1)
        fall = p[rows, y] - q[rows, y] if self.is_classifier_ else np.abs(p[:, 0] - q[:, 0])
        return float(fall.mean()), float(fall.std(ddof=1) / np.sqrt(len(fall))) if len(fall) > 1 else float("nan")

    def _set(self, columns: Any) -> np.ndarray:
        chosen = self.top_ if columns is None else np.asarray(columns, dtype=np.int64)
        if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= self.n_features_in_:
            raise InputError(f"columns must be numbers in 0..{self.n_features_in_ - 1}, at least one")
        return chosen

    def comprehensiveness(self, X: Any, *, columns: Any = None) -> tuple[float, float]:
        """mean[p(x)_y - p(x with the columns replaced)_y] and its standard error; y: the predicted class. Higher is better.

        columns: ``top_`` where left out. For a regression the size of the change.
        """
        check_is_fitted(self, "surrogate_")
        return self._drop(self._table(X, "X"), self._set(columns))

    def sufficiency(self, X: Any, *, columns: Any = None) -> tuple[float, float]:
        """mean[p(x)_y - p(x with all other columns replaced)_y] and its standard error. Lower is better."""
        check_is_fitted(self, "surrogate_")
        others = np.setdiff1d(np.arange(self.n_features_in_), self._set(columns))
        return self._drop(self._table(X, "X"), others)

    def to_json(self) -> dict[str, Any]:
        """What was found, as plain lists and numbers that ``json.dumps`` takes: columns, importance, rules."""
        table = self.importance_.iloc[self.top_]
        found: dict[str, Any] = {
            "k": self.k_, "surrogate": self.surrogate_, "notes": list(self.notes_),
            "classes": None if self.classes_ is None else self.classes_.tolist(),
            "top": [self.features_[j] for j in self.top_], "columns": [self.features_[j] for j in self.columns_],
            "importance": table.astype(object).where(table.notna(), None).to_dict("records"),
        }  # fmt: skip
        if self._boxes is not None:
            found["rules"] = [_plain(asdict(rule)) | {"text": str(rule)} for rule in self.rules()]
        return found


def _finite(value: float) -> float:
    return value if np.isfinite(value) else -np.inf


def _plain(value: Any) -> Any:
    """Numbers without a finite value become None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
