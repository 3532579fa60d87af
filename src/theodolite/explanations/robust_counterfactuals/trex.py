"""Counterfactuals moved, or chosen, until the class holds all around them."""

__all__ = ["ConfidenceThreshold", "TRex", "TRexLatent", "TRexNearest"]

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.explanations.counterfactuals import (
    Generator,
    Search,
    base_generator,
    log_odds_slope,
    neighbours,
)
from theodolite.explanations.robust_counterfactuals.latent import Coordinates, LatentCoordinates
from theodolite.explanations.stability import draws, stability

_MARGIN = 2.0  # standard errors of the search's draws above tau at which it stops


@dataclass(kw_only=True)
class Raised(Coordinates, Generator):
    """Sets out from a base counterfactual and climbs an objective until it passes ``tau``.

    Steps of ``step_size`` along the normalised gradient, kept within ``radius`` of the base counterfactual (not of the row) and
    within what may change; the last point that the model accepts is returned. base: "closest", "nearest" or a generator.
    """

    base: str | Generator = "closest"
    tau: float = 0.75
    step_size: float = 0.01
    radius: float = 1.0
    max_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < 1:
            raise InputError(f"tau must be between 0 and 1, got {self.tau}")
        if not (self.step_size > 0 and self.radius > 0 and self.max_steps >= 0):
            raise InputError("need step_size > 0, radius > 0 and max_steps >= 0")
        base_generator(self.base, self.norm)
        self._goal = self.tau

    def _merit(self, search: Search, z: Tensor) -> Tensor:
        return self._objective(search, z)[0]

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        base = search.region.project(base_generator(self.base, self.norm)._search(search, begin)[0])
        count = torch.zeros(len(base), dtype=torch.long)
        # only what the present model accepts is a place to set out from
        left = (search.probability(base) >= 0.5).nonzero().ravel()
        centre, kept = self._enter(search, base), base.clone()
        at = centre.clone()
        for step in range(self.max_steps + 1):
            if len(left) == 0:
                break
            part = search.on(left)
            points = self._points(part, at[left])
            value, slope, accepted = self._objective(part, points)
            kept[left[accepted]] = points[accepted]
            going = value < self.tau
            left, slope, part = left[going], slope[going], part.on(going)
            if step == self.max_steps or len(left) == 0:
                break
            slope = self._uphill(part, at[left], slope)
            moved = at[left] + self.step_size * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
            away = moved - centre[left]
            moved = centre[left] + away * (self.radius / away.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
            at[left] = self._within(part, moved)
            count[left] += 1
        return kept, count

    @abstractmethod
    def _objective(self, search: Search, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value (n,), gradient (n, d), and whether the model accepts (n,)."""


@dataclass(kw_only=True)
class TRex(Raised):
    """T-Rex:I: climbs the relaxed stability until it passes ``tau``, so that retrained models still give the class.

    search_k: draws during the search, the same in every step; it stops two of their standard errors above tau. The stability
    that is reported comes from k other draws, and ``reached`` says whether that passes tau. The stability carries no proof.

    >>> net = torch.nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[8.0, 0.0]])), net.bias.fill_(-4.0)
    >>> found = TRex(tau=0.75).fit(net, np.array([[0.0, 0.0], [1.0, 1.0]])).generate([[0.2, 0.5]])
    >>> bool(found.reached[0]), bool(0.4 < found.cost[0] < 0.6)
    (True, True)
    """

    search_k: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search_k < 2:
            raise InputError(f"search_k must be at least 2 draws, got {self.search_k}")

    def _aim(self, rated: np.ndarray, probability: np.ndarray) -> np.ndarray:
        return rated >= self.tau

    def _objective(self, search: Search, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, n = search.score, len(z)
        value, slope = torch.empty(n, dtype=torch.float64), torch.empty_like(z)
        accepted = torch.empty(n, dtype=torch.bool)
        noise = self.sigma * draws(self.search_k, z.shape[1], self.seed)
        moves = score.cast(noise * torch.as_tensor(search.schema.span))
        span = torch.as_tensor(search.schema.span)
        with torch.enable_grad(), score.quiet():
            for part in score.parts(z, self.search_k + 1, gradients=True):
                x = score.cast(search.inputs(z[part])).requires_grad_(True)
                m = score.apply(x)
                around = score.apply((x[:, None] + moves).flatten(0, 1)).view(len(x), -1)
                each = around - (m[:, None] - around).abs()
                mean = each.mean(dim=1)
                (g,) = torch.autograd.grad(mean.sum(), x)
                error = each.detach().double().std(dim=1) / self.search_k**0.5
                value[part] = mean.detach().double().cpu() - _MARGIN * error.cpu()
                slope[part] = g.double().cpu() * span
                accepted[part] = (m >= 0.5).detach().cpu()
        return value, slope, accepted


@dataclass(kw_only=True)
class TRexLatent(LatentCoordinates, TRex):
    """`TRex` in the code of a small autoencoder: every step lands on a row that looks like the training rows.

    It sets out from the code of the base counterfactual; step_size and radius are in units of the code, whose spread over the
    training rows is about 1. Where no decoded point is accepted the base counterfactual comes back, with ``reached`` False.
    """

    step_size: float = 0.05
    radius: float = 3.0


@dataclass(kw_only=True)
class ConfidenceThreshold(Raised):
    """The honest control of `TRex`: climbs the probability m itself until it passes ``tau``, with the same steps."""

    def _aim(self, rated: np.ndarray, probability: np.ndarray) -> np.ndarray:
        return probability >= self.tau

    def _objective(self, search: Search, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        odds, slope = log_odds_slope(search, z)  # same direction as m's, and never flat where m is near 0 or 1
        return torch.sigmoid(odds), slope, odds >= 0


@dataclass(kw_only=True)
class TRexNearest(Generator):
    """T-Rex:NN: the nearest training row of the target class whose stability passes ``tau``; any model with probabilities.

    A training row is plausible by construction. Where no row passes, the nearest one comes back with ``reached`` False.
    """

    tau: float = 0.75

    needs_gradients = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < 1:
            raise InputError(f"tau must be between 0 and 1, got {self.tau}")

    def _aim(self, rated: np.ndarray, probability: np.ndarray) -> np.ndarray:
        return rated >= self.tau

    def _whole(self, search: Search) -> tuple[Tensor, Tensor]:
        return self._search(search, None)

    def _search(self, search: Search, begin: Tensor | None) -> tuple[Tensor, Tensor]:
        order = neighbours(search, self.norm)
        # the stability is m less twice the mean fall of m among the draws, so where m is too small it need not be drawn
        known = search.probability(search.accepted)
        known[known >= self.tau] = torch.nan
        z, looked = search.region.start.clone(), torch.zeros(len(order), dtype=torch.long)
        chosen = torch.full((len(order),), -1)
        block, at = 8, 0
        while True:  # rate the candidates that any row still needs, some more of each row at a time
            left = [i for i in range(len(order)) if chosen[i] < 0 and at < len(order[i])]
            if not left:
                break
            wanted = torch.cat([order[i][at : at + block] for i in left]).unique()
            wanted = wanted[known[wanted].isnan()]
            if len(wanted):
                known[wanted] = self._rated(search, search.accepted[wanted])
            for i in left:
                passing = (known[order[i][at : at + block]] >= self.tau).nonzero().ravel()
                looked[i] = at + (int(passing[0]) + 1 if len(passing) else len(order[i][at : at + block]))
                if len(passing):
                    chosen[i] = order[i][at + int(passing[0])]
            at, block = at + block, block * 2
        for i, candidates in enumerate(order):
            if len(candidates):
                z[i] = search.accepted[chosen[i] if chosen[i] >= 0 else candidates[0]]
        return z, looked

    def _rated(self, search: Search, z: Tensor) -> Tensor:
        found: Any = stability(
            search.score.view.model, search.inputs(z).numpy(), sigma=self.sigma, k=self.k, target=search.score.target,
            units=search.schema.span, seed=self.seed, memory=self.memory,
        )  # fmt: skip
        return torch.as_tensor(found)
