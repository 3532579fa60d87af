"""Networks with few features or few edges: what they answer, and how few are enough."""

__all__ = [
    "AblationCurve",
    "NotMonotoneWarning",
    "ResolutionWarning",
    "ablate_edges",
    "ablate_nodes",
    "accuracy",
    "edges_required",
]

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from theodolite.activations._basis import batches
from theodolite.activations._nodes import NodeBasis, kept_quality, rows_of
from theodolite.activations.local_interaction_basis.basis import edges, section_index
from theodolite.core.curve import QualityCurve
from theodolite.core.errors import DataError, InputError
from theodolite.core.memory import DEFAULT_BUDGET, chunk_rows, chunks

Score = Callable[[Tensor], float]
_STAYS = 8
_AT_ONCE = 4096


class NotMonotoneWarning(UserWarning):
    """Fewer edges passed where more failed, so the number found is that from which on all of the next ones pass."""


class ResolutionWarning(UserWarning):
    """The drop is less than one row, so that "no loss" is a statement about a handful of rows."""


@dataclass(frozen=True, eq=False)
class AblationCurve(QualityCurve):
    """A `QualityCurve` of one run over the number of features or edges that are kept; the mean is always kept, uncounted."""

    @property
    def k(self) -> tuple[int, ...]:
        """How many features or edges were kept."""
        return self.dimensions

    @property
    def score(self) -> Float[np.ndarray, " k"]:
        """The score with so many."""
        return self.runs[:, 0]

    @property
    def base(self) -> float:
        """The score of the untouched network."""
        return self.reference


@dataclass(frozen=True, eq=False)
class _Accuracy:
    answers: Tensor

    def __call__(self, output: Tensor) -> float:
        if output.ndim < 2 or output.shape[:-1] != self.answers.shape:
            raise InputError(
                f"{tuple(self.answers.shape)} class labels do not fit outputs of shape {tuple(output.shape)}: give one label "
                "for each row of scores"
            )
        return float((output.argmax(dim=-1) == self.answers.to(output.device)).double().mean())


def accuracy(y: Any) -> Score:
    """A score: the share of outputs (n, classes), or (n, p, classes), whose largest entry is at the label ``y`` (n,) or (n, p).

    Raises DataError for no labels at all.

    >>> accuracy([0, 1])(torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    0.5
    """
    values = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if values.size == 0:
        raise DataError("there are no class labels, so there is no accuracy")
    if values.dtype.kind not in "iub":
        raise DataError(
            f"class labels must be whole numbers, the columns of the outputs from 0 on, got {values.dtype}; of names, give "
            "their places: np.unique(y, return_inverse=True)[1], where the columns are in that order"
        )
    return _Accuracy(torch.from_numpy(values.astype(np.int64)))


def ablate_nodes(basis: NodeBasis, X: Any, score: Score, layer: int, ks: Sequence[int] | None = None) -> AblationCurve:
    """Score of the network when only the first k features of one node are kept, the rest at the mean.

    score(output of all rows) -> number, larger is better. ks: 1 to 10, then doubling, and all, where left out; 0 keeps the
    mean alone. The paper counts the mean as one node more.
    """
    chosen = basis._layer(layer)
    tried = _counts(chosen.rank) if ks is None else sorted(set(ks))
    if not tried or tried[0] < 0 or tried[-1] > chosen.rank:
        raise InputError(f"ks must lie in 0 .. {chosen.rank}, got {tried}")
    x, node = rows_of(basis.sections, X), layer % len(basis.layers_)
    quality = kept_quality(basis.sections_, x, node, chosen, score, sorted({0, *tried}), memory=basis.memory)
    return AblationCurve(
        tuple(tried), np.array([[_finite(quality[k])] for k in tried]), chance=quality[0], reference=_finite(quality[None]),
        name=f"{basis.basis} features", metric="score", total_dimension=chosen.rank,
    )  # fmt: skip


def ablate_edges(
    basis: NodeBasis,
    X: Any,
    score: Score,
    layer: int,
    edges: Float[Tensor, "r_next r"],
    ms: Sequence[int],
) -> AblationCurve:
    """Score of the network when only the m strongest of ``edges`` from node ``layer`` to the next are kept, for each m of ``ms``.

    Each feature of the next node is computed by the section itself from the node with that feature's own inputs in place and
    all others at the mean, so the section runs once for each different row of the mask. The mean's edges are always kept
    and not counted. edges: E (r_{l+1}, r_l), of `edges`.
    """
    ablation = _EdgeAblation(basis, X, score, layer, edges)
    tried = sorted(set(ms))
    if not tried or tried[0] < 0 or tried[-1] > ablation.total:
        raise InputError(f"ms must lie in 0 .. {ablation.total} edges, got {tried}")
    quality = [[ablation.score(m)] for m in tried]
    return AblationCurve(
        tuple(tried), np.array(quality), chance=ablation.score(0), reference=ablation.base,
        name=f"{basis.basis} edges", metric="score", total_dimension=ablation.total,
    )  # fmt: skip


