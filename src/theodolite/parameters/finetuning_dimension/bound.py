"""A bound on the risk that counts the coordinates of a fine-tuned model, not its parameters, arXiv:2012.13255, section 6."""

__all__ = ["CompressionCertificate", "compression_bound", "compression_certificate", "quantize_coordinates"]

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from theodolite.core.errors import InputError
from theodolite.parameters.finetuning_dimension.subspace import FineTuningSubspace
from theodolite.parameters.finetuning_dimension.training import chance_level, read_part, scores

_SEED_BITS, _RANGE_BITS = 64, 64


def compression_bound(
    empirical_risk: float,
    n_samples: int,
    n_coordinates: int,
    bits: int,
    *,
    delta: float = 0.05,
    extra_bits: float = 0,
) -> float:
    """Upper bound, with probability 1 - delta, on the risk of a model that b bits for each of d coordinates describe.

        risk <= empirical risk + sqrt((d b ln 2 + e ln 2 + ln(1 / delta)) / (2 n))                    (Occam; theorem 1)

    empirical_risk: share of errors of the quantised model on the n_samples rows it was trained on. extra_bits: e, all else
    that was chosen after seeing them: seeds, the ranges of the quantiser, log2 of the number of configurations tried. A
    bound of 1 or more says nothing.

    Raises InputError for numbers that cannot be.

    >>> round(compression_bound(0.05, 50_000, 200, 8), 5)
    0.15545
    """
    if not 0 <= empirical_risk <= 1 or not 0 < delta < 1:
        raise InputError(f"need a risk in [0, 1] and 0 < delta < 1, got {empirical_risk} and {delta}")
    if n_samples < 1 or n_coordinates < 0 or bits < 1 or extra_bits < 0:
        raise InputError(
            f"need n_samples >= 1, n_coordinates >= 0, bits >= 1 and extra_bits >= 0; "
            f"got {n_samples}, {n_coordinates}, {bits}, {extra_bits}"
        )
    nats = (n_coordinates * bits + extra_bits) * math.log(2) + math.log(1 / delta)
    return float(empirical_risk) + math.sqrt(nats / (2 * n_samples))


@torch.no_grad()
def quantize_coordinates(subspace: FineTuningSubspace, bits: int) -> FineTuningSubspace:
    """A copy whose coordinates, and whose scales, each take one of 2^bits values spaced evenly over their own range.

    The two ends of a range are float32 numbers that have to be told too: 64 bits for the coordinates and 64 for the scales.

    >>> from torch import nn
    >>> tuned = FineTuningSubspace(nn.Linear(4, 2), 3, method="did", head=None)
    >>> tuned.coordinates.data = torch.tensor([0.0, 0.3, 1.0])
    >>> quantize_coordinates(tuned, 1).coordinates.tolist()
    [0.0, 0.0, 1.0]
    """
    if not 1 <= bits <= 24:
        raise InputError(f"bits must lie between 1 and 24, what a float32 number resolves; got {bits}")
    if subspace.merged:
        raise InputError("the coordinates are merged into the model; unmerge_() comes first")
    made = copy.deepcopy(subspace)
    for values in made.trained():
        low, high = values.min(), values.max()
        cell = (high - low) / (2**bits - 1)
        if cell > 0:
            values.copy_(low + ((values - low) / cell).round() * cell)
    return made


@dataclass(frozen=True)
class CompressionCertificate:
    """What `compression_certificate` finds.

    bound: on the risk, with probability 1 - delta. empirical_risk: of the quantised model on the training rows;
    unquantised_risk: of the model before. chance_risk: of always answering the commonest class. vacuous: bound >=
    chance_risk. description_bits: everything that was counted. n_samples: training rows.
    """

    bound: float
    empirical_risk: float
    unquantised_risk: float
    chance_risk: float
    vacuous: bool
    description_bits: float
    bits: int
    n_samples: int
    delta: float


def compression_certificate(
    subspace: FineTuningSubspace,
    train: Mapping[str, Any],
    *,
    bits: int = 8,
    delta: float = 0.05,
    configurations: int = 1,
    memory: int | None = None,
) -> CompressionCertificate:
    """Quantise, measure the risk of the quantised model on the rows it was trained on, and bound the true risk.

    train: the training rows, columns of tensors with "labels". configurations: how many models were trained before this one
    was chosen (dimensions x learning rates x seeds); choosing costs log2 of it. Paid beside the d b bits: 64 for the seed of
    P, 64 for each range of `quantize_coordinates`, log2(configurations).

    Raises DataError for rows without labels.
    """
    train = read_part(train, "train", "accuracy")
    if configurations < 1:
        raise InputError(f"configurations must be at least 1, got {configurations}")
    labels = train["labels"]
    small = quantize_coordinates(subspace, bits)
    before, after = (
        float((scores(model, train, memory=memory).argmax(dim=1) != labels).double().mean())
        for model in (subspace, small)
    )
    extra = _SEED_BITS + _RANGE_BITS * len(subspace.trained()) + math.log2(configurations)
    bound = compression_bound(after, len(labels), subspace.dimension, bits, delta=delta, extra_bits=extra)
    chance = 1 - chance_level(labels, "accuracy")
    return CompressionCertificate(
        bound=bound,
        empirical_risk=after,
        unquantised_risk=before,
        chance_risk=chance,
        vacuous=bound >= chance,
        description_bits=subspace.dimension * bits + extra,
        bits=bits,
        n_samples=len(labels),
        delta=delta,
    )
