"""How long a memory series need: what states of each time step still tell, read by ridge regression from windows."""

__all__ = ["MemoryScan", "memory_scan"]

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from theodolite.core.errors import DataError, InputError
from theodolite.core.estimate import Estimate, bootstrap
from theodolite.core.subject import Dataset, Rows
from theodolite.networks.hippo.discretize import zero_order_hold
from theodolite.networks.hippo.kernels import powers
from theodolite.networks.hippo.matrices import check_measure, hippo_matrix
from theodolite.networks.hippo.memory import ridge

_MEASURES: tuple[str, ...] = ("legs", "legt", "fout")
_ROWS = 3000
_CHANNELS = 8
_STATES = 32
_Pairs = tuple[np.ndarray, np.ndarray]
"""(error, reference) of each validation row and of each test row."""


@dataclass(frozen=True, eq=False)
class MemoryScan:
    """States at the end of each window, for every measure and memory length, and what a linear readout makes of them.

    recall and target (measure, memory): errors on the test rows. recall: of all lags of the window from each channel's own
    states, root mean square over the windows' spread around their mean by lag (1: the states tell nothing). target: of the
    data's target from all channels' states, the same ratio for a value, the share of wrong answers for a class.

    measure and memory_steps chosen have the smallest recall error on the validation rows; chosen_recall is theirs on the
    test rows. random_recall: of as many random frequencies, shuffled_recall: of the chosen measure on windows whose samples
    are in random order, both with their own best memory by the validation rows. needed: the shortest memory from
    which the target is told within one standard error of the best on the validation rows; 1 where the last value alone will
    do. needed_error and last_error: on the test rows, from that memory and from the last values; gain: how much smaller the
    first is, on the same rows. wanted: the grid's end was reached, so that longer windows may ask for more.
    """

    measures: tuple[str, ...]
    memory_steps: Float[np.ndarray, " memory"]
    n_state: int
    steps: int
    recall: Float[np.ndarray, "measure memory"]
    random: Float[np.ndarray, " memory"]
    target: Float[np.ndarray, "measure memory"]
    chosen: tuple[str, float]
    chosen_recall: Estimate
    random_recall: Estimate
    shuffled_recall: Estimate
    needed: float
    needed_measure: str | None
    needed_error: Estimate
    last_error: Estimate
    gain: Estimate
    wanted: bool


@dataclass(frozen=True, eq=False)
class _Part:
    x: np.ndarray  # (channels, n, steps), newest sample first, in units of the channel's training deviation
    y: np.ndarray  # (n, targets): values, or one column a class
    groups: np.ndarray | None


