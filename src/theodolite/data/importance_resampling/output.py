"""Where the selected documents go: one file, or a folder with a file for each shard, checked before long work starts."""

__all__ = ["Output", "join_parts", "plan_output", "write_part"]

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from theodolite.core.errors import DataError, InputError
from theodolite.core.files import disk_errors
from theodolite.data.shards import COMPRESSED, FORMS, SUFFIXES, Corpus, FileShard, Form, MemoryShard, write_batches

_PIECE, _BATCH = 1 << 20, 1024


@dataclass(frozen=True)
class Output:
    """What is written: ``names`` in ``folder``, a shard each in its form; then put together as ``file``, where there is one."""

    folder: str
    names: tuple[str, ...]
    forms: tuple[Form, ...]
    file: str | None

    def prepare(self) -> None:
        """Make the folder; parts of another selection in it are an error."""
        fs, path = fsspec.core.url_to_fs(self.folder)
        try:
            fs.makedirs(path, exist_ok=True)
            there = {Path(name).name for name in fs.ls(path, detail=False)}
        except OSError as error:
            raise DataError(f"cannot write into the folder {self.folder}: {error}") from error
        others = sorted(name for name in there - set(self.names) if name.startswith("part-"))
        if others:
            raise DataError(
                f"{self.folder} holds parts of another selection ({others[0]}, ...); remove them or choose another folder"
            )

    def finish(self) -> list[str]:
        """The names of what was written, when all parts are there."""
        if self.file is None:
            return [f"{self.folder}/{name}" for name in self.names]
        join_parts(self.folder, self.names, self.file, self.forms[0])
        return [self.file]


def plan_output(corpus: Corpus, out: str | Path, *, kept: Sequence[Corpus] = ()) -> Output:
    """What `ImportanceResampler.write` writes of a corpus for ``out``; nothing is made yet.

    kept: further corpora whose files must not be written over, as those of ``corpus`` must not. Raises InputError for a form
    that the corpus does not have, for a compressed one, and where a file of a corpus would be written over; DataError where
    ``out`` lies in no folder that can be written into.
    """
    out = str(out).rstrip("/")
    suffix = Path(out).suffix.lower()
    form: Form | None = FORMS.get(suffix)
    if suffix in COMPRESSED:
        raise InputError(
            f"{out}: what is selected is not compressed; choose a name that ends in .jsonl, or a folder without {suffix}"
        )
    found = {shard.form for shard in corpus.shards}
    if form not in (None, "jsonl") and found != {form}:
        raise InputError(
            f"{suffix} files are made of a corpus of such files; this one is {', '.join(sorted(found))}: write .jsonl"
        )
    forms: tuple[Form, ...] = tuple(form or shard.form for shard in corpus.shards)
    names = tuple(f"part-{i:05d}-of-{len(forms):05d}{SUFFIXES[one]}" for i, one in enumerate(forms))
    made = Output(out if form is None else f"{out}.parts", names, forms, None if form is None else out)
    sources = {_place(shard.url) for one in (corpus, *kept) for shard in one.shards if isinstance(shard, FileShard)}
    for file in (out, *(f"{made.folder}/{name}" for name in names)):
        if _place(file) in sources:
            raise InputError(
                f"{file} is one of the files that are read, and would be written over; choose another name"
            )
    _check_place(made)
    return made


def _place(url: str) -> str:
    """One name of a file, whatever links and dots lead to it."""
    fs, path = fsspec.core.url_to_fs(url)
    return os.path.realpath(path) if "file" in fs.protocol else fs.unstrip_protocol(path)


def _check_place(made: Output) -> None:
    """DataError where a folder on this machine cannot be written into, or is where a file is to be."""
    fs, path = fsspec.core.url_to_fs(made.folder)
    if "file" not in fs.protocol:
        return
    if made.file is not None and Path(made.file).is_dir():
        raise DataError(f"{made.file} is a folder, and its name that of a file; choose another name")
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise DataError(f"cannot write into the folder {made.folder}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DataError(f"cannot write into the folder {made.folder}: {place} is read-only")


def write_part(shard: FileShard | MemoryShard, rows: np.ndarray, folder: str, name: str, form: Form) -> None:
    """Write rows of a shard as the file ``name`` in ``folder``; it is there when it is whole."""
    fs, path = fsspec.core.url_to_fs(folder)
    with _written_whole(fs, f"{path}/.{name}.unfinished", f"{path}/{name}") as file:
        shard.copy(rows, file, form)


@contextmanager
def _written_whole(fs: Any, unfinished: str, path: str) -> Iterator[Any]:
    """A file that gets its name when it is whole; DiskError, and no file, where it cannot be written."""
    with disk_errors(path):
        try:
            with fs.open(unfinished, "wb") as file:
                yield file
            fs.mv(unfinished, path)
        except OSError:
            if fs.exists(unfinished):
                fs.rm(unfinished)
            raise


def join_parts(folder: str, names: Sequence[str], out: str, form: Form) -> None:
    """Put the files ``names`` of ``folder`` after one another as the file ``out``, and remove the folder."""
    fs, path = fsspec.core.url_to_fs(folder)
    _, target = fsspec.core.url_to_fs(out)
    with _written_whole(fs, f"{path}/.whole", target) as file:
        if form == "parquet":
            write_batches(*_parquet_parts(fs, [f"{path}/{name}" for name in names]), file)
        else:
            for name in names:
                with fs.open(f"{path}/{name}", "rb") as part:
                    while piece := part.read(_PIECE):
                        file.write(piece)
    for name in [*names, *_unfinished(fs, path)]:
        fs.rm_file(f"{path}/{name}")
    if fs.isdir(path) and not fs.ls(path):  # what else is in it is not ours to remove
        fs.rmdir(path)


def _unfinished(fs: Any, path: str) -> list[str]:
    """What a run that was killed left in a folder of parts."""
    names = [Path(name).name for name in fs.ls(path, detail=False)]
    return [name for name in names if name.startswith(".part-") and name.endswith(".unfinished")]


def _parquet_parts(fs: Any, paths: list[str]) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
    with fs.open(paths[0], "rb") as first:
        schema = pq.ParquetFile(first).schema_arrow

    def batches() -> Iterator[pa.RecordBatch]:
        for path in paths:
            with fs.open(path, "rb") as part:
                for batch in pq.ParquetFile(part).iter_batches(_BATCH):
                    if not batch.schema.equals(schema):
                        raise DataError(
                            "the Parquet files have different columns, so they cannot be put into one; give a folder as --out"
                        )
                    yield batch

    return batches(), schema
