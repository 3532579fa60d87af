"""The graph of what interacts: features of all layers, the edges that carry the interaction, and the modules they fall into."""

__all__ = ["Edge", "InteractionGraph", "Node", "interaction_graph"]

import math
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pandas as pd
import torch

from theodolite.activations._nodes import NodeBasis
from theodolite.activations.interaction_basis import Modules, find_modules
from theodolite.activations.local_interaction_basis.basis import edges
from theodolite.core.errors import DataError, InputError

_INKS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b7791f", "#97266d", "#0987a0", "#9b2c2c")
_PALE = "#a0aec0"


@dataclass(frozen=True)
class Node:
    """A feature of a layer, numbered from 0 in the order of its importance; -1 is the mean, first of its layer.

    importance: the feature's eigenvalue, 0 of the mean. module: the number of its cluster, -1 of the mean.
    """

    layer: int
    name: str
    feature: int
    importance: float
    module: int


@dataclass(frozen=True)
class Edge:
    """An edge between two nodes by their places in the graph's ``nodes``; share of its layer pair's whole interaction."""

    source: int
    target: int
    share: float


@dataclass(frozen=True, eq=False)
class InteractionGraph:
    """nodes of all layers, the mean of each layer first; the edges kept; the modules of the features."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    modules: Modules

    def to_networkx(self) -> nx.DiGraph:
        """The same as a directed graph; weight is the share of the interaction, ``layer`` serves `multipartite_layout`."""
        graph = nx.DiGraph()
        for place, node in enumerate(self.nodes):
            graph.add_node(
                place,
                layer=node.layer,
                name=node.name,
                feature=node.feature,
                importance=node.importance,
                module=node.module,
            )
        graph.add_weighted_edges_from((edge.source, edge.target, edge.share) for edge in self.edges)
        return graph

    def to_frame(self) -> pd.DataFrame:
        """One row an edge: layer, source and target feature, share of the pair's interaction, whether it stays in its module."""
        rows = []
        for edge in self.edges:
            a, b = self.nodes[edge.source], self.nodes[edge.target]
            rows.append((a.layer, a.name, a.feature, b.name, b.feature, edge.share, a.module == b.module))
        names = ["layer", "source_node", "source", "target_node", "target", "share", "within_module"]
        return pd.DataFrame(rows, columns=names)

    def plot(self) -> Any:
        """A plotly figure: a column a layer, features by module and importance, edges wider the stronger on a log scale.

        ``.write_html(path)`` makes a page that opens anywhere; features without an edge are left out.
        """
        import plotly.graph_objects as go

        used = {place for edge in self.edges for place in (edge.source, edge.target)}
        shown = [p for p, node in enumerate(self.nodes) if p in used or node.feature < 0]
        columns: dict[int, list[int]] = {}
        for place in sorted(shown, key=lambda p: (self.nodes[p].module, self.nodes[p].feature)):
            columns.setdefault(self.nodes[place].layer, []).append(place)
        at = {
            p: (layer, -i / max(1, len(places) - 1)) for layer, places in columns.items() for i, p in enumerate(places)
        }
        figure = go.Figure()
        least = min(edge.share for edge in self.edges)
        span = max(1e-9, math.log10(max(edge.share for edge in self.edges) / least))
        widths: dict[float, list[Edge]] = {}
        for edge in self.edges:
            widths.setdefault(round(0.5 + 2.5 * math.log10(edge.share / least) / span), []).append(edge)
        for width, some in sorted(widths.items()):
            xs, ys = list[float | None](), list[float | None]()
            for edge in some:
                (x0, y0), (x1, y1) = at[edge.source], at[edge.target]
                xs += [x0, x1, None]
                ys += [y0, y1, None]
            figure.add_scatter(
                x=xs, y=ys, mode="lines", line={"width": max(width, 0.5), "color": _PALE}, hoverinfo="skip"
            )
        nodes = [self.nodes[p] for p in at]
        figure.add_scatter(
            x=[x for x, _ in at.values()], y=[y for _, y in at.values()], mode="markers",
            marker={"size": 9, "color": [_PALE if n.module < 0 else _INKS[n.module % len(_INKS)] for n in nodes]},
            text=[f"{n.name}: " + ("mean" if n.feature < 0 else f"feature {n.feature}, module {n.module}") for n in nodes],
            hoverinfo="text",
        )  # fmt: skip
        titles = {node.layer: node.name for node in self.nodes}
        figure.update_xaxes(tickvals=list(titles), ticktext=list(titles.values()), showgrid=False)
        figure.update_yaxes(visible=False)
        figure.update_layout(showlegend=False, plot_bgcolor="white", height=500)
        return figure


def interaction_graph(basis: NodeBasis, X: Any, *, drop: float = 0.001) -> InteractionGraph:
    """The features of all layers and the strongest edges, without those that carry ``drop`` of the whole interaction.

    Edges of each pair of layers are taken as shares of the pair's own sum, so that layers of different scales can be seen
    together; modules are found on their logarithms, as `find_modules` of the interaction basis does. The mean of a layer is
    a node without edges: it acts on everything and costs nothing.

    Raises InputError for a drop outside (0, 1), DataError where nothing interacts.

    >>> from theodolite.activations.local_interaction_basis import LocalInteractionBasis
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> basis = LocalInteractionBasis([torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)]).fit(x)
    >>> [(node.name, node.feature) for node in interaction_graph(basis, x).nodes][:2]
    [('node 0', -1), ('node 0', 0)]
    """
    if not 0 < drop < 1:
        raise InputError(f"drop must lie between 0 and 1, got {drop}")
    pairs = []
    for layer in range(len(basis.layers_) - 1):
        E = edges(basis, X, layer)
        if not float(E.sum()) > 0:
            raise DataError(f"no feature of node {layer} acts on the next one, so there is no graph")
        pairs.append(E / E.sum())
    values = torch.cat([E.flatten() for E in pairs]).sort().values
    first = int(torch.searchsorted(values.cumsum(0), drop * values.sum(), right=True))
    eps = float(values[min(first, len(values) - 1)]) * (1 - 1e-9)
    modules = find_modules(pairs, eps, seed=basis.seed)
    nodes, starts = list[Node](), list[int]()
    for number, (layer, name) in enumerate(zip(basis.layers_, basis.sections_.names, strict=True)):
        starts.append(len(nodes) + 1)
        nodes.append(Node(number, name, -1, 0.0, -1))
        found = zip(layer.eigenvalues.tolist(), modules.labels[number].tolist(), strict=True)
        nodes += [Node(number, name, i, value, module) for i, (value, module) in enumerate(found)]
    kept = [
        Edge(starts[layer] + j, starts[layer + 1] + i, float(E[i, j]))
        for layer, E in enumerate(pairs)
        for i, j in (eps < E).nonzero().tolist()
    ]
    return InteractionGraph(tuple(nodes), tuple(kept), modules)
