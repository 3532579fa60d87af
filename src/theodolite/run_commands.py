"""``theodolite run SLUG``: one method on the user's own input."""

__all__ = ["run_app"]

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from theodolite.catalog import CATALOG, Entry
from theodolite.commands import Dask, Json, SubjectFlags, Workers, executor_of, subject_flags
from theodolite.core.errors import DataError, InputError

run_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Seconds = Annotated[float, typer.Option(help="time to plan for")]
Memory = Annotated[int, typer.Option(help="MiB to expand a batch to", min=16)]


def _tell(result: Any, as_json: bool) -> None:
    """Print a dictionary of results, for people or for machines."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    console = Console()
    for name, value in result.items():
        console.print(f"[bold]{name.replace('_', ' ')}[/]", end=": ")
        console.print(value, markup=False)


def _chart(slug: str, flags: SubjectFlags, seconds: float, memory: int, as_json: bool) -> None:
    from theodolite.survey.run import measure

    finding = measure(slug, flags.load(), seed=flags.seed, seconds=seconds, memory=memory << 20)
    if as_json:
        print(json.dumps(finding.to_json(), ensure_ascii=False))
    else:
        Console().print(str(finding), markup=False)


def _generic(about: Entry) -> Callable[..., None]:
    @subject_flags
    def run(flags: SubjectFlags, seconds: Seconds = 60.0, memory: Memory = 1024, as_json: Json = False) -> None:
        _chart(about.slug, flags, seconds, memory, as_json)

    return run


@subject_flags
def _label_geometry(
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
        _chart("label-geometry", flags, seconds, memory, as_json)
        return
    if probs is None or metric is None:
        raise InputError("give both --probs (a .npy file) and --metric (a text file of edges)")
    import numpy as np

    from theodolite.core.files import write_whole
    from theodolite.predictions.label_geometry import FrechetPredictor, LabelMetric, adaptation_report, next_class

    p = _array(probs)
    geometry = LabelMetric.from_hierarchy_file(metric, None if labels is None else _lines(labels))
    columns = list(geometry.labels) if observed is None else _lines(observed)
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
        report = adaptation_report(p, _lines(truth), geometry, columns, seed=flags.seed)
        result |= {
            name: value for name, value in dataclasses.asdict(report).items() if not isinstance(value, np.ndarray)
        }
    if out is not None:
        write_whole(out, "".join(f"{answer}\n" for answer in answers))
    elif as_json:
        result["answers"] = [str(answer) for answer in answers]
    _tell(result, as_json)


@subject_flags
def _adaptive_data_analysis(
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
        _tell(dataclasses.asdict(audit_log(audit, rows=rows)), as_json)
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
        _tell(result, as_json)
    else:
        _chart("adaptive-data-analysis", flags, seconds, memory, as_json)


@subject_flags
def _interaction_basis(
    flags: SubjectFlags,
    nodes: Annotated[
        str | None, typer.Option(help="hidden layers by name, with commas between, in the order they run")
    ] = None,
    rows: Annotated[int, typer.Option(help="training rows to use", min=2)] = 2000,
    seconds: Seconds = 60.0,
    memory: Memory = 1024,
    as_json: Json = False,
) -> None:
    """The basis of the named layers, the modules they fall into and the free weights; or chart a subject as the survey."""
    if nodes is None:
        _chart("interaction-basis", flags, seconds, memory, as_json)
        return
    from theodolite.activations.interaction_basis import InteractionBasis, degeneracy, find_modules, interactions

    subject, names = flags.load(), [name.strip() for name in nodes.split(",") if name.strip()]
    if not subject.is_network:
        raise InputError(f"--nodes names layers of a network; {subject.name} is a {subject.model_name}")
    x = subject.data.train.x[:rows]
    options: dict[str, Any] = {"memory": memory << 20, "seed": flags.seed}
    basis = InteractionBasis.from_module(subject.predictor, names, **options).fit(x)
    report = degeneracy(subject.predictor, x, **options)
    modules = find_modules(interactions(basis, x), seed=flags.seed)
    result: dict[str, Any] = {
        name: {
            "width": layer.width,
            "directions": layer.rank,
            "rank_gram": layer.rank_gram,
            "rank_jacobian": layer.rank_jacobian,
            "identified": int(layer.identified.sum()),
            "eigenvalues": layer.eigenvalues[:20].tolist(),
        }
        for name, layer in zip(basis.sections_.names, basis.layers_, strict=True)
    }
    result |= {"modules": modules.count, "modularity": modules.q, "modularity_of_rewired_graphs": modules.q_null}
    result |= {"free_directions": report.free_directions, "weights_of_linear_layers": report.parameters}
    _tell(result, as_json)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _array(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as a .npy array of numbers: {error}") from error


_OWN = {
    "label-geometry": _label_geometry,
    "adaptive-data-analysis": _adaptive_data_analysis,
    "interaction-basis": _interaction_basis,
}

for _about in CATALOG:
    if _about.state == "available":
        run_app.command(_about.slug, help=f"{_about.title} ({_about.authors}, {_about.year}). Needs {_about.needs}.")(
            _OWN.get(_about.slug) or _generic(_about)
        )
