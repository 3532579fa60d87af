"""Which labels a Frechet mean of observed labels can ever be, and which label to observe next."""

__all__ = ["Locus", "is_locus_cover", "locus", "next_class"]

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linprog

from theodolite.core.errors import DataError, InputError
from theodolite.predictions.label_geometry.metric import Label, LabelMetric
from theodolite.predictions.label_geometry.trees import farthest

_LARGEST_EXACT = 48


@dataclass(frozen=True, eq=False)
class Locus:
    """Labels that some weights on the observed ones make a Frechet mean.

    margin (N,): how far the best weights keep a label ahead of every other, in squared distance. reachable: margin >= 0,
    perhaps only tied; identified: margin > 0, the only mean for some weights.
    """

    labels: tuple[Label, ...]
    margin: Float[np.ndarray, " label"]
    reachable: Bool[np.ndarray, " label"]
    identified: Bool[np.ndarray, " label"]


def locus(metric: LabelMetric, observed: Iterable[Label], tol: float = 1e-9) -> Locus:
    """For each label y the linear program: max t with sum_i w_i (d(u, l_i)^2 - d(y, l_i)^2) >= t for all u != y.

    w runs over the simplex on the observed labels l_i. One program a label of K + 1 variables and N - 1 rows, so meant for
    up to about 2,000 labels; trees have `tree_locus` in linear time. tol is relative to the largest squared distance.
    """
    chosen = list(observed)
    if not chosen:
        raise DataError("no label is observed")
    squared = metric.squared(chosen)
    scale = float(squared.max()) or 1.0
    scaled = squared / scale
    margin = np.array([_margin(scaled, y) for y in range(len(metric))])
    return Locus(metric.labels, margin * scale, margin >= -tol, margin > tol)


def _margin(squared: np.ndarray, y: int) -> float:
    k = len(squared)
    gains = np.delete(squared, y, axis=1).T - squared[:, y]
    solved = linprog(
        np.r_[np.zeros(k), -1.0],
        A_ub=np.c_[-gains, np.ones(len(gains))],
        b_ub=np.zeros(len(gains)),
        A_eq=np.r_[np.ones(k), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * k + [(None, None)],
        method="highs",
    )
    if solved.status != 0:
        raise InputError(f"the linear program of label {y} was not solved: {solved.message}")
    return float(-solved.fun)


def is_locus_cover(metric: LabelMetric, observed: Iterable[Label], *, identify: bool = False) -> bool:
    """Whether every label is reachable from the observed ones; identify: without ties."""
    found = locus(metric, observed)
    return bool((found.identified if identify else found.reachable).all())


def next_class(metric: LabelMetric | nx.Graph, observed: Iterable[Label], n: int = 1) -> list[Label]:
    """The n labels to observe next, each the one that enlarges the set of predictable labels most; fewer where all are in.

    On a tree that is the label farthest from the present locus, which from a longest path's end on is the best choice for
    every budget. Elsewhere greedy, on the exact locus for up to 48 labels and on loci of pairs for more.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    known = metric if isinstance(metric, LabelMetric) else LabelMetric.from_graph(metric)
    chosen = [known.labels[i] for i in known.index(observed)]
    if known.is_tree:
        return farthest(known, chosen, n)
    added: list[Label] = []
    squared = known.squared(known.labels)
    inside = np.zeros(len(known), dtype=bool)
    while len(added) < min(n, len(known) - len(chosen)):
        have = known.index([*chosen, *added])
        candidates = np.setdiff1d(np.arange(len(known)), have)
        if len(known) <= _LARGEST_EXACT:
            sizes = [int(locus(known, [known.labels[i] for i in (*have, c)]).reachable.sum()) for c in candidates]
        else:
            for i, a in enumerate(have):
                for b in have[:i]:
                    inside |= _pair_locus(squared[a], squared[b])
            sizes = [int(_with_candidate(squared, inside, have, int(c)).sum()) for c in candidates]
        added.append(known.labels[int(candidates[int(np.argmax(sizes))])])
    return added


def _with_candidate(squared: np.ndarray, inside: np.ndarray, have: np.ndarray, candidate: int) -> np.ndarray:
    union = inside.copy()
    union[[candidate, *have]] = True
    for a in have:
        union |= _pair_locus(squared[a], squared[candidate])
    return union


def _pair_locus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Labels that minimise w a + (1 - w) b for some w in [0, 1]: those on the lower left hull of the points (a, b)."""
    order = np.lexsort((b, a))
    hull: list[int] = []
    for i in order:
        if hull and b[i] >= b[hull[-1]]:
            continue  # farther from both ends than one that is in
        while len(hull) >= 2:
            p, q = hull[-2], hull[-1]
            if (a[q] - a[p]) * (b[i] - b[p]) - (b[q] - b[p]) * (a[i] - a[p]) < -1e-12:
                hull.pop()
            else:
                break
        hull.append(int(i))
    inside = np.zeros(len(a), dtype=bool)
    inside[hull] = True
    return inside
