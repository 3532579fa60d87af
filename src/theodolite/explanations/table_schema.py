"""What the columns of a table are and what may change in them: ranges, one-way columns, one-hot groups, bounds and costs.

Every method that moves rows of a table reads its limits from here, so that they mean the same everywhere.
"""

__all__ = ["Name", "Region", "TableSchema", "plain_rows"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from theodolite.core.errors import DataError, InputError

Name = str | int

_NOTHING = 1e-9
"""Of a column's range: what a search leaves of no change at all, by rounding."""


@dataclass(frozen=True, eq=False)
class TableSchema:
    """What the columns of a table are: ranges of the training rows, and what may change.

    names: one a column, () where they have none. low, high: (d,) the training minimum and maximum (0 and 1 in groups).
    immutable, increasing, decreasing: (d,) columns that keep their value, may only grow, may only fall. groups: columns of
    one-hot groups; their members are 0 or 1 and exactly one is 1. floor, ceiling: (d,) bounds that hold in any case, infinite
    where none were given; there the range of the training rows (or the row's own value, where it lies outside) is the limit.
    costs: (d,) what a change of each column counts beside the others, 1 where not told.
    absent: members of groups that no training row has, which no row is moved to.
    """

    names: tuple[str, ...]
    low: Float[np.ndarray, " feature"]
    high: Float[np.ndarray, " feature"]
    immutable: Bool[np.ndarray, " feature"]
    increasing: Bool[np.ndarray, " feature"]
    decreasing: Bool[np.ndarray, " feature"]
    floor: Float[np.ndarray, " feature"]
    ceiling: Float[np.ndarray, " feature"]
    costs: Float[np.ndarray, " feature"]
    groups: tuple[tuple[int, ...], ...] = ()
    absent: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        X: Any,
        *,
        names: Sequence[str] = (),
        immutable: Sequence[Name] | np.ndarray | None = None,
        increasing: Sequence[Name] | None = None,
        decreasing: Sequence[Name] | None = None,
        groups: Sequence[Sequence[Name]] = (),
        bounds: Any = None,
        costs: Any = None,
    ) -> "TableSchema":
        """Read ranges from training rows (n, d); columns are told by name (a data frame has them) or by number.

        immutable: columns or a mask (d,). bounds: {column: (low, high)}, or (low, high) with each a number, (d,) or None.
        costs: {column: number} or (d,), each above 0; a change of category changes two columns of its group.
        Raises DataError (a ValueError) for NaN, for groups that are not one-hot in the rows, and for unknown columns.
        """
        names = tuple(map(str, X.columns)) if hasattr(X, "columns") else tuple(names)
        rows = plain_rows(X, names)
        d = rows.shape[1]
        if len(rows) == 0:
            raise DataError("ranges cannot be read from zero training rows")
        if names and (len(names) != d or len(set(names)) < d):
            raise DataError(f"need one name for each of the {d} columns, all of them different; got {list(names)[:8]}")
        low, high = rows.min(axis=0), rows.max(axis=0)
        at = _places(names, d)
        members = tuple(tuple(at(c) for c in group) for group in groups)
        flat = [c for group in members for c in group]
        if len(set(flat)) != len(flat) or any(len(group) < 2 for group in members):
            raise DataError("one-hot groups need at least two columns each, and no column may stand twice")
        for group in members:
            if not _one_hot(rows[:, group]):
                raise DataError(f"the columns {[names[c] if names else c for c in group]} are not one-hot in the rows")
        absent = frozenset(c for c in flat if high[c] == 0)
        low[flat], high[flat] = 0.0, 1.0
        fixed = _mask(immutable, at, d)
        for group in members:
            fixed[list(group)] |= fixed[list(group)].any()
        up, down = _mask(increasing, at, d), _mask(decreasing, at, d)
        if (up | down)[flat].any():
            raise InputError("columns of a one-hot group cannot be one-way; make the group immutable instead")
        floor, ceiling = _bounds(bounds, at, d)
        return cls(names, low, high, fixed, up, down, floor, ceiling, _costs(costs, at, d), members, absent)

    @property
    def span(self) -> Float[np.ndarray, " feature"]:
        """The training range of each column, 1 where that is 0: what counts as one unit of cost and of noise."""
        return np.where(self.high > self.low, self.high - self.low, 1.0)

    def rows(self, X: Any) -> Float[np.ndarray, "row feature"]:
        """Rows as numbers in the order of the columns; a data frame's are found by name."""
        rows = plain_rows(X, self.names)
        if rows.shape[1] != len(self.low):
            raise DataError(f"the rows have {rows.shape[1]} columns but the training rows had {len(self.low)}")
        for group in self.groups:
            if not _one_hot(rows[:, group]):
                raise DataError(f"the columns {list(group)} must be one-hot in every row")
        return rows

    def scaled(self, x: Float[np.ndarray, "row feature"]) -> Float[Tensor, "row feature"]:
        """In units of the training ranges."""
        return torch.as_tensor((x - self.low) / self.span)

    def unscaled(self, z: Tensor) -> Float[Tensor, "row feature"]:
        """In the user's units."""
        return z * torch.as_tensor(self.span) + torch.as_tensor(self.low)

    def region(self, x: Float[np.ndarray, "row feature"]) -> "Region":
        """Where each row may move to."""
        low = np.where(np.isfinite(self.floor), self.floor, np.minimum(x, self.low))
        high = np.where(np.isfinite(self.ceiling), self.ceiling, np.maximum(x, self.high))
        high = np.where(np.isin(np.arange(len(self.low)), list(self.absent)), x, high)
        low = np.where(self.immutable | self.increasing, np.maximum(low, x), low)
        high = np.where(self.immutable | self.decreasing, np.minimum(high, x), high)
        costs = torch.as_tensor(self.costs)
        return Region(self.scaled(x), self.scaled(low), self.scaled(high), costs, self.groups)

    def restored(self, z: Tensor, x: np.ndarray) -> Float[np.ndarray, "row feature"]:
        """Points in the user's units, bit for bit the row's own value where nothing changed, and within the limits."""
        same = (z - self.scaled(x)).abs() < _NOTHING
        out = np.where(same.numpy(), x, self.unscaled(z).numpy())
        out = np.where(self.increasing, np.maximum(out, x), out)
        out = np.where(self.decreasing, np.minimum(out, x), out)
        for group in self.groups:
            out[:, group] = out[:, group].round()
        return np.clip(out, self.floor, self.ceiling)


