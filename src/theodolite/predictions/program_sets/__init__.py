"""Partial programs that hold the right program: code that a model generated, with holes in its uncertain parts.

    F_tau(x) = completions of the largest part of the generated tree with sum_v l_v <= -log tau and at most m holes  (eq. 3)
    tau = min {tau : errors on n calibration pairs <= k(n, epsilon, delta)}                                          (eq. 2)

l_v is the surprise of the own text of node v of the syntax tree under the model. With confidence 1 - delta over the
calibration pairs, the right program is a completion for at least a share 1 - epsilon of later prompts, whatever the model;
a better one has fewer holes. Works for Python and SQL, and needs token log-probabilities and references.

`parse_program`, `node_costs`, `prune`, `contains` are the steps; `ProgramSetCalibrator` puts them together; `generate` asks
a `theodolite.language` model for programs.

Source: Khakhar, Mell, Bastani, 2023, arXiv:2302.08703 (PAC Prediction Sets for Large Language Models of Code).
"""

__all__ = [
    "CalibrationTooSmall",
    "Coverage",
    "Generation",
    "PartialProgram",
    "ProgramNode",
    "ProgramSetCalibrator",
    "ProgramSyntaxError",
    "ProgramTree",
    "ReferenceParseError",
    "TokenAlignmentError",
    "TokenLogprob",
    "choose_level",
    "contains",
    "generate",
    "k_errors",
    "node_costs",
    "parse_program",
    "prune",
    "pruning_gap",
]

from theodolite.predictions.program_sets.calibrate import (
    CalibrationTooSmall,
    Coverage,
    ProgramSetCalibrator,
    ReferenceParseError,
    choose_level,
    k_errors,
)
from theodolite.predictions.program_sets.costs import (
    Generation,
    TokenAlignmentError,
    TokenLogprob,
    generate,
    node_costs,
)
from theodolite.predictions.program_sets.membership import contains
from theodolite.predictions.program_sets.pruning import PartialProgram, prune, pruning_gap
from theodolite.predictions.program_sets.trees import ProgramNode, ProgramSyntaxError, ProgramTree, parse_program
