"""Tables from files: CSV, TSV, Parquet and JSON Lines, read in a stream, a uniform sample of the rows kept."""

__all__ = ["Source", "read_table", "sample_rows"]

import csv
import gzip
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from theodolite.core.errors import DataError
from theodolite.core.loading.labels import TARGET_NAMES
from theodolite.core.loading.options import DataOptions

_SNIFF = 1 << 16
_CELLS = 500_000  # cells of a CSV that are in memory as text at a time
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


@dataclass(frozen=True, eq=False)
class Source:
    """Rows of a table as they were found, before anything is encoded."""

    frame: pd.DataFrame
    notes: tuple[str, ...] = ()


def read_table(path: Path, options: DataOptions) -> Source:
    """At most ``options.max_rows`` rows of a table file, drawn uniformly and in the file's order."""
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            return _read_parquet(path, options)
        if suffix in (".jsonl", ".ndjson", ".json"):
            return _read_json_lines(path, options)
        return _read_csv(path, options)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


class _Reservoir:
    """A uniform sample without replacement of rows that come in blocks: the rows with the smallest random keys stay."""

    def __init__(self, options: DataOptions) -> None:
        self._random = np.random.default_rng(options.seed)
        self._size = options.max_rows
        self._keys = np.empty(0)
        self.seen = 0

    def choose(self, block: int) -> np.ndarray:
        """Positions, in [rows kept so far, block of new rows], of the rows to keep; ascending."""
        self.seen += block
        keys = np.concatenate([self._keys, self._random.random(block)])
        kept = np.arange(len(keys))
        if len(keys) > self._size:
            kept = np.sort(np.argpartition(keys, self._size)[: self._size])
        self._keys = keys[kept]
        return kept

    def notes(self) -> tuple[str, ...]:
        if self.seen <= self._size:
            return ()
        return (f"{self._size:,} of {self.seen:,} rows, drawn uniformly (--max-rows)",)


def sample_rows(count: int, options: DataOptions) -> tuple[np.ndarray, tuple[str, ...]]:
    """Ascending positions of at most ``max_rows`` of ``count`` rows, with a note where rows were left out."""
    reservoir = _Reservoir(options)
    return reservoir.choose(count), reservoir.notes()


@dataclass(frozen=True)
class _Dialect:
    """How a text table is written."""

    separator: str
    encoding: str
    header: bool
    names: list[str]


def _read_csv(path: Path, options: DataOptions) -> Source:
    dialect = _sniff(path, options)
    kept: Any = pd.DataFrame(columns=dialect.names, dtype="str")
    reservoir = _Reservoir(options)
    try:
        with warnings.catch_warnings(), _open(path) as file:
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a line with too many fields would lose them
            blocks: Iterator[pd.DataFrame] = pd.read_csv(
                file,
                sep=r"\s+" if dialect.separator == " " else dialect.separator,
                header=None,
                names=dialect.names,
                skiprows=int(dialect.header),
                index_col=False,
                dtype="str",
                na_values=["?"],
                skipinitialspace=True,
                encoding=dialect.encoding,
                chunksize=max(1_000, _CELLS // len(dialect.names)),
            )
            for block in blocks:
                kept = pd.concat([kept, block]).iloc[reservoir.choose(len(block))]
    except (ValueError, EOFError) as error:  # pandas' own errors are ValueErrors, a cut .gz is an EOFError
        raise DataError(f"{path} is not a table that can be read: {str(error).strip()}") from error
    except pd.errors.ParserWarning as error:
        raise DataError(f"{path} has lines with more than {len(dialect.names)} fields, its first line's") from error
    stripped = kept.reset_index(drop=True).apply(lambda column: column.str.strip())
    notes = () if dialect.encoding != "latin-1" else ("the file is not UTF-8; it was read as Latin-1",)
    return Source(stripped.mask(stripped == ""), (*notes, *reservoir.notes()))


def _sniff(path: Path, options: DataOptions) -> _Dialect:
    """Encoding, separator, whether there is a header, and the names of the columns, from the first 64 KiB."""
    try:
        with _open(path) as file:
            head = file.read(_SNIFF)
    except EOFError as error:
        raise DataError(f"{path} ends in the middle: {error}") from error
    if _CONTROL.search(head):
        raise DataError(f"{path} is not text (it holds control bytes); a CSV is saved as UTF-8")
    whole = len(head) < _SNIFF
    try:
        encoding = "utf-8-sig"
        text = (head if whole else head[: head.rfind(b"\n") + 1] or head[:-4]).decode(encoding)
    except UnicodeDecodeError:
        encoding = "latin-1"
        text = head.decode(encoding)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty")
    separator = "\t" if _suffix(path) in (".tsv", ".tab") else _separator(lines)
    rows = _split(lines, separator)
    first, rest = rows[0], rows[1:]
    header = options.header if options.header is not None else _has_header(path, first, rest, options)
    if not header:
        return _Dialect(separator, encoding, False, [f"column{i + 1}" for i in range(max(map(len, rows[:100])))])
    names = [name or f"unnamed{i + 1}" for i, name in enumerate(first)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: several columns are called {', '.join(map(repr, twice[:5]))}; give each its own name, "
            "or say --no-header where the first line holds data"
        )
    return _Dialect(separator, encoding, True, names)


def _split(lines: list[str], separator: str) -> list[list[str]]:
    try:
        rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, skipinitialspace=True))
    except csv.Error:
        rows = [line.split(separator) for line in lines]
    return [[cell.strip() for cell in row] for row in rows if row]


