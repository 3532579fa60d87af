"""A small network of such layers for whole series: a class, or a value, for each."""

__all__ = ["ClassifierState", "S4DBlock", "S4DClassifier"]

from typing import Any, NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import InputError
from theodolite.core.train import seeded
from theodolite.networks.diagonal_ssm.layer import S4D


class S4DBlock(nn.Module):
    """norm(x + GLU(W GELU(S4D(x)))), the authors' small block: (B, L, H) to the same."""

    def __init__(self, d_model: int, dropout: float, **layer: Any) -> None:
        super().__init__()
        self.layer = S4D(d_model, **layer)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Linear(d_model, 2 * d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Float[Tensor, "batch length channel"]) -> Float[Tensor, "batch length channel"]:
        """The block's output for a whole series."""
        return self._after(x, self.layer.convolve(x))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output (B, H) for one sample, and the next state of its layer."""
        y, state = self.layer.step(x, state)
        return self._after(x, y), state

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x + F.glu(self.mix(self.dropout(F.gelu(y)))))


class ClassifierState(NamedTuple):
    """What a classifier carries from sample to sample: its layers' states, the sum of its outputs, how many were summed."""

    layers: tuple[Tensor, ...]
    total: Tensor
    samples: int


class S4DClassifier(nn.Module):
    """Scores (B, d_output) of series (B, L, d_input), or (B, L) where there is one channel.

    Linear in, n_layers blocks of d_model channels, the mean over time (pooling "mean") or the last step ("last"), Linear
    out. options: of `S4D` and its kernel, such as n_state, init, bidirectional. `step` reads a stream one sample at a time
    and gives the scores so far. seed: None draws from torch's own generator.

    Raises InputError for another pooling, sizes below 1, or an input of another shape.

    >>> import torch
    >>> network = S4DClassifier(1, 10, d_model=8, n_state=8, seed=0)
    >>> tuple(network(torch.zeros(2, 50)).shape)
    (2, 10)
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        d_model: int = 64,
        n_layers: int = 2,
        pooling: str = "mean",
        *,
        dropout: float = 0.0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "last"):
            raise InputError(f"pooling is mean or last, got {pooling!r}")
        if min(d_input, d_output, d_model, n_layers) < 1:
            raise InputError(f"sizes must be at least 1, got {d_input}, {d_output}, {d_model} and {n_layers} layers")
        self.d_input, self.pooling = d_input, pooling
        with seeded(seed):
            self.encoder = nn.Linear(d_input, d_model)
            self.blocks = nn.ModuleList(S4DBlock(d_model, dropout, **options) for _ in range(n_layers))
            self.decoder = nn.Linear(d_model, d_output)

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "batch output"]:
        """Scores of whole series."""
        if x.ndim == 2 and self.d_input == 1:
            x = x[..., None]
        if x.ndim != 3 or x.shape[2] != self.d_input or not x.is_floating_point():
            raise InputError(
                f"this network takes real (batch, length, {self.d_input}), got {tuple(x.shape)} of {x.dtype}"
            )
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return self.decoder(x.mean(dim=1) if self.pooling == "mean" else x[:, -1])

    def initial_state(self, batch: int) -> ClassifierState:
        """The state before the first sample."""
        states = tuple(block.layer.initial_state(batch) for block in self._blocks())
        return ClassifierState(states, self.decoder.weight.new_zeros(batch, self.decoder.in_features), 0)

    def step(self, x: Shaped[Tensor, "..."], state: ClassifierState) -> tuple[Tensor, ClassifierState]:
        """Read one sample x (B, d_input): the scores of the series up to it, and the next state."""
        if x.ndim != 2 or x.shape[1] != self.d_input or not x.is_floating_point():
            raise InputError(f"step takes real (batch, {self.d_input}), got {tuple(x.shape)} of {x.dtype}")
        y, after = self.encoder(x), []
        for block, before in zip(self._blocks(), state.layers, strict=True):
            y, new = block.step(y, before)
            after.append(new)
        total, samples = state.total + y, state.samples + 1
        pooled = total / samples if self.pooling == "mean" else y
        return self.decoder(pooled), ClassifierState(tuple(after), total, samples)

    def _blocks(self) -> list[S4DBlock]:
        return [block for block in self.blocks if isinstance(block, S4DBlock)]
