"""Small graph networks that run on dense batches and on lists of edges, their training, and an adapter."""

__all__ = ["GCN", "GIN", "DropEdges", "graph_accuracy", "train_on_graphs", "train_on_nodes"]

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import InputError, TrainingCollapsedError
from theodolite.core.train import Recipe, train
from theodolite.core.view import evaluation_mode
from theodolite.explanations.graph_fidelity.graph import Graph


class _GraphNetwork(nn.Module, ABC):
    """Layers, a readout and a linear head; the number of features is taken from the first batch.

    readout: "max", "maxmean" (both, side by side), "mean", or "node" for scores of each node. A mean tells the number of
    edges, which may give a label away; a maximum does not.
    """

    def __init__(self, classes: int, hidden: int, layers: int, readout: str, seed: int) -> None:
        super().__init__()
        if classes < 2 or hidden < 1 or layers < 1:
            raise InputError(f"need classes >= 2, hidden >= 1, layers >= 1; got {classes}, {hidden}, {layers}")
        if readout not in ("max", "maxmean", "mean", "node"):
            raise InputError(f"readout must be max, maxmean, mean or node, got {readout!r}")
        self.readout, self.seed = readout, seed
        self.layers = nn.ModuleList(
            self._layer(nn.LazyLinear(hidden) if i == 0 else None, hidden) for i in range(layers)
        )
        self.head = nn.Linear(hidden * (2 if readout == "maxmean" else 1), classes)
        self._start(seed)

    @abstractmethod
    def _layer(self, first: nn.Module | None, hidden: int) -> nn.Module:
        """A layer; ``first`` is its first linear map where that has to find its number of features."""

    def _start(self, seed: int) -> None:
        """Draw all weights that are there by ``seed``, as torch draws those of linear layers."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not nn.parameter.is_lazy(module.weight):
                bound = module.in_features**-0.5
                for p in module.parameters():
                    with torch.no_grad():
                        p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)

    def materialize(self, features: int) -> None:
        """Give the first layer its number of features; a batch does it too, and here the weights come from the seed."""
        if any(nn.parameter.is_lazy(p) for p in self.parameters()):
            self(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, features))
            self._start(self.seed)

    @abstractmethod
    def _mix(self, layer: nn.Module, h: Tensor, neighbours: Tensor) -> Tensor:
        """What a layer makes of the nodes and the sums of their neighbours."""

    def forward(
        self,
        A: Float[Tensor, "graph node node"],
        node_mask: Bool[Tensor, "graph node"],
        x: Float[Tensor, "graph node feature"],
    ) -> Float[Tensor, "graph ... class"]:
        """Scores of padded graphs; A[g, i, j] is the weight of the edge from j to i."""
        h = x
        spread = self._dense_operator(A)
        for layer in self.layers:
            h = self._mix(layer, h, spread @ h)
        if self.readout == "node":
            return self.head(h)
        there = node_mask[..., None]
        most = h.masked_fill(~there, -torch.inf).amax(dim=1)
        mean = (h * there).sum(dim=1) / there.sum(dim=1)
        return self.head({"max": most, "mean": mean}.get(self.readout, torch.cat([most, mean], dim=1)))

    def forward_edges(
        self,
        x: Float[Tensor, "node feature"],
        edge_index: Int[Tensor, "2 edge"],
        edge_weight: Float[Tensor, " edge"],
        batch: Int[Tensor, " node"],
    ) -> Float[Tensor, "row class"]:
        """The same scores from a list of weighted edges; batch says which graph a node belongs to."""
        h, (source, target) = x, edge_index
        weight, own = self._edge_operator(source, target, edge_weight, len(x))
        for layer in self.layers:
            spread = torch.zeros_like(h).index_add(0, target, weight[:, None] * h[source])
            h = self._mix(layer, h, spread if own is None else spread + own[:, None] * h)
        if self.readout == "node":
            return self.head(h)
        graphs = int(batch.max()) + 1
        most = h.new_full((graphs, h.shape[1]), -torch.inf).scatter_reduce(0, batch[:, None].expand_as(h), h, "amax")
        size = torch.bincount(batch, minlength=graphs)[:, None]
        mean = h.new_zeros(graphs, h.shape[1]).index_add(0, batch, h) / size
        return self.head({"max": most, "mean": mean}.get(self.readout, torch.cat([most, mean], dim=1)))

    def _dense_operator(self, a: Tensor) -> Tensor:
        return a

    def _edge_operator(self, source: Tensor, target: Tensor, weight: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
        return weight, None


class GIN(_GraphNetwork):
    """Graph isomorphism network: h_i = MLP(h_i + sum of the neighbours' h), the MLP of two layers, then ReLU.

    Source: Xu, Hu, Leskovec, Jegelka, 2018, arXiv:1810.00826, equation 4.1 with ε = 0.
    """

    def __init__(
        self, classes: int = 2, *, hidden: int = 32, layers: int = 3, readout: str = "max", seed: int = 0
    ) -> None:
        super().__init__(classes, hidden, layers, readout, seed)

    def _layer(self, first: nn.Module | None, hidden: int) -> nn.Module:
        return nn.Sequential(first or nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def _mix(self, layer: nn.Module, h: Tensor, neighbours: Tensor) -> Tensor:
        return F.relu(layer(h + neighbours))


class GCN(_GraphNetwork):
    """Graph convolutional network: h = relu(D^-1/2 (A + I) D^-1/2 h W + b), degrees D of the edges that are there.

    Source: Kipf and Welling, 2016, arXiv:1609.02907, equation 2.
    """

    def __init__(
        self, classes: int = 2, *, hidden: int = 32, layers: int = 3, readout: str = "max", seed: int = 0
    ) -> None:
        super().__init__(classes, hidden, layers, readout, seed)

    def _layer(self, first: nn.Module | None, hidden: int) -> nn.Module:
        return first or nn.Linear(hidden, hidden)

    def _mix(self, layer: nn.Module, h: Tensor, neighbours: Tensor) -> Tensor:
        return F.relu(layer(neighbours))

    def _dense_operator(self, a: Tensor) -> Tensor:
        a = a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        scale = a.sum(dim=-1).rsqrt()
        return scale[..., None] * a * scale[..., None, :]

    def _edge_operator(self, source: Tensor, target: Tensor, weight: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
        scale = torch.ones(n, dtype=weight.dtype, device=weight.device).index_add(0, target, weight).rsqrt()
        return scale[target] * weight * scale[source], scale**2


class DropEdges(nn.Module):
    """Adapter for a model without edge weights, ``model(x, edge_index, batch)``: edges of weight 0 leave edge_index.

    For layers that work out their degrees from the edges they are given this is the same as a weight of 0. Weights other
    than 0 and 1 do not reach the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._batched = "batch" in inspect.signature(model.forward).parameters

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, batch: Tensor) -> Tensor:
        """Scores of the graphs with the edges that are left."""
        left: Any = edge_index[:, edge_weight != 0]
        return self.model(x, left, batch=batch) if self._batched else self.model(x, left)


