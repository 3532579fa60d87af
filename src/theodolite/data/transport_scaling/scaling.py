"""The estimator: pilot tables, laws, projection, selection."""

__all__ = ["TransportScaling"]

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.base import BaseEstimator

from theodolite.core.errors import DataError, InputError
from theodolite.core.parallel import seeds_for
from theodolite.core.splits import find_leaks
from theodolite.data.transport_scaling.forms import (
    FORMS,
    Law,
    Response,
    affordable,
    choose_form,
    n_coefficients,
    project,
    projection_weights,
    region_errors,
)
from theodolite.data.transport_scaling.mixes import as_mixes, design, nearest_allowed
from theodolite.data.transport_scaling.selection import Baseline, MixSelection, baseline_mixes, climb
from theodolite.data.transport_scaling.tables import PilotTable, Pool, Source, make_table, regresses
from theodolite.data.transport_scaling.transport import (
    check_labels,
    distances,
    exact_seconds,
    label_distances,
    warn_of_seconds,
)

_TARGET_ROWS = 400
_FEWEST = 10
_DENSE_BYTES = 4e9
_RESTARTS = 5
_DRAWS = 200
_SMALLEST = 1e-6


class TransportScaling(BaseEstimator):
    """Scores of a model on mixes of sources that show only pilot samples, and the best mix at a size not seen yet.

    estimator: a scikit-learn classifier or regressor, or a function (X, y, X_val, y_val) -> score, larger being better.
    sizes: (N_0, N_1); half of the smallest pilot sample and all of it where None. Pilot tables train grid x n_repeats models
    at each size. form: "auto" takes the law with the least error when mixes with p_i >= 0.5 are held out, never looking at
    what is predicted. response: see `project`. embed: X -> features (n, p) for the distance; the columns, standardised by the
    validation rows, where None. The distance is to at most 400 validation rows; the score is on all. executor: as everywhere.

    After `fit`: tables_ (two `PilotTable`), form_, laws_, errors_ (form x mean absolute error on held-out regions at each
    size), n_trainings_.

    Source: Kang et al., 2023, arXiv:2307.02460, section 3 and algorithm 1.

    >>> from sklearn.linear_model import LogisticRegression
    >>> rng = np.random.default_rng(0)
    >>> def rows(n, share):
    ...     y = (np.arange(n) < share * n).astype(int)
    ...     return rng.normal(size=(n, 2)) + 2 * y[:, None], y
    >>> scaling = TransportScaling(LogisticRegression(), grid_step=0.25, n_repeats=1)
    >>> scaling.fit([Source("a", *rows(40, 0.1)), Source("b", *rows(40, 0.9))], *rows(100, 0.5)).n_trainings_
    10
    """

    tables_: tuple[PilotTable, PilotTable]
    laws_: tuple[Law, Law]
    errors_: pd.DataFrame
    form_: str
    n_trainings_: int

    def __init__(
        self,
        estimator: Any | Callable[..., float],
        *,
        sizes: tuple[int, int] | None = None,
        grid_step: float = 0.1,
        n_repeats: int = 3,
        form: str = "auto",
        response: Response = "log_error",
        embed: Callable[[Any], Any] | None = None,
        scoring: str = "accuracy",
        executor: Executor | int | None = None,
        seed: int = 0,
    ) -> None:
        self.estimator = estimator
        self.sizes = sizes
        self.grid_step = grid_step
        self.n_repeats = n_repeats
        self.form = form
        self.response: Response = response
        self.embed = embed
        self.scoring = scoring
        self.executor = executor
        self.seed = seed

    def fit(self, sources: Sequence[Source], X_val: Any, y_val: Any) -> "TransportScaling":
        """Make both pilot tables and fit the laws; sources' pilot samples must not hold validation rows."""
        if self.n_repeats < 1:
            raise InputError(f"n_repeats must be at least 1, got {self.n_repeats}")
        if self.form not in ("auto", "forest"):
            n_coefficients(self.form, 2)  # raises for a form that is not known
        scoring = "r2" if self.scoring == "accuracy" and regresses(self.estimator) else self.scoring
        if self.response == "log_error" and scoring.startswith("neg_"):
            raise InputError(f"scoring {scoring!r} is not an accuracy; use response='score'")
        pool = self._pool(sources, np.asarray(X_val), np.asarray(y_val))
        self.sources_ = tuple(sources)
        m, rows = len(sources), np.bincount(pool.source)
        n_0, n_1 = self.sizes or (int(rows.min()) // 2, int(rows.min()))
        if not 2 <= n_0 < n_1:
            raise InputError(f"need two sizes 2 <= N_0 < N_1, got {n_0} and {n_1}")
        mixes = design(m, self.grid_step, self.seed)
        short = [source.name for source, count in zip(sources, rows) if count < n_1]
        if short:
            warnings.warn(
                f"the pilot samples of {', '.join(map(repr, short))} have fewer rows than N_1 = {n_1}, so mixes repeat rows and "
                "scores grow too slowly with size; lower `sizes`",
                UserWarning,
                stacklevel=2,
            )
        count = len(mixes) * self.n_repeats
        warn_of_seconds(
            count * sum(exact_seconds(pool.cost, n) for n in (n_0, n_1)),
            f"{2 * count} exact transports of {n_0:,} and {n_1:,} rows, besides the trainings,",
        )
        one, two = (
            make_table(pool, self.estimator, scoring, mixes, n, self.n_repeats, seed=seed, executor=self.executor)
            for n, seed in zip((n_0, n_1), seeds_for(self.seed, 2), strict=True)
        )
        self.pool_, self.tables_ = pool, (one, two)
        self.n_trainings_ = 2 * len(mixes) * self.n_repeats
        if np.ptp([one.score, two.score], axis=1).max() == 0:
            raise DataError(
                f"every mix scores {one.score[0]:.4g} at {n_0} rows and {two.score[0]:.4g} at {n_1}: there is nothing to predict"
            )
        if self.response == "log_error" and max(one.score_runs.max(), two.score_runs.max()) > 1:
            raise InputError("scores above 1 need response='score'")
        self.form_ = self._choose()
        self.laws_ = self._fit_laws(one.score, one.transport, two.score, two.transport)
        # an error below half of the least one seen is the law running out of its range
        self._least = tuple(float(max(0.0, (1 - table.score).min() / 2)) for table in self.tables_)
        return self

    def predict(self, p: Any, size: int) -> Any:
        """Score at mix p (m,), a number, or mixes (G, m), an array (G,), after training on ``size`` rows."""
        mixes = self._mixes(p)
        self._check_size(size)
        scores = self._predict(mixes, size)
        return float(scores[0]) if np.ndim(p) == 1 else scores

    def predict_interval(self, p: Any, size: int) -> tuple[float, float]:
        """95 % interval of the prediction at one mix, over resampled repetitions of the tables: (low, high).

        It holds what repeating the pilot would change; not that the law may be the wrong one.
        """
        mixes = self._mixes(p)
        self._check_size(size)
        if len(mixes) != 1:
            raise InputError(f"an interval is for one mix, got {len(mixes)}")
        if self.n_repeats < 2:
            raise InputError("an interval needs n_repeats >= 2")
        first, second = self._distances(mixes)
        rng = np.random.default_rng(self.seed)
        draws = [float(self._at(self.laws_, mixes, first, second, size)[0])]
        for _ in range(_DRAWS):
            middle = []
            for table in self.tables_:
                taken = rng.integers(0, self.n_repeats, table.score_runs.shape)
                middle += [
                    np.median(np.take_along_axis(runs, taken, axis=1), axis=1)
                    for runs in (table.score_runs, table.transport_runs)
                ]
            laws = self._fit_laws(*middle)
            draws.append(float(self._at(laws, mixes, first, second, size)[0]))
        low, high = np.quantile(draws, [0.025, 0.975])
        return min(float(low), draws[0]), max(float(high), draws[0])

    def select(self, size: int, budget: float | None = None) -> MixSelection:
        """The mix with the best predicted score at ``size`` rows, within a budget of sum_i cost_i size p_i; trains no model.

        Mirror ascent along the exact gradient of both sizes, on a fixed sample of the pool a restart, from the middle, near
        every vertex and from the table's best mix by the law. What the restarts find is compared by `predict` with the plain
        mixes, so that none of those that may be bought is predicted to do better. Sources deliver at most their total.
        """
        if not hasattr(self, "laws_"):
            raise InputError("fit before selecting a mix")
        if self.form_ == "forest":
            raise InputError("a random forest has no gradient; choose another form to select a mix")
        self._check_size(size)
        m = len(self.sources_)
        costs = np.array([source.cost for source in self.sources_], dtype=np.float64)
        caps = np.array([1.0 if s.total is None else min(1.0, s.total / size) for s in self.sources_])
        if caps.sum() < 1 - 1e-9:
            raise InputError(f"the sources can deliver {caps.sum() * size:.0f} rows in all, fewer than {size}")
        most = math.inf if budget is None else budget / size
        cheapest = _cheapest(costs, caps)
        if cheapest @ costs > most:
            raise InputError(
                f"a budget of {budget:g} buys fewer than {size} rows; the cheapest mix costs {cheapest @ costs * size:g}"
            )

        def allowed(p: np.ndarray) -> np.ndarray:
            return nearest_allowed(p, caps, costs, most)

        rng = np.random.default_rng(self.seed)
        uniform = np.full(m, 1 / m)
        one, two = self.tables_
        measured = self._at(self.laws_, two.p, one.transport, two.transport, size)
        starts = [uniform, *(0.9 * np.eye(m) + 0.1 * uniform), two.p[int(measured.argmax())]]
        starts += [rng.dirichlet(np.ones(m)) for _ in range(_RESTARTS - len(starts))]
        found = [climb(self._objective(size, rng), start, allowed) for start in starts]
        scores = self._predict(np.stack([p for p, _ in found]), size).tolist()
        plain = baseline_mixes(lambda q: self._predict(q, size), two.p, two.transport, two.score, self.seed)
        predicted = self._predict(np.stack(list(plain.values())), size)
        baselines = {name: Baseline(p, float(s)) for (name, p), s in zip(plain.items(), predicted, strict=True)}
        for plain_mix in baselines.values():
            if np.abs(allowed(plain_mix.p) - plain_mix.p).max() < 1e-9:
                found.append((plain_mix.p, plain_mix.p[None]))
                scores.append(plain_mix.predicted_score)
        best = int(np.argmax(scores))
        return MixSelection(found[best][0], scores[best], baselines, found[best][1])

    # ---- inside

    def _pool(self, sources: Sequence[Source], X_val: np.ndarray, y_val: np.ndarray) -> Pool:
        if len(sources) < 2:
            raise InputError(f"need at least two sources to mix, got {len(sources)}")
        twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
        if twice:
            raise InputError(f"every source needs its own name; {twice[0]!r} is there twice")
        parts = [np.asarray(source.X) for source in sources]
        labels = [np.asarray(source.y) for source in sources]
        for source, rows, y in zip(sources, parts, labels):
            if len(rows) < _FEWEST:
                raise DataError(f"source {source.name!r} has {len(rows)} rows; at least {_FEWEST} are needed")
            if y.shape != (len(rows),):
                raise InputError(f"source {source.name!r} has {len(rows)} rows but labels of shape {y.shape}")
            if rows.shape[1:] != X_val.shape[1:]:
                raise InputError(
                    f"source {source.name!r} has rows of shape {rows.shape[1:]}, the validation rows {X_val.shape[1:]}"
                )
            if not source.cost >= 0 or (source.total is not None and source.total < 1):
                raise InputError(f"source {source.name!r}: need cost >= 0 and total >= 1")
        if y_val.shape != (len(X_val),) or len(X_val) < 2:
            raise InputError(
                f"need at least two validation rows and a label for each, got {X_val.shape} and {y_val.shape}"
            )
        for one in labels:
            check_labels(one, y_val)
        X, y = np.concatenate(parts), np.concatenate(labels)
        for name, rows in (("the sources", X), ("the validation rows", X_val)):
            if np.issubdtype(rows.dtype, np.number) and not np.isfinite(rows).all():
                raise DataError(f"{name} hold NaN or infinite values; fill them in or leave the rows out")
        continuous = regresses(self.estimator) or (
            np.issubdtype(y_val.dtype, np.floating) and len(np.unique(y_val)) > max(20, len(y_val) // 2)
        )
        if not continuous:
            absent = np.setdiff1d(y_val, y)
            if len(absent):
                warnings.warn(
                    f"no source has the labels {', '.join(map(str, absent[:10]))}, which validation rows have",
                    UserWarning,
                    stacklevel=3,
                )
        shared = find_leaks(
            np.arange(len(X)),
            len(X) + np.arange(len(X_val)),
            X=np.concatenate([X, X_val]).reshape(len(X) + len(X_val), -1),
        )
        if len(shared.twins):
            warnings.warn(
                f"{len(shared.twins)} validation rows equal pilot rows; scores are too good where they are the same rows",
                UserWarning,
                stacklevel=3,
            )
        source = np.repeat(np.arange(len(sources)), [len(rows) for rows in parts])
        return Pool(X, y, source, self._costs(X, y, X_val, y_val, continuous), X_val, y_val)

    def _costs(
        self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray, continuous: bool
    ) -> np.ndarray:
        """Costs (P, V) of the pool, made once; both classes of a pair are taken from the validation rows."""
        if self.embed is None:
            if X.ndim != 2:
                raise InputError(
                    f"rows of shape {X.shape[1:]} need embed, a function that makes features (n, p) of them"
                )
            try:
                a, b = X.astype(np.float64), X_val.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"rows that hold more than numbers need embed, a function that makes features (n, p) of them: {error}"
                ) from error
            scale = b.std(axis=0)
            scale[scale == 0] = 1.0
            a, b = (a - b.mean(axis=0)) / scale, (b - b.mean(axis=0)) / scale
        else:
            a, b = (np.asarray(self.embed(rows), dtype=np.float64) for rows in (X, X_val))
        taken = np.random.default_rng(self.seed).permutation(len(b))[:_TARGET_ROWS]
        if len(a) * len(taken) * 8 > _DENSE_BYTES:
            raise InputError(f"{len(a):,} pilot rows need more than 4 GB of costs; give smaller pilot samples")
        cost = distances(a, b[taken], 2)
        if not continuous:
            absent = ~np.isin(y, y_val)
            rows, labels = np.concatenate([b, a[absent]]), np.concatenate([y_val, y[absent]])
            names = np.unique(labels)
            table = label_distances(rows, labels, rows, labels)
            cost += table[np.searchsorted(names, y)][:, np.searchsorted(names, y_val[taken])]
        return cost

    def _choose(self) -> str:
        one, two = self.tables_
        m, forms = len(self.sources_), (*FORMS, "forest")
        errors = [region_errors(table.p, table.transport, table.score, forms, seed=self.seed) for table in self.tables_]
        names = [form for form in forms if form in errors[0]]
        self.errors_ = pd.DataFrame(
            {f"N = {table.size}": [found[form] for form in names] for table, found in zip(self.tables_, errors)},
            index=pd.Index(names, name="form"),
        )
        if self.form != "auto":
            return affordable(self.form, len(one.p), m)
        # the larger size is nearer to what is asked, and its scores are less noisy
        return choose_form(two.p, two.transport, two.score)

    def _fit_laws(
        self, score_0: np.ndarray, ot_0: np.ndarray, score_1: np.ndarray, ot_1: np.ndarray
    ) -> tuple[Law, Law]:
        p = self.tables_[0].p
        return (
            Law.fit(self.form_, p, ot_0, score_0, seed=self.seed),
            Law.fit(self.form_, p, ot_1, score_1, seed=self.seed),
        )

    def _mixes(self, p: Any) -> np.ndarray:
        if not hasattr(self, "laws_"):
            raise InputError("fit before predicting")
        return as_mixes(p, len(self.sources_))

    def _predict(self, mixes: np.ndarray, size: int) -> np.ndarray:
        return self._at(self.laws_, mixes, *self._distances(mixes), size)

    def _check_size(self, size: int) -> None:
        if not size >= 1:
            raise InputError(f"the size must be at least 1, got {size}")
        if size < self.tables_[1].size:
            warnings.warn(
                f"{size} rows are fewer than the pilot's N_1 = {self.tables_[1].size}: this is interpolation, not projection",
                UserWarning,
                stacklevel=3,
            )

    def _distances(self, mixes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Median distances at both sizes; every mix is drawn in the same order, so that mixes differ by their shares only."""
        out = []
        for table in self.tables_:
            runs = [
                [
                    self.pool_.distance(self.pool_.draw(p, table.size, np.random.default_rng([self.seed, run])))
                    for p in mixes
                ]
                for run in range(self.n_repeats)
            ]
            out.append(np.median(runs, axis=0))
        return out[0], out[1]

    def _at(self, laws: tuple[Law, Law], p: np.ndarray, ot_0: np.ndarray, ot_1: np.ndarray, size: int) -> np.ndarray:
        scores = [law(p, ot) for law, ot in zip(laws, (ot_0, ot_1))]
        if self.response == "log_error":
            scores = [np.minimum(score, 1 - least) for score, least in zip(scores, self._least)]
            if min(table.score.min() for table in self.tables_) >= 0:
                scores = [np.maximum(score, 0.0) for score in scores]
        first, second = scores
        return project(first, second, self.tables_[0].size, self.tables_[1].size, size, self.response)

    def _objective(self, size: int, rng: np.random.Generator) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """Projected score and its gradient at a mix, on one fixed sample of the pool for each size."""
        m = len(self.sources_)
        even = np.full(m, 1 / m)
        samples = [self.pool_.draw(even, max(table.size, m), rng) for table in self.tables_]
        weights = projection_weights(self.tables_[0].size, self.tables_[1].size, size)

        def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
            gradient, moved = np.zeros(m), []
            for k, (law, rows) in enumerate(zip(self.laws_, samples, strict=True)):
                source = self.pool_.source[rows]
                count = np.bincount(source, minlength=m)
                solved = self.pool_.transport(rows, (p / count)[source])
                mean = np.bincount(source, weights=solved.source_potentials, minlength=m) / count
                moved.append(np.array([solved.value]))
                own = law.gradient(p, solved.value, mean)
                if self.response == "log_error":
                    score = float(law(p[None], moved[-1])[0])
                    own = own / (1 - min(score, 1 - self._least[k]) + _SMALLEST)
                gradient += (weights[1] if k == 0 else weights[0]) * own
            value = float(self._at(self.laws_, p[None], moved[0], moved[1], size)[0])
            if self.response == "log_error":
                gradient *= 1 - value + _SMALLEST
            return value, gradient

        return objective


def _cheapest(costs: Float[np.ndarray, " source"], caps: Float[np.ndarray, " source"]) -> Float[np.ndarray, " source"]:
    p, left = np.zeros(len(costs)), 1.0
    for i in np.argsort(costs, kind="stable"):
        p[i] = min(caps[i], left)
        left -= p[i]
    return p
