"""What every method here asks of its rows and labels before any work starts."""

__all__ = ["Labelled", "check_count", "check_rows", "labelled"]

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from theodolite.core.errors import DataError, InputError

UNLABELLED = -1
_LARGEST = 1e150  # squares of larger values overflow


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows x (n, p); y (n,) the index of each row's class in ``classes``, or -1 where it has none; names of columns."""

    x: Float[np.ndarray, "row column"]
    y: Int[np.ndarray, " row"]
    classes: np.ndarray
    columns: tuple[str, ...]

    @property
    def known(self) -> Bool[np.ndarray, " row"]:
        """Whether a row has a class."""
        return self.y != UNLABELLED

    @property
    def means(self) -> Float[np.ndarray, "class column"]:
        """Mean row of each known class; no row where no class is known."""
        return class_means(self.x[self.known], self.y[self.known], len(self.classes))


def class_means(x: np.ndarray, y: np.ndarray, classes: int) -> Float[np.ndarray, "class column"]:
    """Mean of the rows ``x`` (n, p) of each class 0..classes-1 of ``y`` (n,)."""
    return np.stack([x[y == c].mean(axis=0) for c in range(classes)]) if classes else np.empty((0, x.shape[1]))


def check_rows(X: Any) -> tuple[Float[np.ndarray, "row column"], tuple[str, ...]]:
    """X (n, p) as float64 with the names of its columns; DataError naming what is no number or not finite."""
    names = tuple(map(str, X.columns)) if hasattr(X, "columns") else ()
    table = np.asarray(X)
    if table.ndim != 2 or 0 in table.shape:
        raise DataError(f"need a table of at least one row and one column, got an array of shape {table.shape}")
    names = names or tuple(f"column {i}" for i in range(table.shape[1]))
    if table.dtype.kind not in "fiub":
        texts = [name for i, name in enumerate(names) if not _is_numeric(table[:, i])]
        if texts:
            raise DataError(
                f"not numbers: {_shown(texts)}; turn categories into columns of 0 and 1 first (for instance with "
                "sklearn.preprocessing.OneHotEncoder)"
            )
    x = table.astype(np.float64)
    broken = [name for i, name in enumerate(names) if not np.isfinite(x[:, i]).all()]
    if broken:
        raise DataError(f"NaN or infinite values in {_shown(broken)}; fill them in or leave these rows out")
    large = [name for i, name in enumerate(names) if np.abs(x[:, i]).max() > _LARGEST]
    if large:
        raise DataError(f"values above {_LARGEST:g} in {_shown(large)}, whose squares overflow; divide these columns")
    return x, names


def _is_numeric(column: np.ndarray) -> bool:
    try:
        column.astype(np.float64)
    except (TypeError, ValueError):
        return False
    return True


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def labelled(X: Any, y: Any, *, novel: bool = True) -> Labelled:
    """Check rows X (n, p) and labels y (n,), in which -1 marks rows without one; novel: at least one such row is needed."""
    x, columns = check_rows(X)
    given = np.asarray(y)
    if given.shape != (len(x),):
        raise DataError(f"need one label a row, -1 where there is none: {len(x)} rows, labels of shape {given.shape}")
    missing = (
        given != given if given.dtype.kind in "fO" else np.zeros(len(x), dtype=bool)
    )  # only NaN differs from itself
    if given.dtype.kind == "O":
        missing |= np.array([label is None for label in given])
    if missing.any():
        raise DataError(f"{int(missing.sum())} labels are missing (NaN or None); mark unlabelled rows by -1")
    if given.dtype.kind == "O":
        given = _plain(given.tolist())
    if given.dtype.kind == "f" and (~np.isfinite(given) | (given != np.round(given))).any():
        raise DataError("labels are classes, but some are fractions or infinite; is this the target of a regression?")
    if given.dtype.kind in "fiu":
        given = given.astype(np.int64)
        unlabelled = given == UNLABELLED
    else:
        given = given.astype(str)
        unlabelled = given == str(UNLABELLED)
    if novel and not unlabelled.any():
        raise DataError("nothing to discover: no row is unlabelled; mark rows without a class by the label -1")
    classes, index, counts = np.unique(given[~unlabelled], return_inverse=True, return_counts=True)
    if (counts < 2).any():
        raise DataError(
            f"the known class {classes[counts < 2][0]} has a single row; give each known class at least two, or mark the "
            "row as unlabelled (-1)"
        )
    numbers = np.full(len(x), UNLABELLED, dtype=np.int64)
    numbers[~unlabelled] = index
    return Labelled(x, numbers, classes, columns)


def _plain(labels: list[Any]) -> np.ndarray:
    """Labels of mixed types as whole numbers where all are, and as texts otherwise; 2.0 is 2, so -1.0 marks a row as -1 does."""
    values = [
        int(label)
        if isinstance(label, np.integer) or (isinstance(label, (float, np.floating)) and float(label).is_integer())
        else label
        for label in labels
    ]
    return np.array(values) if all(type(value) is int for value in values) else np.array(list(map(str, values)))


def check_count(n_novel: int | str, rows: int) -> int | None:
    """``n_novel``, None where it is to be found; InputError where it is neither "auto" nor a number that ``rows`` can fill."""
    if n_novel == "auto":
        return None
    if isinstance(n_novel, bool) or not isinstance(n_novel, (int, np.integer)) or n_novel < 1:
        raise InputError(f'n_novel must be "auto" or a whole number of at least 1, got {n_novel!r}')
    if n_novel > rows:
        raise InputError(f"n_novel={n_novel} is more than the {rows} unlabelled rows")
    return int(n_novel)
