"""One engine for all eight methods: a neighbourhood, a loss and a surrogate class give an explanation.

    g* = argmin_{g in G} E_{z ~ Z_x} l(f, g, x, z)                                                          (equation 1)

    squared loss      pi(z) (F(z) - g(z))^2              solved as weighted least squares
    gradient loss     ||grad_z F(z) - grad_z g(z)||^2    solved by w = E_Z[grad_z F]

F(z) is the model at x moved by z. The explanation is w.

Source: Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254.
"""

__all__ = ["LocalApproximation", "LocalExplanation", "SingularFitWarning"]

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.explanations.local_approximation.local import LocalFunction
from theodolite.explanations.local_approximation.neighbourhood import Draws, Neighbourhood, whole_number
from theodolite.explanations.local_approximation.solve import (
    FALLBACK_RIDGE,
    LeastSquares,
    fit_logistic,
    jackknife,
    least_squares,
    least_squares_with_ends,
    logistic_loss,
)


class SingularFitWarning(UserWarning):
    """Some rows have moves that do not determine their weights, so a small ridge chose among them."""


@dataclass(frozen=True, eq=False)
class LocalExplanation:
    """Weights (n, d) of one surrogate for each row, in the coordinates of the neighbourhood's moves.

    intercept (n,): of g; a gradient loss leaves a linear g's open, and it is set so that g(x) = f(x). loss (n,): mean of
    what was minimised, on the moves that were fitted (it flatters: see `faithfulness`). r2 (n,): share of the best
    constant's loss that the weights remove. standard_error (n, d): of the weights, from the draws; 0 where every move of
    the neighbourhood was used, or only one. target (n,): the class that was explained. n_evaluations: inputs that went
    through f. method: what was asked.
    """

    weights: Float[Tensor, "row feature"]
    intercept: Float[Tensor, " row"]
    loss: Float[Tensor, " row"]
    r2: Float[Tensor, " row"]
    standard_error: Float[Tensor, "row feature"]
    target: Int[Tensor, " row"]
    n_evaluations: int
    seconds: float
    method: "LocalApproximation"


@dataclass(frozen=True, eq=False)
class LocalApproximation:
    """An explanation method: where the surrogate must agree (``neighbourhood``), in what (``loss``), and what it is.

    loss: "squared" or "gradient". surrogate: "linear" g = w z + b, "logistic" g = sigma(w z + b). intercept: whether a
    squared loss fits b, or leaves it 0. n_samples: moves drawn where the neighbourhood cannot be listed. ridge: weight of
    the squared norm of w, beside a loss that is a weighted mean. memory: bytes for the batches, default 1 GiB.

    Every row sees the same moves, so its explanation does not depend on which rows it is explained with, and the same seed
    gives the same explanation whatever the memory.

    >>> plane = lambda x: x @ torch.tensor([1.0, -2.0])
    >>> method = LocalApproximation(Neighbourhood.one_hot(), intercept=False)
    >>> method.explain(plane, torch.tensor([[3.0, 1.0]])).weights
    tensor([[ 3., -2.]])
    """

    neighbourhood: Neighbourhood
    loss: str = "squared"
    surrogate: str = "linear"
    intercept: bool = True
    n_samples: int = 1000
    ridge: float = 0.0
    seed: int = 0
    memory: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.neighbourhood, Neighbourhood):
            raise InputError(
                f"neighbourhood must be made with Neighbourhood.binary, .gaussian, ..., got {self.neighbourhood!r}"
            )
        if self.loss not in ("squared", "gradient"):
            raise InputError(f"loss must be squared or gradient, got {self.loss!r}")
        if self.surrogate not in ("linear", "logistic"):
            raise InputError(f"surrogate must be linear or logistic, got {self.surrogate!r}")
        whole_number("n_samples", self.n_samples, 1)
        whole_number("seed", self.seed, 0)
        if self.memory is not None:
            whole_number("memory", self.memory, 1)
        if not 0 <= self.ridge < float("inf"):
            raise InputError(f"ridge must be at least 0 and finite, got {self.ridge}")
        linear = self.loss == "squared" and self.surrogate == "linear" and self.intercept
        if self.neighbourhood.fixes_ends and not linear:
            raise InputError(
                "the Shapley kernel is infinite at both ends, which only a squared loss and a linear surrogate with an "
                "intercept can meet; use kernel='exponential' or 'uniform'"
            )

    def explain(self, f: Any, X: Any, target: Any = None) -> LocalExplanation:
        """Weights for every row of ``X`` (n, d) or (n, C, H, W), a tensor or an array.

        f: an nn.Module (the softmax of its class scores is explained; what has one output, or gives probabilities already,
        is taken as it is), a fitted scikit-learn estimator, a callable batch -> (n,) or (n, classes), or a `ModelView` (for
        the logits of a network). target: class index, one or one for each row; None is the class predicted for each row
        (index 0 of a single output).

        Raises NotDifferentiableError, DegenerateNeighbourhoodError, and InputError for rows or options that do not fit.
        """
        started = time.perf_counter()
        local = LocalFunction(f, X, target, self.neighbourhood, memory=self.memory)
        d = local.features
        draws = self.neighbourhood.draws(d, self.n_samples, seed=self.seed)
        if self.loss == "gradient":
            local.require_gradient()
        else:
            self._check_samples(draws, d, local.memory)
        if self.loss == "gradient" and self.surrogate == "linear":
            fitted = _mean_gradient(local, draws, self.ridge)
        else:
            fitted = _fit(self, local, draws)
        single = torch.float32
        return LocalExplanation(
            fitted.weights, fitted.intercept.to(single), fitted.loss.to(single), fitted.r2.to(single),
            fitted.standard_error, local.target, local.evaluations, time.perf_counter() - started, self,
        )  # fmt: skip

    def _check_samples(self, draws: Draws, d: int, budget: int) -> None:
        p = d + 1 if self.intercept else d
        if not draws.exact and draws.size < p and self.ridge == 0:
            raise InputError(
                f"{draws.size} samples cannot determine {d} weights{' and an intercept' if self.intercept else ''}; take "
                f"n_samples >= {p}, feature groups, or a ridge above 0"
            )
        needed = 8 * (4 * p * p + draws.size * p)
        if needed > budget:
            raise InputError(
                f"a squared loss with {d} features needs {needed / 2**30:.3g} GiB for its normal matrix, the budget is "
                f"{budget / 2**30:.3g} GiB; pass feature groups (square_patches), or more memory"
            )


