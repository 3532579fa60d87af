"""Counterfactuals that stay true when training rows are deleted: the right to explanation beside the right to be forgotten.

    min_x' c(x, x')   with   min_{|S| <= k} f_{w_-S}(x') >= t,     w_-S = weights after training without S          (eq. 3)
    f_worst(x') = f_w(x') + (1/n) sum of the k smallest  a_i(x') = (x', 1) . H^-1 g_i

The influence of rows adds up, so the worst set for a fixed x' is a partial sort and f_worst is concave: the nearest robust
point is unique and found exactly by cutting planes. Influence is too small, so a point on its boundary fails after a true
retraining of the worst set: ``verify=True`` retrains, and is the only mode that may be called certified.

Source: Krishna, Ma, Lakkaraju, 2023, arXiv:2302.04288 (Towards Bridging the Gaps between the Right to Explanation and the
Right to be Forgotten).
"""

__all__ = [
    "DeletionCounterfactualSet",
    "DeletionRobustCounterfactual",
    "ExactRetrainer",
    "InfluenceWarning",
    "SeparableDataError",
    "WorstDeletion",
    "deletion_effect",
    "validity_under_deletion",
    "worst_deletion",
]

from theodolite.core.influence import ExactRetrainer, SeparableDataError
from theodolite.explanations.deletion_robust.counterfactual import (
    DeletionCounterfactualSet,
    DeletionRobustCounterfactual,
)
from theodolite.explanations.deletion_robust.linear import (
    InfluenceWarning,
    WorstDeletion,
    deletion_effect,
    validity_under_deletion,
    worst_deletion,
)
