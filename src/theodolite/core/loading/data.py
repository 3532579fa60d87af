"""A data set from whatever file or folder holds it: found, split, and turned into what a model takes."""

__all__ = ["Loaded", "load_data"]

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.loading.arrays import Arrays, read_npz
from theodolite.core.loading.columns import Encoding, Table, find_columns, fit_encoding
from theodolite.core.loading.images import check_size, decode_images, find_images, resize
from theodolite.core.loading.labels import (
    Labels,
    check_given_test,
    class_name,
    find_target,
    numbers,
    read_labels,
    split,
)
from theodolite.core.loading.options import DataOptions, Wanted
from theodolite.core.loading.series import row_series, table_series
from theodolite.core.loading.tables import Source, read_table, sample_rows
from theodolite.core.loading.texts import TermWeights, find_text
from theodolite.core.loading.ts_files import read_ts
from theodolite.core.subject import Column, Dataset, Modality, Rows

_TABLES = (".csv", ".tsv", ".tab", ".txt", ".parquet", ".jsonl", ".ndjson", ".json")
_ENOUGH = 10
_ABSENT = -1


@dataclass(frozen=True, eq=False)
class Loaded:
    """A data set, and for a table how its columns became features."""

    data: Dataset
    encoding: Encoding | None = None


def load_data(path: str, options: DataOptions, wanted: Wanted) -> Loaded:
    """Read, check, split and encode the data at ``path``; DataError where they cannot be used or are ambiguous."""
    file = _existing(path)
    test = _existing(options.test, "--test") if options.test is not None else None
    if options.series and (file.is_dir() or wanted.embedding is not None or wanted.columns):
        raise InputError("--series takes a table or an .npz file, and a model that takes (n, steps, channels)")
    if file.is_dir():
        if any((file / name).is_file() for name in ("state.json", "dataset_dict.json")):
            from theodolite.core.loading.saved import read_saved

            return _any(file.name, read_saved(file, test, options), options, wanted)
        return _image_folder(file, test, options, wanted)
    suffix = (file.with_suffix("") if file.suffix.lower() == ".gz" else file).suffix.lower()
    if suffix == ".npz":
        found = [read_npz(part, options) for part in (file, test) if part is not None]
        if test is not None and (found[0].test.any() or found[0].x.shape[1:] != found[1].x.shape[1:]):
            raise DataError(f"{file} has test rows of its own, or rows of another shape than --test {test}")
        arrays = found[0] if test is None else _joined(found)
        return _array_data(file.name, arrays, options, wanted)
    if suffix == ".ts":
        return _ts_data(file, test, options, wanted)
    if suffix not in _TABLES:
        raise DataError(
            f"{file}: the ending {file.suffix!r} is of no known form; expected .csv, .tsv, .parquet, .npz, .ts, .jsonl, a "
            "folder of images by class or a saved datasets folder"
        )
    if options.series and (options.task or wanted.task) != "classification":
        every = replace(options, max_rows=sys.maxsize)  # a series has no row to spare
        return Loaded(table_series(file.name, read_table(file, every), options, wanted))
    sources = [read_table(part, options) for part in (file, test) if part is not None]
    if test is not None and set(sources[0].frame.columns) != set(sources[1].frame.columns):
        strange = sorted(map(str, set(sources[0].frame.columns) ^ set(sources[1].frame.columns)))
        raise DataError(f"{file} and {test} have different columns: {', '.join(strange[:8])}")
    given = np.repeat(np.arange(len(sources)) == 1, [len(source.frame) for source in sources])
    frame = pd.concat([source.frame for source in sources], ignore_index=True) if test else sources[0].frame
    notes = tuple(note for source in sources for note in source.notes)
    if options.series:
        return _series_data(file.name, row_series(file.name, Source(frame, notes), given, options), options, wanted)
    return _frame_data(file.name, Source(frame, notes), given, options, wanted)