@dataclass(frozen=True, eq=False)
class _Fitted:
    weights: Tensor
    intercept: Tensor
    loss: Tensor
    r2: Tensor
    standard_error: Tensor

    @classmethod
    def empty(cls, n: int, d: int, draws: Draws, device: torch.device) -> "_Fitted":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64 if len(shape) == 1 else torch.float32, device=device)

        # where nothing is left to chance, one 0 stands for all standard errors
        error = zeros(1, 1).expand(n, d) if draws.exact or draws.size < 2 else zeros(n, d)
        return cls(zeros(n, d), zeros(n), zeros(n), zeros(n), error)

    def put(
        self,
        rows: slice,
        weights: Tensor,
        intercept: Tensor,
        loss: Tensor,
        null: Tensor,
        size: Tensor,
        variance: Tensor | None,
    ) -> None:
        """Store some rows; null: loss of the best constant, size: mean square of what was fitted."""
        self.weights[rows], self.intercept[rows], self.loss[rows] = weights.float(), intercept, loss
        # where f does not change but for rounding, a surrogate that does not either is perfect
        rounding = 1e-24 * size
        explained = 1 - loss / null.clamp_min(torch.finfo(null.dtype).tiny)
        self.r2[rows] = torch.where(null > rounding, explained, (loss <= rounding).double())
        if variance is not None:
            self.standard_error[rows] = variance.clamp_min(0).sqrt().float()


def move_weights(local: LocalFunction, draws: Draws, rows: slice) -> Float[Tensor, "any move"]:
    """Weight of every move, summing to 1 for each row; (1, moves) where it does not depend on the row."""
    base = draws.log_weight.to(local.x.device)
    if local.neighbourhood.weighs_inputs:
        spread = local.squared_offset(rows)
        base = base + torch.cat([local.neighbourhood.log_kernel(block.to(spread), spread) for block in draws], dim=1)
    # relative to the largest: far from the baseline all of them are too small for a float
    return torch.softmax(base if base.ndim == 2 else base[None], dim=1)


def _mean_gradient(local: LocalFunction, draws: Draws, ridge: float) -> _Fitted:
    """A linear g under the gradient loss: w is the mean gradient, and the loss is the gradient's variance."""
    n, d = len(local), local.features
    out = _Fitted.empty(n, d, draws, local.x.device)
    for rows in chunks(n, 8.0 * (6 * d + 4 * draws.size), local.share(8)):
        weights = move_weights(local, draws, rows)
        size, done = rows.stop - rows.start, 0
        # moments about the first gradient: a variance far below the squared mean keeps its digits
        origin = torch.zeros(size, d, dtype=torch.float64, device=local.x.device)
        first, second = torch.zeros_like(origin), torch.zeros_like(origin)
        for block in draws:
            chosen = slice(done, done + len(block))
            for part in chunks(size, 8.0 * 3 * len(block) * d, local.share(4)):
                found = local.gradients(slice(rows.start + part.start, rows.start + part.stop), block)
                if done == 0:
                    origin[part] = found[:, 0].double()
                pi = (weights if len(weights) == 1 else weights[part])[:, None, chosen].to(found)
                found = found - origin[part, None].to(found)
                first[part] += (pi @ found)[:, 0]
                second[part] += (pi @ found.square_())[:, 0]
            done = chosen.stop
        spread = (second - first.square()).clamp_min(0)
        mean = origin + first
        w = mean / (1 + ridge)
        variance = None
        if not draws.exact and draws.size > 1:
            concentration = weights.square().sum(dim=1, keepdim=True)
            variance = spread * concentration / (1 - concentration).clamp_min(1e-12)
        loss = (spread + (mean - w).square()).sum(dim=1)
        null = (spread + mean.square()).sum(dim=1)
        out.put(rows, w, local.intercept_for(w, local.anchor[rows], rows), loss, null, null, variance)
    return out


