"""Small readable models fitted to a black box's answers, and how faithful they are on rows that fitted nothing.

R2 = 1 - sum ||q - p||^2 / sum ||p - mean p||^2   (over rows and classes together, so a rare class weighs little)
"""

__all__ = ["SURROGATES", "ConstantModelWarning", "Fidelity", "Surrogate", "fit_surrogate", "measure_fidelity"]

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import RidgeCV
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor

from theodolite.core.errors import InputError

SURROGATES = ("tree", "forest", "boosting", "extra", "ridge")
_TREES = 100
_CONSTANT = 1e-8  # variance of the answers below which R2 means nothing


class ConstantModelWarning(UserWarning):
    """The black box hardly changes its answer on these rows, so R2 is undefined."""


@dataclass(frozen=True)
class Fidelity:
    """How well a surrogate follows a black box on some rows, and how right both are.

    r2: share of the variance of the answers that the copy gives, over all classes together; NaN for a constant black box.
    agreement: share of rows with the same most probable class; js: mean Jensen-Shannon divergence in bits, in [0, 1];
    both None for a regression. Accuracy, Matthews correlation and macro F1 are None where no labels were given.
    """

    r2: float
    agreement: float | None
    js: float | None
    accuracy_black_box: float | None
    accuracy_surrogate: float | None
    mcc_black_box: float | None
    mcc_surrogate: float | None
    k: int
    surrogate: str
    f1_black_box: float | None = None
    f1_surrogate: float | None = None
    rows: int = 0


def r2_of(p: Float[np.ndarray, "row output"], q: Float[np.ndarray, "row output"]) -> float:
    """The variance-weighted R2 of q as a copy of p; NaN where p is constant."""
    spread = ((p - p.mean(axis=0)) ** 2).sum()
    return float(1 - ((q - p) ** 2).sum() / spread) if spread / len(p) >= _CONSTANT else float("nan")


def measure_fidelity(
    p: Float[np.ndarray, "row output"],
    q: Float[np.ndarray, "row output"],
    y: Int[np.ndarray, " row"] | None = None,
    *,
    k: int,
    surrogate: str,
) -> Fidelity:
    """Fidelity of answers q to the black box's answers p; y: true class indices.

    >>> p = np.array([[0.9, 0.1], [0.2, 0.8]])
    >>> measure_fidelity(p, p, k=1, surrogate="tree").r2
    1.0
    """
    r2 = r2_of(p, q)
    if np.isnan(r2):
        warnings.warn(
            "the black box gives (nearly) the same answer to all rows, so R2 is undefined; agreement still holds",
            ConstantModelWarning,
            stacklevel=3,
        )
    if p.shape[1] == 1:
        return Fidelity(r2, None, None, None, None, None, None, k, surrogate, rows=len(p))
    ours, theirs = q.argmax(axis=1), p.argmax(axis=1)
    middle = (p + q) / 2
    js = (_relative(p, middle) + _relative(q, middle)).sum(axis=1) / 2
    agreement, divergence = float((ours == theirs).mean()), float(np.clip(js.mean(), 0, 1))
    if y is None:
        return Fidelity(r2, agreement, divergence, None, None, None, None, k, surrogate, rows=len(p))
    right = float(accuracy_score(y, theirs)), float(accuracy_score(y, ours))
    mcc = float(matthews_corrcoef(y, theirs)), float(matthews_corrcoef(y, ours))
    f1 = float(f1_score(y, theirs, average="macro")), float(f1_score(y, ours, average="macro"))
    return Fidelity(r2, agreement, divergence, *right, *mcc, k, surrogate, *f1, rows=len(p))


def _relative(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    positive = p > 0
    return np.where(positive, p * np.log2(np.where(positive, p, 1.0) / np.where(positive, q, 1.0)), 0.0)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A fitted copy that looks at some columns only; `predict` gives what the black box gives."""

    name: str
    columns: Int[np.ndarray, " k"]
    model: Any
    outputs: int
    paired: bool

    def predict(self, x: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row output"]:
        """Probabilities (n, classes), not negative and summing to 1, or values (n, 1)."""
        q = np.asarray(self.model.predict(x[:, self.columns]), dtype=np.float64).reshape(len(x), -1)
        if self.outputs == 1:
            return q
        if self.paired:
            q = np.hstack([1 - q, q])
        q = np.clip(q, 0, 1)
        total = q.sum(axis=1, keepdims=True)
        return np.where(total > 0, q / np.where(total > 0, total, 1.0), 1 / self.outputs)


def fit_surrogate(
    name: str,
    x: Float[np.ndarray, "row column"],
    p: Float[np.ndarray, "row output"],
    columns: Int[np.ndarray, " k"],
    *,
    max_depth: int = 10,
    min_leaf: int = 3,
    hard: bool = False,
    seed: int = 0,
) -> Surrogate:
    """Fit a "tree", "forest", "boosting", "extra" (extremely randomised trees) or "ridge" to answers p on some columns.

    Targets are the answers themselves; hard: the most probable class alone. InputError for another name.
    """
    if hard and p.shape[1] > 1:
        p = np.eye(p.shape[1])[p.argmax(axis=1)]
    # of two classes one is enough; and a tree of one column is the tree of both
    paired = p.shape[1] == 2
    target = p[:, 1] if paired else p[:, 0] if p.shape[1] == 1 else p
    if name == "tree":
        model: Any = DecisionTreeRegressor(max_depth=max_depth, min_samples_leaf=min_leaf, random_state=seed)
    elif name == "forest":
        model = RandomForestRegressor(_TREES, random_state=seed)
    elif name == "extra":
        model = ExtraTreesRegressor(_TREES, random_state=seed)
    elif name == "boosting":
        model = HistGradientBoostingRegressor(min_samples_leaf=min_leaf, random_state=seed)
        model = MultiOutputRegressor(model) if target.ndim == 2 else model
    elif name == "ridge":
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-6, 3, 10)))
    else:
        raise InputError(f"surrogate must be one of {', '.join(SURROGATES)} or all, got {name!r}")
    return Surrogate(name, columns, model.fit(x[:, columns], target), p.shape[1], paired)
