"""How good an explanation of a graph network is, without ground truth, by removing only a random part of it.

    Fid+(Ψ) = f(G)_y − E[f(G − E_α1(Ψ))_y]                     remove a share α1 of the explanation; higher is better
    Fid−(Ψ) = f(G)_y − E[f(Ψ + E_α2(E − Ψ))_y]                 keep it and a share α2 of the rest; lower is better
    FidΔ = Fid+ − Fid−                                          higher is better

E is the set of edges of the graph G, Ψ the explanation, f(.)_y the probability of the label y, or 1[argmax f = y] in the
accuracy form, and E_α(S) keeps each undirected edge of S with probability α. With α1 = 1 and α2 = 0 these are the ordinary
scores, which show the network graphs that it was never trained on; they are computed too, always side by side. Nodes and
features stay, edges are dropped by their weight, so that degrees are worked out anew, and self-loops are never dropped.

`coherence` asks which of the scores ranks candidates as the true explanation does, on graphs where that is known.
The paper's theory (conditions under which a score is monotone in the information that an explanation holds) is not
implemented.

Source: Zheng, Shirani, Wang, Cheng, Chen, Chen, Wei, Luo, 2023, arXiv:2310.01820 (Towards Robust Fidelity for Evaluating
Explainability of Graph Neural Networks).
"""

__all__ = [
    "GCN",
    "GIN",
    "CoherenceResult",
    "DropEdges",
    "EdgeWeightIgnoredError",
    "FidelityScores",
    "Graph",
    "GraphSet",
    "NodeTask",
    "UnsupportedTaskError",
    "alpha_sweep",
    "ba_2motifs",
    "characterization_score",
    "coherence",
    "edge_saliency",
    "fidelity_table",
    "graph_accuracy",
    "load_mutag",
    "rewired",
    "robust_fidelity",
    "train_on_graphs",
    "train_on_nodes",
    "tree_cycles",
    "tree_grid",
]

from theodolite.explanations.graph_fidelity.agreement import CoherenceResult, coherence
from theodolite.explanations.graph_fidelity.datasets import (
    GraphSet,
    NodeTask,
    ba_2motifs,
    load_mutag,
    rewired,
    tree_cycles,
    tree_grid,
)
from theodolite.explanations.graph_fidelity.engine import EdgeWeightIgnoredError, UnsupportedTaskError
from theodolite.explanations.graph_fidelity.graph import Graph
from theodolite.explanations.graph_fidelity.models import (
    GCN,
    GIN,
    DropEdges,
    graph_accuracy,
    train_on_graphs,
    train_on_nodes,
)
from theodolite.explanations.graph_fidelity.scores import (
    FidelityScores,
    alpha_sweep,
    characterization_score,
    edge_saliency,
    fidelity_table,
    robust_fidelity,
)
