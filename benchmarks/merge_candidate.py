"""One candidate of an evolutionary merge, written into a reused model, beside versions that start anew for each candidate.

Peer: mergekit (LGPL-3.0 and heavy, so neither installed nor copied). "its design" is what its pipeline does for a candidate,
written here with torch: copy the model, draw the masks (or rank the magnitudes) again, stack and elect whole tensors;
"NumPy" is the same without torch. All merge two sources and a base with other
weights and densities in every round; the time is that of the one thread on a core, so that other work on the machine does not
count.

Run: python benchmarks/merge_candidate.py [PATH]      writes merge_candidate.json beside this file, or PATH
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from theodolite.parameters.merging import METHODS, layer_groups
from theodolite.parameters.merging.methods import Merger

State = dict[str, Tensor]
Step = Callable[[np.ndarray, np.ndarray], object]


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class LikeSmolLM2(nn.Module):
    """The tensors of SmolLM2-135M: 49,152 x 576 tied embeddings and 30 blocks; random numbers, no forward."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / 24, requires_grad=False)

        self.embed_tokens = weight(49_152, 576)
        self.layers = nn.ModuleList(
            nn.ParameterDict(
                {
                    "q": weight(576, 576), "k": weight(192, 576), "v": weight(192, 576), "o": weight(576, 576),
                    "gate": weight(1536, 576), "up": weight(1536, 576), "down": weight(576, 1536),
                    "input_norm": weight(576), "mlp_norm": weight(576),
                }
            )
            for _ in range(30)
        )  # fmt: skip
        self.norm = weight(576)


def elected(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    votes = deltas * weights.view(-1, *[1] * (deltas.ndim - 1))
    agree = votes.sign() == torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0)
    mixed = (votes * agree).sum(dim=0)
    if normalize:
        divisor = (agree * weights.view(-1, *[1] * (deltas.ndim - 1))).sum(dim=0)
        mixed = mixed / torch.where(divisor == 0, 1.0, divisor)
    return mixed


def plain_torch(method: str, nets: list[nn.Module], groups: dict[str, list[str]]) -> Step:
    def step(weights: np.ndarray, densities: np.ndarray) -> nn.Module:
        model = copy.deepcopy(nets[0])
        start, *states = (net.state_dict() for net in nets)
        made = model.state_dict()
        for g, names in enumerate(groups.values()):
            for name in names:
                deltas = []
                for state, rho in zip(states, densities[g].tolist()):
                    delta = state[name] - start[name]
                    if method == "dare_ties":
                        delta = delta * torch.bernoulli(torch.full_like(delta, rho)) / rho
                    else:
                        mask = torch.zeros(delta.numel())
                        mask[delta.abs().view(-1).topk(int(rho * delta.numel())).indices] = 1
                        delta = delta * mask.view_as(delta)
                    deltas.append(delta)
                mixed = elected(torch.stack(deltas), torch.from_numpy(weights[g]).float(), METHODS[method].normalize)
                made[name].copy_(start[name] + mixed)
        return model

    return step


def plain_numpy(method: str, nets: list[nn.Module], groups: dict[str, list[str]]) -> Step:
    start, *states = ({n: t.numpy() for n, t in net.state_dict().items()} for net in nets)
    draw = np.random.default_rng(0)

    def kept(tau: np.ndarray, rho: float) -> np.ndarray:
        if method == "dare_ties":
            return np.where(draw.random(tau.shape, dtype=np.float32) < rho, tau / np.float32(rho), 0)
        cut = np.partition(np.abs(tau).ravel(), tau.size - int(rho * tau.size))[tau.size - int(rho * tau.size)]
        return np.where(np.abs(tau) >= cut, tau, 0)

    def step(weights: np.ndarray, densities: np.ndarray) -> dict[str, np.ndarray]:
        made = {}
        for g, names in enumerate(groups.values()):
            for name in names:
                taus = [kept(s[name] - start[name], rho) for s, rho in zip(states, densities[g])]
                votes = np.stack([np.float32(w) * tau for w, tau in zip(weights[g], taus)])
                agree = np.sign(votes) == np.where(votes.sum(axis=0) >= 0, 1, -1)
                mixed = (votes * agree).sum(axis=0)
                if METHODS[method].normalize:
                    share = weights[g].astype(np.float32).reshape(-1, *[1] * (votes.ndim - 1))
                    divisor = (agree * share).sum(axis=0)
                    mixed /= np.where(divisor == 0, 1, divisor)
                made[name] = start[name] + mixed
        return made

    return step


def ours(method: str, nets: list[nn.Module], groups: dict[str, list[str]]) -> Step:
    merger = Merger(nets[1:], base=nets[0], method=method, groups=groups)
    candidate = copy.deepcopy(nets[1])
    return lambda weights, densities: merger.into(candidate, weights, densities)


def measure(nets: list[nn.Module], rounds: int, methods: tuple[str, ...]) -> dict[str, dict[str, float]]:
    groups, table = layer_groups(nets[0]), {}
    draw = np.random.default_rng(0)
    for method in methods:
        steps = {
            "ours": ours(method, nets, groups),
            "its design": plain_torch(method, nets, groups),
            "NumPy": plain_numpy(method, nets, groups),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(rounds + 1):  # in turns: load hits all alike; the first round fills caches
            weights = draw.uniform(0.2, 1, (len(groups), 2))
            densities = draw.uniform(0.1, 0.9, (len(groups), 2))
            for name, step in steps.items():
                with torch.no_grad():
                    began = time.process_time()
                    step(weights, densities)
                if round_ > 0:
                    seconds[name].append(time.process_time() - began)
        table[method] = {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()}
    return table


def main() -> None:
    torch.set_num_threads(1)
    small = measure([mlp(s) for s in range(3)], 40, ("dare_ties", "ties"))
    large = measure([LikeSmolLM2(s) for s in range(3)], 2, ("dare_ties",))
    found = {
        "MLP of 118,282 weights, dare_ties": small["dare_ties"],
        "MLP of 118,282 weights, ties": small["ties"],
        "134.5 million weights, dare_ties": large["dare_ties"],
    }
    result = {
        "name": "one candidate merge of two sources and a base, other weights and densities each time, one thread, CPU time",
        "peer": "mergekit's design, written here",
        "ratios": {
            f"{name}, ours / its design": round(times["ours"] / times["its design"], 3) for name, times in found.items()
        },
        "milliseconds, MLP": small,
        "milliseconds, tensors of SmolLM2-135M": large,
        "command": "OMP_NUM_THREADS=1 python benchmarks/merge_candidate.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
