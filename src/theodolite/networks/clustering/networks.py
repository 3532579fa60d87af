"""The published encoders and decoders: convolutional for images, fully connected for everything else.

The published code ends the fully connected decoder in a sigmoid, as suits pixels; here its output is free, since new rows of a
table go beyond the range of those seen, and since it then trains sooner.

Both take inputs in their own units: one shift and one factor for all numbers together bring them to [0, 1], which keeps
distances but for that factor, and the decoder gives the units back.
"""

__all__ = ["FullyConnectedDecoder", "autoencoder"]

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from theodolite.core.errors import InputError

_WIDTHS = (500, 500, 2000)
_DROPOUT = 0.2
_HIDDEN = 256


def autoencoder(
    kind: str, shape: tuple[int, ...], latent_dim: int, *, low: float = 0.0, span: float = 1.0
) -> tuple[nn.Module, nn.Module]:
    """Encoder and mirrored decoder for inputs of ``shape`` with values in [low, low + span]; kind: "conv" or "mlp".

    "conv" takes images (height, width) or (channels, height, width), both sides divisible by 4.
    """
    inner = shape if len(shape) == 3 else (1, *shape)
    if kind == "conv":
        encoder, decoder = _conv(inner, latent_dim)
    else:
        inner = (math.prod(shape),)
        encoder, decoder = _fully_connected(inner[0], latent_dim), FullyConnectedDecoder(inner, latent_dim)
    return nn.Sequential(_ToUnit(low, span, inner), encoder), nn.Sequential(decoder, _FromUnit(low, span, shape))


class _ToUnit(nn.Module):
    """(x - low) / span, as rows of ``shape``."""

    def __init__(self, low: float, span: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.low: Tensor
        self.span: Tensor
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("span", torch.tensor(span))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.low) / self.span).reshape(len(x), *self.shape)


class _FromUnit(_ToUnit):
    """x * span + low, as rows of ``shape``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape) * self.span + self.low


def _fully_connected(width: int, latent_dim: int) -> nn.Module:
    """d - 500 - 500 - 2000 - latent with dropout before each layer."""
    layers: list[nn.Module] = []
    for a, b in pairwise((width, *_WIDTHS)):
        layers += [nn.Dropout(_DROPOUT), nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(_DROPOUT), nn.Linear(_WIDTHS[-1], latent_dim))


class FullyConnectedDecoder(nn.Sequential):
    """latent - 2000 - 500 - 500 - d, mirrored from the fully connected encoder; gives rows of ``shape``."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int) -> None:
        layers: list[nn.Module] = []
        for a, b in pairwise((latent_dim, *reversed(_WIDTHS))):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers, nn.Linear(_WIDTHS[0], math.prod(shape)), nn.Unflatten(1, shape))


def _conv(shape: tuple[int, ...], latent_dim: int) -> tuple[nn.Module, nn.Module]:
    channels, height, width = shape
    if height % 4 or width % 4:
        raise InputError(
            f"the convolutional encoder halves images twice, so height and width must be divisible by 4; these are "
            f"{height} x {width}: pad or resize them, or use encoder='mlp'"
        )
    small = (16, height // 4, width // 4)
    encoder = nn.Sequential(
        *_block(nn.Conv2d(channels, 16, 3, padding=1)),
        *_block(nn.Conv2d(16, 32, 3, stride=2, padding=1)),
        *_block(nn.Conv2d(32, 32, 3, padding=1)),
        *_block(nn.Conv2d(32, 16, 3, stride=2, padding=1)),
        nn.Flatten(),
        nn.Linear(math.prod(small), _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, math.prod(small)),
        nn.Unflatten(1, small),
        *_block(nn.ConvTranspose2d(16, 32, 3, stride=2, padding=1, output_padding=1)),
        *_block(nn.ConvTranspose2d(32, 32, 3, padding=1)),
        *_block(nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1)),
        nn.ConvTranspose2d(16, channels, 3, padding=1),
        nn.Sigmoid(),
    )
    return encoder, decoder


def _block(conv: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, nn.Module, nn.Module]:
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()
