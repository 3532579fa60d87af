"""Which columns a model uses: scores from gradients and from perturbing, their consensus, and picks that do not repeat.

gradient_j    = mean |x_j ds_y/dx_j|,  s_y: the predicted class's score less the mean score of all classes
permutation_j = mean over repeats of loss(x with column j permuted) - loss(x)
sensitivity_j = mean sum_c |p_c(x + sd_j e_j) - p_c(x)|
attention_j   = mean attention on column j over rows that are classified right
"""

__all__ = ["Scores", "consensus", "correlation_clusters", "pick_apart", "score_columns", "screened"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from theodolite.core.errors import ModelError
from theodolite.core.memory import chunks
from theodolite.core.view import ModelView, evaluation_mode
from theodolite.explanations.surrogate.blackbox import BlackBox

_SCREEN_FROM = 500  # with more columns only the most promising ones are perturbed
_SCREEN_ROWS = 64
_SMALLEST = 1e-12
_BLOCK = 1 << 28  # bytes of edited values and of the changes that they make, at a time


@dataclass(frozen=True, eq=False)
class Scores:
    """One score per column by method, NaN where a column was screened out, and its standard error over the rows."""

    value: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    notes: tuple[str, ...]


class _Centred(nn.Module):
    """Scores less their mean: what a softmax sees of them, without its saturation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(x)
        scores = scores.reshape(len(scores), -1)
        return scores - scores.mean(dim=1, keepdim=True) if scores.shape[1] > 1 else scores


def _gradient(box: BlackBox, x: np.ndarray) -> np.ndarray:
    rows = box.tensor(x)
    return (rows * ModelView(_Centred(box.model), output="raw").gradients(rows)).abs().double().cpu().numpy()


def _attention(box: BlackBox, x: np.ndarray, p: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    right = np.ones(len(x), dtype=bool) if y is None or p.shape[1] == 1 else p.argmax(axis=1) == y
    with torch.no_grad(), evaluation_mode(box.model):
        return box.model.attention_weights(box.tensor(x[right if right.any() else ~right])).double().cpu().numpy()


def loss_by_row(p: Float[np.ndarray, "... row output"], target: np.ndarray) -> Float[np.ndarray, "... row"]:
    """Log-loss of probabilities (cross-entropy with soft targets), squared error of a single value."""
    if p.shape[-1] == 1:
        return (p[..., 0] - target.reshape(-1)) ** 2
    if target.ndim == 2:
        return -(target * np.log(np.maximum(p, _SMALLEST))).sum(axis=-1)
    return -np.log(np.maximum(p[..., np.arange(len(target)), target], _SMALLEST))


def _permutation(
    box: BlackBox, x: np.ndarray, p: np.ndarray, target: np.ndarray, columns: np.ndarray, repeats: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard error) by column of the increase of the loss; one set of permutations serves every column."""
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(len(x)) for _ in range(repeats)])
    before, parts = loss_by_row(p, target), []
    for block in chunks(len(columns), 24.0 * orders.size, _BLOCK):
        some = columns[block]
        values, found = np.concatenate([x[orders, j] for j in some]), np.empty((len(some) * repeats, len(x)))
        for part, answers in box.edited(x, np.repeat(some, repeats), values):
            found[part] = loss_by_row(answers, target) - before
        parts.append(_summary(found.reshape(len(some), repeats, len(x)).mean(axis=1)))
    return _joined(parts)


