"""Latent vectors to relative ones and back: an estimator on arrays and tensors, and a dictionary of hidden space."""

__all__ = ["PREPROCESSES", "RelativeProjection"]

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from theodolite.activations.relative.anchors import select_anchors
from theodolite.activations.relative.similarity import (
    SIMILARITIES,
    inverse,
    latents,
    need_direction,
    similarities,
    unit,
)
from theodolite.core.errors import InputError
from theodolite.core.memory import chunks

PREPROCESSES = ("none", "center", "standardize")


class RelativeProjection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Coordinates of latent vectors by their similarities to anchors of the same space.

    For a second model fit a second projection on its own latents of the same samples with the first one's ``anchor_index_``
    (for samples of other kinds, such as translations, with a list of its own in the same order): the two outputs compare
    column by column.

    n_anchors, selection: how many anchors, chosen by `select_anchors` where ``fit`` is given no index. similarity: see
    `relative`. preprocess: "none" as in the paper; "center" takes the mean of the anchors off; "standardize" also divides
    each coordinate by its standard deviation over the anchors (for hidden states of transformers). normalize: scale each
    output to length 1, as a linear model on it wants; the similarities are not scaled otherwise. quantize: round to
    multiples of this number, with the gradient of no rounding. subspaces: cut the coordinates into so many blocks with
    similarities of their own, side by side in the output.

    Attributes: ``anchor_index_`` (m,) rows of the data that ``fit`` was given, ``anchors_`` (m, width) as they were given,
    ``mean_`` and ``scale_`` (width,) of the preprocessing, ``n_features_in_``. All are arrays, so that skops can store them.

    It is a dictionary of hidden space as well (`theodolite.core.dictionary`): ``directions``, ``encode``, ``decode``.

    Source: Moschella et al., 2022, arXiv:2209.15430.

    >>> Z = np.random.default_rng(0).normal(size=(50, 8))
    >>> turn = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> one = RelativeProjection(10).fit(Z)
    >>> two = RelativeProjection().fit(3 * Z @ turn, anchor_index=one.anchor_index_)
    >>> bool(np.allclose(one.transform(Z), two.transform(3 * Z @ turn), atol=1e-6))
    True
    """

    def __init__(
        self,
        n_anchors: int = 300,
        *,
        selection: str = "uniform",
        similarity: str = "cosine",
        preprocess: str = "none",
        normalize: bool = False,
        quantize: float | None = None,
        subspaces: int = 1,
        seed: int = 0,
    ) -> None:
        self.n_anchors = n_anchors
        self.selection = selection
        self.similarity = similarity
        self.preprocess = preprocess
        self.normalize = normalize
        self.quantize = quantize
        self.subspaces = subspaces
        self.seed = seed

    def fit(self, Z: Any, y: Any = None, *, anchor_index: Any = None) -> "RelativeProjection":
        """Take the anchors out of ``Z`` (row, width): the rows ``anchor_index`` in that order, or by the selection.

        y: classes, for "stratified" alone. Statistics of the preprocessing are of the anchors only.
        """
        self._check_options()
        rows = self._take(Z, reset=True).detach()
        if anchor_index is None:
            index = select_anchors(rows, self.n_anchors, method=self.selection, y=y, seed=self.seed)
        else:
            index = _checked_index(anchor_index, len(rows))
        width = rows.shape[1]
        if not 1 <= self.subspaces <= width:
            raise InputError(f"{width} coordinates can be cut into 1 to {width} subspaces, got {self.subspaces}")
        if self.preprocess != "none" and len(index) < 2:
            raise InputError(
                f"preprocess={self.preprocess!r} takes the anchors' mean off, so it needs at least 2 anchors"
            )
        anchors = rows[torch.as_tensor(index, device=rows.device)]
        exact = anchors.double()
        mean, scale = torch.zeros_like(exact[0]), torch.ones_like(exact[0])
        if self.preprocess != "none":
            mean = exact.mean(dim=0)
        if self.preprocess == "standardize":
            deviation = exact.std(dim=0, correction=0)
            # a coordinate that does not vary beyond rounding is left as it is
            scale = torch.where(deviation > 1e-6 * exact.abs().amax(dim=0), deviation, 1.0)
        self.anchor_index_ = index
        self.anchors_ = anchors.cpu().numpy()
        self.mean_, self.scale_ = (one.to(anchors.dtype).cpu().numpy() for one in (mean, scale))
        self._n_features_out = len(index) * self.subspaces
        if self.similarity == "cosine":
            for block in self._blocks(self._prepared(anchors)):
                need_direction(block, "anchors")
        return self

    def transform(self, Z: Any) -> Any:
        """Relative vectors (row, anchors x subspaces), float32, of the kind (array or tensor) that ``Z`` (row, width) is.

        Gradients go through a tensor. Raises InputError for another width than fitted, DataError for NaN and for zero rows.
        """
        check_is_fitted(self)
        rows = self._take(Z, reset=False)
        prepared = self._prepared(rows)
        if self.similarity == "cosine":
            for block in self._blocks(prepared):
                need_direction(block, "Z")
        out = self._similar(prepared)
        return out if isinstance(Z, Tensor) else out.numpy()

    @property
    def directions(self) -> Float[Tensor, "code width"]:
        """The anchors, about the mean that the preprocessing takes off; of several subspaces one block each."""
        check_is_fitted(self)
        whole = torch.as_tensor(self.anchors_ - self.mean_).float()
        if self.subspaces == 1:
            return whole
        out = torch.zeros(self.subspaces, *whole.shape)
        for block, part in enumerate(self._parts(whole.shape[1])):
            out[block, :, part] = whole[:, part]
        return out.flatten(0, 1)

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row code"]:
        """Relative vectors of activations with any leading axes; a vector without direction has cosine 0 to every anchor."""
        check_is_fitted(self)
        flat = x.reshape(-1, x.shape[-1])
        return self._similar(self._prepared(flat)).reshape(*x.shape[:-1], self._n_features_out)

    def decode(self, codes: Float[Tensor, "*row code"]) -> Float[Tensor, "*row width"]:
        """Activations of relative vectors by least squares on the anchors.

        Exact for "inner", "basis" and "euclidean" where the anchors span; the cosine keeps no length, for which the mean
        length of the anchors is put. Raises InputError where ``normalize`` took away a length that is needed.
        """
        check_is_fitted(self)
        if self.normalize and self.similarity != "cosine":
            raise InputError(
                f"{self.similarity!r} vectors cannot be decoded once they are scaled to length 1; use normalize=False"
            )
        m = len(self.anchors_)
        flat = codes.reshape(-1, codes.shape[-1])
        if flat.shape[1] != self._n_features_out:
            raise InputError(f"codes of this projection have width {self._n_features_out}, got {flat.shape[1]}")
        anchors = self._prepared(torch.as_tensor(self.anchors_).to(flat))
        pieces = [self._restored(r, a) for r, a in zip(flat.split(m, dim=1), self._blocks(anchors), strict=True)]
        prepared = torch.cat(pieces, dim=1)
        mean, scale = (torch.as_tensor(one).to(flat) for one in (self.mean_, self.scale_))
        return (prepared * scale + mean).reshape(*codes.shape[:-1], len(self.mean_))

    def _restored(self, r: Tensor, anchors: Tensor) -> Tensor:
        """Latents (row, width) of one block from similarities (row, anchor)."""
        if self.similarity == "basis":
            return r @ anchors
        if self.similarity == "inner":
            return r @ inverse(anchors).mT.to(r) * math.sqrt(anchors.shape[1])
        if self.similarity == "euclidean":
            # |x - a_j|^2 less its mean over j is linear in x
            squared, lengths = r.square(), anchors.square().sum(dim=1)
            right = (lengths - lengths.mean()) - (squared - squared.mean(dim=1, keepdim=True))
            return right @ inverse(2 * (anchors - anchors.mean(dim=0))).mT.to(r)
        direction = r @ inverse(unit(anchors)).mT.to(r)
        if self.normalize:
            direction = unit(direction)
        return direction * anchors.norm(dim=1).mean()

    def _similar(self, prepared: Tensor) -> Tensor:
        anchors = self._prepared(torch.as_tensor(self.anchors_).to(prepared))
        pairs = list(zip(self._blocks(prepared), self._blocks(anchors), strict=True))
        if prepared.requires_grad:
            out = torch.cat([similarities(x, a, self.similarity) for x, a in pairs], dim=1)
        else:
            out = torch.cat([_in_chunks(x, a, self.similarity) for x, a in pairs], dim=1)
        if self.quantize is not None:
            out = out + ((out / self.quantize).round() * self.quantize - out).detach()
        if self.normalize:
            out = unit(out)
        return out.float()

    def _prepared(self, rows: Tensor) -> Tensor:
        if self.preprocess == "none":
            return rows
        mean, scale = (torch.as_tensor(one).to(rows) for one in (self.mean_, self.scale_))
        return (rows - mean) / scale

    def _blocks(self, rows: Tensor) -> list[Tensor]:
        return [rows[:, part] for part in self._parts(rows.shape[1])]

    def _parts(self, width: int) -> list[slice]:
        ends = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(width), self.subspaces))]).tolist()
        return [slice(a, b) for a, b in pairwise(ends)]

    def _take(self, Z: Any, *, reset: bool) -> Tensor:
        """Rows as a tensor, with the width remembered or compared."""
        shape = getattr(Z, "shape", ())
        if not reset and len(shape) == 2 and shape[1] != self.n_features_in_:
            raise InputError(
                f"X has {shape[1]} features, but RelativeProjection is expecting {self.n_features_in_} features as input: fit "
                "one projection for each model, all with the same anchor_index"
            )
        if not isinstance(Z, Tensor):
            # names of columns, lists and sparse matrices are scikit-learn's matter; NaN is told below, with its row
            return latents(np.asarray(validate_data(self, Z, reset=reset, ensure_all_finite=False, allow_nd=True)))
        rows = latents(Z)
        if reset:
            self.n_features_in_ = rows.shape[1]
        return rows

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # float32, whatever comes in
        return tags

    def _check_options(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise InputError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {self.similarity!r}")
        if self.preprocess not in PREPROCESSES:
            raise InputError(f"preprocess must be none, center or standardize, got {self.preprocess!r}")
        if self.quantize is not None and not self.quantize > 0:
            raise InputError(f"quantize is the width of a bin, above 0; got {self.quantize}")


def _checked_index(anchor_index: Any, rows: int) -> np.ndarray:
    index = np.asarray(anchor_index.cpu() if isinstance(anchor_index, Tensor) else anchor_index)
    if index.ndim != 1 or len(index) == 0 or not np.issubdtype(index.dtype, np.integer):
        raise InputError(f"anchor_index must be a list of row numbers, got {anchor_index!r}")
    outside = index[(index < 0) | (index >= rows)]
    if len(outside):
        raise InputError(f"anchor_index names row {outside[0]}, but there are rows 0 to {rows - 1} only")
    values, counts = np.unique(index, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"anchor_index names row {values[counts > 1][0]} more than once; anchors must differ")
    return index.astype(np.int64)


def _in_chunks(rows: Tensor, anchors: Tensor, similarity: str) -> Tensor:
    if similarity == "basis":  # one pseudo-inverse for all
        return similarities(rows, anchors, similarity)
    cost = rows.element_size() * (3.0 * rows.shape[1] + len(anchors))
    return torch.cat([similarities(rows[part], anchors, similarity) for part in chunks(len(rows), cost)])
