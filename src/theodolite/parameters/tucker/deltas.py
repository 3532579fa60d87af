"""Trainable updates of one weight: a Tucker core with a factor per mode, and what it is compared with.

    Delta W = s G x1 A1 x2 A2 ... xN AN

Source: Si et al., 2024, arXiv:2405.14739; LoRA is Hu et al., 2021, arXiv:2106.09685.
"""

__all__ = ["CPDelta", "Delta", "FullDelta", "LoraDelta", "TuckerDelta", "cp_delta", "lora_delta"]

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.core.errors import InputError
from theodolite.parameters.tucker.decomposition import check_ranks, leading_vectors, tucker_product, unfold

INITS = ("kaiming", "orthonormal", "hosvd")


class Delta(nn.Module):
    """An update of one weight of ``shape``, zero at the start, that calling it gives.

    scale: buffer, the fixed s. ranks: as made. A call with ``index`` gives one row of the first axis only.
    """

    def __init__(self, shape: object, ranks: tuple[int, ...], scale: object) -> None:
        super().__init__()
        self.shape, self.ranks = _check_shape(shape), ranks
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(check_scale(scale)))

    @property
    def parameter_count(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def silence(self, row: int) -> None:
        """Make the update of one row of the first axis zero; it stays so while that row has no gradient."""

    def extra_repr(self) -> str:
        """Shape, ranks and scale."""
        return f"shape={self.shape}, ranks={self.ranks}, scale={float(self.scale):g}"


class TuckerDelta(Delta):
    """A weight update with the weight's own axes: a small core and one factor for each axis.

    shape: of the weight, in its own order (out, in / groups, kernel height, kernel width). ranks: one per axis, same order.
    core: nn.Parameter (*ranks), zeros, so the update is zero at the start and the core alone has a gradient in the first
    step. factors: nn.ParameterList of (size, rank). With two axes this is LoRA with a free core: Delta W = s A G B^T.
    init: of the factors, "kaiming" (normal with standard deviation sqrt(0.5 / rank)), "orthonormal" (columns orthonormal,
    so that ||Delta W|| = s ||G||), or "hosvd" (leading singular vectors of the unfoldings of ``base``, the pretrained
    weight). seed: of the draw; None takes torch's generator. base: also gives device and precision (at least float32).
    clip: cut ranks that are larger than their axis.

    Raises InputError for ranks that do not fit (naming the axis), scale <= 0, an unknown init, and "hosvd" without base.
    Source: Si et al., 2024, arXiv:2405.14739.

    >>> update = TuckerDelta((32, 16, 3, 3), (8, 8, 3, 3), seed=0)
    >>> update().shape, update.parameter_count
    (torch.Size([32, 16, 3, 3]), 978)
    """

    def __init__(
        self,
        shape: object,
        ranks: object,
        *,
        scale: object = 4.0,
        init: str = "kaiming",
        base: Tensor | None = None,
        seed: int | None = None,
        clip: bool = False,
    ) -> None:
        shape = _check_shape(shape)
        checked = check_ranks(shape, ranks, clip=clip)
        if init not in INITS:
            raise InputError(f"init is one of {', '.join(INITS)}, got {init!r}")
        if base is not None and tuple(base.shape) != shape:
            raise InputError(f"base has shape {tuple(base.shape)}, the update {shape}; they must be equal")
        if init == "hosvd" and base is None:
            raise InputError('init="hosvd" takes its factors from the pretrained weight; give it as base=')
        super().__init__(shape, checked, scale)
        generator = _generator(seed)
        if init == "hosvd" and base is not None:
            weight = base.detach().double()
            factors = [leading_vectors(unfold(weight, mode), rank) for mode, rank in enumerate(checked)]
        else:
            factors = [
                torch.randn(size, rank, generator=generator, dtype=torch.float64)
                for size, rank in zip(shape, checked, strict=True)
            ]
            factors = [
                torch.linalg.qr(factor).Q if init == "orthonormal" else factor * math.sqrt(0.5 / factor.shape[1])
                for factor in factors
            ]
        self.core = nn.Parameter(torch.zeros(checked))
        self.factors = nn.ParameterList([nn.Parameter(factor.float()) for factor in factors])
        _settle(self, base)

    def forward(self, index: int | None = None) -> Float[Tensor, "..."]:
        """Delta W (*shape), or its row ``index`` (*shape[1:]) at the cost of that row."""
        factors = list(self.factors)
        if index is None:
            return tucker_product(self.scale * self.core, factors)
        core = torch.tensordot(self.scale * factors[0][index], self.core, dims=1)
        return tucker_product(core, factors[1:])

    def silence(self, row: int) -> None:
        """Zero that row of the first factor."""
        with torch.no_grad():
            self.factors[0][row] = 0


class CPDelta(Delta):
    """A weight update as a sum of ``rank`` outer products: the Tucker form with a diagonal core (rank), zeros."""

    def __init__(self, shape: object, rank: int, *, scale: object = 4.0, seed: int | None = None) -> None:
        _check_rank(rank)
        super().__init__(shape, (rank,) * len(_check_shape(shape)), scale)
        generator = _generator(seed)
        drawn = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in self.shape]
        self.core = nn.Parameter(torch.zeros(rank))
        # columns of length one in expectation: no axis is mixed, so the rank does not enter
        self.factors = nn.ParameterList([nn.Parameter((one / math.sqrt(len(one))).float()) for one in drawn])

    def forward(self, index: int | None = None) -> Float[Tensor, "..."]:
        """Delta W (*shape), or its row ``index`` (*shape[1:])."""
        first, *rest = list(self.factors)
        first = first if index is None else first[index : index + 1]
        columns, sizes = (self.scale * self.core * first), [len(first)]
        for factor in rest[:-1]:
            columns = (columns[:, None] * factor[None]).reshape(-1, len(self.core))
            sizes.append(len(factor))
        made = columns @ rest[-1].T if rest else columns.sum(dim=1)
        made = made.reshape(*sizes, *([len(rest[-1])] if rest else []))
        return made if index is None else made[0]

    def silence(self, row: int) -> None:
        """Zero that row of the first factor."""
        with torch.no_grad():
            self.factors[0][row] = 0


