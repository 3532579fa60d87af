"""The plan: for every method that is there, that it runs and what it will cost, or the one reason why it does not."""

__all__ = ["Step", "make_plan"]

from dataclasses import dataclass
from typing import Any

from theodolite.catalog import CATALOG
from theodolite.core.subject import Subject
from theodolite.survey.chart import load_charts


@dataclass(frozen=True)
class Step:
    """One method of the plan. seconds is a forecast, 0 where it does not apply."""

    slug: str
    space: str
    title: str
    applies: bool
    reason: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``atlas.json``."""
        return dict(vars(self))


def make_plan(subject: Subject) -> tuple[Step, ...]:
    """One step per available method, in the catalogue's order."""
    charts = load_charts()
    steps = []
    for about in CATALOG:
        if about.state == "planned":
            continue
        chart = charts.get(about.slug)
        reason = "has no chart; use it with: theodolite run" if chart is None else chart.needs.refusal(subject)
        cost = chart.cost(subject) if chart is not None and reason is None else 0.0
        steps.append(Step(about.slug, about.space, about.title, reason is None, reason or "", round(cost, 1)))
    return tuple(steps)
