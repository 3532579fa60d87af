"""A small variational autoencoder of the rows of a table: few coordinates in which every point looks like a training row.

    -log p(x | c, held) = (d/2) log mean (x - decoded)^2 + cross-entropy of each one-hot group,   c ~ N(mu(x), s(x)^2)
    loss = that + KL( N(mu(x), s(x)^2) || N(0, I) )

The noise of the decoder is the one that fits best (the logarithm), so that nothing has to be weighed against the divergence and
the codes of the training rows spread like a standard normal. The columns that may not change are given to both halves, which
makes what is decoded depend on them.

Source: Kingma, Welling, 2014, arXiv:1312.6114; the decoder's noise: Rybkin, Daniilidis, Levine, 2021, arXiv:2006.13202;
conditions on what is immutable: Pawelczyk, Broelemann, Kasneci, 2020, arXiv:1910.09398.
"""

__all__ = ["Autoencoder", "AutoencoderWarning", "train_autoencoder"]

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError, TrainingCollapsedError
from theodolite.core.train import seeded
from theodolite.explanations.table_schema import TableSchema

_LEAST_ROWS = 20
_LEAST_STEPS = 1000
_POOR = 0.1


class AutoencoderWarning(UserWarning):
    """The autoencoder hardly tells rows apart, so a search in its code sees little of the table."""


class Autoencoder(nn.Module):
    """Encoder d -> hidden -> code and decoder code -> hidden -> d of scaled rows, both given the columns that are held.

    explained: share of the variance of rows it has not seen that decoded codes explain; 1 is all, 0 no more than their mean.
    """

    def __init__(
        self, features: int, held: tuple[int, ...], groups: tuple[tuple[int, ...], ...], code: int, hidden: int
    ) -> None:
        super().__init__()
        self.features, self.held, self.groups, self.code = features, held, groups, code
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code + len(held), hidden), nn.ReLU(), nn.Linear(hidden, features))
        self.explained = float("nan")

    def encode(self, z: Float[Tensor, "row feature"]) -> Float[Tensor, "row code"]:
        """The mean code of scaled rows."""
        return self.encoder(z.to(self._like))[:, : self.code].to(z)

    def decode(
        self, code: Float[Tensor, "row code"], like: Float[Tensor, "row feature"]
    ) -> Float[Tensor, "row feature"]:
        """Scaled rows of codes, given the held columns of ``like``; numbers within (0, 1), groups as shares that sum to 1."""
        out = self._scores(code.to(self._like), like.to(self._like))
        made = torch.sigmoid(out)
        for group in self.groups:
            columns = list(group)
            made = made.index_copy(1, torch.tensor(columns), torch.softmax(out[:, columns], dim=1))
        return made.to(code)

    @property
    def _like(self) -> Tensor:
        return next(self.parameters())

    def _scores(self, code: Tensor, like: Tensor) -> Tensor:
        return self.decoder(torch.cat([code, like[:, list(self.held)]], dim=1))

    def loss(self, z: Float[Tensor, "row feature"], generator: torch.Generator) -> Float[Tensor, ""]:
        """The mean over rows of the bound on -log p(x), up to a constant."""
        mean, log_scale = self.encoder(z).chunk(2, dim=1)
        log_scale = log_scale.clamp(-10, 5)
        code = mean + log_scale.exp() * torch.randn(mean.shape, generator=generator).to(mean)
        out = self._scores(code, z)
        grouped = [column for group in self.groups for column in group]
        numbers = [column for column in range(self.features) if column not in set(grouped) | set(self.held)]
        surprise = torch.zeros((), dtype=z.dtype)
        if numbers:
            error = (torch.sigmoid(out[:, numbers]) - z[:, numbers]).square().mean()
            surprise = 0.5 * len(numbers) * (error + 1e-6).log()
        for group in self.groups:
            columns = list(group)
            if columns[0] in self.held:
                continue
            surprise = surprise + F.cross_entropy(out[:, columns], z[:, columns].argmax(dim=1))
        divergence = 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(dim=1).mean()
        return surprise + divergence


def train_autoencoder(
    schema: TableSchema,
    X: Any,
    *,
    code: int = 8,
    hidden: int = 128,
    epochs: int = 50,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> Autoencoder:
    """The autoencoder of training rows X (n, d) in the user's units, by Adam; a tenth of them is kept aside to judge it.

    A small table gets more than ``epochs`` rounds, so that there are 1,000 steps. Warns (`AutoencoderWarning`) where it explains
    less than a tenth of the variance of the rows that were kept aside. Raises DataError for fewer than 20 rows and
    `TrainingCollapsedError` where the loss is not finite.
    """
    if min(code, hidden, epochs, batch_size) < 1 or not lr > 0:
        raise InputError("need code, hidden, epochs and batch_size >= 1 and lr > 0")
    rows = schema.scaled(schema.rows(X)).float()
    n, d = rows.shape
    if n < _LEAST_ROWS:
        raise DataError(f"an autoencoder needs at least {_LEAST_ROWS} training rows, got {n}")
    held = tuple(np.flatnonzero(schema.immutable).tolist())
    with seeded(seed):
        model = Autoencoder(d, held, schema.groups, code, hidden)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    aside, kept = rows[order[: n // 10]], rows[order[n // 10 :]]
    steps = max(_LEAST_STEPS, epochs * -(-len(kept) // batch_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    done = 0
    while done < steps:
        for part in torch.randperm(len(kept), generator=generator).split(batch_size):
            loss = model.loss(kept[part], generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        if not bool(torch.isfinite(loss)):
            raise TrainingCollapsedError(
                "the loss of the autoencoder is not finite; look for columns with far outliers"
            )
    model.eval().requires_grad_(False)
    free = torch.as_tensor(~schema.immutable)
    away = (model.decode(model.encode(aside), aside) - aside)[:, free].square().sum()
    spread = (aside - kept.mean(dim=0))[:, free].square().sum()
    model.explained = float(1 - away / spread.clamp_min(1e-12))
    if model.explained < _POOR:
        warnings.warn(
            f"the autoencoder explains {max(model.explained, 0.0):.0%} of the variance of rows it has not seen; a search in its "
            "code sees little of this table. Give it more rows or a larger code",
            AutoencoderWarning,
            stacklevel=2,
        )
    return model