class LoraDelta(Delta):
    """A weight update of low rank on the weight flattened to (out, everything else): s B A, B zeros, s = alpha / rank.

    For a convolution this is also what a kernel-sized convolution to ``rank`` channels and a 1 x 1 convolution up make, since
    their product is the same matrix.
    """

    def __init__(self, shape: object, rank: int, *, alpha: float | None = None, seed: int | None = None) -> None:
        shape = _check_shape(shape)
        _check_rank(rank)
        out, rest = shape[0], math.prod(shape[1:])
        if len(shape) < 2 or rank > min(out, rest):
            raise InputError(
                f"a low-rank update needs two axes and rank <= {min(out, rest)} here, got shape {shape} and rank {rank}"
            )
        super().__init__(shape, (rank,), 1.0 if alpha is None else check_scale(alpha) / rank)
        bound = 1 / math.sqrt(rest)  # Kaiming uniform with a = sqrt(5)
        A = (2 * torch.rand(rank, rest, generator=_generator(seed), dtype=torch.float64) - 1) * bound
        self.A, self.B = nn.Parameter(A.float()), nn.Parameter(torch.zeros(out, rank))

    def forward(self, index: int | None = None) -> Float[Tensor, "..."]:
        """Delta W (*shape), or its row ``index`` (*shape[1:])."""
        if index is None:
            return ((self.scale * self.B) @ self.A).view(self.shape)
        return ((self.scale * self.B[index]) @ self.A).view(self.shape[1:])


class FullDelta(Delta):
    """A weight update with a number of its own for each entry: full fine-tuning, with the base kept apart."""

    def __init__(self, shape: object) -> None:
        super().__init__(shape, _check_shape(shape), 1.0)
        self.value = nn.Parameter(torch.zeros(self.shape))

    def forward(self, index: int | None = None) -> Float[Tensor, "..."]:
        """Delta W (*shape), or its row ``index`` (*shape[1:])."""
        return self.value if index is None else self.value[index]


def lora_delta(shape: object, rank: int, *, alpha: float | None = None, seed: int | None = None) -> LoraDelta:
    """A `LoraDelta`; alpha None takes alpha = rank, a scale of 1.

    >>> lora_delta((32, 16, 3, 3), 4, alpha=8, seed=0).parameter_count
    704
    """
    return LoraDelta(shape, rank, alpha=alpha, seed=seed)


def cp_delta(shape: object, rank: int, *, scale: object = 4.0, seed: int | None = None) -> CPDelta:
    """A `CPDelta`.

    >>> cp_delta((32, 16, 3, 3), 4, seed=0).parameter_count
    220
    """
    return CPDelta(shape, rank, scale=scale, seed=seed)


def _settle(update: Delta, base: Tensor | None) -> None:
    """Put the update where the base weight is, in its precision but in no less than float32."""
    if base is not None:
        update.to(device=base.device, dtype=torch.promote_types(base.dtype, torch.float32))


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(int(seed))


def _check_shape(shape: object) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in shape) if isinstance(shape, Iterable) else ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"a weight's shape is one or more positive sizes, got {shape!r}")
    return sizes


def check_scale(scale: object) -> float:
    """``scale`` as a float; InputError where it is not a positive number."""
    if isinstance(scale, Real) and not isinstance(scale, bool) and 0 < float(scale) < math.inf:
        return float(scale)
    raise InputError(f"the scale of an update must be a positive number, got {scale!r}")


def _check_rank(rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
        raise InputError(f"a rank is a whole number of at least 1, got {rank!r}")
