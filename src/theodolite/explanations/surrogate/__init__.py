"""Which columns a black box uses and by what rule: a small readable copy of it on k columns, and how faithful the copy is.

Columns are scored on validation rows by gradients and by perturbing, and ordered by the mean of their ranks. A tree (or
forest, boosting, ridge) is fitted to the black box's own answers on the k best of them, picked so that they do not repeat each
other. Its fidelity on held-out rows,

    R2 = 1 - sum ||q - p||^2 / sum ||p - mean p||^2      q: the copy's answers, p: the black box's,

says how far its rules and counterfactuals can be believed. A copy of a model that has memorised its training rows may well
have R2 below 0 on new rows; that is the answer, not a fault.

Source: Karim, Shajalal, Graß, Döhmen, Chala, et al., 2022, arXiv:2208.13405 (Interpreting Black-box Machine Learning Models
for High Dimensional Datasets).
"""

__all__ = [
    "SURROGATES",
    "BlackBox",
    "Condition",
    "ConstantModelWarning",
    "ConvAutoencoderClassifier",
    "Fidelity",
    "LocalSurrogateExplanation",
    "NotProbabilitiesError",
    "OverlapWarning",
    "Rule",
    "RuleList",
    "SelfAttentionNetwork",
    "Surrogate",
    "SurrogateCounterfactual",
    "SurrogateExplainer",
    "fit_surrogate",
    "measure_fidelity",
]

from theodolite.explanations.surrogate.blackbox import BlackBox, NotProbabilitiesError
from theodolite.explanations.surrogate.copies import (
    SURROGATES,
    ConstantModelWarning,
    Fidelity,
    Surrogate,
    fit_surrogate,
    measure_fidelity,
)
from theodolite.explanations.surrogate.explainer import SurrogateExplainer
from theodolite.explanations.surrogate.local import LocalSurrogateExplanation, SurrogateCounterfactual
from theodolite.explanations.surrogate.networks import ConvAutoencoderClassifier, SelfAttentionNetwork
from theodolite.explanations.surrogate.reading import OverlapWarning
from theodolite.explanations.surrogate.rules import Condition, Rule, RuleList
