"""Inputs as people read them: every input is a row of slots with one discrete value each, whatever the model takes.

A table has a slot for each feature, numeric ones cut at their quartiles; a text has a slot for each word. What a reader sees,
what is perturbed and what an explanation names are (slot, value) pairs, numbered as the columns of a one-hot code.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (Section 4, Appendix A).
"""

__all__ = ["Domain", "TableDomain", "TextDomain"]

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.sparse.linalg import svds

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks

Codes = Int[np.ndarray, "row slot"]
Picked = Int[np.ndarray, "row pick"]
_NEIGHBOURS, _RAREST, _DIMENSIONS, _WINDOW = 10, 3, 50, 2


class Domain(ABC):
    """What tables and texts have in common. width: number of one-hot columns; -1 is the code of an empty slot.

    one_by_one: whether `background` draws each slot on its own, whatever the others are.
    """

    one_by_one: bool
    width: int
    names: tuple[str, ...]

    @abstractmethod
    def encode(self, rows: Any) -> Codes:
        """Codes of raw rows."""

    @abstractmethod
    def columns(self, codes: Codes) -> Codes:
        """The one-hot column of each slot's value, -1 where there is none."""

    @abstractmethod
    def realise(self, codes: Codes, row: Any, rng: np.random.Generator | None = None) -> Any:
        """What the model takes: ``row`` (one raw input) with those values replaced that ``codes`` changes.

        A bin stands for its median. With ``rng`` every number, also of ``row``, is drawn from the bin that it lies in.
        """

    @abstractmethod
    def changeable(self, codes: Int[np.ndarray, " slot"]) -> Int[np.ndarray, " changeable"]:
        """Slots that have another value to take."""

    @abstractmethod
    def others(self, slots: Picked, codes: Int[np.ndarray, " slot"], rng: np.random.Generator) -> Picked:
        """Another value for each of ``slots`` of one input."""

    @abstractmethod
    def background(
        self, codes: Int[np.ndarray, " slot"], keep: Bool[np.ndarray, "row slot"], rng: np.random.Generator
    ) -> Codes:
        """An input for each row of ``keep``: kept slots have their value, others are drawn as inputs come (a text: near it)."""

    @abstractmethod
    def switched(self, codes: Int[np.ndarray, " slot"], n: int, rng: np.random.Generator) -> Codes:
        """Inputs around one for a local surrogate: values drawn one by one as they come (a text: words left out)."""

    @abstractmethod
    def show(self, codes: Int[np.ndarray, " slot"]) -> str:
        """One input in words."""

    @abstractmethod
    def change(self, before: Int[np.ndarray, " slot"], after: Int[np.ndarray, " slot"]) -> str:
        """What differs between two inputs, a line each."""

    def in_order(self, row: Any) -> Any:
        """One raw input with its values where the domain has them; InputError where there are too few or too many."""
        return row

    def one_hot(self, codes: Codes) -> Float[np.ndarray, "row column"]:
        """1 in the columns of the values that a row has."""
        columns = self.columns(codes)
        out = np.zeros((len(codes), self.width + 1))
        np.put_along_axis(out, np.where(columns < 0, self.width, columns), 1.0, axis=1)
        return out[:, : self.width]

    def perturb(self, codes: Int[np.ndarray, " slot"], n: int, rng: np.random.Generator, *, most: int = 3) -> Codes:
        """n inputs in which 1 to ``most`` slots, chosen uniformly, take another value; no loop over samples."""
        free = self.changeable(codes)
        if not len(free):
            raise DataError("no slot of this input has another value, so it cannot be perturbed")
        most = min(most, len(free))
        picked = np.empty((n, most), dtype=np.int64)
        for i in range(most):  # each next one among those left, shifted past those taken
            drawn = rng.integers(0, len(free) - i, n)
            for taken in np.sort(picked[:, :i], axis=1).T:
                drawn += drawn >= taken
            picked[:, i] = drawn
        slots = free[picked]
        new = self.others(slots, codes, rng)
        count = rng.integers(1, most + 1, n)
        out = np.tile(codes, (n, 1))
        for i in range(most):
            on = np.flatnonzero(count > i)
            out[on, slots[on, i]] = new[on, i]
        return out

    def holds(self, rule: Sequence[int], codes: Codes) -> Bool[np.ndarray, " row"]:
        """Whether every column of ``rule`` is among those of a row."""
        columns = self.columns(codes)
        found = np.ones(len(codes), dtype=bool)
        for column in rule:
            found &= (columns == column).any(axis=1)
        return found


