"""The attack that turns a reused holdout into an accuracy above chance, out of pure noise."""

__all__ = ["AttackResult", "freedman_attack"]

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import InputError
from theodolite.core.parallel import seeds_for, spread

_SIGNAL_FEATURES, _SIGNAL_STRENGTH = 20, 6.0


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Accuracies of the analyst's classifier, each (repeats, len(k_list)).

    train: on the training rows; reported: what the mechanism answers; fresh: on new rows, the truth.
    """

    k_list: tuple[int, ...]
    train: Float[np.ndarray, "repeat k"]
    reported: Float[np.ndarray, "repeat k"]
    fresh: Float[np.ndarray, "repeat k"]

    @property
    def error(self) -> float:
        """Mean distance of what is reported from the truth."""
        return float(np.abs(self.reported - self.fresh).mean())


def freedman_attack(
    n: int,
    d: int,
    k_list: Sequence[int],
    signal: bool = False,
    mechanism: str = "thresholdout",
    repeats: int = 5,
    seed: int = 0,
    executor: Executor | int | None = None,
) -> AttackResult:
    """Select among d noise features by their correlation with n random labels, then ask how well the selection does.

    Features whose correlation exceeds 1 / sqrt(n) on the training rows and in the mechanism's answer, with one sign, are
    kept; of these the k of largest training correlation vote with their signs. signal: the first 20 features get
    + 6 / sqrt(n) times the label. mechanism: "standard" answers with the holdout's means, "thresholdout" as in the
    published experiment (threshold 4 / sqrt(n), Gaussian noise 1 / sqrt(n)), "gaussian" adds noise 1 / sqrt(n) to all.

    executor: spreads the repeats (`theodolite.core.parallel.spread`). Memory 12 n d bytes for each that runs.

    Source: Dwork et al., 2015, Science 349, after Freedman, 1983.
    """
    ks = tuple(int(k) for k in k_list)
    if n < 2 or d < 1 or repeats < 1 or not ks or min(ks) < 1 or max(ks) > d:
        raise InputError(
            f"need n >= 2, d >= 1, repeats >= 1 and 1 <= k <= d, got n={n}, d={d}, repeats={repeats}, k={ks}"
        )
    if signal and d < _SIGNAL_FEATURES:
        raise InputError(
            f"the signal sits in the first {_SIGNAL_FEATURES} features, so d must be at least that; got {d}"
        )
    if mechanism not in ("standard", "thresholdout", "gaussian"):
        raise InputError(f"mechanism must be standard, thresholdout or gaussian, got {mechanism!r}")
    tasks = [(n, d, ks, signal, mechanism, s) for s in seeds_for(seed, repeats)]
    runs = spread(_one, tasks, executor=executor)
    train, reported, fresh = (np.stack([run[i] for run in runs]) for i in range(3))
    return AttackResult(ks, train, reported, fresh)


def _one(
    n: int, d: int, ks: tuple[int, ...], signal: bool, mechanism: str, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    samples = [_sample(n, d, signal, rng) for _ in range(3)]
    correlations = [(y @ x) / n for x, y in samples]
    answered = _answers(correlations[0], correlations[1], n, mechanism, rng)
    level = 1 / math.sqrt(n)
    kept = (np.abs(correlations[0]) > level) & (np.abs(answered) > level) & (correlations[0] * answered > 0)
    strength = np.where(kept, np.abs(correlations[0]), -1.0)
    order = np.argsort(-strength, kind="stable")
    accuracies = np.empty((3, len(ks)))
    for column, k in enumerate(ks):
        chosen = order[:k]
        chosen = chosen[kept[chosen]]
        votes = np.zeros(d, dtype=np.float32)
        votes[chosen] = np.sign(correlations[0][chosen])
        for row, (x, y) in enumerate(samples):
            # an empty or tied vote is a fair coin: half a point
            accuracies[row, column] = ((np.sign(x @ votes) * y + 1) / 2).mean()
    reported = _answers(accuracies[0], accuracies[1], n, mechanism, rng)
    return accuracies[0], reported, accuracies[2]


def _sample(n: int, d: int, signal: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = rng.standard_normal((n, d), dtype=np.float32)
    y = (2 * rng.integers(0, 2, n) - 1).astype(np.float32)
    if signal:
        x[:, :_SIGNAL_FEATURES] += np.float32(_SIGNAL_STRENGTH / math.sqrt(n)) * y[:, None]
    return x, y


def _answers(train: np.ndarray, holdout: np.ndarray, n: int, mechanism: str, rng: np.random.Generator) -> np.ndarray:
    """What a mechanism with the published settings answers to many questions at once, from their two means."""
    noise = 1 / math.sqrt(n)
    if mechanism == "standard":
        return holdout
    if mechanism == "gaussian":
        return holdout + rng.normal(0.0, noise, len(holdout))
    threshold = 4 / math.sqrt(n) + rng.normal(0.0, noise, len(train))
    return np.where(np.abs(holdout - train) > threshold, holdout + rng.normal(0.0, noise, len(train)), train)
