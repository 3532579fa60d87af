"""What T-Rex is compared with: a stable neighbour, a penalised descent, and one against moved weights."""

__all__ = ["Roar", "StableNeighbourSearch", "Wachter"]

from dataclasses import dataclass

import torch
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.explanations.counterfactuals import ClosestCounterfactual, Generator, NearestNeighbour, Search


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

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        first = self.base if isinstance(self.base, Generator) else None
        made = first or (NearestNeighbour if self.base == "nearest" else ClosestCounterfactual)(norm=self.norm)
        base = search.region.project(made._search(search, begin)[0])
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
class Wachter(Generator):
    """Descends -log m + lam * distance with Adam, and returns the nearest accepted point on its way.

    Source: Wachter, Mittelstadt, Russell, 2017, arXiv:1711.00399.
    """

    steps: int = 1000
    lr: float = 0.01
    lam: float = 0.01

    def _odds(self, search: Search, z: Tensor) -> Tensor:
        return search.score.log_odds(search.inputs(z))

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        region = search.region
        z = region.project(region.start if begin is None else begin).requires_grad_(True)
        optimizer = torch.optim.Adam([z], lr=self.lr)
        best, distance = z.detach().clone(), torch.full((len(z),), torch.inf, dtype=torch.float64)
        count = torch.zeros(len(z), dtype=torch.long)
        with torch.enable_grad(), search.score.quiet():
            for _ in range(self.steps):
                odds = self._odds(search, z)
                cost = (z - region.start).abs().sum(dim=1) if self.norm == 1 else (z - region.start).norm(dim=1)
                good = ((odds >= 0) & (cost < distance)).detach()
                best[good], distance[good] = z.detach()[good], cost.detach()[good]
                count += torch.isinf(distance)
                optimizer.zero_grad()
                loss = torch.nn.functional.softplus(-odds).sum() + self.lam * cost.sum()
                (z.grad,) = torch.autograd.grad(loss, z)
                optimizer.step()
                with torch.no_grad():
                    z.copy_(region.project(z))
                if bool(torch.isfinite(distance).all()):
                    break
        return best, count


@dataclass(kw_only=True)
class Roar(Wachter):
    """`Wachter` against the worst model whose local linear weights moved by at most ``delta_max`` each.

    The model is linear near the point, f(z') = f(z) + g . (z' - z); weights and intercept move within a box, so that the
    worst log-odds are f(z) - delta_max (|z|_1 + 1). The paper fits the local line by sampling; the gradient is used here.

    Source: Upadhyay, Joshi, Lakkaraju, 2021, arXiv:2102.13620 (Towards Robust and Reliable Algorithmic Recourse).
    """

    delta_max: float = 1e-3

    def _odds(self, search: Search, z: Tensor) -> Tensor:
        return super()._odds(search, z) - self.delta_max * (z.abs().sum(dim=1) + 1)
