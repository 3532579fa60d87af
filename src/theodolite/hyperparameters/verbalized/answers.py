"""Reading what language models answer: strictly, so that a wrong number is never taken for an answer."""

__all__ = ["LearnerFormatError", "OptimizerFormatError", "read_description", "read_label", "read_number"]

import math
import re
from collections.abc import Sequence

from theodolite.core.errors import TheodoliteError


class LearnerFormatError(TheodoliteError):
    """More than half of a batch of the learner's answers could not be read, after one repair of each."""


class OptimizerFormatError(TheodoliteError):
    """The optimizer's answers could not be read three times in a row."""


_OUTPUT = re.compile(r"(?i)\boutput\b[*_ ]*(?:\([^)\n]*\))?[*_ ]*:")
_DESCRIPTION = re.compile(r"(?i)\bnew pattern descriptions?\b[*_ ]*:")
_REASONING = re.compile(r"(?i)\breasoning\b[*_ ]*:")
_MINUS = re.compile("[\u2012\u2013\u2212\ufe63\uff0d]")  # dashes that are written for a minus
_SCALED = re.compile(r"\w|\s*(?:%|(?:percent|dozen|hundred|thousand|[mbtr]+illion)s?\b)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


def read_number(text: str) -> float | None:
    """The one number in the first line with content after the last "Output:", None where there is not exactly one.

    >>> read_number("Explanations: 3 times 1 plus 4. **Output:** [7.10]")
    7.1
    >>> [read_number(f"Output: {value}") for value in ("-1.5e-3", "≈ 1,234.5", "5 or 7", "about seven")]
    [-0.0015, 1234.5, None, None]
    """
    line = _answer_line(text)
    if line is None:
        return None
    line = _MINUS.sub("-", line)
    found = list(_NUMBER.finditer(line))
    if len(found) != 1:
        return None
    start, end = found[0].span()
    # what touches it makes it something else: x1, 3x, 50 %, 2 million; so does a sign that stands apart: 4 - 3, ± 3
    if re.search(r"\w$|[-+±]\s*$", line[:start]) or _SCALED.match(line[end:]):
        return None
    value = float(found[0][0].replace(",", ""))
    return value if math.isfinite(value) else None


def read_label(text: str, labels: Sequence[str]) -> int | None:
    """Which of ``labels`` is the first line with content after the last "Output:", whatever its case and its brackets."""
    line = _answer_line(text)
    if line is None:
        return None
    said = _bare(line)
    found = [i for i, label in enumerate(labels) if _bare(label) == said]
    return found[0] if len(found) == 1 else None


def read_description(text: str) -> tuple[str, str] | None:
    """(reasoning, new descriptions) of the optimizer's answer; None where the last section is not there or empty."""
    heads = list(_DESCRIPTION.finditer(text))
    if not heads:
        return None
    description = _unwrapped(text[heads[-1].end() :])
    if not re.search(r"\w", description):
        return None
    before = text[: heads[-1].start()]
    start = _REASONING.search(before)
    return _unwrapped(before[start.end() :] if start else before), description


def _answer_line(text: str) -> str | None:
    """The first line after the last "Output:" that holds a letter or a digit."""
    heads = list(_OUTPUT.finditer(text))
    if not heads:
        return None
    return next((line for line in text[heads[-1].end() :].splitlines() if re.search(r"\w", line)), None)


def _bare(text: str) -> str:
    return text.strip(" \t[](){}\"'`*_.,:;").casefold()


def _unwrapped(text: str) -> str:
    """Without what Markdown puts around a section: stars of its heading, fences, a pair of brackets, the next heading's marks."""
    text = re.sub(r"(?m)^\s*```\w*\s*$", "", text).strip()
    text = re.sub(r"^(?:[*_]+\s*)+", "", text)
    text = re.sub(r"\s*[*_#]+$", "", text)
    return text[1:-1].strip() if text.startswith("[") and text.find("]") == len(text) - 1 else text
