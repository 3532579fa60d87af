"""Robust and ordinary fidelity of explanations, side by side."""

__all__ = [
    "FidelityScores",
    "alpha_sweep",
    "characterization_score",
    "edge_saliency",
    "fidelity_table",
    "robust_fidelity",
]

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from theodolite.core.errors import InputError, ModelError
from theodolite.explanations.graph_fidelity.engine import Scorer, check_edge_weights
from theodolite.explanations.graph_fidelity.graph import Graph, as_graph, explained_pairs

Label = int | str | Tensor | None
LARGEST_ENUMERATION = 12  # edges, so 4,096 subsets


@dataclass(frozen=True)
class FidelityScores:
    """What one explanation reaches.

    plus, minus, delta: robust scores; plus_se, minus_se: their standard errors, 0 where nothing was drawn at random.
    ordinary_*: the same with α1 = 1, α2 = 0. sparsity: 1 − |Ψ| / |E|, undirected edges counted once. n_forward: graphs
    that the network saw (equal ones are shown once). label, probability: the class and f(G) of it. degenerate: "empty"
    or "complete" where the explanation holds no edge or all; then the side on which nothing can be removed is 0.
    """

    plus: float
    minus: float
    delta: float
    plus_se: float
    minus_se: float
    ordinary_plus: float
    ordinary_minus: float
    ordinary_delta: float
    sparsity: float
    n_forward: int
    label: int
    probability: float
    degenerate: Literal["empty", "complete"] | None = None

    @property
    def delta_se(self) -> float:
        """Standard error of delta; the two sides are drawn independently."""
        return float(np.hypot(self.plus_se, self.minus_se))


