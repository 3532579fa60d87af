"""One row under the tree: the leaf that it falls into, and the nearest leaf of another class."""

__all__ = ["LocalSurrogateExplanation", "SurrogateCounterfactual", "leaf_of", "nearest_leaf"]

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from theodolite.core.errors import InputError
from theodolite.explanations.surrogate.rules import Condition, LeafBoxes


@dataclass(frozen=True)
class LocalSurrogateExplanation:
    """Why the copy answers one row as it does.

    path: the conditions that lead to its leaf, merged per column. prediction, black_box: the two answers (class names, or
    values). agrees: whether they are equal (a regression: within half a standard deviation). alternatives: the other
    classes with the leaf's probability, the next-best first.
    """

    path: tuple[Condition, ...]
    prediction: object
    black_box: object
    agrees: bool
    alternatives: tuple[tuple[object, float], ...]

    def __str__(self) -> str:
        reasons = " and ".join(map(str, self.path)) or "nothing is asked"
        rest = "" if self.agrees else f"; the black box answers {self.black_box}"
        return f"{self.prediction} because {reasons}{rest}"


@dataclass(frozen=True, eq=False)
class SurrogateCounterfactual:
    """The smallest change that takes a row into a leaf of another class.

    changes: {feature: (before, after)}. cost: sum of |after - before| in standard deviations of the training rows, to the
    border of the leaf. flips_surrogate, flips_black_box: whether each model then gives the wanted class (any other class
    than before, where none was named).
    """

    x_new: Float[np.ndarray, " column"]
    changes: Mapping[str, tuple[float, float]]
    cost: float
    flips_surrogate: bool
    flips_black_box: bool


def leaf_of(boxes: LeafBoxes, row: Float[np.ndarray, " column"]) -> int:
    """Which leaf a row falls into; values are rounded to single precision first, as the tree does."""
    values = row[boxes.columns].astype(np.float32)
    return int(np.flatnonzero(((values > boxes.low) & (values <= boxes.high)).all(axis=1))[0])


def nearest_leaf(
    boxes: LeafBoxes,
    row: Float[np.ndarray, " column"],
    scale: Float[np.ndarray, " column"],
    wanted: Bool[np.ndarray, " leaf"],
) -> tuple[int, float, Float[np.ndarray, " column"]]:
    """(leaf, cost, row moved into it) of the wanted leaf that needs the smallest change, L1 in units of ``scale``.

    Columns without a scale count in their own units. InputError where no leaf is wanted.
    """
    if not wanted.any():
        raise InputError("no leaf of the tree gives the class that is wanted")
    columns = boxes.columns
    unit = np.where(scale[columns] > 0, scale[columns], 1.0)
    costs = np.where(wanted, boxes.costs(row[columns], unit), np.inf)
    nearest = int(costs.argmin())
    new = row.copy()
    new[columns] = boxes.into(nearest, row[columns])
    return nearest, float(costs[nearest]), new
