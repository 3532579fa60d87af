"""What deleting training rows does to a logistic regression: leverage, influence, and the exact answer by Newton's method.

    loss(w) = sum_i l_i(w) + ridge/2 |w|^2 (without the intercept),   x~ = (x, 1),   p_i = sigmoid(x~_i . w)
    H = (1/n) sum_i p_i (1 - p_i) x~_i x~_i^T + Lambda,               g_i = (p_i - y_i) x~_i
    w_-S ~ w + sum_{i in S} d_i,   d_i = H^-1 g_i / n  (first order),  d_i = H^-1 g_i / (n (1 - h_i))  (leverage)
    h_i = p_i (1 - p_i) x~_i^T H^-1 x~_i / n

Deletion adds H^-1 g_i / n. First-order influence is too small, since a deleted row leaves H too: with its leverage h_i the
step is one exact Newton step of the training without row i (Sherman and Morrison).

Source: Koh, Liang, 2017, arXiv:1703.04730 (first order); Pregibon, 1981, Annals of Statistics 9 (leverage).
"""

__all__ = ["ExactRetrainer", "LogisticInfluence", "SeparableDataError", "logistic_gradient"]

from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import linalg
from scipy.optimize import linprog
from scipy.special import expit

from theodolite.core.errors import DataError, InputError

_LARGEST_LEVERAGE = (
    1 - 1e-9
)  # a row above it alone fixes a direction of the weights, so its deletion has no finite effect
_ITERATIONS = 100
_SURE = 12.0  # a logit
_HALVINGS = 40
_QUADRATIC = 1e-8  # below this Newton decrement, relative to the loss, every step squares the error


class SeparableDataError(DataError):
    """A hyperplane separates the classes and nothing holds the weights back, so they grow without end."""