@dataclass(frozen=True, eq=False)
class Region:
    """The points that each row may become, in scaled units: a box, and in it one-hot groups (a simplex until settled)."""

    start: Float[Tensor, "row feature"]
    low: Float[Tensor, "row feature"]
    high: Float[Tensor, "row feature"]
    costs: Float[Tensor, " feature"]
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def possible(self) -> Bool[Tensor, " row"]:
        """Rows for which the region is not empty."""
        return (self.low <= self.high).all(dim=1)

    def take(self, rows: Tensor) -> "Region":
        """The region of some of the rows."""
        return replace(self, start=self.start[rows], low=self.low[rows], high=self.high[rows])

    def project(self, z: Tensor) -> Float[Tensor, "row feature"]:
        """The nearest point of the region (of its convex hull where there are one-hot groups)."""
        out = torch.minimum(torch.maximum(z, self.low), self.high)
        for group in self.groups:
            columns = list(group)
            out[:, columns] = _simplex(z[:, columns], self.low[:, columns], self.high[:, columns])
        return out

    def settle(self, z: Tensor) -> tuple[Float[Tensor, "row feature"], "Region"]:
        """The point with the largest member of each group set to 1, and the region with the groups held there."""
        out, low, high = self.project(z), self.low.clone(), self.high.clone()
        for group in self.groups:
            columns = list(group)
            chosen = out[:, columns].argmax(dim=1)
            out[:, columns] = torch.nn.functional.one_hot(chosen, len(columns)).to(out)
            low[:, columns] = high[:, columns] = out[:, columns]
        return out, replace(self, low=low, high=high, groups=())

    def cost(self, z: Tensor, norm: int) -> Float[Tensor, " row"]:
        """Distance from the row, L1 or L2, in scaled units, each column's times what its change costs."""
        return ((z - self.start) * self.costs).norm(p=norm, dim=1)


