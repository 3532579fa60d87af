"""A space of parameters by name: drawing, checking, and the unit cube that optimisers work in."""

__all__ = ["Config", "SearchSpace"]

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float as Floats
from scipy.stats import qmc

from theodolite.core.errors import InputError
from theodolite.hyperparameters.space.parameters import Categorical, Float, Int, Ordinal, Parameter, number

Config = dict[str, Any]
"""One value for each parameter of a space, by name."""

_SAME = 8  # decimals to which two configurations are the same


class SearchSpace(Mapping[str, Parameter]):
    """Parameters by name.

    Raises InputError for an empty space, an empty name, or what is no parameter.

    >>> space = SearchSpace({"depth": Int(1, 15), "rate": Float(1e-3, 1.0, "log"), "rule": Categorical(("gini", "entropy"))})
    >>> config = space.sample(1, seed=0)[0]
    >>> space.check(config) == config
    True
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        if not parameters:
            raise InputError("a search space needs at least one parameter")
        for name, parameter in parameters.items():
            if not isinstance(name, str) or not name.strip():
                raise InputError(f"a parameter's name is a text that is not blank, got {name!r}")
            if not isinstance(parameter, Parameter):
                raise InputError(
                    f"{name} must be an Int, Float, Ordinal or Categorical, got {type(parameter).__name__}"
                )
        self._parameters: dict[str, Parameter] = dict(parameters)

    def __getitem__(self, name: str) -> Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        return f"SearchSpace({self._parameters!r})"

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "SearchSpace":
        """Of plain lists, as JSON holds them: [kind, scale, [low, high]] or [kind, scale, [value, ...]].

        kind: "int", "float", "ordinal" or "categorical"; scale: "linear", "log" or "logit".
        """
        made: dict[str, Parameter] = {}
        for name, entry in spec.items():
            if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 3:
                raise InputError(f"{name}: a parameter is [kind, scale, [low, high] or values], got {entry!r}")
            kind, scale, values = entry
            if kind not in ("int", "float", "ordinal", "categorical"):
                raise InputError(f"{name}: a kind is int, float, ordinal or categorical; got {kind!r}")
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise InputError(f"{name}: bounds or values are a list, got {values!r}")
            if kind in ("int", "float"):
                if len(values) != 2:
                    raise InputError(f"{name}: needs [low, high], got {values!r}")
                low, high = (number(value) for value in values)
                if kind == "int" and not (low.is_integer() and high.is_integer()):
                    raise InputError(f"{name}: bounds of an int are whole numbers, got {values!r}")
                made[name] = Int(int(low), int(high), scale) if kind == "int" else Float(low, high, scale)
            else:
                made[name] = (Ordinal if kind == "ordinal" else Categorical)(tuple(values))
        return cls(made)

    def to_spec(self) -> dict[str, list[Any]]:
        """What `from_spec` reads."""
        kinds = {Int: "int", Float: "float", Ordinal: "ordinal", Categorical: "categorical"}
        return {
            name: [kinds[type(one)], one.scale, [one.low, one.high]]
            if isinstance(one, (Int, Float))
            else [kinds[type(one)], "linear", list(one.values)]
            for name, one in self.items()
        }

    def check(self, config: Mapping[str, Any]) -> Config:
        """The configuration with each value of its parameter's type; InputError naming the parameter that does not fit."""
        if set(config) != set(self):
            missing, more = sorted(set(self) - set(config)), sorted(map(str, set(config) - set(self)))
            raise InputError(
                f"a configuration has the space's parameters; missing: {missing}, not of the space: {more}"
            )
        out = {}
        for name, parameter in self.items():
            try:
                out[name] = parameter.check(config[name])
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        return out

    def key(self, config: Mapping[str, Any]) -> tuple[Any, ...]:
        """Equal for two configurations that are the same to 8 decimals."""
        return tuple(
            round(config[name], _SAME) if isinstance(one, Float) else str(config[name]) for name, one in self.items()
        )

    def from_unit(self, u: Floats[np.ndarray, "config parameter"]) -> list[Config]:
        """Configurations at points of the unit cube."""
        return [
            {name: one.from_unit(float(at)) for at, (name, one) in zip(row, self.items(), strict=True)} for row in u
        ]

    def to_unit(self, configs: Iterable[Mapping[str, Any]]) -> Floats[np.ndarray, "config parameter"]:
        """Points of the unit cube, one column a parameter."""
        return np.array([[one.to_unit(c[name]) for name, one in self.items()] for c in configs]).reshape(-1, len(self))

    def encode(self, configs: Iterable[Mapping[str, Any]]) -> Floats[np.ndarray, "config column"]:
        """As `to_unit`, but a categorical parameter has a column of 0 and 1 for each of its values."""
        wanted = list(configs)
        columns = []
        for name, one in self.items():
            if isinstance(one, Categorical):
                columns.append([[float(one.index(c[name]) == i) for i in range(len(one.values))] for c in wanted])
            else:
                columns.append([[one.to_unit(c[name])] for c in wanted])
        return np.concatenate(
            [np.array(column, dtype=np.float64).reshape(len(wanted), -1) for column in columns], axis=1
        )

    def sample(self, n: int, *, seed: int | np.random.Generator = 0) -> list[Config]:
        """n configurations, each parameter uniform on its scale."""
        return self.from_unit(np.random.default_rng(seed).random((n, len(self))))

    def sobol(self, n: int, *, seed: int = 0) -> list[Config]:
        """The first n points of a scrambled Sobol sequence."""
        points = qmc.Sobol(len(self), rng=np.random.default_rng(seed)).random_base2(
            max(0, math.ceil(math.log2(max(1, n))))
        )
        return self.from_unit(points[:n])

    def latin_hypercube(self, n: int, *, seed: int = 0) -> list[Config]:
        """n points, one in each of n slices of every parameter."""
        return self.from_unit(qmc.LatinHypercube(len(self), rng=np.random.default_rng(seed)).random(n))
