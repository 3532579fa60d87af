"""A training step with Tucker updates of two convolutions, beside full fine-tuning of them, two convolutions a layer, and peft.

Two convolutions a layer is how the paper's own code does it: the frozen layer, and a convolution with the update, whose input
goes through dropout. `TwoConvolutions` below is that design, written here, with its dropout and without.
Peer: peft's LoRA on the same two convolutions (rank 4), which is a kernel-sized and a 1 x 1 convolution beside the frozen one.

Run: python benchmarks/tucker_step.py [PATH]      writes tucker_step.json beside this file, or PATH
"""

import copy
import importlib
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.parameters.tucker import TuckerDelta, adapt
from theodolite.reproductions.flora import small_network

BATCH, ROUNDS, LAYERS, RANKS = 50, 60, ["3", "6"], (8, 8, 3, 3)


class TwoConvolutions(nn.Module):
    """The frozen convolution's answer and that of the update on its own, the update made axis by axis in the order of axes."""

    def __init__(self, layer: nn.Conv2d, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = layer.requires_grad_(False), nn.Dropout(dropout)
        shape = tuple(layer.weight.shape)
        start = TuckerDelta(shape, RANKS, seed=0)
        self.core, self.factors = start.core, start.factors

    def forward(self, x: Tensor) -> Tensor:
        """f(x; W) + f(drop(x); D)."""
        update = 4.0 * self.core
        for mode, factor in enumerate(self.factors):
            update = torch.tensordot(factor, update, dims=([1], [mode])).movedim(0, mode)  # type: ignore[arg-type]
        return self.layer(x) + nn.functional.conv2d(self.dropout(x), update, padding=self.layer.padding)  # type: ignore[arg-type]


def two_convolutions(dropout: float) -> nn.Module:
    net = small_network(0).requires_grad_(False)
    for name in LAYERS:
        setattr(net, name, TwoConvolutions(net.get_submodule(name), dropout))  # type: ignore[arg-type]
    return net


def ours(**options: Any) -> nn.Module:
    net = small_network(0)
    adapt(net, include=LAYERS, **{"ranks": RANKS, **options})
    return net


def full() -> nn.Module:
    """The same two kernels trained in place: what an adapter has to cost no more than."""
    net = small_network(0).requires_grad_(False)
    for name in LAYERS:
        net.get_submodule(name).get_parameter("weight").requires_grad_(True)
    return net


def peer() -> nn.Module | None:
    try:
        peft = importlib.import_module("peft")
    except ImportError:
        return None
    return peft.get_peft_model(small_network(0), peft.LoraConfig(r=4, lora_alpha=16, target_modules=LAYERS))


def step_of(model: nn.Module) -> Callable[[], None]:
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def answer_of(model: nn.Module) -> Callable[[], None]:
    x = torch.randn(BATCH, 1, 28, 28)
    model = copy.deepcopy(model).eval()

    def answer() -> None:
        with torch.no_grad():
            model(x)

    return answer


def milliseconds(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median processor time of each on one thread, in turns: other work on the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_, (name, call) in itertools.product(range(ROUNDS + 5), calls.items()):
        began = time.process_time()
        call()
        if round_ >= 5:
            seconds[name].append(time.process_time() - began)
    return {name: round(1000 * statistics.median(values), 3) for name, values in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {
        "full fine-tuning of the two kernels": full(),
        "ours": ours(),
        "ours, dropout 0.01": ours(dropout=0.01),
        "ours, LoRA of rank 4": ours(kind="lora", ranks=4),
        "two convolutions, dropout 0.01": two_convolutions(0.01),
        "two convolutions": two_convolutions(0.0),
    }
    version, other = "not installed", peer()
    if other is not None:
        version = importlib.metadata.version("peft")
        models["peft LoRA of rank 4"] = other
    step = milliseconds({name: step_of(model) for name, model in models.items()})
    answer = milliseconds({name: answer_of(model) for name, model in models.items()})
    ratios = {
        "step, ours / full fine-tuning": step["ours"] / step["full fine-tuning of the two kernels"],
        "step, two convolutions with dropout / ours": step["two convolutions, dropout 0.01"] / step["ours"],
        "step, two convolutions without dropout / ours": step["two convolutions"] / step["ours"],
        "step, both with dropout, two convolutions / ours": step["two convolutions, dropout 0.01"]
        / step["ours, dropout 0.01"],
        "answer, two convolutions / ours": answer["two convolutions"] / answer["ours"],
    }
    if other is not None:
        ratios["step, peft LoRA / ours"] = step["peft LoRA of rank 4"] / step["ours"]
        ratios["answer, peft LoRA / ours"] = answer["peft LoRA of rank 4"] / answer["ours"]
    result = {
        "name": "a training step with Tucker updates (8, 8, 3, 3) of two 3 x 3 convolutions, 28 x 28 images, batch 50, one core",
        "peer": f"two convolutions a layer (the design of the paper's code, written here); peft {version}, LoRA of rank 4",
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "milliseconds a step (processor time)": step,
        "milliseconds an answer without gradients": answer,
        "trained numbers": {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()
        },
        "command": "OMP_NUM_THREADS=1 python benchmarks/tucker_step.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
