"""The eight methods as rows of one table: a neighbourhood, a loss and a linear surrogate each (Table 1 of the paper)."""

__all__ = ["METHODS", "attribute"]

import dataclasses
from typing import Any

import numpy as np
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.explanations.local_approximation.engine import LocalApproximation, LocalExplanation
from theodolite.explanations.local_approximation.neighbourhood import Neighbourhood

METHODS: dict[str, LocalApproximation] = {
    "LIME": LocalApproximation(Neighbourhood.binary()),
    "KernelSHAP": LocalApproximation(Neighbourhood.binary("shapley")),
    "Occlusion": LocalApproximation(Neighbourhood.one_hot(), intercept=False),
    "C-LIME": LocalApproximation(Neighbourhood.gaussian(0.1)),
    "SmoothGrad": LocalApproximation(Neighbourhood.gaussian(0.1), "gradient"),
    # the limits sigma -> 0 and a -> 1: so near to x that a few draws are as good as many
    "Vanilla Gradients": LocalApproximation(Neighbourhood.gaussian(1e-5), "gradient", n_samples=4),
    "Integrated Gradients": LocalApproximation(Neighbourhood.path(), "gradient"),
    "Gradient × Input": LocalApproximation(Neighbourhood.path(1 - 1e-5, nodes=2), "gradient"),
}
"""The methods of Table 1 with the settings of the paper's experiments, by name."""


def attribute(name: str, f: Any, X: Tensor | np.ndarray, target: Any = None, **override: Any) -> LocalExplanation:
    """Explain rows ``X`` by one of the eight `METHODS`, with some of its options replaced.

    name: case, blanks, hyphens and underscores do not matter ("integrated_gradients"). override: options of
    `LocalApproximation` (n_samples, seed, ...) or of the method's neighbourhood (sigma, baseline, groups, ...).

    >>> import torch
    >>> attribute("gradient x input", lambda x: x.square().sum(dim=1), torch.tensor([[1.0, 2.0]])).weights.round()
    tensor([[2., 8.]])
    """
    method = METHODS[_method_name(name)]
    here = {field.name for field in dataclasses.fields(method.neighbourhood)}
    engine = {field.name for field in dataclasses.fields(method)}
    unknown = sorted(set(override) - here - engine)
    if unknown:
        raise InputError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(here | engine))}")
    inner = {key: value for key, value in override.items() if key in here}
    outer = {key: value for key, value in override.items() if key not in here}
    if inner:
        outer["neighbourhood"] = dataclasses.replace(outer.get("neighbourhood", method.neighbourhood), **inner)
    return dataclasses.replace(method, **outer).explain(f, X, target)


def _method_name(name: str) -> str:
    plain = {_plain(known): known for known in METHODS}
    if _plain(name) not in plain:
        raise InputError(f"there is no method called {name!r}; there are: {', '.join(METHODS)}")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold().replace("×", "x") if letter.isalnum())
