"""Which labels a Frechet mean of observed labels can ever be, and which label to observe next."""

__all__ = ["Locus", "is_locus_cover", "is_pairwise_decomposable", "locus", "next_class"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import linprog

from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import DEFAULT_BUDGET, chunks
from theodolite.predictions.label_geometry.metric import Label, LabelMetric
from theodolite.predictions.label_geometry.trees import as_metric, farthest, tree_locus

_LARGEST_EXACT = 48
_LARGEST_PAIRS = 20_000_000_000
_TOLERANCE = 1e-9


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


def locus(metric: LabelMetric, observed: Iterable[Label], tol: float = _TOLERANCE) -> Locus:
    """For each label y the linear program: max t with sum_i w_i (d(u, l_i)^2 - d(y, l_i)^2) >= t for all u != y.

    w runs over the simplex on the observed labels l_i. One program a label of K + 1 variables and N - 1 rows, so meant for
    up to about 2,000 labels; trees have `tree_locus` in linear time. tol is relative to the largest squared distance.

    Source: Roberts et al., 2023, arXiv:2307.12226, definition of the locus of the Frechet mean.

    >>> found = locus(LabelMetric.from_graph(nx.cycle_graph(4)), [0, 2])
    >>> found.reachable.tolist(), found.identified.tolist()
    ([True, True, True, True], [True, False, True, False])
    """
    if not tol >= 0:
        raise InputError(f"tol must be at least 0, got {tol}")
    squared, scale = _scaled(metric, _some(metric, observed))
    margin = _margins(squared, np.arange(len(metric)), metric)
    return Locus(metric.labels, margin * scale, margin >= -tol, margin > tol)


def _some(metric: LabelMetric, observed: Iterable[Label]) -> list[Label]:
    chosen = metric.names(np.unique(metric.index(observed)))
    if not chosen:
        raise DataError("no label is observed; give at least one")
    return chosen


def _scaled(metric: LabelMetric, observed: Sequence[Label]) -> tuple[np.ndarray, float]:
    squared = metric.squared(observed)
    scale = float(squared.max()) or 1.0
    return squared / scale, scale


def _margins(squared: np.ndarray, which: np.ndarray, metric: LabelMetric) -> Float[np.ndarray, " label"]:
    """Margin of each label in ``which``, of squared distances (K, N)."""
    return np.array([_margin(squared, y, metric.labels[y]) for y in which.tolist()])


def _margin(squared: np.ndarray, y: int, name: Label) -> float:
    """The program of one label, with only those rows that matter: the most violated ones join until none is left."""
    k = len(squared)
    gains = np.delete(squared, y, axis=1).T - squared[:, y]
    rows = np.unique(np.r_[gains.argmin(axis=0), gains.sum(axis=1).argmin()])
    while True:
        solved = linprog(
            np.r_[np.zeros(k), -1.0],
            A_ub=np.c_[-gains[rows], np.ones(len(rows))],
            b_ub=np.zeros(len(rows)),
            A_eq=np.r_[np.ones(k), 0.0][None],
            b_eq=[1.0],
            bounds=[(0, None)] * k + [(None, None)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if solved.status != 0:
            raise InputError(f"the linear program of label {name!r} was not solved: {solved.message}")
        w = np.maximum(solved.x[:k], 0.0)
        reached = gains @ (w / w.sum())
        worst = np.argsort(reached)[: k + 10]
        more = np.setdiff1d(worst[reached[worst] < -solved.fun - 1e-12], rows)
        if not len(more):
            return float(reached.min())  # what these weights reach, whatever the solver's own tolerance
        rows = np.r_[rows, more]


def is_locus_cover(metric: LabelMetric, observed: Iterable[Label], *, identify: bool = False) -> bool:
    """Whether every label is reachable from the observed ones; identify: without ties.

    >>> is_locus_cover(LabelMetric.from_graph(nx.path_graph(5)), [0, 4], identify=True)
    True
    """
    chosen = _some(metric, observed)
    if metric.is_tree and metric.tree().all_labelled:
        return len(tree_locus(metric, chosen)) == len(metric)
    found = locus(metric, chosen)
    return bool((found.identified if identify else found.reachable).all())


def is_pairwise_decomposable(metric: LabelMetric, observed: Iterable[Label]) -> bool:
    """Whether the locus is the union of the loci of pairs of observed labels, as it is on trees.

    >>> is_pairwise_decomposable(LabelMetric.from_graph(nx.star_graph(3)), [1, 2, 3])
    True
    """
    chosen = _some(metric, observed)
    squared, _ = _scaled(metric, chosen)
    return bool((locus(metric, chosen).reachable <= _pairs_locus(squared)).all())


def next_class(metric: LabelMetric | nx.Graph, observed: Iterable[Label], n: int = 1) -> list[Label]:
    """The n labels to observe next, each the one that enlarges the set of predictable labels most; fewer where all are in.

    On a tree whose nodes are all labels that is the label farthest from the present locus, which from a longest path's
    ends on (where it starts with nothing observed) is the best choice for every budget. Elsewhere greedy: for up to 48
    labels on the exact locus, then on what is identified without ties; for more on the union of the loci of pairs, which
    is a part of the locus and takes time in proportion to observed x labels^2. Among equals the first label wins.

    >>> next_class(nx.path_graph(5), [1, 2])
    [4]
    """
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    known = as_metric(metric)
    chosen = known.names(np.unique(known.index(observed)))
    if known.is_tree and known.tree().all_labelled:
        return farthest(known, chosen, n)
    exact = len(known) <= _LARGEST_EXACT
    if not exact and (len(chosen) + n) * len(known) ** 2 > _LARGEST_PAIRS:
        raise InputError(
            f"{len(chosen)} observed of {len(known)} labels are too many for the loci of all pairs (a few {_LARGEST_PAIRS:.0e} "
            "steps at most); restrict the metric to the labels that matter, or use a tree with all nodes as labels"
        )
    squared, _ = _scaled(known, list(known.labels))
    have = known.index(chosen).tolist()
    added: list[int] = []
    if not have:  # two labels as far from each other as any
        added.append(int(np.unravel_index(int(squared.argmax()), squared.shape)[0]))
        have.append(added[0])
    while len(added) < n:
        best = _best_exact(squared, have, known) if exact else _best_by_pairs(squared, have)
        if best is None:
            break
        added.append(best)
        have.append(best)
    return known.names(np.array(added, dtype=np.int64))


def _best_exact(squared: np.ndarray, have: list[int], metric: LabelMetric) -> int | None:
    """The label that makes most others reachable, then identified; adding one never takes any out of either set."""
    every = np.arange(len(squared))
    now = _margins(squared[have], every, metric)
    if (now > _TOLERANCE).all():
        return None
    open_ = np.flatnonzero(now <= _TOLERANCE)
    scores = {}
    for candidate in np.setdiff1d(every, have).tolist():
        margin = _margins(squared[[*have, candidate]], open_, metric)
        scores[candidate] = (int((margin >= -_TOLERANCE).sum()), int((margin > _TOLERANCE).sum()), -candidate)
    return max(scores, key=scores.__getitem__) if scores else None


def _best_by_pairs(squared: np.ndarray, have: list[int]) -> int | None:
    inside = _pairs_locus(squared[have])
    outside = np.setdiff1d(np.flatnonzero(~inside), have)
    if not len(outside):
        return None
    others = np.setdiff1d(np.arange(len(squared)), have)
    gained = np.zeros(len(others), dtype=np.int64)
    for part in chunks(len(others), 8.0 * len(squared) * len(have), DEFAULT_BUDGET):
        union = np.zeros((len(others[part]), len(squared)), dtype=bool)
        for a in have:
            union |= pair_loci(squared[a], squared[others[part]])
        gained[part] = (union & ~inside).sum(axis=1)
    return int(others[int(gained.argmax())])


def _pairs_locus(squared: Float[np.ndarray, "observed label"]) -> Bool[np.ndarray, " label"]:
    """Union of the loci of all pairs of observed labels."""
    inside = np.zeros(squared.shape[1], dtype=bool)
    for i, row in enumerate(squared):
        inside |= pair_loci(row, squared[: i + 1]).any(axis=0)
    return inside


def pair_loci(a: Float[np.ndarray, " label"], b: Float[np.ndarray, "pair label"]) -> Bool[np.ndarray, "pair label"]:
    """Labels u that minimise (1 - s) a_u + s b_u for some s in [0, 1], ties among them, for each row of b.

    They lie on the lower left hull of the points (a_u, b_u), which is walked from the least a to the least b, all rows
    at once. a and b: squared distances to two labels.
    """
    out = np.zeros(b.shape, dtype=bool)
    for part in chunks(len(b), 64.0 * b.shape[1], DEFAULT_BUDGET >> 2):
        rows = b[part]
        slack = _TOLERANCE * max(float(a.max()), float(rows.max()))
        at_start = np.broadcast_to(a <= a.min() + slack, rows.shape)
        found = at_start | (rows <= rows.min(axis=1, keepdims=True) + slack)
        here = np.where(at_start, rows, np.inf).argmin(axis=1)
        active = np.arange(len(rows))
        while len(active):
            at_a, at_b = a[here][:, None], rows[active, here][:, None]
            fall = at_b - rows[active]
            with np.errstate(divide="ignore", invalid="ignore"):
                price = np.where(fall > slack, (a - at_a) / fall, np.inf).min(axis=1, keepdims=True).clip(min=0)
            going = np.isfinite(price[:, 0])
            active, at_a, at_b, fall, price = active[going], at_a[going], at_b[going], fall[going], price[going]
            # at the weights where leaving pays, everything on the edge of the hull is equally good
            on_edge = (a - at_a) - price * fall <= slack * (1 + price)
            found[active] |= on_edge
            here = np.where(on_edge, rows[active], np.inf).argmin(axis=1)
        out[part] = found
    return out
