"""What a chart finds: one line to remember, numbers with intervals, a control, a figure, and what to do next."""

__all__ = ["Finding", "estimate_from_json", "estimate_to_json"]

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from theodolite.catalog import Entry, entry
from theodolite.core.errors import InputError
from theodolite.core.estimate import Comparison, Control, Estimate


@dataclass(frozen=True, eq=False)
class Finding:
    """One method's answer about one subject.

    headline: one sentence with at least one measured number. numbers: every number shown, each with its interval.
    comparison: the main number beside its controls; where it does not beat them, the page says so beside the headline.
    reading: how to read the figure. advice: what to do next. code: Python that gives the same numbers.
    caveats: what limits this finding, in words. seconds and peak_bytes are filled in by whoever ran the chart.
    """

    slug: str
    headline: str
    numbers: Mapping[str, Estimate]
    comparison: Comparison
    figure: go.Figure
    reading: str
    advice: str
    seed: int
    code: str = ""
    caveats: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.numbers:
            raise InputError(f"{self.slug}: a finding needs at least one number")
        if not self.headline.strip():
            raise InputError(f"{self.slug}: a finding needs a headline")

    @property
    def entry(self) -> Entry:
        """The catalogue's entry of the method."""
        return entry(self.slug)

    @property
    def beaten(self) -> tuple[Control, ...]:
        """The controls that the main number does not beat: empty is good."""
        return self.comparison.loses_to

    def measured(self, *, seconds: float, peak_bytes: int | None, code: str) -> "Finding":
        """The same finding with what its run cost and the Python that repeats it."""
        return replace(self, seconds=seconds, peak_bytes=peak_bytes, code=code)

    def __str__(self) -> str:
        lines = [self.headline, *(f"  {name}: {number}" for name, number in self.numbers.items())]
        for control in self.comparison.controls:
            verdict = "beaten" if self.comparison.beats(control) else "not beaten"
            lines.append(f"  control, {control.name}: {control.estimate} ({verdict})")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As it is written to ``findings/SLUG.json``; infinite ends of intervals become null."""
        about = self.entry
        first, *others = (self._control(control) for control in self.comparison.controls)
        return {
            "slug": self.slug,
            "space": about.space,
            "title": about.title,
            "authors": about.authors,
            "year": about.year,
            "arxiv": about.arxiv,
            "module": about.import_name,
            "headline": self.headline,
            "numbers": [{"name": name, **estimate_to_json(number)} for name, number in self.numbers.items()],
            "measured": {"name": self.comparison.name, **estimate_to_json(self.comparison.estimate)},
            "larger_is_better": self.comparison.larger_is_better,
            "control": first,
            "controls": [first, *others],
            "loses": bool(self.beaten),
            "figure": json.loads(str(self.figure.to_json())),
            "reading": self.reading,
            "advice": self.advice,
            "code": self.code,
            "caveats": list(self.caveats),
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
        }

    def _control(self, control: Control) -> dict[str, Any]:
        return {
            "name": control.name,
            "kind": control.kind,
            **estimate_to_json(control.estimate),
            "beaten": self.comparison.beats(control),
        }


def estimate_to_json(estimate: Estimate) -> dict[str, Any]:
    """{"value", "low", "high", "unit", "n"}; an end that is infinite is null."""
    ends = {"low": estimate.low, "high": estimate.high}
    return {
        "value": estimate.value,
        **{name: end if math.isfinite(end) else None for name, end in ends.items()},
        "unit": estimate.unit,
        "n": estimate.n,
    }


def estimate_from_json(value: Mapping[str, Any]) -> Estimate:
    """The estimate that `estimate_to_json` wrote."""
    low = -math.inf if value["low"] is None else value["low"]
    high = math.inf if value["high"] is None else value["high"]
    return Estimate(value["value"], low, high, value.get("unit", ""), value.get("n"))
