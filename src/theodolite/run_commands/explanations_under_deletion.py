"""``theodolite run explanations-under-deletion``."""

__all__ = ["command"]

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, array, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    rows: Annotated[Path | None, typer.Option(help=".npy file of training rows, rows x features, scaled")] = None,
    labels: Annotated[Path | None, typer.Option(help=".npy file of their labels, 0 and 1; 1 is to be reached")] = None,
    queries: Annotated[Path | None, typer.Option(help=".npy file of the rows that need a counterfactual")] = None,
    delete: Annotated[
        float, typer.Option(help="training rows that may be deleted: a number, or a share below 1")
    ] = 0.01,
    regularisation: Annotated[float, typer.Option("--C", help="C of the logistic regression", min=0.0)] = 1.0,
    fixed: Annotated[str, typer.Option(help="columns that may not change, by number: 0,4,7")] = "",
    increasing: Annotated[str, typer.Option(help="columns that may only grow, by number")] = "",
    decreasing: Annotated[str, typer.Option(help="columns that may only fall, by number")] = "",
    group: Annotated[
        list[str] | None, typer.Option(help="one-hot group of 0 and 1: its columns, by number; repeat for more")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="retrain without the worst rows and go on until that is survived")
    ] = True,
    out: Annotated[Path | None, typer.Option(help=".npy file to write the counterfactuals to")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Counterfactuals that survive deletions: give --rows, --labels and --queries, or a subject as for the survey."""
    if rows is None and labels is None and queries is None:
        chart("explanations-under-deletion", flags, seconds, memory, as_json)
        return
    if rows is None or labels is None or queries is None:
        raise InputError("give all of --rows, --labels and --queries (.npy files)")
    import numpy as np

    from theodolite.core.files import write_bytes
    from theodolite.explanations.deletion_robust import DeletionRobustCounterfactual, validity_under_deletion

    limits = {
        "immutable": _columns("--fixed", fixed), "increasing": _columns("--increasing", increasing),
        "decreasing": _columns("--decreasing", decreasing), "groups": [_columns("--group", one) for one in group or ()],
    }  # fmt: skip
    x, y = array(rows), array(labels)
    k: Any = int(delete) if delete >= 1 and delete == int(delete) else delete
    made = DeletionRobustCounterfactual(k, verify=verify, **limits).fit(x, y, C=regularisation)
    found = made.generate(array(queries))
    plain = DeletionRobustCounterfactual(0, **limits).fit(x, y, C=regularisation).generate(array(queries))
    result: dict[str, Any] = {"queries": len(found), "deleted_rows": found.k, "reached": int(found.valid.sum())}
    if verify:
        result["certified_for_the_sets_visited"] = int(found.certified.sum())
    if found.k > 0:
        common = np.bincount(np.concatenate([*found.worst_rows, np.zeros(0, dtype=np.int64)]), minlength=len(y))
        result["rows_most_able_to_break_them"] = np.argsort(-common, kind="stable")[
            : min(10, int((common > 0).sum()))
        ].tolist()
        for name, points in (("plain", plain), ("robust", found)):
            for mode in ("random", "worst"):
                share = validity_under_deletion(points, x, y, k, mode, C=regularisation, seed=flags.seed)
                result[f"{name}_accepted_after_{mode}_deletion"] = round(float(share.mean()), 4)
    if found.valid.any():
        result["mean_cost"] = round(float(found.cost[found.valid].mean()), 6)
        result["mean_plain_cost"] = round(float(found.plain_cost[found.valid].mean()), 6)
    if out is not None:
        buffer = io.BytesIO()
        np.save(buffer, found.counterfactuals)
        write_bytes(out, buffer.getvalue())
    elif as_json:
        result["counterfactuals"] = [
            row.tolist() if there else None for row, there in zip(found.counterfactuals, found.valid, strict=True)
        ]
    tell(result, as_json)


def _columns(option: str, given: str) -> list[int]:
    try:
        return [int(column) for column in given.split(",") if column.strip()]
    except ValueError as error:
        raise InputError(f"{option} takes column numbers between commas (0,4,7), got {given!r}") from error
