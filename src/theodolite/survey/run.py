"""Run the plan within its budget; each finding is on disk the moment it is done, and a second run continues."""

__all__ = ["Outcome", "measure", "survey"]

import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from theodolite.catalog import CATALOG
from theodolite.core.errors import DiskError, InputError, MissingExtraError, ModelError, TheodoliteError
from theodolite.core.memory import DEFAULT_BUDGET, peak_memory
from theodolite.core.parallel import one_thread
from theodolite.core.subject import Subject
from theodolite.survey.atlas import Atlas, describe, versions
from theodolite.survey.chart import Budget, load_charts
from theodolite.survey.finding import Finding
from theodolite.survey.holdout import account, holdout_of
from theodolite.survey.plan import Step, make_plan

# What a user's model or the numerics under a chart can raise: told on the page, and the survey goes on.
_CHART_ERRORS = (
    TheodoliteError, RuntimeError, ValueError, ArithmeticError, MemoryError, AttributeError, LookupError, TypeError,
    np.linalg.LinAlgError,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one step: "found" now, "kept" from an earlier run, "failed", or "skipped" for lack of time or of an
    optional package.
    """

    step: Step
    state: Literal["found", "kept", "failed", "skipped"]
    text: str
    seconds: float = 0.0


def measure(
    slug: str, subject: Subject, *, seed: int = 0, seconds: float = 60.0, memory: int = DEFAULT_BUDGET
) -> Finding:
    """One method's finding about ``subject``, as the survey makes it.

    seconds: the time the chart plans for; memory: bytes for what it expands. Raises ModelError with the one reason why
    where the method does not apply.
    """
    charts = load_charts()
    if slug not in charts:
        known = ", ".join(charts)
        raise InputError(f"no chart for {slug!r}; there are charts for: {known}")
    refusal = charts[slug].needs.refusal(subject)
    if refusal is not None:
        raise ModelError(f"{slug} does not apply to {subject.name}: it {refusal}")
    if subject.holdout is None:
        subject = subject.with_holdout(holdout_of(subject, slug, seed=seed))
    started = time.perf_counter()
    with one_thread(subject.is_small), peak_memory() as peak:
        finding = charts[slug].draw(subject, Budget(seconds, memory, seed))
    return finding.measured(seconds=time.perf_counter() - started, peak_bytes=peak.bytes, code=finding.code)


def survey(
    subject: Subject,
    out: str | Path = "atlas",
    *,
    budget: float = 600.0,
    memory: int = DEFAULT_BUDGET,
    seed: int = 0,
    fresh: bool = False,
    command: str = "",
    code: str = "",
    only: tuple[str, ...] = (),
    on_step: Callable[[Step], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> dict[str, Any]:
    """Survey ``subject`` into the folder ``out`` and return what ``atlas.json`` holds.

    budget: seconds for all charts together; what does not fit any more is skipped and says so. memory: bytes a chart
    may expand to. code: the lines of Python that make ``subject``, shown before each finding's own line. only: slugs
    to run, all that apply where empty. on_step is called before a chart runs, on_outcome after. A run that was stopped
    at any point continues when it is called again with the same subject and seed; ``fresh`` starts over.
    """
    atlas = Atlas(Path(out))
    if fresh:
        atlas.clear()
    identity = {"fingerprint": subject.fingerprint, "seed": seed}
    earlier = atlas.begin(identity)
    plan = [step for step in make_plan(subject) if not only or step.slug in only]
    started = time.perf_counter()
    before = earlier["seconds"] if earlier else 0.0
    state: dict[str, Any] = {
        "name": subject.name,
        "command": command,
        **identity,
        "started": earlier["started"] if earlier else _now(),
        "finished": None,
        "status": "running",
        "seconds": before,
        "subject": describe(subject),
        "plan": [step.to_json() for step in plan],
        "planned": [entry.slug for entry in CATALOG if entry.state == "planned"],
        "failed": [],
        "skipped": [],
        "holdout": account(subject, atlas.ledger),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
    }

    def save(status: str) -> None:
        state["status"] = status
        state["seconds"] = round(before + time.perf_counter() - started, 1)
        state["finished"] = _now() if status == "complete" else None
        state["holdout"] = account(subject, atlas.ledger)
        atlas.write(state)

    save("running")
    finished = False
    try:
        for step in sorted((step for step in plan if step.applies), key=lambda step: step.seconds):
            left = budget - (time.perf_counter() - started)
            outcome = _one(atlas, subject, step, left=left, memory=memory, seed=seed, code=code, on_step=on_step)
            if outcome.state in ("failed", "skipped"):
                state[outcome.state].append({"slug": step.slug, "error": outcome.text})
            save("running")
            if on_outcome is not None:
                on_outcome(outcome)
        finished = True
    finally:
        save("complete" if finished else "stopped")
    return state


def _one(
    atlas: Atlas,
    subject: Subject,
    step: Step,
    *,
    left: float,
    memory: int,
    seed: int,
    code: str,
    on_step: Callable[[Step], None] | None,
) -> Outcome:
    kept = atlas.finding(step.slug)
    if kept is not None:
        return Outcome(step, "kept", kept["headline"])
    if step.seconds > left:
        text = f"would take about {step.seconds:.0f} s and {max(0.0, left):.0f} s are left; give more with --budget"
        return Outcome(step, "skipped", text)
    if on_step is not None:
        on_step(step)
    started = time.perf_counter()
    asking = subject.with_holdout(holdout_of(subject, step.slug, seed=seed, ledger=atlas.ledger))
    try:
        finding = measure(step.slug, asking, seed=seed, memory=memory)  # as its line of Python does
    except DiskError:
        raise
    except MissingExtraError as error:  # nothing went wrong: the user has not installed what this chart needs
        return Outcome(step, "skipped", str(error))
    except _CHART_ERRORS as error:
        return Outcome(step, "failed", f"{type(error).__name__}: {error}", time.perf_counter() - started)
    call = f"theodolite.measure({step.slug!r}, subject{f', seed={seed}' if seed else ''})"
    repeat = "\n".join(["import theodolite", code, f"print({call})"]) if code else ""
    atlas.add(finding.measured(seconds=finding.seconds, peak_bytes=finding.peak_bytes, code=repeat))
    return Outcome(step, "found", finding.headline, finding.seconds)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
