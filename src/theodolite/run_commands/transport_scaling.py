"""``theodolite run transport-scaling``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, Workers, subject_flags
from theodolite.core.errors import DataError, InputError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell

_ALL = 10**9


@subject_flags
def command(
    flags: SubjectFlags,
    table: Annotated[
        Path | None, typer.Argument(help="CSV, TSV, Parquet or JSON Lines file of all pilot samples")
    ] = None,
    source_column: Annotated[str | None, typer.Option(help="column that names the source of each row")] = None,
    val: Annotated[Path | None, typer.Option(help="file of validation rows with the same columns")] = None,
    size: Annotated[int | None, typer.Option(help="rows to buy in all", min=1)] = None,
    cost: Annotated[list[str] | None, typer.Option(help="SOURCE=COST of a row; repeatable; 1 where left out")] = None,
    budget: Annotated[float | None, typer.Option(help="most that all rows may cost")] = None,
    grid_step: Annotated[float, typer.Option(help="step of the grid of mixes that are trained")] = 0.1,
    repeats: Annotated[int, typer.Option(help="trainings of each mix at each of two sizes", min=2)] = 3,
    workers: Workers = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """The best mix of sources for --size rows: give a table with --source-column, --target and --val; or a subject.

    The model is a logistic regression on standardised columns, a ridge regression with --task regression.
    """
    if table is None:
        if source_column or val or size or budget is not None or cost:
            raise InputError("--source-column, --val, --size, --cost and --budget need a table: give its file first")
        chart("transport-scaling", flags, seconds, memory, as_json)
        return
    if source_column is None or flags.target is None or val is None or size is None:
        raise InputError("give --source-column, --target, --val FILE and --size with the table")
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from theodolite.data.transport_scaling import Source, TransportScaling

    regression = flags.task == "regression"
    if flags.task not in (None, "classification", "regression"):
        raise InputError(f"--task is classification or regression here, got {flags.task!r}")
    X, y, names, X_val, y_val = _read(table, val, source_column, flags)
    costs = _costs(cost or [], sorted(set(names.tolist())))
    sources = [Source(name, X[names == name], y[names == name], cost=price) for name, price in costs.items()]
    model: Any = make_pipeline(StandardScaler(), Ridge() if regression else LogisticRegression(C=10, max_iter=1000))
    scaling = TransportScaling(model, grid_step=grid_step, n_repeats=repeats, executor=workers, seed=flags.seed)
    chosen = scaling.fit(sources, X_val, y_val).select(size, budget)
    low, high = scaling.predict_interval(chosen.p, size)
    one, two = scaling.tables_
    result: dict[str, Any] = {
        "mix": {source.name: round(float(share), 3) for source, share in zip(sources, chosen.p)},
        "predicted_score": round(chosen.predicted_score, 4),
        "interval": [round(low, 4), round(high, 4)],
        "score": "R2" if regression else "accuracy",
        "predicted_for_plain_mixes": {
            name: round(plain.predicted_score, 4) for name, plain in chosen.baselines.items()
        },
        "pilot_sizes": [one.size, two.size],
        "law": scaling.form_,
        "error_of_the_law_on_held_out_mixes": round(float(scaling.errors_.loc[scaling.form_].iloc[1]), 4)
        if scaling.form_ in scaling.errors_.index
        else "not known: no region of mixes could be held out",
        "models_trained": scaling.n_trainings_,
    }
    tell(result, as_json)


def _costs(given: list[str], names: list[str]) -> dict[str, float]:
    costs = dict.fromkeys(names, 1.0)
    for one in given:
        name, _, number = one.rpartition("=")
        if name not in costs:
            raise InputError(f"--cost {one}: the sources are {', '.join(names)}; write SOURCE=COST")
        try:
            costs[name] = float(number)
        except ValueError as error:
            raise InputError(f"--cost {one}: {number!r} is no number") from error
    return costs


def _read(path: Path, val: Path, source: str, flags: SubjectFlags) -> tuple[Any, Any, Any, Any, Any]:
    """Pilot rows, labels and sources; validation rows and labels. Both files are encoded alike."""
    import numpy as np
    import pandas as pd

    from theodolite.core.loading import DataOptions
    from theodolite.core.loading.columns import find_columns, fit_encoding
    from theodolite.core.loading.tables import read_table

    frames = []
    for file in (path, val):
        if not file.is_file():
            raise DataError(f"there is no file {file}")
        frames.append(read_table(file, DataOptions(header=True, max_rows=_ALL, seed=flags.seed)).frame)
    target = str(flags.target)
    for file, frame, needed in ((path, frames[0], (source, target)), (val, frames[1], (target,))):
        absent = [name for name in needed if name not in frame.columns]
        if absent:
            raise InputError(
                f"{file} has no column {absent[0]!r}; its columns are {', '.join(map(str, frame.columns[:20]))}"
            )
        empty = [name for name in needed if frame[name].isna().any()]
        if empty:
            raise DataError(f"{file}: {int(frame[empty[0]].isna().sum())} rows have no value in column {empty[0]!r}")
    pilot, validation = frames[0].drop(columns=[source, target]), frames[1].drop(columns=target)
    validation = validation.drop(columns=source, errors="ignore")
    if sorted(map(str, pilot.columns)) != sorted(map(str, validation.columns)):
        different = sorted(set(map(str, pilot.columns)) ^ set(map(str, validation.columns)))
        raise InputError(f"both files need the same columns; {', '.join(different[:10])} are in one of them only")
    found = find_columns(pd.concat([pilot, validation[list(pilot.columns)]], ignore_index=True))
    holes = [column.name for column in found.columns if column.missing]
    if holes and flags.missing != "median":
        raise DataError(f"columns {', '.join(holes[:5])} have missing values; fill them in with --missing median")
    n = len(pilot)
    X = fit_encoding(found, np.arange(n), standardise=False).encode(found.values).astype(np.float64)
    kind: Any = float if flags.task == "regression" else str
    try:
        y, y_val = (frame[target].astype(kind).to_numpy() for frame in frames)
    except ValueError as error:
        raise DataError(f"column {target!r} holds text, so this is no regression") from error
    if kind is str:
        y, y_val = y.astype(str), y_val.astype(str)
    return X[:n], y, frames[0][source].astype(str).to_numpy(dtype=str), X[n:], y_val
