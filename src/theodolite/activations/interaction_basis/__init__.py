"""Interaction basis: coordinates of a network's layers that do not depend on the weight directions that are free.

Around trained parameters w* the behavioural loss is L_B(w) = (1/n) sum_x |f_w(x) - f_w*(x)|^2; its Hessian is exactly
(2/n) sum J_w^T J_w, and each null vector of it is a direction in which the weights can go without changing the network on
the data. `degeneracy` counts them per layer and says where they come from; `effective_parameters` measures what is left;
`InteractionBasis` writes every layer in coordinates that are the same for all such weights:

    f^ = C^T (f - mean),   C = U D^{-1/2} V Lambda^{1/2},   G = U D U^T,   D^{1/2} U^T K U D^{1/2} = V Lambda V^T

with G the Gram matrix of the layer's activations and K that of the Jacobians of the final output. `interactions` are the
edges between the features of neighbouring layers, `find_modules` the parts that interact little on a log scale. The
baselines are the neurons themselves, principal components and a random rotation.

Source: Bushnaq, Mendel, Heimersheim, Braun, Goldowsky-Dill, Hänni, Wu, Hobbhahn, 2024, arXiv:2405.10927 (Using Degeneracy
in the Loss Landscape for Mechanistic Interpretability).
"""

__all__ = [
    "ActivationPrecisionWarning",
    "ConvergenceWarning",
    "DegeneracyReport",
    "DegenerateLayerError",
    "EffectiveParameters",
    "InteractionBasis",
    "LayerBasis",
    "LayerDegeneracy",
    "Modules",
    "RankWarning",
    "behavioural_hessian",
    "behavioural_loss",
    "degeneracy",
    "effective_parameters",
    "find_modules",
    "interactions",
    "kept_directions_curve",
    "synchronised",
    "synchronised_heads",
]

from theodolite.activations._basis import (
    ActivationPrecisionWarning,
    DegenerateLayerError,
    LayerBasis,
    RankWarning,
)
from theodolite.activations.interaction_basis.basis import InteractionBasis, interactions, kept_directions_curve
from theodolite.activations.interaction_basis.behaviour import behavioural_hessian, behavioural_loss
from theodolite.activations.interaction_basis.degeneracy import (
    DegeneracyReport,
    LayerDegeneracy,
    degeneracy,
    synchronised,
    synchronised_heads,
)
from theodolite.activations.interaction_basis.effective import (
    ConvergenceWarning,
    EffectiveParameters,
    effective_parameters,
)
from theodolite.activations.interaction_basis.modules import Modules, find_modules
