"""The k-means layer and TELL's step beside scikit-learn's k-means and the design of the published training step.

The published code has no licence, so its design is written out here: the indicator is made by a loop over the batch into a
matrix batch x clusters, and the loss is taken over that whole matrix. Same encoder, same data, in turns. MiniBatchKMeans is
scikit-learn's.

Run: python benchmarks/clustering_layer.py [PATH]      writes clustering_layer.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_digits
from torch.nn import functional as F

from theodolite.networks.clustering import TELL, KMeansLayer
from theodolite.networks.clustering.networks import autoencoder

ROUNDS = 3
ROWS, WIDTH, CLUSTERS = 1_000_000, 64, 100
STEPS = 10


def cpu_seconds(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median CPU time of each call, taken in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


class LoopedStep:
    """One pair of steps with the indicator made row by row."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder, self.decoder = autoencoder("conv", (8, 8), 10)
        self.weight = torch.nn.Parameter(2e-3 * F.normalize(torch.randn(10, 10), dim=1))
        parameters = [*self.encoder.parameters(), *self.decoder.parameters(), self.weight]
        self.optimizer = torch.optim.Adadelta(parameters)

    def __call__(self, batch: torch.Tensor) -> None:
        """Both steps on one batch."""
        for even in (True, False):
            z = F.normalize(self.encoder(batch), dim=1)
            scores = (z.detach() if even else z) @ self.weight.T
            indicator = torch.zeros_like(scores)
            for i in range(len(batch)):
                indicator[i, int(scores[i].argmax())] = 1
            loss = F.mse_loss(self.decoder(z), batch) + 0.01 * (indicator * (2e-3 - scores) / 1e-3).mean()
            self.optimizer.zero_grad()
            loss.backward()
            gradient = self.weight.grad
            if even:
                gradient.mul_(2e-4 / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12))
            else:
                gradient.zero_()
            self.optimizer.step()
            with torch.no_grad():
                self.weight.mul_(2e-3 / self.weight.norm(dim=1, keepdim=True))


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    first = x[:CLUSTERS].copy()
    peer = KMeans(CLUSTERS, init=first, n_init=1, max_iter=1).fit(x[:20_000])
    layer = KMeansLayer(WIDTH, CLUSTERS)
    layer.centers = peer.cluster_centers_
    rows = torch.from_numpy(x)
    same = float((layer.assign(rows).numpy() == peer.predict(x)).mean())
    assigning = cpu_seconds({"ours": lambda: layer.assign(rows), "peer": lambda: peer.predict(x)})

    images = torch.as_tensor(load_digits().images[:64] / 16, dtype=torch.float32)
    model = TELL(10).partial_fit(images)
    looped = LoopedStep()

    def many(step: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(STEPS):
                step(images)

        return run

    training = cpu_seconds({"ours": many(model.partial_fit), "peer": many(looped)})

    vectors = x[:10_000] + 3 * first[rng.integers(10, size=10_000)]
    stream = {
        "ours": TELL(10, encoder=None, init="kmeans", optimizer="adadelta"),
        "peer": MiniBatchKMeans(10, n_init=1, random_state=0),
    }

    def fed(learner: Any) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, 10_000, 500):
                learner.partial_fit(vectors[start : start + 500])

        return run

    online = cpu_seconds({name: fed(learner) for name, learner in stream.items()})
    result = {
        "name": "neural clustering, CPU time on one core",
        "peer": "scikit-learn's KMeans.predict and MiniBatchKMeans; the published training step's design, written out here",
        f"nearest of {CLUSTERS} centres, {ROWS:,} rows of {WIDTH}": {
            "scikit-learn / ours": round(assigning["peer"] / assigning["ours"], 2),
            "ours, seconds": round(assigning["ours"], 2),
            "same answers": round(same, 6),
        },
        "one pair of steps, batch 64, convolutional encoder, 8 x 8": {
            "published design / ours": round(training["peer"] / training["ours"], 2),
            "ours, milliseconds a step": round(training["ours"] / STEPS / 2 * 1000, 1),
        },
        "a stream of 20 batches of 500 rows of 64, 10 clusters, no encoder": {
            "MiniBatchKMeans / ours": round(online["peer"] / online["ours"], 2),
        },
        "command": "OMP_NUM_THREADS=1 python benchmarks/clustering_layer.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
