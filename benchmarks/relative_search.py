"""Agreement of two spaces and farthest anchors, beside scikit-learn's search and the usual way with all distances.

Peers: `sklearn.neighbors.NearestNeighbors(metric="cosine", algorithm="brute")`, which finds the k neighbours only, asked for
the same two searches (the items' vectors of A in B, those of B in B); and, as no package on PyPI does it, the usual design of
farthest points on a matrix of all distances. Ours finds the rank of every item as well.

Run: python benchmarks/relative_search.py [PATH]      writes relative_search.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from theodolite.activations.relative import RelativeProjection, item_agreement, select_anchors
from theodolite.core.memory import peak_memory

ROUNDS, K = 3, 10


def spaces(items: int, anchors: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative vectors of two noisy views of the same items, of width 384 and 576."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(items, 384, generator=draw)
    other = z @ torch.randn(384, 576, generator=draw) / 20 + torch.randn(items, 576, generator=draw)
    first = RelativeProjection(anchors).fit(z)
    return first.transform(z), RelativeProjection().fit(other, anchor_index=first.anchor_index_).transform(other)


def neighbours(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard of the two sets of neighbours by scikit-learn."""
    index = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(b)
    one, two = (index.kneighbors(z, return_distance=False) for z in (a, b))
    shared = np.array([len(np.intersect1d(p, q)) for p, q in zip(one, two, strict=True)])
    return shared / (2 * K - shared)


def all_distances(z: np.ndarray, count: int, start: int) -> list[int]:
    """Farthest points by a matrix of all distances."""
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    distance = cdist(unit, unit)
    chosen = [start]
    nearest = distance[start].copy()
    while len(chosen) < count:
        nearest = np.minimum(nearest, distance[chosen[-1]])
        chosen.append(int(nearest.argmax()))
    return chosen


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call, taken in turns so that other load hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    result: dict[str, Any] = {
        "name": "agreement of two spaces and farthest anchors, one core",
        "peer": "scikit-learn NearestNeighbors (cosine, brute); farthest points on all distances (scipy cdist)",
        "command": "OMP_NUM_THREADS=1 python benchmarks/relative_search.py",
    }
    for items in (2_000, 6_000):
        a, b = spaces(items, 300)
        taken = medians(
            {"ours": partial(item_agreement, a, b, k=K), "sklearn": partial(neighbours, a.numpy(), b.numpy())}
        )
        same = float(np.mean(np.isclose(item_agreement(a, b, k=K).jaccard, neighbours(a.numpy(), b.numpy()))))
        result[f"search, {items:,} items, 300 anchors"] = {
            "ours / sklearn": round(taken["ours"] / taken["sklearn"], 3),
            "ours, seconds one direction": round(taken["ours"], 3),
            "items with the same overlap": same,
        }
    a, b = spaces(20_000, 300)
    with peak_memory() as peak:
        start = time.perf_counter()
        item_agreement(a, b, k=K)
        seconds = time.perf_counter() - start
    result["search, 20,000 items, 300 anchors"] = {
        "ours, seconds one direction": round(seconds, 2),
        "ours, MiB": None if peak.bytes is None else round(peak.bytes / 2**20),
    }
    z = np.random.default_rng(0).normal(size=(6_000, 64))
    taken = medians(
        {
            "ours": partial(select_anchors, z, 300, method="fps", start=0),
            "all distances": partial(all_distances, z, 300, 0),
        }
    )
    same_rows = select_anchors(z, 300, method="fps", start=0).tolist() == all_distances(z, 300, 0)
    result["300 farthest anchors of 6,000"] = {
        "ours / all distances": round(taken["ours"] / taken["all distances"], 3),
        "same anchors": same_rows,
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