def logistic_table(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checked inputs: rows with a column of ones behind them (n, d + 1) and labels 0 or 1 (n,), both float64."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or len(x) < 2:
        raise DataError(f"need rows (n, d) and labels (n,) with n >= 2, got shapes {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise DataError("the rows hold NaN or infinite values; fill or drop them first")
    found = np.unique(y)
    if not np.isin(found, (0, 1)).all():
        raise DataError(f"labels must be 0 and 1, got {found[:5].tolist()}; encode the class to be reached as 1")
    if len(found) < 2:
        raise DataError(f"all {len(y)} labels are {int(found[0])}; a logistic regression needs both classes")
    return np.column_stack([x, np.ones(len(x))]), y.astype(np.float64)


def _ridge_vector(ridge: float | np.ndarray, size: int) -> np.ndarray:
    ridge = np.asarray(ridge, dtype=np.float64)
    if ridge.ndim == 0:
        ridge = np.append(np.full(size - 1, ridge), 0.0)
    if ridge.shape != (size,) or not np.isfinite(ridge).all() or (ridge < 0).any():
        raise InputError(f"ridge must be a number >= 0 or one for each of the {size} weights, got shape {ridge.shape}")
    return ridge


def logistic_gradient(
    x: Float[np.ndarray, "row feature"],
    y: np.ndarray,
    w: Float[np.ndarray, " weight"],
    ridge: float | np.ndarray,
) -> Float[np.ndarray, " weight"]:
    """Gradient of the mean training loss at ``w`` (d + 1,), intercept last; zero at the trained weights.

    ridge: in mean form, 1/(C n) for scikit-learn's C; a number is not put on the intercept, a vector says all.
    """
    table, labels = logistic_table(x, y)
    w = np.asarray(w, dtype=np.float64)
    return table.T @ (expit(table @ w) - labels) / len(table) + _ridge_vector(ridge, len(w)) * w


class LogisticInfluence:
    """Change of the weights of a logistic regression by the deletion of each of its training rows.

    X: (n, d). y: (n,) of 0 and 1. w: (d + 1,) trained weights, intercept last. ridge: in mean form, 1/(C n) for
    scikit-learn's C (a number is not put on the intercept; a vector (d + 1,) says all). damping: what "first-order-damped"
    adds to H in place of the ridge. Where H is singular (complete one-hot groups without a ridge) its pseudo-inverse is used.

    Raises `DataError` for labels other than 0 and 1 and for values that are not finite.

    >>> x, y = np.array([[-2.0], [-1.0], [-0.2], [0.1], [1.0], [2.0]]), np.array([0, 0, 1, 0, 1, 1])
    >>> retrainer = ExactRetrainer(x, y, C=1.0)
    >>> influence = LogisticInfluence(x, y, retrainer.weights, ridge=1 / 6)
    >>> true = retrainer.without([2]) - retrainer.weights
    >>> bool(abs(influence.directions("leverage")[2] - true).max() < 0.05)
    True
    """

    def __init__(
        self,
        X: Float[np.ndarray, "row feature"],
        y: np.ndarray,
        w: Float[np.ndarray, " weight"],
        ridge: float | np.ndarray,
        *,
        damping: float = 0.01,
    ) -> None:
        self._table, self._y = logistic_table(X, y)
        self.w = np.asarray(w, dtype=np.float64)
        if self.w.shape != (self._table.shape[1],):
            raise InputError(f"w must be (d + 1,) = ({self._table.shape[1]},), intercept last; got {self.w.shape}")
        if not damping > 0:
            raise InputError(f"damping must be above 0, got {damping}")
        self.ridge = _ridge_vector(ridge, len(self.w))
        self.damping = damping
        self.probabilities = expit(self._table @ self.w)

    @cached_property
    def gradients(self) -> Float[np.ndarray, "row weight"]:
        """g_i, the gradient of each row's own loss."""
        return (self.probabilities - self._y)[:, None] * self._table

    @cached_property
    def _curvature(self) -> np.ndarray:
        s = self.probabilities * (1 - self.probabilities)
        return (self._table * s[:, None]).T @ self._table / len(self._table)

    @property
    def hessian(self) -> Float[np.ndarray, "weight weight"]:
        """H of the mean loss with its ridge."""
        return self._curvature + np.diag(self.ridge)

    @cached_property
    def _first_order(self) -> np.ndarray:
        return self.gradients @ _inverse(self.hessian) / len(self._table)

    @cached_property
    def leverage(self) -> Float[np.ndarray, " row"]:
        """h_i in [0, 1): the share of the curvature along its own direction that row i brings."""
        s = self.probabilities * (1 - self.probabilities)
        return s * np.einsum("ij,ij->i", self._table @ _inverse(self.hessian), self._table) / len(self._table)

    def directions(self, kind: str = "leverage") -> Float[np.ndarray, "row weight"]:
        """d_i: what the deletion of row i adds to the weights, 1/n included."""
        if kind == "first-order":
            return self._first_order
        if kind == "leverage":
            return self._first_order / (1 - np.minimum(self.leverage, _LARGEST_LEVERAGE))[:, None]
        if kind == "first-order-damped":
            damped = self._curvature + self.damping * np.eye(len(self.w))
            return self.gradients @ _inverse(damped) / len(self._table)
        raise InputError(f"influence must be 'leverage', 'first-order' or 'first-order-damped', got {kind!r}")


def _inverse(h: np.ndarray) -> np.ndarray:
    """Inverse of a symmetric positive matrix, or its pseudo-inverse where it is singular to working precision."""
    values, vectors = linalg.eigh(h)
    kept = values > values[-1] * len(h) * np.finfo(np.float64).eps
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


class ExactRetrainer:
    """Logistic regression with and without some of its rows, by Newton's method from the weights of all rows.

    X: (n, d), taken as it is: a scaler stays the one of all rows, or the coordinates of every point would move. y: (n,) of 0
    and 1. C: scikit-learn's, 1 / ridge in sum form and not on the intercept; infinity for no ridge.
    `weights` (d + 1,), intercept last, are those of all rows. The first step of a retraining reuses the Hessian of all rows,
    less what the deleted rows brought to it.

    Raises `SeparableDataError` where C is infinite and the classes are separable, `DataError` where a class has no row left.
    """

    def __init__(self, X: Float[np.ndarray, "row feature"], y: np.ndarray, C: float = 1.0) -> None:
        if not C > 0:
            raise InputError(f"C must be above 0 (infinity for no ridge), got {C}")
        self._table, self._y = logistic_table(X, y)
        self.C = float(C)
        self._ridge = np.append(np.full(self._table.shape[1] - 1, 1 / self.C), 0.0)
        everything = np.ones(len(self._y))
        self.weights: np.ndarray = self._newton(np.zeros(len(self._ridge)), everything)
        p = expit(self._table @ self.weights)
        self._curvature_of_rows = p * (1 - p)
        self._errors = p - self._y
        self._hessian = self._hessian_at(self._curvature_of_rows)

    def without(self, rows: Any) -> Float[np.ndarray, " weight"]:
        """Weights (d + 1,) after training without ``rows`` (distinct indices)."""
        rows = np.asarray(rows, dtype=np.int64).ravel()
        if len(rows) == 0:
            return self.weights.copy()
        n = len(self._y)
        if rows.min() < 0 or rows.max() >= n or len(np.unique(rows)) < len(rows):
            raise InputError(f"rows to delete must be distinct indices in 0..{n - 1}, got {rows[:10].tolist()}")
        kept = np.ones(n)
        kept[rows] = 0
        left = self._y[kept > 0]
        if len(np.unique(left)) < 2:
            raise DataError(f"without these {len(rows)} rows a class has no row left; delete fewer")
        taken = self._table[rows]
        hessian = self._hessian - (taken * self._curvature_of_rows[rows, None]).T @ taken
        start = self.weights + self._solve(hessian, taken.T @ self._errors[rows])
        if self._loss(start, kept) > self._loss(self.weights, kept):  # many rows at once: the step may overshoot
            start = self.weights
        return self._newton(start, kept)

    def _loss(self, w: np.ndarray, kept: np.ndarray) -> float:
        z = self._table @ w
        return float(kept @ (np.logaddexp(0, z) - self._y * z) + 0.5 * (self._ridge * w) @ w)

    def _hessian_at(self, s: np.ndarray) -> np.ndarray:
        return (self._table * s[:, None]).T @ self._table + np.diag(self._ridge)

    def _solve(self, hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        if np.isfinite(self.C):
            try:
                return linalg.cho_solve(linalg.cho_factor(hessian), gradient)
            except linalg.LinAlgError:
                pass  # rows at certain probabilities leave the intercept without curvature
        return _inverse(hessian) @ gradient

    def _newton(self, w: np.ndarray, kept: np.ndarray) -> np.ndarray:
        loss = self._loss(w, kept)
        for _ in range(_ITERATIONS):
            z = self._table @ w
            p = expit(z)
            gradient = self._table.T @ (kept * (p - self._y)) + self._ridge * w
            step = self._solve(self._hessian_at(kept * p * (1 - p)), gradient)
            decrement = float(gradient @ step)
            if decrement <= _QUADRATIC * (1 + abs(loss)):  # differences of the loss are rounding here: whole steps
                w = w - step
                if decrement <= _QUADRATIC**2 * (1 + abs(loss)):
                    self._refuse_separated(z, kept)
                    return w
                loss = self._loss(w, kept)
                continue
            rate, best = 1.0, loss
            for _ in range(_HALVINGS):
                tried = w - rate * step
                best = self._loss(tried, kept)
                if best <= loss - 1e-4 * rate * decrement:
                    break
                rate /= 2
            else:
                self._refuse_separated(z, kept)
                return w  # no step lowers the loss in float64: this is its minimum
            w, loss = tried, best
        if np.isfinite(self.C):
            raise DataError(
                f"the training did not converge in {_ITERATIONS} Newton steps at C = {self.C:g}; standardise the columns, "
                "or take a smaller C"
            )
        raise SeparableDataError(_SEPARABLE)

    def _refuse_separated(self, z: np.ndarray, kept: np.ndarray) -> None:
        """Without a ridge a row at a sure probability may be the mark of weights that still grow: ask a linear program."""
        if np.isfinite(self.C) or np.abs(z).max() < _SURE:
            return
        rows = np.where(self._y > 0, 1.0, -1.0)[kept > 0, None] * self._table[kept > 0]
        found = linprog(-rows.sum(axis=0), A_ub=-rows, b_ub=np.zeros(len(rows)), bounds=(-1, 1), method="highs")
        if found.success and found.fun < -1e-7:  # a hyperplane with no row on its wrong side and some off it
            raise SeparableDataError(_SEPARABLE)


_SEPARABLE = (
    "the classes can be separated and there is no ridge, so the weights grow without end and no deletion has an effect that "
    "can be told; train with a ridge, for example C = 1"
)
