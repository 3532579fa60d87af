"""Errors that say what was given, what was expected and what to do."""

__all__ = [
    "BudgetExhausted",
    "DataError",
    "DiskError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "TheodoliteError",
    "TrainingCollapsedError",
    "UnsafeFileError",
    "require",
]

import importlib
from types import ModuleType


class TheodoliteError(Exception):
    """Base of every error this package raises on purpose; the command line prints its text and no traceback."""


class InputError(TheodoliteError, ValueError):
    """An argument has a value that the function cannot work with."""


class DataError(InputError):
    """The data cannot be used as they are: empty, ambiguous, of one class, not finite, ..."""


class ModelError(InputError):
    """The model cannot be built, loaded or used on these data."""


class UnsafeFileError(TheodoliteError):
    """A file could run code when it is read, so it was not read."""


class MissingExtraError(TheodoliteError, ImportError):
    """An optional dependency is not installed; the text names the extra that brings it."""


class DiskError(TheodoliteError, OSError):
    """A file could not be written whole; what was there before is untouched."""


class TrainingCollapsedError(TheodoliteError):
    """A training run ended without a usable model (loss not finite, or no better than a constant)."""


class BudgetExhausted(TheodoliteError):
    """A limited resource (queries to a holdout, time) is spent; no answer was made."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional ``module``, or raise `MissingExtraError` naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed; it comes with: pip install 'theodolite[{extra}]'"
        ) from error
