"""Thresholdout: answers from the training set while it agrees with the holdout, and counts where it does not."""

__all__ = ["Thresholdout"]

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from theodolite.core.errors import BudgetExhausted, DataError, InputError
from theodolite.core.memory import chunks
from theodolite.data.reusable_holdout.answers import Answer, HoldoutLeakError, Query, check_sample, mean_of, query_mean
from theodolite.data.reusable_holdout.bounds import smallest_tolerance, theory_settings
from theodolite.data.reusable_holdout.ledger import Ledger, RepeatedSeedWarning, current_ledger, fingerprint


class Thresholdout:
    """A holdout that may be asked again and again, each question depending on earlier answers.

    Start: gamma ~ Lap(2 sigma), T' = T + gamma. A question with means S_t on the training and S_h on the holdout rows:
    eta ~ Lap(4 sigma); if |S_h - S_t| > T' + eta the answer is S_h + Lap(sigma), one unit of the budget is spent and
    gamma is drawn anew; otherwise the answer is S_t, without noise and free.

    preset "theory": T = 3 tau / 4, sigma = tau / (96 ln(4 m / beta)) for tolerance tau, max_queries m and confidence
    1 - beta, and the largest budget that the rows carry; too few rows for the tolerance raise InputError naming the
    smallest that can be had. The proof gives the growth of that budget; its constant is taken as 1.
    preset "science": the published experiment: T = 4 / sqrt(n), Gaussian noise of deviation 1 / sqrt(n) on threshold
    and answer, no budget and no fresh gamma. It carries no guarantee.
    Without a preset what is not given is filled in from the theory's formulas, again without a guarantee.

    A query function gets the rows and labels as they were given here: data frames stay data frames.

    ledger: a file that keeps the account across restarts, found again by the rows themselves; with less budget left
    there than asked for here, the smaller one counts and `note` says so. allow_shared_rows: whether a row may stand in both
    sets (legitimate copies in the data); HoldoutLeakError otherwise.

    Source: Dwork et al., 2015, arXiv:1506.02629 and Science 349; arXiv:1411.2664.

    >>> import numpy as np
    >>> x = np.arange(40.0)[:, None]
    >>> holdout = Thresholdout(x[:20], x[:20, 0] % 2, x[20:], x[20:, 0] % 2, preset="science")
    >>> holdout.ask(lambda x, y: y).value
    0.5
    """

    def __init__(
        self,
        X_train: Any,
        y_train: Any,
        X_holdout: Any,
        y_holdout: Any,
        *,
        budget: int | None = None,
        threshold: float | None = None,
        sigma: float | None = None,
        tolerance: float = 0.05,
        confidence: float = 0.95,
        max_queries: int = 1000,
        preset: str | None = None,
        noise: str = "laplace",
        seed: int = 0,
        ledger: str | Path | None = None,
        allow_shared_rows: bool = False,
    ) -> None:
        self._train = check_sample(X_train, y_train, "training")
        self._holdout = check_sample(X_holdout, y_holdout, "holdout")
        if preset not in (None, "theory", "science") or noise not in ("laplace", "gaussian"):
            raise InputError(
                f"preset is theory, science or None and noise laplace or gaussian; got {preset!r}, {noise!r}"
            )
        shapes = [np.shape(x)[1:] for x in (self._train[0], self._holdout[0])]
        if shapes[0] != shapes[1]:
            raise DataError(f"training and holdout rows have different shapes, {shapes[0]} and {shapes[1]}")
        if not allow_shared_rows:
            self._refuse_shared_rows()
        n = len(self._holdout[0])
        self.preset, self.noise, self.seed = preset, noise, seed
        self.tolerance, self.confidence, self.max_queries = tolerance, confidence, max_queries
        self._refresh = preset != "science"
        theory_threshold, theory_sigma, theory_budget = theory_settings(n, tolerance, 1 - confidence, max_queries)
        if preset == "science":
            self.noise = "gaussian"
            self.tolerance = 1 / math.sqrt(n)
            self.threshold = 4 / math.sqrt(n) if threshold is None else threshold
            self._scales = (0.0, self.tolerance, self.tolerance)
            self.remaining = budget
        else:
            if preset == "theory" and theory_budget < 1:
                raise InputError(
                    f"{n} holdout rows cannot answer {max_queries} queries within {tolerance}: the smallest tolerance "
                    f"they reach is {smallest_tolerance(n, 1 - confidence, max_queries):.3g}"
                )
            self.threshold = theory_threshold if threshold is None else threshold
            s = theory_sigma if sigma is None else sigma
            if not (self.threshold >= 0 and s >= 0):
                raise InputError(f"threshold and sigma must not be negative, got {self.threshold} and {s}")
            self._scales = (2 * s, 4 * s, s)
            self.remaining = max(1, theory_budget) if budget is None else budget
        if self.remaining is not None and self.remaining < 0:
            raise InputError(f"a budget must not be negative, got {budget}")
        self.note = ""
        self._rng = np.random.default_rng(seed)
        self._log: list[tuple[int, str, float, str, float, int | None, float]] = []
        self._first = 0
        self._ledger = self._open(ledger if ledger is not None else current_ledger())
        self._gamma = self._draw(self._scales[0])

    def _refuse_shared_rows(self) -> None:
        train, holdout = _row_keys(np.asarray(self._train[0]), np.asarray(self._holdout[0]))
        shared = int(np.isin(holdout, train).sum())
        if shared:
            raise HoldoutLeakError(
                f"{shared} of {len(holdout)} holdout rows are in the training set too; take them out of one of the two, or "
                "pass allow_shared_rows=True where equal rows are separate observations"
            )

    def _open(self, path: str | Path | None) -> Ledger | None:
        if path is None:
            return None
        ledger = Ledger(path, fingerprint(*self._holdout))
        self._first = len(ledger.records)
        if self.seed in ledger.seeds:
            warnings.warn(
                f"this holdout was asked before with noise of seed {self.seed}; take another seed for other questions",
                RepeatedSeedWarning,
                stacklevel=3,
            )
        left = ledger.budget_left
        if left is None and self.remaining is not None:
            left = max(0, self.remaining - ledger.damaged)
        if left is not None and self.remaining is not None and left < self.remaining:
            self.note = f"{self._first} questions were asked of these rows before; {left} of the budget are left"
            if ledger.damaged:
                self.note += f" ({ledger.damaged} lines of the ledger cannot be read; each counts as one of them)"
            self.remaining = left
        ledger.open(seed=self.seed, rows=len(self._holdout[0]), budget_left=self.remaining)
        return ledger

    def __repr__(self) -> str:
        return f"Thresholdout({len(self._holdout[0])} rows, {len(self._log)} asked, remaining={self.remaining})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a holdout cannot be pickled or copied: a copy would have its own budget; use a ledger")

    def _draw(self, scale: float) -> float:
        kind = self._rng.laplace if self.noise == "laplace" else self._rng.normal
        return float(kind(0.0, scale))

    def ask(self, query: "Query | tuple[np.ndarray, np.ndarray]", *, name: str = "") -> Answer:
        """Answer a query: a function of (X, y), or its values (on the training rows, on the holdout rows).

        Raises BudgetExhausted, and gives nothing away, when the budget is spent.
        """
        of_train, of_holdout = query if isinstance(query, tuple) else (query, query)
        train = query_mean(of_train, *self._train, len(self._train[0]))
        holdout = query_mean(of_holdout, *self._holdout, len(self._holdout[0]))
        return self._answer(train, holdout, name, 1.0)

    def ask_many(self, train_values: np.ndarray, holdout_values: np.ndarray, *, name: str = "") -> list[Answer]:
        """Answer queries one after another from their values, (q, n_train) and (q, n_holdout)."""
        train_values, holdout_values = np.atleast_2d(train_values), np.atleast_2d(holdout_values)
        sizes = (len(self._train[0]), len(self._holdout[0]))
        if len(train_values) != len(holdout_values) or (train_values.shape[1], holdout_values.shape[1]) != sizes:
            raise InputError(
                f"need values of shape (q, {sizes[0]}) and (q, {sizes[1]}), got {train_values.shape} and {holdout_values.shape}"
            )
        answers = []
        for part in chunks(len(train_values), 8.0 * sum(sizes)):
            train, holdout = train_values[part], holdout_values[part]
            for values in (train, holdout):
                mean_of(values)
            means = zip(_row_means(train), _row_means(holdout), strict=True)
            answers += [self._answer(float(t), float(h), name, 1.0) for t, h in means]
        return answers

    def evaluate(self, statistic: Callable[[Any, Any], float]) -> tuple[float, float]:
        """A statistic of (X, y) on both samples, for `ask_statistic`; what it returns must not be shown to an analyst."""
        return statistic(*self._train), statistic(*self._holdout)

    def ask_statistic(self, train: float, holdout: float, *, sensitivity: float, name: str = "") -> Answer:
        """Answer a number that is not a mean over rows, given how far one row can move it (a mean: 1 / n)."""
        if not (math.isfinite(train) and math.isfinite(holdout) and sensitivity > 0):
            raise InputError(f"need finite numbers and a sensitivity above 0, got {train}, {holdout}, {sensitivity}")
        return self._answer(train, holdout, name, sensitivity * len(self._holdout[0]))

    def _answer(self, train: float, holdout: float, name: str, scale: float) -> Answer:
        if self.remaining is not None and self.remaining < 1:
            raise BudgetExhausted(
                f"the holdout's budget is spent after {len(self._log) + self._first} questions; no answer was made. "
                "Collect a fresh holdout, or stop selecting"
            )
        eta = self._draw(self._scales[1] * scale)
        if abs(holdout - train) > self.threshold * scale + self._gamma * scale + eta:
            value = holdout + self._draw(self._scales[2] * scale)
            source: Literal["train", "holdout"] = "holdout"
            if self.remaining is not None:
                self.remaining -= 1
            if self._refresh:
                self._gamma = self._draw(self._scales[0])
        else:
            value, source = train, "train"
        index = self._first + len(self._log)
        answer = Answer(value, source, self._error_bound(source) * scale, self.remaining, index)
        record = (index, name, value, source, answer.error_bound, self.remaining, time.time())
        if self._ledger is not None:
            self._ledger.add(dict(zip(_COLUMNS, record, strict=True)))
        self._log.append(record)
        return answer

    def _error_bound(self, source: str) -> float:
        """The theorem's tolerance, or without one: threshold and noise at the confidence, and the holdout's own error."""
        if self.preset == "theory":
            return self.tolerance
        beta = 1 - self.confidence
        sampling = math.sqrt(math.log(4 / beta) / (2 * len(self._holdout[0])))
        spread = math.log(2 / beta) if self.noise == "laplace" else math.sqrt(2 * math.log(4 / beta))
        noise = self._scales[2] if source == "holdout" else self._scales[0] + self._scales[1]
        return sampling + noise * spread + (0.0 if source == "holdout" else self.threshold)

    @property
    def log(self) -> pd.DataFrame:
        """What was asked of this object, never the holdout's exact values."""
        frame = pd.DataFrame(self._log, columns=_COLUMNS)
        frame["rows"] = len(self._holdout[0])
        return frame


_COLUMNS = ["index", "name", "value", "source", "error_bound", "budget_left", "time"]


def _row_means(values: np.ndarray) -> np.ndarray:
    return values @ np.full(
        values.shape[1], 1 / values.shape[1], dtype=values.dtype if values.dtype.kind == "f" else float
    )


def _row_keys(train: np.ndarray, holdout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One item a row, its bytes in a type that both have: floats in the coarser one, so that a rounded copy is a copy."""
    pair = [x.reshape(len(x), -1) for x in (train, holdout)]
    kinds = {x.dtype.kind for x in pair}
    if kinds == {"f"}:
        common = min((x.dtype for x in pair), key=lambda kind: kind.itemsize)
    else:
        pair = pair if kinds <= set("biuf") else [x.astype(str) for x in pair]
        common = np.result_type(*pair)
    pair = [np.ascontiguousarray(x, dtype=common) for x in pair]
    keys = [x.view(np.dtype((np.void, common.itemsize * x.shape[1]))).ravel() for x in pair]
    return keys[0], keys[1]