class _Rows(nn.Module):
    """A network on numbered graphs of a padded batch, so that the trainer's rows are numbers."""

    def __init__(self, model: nn.Module, graphs: Sequence[Graph]) -> None:
        super().__init__()
        self.model = model
        sizes = [g.num_nodes for g in graphs]
        a, x = (
            torch.zeros(len(graphs), max(sizes), max(sizes)),
            torch.zeros(len(graphs), max(sizes), graphs[0].x.shape[1]),
        )
        for i, graph in enumerate(graphs):
            a[i, graph.edge_index[1], graph.edge_index[0]] = 1.0
            x[i, : sizes[i]] = graph.x
        self.batch = (a, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None], x)

    def forward(self, rows: Tensor) -> Tensor:
        return self.model(*(part[rows] for part in self.batch))


def train_on_graphs(
    model: GIN | GCN, graphs: Sequence[Graph], labels: Int[Tensor, " graph"], *, recipe: Recipe | None = None
) -> GIN | GCN:
    """Train a network of this module, in place, to tell the labels of whole graphs; on the CPU, in dense batches.

    Raises TrainingCollapsedError where it ends no better than the most frequent label. Returns the model.
    """
    if not graphs or len(labels) != len(graphs):
        raise InputError(
            f"need a label for each graph and at least one, got {len(graphs)} graphs, {len(labels)} labels"
        )
    model.materialize(graphs[0].x.shape[1])
    rows = torch.arange(len(graphs))
    wrapped = _Rows(model, graphs)
    train(wrapped, rows, labels, recipe=recipe or Recipe(epochs=60, batch_size=50, lr=5e-3))
    _check_better(graph_accuracy(model, graphs, labels), labels)
    return model


def graph_accuracy(model: nn.Module, graphs: Sequence[Graph], labels: Int[Tensor, " graph"]) -> float:
    """Share of graphs whose largest score is at their label."""
    with torch.no_grad(), evaluation_mode(model):
        return float((_Rows(model, graphs)(torch.arange(len(graphs))).argmax(dim=1) == labels).double().mean())


def train_on_nodes(
    model: GIN | GCN, graph: Graph, labels: Int[Tensor, " node"], *, recipe: Recipe | None = None
) -> GIN | GCN:
    """Train a network with readout "node", in place, to tell the labels of the nodes of one graph. Returns the model."""
    if model.readout != "node":
        raise InputError(f"labels of nodes need readout='node', the model has {model.readout!r}")
    model.materialize(graph.x.shape[1])
    one = (torch.ones(graph.edge_index.shape[1]), torch.zeros(graph.num_nodes, dtype=torch.long))

    class Nodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows: Tensor) -> Tensor:
            return model.forward_edges(graph.x, graph.edge_index, *one)[rows]

    every = torch.arange(graph.num_nodes)
    wrapped = Nodes()
    train(wrapped, every, labels, recipe=recipe or Recipe(epochs=200, batch_size=graph.num_nodes, lr=1e-2))
    with torch.no_grad():
        _check_better(float((wrapped(every).argmax(dim=1) == labels).double().mean()), labels)
    return model


def _check_better(reached: float, labels: Tensor) -> None:
    most = float(torch.bincount(labels).max()) / len(labels)
    if reached <= most and most < 1:
        raise TrainingCollapsedError(
            f"the network tells {reached:.1%} of the labels it was trained on, the most frequent label alone {most:.1%}; "
            "try another seed, a smaller step size or more epochs"
        )
