"""Two ways in which sparse autoencoders fail where supervised codes do not, as experiments that take seconds.

Occlusion: x = u_a + m v_b + noise with independent attributes a and b. Below some m < 1 the autoencoder spends its few codes
on a, and no feature tells b. Over-splitting: x = +-u + noise; a wider autoencoder breaks each of the two values into many
features that are precise and rarely on.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366, sections 6 and 7.
"""

__all__ = ["OcclusionCurve", "SplittingCurve", "occlusion_curve", "splitting_curve", "weakened"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from theodolite.activations.dictionary import SparseAutoencoder, train_sae
from theodolite.activations.dictionary_evaluation.features import FeatureScores, feature_f1
from theodolite.activations.dictionary_evaluation.supervised import SupervisedDictionary
from theodolite.core.errors import InputError


@dataclass(frozen=True, eq=False)
class OcclusionCurve:
    """At each magnitude ratio m: mean best F1 over the values of A (the larger attribute) and of B, on other rows, and the mean
    cosine of the supervised codes of B to the true ones.
    """

    ratios: tuple[float, ...]
    a: np.ndarray
    b: np.ndarray
    supervised: np.ndarray


@dataclass(frozen=True, eq=False)
class SplittingCurve:
    """At each width: the best F1 of any feature for the binary attribute, the number of features with precision over 0.9 and
    recall under 0.5, on other rows; supervised: F1 of the sign of the supervised code.
    """

    widths: tuple[int, ...]
    best: np.ndarray
    split: np.ndarray
    supervised: float


def occlusion_curve(
    sae_factory: Callable[[int], SparseAutoencoder],
    ratios: Sequence[float],
    *,
    values: int = 20,
    d: int = 32,
    noise: float = 0.05,
    n: int = 8000,
    epochs: int = 20,
    lr: float = 3e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> OcclusionCurve:
    """Train an autoencoder at each ratio m of the two attributes' sizes; sae_factory(d) makes one of width ``d``.

    values: of each attribute, with random unit directions. noise: standard deviation of each coordinate. n: rows to train on,
    half as many to score.
    """
    if not ratios or min(ratios) < 0:
        raise InputError(f"need at least one ratio, none below 0, got {list(ratios)}")
    rng = torch.Generator().manual_seed(seed)
    u, v = (torch.nn.functional.normalize(torch.randn(values, d, generator=rng), dim=1) for _ in range(2))
    total = n + n // 2
    a, b = (torch.randint(0, values, (total,), generator=rng) for _ in range(2))
    spread = noise * torch.randn(total, d, generator=rng)
    table: Any = pd.DataFrame({"A": a.numpy(), "B": b.numpy()})
    found: dict[str, list[float]] = {"A": [], "B": [], "code": []}
    for m in ratios:
        x = u[a] + m * v[b] + spread
        scores = _trained(sae_factory(d), x, n, table, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
        for name in ("A", "B"):
            found[name].append(float(scores.best_by_value(name).mean()))
        codes = SupervisedDictionary().fit(x[:n], table[:n]).codes_["B"]
        true = (m * (v - v.mean(dim=0))).double()
        found["code"].append(float(torch.nn.functional.cosine_similarity(codes, true, dim=1).mean()) if m > 0 else 0.0)
    return OcclusionCurve(tuple(ratios), *(np.array(found[name]) for name in ("A", "B", "code")))


def splitting_curve(
    sae_factory: Callable[[int, int], SparseAutoencoder],
    widths: Sequence[int],
    *,
    d: int = 32,
    noise: float = 0.25,
    n: int = 8000,
    epochs: int = 20,
    lr: float = 3e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> SplittingCurve:
    """Train an autoencoder of each width on x = +-u + noise; sae_factory(d, width) makes one."""
    if not widths:
        raise InputError("need at least one width")
    rng = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(d, generator=rng), dim=0)
    total = n + n // 2
    side = torch.randint(0, 2, (total,), generator=rng)
    x = (2.0 * side[:, None] - 1) * u + noise * torch.randn(total, d, generator=rng)
    table: Any = pd.DataFrame({"side": side.numpy()})
    best, split = [], []
    for width in widths:
        scores = _trained(sae_factory(d, width), x, n, table, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
        best.append(float(scores.f1.to_numpy().max()))
        precision, recall = (frame.to_numpy() for frame in (scores.precision, scores.recall))
        split.append(int(((precision > 0.9) & (recall < 0.5)).any(axis=1).sum()))
    made = SupervisedDictionary().fit(x[:n], table[:n])
    read = made.encode(x[n:])[:, :2] > 0
    supervised = float(feature_f1(read, table[n:]).f1.to_numpy().max())
    return SplittingCurve(tuple(widths), np.array(best), np.array(split), supervised)


@torch.no_grad()
def _scored(sae: SparseAutoencoder, x: Tensor, table: pd.DataFrame) -> FeatureScores:
    return feature_f1(sae.encode(x) > 0, table)


def _trained(sae: SparseAutoencoder, x: Tensor, n: int, table: Any, **options: Any) -> FeatureScores:
    """Scores, on the rows after the first n, of an autoencoder that was trained on these."""
    train_sae(sae, x[:n], **options)
    return _scored(sae, x[n:], table[n:])


def weakened(
    acts: Tensor, attributes: pd.DataFrame, attribute: str, alpha: float, *, supervised: SupervisedDictionary
) -> Tensor:
    """Activations whose supervised code of one attribute is shrunk to ``alpha`` of itself: x - (1 - alpha) u.

    Train the same autoencoder on these for falling alpha, and the alpha at which a hidden attribute gets a feature tells how
    much larger the other one is at a real location.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in [0, 1], got {alpha}")
    return acts - (1 - alpha) * supervised.code(attribute, attributes[attribute].tolist()).to(acts)
