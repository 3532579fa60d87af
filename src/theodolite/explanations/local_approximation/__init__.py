"""Which explanation to choose: eight attribution methods as one regression problem, and how faithful each one is where.

    g* = argmin_{g in G} E_{z ~ Z_x} l(f, g, x, z)                                                          (equation 1)

A neighbourhood Z_x of moves away from the input x, a loss l (values or gradients) and a class G of interpretable functions
(linear or logistic) name a method; its explanation is the weights of g*. LIME, KernelSHAP, Occlusion, C-LIME, SmoothGrad,
Vanilla Gradients, Integrated Gradients and Gradient x Input are eight such names (`METHODS`); `LocalApproximation` makes a
ninth. No method is faithful everywhere (Theorem 1), so `faithfulness_table` measures each one in each neighbourhood and
`recommend` picks for the one that matters.

Source: Han, Srinivas, Lakkaraju, 2022, arXiv:2206.01254 (Which Explanation Should I Choose? A Function Approximation
Perspective to Characterizing Post Hoc Explanations).
"""

__all__ = [
    "METHODS",
    "NEIGHBOURHOODS",
    "DegenerateNeighbourhoodError",
    "LocalApproximation",
    "LocalExplanation",
    "Neighbourhood",
    "NotDifferentiableError",
    "PerturbationCurve",
    "SingularFitWarning",
    "attribute",
    "faithfulness",
    "faithfulness_by_row",
    "faithfulness_table",
    "perturbation_curve",
    "recommend",
    "square_patches",
    "with_options",
]

from theodolite.explanations.local_approximation.engine import LocalApproximation, LocalExplanation, SingularFitWarning
from theodolite.explanations.local_approximation.faithfulness import (
    NEIGHBOURHOODS,
    faithfulness,
    faithfulness_by_row,
    faithfulness_table,
    recommend,
)
from theodolite.explanations.local_approximation.methods import METHODS, attribute, with_options
from theodolite.explanations.local_approximation.neighbourhood import (
    DegenerateNeighbourhoodError,
    Neighbourhood,
    NotDifferentiableError,
    square_patches,
)
from theodolite.explanations.local_approximation.perturbation import PerturbationCurve, perturbation_curve
