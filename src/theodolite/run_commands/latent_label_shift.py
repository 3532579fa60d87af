"""``theodolite run latent-label-shift``."""

__all__ = ["command"]

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    table: Annotated[Path | None, typer.Argument(help="the table, as with --data")] = None,
    classes: Annotated[
        int | None, typer.Option(help="hidden classes to find; the evidence on their number otherwise")
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(help="clusters of the domains' probabilities; 3 times the classes")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="column not to look at; may be given several times")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="text file to write each row's class to, one a line")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Hidden classes of a table without labels: give FILE --domain COLUMN --classes K, or a subject as for the survey.

    With --target the column of true labels is not looked at either, and the classes found are scored by it.
    """
    if table is not None:
        if flags.data is not None:
            raise InputError(f"give the table once: {table}, or --data {flags.data}")
        flags = replace(flags, data=str(table))
    domain = flags.domain
    if domain is None:
        if classes is not None or clusters is not None or leave_out or out is not None:
            raise InputError("--classes, --clusters, --leave-out and --out need --domain COLUMN and --data FILE")
        chart("latent-label-shift", flags, seconds, memory, as_json)
        return
    if flags.data is None:
        raise InputError("--domain names a column of a table: give the table, FILE or --data FILE")
    import numpy as np

    from theodolite.core.files import write_whole
    from theodolite.data.latent_label_shift import LatentLabelShift, count_classes, match_labels

    X, domains, truth = _table(flags, domain, leave_out or [])
    # without a number of classes two are fitted, and only the clusters' shares are looked at, as many as serve any number
    many = 3 * min(10, len(np.unique(domains)))
    model = LatentLabelShift(classes or 2, n_clusters=clusters or (None if classes else many), seed=flags.seed).fit(
        X, domains
    )
    result: dict[str, Any] = {"rows": len(X), "columns": X.shape[1], "domains": len(model.domains_)}
    if classes is None:
        count = count_classes(model.cluster_shares_, model.domain_rows_, seed=flags.seed)
        result |= {
            "classes_by_held_out_error": count.chosen,
            "singular_values_above_noise": count.rank,
            "singular_values": count.singular_values.round(4).tolist(),
            "noise_floor": round(count.noise_floor, 4),
            "held_out_error": dict(zip(count.classes.tolist(), count.held_out_error.mean(axis=1).round(6).tolist())),
            "next": "run again with --classes K",
        }
        tell(result, as_json)
        return
    result |= {
        "p_value_of_label_shift": "none: as many classes as domains explain any difference"
        if classes == len(model.domains_)
        else model.shift_test_.p_value,
        "condition_number": round(model.condition_number_, 2),
        "class_shares": dict(zip(map(str, model.domains_), model.class_shares_.T.round(4).tolist())),
    }
    if truth is not None:
        result["accuracy"] = match_labels(model.labels_, truth).accuracy
    if out is not None:
        write_whole(out, "".join(f"{label}\n" for label in model.labels_))
    elif as_json:
        result["labels"] = model.labels_.tolist()
    tell(result, as_json)


def _table(flags: SubjectFlags, domain: str, leave_out: list[str]) -> tuple[Any, Any, Any]:
    """Rows (n, p) as numbers, the domain of each row as text, and its label as text where --target names one."""
    import numpy as np

    from theodolite.core.loading import DataOptions
    from theodolite.core.loading.columns import find_columns, fit_encoding
    from theodolite.core.loading.tables import read_table

    path = Path(str(flags.data))
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    frame = read_table(path, DataOptions(header=True, max_rows=flags.max_rows, seed=flags.seed)).frame
    names = [domain, *([flags.target] if flags.target else []), *leave_out]
    absent = [name for name in names if name not in frame.columns]
    if absent:
        raise InputError(
            f"{path} has no column {absent[0]!r}; its columns are {', '.join(map(str, frame.columns[:20]))}"
        )
    missing = int(frame[domain].isna().to_numpy().sum())
    if missing:
        raise DataError(
            f"{missing} rows have no value in column {domain!r}; leave them out of the table or name their domain"
        )
    table = find_columns(frame.drop(columns=list(dict.fromkeys(names))))
    if not table.columns:
        raise DataError(f"no column is left to look at besides {', '.join(map(repr, names))}")
    holes = [column.name for column in table.columns if column.missing]
    if holes and flags.missing != "median":
        raise DataError(
            f"missing values in column {', '.join(holes[:5])}: say --missing median, or --leave-out the column"
        )
    rows = np.arange(len(frame))
    X = fit_encoding(table, rows, standardise=False).encode(table.values).astype(np.float64)
    truth = frame[flags.target].astype(str).to_numpy(dtype=str) if flags.target else None
    return X, frame[domain].astype(str).to_numpy(dtype=str), truth
