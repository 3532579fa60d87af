"""A training step of a shared network beside an ordinary one and beside the design of FakeRoast.

FakeRoast (github.com/apd10/FakeRoast) has no licence and no package. What is measured here is its design, written for this
script: every layer keeps an int64 slot and a float sign for each of its weights, reads by an advanced index, and leaves the
adjoint to autograd.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from theodolite.parameters.sharing import SharedEmbedding, share_parameters

COMPRESSIONS = (10, 300)
BATCH, ROUNDS = 100, 150
SIZES = (784, 300, 100, 10)


class StoredLinear(nn.Module):
    """A dense layer that reads an array through slots and signs kept for every weight."""

    slots: Tensor
    signs: Tensor

    def __init__(self, plain: nn.Linear, array: nn.Parameter, slots: Tensor, signs: Tensor, scale: float) -> None:
        super().__init__()
        self.array, self.bias, self.scale = array, plain.bias, scale
        self.register_buffer("slots", slots.view(plain.weight.shape))
        self.register_buffer("signs", signs.view(plain.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return nn.functional.linear(x, self.array[self.slots] * self.signs * self.scale, self.bias)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(SIZES):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def stored(compression: int) -> nn.Module:
    """The peer's design with our slots, signs and start, so that both compute the same function."""
    ours, plain = share_parameters(network(), compression=compression), network()
    array, at = nn.Parameter(ours.array.detach().clone()), 0
    for i, (name, scale) in zip((0, 2, 4), ours.scales.items(), strict=True):
        size = ours.weight(name).numel()
        slots, signs = ours.map.indices(at, at + size), ours.map.signs(at, at + size).float()
        plain[i] = StoredLinear(plain[i], array, slots, signs, scale)  # type: ignore[arg-type]
        at += size
    weight = ours.gradient_weight
    array.register_hook(lambda gradient: gradient * weight)
    return plain


def step_of(model: nn.Module) -> Callable[[], None]:
    x, y = torch.randn(BATCH, SIZES[0]), torch.randint(0, SIZES[-1], (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def stored_bytes(model: nn.Module) -> int:
    """Parameters and buffers that stay in memory between steps."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median and least processor time in milliseconds; in turns, so that the load of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_, (name, step) in itertools.product(range(rounds + 3), steps.items()):
        began = time.thread_time()
        step()
        if round_ >= 3:
            seconds[name].append(time.thread_time() - began)
    return {name: (1000 * statistics.median(values), 1000 * min(values)) for name, values in seconds.items()}


def lookup_of(rows: int) -> Callable[[], None]:
    table = SharedEmbedding(rows, 16, torch.randn(1_000_000), seed=1)
    chosen = torch.randint(0, rows, (1024,))

    def look() -> None:
        with torch.no_grad():
            table(chosen)

    return look


def main() -> None:
    torch.set_num_threads(1)
    models: dict[str, nn.Module] = {"dense": network()}
    for compression in COMPRESSIONS:
        models[f"ours {compression}x"] = share_parameters(network(), compression=compression)
        models[f"stored indices {compression}x"] = stored(compression)
    x = torch.randn(5, SIZES[0])
    for compression in COMPRESSIONS:
        one, other = models[f"ours {compression}x"](x), models[f"stored indices {compression}x"](x)
        if not torch.allclose(one, other, atol=1e-4):
            raise SystemExit(f"the two designs disagree at {compression}x")
    ms = in_turns({name: step_of(model) for name, model in models.items()}, ROUNDS)
    size = {name: stored_bytes(model) for name, model in models.items()}
    looks = in_turns({f"{rows:,} rows": lookup_of(rows) for rows in (10**6, 10**7)}, ROUNDS)
    ratios = {}
    for compression in COMPRESSIONS:
        ours, peer = f"ours {compression}x", f"stored indices {compression}x"
        ratios |= {
            f"step {compression}x, ours / dense": round(ms[ours][0] / ms["dense"][0], 3),
            f"step {compression}x, ours / stored indices": round(ms[ours][0] / ms[peer][0], 3),
            f"memory {compression}x, stored indices / ours": round(size[peer] / size[ours], 1),
        }
    ratios["embedding lookup, 10^7 rows / 10^6 rows"] = round(
        looks["10,000,000 rows"][0] / looks["1,000,000 rows"][0], 3
    )
    result = {
        "name": "a training step of a shared FC 784-300-100-10 (266,200 weights), batch 100, SGD with momentum, one core",
        "peer": "FakeRoast's design, written here: an int64 slot and a float sign stored for every weight",
        "ratios": ratios,
        "milliseconds of processor time a step (median, least)": {
            name: [round(v, 3) for v in values] for name, values in ms.items()
        },
        "bytes of parameters and buffers": size,
        "milliseconds of processor time a lookup of 1,024 rows of 16 (median, least)": {
            name: [round(v, 3) for v in values] for name, values in looks.items()
        },
        "load average": round(float(Path("/proc/loadavg").read_text().split()[0]), 1)
        if Path("/proc/loadavg").exists()
        else None,
        "command": "OMP_NUM_THREADS=1 python benchmarks/shared_step.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
