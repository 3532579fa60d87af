"""PBN: cluster unlabelled rows in a latent space that known classes have shaped."""

__all__ = ["PBN"]

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.utils.validation import check_is_fitted

from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.memory import chunks
from theodolite.core.parallel import one_thread
from theodolite.data.novel_classes.counts import ClusterCount, estimate_n_clusters
from theodolite.data.novel_classes.kmeans import NCDKMeans, check_width, nearest
from theodolite.data.novel_classes.labels import UNLABELLED, Labelled, check_count, class_means, labelled
from theodolite.data.novel_classes.network import NORMS, ProjectionNetwork, hidden_widths, train_projection
from theodolite.data.novel_classes.spectral import NCDSpectralClustering

_CLUSTERERS = ("kmeans", "ncd_kmeans", "spectral", "ncd_spectral")
_SMALL = 1 << 20  # numbers in a batch's widest layer below which one thread is soonest
_SPREAD = 1e-5
_EPOCHS, _STEPS = 200, 1600


class PBN(BaseEstimator):
    """Projection-based novel class discovery: clusters of unlabelled rows in a latent space shaped by known classes.

    An encoder gives z, normalised to length 1, from which a linear classifier names the known classes and a decoder gives
    the row back. It minimises

        w * cross-entropy(known rows) + (1 - w) * sum over columns of (x - x^)^2, mean over known and unlabelled rows

    and clusters the codes of the unlabelled rows. w = 1 trains on known rows only (the baseline, which tends to collapse
    what is new), w = 0 is an autoencoder.

    latent_dim: columns of z, None for 3/4 of those of X. w, lr, dropout: the other three hyperparameters; `tune_hidden`
    finds all four. hidden: widths of the hidden layers, None for 3/4 and 2/4 of the columns (at least 2; give wider
    ones for a table of few columns, where so few units lose too much). epochs: None for the published 200, or for as many more
    as make 1,600 steps of batch_size rows, which is what 200 make of the smallest published table; tables of some hundred rows
    would otherwise stop long before they have learnt anything. norm: "l2" or "none".
    clusterer: "kmeans", "ncd_kmeans", "spectral" or "ncd_spectral" (k-means or spectral clustering, the latter two
    with the known rows). n_novel: clusters, or "auto" for the best silhouette among 2..30 on the normalised codes.
    cluster_normalized: cluster the normalised codes instead of z before normalisation (the published code does the latter).
    device: "auto" for an accelerator where there is one.

    fit(X (n, p), y (n,)): y is -1 for unlabelled rows. Columns are standardised with all rows of the fit; constant ones are
    left out (dropped_columns_ names them). Afterwards labels_ (cluster of each unlabelled row, in order), n_novel_, count_
    (`ClusterCount`, None where n_novel was given), classes_ (known), known_centroids_ and centroids_ (of known classes and
    clusters, in the space of `transform`), history_ (losses by epoch) and reconstruction_r2_ (of all rows, a check of the
    network that the loss cannot flatter).

    DataError for data that cannot be used (no unlabelled row, no known class, NaN, texts, constant columns only), InputError
    for options out of range, TrainingCollapsedError where the loss is not finite or all codes are the same.

    Source: Troisemaine, Reiffers-Masson, Gosselin, Lemaire, Vaton, 2023, arXiv:2311.05440.

    >>> rng = np.random.default_rng(0)
    >>> X = np.repeat(np.eye(4) * 8, 25, axis=0) + rng.normal(size=(100, 4))
    >>> y = np.repeat([0, 1, -1, -1], 25)
    >>> PBN(n_novel=2, epochs=20).fit(X, y).labels_.shape
    (50,)
    """

    def __init__(
        self,
        latent_dim: int | None = None,
        w: float = 0.5,
        *,
        lr: float = 1e-3,
        dropout: float = 0.1,
        hidden: tuple[int, ...] | None = None,
        epochs: int | None = None,
        batch_size: int = 512,
        norm: str = "l2",
        clusterer: str = "kmeans",
        n_novel: int | str = "auto",
        cluster_normalized: bool = False,
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.latent_dim = latent_dim
        self.w = w
        self.lr = lr
        self.dropout = dropout
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.norm = norm
        self.clusterer = clusterer
        self.n_novel = n_novel
        self.cluster_normalized = cluster_normalized
        self.device = device
        self.seed = seed

    def fit(self, X: Any, y: Any) -> "PBN":
        """Train on all rows of X (n, p) and cluster those whose label in y (n,) is -1."""
        data = labelled(X, y)
        unlabelled = ~data.known
        k = check_count(self.n_novel, int(unlabelled.sum()))
        self._fit_network(data)
        codes = self._codes(data.x)
        space = self._space(codes)
        self.known_centroids_ = class_means(space[data.known], data.y[data.known], len(data.classes))
        self.count_: ClusterCount | None = None
        if k is None:
            self.count_ = estimate_n_clusters(self._normalised(codes[unlabelled]), seed=self.seed)
            k = self.count_.k
        self.labels_, self.centroids_ = self._cluster(space[unlabelled], space[data.known], data, k)
        self.n_novel_ = len(self.centroids_)
        # spectral clusters need not be round, so a new row takes the cluster of the nearest row instead of centroid
        means = self.clusterer in ("kmeans", "ncd_kmeans")
        self._reference = (self.centroids_, np.arange(self.n_novel_)) if means else (space[unlabelled], self.labels_)
        return self

    def cluster_hidden(self, X: Any, y: Any, hidden: Bool[np.ndarray, " row"], k: int) -> Int[np.ndarray, " hidden"]:
        """Train on all rows, given the labels in y (n,), and give k clusters of the ``hidden`` rows; for tuning."""
        data = labelled(X, y)
        self._fit_network(data)
        space = self._space(self._codes(data.x))
        return self._cluster(space[hidden], space[data.known], data, k)[0]

    def transform(self, X: Any) -> Float[np.ndarray, "row latent"]:
        """The codes of rows X (n, p) in the space that is clustered, (n, latent)."""
        check_is_fitted(self, "network_")
        return self._space(self._codes(check_width(X, self.n_features_in_)))

    def predict(self, X: Any) -> Int[np.ndarray, " row"]:
        """The cluster 0..k-1 of each row of X (n, p), taken to be of a new class."""
        check_is_fitted(self, "labels_")
        points, labels = self._reference
        return labels[nearest(self.transform(X), points)]

    def predict_known(self, X: Any) -> np.ndarray:
        """The known class of each row of X (n, p) by the classifier, taken to be of a known class."""
        check_is_fitted(self, "network_")
        if self.w == 0:
            raise ModelError("with w = 0 the classifier is not trained; use w > 0")
        with torch.no_grad():
            z = torch.as_tensor(self._codes(check_width(X, self.n_features_in_)), dtype=torch.float32)
            classifier = self.network_.classifier
            scores = classifier(self.network_.normalise(z.to(classifier.weight.device)))
        return self.classes_[scores.argmax(dim=1).cpu().numpy()]

    def predict_open(self, X: Any) -> np.ndarray:
        """For each row of X (n, p) the known class or "novel-j", whichever has the nearest mean code; an array of objects."""
        check_is_fitted(self, "labels_")
        names = np.array([*self.classes_.tolist(), *(f"novel-{j}" for j in range(self.n_novel_))], dtype=object)
        return names[nearest(self.transform(X), np.concatenate([self.known_centroids_, self.centroids_]))]

    def _check_options(self, columns: int) -> int:
        """The latent dimension; InputError for what is out of range."""
        latent = max(1, round(0.75 * columns)) if self.latent_dim is None else self.latent_dim
        if not 0 <= self.w <= 1:
            raise InputError(f"w must lie between 0 and 1, got {self.w}")
        if latent < 1 or latent != int(latent):
            raise InputError(f"latent_dim must be a whole number of at least 1, got {latent}")
        if not 0 <= self.dropout < 1 or not self.lr > 0:
            raise InputError(f"need 0 <= dropout < 1 and lr > 0, got {self.dropout} and {self.lr}")
        if (self.epochs is not None and self.epochs < 1) or self.batch_size < 2:
            raise InputError(
                f"need epochs >= 1 and batch_size >= 2 (BatchNorm), got {self.epochs} and {self.batch_size}"
            )
        if self.hidden is not None and (not self.hidden or min(self.hidden) < 1):
            raise InputError(f"hidden must hold widths of at least 1, got {self.hidden}")
        for name, allowed in (("norm", NORMS), ("clusterer", _CLUSTERERS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        return int(latent)

    def _fit_network(self, data: Labelled) -> None:
        if not len(data.classes):
            raise DataError("no row has a known class, so there is nothing to learn from; cluster with k-means instead")
        moves = (data.x.max(axis=0) > data.x.min(axis=0)) & (data.x.std(axis=0) > 0)
        if not moves.any():
            raise DataError(f"all columns are constant ({', '.join(data.columns[:8])}), so rows cannot be told apart")
        latent = self._check_options(int(moves.sum()))
        self.n_features_in_ = data.x.shape[1]
        self.classes_ = data.classes
        self.dropped_columns_ = tuple(name for name, kept in zip(data.columns, moves, strict=True) if not kept)
        self._moves, self._shift, self._scale = moves, data.x[:, moves].mean(axis=0), data.x[:, moves].std(axis=0)
        columns = int(moves.sum())
        hidden = self.hidden or hidden_widths(columns)
        device = self.device
        if device == "auto":
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = "cpu" if found is None else str(found)
        epochs = self.epochs or max(_EPOCHS, math.ceil(_STEPS / math.ceil(len(data.x) / self.batch_size)))
        small = self.batch_size * max(columns, latent, *hidden) < _SMALL
        with torch.random.fork_rng(devices=[]), one_thread(small):
            torch.manual_seed(self.seed)
            network = ProjectionNetwork(
                columns, hidden, latent, len(data.classes), dropout=self.dropout, norm=self.norm
            ).to(device)
            x = self._standardised(data.x).to(device)
            self.history_ = train_projection(
                network, x, torch.as_tensor(data.y).to(device),
                w=self.w, lr=self.lr, epochs=epochs, batch_size=self.batch_size, seed=self.seed,
            )  # fmt: skip
        self.network_ = network
        self._check_health(data)

    def _check_health(self, data: Labelled) -> None:
        codes = self._codes(data.x)
        spread = codes.std(axis=0).max()
        if not spread > _SPREAD * (1 + np.abs(codes).max()):
            raise TrainingCollapsedError(
                f"the network gives all rows the same code (spread {spread:.1e}); try a smaller lr than {self.lr}, less dropout "
                f"than {self.dropout} or a smaller w than {self.w}"
            )
        x = self._standardised(data.x)
        device = self.network_.classifier.weight.device
        with torch.no_grad():
            z = torch.as_tensor(codes, dtype=torch.float32, device=device)
            back = self.network_.decoder(self.network_.normalise(z)).cpu()
        self.reconstruction_r2_ = 1 - float((back - x).square().sum() / x.square().sum())

    def _standardised(self, x: Float[np.ndarray, "row column"]) -> torch.Tensor:
        return torch.as_tensor((x[:, self._moves] - self._shift) / self._scale, dtype=torch.float32)

    def _codes(self, x: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row latent"]:
        """z before normalisation, float64, with dropout off."""
        device = self.network_.classifier.weight.device
        widest = 16.0 * (
            x.shape[1] + max(m.out_features for m in self.network_.encoder if isinstance(m, torch.nn.Linear))
        )
        with torch.no_grad():
            parts = [
                self.network_.encoder(self._standardised(x[part]).to(device)).cpu() for part in chunks(len(x), widest)
            ]
        return torch.cat(parts).double().numpy()

    def _normalised(self, codes: Float[np.ndarray, "row latent"]) -> Float[np.ndarray, "row latent"]:
        if self.norm == "none":
            return codes
        return codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)

    def _space(self, codes: Float[np.ndarray, "row latent"]) -> Float[np.ndarray, "row latent"]:
        return self._normalised(codes) if self.cluster_normalized else codes

    def _cluster(
        self, novel: np.ndarray, known: np.ndarray, data: Labelled, k: int
    ) -> tuple[Int[np.ndarray, " novel"], Float[np.ndarray, "cluster latent"]]:
        """Labels and mean codes of k clusters of the codes ``novel``."""
        different = len(np.unique(novel, axis=0))
        if different < k:
            raise DataError(f"{different} different codes are too few for {k} clusters; give a smaller n_novel")
        if self.clusterer == "kmeans":
            options: dict[str, Any] = {"n_init": 10, "random_state": self.seed}
            found: Any = KMeans(k, **options).fit(novel)
            return found.labels_.astype(np.int64), found.cluster_centers_
        rows = novel if self.clusterer == "spectral" else np.concatenate([novel, known])
        y = np.full(len(rows), UNLABELLED)
        y[len(novel) :] = data.y[data.known][: len(rows) - len(novel)]
        if self.clusterer == "ncd_kmeans":
            found = NCDKMeans(k, seed=self.seed).fit(rows, y)
            return found.labels_, found.centroids_
        # a spectral cluster that lost all rows has no mean in this space, so it is no cluster
        labels = np.unique(NCDSpectralClustering(k, seed=self.seed).fit(rows, y).labels_, return_inverse=True)[1]
        return labels, class_means(novel, labels, int(labels.max()) + 1)
