"""Local interaction basis: linear coordinates of each layer in which few layer-to-layer interactions are left.

From the last node backwards, with G = U D U^T the Gram matrix of a node's activations about their mean and K that of the
Jacobians of the *next node's features*,

    D^{1/2} U^T K U D^{1/2} = V Lambda V^T,   C = U D^{-1/2} V Lambda^{1/2},   f^ = C^T (f - mean)

so that directions which the next node ignores are gone and the rest are in the order of how much they matter to it. `edges`
says how strongly feature j acts on feature i of the next node; `ablate_nodes` and `ablate_edges` keep the first features
or the strongest edges and score what the network then answers; `edges_required` is the fewest edges that do: the fair number
for comparing bases, because the strengths themselves grow with the scale of the features. `interaction_graph` draws what
interacts, `fourier_labels` names the features of a network that adds modulo a number.

The paper finds sparser interactions than between principal components on modular addition and image classifiers, and little
or none on language models; so measure it beside `baseline("pca")`.

Source: Bushnaq, Heimersheim, Goldowsky-Dill, Braun, Mendel, Hänni, Griffin, Stöhler, Wache, Hobbhahn, 2024,
arXiv:2405.10928.
"""

__all__ = [
    "AblationCurve",
    "EvaluationModeWarning",
    "InteractionGraph",
    "LocalInteractionBasis",
    "NotMonotoneWarning",
    "ResolutionWarning",
    "ablate_edges",
    "ablate_nodes",
    "accuracy",
    "attributions",
    "edges",
    "edges_required",
    "fourier_labels",
    "interaction_graph",
    "norm_halves",
]

from theodolite.activations.local_interaction_basis.ablation import (
    AblationCurve,
    NotMonotoneWarning,
    ResolutionWarning,
    ablate_edges,
    ablate_nodes,
    accuracy,
    edges_required,
)
from theodolite.activations.local_interaction_basis.basis import (
    EvaluationModeWarning,
    LocalInteractionBasis,
    attributions,
    edges,
)
from theodolite.activations.local_interaction_basis.fourier import fourier_labels
from theodolite.activations.local_interaction_basis.graph import InteractionGraph, interaction_graph
from theodolite.activations.local_interaction_basis.norms import norm_halves
