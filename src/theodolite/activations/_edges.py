"""Interactions between the features of neighbouring nodes, from the slopes of one section."""

__all__ = ["Path", "edge_blocks", "edge_strengths"]

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from theodolite.activations._basis import AT_ONCE, LayerBasis, batches, valid_positions
from theodolite.core.sections import Sections

Path = tuple[Sequence[float], Sequence[float]]
"""Where between the mean (0) and a row's features (1) slopes are taken, and with which weights."""


def edge_blocks(
    sections: Sections,
    x: Tensor,
    layer: int,
    bases: Sequence[LayerBasis],
    *,
    path: Path | None = None,
    mask: Bool[Tensor, "row position"] | None = None,
    n_probes: int | None = None,
    batch_size: int = 256,
    memory: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[slice, Tensor, Float[Tensor, "block row r"], int]]:
    """Attributions sum_s z_{s,j} d z'_{t,i} / d z_{s,j} of each row to features i of the next node, a block at a time.

    z are the features of node ``layer``, z' those of the next one. Gives the rows, the place p' r' of each of the block's
    (t, i), the attributions, and how many input positions the rows have. The slopes are those at the row, or their weighted
    mean along ``path``. With ``n_probes`` that many random signs stand in for the output positions.
    """
    before, after = bases[layer], bases[layer + 1]
    points = 1 if path is None else len(path[0])
    share = None if memory is None else max(1, memory // points)
    for batch, rows in enumerate(
        batches(sections, x, gradients=AT_ONCE, batch_size=max(1, batch_size // points), memory=share)
    ):
        (f,) = sections.nodes(x[rows], first=layer, last=layer)
        features = before.transform(f)
        valid = valid_positions(f, None if mask is None else mask[rows])
        if valid is not None:
            features = features * valid[..., None]
        start, weights = f, torch.ones(1, dtype=torch.float64, device=f.device)
        if path is not None:
            weights = torch.tensor(path[1], dtype=torch.float64, device=f.device)
            start = torch.cat([before.inverse_transform(before.transform(f) * alpha) for alpha in path[0]]).to(f)
        start = start.detach().requires_grad_()
        end = sections.run(start, layer, layer + 1, gradients=True)
        with torch.enable_grad():
            z = end @ after.C.to(end)
            z = z if z.ndim == 3 else z[:, None]
            kept = valid_positions(z, None if mask is None else mask[rows].repeat(points, 1))
            z = z if kept is None else z * kept[..., None]
        n, places, r = len(f), z.shape[1], z.shape[2]
        signs = _position_probes(places, n_probes, seed + batch).to(z)
        count = f[..., 0].numel() if valid is None else int(valid.sum())
        for first in range(0, len(signs) * r, AT_ONCE):
            index = torch.arange(first, min(first + AT_ONCE, len(signs) * r), device=z.device)
            vectors = torch.zeros(len(index), *z.shape, dtype=z.dtype, device=z.device)
            vectors[torch.arange(len(index)), :, :, index % r] = signs[index // r][:, None]
            (slope,) = torch.autograd.grad(z, [start], vectors, retain_graph=True, is_grads_batched=True)
            slope = slope.to(torch.float64).unflatten(1, (points, n))
            mean_slope = slope[:, 0] if points == 1 else torch.einsum("ba...,a->b...", slope, weights)
            if path is not None and points == 1:
                mean_slope = mean_slope * weights[0]
            parts = (mean_slope @ before.C_pinv.T.to(mean_slope)) * features
            yield rows, index, parts.sum(dim=2) if parts.ndim == 4 else parts, count


def edge_strengths(
    sections: Sections,
    x: Tensor,
    layer: int,
    bases: Sequence[LayerBasis],
    *,
    path: Path | None = None,
    mask: Bool[Tensor, "row position"] | None = None,
    n_probes: int | None = None,
    batch_size: int = 256,
    memory: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "r_next r"]:
    """E_ij = (1/(n p)) sum over rows and output positions t of (sum_s z_{s,j} d z'_{t,i} / d z_{s,j})^2; no root.

    Sums over input positions s are taken before the square, p is the number of input positions. With ``n_probes`` the sum
    over t is replaced by that many random signs over t (unbiased). Options as for `edge_blocks`.
    """
    after = bases[layer + 1]
    total = torch.zeros(after.rank, bases[layer].rank, dtype=torch.float64, device=after.C.device)
    count, seen = 0, -1
    for rows, index, parts, places in edge_blocks(
        sections,
        x,
        layer,
        bases,
        path=path,
        mask=mask,
        n_probes=n_probes,
        batch_size=batch_size,
        memory=memory,
        seed=seed,
    ):
        total.index_add_(0, index % after.rank, parts.square().sum(dim=1))
        if rows.start != seen:
            count, seen = count + places, rows.start
    return total / count


def _position_probes(places: int, n_probes: int | None, seed: int) -> Float[Tensor, "probe place"]:
    if n_probes is None or places == 1:
        return torch.eye(places)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (n_probes, places), generator=generator) * 2.0 - 1) / math.sqrt(n_probes)
