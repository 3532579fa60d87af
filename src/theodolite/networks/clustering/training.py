"""Training of encoder, decoder and centres in turns, one batch at a time."""

__all__ = ["DeadClusterWarning", "Epoch", "Trainer", "codes_of"]

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, TrainingCollapsedError
from theodolite.core.view import ModelView
from theodolite.networks.clustering.layer import KMeansLayer

Phase = Literal["warm-up", "centres", "encoder"]
_PATIENCE = 20  # epochs that a cluster may be without rows
_ROW_STEP = 0.2  # length of a centre's gradient in units of alpha
_LEAST_NORM = 1e-12


class DeadClusterWarning(UserWarning):
    """A cluster has been without rows for 20 epochs, or fewer clusters than asked for hold rows at the end."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of a history.

    phase: "warm-up" (reconstruction alone), "centres" or "encoder" (which of the two the cluster loss moved).
    reconstruction: mean squared error in units of the data's range (None without a decoder); cluster: mean squared distance
    of codes to their centres (None in the warm-up). alive: clusters with rows. nmi: with the labels that are monitored.
    """

    phase: Phase
    reconstruction: float | None
    cluster: float | None
    alive: int | None
    nmi: float | None = None


def codes_of(encoder: nn.Module, x: Tensor) -> Float[Tensor, "row latent"]:
    """Codes of length 1 of rows x (n, ...), in eval mode and in chunks; DataError naming rows whose code is zero."""
    h = ModelView(encoder, output="raw")(x)
    norm = h.norm(dim=1)
    if not bool(torch.isfinite(norm).all()):
        raise TrainingCollapsedError(
            "the encoder gives codes that are not finite; try another optimizer or scale of the data"
        )
    zero = (norm <= _LEAST_NORM).nonzero()[:, 0].tolist()
    if zero:
        named = ", ".join(map(str, zero[:5])) + (", ..." if len(zero) > 5 else "")
        raise DataError(
            f"{len(zero)} rows have a code of length zero, which has no direction and so no nearest centre: {named}; leave "
            "them out (empty rows), or shift the data"
        )
    return h / norm[:, None]


class Trainer:
    """Encoder, decoder and centres with their optimisers. `step` takes one batch, `epoch` all of them once.

    In a "centres" step the cluster loss moves the centres alone (its codes are detached), the gradient of each centre is
    scaled to length 0.2 alpha first, and centres go back to length 1 afterwards; in an "encoder" step centres stay. The
    encoder and the decoder always learn to reconstruct. unit: the data's range, in which reconstruction errors are measured.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        layer: KMeansLayer,
        *,
        cluster_weight: float,
        optimizer: str,
        unit: float,
    ) -> None:
        self.encoder, self.decoder, self.layer = encoder, decoder, layer
        self.cluster_weight, self.unit = cluster_weight, unit
        modules = [encoder] if decoder is None else [encoder, decoder]
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.encoder_trains = any(p.requires_grad for p in encoder.parameters())
        self._networks = _optimizer(optimizer, trained) if trained else None
        # Adam would move every coordinate alike, whatever the size of the centres, so beside it they go by plain steps
        own = [layer.weight]
        self._centres = torch.optim.Adadelta(own) if optimizer == "adadelta" else torch.optim.SGD(own, lr=1.0)
        self._without_rows = torch.zeros(layer.n_clusters, dtype=torch.long)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What the epochs do in turn; where the encoder does not train, all of them move the centres."""
        return ("centres", "encoder") if self.encoder_trains else ("centres",)

    def step(self, batch: Tensor, phase: Phase) -> tuple[Tensor | None, Tensor | None, Int[Tensor, " row"] | None]:
        """One optimiser step; the reconstruction error, the cluster loss and the cluster of each row before it."""
        self.encoder.train(self.encoder_trains)
        codes = F.normalize(self.encoder(batch), dim=1, eps=_LEAST_NORM)
        parts: list[Tensor] = []
        error = distance = labels = None
        if self.decoder is not None:
            self.decoder.train()
            error = F.mse_loss(self.decoder(codes), batch) / self.unit**2
            parts.append(error)
        if phase != "warm-up":
            labels = self.layer.assign(codes)
            self.layer.weight.requires_grad_(phase == "centres")
            distance = self.layer.distances(codes.detach() if phase == "centres" else codes, labels).mean()
            parts.append(distance if phase == "centres" else self.cluster_weight * distance)
        for optimizer in (self._networks, self._centres):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
        torch.stack(parts).sum().backward()
        self.layer.weight.requires_grad_(True)
        if self._networks is not None:
            self._networks.step()
        if phase == "centres":
            self._step_centres()
        return error, distance, labels

    def _step_centres(self) -> None:
        gradient = self.layer.weight.grad
        assert gradient is not None
        length = gradient.norm(dim=1, keepdim=True)
        # a centre without rows has no gradient, and stays
        gradient.mul_(torch.where(length > 0, _ROW_STEP * self.layer.alpha / length, 0.0))
        self._centres.step()
        self.layer.normalize_()

    def epoch(self, x: Tensor, batches: Iterator[Tensor], phase: Phase) -> Epoch:
        """One pass over ``x`` in ``batches`` of row numbers; counts which clusters got rows."""
        errors, distances = list[Tensor](), list[Tensor]()
        rows = torch.zeros(self.layer.n_clusters, dtype=torch.long, device=self.layer.weight.device)
        for batch in batches:
            error, distance, labels = self.step(x[batch], phase)
            if error is not None:
                errors.append(error.detach())
            if distance is not None and labels is not None:
                distances.append(distance.detach())
                rows += torch.bincount(labels, minlength=len(rows))
        means = [float(torch.stack(one).mean()) if one else None for one in (errors, distances)]
        if not all(mean is None or math.isfinite(mean) for mean in means):
            raise TrainingCollapsedError(
                f"the loss is no longer finite (reconstruction {means[0]}, cluster {means[1]}); try another optimizer or bring "
                "the data to a smaller scale"
            )
        if phase == "warm-up":
            return Epoch(phase, means[0], None, None)
        self._without_rows = torch.where(rows.cpu() > 0, 0, self._without_rows + 1)
        return Epoch(phase, means[0], means[1], int((rows > 0).sum()))

    def tend_dead(self, x: Tensor, *, reseed: bool) -> None:
        """Warn of clusters that have been without rows for 20 epochs; reseed: put them where rows are farthest from centres."""
        dead = (self._without_rows == _PATIENCE).nonzero()[:, 0].tolist()
        if not dead:
            return
        names = ", ".join(map(str, dead))
        what = "now restarted at the rows farthest from their centres" if reseed else "reseed=True would restart it"
        warnings.warn(
            f"no row was nearest to cluster {names} for {_PATIENCE} epochs; {what}", DeadClusterWarning, stacklevel=3
        )
        if not reseed:
            return
        codes = codes_of(self.encoder, x)
        with torch.no_grad():
            centers = self.layer.centers.clone()
            for j in dead:
                nearest = self.layer.distances(codes, self.layer.assign(codes))
                centers[j] = codes[int(nearest.argmax())]
                self.layer.centers = centers  # the next one goes elsewhere
        self._without_rows[dead] = 0


def _optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options: Any = {"foreach": True}
    return (torch.optim.Adadelta if name == "adadelta" else torch.optim.Adam)(parameters, **options)
