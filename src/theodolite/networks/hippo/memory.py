"""The recurrence over a series: its states, its past from them, and how well a linear readout recalls a delay."""

__all__ = ["DelayReadout", "HippoMemory", "recall_error", "ridge"]

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular
from sklearn.base import BaseEstimator, TransformerMixin

from theodolite.core.errors import DataError, InputError
from theodolite.networks.hippo.discretize import check_step, discretize
from theodolite.networks.hippo.kernels import basis, powers
from theodolite.networks.hippo.matrices import WINDOWED, check_measure, hippo_matrix

_BLOCK = 32
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class DelayReadout:
    """u_(t - delay) ~ intercept + states . weights, fitted on the first half of a series.

    error: root mean squared error on the other half, divided by that half's standard deviation.
    """

    delay: int
    weights: Float[np.ndarray, " n"]
    intercept: float
    error: float


class HippoMemory(TransformerMixin, BaseEstimator):
    """A fixed memory of the past of a series in n_state numbers a channel.

        fixed:    x_k = Abar x_(k-1) + Bbar u_k,  zero-order hold with the step dt = 1 / memory_steps
        stretch:  x_k = (I - A/2k)^-1 [(I + A/2k) x_(k-1) + B u_k / k],  legs only: all of the past, evenly

    memory_steps: samples that legt and fout hold, over which legs fades; give it or dt, and neither for stretch. `transform`
    starts from nothing and leaves the stream at the end of its series, from where `update` carries it on sample by sample
    (state_ (C, N), steps_ the number of samples seen). Nothing is learned, so `fit` only checks.

    Raises InputError for an unknown measure or scaling, a bad n_state, dt or memory_steps <= 0, both or neither of them;
    DataError for NaN, infinity or an empty series. Warns where dt is too coarse for the highest states.

    Source: Gu et al., 2022, arXiv:2206.12037; stretch: Gu et al., 2020, arXiv:2008.07669, section 3.

    >>> wave = np.sin(np.arange(400) / 20)
    >>> memory = HippoMemory("legt", 16, memory_steps=100)
    >>> states = memory.transform(wave)
    >>> states.shape, bool(abs(memory.reconstruct(states[-1], np.array([50]))[0, 0] - wave[-51]) < 0.01)
    ((400, 1, 16), True)
    """

    def __init__(
        self,
        measure: str = "legs",
        n_state: int = 64,
        dt: float | None = None,
        memory_steps: float | None = None,
        scaling: str = "fixed",
    ) -> None:
        self.measure = measure
        self.n_state = n_state
        self.dt = dt
        self.memory_steps = memory_steps
        self.scaling = scaling

    def fit(self, u: ArrayLike, y: object = None) -> "HippoMemory":
        """Check the parameters and the series."""
        self._step()
        self.n_features_in_ = _series(u).shape[1]
        return self

    def transform(self, u: ArrayLike) -> Float[np.ndarray, "time channel n"]:
        """States (T, C, N) after each sample of u (T,) or (T, C), from an empty memory."""
        values, step = _series(u), self._step()
        if step is None:
            states = _stretched(values, self.n_state)
        else:
            states = _blocked(*_system(self.measure, self.n_state, step), values)
        self.state_, self.steps_ = states[-1].copy(), len(values)
        return states

    def update(self, u_t: ArrayLike) -> Float[np.ndarray, "channel n"]:
        """The state (C, N) after one more sample, a number or (C,)."""
        sample, step = _series(np.atleast_1d(u_t)[None]), self._step()
        state = getattr(self, "state_", None)
        if state is None:
            state, self.steps_ = np.zeros((sample.shape[1], self.n_state)), 0
        if state.shape != (sample.shape[1], self.n_state):
            raise InputError(
                f"the stream has {state.shape[0]} channels of {state.shape[1]} states, this sample {sample.shape[1]} of "
                f"{self.n_state}; start another stream by transform or a new memory"
            )
        self.steps_ += 1
        if step is None:
            state = _stretched_step(state, sample[0], self.steps_)
        else:
            Abar, Bbar = _system(self.measure, self.n_state, step)
            state = state @ Abar.T + sample[0][:, None] * Bbar
        self.state_ = state
        return state.copy()

    def reconstruct(
        self, state: ArrayLike, lags: ArrayLike, *, elapsed: int | None = None
    ) -> Float[np.ndarray, "... lag"]:
        """The series ``lags`` samples before the newest (lag 0), rebuilt from states (..., N): (..., n_lags).

        A sample is held for one step, so lag s stands for the time (s + 1/2) dt. elapsed: for stretch, how many samples a
        state had seen; where left out, all that this memory has seen.
        Raises InputError for negative lags, and for lags that legt and fout (or the elapsed time) do not reach.
        """
        step, state = self._step(), np.asarray(state, dtype=np.float64)
        back = np.atleast_1d(np.asarray(lags, dtype=np.float64))
        if state.shape[-1:] != (self.n_state,):
            raise InputError(f"states must end in n_state = {self.n_state} numbers, got shape {state.shape}")
        if back.ndim != 1 or not np.isfinite(back).all() or (back < 0).any():
            raise InputError("lags must be a row of finite numbers of samples, at least 0")
        if step is None:
            seen = getattr(self, "steps_", 0) if elapsed is None else elapsed
            reach = float(seen)
        else:
            reach = 1 / step if self.measure in WINDOWED else np.inf
        if len(back) and back.max() + 1 > reach * (1 + 1e-9):
            raise InputError(
                f"lag {back.max():g} is not held: {'legs' if step is None else self.measure} reaches lags up to {reach - 1:g} "
                "samples here; ask for shorter lags or make the memory longer"
            )
        if step is None:  # evenly weighted, so the same polynomials as the window's, over all that was seen
            return state @ basis("legt", self.n_state, (back + 0.5) / max(reach, 1.0)).T
        return state @ basis(self.measure, self.n_state, (back + 0.5) * step).T

    def delay_readout(self, u: ArrayLike, delay: int) -> DelayReadout:
        """Ridge regression of u (T,) ``delay`` samples ago on the states now: fitted on the first half, told on the second.

        The penalty is 1e-6 of the states' mean square. Samples before the delay is first reached are left out.
        Raises InputError for a delay < 0 or a series shorter than 2 (delay + n_state).
        """
        values = _series(u)
        if values.shape[1] != 1:
            raise InputError(f"a delay is read from one series, got {values.shape[1]} channels")
        if delay < 0 or len(values) < 2 * (delay + self.n_state):
            raise InputError(
                f"need delay >= 0 and at least 2 (delay + n_state) = {2 * (max(delay, 0) + self.n_state)} samples, "
                f"got delay {delay} and {len(values)} samples"
            )
        states, past = self.transform(values)[delay:, 0], values[: len(values) - delay, 0]
        half = len(past) // 2
        weights, intercept = ridge(states[:half], past[:half, None])
        error = recall_error(states[half:] @ weights + intercept, past[half:, None])
        return DelayReadout(delay, weights[:, 0], float(intercept[0]), float(error[0]))

    def _step(self) -> float | None:
        """The checked time step; None for stretch."""
        check_measure(self.measure, self.n_state)
        if self.scaling not in ("fixed", "stretch"):
            raise InputError(f"there is no scaling {self.scaling!r}; there are fixed and stretch")
        if self.scaling == "stretch":
            if self.measure != "legs" or self.dt is not None or self.memory_steps is not None:
                raise InputError(
                    "scaling 'stretch' is for measure legs and has no time step: leave dt and memory_steps out"
                )
            return None
        if (self.dt is None) == (self.memory_steps is None):
            raise InputError("give either memory_steps, how many samples to remember, or dt = 1 / memory_steps")
        if self.memory_steps is not None and not (np.isfinite(self.memory_steps) and self.memory_steps > 0):
            raise InputError(f"memory_steps must be a positive number, got {self.memory_steps}")
        step = 1.0 / self.memory_steps if self.dt is None and self.memory_steps is not None else float(self.dt or 0.0)
        check_step(step)
        return step


