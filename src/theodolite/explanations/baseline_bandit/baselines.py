"""The families that baselines are drawn from: what a missing feature looks like inside a network."""

__all__ = ["FAMILIES", "TABLE_FAMILIES", "BaselineFamily", "draw_baselines", "family_name", "random_smooth_maps"]

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from theodolite.core.errors import InputError
from theodolite.explanations.baseline_bandit.split import Grid

BaselineFamily = str | Callable[..., Any]
"""A name from `FAMILIES` or "zero", or a callable (a, rng, bank) -> b with a and b of one shape."""

FAMILIES = ("normal", "uniform", "blur", "constant", "train")
TABLE_FAMILIES = ("normal", "uniform", "train")
"""On a table a channel has one position: there is nothing to blur, and a constant is a uniform draw."""


def family_name(family: BaselineFamily) -> str:
    """The family's own name, or that of the callable."""
    name = family if isinstance(family, str) else getattr(family, "__name__", type(family).__name__)
    if isinstance(family, str) and family not in (*FAMILIES, "zero"):
        raise InputError(
            f"there is no baseline family {family!r}; there are {', '.join(FAMILIES)}, zero, or a callable"
        )
    return name


def draw_baselines(
    family: BaselineFamily,
    a: Float[Tensor, "row ..."],
    rng: torch.Generator,
    bank: Float[Tensor, "bank ..."] | None = None,
    *,
    train_mean: int = 1,
    channels_last: bool = False,
) -> Float[Tensor, "row ..."]:
    """One baseline for each row of the activations ``a``, each with its own draw; of a transformer's grid of tokens too.

    "normal": channel mean + channel deviation * noise; "uniform": per channel U(min, max) at each position; "blur": ``a``
    under a Gaussian, deviation U(0.7, height / 3) positions; "constant": per channel one value, U(min, max); "train": mean of
    ``train_mean`` rows of ``bank`` (activations of training inputs); "zero". Statistics are those of the row itself over
    its positions; of a table's row, which has one, those of the bank. Raises InputError without a bank where one is needed.
    """
    name = family_name(family)
    if not isinstance(family, str):
        b = family(a, rng, bank)
        if not isinstance(b, Tensor) or b.shape != a.shape:
            raise InputError(
                f"the baseline {name} gave {getattr(b, 'shape', type(b))} for activations {tuple(a.shape)}"
            )
        return b
    if name == "zero":
        return torch.zeros_like(a)
    table = a.ndim == 2
    if bank is None and (name == "train" or table):
        raise InputError(
            f"the baseline family {name!r} needs a bank of training inputs" + (" on tables" if table else "")
        )
    if name == "train":
        assert bank is not None
        if train_mean < 1:
            raise InputError(f"train_mean must be at least 1, got {train_mean}")
        chosen = torch.randint(len(bank), (len(a), train_mean), generator=rng)
        return bank[chosen.to(bank.device)].mean(dim=1)
    if table:
        assert bank is not None
        if name not in TABLE_FAMILIES:
            raise InputError(
                f"tables have no {name!r} baseline; there are {', '.join(TABLE_FAMILIES)}, zero, or a callable"
            )
        if name == "normal":
            return bank.mean(dim=0) + bank.std(dim=0, correction=0) * _noise(a, rng)
        low, high = bank.amin(dim=0), bank.amax(dim=0)
        return low + (high - low) * _even(a, rng)
    grid = Grid.of(a, channels_last=channels_last)
    values = grid.values
    if name == "blur":
        return grid.back(_blurred(values, rng))
    flat = values.flatten(2)
    if name == "normal":
        mean, deviation = flat.mean(dim=2, keepdim=True), flat.std(dim=2, keepdim=True, correction=0)
        return grid.back((mean + deviation * _noise(flat, rng)).reshape(values.shape))
    low, high = flat.amin(dim=2, keepdim=True), flat.amax(dim=2, keepdim=True)
    share = _even(low if name == "constant" else flat, rng)
    return grid.back((low + (high - low) * share).expand(flat.shape).reshape(values.shape))


def _noise(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng).to(like)


def _even(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=rng).to(like)


def _blurred(values: Tensor, rng: torch.Generator) -> Tensor:
    """Each row under a Gaussian of its own width, as two matrix products; it ends at the border and is normalised there."""
    rows, _, height, width = values.shape
    least, most = 0.7, max(0.7, height / 3)
    sigma = (least + (most - least) * torch.rand(rows, generator=rng)).to(values)

    def kernel(size: int) -> Tensor:
        place = torch.arange(size, dtype=values.dtype, device=values.device)
        distance = (place[:, None] - place) / sigma[:, None, None]
        return torch.softmax(-0.5 * distance.square(), dim=2)[:, None]

    return kernel(height) @ values @ kernel(width).transpose(2, 3)


def random_smooth_maps(
    n: int, shape: tuple[int, ...], *, seed: int | torch.Generator = 0, cells: int = 7
) -> Float[Tensor, "map ..."]:
    """The control: maps (n, height, width) in [0, 1] that know nothing, random on ``cells`` x ``cells`` and enlarged.

    For tables, shape (features,), uniform numbers.
    """
    rng = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return scaled(torch.rand((n, *shape), generator=rng))
    coarse = torch.rand((n, 1, min(cells, shape[0]), min(cells, shape[1])), generator=rng)
    return scaled(functional.interpolate(coarse, size=shape, mode="bicubic", align_corners=False)[:, 0])


def scaled(maps: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
    """Each map from 0 to 1; one without any differences becomes zeros."""
    flat = maps.flatten(1)
    low = flat.amin(dim=1, keepdim=True)
    span = flat.amax(dim=1, keepdim=True) - low
    # differences below rounding of the values themselves are none
    some = span > 1e-6 * flat.abs().amax(dim=1, keepdim=True)
    return torch.where(some, (flat - low) / torch.where(some, span, 1.0), 0.0).clamp(0, 1).reshape(maps.shape)
