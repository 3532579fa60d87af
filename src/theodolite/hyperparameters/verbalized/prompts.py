"""What the learner and the optimizer are told, and how rows are written for them."""

__all__ = [
    "CLASSIFICATION",
    "NO_FORMULA",
    "ONE_DECIMAL",
    "REGRESSION",
    "described",
    "learner_prompt",
    "optimizer_batch",
    "optimizer_instructions",
    "render",
    "repair",
    "scored_prompt",
]

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from theodolite.core.errors import DataError
from theodolite.language.model import Message

REGRESSION = (
    "You are designed to do regression: to predict the output of any given input. Input and output are real numbers."
)
CLASSIFICATION = "You are designed to do classification: to predict the class of any given input."
NO_FORMULA = "Do not describe the model by a symbolic formula; use words."
ONE_DECIMAL = "Give every value in the descriptions with a precision of one decimal."

_LEARNER = """You are the model. Use the descriptions below, and nothing else, to predict the output of the given input.

** Pattern Descriptions: **
{theta}

** Input: **
{row}

Answer strictly in this format and write nothing else:

Explanations: [your analysis, step by step]

Output: [{form}]"""

_REPAIR = """Your answer could not be read. Give it again, strictly in this format and with nothing else:

Explanations: [your analysis, step by step]

Output: [{form}]"""

_OPTIMIZER = """You are the optimizer of a model, which predicts the output of an input by following its pattern descriptions. \
You are given a batch of inputs, the current descriptions, what the model answered and the target outputs. Improve the \
descriptions so that the model's outputs come closer to the targets.

If the model does well, keep the current descriptions. If it does not, write new ones, with which the model predicts this batch \
better and the next batch of independent inputs from the same distribution too. The first sentences of the current descriptions, \
which state the task, are always put before what you write, so do not repeat them. If your last step is shown, you may use it. \
Think step by step.{more}

Answer strictly in this format and write nothing else:

Reasoning: [why the descriptions have to change, or why not; explicit and in full]

New Pattern Descriptions: [the new descriptions; specific and concrete; the exact value of every parameter that they name]"""

_BATCH = """** Inputs (a batch of i.i.d. data): **
{rows}

** Current Pattern Descriptions: **
{theta}

** The model outputs: **
{outputs}

** The target outputs: **
{targets}"""


def described(initial: str, theta: str) -> str:
    """What the learner reads: theta_0 first, whatever was learned."""
    return theta if theta.startswith(initial) else f"{initial} {theta}"


def learner_prompt(theta: str, row: str, form: str) -> list[Message]:
    """The conversation that asks for one answer; ``form`` says what an output is."""
    return [{"role": "user", "content": _LEARNER.format(theta=theta, row=row, form=form)}]


def repair(asked: Sequence[Message], answer: str, form: str) -> list[Message]:
    """The conversation that asks once more for an answer that can be read."""
    told = {"role": "assistant", "content": answer or "(nothing)"}
    return [*asked, told, {"role": "user", "content": _REPAIR.format(form=form)}]


def scored_prompt(theta: str, row: str, cue: str) -> str:
    """The text that a label continues, with a space before it."""
    return f"{theta}\nInput: {row}\n{cue}:"


def optimizer_instructions(more: str) -> Message:
    """The system message, psi."""
    return {"role": "system", "content": _OPTIMIZER.format(more=f" {more}" if more else "")}


def optimizer_batch(
    theta: str, rows: Sequence[str], outputs: Sequence[str], targets: Sequence[str], loss: float | None
) -> Message:
    """The user message: a batch, one row a line, with its loss where it is given."""
    text = _BATCH.format(
        rows="\n".join(" ".join(row.split()) for row in rows),
        theta=theta,
        outputs="\n".join(outputs),
        targets="\n".join(targets),
    )
    return {"role": "user", "content": text if loss is None else f"{text}\n\n** The loss: **\n{loss:.4g}"}


def render(X: Any) -> tuple[list[str], tuple[str, ...] | int | None]:
    """Rows as text, and their form: the names of a DataFrame's columns, the number of an array's, None for texts.

    A row of a DataFrame is "name: value, ...", one of an array "[value, ...]", numbers with up to four significant digits.
    Raises DataError for missing or infinite values, images and anything else that is not rows.
    """
    if isinstance(X, pd.DataFrame):
        cells: Any = X.to_numpy(dtype=object)
        _check_cells(cells)
        names = tuple(map(str, X.columns))
        rows = [", ".join(f"{name}: {_cell(cell)}" for name, cell in zip(names, row, strict=True)) for row in cells]
        form: tuple[str, ...] | int | None = names
    else:
        if isinstance(X, str):
            raise DataError("X is one text; give a list of texts")
        cells = np.asarray(X, dtype=object) if isinstance(X, (list, tuple)) else np.asarray(X)
        if cells.ndim == 1 and len(cells) and all(isinstance(cell, str) for cell in cells):
            rows, form = [str(cell).strip() for cell in cells], None
        elif cells.ndim == 2:
            _check_cells(cells)
            rows, form = ["[" + ", ".join(map(_cell, row)) + "]" for row in cells], cells.shape[1]
        else:
            raise DataError(
                f"X must be a table (rows, columns) or a list of texts, got shape {cells.shape}; {_instead(cells)}"
            )
    if not rows:
        raise DataError("X has no rows")
    return rows, form


def _instead(cells: np.ndarray) -> str:
    """What is to be done about an X that is no rows."""
    if cells.ndim != 1:
        return "images cannot be read"
    if len(cells) == 0:
        return "it has no rows"
    texts = [isinstance(cell, str) for cell in cells.tolist()]
    if any(texts):
        return f"row {texts.index(False)} is no text"
    return "one column of numbers is given as (rows, 1)"


def _check_cells(cells: np.ndarray) -> None:
    bad = pd.isna(cells)
    if cells.dtype.kind in "fc":
        bad = ~np.isfinite(cells)
    elif cells.dtype == object:
        bad = bad | np.array(
            [[isinstance(cell, (float, np.floating)) and np.isinf(cell) for cell in row] for row in cells]
        )
    if bad.any():
        row, column = (int(place[0]) for place in np.nonzero(bad))
        raise DataError(
            f"X has {int(bad.sum())} missing or infinite values, the first in row {row}, column {column}; settle them first"
        )


def _cell(value: Any) -> str:
    if isinstance(value, (bool, np.bool_, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return " ".join(str(value).split())
    return f"{float(f'{value:.4g}'):.12g}"
