"""One figure for every way to spend few numbers on a network: quality against the numbers trained or kept, and what is not
beaten.
"""

__all__ = ["Point", "draw", "largest_update", "not_beaten"]

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from torch import nn

from theodolite.core.curve import QualityCurve
from theodolite.core.estimate import Estimate, format_number
from theodolite.parameters.peft import pareto_front
from theodolite.parameters.peft.sizes import largest
from theodolite.parameters.tucker import TuckerAdapters, adapt, parameter_count
from theodolite.parameters.tucker.decomposition import sensible_ranks
from theodolite.survey.figures import INKS, band_line, level_line

_OUTSIDE = 0.5  # of the points' range: a level further off than that would press the points together


@dataclass(frozen=True)
class Point:
    """A network as it was measured: the numbers that it trains or keeps, and its quality, larger is better."""

    coordinates: int
    quality: Estimate


def not_beaten(ways: Mapping[str, Sequence[Point]], *, nothing: float) -> list[tuple[str, int, float]]:
    """(way, numbers, quality) that no point with as few numbers reaches, from few numbers to many; only what is better than
    ``nothing``, the quality without any of them.
    """
    curves = {
        name: QualityCurve.from_runs(
            {point.coordinates: [point.quality.value] for point in points}, chance=nothing, reference=nothing
        )
        for name, points in ways.items()
    }
    return [point for point in pareto_front(curves) if point[2] > nothing]


def draw(
    figure: go.Figure,
    ways: Mapping[str, Sequence[Point]],
    *,
    nothing: float,
    levels: Mapping[str, float],
    control: Collection[str] = (),
    row: int | None = None,
) -> None:
    """Draw every way as a line of points with its intervals, the levels by name, and the front of what is not beaten.

    nothing: as in `not_beaten`. control: ways that are drawn in grey. row: in which panel. A level that lies far from all
    points is told in words at the edge.
    """
    col = None if row is None else 1
    for at, (name, points) in enumerate(ways.items()):
        line = sorted(points, key=lambda point: point.coordinates)
        low, high = [point.quality.low for point in line], [point.quality.high for point in line]
        grey = name in control
        band_line(
            figure, [point.coordinates for point in line], [point.quality.value for point in line], name=name,
            ink=INKS[6] if grey else INKS[at % 6], dash="dot" if grey else "dash" if at >= 6 else None, low=low, high=high,
            row=row, col=col,
        )  # fmt: skip
        if len(line) == 1:  # a band has no width here
            value = line[0].quality.value
            figure.data[-1].error_y = {"array": [high[0] - value], "arrayminus": [value - low[0]], "thickness": 1}
    front = not_beaten(ways, nothing=nothing)
    if front:
        figure.add_trace(
            go.Scatter(
                x=[size for _, size, _ in front], y=[value for _, _, value in front], mode="lines+markers",
                name="not beaten with as few numbers", line={"color": "#000000", "width": 1, "shape": "hv"},
                marker={"symbol": "circle-open", "size": 13, "color": "#000000"},
            ),
            row=row, col=col,
        )  # fmt: skip
    qualities = [point.quality for points in ways.values() for point in points]
    low, high = min(quality.low for quality in qualities), max(quality.high for quality in qualities)
    for name, level in levels.items():
        if low - _OUTSIDE * (high - low) <= level <= high + _OUTSIDE * (high - low):
            level_line(figure, level, name, row=row)
            continue
        where: dict[str, Any] = {} if row is None else {"row": row, "col": 1}
        figure.add_annotation(
            text=f"{name}: {format_number(level)}, {'below' if level < low else 'above'} this range", showarrow=False,
            xref="x domain", yref="y domain", x=1, y=0 if level < low else 1, xanchor="right",
            yanchor="bottom" if level < low else "top", **where,
        )  # fmt: skip


def largest_update(model: nn.Module, budget: int, *, kind: str = "tucker", **options: Any) -> TuckerAdapters | None:
    """The low-rank update of the weights, put into ``model``, of the largest rank that holds at most ``budget`` numbers.

    kind: "tucker" or "lora"; options: of `theodolite.parameters.tucker.adapt`. None where not even rank 1 fits; the model is
    then as before.
    """

    def size(shape: tuple[int, ...], rank: int) -> int:
        if kind == "lora":
            rest = math.prod(shape[1:])
            return min(rank, shape[0], rest) * (shape[0] + rest)
        return parameter_count(shape, sensible_ranks(shape, rank, shape[2:]))

    smallest = adapt(model, ranks=1, kind=kind, **options)
    smallest.remove()
    shapes = [update.shape for update in smallest.updates.values()]
    most = max(max(shape) for shape in shapes)
    rank = largest(lambda one: sum(size(shape, one) for shape in shapes) <= budget, 1, most)
    return adapt(model, ranks=rank, kind=kind, **options) if rank else None
