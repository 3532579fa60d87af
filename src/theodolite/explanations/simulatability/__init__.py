"""Which explanation helps a reader predict what a model answers: leak-free tests, five explanations, readers, intervals.

    effect = Post - Pre,   Pre, Post: share of the model's answers that a reader predicts before and after explanations

Forward: answers on new inputs. Counterfactual: answers on a perturbation of an explained input. Explanations of tested inputs are
never shown, and tests are balanced so that knowing the task gains nothing. `run` asks simulated readers (a statistical student,
a language model); `export_forms` makes the same test for people, whose answers `import_responses` reads.

Source: Hase, Bansal, 2020, arXiv:2005.01831 (Evaluating Explainable AI: Which Algorithmic Explanations Help Users Predict Model
Behavior?).
"""

__all__ = [
    "Anchor",
    "Attribution",
    "CannotBalance",
    "Composite",
    "CounterfactualTest",
    "DecisionBoundary",
    "DegenerateModel",
    "Explanation",
    "ForwardTest",
    "LanguageModelSimulator",
    "Lime",
    "NoFlips",
    "Panel",
    "Prototype",
    "PrototypeNetwork",
    "Shuffled",
    "SimulationProtocol",
    "StudentSimulator",
    "effects",
    "export_forms",
    "import_responses",
    "rating_effect",
    "run",
]

from theodolite.explanations.simulatability.analysis import effects, rating_effect
from theodolite.explanations.simulatability.methods import (
    Anchor,
    Attribution,
    Composite,
    DecisionBoundary,
    Explanation,
    Lime,
    Prototype,
    Shuffled,
)
from theodolite.explanations.simulatability.protocol import (
    CannotBalance,
    CounterfactualTest,
    DegenerateModel,
    ForwardTest,
    NoFlips,
    SimulationProtocol,
)
from theodolite.explanations.simulatability.prototype_network import PrototypeNetwork
from theodolite.explanations.simulatability.simulators import LanguageModelSimulator, Panel, StudentSimulator, run
from theodolite.explanations.simulatability.study import export_forms, import_responses
