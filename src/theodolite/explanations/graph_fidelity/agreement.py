"""Which fidelity score ranks explanations as the true one does, where the true one is known."""

__all__ = ["CoherenceResult", "coherence", "candidates"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from theodolite.core.errors import InputError
from theodolite.core.estimate import Estimate
from theodolite.core.memory import chunks
from theodolite.explanations.graph_fidelity.graph import Graph
from theodolite.explanations.graph_fidelity.scores import Scheme, check_lengths, measure, numbered, prepared

SCORES = ("plus", "minus", "delta", "ordinary_plus", "ordinary_minus", "ordinary_delta", "sparsity")
GOLD = ("edit", "jaccard", "ratio", "lost", "added")
_STEP_BYTES, _RESAMPLES = 1 << 27, 1000


@dataclass(frozen=True, eq=False)
class CoherenceResult:
    """Agreement of scores with the distance to the true explanation.

    rho: Spearman's correlation over the cells of the grid, scores x gold standards; good is -1 for plus and delta and +1
    for minus. low, high: its 95 % bootstrap interval over graphs. surface (score, r1, r2): mean scores, in the order of
    ``scores``; distance (gold, r1, r2): mean distances. n_forward: graphs that the network saw.
    """

    rho: pd.DataFrame
    low: pd.DataFrame
    high: pd.DataFrame
    surface: Float[np.ndarray, "score lost added"]
    distance: Float[np.ndarray, "gold lost added"]
    scores: tuple[str, ...]
    gold: tuple[str, ...]
    grid: tuple[float, ...]
    graphs: int
    n_forward: int

    def estimate(self, score: str, gold: str) -> Estimate:
        """One correlation with its interval."""
        if score not in self.scores or gold not in self.gold:
            raise InputError(
                f"there are the scores {self.scores} and the standards {self.gold}; got {score!r}, {gold!r}"
            )
        low, value, high = (float(table.loc[score, gold]) for table in (self.low, self.rho, self.high))  # type: ignore[arg-type]
        return Estimate(value, low, high, "Spearman's ρ", self.graphs)


def coherence(
    model: Any,
    graphs: Sequence[Graph | Any],
    true_explanations: Sequence[Any],
    grid: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8),
    gold: Sequence[str] = ("edit", "jaccard", "ratio"),
    *,
    labels: Sequence[int] | Tensor | np.ndarray | None = None,
    target_nodes: Sequence[int] | None = None,
    alpha1: float = 0.1,
    alpha2: float = 0.9,
    n_samples: int = 30,
    form: str = "probability",
    sampling: str = "bernoulli",
    hops: int | None = None,
    seed: int = 0,
) -> CoherenceResult:
    """Rank agreement of each score with the distance of candidates to the true explanation Ψ*.

    Candidates: for each r1 and r2 of ``grid`` a share r1 of Ψ* is dropped and a share r2 of E − Ψ* added, at random.
    gold: "edit" |Ψ △ Ψ*|, "jaccard" 1 − |Ψ ∩ Ψ*| / |Ψ ∪ Ψ*|, "ratio" r1 + r2, "lost" r1, "added" r2. Scores and
    distances are averaged over graphs before they are ranked; a score that is the same in every cell ranks nothing and
    has ρ = 0. Give a network that has learned the task: with chance accuracy no score can agree with anything.

    Source: Zheng et al., 2023, arXiv:2310.01820; the Jaccard and ratio distances are ours.
    """
    scheme = Scheme(alpha1, alpha2, n_samples, form, sampling)
    shares = np.array(list(grid), dtype=np.float64)
    if len(shares) < 2 or not ((shares >= 0) & (shares <= 1)).all() or len(np.unique(shares)) < len(shares):
        raise InputError(f"grid needs at least two different shares in [0, 1], got {tuple(grid)}")
    unknown = [name for name in gold if name not in GOLD]
    if unknown or not gold:
        raise InputError(f"gold standards are {', '.join(GOLD)}; got {tuple(gold)}")
    check_lengths(graphs, true_explanations, labels=labels, target_nodes=target_nodes)
    rng, seen, found, distances = np.random.default_rng(seed), 0, [], []
    for i, (graph, explanation) in enumerate(zip(graphs, true_explanations, strict=True)):
        node = None if target_nodes is None else target_nodes[i]
        with numbered(i):
            scorer, true = prepared(model, graph, explanation, node, hops, check=i == 0)
            if not true.any() or true.all():
                raise InputError(
                    "the true explanation holds no edge or all of them, so nothing can be dropped or added"
                )
            subsets = candidates(true, shares, rng)
            parts = []
            for part in chunks(len(subsets), (2 * n_samples + 3) * 4.0 * len(true), _STEP_BYTES):
                one = measure(scorer, subsets[part], None if labels is None else labels[i], scheme, rng)
                parts.append([one.scores[name] for name in SCORES[:-1]])
                seen += one.n_forward
        found.append(np.concatenate([np.concatenate(parts, axis=1), 1 - subsets.mean(axis=1)[None]]))
        distances.append(np.stack([_distance(name, subsets, true, shares) for name in gold]))
    return _agree(np.stack(found), np.stack(distances), shares, tuple(gold), seen, rng)


