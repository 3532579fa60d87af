"""Batched fits of one surrogate for each row: weighted least squares in closed form, logistic surrogates by L-BFGS.

    g = w z + b,            min sum_j pi_j (f_j - g_j)^2:      w = (Z' P Z)^+ Z' P f,   P = diag(pi), summing to 1
    g = sigma(w z + b),     min sum_j pi_j (f_j - g_j)^2    or    min sum_j pi_j ||grad f_j - g_j (1 - g_j) w||^2

All in double precision, since normal equations square the condition number.

Source: Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254 (equation 1 and Table 1); the errors are the sandwich of White, 1980.
"""

__all__ = ["LeastSquares", "fit_logistic", "jackknife", "least_squares", "least_squares_with_ends", "logistic_loss"]

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from theodolite.core.memory import chunks

_SMALLEST_PIVOT = 1e-10
FALLBACK_RIDGE = 1e-6
_FOLDS = 10


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """Weights, intercept, the sampling variance of the weights, and which rows needed a ridge to have a solution."""

    weights: Float[Tensor, "row feature"]
    intercept: Float[Tensor, " row"]
    variance: Float[Tensor, "row feature"]
    singular: Bool[Tensor, " row"]


def least_squares(
    moves: Tensor,
    values: Tensor,
    weights: Tensor,
    *,
    intercept: bool,
    ridge: float,
    cluster: int,
    listed: int,
    memory: int,
) -> LeastSquares:
    """Fit g = w z (+ b) for each row.

    moves: (m, d); values: (n, m); weights: (n, m), or (1, m) where all rows share them, each summing to 1. ridge is added
    to the diagonal of the features. For the variance: the first ``listed`` moves are not left to chance, and ``cluster`` of
    the others in a row depend on each other.
    """
    z = moves.double()
    if intercept:
        z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    penalised = torch.arange(z.shape[1], device=z.device) < moves.shape[1]
    found, covariance, singular = _solve(z, values, weights, penalised.double(), ridge, cluster, listed, memory)
    d = moves.shape[1]
    variance = torch.diagonal(covariance, dim1=1, dim2=2)[:, :d]
    return LeastSquares(
        found[:, :d], found[:, d] if intercept else found.new_zeros(len(found)), variance.clamp_min(0), singular
    )


def least_squares_with_ends(
    moves: Tensor,
    values: Tensor,
    weights: Tensor,
    at_zero: Tensor,
    at_one: Tensor,
    *,
    ridge: float,
    cluster: int,
    listed: int,
    memory: int,
) -> LeastSquares:
    """Fit g = w z + b with g(0) and g(1) given (n,): the last weight is what the others leave of their difference."""
    total, last = at_one - at_zero, moves[:, -1:].double()
    z = moves[:, :-1].double() - last
    if z.shape[1] == 0:
        return LeastSquares(
            total[:, None], at_zero, torch.zeros_like(total)[:, None], torch.zeros_like(total, dtype=torch.bool)
        )
    left = values - at_zero[:, None] - total[:, None] * last[:, 0]
    penalised = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
    found, covariance, singular = _solve(z, left, weights, penalised, ridge, cluster, listed, memory)
    variance = torch.cat([torch.diagonal(covariance, dim1=1, dim2=2), covariance.sum(dim=(1, 2))[:, None]], dim=1)
    rest = total - found.sum(dim=1)
    return LeastSquares(torch.cat([found, rest[:, None]], dim=1), at_zero, variance.clamp_min(0), singular)


