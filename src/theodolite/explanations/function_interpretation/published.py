"""The published benchmark's files: numeric functions, concepts of neurons, and unit tests."""

__all__ = ["PublishedNeuron", "PublishedStrings", "load_published"]

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodolite.core.errors import DataError, InputError
from theodolite.explanations.function_interpretation.families import FAMILIES
from theodolite.explanations.function_interpretation.judges import UnitTest
from theodolite.explanations.function_interpretation.numeric import Corruption, NumericFunction, Variant

_VARIANTS: dict[str, Variant] = {
    "function_code.py": "clean",
    "corrupted_function_code.py": "corrupted",
    "noised_function_code.py": "noisy",
    "load_mlp.py": "mlp",
}


@dataclass(frozen=True)
class PublishedNeuron:
    """A concept neuron: one or two concepts (of a relation: what goes in and what comes out, and an exception, if any)."""

    name: str
    concepts: tuple[str, ...]
    exception: str | None
    words: tuple[str, ...]
    tests: tuple[UnitTest, ...]


@dataclass(frozen=True)
class PublishedStrings:
    """The unit tests of a published string function, whose definition is not in the files."""

    name: str
    tests: tuple[UnitTest, ...]


def load_published(directory: str | Path, category: str) -> list[Any]:
    """The published functions of a category, in the files' order.

    directory: with files named as in the repository (``numeric/data.json``) or with "-" for "/" (``numeric-data.json``).
    category: "numeric" (gives `NumericFunction`, its networks fitted here), "neurons_entities" or "neurons_relations"
    (`PublishedNeuron`), "strings" (`PublishedStrings`).

    Raises DataError where a file is missing or not what it should be.
    """
    readers: dict[str, Callable[[Path], list[Any]]] = {
        "numeric": _numeric,
        "strings": _strings,
        "neurons_entities": lambda folder: _neurons(folder, "neurons_entities"),
        "neurons_relations": lambda folder: _neurons(folder, "neurons_relations"),
    }
    if category not in readers:
        raise InputError(f"a category is one of {', '.join(readers)}, got {category!r}")
    try:
        return readers[category](Path(directory).expanduser())
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{directory} is not the published {category} set ({type(error).__name__}: {error})") from error


def _json(folder: Path, name: str) -> Any:
    for path in (folder / name, folder / name.replace("/", "-")):
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {path} as JSON: {error}") from error
    raise DataError(f"{folder} holds neither {name} nor {name.replace('/', '-')}")


def _numeric(folder: Path) -> list[NumericFunction]:
    variants = _json(folder, "numeric/func_name_dict.json")
    return [_function(row, variants[row["dir"]], place) for place, row in enumerate(_json(folder, "numeric/data.json"))]


def _function(row: dict[str, Any], variant: str, place: int) -> NumericFunction:
    *families, how = row["name"].split("(")[0].split(";") if ";" in row["name"] else (row["name"].split("(")[0], "")
    given = [row["params"]] if not how else row["params"]
    parts = []
    for family, parameters in zip(families, given, strict=True):
        if family not in FAMILIES:
            raise DataError(f"{row['dir']}: there is no family {family!r}")
        parts.append((family, _tuple(parameters)))
    boundary = row["corruption_params"]["boundary"]
    low, high = {
        "interval_inside": lambda: (boundary[0], boundary[1]),
        "interval_smaller": lambda: (-math.inf, boundary[0]),
        "interval_larger": lambda: (boundary[0], math.inf),
    }[row["corruption_type"]]()
    domain = row["domain"]
    return NumericFunction(
        tuple(parts), {"": "", "multiply_two": "*", "sum_two": "+"}[how], _VARIANTS[variant],  # type: ignore[arg-type]
        Corruption(float(low), float(high), float(row["corruption_params"]["std"])), row["noise_type"],
        (float(domain[0]), float(domain[1])), row["dir"], place,
    )  # fmt: skip


def _tuple(parameters: Any) -> tuple[Any, ...]:
    if parameters is None:
        return ()
    if not isinstance(parameters, list):
        return (parameters,)
    return tuple(tuple(one) if isinstance(one, list) else one for one in parameters)


def _neurons(folder: Path, category: str) -> list[PublishedNeuron]:
    rows, tests = _json(folder, f"{category}/data.json"), _json(folder, f"{category}/unit_test_data.json")
    made = []
    for row, told in zip(rows, tests, strict=True):
        name = row["dir"].rstrip("/").split("/")[-1]
        if name != told["name"]:
            raise DataError(f"the unit tests of {told['name']} stand where those of {name} should")
        concepts = tuple(one for one in (row["concept1"], row["concept2"]) if one)
        made.append(PublishedNeuron(name, concepts, row.get("exeption"), tuple(row["initial"]), _tests(told)))
    return made


def _strings(folder: Path) -> list[PublishedStrings]:
    return [PublishedStrings(row["name"], _tests(row)) for row in _json(folder, "strings/unit_test_data.json")]


def _tests(row: dict[str, Any]) -> tuple[UnitTest, ...]:
    """Candidates are words, or inputs with outputs, which are put in one text."""
    made = []
    for candidates, answer in zip(row["test_vec"], row["correct_inx"], strict=True):
        paired = isinstance(candidates[0], list)
        texts = [f"{a} -> {b}" for a, b in zip(*candidates, strict=True)] if paired else candidates
        made.append(UnitTest(tuple(texts), int(answer)))
    return tuple(made)