def _fit(method: LocalApproximation, local: LocalFunction, draws: Draws) -> _Fitted:
    """A squared loss, or a logistic g: from the model's values (or gradients) at all moves of some rows at a time."""
    n, d, m, gradient = len(local), local.features, draws.size, method.loss == "gradient"
    out = _Fitted.empty(n, d, draws, local.x.device)
    moves = draws.all().to(local.x)
    singular: list[int] = []
    for rows in chunks(n, 8.0 * (8 * m + 6 * (d + 1) ** 2 + gradient * 4 * m * d), local.share(4)):
        weights = move_weights(local, draws, rows)
        if gradient:
            target = local.gradients(rows, moves).double()
            tangent = (weights[..., None] * target).sum(dim=1)
            size = null = _mean_square(weights, target.square().sum(dim=2).sqrt())
        else:
            target = local.values(rows, moves)
            linear = _linear(method, local, draws, rows, moves, weights, target)
            singular += (linear.singular.nonzero().ravel() + rows.start).tolist()
            tangent = linear.weights
            middle = (weights * target).sum(dim=1, keepdim=True) if method.intercept else 0.0
            size, null = _mean_square(weights, target), _mean_square(weights, target - middle)
            if method.surrogate == "linear":
                residual = target - tangent @ moves.double().T - linear.intercept[:, None]
                fitted = tangent, linear.intercept, _mean_square(weights, residual), linear.variance
        if method.surrogate == "logistic":
            fitted = _logistic(method, local, rows, moves, weights, target, tangent, exact=draws.exact)
        w, b, loss, variance = fitted
        out.put(rows, w, b, loss, null, size, None if draws.exact or draws.size < 2 else variance)
    if singular:
        shown = f"{singular[:10]}{' and more' if len(singular) > 10 else ''}"
        warnings.warn(
            f"the moves do not determine the weights of {len(singular)} of {n} rows ({shown}): too few moves with weight, "
            f"or features that always move together; a ridge of {FALLBACK_RIDGE:g} chose the smallest weights. Take more "
            "samples, a larger width, feature groups, or a ridge",
            SingularFitWarning,
            stacklevel=3,
        )
    return out


def _mean_square(weights: Tensor, residual: Tensor) -> Float[Tensor, " row"]:
    return (weights * residual.square()).sum(dim=1)


def _linear(
    method: LocalApproximation,
    local: LocalFunction,
    draws: Draws,
    rows: slice,
    moves: Tensor,
    weights: Tensor,
    values: Tensor,
) -> LeastSquares:
    options = {"ridge": method.ridge, "cluster": draws.cluster, "listed": draws.listed, "memory": local.share(4)}
    if local.neighbourhood.fixes_ends:
        at_zero = local.values(rows, torch.zeros_like(moves[:1]))[:, 0]
        return least_squares_with_ends(moves, values, weights, at_zero, local.anchor[rows], **options)
    return least_squares(moves, values, weights, intercept=method.intercept, **options)


def _logistic(
    method: LocalApproximation, local: LocalFunction, rows: slice, moves: Tensor, weights: Tensor, target: Tensor,
    tangent: Tensor, *, exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Started where its value at x is the model's and its slope there the linear fit's."""
    at_x = local.anchor[rows].clamp(0.01, 0.99)
    w = tangent / (at_x * (1 - at_x))[:, None]
    b = torch.logit(at_x) - w.sum(dim=1) * local.neighbourhood.multiplicative

    options = {"intercept": method.intercept, "ridge": method.ridge}
    found = fit_logistic(moves, weights, target, (w, b if method.intercept else torch.zeros_like(b)), **options)
    variance = (
        torch.zeros_like(w)
        if exact
        else jackknife(lambda kept: fit_logistic(moves, kept, target, found, steps=40, **options), weights)
    )
    return *found, (weights * logistic_loss(moves, target, *found)).sum(dim=1), variance
