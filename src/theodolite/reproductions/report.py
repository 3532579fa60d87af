"""Run a paper's claims and write down what came out."""

__all__ = ["LastMeasured", "Report", "last_measured", "reproduce"]

import importlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from theodolite.catalog import entry
from theodolite.core.errors import InputError
from theodolite.core.parallel import one_thread
from theodolite.reproductions.claim import Claim, Scale


@dataclass(frozen=True)
class Report:
    """All claims of one paper, measured in one run."""

    slug: str
    seed: int
    scale: Scale
    seconds: float
    claims: tuple[Claim, ...]

    def to_json(self) -> dict[str, Any]:
        """The form that ``theodolite reproduce SLUG --json`` prints."""
        about = entry(self.slug)
        return {
            "slug": self.slug,
            "title": about.title,
            "arxiv": about.arxiv,
            "seed": self.seed,
            "scale": self.scale.value,
            "seconds": round(self.seconds, 2),
            "claims": [_claim_to_json(claim) for claim in self.claims],
        }


def _claim_to_json(claim: Claim) -> dict[str, Any]:
    measured = claim.measured
    low, high = (measured.low, measured.high) if measured is not None else (None, None)
    return {
        "claim": claim.claim,
        "paper": claim.paper,
        "measured": measured.value if measured is not None else None,
        "low": low if low is not None and math.isfinite(low) else None,
        "high": high if high is not None and math.isfinite(high) else None,
        "unit": measured.unit if measured is not None else "",
        "threshold": claim.threshold,
        "comparator": vars(claim.comparator).copy() if claim.comparator is not None else None,
        "holds": claim.holds,
        "scaled": claim.scaled,
    }


def module_name(slug: str) -> str:
    """The module that holds the claims of the method ``slug``."""
    return f"theodolite.reproductions.{slug.replace('-', '_')}"


def reproduce(
    slug: str, *, full: bool = False, seed: int = 0, on_claim: Callable[[Claim], None] | None = None
) -> Report:
    """Measure every claim of the paper behind ``slug``; quick (at most 45 seconds on two cores) or full.

    on_claim is called with each claim as it is done. A method without a reproduction raises InputError.
    """
    about = entry(slug)
    if find_spec(module_name(slug)) is None:
        raise InputError(f"{slug} ({about.title}) has no reproduction yet; see: theodolite methods")
    scale = Scale.FULL if full else Scale.QUICK
    started = time.perf_counter()
    done = []
    with one_thread():  # the numbers are the same on any number of cores
        for claim in importlib.import_module(module_name(slug)).claims(scale, seed):
            done.append(claim)
            if on_claim is not None:
                on_claim(claim)
    return Report(slug, seed, scale, time.perf_counter() - started, tuple(done))


@dataclass(frozen=True)
class LastMeasured:
    """How many claims of a paper held, did not hold, and could not be told when they were last measured."""

    scale: str
    holds: int
    fails: int
    untold: int
    claims: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        told = self.holds + self.fails
        untold = f", {self.untold} not told" if self.untold else ""
        return f"{self.holds} of {told} hold{untold}"


def last_measured(slug: str) -> LastMeasured | None:
    """The stored outcome of the last reproduction that ships with the package, None where there is none."""
    path = files("theodolite.reproductions") / "measured" / f"{slug}.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    verdicts = [claim["holds"] for claim in report["claims"]]
    return LastMeasured(
        report["scale"],
        sum(v is True for v in verdicts),
        sum(v is False for v in verdicts),
        sum(v is None for v in verdicts),
        tuple(report["claims"]),
    )
