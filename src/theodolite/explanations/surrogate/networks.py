"""The paper's networks for wide tables: attention over columns, and a convolutional autoencoder whose code is classified."""

__all__ = ["ConvAutoencoderClassifier", "SelfAttentionNetwork"]

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import InputError

_FULL_UP_TO = 2000  # a full attention matrix has d x d weights a head
_RANK = 16


class SelfAttentionNetwork(nn.Module):
    """Omega(x) = 1/h sum_head x * softmax(W_head x + b_head);  scores = W2 SELU(dropout(W1 Omega(x) + b1)) + b2.

    attention: "full" has a d x d matrix a head (up to d = 2000), "low-rank" a product of d x 16 and 16 x d, "diagonal" one
    number a column and no input: softmax(theta) d. Gives scores (n, classes) to be put through a softmax.

    Source: Karim et al., 2022, arXiv:2208.13405.

    >>> SelfAttentionNetwork(5, 3)(torch.zeros(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        d: int,
        classes: int,
        heads: int = 2,
        hidden: int = 64,
        attention: str = "full",
        *,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if attention not in ("full", "diagonal", "low-rank"):
            raise InputError(f"attention must be full, diagonal or low-rank, got {attention!r}")
        if min(d, heads, hidden) < 1 or classes < 2:
            raise InputError(f"need d, heads, hidden >= 1 and classes >= 2, got {d}, {heads}, {hidden}, {classes}")
        if attention == "full" and d > _FULL_UP_TO:
            raise InputError(
                f"full attention over {d} columns needs {heads * d * d:,} weights; use attention='diagonal' or 'low-rank'"
            )
        self.d, self.heads, self.attention = d, heads, attention
        if attention == "diagonal":
            self.theta = nn.Parameter(torch.zeros(heads, d))
        elif attention == "full":
            self.score: nn.Module = nn.Linear(d, heads * d)
        else:
            self.score = nn.Sequential(nn.Linear(d, heads * _RANK, bias=False), nn.Linear(heads * _RANK, heads * d))
        self.first, self.last = nn.Linear(d, hidden), nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(dropout)

    def attention_weights(self, x: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
        """Mean attention over the heads; each row sums to 1."""
        if self.attention == "diagonal":
            return self.theta.softmax(dim=1).mean(dim=0).expand(len(x), self.d)
        return self.score(x).reshape(len(x), self.heads, self.d).softmax(dim=2).mean(dim=1)

    def forward(self, x: Float[Tensor, "row column"]) -> Float[Tensor, "row class"]:
        """Scores of the classes."""
        seen = x * self.attention_weights(x)
        if self.attention == "diagonal":
            seen = seen * self.d
        return self.last(F.selu(self.dropout(self.first(seen))))


class ConvAutoencoderClassifier(nn.Module):
    """A convolutional autoencoder of the row seen as a signal of length d, whose code is classified by self-attention.

    Trained on `loss`: squared reconstruction error plus cross-entropy. code: length of the code.

    Source: Karim et al., 2022, arXiv:2208.13405.

    >>> ConvAutoencoderClassifier(20, 3)(torch.zeros(2, 20)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, d: int, classes: int, code: int = 64, channels: int = 8, heads: int = 2, hidden: int = 64
    ) -> None:
        super().__init__()
        if min(d, code, channels) < 1:
            raise InputError(f"need d, code, channels >= 1, got {d}, {code}, {channels}")
        self.d, self.channels = d, channels
        self.short = -(-d // 4)
        self.reduce = nn.Sequential(
            nn.Conv1d(1, channels, 5, stride=2, padding=2), nn.SELU(),
            nn.Conv1d(channels, channels, 5, stride=2, padding=2), nn.SELU(), nn.Flatten(),
            nn.Linear(channels * self.short, code),
        )  # fmt: skip
        self.widen = nn.Linear(code, channels * self.short)
        self.expand = nn.Sequential(
            nn.SELU(), nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1), nn.SELU(),
            nn.ConvTranspose1d(channels, 1, 4, stride=2, padding=1),
        )  # fmt: skip
        self.classify = SelfAttentionNetwork(code, classes, heads, hidden)

    def encode(self, x: Float[Tensor, "row column"]) -> Float[Tensor, "row code"]:
        """The code of each row."""
        return self.reduce(x[:, None])

    def decode(self, code: Float[Tensor, "row code"]) -> Float[Tensor, "row column"]:
        """The row that a code stands for."""
        signal = self.widen(code).reshape(len(code), self.channels, self.short)
        return self.expand(signal)[:, 0, : self.d]

    def forward(self, x: Float[Tensor, "row column"]) -> Float[Tensor, "row class"]:
        """Scores of the classes."""
        return self.classify(self.encode(x))

    def loss(self, x: Float[Tensor, "row column"], y: Int[Tensor, " row"], *, weight: float = 1.0) -> Float[Tensor, ""]:
        """weight x mean squared reconstruction error + cross-entropy."""
        code = self.encode(x)
        return weight * F.mse_loss(self.decode(code), x) + F.cross_entropy(self.classify(code), y)
