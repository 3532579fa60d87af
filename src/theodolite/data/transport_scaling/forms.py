"""Stage one: laws of the score in a mix and its distance. Stage two: the projection to larger sizes."""

__all__ = ["FORMS", "FORMS_WITHOUT_TRANSPORT", "Law", "choose_form", "project", "region_errors"]

import math
import warnings
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Inexact

from theodolite.core.errors import InputError

Response = Literal["log_error", "score"]
FORMS = ("ot", "pl", "pq_notebook", "pq", "ot_root", "linear", "quadratic", "quadratic_cross", "root")
FORMS_WITHOUT_TRANSPORT = ("linear", "quadratic", "quadratic_cross", "root", "forest")
_SMALLEST = 1e-6
_LEAST_SHARE = 1e-6
_REGION = 0.5


def project(score_0: Any, score_1: Any, n_0: float, n_1: float, n: Any, response: Response = "log_error") -> np.ndarray:
    """The score at size n from scores at n_0 < n_1: exact at both, linear in log n for the response.

    "log_error": the response is log(1 - score + 1e-6), a power law of the error, never outside [0, 1] for scores in it.
    "score", as published, can pass 100 %. Arrays broadcast.

    Source: Kang et al., 2023, arXiv:2307.02460, eq. 6.

    >>> round(float(project(0.8, 0.9, 100, 200, 400)), 4)
    0.95
    """
    if not 0 < n_0 < n_1:
        raise InputError(f"the two sizes must rise and be positive, got {n_0} and {n_1}")
    sizes = np.asarray(n, dtype=np.float64)
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise InputError(f"a size to project to must be positive, got {n}")
    if response not in ("log_error", "score"):
        raise InputError(f"the response is 'log_error' or 'score', got {response!r}")
    first, second = np.asarray(score_0, dtype=np.float64), np.asarray(score_1, dtype=np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("scores to project from must be finite")
    up, down = projection_weights(n_0, n_1, sizes)
    if response == "score":
        return np.asarray(up * second + down * first)
    if (first > 1).any() or (second > 1).any():
        raise InputError(
            "response='log_error' is for scores of at most 1, such as accuracy or R2; use response='score'"
        )
    errors = np.log(1 - first + _SMALLEST), np.log(1 - second + _SMALLEST)
    answer = 1 + _SMALLEST - np.exp(up * errors[1] + down * errors[0])
    lowest = 0.0 if (first >= 0).all() and (second >= 0).all() else -np.inf
    return np.asarray(np.clip(answer, lowest, 1.0))


def projection_weights(n_0: float, n_1: float, n: Any) -> tuple[Any, Any]:
    """Weights of the response at n_1 and at n_0."""
    span = math.log(n_1 / n_0)
    return np.log(np.asarray(n) / n_0) / span, -np.log(np.asarray(n) / n_1) / span


def _columns(form: str, p: Inexact[np.ndarray, "mix source"], transport: Float[np.ndarray, " mix"]) -> np.ndarray:
    """The regressors of a form; the last source's share is left out where the others determine it.

    The two forms with roots of the shares are not in the paper: the first rows of a source are worth more than its later ones, so
    the score bends near a share of 0, which no polynomial of so few coefficients follows.
    """
    q, d, one = p[:, :-1], transport[:, None], np.ones((len(p), 1))
    match form:
        case "ot":
            parts = [one, d]
        case "pl":
            parts = [one, q, d, q * d]
        case "pq_notebook":
            parts = [one, q, d, q * d, q**2 * d]
        case "pq":
            parts = [one, q, q**2, d, q * d, q**2 * d]
        case "ot_root":
            parts = [one, d, np.sqrt(p)]
        case "root":
            parts = [one, np.sqrt(p)]
        case "linear":
            parts = [one, q]
        case "quadratic":
            parts = [one, q, q**2]
        case "quadratic_cross":
            pairs = [q[:, i : i + 1] * q[:, j : j + 1] for i, j in combinations(range(q.shape[1]), 2)]
            parts = [one, q, q**2, *pairs]
        case _:
            raise InputError(f"form must be 'auto', 'forest' or one of {', '.join(FORMS)}; got {form!r}")
    return np.concatenate(parts, axis=1)


def n_coefficients(form: str, m: int) -> int:
    """How many coefficients a form has for m sources; a forest counts as none."""
    return 0 if form == "forest" else _columns(form, np.zeros((1, m)), np.zeros(1)).shape[1]


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law score = L(p, OT); linear in its coefficients, or a random forest on p."""

    form: str
    coefficients: Float[np.ndarray, " coefficient"]
    forest: Any = None

    @classmethod
    def fit(cls, form: str, p: np.ndarray, transport: np.ndarray, score: np.ndarray, *, seed: int = 0) -> "Law":
        """Ordinary least squares, the shortest solution where columns are collinear."""
        if form == "forest":
            from sklearn.ensemble import RandomForestRegressor

            return cls(form, np.empty(0), RandomForestRegressor(100, random_state=seed).fit(p, score))
        columns = _columns(form, p, transport)
        scale = np.abs(columns).max(axis=0)
        scale[scale == 0] = 1.0
        return cls(form, np.linalg.lstsq(columns / scale, score, rcond=None)[0] / scale)

    def __call__(self, p: np.ndarray, transport: np.ndarray) -> Float[np.ndarray, " mix"]:
        """Scores of mixes p (G, m) at distances (G,)."""
        return (
            self.forest.predict(p) if self.forest is not None else _columns(self.form, p, transport) @ self.coefficients
        )

    def gradient(self, p: Float[np.ndarray, " source"], transport: float, transport_gradient: np.ndarray) -> np.ndarray:
        """dL/dp (m,) along the distance and the shares; a share below 1e-6 has the slope that it has there."""
        if self.forest is not None:
            raise InputError("a random forest has no gradient; choose another form to select a mix")
        step, m = 1e-20, len(p)
        # the imaginary part of L(p + i step) / step is the derivative to the last digit, as nothing is subtracted
        points = np.maximum(p, _LEAST_SHARE) + 1j * step * np.eye(m)
        direct = np.imag(_columns(self.form, points, np.full(m, transport)) @ self.coefficients) / step
        ends = self(np.stack([p, p]), np.array([transport + 1, transport]))  # every form is linear in the distance
        return direct + (ends[0] - ends[1]) * transport_gradient


def region_errors(
    p: np.ndarray, transport: np.ndarray, score: np.ndarray, forms: tuple[str, ...] = FORMS, *, seed: int = 0
) -> dict[str, float]:
    """Mean absolute error of each form on mixes with p_i >= 0.5, fitted on the others, over every i in turn.

    Forms with more coefficients than the mixes left are not in the result; nor is any where no region can be held out.
    """
    m = p.shape[1]
    errors: dict[str, list[float]] = {}
    for i in range(m):
        out = p[:, i] >= _REGION - 1e-9
        if not out.any() or (~out).sum() < 2:
            continue
        for form in forms:
            if n_coefficients(form, m) > (~out).sum():
                continue
            law = Law.fit(form, p[~out], transport[~out], score[~out], seed=seed)
            errors.setdefault(form, []).append(float(np.abs(law(p[out], transport[out]) - score[out]).mean()))
    most = max((len(found) for found in errors.values()), default=0)
    return {form: float(np.mean(found)) for form, found in errors.items() if len(found) == most}


def choose_form(p: np.ndarray, transport: np.ndarray, score: np.ndarray) -> str:
    """The form with the least leave-one-region-out error; among equals the one with fewer coefficients.

    >>> grid = np.array([[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    >>> far = np.array([4.0, 1.0, 0.5, 2.0, 3.0])
    >>> choose_form(grid, far, 1 - 0.1 * far)
    'ot'
    """
    found = region_errors(p, transport, score)
    if not found:
        return "ot"
    best = min(found.values())
    close = [form for form, error in found.items() if error <= best + 1e-9 * max(1.0, abs(best))]
    return min(close, key=lambda form: n_coefficients(form, p.shape[1]))


def affordable(form: str, n_mixes: int, m: int) -> str:
    """The form, or "ot" with a warning where the mixes are fewer than its coefficients."""
    needed = n_coefficients(form, m)
    if needed <= n_mixes:
        return form
    warnings.warn(
        f"form {form!r} has {needed} coefficients but the table has {n_mixes} mixes; 'ot' is fitted instead",
        UserWarning,
        stacklevel=3,
    )
    return "ot"
