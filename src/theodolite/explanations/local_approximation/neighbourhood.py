"""Where a surrogate has to agree with the model: the distribution Z_x of moves away from one input.

A move is a vector z with one entry for each feature, in one of two coordinates:

    multiplicative   x_z = b0 + z * (x - b0)      z = 1 is x itself, z = 0 is the baseline b0
    additive         x_z = x + z                  z = 0 is x itself

Source: Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254 (Section 3, Table 1).
"""

__all__ = [
    "DegenerateNeighbourhoodError",
    "Draws",
    "Neighbourhood",
    "NotDifferentiableError",
    "square_patches",
    "whole_number",
]

import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from theodolite.core.errors import InputError

_MOST_ENUMERATED = 20
_BLOCK_NUMBERS = 1 << 22  # a block of draws holds at most this many numbers, whatever the memory budget is

Array = Tensor | np.ndarray


class NotDifferentiableError(InputError, TypeError):
    """A gradient loss was asked of a model without gradients."""


class DegenerateNeighbourhoodError(InputError):
    """An input equals its baseline everywhere, so that moving between the two changes nothing."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Moves of a neighbourhood in blocks that are drawn again, the same, each time they are iterated over.

    size: number of moves. exact: they are the whole distribution (or a quadrature of it), so nothing is left to chance.
    log_weight: (size,) of each move, on top of what depends on the input. listed: how many of the first moves are not
    drawn but all of their kind. cluster: of the others, moves in a row that depend on each other.
    """

    size: int
    exact: bool
    blocks: Callable[[], Iterator[Tensor]]
    log_weight: Float[Tensor, " move"]
    cluster: int = 1
    listed: int = 0

    def __iter__(self) -> Iterator[Tensor]:
        return self.blocks()

    def all(self) -> Float[Tensor, "move feature"]:
        """All moves at once, (size, features)."""
        return torch.cat(list(self))


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbourhood:
    """A distribution of moves around an input; made by `binary`, `gaussian`, `path` and `one_hot`.

    Every kind takes ``groups``, integers 0..k-1 that say which feature (superpixel, one-hot group) an entry of the input
    belongs to: shape of one input (or what broadcasts to it, such as (height, width)), or of the whole batch where each row
    has its own. The entries of a group move together and share one weight. None: each entry is a feature.

    ``baseline`` is a number, one input, or a background set (m, ...) over which f is averaged: then KernelSHAP gives the
    Shapley values of the interventional game, and Integrated Gradients becomes Expected Gradients.
    """

    groups: Array | None = None

    multiplicative: ClassVar[bool] = True
    natural_loss: ClassVar[str] = "squared"
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.groups is not None:
            groups = torch.as_tensor(self.groups)
            integers = groups.dtype != torch.bool and not groups.is_floating_point()
            if not integers or groups.numel() == 0 or int(groups.min()) < 0:
                raise InputError("groups must be integers 0..k-1 that number the features")
            missing = int(groups.max()) + 1 - len(groups.unique())
            if missing:
                raise InputError(
                    f"groups must number the features 0..{int(groups.max())} without gaps, {missing} missing"
                )
        self._check()

    def _check(self) -> None:
        """Raise where an option has an impossible value."""

    def draws(self, features: int, n_samples: int, *, seed: int, stream: int = 0) -> Draws:
        """``n_samples`` moves (all of them, where they can be listed); another ``stream`` gives other ones."""
        raise InputError("make a neighbourhood with Neighbourhood.binary, .gaussian, .path or .one_hot")

    @property
    def weighs_inputs(self) -> bool:
        """Whether the weight of a move depends on the input (`log_kernel`)."""
        return False

    @property
    def fixes_ends(self) -> bool:
        """Whether the weight is infinite at z = 0 and z = 1, so that g is given there."""
        return False

    def log_kernel(self, moves: Tensor, spread: Tensor) -> Float[Tensor, "row move"]:
        """That part of the log-weight; spread: (rows, features) squared distance to the baseline."""
        return torch.zeros(len(spread), len(moves), dtype=spread.dtype, device=spread.device)

    @staticmethod
    def binary(
        kernel: str = "exponential",
        width: float = 1.0,
        baseline: Any = 0.0,
        enumerate: bool | str = "auto",
        *,
        groups: Array | None = None,
    ) -> "Binary":
        """Each feature is kept or set to the baseline, by a fair coin.

        kernel: "exponential" weighs a move by exp(-||x - x_z||^2 / width^2), which is captum's Lime kernel
        exp(-||x - x_z||^2 / (2 w^2)) with width = sqrt(2) w; "shapley" by (d - 1) / (C(d, s) s (d - s)) with s features kept,
        infinite at s = 0 and s = d; "uniform" all alike. enumerate: use all 2^d moves; "auto" where they are no more
        than the samples asked for. Otherwise moves are drawn; for the Shapley kernel the sizes that fit are listed whole.

        >>> Neighbourhood.binary(width=0)
        Traceback (most recent call last):
        theodolite.core.errors.InputError: width must be above 0 and finite, got 0
        """
        return Binary(kernel=kernel, width=width, baseline=baseline, enumerate=enumerate, groups=groups)

    @staticmethod
    def gaussian(sigma: float = 0.1, *, groups: Array | None = None) -> "Gaussian":
        """Noise N(0, sigma^2) on every feature; sigma in the units of the input."""
        return Gaussian(sigma=sigma, groups=groups)

    @staticmethod
    def path(
        low: float = 0.0,
        high: float = 1.0,
        baseline: Any = 0.0,
        nodes: int = 64,
        quadrature: str = "gauss",
        *,
        groups: Array | None = None,
    ) -> "Path":
        """The straight line from the baseline (0) to the input (1): z = alpha 1 with alpha ~ U(low, high).

        quadrature: "gauss" takes that many Gauss-Legendre nodes, "monte-carlo" draws n_samples of them.
        """
        return Path(low=low, high=high, baseline=baseline, nodes=nodes, quadrature=quadrature, groups=groups)

    @staticmethod
    def one_hot(baseline: Any = 0.0, *, groups: Array | None = None) -> "OneHot":
        """One feature at a time is set to the baseline; the target is the change f(x) - f(x without that feature)."""
        return OneHot(baseline=baseline, groups=groups)

    def spread_weights(self, weights: Array, X: Array) -> Tensor:
        """Weights (n, d) laid out as the input is, shape of ``X``: every entry has the weight of its group."""
        weights, shape = torch.as_tensor(weights), tuple(X.shape)
        if self.groups is None:
            return weights.reshape(shape)
        index = group_index(self.groups, shape).expand(shape[0], -1).to(weights.device)
        return weights.gather(1, index).reshape(shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Binary(Neighbourhood):
    """See `Neighbourhood.binary`."""

    kernel: str = "exponential"
    width: float = 1.0
    baseline: Any = 0.0
    enumerate: bool | str = "auto"

    name: ClassVar[str] = "binary"

    def _check(self) -> None:
        _one_of("kernel", self.kernel, ("exponential", "shapley", "uniform"))
        _above_zero("width", self.width)
        if not isinstance(self.enumerate, bool) and self.enumerate != "auto":
            raise InputError(f"enumerate must be True, False or 'auto', got {self.enumerate!r}")

    @property
    def fixes_ends(self) -> bool:
        return self.kernel == "shapley"

    def draws(self, features: int, n_samples: int, *, seed: int, stream: int = 0) -> Draws:
        d = features
        if self.enumerate is True and d > _MOST_ENUMERATED:
            raise InputError(
                f"enumerate=True needs 2^{d} model evaluations a row; at most {_MOST_ENUMERATED} features can be"
            )
        if self.enumerate is True or (self.enumerate == "auto" and d <= _MOST_ENUMERATED and 2**d <= n_samples):
            return self._every_move(d)
        if not self.fixes_ends:
            return _drawn(lambda g, m: torch.randint(2, (m, d), generator=g).float(), d, n_samples, seed, stream)
        if d == 1:
            return self._every_move(d)
        return self._subsets(d, n_samples, seed, stream)

    def _subsets(self, d: int, n_samples: int, seed: int, stream: int) -> Draws:
        """The smallest and the largest subsets as far as the samples reach, and draws of the others, both as the kernel has it.

        Sizes drawn from the kernel's own law leave all weights of the draws equal; a draw and its complement halve the noise.
        """
        law = [0.0, *(1 / (size * (d - size)) for size in range(1, d))]  # weight of all subsets of a size together
        open_, listed, left = sum(law), [], n_samples
        for size in range(1, (d + 1) // 2):
            both = 2 * law[size]
            if 2 * math.comb(d, size) > left * both / open_:
                break
            listed += [size, d - size]
            left, open_ = left - 2 * math.comb(d, size), open_ - both
        if len(listed) == d - 1:
            return self._every_move(d)
        sizes = torch.tensor([size for size in range(1, d) if size not in listed])
        share = torch.tensor([law[size] for size in sizes.tolist()], dtype=torch.float64)

        def pairs(generator: torch.Generator, m: int) -> Tensor:
            kept = sizes[torch.multinomial(share, m // 2, replacement=True, generator=generator)]
            order = torch.rand(m // 2, d, generator=generator).argsort(dim=1).argsort(dim=1)
            first = (order < kept[:, None]).float()
            return torch.stack([first, 1 - first], dim=1).reshape(m, d)

        drawn = _drawn(pairs, d, max(2, left + left % 2), seed, stream, cluster=2)
        weight = [law[size] / math.comb(d, size) for size in listed for _ in range(math.comb(d, size))]
        weight += [open_ / drawn.size] * drawn.size

        def blocks() -> Iterator[Tensor]:
            for size in listed:
                yield _of_size(d, size)
            yield from drawn

        log_weight = torch.tensor(weight, dtype=torch.float64).log()
        return Draws(len(weight), False, blocks, log_weight, cluster=2, listed=len(weight) - drawn.size)

    def _every_move(self, d: int) -> Draws:
        codes = torch.arange(2**d)
        if self.fixes_ends:
            codes = codes[1:-1] if d > 1 else codes[1:]  # a single feature has nothing between the ends: x stands in
        log_weight = torch.zeros(len(codes), dtype=torch.float64)
        if self.fixes_ends and d > 1:
            kept = _bits(codes, d).sum(dim=1).double()
            choose = torch.lgamma(torch.tensor(d + 1.0)) - torch.lgamma(kept + 1) - torch.lgamma(d - kept + 1)
            log_weight = math.log(d - 1) - choose - torch.log(kept * (d - kept))
        block = max(1, _BLOCK_NUMBERS // d)
        return Draws(len(codes), True, lambda: (_bits(part, d) for part in codes.split(block)), log_weight)

    @property
    def weighs_inputs(self) -> bool:
        return self.kernel == "exponential"

    def log_kernel(self, moves: Tensor, spread: Tensor) -> Float[Tensor, "row move"]:
        return -(spread @ (1 - moves.to(spread)).square().T) / self.width**2


@dataclass(frozen=True, eq=False, kw_only=True)
class Gaussian(Neighbourhood):
    """See `Neighbourhood.gaussian`."""

    sigma: float = 0.1

    multiplicative: ClassVar[bool] = False
    name: ClassVar[str] = "gaussian"

    def _check(self) -> None:
        _above_zero("sigma", self.sigma)

    def draws(self, features: int, n_samples: int, *, seed: int, stream: int = 0) -> Draws:
        return _drawn(
            lambda g, m: torch.randn(m, features, generator=g).mul_(self.sigma), features, n_samples, seed, stream
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Path(Neighbourhood):
    """See `Neighbourhood.path`."""

    low: float = 0.0
    high: float = 1.0
    baseline: Any = 0.0
    nodes: int = 64
    quadrature: str = "gauss"

    natural_loss: ClassVar[str] = "gradient"  # a squared loss on a line sees only the sum of the weights
    name: ClassVar[str] = "path"

    def _check(self) -> None:
        _one_of("quadrature", self.quadrature, ("gauss", "monte-carlo"))
        if not (_finite(self.low) and _finite(self.high) and self.low < self.high):
            raise InputError(f"need low < high, two finite numbers; got low={self.low!r}, high={self.high!r}")
        whole_number("nodes", self.nodes, 1)

    def draws(self, features: int, n_samples: int, *, seed: int, stream: int = 0) -> Draws:
        length = self.high - self.low
        if self.quadrature == "monte-carlo":
            return _drawn(
                lambda g, m: (self.low + length * torch.rand(m, 1, generator=g, dtype=torch.float64)).expand(m, features),
                features, n_samples, seed, stream,
            )  # fmt: skip
        nodes, weights = np.polynomial.legendre.leggauss(self.nodes)
        alphas = torch.from_numpy(self.low + length * (nodes + 1) / 2)[:, None]
        block = max(1, _BLOCK_NUMBERS // features)
        return Draws(
            self.nodes,
            True,
            lambda: (part.expand(-1, features) for part in alphas.split(block)),
            torch.from_numpy(np.log(weights)),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class OneHot(Neighbourhood):
    """See `Neighbourhood.one_hot`. Its moves are xi = e_j; the model is evaluated at z = 1 - xi."""

    baseline: Any = 0.0

    name: ClassVar[str] = "one-hot"

    def draws(self, features: int, n_samples: int, *, seed: int, stream: int = 0) -> Draws:
        block = max(1, _BLOCK_NUMBERS // features)

        def blocks() -> Iterator[Tensor]:
            for part in torch.arange(features).split(block):
                yield (part[:, None] == torch.arange(features)).float()

        return Draws(features, True, blocks, torch.zeros(features, dtype=torch.float64))


def square_patches(height: int, width: int, size: int) -> Int[Tensor, "height width"]:
    """Feature groups that cut an image into squares of ``size`` pixels, numbered row by row.

    >>> square_patches(4, 6, 2)[2].tolist()
    [3, 3, 4, 4, 5, 5]
    """
    if min(height, width, size) < 1:
        raise InputError(f"height, width and size must be at least 1, got {height}, {width}, {size}")
    rows, columns = torch.arange(height) // size, torch.arange(width) // size
    return rows[:, None] * (int(columns[-1]) + 1) + columns


def group_index(groups: Array, shape: tuple[int, ...]) -> Int[Tensor, "rows entry"]:
    """The feature of each entry of a flattened input: one row for all inputs, or one for each of ``shape[0]``."""
    numbers = torch.as_tensor(groups).long()
    for wanted in (shape[1:], shape):
        try:
            rows = numbers.expand(wanted)
        except RuntimeError:
            continue
        return rows.reshape(1 if wanted is not shape else shape[0], -1)
    raise InputError(f"groups of shape {tuple(numbers.shape)} do not fit inputs of shape {shape[1:]}")


def _bits(codes: Tensor, d: int) -> Tensor:
    return ((codes[:, None] >> torch.arange(d)) & 1).float()


def _of_size(d: int, size: int) -> Float[Tensor, "subset feature"]:
    """All subsets of d features that have this size."""
    chosen = torch.combinations(torch.arange(d), min(size, d - size))
    few = torch.zeros(len(chosen), d).scatter_(1, chosen, 1.0)
    return few if 2 * size <= d else 1 - few


def _drawn(
    draw: Callable[[torch.Generator, int], Tensor], features: int, n: int, seed: int, stream: int, cluster: int = 1
) -> Draws:
    """Blocks with a generator each, so that what is drawn does not depend on how much memory there is."""
    size = max(cluster, _BLOCK_NUMBERS // features // cluster * cluster)

    def blocks() -> Iterator[Tensor]:
        for i, start in enumerate(range(0, n, size)):
            state = np.random.SeedSequence([seed, stream, i]).generate_state(1, np.uint64)[0]
            yield draw(torch.Generator().manual_seed(int(state >> np.uint64(1))), min(size, n - start))

    return Draws(n, False, blocks, torch.zeros(n, dtype=torch.float64), cluster)


def whole_number(name: str, value: object, least: int) -> None:
    """Raise InputError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _above_zero(name: str, value: Any) -> None:
    if not (_finite(value) and value > 0):
        raise InputError(f"{name} must be above 0 and finite, got {value!r}")