def edges_required(
    basis: NodeBasis,
    X: Any,
    score: Score,
    layer: int,
    *,
    drop: float = 0.001,
    edges: Float[Tensor, "r_next r"] | None = None,
) -> int:
    """Fewest edges from node ``layer`` to the next whose score is within ``drop`` of the untouched network's.

    By bisection; the number that is found must also pass with up to 8 edges more. edges: E of the rows that the basis was
    fitted on, where ``X`` are others to score on; of ``X`` where left out.

    Raises DataError where all edges together lose more than ``drop``; warns where the score is not monotone
    (NotMonotoneWarning: then it is the smallest number that passes and stays passing) and where ``drop`` of an `accuracy` is
    less than one row (ResolutionWarning).
    """
    if not 0 <= drop < math.inf:
        raise InputError(f"drop must be at least 0, got {drop}")
    given = _edges_of(basis, X, layer) if edges is None else edges
    ablation = _EdgeAblation(basis, X, score, layer, given)
    if isinstance(score, _Accuracy) and drop * score.answers.numel() < 1 - 1e-9:
        warnings.warn(
            f"a drop of {drop:g} of {score.answers.numel()} labels is less than one of them, so one changed answer counts as a "
            "loss; score more rows, or allow a larger drop",
            ResolutionWarning,
            stacklevel=2,
        )
    enough = ablation.base - drop - 1e-12
    found = _bisect(ablation, enough)
    stable = _stays(ablation, enough, found)
    if stable != found:
        warnings.warn(
            f"{found} edges pass, but not all of the next {_STAYS} numbers do; from {stable} on they do",
            NotMonotoneWarning,
            stacklevel=2,
        )
    return stable


_edges_of = edges


def _bisect(ablation: "_EdgeAblation", enough: float) -> int:
    low, high = -1, ablation.total
    if ablation.score(high) < enough:
        raise DataError(
            f"with all {high} edges the score is {ablation.score(high):.6g}, of the untouched network {ablation.base:.6g}: what "
            "the basis leaves out matters on these rows; fit it on more rows, or allow a larger drop"
        )
    while high - low > 1:
        middle = (low + high + 1) // 2
        low, high = (low, middle) if ablation.score(middle) >= enough else (middle, high)
    return high


def _stays(ablation: "_EdgeAblation", enough: float, found: int) -> int:
    """The smallest number from ``found`` on that passes together with its next 8 (as far as there are so many)."""
    start = found
    m = found
    while m <= min(start + _STAYS, ablation.total):
        if ablation.score(m) < enough:
            start = m + 1
        m += 1
    return start


def _counts(rank: int) -> list[int]:
    few = set(range(1, min(rank, 10) + 1))
    return sorted(few | {10 * 2**i for i in range(rank.bit_length()) if 10 * 2**i < rank} | {rank})


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise DataError(f"the score is {value}; it must be a finite number")
    return float(value)


