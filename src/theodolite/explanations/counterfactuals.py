"""Counterfactuals of tables: what may change, by how much and what that costs; the closest one, and the nearest neighbour.

    min |z' - z|   with   m(z') >= 1/2   inside what may change, z in units of the training rows' ranges

Columns are scaled to [0, 1] by the training rows inside and given back in the user's units. Robust counterfactuals
(`theodolite.explanations.robust_counterfactuals`) start from these.

Source: Wachter, Mittelstadt, Russell, 2017, arXiv:1711.00399.
"""

__all__ = [
    "ClosestCounterfactual",
    "CounterfactualNotFoundError",
    "CounterfactualSet",
    "Counterfactuals",
    "Generator",
    "NearestNeighbour",
    "Region",
    "TableSchema",
]

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from theodolite.core.errors import DataError, InputError, ModelError, TheodoliteError
from theodolite.explanations.stability import ClassScore, check_noise, stability, warn_of_training

Name = str | int
_EDGE = 1e-3  # log-odds beyond the boundary that a search aims at, so that rounding does not lose the class
_RANGE_STEPS = 30


class CounterfactualNotFoundError(TheodoliteError):
    """No counterfactual was found within what may change."""


@dataclass(frozen=True, eq=False)
class TableSchema:
    """What the columns of a table are: ranges of the training rows, and what may change.

    names: one a column, () where they have none. low, span: (d,) the training minimum and range (1 where that is 0).
    immutable, increasing, decreasing: (d,) columns that keep their value, may only grow, may only fall. groups: columns of
    one-hot groups; their members are 0 or 1 and exactly one is 1. floor, ceiling: (d,) bounds that hold in any case, infinite
    where none were given; there the range of the training rows (or the row's own value, where it lies outside) is the limit.
    """

    names: tuple[str, ...]
    low: Float[np.ndarray, " feature"]
    span: Float[np.ndarray, " feature"]
    immutable: Bool[np.ndarray, " feature"]
    increasing: Bool[np.ndarray, " feature"]
    decreasing: Bool[np.ndarray, " feature"]
    floor: Float[np.ndarray, " feature"]
    ceiling: Float[np.ndarray, " feature"]
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
    ) -> "TableSchema":
        """Read ranges from training rows (n, d); columns are told by name (a data frame has them) or by number.

        immutable: columns or a mask (d,). bounds: {column: (low, high)}, or (low, high) with each a number, (d,) or None.
        Raises DataError (a ValueError) for NaN, for groups that are not one-hot in the rows, and for unknown columns.
        """
        names = tuple(map(str, X.columns)) if hasattr(X, "columns") else tuple(names)
        rows = plain_rows(X, names)
        d = rows.shape[1]
        if len(rows) == 0:
            raise DataError("ranges cannot be read from zero training rows")
        if names and len(names) != d:
            raise DataError(f"{len(names)} names for {d} columns")
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
        span = np.where(high > low, high - low, 1.0)
        return cls(names, low, span, fixed, up, down, floor, ceiling, members, absent)

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
        high = np.where(np.isfinite(self.ceiling), self.ceiling, np.maximum(x, self.low + self.span))
        high = np.where((self.span == 1) & np.isin(np.arange(len(self.low)), list(self.absent)), 0.0, high)
        low = np.where(self.immutable | self.increasing, np.maximum(low, x), low)
        high = np.where(self.immutable | self.decreasing, np.minimum(high, x), high)
        return Region(self.scaled(x), self.scaled(low), self.scaled(high), self.groups)

    def restored(self, z: Tensor, x: np.ndarray) -> Float[np.ndarray, "row feature"]:
        """Points in the user's units, bit for bit the row's own value where nothing changed, and within the limits."""
        same = z == self.scaled(x)
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
        return out, Region(self.start, low, high)

    def cost(self, z: Tensor, norm: int) -> Float[Tensor, " row"]:
        """Distance from the row, L1 or L2, in scaled units."""
        return (z - self.start).norm(p=norm, dim=1)


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Points (n, d) in the user's units that change the answers for the rows ``factuals``.

    cost: (n,) distance in units of the training ranges, L1 or L2 as asked. valid: (n,) the model answers the target class
    there. reached: (n,) the search met its own aim, too. unchanged: (n,) rows that had the target class before; they come back
    as they were, at cost 0. A row without a counterfactual is NaN, with valid False.
    """

    factuals: Float[np.ndarray, "row feature"]
    counterfactuals: Float[np.ndarray, "row feature"]
    cost: Float[np.ndarray, " row"]
    valid: Bool[np.ndarray, " row"]
    reached: Bool[np.ndarray, " row"]
    unchanged: Bool[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.cost)


@dataclass(frozen=True, eq=False)
class CounterfactualSet(Counterfactuals):
    """Counterfactuals with their relaxed stability (n,), from draws that no search has seen, and steps (n,) of the search."""

    stability: Float[np.ndarray, " row"]
    steps: Int[np.ndarray, " row"]


@dataclass(frozen=True, eq=False)
class Search:
    """What a generator works on: the score, the rows' region, the table, and the training rows that have the target class."""

    score: ClassScore
    region: Region
    schema: TableSchema
    accepted: Float[Tensor, "train feature"]

    def inputs(self, z: Tensor) -> Tensor:
        """Scaled points as the model takes them."""
        return self.schema.unscaled(z)

    def probability(self, z: Tensor) -> Float[Tensor, " row"]:
        """m at scaled points, without gradients."""
        return self.score(self.inputs(z))

    def on(self, rows: Tensor) -> "Search":
        """The same for some of the rows."""
        return replace(self, region=self.region.take(rows))


