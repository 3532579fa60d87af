"""Tensors as a small core times one matrix per mode: the product, the best fit of a given size, and how sizes compare.

    T[i1, ..., iN] = sum_j G[j1, ..., jN] A1[i1, j1] ... AN[iN, jN]

Source: Si et al., 2024, arXiv:2405.14739; the fit is De Lathauwer, De Moor, Vandewalle, 2000 (SIAM J. Matrix Anal. Appl. 21).
"""

__all__ = [
    "Tucker",
    "budget_ranks",
    "check_ranks",
    "compare_structures",
    "cp_approximation",
    "leading_vectors",
    "matrix_approximation",
    "parameter_count",
    "sensible_ranks",
    "tucker_approximation",
    "tucker_product",
    "unfold",
]

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from theodolite.core.errors import DataError, InputError

_CP_SWEEPS = 100


def _mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """The tensor with axis ``mode`` multiplied by ``matrix`` (new, old)."""
    shape = tensor.shape
    left, right = math.prod(shape[:mode]), math.prod(shape[mode + 1 :])
    if right == 1:
        made = tensor.reshape(left, shape[mode]) @ matrix.T
    elif left == 1:
        made = matrix @ tensor.reshape(shape[mode], right)
    else:
        made = matrix @ tensor.reshape(left, shape[mode], right)
    return made.reshape(*shape[:mode], len(matrix), *shape[mode + 1 :])


def tucker_product(core: Float[Tensor, "..."], factors: Sequence[Float[Tensor, "_ _"]]) -> Float[Tensor, "..."]:
    """The tensor G x1 A1 x2 A2 ... of a core (J1, ..., JN) and factors (In, Jn), one matrix product a mode.

    The modes are multiplied in the order that takes the fewest operations: by growing 1 / Jn - 1 / In, so modes that
    do not grow (a kernel at full rank) come first, while the tensor is small.

    >>> tucker_product(torch.ones(2, 1), [torch.eye(2), torch.full((3, 1), 2.0)]).tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    made = core
    for mode in sorted(range(core.ndim), key=lambda n: 1 / factors[n].shape[1] - 1 / factors[n].shape[0]):
        made = _mode_product(made, factors[mode], mode)
    return made


def _project(tensor: Tensor, factors: Sequence[Tensor], skip: int | None = None) -> Tensor:
    """The tensor in the coordinates of orthonormal factors, the mode ``skip`` left as it is; what shrinks most goes first."""
    made = tensor
    for mode in sorted(range(tensor.ndim), key=lambda n: factors[n].shape[1] / factors[n].shape[0]):
        if mode != skip:
            made = _mode_product(made, factors[mode].T, mode)
    return made


def unfold(tensor: Float[Tensor, "..."], mode: int) -> Float[Tensor, "row column"]:
    """The matrix whose rows run along ``mode`` and whose columns run over all other axes."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def leading_vectors(matrix: Float[Tensor, "row column"], count: int) -> Float[Tensor, "row count"]:
    """The first ``count`` left singular vectors; where there are fewer, orthonormal columns fill up."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :count]
    left = torch.linalg.svd(matrix, full_matrices=False).U[:, :count]
    if left.shape[1] < count:  # any further directions do: the core has nothing for them
        extra = torch.randn(
            rows, count - left.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        left = torch.linalg.qr(torch.cat([left, extra.to(left)], dim=1)).Q
    return left


@dataclass(frozen=True, eq=False)
class Tucker:
    """A tensor as core (J1, ..., JN) and factors (In, Jn), with the share of its norm that is missed.

    relative_error: ||T - this|| / ||T||, Frobenius; 0 for a tensor of zeros.
    """

    core: Tensor
    factors: tuple[Tensor, ...]
    relative_error: float

    def to_tensor(self) -> Tensor:
        """The tensor that this stands for."""
        return tucker_product(self.core, self.factors)

    @property
    def parameter_count(self) -> int:
        """Numbers in the core and in the factors."""
        return self.core.numel() + sum(factor.numel() for factor in self.factors)


def check_ranks(shape: Sequence[int], ranks: object, *, clip: bool = False) -> tuple[int, ...]:
    """``ranks`` as a tuple, one for each mode of ``shape``; larger ones than the mode are cut only with ``clip``."""
    given: Any = ranks
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise InputError(f"ranks must be one whole number for each of the {len(shape)} modes, got {ranks!r}")
    numbers: list[Any] = list(given)
    if not all(isinstance(rank, Integral) for rank in numbers):
        raise InputError(f"ranks must be whole numbers, got {numbers}")
    if len(numbers) != len(shape):
        raise InputError(
            f"a weight of shape {tuple(shape)} needs {len(shape)} ranks, in the order of its axes, got {len(numbers)}: {numbers}"
        )
    made = []
    for mode, (size, rank) in enumerate(zip(shape, map(int, numbers), strict=True)):
        if rank < 1:
            raise InputError(f"rank {rank} for mode {mode} of shape {tuple(shape)}: every rank must be at least 1")
        if rank > size and not clip:
            raise InputError(
                f"rank {rank} for mode {mode} of shape {tuple(shape)} is larger than its size {size}; "
                "ranks are in the order of the weight's axes (out, in / groups, kernel); clip=True cuts them"
            )
        made.append(min(rank, size))
    return tuple(made)


def parameter_count(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in a core of ``ranks`` and its factors.

    >>> parameter_count((32, 16, 3, 3), (8, 8, 3, 3)), parameter_count((384, 1536), (8, 8))
    (978, 15424)
    """
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def sensible_ranks(shape: Sequence[int], rank: int, kernel: Sequence[int] | None = None) -> tuple[int, ...]:
    """At most ``rank`` in every channel mode, the kernel modes at ``kernel`` (None: at ``rank`` too).

    The channel modes are the first two of a weight, or all where there is no kernel. No rank is larger than its mode, nor
    than the product of the others (nothing would use the rest).
    """
    kernel = list(kernel if kernel is not None else [])
    ranks = [min(rank, size) for size in shape[: len(shape) - len(kernel)]] + kernel
    for _ in range(len(shape)):  # cutting one can make another too large
        for mode in range(len(ranks) - len(kernel)):
            if len(ranks) > 1:
                ranks[mode] = min(ranks[mode], math.prod(ranks[:mode] + ranks[mode + 1 :]))
    return tuple(ranks)


