"""The eight methods as rows of one table: a neighbourhood, a loss and a linear surrogate each (Table 1 of the paper)."""

__all__ = ["METHODS", "attribute", "with_options"]

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from theodolite.core.errors import InputError
from theodolite.explanations.local_approximation.engine import LocalApproximation, LocalExplanation
from theodolite.explanations.local_approximation.neighbourhood import Neighbourhood

METHODS: dict[str, LocalApproximation] = {
    "LIME": LocalApproximation(Neighbourhood.binary()),
    "KernelSHAP": LocalApproximation(Neighbourhood.binary("shapley")),
    "Occlusion": LocalApproximation(Neighbourhood.one_hot(), intercept=False),
    "C-LIME": LocalApproximation(Neighbourhood.gaussian(0.1)),
    "SmoothGrad": LocalApproximation(Neighbourhood.gaussian(0.1), "gradient"),
    # the limits sigma -> 0 and a -> 1: so near to x that one draw is as good as many
    "Vanilla Gradients": LocalApproximation(Neighbourhood.gaussian(1e-5), "gradient", n_samples=1),
    "Integrated Gradients": LocalApproximation(Neighbourhood.path(), "gradient"),
    "Gradient × Input": LocalApproximation(Neighbourhood.path(1 - 1e-5, nodes=1), "gradient"),
}
"""The methods of Table 1 with the settings of the paper's experiments, by name."""


def attribute(name: str, f: Any, X: Any, target: Any = None, **override: Any) -> LocalExplanation:
    """Explain rows ``X`` by one of the eight `METHODS`, with some of its options replaced.

    name: case, blanks, hyphens and underscores do not matter ("integrated_gradients"). override: options of
    `LocalApproximation` (n_samples, seed, ...) or of the method's neighbourhood (sigma, baseline, groups, ...).

    >>> import torch
    >>> attribute("gradient x input", lambda x: x.square().sum(dim=1), torch.tensor([[1.0, 2.0]])).weights.round()
    tensor([[2., 8.]])
    """
    return _with(name, METHODS[_method_name(name)], override).explain(f, X, target)


_Kind = TypeVar("_Kind", LocalApproximation, Neighbourhood)
_FOR_ALL = ("baseline", "groups", "memory", "seed")


def with_options(table: Mapping[str, _Kind], **options: Any) -> dict[str, _Kind]:
    """`METHODS`, or a table of neighbourhoods, with a baseline, groups, memory or seed set in every entry that has one.

    >>> import torch
    >>> methods = with_options(METHODS, baseline=torch.tensor([1.0, 0.5]), groups=torch.tensor([0, 1]))
    >>> methods["LIME"].neighbourhood.baseline.tolist()
    [1.0, 0.5]
    """
    unknown = sorted(set(options) - set(_FOR_ALL))
    if unknown:
        raise InputError(
            f"only {', '.join(_FOR_ALL)} mean the same in all entries, got {', '.join(unknown)}; set others in one method: "
            "dataclasses.replace(METHODS['LIME'], n_samples=...)"
        )
    return {
        name: _with(name, entry, {key: value for key, value in options.items() if key in _names(entry)})
        for name, entry in table.items()
    }


def _with(name: str, entry: _Kind, options: Mapping[str, Any]) -> _Kind:
    """The entry with some of its own options, or of its neighbourhood's, replaced."""
    unknown = sorted(set(options) - _names(entry))
    if unknown:
        raise InputError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(_names(entry)))}")
    own = {field.name for field in dataclasses.fields(entry)}
    outer = {key: value for key, value in options.items() if key in own}
    inner = {key: value for key, value in options.items() if key not in own}
    if inner and isinstance(entry, LocalApproximation):
        around = outer.get("neighbourhood", entry.neighbourhood)
        outer["neighbourhood"] = dataclasses.replace(around, **inner)
    return dataclasses.replace(entry, **outer)


def _names(entry: LocalApproximation | Neighbourhood) -> set[str]:
    names = {field.name for field in dataclasses.fields(entry)}
    if isinstance(entry, LocalApproximation):
        names |= {field.name for field in dataclasses.fields(entry.neighbourhood)}
    return names


def _method_name(name: str) -> str:
    plain = {_plain(known): known for known in METHODS}
    if _plain(name) not in plain:
        raise InputError(f"there is no method called {name!r}; there are: {', '.join(METHODS)}")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold().replace("×", "x") if letter.isalnum())
