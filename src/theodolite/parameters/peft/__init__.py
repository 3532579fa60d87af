"""Parameter-efficient tuning in one vocabulary: every method adds a computed change to a hidden state of a frozen model.

    h <- compose(h, Delta h),   Delta h = f(input W_down) W_up                                   (section 3, table 1)

A method is five choices: the form f, the bottleneck r, the state that is changed, whether Delta h is computed from what the
sub-block reads (parallel) or from what it gives (sequential), and how it is added. `PRESETS` holds the methods with names:
adapters, prefix tuning, LoRA, BitFit, prompts, and the paper's own mix, "mam", a short prefix at attention and a scaled
parallel adapter at the FFN. `apply` puts one into a model, `compare` measures several (functions that make a low-rank,
shared or pruned model among them), `quality_against_parameters` gives a curve of each for one axis, and `design_effects`
says which choice was worth what.

Source: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, 2022, arXiv:2110.04366 (Towards a Unified View of Parameter-Efficient
Transfer Learning).
"""

__all__ = [
    "LabelledTexts",
    "Modification",
    "PEFTModel",
    "PRESETS",
    "ParameterCount",
    "Task",
    "apply",
    "bottleneck_for_budget",
    "compare",
    "design_effects",
    "find_blocks",
    "pareto_front",
    "prefix_gate",
    "quality_against_parameters",
    "tokenized",
]

from theodolite.parameters.peft.blocks import find_blocks
from theodolite.parameters.peft.changes import prefix_gate
from theodolite.parameters.peft.comparison import (
    LabelledTexts,
    Task,
    compare,
    design_effects,
    pareto_front,
    quality_against_parameters,
    tokenized,
)
from theodolite.parameters.peft.model import ParameterCount, PEFTModel, apply, bottleneck_for_budget
from theodolite.parameters.peft.modification import PRESETS, Modification
