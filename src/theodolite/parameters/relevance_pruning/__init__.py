"""The units of a trained network ranked by how much of its evidence for the true class flows through them, and pruned.

    R_i = sum_j a_i w_ij^+ / (sum_k a_k w_kj^+ + eps) R_j,     score of unit u = sum of R_u over reference rows and positions

Relevance starts at the true class's score and keeps its sum from layer to layer, so that the units of all layers are
ranked together without a normalisation; a few labelled rows a class do. The classical criteria (weights, Taylor expansion,
gradient) and chance are ranked by the same call. Of a Hugging Face transformer the units are the hidden numbers of its MLPs:
`unit_scores`, `prune_units`, `apply_mask` and `remove_units` take it as it is, with token ids for rows and tokens (or classes)
for targets. Its hidden numbers have both signs, so there sum |R| (abs=True).

Source: Yeom, Seegerer, Lapuschkin, Binder, Wiedemann, Müller, Samek, 2021, Pattern Recognition 115, arXiv:1912.08881
(Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning).
"""

__all__ = [
    "CRITERIA",
    "CriteriaComparison",
    "PruningResult",
    "RankAgreement",
    "RelevanceError",
    "RelevancePruner",
    "UnitMask",
    "UnsupportedLayerError",
    "apply_mask",
    "compare_criteria",
    "draw_reference",
    "prune_units",
    "rank_agreement",
    "relevance",
    "remove_units",
    "unit_scores",
]

from theodolite.core.masks import UnitMask, apply_mask, prune_units, remove_units
from theodolite.parameters.relevance_pruning.pruning import (
    CriteriaComparison,
    PruningResult,
    RelevancePruner,
    compare_criteria,
    draw_reference,
)
from theodolite.parameters.relevance_pruning.relevance import relevance
from theodolite.parameters.relevance_pruning.rules import UnsupportedLayerError
from theodolite.parameters.relevance_pruning.scores import CRITERIA, RankAgreement, rank_agreement, unit_scores
from theodolite.parameters.relevance_pruning.targets import RelevanceError
