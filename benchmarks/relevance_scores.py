"""Scoring every unit of a network by relevance, beside one gradient (the Taylor criterion), and beside torch-pruning.

Peer: torch-pruning's Taylor importance over its dependency graph, where it is installed; it needs gradients that the caller
makes. EfficientNet-Lite0 comes from the wheel of `make models`, its images from THEODOLITE_DATA.

Run: python benchmarks/relevance_scores.py [PATH]      writes relevance_scores.json beside this file, or PATH
"""

import importlib.metadata
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from theodolite.core.builtin import builtin
from theodolite.core.sources import find_data
from theodolite.parameters.relevance_pruning import CRITERIA, unit_scores
from theodolite.reproductions.efficientnet import load_network, weights_file

ROUNDS = 5


def in_turns(works: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Processor time of each call in each round, one after the other, so that other work on the machine hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for round_, (name, work) in itertools.product(range(ROUNDS + 1), works.items()):
        started = time.process_time()
        work()
        if round_ > 0:  # the first is not counted
            taken[name].append(time.process_time() - started)
    return taken


def of_network(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    works: dict[str, Callable[[], Any]] = {
        name: lambda name=name: unit_scores(model, (x, y), criterion=name) for name in CRITERIA
    }
    peer = peer_work(model, x, y)
    taken = in_turns(works | ({"torch-pruning, Taylor": peer} if peer is not None else {}))
    model.zero_grad(set_to_none=True)
    middle = {name: statistics.median(values) for name, values in taken.items()}
    ratios = sorted(a / b for a, b in zip(taken["lrp"], taken["taylor"], strict=True))
    out = {
        "rows": len(x),
        "time of relevance / time of Taylor": round(statistics.median(ratios), 2),
        "smallest and largest of the rounds": [round(ratios[0], 2), round(ratios[-1], 2)],
        "rounds": ROUNDS,
        "seconds": {name: round(value, 3) for name, value in middle.items()},
        "seconds of all five": round(sum(middle[name] for name in CRITERIA), 2),
    }
    if peer is not None:
        out["time of Taylor, ours / torch-pruning"] = round(middle["taylor"] / middle["torch-pruning, Taylor"], 2)
    return out


def peer_work(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None] | None:
    """Backward pass, dependency graph and group importances; None where torch-pruning is not there or fails on the network."""
    try:
        import torch_pruning
    except ImportError:
        return None

    def work() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x[:1])
        importance = torch_pruning.importance.TaylorImportance()
        for group in graph.get_all_groups(ignored_layers=[list(model.modules())[-1]]):
            importance(group)

    try:
        work()
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        print(f"torch-pruning: {type(error).__name__}: {error}")
        return None
    return work


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*no reference row.*")  # a few images of 1,000 classes
    digits = builtin("digits")
    rows = digits.data.train.head(512)
    networks = {"the digits network": of_network(digits.predictor, rows.x, rows.y)}
    if weights_file() is not None and find_data("imagenet-1000.tar") is not None:
        x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        networks["EfficientNet-Lite0, 224 x 224"] = of_network(load_network(), x, torch.arange(8))
    try:
        peer = f"torch-pruning {importlib.metadata.version('torch-pruning')}"
    except importlib.metadata.PackageNotFoundError:
        peer = "torch-pruning (not installed here)"
    result = {
        "name": "scores of all units of a network, processor time, one core",
        "peer": peer,
        "networks": networks,
        "command": "OMP_NUM_THREADS=1 python benchmarks/relevance_scores.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
