"""The kernel beside its direct formula, and the layers beside torch's recurrent and convolution layers and a step loop.

Every measurement runs in a child process of its own, so that its peak of memory is its own; processor time, forward and
backward, the least of a few rounds.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from theodolite.core.memory import peak_memory
from theodolite.networks.diagonal_ssm import S4D, DiagonalSSMKernel
from theodolite.networks.hippo import S4

H, N = 64, 64
LENGTHS = (1024, 4096, 16_384, 65_536)
LONGEST_LOOP = 4096  # a loop keeps every step for the backward pass; its cost grows in proportion
BATCH = 8  # of the one comparison at L 4,096; the growth with L is measured on one row


def direct(kernel: DiagonalSSMKernel, length: int) -> Tensor:
    _, Bbar = kernel.discretize()
    steps = torch.arange(length) * kernel.dt[:, None]
    table = torch.exp(kernel.eigenvalues()[..., None] * steps[:, None])
    return torch.einsum("hn,hnl->hl", kernel.output_weights * Bbar, table).real


def loop(layer: S4D, u: Tensor) -> Tensor:
    state, outputs = layer.initial_state(len(u)), []
    for sample in u.unbind(dim=1):
        y, state = layer.step(sample, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


class LongConvolution(nn.Module):
    """A convolution of 31 steps over all channels, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(H, H, 31, padding=30)

    def forward(self, u: Tensor) -> Tensor:
        """The layer's output."""
        return self.inner(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)


def kernel_call(name: str, length: int) -> Callable[[], Tensor]:
    kernel = DiagonalSSMKernel(H, N, seed=0)
    return (lambda: kernel(length)) if name == "two-level kernel" else (lambda: direct(kernel, length))


def layer_call(name: str, length: int, batch: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    u = torch.randn(batch, length, H)
    s4d, s4 = S4D(H, N), S4(H, N)
    calls: dict[str, Callable[[], Tensor]] = {
        "S4D": lambda: s4d(u)[0],
        "S4, outputs alone": lambda: s4.convolve(u),
        "step loop": lambda: loop(s4d, u),
    }
    if name in calls:
        return calls[name]
    if name == "nn.Conv1d, 31 steps":
        convolution = LongConvolution()
        return lambda: convolution(u)
    recurrent = nn.LSTM(H, H, batch_first=True) if name == "nn.LSTM" else nn.GRU(H, H, batch_first=True)
    return lambda: recurrent(u)[0]


def measure(make: Callable[[], Callable[[], Tensor]], rounds: int = 3) -> dict[str, float]:
    """Seconds and MB of one call, measured in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call, found = make(), []
            with peak_memory() as peak:
                for _ in range(rounds):
                    began = time.process_time()
                    call().square().sum().backward()
                    found.append(time.process_time() - began)
            os.write(writing, json.dumps({"s": min(found), "MB": (peak.bytes or 0) / 1e6}).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a measurement failed")
    return json.loads(text)


def main() -> None:
    torch.set_num_threads(1)
    kernels = {
        f"{name}, L {length:,}": measure(lambda name=name, length=length: kernel_call(name, length))
        for length in LENGTHS[:2]
        for name in ("two-level kernel", "direct kernel")
    }
    names = ("S4D", "S4, outputs alone", "nn.LSTM", "nn.GRU", "nn.Conv1d, 31 steps", "step loop")
    fair = {
        name: measure(lambda name=name: layer_call(name, 4096, BATCH), 1 if name == "step loop" else 3)
        for name in names
    }
    growth: dict[str, Any] = {}
    for name in names:
        for length in LENGTHS:
            if name != "step loop" or length <= LONGEST_LOOP:
                rounds = 1 if name == "step loop" or length > 16_384 else 2
                call = lambda name=name, length=length: layer_call(name, length, 1)  # noqa: E731
                growth[f"{name}, L {length:,}"] = measure(call, rounds)
    with torch.no_grad():
        pair = [kernel_call(name, 4096)() for name in ("two-level kernel", "direct kernel")]
    ours, theirs = kernels["two-level kernel, L 4,096"], kernels["direct kernel, L 4,096"]
    last = f"L {LENGTHS[-1]:,}"
    ratios = {
        "kernel L 4,096, largest relative difference to the direct formula": float(
            f"{float((pair[0] - pair[1]).abs().max() / pair[1].abs().max()):.1e}"
        ),
        "kernel L 4,096, time: direct / two-level": round(theirs["s"] / ours["s"], 1),
        "kernel L 4,096, peak memory: direct / two-level": round(theirs["MB"] / max(ours["MB"], 0.1), 1),
        **{
            f"layer L 4,096, batch {BATCH}, time: {name} / S4D": round(fair[name]["s"] / fair["S4D"]["s"], 2)
            for name in names[1:]
        },
        **{
            f"layer {last}, batch 1, time: {name} / S4D": round(
                growth[f"{name}, {last}"]["s"] / growth[f"S4D, {last}"]["s"], 2
            )
            for name in names[1:5]
        },
        **{
            f"layer {last}, batch 1, memory: {name} / S4D": round(
                growth[f"{name}, {last}"]["MB"] / growth[f"S4D, {last}"]["MB"], 2
            )
            for name in names[1:5]
        },
        "S4D, exponent of the time in L, 1k to 64k": round(
            math.log(growth[f"S4D, {last}"]["s"] / growth["S4D, L 1,024"]["s"]) / math.log(LENGTHS[-1] / 1024), 2
        ),
    }
    rounded = {
        key: {unit: round(value, 4 if unit == "s" else 1) for unit, value in row.items()}
        for key, row in (
            kernels | {f"{name}, L 4,096, batch {BATCH}": row for name, row in fair.items()} | growth
        ).items()
    }
    result = {
        "name": f"diagonal state space kernel and layer, H {H}, N {N}, forward and backward, one core",
        "peer": "the direct Vandermonde formula; nn.LSTM, nn.GRU, nn.Conv1d of torch; a loop over S4D.step",
        "ratios": ratios,
        "processor seconds, and MB more at the peak (rows without a batch: one row)": rounded,
        "not measured": f"the step loop beyond L {LONGEST_LOOP:,}: it keeps every step, and its time grows in proportion",
        "load average": round(os.getloadavg()[0], 1),
        "command": "OMP_NUM_THREADS=1 python benchmarks/state_space_layers.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
