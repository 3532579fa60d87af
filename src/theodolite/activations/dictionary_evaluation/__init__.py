"""Whether a dictionary of hidden space keeps what a model uses, can steer it, and has features that mean something.

On a task whose inputs have known attributes a_i (who is named, in which order, which class) a supervised dictionary needs no
training,

    a_hat(p) = a_bar + sum_i u_{i, a_i(p)},     u_{iv} = E[act | a_i = v] - a_bar   or by least squares       (sec. 3)

and is the yardstick: any other dictionary, a sparse autoencoder say, is scored beside it on three tests. Approximation:
how much of the outcome is left when activations are replaced by their reconstruction, and how much is lost with it.
Sparse control: whether exchanging k features makes the model act as if an attribute had another value, with the error of
the reconstruction kept in place. Interpretability: how well the pattern f > 0 of a feature, or of a group of values,
predicts an attribute (F1). `evaluate_dictionary` runs all three; `compare_dictionaries` puts any dictionaries of one layer
into one table where no attributes are known; `occlusion_curve` and `splitting_curve` are two ways in
which sparse autoencoders fail.

Source: Makelov, Lange and Nanda, 2024, arXiv:2405.08366 (Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control).
"""

__all__ = [
    "IOI_TEMPLATES",
    "Answers",
    "DictionaryReport",
    "DictionaryTable",
    "FeatureScores",
    "LayerLoss",
    "Location",
    "OcclusionCurve",
    "PatchedRuns",
    "SplittingCurve",
    "SupervisedDictionary",
    "Task",
    "aware_edit",
    "compare_dictionaries",
    "evaluate_dictionary",
    "feature_f1",
    "feature_weights",
    "greedy_edit",
    "head_location",
    "ioi_task",
    "locate",
    "occlusion_curve",
    "recovered_share",
    "single_token_names",
    "splitting_curve",
    "tabular_task",
    "weakened",
    "writing_heads",
]

from theodolite.activations.dictionary_evaluation.edits import aware_edit, greedy_edit
from theodolite.activations.dictionary_evaluation.evaluation import evaluate_dictionary, recovered_share
from theodolite.activations.dictionary_evaluation.features import FeatureScores, feature_f1, feature_weights
from theodolite.activations.dictionary_evaluation.ioi import IOI_TEMPLATES, ioi_task, single_token_names
from theodolite.activations.dictionary_evaluation.locating import head_location, locate, writing_heads
from theodolite.activations.dictionary_evaluation.report import DictionaryReport
from theodolite.activations.dictionary_evaluation.runs import Answers, Location, PatchedRuns
from theodolite.activations.dictionary_evaluation.supervised import SupervisedDictionary
from theodolite.activations.dictionary_evaluation.table import DictionaryTable, LayerLoss, compare_dictionaries
from theodolite.activations.dictionary_evaluation.task import Task, tabular_task
from theodolite.activations.dictionary_evaluation.toys import (
    OcclusionCurve,
    SplittingCurve,
    occlusion_curve,
    splitting_curve,
    weakened,
)