def _separator(lines: list[str]) -> str:
    """The separator that cuts every line into the same number of fields, at least two; a comma where none does."""
    for separator in (";", ",", "\t", "|", " "):
        widths = {len(row) for row in _split([line.strip(" ") for line in lines[:100]], separator)}
        if len(widths) == 1 and widths != {1}:
            return separator
    return ","


def _has_header(path: Path, first: list[str], rest: list[list[str]], options: DataOptions) -> bool:
    known = {name.lower() for name in (options.target, options.text) if name} | TARGET_NAMES | {"text"}
    if not any(map(_is_number, first)):
        if any(cell.lower() in known for cell in first):
            return True
        below = zip(*[row for row in rest if len(row) == len(first)], strict=True)
        if any(all(_is_number(cell) or cell in ("", "?", "NA") for cell in column) for column in below):
            return True
    shown = ", ".join(first[:4])
    raise DataError(
        f"{path}: it does not tell whether its first line ({shown}{', ...' if len(first) > 4 else ''}) holds the names "
        f"of the columns; say --header, or --no-header (they are then called column1 to column{len(first)})"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, options: DataOptions) -> Source:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            usable, notes = _usable_columns(path, schema)
            reservoir, kept = _Reservoir(options), schema.empty_table().select(usable)
            for batch in file.iter_batches(columns=usable, batch_size=max(1_000, _CELLS * 4 // len(usable))):
                block = pa.Table.from_batches([batch]).select(usable)
                kept = pa.concat_tables([kept, block.cast(kept.schema)])
                kept = kept.take(reservoir.choose(len(block)))
        return Source(kept.to_pandas(), (*notes, *reservoir.notes()))
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from error


def _usable_columns(path: Path, schema: pa.Schema) -> tuple[list[str], tuple[str, ...]]:
    """Names of the columns of numbers, booleans and texts, and a note about those of any other kind."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: several columns are called {', '.join(map(repr, twice[:5]))}; rename them")
    tests = (
        pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string,
        pa.types.is_string_view, pa.types.is_decimal, pa.types.is_dictionary, pa.types.is_null,
    )  # fmt: skip
    usable = [field.name for field in schema if any(test(field.type) for test in tests)]
    left = [f"{field.name!r} ({field.type})" for field in schema if field.name not in usable]
    if not usable:
        raise DataError(f"{path} has no column of numbers, booleans or texts")
    return usable, (f"left out, neither numbers nor texts: {', '.join(left)}",) if left else ()


def _read_json_lines(path: Path, options: DataOptions) -> Source:
    reservoir, kept = _Reservoir(options), list[tuple[int, str]]()
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as lines:
            block = list[tuple[int, str]]()
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    block.append((number, line))
                if len(block) == 10_000:
                    kept = _pick(kept + block, reservoir.choose(len(block)))
                    block = []
            kept = _pick(kept + block, reservoir.choose(len(block)))
    except (UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    if not kept:
        raise DataError(f"{path} is empty")
    records = [_record(path, number, line) for number, line in kept]
    return Source(pd.DataFrame.from_records(records), reservoir.notes())


def _pick(rows: list[tuple[int, str]], positions: np.ndarray) -> list[tuple[int, str]]:
    return [rows[i] for i in positions.tolist()]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error}); JSON Lines has one object on each line") from error
    if not isinstance(record, dict):
        raise DataError(f'{path}, line {number}: expected an object such as {{"text": ..., "label": ...}}')
    return record
