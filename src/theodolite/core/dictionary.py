"""Dictionaries of hidden space: what gives an activation coordinates and puts it back together from them.

    codes c = encode(f),   f_hat = decode(c),   directions v_1 .. v_k of hidden space, one for each code

Principal components, interaction bases, sparse autoencoders, supervised dictionaries, relative representations and probes
all are one, so that each of the evaluations here runs on each of them. All of them beside each other, with what the model
still does on their reconstructions: `theodolite.activations.dictionary_evaluation.compare_dictionaries`.
"""

__all__ = [
    "Dictionary",
    "LinearDictionary",
    "Quality",
    "decoder_of",
    "explained_variance",
    "kept_codes_curve",
    "measure",
    "stability",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from theodolite.core.capture import Moments
from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError
from theodolite.core.memory import chunks


@runtime_checkable
class Dictionary(Protocol):
    """What every dictionary of hidden space offers; a torch module or a plain object."""

    @property
    def directions(self) -> Float[Tensor, "code width"]:
        """The direction in hidden space that each code stands for, one a row."""
        ...

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row code"]:
        """Codes of activations."""
        ...

    def decode(self, codes: Float[Tensor, "*row code"]) -> Float[Tensor, "*row width"]:
        """Activations of codes."""
        ...


@dataclass(frozen=True, eq=False)
class LinearDictionary:
    """codes = (f - centre) E^T, f_hat = codes V + centre; rows of V are the directions, of E the encoder's.

    Principal components, single neurons and random directions are made by the class methods.

    >>> whole = LinearDictionary.neurons(3)
    >>> whole.decode(whole.encode(torch.tensor([1.0, 2.0, 3.0])))
    tensor([1., 2., 3.])
    """

    directions: Float[Tensor, "code width"]
    encoder: Float[Tensor, "code width"]
    centre: Float[Tensor, " width"]

    def encode(self, x: Float[Tensor, "*row width"]) -> Float[Tensor, "*row code"]:
        """(f - centre) E^T."""
        return (x - self.centre) @ self.encoder.mT

    def decode(self, codes: Float[Tensor, "*row code"]) -> Float[Tensor, "*row width"]:
        """c V + centre."""
        return codes @ self.directions + self.centre

    @classmethod
    def neurons(cls, width: int, *, centre: Tensor | None = None) -> "LinearDictionary":
        """The coordinates as they are."""
        eye = torch.eye(width)
        return cls(eye, eye, torch.zeros(width) if centre is None else centre)

    @classmethod
    def principal_components(cls, rows: Float[Tensor, "... width"], k: int | None = None) -> "LinearDictionary":
        """The k directions of largest variance of ``rows``, orthonormal, largest first; computed in float64."""
        moments = Moments(rows.shape[-1], device=rows.device)
        flat = rows.reshape(-1, rows.shape[-1])
        for part in chunks(len(flat), 32.0 * flat.shape[1]):
            moments.add(flat[part])
        if not 1 <= (k or 1) <= rows.shape[-1]:
            raise InputError(f"principal components of width {rows.shape[-1]} number 1 to that many, got {k}")
        vectors = torch.linalg.eigh(moments.covariance).eigenvectors.mT.flip(0)[:k].to(rows.dtype)
        return cls(vectors, vectors, moments.mean.to(rows.dtype))

    @classmethod
    def random(cls, width: int, k: int, *, seed: int, centre: Tensor | None = None) -> "LinearDictionary":
        """k random orthonormal directions (k <= width): the control of every learned basis."""
        if not 1 <= k <= width:
            raise InputError(f"at most {width} directions of width {width} are orthonormal, got {k}")
        drawn = torch.randn(width, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rows = torch.linalg.qr(drawn).Q.mT.float().contiguous()
        return cls(rows, rows, torch.zeros(width) if centre is None else centre)


@dataclass(frozen=True)
class Quality:
    """How near a dictionary comes, and with how many codes.

    explained: share of the variance about the mean that decode(encode(f)) keeps. active: mean number of codes that are not 0.
    dead: share of codes that are 0 on every row. codes: their number.
    """

    name: str
    codes: int
    explained: float
    active: float
    dead: float


@torch.no_grad()
def explained_variance(dictionary: Dictionary, rows: Float[Tensor, "... width"], *, memory: int | None = None) -> float:
    """1 - sum |f - f_hat|^2 / sum |f - mean|^2 over held-out ``rows``; 0 for a dictionary that always answers their mean."""
    return _measure(dictionary, rows, memory)[0]


@torch.no_grad()
def measure(
    dictionaries: Mapping[str, Dictionary], rows: Float[Tensor, "... width"], *, memory: int | None = None
) -> tuple[Quality, ...]:
    """Each dictionary by name on the same held-out ``rows``."""
    made = []
    for name, dictionary in dictionaries.items():
        explained, active, used = _measure(dictionary, rows, memory)
        made.append(Quality(name, len(used), explained, active, float((~used).float().mean())))
    return tuple(made)


def _measure(dictionary: Dictionary, rows: Tensor, memory: int | None) -> tuple[float, float, Tensor]:
    flat = rows.reshape(-1, rows.shape[-1])
    if len(flat) < 2:
        raise InputError(f"need at least two rows to measure a dictionary on, got {len(flat)}")
    count, width = dictionary.directions.shape
    if width != flat.shape[1]:
        raise InputError(f"the dictionary's directions have width {width}, the rows {flat.shape[1]}")
    mean = flat.double().mean(dim=0)
    lost = total = active = 0.0
    used = torch.zeros(count, dtype=torch.bool, device=flat.device)
    for part in chunks(len(flat), 16.0 * (count + width), memory):
        codes = dictionary.encode(flat[part])
        on = codes != 0
        used |= on.any(dim=0)
        active += float(on.sum())
        lost += float((flat[part] - dictionary.decode(codes)).double().square().sum())
        total += float((flat[part].double() - mean).square().sum())
    if total == 0:
        raise InputError("all rows are the same, so there is no variance to explain")
    return 1 - lost / total, active / len(flat), used


@torch.no_grad()
def decoder_of(dictionary: Dictionary, codes: Tensor | None = None) -> tuple[Float[Tensor, "code width"], Tensor]:
    """What each code adds in the units of the activations, and what is there without any: decode as codes D + b.

    Raises InputError where decode is not affine, which is tried on ``codes``.

    >>> decoder_of(LinearDictionary.neurons(2))[1]
    tensor([0., 0.])
    """
    count = len(dictionary.directions)
    unit = torch.eye(count, device=dictionary.directions.device)
    if codes is not None:
        unit = unit.to(codes)
    bias = dictionary.decode(torch.zeros_like(unit[:1]))[0]
    decoder = dictionary.decode(unit) - bias
    if codes is not None:
        some = codes.reshape(-1, count)[:64]
        off = (dictionary.decode(some) - some @ decoder - bias).abs().max()
        if float(off) > 1e-4 * float((some.abs() @ decoder.abs() + bias.abs()).max()):
            raise InputError(
                f"{type(dictionary).__name__} does not add its codes up (decode is not affine), so codes cannot be kept or moved "
                "one by one"
            )
    return decoder, bias


@torch.no_grad()
def kept_codes_curve(
    dictionary: Dictionary,
    rows: Float[Tensor, "row width"],
    counts: Sequence[int] | None = None,
    *,
    fit: Float[Tensor, "other width"] | None = None,
    order: Tensor | None = None,
    name: str = "kept codes",
    blocks: int = 5,
) -> QualityCurve:
    """Explained variance when only the first k codes are kept and the others are set to their mean, for each k of ``counts``.

    counts: 1 to all where None. fit: rows from which means and order come; where None the first half of ``rows``, and the
    second is scored, in ``blocks`` parts as the curve's runs. order: of the codes, by default falling by the variance of what
    each adds. The reference is the variance explained with all codes, so that `smallest` is the fewest that keep 90 % of it.
    """
    fit, shown = (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if fit is None else (fit, rows)
    if len(shown) < 2 * blocks or len(fit) < 2:
        raise InputError(f"need at least {2 * blocks} rows to score for {blocks} blocks, got {len(shown)}")
    first, codes = dictionary.encode(fit), dictionary.encode(shown)
    decoder, bias = decoder_of(dictionary, codes)
    mean = first.mean(dim=0)
    left = shown.double() - (mean @ decoder + bias).double()
    if order is None:
        order = (first.var(dim=0) * decoder.square().sum(dim=1)).argsort(descending=True)
    decoder, steps = decoder[order].double(), (codes - mean)[:, order].double()
    about = (shown.double() - shown.double().mean(dim=0)).square().sum(dim=1)
    parts = [slice(int(part[0]), int(part[-1]) + 1) for part in np.array_split(np.arange(len(shown)), blocks)]
    off = np.stack([_errors(steps[part], decoder, left[part]) for part in parts], axis=1)
    quality = 1 - off / np.array([float(about[part].sum()) for part in parts])
    tried = range(1, len(order) + 1) if counts is None else counts
    return QualityCurve(
        tuple(tried), quality[list(tried)], chance=0.0, reference=float(quality[-1].mean()), name=name,
        metric="variance explained", total_dimension=len(order),
    )  # fmt: skip


def _errors(steps: Tensor, decoder: Tensor, left: Tensor) -> np.ndarray:
    """|left - sum of the first k steps times the decoder's rows|^2 over all rows, for k = 0 .. all of them.

    By inner products, without a reconstruction for each k.
    """
    change = -2 * (steps * (left @ decoder.mT)).sum(dim=0)
    places = torch.arange(len(decoder), device=decoder.device)
    for part in chunks(len(decoder), 32.0 * len(decoder)):
        both = (steps.mT @ steps[:, part]) * (decoder @ decoder[part].mT)
        earlier = places[:, None] < places[part]
        change[part] += (2 * both * earlier).sum(dim=0) + both[part].diagonal()
    return np.concatenate([[0.0], change.cumsum(dim=0).cpu().numpy()]) + float(left.square().sum())


def stability(a: Dictionary, b: Dictionary) -> float:
    """Mean absolute cosine of the directions of two dictionaries, matched one to one as well as can be (seeds, checkpoints).

    >>> eye = LinearDictionary.neurons(4)
    >>> stability(eye, LinearDictionary(eye.directions.flip(0), eye.encoder, eye.centre))
    1.0
    """
    one, two = (torch.nn.functional.normalize(d.directions.detach().double(), dim=1) for d in (a, b))
    if one.shape[1] != two.shape[1]:
        raise InputError(f"directions of width {one.shape[1]} and {two.shape[1]} do not compare")
    cosines = (one @ two.mT).abs().cpu().numpy()
    matched = cosines[linear_sum_assignment(-cosines)]
    return float(np.mean(matched))
