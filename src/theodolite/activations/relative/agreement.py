"""How well the items of one space are found in another one: ranks, shared neighbours, cosines, linear CKA."""

__all__ = ["ItemAgreement", "LatentAgreement", "RelativeWarning", "item_agreement", "latent_agreement"]

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.activations.relative.similarity import Rows, latents, need_direction, unit
from theodolite.core.dictionary import LinearDictionary
from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunk_rows, chunks


class RelativeWarning(UserWarning):
    """The numbers are computed, but may not mean what they seem to."""


@dataclass(frozen=True)
class LatentAgreement:
    """Agreement from a space A to a space B on the same items.

    jaccard: mean overlap of two sets of k items, those nearest in B to the item's own vector in B and those nearest in B to
    its vector in A (the item itself may be in both). mrr: mean reciprocal rank of the item when B is searched with its
    vector in A. top1: share of items that come first. cosine: mean cosine of an item's two vectors, which is no sign of
    success by itself (it is as large with the anchors in another order). cka: linear CKA, which needs no common coordinates.
    n: items; k: neighbours.
    """

    jaccard: float
    mrr: float
    top1: float
    cosine: float
    cka: float
    n: int
    k: int


@dataclass(frozen=True, eq=False)
class ItemAgreement:
    """The same for each item (item,), for intervals: overlap of neighbours, rank, reciprocal rank (0 where cut), cosine."""

    jaccard: Float[np.ndarray, " item"]
    rank: Float[np.ndarray, " item"]
    reciprocal_rank: Float[np.ndarray, " item"]
    cosine: Float[np.ndarray, " item"]


def latent_agreement(
    Za: Rows,
    Zb: Rows,
    *,
    k: int = 10,
    exclude: Iterable[int] | np.ndarray | Tensor | None = None,
    block: int = 2048,
    truncate_rank: int | None = None,
) -> LatentAgreement:
    """Agreement of the vectors ``Za`` with the vectors ``Zb`` (item, width) of the same items, from A to B, by cosine.

    Give relative vectors, or absolute ones for comparison: where their widths differ both are cut to the smaller one by
    their own principal components, with a `RelativeWarning`. exclude: items that are left out of queries and index, such
    as the anchors, which would be found for free. block: rows of the n x n cosines that are held at a time.
    truncate_rank: count reciprocal ranks beyond this one as 0, as the official code does; None ranks all items. Items that
    tie share the mean of their ranks, so a space in which all fell together gets no credit.

    Raises InputError for other shapes, k > n, or an item to exclude that is not there; DataError for NaN, rows of zeros and
    spaces whose rows are all the same.

    Source: Moschella et al., 2022, arXiv:2209.15430, section 4.1; linear CKA: Kornblith et al., 2019, arXiv:1905.00414.

    >>> Z = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    >>> found = latent_agreement(Z, Z)
    >>> found.mrr, found.jaccard, round(found.cka, 6)
    (1.0, 1.0, 1.0)
    """
    a, b = _compared(Za, Zb, exclude)
    items = _by_item(a, b, k, block, truncate_rank)
    return LatentAgreement(
        jaccard=float(items.jaccard.mean()),
        mrr=float(items.reciprocal_rank.mean()),
        top1=float((items.rank == 1).mean()),
        cosine=float(items.cosine.mean()),
        cka=_linear_cka(a, b),
        n=len(a),
        k=k,
    )


def item_agreement(
    Za: Rows,
    Zb: Rows,
    *,
    k: int = 10,
    exclude: Iterable[int] | np.ndarray | Tensor | None = None,
    block: int = 2048,
    truncate_rank: int | None = None,
) -> ItemAgreement:
    """What `latent_agreement` takes the means of, for each item that is not excluded, in order; the same arguments.

    >>> Z = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    >>> item_agreement(Z, Z, exclude=[0, 1]).rank.shape
    (38,)
    """
    return _by_item(*_compared(Za, Zb, exclude), k, block, truncate_rank)


