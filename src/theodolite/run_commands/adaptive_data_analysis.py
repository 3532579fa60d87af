"""``theodolite run adaptive-data-analysis``."""

__all__ = ["command"]

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Dask, Json, SubjectFlags, Workers, executor_of, subject_flags
from theodolite.core.errors import DataError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    audit: Annotated[Path | None, typer.Option(help="ledger or CSV of looks at a holdout: count them")] = None,
    rows: Annotated[int | None, typer.Option(help="rows of the holdout, where the log does not say", min=1)] = None,
    attack: Annotated[int | None, typer.Option(help="run the attack on this many rows of pure noise", min=2)] = None,
    features: Annotated[int | None, typer.Option(help="noise features of the attack; as many as rows", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="repeats of the attack", min=1)] = 5,
    workers: Workers = None,
    dask: Dask = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Audit a log of looks at a holdout, run the attack at some size, or chart a subject as the survey does."""
    from theodolite.data.reusable_holdout import audit as audit_log
    from theodolite.data.reusable_holdout import freedman_attack

    if audit is not None:
        if not audit.exists():
            raise DataError(f"there is no file {audit}")
        tell(dataclasses.asdict(audit_log(audit, rows=rows)), as_json)
    elif attack is not None:
        d = features or attack
        kept = sorted({max(1, round(d * share)) for share in (0.01, 0.02, 0.05)})
        result: dict[str, Any] = {"rows": attack, "features": d, "kept_features": kept}
        with executor_of(workers, dask) as executor:
            for mechanism in ("standard", "gaussian", "thresholdout"):
                run = freedman_attack(
                    attack, d, kept, mechanism=mechanism, repeats=repeats, seed=flags.seed, executor=executor
                )
                result[f"reported_by_{mechanism}"] = run.reported.mean(axis=0).round(4).tolist()
                result[f"true_accuracy_under_{mechanism}"] = run.fresh.mean(axis=0).round(4).tolist()
        tell(result, as_json)
    else:
        chart("adaptive-data-analysis", flags, seconds, memory, as_json)
