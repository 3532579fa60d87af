"""LIME and KernelSHAP of HELOC rows with 1,000 samples each, beside captum, lime, shap and a fit by gradient descent.

The network is the paper's own (23-8-8-1), from the folder THEODOLITE_DATA. "gradient descent" is how the paper's code fits
the same surrogate, written here from its description: Adam in batches of 128, 100 epochs, for each of 18 settings of the
step size (1, 0.5, 0.1), its decay (0.5, 0.1, 0.05) and when (epochs 30 and 80, or 50 and 95), the best on held-out moves
kept. error: mean L1 distance to the same fit on 200,000 moves.

Run: OMP_NUM_THREADS=1 python benchmarks/lime_heloc.py [PATH]      writes lime_heloc.json beside this file, or PATH
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from theodolite.core.errors import require
from theodolite.core.sources import find_data
from theodolite.explanations.local_approximation import attribute

SAMPLES = 1000
PEER_ROWS = {
    "captum, one move a call": 1, "captum, 1,000 moves a call": 5, "lime": 10, "shap": 10, "gradient descent": 2,
}  # fmt: skip


def network_and_rows() -> tuple[nn.Sequential, Tensor]:
    weights = find_data("lfa/official-heloc-ffnnA.safetensors")
    table = find_data("lfa/heloc-clean-test20-normalized-subset.csv")
    if weights is None or table is None:
        sys.exit("needs lfa/official-heloc-ffnnA.safetensors and lfa/heloc-...-subset.csv: set THEODOLITE_DATA")
    saved = load_file(str(weights))
    net = nn.Sequential(nn.Linear(23, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
    for number, layer in enumerate(layer for layer in net if isinstance(layer, nn.Linear)):
        layer.load_state_dict({part: saved[f"linear{number + 1}.{part}"] for part in ("weight", "bias")})
    rows = pd.read_csv(table).to_numpy(dtype=np.float32)[:, :-1]
    return net.eval().requires_grad_(False), torch.from_numpy(rows)


def captum_lime(f: Callable[[Tensor], Tensor], x: Tensor, at_once: int) -> Tensor:
    attr, lime = require("captum.attr", "dev"), require("captum.attr._core.lime", "dev")
    model = require("captum._utils.models.linear_model", "dev").SkLearnLinearRegression()
    # its kernel is exp(-d^2 / (2 w^2)), the paper's exp(-d^2 / w^2)
    near = lime.get_exp_kernel_similarity_function("euclidean", kernel_width=1 / math.sqrt(2))
    explainer = attr.Lime(f, interpretable_model=model, similarity_func=near)
    rows = [explainer.attribute(row[None], n_samples=SAMPLES, perturbations_per_eval=at_once) for row in x]
    return torch.cat(rows)


def descended(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A linear surrogate of each row by Adam, the best of 18 settings on a fifth of the moves."""
    found = []
    for row in x:
        moves = torch.randint(2, (SAMPLES, row.numel())).float()
        values, weights = f(moves * row), torch.exp(-(row - moves * row).square().sum(dim=1))
        cut, best, kept = SAMPLES * 4 // 5, math.inf, torch.zeros(row.numel())
        for step, decay, when in itertools.product((1, 0.5, 0.1), (0.5, 0.1, 0.05), ((30, 80), (50, 95))):
            g = nn.Linear(row.numel(), 1)
            optimizer = torch.optim.Adam(g.parameters(), lr=step)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(when), decay)
            for _ in range(100):
                for batch in torch.randperm(cut).split(128):
                    optimizer.zero_grad(set_to_none=True)
                    (weights[batch] * (g(moves[batch])[:, 0] - values[batch]).square()).mean().backward()
                    optimizer.step()
                schedule.step()
                with torch.no_grad():
                    loss = float((weights[cut:] * (g(moves[cut:])[:, 0] - values[cut:]).square()).mean())
                if loss < best:
                    best, kept = loss, g.weight.detach()[0].clone()
        found.append(kept)
    return torch.stack(found)


def timed(run: Callable[[Tensor], Any], x: Tensor) -> tuple[float, Any]:
    began = time.process_time()
    out = run(x)
    return (time.process_time() - began) / len(x), out


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = network_and_rows()

    def f(z: Tensor) -> Tensor:
        return net(z)[:, 0]

    def g(z: np.ndarray) -> np.ndarray:
        return f(torch.as_tensor(z, dtype=torch.float32)).numpy()

    tabular = require("lime.lime_tabular", "dev").LimeTabularExplainer(
        x.numpy(), mode="regression", discretize_continuous=False
    )
    kernel = require("shap", "dev").KernelExplainer(g, np.zeros((1, x.shape[1])))
    peers: dict[str, Callable[[Tensor], Any]] = {
        "captum, one move a call": lambda z: captum_lime(f, z, 1),
        "captum, 1,000 moves a call": lambda z: captum_lime(f, z, SAMPLES),
        "lime": lambda z: [tabular.explain_instance(row, g, num_features=23, num_samples=SAMPLES) for row in z.numpy()],
        "shap": lambda z: torch.as_tensor(kernel.shap_values(z.numpy(), nsamples=SAMPLES, silent=True, l1_reg=False)),
        "gradient descent": lambda z: descended(f, z),
    }
    fine = {name: attribute(name, f, x[:10], n_samples=200_000).weights for name in ("LIME", "KernelSHAP")}
    seconds, error = {}, {}
    for name in fine:
        attribute(name, f, x[:2], n_samples=SAMPLES)
        seconds[f"ours, {name}"], found = timed(lambda z, name=name: attribute(name, f, z, n_samples=SAMPLES), x)
        error[f"ours, {name}"] = float((found.weights[:10] - fine[name]).abs().sum(dim=1).mean())
    for name, run in peers.items():
        seconds[name], found = timed(run, x[: PEER_ROWS[name]])
        if isinstance(found, Tensor):
            wanted = fine["KernelSHAP" if name == "shap" else "LIME"][: len(found)]
            error[name] = float((found - wanted).abs().sum(dim=1).mean())
        print(name, f"{seconds[name]:.4g} s a row", flush=True)
    result = {
        "name": f"LIME and KernelSHAP with {SAMPLES:,} samples a row, HELOC network A (23 features), one core",
        "peers": {name: require(name, "dev").__version__ for name in ("captum", "shap")},
        "ratios": {
            f"{name} / ours": round(value / seconds["ours, KernelSHAP" if name == "shap" else "ours, LIME"], 1)
            for name, value in seconds.items()
            if not name.startswith("ours")
        },
        "wanted": {"captum, one move a call / ours": ">= 50", "gradient descent / ours": ">= 100"},
        "cpu seconds a row": {name: float(f"{value:.3g}") for name, value in seconds.items()},
        "error": {name: float(f"{value:.3g}") for name, value in error.items()},
        "lime": "fits its own perturbations (noise, not on/off changes), so it is timed only",
        "rows": {"ours": len(x), **PEER_ROWS},
        "command": "OMP_NUM_THREADS=1 python benchmarks/lime_heloc.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
