"""A graph network as a function from sets of kept edges to class probabilities, many sets in one batch."""

__all__ = ["EdgeWeightIgnoredError", "Scorer", "UnsupportedTaskError", "call_edges", "check_edge_weights"]

import inspect
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from theodolite.core.errors import InputError, ModelError
from theodolite.core.memory import chunks
from theodolite.core.view import evaluation_mode
from theodolite.explanations.graph_fidelity.graph import Graph

LARGEST_DENSE = 200  # nodes; above it a model that can take both forms is given lists of edges
_STEP_BYTES = 1 << 26  # a batch that stays near the processor's cache is faster than one that fills the memory
_WIDTH = 256  # bytes that a node is taken to cost for each layer's value kept at a time, beyond its features


class UnsupportedTaskError(ModelError):
    """Fidelity needs class scores, and the model gives something else, such as one number for regression."""


class EdgeWeightIgnoredError(ModelError):
    """Dropping edges by their weight does not reach the model, so every score would be 0 whatever the explanation."""


def _arguments(model: Any) -> dict[str, inspect.Parameter]:
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ModelError(f"cannot see which arguments the model takes: {error}") from error


def _form(model: Any) -> Literal["both", "dense", "by name", "by place"]:
    """How a model is called: model(x, edge_index, edge_weight, batch) or model(A, node_mask, x)."""
    if hasattr(model, "forward_edges"):
        return "both"
    found = _arguments(model)
    kinds = [p.kind for p in found.values()]
    if "edge_index" in found:
        if "edge_weight" not in found and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise EdgeWeightIgnoredError(
                "the model has no argument edge_weight, by which edges are dropped; wrap it in DropEdges(model), which takes "
                "them out of edge_index instead"
            )
        return "by name"
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return "by place"
    places = [p for p in found.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in places)
    if least <= 3 <= len(places) and (least == 3 or len(places) == 3):
        return "dense"
    if least <= 4 <= len(places):
        return "by place"
    raise ModelError(
        "the model must take (x, edge_index, edge_weight, batch), or a dense batch (A, node_mask, x); it takes "
        f"({', '.join(found)})"
    )


def call_edges(
    model: Any, x: Tensor, edge_index: Tensor, edge_weight: Tensor, batch: Tensor, form: str | None = None
) -> Any:
    """The model on a list of edges; arguments it does not take (batch, for a model of nodes) are left out."""
    form = form or _form(model)
    if form == "both":
        return model.forward_edges(x, edge_index, edge_weight, batch)
    if form == "by place":
        return model(x, edge_index, edge_weight, batch)
    found = _arguments(model)
    given: dict[str, Tensor] = {"edge_index": edge_index, "edge_weight": edge_weight}
    if "batch" in found or any(p.kind is p.VAR_KEYWORD for p in found.values()):
        given["batch"] = batch
    return model(x, **given) if "x" not in found else model(x=x, **given)