class _EdgeAblation:
    """The network with the m strongest edges of one pair of nodes, for any m.

    What is kept of one feature's inputs only grows with m, so a feature's values are known by how many of its edges are kept.
    """

    def __init__(self, basis: NodeBasis, X: Any, score: Score, layer: int, edges: Tensor) -> None:
        self.node = section_index(basis, layer)
        self.sections, self.memory = basis.sections_, basis.memory
        self.before, self.after = basis.layers_[self.node : self.node + 2]
        E = torch.as_tensor(edges)
        if E.shape != (self.after.rank, self.before.rank) or not bool(torch.isfinite(E).all()):
            raise InputError(
                f"edges must be finite, of shape ({self.after.rank}, {self.before.rank}), got {tuple(E.shape)}"
            )
        x = rows_of(basis.sections, X)
        self._score, self._scores, self.total = score, dict[int, float](), E.numel()
        rank = torch.empty(E.numel(), dtype=torch.int64, device=E.device)
        rank[E.flatten().argsort(descending=True, stable=True)] = torch.arange(E.numel(), device=E.device)
        self.rank = rank.reshape(E.shape)
        parts = list[Tensor]()
        kept = list[Tensor]()
        untouched = list[Tensor]()
        for rows in batches(self.sections, x, gradients=0, batch_size=1024, memory=self.memory):
            (f,) = self.sections.nodes(x[rows], first=self.node, last=self.node)
            parts.append(self.before.transform(f))
            kept.append(f[:1])
            untouched.append(self.sections.run(f, self.node))
        like = kept[0]
        features = torch.cat(parts)
        # features of unit size keep float32 networks exact: C^+ alone has entries of very different sizes
        size = features.square().reshape(-1, self.before.rank).mean(dim=0).sqrt().clamp_min(1e-300)
        self.features = (features / size).to(like)
        self.back = (self.before.C_pinv * size[:, None]).to(like)
        self.mean = self.before.mean.to(like)
        self.base = _finite(self._score(torch.cat(untouched)))
        self.row_bytes = self.sections.row_bytes(x, gradients=False)
        self.known = dict[tuple[int, int], Tensor]()
        self.linear = self._linear()

    def score(self, m: int) -> float:
        """Score with the m strongest edges."""
        if m not in self._scores:
            z = self._next_features(self.rank < m)
            parts = list[Tensor]()
            for rows in chunks(len(z), self.row_bytes, self.memory):
                node = self.after.inverse_transform(z[rows]).to(self.features)
                parts.append(self.sections.run(node, self.node + 1))
            self._scores[m] = _finite(self._score(torch.cat(parts)))
        return self._scores[m]

    def _next_features(self, mask: Bool[Tensor, "r_next r"]) -> Float[Tensor, "row ... r_next"]:
        if self.linear is not None:
            slopes, constant = self.linear
            return self.features.to(slopes) @ (slopes * mask).T + constant
        counts = mask.sum(dim=1).tolist()
        wanted = dict[bytes, list[int]]()
        for i, count in enumerate(counts):
            if (i, count) not in self.known:
                wanted.setdefault(mask[i].cpu().numpy().tobytes(), []).append(i)
        if len(self.known) * self.features[..., 0].numel() * self.features.element_size() > (
            (self.memory or DEFAULT_BUDGET) // 4
        ):
            self.known = {(i, c): z for i, c in enumerate(counts) if (z := self.known.get((i, c))) is not None}
        groups = list(wanted.values())
        width = math.prod(self.features.shape[1:-1]) * (self.row_bytes + 2 * self.mean.element_size() * len(self.mean))
        rows = chunk_rows(width, self.memory, at_most=_AT_ONCE)
        step = max(1, rows // len(self.features))
        for start in range(0, len(groups), step):
            block = groups[start : start + step]
            masks = mask[[group[0] for group in block]]
            size = max(1, rows // len(block))
            pieces = [self._run(masks, part, block) for part in self.features.split(size)]
            found = [
                [torch.cat([piece[g][k] for piece in pieces]) for k in range(len(block[g]))] for g in range(len(block))
            ]
            for group, columns in zip(block, found, strict=True):
                for i, column in zip(group, columns, strict=True):
                    self.known[i, counts[i]] = column
        return torch.stack([self.known[i, count] for i, count in enumerate(counts)], dim=-1)

    def _run(self, masks: Tensor, features: Tensor, groups: list[list[int]]) -> list[list[Tensor]]:
        """For each mask the values of its group's next features, when only the inputs in the mask are in place."""
        shaped = masks.reshape(len(masks), *[1] * (features.ndim - 1), -1)
        f = self.mean + (features[None] * shaped) @ self.back
        after = self.sections.run(f.flatten(0, 1), self.node, self.node + 1).unflatten(0, f.shape[:2])
        after = after.to(self.after.C) - self.after.mean
        return [list((after[g] @ self.after.C[:, group]).unbind(dim=-1)) for g, group in enumerate(groups)]

    def _linear(self) -> tuple[Tensor, Tensor] | None:
        """Slopes and constant of the section where it is affine on flat nodes, which random masks of all rows must confirm."""
        if self.features.ndim != 2:
            return None
        double = self.after.C
        zero = self.sections.run(self.mean[None].clone(), self.node, self.node + 1)
        if zero.ndim != 2:
            return None
        steps = self.sections.run(self.mean + self.back, self.node, self.node + 1)
        slopes = ((steps.to(double) - zero.to(double)) @ self.after.C).T
        constant = self.after.transform(zero)[0]
        generator = torch.Generator().manual_seed(0)
        precise = 1e-9 if self.mean.dtype == torch.float64 else 1e-4
        for rows in chunks(len(self.features), self.row_bytes, self.memory):
            part = self.features[rows]
            part = part * (torch.rand(part.shape, generator=generator) < 0.5).to(part)
            real = self.after.transform(self.sections.run(self.mean + part @ self.back, self.node, self.node + 1))
            off = (part.to(double) @ slopes.T + constant - real).abs().amax(dim=0)
            if bool((off > precise * (real - constant).abs().amax(dim=0).clamp_min(1e-300)).any()):
                return None
        return slopes, constant
