"""The account of what was asked of a holdout: one JSON line an answer, keyed by the holdout's own bytes."""

__all__ = ["AuditReport", "Ledger", "RepeatedSeedWarning", "audit", "fingerprint", "holdout_ledger"]

import contextvars
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from theodolite.core.errors import DataError, DiskError
from theodolite.data.reusable_holdout.bounds import adaptive_bias

_default: contextvars.ContextVar[Path | None] = contextvars.ContextVar("holdout_ledger", default=None)


class RepeatedSeedWarning(UserWarning):
    """A holdout is opened again with noise that was used on it before; different questions then share their noise."""


def fingerprint(x: Any, y: Any) -> str:
    """SHA-256 of the rows and labels: the same rows under another name have the same account."""
    digest = hashlib.sha256()
    for part in (x, y):
        whole = np.ascontiguousarray(part)
        data = whole.tobytes() if whole.dtype != object else "\0".join(map(str, whole.ravel().tolist())).encode()
        digest.update(str(whole.shape).encode() + data)
    return digest.hexdigest()


@contextmanager
def holdout_ledger(path: str | Path) -> Iterator[Path]:
    """Every mechanism that is made inside the block keeps its account in the file ``path``."""
    token = _default.set(Path(path))
    try:
        yield Path(path)
    finally:
        _default.reset(token)


def current_ledger() -> Path | None:
    """The file that `holdout_ledger` set, None outside of it."""
    return _default.get()


class Ledger:
    """The account of one holdout in a file that may hold several. A line is written before its answer is given.

    `records` are the earlier answers, `budget_left` the smallest that was left (None: nothing was counted), `seeds` those
    that were used, `damaged` the lines that cannot be read (each counts as one look, and against the budget).
    """

    def __init__(self, path: str | Path, key: str) -> None:
        self.path = Path(path)
        self.key = key
        self.records: list[dict[str, Any]] = []
        self.seeds: set[int] = set()
        self.damaged = 0
        self.budget_left: int | None = None
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise DiskError(f"cannot read the holdout's ledger {self.path}: {error.strerror}") from error
        for line in text.splitlines():
            self._read(line)
        if self.budget_left is not None:
            self.budget_left = max(0, self.budget_left - self.damaged)
        if text and not text.endswith("\n"):
            self._write("\n")  # a writer was killed in the middle of a line

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
            mine = record["fingerprint"] == self.key
        except (ValueError, KeyError, TypeError):
            self.damaged += 1
            return
        if not mine:
            return
        if record.get("event") == "open":
            self.seeds.add(record["seed"])
        else:
            self.records.append(record)
        left = record.get("budget_left")
        if left is not None:
            self.budget_left = left if self.budget_left is None else min(self.budget_left, left)

    def open(self, *, seed: int, rows: int, budget_left: int | None) -> None:
        """Note that a mechanism was made."""
        self._append({"event": "open", "seed": seed, "rows": rows, "budget_left": budget_left})

    def add(self, record: dict[str, Any]) -> None:
        """Note one answer."""
        self._append({"event": "answer", **record})

    def _append(self, record: dict[str, Any]) -> None:
        self._write(json.dumps({"fingerprint": self.key, **record}) + "\n")

    def _write(self, text: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiskError(
                f"cannot write the holdout's ledger {self.path}: {error.strerror}; no answer was given"
            ) from error


@dataclass(frozen=True)
class AuditReport:
    """What a log of looks at a holdout says.

    looks: questions asked; hits: answers that came from the holdout itself; rows: of the holdout; careless_accuracy:
    what pure noise could seem to reach after so many looks at bare scores (truth 0.5); possible_gain: that minus 0.5.
    """

    looks: int
    hits: int
    rows: int
    careless_accuracy: float
    possible_gain: float


def audit(log: "pd.DataFrame | str | Path", *, rows: int | None = None) -> AuditReport:
    """Count the adaptive looks of a log and bound the bias that they could have caused.

    log: the `.log` of a mechanism, or a file: a ledger, or a CSV with a column "source" or one row for each look.
    rows: size of the holdout where the log does not say.
    """
    if isinstance(log, (str, Path)):
        log = _read_log(Path(log))
    if rows is None and "rows" in log.columns:
        known = log["rows"].dropna().tolist()
        rows = int(known[0]) if known else None
    if rows is None or rows < 1:
        raise DataError("the log does not say how many rows the holdout has; give rows")
    looks = log[log["event"] != "open"] if "event" in log.columns else log
    sources = looks["source"].tolist() if "source" in looks.columns else ["holdout"] * len(looks)
    hits = sources.count("holdout")
    reached = adaptive_bias(len(looks), rows)
    return AuditReport(len(looks), hits, rows, reached, reached - 0.5)


def _read_log(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise DataError(f"there is no log {path}")
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            return pd.DataFrame([json.loads(line) for line in text.splitlines() if line])
        return pd.read_csv(path)
    except (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise DataError(f"{path} is neither a ledger (a line of JSON an answer) nor a CSV: {error}") from error
