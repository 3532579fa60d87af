"""Columns of a table: what kind each is, its missing values, and the numbers that a model takes."""

__all__ = ["Encoding", "Table", "find_columns", "fit_encoding"]

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from pandas.api import types

from theodolite.core.errors import DataError
from theodolite.core.loading.labels import class_name, numbers
from theodolite.core.subject import Column

_LARGEST = 1e30  # beyond this a float32 network overflows
_EXACT = 2**24  # whole numbers up to here are exact in float32


@dataclass(frozen=True, eq=False)
class Table:
    """Usable columns with their values (n, columns): a number, 0 or 1, or the number of the level; NaN where missing."""

    columns: tuple[Column, ...]
    values: Float[np.ndarray, "row column"]
    left_out: dict[str, str]
    notes: tuple[str, ...]


def find_columns(frame: pd.DataFrame) -> Table:
    """Kind, levels and values of every column; a column that is neither numbers nor categories is left out, with why."""
    columns, values, left_out, notes = list[Column](), list[np.ndarray](), dict[str, str](), list[str]()
    for position, name in enumerate(map(str, frame.columns)):
        series = frame.iloc[:, position]
        why, found, levels = _read_column(name, series)
        if why:
            left_out[name] = why
            continue
        infinite = np.isinf(found)
        if infinite.any():
            notes.append(f"column {name!r}: {int(infinite.sum())} infinite values count as missing")
            found[infinite] = np.nan
        missing = int(np.isnan(found).sum())
        if missing == len(found):
            left_out[name] = "empty"
            continue
        largest = float(np.nanmax(np.abs(found)))
        if largest > _LARGEST:
            raise DataError(f"column {name!r} has values up to {largest:.3g}; rescale it below {_LARGEST:.0e}")
        if not levels and largest > _EXACT and _whole(found):
            notes.append(f"column {name!r} has whole numbers up to {largest:.0f}; they are kept to 7 digits")
        kind = "numeric" if not levels else "boolean" if levels == ("False", "True") else "category"
        columns.append(Column(name, kind, missing, levels))
        values.append(found)
    if left_out:
        shown = [f"{name!r} ({why})" for name, why in left_out.items()]
        notes.append(f"columns left out: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}")
    table = np.stack(values, axis=1) if values else np.empty((len(frame), 0))
    return Table(tuple(columns), table, left_out, tuple(notes))


