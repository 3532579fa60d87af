"""Surveys the spaces a machine-learning model lives in.

>>> import theodolite
>>> subject = theodolite.subject("breast-cancer")
>>> subject.data.test.x.shape
torch.Size([114, 30])
"""

__version__ = "0.1.0"

__all__ = [
    "CATALOG",
    "DataOptions",
    "Dataset",
    "Estimate",
    "Finding",
    "QualityCurve",
    "Recipe",
    "Rows",
    "Subject",
    "TheodoliteError",
    "language_subject",
    "load_subject",
    "measure",
    "reproduce",
    "subject",
    "survey",
]

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theodolite.catalog import CATALOG
    from theodolite.core.curve import QualityCurve
    from theodolite.core.errors import TheodoliteError
    from theodolite.core.estimate import Estimate
    from theodolite.core.loading import DataOptions, load_subject
    from theodolite.core.subject import Dataset, Rows, Subject
    from theodolite.core.train import Recipe
    from theodolite.language.subjects import language_subject
    from theodolite.reproductions.report import reproduce
    from theodolite.subjects import subject
    from theodolite.survey.finding import Finding
    from theodolite.survey.run import measure, survey

_HOMES = {
    "CATALOG": "theodolite.catalog",
    "DataOptions": "theodolite.core.loading",
    "Dataset": "theodolite.core.subject",
    "Estimate": "theodolite.core.estimate",
    "Finding": "theodolite.survey.finding",
    "QualityCurve": "theodolite.core.curve",
    "Recipe": "theodolite.core.train",
    "Rows": "theodolite.core.subject",
    "Subject": "theodolite.core.subject",
    "TheodoliteError": "theodolite.core.errors",
    "language_subject": "theodolite.language.subjects",
    "load_subject": "theodolite.core.loading",
    "measure": "theodolite.survey.run",
    "reproduce": "theodolite.reproductions.report",
    "subject": "theodolite.subjects",
    "survey": "theodolite.survey.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import theodolite`` takes no time."""
    if name not in _HOMES:
        raise AttributeError(f"module 'theodolite' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)
