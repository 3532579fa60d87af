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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from theodolite.core.errors import InputError, ModelError, TheodoliteError
from theodolite.explanations.stability import ClassScore, check_noise, stability, warn_of_training
from theodolite.explanations.table_schema import Name, Region, TableSchema

_EDGE = 1e-3  # log-odds beyond the boundary that a search aims at, so that rounding does not lose the class
_RANGE_STEPS = 30


class CounterfactualNotFoundError(TheodoliteError):
    """No counterfactual was found within what may change."""


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

    def log_odds(self, z: Tensor) -> Float[Tensor, " row"]:
        """Log-odds of m at scaled points, without gradients."""
        with torch.no_grad(), self.score.quiet():
            slices = self.score.parts(z, 1, gradients=False)
            return torch.cat([self.score.log_odds(self.inputs(z[part])).double().cpu() for part in slices])

    def on(self, rows: Tensor) -> "Search":
        """The same for some of the rows."""
        return replace(self, region=self.region.take(rows))


@dataclass(kw_only=True)
class Generator(ABC):
    """What all generators share: ``fit(model, X_train)`` reads the table, ``generate(X)`` makes one point a row.

    norm: 1 or 2, of the cost, in ranges of the training rows times ``costs``. immutable, increasing, decreasing, groups, bounds,
    costs, names: as in `TableSchema.of`. sigma, k, seed: of the reported stability.
    on_failure: "nan" or "raise" (`CounterfactualNotFoundError`). memory: bytes.
    """

    norm: int = 2
    immutable: Sequence[Name] | np.ndarray | None = None
    increasing: Sequence[Name] | None = None
    decreasing: Sequence[Name] | None = None
    groups: Sequence[Sequence[Name]] = ()
    bounds: Any = None
    costs: Any = None
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
            decreasing=self.decreasing, groups=self.groups, bounds=self.bounds, costs=self.costs,
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
                "use Cchvae, TRexNearest or NearestNeighbour"
            )
        unchanged = (score(torch.as_tensor(x)) >= 0.5).numpy()
        if self.needs_gradients and len(x):
            with torch.enable_grad(), score.quiet():
                if not score.log_odds(torch.as_tensor(x[:1]).requires_grad_()).requires_grad:
                    raise ModelError(
                        "the model's answer cannot be differentiated by its input; use Cchvae, TRexNearest or NearestNeighbour"
                    )
        z = schema.scaled(x)
        steps = np.zeros(len(x), dtype=np.int64)
        region = schema.region(x)
        todo = torch.as_tensor(~unchanged & region.possible.numpy()).nonzero().ravel()
        if len(todo):
            search = Search(score, region.take(todo), schema, schema.scaled(self._train)[score(train) >= 0.5])
            z[todo], count = self._whole(search)
            steps[todo.numpy()] = count.numpy()
        out = schema.restored(z, x)
        likely = score(torch.as_tensor(out)).numpy()
        found = likely >= 0.5
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
        return CounterfactualSet(x, out, cost, found, found & self._aim(rated, likely), unchanged, rated, steps)

    def _rate(self, x: np.ndarray, score: ClassScore) -> np.ndarray:
        # other draws than any search uses, or the score would be the best of those that it was searched on
        options = {"sigma": self.sigma, "k": self.k, "units": self.schema.span, "memory": self.memory}
        with score.quiet():
            return stability(score.view.model, x, target=score.target, seed=self.seed + 2_000_003, **options)

    def _whole(self, search: Search) -> tuple[Tensor, Tensor]:
        """The search, and where there are one-hot groups others with each group held at one member.

        First at the largest members. That often leaves a row with its own ones, from where the numbers alone do not reach; for
        such rows groups are swapped until the aim is met, or taken from the nearest training row, and the search goes on there.
        """
        z, steps = self._search(search, None)
        if not search.region.groups:
            return z, steps
        z, held = search.region.settle(z)
        found, more = self._search(replace(search, region=held), z)
        z, steps = self._preferred(search, z, found), steps + more
        left = (self._merit(search, z) < self._goal).nonzero().ravel()
        if len(left):
            part = search.on(left)
            swapped = self._preferred(
                part, _swapped(self, part, z[left]), NearestNeighbour(norm=self.norm)._search(part, None)[0]
            )
            _, held = part.region.settle(swapped)
            found, more = self._search(replace(part, region=held), swapped)
            z[left] = self._preferred(part, self._preferred(part, z[left], swapped), found)
            steps[left] += more
        return z, steps

    def _preferred(self, search: Search, one: Tensor, other: Tensor) -> Float[Tensor, "row feature"]:
        """Of two points for each row the one that meets the aim, or else has the class, or else is nearer."""
        rank = [
            (self._merit(search, z) >= self._goal).int() + (search.probability(z) >= 0.5).int() for z in (one, other)
        ]
        nearer = search.region.cost(other, self.norm) < search.region.cost(one, self.norm)
        return torch.where(((rank[1] > rank[0]) | ((rank[1] == rank[0]) & nearer))[:, None], other, one)

    _goal = 0.5

    def _merit(self, search: Search, z: Tensor) -> Float[Tensor, " row"]:
        """What the search wants to be at least ``_goal``: m."""
        return search.probability(z)

    def _aim(self, rated: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """Whether each point, by its stability and its m, met what the search was after."""
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
        count, left = torch.zeros(len(z), dtype=torch.long), torch.arange(len(z))
        for attempt in range(self.binary_search_steps):
            if len(left) == 0:
                break
            before = distance[left]
            best[left], distance[left], hit = self._attempt(search.on(left), z[left], best[left], before, weight[left])
            count[left] += self.steps
            found = distance[left] < torch.inf
            gained = (before - distance[left]) > 1e-3 * distance[left]
            # a search that slid back to the row needs more weight on the class; one that holds it, and gains nothing, less
            weight[left] *= torch.where(hit, torch.where(gained, 1.0, 0.7), 2.0)
            z[left] = torch.where(found[:, None], best[left], z[left])
            # each row leaves by itself, so that what it gets does not depend on the others
            done = (hit & torch.isfinite(before) & ~gained) | (~found if attempt >= 2 else torch.zeros_like(found))
            left = left[~done]
        return _pulled_back(search, best, torch.isfinite(distance)), count

    def _attempt(
        self, search: Search, z: Tensor, best: Tensor, distance: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best points and distances after ``steps`` with one weight a row, and whether the class was held in the end."""
        region, hit = search.region, torch.zeros(len(z), dtype=torch.bool)
        best, distance = best.clone(), distance.clone()
        for step in range(self.steps):
            odds, slope = log_odds_slope(search, z)
            slope = slope / region.costs  # moves are in units of cost
            # the L1 step takes as much from every column, so the steepest has to move at all
            length = slope.abs().amax(dim=1, keepdim=True) if self.norm == 1 else slope.norm(dim=1, keepdim=True)
            slope = slope / length.clamp_min(1e-12)
            over = odds >= _EDGE
            if step >= self.steps // 2:
                hit |= over
            cost = region.cost(z, self.norm)
            improved = over & (cost < distance)
            best[improved], distance[improved] = z[improved], cost[improved]
            rate = self.lr * (1 - step / self.steps) + 1e-4
            moved = (z - region.start) * region.costs + torch.where(over, 0.0, rate * weight)[:, None] * slope
            z = region.project(region.start + _shrink(moved, rate, self.norm) / region.costs)
        return best, distance, hit


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


def base_generator(base: str | Generator, norm: int) -> Generator:
    """The generator that ``base`` names ("closest" or "nearest"), or is."""
    if isinstance(base, Generator):
        return base
    if base not in ("closest", "nearest"):
        raise InputError(f'base must be "closest", "nearest" or a generator, got {base!r}')
    return (ClosestCounterfactual if base == "closest" else NearestNeighbour)(norm=norm)


def neighbours(search: Search, norm: int) -> list[Int[Tensor, " candidate"]]:
    """For each row the training rows of the target class within its region, nearest first."""
    out = []
    for start, low, high in zip(search.region.start, search.region.low, search.region.high, strict=True):
        inside = ((search.accepted >= low - 1e-9) & (search.accepted <= high + 1e-9)).all(dim=1).nonzero().ravel()
        away = (search.accepted[inside] - start) * search.region.costs
        out.append(inside[away.norm(p=norm, dim=1).argsort(stable=True)])
    return out


def log_odds_slope(
    search: Search, z: Tensor, *, unit: bool = True
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row feature"]]:
    """Log-odds at scaled points and their gradient there; unit: of length 1 (0 where the model is flat)."""
    score = search.score
    odds = torch.empty(len(z), dtype=torch.float64)
    slope = torch.empty_like(z)
    with torch.enable_grad(), score.quiet():
        for part in score.parts(z, 1, gradients=True):
            rows = z[part].detach().requires_grad_(True)
            here = score.log_odds(search.inputs(rows))
            (slope[part],) = torch.autograd.grad(here.sum(), rows)
            odds[part] = here.detach().double().cpu()
    return odds, slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12) if unit else slope


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


def _swapped(method: Generator, search: Search, z: Tensor) -> Float[Tensor, "row feature"]:
    """Points with groups set, one after another, to the member that raises the log-odds most for its cost, until the method's
    aim is met.
    """
    z, left, region = z.clone(), torch.arange(len(z)), search.region
    for _ in range(2 * len(region.groups)):
        left = left[method._merit(search.on(left), z[left]) < method._goal + _EDGE]
        if len(left) == 0:
            break
        part, here = search.on(left), z[left]
        before, best = part.log_odds(here), here.clone()
        most = torch.zeros_like(before)
        for group in region.groups:
            columns = list(group)
            for member in group:
                tried = here.clone()
                tried[:, columns] = 0.0
                tried[:, member] = 1.0
                allowed = ((tried >= part.region.low) & (tried <= part.region.high))[:, columns].all(dim=1)
                gain = (part.log_odds(tried) - before) / region.costs[member]
                gain = torch.where(allowed, gain, -torch.inf)
                best = torch.where((gain > most)[:, None], tried, best)
                most = torch.maximum(most, gain)
        z[left] = best
        left = left[(best != here).any(dim=1)]
    return z


def _shrink(move: Tensor, by: float, norm: int) -> Tensor:
    """Proximal step of the distance: each coordinate (L1) or the length (L2) loses ``by``."""
    if norm == 1:
        return move.sign() * (move.abs() - by).clamp_min(0)
    length = move.norm(dim=1, keepdim=True)
    return move * (1 - by / length.clamp_min(1e-12)).clamp_min(0)