def _any(name: str, found: Any, options: DataOptions, wanted: Wanted) -> Loaded:
    if isinstance(found, Arrays):
        return _array_data(name, found, options, wanted)
    source, given = found
    return _frame_data(name, source, given, options, wanted)


def _existing(path: str, flag: str = "--data") -> Path:
    found = Path(path).expanduser()
    try:
        if not found.exists():
            raise DataError(f"{flag} {path}: there is no such file or folder")
        if found.is_file():
            found.open("rb").close()
        elif not found.is_dir():
            raise DataError(f"{flag} {path} is neither a file nor a folder")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{flag} {path} cannot be read: {error}") from error
    return found


def _joined(found: Sequence[Arrays]) -> Arrays:
    test = np.repeat([False, True], [len(part.x) for part in found])
    x, y = (np.concatenate([getattr(part, name) for part in found]) for name in "xy")
    return Arrays(x, y, test, tuple(note for part in found for note in part.notes))


def _settle(
    missing: dict[str, np.ndarray], labels: np.ndarray, options: DataOptions, *, fills: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which rows stay, with a note; DataError naming --missing where something is missing and nobody said what to do.

    missing: (n,) masks by column. labels: (n,) where the label is missing. fills: whether values can be filled in.
    """
    gone = {name: int(mask.sum()) for name, mask in missing.items() if mask.any()}
    total = len(labels)
    if not gone and not labels.any():
        return np.ones(total, dtype=bool), ()
    shown = ", ".join(f"{name!r} in {count:,}" for name, count in list(gone.items())[:6])
    if options.missing in (None, "error"):
        parts = [f"the label in {int(labels.sum()):,}"] if labels.any() else []
        parts += [shown] if gone else []
        median = ", or --missing median fills in the median (the commonest level)" if gone and fills else ""
        raise DataError(f"missing, of {total:,} rows: {', '.join(parts)}; --missing drop leaves these rows out{median}")
    stay = ~labels
    notes = (f"{int(labels.sum()):,} rows without a label left out",) if labels.any() else ()
    if gone and options.missing == "drop":
        whole = ~np.any(list(missing.values()), axis=0)
        notes = (*notes, f"{int((stay & ~whole).sum()):,} rows with missing values left out ({shown})")
        stay &= whole
    elif gone and not fills:
        raise DataError(
            f"missing, of {total:,} rows: {shown}; these cannot be filled in, only --missing drop is possible"
        )
    elif gone:
        notes = (*notes, f"missing values filled in with the training rows' median or commonest level ({shown} rows)")
    return stay, notes


def _check_count(name: str, count: int) -> None:
    if count < _ENOUGH:
        raise DataError(f"{name} has {count} usable rows; at least {_ENOUGH} are needed to train, select and report")


def _no_value(values: Any) -> np.ndarray:
    found = numbers(values)
    return values.isna().to_numpy() if found is None else ~np.isfinite(found)


def _frame_data(name: str, source: Source, given: np.ndarray, options: DataOptions, wanted: Wanted) -> Loaded:
    frame: Any = source.frame.set_axis([str(column) for column in source.frame.columns], axis=1)
    _check_count(name, len(frame))
    if not frame.columns.is_unique:
        raise DataError(f"{name} has several columns of one name; rename them")
    target = find_target(list(frame.columns), options)
    inputs = frame.drop(columns=target)
    domains = None if options.domain is None else _domains(name, frame, target, options)
    if domains is not None and not _takes(wanted, domains[0].name):
        inputs = inputs.drop(columns=domains[0].name)
    text = find_text(inputs, options)
    if text is not None:
        _no_domain(name, options)
        return _text_data(name, inputs[text], frame[target], given, source.notes, options, wanted)
    if wanted.embedding is not None:
        raise DataError(f"the model takes texts, but {name} has no column of free texts; name it with --text NAME")
    if wanted.columns and set(wanted.columns) <= set(inputs.columns):
        inputs = inputs[list(wanted.columns)]
    table = find_columns(inputs)
    if not table.columns:
        why = ", ".join(f"{column!r}: {reason}" for column, reason in list(table.left_out.items())[:4])
        raise DataError(f"{name} has no column that a model can take ({why or 'only the label'}); texts: --text NAME")
    gaps = {column.name: np.isnan(table.values[:, i]) for i, column in enumerate(table.columns) if column.missing}
    if domains is not None and (nowhere := domains[1] < 0).any():
        gaps[domains[0].name] = nowhere
    nameless = _no_value(frame[target])
    stay, settled = _settle(gaps, nameless, options, fills=True)
    _check_count(name, int(stay.sum()))
    labels = read_labels(frame[target][stay], options, wanted)
    if gaps and options.missing == "drop":
        nameless = nameless & ~np.any(list(gaps.values()), axis=0)
    unlabelled = table.values[nameless]
    table = Table(table.columns, table.values[stay], table.left_out, table.notes)
    parts = _split(name, labels, given[stay], options, wanted)
    standardise = options.scale == "standard" or (options.scale is None and not wanted.trained)
    encoding = fit_encoding(table, parts["train"], standardise=standardise)
    check_size(len(table.values) * len(encoding.features))
    picked = _picked(encoding, table, wanted)
    copies = (
        int(frame[stay].duplicated().sum()) if not any(r.startswith("nested") for r in table.left_out.values()) else 0
    )
    notes = (
        *source.notes, *table.notes, *settled,
        *(("numbers standardised with the mean and deviation of the training rows",) if standardise else ()),
        *((f"{copies:,} rows are exact copies of others, which may lie in another part",) if copies else ()),
    )  # fmt: skip
    data = _dataset(
        name, "tabular", labels, parts, lambda rows: _take(encoding.encode(table.values[rows]), picked),
        wanted.columns if _ABSENT in picked else tuple(encoding.features[i] for i in picked), table.columns, notes,
        given[stay],
    )  # fmt: skip
    if domains is not None:
        column, of_row = domains[0], torch.from_numpy(domains[1][stay])
        located = {part: replace(rows, domain=of_row[parts[part]]) for part, rows in data.parts.items()}
        data = replace(data, domains=column, **located)
    if len(unlabelled) and labels.task == "classification":
        data = replace(data, unlabelled=torch.from_numpy(_take(encoding.encode(unlabelled), picked)))
    if standardise:
        scaling = tuple((0.0, 1.0) if i == _ABSENT else encoding.scaling[i] for i in picked)
        data = replace(data, scaling=scaling)
    return Loaded(data, encoding if picked == list(range(len(encoding.features))) else None)


def _domains(name: str, frame: Any, target: str, options: DataOptions) -> tuple[Column, np.ndarray]:
    """The column that names each row's domain, and the number (n,) of each row's level in it, -1 where there is none."""
    column = str(options.domain)
    if column not in frame.columns or column == target:
        raise InputError(
            f"--domain {column}: {'that is the label' if column == target else f'{name} has no such column'}; the others are "
            f"{', '.join(other for other in list(frame.columns)[:20] if other != target)}"
        )
    cells = frame[column]
    found, gone = numbers(cells), cells.isna().to_numpy()
    named: Any = cells if found is None else pd.Series(found)
    names = np.array(["" if empty else class_name(cell) for cell, empty in zip(named, gone, strict=True)], dtype=object)
    if gone.any() and options.missing != "drop":
        raise DataError(
            f"{int(gone.sum()):,} of {len(gone):,} rows have no value in the --domain column {column!r}; --missing drop leaves "
            "them out"
        )
    levels = np.unique(names[~gone]) if found is None else [class_name(value) for value in np.unique(found[~gone])]
    place = {level: i for i, level in enumerate(levels)}
    return Column(column, "category", int(gone.sum()), tuple(map(str, levels))), np.array(
        [place.get(one, -1) for one in names], dtype=np.int64
    )


def _takes(wanted: Wanted, column: str) -> bool:
    """Whether the model asks for the column, or for a level of it, by name."""
    return any(asked == column or asked.startswith((f"{column}=", f"{column}_")) for asked in wanted.columns)


def _no_domain(name: str, options: DataOptions) -> None:
    if options.domain is not None:
        raise InputError(f"--domain names a column of a table of numbers and categories; {name} holds no such table")


def _take(features: np.ndarray, picked: Sequence[int]) -> np.ndarray:
    """Features (n, len(picked)) in the order of ``picked``, zeros where one is absent."""
    taken = features[:, picked]
    taken[:, np.array(picked) == _ABSENT] = 0
    return taken


def _picked(encoding: Encoding, table: Table, wanted: Wanted) -> list[int]:
    """Positions of the features that the model knows by name ("color=red" or "color_red"), in its order.

    A level of a category that no row of the data has is a column of zeros: _ABSENT.
    """
    every = list(range(len(encoding.features)))
    if not wanted.columns:
        return every
    known = {name: i for i, name in enumerate(encoding.features)}
    known |= {
        f"{column.name}_{level}": known[feature]
        for column in encoding.columns
        if column.kind == "category"
        for feature, level in zip(column.features, column.levels, strict=True)
    }
    if tuple(column.name for column in encoding.columns) == wanted.columns:
        return every
    levels = tuple(f"{column.name}{mark}" for column in encoding.columns if column.kind == "category" for mark in "=_")
    known |= {name: _ABSENT for name in wanted.columns if name not in known and name.startswith(levels)}
    lacking = [name for name in wanted.columns if name not in known]
    if lacking:
        shown = [f"{name!r}" + (f" ({table.left_out[name]})" if name in table.left_out else "") for name in lacking]
        raise ModelError(f"the model takes columns that the data do not give: {', '.join(shown[:8])}")
    picked = [known[name] for name in wanted.columns]
    if all(i == _ABSENT for i in picked):
        raise ModelError(f"the model takes levels that no row of the data has: {', '.join(wanted.columns[:8])}")
    return picked


def _text_data(
    name: str, texts: Any, target: Any, given: np.ndarray, found: tuple[str, ...], options: DataOptions,
    wanted: Wanted,
) -> Loaded:  # fmt: skip
    if options.scale == "standard":
        raise InputError("--scale standard is for tables and images; texts have no columns to standardise")
    if wanted.columns:
        raise ModelError(f"the model takes the columns {', '.join(wanted.columns[:5])}, but {name} holds texts")
    blank = texts.isna() | (texts.astype(object).map(lambda cell: str(cell).strip()) == "")
    stay, settled = _settle({str(texts.name): blank.to_numpy()}, _no_value(target), options, fills=False)
    _check_count(name, int(stay.sum()))
    labels = read_labels(target[stay], options, wanted)
    parts = _split(name, labels, given[stay], options, wanted)
    cells = texts[stay].astype(str).to_numpy(dtype=object)
    embedding = wanted.embedding or TermWeights()
    embedding.fit(cells[parts["train"]].tolist())
    notes = (*found, f"texts are in column {str(texts.name)!r}", embedding.note, *settled)
    data = _dataset(
        name, "text", labels, parts, lambda rows: embedding(cells[rows].tolist()), embedding.features(), (), notes, given[stay]
    )  # fmt: skip
    return Loaded(data)


def _image_folder(folder: Path, test: Path | None, options: DataOptions, wanted: Wanted) -> Loaded:
    _no_domain(folder.name, options)
    found = find_images(folder)
    files, names, given = list(found.files), list(found.labels), found.test
    if test is not None:
        more = find_images(test) if test.is_dir() else None
        if more is None or given.any():
            raise DataError(f"--test {test} must be a folder of images by class, and {folder} then has no test folder")
        files, names = [*files, *more.files], [*names, *more.labels]
        given = np.concatenate([given, np.ones(len(more.files), dtype=bool)])
    kept, notes = sample_rows(len(files), options)
    pixels, broken = decode_images([files[i] for i in kept], options)
    if broken:
        shown = ", ".join(str(files[kept[i]]) for i in broken[:3])
        if options.missing != "drop":
            raise DataError(
                f"{len(broken)} of {len(kept)} images cannot be decoded: {shown}; --missing drop leaves them out"
            )
        notes = (*notes, f"{len(broken)} images that cannot be decoded left out: {shown}")
    whole = np.setdiff1d(np.arange(len(kept)), broken)
    labels = np.array([names[i] for i in kept], dtype=object)[whole]
    return _array_data(folder.name, Arrays(pixels[whole], labels, given[kept][whole], notes), options, wanted)


def _ts_data(file: Path, test: Path | None, options: DataOptions, wanted: Wanted) -> Loaded:
    found = [read_ts(part, options) for part in (file, test) if part is not None]
    arrays, task = found[0]
    if test is not None:
        if task != found[1][1] or arrays.x.shape[1:] != found[1][0].x.shape[1:]:
            raise DataError(f"{test} holds series of another shape or kind of label than {file}")
        arrays = _joined([part for part, _ in found])
    return _series_data(file.name, arrays, replace(options, series=True, task=options.task or task), wanted)


def _series_data(name: str, arrays: Arrays, options: DataOptions, wanted: Wanted) -> Loaded:
    """Series (n, steps) or (n, steps, channels), one a row, with a class or a value each."""
    x = arrays.x[..., None] if arrays.x.ndim == 2 else arrays.x
    if x.ndim != 3 or 0 in x.shape[1:] or x.dtype.kind not in "fiub":
        raise DataError(f"{name}: x has shape {x.shape}; series are numbers (n, steps) or (n, steps, channels)")
    if options.window is not None:
        raise InputError(f"{name} holds one series a row, {x.shape[1]} steps each; --window is for a table")
    _check_count(name, len(x))
    gaps: Any = ~np.isfinite(x).all(axis=(1, 2))
    target = pd.Series(_strings(arrays.y), name="label")
    stay, settled = _settle({"series": gaps}, _no_value(target), options, fills=False)
    _check_count(name, int(stay.sum()))
    check_size(x[stay].size)
    values = x[stay].astype(np.float32)
    labels = read_labels(target[stay], options, wanted)
    parts = _split(name, labels, arrays.test[stay], options, wanted)
    standardise = options.scale == "standard" or (options.scale is None and not wanted.trained)
    if standardise:
        seen = values[parts["train"]].astype(np.float64)
        deviation = seen.std(axis=(0, 1))
        values = ((values - seen.mean(axis=(0, 1))) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    notes = (
        *arrays.notes, *settled,
        *(("channels standardised with the mean and deviation of the training rows",) if standardise else ()),
    )  # fmt: skip
    return Loaded(_dataset(name, "series", labels, parts, lambda rows: values[rows], (), (), notes, arrays.test[stay]))


def _array_data(name: str, arrays: Arrays, options: DataOptions, wanted: Wanted) -> Loaded:
    if options.series:
        return _series_data(name, arrays, options, wanted)
    x = arrays.x
    if x.dtype.kind in "US" or x.ndim <= 2:
        columns = x[:, None] if x.ndim == 1 else x
        if columns.ndim > 2:
            raise DataError(f"{name}: x holds strings of shape {x.shape}; expected one text a row")
        texts = columns.dtype.kind in "US" and columns.shape[1] == 1
        frame = pd.DataFrame(_strings(columns), columns=[f"column{i + 1}" for i in range(columns.shape[1])])
        frame = frame.rename(columns={"column1": "text"}) if texts else frame
        frame["target"] = _strings(arrays.y)
        settled = replace(options, target="target")
        return _frame_data(name, Source(frame, arrays.notes), arrays.test, settled, wanted)
    _no_domain(name, options)
    if wanted.embedding is not None or wanted.columns:
        raise ModelError(f"{name} holds images, but the model takes {'texts' if wanted.embedding else 'named columns'}")
    _check_count(name, len(x))
    pixels, shape_notes = _channels_first(name, x)
    bad: Any = ~np.isfinite(pixels).all(axis=(1, 2, 3)) if pixels.dtype.kind == "f" else np.zeros(len(x), dtype=bool)
    target = pd.Series(_strings(arrays.y), name="label")
    stay, settled = _settle({"pixels": bad}, _no_value(target), options, fills=False)
    _check_count(name, int(stay.sum()))
    pixels = pixels[stay] if not stay.all() else pixels
    labels = read_labels(target[stay], options, wanted)
    parts = _split(name, labels, arrays.test[stay], options, wanted)
    side = options.image_size
    check_size(len(pixels) * pixels.shape[1] * (side**2 if side else pixels.shape[2] * pixels.shape[3]))
    to_unit = 255 if pixels.dtype == np.uint8 else 1

    def numbers_of(rows: np.ndarray) -> np.ndarray:
        found = np.ascontiguousarray(pixels[rows], dtype=np.float32) / np.float32(to_unit)
        return resize(found, side) if side and found.shape[2:] != (side, side) else found

    shift, scale = np.float32(0), np.float32(1)
    if options.scale == "standard":
        seen = numbers_of(parts["train"]).astype(np.float64)
        shift = seen.mean(axis=(0, 2, 3), keepdims=True).astype(np.float32)
        deviation = seen.std(axis=(0, 2, 3), keepdims=True)
        scale = np.where(deviation > 0, deviation, 1).astype(np.float32)
    notes = (
        *arrays.notes, *shape_notes, *settled,
        *(("pixels divided by 255, so that they lie in [0, 1]",) if to_unit == 255 else ()),
        *(("channels standardised with the mean and deviation of the training rows",) if scale.ndim else ()),
    )  # fmt: skip
    data = _dataset(
        name, "image", labels, parts, lambda rows: (numbers_of(rows) - shift) / scale, (), (), notes, arrays.test[stay]
    )
    return Loaded(data)


def _strings(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "S":
        return np.char.decode(values, "latin-1").astype(object)
    return values.astype(object) if values.dtype.kind == "U" else values


def _channels_first(name: str, x: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n, channels, height, width) of (n, height, width) or of four axes whose second or last is 1, 3 or 4 long."""
    if 0 in x.shape[1:]:
        raise DataError(f"{name}: images of shape {x.shape[1:]} have no pixels")
    if x.ndim == 3:
        return x[:, None], ()
    if x.shape[1] in (1, 3, 4):
        both = x.shape[3] in (1, 3, 4)
        return x, ("the second axis of x is taken as the channels",) if both else ()
    if x.shape[3] in (1, 3, 4):
        return x.transpose(0, 3, 1, 2), ()
    raise DataError(f"{name}: x has shape {x.shape}; expected images with 1, 3 or 4 channels as second or last axis")


def _split(name: str, labels: Labels, given: np.ndarray, options: DataOptions, wanted: Wanted) -> dict[str, np.ndarray]:
    if not wanted.classes:
        check_given_test(labels, given)
    parts = split(labels, given, options.seed)
    for part, rows in parts.items():
        if len(rows) == 0:
            raise DataError(f"{name}: no rows are left for the {part} part; give more rows")
    return parts


def _dataset(
    name: str, modality: Modality, labels: Labels, parts: dict[str, np.ndarray], x: Callable[[np.ndarray], np.ndarray],
    features: tuple[str, ...], columns: tuple, notes: tuple[str, ...], given: np.ndarray,
) -> Dataset:  # fmt: skip
    how = "by class" if labels.task == "classification" else "at random"
    told = f"split {how}: 60 % train, 20 % validation, 20 % test"
    if given.any():
        told = f"test rows as given; the others split {how}: 75 % train, 25 % validation"
    rows = {
        part: Rows(torch.from_numpy(np.ascontiguousarray(x(where))), torch.from_numpy(labels.y[where]))
        for part, where in parts.items()
    }
    return Dataset(
        name, modality, labels.task, rows["train"], rows["validation"], rows["test"], features, labels.classes, columns,
        (*notes, *labels.notes, told),
    )  # fmt: skip
