"""The one account of what a survey asks the test rows."""

__all__ = ["account", "holdout_of"]

import math
import warnings
import zlib
from pathlib import Path
from typing import Any

from theodolite.core.estimate import Estimate
from theodolite.core.subject import Subject
from theodolite.data.reusable_holdout import Ledger, RepeatedSeedWarning, Thresholdout, adaptive_bias, fingerprint
from theodolite.survey.finding import estimate_to_json

BUDGET = 40
"""Answers that may come from the test rows themselves, in all surveys of the same rows together."""


def holdout_of(subject: Subject, slug: str, *, seed: int, ledger: Path | None = None) -> Thresholdout:
    """The reusable holdout of ``subject`` as one chart asks it; charts share the account, each has its own noise.

    The validation rows answer while they agree with the test rows to 2 / sqrt(n), about three standard errors of their
    difference. That is a rule of thumb: the theorem's threshold needs far more rows than most test sets have.
    """
    data = subject.data
    n = len(data.test)
    with warnings.catch_warnings():
        # the same chart with the same seed asks the same questions again, so its noise tells nothing new
        warnings.simplefilter("ignore", RepeatedSeedWarning)
        return Thresholdout(
            subject.flat("validation"),
            data.validation.y.numpy(),
            subject.flat("test"),
            data.test.y.numpy(),
            budget=BUDGET,
            threshold=2 / math.sqrt(n),
            sigma=0.25 / math.sqrt(n),
            seed=zlib.crc32(f"{seed} {slug}".encode()),
            ledger=ledger,
            allow_shared_rows=True,
        )


def account(subject: Subject, ledger: Path) -> dict[str, Any]:
    """How much was asked of the test rows, and what a careless search could have gained by as many looks."""
    n = len(subject.data.test)
    book = Ledger(ledger, fingerprint(subject.flat("test"), subject.data.test.y.numpy()))
    asked = len(book.records)
    gain = Estimate.exact(adaptive_bias(asked, n) - 0.5, "accuracy")
    by: dict[str, dict[str, Any]] = {}
    for record in book.records:
        one = by.setdefault(record["name"], {"name": record["name"], "asked": 0, "spent": 0})
        one["asked"] += 1
        one["spent"] += record["source"] == "holdout"
    return {
        "asked": asked,
        "by": list(by.values()),
        "spent": sum(record["source"] == "holdout" for record in book.records),
        "budget": BUDGET,
        "rows": n,
        "naive_gain": estimate_to_json(gain),
    }
