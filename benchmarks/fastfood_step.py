"""A training step in a subspace, beside the step of the same network trained directly and beside one transform per tensor.

Peer: intrinsic-dimensionality (PyPI, 0.1), which gives every tensor a fastfood transform of its own and puts the result in
place in every forward. Its wheel holds no module (`pip install --no-deps intrinsic-dimensionality` installs nothing that
can be imported); with a clone of github.com/jgamper/intrinsic-dimensionality on PYTHONPATH it is timed too, and its columns
have norm sqrt(number of tensors). `PerTensor` below is the same design, written here with the same column norms as ours.

Run: python benchmarks/fastfood_step.py [PATH]      writes fastfood_step.json beside this file, or PATH
"""

import importlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.parameters.reparametrization import KINDS
from theodolite.parameters.subspace import SubspaceModel

DIMENSION, BATCH, ROUNDS = 750, 128, 40


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


def hadamard_by_levels(x: Tensor) -> Tensor:
    """One axis of length 2 for each butterfly, the first of them the widest."""
    levels = len(x).bit_length() - 1
    cube = x.view([2] * levels)
    for axis in range(levels):
        a, b = cube.select(axis, 0), cube.select(axis, 1)
        cube = torch.stack((a + b, a - b), dim=axis)
    return cube.reshape(-1)


class PerTensor(nn.Module):
    """One fastfood transform for each tensor, differentiated step by step, its pieces put in place in every forward."""

    def __init__(self, module: nn.Module, d: int) -> None:
        super().__init__()
        self.coordinates = nn.Parameter(torch.zeros(d))
        self.start = {name: p.detach().clone() for name, p in module.named_parameters()}
        total = sum(p.numel() for p in self.start.values())
        self.module, self.pieces = module, []
        for name, value in self.start.items():
            holder, _, attribute = name.rpartition(".")
            size = max(value.numel(), d)  # where a tensor has fewer weights than there are coordinates, none is cut off
            length = 1 << (size - 1).bit_length()
            gaussian = torch.randn(length)
            # of the squared length 1 that a column has over the network, a tensor of n weights gets n / D
            scale = torch.sqrt(length * gaussian.square().sum()) * math.sqrt(total / length)
            signs, order = torch.randint(0, 2, (length,)) * 2.0 - 1, torch.randperm(length)
            self.pieces.append((module.get_submodule(holder), attribute, value, signs, order, gaussian / scale))
            delattr(module.get_submodule(holder), attribute)

    def piece(self, z: Tensor, value: Tensor, signs: Tensor, order: Tensor, gaussian: Tensor) -> Tensor:
        """P z for one tensor."""
        padded = nn.functional.pad(z, (0, len(signs) - len(z)))
        return hadamard_by_levels(gaussian * hadamard_by_levels(padded * signs)[order])[: value.numel()]

    def forward(self, x: Tensor) -> Tensor:
        """Scores at the present coordinates."""
        for holder, attribute, value, *map_ in self.pieces:
            setattr(holder, attribute, value + self.piece(self.coordinates, value, *map_).view(value.shape))
        return self.module(x)

    def column_norms(self, columns: int) -> Tensor:
        """Norms of the first columns over all tensors together."""
        units = torch.eye(len(self.coordinates))[:columns]
        parts = [[self.piece(unit, *one[2:]).square().sum() for one in self.pieces] for unit in units]
        return torch.tensor(parts).sum(dim=1).sqrt()


def peer_model() -> nn.Module | None:
    try:
        package: Any = importlib.import_module("intrinsic.fastfood")
    except ImportError:
        return None
    return package.FastfoodWrap(network(), DIMENSION, device="cpu")


def step_of(model: nn.Module) -> Callable[[], None]:
    x, y = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    torch.set_num_threads(1)
    ours = {kind: SubspaceModel(network(), DIMENSION, projection=kind) for kind in KINDS if kind != "dense"}
    # the dense map of this network has 1.5e8 entries, more than make_projection agrees to
    ours["dense, d = 100"] = SubspaceModel(network(), 100, projection="dense")
    variant, peer = PerTensor(network(), DIMENSION), peer_model()
    models = {"direct": network(), **ours, "per-tensor fastfood": variant}
    if peer is not None:
        models["intrinsic-dimensionality"] = peer
    steps = {name: step_of(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_, (name, step) in itertools.product(range(ROUNDS + 3), steps.items()):  # in turns: load hits all alike
        began = time.perf_counter()
        step()
        if round_ >= 3:
            seconds[name].append(time.perf_counter() - began)
    ms = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    against = "intrinsic-dimensionality" if peer is not None else "per-tensor fastfood"
    norms = {"ours": ours["fastfood"].map.column_norms()[:40], "per tensor": variant.column_norms(40)}
    result = {
        "name": "a training step in a random subspace, FC 784-200-200-10 (D = 199,210), d = 750, batch 128, one core",
        "peer": "intrinsic-dimensionality 0.1"
        + (
            ""
            if peer is not None
            else " (not importable here: its wheel has no module; measured instead: the same design, written here)"
        ),
        "ratios": {
            f"fastfood step, ours / {against}": round(ms["fastfood"] / ms[against], 3),
            "hashed step / direct step": round(ms["hashed"] / ms["direct"], 3),
            "sparse step / direct step": round(ms["sparse"] / ms["direct"], 3),
            "fastfood step / direct step": round(ms["fastfood"] / ms["direct"], 3),
        },
        "milliseconds a step": {name: round(value, 3) for name, value in ms.items()},
        "column norms of fastfood": {
            name: [round(float(value.min()), 3), round(float(value.max()), 3)] for name, value in norms.items()
        },
        "command": "OMP_NUM_THREADS=1 python benchmarks/fastfood_step.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