class TableDomain(Domain):
    """A table: numeric columns cut at their quartiles, categorical ones by value.

    rows: (n, features) array or data frame. categorical: names or positions of columns whose values are kinds, not amounts.
    Raises DataError for text columns that are not among them, and for missing values.
    """

    one_by_one = False  # other values come from one row of the table, and hang together as they do there

    def __init__(self, rows: Any, feature_names: Sequence[str], categorical: Sequence[str | int] | None) -> None:
        table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(np.asarray(rows))
        self._frame = list(rows.columns) if isinstance(rows, pd.DataFrame) else None
        self._dtype = np.asarray(rows).dtype if self._frame is None else None
        self.features = tuple(map(str, feature_names))
        if len(self.features) != table.shape[1] or len(set(self.features)) != len(self.features):
            raise InputError(
                f"feature_names must be {table.shape[1]} different names, one a column, got {list(feature_names)}"
            )
        kinds = self._categorical(categorical)
        self._numeric = np.array([i not in kinds for i in range(len(self.features))])
        self._edges: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._members: list[list[np.ndarray]] = []
        levels: list[list[str]] = []
        for i, name in enumerate(self.features):
            column = table.iloc[:, i]
            if column.isna().any():
                raise DataError(
                    f"column {name!r} has {int(column.isna().sum())} missing values; fill or drop them first"
                )
            if self._numeric[i]:
                numbers = self._as_numbers(column, name)
                edges = np.unique(np.quantile(numbers, [0.25, 0.5, 0.75], method="lower"))
                edges = edges[edges < numbers.max()]
                bins = np.searchsorted(edges, numbers, side="left")
                self._members.append([numbers[bins == b] for b in range(len(edges) + 1)])
                self._edges.append(edges)
                self._values.append(
                    np.array([np.quantile(numbers[bins == b], 0.5, method="lower") for b in range(len(edges) + 1)])
                )
                levels.append(_bins(edges))
            else:
                values = np.array(sorted(column.unique(), key=str), dtype=object)
                self._edges.append(np.empty(0))
                self._members.append([])
                self._values.append(values)
                levels.append([str(value) for value in values])
        self.levels = tuple(map(tuple, levels))
        self._count = np.array([len(names) for names in levels])
        self._start = np.concatenate([[0], np.cumsum(self._count)[:-1]])
        self.width = int(self._count.sum())
        self.names = tuple(f"{f} = {v}" for f, names in zip(self.features, levels, strict=True) for v in names)
        self._pool = self.encode(rows)
        self._last: tuple[tuple[Any, ...], np.ndarray] | None = None
        if self._dtype is not None and self._dtype.kind in "fiub":
            self._values = [values.astype(self._dtype) for values in self._values]

    def _categorical(self, given: Sequence[str | int] | None) -> set[int]:
        found = set()
        for one in given or ():
            if isinstance(one, str) and one in self.features:
                found.add(self.features.index(one))
            elif not isinstance(one, str) and 0 <= int(one) < len(self.features):
                found.add(int(one))
            else:
                raise InputError(f"categorical names {one!r}, which is no column; there are {list(self.features)}")
        return found

    def _as_numbers(self, column: pd.Series, name: str) -> np.ndarray:
        try:
            numbers = column.to_numpy(dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"column {name!r} holds text; list it in categorical=[{name!r}, ...] if its values are kinds"
            ) from error
        if not np.isfinite(numbers).all():
            raise DataError(f"column {name!r} holds values that are not finite")
        return numbers

    def encode(self, rows: Any) -> Codes:
        """Codes of raw rows."""
        table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(np.asarray(rows))
        if table.shape[1] != len(self.features):
            raise InputError(f"rows must have {len(self.features)} columns, got {table.shape[1]}")
        out = np.empty(table.shape, dtype=np.int64)
        for i, name in enumerate(self.features):
            column = table.iloc[:, i]
            if self._numeric[i]:
                out[:, i] = np.searchsorted(self._edges[i], self._as_numbers(column, name), side="left")
                continue
            found = pd.Index(self._values[i]).get_indexer(pd.Index(column.to_numpy(dtype=object)))
            if (found < 0).any():
                raise DataError(
                    f"column {name!r} has a value that was not there before: {column.iloc[int(found.argmin())]!r}"
                )
            out[:, i] = found
        return out

    def columns(self, codes: Codes) -> Codes:
        """The one-hot column of each value."""
        return self._start + codes

    def realise(self, codes: Codes, row: Any, rng: np.random.Generator | None = None) -> Any:
        """Rows that the model takes."""
        kind = object if self._frame is not None or self._dtype is None else self._dtype
        raw = np.asarray(row, dtype=kind).ravel()
        own = self._own(raw)
        out = np.empty(codes.shape, dtype=kind)
        for i, values in enumerate(self._values):
            out[:, i] = np.where(codes[:, i] == own[i], raw[i], values[codes[:, i]])
            if rng is not None:
                for b, members in enumerate(self._members[i]):
                    here = np.flatnonzero(codes[:, i] == b)
                    out[here, i] = members[rng.integers(0, len(members), len(here))]
        return self._like(out)

    def _own(self, raw: np.ndarray) -> np.ndarray:
        """Codes of one raw input, which is asked about many times in a row."""
        key = tuple(raw.tolist())
        if self._last is None or self._last[0] != key:
            self._last = (key, self.encode(self.as_rows([raw]))[0])
        return self._last[1]

    def in_order(self, row: Any) -> Any:
        """One raw input with its values where the table has them."""
        if isinstance(row, pd.DataFrame) and len(row) == 1:
            row = row.iloc[0]
        if isinstance(row, pd.Series) and set(self.features) <= set(map(str, row.index)):
            row = row.rename(index=str)[list(self.features)]
        if np.size(row) != len(self.features):
            raise InputError(f"an input has {len(self.features)} values, got {np.size(row)}")
        return row

    def as_rows(self, rows: Sequence[Any]) -> Any:
        """Single raw rows as the model takes them."""
        return self._like(np.array([np.asarray(row, dtype=object).ravel() for row in rows], dtype=object))

    def _like(self, values: np.ndarray) -> Any:
        if self._frame is not None:
            return pd.DataFrame(values, columns=self._frame).infer_objects()
        return values.astype(self._dtype)

    def changeable(self, codes: Int[np.ndarray, " slot"]) -> Int[np.ndarray, " changeable"]:
        """Slots with another value."""
        return np.flatnonzero(self._count > 1)

    def others(self, slots: Picked, codes: Int[np.ndarray, " slot"], rng: np.random.Generator) -> Picked:
        """Another value for each slot."""
        count = self._count[slots]
        return (codes[slots] + 1 + (rng.random(slots.shape) * (count - 1)).astype(np.int64)) % count

    def background(
        self, codes: Int[np.ndarray, " slot"], keep: Bool[np.ndarray, "row slot"], rng: np.random.Generator
    ) -> Codes:
        """Inputs that keep some values."""
        return np.where(keep, codes, self._pool[rng.integers(0, len(self._pool), len(keep))])

    def switched(self, codes: Int[np.ndarray, " slot"], n: int, rng: np.random.Generator) -> Codes:
        """Inputs around one."""
        drawn = rng.integers(0, len(self._pool), (n, len(codes)))
        return np.take_along_axis(self._pool, drawn, axis=0)

    def show(self, codes: Int[np.ndarray, " slot"]) -> str:
        """One input in words."""
        return "\n".join(self.names[c] for c in self.columns(codes[None])[0])

    def change(self, before: Int[np.ndarray, " slot"], after: Int[np.ndarray, " slot"]) -> str:
        """What differs, a line each."""
        return "\n".join(
            f"{self.features[i]}: {self.levels[i][before[i]]} -> {self.levels[i][after[i]]}"
            for i in np.flatnonzero(before != after)
        )