def _read_column(name: str, series: pd.Series) -> tuple[str, np.ndarray, tuple[str, ...]]:
    """(why the column cannot be used or "", values, levels)."""
    nothing = np.empty(0)
    found = numbers(series)
    if found is not None:
        unnamed = name.lower().startswith("unnamed") or name.startswith("__index_level_")
        counts = len(found) > 20 and len(np.unique(found)) == len(found) and _whole(found)
        return ("a row number", nothing, ()) if unnamed and counts else ("", found.copy(), ())
    if types.is_datetime64_any_dtype(series.dtype) or types.is_timedelta64_dtype(series.dtype):
        return "a time", nothing, ()
    there = series.notna()
    cells: Any = series[there].astype(object)
    if cells.map(_nested).any():
        return "nested or binary values", nothing, ()
    codes, uniques = pd.factorize(cells.map(class_name), sort=True)
    lowered = {level.lower() for level in uniques}
    if lowered and lowered <= {"true", "false"}:
        values = np.array([level.lower() == "true" for level in uniques], dtype=float)[codes]
        levels = ("False", "True")
    else:
        at_most = min(200, max(20, len(series) // 5))
        if len(uniques) > at_most:
            return f"{len(uniques)} different texts", nothing, ()
        values, levels = codes.astype(float), tuple(uniques)
    out = np.full(len(series), np.nan)
    out[there.to_numpy()] = values
    return "", out, levels


def _whole(values: np.ndarray) -> bool:
    there = values[np.isfinite(values)]
    return bool((there == np.round(there)).all())


def _nested(cell: object) -> bool:
    return isinstance(cell, (list, dict, tuple, set, bytes, np.ndarray, complex))


@dataclass(frozen=True, eq=False)
class Encoding:
    """How columns become the features of a model: numbers shifted and scaled, a category one feature per level."""

    columns: tuple[Column, ...]
    fill: Float[np.ndarray, " column"]
    shift: Float[np.ndarray, " column"]
    scale: Float[np.ndarray, " column"]

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Names of the features: the column's, or "column=level"."""
        return tuple(feature for column in self.columns for feature in column.features)

    @cached_property
    def scaling(self) -> tuple[tuple[float, float], ...]:
        """(shift, scale) of each feature; (0, 1) for the levels of a category."""
        return tuple(
            (float(shift), float(scale)) if column.kind != "category" else (0.0, 1.0)
            for column, shift, scale in zip(self.columns, self.shift, self.scale, strict=True)
            for _ in (column.levels if column.kind == "category" else ("",))
        )

    @cached_property
    def _starts(self) -> Int[np.ndarray, " column"]:
        widths = [len(c.levels) if c.kind == "category" else 1 for c in self.columns]
        return np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(np.int64)

    @cached_property
    def _categories(self) -> Int[np.ndarray, " category"]:
        return np.flatnonzero([column.kind == "category" for column in self.columns])

    def encode(self, values: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row feature"]:
        """Features (n, features) float32 of values as a `Table` holds them."""
        values = np.where(np.isnan(values), self.fill, values)
        out = np.zeros((len(values), len(self.features)), dtype=np.float32)
        plain = np.setdiff1d(np.arange(len(self.columns)), self._categories)
        out[:, self._starts[plain]] = (values[:, plain] - self.shift[plain]) / self.scale[plain]
        for column in self._categories:
            out[np.arange(len(values)), self._starts[column] + values[:, column].astype(np.int64)] = 1
        return out

    def decode(self, x: np.ndarray) -> pd.DataFrame:
        """The columns as the file has them, of features (n, features): a category is the level of the largest feature."""
        columns = dict[str, np.ndarray]()
        for i, column in enumerate(self.columns):
            start = self._starts[i]
            if column.kind == "category":
                best = x[:, start : start + len(column.levels)].argmax(axis=1)
                columns[column.name] = np.array(column.levels, dtype=object)[best]
            elif column.kind == "boolean":
                columns[column.name] = x[:, start] > 0.5
            else:
                columns[column.name] = x[:, start].astype(np.float64) * self.scale[i] + self.shift[i]
        return pd.DataFrame(columns)


def fit_encoding(table: Table, train: Int[np.ndarray, " row"], *, standardise: bool) -> Encoding:
    """An encoding of ``table`` whose medians, commonest levels, means and deviations are those of the training rows."""
    rows = table.values[train]
    for i, column in enumerate(table.columns):
        if np.isnan(rows[:, i]).all():
            raise DataError(f"column {column.name!r} has no value in the training rows, so none can be filled in")
    fill = np.nanmedian(rows, axis=0)
    for i, column in enumerate(table.columns):
        if column.levels:
            fill[i] = np.bincount(rows[~np.isnan(rows[:, i]), i].astype(np.int64)).argmax()
    shift, scale = np.zeros(len(fill)), np.ones(len(fill))
    if standardise:
        filled = np.where(np.isnan(rows), fill, rows)
        numeric = np.array([not column.levels for column in table.columns])
        moves = filled.max(axis=0) > filled.min(axis=0)  # the mean of a constant is off by rounding
        shift = np.where(numeric, np.where(moves, filled.mean(axis=0), filled[0]), 0.0)
        scale = np.where(numeric & moves, np.maximum(filled.std(axis=0), 1e-30), 1.0)
    encoding = Encoding(table.columns, fill, shift, scale)
    if len(set(encoding.features)) < len(encoding.features):
        twice = next(name for i, name in enumerate(encoding.features) if name in encoding.features[:i])
        raise DataError(f"two features would be called {twice!r}; rename the column")
    return encoding