def _sensitivity(
    box: BlackBox, x: np.ndarray, p: np.ndarray, columns: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard error) by column of the change of the answer when the column is moved by its deviation."""
    parts = []
    for block in chunks(len(columns), 24.0 * len(x), _BLOCK):
        some = columns[block]
        for _, answers in box.edited(x, some, (x[:, some] + scale[some]).T):
            parts.append(_summary(np.abs(answers - p).sum(axis=-1)))
    return _joined(parts)


def _summary(rows: Float[np.ndarray, "column row"]) -> tuple[np.ndarray, np.ndarray]:
    n = rows.shape[1]
    error = rows.std(axis=1, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(rows), np.nan)
    return rows.mean(axis=1), error


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([error for _, error in parts])


def screened(
    box: BlackBox, x: np.ndarray, p: np.ndarray, gradient: np.ndarray | None, keep: int, seed: int
) -> Int[np.ndarray, " kept"]:
    """The columns worth perturbing: all up to 500, otherwise the ``keep`` best by gradient x input.

    Without gradients: by how much the answers to at most 64 rows move when a column is permuted once.
    """
    d = x.shape[1]
    if d <= _SCREEN_FROM or keep >= d:
        return np.arange(d)
    if gradient is None:
        rng = np.random.default_rng(seed)
        some = rng.permutation(len(x))[:_SCREEN_ROWS]
        few, order, moved = x[some], rng.permutation(len(some)), np.empty(d)
        for start in range(0, d, _SCREEN_FROM):  # the edited values of all columns at once would be another table
            block = np.arange(start, min(start + _SCREEN_FROM, d))
            for part, answers in box.edited(few, block, few[order][:, block].T):
                moved[block[part]] = np.abs(answers - p[some]).sum(axis=-1).mean(axis=-1)
        gradient = moved
    return np.sort(np.argsort(-gradient, kind="stable")[:keep])


def score_columns(
    box: BlackBox,
    x: Float[np.ndarray, "row column"],
    y: np.ndarray | None,
    *,
    methods: Sequence[str],
    scale: Float[np.ndarray, " column"],
    keep: int,
    repeats: int,
    seed: int,
) -> Scores:
    """Every score that the model allows, on rows that nothing was fitted on.

    y: class indices or values; without them the permuted answers are compared with the model's own. Raises ModelError where
    no score is left.
    """
    p, d, notes = box(x), x.shape[1], list[str]()
    told: dict[str, tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]] = {}  # method: (columns, (mean, standard error))
    gradient = None
    if box.is_module and ("gradient" in methods or d > _SCREEN_FROM):
        try:
            gradient = _gradient(box, x)
        except RuntimeError as error:
            notes.append(f"gradient left out: the network is not differentiable ({str(error).splitlines()[0]})")
    elif "gradient" in methods:
        notes.append(f"gradient left out: {type(box.model).__name__} has no gradients")
    if gradient is not None and "gradient" in methods:
        told["gradient"] = np.arange(d), _summary(gradient.T)
    if "attention" in methods:
        if hasattr(box.model, "attention_weights"):
            told["attention"] = np.arange(d), _summary(_attention(box, x, p, y).T)
        else:
            notes.append(f"attention left out: {type(box.model).__name__} has no attention_weights")
    if {"permutation", "sensitivity"} & set(methods):
        columns = screened(box, x, p, None if gradient is None else gradient.mean(axis=0), keep, seed)
        if len(columns) < d:
            notes.append(f"{len(columns)} of {d} columns were perturbed, the best by a first look at all of them")
        if "permutation" in methods:
            told["permutation"] = columns, _permutation(box, x, p, p if y is None else y, columns, repeats, seed)
        if "sensitivity" in methods:
            told["sensitivity"] = columns, _sensitivity(box, x, p, columns, scale)
    if not told:
        raise ModelError(
            "no score is left for this model: " + "; ".join(notes) + "; ask for permutation or sensitivity"
        )
    value, error = {}, {}
    for name in (name for name in methods if name in told):
        columns, (mean, spread) = told[name]
        value[name], error[name] = np.full(d, np.nan), np.full(d, np.nan)
        value[name][columns], error[name][columns] = mean, spread
    return Scores(value, error, tuple(notes))


def consensus(
    scores: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], Float[np.ndarray, " column"], Float[np.ndarray, " column"]]:
    """(ranks by method, their mean, importance): rank 1 is best, columns that were screened out share the last ranks.

    importance: each score in units of its largest, cut at 0, averaged; what the mean rank cannot tell is how much better
    a column is.
    """
    ranks = {
        name: stats.rankdata(-np.where(np.isnan(value), -np.inf, value), method="average")
        for name, value in scores.items()
    }
    shares = [
        np.maximum(np.nan_to_num(value), 0) / max(float(np.nanmax(value)), _SMALLEST) for value in scores.values()
    ]
    return ranks, np.mean(list(ranks.values()), axis=0), np.mean(shares, axis=0)


def _standardised(x: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and length 1 (constant ones all 0), missing values at the mean."""
    z = np.where(np.isnan(x), 0.0, x - np.nanmean(x, axis=0))
    length = np.linalg.norm(z, axis=0)
    return z / np.where(length > 0, length, 1.0)


def pick_apart(
    importance: Float[np.ndarray, " column"],
    x: Float[np.ndarray, "row column"],
    order: Int[np.ndarray, " candidate"],
    k: int,
) -> Int[np.ndarray, " k"]:
    """Greedily the column with the largest importance x (1 - largest |correlation| with those picked); ties by ``order``.

    >>> x = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [2.0, 2.0, 1.0]])
    >>> pick_apart(np.array([1.0, 0.9, 0.2]), x, np.arange(3), 2).tolist()
    [0, 2]
    """
    z, left = _standardised(x[:, order]), np.maximum(importance[order], 0) + _SMALLEST
    apart, picked = np.ones(len(order)), list[int]()
    for _ in range(k):
        gain = left * apart
        gain[picked] = -1.0
        best = int(np.argmax(gain))
        picked.append(best)
        apart = np.minimum(apart, 1 - np.minimum(np.abs(z[:, best] @ z), 1))
    return order[picked]


def correlation_clusters(
    x: Float[np.ndarray, "row column"], columns: Int[np.ndarray, " some"], *, above: float = 0.9
) -> tuple[tuple[int, ...], ...]:
    """Groups of two or more of ``columns`` that hang together by correlations above ``above`` in size.

    Permuting one column of a group hides behind the others: read the importance of a group, not of its members.
    """
    z = _standardised(x[:, columns])
    one, other = np.nonzero(np.triu(np.abs(z.T @ z) > above, 1))
    graph = coo_array((np.ones(len(one)), (one, other)), shape=(len(columns), len(columns)))
    labels = connected_components(graph, directed=False)[1]
    members = [columns[labels == label] for label in range(labels.max() + 1)]
    return tuple(tuple(int(j) for j in group) for group in members if len(group) > 1)
