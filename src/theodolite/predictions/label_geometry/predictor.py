"""Answer with the weighted Frechet mean of the labels that a classifier knows."""

__all__ = ["FrechetHead", "FrechetPredictor", "frechet_mean"]

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunk_rows, chunks
from theodolite.predictions.label_geometry.metric import Label, LabelMetric, plain
from theodolite.predictions.label_geometry.trees import TreeSums

TEMPERATURES = (0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0, 2.828, 4.0)
_TREE_NODES = 5000
_TREE_BYTES = 1 << 28


class FrechetPredictor(BaseEstimator):
    """y(x) = argmin over all labels y of sum_i P(l_i | x) d(y, l_i)^2; with all distances equal it is argmax.

    metric: distances between all labels, by name. observed: the labels that the probabilities are about, in the order of
    their columns. temperature: probabilities are sharpened to p^(1/T) / sum, which is softmax(logits / T).
    chunk_size: columns of scores held at a time. Ties go to the lowest index; `ties_` counts them in the last prediction.
    Large trees are answered without any matrix, by rerooting.

    Source: Roberts et al., 2023, arXiv:2307.12226, eq. 1.

    >>> metric = LabelMetric.from_function(lambda a, b: abs(a - b), [0, 1, 2])
    >>> FrechetPredictor(metric, [0, 2]).predict(np.array([[0.5, 0.5], [0.9, 0.1]])).tolist()
    [1, 0]
    """

    def __init__(
        self, metric: LabelMetric, observed: Sequence[Label], temperature: float = 1.0, chunk_size: int = 4096
    ) -> None:
        self.metric = metric
        self.observed = observed
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._columns = metric.index(observed)
        if len(set(self._columns.tolist())) != len(self._columns) or not len(self._columns):
            raise DataError("observed labels must be different, and at least one")
        if not temperature > 0 or chunk_size < 1:
            raise InputError(f"need temperature > 0 and chunk_size >= 1, got {temperature} and {chunk_size}")
        self._tree = TreeSums(metric) if metric.is_tree and len(metric) >= _TREE_NODES else None
        self._squared = None if self._tree is not None else metric.squared(observed)
        if self._squared is not None and len(metric) > 2:
            off = self._squared[self._squared > 0]
            if off.size and np.ptp(off) <= 1e-9 * off.max():
                warnings.warn(
                    "all distances are equal, so only observed labels can be predicted, as by argmax",
                    UserWarning,
                    stacklevel=2,
                )

    @classmethod
    def from_estimator(cls, estimator: Any, metric: LabelMetric, **options: Any) -> "FrechetPredictor":
        """For the columns of a fitted classifier's predict_proba, matched by name through its ``classes_``."""
        return cls(metric, [plain(c) for c in estimator.classes_], **options)

    def _weights(self, probabilities: Any) -> np.ndarray:
        p = np.asarray(probabilities, dtype=np.float64)
        k = len(self._columns)
        if p.ndim != 2 or p.shape[1] != k:
            raise InputError(f"need one column for each of the {k} observed labels, got an array of shape {p.shape}")
        if not np.isfinite(p).all() or (p < 0).any() or (np.abs(p.sum(axis=1) - 1) > 1e-3).any():
            raise InputError(
                "rows are not probabilities (not negative, summing to 1); they look like logits: pass softmax(logits / T), or "
                "use FrechetHead, which takes logits"
            )
        return sharpen(p, self.temperature)

    def scores(self, probabilities: Any) -> Float[np.ndarray, "row label"]:
        """sum_i P(l_i | x) d(y, l_i)^2 for every label y, (n, N); the smallest wins."""
        weights = self._weights(probabilities)
        if self._tree is not None:
            return self._tree(weights, self._columns).T
        return weights @ self._squared

    def predict_indices(self, probabilities: Any) -> Int[np.ndarray, " row"]:
        """Positions of the predicted labels in ``metric.labels``."""
        weights = self._weights(probabilities)
        if self._tree is not None:
            return self._predict_tree(weights)
        n, size = len(weights), len(self.metric)
        best, index, ties = np.full(n, np.inf), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
        tolerance = 1e-12 * float(self._squared.max())
        for start in range(0, size, self.chunk_size):
            block = self._squared[:, start : start + self.chunk_size]
            for rows in chunks(n, 16.0 * block.shape[1]):
                values = weights[rows] @ block
                least = values.argmin(axis=1)
                value = values[np.arange(len(values)), least]
                tied = (values <= value[:, None] + tolerance).sum(axis=1) > 1
                better = value < best[rows] - tolerance
                even = np.abs(value - best[rows]) <= tolerance
                ties[rows] = np.where(better, tied, ties[rows] | even)
                index[rows] = np.where(better, start + least, index[rows])
                best[rows] = np.where(better, value, best[rows])
        self.ties_ = int(ties.sum())
        return index

    def _predict_tree(self, weights: np.ndarray) -> np.ndarray:
        tree = self._tree
        index, ties = np.empty(len(weights), dtype=np.int64), 0
        step = chunk_rows(64.0 * tree.size, _TREE_BYTES)
        for start in range(0, len(weights), step):
            values = tree(weights[start : start + step], self._columns)
            index[start : start + step] = values.argmin(axis=0)
            least = values.min(axis=0)
            ties += int(((values <= least + 1e-9 * np.maximum(least, 1.0)).sum(axis=0) > 1).sum())
        self.ties_ = ties
        return index

    def predict(self, probabilities: Any) -> np.ndarray:
        """Predicted labels (n,)."""
        labels = np.empty(len(self.metric), dtype=object)
        labels[:] = self.metric.labels
        found = labels[self.predict_indices(probabilities)]
        kinds = {type(label) for label in self.metric.labels}
        return found.astype(kinds.pop()) if kinds in ({int}, {str}, {float}, {bool}) else found

    def fit_temperature(self, logits: Any, y: Iterable[Label]) -> "FrechetPredictor":
        """Choose the temperature on held-out rows of observed labels by mean squared distance, and return self.

        Each row's own label is left out of its probabilities, so that it stands for a label that was never seen.
        """
        z = np.asarray(logits, dtype=np.float64)
        truth = self.metric.index(y)
        position = {column: i for i, column in enumerate(self._columns.tolist())}
        known = np.array([t in position for t in truth.tolist()])
        if z.ndim != 2 or z.shape != (len(truth), len(self._columns)) or not known.any():
            raise InputError(
                f"need logits (n, {len(self._columns)}) and n labels, some of them observed; got {z.shape}"
            )
        z, truth = z[known].copy(), truth[known]
        if len(self._columns) < 2:
            raise InputError("with one observed label there is nothing left when it is left out")
        z[np.arange(len(z)), [position[t] for t in truth.tolist()]] = -np.inf
        distance = self.metric.squared([self.metric.labels[t] for t in truth])
        losses = []
        for temperature in TEMPERATURES:
            trial = FrechetPredictor(self.metric, self.observed, 1.0, self.chunk_size)
            chosen = trial.predict_indices(softmax(z / temperature))
            losses.append(distance[np.arange(len(z)), chosen].mean())
        self.temperature = float(TEMPERATURES[int(np.argmin(losses))])
        return self


