"""k-means as a layer: its weights are the cluster centres, its largest output is the nearest one.

Source: Peng et al., 2022, arXiv:1808.07292.
"""

__all__ = ["KMeansLayer"]

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks

_BLOCK = 1 << 19  # bytes of a block's scores: what stays in a core's own cache is compared soonest


class KMeansLayer(nn.Module):
    """k-means as a layer. Weight row j is W_j = 2 alpha c_j, the bias b_j = -alpha ||c_j||^2, so that

        W_j . x + b_j = -alpha ||x - c_j||^2 + alpha ||x||^2                                            (eq. 4 to 6)

    and the largest output is the nearest centre c_j for every alpha > 0. The softmax of the outputs is the assignment, and
    becomes one-hot as alpha grows. The bias follows from the weight and is no parameter of its own.

    normalized: centres are kept at length 1 (call `normalize_` after every optimiser step): then b_j is -alpha for all j,
    and 2 alpha - W_j . z = alpha ||z - c_j||^2 for every z of length 1. Centres start at random: in random directions where
    normalized, otherwise standard normal; set ``centers`` to start elsewhere.

    InputError for alpha <= 0, fewer than 2 clusters or no feature.

    Source: Peng et al., 2022, arXiv:1808.07292.

    >>> layer = KMeansLayer(2, 2, alpha=0.5)
    >>> layer.centers = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    >>> layer.assign(torch.tensor([[1.0, 0.0], [3.0, 1.0]])), layer.loss(torch.tensor([[1.0, 0.0], [3.0, 1.0]])).item()
    (tensor([0, 1]), 1.5)
    """

    def __init__(
        self, n_features: int, n_clusters: int, *, alpha: float = 1.0, normalized: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        if n_features < 1 or n_clusters < 2:
            raise InputError(f"need at least 1 feature and 2 clusters, got {n_features} and {n_clusters}")
        if not 0 < alpha < math.inf:
            raise InputError(f"alpha must be a finite number above 0, got {alpha}")
        self.n_features, self.n_clusters = n_features, n_clusters
        self.alpha, self.normalized = float(alpha), normalized
        drawn = torch.randn(n_clusters, n_features, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(2 * self.alpha * drawn)
        if normalized:
            self.normalize_()

    def forward(self, x: Float[Tensor, "row feature"]) -> Float[Tensor, "row cluster"]:
        """-alpha ||x - c_j||^2 + alpha ||x||^2 for each row of x (n, d) and each centre, (n, k)."""
        rows = self._rows(x)
        return rows @ self.weight.T - self.weight.square().sum(dim=1) / (4 * self.alpha)

    @property
    def centers(self) -> Float[Tensor, "cluster feature"]:
        """The centres (k, d), W / (2 alpha); setting them scales each to length 1 where the layer is normalized."""
        return self.weight / (2 * self.alpha)

    @centers.setter
    def centers(self, centers: Any) -> None:
        given = torch.as_tensor(centers).detach().to(self.weight)
        if given.shape != self.weight.shape:
            raise InputError(f"centers must have shape {tuple(self.weight.shape)}, got {tuple(given.shape)}")
        if not bool(torch.isfinite(given).all()):
            raise InputError("centers must be finite numbers")
        with torch.no_grad():
            self.weight.copy_(2 * self.alpha * given)
        if self.normalized:
            self.normalize_()

    @torch.no_grad()
    def assign(self, x: Float[Tensor, "row feature"]) -> Int[Tensor, " row"]:
        """The nearest centre of each row of x (n, d), block by block; one of them where several are equally near.

        Raises DataError for rows that are not finite.
        """
        rows, centers = self._rows(x), self.centers
        # distances do not change when everything moves, and about the centres' mean no digits are lost to a common offset
        middle = centers.mean(dim=0)
        centers = centers - middle
        half = centers.square().sum(dim=1) / 2
        out = torch.empty(len(rows), dtype=torch.long, device=rows.device)
        for part in chunks(len(rows), rows.element_size() * self.n_clusters, _BLOCK):
            nearness, out[part] = torch.addmm(half, rows[part] - middle, centers.T, beta=-1).max(dim=1)
            if not bool(torch.isfinite(nearness).all()):  # so it is where a row is not
                row = part.start + int((~torch.isfinite(nearness)).nonzero()[0])
                raise DataError(f"row {row} of x holds NaN or infinite values, so no centre is nearest to it")
        return out

    def loss(self, x: Float[Tensor, "row feature"]) -> Float[Tensor, ""]:
        """Mean over the rows of x (n, d) of the squared distance to the nearest centre; which one that is has no gradient.

        Where normalized, it is mean(||x||^2 + 1 - W_c . x / alpha), the same number for centres of length 1: the gradient
        of a centre is then along the mean of its rows, as in the paper, without a part that only changes its length.
        """
        rows = self._rows(x)
        return self.distances(rows, self.assign(rows)).mean()

    def distances(self, x: Float[Tensor, "row feature"], labels: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Squared distance of each row of x (n, d) to the centre that ``labels`` (n,) names, with gradients."""
        rows = self._rows(x)
        chosen = self.weight[labels]
        if self.normalized:
            return rows.square().sum(dim=1) + 1 - (chosen * rows).sum(dim=1) / self.alpha
        return (rows - chosen / (2 * self.alpha)).square().sum(dim=1)

    @torch.no_grad()
    def normalize_(self) -> "KMeansLayer":
        """Scale every centre to length 1, every weight row to 2 alpha; DataError naming a centre that is zero."""
        length = self.weight.norm(dim=1, keepdim=True)
        if not bool((length > 0).all()):
            raise DataError(f"centre {int((length[:, 0] > 0).long().argmin())} is zero and has no direction")
        self.weight.mul_(2 * self.alpha / length)
        return self

    def _rows(self, x: Tensor) -> Tensor:
        """Rows in the precision and on the device of the weight."""
        if x.ndim != 2 or x.shape[1] != self.n_features or len(x) == 0:
            raise InputError(f"x must be (rows, {self.n_features}) with at least one row, got {tuple(x.shape)}")
        return x.to(self.weight)

    def extra_repr(self) -> str:
        """Sizes and options, for printing."""
        return f"{self.n_features}, {self.n_clusters}, alpha={self.alpha}, normalized={self.normalized}"
