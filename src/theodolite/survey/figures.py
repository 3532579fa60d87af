"""What the charts' figures share: bands, reference lines, sizes. Colours and fonts are the page's."""

__all__ = ["INKS", "band_line", "blank", "level_line"]

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
"""Okabe and Ito's colours, told apart by every kind of colour vision."""


def blank(x: str, y: str, *, log_x: bool = False) -> go.Figure:
    """An empty figure with named axes."""
    figure = go.Figure()
    figure.update_xaxes(title_text=x, type="log" if log_x else None)
    figure.update_yaxes(title_text=y)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50}, legend={"orientation": "h", "y": 1.12})
    return figure


def band_line(
    figure: go.Figure,
    x: Sequence[float],
    y: Sequence[float],
    *,
    name: str,
    ink: str,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    dash: str | None = None,
    row: int | None = None,
    col: int | None = None,
    legend: bool = True,
) -> None:
    """Add a line with markers, and its interval as a pale band where there is one; row, col: in which panel."""
    if low is not None and high is not None:
        band = go.Scatter(
            x=[*x, *reversed(list(x))],
            y=[*high, *reversed(list(low))],
            fill="toself",
            mode="lines",
            fillcolor=_pale(ink),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            name=f"{name}, interval",
        )
        figure.add_trace(band, row=row, col=col)
    line = go.Scatter(
        x=list(x), y=list(y), mode="lines+markers", name=name, line={"color": ink, "dash": dash}, showlegend=legend
    )
    figure.add_trace(line, row=row, col=col)


def level_line(figure: go.Figure, y: float, name: str, *, dash: str = "dot", row: int | None = None) -> None:
    """Add a horizontal line with its name at the right end; ``row`` where the figure has several."""
    where: dict[str, Any] = {} if row is None else {"row": row, "col": 1}
    figure.add_hline(
        y=y,
        line_dash=dash,
        line_width=1,
        line_color=INKS[6],
        annotation_text=name,
        annotation_position="bottom right",
        **where,
    )


def _pale(ink: str) -> str:
    red, green, blue = (int(ink[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
