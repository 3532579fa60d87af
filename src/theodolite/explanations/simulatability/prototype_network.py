"""A classifier that answers by likeness to training examples, which it can show.

    z = sigmoid(W extractor(x)),   s_j = exp(-||z - p_j||^2),   logit_c = max over the prototypes j of class c of s_j
    loss = cross-entropy - 0.1 mean_i min(min over prototypes of other classes ||z_i - p_j||^2, 4)

The paper trains 300 epochs with step size .001 in batches of 1,000; on some thousand rows that is too few steps to move any
prototype, so the defaults take larger ones.

After epoch `push_from` each prototype is set, every epoch, to the nearest training latent of its class that no other has taken.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (Section 3.4, Appendix B).
"""

__all__ = ["PrototypeNetwork"]

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError, TrainingCollapsedError
from theodolite.core.train import Recipe, train
from theodolite.core.view import ModelView

_HIDDEN, _FARTHEST, _SEPARATION = 50, 4.0, 0.1


class PrototypeNetwork(ClassifierMixin, BaseEstimator):
    """Classifier by the nearest prototype of each class.

    n_per_class: prototypes of a class. latent: dimensions of z. similarity: "exp" exp(-d), or "log" log(1 + 1 / (d + 1e-4)).
    The latent layer is first trained as a black box with a linear head. freeze_extractor: the extractor keeps base's weights
    (without a base, those it has before prototypes are trained). Fitted: prototypes_, the row of X that each one is;
    prototype_classes_; classes_.
    """

    def __init__(
        self,
        n_per_class: int = 20,
        latent: int = 16,
        *,
        similarity: Literal["exp", "log"] = "exp",
        epochs: int = 100,
        push_from: int = 80,
        lr: float = 0.05,
        batch_size: int = 250,
        freeze_extractor: bool = False,
        seed: int = 0,
    ) -> None:
        self.n_per_class = n_per_class
        self.latent = latent
        self.similarity = similarity
        self.epochs = epochs
        self.push_from = push_from
        self.lr = lr
        self.batch_size = batch_size
        self.freeze_extractor = freeze_extractor
        self.seed = seed

    def fit(self, X: Any, y: Any, base: Any = None) -> "PrototypeNetwork":
        """Fit to rows X (n, features) of numbers and labels y (n,).

        base: a trained black box. Of an nn.Sequential that starts Linear(features, 50), ReLU, Linear(50, 50), ReLU the
        extractor takes the weights; of another network or estimator it learns the answers first; None: the labels. Raises
        DataError for a class with fewer rows than prototypes, TrainingCollapsedError for a loss that is not finite.
        """
        rows = np.asarray(X, dtype=np.float64)
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise DataError(f"X must be a table of finite numbers, got shape {rows.shape}")
        if self.n_per_class < 1 or self.latent < 1 or self.epochs < 1 or self.similarity not in ("exp", "log"):
            raise InputError("need n_per_class, latent and epochs of at least 1, and similarity 'exp' or 'log'")
        self.classes_, index = np.unique(np.asarray(y), return_inverse=True)
        counts = np.bincount(index)
        if len(counts) < 2 or len(index) != len(rows) or counts.min() < self.n_per_class:
            raise DataError(
                f"each class needs at least {self.n_per_class} rows for as many prototypes, and there must be two classes; "
                f"got {counts.tolist()} rows"
            )
        x, target = torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(index)
        self.n_features_in_ = x.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.extractor_, same = self._extractor(x.shape[1], base)
            self.layer_ = nn.Linear(_HIDDEN, self.latent)
            whole = nn.Sequential(self.extractor_, self.layer_, nn.Sigmoid(), nn.Linear(self.latent, len(counts)))
            # requires_grad set on the module itself would be an attribute that no optimiser reads
            self.extractor_.requires_grad_(not (self.freeze_extractor and same))
            answers = target if base is None or same else self._answers(base, rows)
            train(whole, x, answers, recipe=Recipe(epochs=8, batch_size=128, lr=3e-3, seed=self.seed))
            self.extractor_.requires_grad_(not self.freeze_extractor)
        self.prototype_classes_ = np.repeat(np.arange(len(counts)), self.n_per_class)
        with torch.no_grad():
            z = self._latents(x)
            start = [
                KMeans(self.n_per_class, n_init=1, random_state=self.seed)  # type: ignore[arg-type]
                .fit(z[target == c].numpy())
                .cluster_centers_
                for c in range(len(counts))
            ]
        self.vectors_ = nn.Parameter(torch.as_tensor(np.concatenate(start), dtype=torch.float32))
        self._train(x, target)
        return self

    def _extractor(self, features: int, base: Any) -> tuple[nn.Sequential, bool]:
        """The extractor, and whether it has base's weights."""
        wanted = nn.Sequential(nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU())
        parts = list(base.children())[:4] if isinstance(base, nn.Sequential) else []
        shapes = [[tuple(p.shape) for p in nn.ModuleList(some).parameters()] for some in (parts, list(wanted))]
        if [type(part) for part in parts] != [type(part) for part in wanted] or shapes[0] != shapes[1]:
            return wanted, False
        wanted.load_state_dict(nn.Sequential(*parts).state_dict())
        return wanted, True

    def _answers(self, base: Any, rows: np.ndarray) -> Tensor:
        """Classes that a black box gives the rows."""
        if isinstance(base, nn.Module):
            found = self.classes_[ModelView(base).predict(torch.as_tensor(rows, dtype=torch.float32)).numpy()]
        elif hasattr(base, "predict"):
            found = np.asarray(base.predict(rows))
        else:
            raise InputError("base must be a network or have predict; leave it out to train an extractor on the labels")
        if not np.isin(found, self.classes_).all():
            raise DataError(f"base answers classes that y does not have; y has {self.classes_.tolist()}")
        return torch.as_tensor(np.searchsorted(self.classes_, found))

    def _train(self, x: Tensor, target: Tensor) -> None:
        moving = [
            p for p in (*self.extractor_.parameters(), *self.layer_.parameters(), self.vectors_) if p.requires_grad
        ]
        step = torch.optim.SGD(moving, lr=self.lr, momentum=0.9)
        generator = torch.Generator().manual_seed(self.seed)
        own = torch.as_tensor(self.prototype_classes_)
        for epoch in range(self.epochs):
            for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                distance = self._distances(self._latents(x[part]))
                wrong = distance.masked_fill(own == target[part][:, None], torch.inf).amin(dim=1)
                loss = F.cross_entropy(self._logits(distance), target[part])
                loss = loss - _SEPARATION * wrong.clamp(max=_FARTHEST).mean()
                if not bool(torch.isfinite(loss)):
                    raise TrainingCollapsedError("the prototype network's loss is not finite; lower lr")
                step.zero_grad()
                loss.backward()
                step.step()
            if epoch >= self.push_from or epoch == self.epochs - 1:
                self._push(x, target)

    def _push(self, x: Tensor, target: Tensor) -> None:
        """Set each prototype, nearest first come, to the closest training latent of its class that is still free."""
        with torch.no_grad():
            z = self._latents(x)
            distance = self._distances(z)
            distance[target[:, None] != torch.as_tensor(self.prototype_classes_)] = torch.inf
            rows = np.empty(len(self.vectors_), dtype=np.int64)
            for j in range(len(self.vectors_)):
                rows[j] = int(distance[:, j].argmin())
                distance[rows[j]] = torch.inf
            self.vectors_.copy_(z[torch.as_tensor(rows)])
        self.prototypes_ = rows

    def _latents(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.layer_(self.extractor_(x)))

    def _distances(self, z: Tensor) -> Tensor:
        squared = (z**2).sum(1, keepdim=True) - 2 * z @ self.vectors_.T + (self.vectors_**2).sum(1)
        return squared.clamp(min=0)

    def _similar(self, distance: Tensor) -> Tensor:
        return torch.exp(-distance) if self.similarity == "exp" else torch.log1p(1 / (distance + 1e-4))

    def _logits(self, distance: Tensor) -> Tensor:
        return self._similar(distance).reshape(len(distance), -1, self.n_per_class).amax(dim=2)

    def latents(self, X: Any) -> Float[np.ndarray, "row latent"]:
        """z of each row."""
        with torch.no_grad():
            return self._latents(self._rows(X)).numpy()

    def similarities(self, X: Any) -> Float[np.ndarray, "row prototype"]:
        """Similarity of each row to each prototype."""
        with torch.no_grad():
            return self._similar(self._distances(self._latents(self._rows(X)))).numpy()

    def predict_proba(self, X: Any) -> Float[np.ndarray, "row class"]:
        """Probabilities of the classes."""
        with torch.no_grad():
            return torch.softmax(self._logits(self._distances(self._latents(self._rows(X)))), 1).double().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def _rows(self, X: Any) -> Tensor:
        if not hasattr(self, "vectors_"):
            raise InputError("the prototype network is not fitted yet; call fit(X, y)")
        rows = torch.as_tensor(np.asarray(X, dtype=np.float64), dtype=torch.float32)
        if rows.ndim != 2 or rows.shape[1] != self.n_features_in_:
            raise InputError(f"X must be (n, {self.n_features_in_}), got {tuple(rows.shape)}")
        return rows
