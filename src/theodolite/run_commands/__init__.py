"""``theodolite run SLUG``: one method on the user's own input.

A method's own command is the function ``command`` in the file of its slug here; a method without one charts a subject as the
survey does.
"""

__all__ = ["run_app"]

import importlib
from collections.abc import Callable
from importlib.util import find_spec

import typer

from theodolite.catalog import CATALOG, Entry
from theodolite.commands import Json, SubjectFlags, subject_flags
from theodolite.run_commands.shared import Memory, Seconds, chart

run_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _command(about: Entry) -> Callable[..., None]:
    module = f"{__name__}.{about.slug.replace('-', '_')}"
    if find_spec(module) is not None:
        return importlib.import_module(module).command

    @subject_flags
    def run(flags: SubjectFlags, seconds: Seconds = 60.0, memory: Memory = 1024, as_json: Json = False) -> None:
        chart(about.slug, flags, seconds, memory, as_json)

    return run


for _about in CATALOG:
    if _about.state == "available":
        run_app.command(_about.slug, help=f"{_about.title} ({_about.authors}, {_about.year}). Needs {_about.needs}.")(
            _command(_about)
        )
