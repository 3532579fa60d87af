"""``theodolite run hippo``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_ROWS = 3000 * 5  # of which the test windows are a fifth
_TIMES = 130  # of which a fifth holds windows of 16 steps, and ten of them


@subject_flags
def command(
    flags: SubjectFlags,
    scan: Annotated[
        Path | None, typer.Option(help="table whose rows are times in order: scan one column's memory, without a model")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the column to scan; may be left out where there is one")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """How long a memory a series asks for: give --scan FILE.csv --column NAME, or a subject of series as for the survey."""
    if scan is None:
        if column is not None:
            raise InputError("--column goes with --scan FILE.csv; for a subject the column is --target")
        chart("hippo", flags, seconds, memory, as_json)
        return
    if flags.subject or flags.model or flags.data:
        raise InputError("--scan reads a table without a model; leave out --subject, --model and --data")
    from theodolite.networks.hippo import memory_scan
    from theodolite.survey.networks.memory_scan import memory_words, needed_words

    data = _one_series(scan, column, flags)
    found = memory_scan(data, seed=flags.seed)
    result: dict[str, Any] = {
        "series": data.features[0],
        "windows": f"{len(data.train):,} + {len(data.validation):,} + {len(data.test):,} of {found.steps} steps",
        "finding": f"{needed_words(found, 'The next value')}; {memory_words(found)}.",
        "memory_needed": round(found.needed, 1),
        "dt": round(1 / found.needed, 5),
        "error_from_that_memory": found.needed_error,
        "error_from_the_last_value": found.last_error,
        "error_of_rebuilt_windows": found.chosen_recall,
        "error_of_random_frequencies": found.random_recall,
        "error_in_random_order": found.shuffled_recall,
    }
    for place, measure in enumerate(found.measures if as_json else ()):
        table = zip(found.memory_steps, found.target[place], found.recall[place], strict=True)
        result[f"{measure}_by_memory"] = [
            {"memory_steps": round(float(m), 1), "target": round(float(t), 4), "windows": round(float(r), 4)}
            for m, t, r in table
        ]
    tell(result, as_json)


def _one_series(path: Path, column: str | None, flags: SubjectFlags) -> Any:
    """Windows of one column, in units of its training deviation, with its next values."""
    from dataclasses import replace

    from theodolite.core.loading.columns import find_columns
    from theodolite.core.loading.data import load_data
    from theodolite.core.loading.options import DataOptions, Wanted
    from theodolite.core.loading.tables import read_table

    frame: Any = read_table(path, DataOptions(series=True, header=flags.header)).frame
    if column is None:
        numeric = [found.name for found in find_columns(frame).columns if found.kind == "numeric"]
        if len(numeric) != 1:
            raise InputError(
                f"{path} has {len(numeric)} columns of numbers ({', '.join(numeric[:8])}); choose one with --column"
            )
        column = numeric[0]
    if flags.window is None and len(frame) < _TIMES:
        raise InputError(
            f"a memory scan needs at least {_TIMES} times, for windows of 16 steps in three parts; {path} has {len(frame):,}"
        )
    # a fifth of the times are the test rows: of such windows they hold five stretches, the fewest that can be sure of a gain
    window = flags.window or max(16, min(512, len(frame) // 32))
    options = DataOptions(
        series=True,
        target=column,
        window=window,
        max_rows=_ROWS,
        missing=flags.missing,
        header=flags.header,
        seed=flags.seed,
    )
    data = load_data(str(path), options, Wanted()).data
    parts = {part: replace(rows, x=rows.x[:, :, :1]) for part, rows in data.parts.items()}
    return replace(data, features=data.features[:1], columns=data.columns[:1], **parts)
