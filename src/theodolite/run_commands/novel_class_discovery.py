"""``theodolite run novel-class-discovery``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_ALL = 10**9


@subject_flags
def command(
    flags: SubjectFlags,
    table: Annotated[
        Path | None,
        typer.Argument(help="CSV, TSV, Parquet or JSON Lines file; an empty label or -1 marks an unlabelled row"),
    ] = None,
    label: Annotated[str | None, typer.Option(help="name of the label column")] = None,
    novel: Annotated[
        int | None, typer.Option(help="number of new classes; by the silhouette where left out", min=1)
    ] = None,
    tune: Annotated[
        int, typer.Option(help="settings to try for the hyperparameters, by hiding known classes; 0: defaults", min=0)
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="CSV file to write the group of each unlabelled row to")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Group the rows without a label into new classes: give a table with --label, or a subject as for the survey."""
    if table is None:
        chart("novel-class-discovery", flags, seconds, memory, as_json)
        return
    import numpy as np

    from theodolite.core.files import write_whole
    from theodolite.data.novel_classes import PBN, describe_clusters, tune_hidden

    x, y, names, numbers = _read(table, label, flags)
    unlabelled = y == "-1"
    if not unlabelled.any():
        raise DataError(
            f"nothing to discover: every row of {table} has a label; leave the label empty (or write -1) in the rows whose class "
            "nobody knows"
        )
    made = PBN(n_novel=novel or "auto", epochs=flags.epochs, seed=flags.seed)
    if tune:
        made = tune_hidden(made, None, x, y, n_trials=tune, seed=flags.seed).refit
    else:
        made.fit(x, y)
    cards = describe_clusters(
        x[unlabelled], made.labels_, names, known=(x[~unlabelled], y[~unlabelled]), seed=flags.seed
    )
    result: dict[str, Any] = {
        "known_classes": [str(name) for name in made.classes_],
        "labelled_rows": int((~unlabelled).sum()),
        "unlabelled_rows": int(unlabelled.sum()),
        "new_groups": made.n_novel_,
        "number_of_groups": "as given" if made.count_ is None else "estimated by the silhouette",
    }
    if made.count_ is not None:
        result["silhouette"] = round(float(made.count_.scores.mean(axis=1).max()), 3)
    result["variance_that_the_network_gives_back"] = round(made.reconstruction_r2_, 3)
    if tune:
        result["parameters"] = {name: getattr(made, name) for name in ("lr", "dropout", "w", "latent_dim")}
    result["groups"] = [str(card) for card in cards]
    if out is not None:
        rows = zip(numbers[np.flatnonzero(unlabelled)].tolist(), made.labels_.tolist(), strict=True)
        write_whole(out, "row,group\n" + "".join(f"{row},novel-{group}\n" for row, group in rows))
    tell(result, as_json)


def _read(path: Path, label: str | None, flags: SubjectFlags) -> tuple[Any, Any, tuple[str, ...], Any]:
    """Features (n, p), labels (n,) with "-1" where there is none, names of features, number of each row in the file."""
    import dataclasses

    import numpy as np

    from theodolite.core.loading.columns import Table, find_columns, fit_encoding
    from theodolite.core.loading.labels import class_name, find_target
    from theodolite.core.loading.labels import numbers as label_numbers
    from theodolite.core.loading.tables import read_table

    if not path.is_file():
        raise DataError(f"there is no file {path}")
    # every unlabelled row is to get its group, so no sample of the rows is drawn
    options = dataclasses.replace(flags.options(), target=label or flags.target, max_rows=_ALL)
    frame = read_table(path, options).frame
    frame.columns = list(map(str, frame.columns))
    if label is not None and label not in frame.columns:
        raise InputError(f"--label {label}: {path} has no such column; its columns are {', '.join(frame.columns[:20])}")
    target = find_target(list(frame.columns), options)
    if options.domain is not None and options.domain not in frame.columns:
        raise InputError(f"--domain {options.domain}: {path} has no such column")
    found = find_columns(frame.drop(columns=[target, *([options.domain] if options.domain is not None else [])]))
    if not found.columns:
        raise DataError(f"{path} has no column of numbers or categories beside the label {target!r}")
    kept = np.ones(len(frame), dtype=bool)
    gaps = np.isnan(found.values).any(axis=1)
    if gaps.any() and options.missing in (None, "error"):
        names = [column.name for column in found.columns if column.missing]
        raise DataError(
            f"values are missing in {int(gaps.sum())} rows ({', '.join(names[:6])}); --missing drop leaves these rows out, "
            "--missing median fills in the median (the commonest level)"
        )
    if options.missing == "drop":
        kept = ~gaps
    rows = Table(found.columns, found.values[kept], found.left_out, found.notes)
    encoding = fit_encoding(rows, np.arange(len(rows.values)), standardise=False)
    cells: Any = frame[target][kept]
    values = label_numbers(cells)  # "1" and "1.0" are one class
    named = cells if values is None else values
    y = np.array(["-1" if empty else class_name(cell) for cell, empty in zip(named, cells.isna())], dtype=str)
    return encoding.encode(rows.values).astype(np.float64), y, encoding.features, np.flatnonzero(kept)
