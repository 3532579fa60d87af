"""The page: one HTML file, made from ``atlas.json`` and the findings alone, that asks nothing of any network."""

__all__ = ["render", "render_folder"]

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from theodolite.catalog import CATALOG, SPACES
from theodolite.core.estimate import format_number
from theodolite.core.files import read_json, write_whole
from theodolite.survey.terrain import contours

_LOG_SPAN = 50
"""Whiskers that span more than this factor are drawn on a logarithmic scale."""


def render(atlas: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> str:
    """The page as text. atlas: what ``atlas.json`` holds; findings: what ``findings/*.json`` hold."""
    environment = _environment()
    order = {entry.slug: place for place, entry in enumerate(CATALOG)}
    shown = sorted(findings, key=lambda finding: order.get(finding["slug"], len(order)))
    titles = {entry.slug: entry for entry in CATALOG}
    scripts = [get_plotlyjs(), _asset("page.js")]
    return environment.get_template("page.html").render(
        atlas=atlas,
        rooms=[
            {"name": space, "about": about, "findings": found}
            for space, about in SPACES.items()
            if (found := [finding for finding in shown if finding["space"] == space])
        ],
        findings=shown,
        papers={finding["slug"]: titles[finding["slug"]] for finding in shown if finding["slug"] in titles},
        planned=[titles[slug] for slug in atlas["planned"] if slug in titles],
        refused=[step for step in atlas["plan"] if not step["applies"]],
        terrain=Markup(contours(atlas["fingerprint"])),
        css=Markup(_asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        figures=Markup(_json({finding["slug"]: _plain_figure(finding["figure"]) for finding in shown})),
        policy="; ".join([
            "default-src 'none'",
            "script-src " + " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
            "style-src 'unsafe-inline'",  # plotly writes style attributes
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]),
    )  # fmt: skip


def render_folder(folder: str | Path) -> Path:
    """Make ``index.html`` of an atlas folder again from its JSON files; the path of the page."""
    folder = Path(folder)
    found = [read_json(path) for path in sorted((folder / "findings").glob("*.json"))]
    page = folder / "index.html"
    write_whole(page, render(read_json(folder / "atlas.json"), found))
    return page


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("theodolite.survey", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": format_number, "interval": _interval, "took": _took, "moment": _moment, "size": _size}
    made.globals["whiskers"] = _whiskers
    return made


@functools.cache
def _asset(name: str) -> str:
    return Path(__file__).with_name("assets").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that can stand inside a script element whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


_KEPT = re.compile(r"&lt;(br|extra|/extra)&gt;")


def _plain_figure(value: Any) -> Any:
    """A plotly figure whose strings show as they are: plotly reads some HTML in text, so all but line breaks is escaped."""
    if isinstance(value, dict):
        return {key: _plain_figure(item) for key, item in value.items() if key != "template"}
    if isinstance(value, list):
        return [_plain_figure(item) for item in value]
    if isinstance(value, str):
        escaped = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return _KEPT.sub(r"<\1>", escaped)
    return value


def _interval(number: Mapping[str, Any]) -> str:
    """ "[low, high]", with infinity where an end is not bounded; "exact" for a count."""
    low, high = number["low"], number["high"]
    if low == high == number["value"]:
        return f"the same in all {number['n']}" if (number.get("n") or 0) > 1 else "exact"
    ends = ["−∞" if low is None else format_number(low), "∞" if high is None else format_number(high)]
    return f"[{ends[0]}, {ends[1]}]"


def _whiskers(finding: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measured number and its controls on one scale: positions in percent, for bars drawn with CSS."""
    rows = [{"name": finding["measured"]["name"], "ours": True, **finding["measured"]}]
    rows += [{"ours": False, **control} for control in finding["controls"]]
    ends = [end for row in rows for end in (row["low"], row["value"], row["high"]) if end is not None]
    low, high = min(ends), max(ends)
    logarithmic = low > 0 and high / low > _LOG_SPAN

    def place(value: float | None, otherwise: float) -> float:
        if value is None:
            return otherwise
        if low == high:
            return 50.0
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return round(2 + 96 * share, 2)

    for row in rows:
        row |= {"from": place(row["low"], 0.0), "at": place(row["value"], 50.0), "to": place(row["high"], 100.0)}
        row["logarithmic"] = logarithmic
    return rows


def _took(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 5 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _size(amount: int | None) -> str:
    """Bytes in the largest unit that gives a number above 1."""
    if amount is None:
        return "not measured"
    value, units = float(amount), ["bytes", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def _moment(stamp: str | None) -> str:
    return "" if stamp is None else datetime.fromisoformat(stamp).strftime("%-d %B %Y, %H:%M UTC")
