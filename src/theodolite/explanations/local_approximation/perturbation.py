"""The perturbation test: how much f changes when the features an explanation ranks lowest, or highest, are disturbed.

    change(k) = mean over draws of |f(x) - f(x')|,   x' with the bottom-k or top-k features by |w| disturbed

Lower is better for the bottom-k (what is called unimportant should not matter), higher for the top-k.

Source: Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254 (Section 5.2).
"""

__all__ = ["KS", "PerturbationCurve", "perturbation_curve"]

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.memory import chunks
from theodolite.explanations.local_approximation.local import LocalFunction
from theodolite.explanations.local_approximation.neighbourhood import Array, Neighbourhood, whole_number

KS = range(1, 12)
"""Numbers of disturbed features in the paper; where there are fewer features, up to all of them."""


@dataclass(frozen=True, eq=False)
class PerturbationCurve:
    """Mean |f(x) - f(x')| of every row for each number ``ks`` of disturbed features; change (n, len(ks))."""

    ks: tuple[int, ...]
    change: Float[Tensor, "row k"]
    kind: str
    end: str

    @property
    def lower_is_better(self) -> bool:
        """True for the bottom-k, which should not matter."""
        return self.end == "bottom"

    @property
    def mean(self) -> Float[Tensor, " k"]:
        """The curve: mean over rows."""
        return self.change.mean(dim=0)

    @property
    def area(self) -> float:
        """Area under the curve, as the mean over ks."""
        return float(self.change.mean())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.mean.cpu().numpy().astype(dtype or np.float64)


def perturbation_curve(
    f: Any,
    X: Any,
    weights: Any,
    kind: str = "binary",
    end: str = "bottom",
    ks: Iterable[Any] = KS,
    sigma: float = 0.1,
    draws: int = 100,
    *,
    baseline: Any = 0.0,
    groups: Array | None = None,
    target: Any = None,
    seed: int = 0,
    memory: int | None = None,
) -> PerturbationCurve:
    """How the score of each row's target changes when its k lowest or highest ranked features are disturbed.

    weights: (n, d), ranked by |w|, ties by position. kind: "binary" sets features to ``baseline``, "gaussian" adds
    N(0, sigma^2) noise, ``draws`` times. end: "bottom" or "top". ks: numbers of features; the default stops at d. The
    control is the same call with the weights of each row shuffled.

    >>> plane = lambda x: x @ torch.tensor([3.0, 1.0])
    >>> perturbation_curve(plane, torch.ones(1, 2), torch.tensor([[3.0, 1.0]])).mean
    tensor([1., 4.])
    """
    if kind not in ("binary", "gaussian") or end not in ("bottom", "top"):
        raise InputError(f"kind must be binary or gaussian and end bottom or top, got {kind!r} and {end!r}")
    whole_number("draws", draws, 1)
    whole_number("seed", seed, 0)
    binary = kind == "binary"
    around = (
        Neighbourhood.binary("uniform", baseline=baseline, groups=groups)
        if binary
        else Neighbourhood.gaussian(sigma, groups=groups)
    )
    local = LocalFunction(f, X, target, around, memory=memory)
    d, counts = local.features, tuple(ks)
    size = torch.as_tensor(weights, device=local.x.device).abs()
    if size.shape != (len(local), d) or bool(torch.isnan(size).any()):
        raise InputError(f"weights must be {(len(local), d)} numbers for these rows, got {tuple(size.shape)}")
    if counts == tuple(KS):
        counts = counts[:d]
    for k in counts:
        whole_number("each of ks", k, 1)
    if not counts or max(counts) > d:
        raise InputError(f"ks must lie in 1..{d}, the number of features, got {list(counts)}")
    rank = size.argsort(dim=1, descending=end == "top", stable=True).argsort(dim=1)
    levels = torch.tensor(counts, device=rank.device)[:, None, None]
    change = torch.zeros(len(local), len(counts), dtype=torch.float64, device=local.x.device)
    move_bytes = 4.0 * 4 * len(counts) * d
    for noise in _noise(around, d, draws, seed, move_bytes, local.share(4)) if not binary else [None]:
        for rows in chunks(len(local), move_bytes * (1 if noise is None else len(noise)), local.share(4)):
            disturbed = rank[rows, None, None] < levels
            moves = (1 - disturbed.to(local.x)) if noise is None else disturbed * noise.to(local.x)
            values = local.values(rows, moves.flatten(1, 2)).unflatten(1, (len(counts), -1))
            change[rows] += (values - local.anchor[rows, None, None]).abs().sum(dim=2) / (1 if binary else draws)
    return PerturbationCurve(counts, change.float(), kind, end)


def _noise(around: Neighbourhood, d: int, draws: int, seed: int, move_bytes: float, memory: int) -> Iterator[Tensor]:
    """The draws in blocks of which one row can have all its moves at once."""
    for block in around.draws(d, draws, seed=seed):
        for part in chunks(len(block), move_bytes, memory):
            yield block[part]
