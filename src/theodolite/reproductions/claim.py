"""A paper's claim, measured here."""

__all__ = ["Claim", "Comparator", "Scale"]

from dataclasses import dataclass
from enum import Enum

from theodolite.core.estimate import Estimate


class Scale(Enum):
    """How much work a reproduction may do: QUICK within 45 seconds on two cores, FULL within minutes."""

    QUICK = "quick"
    FULL = "full"


@dataclass(frozen=True)
class Comparator:
    """The stand-in that was measured in the same run."""

    name: str
    measured: float


@dataclass(frozen=True)
class Claim:
    """One claim of a paper next to what was measured here.

    claim: in words. paper: the paper's own number in words ("0.894 at d = 750"), or "none given".
    measured: our number with its interval. threshold: the bar in words, as the card gives it (">= 0.89").
    holds: True, False, or None where it cannot be told here (then `scaled` says why).
    scaled: how the paper's setting was scaled down, and what that costs; "" where it was not.
    """

    claim: str
    paper: str
    measured: Estimate | None
    threshold: str
    holds: bool | None
    comparator: Comparator | None = None
    scaled: str = ""
