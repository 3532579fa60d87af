"""``theodolite run label-geometry``."""

__all__ = ["command"]

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.core.errors import InputError
from theodolite.run_commands.shared import Memory, Seconds, array, chart, lines, tell


@subject_flags
def command(
    flags: SubjectFlags,
    probs: Annotated[Path | None, typer.Option(help=".npy file of probabilities, rows x observed labels")] = None,
    observed: Annotated[
        Path | None, typer.Option(help="text file: the label of each column, one a line; all labels where left out")
    ] = None,
    metric: Annotated[
        Path | None, typer.Option(help="text file of the label tree or graph: parent child a line")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="text file: the labels that may be answered; all nodes where left out")
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="text file: the true label of each row; adds a report")] = None,
    out: Annotated[Path | None, typer.Option(help="text file to write the answers to, one a line")] = None,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """Answer with labels that a classifier never saw: give --probs and --metric, or a subject as for the survey."""
    if probs is None and metric is None:
        chart("label-geometry", flags, seconds, memory, as_json)
        return
    if probs is None or metric is None:
        raise InputError("give both --probs (a .npy file) and --metric (a text file of edges)")
    import numpy as np

    from theodolite.core.files import write_whole
    from theodolite.predictions.label_geometry import FrechetPredictor, LabelMetric, adaptation_report, next_class

    p = array(probs)
    geometry = LabelMetric.from_hierarchy_file(metric, None if labels is None else lines(labels))
    columns = list(geometry.labels) if observed is None else lines(observed)
    predictor = FrechetPredictor(geometry, columns)
    answers = predictor.predict(p)
    result: dict[str, Any] = {
        "rows": len(answers),
        "labels": len(geometry),
        "observed": len(columns),
        "tied": predictor.ties_,
        "share_of_answers_never_observed": float(np.mean(~np.isin(answers, np.array(columns)))),
        "next_label": next(iter(map(str, next_class(geometry, columns))), None),
    }
    if truth is not None:
        report = adaptation_report(p, lines(truth), geometry, columns, seed=flags.seed)
        result |= {
            name: value for name, value in dataclasses.asdict(report).items() if not isinstance(value, np.ndarray)
        }
    if out is not None:
        write_whole(out, "".join(f"{answer}\n" for answer in answers))
    elif as_json:
        result["answers"] = [str(answer) for answer in answers]
    tell(result, as_json)
