"""What a user may say about data, and what a model says about the data it takes."""

__all__ = ["DataOptions", "Embedding", "Wanted"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from theodolite.core.errors import InputError
from theodolite.core.subject import Task


@dataclass(frozen=True)
class DataOptions:
    """What settles a question that the data leave open; every field is a flag of the command line.

    target: name of the label column. task: "classification" or "regression". test: a second file with the test rows.
    missing: "error", "drop" (leave out rows with a missing value), "median" (fill in the median, or the commonest
    level, of the training rows) or, of a series, "last" (the value before goes on). scale: "none" or "standard"; not
    given, columns are standardised for a network that is trained here and left alone for a model that comes trained.
    text: name of the text column. header: whether the first line of a CSV holds names. max_rows: rows kept of larger
    data, drawn uniformly. image_size: side in pixels. series: the rows of a table are times in their order, the rows
    of an array (and, for classification, of a table) are series. window: steps of a table's windows (96). domain:
    name of the column that names each row's site (a hospital, a shop, a week); it is no input of the model, unless a
    model that comes trained asks for it.
    """

    target: str | None = None
    task: str | None = None
    test: str | None = None
    missing: str | None = None
    scale: str | None = None
    text: str | None = None
    header: bool | None = None
    max_rows: int = 50_000
    image_size: int | None = None
    series: bool = False
    window: int | None = None
    domain: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "task": ("classification", "regression"),
            "missing": ("error", "drop", "median", "last"),
            "scale": ("none", "standard"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in (None, *values):
                raise InputError(f"--{name} is one of {', '.join(values)}; got {getattr(self, name)!r}")
        if self.missing == "last" and not self.series:
            raise InputError("--missing last carries the value before on, which only the times of a --series have")
        if self.domain is not None and self.series:
            raise InputError(
                "--domain names a column of a table's rows; with --series the rows are times or whole series"
            )
        if self.max_rows < 10:
            raise InputError(f"--max-rows must be at least 10, got {self.max_rows}")
        if self.image_size is not None and not 4 <= self.image_size <= 2048:
            raise InputError(f"--image-size must lie between 4 and 2048 pixels, got {self.image_size}")
        if self.window is not None and (not self.series or self.window < 2):
            raise InputError(
                f"--window is the length of a series' windows, at least 2, with --series; got {self.window}"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must lie between 0 and 2**32 - 1, got {self.seed}")


@runtime_checkable
class Embedding(Protocol):
    """Turns texts into vectors; what it learns, it learns from the training texts."""

    note: str

    def fit(self, texts: Sequence[str]) -> None:
        """Learn from the training texts."""
        ...

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (n, dimensions), float32."""
        ...

    def features(self) -> tuple[str, ...]:
        """Names of the dimensions, () where they have none."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What a model says about its data: task, classes by name, columns by name, how texts become vectors.

    trained: the model comes with what it has learnt, so the data must be as it knows them.
    """

    trained: bool = False
    task: Task | None = None
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    embedding: Embedding | None = None
