"""Merges of several fine-tuned versions of one model: formulas, and recipes and paths found by evolution.

In weight space, theta = theta_0 + sum_k w_gk (theta_k - theta_0) and its variants (`merge`), with a weight for each group g
of tensors and each source k that CMA-ES evolves on a fitness (`evolve_weights`). In the space of data flow, weights stay and
the path of hidden states through the blocks of all sources is evolved (`evolve_routing`); `evolve` has both. No gradient is
used. What a search finds stands beside its sources, averages, a grid, and random search with as many evaluations.

Source: Akiba, Shing, Tang, Sun, Ha, 2024, arXiv:2403.13187 (Evolutionary Optimization of Model Merging Recipes).
"""

__all__ = [
    "BASELINES",
    "METHODS",
    "Fitness",
    "MergeResult",
    "RoutedModel",
    "RoutingResult",
    "accuracy_fitness",
    "dare",
    "elect_signs",
    "evolve",
    "evolve_routing",
    "evolve_weights",
    "layer_groups",
    "merge",
    "multi_fitness",
    "perplexity_fitness",
    "slerp",
    "task_vector",
    "trim",
]

from theodolite.parameters.merging.baselines import BASELINES
from theodolite.parameters.merging.evolve import MergeResult, evolve, evolve_weights
from theodolite.parameters.merging.fitness import Fitness, accuracy_fitness, multi_fitness, perplexity_fitness
from theodolite.parameters.merging.methods import METHODS, dare, elect_signs, merge, slerp, task_vector, trim
from theodolite.parameters.merging.routing import RoutedModel, RoutingResult, evolve_routing
from theodolite.parameters.merging.states import layer_groups