class Scorer:
    """Class scores of one graph, or of one of its nodes, for any set of kept edges.

    target_node: whose scores they are, for a model that gives scores for each node. hops: edges further than so many
    steps from the target do not count as edges of the explanation problem; nodes one step further are kept with their
    edges, so that degrees, and with them the scores, are those of the whole graph.
    """

    def __init__(self, model: Any, graph: Graph, target_node: int | None = None, hops: int | None = None) -> None:
        n = graph.num_nodes
        if target_node is not None and not 0 <= target_node < n:
            raise InputError(f"target_node must be 0..{n - 1}, got {target_node}")
        if hops is not None and (target_node is None or hops < 1):
            raise InputError(
                f"hops needs a target_node and must be at least 1, got hops={hops}, target_node={target_node}"
            )
        self.model, self.form = model, _form(model)
        device, dtype = _home(model, graph.x)
        pair, inside = graph.pair, np.ones(len(graph.ends), dtype=bool)
        x, edge_index, self.target = graph.x, graph.edge_index.cpu(), target_node
        if hops is not None and target_node is not None:
            near = _distances(graph, target_node, hops + 1)
            kept = near <= hops + 1
            place = np.cumsum(kept) - 1
            both = kept[edge_index.numpy()].all(axis=0)
            inside = (near[graph.ends] <= hops).all(axis=1)
            x, edge_index = x[torch.from_numpy(kept).to(x.device)], torch.from_numpy(place[edge_index.numpy()[:, both]])
            pair, self.target = pair[both], int(place[target_node])
        self.inside = inside  # which edges of the graph count, (pairs of the graph,)
        self.n_pairs = int(inside.sum())
        if self.n_pairs == 0:
            raise InputError(
                f"there are no edges to explain{'' if hops is None else f' within {hops} hops of the target'}"
            )
        column = np.where(inside, np.cumsum(inside) - 1, self.n_pairs)
        place = np.full(len(pair), self.n_pairs)
        place[pair >= 0] = column[pair[pair >= 0]]
        self.column = torch.from_numpy(place).to(device)  # of each local edge in (kept..., 1)
        self.x, self.edge_index = x.to(device=device, dtype=dtype), edge_index.to(device)
        self.dense = self.form == "dense" or (self.form == "both" and len(x) <= LARGEST_DENSE)

    def logits(self, keep: Float[Tensor, "set pair"], x: Tensor | None = None) -> Float[Tensor, "set class"]:
        """Scores for weights (sets, pairs) of the edges, in one call; gradients flow where the caller has them on."""
        out = self.outputs(keep, x)
        if not isinstance(out, Tensor):
            raise ModelError(f"the model must return a tensor of class scores, it returned {type(out).__name__}")
        sets, n = len(keep), len(self.x)
        if out.ndim == 2 and self.target is not None and len(out) == sets * n:
            out = out.reshape(sets, n, -1)
        if out.ndim == 1 or out.shape[-1] == 1:
            raise UnsupportedTaskError(
                f"the model gives one number (shape {tuple(out.shape)}), and fidelity needs a score for each class; for a "
                "single logit z of two classes return the two columns 0 and z"
            )
        if self.target is None:
            if out.shape[:-1] != (sets,):
                raise ModelError(
                    f"the model gives scores of shape {tuple(out.shape)} for {sets} graphs; for scores of nodes give target_node"
                )
            return out
        if out.shape[:-1] != (sets, n):
            raise ModelError(
                f"target_node needs scores for each of {n} nodes, the model gives shape {tuple(out.shape)}"
            )
        return out[:, self.target]

    def outputs(self, keep: Float[Tensor, "set pair"], x: Tensor | None = None) -> Any:
        """What the model itself returns."""
        x = self.x if x is None else x
        sets, n = len(keep), len(x)
        weight = torch.cat([keep.to(x), keep.new_ones(sets, 1).to(x)], dim=1)[:, self.column]
        source, target = self.edge_index
        if self.dense:
            a = x.new_zeros(sets, n * n).index_add(1, target * n + source, weight).reshape(sets, n, n)
            there = torch.ones(sets, n, dtype=torch.bool, device=x.device)
            return self.model(a, there, x.expand(sets, n, -1))
        shift = torch.arange(sets, device=x.device)
        edges = self.edge_index.repeat(1, sets) + shift.repeat_interleave(self.edge_index.shape[1]) * n
        return call_edges(
            self.model, x.repeat(sets, 1), edges, weight.reshape(-1), shift.repeat_interleave(n), self.form
        )

    def probabilities(self, keep: Bool[np.ndarray, "set pair"]) -> tuple[Float[np.ndarray, "set class"], int]:
        """Class probabilities (sets, classes), float64, and how many graphs the model saw: equal sets are seen once."""
        packed = np.ascontiguousarray(np.packbits(keep, axis=1))
        rows = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
        _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
        distinct = torch.from_numpy(keep[first])
        cost = len(self.x) * (self.x.shape[1] * 4.0 + 4 * _WIDTH) + self.edge_index.shape[1] * _WIDTH
        cost += 12.0 * len(self.x) ** 2 if self.dense else 0.0
        parts = []
        with torch.no_grad(), self.evaluating():
            for part in chunks(len(first), cost, _STEP_BYTES):
                found = self.logits(distinct[part].to(self.x))
                parts.append(torch.softmax(found.double(), dim=1).cpu())
        found = torch.cat(parts).numpy()
        if not np.isfinite(found).all():
            raise ModelError("the model gives scores that are not finite")
        return found[inverse.ravel()], len(first)

    def evaluating(self) -> Any:
        """The model in evaluation mode, where it has one."""
        return evaluation_mode(self.model) if isinstance(self.model, nn.Module) else nullcontext()


def _home(model: Any, x: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where the model's floating-point parameters are and what they are made of; the features' own where it has none."""
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        if parameter.is_floating_point() and not nn.parameter.is_lazy(parameter):
            return parameter.device, parameter.dtype
    return x.device, x.dtype


def _distances(graph: Graph, start: int, longest: int) -> np.ndarray:
    """Steps (n,) from each node to ``start`` along the edges, longest + 1 for those further away."""
    source, target = graph.edge_index.cpu().numpy()
    steps = np.full(graph.num_nodes, longest + 1)
    steps[start] = 0
    for step in range(1, longest + 1):
        reached = source[steps[target] == step - 1]
        steps[reached] = np.minimum(steps[reached], step)
    return steps


def check_edge_weights(scorer: Scorer) -> None:
    """Raise EdgeWeightIgnoredError where the model's output does not change when all edges are dropped.

    One more call as a rule. Where nothing changes it is asked further, since a constant model is no error, and nor is a
    graph whose features happen to be the same with and without its neighbours.
    """
    with torch.no_grad(), scorer.evaluating():
        two = torch.stack([torch.ones(scorer.n_pairs), torch.zeros(scorer.n_pairs)]).to(scorer.x)

        def moves(x: Tensor) -> bool:
            return not torch.equal(scorer.outputs(two[:1], x), scorer.outputs(two[1:], x))

        scorer.logits(two[:1])
        if moves(scorer.x):
            return
        uneven = scorer.x * torch.linspace(1, 0.1, len(scorer.x)).to(scorer.x)[:, None]
        if moves(uneven):
            return
        if not torch.equal(scorer.outputs(two[:1]), scorer.outputs(two[:1], uneven)) or _reads_edges(scorer, uneven):
            raise EdgeWeightIgnoredError(
                "the model's output stays the same when all edges have weight 0, so it ignores edge_weight; let its layers "
                "use it, or wrap the model in DropEdges(model), which takes edges out of edge_index"
            )


def _reads_edges(scorer: Scorer, x: Tensor) -> bool:
    """Whether taking edges out of the list itself changes the output."""
    if scorer.dense:
        return False
    batch = torch.zeros(len(x), dtype=torch.long, device=x.device)
    none = scorer.edge_index[:, :0]
    return not torch.equal(
        call_edges(scorer.model, x, none, x.new_zeros(0), batch, scorer.form),
        scorer.outputs(torch.ones(1, scorer.n_pairs), x),
    )
