"""A model whose parameters are a paragraph: a language model reads it to predict, another rewrites it to predict better.

    y_hat = f(x; theta)                                            the learner answers one input under the descriptions theta
    theta_t = g({x_i, y_hat_i, y_i} in batch t, theta_(t-1); psi)  the optimizer writes better ones under its instructions psi
    what the learner reads is theta_0 + " " + theta_t, so that the task and what is known beforehand are never overwritten

The optimizer sees its last answer too (``history``), never the whole conversation. Every step is kept as an `Update`. Beyond
the paper: descriptions may be kept by their loss on rows set aside, a classifier may compare log p(label | prompt) instead of
reading free text, answers are read strictly and their failures counted, and calls have a budget. A fit that was stopped and is
started again asks nothing twice where the model keeps its answers (`theodolite.language.connect` does).

Source: Xiao, Bamler, Schölkopf, Liu, 2025, arXiv:2406.04344.
"""

__all__ = [
    "NO_FORMULA",
    "ONE_DECIMAL",
    "Candidate",
    "CandidateSearch",
    "LearnerFormatError",
    "OptimizerFormatError",
    "Update",
    "VerbalizedClassifier",
    "VerbalizedRegressor",
    "candidate_search",
    "in_context",
    "reference_scores",
    "training_report",
]

from theodolite.hyperparameters.verbalized.answers import LearnerFormatError, OptimizerFormatError
from theodolite.hyperparameters.verbalized.baselines import (
    Candidate,
    CandidateSearch,
    candidate_search,
    in_context,
    reference_scores,
)
from theodolite.hyperparameters.verbalized.estimators import VerbalizedClassifier, VerbalizedRegressor
from theodolite.hyperparameters.verbalized.prompts import NO_FORMULA, ONE_DECIMAL
from theodolite.hyperparameters.verbalized.report import training_report
from theodolite.hyperparameters.verbalized.training import Update
