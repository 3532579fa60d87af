"""``theodolite run diagonal-state-space``."""

__all__ = ["command"]

from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import ModelError
from theodolite.run_commands.shared import Memory, Seconds, chart, tell


@subject_flags
def command(
    flags: SubjectFlags,
    inspect: Annotated[
        Path | None, typer.Option(help="write the memory and frequency of every channel into this CSV file")
    ] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Chart a subject: the layers inside its network, or such a network trained beside its model of series; or --inspect."""
    if inspect is None:
        chart("diagonal-state-space", flags, seconds, memory, as_json)
        return
    import pandas as pd

    from theodolite.core.files import write_whole
    from theodolite.networks.diagonal_ssm import kernel_summary
    from theodolite.survey.networks.state_space import kernels_of

    subject = flags.load()
    kernels = kernels_of(subject.predictor)
    if not kernels:
        raise ModelError(f"{subject.name}: {subject.model_name} holds no S4D layers, so there is nothing to inspect")
    tables: dict[str, Any] = {name: kernel_summary(kernel) for name, kernel in kernels.items()}
    whole: Any = pd.concat([table.assign(layer=name) for name, table in tables.items()], ignore_index=True)
    write_whole(inspect, whole.to_csv(index=False))
    result: dict[str, Any] = {
        name: {
            "channels": len(table),
            **{f"median_{column}": round(float(table[column].median()), 4) for column in table.columns[1:]},
        }
        for name, table in tables.items()
    }
    tell(result | {"written": str(inspect)}, as_json)
