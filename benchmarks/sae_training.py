"""A training step of a sparse autoencoder beside SAELens' design, and F1 of all features beside scikit-learn, one core.

Peer: sae-lens brings transformer-lens and more with it, so its training step is written here as it is designed: the loss
through autograd, the gradient's part along the decoder's rows removed, Adam of torch with its default settings, rows set to norm
1, and the firing counts of each latent kept up to date. F1 peer: scikit-learn's f1_score, a call for each feature and value.

Run: python benchmarks/sae_training.py [PATH]      writes sae_training.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import f1_score
from torch import nn

from theodolite.activations.dictionary import SparseAutoencoder, train_sae
from theodolite.activations.dictionary_evaluation import feature_f1

WIDTH, LATENTS, ROWS, BATCH, ROUNDS = 64, 1024, 20_000, 512, 5


class PeerStep(nn.Module):
    """SAELens' trainer in small: standard (l1) or TopK."""

    def __init__(self, k: int | None) -> None:
        super().__init__()
        rows = nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1)
        self.W_dec, self.W_enc = nn.Parameter(rows), nn.Parameter(rows.T.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(LATENTS)), nn.Parameter(torch.zeros(WIDTH))
        self.k, self.quiet = k, torch.zeros(LATENTS)

    def epoch(self, x: torch.Tensor) -> None:
        """One pass over the rows."""
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-4)
        for part in torch.randperm(len(x)).split(BATCH):
            rows = x[part]
            f = torch.relu((rows - self.b_dec) @ self.W_enc + self.b_enc)
            if self.k is not None:
                top = f.topk(self.k, dim=-1)
                f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
            loss = (f @ self.W_dec + self.b_dec - rows).square().sum(dim=-1).mean()
            if self.k is None:
                loss = loss + 1.0 * f.sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                slope = self.W_dec.grad
                assert slope is not None
                slope -= (slope * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec
            optimizer.step()
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
                self.quiet = torch.where((f > 0).any(dim=0), 0.0, self.quiet + len(part))


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(ROWS, WIDTH)
    found: dict[str, dict[str, float]] = {}
    for kind, k in (("vanilla", None), ("topk", 16)):
        ours, theirs = [], []
        for _ in range(ROUNDS):
            sae = SparseAutoencoder(WIDTH, LATENTS, kind, k=k, l1=1.0)
            started = time.process_time()
            train_sae(sae, x, epochs=1, batch_size=BATCH)
            ours.append(time.process_time() - started)
            peer = PeerStep(k)
            started = time.process_time()
            peer.epoch(x)
            theirs.append(time.process_time() - started)
        found[f"one epoch, {kind}, {WIDTH} to {LATENTS}, {ROWS:,} rows"] = {
            "ours / SAELens' design": round(statistics.median(ours) / statistics.median(theirs), 3),
            "ours, processor seconds": round(statistics.median(ours), 3),
        }
    active = torch.rand(ROWS, 2048) < 0.02
    table = pd.DataFrame({"a": np.random.default_rng(0).integers(0, 100, ROWS)})
    started = time.process_time()
    scores = feature_f1(active, table)
    ours_f1 = time.process_time() - started
    started = time.process_time()
    for j in range(10):
        f1_score((table["a"] == j).to_numpy(), active[:, j].numpy())
    each = (time.process_time() - started) / 10
    result = {
        "name": "training of a sparse autoencoder, F1 of its features; one core, medians of processor time",
        "peer": "SAELens' training step as designed (written here: the package brings others); scikit-learn's f1_score",
        "training": found,
        "F1, 20,000 rows x 2,048 features x 100 values": {
            "processor seconds": round(ours_f1, 3),
            "ours / scikit-learn, a call a pair": round(ours_f1 / (each * scores.f1.size), 6),
        },
        "command": "OMP_NUM_THREADS=1 python benchmarks/sae_training.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
