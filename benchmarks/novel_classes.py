"""Novel class discovery beside the designs of the published code, and scikit-learn's silhouette.

The published code (PracticalNCD) is notebooks that download data when they are imported and need an account of a tracking
service, so its designs are written out here: Lloyd's iterations with a loop over clusters, a dense matrix of distances
filled in by ten rows at a time, and training through a DataLoader. Same results, same data, in turns.

Run: python benchmarks/novel_classes.py [PATH]      writes novel_classes.json beside this file, or PATH
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
from sklearn.metrics import silhouette_score
from torch.utils.data import DataLoader, TensorDataset

from theodolite.data.novel_classes.counts import silhouette
from theodolite.data.novel_classes.kmeans import lloyd
from theodolite.data.novel_classes.network import ProjectionNetwork, projection_loss, train_projection
from theodolite.data.novel_classes.spectral import NCDSpectralClustering, dense_affinity

ROUNDS = 5


def cpu_seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU time of each call, taken in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def lloyd_by_loops(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Distances and means of one cluster after the other."""
    centres = centres.copy()
    for _ in range(1000):
        distance = np.stack([np.linalg.norm(points - centre, axis=1) for centre in centres])
        labels = distance.argmin(axis=0)
        moved = centres.copy()
        for j in range(len(centres)):
            if (labels == j).any():
                moved[j] = points[labels == j].mean(axis=0)
        shift = np.linalg.norm(moved - centres, axis=1).max()
        centres = moved
        if shift <= 1e-10:
            break
    return centres


def distances_by_tens(x: np.ndarray, sigma: float) -> np.ndarray:
    """The affinity from a dense matrix of distances that is filled in by ten rows at a time."""
    out = np.empty((len(x), len(x)))
    for start in range(0, len(x), 10):
        rows = x[start : start + 10]
        out[start : start + 10] = np.sqrt(((rows[:, None] - x[None]) ** 2).sum(axis=2))
    affinity = np.exp(-(out**2) / (2 * sigma**2))
    np.fill_diagonal(affinity, 0)
    return affinity


def train_by_loader(network: ProjectionNetwork, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    """The same loss and optimiser with batches collated row by row."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.006)
    for _ in range(epochs):
        for rows, labels in DataLoader(TensorDataset(x, y), batch_size=512, shuffle=True):
            classification, reconstruction = projection_loss(network, rows, labels)
            loss = 0.86 * classification + 0.14 * reconstruction
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def network() -> ProjectionNetwork:
    torch.manual_seed(0)
    return ProjectionNetwork(16, (12, 8), 13, 19, dropout=0.08)


def main() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, 16)) + 2 * rng.normal(size=(20, 16))[rng.integers(20, size=20_000)]
    first = points[rng.choice(20_000, 20, replace=False)]
    same = float(np.abs(lloyd(points, first) - lloyd_by_loops(points, first)).max())
    k_means = cpu_seconds({"ours": partial(lloyd, points, first), "peer": partial(lloyd_by_loops, points, first)})

    x = rng.normal(size=(2000, 16))
    affinity = cpu_seconds({"ours": partial(dense_affinity, x, 3.0), "peer": partial(distances_by_tens, x, 3.0)})
    labels = np.r_[np.arange(12), rng.integers(12, size=1988)]
    distances = cdist(x, x)
    index = cpu_seconds(
        {
            "ours": partial(silhouette, distances, labels),
            "peer": partial(silhouette_score, x, labels),
            "peer with our distances": partial(silhouette_score, distances, labels, metric="precomputed"),
        }
    )
    y = np.where(np.arange(2000) < 1500, rng.integers(5, size=2000), -1)
    spectral = cpu_seconds({"ours": partial(NCDSpectralClustering(5).fit, x, y)})["ours"]

    rows, classes = torch.randn(4200, 16), torch.randint(-1, 19, (4200,))
    epochs = 5
    options = {"w": 0.86, "lr": 0.006, "epochs": epochs, "batch_size": 512, "seed": 0}
    training = cpu_seconds(
        {
            "ours": lambda: train_projection(network(), rows, classes, **options),
            "peer": lambda: train_by_loader(network(), rows, classes, epochs),
        }
    )
    result = {
        "name": "novel class discovery, CPU time on one core",
        "peer": "the designs of the published code, written out here; scikit-learn's silhouette",
        "k-means, 20,000 rows, 20 clusters, to convergence": {
            "peer (loop over clusters) / ours": round(k_means["peer"] / k_means["ours"], 2),
            "largest difference of the centroids": same,
        },
        "affinity, 2,000 rows": {"peer (ten rows at a time) / ours": round(affinity["peer"] / affinity["ours"], 2)},
        "silhouette, 2,000 rows, 12 clusters": {
            "scikit-learn from the rows / ours from distances that are made once": round(
                index["peer"] / index["ours"], 2
            ),
            "scikit-learn / ours, both from the same distances": round(
                index["peer with our distances"] / index["ours"], 2
            ),
        },
        "training, 4,200 rows, 16 columns": {
            "peer (DataLoader) / ours": round(training["peer"] / training["ours"], 2),
            "60 epochs of ours, seconds": round(training["ours"] / epochs * 60, 2),
        },
        "spectral clustering, 2,000 rows, seconds": round(spectral, 2),
        "command": "OMP_NUM_THREADS=1 python benchmarks/novel_classes.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
