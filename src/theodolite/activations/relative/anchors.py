"""Which samples become anchors."""

__all__ = ["SELECTIONS", "select_anchors"]

from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64
from sklearn.cluster import KMeans
from torch import Tensor

from theodolite.activations.relative.similarity import Rows, latents, need_direction, unit
from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import chunks

SELECTIONS = ("uniform", "fps", "kmeans", "top", "stratified")


def select_anchors(
    Z: Rows,
    n_anchors: int,
    *,
    method: str = "uniform",
    y: Any = None,
    start: int | None = None,
    seed: int = 0,
) -> Int64[np.ndarray, " anchor"]:
    """Rows of ``Z`` (row, width) to be anchors: ``n_anchors`` different indices, sorted (by "fps": in the order found).

    method: "uniform" at random; "fps" each the row farthest from those before it, of rows scaled to length 1, from row
    ``start`` (at random where left out); "kmeans" the row nearest to each of the centroids; "top" the first rows (of words
    sorted by frequency); "stratified" as many of each class of ``y`` (row,) as of any other, at random.

    Raises InputError where there are fewer rows than anchors, DataError where ``y`` has one class or a row has none.

    Source: Moschella et al., 2022, arXiv:2209.15430, section 3 and appendix.

    >>> select_anchors(np.eye(5), 2, method="top").tolist()
    [0, 1]
    """
    if method not in SELECTIONS:
        raise InputError(f"anchors are selected by one of {', '.join(SELECTIONS)}, got {method!r}")
    rows = latents(Z).detach()
    n = len(rows)
    if n_anchors < 1:
        raise InputError(f"need at least 1 anchor, got {n_anchors}")
    if n_anchors > n:
        raise InputError(f"{n_anchors} anchors cannot be taken from {n} samples: give more samples or fewer anchors")
    if start is not None and (method != "fps" or not 0 <= start < n):
        raise InputError(f"start is the row that 'fps' begins at, 0 to {n - 1}; got {start} with method {method!r}")
    rng = np.random.default_rng(seed)
    if method == "fps":
        return _farthest(rows, n_anchors, int(rng.integers(n)) if start is None else start)
    if method == "top":
        chosen = np.arange(n_anchors)
    elif method == "kmeans":
        chosen = _near_centroids(rows, n_anchors, rng)
    elif method == "stratified":
        chosen = _stratified(y, n, n_anchors, rng)
    else:
        chosen = rng.choice(n, n_anchors, replace=False)
    return np.sort(chosen).astype(np.int64)


def _farthest(rows: Tensor, count: int, start: int) -> Int64[np.ndarray, " anchor"]:
    need_direction(rows, "Z")
    points = unit(rows)
    chosen = [start]
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    while len(chosen) < count:
        # of vectors of length 1 the squared distance is 2 - 2 cos
        nearest = torch.minimum(nearest, 2 - 2 * (points @ points[chosen[-1]]))
        nearest[chosen[-1]] = -torch.inf  # never again, even where all that is left are copies
        chosen.append(int(nearest.argmax()))
    return np.array(chosen, dtype=np.int64)


def _near_centroids(rows: Tensor, count: int, rng: np.random.Generator) -> np.ndarray:
    points = rows.cpu()
    fitted = KMeans(count, n_init=cast("Any", 1), random_state=int(rng.integers(2**31))).fit(points.numpy())
    centroids = torch.as_tensor(fitted.cluster_centers_).to(points)
    best = torch.full((count,), torch.inf, dtype=points.dtype)
    index = torch.zeros(count, dtype=torch.long)
    for part in chunks(len(points), 8.0 * count):
        found = torch.cdist(centroids, points[part]).min(dim=1)
        better = found.values < best
        best[better], index[better] = found.values[better], found.indices[better] + part.start
    chosen = np.unique(index.numpy())
    # two centroids can share their nearest row, and copies of a row leave centroids over: others at random
    others = np.setdiff1d(np.arange(len(points)), chosen)
    return np.r_[chosen, rng.choice(others, count - len(chosen), replace=False)]


def _stratified(y: Any, n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    if y is None:
        raise InputError("'stratified' takes as many anchors of each class: give the classes y, one a row")
    labels = np.asarray(y)
    if labels.shape != (n,):
        raise InputError(f"y must hold one class for each of the {n} rows, got shape {labels.shape}")
    missing = np.flatnonzero(np.asarray(pd.isna(labels)))
    if len(missing):
        raise DataError(f"row {missing[0]} has no class: leave such rows out or give them one")
    classes, inverse = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"all rows are of class {classes[0]!s}, so anchors cannot be spread over classes; use 'uniform'"
        )
    order = rng.permutation(n)
    order = order[np.argsort(inverse[order], kind="stable")]
    counts = np.bincount(inverse)
    turn = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # its place within its class
    ranked = order[np.lexsort((rng.permutation(len(classes))[inverse[order]], turn))]
    return ranked[:count]