class FrechetHead(nn.Module):
    """The same rule on logits, differentiable: forward gives minus the scores, so that argmax is the prediction.

    Use it behind a network that was trained on the observed labels; `loss` fine-tunes through the rule.
    """

    squared: Tensor

    def __init__(self, metric: LabelMetric, observed: Sequence[Label], *, temperature: float = 1.0) -> None:
        super().__init__()
        self.labels = metric.labels
        self.temperature = temperature
        self.register_buffer("squared", torch.from_numpy(metric.squared(observed)).float())

    def forward(self, logits: Float[Tensor, "row observed"]) -> Float[Tensor, "row label"]:
        """Minus sum_i softmax(logits / T)_i d(y, l_i)^2."""
        return -(torch.softmax(logits / self.temperature, dim=1) @ self.squared)

    def loss(
        self, logits: Float[Tensor, "row observed"], y: Int[Tensor, " row"], *, straight_through: bool = False
    ) -> Float[Tensor, ""]:
        """Mean of sum_j softmax(-S)_j d(j, y)^2; y indexes the observed labels.

        straight_through: the distance of the hard prediction, with the gradient of the soft one.
        """
        scores = self(logits)
        distance = self.squared[y]
        soft = (torch.softmax(scores, dim=1) * distance).sum(dim=1)
        if straight_through:
            hard = distance.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
            soft = soft + (hard - soft).detach()
        return soft.mean()


def frechet_mean(points: Sequence[Label], weights: Sequence[float], metric: LabelMetric) -> list[Label]:
    """All labels that minimise sum_i w_i d(y, points_i)^2."""
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (len(points),) or not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise InputError(f"need one weight >= 0 a point and not all 0, got {w.tolist()} for {len(points)} points")
    total = (w / w.sum()) @ metric.squared(points)
    return [metric.labels[i] for i in np.flatnonzero(total <= total.min() + 1e-12 * max(1.0, float(total.max())))]


def softmax(z: np.ndarray) -> np.ndarray:
    """Rows of probabilities; -inf has probability 0."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sharpen(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """p^(1/T) / sum: the softmax of the same logits over T."""
    if temperature == 1.0:
        return probabilities
    with np.errstate(divide="ignore"):
        return softmax(np.log(probabilities) / temperature)
