"""Which direction inside a network makes it prefer one answer to another, from one pair of inputs and without labels.

An observable n is a linear functional of the scores, such as logit(" she") - logit(" he"). Pushed backwards along a path of
components it becomes a feature vector y of hidden space,

    y <- W_U^T n,   head h of layer l:  y <- (W_O^h W_V^h)^T y,   norms and MLPs:  y <- gradient of y . f(x) at x0   (sec. 2.3)

with the attention weights held fixed, so that y . x predicts what the path adds to the observable. `propagate` follows one
path, `find_paths` finds the paths that matter from one pair of prompts, `evaluate` and `compare_baselines` say how well a
feature predicts the model beside what labelled prompts give, `coupling` how far two observables use the same feature, and
`steer`, `ablate` and `projection_patch` use it. Of a network that is no decoder a path is a list of names of modules.

Source: Dunefsky and Cohan, 2023, arXiv:2312.16291 (Observable Propagation: A Data-Efficient Approach to Uncover Feature
Vectors in Transformers).
"""

__all__ = [
    "NAMES",
    "OBJECT_TEMPLATES",
    "SUBJECT_TEMPLATES",
    "Component",
    "ComponentPath",
    "Effect",
    "FeatureReport",
    "FeatureVector",
    "LogitAttribution",
    "NamedPrompts",
    "Observable",
    "Readings",
    "ScoredPath",
    "ablate",
    "all_paths",
    "compare_baselines",
    "cosine",
    "coupling",
    "coupling_matrix",
    "evaluate",
    "find_paths",
    "head_norms",
    "head_scores",
    "layernorm_angle",
    "logit_attribution",
    "measure_effect",
    "named_prompts",
    "projection_patch",
    "propagate",
    "read",
    "read_all",
    "steer",
]

from theodolite.activations.observables.evaluation import (
    FeatureReport,
    Readings,
    compare_baselines,
    evaluate,
    read,
    read_all,
)
from theodolite.activations.observables.feature import (
    Component,
    ComponentPath,
    FeatureVector,
    cosine,
    coupling,
    coupling_matrix,
    layernorm_angle,
)
from theodolite.activations.observables.intervention import Effect, ablate, measure_effect, projection_patch, steer
from theodolite.activations.observables.names import (
    NAMES,
    OBJECT_TEMPLATES,
    SUBJECT_TEMPLATES,
    NamedPrompts,
    named_prompts,
)
from theodolite.activations.observables.observable import Observable
from theodolite.activations.observables.propagation import (
    LogitAttribution,
    all_paths,
    head_norms,
    logit_attribution,
    propagate,
)
from theodolite.activations.observables.search import ScoredPath, find_paths, head_scores