def _solve(
    z: Tensor, values: Tensor, weights: Tensor, penalised: Tensor, ridge: float, cluster: int, listed: int, memory: int
) -> tuple[Float[Tensor, "row p"], Float[Tensor, "row p p"], Bool[Tensor, " row"]]:
    n, p = len(values), z.shape[1]
    normal = z.new_zeros(len(weights), p, p)
    for part in chunks(len(z), 16.0 * len(weights) * p, memory):
        normal += (weights[:, part, None] * z[part]).mT @ z[part]
    normal += ridge * torch.diag(penalised)
    scale = torch.diagonal(normal, dim1=1, dim2=2).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    unit = normal / (scale[:, :, None] * scale[:, None, :])
    factor, failed = torch.linalg.cholesky_ex(unit)
    # a pivot of the unit-diagonal matrix is the share of a column that the columns before it leave unexplained
    singular = (failed > 0) | (~(torch.diagonal(factor, dim1=1, dim2=2).square() > _SMALLEST_PIVOT)).any(dim=1)
    if bool(singular.any()):
        unit = unit + singular[:, None, None] * FALLBACK_RIDGE * torch.diag(penalised)
        factor = torch.linalg.cholesky(unit)
    inverse = torch.cholesky_inverse(factor) / (scale[:, :, None] * scale[:, None, :])
    found = (inverse @ ((weights * values) @ z)[:, :, None])[:, :, 0]
    scores = weights * (values - found @ z.T)
    middle, clusters = z.new_zeros(n, p, p), (len(z) - listed) // cluster
    # what the listed moves leave to the drawn ones is no noise
    mean = (scores[:, listed:] @ z[listed:] / max(1, clusters))[:, None]
    for part in chunks(clusters, 16.0 * n * p * cluster, memory):
        wide = slice(listed + part.start * cluster, listed + part.stop * cluster)
        summed = (scores[:, wide, None] * z[wide]).unflatten(1, (-1, cluster)).sum(dim=2) - mean
        middle += summed.mT @ summed
    # the residuals are smaller than the noise by the degrees of freedom that the fit took
    independent = clusters + listed
    covariance = inverse @ middle @ inverse * (independent / max(1, independent - p))
    return found, covariance, singular.expand(n)


def logistic_loss(moves: Tensor, target: Tensor, w: Tensor, b: Tensor) -> Float[Tensor, "row move"]:
    """Squared distance of g = sigma(w z + b) from values (n, m), or of its gradient in z from gradients (n, m, d)."""
    g = torch.sigmoid(w @ moves.double().T + b[:, None])
    if target.ndim == 2:
        return (target - g).square()
    steep = g * (1 - g)
    along = torch.einsum("nmd,nd->nm", target, w)
    return target.square().sum(dim=2) - 2 * steep * along + steep.square() * w.square().sum(dim=1, keepdim=True)


def fit_logistic(
    moves: Tensor,
    weights: Tensor,
    target: Tensor,
    start: tuple[Tensor, Tensor],
    *,
    intercept: bool,
    ridge: float,
    steps: int = 400,
) -> tuple[Float[Tensor, "row feature"], Float[Tensor, " row"]]:
    """Weights and intercept of g = sigma(w z + b), matched to values (n, m) or to gradients (n, m, d)."""
    # steps in units of each feature's own range, and losses relative to the target's size: all rows stop alike
    unit = moves.double().square().mean(dim=0).sqrt().clamp_min(1e-12)
    squares = target.square() if target.ndim == 2 else target.square().sum(dim=2)
    size = (weights * squares).sum(dim=1).clamp_min(1e-30)
    w, b = (start[0] * unit).clone().requires_grad_(True), start[1].clone().requires_grad_(intercept)
    optimizer = torch.optim.LBFGS(
        [w, b] if intercept else [w], max_iter=steps, history_size=30, tolerance_grad=1e-9, tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        row = (weights * logistic_loss(moves, target, w / unit, b)).sum(dim=1)
        total = ((row + ridge * (w / unit).square().sum(dim=1)) / size).sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return (w / unit).detach(), b.detach()


def jackknife(
    fit: Callable[[Tensor], tuple[Tensor, Tensor]], weights: Float[Tensor, "any move"]
) -> Float[Tensor, "row feature"]:
    """Sampling variance of fitted weights: fit again ten times, each without another tenth of the moves."""
    folds = torch.arange(weights.shape[1], device=weights.device) * _FOLDS // weights.shape[1]
    again = []
    for fold in range(_FOLDS):
        kept = weights * (folds != fold)
        again.append(fit(kept / kept.sum(dim=1, keepdim=True).clamp_min(1e-300))[0])
    return torch.stack(again).var(dim=0, correction=0) * (_FOLDS - 1)
