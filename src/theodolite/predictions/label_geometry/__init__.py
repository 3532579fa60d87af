"""Answers with labels that a classifier never saw, by replacing argmax with a weighted mean in the labels' own geometry.

    y(x) = argmin over all labels y of  sum_i P(l_i | x) d(y, l_i)^2                                         (eq. 1)

l_i are the observed labels, P(l_i | x) the classifier's probabilities and d distances between all labels (a taxonomy, a
graph, embeddings). No training. The locus, all labels that are such a mean for some weights, tells what can be answered at
all: on a tree the labels on paths between observed ones. `next_class` says which label to observe next.

The paper's learning theory (bounds in the label space's diameter and the sample size) is not implemented.

Source: Roberts, Li, Adila, Cromp, Huang, Zhao, Sala, 2023, arXiv:2307.12226 (Geometry-Aware Adaptation for Pretrained
Models; there called Loki).
"""

__all__ = [
    "AdaptationReport",
    "FrechetHead",
    "FrechetPredictor",
    "LabelMetric",
    "Locus",
    "MetricCheck",
    "adaptation_report",
    "frechet_mean",
    "is_locus_cover",
    "is_pairwise_decomposable",
    "locus",
    "locus_curve",
    "minimum_locus_cover",
    "nearest_observed",
    "next_class",
    "random_tree_metric",
    "tree_locus",
]

from theodolite.predictions.label_geometry.locus import (
    Locus,
    is_locus_cover,
    is_pairwise_decomposable,
    locus,
    next_class,
)
from theodolite.predictions.label_geometry.metric import LabelMetric, MetricCheck, random_tree_metric
from theodolite.predictions.label_geometry.predictor import FrechetHead, FrechetPredictor, frechet_mean
from theodolite.predictions.label_geometry.report import AdaptationReport, adaptation_report, nearest_observed
from theodolite.predictions.label_geometry.trees import locus_curve, minimum_locus_cover, tree_locus
