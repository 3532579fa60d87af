"""Bases, edges and edge ablation of a one-block transformer, beside a loop over output features.

Peer: ApolloResearch/rib. It is not on PyPI, needs mpi4py and models of its own, and is not importable here; `looped_edges` and
`looped_ablation` below have its design, written here: one backward pass for each output feature in a Python loop, one forward
pass of the section for each row of the mask, nothing remembered between the steps of the bisection. Both get the same rows,
coordinates, number type and thread, and give the same numbers.

Run: python benchmarks/local_basis_edges.py [PATH]      writes a .json beside this file, or PATH
Needs rib/modadd-seed0.safetensors in the folder THEODOLITE_DATA.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from theodolite.activations.local_interaction_basis import (
    LocalInteractionBasis,
    NotMonotoneWarning,
    ResolutionWarning,
    accuracy,
    edges,
    edges_required,
)
from theodolite.core.sources import find_data
from theodolite.reproductions.local_interaction_adder import load_adder, pairs

ROWS, ROUNDS, DROP, AFTER = 500, 3, 0.001, 8


def looped_grams(basis: LocalInteractionBasis, f: Tensor, layer: int) -> Tensor:
    """K of one node, one feature of the next at a time."""
    after, section = basis.layers_[layer + 1], basis.sections_.functions[layer]
    node = f.detach().requires_grad_()
    z = section(node) @ after.C
    total = torch.zeros(f.shape[-1], f.shape[-1], dtype=torch.float64)
    for i in range(z.shape[1]):
        (slope,) = torch.autograd.grad(z[:, i].sum(), node, retain_graph=True)
        flat = slope.reshape(-1, f.shape[-1])
        total += torch.einsum("nj,nk->jk", flat, flat)
    return total / f[..., 0].numel()


def looped_edges(basis: LocalInteractionBasis, f: Tensor, layer: int) -> Tensor:
    """E of one pair of nodes, one feature of the next at a time."""
    before, after = basis.layers_[layer : layer + 2]
    node = f.detach().requires_grad_()
    z = basis.sections_.functions[layer](node) @ after.C
    features = before.transform(f)
    rows = []
    for i in range(z.shape[1]):
        (slope,) = torch.autograd.grad(z[:, i].sum(), node, retain_graph=True)
        parts = (slope @ before.C_pinv.T) * features
        rows.append((parts.sum(dim=1) if parts.ndim == 3 else parts).square().sum(dim=0))
    return torch.stack(rows) / f[..., 0].numel()


@torch.no_grad()
def looped_required(basis: LocalInteractionBasis, f: Tensor, y: Tensor, layer: int, E: Tensor) -> int:
    """Edges required by bisection, then 8 more, with one pass of the section for each row of the mask at every step."""
    before, after = basis.layers_[layer : layer + 2]
    features, section = before.transform(f), basis.sections_.functions[layer]
    rank = torch.empty(E.numel(), dtype=torch.int64)
    rank[E.flatten().argsort(descending=True, stable=True)] = torch.arange(E.numel())
    rank = rank.reshape(E.shape)

    def score(m: int) -> float:
        columns = []
        for i, mask in enumerate((rank < m).double()):
            made = section(before.inverse_transform(features * mask))
            columns.append((made - after.mean) @ after.C[:, i])
        out = basis.sections_.run(after.inverse_transform(torch.stack(columns, dim=1)), layer + 1)
        return float((out.argmax(dim=1) == y).double().mean())

    enough = float((basis.sections_.run(f, layer).argmax(dim=1) == y).double().mean()) - DROP - 1e-12
    low, high = -1, E.numel()
    while high - low > 1:
        middle = (low + high + 1) // 2
        low, high = (low, middle) if score(middle) >= enough else (middle, high)
    start = m = high
    while m <= min(start + AFTER, E.numel()):
        start = start if score(m) >= enough else m + 1
        m += 1
    return start


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """Seconds of the processor, so that other programs on the machine do not count, and the answer."""
    began = time.process_time()
    answer = call()
    return time.process_time() - began, answer


def main() -> None:
    torch.set_num_threads(1)
    path = find_data("rib/modadd-seed0.safetensors")
    if path is None:
        sys.exit("needs rib/modadd-seed0.safetensors: set THEODOLITE_DATA")
    model = load_adder(path)
    tokens, sums, fit, _ = pairs()
    x, y = model.embed(tokens[fit[:ROWS]]), sums[fit[:ROWS]]
    basis = LocalInteractionBasis(model.sections()).fit(x)
    nodes = basis.sections_.nodes(x)
    E = [edges(basis, x, layer) for layer in range(3)]
    for layer in range(3):
        off = float((E[layer] - looped_edges(basis, nodes[layer], layer)).norm() / E[layer].norm())
        if off > 1e-9:
            sys.exit(f"the edges of pair {layer} differ by {off:.1e}")

    def required() -> list[int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotMonotoneWarning)
            warnings.simplefilter("ignore", ResolutionWarning)
            return [edges_required(basis, x, accuracy(y), n, drop=DROP, edges=E[n]) for n in range(3)]

    tasks: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "bases": (
            lambda: LocalInteractionBasis(model.sections()).fit(x),
            lambda: [looped_grams(basis, nodes[n], n) for n in range(3)],
        ),
        "edges": (
            lambda: [edges(basis, x, n) for n in range(3)],
            lambda: [looped_edges(basis, nodes[n], n) for n in range(3)],
        ),
        "edges required": (required, lambda: [looped_required(basis, nodes[n], y, n, E[n]) for n in range(3)]),
    }
    ratios, seconds, answers = {}, {}, {}
    for name, (ours, theirs) in tasks.items():
        rounds = 1 if name == "edges required" else ROUNDS
        runs: dict[str, list[float]] = {"ours": [], "loop": []}
        for _ in range(rounds):  # in turns: load hits both alike
            took, theirs_found = timed(theirs)
            runs["loop"].append(took)
            took, ours_found = timed(ours)
            runs["ours"].append(took)
        if name == "edges required":
            answers = {"ours": ours_found, "loop": theirs_found}
        ours_s, loop_s = (statistics.median(runs[key]) for key in ("ours", "loop"))
        ratios[f"{name}: ours / loop"] = round(ours_s / loop_s, 3)
        seconds[name] = {"ours": round(ours_s, 2), "loop": round(loop_s, 2)}
    result = {
        "name": f"one-block transformer (mod 113, seed 0), three pairs of nodes, {ROWS} rows, float64, one core",
        "peer": "ApolloResearch/rib (not importable here; measured instead: the same design, written here)",
        "ratios": ratios,
        "processor seconds": seconds,
        "edges required": answers,
        "note": "the loop's bases are K alone; ours are whole, with Gram matrices and eigenvectors",
        "command": "OMP_NUM_THREADS=1 python benchmarks/local_basis_edges.py",
    }
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