def _simplex(z: Tensor, low: Tensor, high: Tensor) -> Float[Tensor, "row member"]:
    """The nearest point with sum 1 and members >= 0; members whose limit is 0 stay 0, held ones stay where they are."""
    free = high > 0
    y = torch.where(free, z, torch.full_like(z, -1e9))
    ordered, _ = y.sort(dim=1, descending=True)
    above = ordered.cumsum(dim=1) - 1
    count = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    last = (ordered - above / count > 0).sum(dim=1, keepdim=True).clamp_min(1)
    out = (y - above.gather(1, last - 1) / last).clamp_min(0)
    return torch.where(low == high, low, out)


def _one_hot(block: np.ndarray) -> bool:
    return bool((np.isin(block, (0, 1))).all() and (block.sum(axis=1) == 1).all())


def plain_rows(X: Any, names: Sequence[str] = ()) -> Float[np.ndarray, "row feature"]:
    """Rows (n, d) of an array, a tensor or a data frame (by ``names``), in double precision; NaN is refused."""
    if hasattr(X, "columns") and names:
        missing = [name for name in names if name not in {str(c) for c in X.columns}]
        if missing:
            raise DataError(f"the table lacks the columns {missing[:5]}")
        X = X[[c for name in names for c in X.columns if str(c) == name]]
    try:
        rows = np.array(X.detach().cpu().numpy() if isinstance(X, Tensor) else X, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"rows must be numbers, all of one length; make categories one-hot columns first ({error})"
        ) from error
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise DataError(f"rows must be (n, features), got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise DataError("rows hold NaN or infinite values; fill or drop them first")
    return rows


def _places(names: Sequence[str], d: int) -> Any:
    def at(column: Name) -> int:
        if isinstance(column, str):
            if column not in names:
                raise DataError(f"there is no column {column!r}; there are: {', '.join(names[:8]) or 'no names'}")
            return list(names).index(column)
        if not 0 <= int(column) < d:
            raise DataError(f"there is no column {column}; there are {d}")
        return int(column)

    return at


def _mask(columns: Any, at: Any, d: int) -> Bool[np.ndarray, " feature"]:
    if columns is None:
        return np.zeros(d, dtype=bool)
    if isinstance(columns, (str, int)):
        raise InputError(f"columns are told as a list of names or numbers, got {columns!r}")
    if len(columns) and np.asarray(columns).dtype == bool:
        if np.shape(columns) != (d,):
            raise DataError(f"a mask of columns must be ({d},), got {np.shape(columns)}")
        return np.array(columns)
    out = np.zeros(d, dtype=bool)
    out[[at(c) for c in columns]] = True
    return out


def _bounds(bounds: Any, at: Any, d: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(d, -np.inf), np.full(d, np.inf)
    if isinstance(bounds, Mapping):
        for column, (least, most) in bounds.items():
            low[at(column)] = -np.inf if least is None else least
            high[at(column)] = np.inf if most is None else most
    elif bounds is not None:
        least, most = bounds
        low[:] = -np.inf if least is None else least
        high[:] = np.inf if most is None else most
    if np.isnan(low).any() or np.isnan(high).any() or (low > high).any():
        raise InputError("bounds must be numbers, each lower one at most the upper one")
    return low, high


def _costs(costs: Any, at: Any, d: int) -> Float[np.ndarray, " feature"]:
    out = np.ones(d)
    if costs is None:
        return out
    if not isinstance(costs, Mapping) and np.shape(costs) != (d,):
        raise DataError(f"costs must be {{column: number}} or ({d},), got shape {np.shape(costs)}")
    for column, cost in costs.items() if isinstance(costs, Mapping) else enumerate(costs):
        out[at(column)] = value = float(cost) if isinstance(cost, Real) else np.nan
        if not 0 < value < np.inf:
            raise InputError(f"costs must be finite and above 0, got {cost!r}; what may not change is immutable")
    return out
