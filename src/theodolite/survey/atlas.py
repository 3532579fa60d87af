"""The atlas: a folder with ``atlas.json``, one JSON file per finding and one page; every file is written whole."""

__all__ = ["SCHEMA", "Atlas", "describe", "versions"]

import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from theodolite.core.errors import DataError
from theodolite.core.files import make_folder, read_json, write_json, write_whole
from theodolite.core.subject import Subject
from theodolite.survey.finding import Finding, estimate_to_json
from theodolite.survey.page import render

SCHEMA = 1
"""Version of the files' layout; a reader refuses a version that it does not know."""

_SHOWN_FEATURES = 200


class Atlas:
    """One atlas folder. Opening it makes the folder and checks that it can be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.main = folder / "atlas.json"
        self.findings_folder = folder / "findings"
        self.ledger = folder / "holdout.jsonl"
        make_folder(folder)

    def clear(self) -> None:
        """Forget the findings; the holdout's ledger stays, for its rows have been looked at."""
        for path in (self.main, self.folder / "index.html"):
            path.unlink(missing_ok=True)
        if self.findings_folder.exists():
            shutil.rmtree(self.findings_folder)

    def begin(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """What an earlier run left, None where there is nothing; another subject's atlas is an error."""
        make_folder(self.findings_folder)
        if not self.main.exists():
            return None
        earlier = read_json(self.main)
        if not isinstance(earlier, dict) or earlier.get("schema") != SCHEMA:
            raise DataError(f"{self.main} has another layout than version {SCHEMA}; use --fresh or another --out")
        different = [key for key, value in identity.items() if earlier.get(key) != value]
        if different:
            raise DataError(
                f"{self.folder} holds a survey with another {' and '.join(different)} (subject there: "
                f"{earlier.get('name')!r}); use --fresh to replace it or --out for another folder"
            )
        return earlier

    def finding(self, slug: str) -> dict[str, Any] | None:
        """A finding that is there already."""
        path = self.findings_folder / f"{slug}.json"
        found = read_json(path) if path.exists() else None
        return found if found is not None and found.get("schema") == SCHEMA else None

    def findings(self) -> list[dict[str, Any]]:
        """All findings that are there."""
        names = sorted(path.stem for path in self.findings_folder.glob("*.json"))
        return [found for name in names if (found := self.finding(name)) is not None]

    def add(self, finding: Finding) -> None:
        """Write one finding."""
        write_json(self.findings_folder / f"{finding.slug}.json", {"schema": SCHEMA, **finding.to_json()})

    def write(self, state: Mapping[str, Any]) -> None:
        """Write the main file and the page made from what is on disk."""
        write_json(self.main, {"schema": SCHEMA, **state})
        write_whole(self.folder / "index.html", render(read_json(self.main), self.findings()))


def describe(subject: Subject) -> dict[str, Any]:
    """The subject as the page shows it."""
    data = subject.data
    counts = torch.bincount(data.train.y, minlength=len(data.classes)).tolist() if data.classes else []
    layers = subject.predictor.named_modules() if subject.is_network else ()
    return {
        "name": subject.name,
        "description": subject.description,
        "kind": "network" if subject.is_network else "black box",
        "model": subject.model_name,
        "parameters": subject.parameter_count,
        "layers": [
            {"name": name, "type": type(layer).__name__, "parameters": sum(p.numel() for p in layer.parameters())}
            for name, layer in layers
            if name and not any(layer.children())
        ],
        "notes": list(subject.notes),
        "retrainable": subject.retrainable,
        "data": {
            "name": data.name,
            "modality": data.modality,
            "task": data.task,
            "rows": {part: len(rows) for part, rows in data.parts.items()},
            "shape": list(data.shape),
            "features": list(data.features[:_SHOWN_FEATURES]),
            "feature_count": len(data.features),
            "classes": list(data.classes),
            "class_counts": counts,
            "columns": [vars(column) | {"levels": list(column.levels)} for column in data.columns[:_SHOWN_FEATURES]],
            "notes": list(data.notes),
        },
        "quality": {"metric": subject.metric, "chance": data.chance, **estimate_to_json(subject.quality())},
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers were made with."""
    found = {"python": platform.python_version()}
    for name in ("theodolite", "torch", "numpy", "scipy", "scikit-learn", "plotly"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
