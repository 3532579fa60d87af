"""A table as series: in time order, cut into windows, each with the value that comes next; or one labelled series a row."""

__all__ = ["row_series", "table_series"]

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api import types

from theodolite.core.errors import DataError, InputError
from theodolite.core.loading.arrays import Arrays
from theodolite.core.loading.columns import Table, find_columns, fit_encoding
from theodolite.core.loading.images import check_size
from theodolite.core.loading.labels import find_target, numbers
from theodolite.core.loading.options import DataOptions, Wanted
from theodolite.core.loading.tables import Source
from theodolite.core.splits import time_blocks
from theodolite.core.subject import Dataset, Rows

_WINDOW = 96
_FEWEST = 10  # windows of a part
_UNEVEN = 1.5  # times the usual step: months differ by less
_UNITS = (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0), ("seconds", 1.0))


def table_series(name: str, source: Source, options: DataOptions, wanted: Wanted) -> Dataset:
    """Windows of a table in time order: x (n, window, channels), y the target column's next value.

    The target is the first channel. The first 60 % of the times train, the next 20 % select, the last 20 % report; no window
    reaches over such a border. Raises DataError for a target that is no number, times out of order, or too few rows.
    """
    if options.test is not None:
        raise InputError("--test cannot be given with --series: the last fifth of the times are the test rows")
    frame: Any = source.frame.set_axis([str(column) for column in source.frame.columns], axis=1)
    if not frame.columns.is_unique:
        raise DataError(f"{name} has several columns of one name; rename them")
    target = find_target(list(frame.columns), options)
    timed, when = _in_order(name, frame)
    table = find_columns(frame[[target, *(c for c in frame.columns if c not in (target, timed))]])
    if not table.columns or table.columns[0].name != target or table.columns[0].kind != "numeric":
        raise DataError(f"{name}: a forecast needs numbers in the column {target!r}")
    table, filled = _filled(name, table, options)
    if np.ptp(table.values[:, 0]) == 0:
        raise DataError(f"{name}: the target {target!r} has the same value at every time, so there is nothing to learn")
    window, total = options.window or _WINDOW, len(table.values)
    borders = _borders(name, total, window)
    standardise = options.scale == "standard" or (options.scale is None and not wanted.trained)
    encoding = fit_encoding(table, np.arange(borders["train"][1]), standardise=standardise)
    values = torch.from_numpy(encoding.encode(table.values))
    windows = total - len(borders) * window
    every = max(1, -(-windows // options.max_rows))
    check_size(windows // every * window * values.shape[1])
    parts = {part: _windows(values[a:b], window, every, options.seed) for part, (a, b) in borders.items()}
    notes = (
        *source.notes, *when, *table.notes, *filled,
        f"windows of {window} steps; the target is the next value of {target!r}",
        *((f"a window starts at every {every}th time, so that at most {options.max_rows:,} are kept",) if every > 1 else ()),
        *(("channels standardised with the mean and deviation of the training times",) if standardise else ()),
        "split by time: the first 60 % train, the next 20 % select, the last 20 % report",
    )  # fmt: skip
    data = Dataset(
        name, "series", "regression", parts["train"], parts["validation"], parts["test"], encoding.features, (),
        table.columns, notes,
    )  # fmt: skip
    return replace(
        data, notes=(*notes, f"answering with the last value has an R2 of {data.chance:.3f} on the test times")
    )


def row_series(name: str, source: Source, given: np.ndarray, options: DataOptions) -> Arrays:
    """Series of a table that holds one a row: all columns but the target, in their order, are its steps.

    given: (n,) whether a row is a test row. Raises DataError for a column that is not of numbers.
    """
    frame: Any = source.frame.set_axis([str(column) for column in source.frame.columns], axis=1)
    if not frame.columns.is_unique:
        raise DataError(f"{name} has several columns of one name; rename them")
    target = find_target(list(frame.columns), options)
    steps = [column for column in frame.columns if column != target]
    found = {column: numbers(frame[column]) for column in steps}
    texts = [column for column, values in found.items() if values is None]
    if texts or not steps:
        raise DataError(
            f"{name}: with --series and classes each row is one series and its columns are the steps, so they must hold numbers; "
            + (f"{', '.join(map(repr, texts[:5]))} do not" if texts else f"there is only {target!r}")
        )
    x = np.stack([values for values in found.values() if values is not None], axis=1)
    return Arrays(x, frame[target].to_numpy(dtype=object), given, source.notes)


def _in_order(name: str, frame: pd.DataFrame) -> tuple[str | None, tuple[str, ...]]:
    """The column that holds the times and notes on it, None where there is none (the rows are in order then); DataError where
    it goes back.
    """
    for column in frame.columns:
        times = frame[column]
        if types.is_string_dtype(times.dtype) or types.is_object_dtype(times.dtype):
            times = pd.to_datetime(times, errors="coerce", format="mixed")
        if types.is_datetime64_any_dtype(times.dtype) and bool(times.notna().all()):
            if not times.is_monotonic_increasing:
                row = int((times.diff() < pd.Timedelta(0)).to_numpy().argmax())
                raise DataError(f"{name}: the times in {column!r} go back at row {row + 1}; sort the rows by time")
            return column, (f"times are in column {column!r}", *_unevenness(column, times))
    return None, ()


def _unevenness(column: str, times: Any) -> tuple[str, ...]:
    """What a reader has to know of times that do not go by one step: windows count rows, not time."""
    steps = times.diff().dt.total_seconds().to_numpy()[1:]
    notes = list[str]()
    if repeated := int((steps == 0).sum()):
        notes.append(
            f"{repeated:,} rows have the time of the row before in {column!r}; of a table of several series give one at a time"
        )
    usual = float(np.median(steps)) if len(steps) else 0.0
    if 0 < usual * _UNEVEN < steps.max():
        notes.append(
            f"times in {column!r} are not evenly spaced: mostly {_span(usual)} apart, up to {_span(steps.max())} before row "
            f"{int(steps.argmax()) + 2:,}; windows count rows, so they reach across such gaps"
        )
    return tuple(notes)


def _span(seconds: float) -> str:
    unit, size = next((one for one in _UNITS if seconds >= one[1]), _UNITS[-1])
    count = f"{seconds / size:.3g}"
    return f"{count} {unit.removesuffix('s') if count == '1' else unit}"


def _filled(name: str, table: Table, options: DataOptions) -> tuple[Table, tuple[str, ...]]:
    """The table without gaps: each value that is missing is the last one before it, or the first of all; and a note."""
    gone = {column.name: column.missing for column in table.columns if column.missing}
    if not gone:
        return table, ()
    shown = ", ".join(f"{column!r} in {count:,}" for column, count in list(gone.items())[:6])
    if options.missing != "last":
        raise DataError(
            f"{name}: missing, of {len(table.values):,} times: {shown}; no time of a series can be left out, "
            "--missing last carries the value before on"
        )
    values = pd.DataFrame(table.values).ffill().bfill().to_numpy()
    return replace(table, values=values), (f"missing values filled in with the value before ({shown})",)


def _borders(name: str, total: int, window: int) -> dict[str, tuple[int, int]]:
    cuts = [0, round(total * 0.6), round(total * 0.8), total]
    if min(b - a for a, b in pairwise(cuts)) < window + _FEWEST:
        raise DataError(
            f"{name} has {total:,} times; each of its three parts (60, 20 and 20 % of them) needs {window} for a window "
            f"and {_FEWEST} more: give more rows or a smaller --window"
        )
    return dict(zip(("train", "validation", "test"), pairwise(cuts), strict=True))


def _windows(values: torch.Tensor, window: int, every: int, seed: int) -> Rows:
    """Windows (n, window, channels) in random order with the first channel's next value; a window's length of neighbours
    is one group.
    """
    x = values.unfold(0, window, 1)[:-1].transpose(1, 2)
    y, groups = values[window:, 0], torch.from_numpy(time_blocks(len(x), window))
    order = torch.arange(0, len(x), every)
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    return Rows(x[order].contiguous(), y[order].contiguous(), groups[order])