@lru_cache(maxsize=32)
def _system(measure: str, n_state: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    return discretize(*hippo_matrix(measure, n_state), step)


def _series(u: ArrayLike) -> Float[np.ndarray, "time channel"]:
    given: Any = u
    try:
        values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"a series is rows of numbers, all of one length: {error}") from error
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise DataError(f"a series is (T,) or (T, channels) with at least one sample, got shape {np.shape(u)}")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"the series has {len(bad)} values that are NaN or infinite, the first at sample {bad[0][0]} of channel {bad[0][1]}; "
            "one would stay in the memory, so fill or cut them first"
        )
    return values


def _blocked(Abar: np.ndarray, Bbar: np.ndarray, u: np.ndarray) -> np.ndarray:
    """All states (T, C, N) from 0: within a block of samples one matrix product of its samples and the state before it.

    x_(k+i) = Abar^(i+1) x_(k-1) + sum_(j <= i) Abar^(i-j) Bbar u_(k+j), so that only the blocks' ends are carried on.
    """
    (length, channels), n = u.shape, len(Bbar)
    block = min(_BLOCK, length)
    impulse = powers(Abar, Bbar, block)
    table = np.zeros((n + block, block, n))
    carry = Abar.T
    for i in range(block):
        table[:n, i] = carry  # x_(k-1) @ (Abar^(i+1))'
        table[n : n + i + 1, i] = impulse[i::-1]
        carry = carry @ Abar.T
    blocks = length // block
    known = np.empty((channels, blocks, n + block))  # the state before each block, then its samples
    known[:, :, n:] = u[: blocks * block].reshape(blocks, block, channels).transpose(2, 0, 1)
    ends = _carried(table[:n, -1], known[:, :, n:] @ np.ascontiguousarray(table[n:, -1]))
    known[:, 0, :n], known[:, 1:, :n] = 0.0, ends[:, :-1]
    states = np.empty((length, channels, n))
    flat = table.reshape(n + block, block * n)
    if channels == 1:  # the product is written where it stays
        np.matmul(known[0], flat, out=states[: blocks * block].reshape(blocks, block * n))
    else:
        for c in range(channels):
            states[: blocks * block, c] = (known[c] @ flat).reshape(blocks * block, n)
    for k in range(blocks * block, length):
        states[k] = states[k - 1] @ Abar.T + u[k][:, None] * Bbar
    return states


