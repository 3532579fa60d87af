"""The network of PBN and its training: one projection that names known classes and gives every row back."""

__all__ = ["History", "ProjectionNetwork", "batches", "hidden_widths", "layers", "train_projection"]

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import TrainingCollapsedError

NORMS = ("l2", "none")


@dataclass(frozen=True)
class History:
    """Means over each epoch's batches: cross-entropy of known rows, and squared error of all rows summed over columns."""

    classification: tuple[float, ...]
    reconstruction: tuple[float, ...]


class ProjectionNetwork(nn.Module):
    """Encoder to z, its length set to 1; decoder and a linear classifier, both of the normalised z.

    Encoder: columns - hidden[0] - ... - latent, with ReLU, BatchNorm and dropout after every hidden layer; the decoder is
    its mirror. Calling it gives (reconstruction (n, columns), scores (n, classes)).
    """

    def __init__(
        self, columns: int, hidden: Sequence[int], latent: int, classes: int, *, dropout: float, norm: str = "l2"
    ) -> None:
        super().__init__()
        self.encoder = layers([columns, *hidden, latent], dropout)
        self.decoder = layers([latent, *reversed(hidden), columns], dropout)
        self.classifier = nn.Linear(latent, classes)
        self.norm = norm

    def normalise(self, z: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """z over its Euclidean length; as it is where the network does not normalise."""
        return F.normalize(z, dim=1) if self.norm == "l2" else z

    def forward(self, x: Float[Tensor, "row column"]) -> tuple[Tensor, Tensor]:
        """Reconstruction and class scores."""
        z = self.normalise(self.encoder(x))
        return self.decoder(z), self.classifier(z)


def hidden_widths(columns: int) -> tuple[int, int]:
    """The paper's widths of the two hidden layers, 3/4 and 2/4 of the columns; at least 2.

    >>> hidden_widths(16)
    (12, 8)
    """
    return max(2, 3 * columns // 4), max(2, 2 * columns // 4)


def layers(widths: list[int], dropout: float) -> nn.Sequential:
    """Linear layers through ``widths``; ReLU, BatchNorm and dropout after all but the last."""
    made = list[nn.Module]()
    for before, after in pairwise(widths[:-1]):
        made += [nn.Linear(before, after), nn.ReLU(), nn.BatchNorm1d(after), nn.Dropout(dropout)]
    return nn.Sequential(*made, nn.Linear(widths[-2], widths[-1]))


def projection_loss(
    network: ProjectionNetwork, x: Float[Tensor, "row column"], y: Int[Tensor, " row"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(mean cross-entropy of the rows with y >= 0, 0 where there are none; squared error summed over columns, mean of rows)."""
    back, scores = network(x)
    named = (y >= 0).sum().clamp(min=1)
    return F.cross_entropy(scores, y, ignore_index=-1, reduction="sum") / named, (back - x).square().sum() / len(x)


def train_projection(
    network: ProjectionNetwork,
    x: Float[Tensor, "row column"],
    y: Int[Tensor, " row"],
    *,
    w: float,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> History:
    """Minimise w * cross-entropy + (1 - w) * squared error by AdamW over rows ``x`` with classes ``y`` (-1: none).

    With w = 1 unlabelled rows have no loss, so they stay out of the batches (and of BatchNorm's statistics) too.
    """
    if w == 1:
        x, y = x[y >= 0], y[y >= 0]
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=True)
    network.train()
    history = list[tuple[float, float]]()
    for epoch in range(epochs):
        total = torch.zeros(2, device=x.device)
        parts = list(batches(len(x), batch_size, order))
        for rows in parts:
            classification, reconstruction = projection_loss(network, x[rows], y[rows])
            loss = w * classification + (1 - w) * reconstruction
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += torch.stack([classification, reconstruction]).detach()
        history.append(tuple((total / len(parts)).tolist()))
        if not all(map(math.isfinite, history[-1])):
            raise TrainingCollapsedError(
                f"the loss is no longer finite in epoch {epoch + 1}; try a smaller step size than lr={lr}"
            )
    network.eval()
    classification, reconstruction = zip(*history, strict=True)
    return History(classification, reconstruction)


def batches(n: int, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """All rows in random order; a last batch of a single row joins the one before, since BatchNorm needs two."""
    shuffled = torch.randperm(n, generator=order)
    starts = list(range(0, n, size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        yield shuffled[start:stop]