def memory_scan(
    data: Dataset,
    *,
    measures: Sequence[str] = _MEASURES,
    memory_steps: Sequence[float] | np.ndarray | None = None,
    n_state: int | None = None,
    seed: int = 0,
) -> MemoryScan:
    """Scan the memory of series: fit readouts on the training rows, choose on the validation rows, report on the test rows.

    n_state: states a channel; 32, or a quarter of the window where that is less, where left out. memory_steps: from 4 steps
    to twice the window by factors of sqrt 2 where left out. The first 8 channels and 3,000 rows of each part are read.
    Raises DataError for data that are not series, are constant or have a constant target in the training or the test rows, or
    have windows of fewer than 16 steps; InputError for an
    unknown measure, an odd n_state with fout, or memory_steps that are not positive.
    """
    if data.modality != "series" or data.train.x.ndim != 3:
        raise DataError(f"{data.name}: a memory is scanned on series (n, steps, channels); these are {data.modality}")
    steps = data.train.x.shape[1]
    if steps < 16:
        raise DataError(f"{data.name}: windows of {steps} steps are too short for a memory scan; use at least 16")
    states = min(_STATES, steps // 8 * 2) if n_state is None else n_state
    for measure in measures:
        check_measure(measure, states)
    if memory_steps is None:
        memory_steps = 4.0 * 2 ** (np.arange(1 + int(2 * np.log2(steps / 2))) / 2)
    grid = np.array(memory_steps, dtype=np.float64)
    if not len(grid) or not (np.isfinite(grid).all() and (grid > 0).all()) or not measures:
        raise InputError(f"need at least one measure and memory_steps that are positive, got {list(grid)}")
    classes = len(data.classes)
    scale = _scale(data)
    parts = [_part(rows, scale, classes) for rows in (data.train, data.validation, data.test)]
    for name, part in (("training", parts[0]), ("test", parts[2])):
        if not np.ptp(part.y, axis=0).any():
            raise DataError(f"{data.name}: the target is the same in all {name} rows, so no memory can be told to help")
    drawn = np.random.default_rng(seed)
    frequencies = -0.5 + 1j * np.exp(drawn.standard_normal(max(1, states // 2)))

    recalled: dict[str, list[_Pairs]] = {}
    told: dict[str, list[_Pairs]] = {}
    for m in measures:
        read = [_states(parts, _kernel(m, states, 1 / memory, steps)) for memory in grid]
        recalled[m] = [_recall(parts, found) for found in read]
        told[m] = [_target(parts, found, classes) for found in read]
    last = _target(parts, [part.x[:, :, :1] for part in parts], classes)
    best = min(measures, key=lambda m: min(_ratio(v) for v, _ in recalled[m]))
    place = int(np.argmin([_ratio(v) for v, _ in recalled[best]]))
    by_chance = [_diagonal_kernel(frequencies, 1 / memory, steps) for memory in grid]
    random_found = [_recall(parts, _states(parts, kernel)) for kernel in by_chance]
    mixed = [replace(part, x=drawn.permuted(part.x, axis=2)) for part in parts]
    mixed_found = [_recall(mixed, _states(mixed, _kernel(best, states, 1 / memory, steps))) for memory in grid]
    needed, needed_measure, at = _needed(told, last, grid, parts[1].groups)
    unit = "of the rows" if classes else "of the spread"

    measured = _share if classes else _ratio

    def gained(both: np.ndarray) -> float:
        return measured(both[:, 2:]) - measured(both[:, :2])

    def spread(pairs: np.ndarray, unit: str, share: bool = False) -> Estimate:
        return bootstrap(
            pairs, _share if share else _ratio, seed=seed, resamples=300, unit=unit, groups=parts[2].groups
        )

    return MemoryScan(
        measures=tuple(measures),
        memory_steps=grid,
        n_state=states,
        steps=steps,
        recall=np.array([[_ratio(t) for _, t in recalled[m]] for m in measures]),
        random=np.array([_ratio(t) for _, t in random_found]),
        target=np.array([[measured(t) for _, t in told[m]] for m in measures]),
        chosen=(best, float(grid[place])),
        chosen_recall=spread(recalled[best][place][1], "of the spread"),
        random_recall=spread(_best(random_found), "of the spread"),
        shuffled_recall=spread(_best(mixed_found), "of the spread"),
        needed=needed,
        needed_measure=needed_measure,
        needed_error=spread(at[1], unit, bool(classes)),
        last_error=spread(last[1], unit, bool(classes)),
        gain=bootstrap(
            np.concatenate([at[1], last[1]], axis=1),
            gained,
            seed=seed,
            resamples=300,
            unit=unit,
            groups=parts[2].groups,
        ),
        wanted=bool(needed >= grid.max() / 2),
    )


def _scale(data: Dataset) -> np.ndarray:
    """Deviation of each channel in the training rows; constant channels are left alone."""
    scale = data.train.x[:_ROWS, :, :_CHANNELS].double().numpy().std(axis=(0, 1))
    if not scale.max() > 0:
        raise DataError(f"{data.name}: the series are constant, so there is nothing to remember")
    return np.where(scale > 0, scale, 1.0)


def _part(rows: Rows, scale: np.ndarray, classes: int) -> _Part:
    rows = rows.head(_ROWS)
    x = rows.x[:, :, :_CHANNELS].double().numpy()[:, ::-1] / scale
    y = rows.y.numpy()
    target = np.eye(classes)[y] if classes else y.astype(np.float64)[:, None]
    groups = rows.blocks
    return _Part(np.ascontiguousarray(x.transpose(2, 0, 1)), target, groups)


def _kernel(measure: str, n_state: int, dt: float, steps: int) -> np.ndarray:
    """(steps, N): the states after a window are its samples, newest first, times this."""
    return powers(*zero_order_hold(*hippo_matrix(measure, n_state), dt), steps)


def _diagonal_kernel(eigenvalues: np.ndarray, dt: float, steps: int) -> np.ndarray:
    """The same of x' = diag(eigenvalues) x + u, real and imaginary parts side by side."""
    step = np.exp(eigenvalues * dt)
    table = (step - 1) / eigenvalues * step ** np.arange(steps)[:, None]
    return np.concatenate([table.real, table.imag], axis=1)


def _states(parts: Sequence[_Part], kernel: np.ndarray) -> list[np.ndarray]:
    """(channels, n, N) at the end of each window."""
    return [part.x @ kernel for part in parts]


def _recall(parts: Sequence[_Part], states: Sequence[np.ndarray]) -> _Pairs:
    """(squared error, squared deviation from the training mean) of each row, summed over lags and channels."""
    found = [np.zeros((len(part.y), 2)) for part in parts[1:]]
    for c, series in enumerate(parts[0].x):
        weights, intercept = ridge(states[0][c], series)
        mean = series.mean(axis=0)
        for part, known, pairs in zip(parts[1:], states[1:], found, strict=True):
            pairs[:, 0] += ((known[c] @ weights + intercept - part.x[c]) ** 2).sum(axis=1)
            pairs[:, 1] += ((part.x[c] - mean) ** 2).sum(axis=1)
    return found[0], found[1]


def _target(parts: Sequence[_Part], states: Sequence[np.ndarray], classes: int) -> _Pairs:
    """(error, reference) of each row: wrong and 1 for a class, squared error and deviation for a value."""
    flat = [np.concatenate(list(known), axis=1) for known in states]
    weights, intercept = ridge(flat[0], parts[0].y)
    found = []
    for part, known in zip(parts[1:], flat[1:], strict=True):
        answer = known @ weights + intercept
        if classes:
            wrong = answer.argmax(axis=1) != part.y.argmax(axis=1)
            found.append(np.stack([wrong.astype(np.float64), np.ones(len(wrong))], axis=1))
        else:
            found.append(np.concatenate([(answer - part.y) ** 2, (part.y - parts[0].y.mean(axis=0)) ** 2], axis=1))
    return found[0], found[1]


def _needed(
    told: dict[str, list[_Pairs]],
    last: _Pairs,
    grid: np.ndarray,
    groups: np.ndarray | None,
) -> tuple[float, str | None, _Pairs]:
    """The shortest memory whose validation errors are within one standard error of the best memory's, row by row."""
    ranked: list[tuple[float, str | None, _Pairs]] = [(1.0, None, last)]
    for name, found in told.items():
        for memory, pair in zip(grid, found, strict=True):
            ranked.append((float(memory), name, pair))
    best = min(ranked, key=lambda one: one[2][0][:, 0].mean())
    close = [one for one in ranked if _within(one[2][0][:, 0] - best[2][0][:, 0], groups)]
    shortest = min(one[0] for one in close)
    return min((one for one in close if one[0] == shortest), key=lambda one: one[2][0][:, 0].mean())


def _within(difference: np.ndarray, groups: np.ndarray | None) -> bool:
    if groups is not None:
        _, inverse = np.unique(groups, return_inverse=True)
        difference = np.bincount(inverse, difference) / np.bincount(inverse)
    return bool(difference.mean() <= difference.std() / np.sqrt(len(difference)))


def _best(found: list[_Pairs]) -> np.ndarray:
    """Test rows of the memory that is best on the validation rows."""
    return min(found, key=lambda pair: _ratio(pair[0]))[1]


def _ratio(pairs: np.ndarray) -> float:
    return float(np.sqrt(pairs[:, 0].sum() / max(float(pairs[:, 1].sum()), np.finfo(float).tiny)))


def _share(pairs: np.ndarray) -> float:
    return float(pairs[:, 0].mean())
