"""Training of a sparse autoencoder beside SAELens, and F1 of all features beside scikit-learn, one core.

Peers: sae-lens itself where it is installed (it brings transformer-lens and more with it, so it is no dependency): its trainer
on the same rows at the same shape, step size and batch, each in a process of its own, with rows a second, the share of the
variance of other rows that is left unexplained after equally many steps, and peak memory. And its training step as it is
designed, written here, without what its trainer does beside: the loss through autograd, the gradient's part along the decoder's
rows removed, Adam of torch with its default settings, rows set to norm 1, and the firing counts of each latent kept up to date.
F1 peer: scikit-learn's f1_score, a call for each feature and value.

Run: python benchmarks/sae_training.py [PATH]      writes sae_training.json beside this file, or PATH
"""

import importlib.metadata
import importlib.util
import json
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import f1_score
from torch import nn

from theodolite.activations.dictionary import SparseAutoencoder, train_sae
from theodolite.activations.dictionary_evaluation import feature_f1

WIDTH, LATENTS, ROWS, BATCH, ROUNDS = 64, 1024, 20_000, 512, 5
EPOCHS = 25  # about 1,000 steps


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


def planted_rows(n: int, seed: int) -> torch.Tensor:
    """Rows that are sums of four of 256 fixed directions, so that there is something to find."""
    directions = nn.functional.normalize(torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 256, (n, 4), generator=g)
    return (directions[which] * (0.5 + torch.rand(n, 4, 1, generator=g))).sum(dim=1)


def ours(x: torch.Tensor, epochs: int) -> SparseAutoencoder:
    """Trained here."""
    sae = SparseAutoencoder(WIDTH, LATENTS, "topk", k=16)
    train_sae(sae, x, epochs=epochs, batch_size=BATCH, lr=1e-3)
    return sae


def saelens(x: torch.Tensor, epochs: int) -> nn.Module:
    """Trained by SAELens' trainer with its own settings beside shape, step size and batch."""
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=16, normalize_activations="none"))
    steps = epochs * -(-len(x) // BATCH)
    batches = (x[rows] for _ in range(epochs) for rows in torch.randperm(len(x)).split(BATCH))
    config = SAETrainerConfig(
        epochs * len(x),
        BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_decay_steps=steps // 4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, batches).fit()
    return sae


def trained(who: str, epochs: int) -> dict[str, float]:
    """TopK training of one of the two on the same rows, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, other = planted_rows(ROWS, 1), planted_rows(4_000, 2)
    train = {"ours": ours, "sae-lens": saelens}[who]
    train(x[: 2 * BATCH], 1)  # what either imports or lays out at its first step is not counted
    before, started = peak(), time.process_time()
    sae = train(x, epochs)
    seconds, held = time.process_time() - started, peak() - before
    with torch.no_grad():
        rebuilt = sae.decode(sae.encode(other))  # type: ignore[operator]
    left = float((other - rebuilt).square().sum() / (other - other.mean(dim=0)).square().sum())
    return {
        "rows a second": round(epochs * ROWS / seconds),
        "variance unexplained": round(left, 4),
        "MiB above the start": round(held, 1),
    }


def peak() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def beside_saelens() -> dict[str, object]:
    """Both trainers in fresh processes, each three times in turns."""
    if importlib.util.find_spec("sae_lens") is None:
        return {"sae-lens": "not installed"}
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "sae-lens": []}
    for _ in range(3):
        for who, made in runs.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                made.append(pool.submit(trained, who, EPOCHS).result())
    middle = {who: {key: statistics.median(run[key] for run in made) for key in made[0]} for who, made in runs.items()}
    return {
        "version": importlib.metadata.version("sae-lens"),
        f"TopK 16, {WIDTH} to {LATENTS}, {ROWS:,} rows, {EPOCHS} epochs, lr 1e-3": middle,
        "time, ours / sae-lens": round(middle["sae-lens"]["rows a second"] / middle["ours"]["rows a second"], 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(ROWS, WIDTH)
    found: dict[str, dict[str, float]] = {}
    for kind, k in (("vanilla", None), ("topk", 16)):
        own, theirs = [], []
        for _ in range(ROUNDS):
            sae = SparseAutoencoder(WIDTH, LATENTS, kind, k=k, l1=1.0)
            started = time.process_time()
            train_sae(sae, x, epochs=1, batch_size=BATCH)
            own.append(time.process_time() - started)
            peer = PeerStep(k)
            started = time.process_time()
            peer.epoch(x)
            theirs.append(time.process_time() - started)
        found[f"one epoch, {kind}, {WIDTH} to {LATENTS}, {ROWS:,} rows"] = {
            "ours / SAELens' design": round(statistics.median(own) / statistics.median(theirs), 3),
            "ours, processor seconds": round(statistics.median(own), 3),
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
        "peer": "SAELens, where installed, and its training step as designed; scikit-learn's f1_score",
        "training": found,
        "beside sae-lens": beside_saelens(),
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