@dataclass(kw_only=True)
class Generator(ABC):
    """What all generators share: ``fit(model, X_train)`` reads the table, ``generate(X)`` makes one point a row.

    norm: 1 or 2, of the cost. immutable, increasing, decreasing, groups, bounds, names: as in `TableSchema.of`. sigma, k, seed:
    of the reported stability. on_failure: "nan" or "raise" (`CounterfactualNotFoundError`). memory: bytes.
    """

    norm: int = 2
    immutable: Sequence[Name] | np.ndarray | None = None
    increasing: Sequence[Name] | None = None
    decreasing: Sequence[Name] | None = None
    groups: Sequence[Sequence[Name]] = ()
    bounds: Any = None
    names: Sequence[str] = ()
    sigma: float = 0.05
    k: int = 1000
    seed: int = 0
    on_failure: Literal["nan", "raise"] = "nan"
    memory: int | None = None
    _model: Any = field(default=None, init=False, repr=False)
    _schema: Any = field(default=None, init=False, repr=False)
    _train: Any = field(default=None, init=False, repr=False)

    needs_gradients = True

    def __post_init__(self) -> None:
        check_noise(self.sigma, self.k)
        if self.norm not in (1, 2):
            raise InputError(f"norm must be 1 or 2, got {self.norm}")
        if self.on_failure not in ("nan", "raise"):
            raise InputError(f'on_failure must be "nan" or "raise", got {self.on_failure!r}')

    def fit(self, model: Any, X_train: Any) -> "Generator":
        """Keep the model and read the ranges of the training rows (n, d)."""
        self._schema = TableSchema.of(
            X_train, names=self.names, immutable=self.immutable, increasing=self.increasing,
            decreasing=self.decreasing, groups=self.groups, bounds=self.bounds,
        )  # fmt: skip
        self._train = self._schema.rows(X_train)
        self._model = model
        warn_of_training(model)
        return self

    @property
    def schema(self) -> TableSchema:
        """What was read from the training rows."""
        if self._schema is None:
            raise InputError(f"{type(self).__name__} is not fitted; call fit(model, X_train) first")
        return self._schema

    def generate(self, X: Any, target: int | None = None) -> CounterfactualSet:
        """One counterfactual for each row of X (n, d); target: the wanted class, None is class 1 of two."""
        schema = self.schema
        x = schema.rows(X)
        train = torch.as_tensor(self._train)
        score = ClassScore(self._model, target, train, memory=self.memory)
        if self.needs_gradients and not score.differentiable:
            raise ModelError(
                f"{type(self).__name__} needs gradients, which {type(self._model).__name__} has none of; "
                "use TRexNearest or NearestNeighbour"
            )
        unchanged = (score(torch.as_tensor(x)) >= 0.5).numpy()
        z = schema.scaled(x)
        steps = np.zeros(len(x), dtype=np.int64)
        region = schema.region(x)
        todo = torch.as_tensor(~unchanged & region.possible.numpy()).nonzero().ravel()
        if len(todo):
            likely = score(train) >= 0.5
            search = Search(score, region.take(todo), schema, schema.scaled(self._train)[likely])
            z[todo], count = self._whole(search)
            steps[todo.numpy()] = count.numpy()
        out = schema.restored(z, x)
        found = score(torch.as_tensor(out)).numpy() >= 0.5
        found &= unchanged | region.possible.numpy()
        if self.on_failure == "raise" and not found.all():
            raise CounterfactualNotFoundError(
                f"no counterfactual for {int((~found).sum())} of {len(x)} rows (the first is row {int((~found).argmax())}); "
                "let more columns change, widen the bounds, or take more steps"
            )
        cost = region.cost(schema.scaled(out), self.norm).numpy()
        rated = np.full(len(x), np.nan)
        rated[found] = self._rate(out[found], score)
        out[~found], cost[~found] = np.nan, np.nan
        return CounterfactualSet(x, out, cost, found, found & self._aim(rated), unchanged, rated, steps)

    def _rate(self, x: np.ndarray, score: ClassScore) -> np.ndarray:
        # other draws than any search uses, or the score would be the best of those that it was searched on
        options = {"sigma": self.sigma, "k": self.k, "units": self.schema.span, "memory": self.memory}
        with score.quiet():
            return stability(score.view.model, x, target=score.target, seed=self.seed + 2_000_003, **options)

    def _whole(self, search: Search) -> tuple[Tensor, Tensor]:
        """The search, and where there are one-hot groups a second one with each group held at its largest member."""
        z, steps = self._search(search, None)
        if not search.region.groups:
            return z, steps
        settled, held = search.region.settle(z)
        z, more = self._search(replace(search, region=held), settled)
        return z, steps + more

    def _aim(self, rated: np.ndarray) -> np.ndarray:
        return np.ones(len(rated), dtype=bool)

    @abstractmethod
    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scaled points (n, d) and steps (n,) for rows that lack the target class; begin: where to set out, None: the row."""


@dataclass(kw_only=True)
class ClosestCounterfactual(Generator):
    """The nearest point with the target class, on the boundary of the present model.

    Steps of falling size either go up the log-odds or, where the class is reached, back toward the row (a proximal step of the
    L1 or L2 distance). The weight between the two is searched ``binary_search_steps`` times over ``steps`` steps; the best
    point is then pulled back along the line to the row. Nonconvex: near, not provably nearest.
    """

    steps: int = 300
    lr: float = 0.01
    binary_search_steps: int = 9

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        region = search.region
        z = region.project(region.start if begin is None else begin)
        best, distance = _better(search, *_neighbour_or_none(search, self.norm), z, self.norm)
        weight = torch.full((len(z),), 2.0, dtype=torch.float64)
        count = torch.zeros(len(z), dtype=torch.long)
        for attempt in range(self.binary_search_steps):
            before = distance.clone()
            for step in range(self.steps):
                odds, slope = log_odds_slope(search, z)
                over = odds >= _EDGE
                cost = region.cost(z, self.norm)
                improved = over & (cost < distance)
                best[improved], distance[improved] = z[improved], cost[improved]
                rate = self.lr * (1 - step / self.steps) + 1e-4
                moved = z + torch.where(over, 0.0, rate * weight)[:, None] * slope
                z = region.project(region.start + _shrink(moved - region.start, rate, self.norm))
            count += self.steps
            found = distance < torch.inf
            gained = (before - distance) > 1e-3 * distance
            if bool(torch.isfinite(before).all()) and not bool(gained.any()):
                break
            if attempt >= 2 and not bool(found.any()):
                break
            weight = torch.where(gained | ~found, weight * torch.where(found, 1.0, 2.0), weight * 0.7)
            z = torch.where(found[:, None], best, z)
        return _pulled_back(search, best, torch.isfinite(distance)), count


@dataclass(kw_only=True)
class NearestNeighbour(Generator):
    """The nearest training row that has the target class and lies within what may change."""

    needs_gradients = False

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        z = search.region.start.clone()
        for i, near in enumerate(neighbours(search, self.norm)):
            if len(near):
                z[i] = search.accepted[near[0]]
        return z, torch.zeros(len(z), dtype=torch.long)

    def _whole(self, search: Search) -> tuple[Tensor, Tensor]:
        return self._search(search, None)


def neighbours(search: Search, norm: int) -> list[Int[Tensor, " candidate"]]:
    """For each row the training rows of the target class within its region, nearest first."""
    out = []
    for start, low, high in zip(search.region.start, search.region.low, search.region.high, strict=True):
        inside = ((search.accepted >= low - 1e-9) & (search.accepted <= high + 1e-9)).all(dim=1).nonzero().ravel()
        out.append(inside[(search.accepted[inside] - start).norm(p=norm, dim=1).argsort(stable=True)])
    return out


def log_odds_slope(search: Search, z: Tensor) -> tuple[Float[Tensor, " row"], Float[Tensor, "row feature"]]:
    """Log-odds at scaled points and their gradient there, of length 1 (0 where the model is flat)."""
    score = search.score
    odds = torch.empty(len(z), dtype=torch.float64)
    slope = torch.empty_like(z)
    with torch.enable_grad(), score.quiet():
        for part in score.parts(z, 1, gradients=True):
            rows = z[part].detach().requires_grad_(True)
            here = score.log_odds(search.inputs(rows))
            (slope[part],) = torch.autograd.grad(here.sum(), rows)
            odds[part] = here.detach().double().cpu()
    return odds, slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _neighbour_or_none(search: Search, norm: int) -> tuple[Tensor, Tensor]:
    """The nearest accepted training row moved into the region, where it still has the class: an upper bound to start from."""
    start = search.region.start
    best, distance = start.clone(), torch.full((len(start),), torch.inf, dtype=torch.float64)
    if len(search.accepted) == 0:
        return best, distance
    nearest = torch.cdist(start, search.accepted, p=norm).argmin(dim=1)
    return _better(search, best, distance, search.region.project(search.accepted[nearest]), norm)


def _better(search: Search, best: Tensor, distance: Tensor, z: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    cost = search.region.cost(z, norm)
    good = (search.probability(z) >= 0.5 + _EDGE / 4) & (cost < distance)
    return torch.where(good[:, None], z, best), torch.where(good, cost, distance)


def _pulled_back(search: Search, best: Tensor, found: Tensor) -> Tensor:
    """The point nearest to the row on the line to it that still has the class, by halving."""
    start = search.region.project(search.region.start)
    near, far = torch.zeros(len(best), dtype=torch.float64), torch.ones(len(best), dtype=torch.float64)
    for _ in range(_RANGE_STEPS if bool(found.any()) else 0):
        middle = (near + far) / 2
        good = search.probability(start + middle[:, None] * (best - start)) >= 0.5 + _EDGE / 4
        near, far = torch.where(good, near, middle), torch.where(good, middle, far)
    return torch.where(found[:, None], start + far[:, None] * (best - start), best)


def _shrink(move: Tensor, by: float, norm: int) -> Tensor:
    """Proximal step of the distance: each coordinate (L1) or the length (L2) loses ``by``."""
    if norm == 1:
        return move.sign() * (move.abs() - by).clamp_min(0)
    length = move.norm(dim=1, keepdim=True)
    return move * (1 - by / length.clamp_min(1e-12)).clamp_min(0)


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
    rows = np.array(X.detach().cpu() if isinstance(X, Tensor) else X, dtype=np.float64)
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
    if isinstance(columns, np.ndarray) and columns.dtype == bool:
        if columns.shape != (d,):
            raise DataError(f"a mask of columns must be ({d},), got {columns.shape}")
        return columns.copy()
    out = np.zeros(d, dtype=bool)
    out[[at(c) for c in (() if columns is None else columns)]] = True
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
