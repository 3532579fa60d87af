"""T-Rex on a batch, beside the same search one row at a time, the published design, and ellice.

The loop follows the authors' code: one row, fresh draws of k = 1000 in every step, forward and backward through all of them.
ellice (`pip install ellice`) makes counterfactuals that hold for an ellipsoid of models of about the same loss; it is run on the
same network and rows, and judged by the same retrained networks. Where it is not installed the file says so.

Run: python benchmarks/counterfactual_loop.py [PATH]      writes counterfactual_loop.json beside this file, or PATH
"""

import contextlib
import importlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn

from theodolite.core.train import Recipe
from theodolite.explanations.robust_counterfactuals import ClosestCounterfactual, TRex, retrain, robust_validity

ROWS, LOOPED, PEER_ROWS, STEPS, SIGMA = 100, 5, 10, 100, 0.05


def network(d: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))


def one_row(net: nn.Module, base: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """The published design: STEPS steps, each with its own draws; no early stop, so that all are counted."""
    generator, x = torch.Generator().manual_seed(seed), base.clone()
    for _ in range(STEPS):
        x = x.detach().requires_grad_(True)
        around = torch.sigmoid(net(x + SIGMA * torch.randn(k, len(x), generator=generator)))[:, 0]
        here = torch.sigmoid(net(x[None]))[0, 0]
        (around.mean() - (here - around).abs().mean()).backward()
        assert x.grad is not None
        x = (x + 0.01 * x.grad / x.grad.norm().clamp_min(1e-12)).detach()
        x = (base + (x - base) * (1 / (x - base).norm().clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)
    return x


def seconds(call: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    out = call()
    return time.perf_counter() - began, out


def speed() -> dict[str, Any]:
    """39 columns, 100 rows, 100 steps for all of them: tau is out of reach, so no row leaves early."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(ROWS, 39))
    box = np.vstack([np.zeros(39), np.ones(39), x])
    net = network(39, 0).eval()
    with torch.no_grad():  # an untrained network is flat; steeper, it looks like a trained one
        net[4].weight *= 10
        net[4].bias -= torch.quantile(net(torch.as_tensor(x).float()), 0.6)
    near = ClosestCounterfactual(steps=50, binary_search_steps=2)
    method = TRex(base=near, tau=0.9999, max_steps=STEPS, k=1000)
    method.fit(net, box)
    base_seconds, base = seconds(lambda: near.fit(net, box).generate(x))
    ours, found = seconds(lambda: method.generate(x))
    rows = torch.as_tensor(base.counterfactuals[~base.unchanged]).float()
    loop, _ = seconds(lambda: [one_row(net, row, 1000, i) for i, row in enumerate(rows[:LOOPED])])
    small, _ = seconds(lambda: [one_row(net, row, 128, i) for i, row in enumerate(rows[:LOOPED])])
    many = int((~found.unchanged).sum())
    mine = (ours - base_seconds) / many
    return {
        "rows that were searched": many,
        "steps a row, mean": float(found.steps[~found.unchanged].mean()),
        "ours, seconds for 100 rows with their base counterfactuals": round(ours, 2),
        "loop of k = 1000 / ours, seconds a row": round(loop / LOOPED / mine, 1),
        "loop of k = 128 / ours, seconds a row": round(small / LOOPED / mine, 1),
    }


def beside_ellice() -> dict[str, Any]:
    """Breast cancer in [0, 1]: cost, share of 10 retrained networks that accept, seconds a row."""
    bunch: Any = load_breast_cancer()
    table = (bunch.data - bunch.data.min(axis=0)) / np.ptp(bunch.data, axis=0)
    x, test, y, _ = train_test_split(table, bunch.target, test_size=0.3, random_state=0, stratify=bunch.target)
    recipe = Recipe(epochs=50, batch_size=64, schedule="constant")
    models = retrain(lambda seed: network(30, seed), x, y, 11, recipe=recipe, seed=0)
    base, retrained = models[0], models[1:]
    with torch.no_grad():
        rejected = test[(base(torch.as_tensor(test).float())[:, 0] < 0).numpy()][:PEER_ROWS]
    result: dict[str, Any] = {}
    for name, method in (
        ("closest", ClosestCounterfactual()), ("T-Rex 0.75", TRex()), ("T-Rex 0.9", TRex(tau=0.9)),
    ):  # fmt: skip
        taken, found = seconds(lambda method=method: method.fit(base, x).generate(rejected))
        result[name] = judged(found.counterfactuals, rejected, retrained, taken)
    try:
        peer: Any = importlib.import_module("ellice")
    except ImportError:
        return result | {"ellice": "not installed here: pip install ellice"}
    names = [f"x{i}" for i in range(30)]
    frame = pd.DataFrame(x, columns=names).assign(label=y)
    for epsilon in (0.01, 0.05):
        explainer = peer.Explainer(base, peer.Data(frame, "label"), backend="pytorch", device="cpu")
        query = pd.DataFrame(rejected, columns=names)
        with contextlib.redirect_stdout(io.StringIO()):
            taken, found = seconds(
                lambda explainer=explainer, query=query, epsilon=epsilon: explainer.generate_counterfactuals(
                    query, method="continuous", robustness_epsilon=epsilon, progress_bar=False
                )
            )
        if not len(found):
            result[f"ellice, epsilon {epsilon}"] = "no counterfactual"
            continue
        rows = found["original_index"].to_numpy()
        result[f"ellice, epsilon {epsilon}"] = judged(found[names].to_numpy(), rejected[rows], retrained, taken)
    return result


def judged(points: np.ndarray, rows: np.ndarray, retrained: list[Any], taken: float) -> dict[str, float]:
    return {
        "rows": len(points),
        "L2 cost": round(float(np.linalg.norm(points - rows, axis=1).mean()), 3),
        "robust validity": round(float(robust_validity(points, retrained).mean()), 3),
        "seconds a row": round(taken / max(1, len(points)), 4),
    }


def main() -> None:
    torch.set_num_threads(1)
    result = {
        "name": "T-Rex on a batch of rows, one core",
        "peer": "the published design, one row at a time with fresh draws (written here); ellice where installed",
        "speed": speed(),
        "breast cancer": beside_ellice(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/counterfactual_loop.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
