"""Folders that Hugging Face ``datasets`` saved: tables, texts and images (extra ``language``)."""

__all__ = ["read_saved"]

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from theodolite.core.errors import DataError, require
from theodolite.core.loading.arrays import Arrays
from theodolite.core.loading.images import decode_images
from theodolite.core.loading.labels import find_target
from theodolite.core.loading.options import DataOptions
from theodolite.core.loading.tables import Source, sample_rows


def read_saved(folder: Path, test: Path | None, options: DataOptions) -> Arrays | tuple[Source, np.ndarray]:
    """Sampled rows with which of them are for testing; images as arrays, everything else as a table."""
    datasets = require("datasets", "language")
    found = _load(datasets, folder)
    if isinstance(found, datasets.DatasetDict):
        parts = [(part, name == "test") for name, part in found.items()]
        if all(given for _, given in parts):
            raise DataError(f"{folder} has only test rows ({', '.join(found)}); a train part is needed")
    else:
        parts = [(found, False)]
    if test is not None:
        more = _load(datasets, test)
        if isinstance(more, datasets.DatasetDict) or any(given for _, given in parts):
            raise DataError(f"--test {test} must be one saved data set, and {folder} then has no test part of its own")
        parts.append((more, True))
    columns = {tuple(part.column_names) for part, _ in parts}
    if len(columns) > 1:
        raise DataError(f"the parts of {folder} have different columns: {sorted(columns)}")
    frames, notes = list[pd.DataFrame](), list[str]()
    pictures = [name for name, kind in parts[0][0].features.items() if isinstance(kind, datasets.Image)]
    try:
        for part, _ in parts:
            rows, more_notes = sample_rows(len(part), options)
            frames.append(_frame(datasets, part.select(rows), pictures))
            notes += more_notes
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    given = np.repeat([given for _, given in parts], [len(frame) for frame in frames])
    frame = pd.concat(frames, ignore_index=True)
    if len(pictures) == 1:
        return _images(frame, pictures[0], given, tuple(notes), options)
    return Source(frame.drop(columns=pictures), tuple(notes)), given


def _load(datasets: Any, folder: Path) -> Any:
    try:
        return datasets.load_from_disk(str(folder))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{folder} is not a folder that datasets saved: {type(error).__name__}: {error}") from error


def _frame(datasets: Any, part: Any, pictures: list[str]) -> pd.DataFrame:
    """Columns as they are stored, a class label by its name, an image by its bytes."""
    for name in pictures:
        part = part.cast_column(name, datasets.Image(decode=False))
    frame = part.with_format("arrow")[:].to_pandas()
    for name, kind in part.features.items():
        if isinstance(kind, datasets.ClassLabel):
            names = dict(enumerate(kind.names))
            frame[name] = frame[name].map(names)  # a label outside the names (-1: not known) is missing
    return frame


def _images(
    frame: pd.DataFrame, picture: str, given: np.ndarray, notes: tuple[str, ...], options: DataOptions
) -> Arrays:
    target = find_target([name for name in frame.columns if name != picture], options)
    files = [cell["bytes"] or Path(cell["path"] or "") if isinstance(cell, dict) else b"" for cell in frame[picture]]
    pixels, broken = decode_images(files, options)
    if broken and options.missing != "drop":
        raise DataError(f"{len(broken)} of {len(files)} images cannot be decoded; --missing drop leaves them out")
    whole = np.setdiff1d(np.arange(len(files)), broken)
    if broken:
        notes = (*notes, f"{len(broken)} images that cannot be decoded left out")
    return Arrays(pixels[whole], frame[target].to_numpy(dtype=object)[whole], given[whole], notes)