def _bins(edges: np.ndarray) -> list[str]:
    ends = [f"{edge:.4g}" for edge in edges]
    if not ends:
        return ["any"]
    between = [f"over {low}, up to {high}" for low, high in itertools.pairwise(ends)]
    return [f"up to {ends[0]}", *between, f"over {ends[-1]}"]


class TextDomain(Domain):
    """Texts as words. A word's other values are its nearest neighbours by the company that words keep in the texts.

    Neighbours: cosine of 50 singular vectors of the positive pointwise mutual information in a window of 2 words; words seen
    less than 3 times have none and stay.
    """

    one_by_one = True

    def __init__(self, texts: Sequence[str]) -> None:
        split = [words(text) for text in texts]
        self.names = tuple(sorted({word for text in split for word in text}))
        self.width = len(self.names)
        self._words = np.array([*self.names, ""], dtype=object)
        self._place = {word: i for i, word in enumerate(self.names)}
        self._near = self._neighbours(split)

    def _neighbours(self, split: Sequence[Sequence[str]]) -> Codes:
        rows, columns, seen = [], [], np.zeros(self.width, dtype=np.int64)
        for text in split:
            codes = [self._place[word] for word in text]
            np.add.at(seen, codes, 1)
            for step in range(1, _WINDOW + 1):
                rows += codes[:-step] + codes[step:]
                columns += codes[step:] + codes[:-step]
        near = np.full((self.width, _NEIGHBOURS), -1)
        known = np.flatnonzero(seen >= _RAREST)
        if len(known) <= _NEIGHBOURS:
            return near
        together = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(self.width, self.width))
        together = together[known][:, known].tocoo()
        totals = np.maximum(np.asarray(together.sum(axis=1)).ravel(), 1)
        mutual = np.log(together.data * totals.sum() / (totals[together.row] * totals[together.col]))
        kept = mutual > 0
        matrix = sparse.csr_matrix((mutual[kept], (together.row[kept], together.col[kept])), shape=together.shape)
        k = min(_DIMENSIONS, len(known) - 1)
        left, size, _ = svds(matrix, k=k, v0=np.ones(len(known)))
        vectors = left * np.sqrt(size)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        for part in chunks(len(known), 16.0 * len(known)):
            cosine = vectors[part] @ vectors.T
            cosine[np.arange(len(cosine)), np.arange(len(known))[part]] = -np.inf
            near[known[part]] = known[np.argsort(-cosine, axis=1, kind="stable")[:, :_NEIGHBOURS]]
        return near

    def encode(self, rows: Any) -> Codes:
        """Codes of raw rows."""
        split = [words(text) for text in rows]
        out = np.full((len(split), max(map(len, split), default=0)), -1)
        for i, text in enumerate(split):
            out[i, : len(text)] = [self._place.get(word, -2) for word in text]
        return out

    def columns(self, codes: Codes) -> Codes:
        """The one-hot column of each value."""
        return np.maximum(codes, -1)

    def realise(self, codes: Codes, row: Any, rng: np.random.Generator | None = None) -> list[str]:
        """Rows that the model takes."""
        text = np.array(words(row), dtype=object)
        own, codes = self.encode([row])[0], codes[:, : len(text)]
        pieces = np.where(codes == own, text, self._words[codes])
        if (codes != -1).all():
            return [" ".join(line) for line in pieces]
        return [" ".join(line[there]) for line, there in zip(pieces, codes != -1, strict=True)]

    def changeable(self, codes: Int[np.ndarray, " slot"]) -> Int[np.ndarray, " changeable"]:
        """Slots with another value."""
        return np.flatnonzero((codes >= 0) & (self._near[codes, 0] >= 0))

    def others(self, slots: Picked, codes: Int[np.ndarray, " slot"], rng: np.random.Generator) -> Picked:
        """Another value for each slot."""
        return self._near[codes[slots], rng.integers(0, _NEIGHBOURS, slots.shape)]

    def background(
        self, codes: Int[np.ndarray, " slot"], keep: Bool[np.ndarray, "row slot"], rng: np.random.Generator
    ) -> Codes:
        """Inputs that keep some values."""
        out, free = np.tile(codes, (len(keep), 1)), self.changeable(codes)
        new = self.others(np.tile(free, (len(keep), 1)), codes, rng)
        out[:, free] = np.where((rng.random(new.shape) < 0.5) & ~keep[:, free], new, out[:, free])
        return out

    def switched(self, codes: Int[np.ndarray, " slot"], n: int, rng: np.random.Generator) -> Codes:
        """Inputs around one."""
        used = np.unique(codes[codes >= 0])
        share = rng.random((n, 1))
        gone = rng.random((n, len(used))) < share
        place = np.searchsorted(used, np.maximum(codes, used[0] if len(used) else 0))
        return np.where((codes >= 0) & gone[:, np.minimum(place, len(used) - 1)], -1, codes)

    def show(self, codes: Int[np.ndarray, " slot"]) -> str:
        """One input in words."""
        return " ".join(self.names[c] if c >= 0 else "?" for c in codes if c != -1)

    def change(self, before: Int[np.ndarray, " slot"], after: Int[np.ndarray, " slot"]) -> str:
        """What differs, a line each."""
        return "\n".join(
            f"{self.names[before[i]] if before[i] >= 0 else '?'} -> {self.names[after[i]] if after[i] >= 0 else '(left out)'}"
            for i in np.flatnonzero(before != after)
        )


def words(text: str) -> list[str]:
    """Words and marks of a text, in lower case."""
    if not isinstance(text, str):
        raise DataError(f"a text must be a string, got {type(text).__name__}")
    return re.findall(r"[\w'-]+|[^\w\s]", text.lower())
