"""Corpora that are larger than memory: files cut into shards, each read where it is by whoever works on it.

A shard is a range of bytes of an uncompressed file of lines (a line belongs to the range that it starts in), a whole compressed
file, a row group of a Parquet file, or a slice of what is in memory. The rows of a corpus are the lines that are not blank, in
the order of the files' names; their numbers do not depend on how the files are cut. Files are opened with fsspec, so that
``s3://``, ``gs://`` and ``hdfs://`` work with the package that fsspec names for them.

Source: the file layer of Xie, Santurkar, Ma, Liang, 2023, arXiv:2302.03169 (`theodolite.data.importance_resampling`).
"""

__all__ = ["Corpus", "FileShard", "MemoryShard"]

import bz2
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from theodolite.core.errors import DataError, InputError, require

Form = Literal["jsonl", "text", "parquet"]
FORMS: dict[str, Form] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".text": "text", ".parquet": "parquet",
}  # fmt: skip
SUFFIXES: dict[Form, str] = {"jsonl": ".jsonl", "text": ".txt", "parquet": ".parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_READ, _BATCH, _IN_MEMORY = 1 << 20, 1024, 10_000


@dataclass(frozen=True)
class FileShard:
    """A part of a file. start, end: bytes, end None to the last one. group: the row group of a Parquet file.

    version: size and date of the file when it was listed. on_error: what to do with a document that cannot be read.
    """

    url: str
    form: Form
    field: str
    start: int = 0
    end: int | None = None
    group: int | None = None
    compression: str = ""
    version: str = ""
    on_error: Literal["raise", "skip"] = "raise"

    @property
    def identity(self) -> str:
        """Text that is another one where the documents may be other ones."""
        return repr(self)

    def texts(self, rows: Int[np.ndarray, " chosen"] | None = None) -> Iterator[str | None]:
        """The text of each row, or of the rows asked for (ascending); None where it cannot be read and is to be skipped."""
        if self.form == "parquet":
            for first, batch in self._batches([self.field]):
                at = _within(rows, first, len(batch))
                for offset, text in zip(at.tolist(), batch.column(0).take(pa.array(at)).to_pylist(), strict=True):
                    yield self._checked(text, first + offset)
            return
        read = self._of_json if self.form == "jsonl" else self._of_text
        for offset, line in self._chosen(rows):
            yield read(line, offset)

    def copy(self, rows: Int[np.ndarray, " chosen"], file: Any, form: Form) -> None:
        """Write the rows asked for (ascending) as they are, or a line of JSON for each where ``form`` is "jsonl"."""
        if self.form == "parquet":
            kept = (batch.take(pa.array(_within(rows, first, len(batch)))) for first, batch in self._batches())
            write_batches(kept, self._schema(), file) if form == "parquet" else _write_json(kept, file)
            return
        for _, line in self._chosen(rows):
            if form != self.form:
                line = json.dumps({self.field: line.decode("utf-8")}, ensure_ascii=False).encode()
            file.write(line + b"\n")

    def place(self, row: int) -> str:
        """Where a row is, in words."""
        if self.form == "parquet":
            return f"{self.url}, row group {self.group}, row {row}"
        offset = next(offset for offset, _ in self._chosen(np.array([row])))
        return f"{self.url}, byte {offset}"

    # ---- lines

    def _chosen(self, rows: np.ndarray | None) -> Iterator[tuple[int, bytes]]:
        """Byte and content of each line that is not blank, or of those asked for."""
        lines = self._lines()
        if rows is None:
            yield from lines
            return
        wanted = iter(rows.tolist())
        next_row = next(wanted, None)
        for row, line in enumerate(lines):
            if next_row is None:
                return
            if row == next_row:
                yield line
                next_row = next(wanted, None)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with _opened(self.url, self.compression) as file:
            offset = self.start
            if offset:
                file.seek(offset - 1)
                offset += len(file.readline()) - 1  # the rest of the line that the part before holds
            for line in iter(file.readline, b""):
                if self.end is not None and offset >= self.end:
                    return
                content = line.rstrip(b"\r\n")
                if offset == 0:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                if content and not content.isspace():
                    yield offset, content
                offset += len(line)

    def _of_json(self, line: bytes, offset: int) -> str | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self._bad(f"{self.url}, byte {offset}: the line is not JSON: {error}")
        if not isinstance(row, dict):
            return self._bad(f"{self.url}, byte {offset}: a line must be an object, this is a {type(row).__name__}")
        if self.field not in row:
            return self._bad(
                f"{self.url}, byte {offset}: no field {self.field!r}; the fields are: {', '.join(map(str, row))[:200]}"
            )
        text = row[self.field]
        if isinstance(text, str):
            return text
        return self._bad(
            f"{self.url}, byte {offset}: the field {self.field!r} is not text, it is a {type(text).__name__}"
        )

    def _of_text(self, line: bytes, offset: int) -> str | None:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            return self._bad(f"{self.url}, byte {offset + error.start}: not UTF-8: {error.reason}")

    def _bad(self, what: str) -> None:
        if self.on_error == "raise":
            raise DataError(f"{what} (on_error='skip' leaves such documents out and counts them)")

    # ---- Parquet

    def _batches(self, columns: list[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Number of the first row of a batch, and the batch."""
        first = 0
        with _opened(self.url, "") as file:
            try:
                for batch in pq.ParquetFile(file).iter_batches(_BATCH, row_groups=[self.group], columns=columns):
                    yield first, batch
                    first += len(batch)
            except pa.ArrowException as error:
                raise DataError(f"{self.url} cannot be read as Parquet: {error}") from error

    def _schema(self) -> pa.Schema:
        with _opened(self.url, "") as file:
            return pq.ParquetFile(file).schema_arrow

    def _checked(self, text: Any, row: int) -> str | None:
        if isinstance(text, str):
            return text
        return self._bad(
            f"{self.url}, row group {self.group}, row {row}: the field {self.field!r} is not text: {text!r:.80}"
        )


@dataclass(frozen=True, eq=False)
class MemoryShard:
    """Documents in memory: strings, or rows of a ``datasets.Dataset`` with the text in ``field``. first: number of the first."""

    rows: Any
    field: str | None
    first: int

    form: Form = "jsonl"

    @property
    def identity(self) -> str:
        """Text that is another one where the documents are other ones."""
        digest = hashlib.blake2b(digest_size=16)
        for text in self.texts():
            digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def texts(self, rows: Int[np.ndarray, " chosen"] | None = None) -> Iterator[str]:
        """The text of each row, or of the rows asked for."""
        if self.field is None:
            found = self.rows if rows is None else (self.rows[row] for row in rows.tolist())
        else:
            kept = self.rows if rows is None else self.rows.select(rows)
            found = (text for batch in kept.iter(_BATCH) for text in batch[self.field])
        for row, text in enumerate(found):
            if not isinstance(text, str):
                at = row if rows is None else int(rows[row])
                raise DataError(f"{self.place(at)} must be a string, it is a {type(text).__name__}")
            yield text

    def copy(self, rows: Int[np.ndarray, " chosen"], file: Any, form: Form) -> None:
        """Write the rows asked for, a line of JSON for each."""
        if self.field is None:
            found: Iterable[dict[str, Any]] = ({"text": self.rows[row]} for row in rows.tolist())
        else:
            found = iter(self.rows.select(rows))
        for row in found:
            file.write(_json_line(row))

    def place(self, row: int) -> str:
        """Which document a row is, in words."""
        return f"document {self.first + row}"


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents in shards; made by one of the ``from_`` functions.

    >>> len(Corpus.from_texts(["a text", "another one"]).shards)
    1
    """

    shards: tuple[FileShard | MemoryShard, ...]

    @classmethod
    def from_files(
        cls,
        urls: str | Path | Sequence[str | Path],
        text_field: str = "text",
        *,
        block_bytes: int = 64 << 20,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> "Corpus":
        """Documents of files: JSON Lines, text with a document a line, Parquet; the first two also as .gz, .bz2, .xz, .zst.

        urls: paths, patterns or addresses that fsspec knows; a file that is named twice is read once. text_field: where JSON
        and Parquet hold the text. block_bytes: of a shard. on_error: "skip" leaves documents that cannot be read out of every
        count; they keep their row number. Raises DataError where nothing is found or a form is not known.
        """
        if block_bytes < 1 or on_error not in ("raise", "skip"):
            raise InputError(
                f"block_bytes must be above 0 and on_error 'raise' or 'skip', got {block_bytes}, {on_error!r}"
            )
        given = [urls] if isinstance(urls, (str, Path)) else list(urls)
        shards: list[FileShard | MemoryShard] = []
        for fs, path in dict.fromkeys(found for url in given for found in _listed(str(url))):
            shards += _cut(fs, path, text_field, block_bytes, on_error)
        if not shards:
            raise DataError(f"no documents in {', '.join(map(str, given)) or 'no files'}: every file is empty")
        return cls(tuple(shards))

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> "Corpus":
        """Documents that are in memory."""
        held = list(texts)
        return cls(tuple(MemoryShard(held[i : i + _IN_MEMORY], None, i) for i in range(0, len(held), _IN_MEMORY)))

    @classmethod
    def from_dataset(cls, dataset: Any, text_field: str = "text") -> "Corpus":
        """Rows of a ``datasets.Dataset``; they stay where the data set holds them."""
        if text_field not in dataset.column_names:
            raise DataError(
                f"the data set has no column {text_field!r}; its columns are: {', '.join(dataset.column_names)}"
            )
        starts = range(0, len(dataset), _IN_MEMORY)
        return cls(
            tuple(
                MemoryShard(dataset.select(range(i, min(len(dataset), i + _IN_MEMORY))), text_field, i) for i in starts
            )
        )

    @classmethod
    def of(cls, source: Any) -> "Corpus":
        """A corpus as it is, a list, array or pandas column of strings, or a ``datasets.Dataset`` with a column "text"."""
        if isinstance(source, Corpus):
            return source
        if hasattr(source, "column_names") and hasattr(source, "select"):
            return cls.from_dataset(source)
        if hasattr(source, "tolist"):  # an array or a column of a table
            source = source.tolist()
        if isinstance(source, (str, bytes, Path)) or not isinstance(source, Sequence):
            raise InputError(
                "a corpus is a list of strings, a Corpus (Corpus.from_files for files) or a datasets.Dataset; got a "
                f"{type(source).__name__}"
            )
        return cls.from_texts(source)

    def texts(self) -> Iterator[str]:
        """All documents in order; one that cannot be read and is skipped is an empty one."""
        for shard in self.shards:
            for text in shard.texts():
                yield "" if text is None else text


# ---- finding and opening files


@contextmanager
def _opened(url: str, compression: str) -> Iterator[Any]:
    fs, path = fsspec.core.url_to_fs(url)
    try:
        with fs.open(path, "rb") as raw, io.BufferedReader(raw, _READ) as file:
            yield _decompressed(file, compression)
    except _BROKEN as error:
        raise DataError(f"{url} is broken or ends too early: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {url}: {error}") from error


def _decompressed(file: Any, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".bz2":
        return bz2.BZ2File(file)
    if compression == ".xz":
        return lzma.LZMAFile(file)
    if compression == ".zst":
        return io.BufferedReader(_ZstdFrames(file), _READ)
    return file


class _ZstdFrames(io.RawIOBase):
    """The content of all frames of a .zst file; one that ends within a frame is an error, which the library's reader hides."""

    def __init__(self, file: Any) -> None:
        self._file, self._zstd = file, require("zstandard", "data")
        self._content, self._rest, self._frame = b"", b"", None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as what is decompressed goes."""
        while not self._content:
            piece = self._rest or self._file.read(_READ >> 3)
            if not piece and self._frame is None:
                return 0
            if not piece:
                raise EOFError("the file ends within a frame")
            self._frame = self._frame or self._zstd.ZstdDecompressor().decompressobj()
            try:
                self._content = self._frame.decompress(piece)
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from error
            self._rest = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._content))
        buffer[:n], self._content = self._content[:n], self._content[n:]
        return n


def _listed(url: str) -> list[tuple[Any, str]]:
    """The files that a path, a pattern or an address names."""
    fs, path = fsspec.core.url_to_fs(url)
    try:
        found = sorted(fs.glob(path)) if any(mark in url for mark in "*?[") and not fs.exists(path) else [path]
        files = [name for name in found if fs.isfile(name)]
        if not files and fs.isdir(path):
            raise DataError(f"{url} is a folder; name its files with a pattern, such as {url.rstrip('/')}/*.jsonl")
    except OSError as error:
        raise DataError(f"cannot list {url}: {error}") from error
    if not files:
        raise DataError(f"there is no file {url}")
    return [(fs, name) for name in files]


def _cut(fs: Any, path: str, field: str, block: int, on_error: Literal["raise", "skip"]) -> list[FileShard]:
    name, suffix = path, Path(path).suffix.lower()
    compression = suffix if suffix in COMPRESSED else ""
    form = FORMS.get(Path(name.removesuffix(Path(path).suffix) if compression else name).suffix.lower())
    if form is None or (compression and form == "parquet"):
        raise DataError(
            f"{path}: a corpus is made of {', '.join(FORMS)} files; the first five also with {', '.join(COMPRESSED)}"
        )
    info = fs.info(path)
    dated = next((info[key] for key in ("mtime", "LastModified", "ETag", "updated") if key in info), "")
    url = path if "file" in fs.protocol else fs.unstrip_protocol(path)
    version = f"{info['size']}-{dated}"
    if form == "parquet":
        with _opened(url, "") as file:
            try:
                about = pq.ParquetFile(file)
            except pa.ArrowException as error:
                raise DataError(f"{url} cannot be read as Parquet: {error}") from error
            if field not in about.schema_arrow.names:
                raise DataError(
                    f"{url} has no column {field!r}; its columns are: {', '.join(about.schema_arrow.names)}"
                )
            return [
                FileShard(url, form, field, group=i, version=version, on_error=on_error)
                for i in range(about.num_row_groups)
            ]
    if compression:
        return [FileShard(url, form, field, compression=compression, version=version, on_error=on_error)]
    size = int(info["size"])
    return [
        FileShard(url, form, field, start, min(size, start + block), version=version, on_error=on_error)
        for start in range(0, size, block)
    ]


# ---- writing


def _within(rows: np.ndarray | None, first: int, length: int) -> np.ndarray:
    """Which rows of a batch are asked for, by their place in it; all where None."""
    if rows is None:
        return np.arange(length)
    low, high = np.searchsorted(rows, [first, first + length])
    return rows[low:high] - first


def _json_line(row: dict[str, Any]) -> bytes:
    # half a surrogate pair has no UTF-8, so it is left escaped
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row, default=str).encode() + b"\n"


def _write_json(batches: Iterable[pa.RecordBatch], file: Any) -> None:
    for batch in batches:
        for row in batch.to_pylist():
            file.write(_json_line(row))


def write_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema, file: Any) -> None:
    with pq.ParquetWriter(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