def _carried(step: np.ndarray, force: np.ndarray) -> np.ndarray:
    """x_k = x_(k-1) step + force_k from 0, for force (C, K, N): runs of equal length side by side, then their ends alike."""
    channels, count, n = force.shape
    run = min(count, _BLOCK)
    runs = -(-count // run)
    local = np.zeros((channels, runs, run, n))
    local.reshape(channels, runs * run, n)[:, :count] = force
    for i in range(1, run):
        local[:, :, i] += local[:, :, i - 1] @ step
    if runs > 1:
        before = _carried(np.linalg.matrix_power(step, run), local[:, :, -1])[:, :-1]
        for i in range(run):
            before = before @ step
            local[:, 1:, i] += before
    return local.reshape(channels, runs * run, n)[:, :count]


def _stretched_step(state: np.ndarray, sample: np.ndarray, k: int) -> np.ndarray:
    """One step of the time-varying system by a triangular solve: state (C, N), sample (C,), k counts from 1."""
    A, B = hippo_matrix("legs", state.shape[1])
    eye = np.eye(len(B))
    right = state @ (eye + A / (2 * k)).T + np.outer(sample, B) / k
    return solve_triangular(eye - A / (2 * k), right.T, lower=True).T


def _stretched(u: np.ndarray, n_state: int) -> np.ndarray:
    """All states (T, C, N) of the time-varying system in O(T C N): one state after the other, over all of time at once.

    A is lower triangular with equal products below the diagonal, so with h = (n + 1)/2 and S_k = sum_(j < n) sqrt(2j+1) x_j(k)
        (k + h) x_n(k) = (k - h) x_n(k-1) + sqrt(2n+1) (u_k - (S_k + S_(k-1))/2),
    a recurrence in k of one number, solved by products and sums over stretches of time in which the products stay in range.
    """
    length, channels = u.shape
    states = np.empty((length, channels, n_state))
    first = min(length, n_state)  # up to here k - h may be 0 or negative: step by step
    state = np.zeros((channels, n_state))
    for k in range(first):
        state = states[k] = _stretched_step(state, u[k], k + 1)
    ratio = 2.0 ** min(1.0, 500.0 / n_state)
    while first < length:
        last = min(length, max(first + 1, int(first * ratio)))
        k = np.arange(first + 1, last + 1)[:, None]
        below = np.zeros((last - first + 1, channels))
        for n in range(n_state):
            root, h = np.sqrt(2.0 * n + 1), (n + 1) / 2
            product = np.cumprod((k - h) / (k + h), axis=0)
            force = root * (u[first:last] - (below[1:] + below[:-1]) / 2) / (k + h)
            x = product * (states[first - 1, :, n] + np.cumsum(force / product, axis=0))
            states[first:last, :, n] = x
            below[0] += root * states[first - 1, :, n]
            below[1:] += root * x
        first = last
    return states


def ridge(
    x: Float[np.ndarray, "row n"], y: Float[np.ndarray, "row target"]
) -> tuple[Float[np.ndarray, "n target"], Float[np.ndarray, " target"]]:
    """Weights and intercepts of least squares with a penalty of 1e-6 times the mean square of the centred x."""
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    centred = x - mean_x
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += _RIDGE * max(float(np.trace(gram)) / len(gram), np.finfo(float).tiny)
    weights = np.linalg.solve(gram, centred.T @ (y - mean_y))
    return weights, mean_y - mean_x @ weights


def recall_error(
    found: Float[np.ndarray, "row target"], true: Float[np.ndarray, "row target"]
) -> Float[np.ndarray, " target"]:
    """Root mean squared error of each column in units of its standard deviation; 1 is what the mean alone gives."""
    spread = true.std(axis=0)
    return np.sqrt(((found - true) ** 2).mean(axis=0)) / np.where(spread > 0, spread, 1.0)
