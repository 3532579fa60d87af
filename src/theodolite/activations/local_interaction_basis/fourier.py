"""What frequencies the features of a network that computes with two numbers modulo p are made of."""

__all__ = ["fourier_labels"]

from typing import Any

import numpy as np
import pandas as pd
import torch

from theodolite.core.errors import DataError, InputError

_NOTABLE = 0.01


def fourier_labels(features: Any, modulus: int) -> pd.DataFrame:
    """The frequency of each feature over the grid of pairs (a, b) modulo ``modulus``, and its share of the power.

    features: (modulus^2, r), pairs with a slowest, or (modulus, modulus, r). One row a feature: frequency_a, frequency_b and
    power_share, the share of the power without the constant. The terms (w, 0), (0, w) and (w, w) of one frequency w count
    together, as cos(wa) + cos(wb) and cos(w(a + b)) do; frequency_a (or _b) is 0 where less than 1 % of their power depends
    on a (on b). Any other pair of frequencies counts on its own; frequency_b is then negative for terms in a - b. A
    constant feature has frequencies and share 0.

    Raises InputError for a wrong number of rows, DataError for values that are not finite.

    >>> a, b = np.meshgrid(np.arange(7), np.arange(7), indexing="ij")
    >>> fourier_labels((np.cos(2 * np.pi * 3 * a / 7) + np.cos(2 * np.pi * 3 * b / 7))[..., None], 7).round(6).values.tolist()
    [[3.0, 3.0, 1.0]]
    """
    values = torch.as_tensor(features).detach().cpu().double().numpy()
    if modulus < 2:
        raise InputError(f"modulus must be at least 2, got {modulus}")
    if values.ndim == 2 and len(values) == modulus**2:
        values = values.reshape(modulus, modulus, -1)
    if values.ndim != 3 or values.shape[:2] != (modulus, modulus):
        raise InputError(f"need features ({modulus**2}, r) or ({modulus}, {modulus}, r), got {values.shape}")
    if not np.isfinite(values).all():
        raise DataError("features hold NaN or infinite values")
    power = np.abs(np.fft.fft2(values, axes=(0, 1))) ** 2
    constant = power[0, 0].copy()
    power[0, 0] = 0
    half = modulus // 2
    signed = np.fft.fftfreq(modulus, 1 / modulus).round().astype(int)
    # a real feature has the same power at (k, l) and (-k, -l): fold the second onto the first
    folded: dict[tuple[int, int], np.ndarray] = {}
    for i, k in enumerate(signed.tolist()):
        for j, q in enumerate(signed.tolist()):
            key = (k, q) if (k, q) >= (0, 0) else (-k, -q)
            if modulus % 2 == 0 and half in (abs(k), abs(q)):  # the highest frequency is its own negative
                key = (abs(k), abs(q))
            folded[key] = folded.get(key, 0) + power[i, j]
    total = power.sum(axis=(0, 1))
    none = np.zeros_like(total)
    groups: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {
        w: (folded.pop((w, 0), none), folded.pop((0, w), none), folded.pop((w, w), none)) for w in range(1, half + 1)
    }
    folded.pop((0, 0), None)
    sums = {w: sum(terms, none) for w, terms in groups.items()}
    rows = []
    for f in range(values.shape[2]):
        if total[f] <= 1e-24 * constant[f] or total[f] == 0:
            rows.append((0, 0, 0.0))
            continue
        w = max(sums, key=lambda one: sums[one][f])
        pair = max(folded, key=lambda one: folded[one][f], default=None)
        if pair is not None and folded[pair][f] > sums[w][f]:
            rows.append((*pair, folded[pair][f] / total[f]))
            continue
        in_a, in_b, both = (term[f] for term in groups[w])
        enough = _NOTABLE * sums[w][f]
        rows.append((w if in_a + both > enough else 0, w if in_b + both > enough else 0, sums[w][f] / total[f]))
    return pd.DataFrame(rows, columns=["frequency_a", "frequency_b", "power_share"])
