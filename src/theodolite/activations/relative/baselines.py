"""Agreement against the number of anchors, beside what needs no anchors, what fits a map on them, and their order permuted."""

__all__ = ["agreement_curve", "quality_curve"]

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor

from theodolite.activations.relative.agreement import RelativeWarning, latent_agreement
from theodolite.activations.relative.projection import RelativeProjection
from theodolite.activations.relative.similarity import Rows, latents
from theodolite.core.curve import QualityCurve
from theodolite.core.errors import InputError

_PERMUTED = "permuted anchors"
_LEAK = 0.5


def agreement_curve(
    Za: Rows,
    Zb: Rows,
    sizes: Sequence[int] = (10, 30, 100, 300, 1000),
    *,
    repeats: int = 3,
    k: int = 10,
    similarity: str = "cosine",
    preprocess: str = "none",
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement of two models' latents (item, width) of the same items for several numbers of anchors, in both directions.

    One row for each representation, number of anchors (0 where none are used), repeat and direction ("a->b", "b->a"), with
    the fields of `LatentAgreement`. Representations: "relative"; "permuted anchors", the control, with the anchors of A in
    another order; "absolute", the latents as they are (cut to one width by their principal components where the widths
    differ, then called "absolute (PCA)"); "procrustes (supervised by anchors)" and "ridge (supervised by anchors)", an
    orthogonal and a linear map from A to B fitted on the anchors. Each repeat draws an order of the items; its first ones
    are the anchors, and the items behind the largest number of anchors are what every size is measured on.

    Sizes above half of the items are left out. Warns with `RelativeWarning` where the permuted control reaches more than
    half of the relative vectors' reciprocal rank. Raises InputError where no size is left.

    >>> Z = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> table = agreement_curve(Z, -Z, sizes=[4, 20], repeats=1)
    >>> table[table.representation == "relative"].mrr.round(3).tolist()[-2:]
    [1.0, 1.0]
    """
    a, b = latents(Za, "Za").detach(), latents(Zb, "Zb").detach().to(latents(Za, "Za").dtype)
    if len(a) != len(b):
        raise InputError(f"the spaces must hold the same items in the same order, got {len(a)} and {len(b)} rows")
    tried = sorted({size for size in sizes if 2 <= size <= len(a) // 2})
    if not tried or repeats < 1:
        raise InputError(
            f"with {len(a)} items the number of anchors can be 2 to {len(a) // 2} (the others are searched), got {list(sizes)} "
            f"and {repeats} repeats"
        )
    rows = []
    for repeat in range(repeats):
        order = np.random.default_rng([seed, repeat]).permutation(len(a))
        items = torch.as_tensor(order[tried[-1] :])
        for name, size, pair in _pairs(a, b, order, tried, items, similarity, preprocess):
            with warnings.catch_warnings():
                # the name of the representation says so
                warnings.filterwarnings("ignore", "the spaces have", RelativeWarning)
                for direction, one, two in pair:
                    found = asdict(latent_agreement(one, two, k=min(k, len(items))))
                    rows.append(
                        {"representation": name, "anchors": size, "repeat": repeat, "direction": direction} | found
                    )
    table = pd.DataFrame(rows)
    _tell_leaks(table, tried[-1])
    return table


def quality_curve(table: pd.DataFrame, *, representation: str = "relative", metric: str = "mrr") -> QualityCurve:
    """The curve of one representation of `agreement_curve`'s table: a run is the mean of both directions of one repeat.

    chance is what a random order of the items gives (of "mrr" and "top1"; 0 for others), reference what the largest number
    of anchors gives, so `QualityCurve.smallest` tells how many anchors are nearly as good.

    >>> Z = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> quality_curve(agreement_curve(Z, -Z, sizes=[4, 20], repeats=2)).dimensions
    (4, 20)
    """
    chosen = table[(table.representation == representation) & (table.anchors > 0)]
    if chosen.empty:
        raise InputError(f"the table has no numbers of anchors of {representation!r}")
    means = chosen.pivot_table(index="anchors", columns="repeat", values=metric, aggfunc="mean")
    runs = dict(zip(means.index.tolist(), means.to_numpy().tolist(), strict=True))
    n = int(chosen.n.iloc[0])
    chance = {"mrr": float((1 / np.arange(1, n + 1)).mean()), "top1": 1 / n}.get(metric, 0.0)
    reference = float(np.mean(runs[max(runs)]))
    return QualityCurve.from_runs(runs, chance=chance, reference=reference, name=representation, metric=metric)


def _pairs(
    a: Tensor,
    b: Tensor,
    order: np.ndarray,
    sizes: Sequence[int],
    items: Tensor,
    similarity: str,
    preprocess: str,
) -> Iterator[tuple[str, int, list[tuple[str, Tensor, Tensor]]]]:
    """Each representation's name, number of anchors and vectors of ``items`` in both directions."""
    same = a.shape[1] == b.shape[1]
    yield "absolute" if same else "absolute (PCA)", 0, _both_ways(a[items], b[items])
    for size in sizes:
        index = order[:size]
        made = [
            RelativeProjection(similarity=similarity, preprocess=preprocess).fit(space, anchor_index=index)
            for space in (a, b)
        ]
        one, two = made[0].transform(a[items]), made[1].transform(b[items])
        yield "relative", size, _both_ways(one, two)
        shuffled = torch.as_tensor(np.random.default_rng(order[:8]).permutation(size))
        yield _PERMUTED, size, _both_ways(one[:, shuffled], two)
        anchors = torch.as_tensor(index)
        for name, mapped in (("procrustes", _procrustes), ("ridge", _ridge)):
            yield f"{name} (supervised by anchors)", size, [
                ("a->b", *mapped(a, b, anchors, items)),
                ("b->a", *mapped(b, a, anchors, items)),
            ]  # fmt: skip


def _both_ways(one: Tensor, two: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    return [("a->b", one, two), ("b->a", two, one)]


def _procrustes(a: Tensor, b: Tensor, anchors: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Items of A turned into B, about the anchors' means: U V^T of the anchors' cross-covariance."""
    mean_a, mean_b = a[anchors].mean(dim=0), b[anchors].mean(dim=0)
    u, _, vh = torch.linalg.svd(((a[anchors] - mean_a).mT @ (b[anchors] - mean_b)).double(), full_matrices=False)
    return (a[items] - mean_a) @ (u @ vh).to(a), b[items] - mean_b


def _ridge(a: Tensor, b: Tensor, anchors: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Items of A mapped linearly into B; the penalty is chosen by leaving out one anchor at a time."""
    mean_a, mean_b = a[anchors].mean(dim=0), b[anchors].mean(dim=0)
    x, y = ((space[anchors] - mean).double().cpu().numpy() for space, mean in ((a, mean_a), (b, mean_b)))
    penalties = float((x**2).sum() / len(x)) * np.logspace(-4, 1, 6)
    weights = np.asarray(RidgeCV(alphas=penalties, fit_intercept=False).fit(x, y).coef_)
    return (a[items] - mean_a) @ torch.as_tensor(weights.reshape(y.shape[1], -1)).to(a).mT, b[items] - mean_b


def _tell_leaks(table: pd.DataFrame, size: int) -> None:
    means = table[table.anchors == size].groupby("representation").mrr.mean()
    if means[_PERMUTED] > _LEAK * means["relative"]:
        warnings.warn(
            f"with {size} anchors in another order the mean reciprocal rank is still {means[_PERMUTED]:.3g} (in their order "
            f"{means['relative']:.3g}): items repeat, labels leak into the vectors, or the spaces have little in common",
            RelativeWarning,
            stacklevel=3,
        )
