"""What the commands of ``theodolite run`` share: options, printing, reading small files, the chart of a subject."""

__all__ = ["Memory", "Seconds", "array", "chart", "lines", "tell"]

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from theodolite.commands import SubjectFlags
from theodolite.core.errors import DataError
from theodolite.core.estimate import Estimate

Seconds = Annotated[float, typer.Option(help="time to plan for")]
Memory = Annotated[int, typer.Option(help="MiB to expand a batch to", min=16)]


def tell(result: Any, as_json: bool) -> None:
    """Print a dictionary of results, for people or for machines; an Estimate with its interval either way."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, default=_plain))
        return
    console = Console()
    for name, value in result.items():
        console.print(f"[bold]{name.replace('_', ' ')}[/]", end=": ")
        console.print(str(value) if isinstance(value, Estimate) else value, markup=False)


def _plain(value: Any) -> Any:
    from theodolite.survey.finding import estimate_to_json

    if isinstance(value, Estimate):
        return estimate_to_json(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def chart(slug: str, flags: SubjectFlags, seconds: float, memory: int, as_json: bool) -> None:
    """Print the finding of the method ``slug`` about a subject, as the survey makes it."""
    from theodolite.survey.run import measure

    finding = measure(slug, flags.load(), seed=flags.seed, seconds=seconds, memory=memory << 20)
    if as_json:
        print(json.dumps(finding.to_json(), ensure_ascii=False))
    else:
        Console().print(str(finding), markup=False)


def lines(path: Path) -> list[str]:
    """The lines of a text file, without blank ones."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def array(path: Path) -> Any:
    """A .npy file of numbers."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as a .npy array of numbers: {error}") from error
