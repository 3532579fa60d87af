"""The dictionary that is computed from known attributes, without training.

    a_hat(p) = a_bar + sum_i u_{i, a_i(p)}

mean codes: u_{iv} = E[act | a_i = v] - a_bar. MSE codes: least squares of the centred activations on the one-hot attributes,
the solution of least norm. They are the same where attributes are independent and balanced.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366, section 3.
"""

__all__ = ["SupervisedDictionary"]

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from theodolite.activations.dictionary_evaluation.task import need_values
from theodolite.core.capture import check_finite
from theodolite.core.errors import DataError, InputError

_SWEEPS = 3


class SupervisedDictionary(BaseEstimator):
    """One direction for each value of each attribute.

    kind: "mean" or "mse". products: tuples of attributes that are taken as one, with a value for each combination; named by their
    tuple, and no longer each alone. After `fit`: mean_ (d,), codes_[attribute] (values, d) and values_[attribute], in float64
    and in the same order.

    As a dictionary of `theodolite.core.dictionary` it reads one value of each attribute out of an activation (the one that leaves
    the least, attribute after attribute, three times over), so that as many codes are on as there are attributes.

    >>> acts = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    >>> made = SupervisedDictionary().fit(acts, {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]})
    >>> made.codes_["a"]
    tensor([[-2.,  0.],
            [ 2.,  0.]], dtype=torch.float64)
    """

    def __init__(self, kind: str = "mean", products: Sequence[tuple[str, ...]] = ()) -> None:
        self.kind = kind
        self.products = products

    def fit(self, acts: Tensor | np.ndarray, attributes: pd.DataFrame | Mapping[str, Any]) -> "SupervisedDictionary":
        """Codes from activations (n, d) and their attributes.

        Raises InputError for an unknown kind or product, DataError for an attribute with a single value or a
        missing one, ActivationError for NaN.
        """
        if self.kind not in ("mean", "mse"):
            raise InputError(f'kind is "mean" or "mse", got {self.kind!r}')
        rows = (acts if isinstance(acts, Tensor) else torch.as_tensor(np.array(acts))).detach().double()
        if rows.ndim != 2 or len(rows) < 2:
            raise InputError(f"need activations (n, d) of at least two rows, got shape {tuple(rows.shape)}")
        check_finite(rows, "the activations")
        table = pd.DataFrame(attributes)
        if len(table) != len(rows):
            raise InputError(f"{len(rows)} activations but {len(table)} rows of attributes")
        need_values(table)
        self.mean_ = rows.mean(dim=0)
        columns = self._columns(table)
        self.values_: dict[Hashable, list[Any]] = {}
        places = {}
        for name, column in columns.items():
            values = sorted(set(column), key=lambda value: (str(type(value)), value))
            if len(values) < 2:
                raise DataError(f"attribute {name!r} has a single value, {values[0]!r}; leave it out")
            self.values_[name] = values
            places[name] = self._places(name, column)
        centred = rows - self.mean_
        one_hot = torch.cat([_one_hot(at, len(self.values_[name])) for name, at in places.items()], dim=1)
        if self.kind == "mean":
            codes = (one_hot.T @ centred) / one_hot.sum(dim=0)[:, None]
        else:
            # of least norm: the columns of each attribute sum to one, so the solution is not unique
            codes = torch.linalg.lstsq(one_hot, centred, driver="gelsd").solution
        parts = codes.split([len(values) for values in self.values_.values()])
        self.codes_: dict[Hashable, Tensor] = dict(zip(self.values_, parts, strict=True))
        return self

    def _columns(self, table: pd.DataFrame) -> dict[Hashable, list[Any]]:
        """The values of each attribute that has a code, products joined."""
        absent = [name for product in self.products for name in product if name not in table.columns]
        if absent:
            raise InputError(f"there is no attribute {absent[0]!r}; there are: {', '.join(map(str, table.columns))}")
        joined = {name for product in self.products for name in product}
        columns: dict[Hashable, list[Any]] = {
            name: table[name].tolist() for name in table.columns if name not in joined
        }
        for product in self.products:
            columns[tuple(product)] = list(zip(*(table[name].tolist() for name in product), strict=True))
        return columns

    def _places(self, name: Hashable, column: Sequence[Any]) -> Tensor:
        if name not in self.values_:
            raise InputError(f"there is no attribute {name!r}; there are: {', '.join(map(str, self.values_))}")
        at = {value: i for i, value in enumerate(self.values_[name])}
        unknown = [value for value in column if value not in at]
        if unknown:
            raise InputError(
                f"attribute {name!r} never had the value {unknown[0]!r} in the activations that were fitted, so it has no code; "
                f"it had {', '.join(map(str, list(at)[:8]))}{', ...' if len(at) > 8 else ''}"
            )
        return torch.tensor([at[value] for value in column])

    def code(self, attribute: Hashable, values: Sequence[Any]) -> Float[Tensor, "row width"]:
        """u_{i, v} for each of ``values``; InputError naming a value that was not there when fitted."""
        check_is_fitted(self)
        return (
            self.codes_[attribute][self._places(attribute, values)]
            if attribute in self.codes_
            else self._missing(attribute)
        )

    def _missing(self, attribute: Hashable) -> Tensor:
        raise InputError(f"there is no attribute {attribute!r}; there are: {', '.join(map(str, self.codes_))}")

    def reconstruct(self, attributes: pd.DataFrame | Mapping[str, Any]) -> Float[Tensor, "row width"]:
        """a_hat for rows with these attributes."""
        check_is_fitted(self)
        columns = self._columns(pd.DataFrame(attributes))
        return self.mean_ + sum((self.code(name, columns[name]) for name in self.codes_), start=torch.zeros(()))

    def edit(self, x: Float[Tensor, "row width"], attr: Hashable, old: Any, new: Any) -> Float[Tensor, "row width"]:
        """x - u_{i, old} + u_{i, new}: each row as if the attribute had its new value.

        old, new: a value for each row, or one for all of them.
        """
        given = [[one] if self._is_value(attr, one) else list(one) for one in (old, new)]
        wrong = [len(values) for values in given if len(values) not in (1, len(x))]
        if wrong:
            raise InputError(f"{len(x)} rows need as many values of {attr!r} or one for all, got {wrong[0]}")
        before, after = (self.code(attr, values) for values in given)
        return x + (after - before).to(x)

    def _is_value(self, attr: Hashable, given: Any) -> bool:
        """Whether one value was given, and not a sequence of them; a value of a product is a tuple of its own."""
        if isinstance(attr, tuple) and isinstance(given, tuple):
            return not all(isinstance(part, tuple) for part in given)
        return isinstance(given, str) or not hasattr(given, "__len__")

    def weights(self, attributes: pd.DataFrame | Mapping[str, Any]) -> pd.DataFrame:
        """u_i . (a_hat - a_bar) / |a_hat - a_bar|^2, a column for each attribute; each row sums to 1."""
        columns = self._columns(pd.DataFrame(attributes))
        parts = {name: self.code(name, columns[name]) for name in self.codes_}
        whole = sum(parts.values(), start=torch.zeros(()))
        size = whole.square().sum(dim=1).clamp_min(1e-300)
        made = {name: ((part * whole).sum(dim=1) / size).numpy() for name, part in parts.items()}
        frame = pd.DataFrame(dict(enumerate(made.values())))
        frame.columns = pd.Index(list(made), tupleize_cols=False)
        return frame

    # ---- as a dictionary

    @property
    def directions(self) -> Float[Tensor, "code width"]:
        """All codes, attribute after attribute."""
        return torch.cat(list(self.codes_.values())).float()

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row code"]:
        """1 for the value of each attribute that is read out of a row, 0 for the others."""
        if x.shape[-1] != len(self.mean_):
            raise InputError(f"the dictionary has width {len(self.mean_)}, the activations {x.shape[-1]}")
        left = (x.double() - self.mean_).reshape(-1, x.shape[-1])
        tables = list(self.codes_.values())
        chosen: list[Tensor | None] = [None] * len(tables)
        for _ in range(_SWEEPS):
            for i, table in enumerate(tables):
                before = chosen[i]
                if before is not None:
                    left = left + table[before]
                best = (table.square().sum(dim=1) - 2 * left @ table.T).argmin(dim=1)
                chosen[i], left = best, left - table[best]
        made = [_one_hot(at, len(table)) for at, table in zip(chosen, tables, strict=True) if at is not None]
        return torch.cat(made, dim=1).to(x.dtype).reshape(*x.shape[:-1], -1)

    def decode(self, codes: Float[Tensor, "*row code"]) -> Float[Tensor, "*row width"]:
        """a_bar + codes times directions."""
        return codes @ self.directions.to(codes) + self.mean_.to(codes)


def _one_hot(places: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(places, count).double()
