"""Counterfactuals that still hold when the model is retrained, and how stable any counterfactual is.

    R(x) = (1/k) sum_i [ m(x_i) - |m(x) - m(x_i)| ],   x_i ~ N(x, sigma^2 I)

m(x) is the probability of the wanted class. The closest counterfactual lies on the boundary, where retrained models disagree
most; `TRex` moves it to where R passes a threshold tau, `TRexNearest` picks a training row where it does (any model with
probabilities). `ConfidenceThreshold`, which raises m alone, is the control that they have to be seen beside.

The search in the latent space of an autoencoder (the third variant of the authors' code) and the baselines C-CHVAE and REVISE,
which need one too, are not implemented.

Source: Hamman, Noorani, Mishra, Magazzeni, Dutta, 2023, arXiv:2305.11997 (Robust Counterfactual Explanations for Neural
Networks With Probabilistic Guarantees; the searches are there called T-Rex).
"""

__all__ = [
    "ClosestCounterfactual",
    "ConfidenceThreshold",
    "CounterfactualNotFoundError",
    "CounterfactualSet",
    "NearestNeighbour",
    "Roar",
    "StableNeighbourSearch",
    "TRex",
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
]

from theodolite.explanations.counterfactuals import (
    ClosestCounterfactual,
    CounterfactualNotFoundError,
    CounterfactualSet,
    NearestNeighbour,
)
from theodolite.explanations.model_changes import perturbed_weights, retrain, robust_validity
from theodolite.explanations.robust_counterfactuals.baselines import Roar, StableNeighbourSearch, Wachter
from theodolite.explanations.robust_counterfactuals.evaluation import benchmark
from theodolite.explanations.robust_counterfactuals.trex import ConfidenceThreshold, TRex, TRexNearest
from theodolite.explanations.stability import TrainModeWarning, samples_needed, stability, stability_guarantee
