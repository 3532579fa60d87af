"""Training of a sparse autoencoder on activations in memory or mapped from disk.

Adam with the part of the decoder's gradient along each row removed and rows put back to norm 1 after each step; learning rate
raised over the first 100 steps and lowered to 0 over the last quarter. Rows on disk are read in blocks that fit the memory;
batches are drawn at random within a block, blocks in random order.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366.
"""

__all__ = ["History", "train_sae"]

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from mmap import mmap

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
    x: Float[Tensor, "row width"] | Float[np.ndarray, "row width"],
    *,
    epochs: int,
    lr: float = 3e-4,
    batch_size: int = 512,
    gradients: Float[Tensor, "row width"] | Float[np.ndarray, "row width"] | None = None,
    resample: Collection[int] = (),
    seed: int = 0,
    memory: int | None = None,
) -> History:
    """Train ``sae`` in place on rows ``x`` and tell how well it does, epoch by epoch.

    x: a tensor, or an array that may be a memory map of a file larger than memory (``store[name]`` of an
    `theodolite.core.store.ActivationStore`), float16 or float32; of an array at most ``memory`` bytes are read at a time.
    The first call sets the scale (mean norm sqrt(d)) and b_dec (the mean); a later one goes on from there. gradients: of an
    outcome by x, for the kind "attribution"; only their direction and relative size count (mean norm sqrt(d)). resample: epochs
    after which latents that were never on start again from rows with a large error.

    Raises InputError for rows that do not fit, ActivationError for NaN, TrainingCollapsedError where the loss is not finite or
    where at the end no latent is ever on.
    """
    _check(sae, x, epochs, batch_size, gradients)
    rows = _Rows(x, sae.W_dec.device, memory)
    slopes = None if gradients is None else _Rows(gradients, sae.W_dec.device, memory)
    n, (mean, norm, differ) = len(x), rows.statistics("the activations")
    if not differ:
        raise InputError("all rows are the same, so there is nothing to tell apart")
    if int(sae.steps) == 0:
        _start(sae, mean, norm)
    factor = 1.0 if slopes is None else sae.d**0.5 / max(slopes.statistics("the gradients")[1], 1e-30)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999), fused=True)
    generator = torch.Generator().manual_seed(seed)
    total, step = epochs * sum(-(-(part.stop - part.start) // batch_size) for part in rows.blocks), 0
    variance = sum(float(((block - mean) * sae.scale).square().sum()) for _, block in rows)
    quiet = torch.zeros(sae.n_latents, dtype=torch.long, device=mean.device)
    numbers = []
    for epoch in range(epochs):
        used = torch.zeros(sae.n_latents, dtype=torch.bool, device=mean.device)
        lost = on = torch.zeros((), device=mean.device)
        for batch, slope in _batches(rows, slopes, batch_size, generator):
            step += 1
            sae.dead = quiet >= _QUIET
            made = sae(batch, None if slope is None else slope * factor)
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
                quiet = torch.where(alive, 0, quiet + len(batch))
                lost = lost + made.losses["reconstruction"].detach() * len(batch)
                on = on + fired.sum()
        if not bool(torch.isfinite(lost)):
            raise TrainingCollapsedError(f"the loss is not finite after epoch {epoch + 1}; lower lr (now {lr})")
        numbers.append((float(lost) / variance, float(on) / n, int((~used).sum())))
        if epoch + 1 in resample:
            _revive(sae, rows, ~used, optimizer, generator)
            quiet[~used] = 0
    sae.steps += step
    sae.dead = torch.zeros_like(sae.dead)
    if numbers[-1][2] == sae.n_latents:
        raise TrainingCollapsedError(
            f"no latent is ever on after {epochs} epochs; lower l1 (now {sae.l1}), or check that the rows differ"
        )
    fvu, l0, dead = zip(*numbers, strict=True)
    return History(np.array(fvu), np.array(l0), np.array(dead))


def _check(
    sae: SparseAutoencoder, x: Tensor | np.ndarray, epochs: int, batch_size: int, gradients: Tensor | np.ndarray | None
) -> None:
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


class _Rows:
    """Rows in blocks: a tensor is one block, an array is read into memory block by block."""

    def __init__(self, x: Tensor | np.ndarray, device: torch.device, memory: int | None) -> None:
        self._x, self._device = x, device
        each = 8.0 * x.shape[1]
        self.blocks = [slice(0, len(x))] if isinstance(x, Tensor) else list(chunks(len(x), each, memory))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for part in self.blocks:
            yield part, self.read(part)

    def read(self, part: slice) -> Tensor:
        """One block as float32."""
        x = self._x
        if isinstance(x, Tensor):
            return x[part].detach().float()
        if isinstance(x, np.memmap) and isinstance(x.base, mmap) and x.flags.c_contiguous and x.filename is not None:
            # read, not mapped: pages of a map that were looked at stay in memory
            width = x.shape[1]
            start = x.offset + part.start * width * x.itemsize
            rows = np.fromfile(x.filename, x.dtype, (part.stop - part.start) * width, offset=start).reshape(-1, width)
        else:
            rows = np.array(x[part])
        return torch.from_numpy(rows.astype(np.float32, copy=False)).to(self._device)

    def pick(self, places: Tensor) -> Tensor:
        """A few rows by their numbers."""
        if isinstance(self._x, Tensor):
            return self._x[places.to(self._x.device)].detach().float()
        return torch.from_numpy(np.array(self._x[places.cpu().numpy()], dtype=np.float32)).to(self._device)

    def statistics(self, name: str) -> tuple[Tensor, float, bool]:
        """Mean, mean norm, and whether any row differs from the first; ActivationError where rows are not finite."""
        mean, norm, count, differ, first = torch.zeros(()), 0.0, 0, False, None
        for part, block in self:
            check_finite(block, name, part.start)
            first = block[0] if first is None else first
            differ = differ or not bool((block == first).all())
            count += len(block)
            share = len(block) / count
            mean = block.mean(dim=0) if part.start == 0 else mean + (block.mean(dim=0) - mean) * share
            lengths = torch.linalg.vector_norm(
                block, dim=1, dtype=torch.float64
            )  # whose squares neither over- nor underflow
            norm += (float(lengths.mean()) - norm) * share
        return mean, norm, differ


def _batches(
    rows: _Rows, slopes: _Rows | None, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All rows once, each batch out of one block."""
    order = [0] if len(rows.blocks) == 1 else torch.randperm(len(rows.blocks), generator=generator).tolist()
    for number in order:
        part = rows.blocks[number]
        block = rows.read(part)
        slope = None if slopes is None else slopes.read(part)
        for batch in torch.randperm(len(block), generator=generator).to(block.device).split(batch_size):
            yield block[batch], None if slope is None else slope[batch]


@torch.no_grad()
def _start(sae: SparseAutoencoder, mean: Tensor, norm: float) -> None:
    """Scale of mean norm sqrt(d), and b_dec at the mean, without which latents die where the mean is large."""
    sae.scale.fill_(sae.d**0.5 / norm)
    sae.b_dec.copy_(mean * sae.scale)


def _project(sae: SparseAutoencoder) -> None:
    """Take from the decoder's gradient what would only change the length of its rows."""
    slope = sae.W_dec.grad
    if slope is not None:
        slope.addcmul_((slope * sae.W_dec.detach()).sum(dim=1, keepdim=True), sae.W_dec.detach(), value=-1)


@torch.no_grad()
def _revive(
    sae: SparseAutoencoder, x: _Rows, dead: Tensor, optimizer: torch.optim.Adam, generator: torch.Generator
) -> None:
    """Point dead latents at rows drawn by their squared error, and forget what Adam knew of them."""
    count = int(dead.sum())
    if count == 0:
        return
    share = torch.cat(
        [
            _error(sae, block[part]).square().sum(dim=1).double().cpu()
            for _, block in x
            for part in chunks(len(block), 16.0 * sae.n_latents)
        ]
    )
    if float(share.sum()) == 0:
        return
    drawn = torch.multinomial(share, count, replacement=True, generator=generator)
    rows = nn.functional.normalize(_error(sae, x.pick(drawn)), dim=1)
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


def _error(sae: SparseAutoencoder, rows: Tensor) -> Tensor:
    return rows - sae.decode(sae.encode(rows))
