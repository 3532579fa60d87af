"""The blocked recurrence of a HiPPO memory beside loops over time, and S4's kernel beside the dense formula, one core.

python benchmarks/hippo_recurrence.py [out.json]

The peers (state-spaces/s4, HiPPO's reference code) are not on PyPI; their designs are rebuilt here: a loop over time of
`x = F.linear(x, A) + B u` in torch, the same in numpy, a kernel from powers of the dense matrix, and the reference's Cauchy sums
at the roots of unity, all nodes and states in one table. Times are the least of several runs, taken in turn.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from theodolite.networks.hippo import HippoMemory, S4Kernel, discretize, hippo_matrix

LENGTH, STATES, MEMORY = 100_000, 64, 200
KINDS = (torch.complex64, torch.complex128)


def least(runs: int, **calls: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of each call, the least of ``runs``, in turn."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(runs):
        for name, call in calls.items():
            began = time.process_time()
            call()
            found[name] = min(found[name], time.process_time() - began)
    return found


def recurrence() -> dict[str, object]:
    u = np.random.default_rng(0).normal(size=LENGTH)
    A, B = discretize(*hippo_matrix("legs", STATES), 1 / MEMORY)
    At, Bt, ut = torch.from_numpy(A), torch.from_numpy(B), torch.from_numpy(u)
    memory = HippoMemory("legs", STATES, memory_steps=MEMORY)
    stretched = HippoMemory("legs", STATES, scaling="stretch")

    def loop() -> np.ndarray:
        x, states = np.zeros(STATES), np.empty((LENGTH, STATES))
        for k in range(LENGTH):
            x = A @ x + B * u[k]
            states[k] = x
        return states

    def torch_loop() -> list[torch.Tensor]:
        x, states = torch.zeros(STATES, dtype=torch.float64), []
        with torch.no_grad():
            for sample in ut:
                x = F.linear(x, At) + Bt * sample
                states.append(x)
        return states

    def updates() -> None:
        stream = HippoMemory("legs", STATES, memory_steps=MEMORY)
        for sample in u[: LENGTH // 10]:
            stream.update(sample)

    taken = least(
        5, blocked=lambda: memory.transform(u), loop=loop, torch_loop=torch_loop, updates=updates,
        stretched=lambda: stretched.transform(u),
    )  # fmt: skip
    taken["updates"] *= 10
    return {
        "setting": f"T = {LENGTH:,}, N = {STATES}, one channel, float64",
        "largest difference to the loop": float(np.abs(memory.transform(u)[:, 0] - loop()).max()),
        "seconds": {name: round(value, 4) for name, value in taken.items()},
        "ratio, torch loop (the reference's design) / blocked": round(taken["torch_loop"] / taken["blocked"], 1),
        "ratio, bare numpy loop / blocked": round(taken["loop"] / taken["blocked"], 1),
        "ratio, update() sample by sample / blocked": round(taken["updates"] / taken["blocked"], 1),
    }


def cauchy(made: S4Kernel, length: int, kind: torch.dtype) -> torch.Tensor:
    """The kernel (H, length) by the paper's formula: 2/(1 + w) [r(C~, B) - r(C~, P) r(P*, B) / (1 + r(P*, P))], rank 1."""
    Abar, _, row = (part.detach() for part in made.dense())
    tilde, half = (row[:, None] - row[:, None] @ torch.linalg.matrix_power(Abar, length))[:, 0], made.n_state // 2
    C = torch.complex(tilde[:, :half], -tilde[:, half:]).div(2).to(kind)
    Lambda = torch.complex(made.real.detach().clamp(max=0), made.imag.detach()).to(kind)
    B, P = (torch.view_as_complex(part.detach()).to(kind) for part in (made.B, made.P[:, 0]))
    dt = made.dt.detach()[:, None].double()
    angle = torch.arange(length // 2 + 1, dtype=torch.float64) * (2 * torch.pi / length)
    w = torch.polar(torch.ones_like(angle), -angle)
    last = length % 2 == 0  # w = -1, where the formula is 0/0
    inner = w[:-1] if last else w
    z = (2 / dt * (1 - inner) / (1 + inner)).to(kind)
    tables = 1 / (z[:, None] - Lambda[..., None]), 1 / (z[:, None] - Lambda.conj()[..., None])

    def r(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        v = (a * b)[:, None]
        return (v @ tables[0] + v.conj() @ tables[1])[:, 0]

    found = r(C, B) - r(C, P) * r(P.conj(), B) / (1 + r(P.conj(), P))
    found = (2 / (1 + inner)).to(kind) * found
    if last:
        found = torch.cat([found, (dt / 2 * 2 * (C * B).real.sum(dim=1, keepdim=True)).to(kind)], dim=1)
    return torch.fft.irfft(found, n=length)


def kernel() -> dict[str, object]:
    channels, length = 64, 1024
    made = S4Kernel(channels, STATES, "legs", l_max=length, generator=torch.Generator().manual_seed(0))
    Abar, Bbar, C = (part.detach().float() for part in made.dense())

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return made(length)

    def dense() -> torch.Tensor:
        x, out = Bbar[..., None], []
        for _ in range(length):
            out.append((C[:, None] @ x)[:, 0, 0])
            x = Abar @ x
        return torch.stack(out, dim=1)

    def trained() -> None:
        made.zero_grad()
        made(length).sum().backward()

    def dense_trained() -> None:
        leaf = Abar.clone().requires_grad_()
        x, out = Bbar[..., None], []
        for _ in range(length):
            out.append((C[:, None] @ x)[:, 0, 0])
            x = leaf @ x
        torch.stack(out, dim=1).sum().backward()

    taken = least(
        3, ours=ours, dense=dense, trained=trained, dense_trained=dense_trained,
        cauchy=lambda: cauchy(made, length, torch.complex64),
    )  # fmt: skip
    exact = made.double()(length).detach()
    apart = {kind: float((cauchy(made, length, kind) - exact).abs().max() / exact.abs().max()) for kind in KINDS}
    made.float()
    return {
        "setting": f"H = {channels}, N = {STATES}, L = {length}, float32",
        "largest relative difference": float((ours() - dense()).abs().max() / dense().abs().max()),
        "largest relative difference to the reference's Cauchy formula, float64": apart[torch.complex128],
        "the same of the reference's in float32": apart[torch.complex64],
        "seconds": {name: round(value, 4) for name, value in taken.items()},
        "ratio, the reference's Cauchy formula / ours": round(taken["cauchy"] / taken["ours"], 2),
        "ratio, dense powers / ours": round(taken["dense"] / taken["ours"], 2),
        "ratio, dense powers / ours, forward and backward": round(taken["dense_trained"] / taken["trained"], 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    result = {
        "name": "HiPPO memory and S4 kernel, one core",
        "peer": "designs of state-spaces/s4 and HiPPO's reference code, rebuilt (neither is on PyPI)",
        "recurrence": recurrence(),
        "kernel": kernel(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/hippo_recurrence.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
