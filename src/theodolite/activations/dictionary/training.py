"""Training of a sparse autoencoder on activations in memory or mapped from disk.

Adam with the part of the decoder's gradient along each row removed and rows put back to norm 1 after each step; learning rate
raised over the first 100 steps and lowered to 0 over the last quarter.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366.
"""

__all__ = ["History", "train_sae"]

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from theodolite.activations.dictionary.autoencoder import SparseAutoencoder
from theodolite.core.capture import check_finite
from theodolite.core.errors import InputError, TrainingCollapsedError
from theodolite.core.memory import chunks

_WARM_UP = 100
_QUIET = 10_000  # rows without firing after which a latent counts as dead while training
_REVIVED = 0.2  # encoder norm of a latent that starts again, relative to the living ones


@dataclass(frozen=True, eq=False)
class History:
    """One number an epoch, over the rows of its batches as they were trained on.

    fvu: |x - x_hat|^2 as a share of the variance about the mean; l0: codes that are on; dead: latents that were on for no row.
    """

    fvu: Float[np.ndarray, " epoch"]
    l0: Float[np.ndarray, " epoch"]
    dead: np.ndarray


def train_sae(
    sae: SparseAutoencoder,
    x: Float[Tensor, "row width"],
    *,
    epochs: int,
    lr: float = 3e-4,
    batch_size: int = 512,
    gradients: Float[Tensor, "row width"] | None = None,
    resample: Collection[int] = (),
    seed: int = 0,
) -> History:
    """Train ``sae`` in place on rows ``x`` and tell how well it does, epoch by epoch.

    The first call sets the scale (mean norm sqrt(d)) and b_dec (the mean); a later one goes on from there. gradients: of an
    outcome by x, for the kind "attribution"; only their direction and relative size count (mean norm sqrt(d)). resample: epochs
    after which latents that were never on start again from rows with a large error.

    Raises InputError for rows that do not fit, ActivationError for NaN, TrainingCollapsedError where the loss is not finite or
    where at the end no latent is ever on.
    """
    n = _check(sae, x, epochs, batch_size, gradients)
    if int(sae.steps) == 0:
        _start(sae, x)
    if gradients is not None:
        gradients = gradients * (sae.d**0.5 / gradients.norm(dim=1).mean().clamp_min(1e-30))
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999), fused=True)
    generator = torch.Generator().manual_seed(seed)
    total, step = epochs * -(-n // batch_size), 0
    variance = float((x - x.mean(dim=0)).square().sum()) * float(sae.scale) ** 2
    quiet = torch.zeros(sae.n_latents, dtype=torch.long, device=x.device)
    numbers = []
    for epoch in range(epochs):
        used = torch.zeros(sae.n_latents, dtype=torch.bool, device=x.device)
        lost = on = torch.zeros((), device=x.device)
        for part in torch.randperm(n, generator=generator).to(x.device).split(batch_size):
            step += 1
            sae.dead = quiet >= _QUIET
            made = sae(x[part], None if gradients is None else gradients[part])
            optimizer.zero_grad()
            made.loss.backward()
            _project(sae)
            optimizer.param_groups[0]["lr"] = lr * min(1.0, step / _WARM_UP, (total - step + 1) / (total / 4))
            optimizer.step()
            with torch.no_grad():
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
                fired = made.latents.detach() > 0
                alive = fired.any(dim=0)
                used |= alive
                quiet = torch.where(alive, 0, quiet + len(part))
                lost = lost + made.losses["reconstruction"].detach() * len(part)
                on = on + fired.sum()
        if not bool(torch.isfinite(lost)):
            raise TrainingCollapsedError(f"the loss is not finite after epoch {epoch + 1}; lower lr (now {lr})")
        numbers.append((float(lost) / variance, float(on) / n, int((~used).sum())))
        if epoch + 1 in resample:
            _revive(sae, x, ~used, optimizer, generator)
            quiet[~used] = 0
    sae.steps += step
    sae.dead = torch.zeros_like(sae.dead)
    if numbers[-1][2] == sae.n_latents:
        raise TrainingCollapsedError(
            f"no latent is ever on after {epochs} epochs; lower l1 (now {sae.l1}), or check that the rows differ"
        )
    fvu, l0, dead = zip(*numbers, strict=True)
    return History(np.array(fvu), np.array(l0), np.array(dead))


def _check(sae: SparseAutoencoder, x: Tensor, epochs: int, batch_size: int, gradients: Tensor | None) -> int:
    if x.ndim != 2 or x.shape[1] != sae.d:
        raise InputError(f"the dictionary has width {sae.d}, so rows are (n, {sae.d}); got shape {tuple(x.shape)}")
    if len(x) < 2 or epochs < 1 or batch_size < 1:
        raise InputError(f"need at least 2 rows, 1 epoch and 1 row a batch, got {len(x)}, {epochs} and {batch_size}")
    if (sae.kind == "attribution") != (gradients is not None):
        raise InputError("gradients belong to the kind 'attribution', which needs them; got " + (
            f"them for {sae.kind!r}" if gradients is not None else "none"
        ))  # fmt: skip
    if gradients is not None and gradients.shape != x.shape:
        raise InputError(f"gradients have shape {tuple(gradients.shape)}, activations {tuple(x.shape)}")
    check_finite(x, "the activations")
    if bool((x == x[0]).all()):
        raise InputError("all rows are the same, so there is nothing to tell apart")
    return len(x)


@torch.no_grad()
def _start(sae: SparseAutoencoder, x: Tensor) -> None:
    """Scale of mean norm sqrt(d), and b_dec at the mean, without which latents die where the mean is large."""
    sae.scale.fill_(float(sae.d**0.5 / x.norm(dim=1).mean()))
    sae.b_dec.copy_(x.mean(dim=0) * sae.scale)


def _project(sae: SparseAutoencoder) -> None:
    """Take from the decoder's gradient what would only change the length of its rows."""
    slope = sae.W_dec.grad
    if slope is not None:
        slope.addcmul_((slope * sae.W_dec.detach()).sum(dim=1, keepdim=True), sae.W_dec.detach(), value=-1)


@torch.no_grad()
def _revive(
    sae: SparseAutoencoder, x: Tensor, dead: Tensor, optimizer: torch.optim.Adam, generator: torch.Generator
) -> None:
    """Point dead latents at rows drawn by their squared error, and forget what Adam knew of them."""
    count = int(dead.sum())
    if count == 0:
        return
    off = torch.cat([x[part] - sae.decode(sae.encode(x[part])) for part in chunks(len(x), 16.0 * sae.n_latents)])
    share = off.square().sum(dim=1).double().cpu()
    if float(share.sum()) == 0:
        return
    drawn = torch.multinomial(share, count, replacement=True, generator=generator).to(x.device)
    rows = nn.functional.normalize(off[drawn], dim=1)
    living = sae.W_enc[:, ~dead]
    norm = float(living.norm(dim=0).mean()) if living.shape[1] else 1.0
    sae.W_dec[dead] = rows
    sae.W_enc[:, dead] = rows.T * norm * _REVIVED
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if hasattr(sae, name):
            getattr(sae, name)[dead] = 0.0
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if parameter is sae.W_enc:
                state[name][:, dead] = 0.0
            elif parameter.shape[0] == len(dead) and parameter is not sae.b_dec:
                state[name][dead] = 0.0