def budget_ranks(shape: Sequence[int], budget: int, *, keep_kernel: bool = True) -> tuple[int, ...]:
    """The largest ranks, equal in all channel modes, whose core and factors hold at most ``budget`` numbers.

    keep_kernel: modes after the second (kernel height, width, depth) stay at full rank while that fits with channel rank
    1, and are cut from the largest down where it does not; False treats all modes alike.

    Raises InputError where not even rank 1 fits, naming the smallest budget.

    >>> budget_ranks((32, 16, 3, 3), 978), budget_ranks((384, 1536), 16_000), budget_ranks((32, 1, 3, 3), 50)
    ((8, 8, 3, 3), (8, 8), (1, 1, 2, 2))
    """
    shape = tuple(int(size) for size in shape)
    least = parameter_count(shape, [1] * len(shape))
    if budget < least:
        raise InputError(
            f"a budget of {budget} numbers is too small for a weight of shape {shape}: rank 1 in every mode takes {least}"
        )
    kernel = list(shape[2:]) if keep_kernel else []
    while kernel and parameter_count(shape, sensible_ranks(shape, 1, kernel)) > budget:
        largest = kernel.index(max(kernel))
        kernel[largest] -= 1
    low, high = 1, max(shape)
    while low < high:
        middle = (low + high + 1) // 2
        fits = parameter_count(shape, sensible_ranks(shape, middle, kernel)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return sensible_ranks(shape, low, kernel)


def _prepared(tensor: Tensor) -> Tensor:
    if tensor.ndim < 1 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise DataError(
            f"expected a floating point tensor with at least one entry, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"the tensor of shape {tuple(tensor.shape)} holds numbers that are not finite")
    return tensor.detach().double()


def _missed(tensor: Tensor, made: Tensor) -> float:
    norm = float(tensor.norm())
    return float((tensor - made).norm()) / norm if norm > 0 else 0.0


def tucker_approximation(
    tensor: Shaped[Tensor, "..."], ranks: object, *, max_iter: int = 20, tol: float = 1e-7
) -> Tucker:
    """The tensor's best fit by a core of ``ranks``, with orthonormal factors: higher-order orthogonal iteration.

    Starts from the leading singular vectors of each unfolding (HOSVD) and improves one factor at a time, so the error never
    grows; stops after ``max_iter`` sweeps, or when the core's norm changes by less than ``tol`` of itself. max_iter=0 gives
    the HOSVD itself. Works in float64 and answers in the tensor's own precision.

    Raises InputError for wrong ranks and DataError for a tensor that is empty, not of floats or not finite.

    >>> tucker_approximation(torch.ones(3, 4, 2), (1, 1, 1)).relative_error < 1e-7
    True
    """
    T = _prepared(tensor)
    sizes = check_ranks(T.shape, ranks)
    factors = [leading_vectors(unfold(T, mode), rank) for mode, rank in enumerate(sizes)]
    core = _project(T, factors)
    for _ in range(max_iter if T.ndim > 1 else 0):
        before = float(core.norm())
        for mode in range(T.ndim):
            others = [torch.eye(size).to(T) if n == mode else factors[n].T for n, size in enumerate(T.shape)]
            factors[mode] = leading_vectors(unfold(tucker_product(T, others), mode), sizes[mode])
        core = _project(T, factors)
        if float(core.norm()) - before <= tol * before:
            break
    error = _missed(T, tucker_product(core, factors))
    return Tucker(core.to(tensor), tuple(factor.to(tensor) for factor in factors), error)


def matrix_approximation(tensor: Shaped[Tensor, "..."], rank: int) -> Tucker:
    """The best fit of rank ``rank`` to the tensor flattened to (first axis, all others), by its singular values.

    What LoRA on a flattened kernel could reach at best, and also LoRA by two convolutions (kernel to r channels, then 1 x 1),
    which is the same matrix. The core is diagonal; error relative to the tensor's norm.

    >>> matrix_approximation(torch.ones(3, 2, 2), 1).factors[1].shape
    torch.Size([4, 1])
    """
    T = _prepared(tensor)
    T = T.reshape(len(T), -1)
    if not 1 <= rank <= min(T.shape):
        raise InputError(f"a matrix of shape {tuple(T.shape)} has ranks 1 to {min(T.shape)}, got {rank}")
    U, S, V = torch.linalg.svd(T, full_matrices=False)
    U, V = U[:, :rank], V[:rank].T
    error = _missed(T, (U * S[:rank]) @ V.T)
    return Tucker(S[:rank].diag().to(tensor), (U.to(tensor), V.to(tensor)), error)


def cp_approximation(tensor: Shaped[Tensor, "..."], rank: int, *, max_iter: int = _CP_SWEEPS, seed: int = 0) -> Tucker:
    """A fit by ``rank`` outer products (a diagonal core), by alternating least squares from the HOSVD's vectors.

    Returned with the diagonal core written out. The fit is a local optimum; columns beyond a mode's size start at random.

    >>> cp_approximation(torch.ones(3, 4, 2), 1).relative_error < 1e-6
    True
    """
    T = _prepared(tensor)
    if rank < 1:
        raise InputError(f"a sum of outer products needs rank >= 1, got {rank}")
    if not bool(T.any()):  # least squares have no one answer
        zeros = tuple(T.new_zeros(size, rank).to(tensor) for size in T.shape)
        return Tucker(_diagonal(torch.ones(rank), T.ndim).to(tensor), zeros, 0.0)
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for mode, size in enumerate(T.shape):
        start = torch.randn(size, rank, generator=generator, dtype=torch.float64).to(T) / math.sqrt(size)
        known = leading_vectors(unfold(T, mode), min(rank, size))
        start[:, : known.shape[1]] = known
        factors.append(start)
    best, error = list(factors), math.inf
    for _ in range(max_iter):
        for mode in range(T.ndim):
            others = [factor for n, factor in enumerate(factors) if n != mode]
            gram = torch.ones(rank, rank).to(T)
            columns = torch.ones(1, rank).to(T)
            for other in others:
                gram = gram * (other.T @ other)
                columns = (columns[:, None] * other[None]).reshape(-1, rank)
            ridge = 1e-10 * gram.diagonal().mean() * torch.eye(rank).to(T)  # outer products may become parallel
            factors[mode] = torch.linalg.solve(gram + ridge, (unfold(T, mode) @ columns).T).T
            if mode < T.ndim - 1:
                factors[mode] = factors[mode] / factors[mode].norm(dim=0).clamp_min(1e-30)
        before, now = error, _missed(T, tucker_product(_diagonal(torch.ones(rank).to(T), T.ndim), factors))
        if now < error:
            best, error = list(factors), now
        if before - now <= 1e-6 * now:
            break
    return Tucker(_diagonal(torch.ones(rank), T.ndim).to(tensor), tuple(factor.to(tensor) for factor in best), error)


def _diagonal(values: Tensor, ndim: int) -> Tensor:
    core = values.new_zeros([len(values)] * ndim)
    index = torch.arange(len(values))
    core[(index,) * ndim] = values
    return core


def compare_structures(delta: Mapping[str, Tensor], budgets: object) -> pd.DataFrame:
    """How much of real weight updates each structure misses at equal size: what the paper's argument rests on.

    delta: updates (fine-tuned minus base weights) by layer. budgets: for each point a number of parameters (int), a share of
    the layer's own number (float), or Tucker ranks (a tuple, for layers with as many axes).

    One row for each of the methods "tucker", "matrix" (the largest rank within the budget), "matrix, rank up" (one more, so
    more numbers than the budget) and "cp": layer, budget, method, parameters, relative_error. Where not even rank 1 fits,
    parameters is 0 and the error 1. LoRA by two convolutions is the matrix. A layer with two axes gains nothing from a core:
    the matrix is best there.

    >>> table = compare_structures({"conv": torch.randn(8, 6, 3, 3)}, [(2, 2, 3, 3)])
    >>> table[["method", "parameters"]].values.tolist()[:2]
    [['tucker', 82], ['matrix', 62]]
    """
    points: list[Any] = list(budgets) if isinstance(budgets, Iterable) else [budgets]
    if not delta or not points:
        raise InputError(f"need at least one update and one budget, got {len(delta)} and {len(points)}")
    rows = []
    for layer, update in delta.items():
        try:
            _prepared(update)
        except DataError as error:
            raise DataError(f"{layer}: {error}") from error
        for point in points:
            budget, ranks = _point(layer, update, point)
            for method, parameters, error in _structures(update, budget, ranks):
                rows.append((layer, budget, method, parameters, error))
    return pd.DataFrame(rows, columns=["layer", "budget", "method", "parameters", "relative_error"])


def _point(layer: str, update: Tensor, point: object) -> tuple[int, tuple[int, ...] | None]:
    """The number of parameters that one budget stands for, and its Tucker ranks where they fit into it."""
    if isinstance(point, Iterable):
        ranks = check_ranks(update.shape, point)
        return parameter_count(update.shape, ranks), ranks
    if isinstance(point, bool) or not isinstance(point, Real) or not float(point) > 0:
        raise InputError(f"a budget for {layer} is a positive number, a share or a tuple of ranks, got {point!r}")
    number = int(point) if isinstance(point, Integral) else int(float(point) * update.numel())
    fits = number >= parameter_count(update.shape, [1] * update.ndim)
    return number, budget_ranks(update.shape, number) if fits else None


def _structures(update: Tensor, budget: int, ranks: tuple[int, ...] | None) -> Iterable[tuple[str, int, float]]:
    if ranks is None:
        yield "tucker", 0, 1.0
    else:
        yield "tucker", parameter_count(update.shape, ranks), tucker_approximation(update, ranks).relative_error
    out, rest = len(update), update.numel() // len(update)
    for method, rank in (("matrix", budget // (out + rest)), ("matrix, rank up", budget // (out + rest) + 1)):
        rank = min(rank, out, rest)
        yield method, rank * (out + rest), matrix_approximation(update, rank).relative_error if rank else 1.0
    rank = budget // (1 + sum(update.shape))
    yield "cp", rank * (1 + sum(update.shape)), cp_approximation(update, rank).relative_error if rank else 1.0
