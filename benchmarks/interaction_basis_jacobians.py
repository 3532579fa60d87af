"""The interaction basis of a one-block transformer, beside a loop over output coordinates, node by node.

Peer: ApolloResearch/rib. It is not on PyPI, needs mpi4py and models of its own, and is not importable here; `looped` below has
its design, written here: for every node on its own it runs the rest of the model again, takes one backward pass for each
output coordinate in a Python loop, keeps the whole Jacobian and contracts it in float64. Both get the same rows, batches,
number type and thread. Also timed: the digits network and one wide layer, which have a budget.

Run: python benchmarks/interaction_basis_jacobians.py [PATH]      writes a .json beside this file, or PATH
Needs rib/modadd-seed0.safetensors in the folder THEODOLITE_DATA (random weights of the same shape where it is not there).
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from theodolite.activations.interaction_basis import InteractionBasis
from theodolite.core.sources import find_data

ROWS, BATCH, ROUNDS, MODULUS = 1000, 250, 3, 113
NODES = ["before_attention", "before_mlp", "after_mlp"]


class Adder(nn.Module):
    """One block without normalisation; (n, 3) tokens -> (n, 113) scores of the sum at the last position."""

    def __init__(self, w: dict[str, Tensor]) -> None:
        super().__init__()
        self.w = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(v, requires_grad=False) for name, v in w.items()}
        )
        self.before_attention, self.before_mlp, self.after_mlp = nn.Identity(), nn.Identity(), nn.Identity()

    def attend(self, h: Tensor) -> Tensor:
        """Residual stream after attention."""
        q, k, v = (
            torch.einsum("npd,hde->nhpe", h, self.w[f"blocks_0_attn_W_{x}"]) + self.w[f"blocks_0_attn_b_{x}"][:, None]
            for x in "QKV"
        )
        hidden = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        pattern = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf).softmax(dim=-1)
        return h + torch.einsum("nhpe,hed->npd", pattern @ v, self.w["blocks_0_attn_W_O"]) + self.w["blocks_0_attn_b_O"]

    def think(self, h: Tensor) -> Tensor:
        """Residual stream after the MLP."""
        inner = torch.relu(h @ self.w["blocks_0_mlp_W_in"] + self.w["blocks_0_mlp_b_in"])
        return h + inner @ self.w["blocks_0_mlp_W_out"] + self.w["blocks_0_mlp_b_out"]

    def read(self, h: Tensor) -> Tensor:
        """Scores at the last position."""
        return h[:, -1] @ self.w["unembed_W_U"][:, :MODULUS] + self.w["unembed_b_U"][:MODULUS]

    def forward(self, tokens: Tensor) -> Tensor:
        """All of it."""
        h = self.before_attention(self.w["embed_W_E"][tokens] + self.w["pos_embed_W_pos"])
        return self.read(self.after_mlp(self.think(self.before_mlp(self.attend(h)))))


def weights() -> tuple[dict[str, Tensor], str]:
    path = find_data("rib/modadd-seed0.safetensors")
    if path is not None:
        found = load_file(path)
        return {n: v for n, v in found.items() if "IGNORE" not in n and "mask" not in n}, "trained weights (seed 0)"
    torch.manual_seed(0)
    shapes = {
        "embed.W_E": (114, 128), "pos_embed.W_pos": (3, 128), "unembed.W_U": (128, 114), "unembed.b_U": (114,),
        "blocks.0.attn.W_O": (4, 32, 128), "blocks.0.attn.b_O": (128,), "blocks.0.mlp.W_in": (128, 512),
        "blocks.0.mlp.b_in": (512,), "blocks.0.mlp.W_out": (512, 128), "blocks.0.mlp.b_out": (128,),
        **{f"blocks.0.attn.W_{x}": (4, 128, 32) for x in "QKV"}, **{f"blocks.0.attn.b_{x}": (4, 32) for x in "QKV"},
    }  # fmt: skip
    return {name: torch.randn(shape) / 11 for name, shape in shapes.items()}, "random weights"


def looped(model: Adder, tokens: Tensor) -> list[Tensor]:
    """K of the three nodes, one output coordinate and one node at a time."""
    rests: list[Callable[[Tensor], Tensor]] = [
        lambda h: model.read(model.think(model.attend(h))),
        lambda h: model.read(model.think(h)),
        model.read,
    ]
    grams = [torch.zeros(128, 128, dtype=torch.float64) for _ in rests]
    for rows in tokens.split(BATCH):
        with torch.no_grad():
            start = model.w["embed_W_E"][rows] + model.w["pos_embed_W_pos"]
            middle = model.attend(start)
            nodes = [start, middle, model.think(middle)]
        for gram, node, rest in zip(grams, nodes, rests, strict=True):
            node = node.detach().requires_grad_()
            out = rest(node)
            jacobian = torch.empty(out.shape[1], *node.shape, dtype=node.dtype)
            for i in range(out.shape[1]):
                (jacobian[i],) = torch.autograd.grad(out[:, i].sum(), node, retain_graph=True)
            flat = jacobian.double()
            gram += torch.einsum("onpj,onpk->jk", flat, flat)
    return [gram / (3 * len(tokens)) for gram in grams]


def timed(call: Callable[[], object]) -> float:
    """Seconds of the processor: other programs on the machine do not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    tensors, which = weights()
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    chosen = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:ROWS]]
    tokens = torch.cat([chosen, torch.full((ROWS, 1), MODULUS)], dim=1)
    result: dict[str, object] = {
        "name": f"interaction basis of a one-block transformer (mod {MODULUS}, d 128, 3 nodes), {ROWS} rows, one core, {which}",
        "peer": "ApolloResearch/rib (not importable here; measured instead: the same design, written here)",
    }
    ratios, seconds = {}, {}
    for dtype in (torch.float32, torch.float64):
        model = Adder({name: value.to(dtype) for name, value in tensors.items()}).eval()
        kept: dict[str, list[Tensor]] = {}

        def ours(model: Adder = model, kept: dict[str, list[Tensor]] = kept) -> None:
            basis = InteractionBasis.from_module(model, NODES, batch_size=BATCH).fit(tokens)
            kept["ours"] = [layer.jacobian_gram for layer in basis.layers_]

        def theirs(model: Adder = model, kept: dict[str, list[Tensor]] = kept) -> None:
            kept["theirs"] = looped(model, tokens)

        runs: dict[str, list[float]] = {"ours": [], "loop": []}
        for _ in range(ROUNDS):  # in turns: load hits both alike
            runs["loop"].append(timed(theirs))
            runs["ours"].append(timed(ours))
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(kept["ours"][:3], kept["theirs"], strict=True))
        name = str(dtype).removeprefix("torch.")
        ours_s, loop_s = (statistics.median(runs[key]) for key in ("ours", "loop"))
        ratios[f"{name}: whole basis, ours / loop for K alone"] = round(ours_s / loop_s, 3)
        seconds[name] = {"ours": round(ours_s, 3), "loop": round(loop_s, 3), "K differs by": f"{off:.1e}"}
    result["ratios"] = ratios
    result["processor seconds"] = seconds

    torch.manual_seed(0)
    digits = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.from_numpy(load_digits().data).float() / 16
    wide = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    many = torch.randn(4096, 64)
    result["budgets"] = {
        "digits network 64-64-64-10, 1,797 rows, all layers (< 3 s)": round(
            timed(lambda: InteractionBasis.from_module(digits, ["input", "1", "3"]).fit(x)), 3
        ),
        "one 2,048-wide layer, 4,096 rows (< 20 s)": round(
            timed(lambda: InteractionBasis.from_module(wide, ["3"]).fit(many)), 3
        ),
    }
    result["command"] = "OMP_NUM_THREADS=1 python benchmarks/interaction_basis_jacobians.py"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
