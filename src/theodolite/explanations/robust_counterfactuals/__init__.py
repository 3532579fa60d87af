"""Counterfactuals that still hold when the model is retrained, and how stable any counterfactual is.

    R(x) = (1/k) sum_i [ m(x_i) - |m(x) - m(x_i)| ],   x_i ~ N(x, sigma^2 I)

m(x) is the probability of the wanted class. The closest counterfactual lies on the boundary, where retrained models disagree
most; `TRex` moves it to where R passes a threshold tau, `TRexNearest` picks a training row where it does (any model with
probabilities). `ConfidenceThreshold`, which raises m alone, is the control that they have to be seen beside.

`TRexLatent`, `Cchvae` and `Revise` search the code of a small autoencoder of the training rows (`train_autoencoder`), so that
what they give looks like a training row without being one.

Source: Hamman, Noorani, Mishra, Magazzeni, Dutta, 2023, arXiv:2305.11997 (Robust Counterfactual Explanations for Neural
Networks With Probabilistic Guarantees; the searches are there called T-Rex).
"""

__all__ = [
    "Autoencoder",
    "AutoencoderWarning",
    "Cchvae",
    "ClosestCounterfactual",
    "ConfidenceThreshold",
    "CounterfactualNotFoundError",
    "CounterfactualSet",
    "NearestNeighbour",
    "Revise",
    "Roar",
    "StableNeighbourSearch",
    "TRex",
    "TRexLatent",
    "TRexNearest",
    "TrainModeWarning",
    "Wachter",
    "benchmark",
    "perturbed_weights",
    "retrain",
    "robust_validity",
    "samples_needed",
    "stability",
    "stability_guarantee",
    "train_autoencoder",
]

from theodolite.explanations.counterfactuals import (
    ClosestCounterfactual,
    CounterfactualNotFoundError,
    CounterfactualSet,
    NearestNeighbour,
)
from theodolite.explanations.model_changes import perturbed_weights, retrain, robust_validity
from theodolite.explanations.robust_counterfactuals.autoencoder import (
    Autoencoder,
    AutoencoderWarning,
    train_autoencoder,
)
from theodolite.explanations.robust_counterfactuals.baselines import (
    Cchvae,
    Revise,
    Roar,
    StableNeighbourSearch,
    Wachter,
)
from theodolite.explanations.robust_counterfactuals.evaluation import benchmark
from theodolite.explanations.robust_counterfactuals.trex import ConfidenceThreshold, TRex, TRexLatent, TRexNearest
from theodolite.explanations.stability import TrainModeWarning, samples_needed, stability, stability_guarantee
