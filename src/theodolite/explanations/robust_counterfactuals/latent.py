"""Coordinates that a search may move in: the columns themselves, or the code of an autoencoder."""

__all__ = ["Coordinates", "LatentCoordinates"]

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.explanations.counterfactuals import Generator, Search
from theodolite.explanations.robust_counterfactuals.autoencoder import Autoencoder, train_autoencoder


class Coordinates:
    """The scaled columns themselves."""

    def _enter(self, search: Search, z: Tensor) -> Tensor:
        """Coordinates of points."""
        return z

    def _points(self, search: Search, at: Tensor) -> Tensor:
        """The points at coordinates, within the region."""
        return at

    def _pulled(self, search: Search, at: Tensor, slope: Tensor) -> Tensor:
        """A gradient by the points as one by their coordinates."""
        return slope

    def _uphill(self, search: Search, at: Tensor, slope: Tensor) -> Tensor:
        """Where to move for most gain at least cost, along columns that are not at their limit."""
        region = search.region
        blocked = ((at >= region.high) & (slope > 0)) | ((at <= region.low) & (slope < 0))
        return torch.where(blocked, 0.0, slope) / region.costs**2

    def _within(self, search: Search, at: Tensor) -> Tensor:
        """Coordinates of the nearest points within the region."""
        return search.region.project(at)


@dataclass(kw_only=True)
class LatentCoordinates(Coordinates, Generator):
    """The code of an autoencoder of the training rows; what is decoded is moved to the nearest point that may be.

    autoencoder: one that `train_autoencoder` made of the same rows and limits, None trains one in ``fit``.
    """

    autoencoder: Autoencoder | None = None
    _trained: Any = field(default=None, init=False, repr=False)

    def fit(self, model: Any, X_train: Any) -> "LatentCoordinates":
        """Keep the model, read the ranges of the training rows (n, d), and train the autoencoder where none was given."""
        super().fit(model, X_train)
        schema, given = self.schema, self.autoencoder
        if given is not None:
            held = tuple(np.flatnonzero(schema.immutable).tolist())
            if (given.features, given.held, given.groups) != (len(schema.low), held, schema.groups):
                raise InputError(
                    "the autoencoder was made for other columns, groups or immutable columns than these rows have"
                )
        self._trained = train_autoencoder(schema, self._train, seed=self.seed) if given is None else given
        return self

    @property
    def _coder(self) -> Autoencoder:
        found = self.autoencoder if self._trained is None else self._trained
        if found is None:
            raise InputError(
                f"{type(self).__name__} has no autoencoder before its fit; as the base of another search give it "
                "autoencoder=train_autoencoder(...)"
            )
        return found

    def _enter(self, search: Search, z: Tensor) -> Tensor:
        return self._coder.encode(z)

    def _points(self, search: Search, at: Tensor) -> Tensor:
        return search.region.project(self._coder.decode(at, search.region.start))

    def _pulled(self, search: Search, at: Tensor, slope: Tensor) -> Tensor:
        with torch.enable_grad():
            code = at.detach().requires_grad_(True)
            (out,) = torch.autograd.grad(self._points(search, code), code, slope)
        return out

    def _uphill(self, search: Search, at: Tensor, slope: Tensor) -> Tensor:
        return self._pulled(search, at, slope)

    def _within(self, search: Search, at: Tensor) -> Tensor:
        return at
