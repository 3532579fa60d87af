"""k-means as a layer of a network: clusters that train with an encoder, and centres that can be read and decoded.

    W_j = 2 alpha c_j,  b_j = -alpha ||c_j||^2:    softmax(W x + b) = softmax(-alpha ||x - c_j||^2)          (eq. 4 to 6)

so that the layer's largest output is the k-means assignment and its weights are the centres. With codes and centres of length 1
the loss ||z - c||^2 is (2 alpha - W_c . z) / alpha, which trains by mini-batches, on streams, with or without an encoder.

The paper's convergence theorem is not restated here; with step sizes that fall the k-means objective is seen not to rise. Its
results on CIFAR are not reproduced.

Source: Peng, Li, Tsang, Zhu, Lv, Zhou, 2022, arXiv:1808.07292 (XAI Beyond Classification: Interpretable Neural Clustering).
"""

__all__ = [
    "TELL",
    "ClusterExplanation",
    "ClusteringMetrics",
    "DeadClusterWarning",
    "Epoch",
    "KMeansLayer",
    "baseline_labels",
    "clustering_metrics",
    "deep_embedded_clustering",
    "spherical_kmeans",
]

from theodolite.networks.clustering.baselines import baseline_labels, deep_embedded_clustering, spherical_kmeans
from theodolite.networks.clustering.estimator import TELL, ClusterExplanation
from theodolite.networks.clustering.layer import KMeansLayer
from theodolite.networks.clustering.metrics import ClusteringMetrics, clustering_metrics
from theodolite.networks.clustering.training import DeadClusterWarning, Epoch
