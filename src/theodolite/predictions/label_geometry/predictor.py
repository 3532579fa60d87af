"""Answer with the weighted Frechet mean of the labels that a classifier knows."""

__all__ = ["FrechetHead", "FrechetPredictor", "frechet_mean"]

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, ModelError
from theodolite.core.memory import DEFAULT_BUDGET, chunks
from theodolite.predictions.label_geometry.metric import Label, LabelMetric, in_order, plain
from theodolite.predictions.label_geometry.rooted import RootedTree
from theodolite.predictions.label_geometry.trees import candidates

Labels = Sequence[Label] | np.ndarray
TEMPERATURES = (0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0, 2.828, 4.0)
_OFF = 1e-3  # by how much a row's sum may differ from 1
_REROOT_FROM = 500  # observed labels from which rerooting a tree beats a matrix product, measured on one core
_STEP_BYTES = DEFAULT_BUDGET >> 2


class FrechetPredictor(BaseEstimator):
    """y(x) = argmin over all labels y of sum_i P(l_i | x) d(y, l_i)^2; with all distances equal it is argmax.

    metric: distances between all labels, by name. observed: the labels that the probabilities are about, in the order of
    their columns (a data frame whose columns bear these names may have them in any order). temperature: probabilities are
    sharpened to p^(1/T) / sum, which is softmax(logits / T).
    chunk_size: labels whose scores are held at a time. Ties go to the label that comes first in ``metric.labels``;
    `ties_` counts the tied rows of the last prediction. `temperature_` is what `fit_temperature` chose.

    On a tree only labels on and nearest to the paths between observed ones are looked at, with many observed labels by
    rerooting, which needs no matrix of distances.

    DataError for observed labels that the metric does not have; InputError for rows that are no probabilities; a warning
    where the observed labels are as far from each other as from all others, so that nothing new can be answered.

    Source: Roberts et al., 2023, arXiv:2307.12226, eq. 1.

    >>> metric = LabelMetric.from_function(lambda a, b: abs(a - b), [0, 1, 2])
    >>> FrechetPredictor(metric, [0, 2]).predict(np.array([[0.5, 0.5], [0.9, 0.1]])).tolist()
    [1, 0]
    """

    def __init__(self, metric: LabelMetric, observed: Labels, temperature: float = 1.0, chunk_size: int = 4096) -> None:
        self.metric = metric
        self.observed = observed
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._prepare()

    @classmethod
    def from_estimator(cls, estimator: Any, metric: LabelMetric, **options: Any) -> "FrechetPredictor":
        """For the columns of a fitted classifier's predict_proba, matched by name through its ``classes_``."""
        if not hasattr(estimator, "classes_"):
            raise ModelError(f"{type(estimator).__name__} has no classes_; fit it first, or give the observed labels")
        return cls(metric, [plain(c) for c in estimator.classes_], **options)

    def set_params(self, **params: Any) -> "FrechetPredictor":
        """Change parameters by name, as scikit-learn does; a temperature that was chosen is forgotten."""
        super().set_params(**params)
        self._prepare()
        return self

    def _prepare(self) -> None:
        metric, columns = self.metric, observed_columns(self.metric, self.observed)
        if not self.temperature > 0 or self.chunk_size < 1:
            raise InputError(f"need temperature > 0 and chunk_size >= 1, got {self.temperature} and {self.chunk_size}")
        self.__dict__.pop("temperature_", None)
        self._columns = columns
        # where rerooting is quicker: the part of the tree that matters, places of observed labels in it, of candidates
        self._tree: tuple[RootedTree, np.ndarray, np.ndarray] | None = None
        self._candidates, self._twin = np.arange(len(metric)), np.zeros(len(metric), dtype=bool)
        if metric.is_tree:
            graph = metric.tree()
            self._candidates, self._twin = candidates(graph, columns)
            if _reroot(len(columns), len(self._candidates), graph.rooted.depth):
                sources, targets = graph.nodes[columns], graph.nodes[self._candidates]
                smaller, place = graph.rooted.spanned(graph.adjacency, np.union1d(sources, targets))
                self._tree = smaller, place[sources], place[targets]
        self._squared: np.ndarray | None = None
        small = 8 * len(columns) * len(self._candidates) <= DEFAULT_BUDGET
        # a graph is searched once; rows of a matrix or of embeddings can be worked out whenever they are needed
        if self._tree is None and (small or metric.is_graph):
            self._squared = metric.between(columns, self._candidates) ** 2
        if len(columns) > 1 and len(metric) > 2 and self._equidistant():
            warnings.warn(
                "the observed labels are equally far from all labels, so only observed labels can be predicted, as by argmax",
                UserWarning,
                stacklevel=3,
            )

    def _equidistant(self) -> bool:
        """Whether all distances from observed labels to other labels are one number; most metrics are told by a few rows."""
        low, high = np.inf, 0.0
        whole = self._squared if len(self._candidates) == len(self.metric) else None
        every = np.arange(len(self.metric))
        for rows in chunks(len(self._columns), 16.0 * len(self.metric), 1 << 22):
            d = self.metric.between(self._columns[rows], every) ** 2 if whole is None else whole[rows].copy()
            d[np.arange(len(d)), self._columns[rows]] = np.nan
            low, high = min(low, float(np.nanmin(d))), max(high, float(np.nanmax(d)))
            if high - low > 1e-9 * high:
                return False
        return True

    def _block(self, start: int, stop: int) -> Float[np.ndarray, "observed label"]:
        if self._squared is not None:
            return self._squared[:, start:stop]
        return self.metric.between(self._columns, self._candidates[start:stop]) ** 2

    def _check(self, probabilities: Any) -> np.ndarray:
        p = as_array(in_order(probabilities, self.observed, axis=1))
        if p.dtype.kind not in "fiub":
            raise InputError(f"probabilities must be numbers, got an array of {p.dtype}")
        k = len(self._columns)
        if p.ndim != 2 or p.shape[1] != k:
            raise InputError(
                f"need one column for each of the {k} observed labels, in their order, got an array of shape {p.shape}; "
                "of a classifier with more classes take the observed columns and softmax their logits"
            )
        for part in chunks(len(p), 32.0 * k, _STEP_BYTES):
            rows = p[part].astype(np.float64, copy=False)
            total = rows.sum(axis=1)
            wrong = ~(np.isfinite(rows).all(axis=1) & (rows >= 0).all(axis=1) & (np.abs(total - 1) <= _OFF))
            if wrong.any():
                i = int(np.argmax(wrong))
                raise InputError(
                    f"rows must be probabilities, not negative and summing to 1; row {part.start + i} has the least entry "
                    f"{rows[i].min():.4g} and sums to {total[i]:.4g}. It looks like logits: pass softmax(logits / T) with a "
                    "temperature T, or use FrechetHead, which takes logits"
                )
        return p

    def _weights(self, p: np.ndarray) -> Float[np.ndarray, "row observed"]:
        return sharpen(p.astype(np.float64, copy=False), getattr(self, "temperature_", self.temperature))

    def scores(self, probabilities: Any) -> Float[np.ndarray, "row label"]:
        """sum_i P(l_i | x) d(y, l_i)^2 for every label y, (n, N); the smallest wins."""
        p, size = self._check(probabilities), len(self.metric)
        out = np.empty((len(p), size))
        if self.metric.is_tree:
            graph = self.metric.tree()
            places = graph.rooted.place[graph.nodes]
            for rows in chunks(len(p), 40.0 * graph.rooted.size, _STEP_BYTES):
                out[rows] = graph.rooted.squared_sums(places[self._columns], self._weights(p[rows]))[places].T
            return out
        weights = self._weights(p)
        for start in range(0, size, self.chunk_size):
            block = self._block(start, start + self.chunk_size)
            out[:, start : start + block.shape[1]] = weights @ block
        return out

    def predict_indices(self, probabilities: Any) -> Int[np.ndarray, " row"]:
        """Positions of the predicted labels in ``metric.labels``."""
        p = self._check(probabilities)
        index, tied = self._answers(len(p), lambda rows: self._weights(p[rows]))
        self.ties_ = int(tied.sum())
        return index

    def _answers(self, n: int, weights: Callable[[slice], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(position of the answer, whether it is tied) for n rows, whose weights are asked for in parts."""
        index, tied = np.empty(n, dtype=np.int64), np.zeros(n, dtype=bool)
        width = len(self._columns) + min(self.chunk_size, len(self._candidates))
        if self._tree is not None:
            width = len(self._columns) + self._tree[0].size
        for rows in chunks(n, 40.0 * width, _STEP_BYTES):
            index[rows], tied[rows] = self._winners(weights(rows))
        return index, tied

    def _winners(self, weights: Float[np.ndarray, "row observed"]) -> tuple[np.ndarray, np.ndarray]:
        """Position of the lowest score of each row, the first of equal ones, and whether there are equal ones."""
        n, rounding = len(weights), _rounding(weights.shape[1])
        if self._tree is not None:
            tree, sources, targets = self._tree
            sums = tree.squared_sums(sources, weights)
            values = sums[targets].T
            # rerooting adds and subtracts, so its error is relative to the largest sum that it passes
            winner, tied, _ = _first_of_least(values, rounding * np.maximum(sums[0], values.max(axis=1)))
        else:
            best, winner, tied = np.full(n, np.inf), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
            for start in range(0, len(self._candidates), self.chunk_size):
                values = weights @ self._block(start, start + self.chunk_size)
                slack = rounding * values.min(axis=1)
                first, twice, least = _first_of_least(values, slack)
                better = least < best - slack
                tied = np.where(better, twice, tied | (least <= best + slack))
                winner = np.where(better, start + first, winner)
                best = np.minimum(best, least)
        return self._candidates[winner], tied | self._twin[winner]

    def predict(self, probabilities: Any) -> np.ndarray:
        """Predicted labels (n,)."""
        labels = np.empty(len(self.metric), dtype=object)
        for i, label in enumerate(self.metric.labels):
            labels[i] = label
        found = labels[self.predict_indices(probabilities)]
        kinds = {type(label) for label in self.metric.labels}
        return np.array(found.tolist(), dtype=kinds.pop()) if kinds in ({int}, {str}, {float}, {bool}) else found

    def fit_temperature(self, logits: Any, y: Iterable[Label]) -> "FrechetPredictor":
        """Choose `temperature_` on held-out rows of observed labels by mean squared distance, and return self.

        Each row's own label is left out of its logits, so that it stands for a label that was never seen. Rows of labels
        that are not observed have nothing to leave out and are passed over.
        """
        z = as_array(in_order(logits, self.observed, axis=1)).astype(np.float64)
        truth = self.metric.index(y)
        k = len(self._columns)
        if z.ndim != 2 or z.shape != (len(truth), k):
            raise InputError(
                f"need logits ({len(truth)}, {k}), a row a label and a column an observed label, got {z.shape}"
            )
        if k < 2:
            raise InputError("with one observed label there is nothing left when it is left out; observe at least two")
        if np.isnan(z).any() or np.isposinf(z).any():
            raise InputError("logits must be numbers (or -inf for probability 0), got nan or inf")
        column = np.full(len(self.metric), -1)
        column[self._columns] = np.arange(k)
        own = column[truth]
        rows = np.flatnonzero(own >= 0)
        z[rows, own[rows]] = -np.inf
        rows = rows[np.isfinite(z[rows]).any(axis=1)]  # no probability is left where the own label had all of it
        if not len(rows):
            raise InputError(f"none of the {len(truth)} rows has an observed label and probability elsewhere")
        z, truth = z[rows], truth[rows]
        answers = np.concatenate(
            [self._answers(len(z), lambda part, t=t: softmax(z[part] / t))[0] for t in TEMPERATURES]
        )
        losses = (
            self.metric.squared_pairs(np.tile(truth, len(TEMPERATURES)), answers).reshape(-1, len(truth)).mean(axis=1)
        )
        best = np.flatnonzero(losses <= losses.min() * (1 + 1e-12))
        self.temperature_ = min((TEMPERATURES[int(i)] for i in best), key=lambda t: abs(np.log(t)))
        return self


def _reroot(observed: int, candidates: int, depth: int) -> bool:
    """Whether rerooting is the quicker way, or the only one; a depth costs as much as a few dozen labels."""
    shallow = candidates >= 50 * depth
    return (observed >= _REROOT_FROM and shallow) or 8 * observed * candidates > DEFAULT_BUDGET


def _rounding(terms: int) -> float:
    """Relative error that a sum of so many terms, none negative, may have: scores this near to each other are equal."""
    return max(1e-12, 4 * float(np.finfo(float).eps) * terms)


def _first_of_least(values: np.ndarray, slack: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column of the first value within ``slack`` of each row's least, whether there are more of them, and the least."""
    least = values.min(axis=1)
    equal = values <= (least + slack)[:, None]
    return equal.argmax(axis=1), equal.sum(axis=1) > 1, least


class FrechetHead(nn.Module):
    """The same rule on logits, differentiable: forward gives minus the scores, so that argmax is the prediction.

    Use it behind a network that was trained on the observed labels; `loss` fine-tunes through the rule. Scores are in
    float32 or finer.

    >>> metric = LabelMetric.from_function(lambda a, b: abs(a - b), [0, 1, 2])
    >>> FrechetHead(metric, [0, 2])(torch.zeros(1, 2)).argmax(dim=1).tolist()
    [1]
    """

    squared: Tensor

    def __init__(self, metric: LabelMetric, observed: Labels, *, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"need temperature > 0, got {temperature}")
        columns = observed_columns(metric, observed)
        self.labels = metric.labels
        self.temperature = temperature
        squared = metric.between(columns, np.arange(len(metric))) ** 2
        self.register_buffer("squared", torch.from_numpy(squared).float())

    def forward(self, logits: Tensor) -> Float[Tensor, "row label"]:
        """Minus sum_i softmax(logits / T)_i d(y, l_i)^2, of logits (row, observed)."""
        if logits.ndim != 2 or logits.shape[1] != len(self.squared):
            raise InputError(
                f"need logits (n, {len(self.squared)}), a column an observed label, got {tuple(logits.shape)}"
            )
        fine = torch.promote_types(logits.dtype, torch.float32)
        return -(torch.softmax(logits.to(fine) / self.temperature, dim=1) @ self.squared.to(fine))

    def loss(self, logits: Tensor, y: Int[Tensor, " row"], *, straight_through: bool = False) -> Float[Tensor, ""]:
        """Mean of sum_j softmax(-S)_j d(j, y)^2 over rows; y indexes the observed labels, as the columns of logits do.

        straight_through: the squared distance of the hard prediction, with the gradient of the soft one.
        """
        scores = self(logits)
        if bool((y < 0).any()) or bool((y >= len(self.squared)).any()):
            raise InputError(f"y must index the {len(self.squared)} observed labels, got {y.min()} to {y.max()}")
        distance = self.squared[y].to(scores.dtype)
        soft = (torch.softmax(scores, dim=1) * distance).sum(dim=1)
        if straight_through:
            hard = distance.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
            soft = soft + (hard - soft).detach()
        return soft.mean()


def frechet_mean(points: Sequence[Label], weights: Any, metric: LabelMetric) -> list[Label]:
    """All labels that minimise sum_i w_i d(y, points_i)^2, for weights >= 0 that are scaled to sum to 1.

    >>> frechet_mean([0, 3], [0.5, 0.5], LabelMetric.from_function(lambda a, b: abs(a - b), range(4)))
    [1, 2]
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (len(points),) or not np.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise InputError(f"need one weight >= 0 a point and not all 0, got {w.tolist()} for {len(points)} points")
    total = (w / w.sum()) @ metric.squared(points)
    return metric.names(np.flatnonzero(total <= total.min() * (1 + _rounding(len(w)))))


def observed_columns(metric: LabelMetric, observed: Iterable[Label]) -> Int[np.ndarray, " observed"]:
    """Positions of the observed labels, which must be different and at least one."""
    columns = metric.index(observed)
    if len(np.unique(columns)) != len(columns) or not len(columns):
        names, count = np.unique(columns, return_counts=True)
        double = metric.names(names[count > 1][:5])
        raise DataError(f"observed labels must be different, and at least one; more than once: {double}")
    return columns


def as_array(values: Any) -> np.ndarray:
    """A numpy array of what may be a tensor."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


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
