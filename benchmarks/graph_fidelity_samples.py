"""Robust fidelity of a graph explanation, beside a loop over samples through torch_geometric's Explainer.

Peer: torch_geometric (`pip install 'theodolite[graphs]'`), whose metrics score one hard mask at a time; robust fidelity with
it is a loop over `Explainer.get_masked_prediction`. The same network, graphs, motifs and number of samples on both sides.

Run: python benchmarks/graph_fidelity_samples.py [PATH]      writes graph_fidelity_samples.json beside this file, or PATH
"""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from theodolite.explanations.graph_fidelity import ba_2motifs, robust_fidelity
from theodolite.explanations.graph_fidelity.agreement import candidates
from theodolite.explanations.graph_fidelity.engine import Scorer
from theodolite.explanations.graph_fidelity.graph import explained_pairs
from theodolite.explanations.graph_fidelity.scores import Scheme, measure

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch_geometric.explain import DummyExplainer, Explainer
    from torch_geometric.nn import GraphConv, global_max_pool

SAMPLES, GRAPHS, GRID = 30, 1, (0.0, 0.2, 0.4, 0.6, 0.8)


class Network(nn.Module):
    """Three layers of sums over weighted neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphConv(1 if i == 0 else 32, 32) for i in range(3))
        self.head = nn.Linear(32, 2)

    def forward(self, x, edge_index, edge_weight=None, batch=None):
        """Scores of graphs."""
        for layer in self.layers:
            x = layer(x, edge_index, edge_weight).relu()
        return self.head(global_max_pool(x, batch))


def looped(explainer, graph, chosen, rng):
    """Robust and ordinary FidΔ, one masked prediction a sample."""
    pair = graph.pair

    def score(keep):
        mask = torch.from_numpy(keep[pair].astype(np.float32))
        return float(explainer.get_masked_prediction(graph.x, graph.edge_index, None, mask).softmax(-1)[0, 0])

    every = np.ones(len(chosen), dtype=bool)
    plus = [score(every & ~(chosen & (rng.random(len(chosen)) < 0.1))) for _ in range(SAMPLES)]
    minus = [score(chosen | (rng.random(len(chosen)) < 0.9)) for _ in range(SAMPLES)]
    score(every)
    return float(np.mean(minus) - np.mean(plus)), score(chosen) - score(~chosen)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Network().eval()
    made = ba_2motifs(GRAPHS, seed=0)
    explainer = Explainer(
        model, algorithm=DummyExplainer(), explanation_type="model", edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "graph", "return_type": "raw"},
    )  # fmt: skip
    true = [explained_pairs(g, m) for g, m in zip(made.graphs, made.explanations, strict=True)]
    sets = [candidates(t, np.array(GRID), np.random.default_rng(0)) for t in true]
    robust_fidelity(model, made.graphs[0], made.explanations[0], n_samples=SAMPLES)
    times = {"ours, one": [], "ours, grid": [], "loop": []}
    for _ in range(3):
        began = time.perf_counter()
        for graph, mask in zip(made.graphs, made.explanations, strict=True):
            one = robust_fidelity(model, graph, mask, label=0, n_samples=SAMPLES)
        times["ours, one"].append((time.perf_counter() - began) / GRAPHS)
        began = time.perf_counter()
        for graph, group in zip(made.graphs, sets, strict=True):
            measure(Scorer(model, graph), group, 0, Scheme(n_samples=SAMPLES), np.random.default_rng(0))
        times["ours, grid"].append((time.perf_counter() - began) / (GRAPHS * len(GRID) ** 2))
        began = time.perf_counter()
        for graph, group in zip(made.graphs, sets, strict=True):
            for chosen in group:
                looped(explainer, graph, chosen, np.random.default_rng(0))
        times["loop"].append((time.perf_counter() - began) / (GRAPHS * len(GRID) ** 2))
    best = {name: min(values) for name, values in times.items()}
    theirs = looped(explainer, made.graphs[-1], true[-1], np.random.default_rng(0))
    result = {
        "name": "robust and ordinary fidelity of an explanation, one core",
        "peer": "a loop over Explainer.get_masked_prediction of torch_geometric, one sample a call",
        "setting": f"GraphConv network on graphs of 19 to 29 nodes, {SAMPLES} samples an expectation, best of 3 rounds",
        "loop / ours, one explanation a call": round(best["loop"] / best["ours, one"], 1),
        f"loop / ours, a grid of {len(GRID) ** 2} candidates at once": round(best["loop"] / best["ours, grid"], 1),
        "difference of the ordinary FidΔ": abs(theirs[1] - one.ordinary_delta),
        "command": "OMP_NUM_THREADS=1 python benchmarks/graph_fidelity_samples.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