def candidates(
    true: Bool[np.ndarray, " pair"], shares: Float[np.ndarray, " share"], rng: np.random.Generator
) -> Bool[np.ndarray, "candidate pair"]:
    """Sets that lost a share r1 of the true edges and gained a share r2 of the others, for r1, r2 in ``shares``."""
    inner, outer = np.flatnonzero(true), np.flatnonzero(~true)
    made = np.zeros((len(shares) ** 2, len(true)), dtype=bool)
    for row, (r1, r2) in enumerate((r1, r2) for r1 in shares for r2 in shares):
        left = len(inner) - int(r1 * len(inner) + 0.5)
        made[row, rng.permutation(inner)[:left]] = True
        made[row, rng.permutation(outer)[: int(r2 * len(outer) + 0.5)]] = True
    return made


def _distance(name: str, subsets: np.ndarray, true: np.ndarray, shares: np.ndarray) -> Float[np.ndarray, " candidate"]:
    lost, added = np.repeat(shares, len(shares)), np.tile(shares, len(shares))
    if name == "edit":
        return (subsets ^ true).sum(axis=1).astype(np.float64)
    if name == "jaccard":
        return 1 - (subsets & true).sum(axis=1) / (subsets | true).sum(axis=1)
    return {"ratio": lost + added, "lost": lost, "added": added}[name]


def _agree(
    scores: Float[np.ndarray, "graph score cell"],
    distances: Float[np.ndarray, "graph gold cell"],
    shares: np.ndarray,
    gold: tuple[str, ...],
    seen: int,
    rng: np.random.Generator,
) -> CoherenceResult:
    n = len(scores)
    rho = _spearman(scores.mean(axis=0), distances.mean(axis=0))
    draws = np.empty((_RESAMPLES, len(SCORES), len(gold)))
    for r, count in enumerate(rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n):
        draws[r] = _spearman(np.tensordot(count, scores, 1), np.tensordot(count, distances, 1))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)

    def table(values: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(values, index=list(SCORES), columns=list(gold))

    cells = (len(shares), len(shares))
    return CoherenceResult(
        table(rho), table(np.minimum(low, rho)), table(np.maximum(high, rho)),
        scores.mean(axis=0).reshape(-1, *cells), distances.mean(axis=0).reshape(-1, *cells),
        SCORES, gold, tuple(shares.tolist()), n, seen,
    )  # fmt: skip


def _spearman(scores: Float[np.ndarray, "score cell"], gold: Float[np.ndarray, "gold cell"]) -> np.ndarray:
    """Correlation of ranks, (scores, golds); values that differ by rounding alone are ties."""
    a, b = (rankdata(np.round(part, 12), axis=1) for part in (scores, gold))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1)[:, None] * (b**2).sum(axis=1))
    return np.where(scale > 0, a @ b.T / np.where(scale > 0, scale, 1.0), 0.0).clip(-1, 1)
