"""What T-Rex is compared with: a stable neighbour, penalised descents, and searches in the code of an autoencoder."""

__all__ = ["Cchvae", "Revise", "Roar", "StableNeighbourSearch", "Wachter"]

from dataclasses import dataclass

import torch
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.explanations.counterfactuals import Generator, Search, base_generator, log_odds_slope
from theodolite.explanations.robust_counterfactuals.latent import Coordinates, LatentCoordinates


@dataclass(kw_only=True)
class StableNeighbourSearch(Generator):
    """SNS: the point near a closest counterfactual with the largest mean probability on the line from 0 to it.

    radius: around the base counterfactual; nodes: on the line; the start carries noise of 1e-3.

    Source: Black, Wang, Fredrikson, 2022, arXiv:2109.08429 (Consistent Counterfactuals for Deep Models).
    """

    base: str | Generator = "closest"
    radius: float = 0.2
    steps: int = 100
    step_size: float = 0.01
    nodes: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.radius > 0 and self.steps >= 1 and self.step_size > 0 and self.nodes >= 1):
            raise InputError("need radius > 0, steps >= 1, step_size > 0 and nodes >= 1")
        base_generator(self.base, self.norm)

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        base = search.region.project(base_generator(self.base, self.norm)._search(search, begin)[0])
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(self.seed), dtype=base.dtype)
        z = search.region.project(base + 1e-3 * noise)
        kept = torch.where((search.probability(z) >= 0.5)[:, None], z, base)
        along = torch.arange(1, self.nodes + 1, dtype=base.dtype) / self.nodes
        score = search.score
        for _ in range(self.steps):
            slope = torch.empty_like(z)
            with torch.enable_grad(), score.quiet():
                for part in score.parts(z, self.nodes, gradients=True):
                    rows = z[part].detach().requires_grad_(True)
                    line = (rows[:, None] * along[:, None]).flatten(0, 1)
                    (slope[part],) = torch.autograd.grad(score.apply(search.inputs(line)).sum() / self.nodes, rows)
            moved = z + self.step_size * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12) - base
            moved = moved * (self.radius / moved.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
            z = search.region.project(base + moved)
            good = search.probability(z) >= 0.5
            kept[good] = z[good]
        return kept, torch.full((len(z),), self.steps)


@dataclass(kw_only=True)
class Wachter(Coordinates, Generator):
    """Descends -log m + lam * distance with Adam for ``steps``, and returns the nearest accepted point on its way.

    Source: Wachter, Mittelstadt, Russell, 2017, arXiv:1711.00399.
    """

    steps: int = 1000
    lr: float = 0.01
    lam: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.steps >= 1 and self.lr > 0 and self.lam >= 0):
            raise InputError("need steps >= 1, lr > 0 and lam >= 0")

    def _odds(self, search: Search, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds (n,) that the descent is after, and their gradient by the scaled points."""
        return log_odds_slope(search, z, unit=False)

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        region = search.region
        at = self._enter(search, region.project(region.start if begin is None else begin)).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([at], lr=self.lr)
        best, distance = region.start.clone(), torch.full((len(at),), torch.inf, dtype=torch.float64)
        count = torch.full((len(at),), self.steps)
        for step in range(self.steps):
            z = self._points(search, at.detach())
            odds, slope = self._odds(search, z)
            cost, away = region.cost(z, self.norm), z - region.start
            good = (odds >= 0) & (cost < distance)
            count[good & torch.isinf(distance)] = step + 1
            best[good], distance[good] = z[good], cost[good]
            downhill = (
                away.sign() * region.costs
                if self.norm == 1
                else away * region.costs**2 / cost.clamp_min(1e-12)[:, None]
            )
            slope = -torch.sigmoid(-odds)[:, None] * slope + self.lam * downhill
            at.grad = self._pulled(search, at.detach(), slope)
            optimizer.step()
            with torch.no_grad():
                at.copy_(self._within(search, at))
        return best, count


@dataclass(kw_only=True)
class Roar(Wachter):
    """`Wachter` against the worst model whose local linear weights moved by at most ``delta_max`` each.

    The model is linear near the point, f(z') = f(z) + g . (z' - z); weights and intercept move within a box, so that the
    worst log-odds are f(z) - delta_max (|z|_1 + 1). The paper fits the local line by sampling; the gradient is used here.

    Source: Upadhyay, Joshi, Lakkaraju, 2021, arXiv:2102.13620 (Towards Robust and Reliable Algorithmic Recourse).
    """

    delta_max: float = 1e-3

    def _merit(self, search: Search, z: Tensor) -> Tensor:
        return torch.sigmoid(self._odds(search, z)[0])

    def _odds(self, search: Search, z: Tensor) -> tuple[Tensor, Tensor]:
        odds, slope = super()._odds(search, z)
        return odds - self.delta_max * (z.abs().sum(dim=1) + 1), slope - self.delta_max * z.sign()


@dataclass(kw_only=True)
class Revise(LatentCoordinates, Wachter):
    """REVISE: `Wachter` in the code of an autoencoder, from the row's own code, with the distance between the rows.

    Source: Joshi, Koyejo, Vijitbenjaronk, Kim, Ghosh, 2019, arXiv:1907.09615 (Towards Realistic Individual Recourse).
    """

    lr: float = 0.1
    lam: float = 0.5


@dataclass(kw_only=True)
class Cchvae(LatentCoordinates, Generator):
    """C-CHVAE: growing spheres around the row's own code until a decoded point is accepted; the nearest of these is taken.

    samples: codes drawn in each shell of width ``step``, the same moves for every row. max_steps: shells before giving up. The
    model is only asked for answers, so any model with probabilities will do.

    Source: Pawelczyk, Broelemann, Kasneci, 2020, arXiv:1910.09398 (Learning Model-Agnostic Counterfactual Explanations for
    Tabular Data).
    """

    samples: int = 1000
    step: float = 0.05
    max_steps: int = 200

    needs_gradients = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.samples >= 1 and self.step > 0 and self.max_steps >= 1):
            raise InputError("need samples >= 1, step > 0 and max_steps >= 1")

    def _whole(self, search: Search) -> tuple[Tensor, Tensor]:
        return self._search(search, None)

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        best, count = search.region.start.clone(), torch.zeros(len(search.region.start), dtype=torch.long)
        centre, left = self._enter(search, best), torch.arange(len(best))
        generator = torch.Generator().manual_seed(self.seed)
        for shell in range(self.max_steps):
            if len(left) == 0:
                break
            moves = torch.randn(self.samples, centre.shape[1], generator=generator, dtype=best.dtype)
            far = self.step * (shell + torch.rand(self.samples, 1, generator=generator, dtype=best.dtype))
            moves = moves * far / moves.norm(dim=1, keepdim=True).clamp_min(1e-12)
            count[left] += 1
            hit = torch.zeros(len(left), dtype=torch.bool)
            for part in search.score.parts(best[left], self.samples, gradients=False):
                rows = left[part]
                copies = search.on(rows.repeat_interleave(self.samples))
                points = self._points(copies, (centre[rows][:, None] + moves).flatten(0, 1))
                points, _ = copies.region.settle(points)
                cost = copies.region.cost(points, self.norm)
                cost[copies.probability(points) < 0.5] = torch.inf
                least, which = cost.view(len(rows), -1).min(dim=1)
                hit[part] = torch.isfinite(least)
                nearest = points.view(len(rows), self.samples, -1)[torch.arange(len(rows)), which]
                best[rows[hit[part]]] = nearest[hit[part]]
            left = left[~hit]
        return best, count
