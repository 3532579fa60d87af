"""Find the new classes in unlabelled rows, with the known classes as the guide.

Some rows have one of the known classes, the others (label -1) belong to classes that nobody has named. `PBN` learns a
projection that names the known classes and gives every row back,

    loss = w * cross-entropy(known rows) + (1 - w) * squared reconstruction error (all rows),

and clusters the unlabelled rows in it; `NCDKMeans` and `NCDSpectralClustering` use the known classes without a network, and
are plain k-means and spectral clustering where no row is known. `estimate_n_clusters` says how many new classes there are,
`tune_hidden` sets the hyperparameters by hiding known classes, so without any label of a new one, and `describe_clusters`
says what sets each new group apart. `TabularNCD`, the forerunner, is experimental.

Source: Troisemaine, Reiffers-Masson, Gosselin, Lemaire, Vaton, 2023, arXiv:2311.05440 (A Practical Approach to Novel Class
Discovery in Tabular Data).
"""

__all__ = [
    "PBN",
    "ClusterCount",
    "ClusterDescription",
    "HiddenClassKFold",
    "History",
    "NCDKMeans",
    "NCDSpectralClustering",
    "TabularNCD",
    "Trial",
    "TuningResult",
    "clustering_accuracy",
    "default_space",
    "describe_clusters",
    "estimate_n_clusters",
    "spectral_bandwidth",
    "tune_hidden",
]

from theodolite.core.clustering import clustering_accuracy
from theodolite.data.novel_classes.counts import ClusterCount, estimate_n_clusters
from theodolite.data.novel_classes.describe import ClusterDescription, describe_clusters
from theodolite.data.novel_classes.kmeans import NCDKMeans
from theodolite.data.novel_classes.network import History
from theodolite.data.novel_classes.pbn import PBN
from theodolite.data.novel_classes.spectral import NCDSpectralClustering, spectral_bandwidth
from theodolite.data.novel_classes.tabular_ncd import TabularNCD
from theodolite.data.novel_classes.tuning import (
    HiddenClassKFold,
    Trial,
    TuningResult,
    default_space,
    tune_hidden,
)
