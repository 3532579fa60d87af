"""The flags that say what a command works on, and their form for machines."""

__all__ = ["Dask", "Json", "Seed", "SubjectFlags", "Workers", "executor_of", "parse_duration", "subject_flags"]

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from theodolite.core.errors import InputError

if TYPE_CHECKING:
    from theodolite.core.subject import Subject

Json = Annotated[bool, typer.Option("--json", help="print JSON and nothing else on stdout")]
Seed = Annotated[int, typer.Option(help="seed of every random choice; the same seed gives the same numbers")]
Workers = Annotated[int | None, typer.Option(help="spread the work over this many processes", min=1)]
Dask = Annotated[
    str | None, typer.Option(help="spread the work over the Dask cluster at this address (tcp://host:8786)")
]


@contextmanager
def executor_of(workers: int | None, dask: str | None) -> Iterator[Executor | int | None]:
    """What `theodolite.core.parallel.spread` takes, of the flags --workers and --dask; a cluster is left running."""
    if dask is None:
        yield workers
        return
    if workers is not None:
        raise InputError("--workers and --dask exclude each other: the cluster has its own workers")
    from theodolite.core.errors import require

    distributed = require("distributed", "distributed")
    try:
        client = distributed.Client(dask, timeout=5)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"--dask {dask}: no Dask scheduler answers there ({error})") from error
    with client:
        yield client.get_executor()


@dataclass(frozen=True)
class SubjectFlags:
    """What to survey: a built-in subject, a function that makes one, or a model with data."""

    subject: Annotated[
        str | None, typer.Option(help="built-in subject (theodolite subjects) or package.module:function")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="package.module:factory, a .skops or .onnx file, a Hugging Face folder or name, smollm2, or auto (train one)"
        ),
    ] = None
    weights: Annotated[Path | None, typer.Option(help=".safetensors or weights-only .pt file for the factory")] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="CSV, TSV, Parquet, NPZ, TS or JSON Lines file, folder of images by class, datasets folder; with "
            "--task language a text file, a folder or pattern of them, or JSON Lines"
        ),
    ] = None
    target: Annotated[str | None, typer.Option(help="name of the label column")] = None
    task: Annotated[
        str | None,
        typer.Option(
            help="classification or regression, where the labels do not tell; language: the model continues the texts"
        ),
    ] = None
    test: Annotated[str | None, typer.Option(help="a second file with the test rows")] = None
    missing: Annotated[
        str | None, typer.Option(help="what to do with missing values: error, drop, median, or last (of a series)")
    ] = None
    scale: Annotated[str | None, typer.Option(help="columns as they are (none) or standardised (standard)")] = None
    text: Annotated[str | None, typer.Option(help="name of the text column")] = None
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="whether the first line of a CSV holds names")
    ] = None
    max_rows: Annotated[int, typer.Option(help="rows kept of larger data, drawn uniformly")] = 50_000
    image_size: Annotated[int | None, typer.Option(help="side in pixels that images are scaled to")] = None
    series: Annotated[
        bool,
        typer.Option(
            "--series",
            help="a table's rows are times in order: forecast --target; the rows of an array, or of a table with --task "
            "classification, are series with a label each",
        ),
    ] = False
    window: Annotated[int | None, typer.Option(help="steps of the windows that --series cuts a table into (96)")] = None
    domain: Annotated[
        str | None,
        typer.Option(help="column of a table that names each row's domain (site, shop, week); no input of the model"),
    ] = None
    epochs: Annotated[int | None, typer.Option(help="epochs of one training of a factory's network")] = None
    seed: Seed = 0

    def load(self) -> "Subject":
        """The subject that the flags name."""
        from theodolite.core.loading import load_subject, load_subject_function
        from theodolite.subjects import SUBJECTS
        from theodolite.subjects import subject as builtin

        if self.subject is not None:
            if self.model or self.data:
                raise InputError("--subject names the model and the data at once; leave out --model and --data")
            if ":" in self.subject:
                return load_subject_function(self.subject)
            return builtin(self.subject, seed=self.seed)
        if self._reads_language:
            from theodolite.language.subjects import language_subject

            return language_subject(self.model or "smollm2", self.data, column=self.text or "text", seed=self.seed)
        if self.data is None:
            if self.model is not None:
                raise InputError("--model needs the data it is used on: --data FILE")
            return builtin(next(iter(SUBJECTS)), seed=self.seed)
        return load_subject(
            model=self.model or "auto",
            data=self.data,
            weights=self.weights,
            options=self.options(),
            epochs=self.epochs,
        )

    @property
    def _reads_language(self) -> bool:
        """Whether a model that continues texts is meant, on texts of --data or the built-in ones."""
        return self.subject is None and (self.task == "language" or (self.model == "smollm2" and self.task is None))

    def options(self) -> Any:
        """What the flags say about the data, as `theodolite.load_subject` takes it."""
        from theodolite.core.loading import DataOptions

        return DataOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DataOptions)})

    def code(self) -> str:
        """The line of Python that makes the same subject."""
        from theodolite.subjects import SUBJECTS

        seed = f", seed={self.seed}" if self.seed else ""
        if self.subject is not None and ":" in self.subject:
            module, _, name = self.subject.partition(":")
            return f"from {module} import {name}\nsubject = {name}()"
        if self._reads_language:
            text = f", {self.data!r}" if self.data else ""
            column = f", column={self.text!r}" if self.text else ""
            return f"subject = theodolite.language_subject({self.model or 'smollm2'!r}{text}{column}{seed})"
        if self.data is None:
            return f"subject = theodolite.subject({self.subject or next(iter(SUBJECTS))!r}{seed})"
        from theodolite.core.loading import DataOptions

        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(DataOptions)
            if getattr(self, field.name) != field.default
        }
        options = ", ".join(f"{name}={value!r}" for name, value in given.items())
        arguments = [f"model={self.model or 'auto'!r}", f"data={self.data!r}"]
        arguments += [f"weights={str(self.weights)!r}"] if self.weights else []
        arguments += [f"options=theodolite.DataOptions({options})"] if options else []
        arguments += [f"epochs={self.epochs}"] if self.epochs else []
        return f"subject = theodolite.load_subject({', '.join(arguments)})"


def subject_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `SubjectFlags` in place of its parameter ``flags``."""
    signature = inspect.signature(function)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for n, p in signature.parameters.items() if n != "flags"]
    shared = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(SubjectFlags)
    ]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        flags = SubjectFlags(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        function(flags=flags, **given)

    command.__signature__ = signature.replace(parameters=shared + own)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in shared + own} | {"return": None}
    return command


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "1.5h".

    >>> parse_duration("10m")
    600.0
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None or float(found[1]) == 0:
        raise InputError(f"a duration is a number of seconds, or a number with s, m or h; got {text!r}")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