def _compared(Za: Rows, Zb: Rows, exclude: Iterable[int] | np.ndarray | Tensor | None) -> tuple[Tensor, Tensor]:
    """Both spaces, checked, of the items that are left, in one width."""
    a, b = latents(Za, "Za").detach(), latents(Zb, "Zb").detach()
    if len(a) != len(b):
        raise InputError(f"the spaces must hold the same items in the same order, got {len(a)} and {len(b)} rows")
    if exclude is not None:
        left_out = exclude.cpu().numpy() if isinstance(exclude, Tensor) else np.asarray(list(exclude))
        if left_out.dtype == bool:
            raise InputError("exclude names items by their numbers, not by a mask; give np.flatnonzero(mask)")
        keep = torch.ones(len(a), dtype=torch.bool)
        for item in left_out.astype(np.int64).tolist():
            if not 0 <= item < len(a):
                raise InputError(f"item {item} cannot be excluded: there are items 0 to {len(a) - 1}")
            keep[item] = False
        a, b = a[keep.to(a.device)], b[keep.to(b.device)]
    if len(a) < 2:
        raise InputError(f"need at least two items that are not excluded, got {len(a)}")
    need_direction(a, "Za")
    need_direction(b, "Zb")
    b = b.to(a)
    if a.shape[1] != b.shape[1]:
        width = min(a.shape[1], b.shape[1], len(a))
        warnings.warn(
            f"the spaces have {a.shape[1]} and {b.shape[1]} coordinates: both are cut to {width} by their own principal "
            "components (PCA), which need not correspond. If these are relative vectors, give both spaces the same anchors",
            RelativeWarning,
            stacklevel=3,
        )
        parts = [LinearDictionary.principal_components(space, width).encode(space) for space in (a, b)]
        a, b = parts
    return a, b


def _by_item(a: Tensor, b: Tensor, k: int, block: int, truncate_rank: int | None) -> ItemAgreement:
    n = len(a)
    if not 1 <= k <= n:
        raise InputError(f"{n} items have 1 to {n} neighbours (an item is its own first), got k={k}")
    if block < 1 or (truncate_rank is not None and truncate_rank < 1):
        raise InputError(f"block and truncate_rank must be at least 1, got {block} and {truncate_rank}")
    one, two = unit(a), unit(b)
    at_once = min(block, chunk_rows(4.0 * one.element_size() * n))
    overlaps, ranks, cosines = [], [], []
    for start in range(0, n, at_once):
        rows = torch.arange(start, min(n, start + at_once), device=a.device)
        across = one[rows] @ two.mT
        own = across[torch.arange(len(rows)), rows]
        ranks.append(_ranks(across, own))
        found = across.topk(k, dim=1, sorted=False).indices
        near = torch.mm(two[rows], two.mT, out=across).topk(k, dim=1, sorted=False).indices
        both = torch.cat([found, near], dim=1).sort(dim=1).values
        shared = (both[:, 1:] == both[:, :-1]).sum(dim=1).double()
        overlaps.append(shared / (2 * k - shared))
        cosines.append(own.double())
    rank = torch.cat(ranks)
    counted = rank if truncate_rank is None else torch.where(rank <= truncate_rank, rank, torch.inf)
    return ItemAgreement(*(each.cpu().numpy() for each in (torch.cat(overlaps), rank, 1 / counted, torch.cat(cosines))))


def _ranks(across: Tensor, own: Tensor) -> Tensor:
    """1 + the items that are nearer + half of those that are as near."""
    nearer = (across > own[:, None]).sum(dim=1).double()
    level = (across == own[:, None]).sum(dim=1).double() - 1
    return 1 + nearer + level / 2


def _linear_cka(a: Tensor, b: Tensor) -> float:
    """|A^T B|^2 / (|A^T A| |B^T B|) of centred columns, in float64; it keeps no scale, so the fourth powers need not overflow."""
    size_a, size_b = (float(part.abs().max()) or 1.0 for part in (a, b))
    mean_a, mean_b = a.double().mean(dim=0) / size_a, b.double().mean(dim=0) / size_b
    cross, own_a, own_b = (torch.zeros(len(p), len(q), dtype=torch.float64, device=a.device) for p, q in
                           ((mean_a, mean_b), (mean_a, mean_a), (mean_b, mean_b)))  # fmt: skip
    for part in chunks(len(a), 16.0 * (a.shape[1] + b.shape[1])):
        x, y = a[part].double() / size_a - mean_a, b[part].double() / size_b - mean_b
        cross += x.mT @ y
        own_a += x.mT @ x
        own_b += y.mT @ y
    lengths = float(own_a.norm() * own_b.norm())
    if lengths == 0:
        raise DataError("all rows of one space are the same, so nothing can be found in it; the encoder has collapsed")
    return min(1.0, float(cross.square().sum()) / lengths)
