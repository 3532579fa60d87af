"""Similarities of latent vectors to anchors, and what latent vectors must be."""

__all__ = ["SIMILARITIES", "Rows", "latents", "relative"]

import math
import warnings

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.core.capture import check_finite
from theodolite.core.errors import DataError, InputError

SIMILARITIES = ("cosine", "inner", "basis", "euclidean")

Rows = Tensor | np.ndarray | pd.DataFrame
"""Latent vectors (row, width). The shape is checked with an error that says what to do, so it is not in the type."""


def relative(Z: Rows, anchors: Rows, *, similarity: str = "cosine") -> Float[Tensor, "row anchor"]:
    """Similarities of each row of ``Z`` (row, width) to each of ``anchors`` (anchor, width), in their order; differentiable.

    similarity: "cosine" (eq. 1), "inner" x . a / sqrt(width), "basis" the least-squares coefficients b of x on the anchors
    (anchors^T b = x where they span; the shortest b where they are more than they need be), "euclidean" -|x - a|.

    Raises InputError for a wrong shape, DataError for NaN and, under the cosine, for rows of zeros.

    Source: Moschella et al., 2022, arXiv:2209.15430, section 3.

    >>> relative(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 5.0], [-1.0, 0.0]])).tolist()
    [[1.0, 0.0]]
    """
    if similarity not in SIMILARITIES:
        raise InputError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    rows, listed = latents(Z, "Z"), latents(anchors, "anchors")
    if rows.shape[1] != listed.shape[1]:
        raise InputError(
            f"rows of width {rows.shape[1]} cannot be compared with anchors of width {listed.shape[1]}: encode the anchor "
            "samples with the same model as the rows"
        )
    listed = listed.to(rows)
    if similarity == "cosine":
        need_direction(rows, "Z")
        need_direction(listed, "anchors")
    return similarities(rows, listed, similarity)


def latents(Z: Rows, name: str = "Z") -> Tensor:
    """Latent vectors as a tensor (row, width) of float32 or float64, checked."""
    if not isinstance(Z, Tensor):
        Z = np.asarray(Z)
        if Z.dtype.kind not in "biuf":
            raise InputError(f"{name} must hold numbers, got {Z.dtype}")
        if min(Z.strides, default=0) < 0:  # a view read backwards, which no tensor can be
            Z = Z.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # a mapped file; nothing here writes
        tensor = torch.as_tensor(Z)
    if tensor.ndim == 3:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, one vector for each token or place: pool them to (rows, width) first "
            "(theodolite.activations.relative.pool_tokens)"
        )
    if tensor.ndim != 2:
        raise InputError(f"{name} must be latent vectors (rows, width), got shape {tuple(tensor.shape)}")
    if 0 in tensor.shape:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: need at least one row and one coordinate")
    check_finite(tensor.detach(), name)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def need_direction(rows: Tensor, name: str) -> None:
    """Raise DataError naming the rows whose direction, and so whose cosine, is undefined."""
    empty = (rows.detach().abs().amax(dim=1) == 0).nonzero().ravel().tolist()
    if empty:
        shown = ", ".join(map(str, empty[:5])) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(
            f"{name}: row{'s' if len(empty) > 1 else ''} {shown} {'are' if len(empty) > 1 else 'is'} all zeros (after centring, "
            "where that is asked for), so the cosine is undefined; leave them out or use similarity='euclidean'"
        )


def similarities(rows: Tensor, anchors: Tensor, similarity: str) -> Float[Tensor, "row anchor"]:
    """`relative` without its checks; rows of zeros have cosine 0."""
    if similarity == "cosine":
        return unit(rows) @ unit(anchors).mT
    if similarity == "inner":
        return rows @ anchors.mT / math.sqrt(rows.shape[1])
    if similarity == "basis":
        # in float64: coefficients on nearly dependent anchors are large and cancel
        return (rows.double() @ inverse(anchors)).to(rows)
    return -torch.cdist(rows, anchors, compute_mode="donot_use_mm_for_euclid_dist")


def inverse(anchors: Tensor) -> Float[Tensor, "width anchor"]:
    """The pseudo-inverse in float64; what differs from dependent anchors by rounding counts as dependent.

    Anchors about their own mean always depend on each other.
    """
    rounding = max(anchors.shape) * torch.finfo(anchors.dtype).eps
    return torch.linalg.pinv(anchors.double(), rtol=rounding)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1 (zeros stay); the largest coordinate is taken out first, so that no square over- or underflows."""
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    return torch.nn.functional.normalize(rows / torch.where(largest > 0, largest, 1.0), dim=1)
