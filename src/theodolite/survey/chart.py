"""Charts: what each method needs of a subject, what it costs, and how it becomes a finding."""

__all__ = ["CHARTS", "Budget", "Chart", "Needs", "chart", "load_charts", "seconds", "trainings"]

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from theodolite.catalog import SPACES, entry
from theodolite.core.memory import DEFAULT_BUDGET
from theodolite.core.subject import Modality, Subject, Task
from theodolite.survey.finding import Finding


@dataclass(frozen=True)
class Budget:
    """What one chart may use: seconds of time, bytes of memory for what it expands, and the seed of its numbers."""

    seconds: float = 60.0
    memory: int = DEFAULT_BUDGET
    seed: int = 0


@dataclass(frozen=True)
class Needs:
    """What a subject must be for a chart to apply; `refusal` gives the one reason why not.

    language_model: True where only language models will do, None where they will too; task and classes are asked of others.
    """

    network: bool = False
    language_model: bool | None = False
    retrainable: bool = False
    modalities: tuple[Modality, ...] = ()
    task: Task | None = None
    classes: int = 2
    rows: int = 40
    test: Callable[[Subject], str | None] | None = None

    def refusal(self, subject: Subject) -> str | None:
        """None where the chart applies, otherwise the first need that is not met, in words."""
        data = subject.data
        if self.language_model and not subject.is_language_model:
            return f"needs a language model; {subject.model_name} answers with {data.task}, not with tokens"
        if subject.is_language_model and self.language_model is False:
            return "needs a model that gives each row a class or a value; this one continues texts"
        if self.network and not subject.is_network:
            return f"needs a network; {subject.model_name} is a black box without layers or gradients"
        if self.retrainable and not subject.retrainable:
            return "needs a network that can be trained again; give a factory (package.module:function) as the model"
        if self.modalities and data.modality not in self.modalities:
            return f"needs {' or '.join(self.modalities)} data; these are {data.modality}"
        if self.task is not None and data.task != self.task and not subject.is_language_model:
            return f"needs a {self.task}; this is a {data.task}"
        if data.task == "classification" and len(data.classes) < self.classes:
            return f"needs at least {self.classes} classes; there are {len(data.classes)}"
        if min(len(rows) for rows in data.parts.values()) < self.rows:
            found = ", ".join(f"{part} {len(rows):,}" for part, rows in data.parts.items())
            return f"needs at least {self.rows} rows in each part of the data; there are {found}"
        return self.test(subject) if self.test is not None else None


@dataclass(frozen=True)
class Chart:
    """A registered chart. cost(subject) is a forecast in seconds."""

    slug: str
    needs: Needs
    cost: Callable[[Subject], float]
    draw: Callable[[Subject, Budget], Finding]


CHARTS: dict[str, Chart] = {}


def chart(slug: str, *, needs: Needs, cost: Callable[[Subject], float]) -> Callable[..., Callable[..., Finding]]:
    """Register ``draw(subject, budget) -> Finding`` as the chart of the method ``slug``."""
    entry(slug)

    def register(draw: Callable[[Subject, Budget], Finding]) -> Callable[[Subject, Budget], Finding]:
        CHARTS[slug] = Chart(slug, needs, cost, draw)
        return draw

    return register


def trainings(count: float) -> Callable[[Subject], float]:
    """The cost of training the subject's network ``count`` times."""
    return lambda subject: count * subject.training_seconds


def seconds(forecast: float) -> Callable[[Subject], float]:
    """A cost that hardly depends on the subject."""
    return lambda _: forecast


def load_charts() -> dict[str, Chart]:
    """All charts: importing the files in a space's folder registers what stands in them."""
    for space in SPACES:
        name = f"theodolite.survey.{space}"
        if find_spec(name) is not None:
            for file in pkgutil.iter_modules(importlib.import_module(name).__path__):
                importlib.import_module(f"{name}.{file.name}")
    return CHARTS