@dataclass(frozen=True)
class Scheme:
    """How a score is taken: the shares, the number of draws, and which."""

    alpha1: float = 0.1
    alpha2: float = 0.9
    n_samples: int = 50
    form: str = "probability"
    sampling: str = "bernoulli"

    def __post_init__(self) -> None:
        for name in ("alpha1", "alpha2"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.n_samples < 2:
            raise InputError(f"n_samples must be at least 2 for a standard error, got {self.n_samples}")
        if self.form not in ("probability", "accuracy"):
            raise InputError(f"form must be probability or accuracy, got {self.form!r}")
        if self.sampling not in ("bernoulli", "count", "exact"):
            raise InputError(f"sampling must be bernoulli, count or exact, got {self.sampling!r}")


@dataclass(frozen=True, eq=False)
class Draws:
    """Sets of edges to keep, the candidate that each belongs to, its weight there, and whether all sets are listed."""

    keep: Bool[np.ndarray, "set pair"]
    owner: Int[np.ndarray, " set"]
    weight: Float[np.ndarray, " set"]
    exact: Bool[np.ndarray, " candidate"]

    def mean(self, values: Float[np.ndarray, " set"]) -> tuple[np.ndarray, np.ndarray]:
        """Expectation of a value over each candidate's sets, and its standard error."""
        n = len(self.exact)
        mean = np.bincount(self.owner, self.weight * values, minlength=n)
        size = np.bincount(self.owner, minlength=n)
        spread = np.bincount(self.owner, self.weight * (values - mean[self.owner]) ** 2, minlength=n)
        return mean, np.where(self.exact, 0.0, np.sqrt(spread / np.maximum(1, size - 1)))


def removals(
    subsets: Bool[np.ndarray, "candidate pair"], share: float, scheme: Scheme, rng: np.random.Generator, *, kept: bool
) -> Draws:
    """All edges but a random part of each subset.

    share: of the subset's edges that is removed; with ``kept`` the share that is left in.
    """
    chance = 1 - share if kept else share
    keep, owner, weight, exact = [], [], [], []
    for c, subset in enumerate(subsets):
        places = np.flatnonzero(subset)
        size = len(places)
        whole = share in (0.0, 1.0) or size == 0
        listed = scheme.sampling == "exact" and size <= LARGEST_ENUMERATION
        if whole:
            removed = np.full((1, size), chance == 1.0)
            w = np.ones(1)
        elif listed:
            removed = (np.arange(1 << size)[:, None] >> np.arange(size) & 1).astype(bool)
            ones = removed.sum(axis=1)
            w = chance**ones * (1 - chance) ** (size - ones)
        else:
            drawn = rng.random((scheme.n_samples, size))
            if scheme.sampling == "count":
                exactly = int(share * size + 0.5)  # a half is rounded up, so that one edge of five leaves at a tenth
                exactly = size - exactly if kept else exactly
                removed = drawn.argsort(axis=1).argsort(axis=1) < exactly
            else:
                removed = drawn < chance
            w = np.full(len(removed), 1 / len(removed))
        sets = np.ones((len(removed), subsets.shape[1]), dtype=bool)
        sets[:, places] = ~removed
        keep.append(sets)
        owner.append(np.full(len(sets), c))
        weight.append(w)
        exact.append(whole or listed)
    return Draws(np.concatenate(keep), np.concatenate(owner), np.concatenate(weight), np.array(exact))


def check_enumerable(subsets: Bool[np.ndarray, "candidate pair"]) -> None:
    """Raise where exact expectations are asked for and neither side can be enumerated."""
    sizes = subsets.sum(axis=1)
    rest = subsets.shape[1] - sizes
    worst = int(np.minimum(sizes, rest).argmax())
    if min(sizes[worst], rest[worst]) > LARGEST_ENUMERATION:
        raise InputError(
            f"sampling='exact' lists all subsets, and needs at most {LARGEST_ENUMERATION} edges in the explanation or outside "
            f"it; candidate {worst} has {int(sizes[worst])} and {int(rest[worst])}; use sampling='bernoulli' and more n_samples"
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores (candidates,) by name, the label, f(G) of it and the number of graphs that the network saw."""

    scores: dict[str, Float[np.ndarray, " candidate"]]
    label: int
    whole: float
    probability: float
    n_forward: int


def measure(
    scorer: Scorer, subsets: Bool[np.ndarray, "candidate pair"], label: Label, scheme: Scheme, rng: np.random.Generator
) -> Measured:
    """Robust and ordinary scores of several explanations (candidates, edges) of one graph, in one go."""
    if scheme.sampling == "exact":
        check_enumerable(subsets)
    parts = {
        "plus": removals(subsets, scheme.alpha1, scheme, rng, kept=False),
        "minus": removals(~subsets, scheme.alpha2, scheme, rng, kept=True),
        "ordinary_plus": removals(subsets, 1.0, scheme, rng, kept=False),
        "ordinary_minus": removals(~subsets, 0.0, scheme, rng, kept=True),
    }
    whole = np.ones((1, subsets.shape[1]), dtype=bool)
    found, seen = scorer.probabilities(np.concatenate([whole, *(part.keep for part in parts.values())]))
    y = resolve_label(label, found[0])
    values = found[:, y] if scheme.form == "probability" else (found.argmax(axis=1) == y).astype(np.float64)
    scores, start = {}, 1
    for name, part in parts.items():
        mean, se = part.mean(values[start : start + len(part.keep)])
        scores[name], start = values[0] - mean, start + len(part.keep)
        if not name.startswith("ordinary"):
            scores[f"{name}_se"] = se
    scores["delta"] = scores["plus"] - scores["minus"]
    scores["ordinary_delta"] = scores["ordinary_plus"] - scores["ordinary_minus"]
    return Measured(scores, y, float(values[0]), float(found[0, y]), seen)


def resolve_label(label: Any, whole: Float[np.ndarray, " class"]) -> int:
    """The column of the label: as given, or the predicted one."""
    if label is None or (isinstance(label, str) and label == "predicted"):
        return int(whole.argmax())
    try:
        y = int(label)
    except (TypeError, ValueError):
        y = -1
    if not 0 <= y < len(whole) or y != label:
        raise InputError(f"label must be 0..{len(whole) - 1} or 'predicted', got {label!r}")
    return y


def robust_fidelity(
    model: Any,
    graph: Graph | Any,
    explanation: Any,
    label: Label = None,
    target_node: int | None = None,
    alpha1: float = 0.1,
    alpha2: float = 0.9,
    n_samples: int = 50,
    form: str = "probability",
    sampling: str = "bernoulli",
    hops: int | None = None,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> FidelityScores:
    """How well a set of edges explains what a graph network says about a graph or one of its nodes.

        Fid+ = f(G)_y − E[f(G − E_α1(Ψ))_y],   Fid− = f(G)_y − E[f(Ψ + E_α2(E − Ψ))_y],   FidΔ = Fid+ − Fid−

    model: ``model(x, edge_index, edge_weight, batch) -> logits`` (torch_geometric's form; arguments are given by name), or
    for padded dense batches ``model(A, node_mask, x) -> logits``. graph: a `Graph` or a torch_geometric ``Data``.
    explanation: a mask of the columns of edge_index, a list of edges, or an ``Explanation``; a soft mask needs
    ``threshold`` or ``top_k``. label: the class y; the predicted one where it is None or "predicted". target_node: for a
    model of nodes, the node whose scores count; with ``hops``, the number of message-passing layers, only edges within so
    many steps from it are explained and counted. form: "accuracy" puts 1[argmax f = y] in the place of the probability.
    sampling: "bernoulli" draws each edge on its own; "count" removes exactly round(α1 |Ψ|) edges and keeps exactly
    round(α2 |E − Ψ|), for explanations of different sizes; "exact" sums over all subsets of a side of at most 12 edges, and
    draws on a side that has more.

    Raises InputError for an explanation that does not fit the graph, shares outside [0, 1] and n_samples < 2;
    UnsupportedTaskError for a regression head; EdgeWeightIgnoredError for a model that edge weights do not reach.

    Source: Zheng et al., 2023, arXiv:2310.01820.

    >>> import networkx as nx
    >>> graph = Graph.from_networkx(nx.path_graph(3))
    >>> def edges_logit(A, node_mask, x):
    ...     return torch.stack([torch.zeros(len(A)), A.sum(dim=(1, 2))], dim=1)
    >>> found = robust_fidelity(edges_logit, graph, [(0, 1)], label=1, sampling="exact")
    >>> round(found.plus, 4), round(found.ordinary_plus, 4), found.sparsity
    (0.0101, 0.1012, 0.5)
    """
    scheme = Scheme(alpha1, alpha2, n_samples, form, sampling)
    scorer, subset = prepared(model, graph, explanation, target_node, hops, threshold=threshold, top_k=top_k)
    return _one(scorer, subset, label, scheme, np.random.default_rng(seed))


def prepared(
    model: Any,
    graph: Graph | Any,
    explanation: Any,
    target_node: int | None,
    hops: int | None,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    check: bool = True,
) -> tuple[Scorer, Bool[np.ndarray, " pair"]]:
    """The graph as a scorer, and the explanation as a set of its edges; check: that edge weights reach the model."""
    made = as_graph(graph)
    chosen = explained_pairs(made, explanation, threshold=threshold, top_k=top_k)
    scorer = Scorer(model, made, None if target_node is None else int(target_node), hops)
    if check:
        check_edge_weights(scorer)
    return scorer, chosen[scorer.inside]


def check_lengths(graphs: Sequence[Any], explanations: Sequence[Any], **others: Any) -> None:
    """Raise where there is not one explanation, and one of each of the others that are given, for each graph."""
    if len(explanations) != len(graphs) or not len(graphs):
        raise InputError(f"need one explanation a graph, got {len(graphs)} graphs and {len(explanations)} explanations")
    for name, given in others.items():
        if given is not None and len(given) != len(graphs):
            raise InputError(f"need one of {name} a graph, got {len(given)} for {len(graphs)} graphs")


@contextmanager
def numbered(i: int) -> Iterator[None]:
    """What is wrong with graph i, not with the model, is raised with its number."""
    try:
        yield
    except ModelError:
        raise
    except InputError as error:
        raise type(error)(f"graph {i}: {error}") from error


def _one(
    scorer: Scorer, subset: Bool[np.ndarray, " pair"], label: Any, scheme: Scheme, rng: np.random.Generator
) -> FidelityScores:
    found = measure(scorer, subset[None], label, scheme, rng)
    names = {field.name for field in dataclasses.fields(FidelityScores)}
    return FidelityScores(
        **{name: float(value[0]) for name, value in found.scores.items() if name in names},
        sparsity=1 - float(subset.mean()),
        n_forward=found.n_forward,
        label=found.label,
        probability=found.probability,
        degenerate="complete" if subset.all() else None if subset.any() else "empty",
    )


def fidelity_table(
    model: Any,
    graphs: Sequence[Graph | Any],
    explanations: Sequence[Any],
    labels: Sequence[int] | Tensor | np.ndarray | None = None,
    *,
    target_nodes: Sequence[int] | None = None,
    alpha1: float = 0.1,
    alpha2: float = 0.9,
    n_samples: int = 50,
    form: str = "probability",
    sampling: str = "bernoulli",
    hops: int | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """`robust_fidelity` of many graphs (or target nodes, the same graph given for each): one row each, its fields as columns.

    A column "characterization" holds `characterization_score` of the ordinary pair. labels: None takes the predicted
    ones. What is wrong with one graph is raised with its number.
    """
    scheme = Scheme(alpha1, alpha2, n_samples, form, sampling)
    check_lengths(graphs, explanations, labels=labels, target_nodes=target_nodes)
    rng, rows = np.random.default_rng(seed), []
    for i, (graph, explanation) in enumerate(zip(graphs, explanations, strict=True)):
        node = None if target_nodes is None else target_nodes[i]
        with numbered(i):
            scorer, subset = prepared(
                model, graph, explanation, node, hops, threshold=threshold, top_k=top_k, check=i == 0
            )
            found = _one(scorer, subset, None if labels is None else labels[i], scheme, rng)
        row = dataclasses.asdict(found) | {"delta_se": found.delta_se}
        rows.append(row | {"characterization": characterization_score(found.ordinary_plus, found.ordinary_minus)})
    return pd.DataFrame(rows)


def alpha_sweep(
    model: Any,
    graph: Graph | Any,
    explanation: Any,
    alphas1: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 1.0),
    alphas2: Sequence[float] = (0.9, 0.7, 0.5, 0.3, 0.0),
    *,
    label: Label = None,
    target_node: int | None = None,
    n_samples: int = 50,
    form: str = "probability",
    sampling: str = "bernoulli",
    hops: int | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Fid+, Fid− and FidΔ for every pair of shares: alpha1, alpha2, plus, minus, delta, plus_se, minus_se, one row a pair.

    From the robust end (small α1, α2 near 1) to the ordinary one (1 and 0); each side is drawn once for each share.
    """
    schemes = [Scheme(a, 0.0, n_samples, form, sampling) for a in alphas1]
    schemes2 = [Scheme(0.0, a, n_samples, form, sampling) for a in alphas2]
    if not schemes or not schemes2:
        raise InputError("give at least one share for each side")
    scorer, subset = prepared(model, graph, explanation, target_node, hops, threshold=threshold, top_k=top_k)
    rng = np.random.default_rng(seed)
    plus = {s.alpha1: measure(scorer, subset[None], label, s, rng).scores for s in schemes}
    minus = {s.alpha2: measure(scorer, subset[None], label, s, rng).scores for s in schemes2}
    rows = []
    for a1, first in plus.items():
        for a2, second in minus.items():
            up, down = float(first["plus"][0]), float(second["minus"][0])
            rows.append((a1, a2, up, down, up - down, float(first["plus_se"][0]), float(second["minus_se"][0])))
    return pd.DataFrame(rows, columns=["alpha1", "alpha2", "plus", "minus", "delta", "plus_se", "minus_se"])


def characterization_score(plus: float, minus: float, *, plus_weight: float = 0.5) -> float:
    """Weighted harmonic mean of Fid+ and 1 − Fid−; 0 where either is not positive, since the mean has no meaning there.

    Source: Amara et al., 2022, arXiv:2206.09677 (GraphFramEx), as torch_geometric computes it.

    >>> round(characterization_score(0.8, 0.2), 6)
    0.8
    """
    if not 0 < plus_weight < 1:
        raise InputError(f"plus_weight must lie between 0 and 1, got {plus_weight}")
    if plus <= 0 or minus >= 1:
        return 0.0
    return 1 / (plus_weight / plus + (1 - plus_weight) / (1 - minus))


def edge_saliency(
    model: Any, graph: Graph | Any, label: Label = None, target_node: int | None = None
) -> Float[Tensor, " edge"]:
    """Gradient of the label's probability by the weight of each edge, a soft mask (m,): a cheap explanation to compare with.

    Both directions of an undirected edge share one weight and so one value; self-loops have 0.
    """
    made = as_graph(graph)
    scorer = Scorer(model, made, target_node)
    with torch.enable_grad(), scorer.evaluating():
        weight = torch.ones(1, scorer.n_pairs, device=scorer.x.device, dtype=scorer.x.dtype, requires_grad=True)
        found = torch.softmax(scorer.logits(weight), dim=1)[0]
        y = resolve_label(label, found.detach().cpu().double().numpy())
        (gradient,) = torch.autograd.grad(found[y], weight, allow_unused=True) if found.requires_grad else (None,)
    if gradient is None:
        raise ModelError("the model's scores cannot be differentiated by the edge weights")
    padded = torch.cat([gradient[0].detach(), gradient.new_zeros(1)])
    return padded[torch.from_numpy(made.pair).to(padded.device)]
