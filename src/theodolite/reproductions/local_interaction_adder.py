"""The one-block transformers that add modulo 113: their weights, their chain of sections, and their pairs of numbers."""

__all__ = ["MODULUS", "Adder", "load_adder", "pairs"]

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from theodolite.core.sections import Sections

MODULUS = 113
_NOT_WEIGHTS = ("IGNORE", "mask")


class Adder(nn.Module):
    """A block without normalisation; (n, 3) tokens a, b, 113 -> (n, 114) scores of the sum at the last position.

    Nodes of `sections`: the residual stream before attention (n, 3, d); before the MLP and before unembedding, at the last
    position alone (n, d); the scores.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(value, requires_grad=False) for name, value in weights.items()}
        )

    def embed(self, tokens: Int[Tensor, "row 3"]) -> Float[Tensor, "row 3 width"]:
        """The residual stream before attention."""
        return self.weights["embed_W_E"][tokens] + self.weights["pos_embed_W_pos"]

    def attend(self, h: Float[Tensor, "row 3 width"]) -> Float[Tensor, "row width"]:
        """The last position of the stream after attention, in which it sees all three."""
        w = self.weights
        key, value = (
            torch.einsum("npd,hde->nhpe", h, w[f"blocks_0_attn_W_{x}"]) + w[f"blocks_0_attn_b_{x}"][:, None]
            for x in "KV"
        )
        query = torch.einsum("nd,hde->nhe", h[:, -1], w["blocks_0_attn_W_Q"]) + w["blocks_0_attn_b_Q"]
        pattern = (torch.einsum("nhe,nhpe->nhp", query, key) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        mixed = torch.einsum("nhp,nhpe->nhe", pattern, value)
        return h[:, -1] + torch.einsum("nhe,hed->nd", mixed, w["blocks_0_attn_W_O"]) + w["blocks_0_attn_b_O"]

    def think(self, h: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """The stream after the MLP."""
        w = self.weights
        inner = torch.relu(h @ w["blocks_0_mlp_W_in"] + w["blocks_0_mlp_b_in"])
        return h + inner @ w["blocks_0_mlp_W_out"] + w["blocks_0_mlp_b_out"]

    def read(self, h: Float[Tensor, "row width"]) -> Float[Tensor, "row score"]:
        """Scores of the last position."""
        return h @ self.weights["unembed_W_U"] + self.weights["unembed_b_U"]

    def forward(self, tokens: Int[Tensor, "row 3"]) -> Float[Tensor, "row score"]:
        """All of it."""
        return self.read(self.think(self.attend(self.embed(tokens))))

    def sections(self) -> Sections:
        """The chain from before attention to the scores."""
        names = ["before attention", "before MLP", "before unembedding", "scores"]
        return Sections([self.attend, self.think, self.read], names)


def load_adder(path: Path) -> Adder:
    """A published checkpoint, in float64."""
    tensors = load_file(path)
    kept = {name: t.double() for name, t in tensors.items() if not any(part in name for part in _NOT_WEIGHTS)}
    return Adder(kept).eval()


def pairs() -> tuple[Int[Tensor, "pair 3"], Int[Tensor, " pair"], Int[Tensor, " train"], Int[Tensor, " test"]]:
    """All pairs (a slowest) as tokens, their sums, and the published split: which are the 30 % for training, which the rest."""
    a, b = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS)).unbind(dim=1)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    train = int(0.3 * len(a))
    return torch.stack([a, b, torch.full_like(a, MODULUS)], dim=1), (a + b) % MODULUS, order[:train], order[train:]
