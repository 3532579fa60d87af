"""TabularNCD, PBN's forerunner, which learns clusters from pairs of similar rows. Experimental."""

__all__ = ["TabularNCD"]

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError, TrainingCollapsedError
from theodolite.core.parallel import one_thread
from theodolite.data.novel_classes.kmeans import check_width
from theodolite.data.novel_classes.labels import check_count, labelled
from theodolite.data.novel_classes.network import batches, hidden_widths, layers


class TabularNCD(BaseEstimator):
    """Experimental: one encoder with two heads, one that names known classes and one that gives the new clusters.

    The first head has a class more, "unlabelled", and learns by cross-entropy. The second learns from pairs of unlabelled
    rows of a batch: a row's ``top_share`` most similar rows (cosine of the codes) are to share its cluster, all others not
    (binary cross-entropy of the inner product of their cluster probabilities). Both are to answer alike for a row and for a
    point between it and one of its n_neighbors nearest rows of the same class, or of no class; w weighs each first loss
    against this second one.

    What is told of it in the PBN paper does not settle every detail, and its pretraining by masked columns is left out, so
    published numbers are not to be expected; `PBN` is the better choice. fit(X (n, p), y (n,)): y is -1 for unlabelled rows.
    Afterwards labels_ (cluster of each unlabelled row, in order) and classes_; empty clusters may remain.

    Source: Troisemaine et al., 2022, arXiv:2209.01217, as compared with in 2023, arXiv:2311.05440.
    """

    def __init__(
        self,
        n_novel: int | str,
        *,
        latent_dim: int | None = None,
        w: float = 0.8,
        top_share: float = 0.1,
        n_neighbors: int = 5,
        lr: float = 1e-3,
        dropout: float = 0.1,
        epochs: int = 100,
        batch_size: int = 512,
        seed: int = 0,
    ) -> None:
        self.n_novel = n_novel
        self.latent_dim = latent_dim
        self.w = w
        self.top_share = top_share
        self.n_neighbors = n_neighbors
        self.lr = lr
        self.dropout = dropout
        self.epochs = epochs
        self.batch_size = batch_size
        self.seed = seed

    def fit(self, X: Any, y: Any) -> "TabularNCD":
        """Train on all rows of X (n, p) and cluster those whose label in y (n,) is -1."""
        data = labelled(X, y)
        k = check_count(self.n_novel, int((~data.known).sum()))
        if k is None:
            raise InputError("TabularNCD needs a number of clusters; estimate it with estimate_n_clusters or PBN")
        if not 0 <= self.w <= 1 or not 0 < self.top_share < 1 or self.n_neighbors < 1:
            raise InputError(
                f"need 0 <= w <= 1, 0 < top_share < 1 and n_neighbors >= 1; got {self.w}, {self.top_share}, {self.n_neighbors}"
            )
        if not self.lr > 0 or not 0 <= self.dropout < 1 or self.epochs < 1 or self.batch_size < 2:
            raise InputError(
                f"need lr > 0, 0 <= dropout < 1, epochs >= 1 and batch_size >= 2; got {self.lr}, {self.dropout}, "
                f"{self.epochs}, {self.batch_size}"
            )
        if not len(data.classes):
            raise DataError("no row has a known class, so there is nothing to learn from; cluster with k-means instead")
        self.n_features_in_, self.classes_ = data.x.shape[1], data.classes
        scale = data.x.std(axis=0)
        self._shift, self._scale = data.x.mean(axis=0), np.where(scale > 0, scale, 1.0)
        latent = self.latent_dim or max(1, round(0.75 * data.x.shape[1]))
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(self.seed)
            widths = [data.x.shape[1], *hidden_widths(data.x.shape[1]), latent]
            self.encoder_ = layers(widths, self.dropout)
            self.classifier_, self.clusters_ = nn.Linear(latent, len(data.classes) + 1), nn.Linear(latent, k)
            self._train(self._scaled(data.x), np.where(data.known, data.y, len(data.classes)), data.known)
        self.labels_ = self.predict(data.x[~data.known])
        return self

    def predict(self, X: Any) -> Int[np.ndarray, " row"]:
        """The cluster with the largest score for each row of X (n, p), taken to be of a new class."""
        check_is_fitted(self, "clusters_")
        with torch.no_grad():
            scores = self.clusters_(self.encoder_(self._scaled(check_width(X, self.n_features_in_))))
        return scores.argmax(dim=1).numpy()

    def _scaled(self, x: Float[np.ndarray, "row column"]) -> Float[Tensor, "row column"]:
        return torch.as_tensor((x - self._shift) / self._scale, dtype=torch.float32)

    def _train(self, x: Tensor, y: Int[np.ndarray, " row"], known: Bool[np.ndarray, " row"]) -> None:
        near = self._neighbours(x.numpy(), y)
        target, new = torch.as_tensor(y), torch.as_tensor(~known)
        order = torch.Generator().manual_seed(self.seed)
        parts = (self.encoder_, self.classifier_, self.clusters_)
        optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=self.lr, fused=True)
        self.encoder_.train()
        for epoch in range(self.epochs):
            total = torch.zeros(())
            for rows in batches(len(x), self.batch_size, order):
                mate = near[rows, torch.randint(near.shape[1], (len(rows),), generator=order)]
                between = x[rows] + torch.rand(len(rows), 1, generator=order) * (x[mate] - x[rows])
                z, z_between = self.encoder_(x[rows]), self.encoder_(between)
                scores = self.classifier_(z)
                alike = F.mse_loss(scores.softmax(dim=1), self.classifier_(z_between).softmax(dim=1))
                loss = self.w * F.cross_entropy(scores, target[rows]) + (1 - self.w) * alike
                if int(new[rows].sum()) > 1:
                    codes = z[new[rows]]
                    p, q = (self.clusters_(one[new[rows]]).softmax(dim=1) for one in (z, z_between))
                    pairs = pair_loss(p, similar_pairs(codes.detach(), self.top_share))
                    loss = loss + self.w * pairs + (1 - self.w) * F.mse_loss(p, q)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
            if not bool(torch.isfinite(total)):
                raise TrainingCollapsedError(
                    f"the loss is no longer finite in epoch {epoch + 1}; try a smaller step size than lr={self.lr}"
                )
        self.encoder_.eval()

    def _neighbours(self, x: np.ndarray, y: np.ndarray) -> Int[Tensor, "row neighbour"]:
        """Nearest rows of the same class (or of no class) of each row; a lone row is its own neighbour."""
        out = np.tile(np.arange(len(x))[:, None], self.n_neighbors)
        for c in np.unique(y):
            rows = np.flatnonzero(y == c)
            count = min(self.n_neighbors, len(rows) - 1)
            if count:
                near = NearestNeighbors(n_neighbors=count).fit(x[rows]).kneighbors(return_distance=False)
                out[rows] = rows[near[:, np.arange(self.n_neighbors) % count]]
        return torch.as_tensor(out)


def similar_pairs(codes: Float[Tensor, "row latent"], share: float) -> Bool[Tensor, "row row"]:
    """For each row which others are among the ``share`` of rows most similar to it by cosine, at least one."""
    unit = F.normalize(codes, dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    count = max(1, round(share * (len(codes) - 1)))
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, similarity.topk(count, dim=1).indices, True)


def pair_loss(p: Float[Tensor, "row cluster"], same: Bool[Tensor, "row row"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of the probability p_i . p_j that two different rows share a cluster."""
    together = (p @ p.T).clamp(1e-6, 1 - 1e-6)
    other = ~torch.eye(len(p), dtype=torch.bool)
    return F.binary_cross_entropy(together[other], same[other].to(p.dtype))
