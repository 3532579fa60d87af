"""The command line: parses, calls, prints."""

__all__ = ["app", "main"]

import itertools
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from theodolite.catalog import CATALOG, SPACES
from theodolite.commands import Json, Seed, SubjectFlags, parse_duration, subject_flags
from theodolite.core.errors import TheodoliteError
from theodolite.run_commands import run_app

app = typer.Typer(
    name="theodolite",
    help="Survey the spaces a machine-learning model lives in: what its weights need, what its layers hold, what its "
    "answers rest on and how far they can be trusted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(run_app, name="run", help="Run one method on your own input: theodolite run SLUG --help")

_STATES = {"found": "[green]✓[/]", "kept": "[blue]=[/]", "failed": "[red]✗[/]", "skipped": "[yellow]-[/]"}
_PARTLY_FAILED, _INTERRUPTED = 3, 130


@app.command()
@subject_flags
def survey(
    flags: SubjectFlags,
    out: Annotated[Path, typer.Option(help="folder to write the atlas into")] = Path("atlas"),
    budget: Annotated[str, typer.Option(help="time for all methods together: 90s, 10m, 1h")] = "10m",
    memory: Annotated[int, typer.Option(help="MiB that one method may expand a batch to", min=16)] = 1024,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over where the folder holds an atlas already")] = False,
    only: Annotated[list[str] | None, typer.Option(help="run only this method (may be repeated)")] = None,
    as_json: Json = False,
) -> None:
    """Survey a model with its data and write an atlas: one page, and one JSON file per finding.

    Without arguments it surveys a built-in subject. Run it again in the same folder and it continues where it stopped.
    Exit codes: 0 done, 1 could not, 2 wrong command line, 3 done but a method failed, 130 stopped.
    """
    from theodolite.catalog import entry
    from theodolite.core.files import make_folder
    from theodolite.survey.run import survey as run_survey

    console = Console(stderr=as_json)
    seconds = parse_duration(budget)
    slugs = tuple(entry(slug).slug for slug in only or ())
    make_folder(out)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with console.status("preparing the subject"):
        subject = flags.load()
    quality = subject.quality()
    console.print(f"[bold]{escape(subject.name)}[/]: {escape(subject.description)}")
    console.print(f"on test rows {quality}, chance {subject.data.chance:.3g}")
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    )
    task = progress.add_task("planning", total=None)

    def tell(outcome: Any) -> None:
        text = outcome.text if outcome.state in ("found", "kept") else f"{outcome.state}: {outcome.text}"
        took = f" [dim]{outcome.seconds:.1f} s[/]" if outcome.seconds else ""
        progress.console.print(f"{_STATES[outcome.state]} [bold]{outcome.step.slug}[/]  {escape(text)}{took}")

    try:
        with progress:
            state = run_survey(
                subject, out, budget=seconds, memory=memory << 20, seed=flags.seed, fresh=fresh, only=slugs,
                command=" ".join(["theodolite", *sys.argv[1:]]), code=flags.code(), on_outcome=tell,
                on_step=lambda step: progress.update(
                    task, description=f"{step.slug} (about {max(1, round(step.seconds))} s)"
                ),
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print(f"stopped; what was found is in {out}. The same command continues.")
        raise typer.Exit(_INTERRUPTED) from None
    if as_json:
        print(json.dumps(state, ensure_ascii=False))
    else:
        for step in state["plan"]:
            if not step["applies"]:
                console.print(f"[dim]· {step['slug']} does not apply: it {escape(step['reason'])}[/]")
        console.print(f"wrote [bold]{out / 'index.html'}[/]")
    if state["failed"]:
        raise typer.Exit(_PARTLY_FAILED)


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="method, as in: theodolite methods")],
    full: Annotated[bool, typer.Option("--full", help="the paper's setting as far as it fits; minutes")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure a paper's headline claims here, beside the paper's numbers and a comparator from the same run.

    Exit codes: 0 it ran, whether the claims hold or not; 1 it could not.
    """
    from theodolite.reproductions.claim import Claim
    from theodolite.reproductions.report import reproduce as run_claims

    console = Console(stderr=as_json)

    def tell(claim: Claim) -> None:
        verdict = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "[yellow]cannot be told here[/]"}
        console.print(f"{verdict[claim.holds]}  {escape(claim.claim)}")
        console.print(f"    paper {escape(claim.paper)}; bar {escape(claim.threshold)}; measured {claim.measured}")
        if claim.comparator is not None:
            console.print(f"    beside it: {escape(claim.comparator.name)} {claim.comparator.measured:.4g}")
        if claim.scaled:
            console.print(f"    [dim]{escape(claim.scaled)}[/]")

    report = run_claims(slug, full=full, seed=seed, on_claim=tell)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        console.print(f"{len(report.claims)} claims in {report.seconds:.1f} s, seed {seed}")


@app.command()
def methods(
    space: Annotated[str | None, typer.Option(help=f"only this space: {', '.join(SPACES)}")] = None,
    as_json: Json = False,
) -> None:
    """List the catalogue: method, space, paper, what it needs, and how its claims came out when last measured."""
    from theodolite.reproductions.report import last_measured

    if space is not None and space not in SPACES:
        raise typer.BadParameter(f"{space!r} is not one of {', '.join(SPACES)}", param_hint="--space")
    chosen = [about for about in CATALOG if space in (None, about.space)]
    if as_json:
        rows = [
            {
                **{name: getattr(about, name) for name in ("slug", "title", "authors", "year", "arxiv", "space")},
                "module": about.import_name,
                "needs": about.needs,
                "state": about.state,
                "claims": str(last_measured(about.slug) or ""),
            }
            for about in chosen
        ]
        print(json.dumps(rows, ensure_ascii=False))
        return
    table = Table(
        Column("method", no_wrap=True, min_width=max(len(about.slug) for about in chosen)), "paper", "needs", "claims"
    )
    for name, group in itertools.groupby(chosen, key=lambda about: about.space):
        table.add_section()
        table.add_row(f"[bold]{name}[/]", f"[italic]{SPACES[name]}[/]")
        for about in group:
            claims = str(last_measured(about.slug) or about.state)
            style = "" if about.state == "available" else "dim"
            table.add_row(about.slug, f"{about.title} ({about.year})", about.needs, claims, style=style)
    Console().print(table)


@app.command()
def subjects(as_json: Json = False) -> None:
    """List the built-in subjects."""
    from theodolite.subjects import SUBJECTS

    if as_json:
        print(json.dumps([{"name": name, "description": about} for name, about in SUBJECTS.items()]))
        return
    for name, about in SUBJECTS.items():
        Console().print(f"[bold]{name}[/]  {about}")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and stop", is_eager=True)] = False,
) -> None:
    if version:
        import theodolite

        print(theodolite.__version__)
        raise typer.Exit()


def main() -> None:
    """Run the command line; an error of this package is one line on stderr and exit code 1, a warning is a line too."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # no paths and no code
    try:
        app()
    except TheodoliteError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(1)
