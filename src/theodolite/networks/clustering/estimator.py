"""TELL as a scikit-learn estimator: an encoder, a k-means layer on its codes, and a decoder that shows the centres."""

__all__ = ["TELL", "ClusterExplanation"]

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from theodolite.core.errors import DataError, InputError, ModelError, TrainingCollapsedError
from theodolite.core.parallel import one_thread
from theodolite.core.view import ModelView
from theodolite.networks.clustering import files
from theodolite.networks.clustering.layer import KMeansLayer
from theodolite.networks.clustering.networks import FullyConnectedDecoder, autoencoder
from theodolite.networks.clustering.training import DeadClusterWarning, Epoch, Phase, Trainer, codes_of

_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SMALL = 1 << 24  # multiplications of a batch below which one thread is soonest
_SPREAD = 1e-4


@dataclass(frozen=True, eq=False)
class ClusterExplanation:
    """What one cluster is.

    center (latent,): its centre, of length 1. decoded: the centre as an input, None without a decoder. nearest_index: the row
    of X nearest to it. size: rows of X in the cluster. radius_quantiles: least, quarter, median, three-quarter and largest
    distance of these rows to the centre, () where there are none. contrast: decoded less the mean row of X: what sets the
    cluster apart, feature by feature.
    """

    center: Float[np.ndarray, " latent"]
    decoded: np.ndarray | None
    nearest_index: int
    size: int
    radius_quantiles: tuple[float, ...]
    contrast: np.ndarray | None


class TELL(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Interpretable neural clustering: k-means on codes that an encoder learns, with centres that can be read.

        L = MSE(x, decoder(z)) + cluster_weight * mean_i ||z_i - c(i)||^2,    z = h(x) / ||h(x)||,    ||c_j|| = 1

    trained in turns: in even epochs the centres move (each by a gradient of length 0.2 alpha) and the encoder only reconstructs,
    in odd ones the centres stay and the encoder gets both terms. cluster_weight multiplies the mean over samples; the published
    code averages over the n_clusters columns too, so its 0.01 with 10 clusters is 0.001 here. Larger weights hurt.

    encoder: "auto" (convolutional for images (n, height, width) or (n, channels, height, width), fully connected for tables),
    "conv", "mlp", a module of your own (copied; inputs go in as they are; one without trainable weights stays frozen), or None:
    the input itself, scaled to length 1, which is spherical k-means by mini-batches. decoder: "auto" mirrors a built-in encoder,
    is fully connected for a trainable module, and none otherwise; a module; or None. latent_dim: of the built-in encoders.
    Their inputs are brought to [0, 1] by one shift and factor for all numbers (scale columns of a table that differ in unit).

    alpha: scale of the layer's weights; it changes no assignment, and is the reach of a centre's step beside the
    optimiser's constants. batch_size: incomplete batches are dropped. optimizer: "adadelta", or "adam", which moves the
    networks while centres go by plain steps of their gradient. init: "random" starts centres in random directions (at
    random rows where the encoder is frozen), "kmeans" at k-means of the codes; below 10,000 rows "kmeans" with
    warmup_epochs=20 (reconstruction only, before the ``epochs``) is safer. reseed: restart a cluster that was without rows
    for 20 epochs; otherwise it is a DeadClusterWarning. seed: what other estimators call random_state.

    Attributes: ``labels_`` (n,), ``n_found_`` clusters with rows, ``inertia_`` (sum of squared distances), ``cluster_centers_``
    (k, latent) of length 1, ``decoded_centers_`` (k, *input) or None, ``reconstruction_r2_`` (None without a decoder),
    ``history_`` (a list of `Epoch`), ``encoder_``, ``decoder_``, ``layer_``, ``n_features_in_``, ``input_shape_``.

    InputError for k < 2 or k > n, a batch larger than the data, image sides not divisible by 4, options out of range; DataError
    for NaN and for rows whose code is zero; TrainingCollapsedError where the loss is not finite, all codes are the same, or
    fewer than half of the clusters (or one alone) hold rows at the end.

    Source: Peng, Li, Tsang, Zhu, Lv, Zhou, 2022, arXiv:1808.07292.

    >>> rng = np.random.default_rng(0)
    >>> X = np.repeat(np.eye(3), 40, axis=0) + rng.normal(size=(120, 3)) * 0.1
    >>> model = TELL(3, encoder=None, init="kmeans", epochs=5).fit(X)
    >>> np.bincount(model.labels_).tolist(), bool(model.predict([[0, 5, 0]])[0] == model.labels_[40])
    ([40, 40, 40], True)
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        encoder: Any = "auto",
        decoder: Any = "auto",
        latent_dim: int = 10,
        cluster_weight: float = 1e-3,
        alpha: float = 1e-3,
        epochs: int = 100,
        batch_size: int = 64,
        optimizer: str = "adadelta",
        init: str = "random",
        warmup_epochs: int = 0,
        reseed: bool = False,
        seed: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.cluster_weight = cluster_weight
        self.alpha = alpha
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.init = init
        self.warmup_epochs = warmup_epochs
        self.reseed = reseed
        self.seed = seed

    # ---- fitting

    def fit(self, X: Any, y: Any = None) -> "TELL":
        """Train on all rows of X: a table (n, d), or images (n, height, width) or (n, channels, height, width).

        y (n,): labels to watch, never to learn from: each epoch's NMI with them goes into ``history_``. Do not choose the
        number of epochs by it: that would be learning from labels.
        """
        x = self._take(X, reset=True)
        self._check(len(x))
        watched = _watched(y, len(x))
        if self.batch_size > len(x):
            raise InputError(
                f"batch_size={self.batch_size} is larger than the {len(x)} rows, so there would be no complete batch; "
                f"give at most batch_size={len(x)}"
            )
        self.history_: list[Epoch] = []
        with torch.random.fork_rng(devices=[]), one_thread(self._is_small(x)):
            torch.manual_seed(self.seed)
            self._build(x)
            codes_of(self.encoder_, x.to(self.layer_.weight.device))  # rows without direction are told before any work
            self._train(x, watched)
        self._finish(x)
        return self

    def partial_fit(self, X: Any, y: Any = None) -> "TELL":
        """One pair of steps on the batch X: the centres' and then the encoder's (the centres' alone where it is frozen).

        The first batch also says how inputs are scaled and where the centres start, so it needs at least n_clusters rows.
        ``labels_`` and what goes with it describe the last `fit`, and are not kept up here.
        """
        first = not hasattr(self, "layer_")
        x = self._take(X, reset=first)
        with torch.random.fork_rng(devices=[]), one_thread(self._is_small(x)):
            if first:
                self._check(len(x))
                torch.manual_seed(self.seed)
                self._build(x)
                self._start_centres(x)
            self._steps += 1
            torch.manual_seed(self.seed + self._steps)  # dropout goes on where the last batch left off
            for phase in self._trainer.phases:
                self._trainer.step(x, phase)
        return self

    def _build(self, x: Tensor) -> None:
        """Fresh networks and centres for inputs like ``x``."""
        shape, unit = tuple(x.shape[1:]), 1.0
        kind = self.encoder
        if isinstance(kind, str):
            if kind == "auto":
                kind = "mlp" if len(shape) == 1 else "conv"
            if kind == "conv" and len(shape) == 1:
                raise InputError(
                    "the convolutional encoder takes images (n, height, width) or (n, channels, height, width); these rows are "
                    "a table, for which encoder='mlp' is meant"
                )
            low = float(x.min())
            unit = float(x.max()) - low
            if not unit > 0:
                raise DataError("all numbers of X are the same, so rows cannot be told apart")
            encoder, decoder = autoencoder(kind, shape, self.latent_dim, low=low, span=unit)
        else:
            encoder, decoder = (nn.Flatten() if kind is None else copy.deepcopy(kind)), None
        device = next((p.device for p in encoder.parameters()), x.device) if isinstance(kind, nn.Module) else x.device
        self.encoder_: nn.Module = encoder.to(device)
        latent = self._latent_width(x[:2].to(device))
        trains = any(p.requires_grad for p in encoder.parameters())
        if isinstance(self.decoder, nn.Module):
            decoder = copy.deepcopy(self.decoder)
        elif self.decoder is None:
            decoder = None
        elif isinstance(kind, nn.Module) and trains:
            decoder = FullyConnectedDecoder(shape, latent)
        self.decoder_: nn.Module | None = None if decoder is None else decoder.to(device)
        self._check_decoder(x[:2].to(device), latent)
        self.layer_ = KMeansLayer(
            latent, self.n_clusters, alpha=self.alpha, normalized=True, seed=self.seed
        ).to(device)  # fmt: skip
        self._steps, self._unit = 0, unit
        self._trainer = self._make_trainer()

    def _make_trainer(self) -> Trainer:
        return Trainer(
            self.encoder_, self.decoder_, self.layer_,
            cluster_weight=self.cluster_weight, optimizer=self.optimizer, unit=self._unit,
        )  # fmt: skip

    def _latent_width(self, rows: Tensor) -> int:
        try:
            out = ModelView(self.encoder_, output="raw")(rows)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(f"the encoder cannot take rows of shape {tuple(rows.shape[1:])}: {error}") from error
        if out.ndim != 2 or len(out) != len(rows):
            raise ModelError(f"an encoder must give codes (rows, latent), this one gives {tuple(out.shape)}")
        return out.shape[1]

    def _check_decoder(self, rows: Tensor, latent: int) -> None:
        if self.decoder_ is None:
            if self.warmup_epochs:
                raise InputError(
                    "the warm-up learns to reconstruct, which needs a decoder; give warmup_epochs=0 or a decoder"
                )
            return
        found = self._decode(torch.eye(latent, device=rows.device)[:1]).shape[1:]
        if found != rows.shape[1:]:
            raise ModelError(f"the decoder gives shape {tuple(found)}, the inputs have {tuple(rows.shape[1:])}")

    def _start_centres(self, x: Tensor) -> None:
        """Centres before their first step; random directions are there already."""
        if self.init == "random" and self._trainer.encoder_trains:
            return
        codes = codes_of(self.encoder_, x)
        different = len(codes.unique(dim=0))
        if different < self.n_clusters:
            raise DataError(f"{different} different codes are too few for {self.n_clusters} clusters")
        if self.init == "random":
            order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(self.seed))
            self.layer_.centers = codes[order[: self.n_clusters]]
            return
        options: dict[str, Any] = {"n_init": 10, "random_state": self.seed}
        found: Any = KMeans(self.n_clusters, **options).fit(codes.cpu().numpy())
        self.layer_.centers = found.cluster_centers_

    def _train(self, x: Tensor, watched: np.ndarray | None) -> None:
        x = x.to(self.layer_.weight.device)
        trainer, order = self._trainer, torch.Generator().manual_seed(self.seed)
        if not trainer.encoder_trains and self.decoder_ is None:  # codes that never change are made once
            trainer, rows = copy.copy(trainer), codes_of(self.encoder_, x)
            trainer.encoder = nn.Flatten()
        else:
            rows = x
        phases = trainer.phases
        for epoch in range(-self.warmup_epochs, self.epochs):
            if epoch == 0:
                self._start_centres(x)
            phase: Phase = "warm-up" if epoch < 0 else phases[epoch % len(phases)]
            drawn = torch.randperm(len(rows), generator=order).split(self.batch_size)
            done = trainer.epoch(rows, (batch for batch in drawn if len(batch) == self.batch_size), phase)
            if watched is not None and epoch >= 0:
                labels = self.layer_.assign(codes_of(trainer.encoder, rows)).cpu().numpy()
                nmi = float(normalized_mutual_info_score(watched, labels))
                done = Epoch(done.phase, done.reconstruction, done.cluster, done.alive, nmi)
            self.history_.append(done)
            trainer.tend_dead(rows, reseed=self.reseed)

    def _finish(self, x: Tensor) -> None:
        """Labels, and the checks that the loss cannot fake: codes that differ, clusters that live, what is reconstructed."""
        x = x.to(self.layer_.weight.device)
        codes = codes_of(self.encoder_, x)
        self.reconstruction_r2_ = self._r2(x, codes)
        spread = float(codes.std(dim=0).max())
        if not spread > _SPREAD:
            raise TrainingCollapsedError(
                f"the encoder gives all rows the same code (spread {spread:.1e}): the run has collapsed; try a smaller "
                f"cluster_weight than {self.cluster_weight}, and keep the decoder"
            )
        labels = self.layer_.assign(codes)
        with torch.no_grad():
            self.inertia_ = float(self.layer_.distances(codes, labels).double().sum())
        self.labels_ = labels.cpu().numpy()
        self.n_found_ = len(np.unique(self.labels_))
        if self.n_found_ == 1 or 2 * self.n_found_ < self.n_clusters:
            raise TrainingCollapsedError(
                f"the {len(x)} rows ended in {self.n_found_} of {self.n_clusters} clusters: the run has collapsed; try "
                f"init='kmeans' with warmup_epochs=20, more epochs, or a smaller cluster_weight than {self.cluster_weight}"
            )
        if self.n_found_ < self.n_clusters:
            warnings.warn(
                f"only {self.n_found_} of {self.n_clusters} clusters hold rows; try init='kmeans', reseed=True or fewer clusters",
                DeadClusterWarning,
                stacklevel=3,
            )

    def _r2(self, x: Tensor, codes: Tensor) -> float | None:
        if self.decoder_ is None:
            return None
        middle = x.mean(dim=0)
        error = total = 0.0
        for part in range(0, len(x), 1024):
            rows = x[part : part + 1024]
            error += float((self._decode(codes[part : part + 1024]) - rows).double().square().sum())
            total += float((rows - middle).double().square().sum())
        return 1 - error / total if total > 0 else 0.0

    # ---- what was learnt

    def predict(self, X: Any) -> Int[np.ndarray, " row"]:
        """The nearest centre, 0..k-1, of each row of X by Euclidean distance of codes."""
        codes = self._codes(X)
        return self.layer_.assign(codes).cpu().numpy()

    def transform(self, X: Any) -> Float[np.ndarray, "row latent"]:
        """Codes (n, latent) of length 1."""
        return self._codes(X).cpu().numpy()

    def soft_predict(self, X: Any, temperature: float = 1.0) -> Float[np.ndarray, "row cluster"]:
        """softmax(-||z - c_j||^2 / temperature) for each row and centre, (n, k)."""
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be a finite number above 0, got {temperature}")
        codes = self._codes(X)
        with torch.no_grad():
            # codes have length 1, so twice the cosine is the squared distance but for a constant
            return (2 * codes @ self.layer_.centers.T / temperature).softmax(dim=1).cpu().numpy()

    @property
    def cluster_centers_(self) -> Float[np.ndarray, "cluster latent"]:
        """Centres (k, latent) of length 1."""
        check_is_fitted(self, "layer_")
        return self.layer_.centers.detach().cpu().numpy()

    @property
    def decoded_centers_(self) -> np.ndarray | None:
        """The centres as inputs, (k, *input): by the decoder, or themselves where the input was the code; None otherwise."""
        check_is_fitted(self, "layer_")
        if self.decoder_ is None and self.encoder is not None:
            return None
        return self.decode(self.cluster_centers_)

    def decode(self, codes: Any) -> np.ndarray:
        """Inputs (n, *input) of codes (n, latent); InputError where there is no decoder."""
        check_is_fitted(self, "layer_")
        rows = torch.as_tensor(codes).detach().to(self.layer_.weight)
        if rows.ndim != 2 or rows.shape[1] != self.layer_.n_features:
            raise InputError(f"codes must be (rows, {self.layer_.n_features}), got {tuple(rows.shape)}")
        if self.decoder_ is not None:
            return self._decode(rows).cpu().numpy()
        if self.encoder is not None:
            raise InputError("there is no decoder, so codes have no picture; look at the nearest rows by explain")
        return rows.cpu().numpy().reshape(-1, *self.input_shape_)

    def explain(self, j: int, X: Any) -> ClusterExplanation:
        """What cluster ``j`` is, by the rows of X: the centre, its picture, the nearest row, how many rows and how far."""
        if not 0 <= j < self.n_clusters:
            raise InputError(f"j must be a cluster 0..{self.n_clusters - 1}, got {j}")
        codes = self._codes(X)
        center = self.layer_.centers.detach()[j]
        mine = self.layer_.assign(codes) == j
        distance = (codes - center).norm(dim=1)
        quantiles: tuple[float, ...] = ()
        if bool(mine.any()):
            quantiles = tuple(map(float, np.quantile(distance[mine].double().cpu().numpy(), _LEVELS)))
        pictures = self.decoded_centers_
        decoded = None if pictures is None else pictures[j]
        contrast = None
        if decoded is not None:
            mean = self._take(X, reset=False).mean(dim=0).cpu().numpy()
            if self.encoder is None:  # only a direction is known of the centre, so rows are taken at the mean length
                mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
            contrast = decoded - mean
        return ClusterExplanation(
            center.cpu().numpy(), decoded, int(distance.argmin()), int(mine.sum()), quantiles, contrast
        )

    # ---- on disk

    def save(self, path: str | Path) -> Path:
        """Write a folder with tell.json and tell.safetensors, which hold no code; the optimiser's state is left out."""
        check_is_fitted(self, "layer_")
        return files.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> "TELL":
        """Read what `save` wrote. encoder, decoder: modules of your own that it was fitted with, whose weights are read.

        DataError for files that are missing or broken, ModelError where modules are missing or do not fit.
        """
        return files.load(cls, Path(path), encoder, decoder)

    # ---- inputs

    def _codes(self, X: Any) -> Tensor:
        check_is_fitted(self, "layer_")
        return codes_of(self.encoder_, self._take(X, reset=False).to(self.layer_.weight.device))

    def _decode(self, codes: Tensor) -> Tensor:
        assert self.decoder_ is not None
        training = self.decoder_.training
        self.decoder_.eval()
        with torch.no_grad():
            out = self.decoder_(codes)
        self.decoder_.train(training)
        return out

    def _take(self, X: Any, *, reset: bool) -> Tensor:
        """Rows as a float32 tensor, finite, of the shape that was fitted."""
        X = X if hasattr(X, "shape") else np.asarray(X)
        shape = tuple(X.shape[1:])
        fitted = shape if reset else self.input_shape_
        if len(shape) != len(fitted) or (len(shape) > 1 and shape != fitted):
            raise InputError(f"rows have shape {shape}, fitted were rows of shape {fitted}")
        if len(shape) in (2, 3):
            given: Any = X.detach() if isinstance(X, Tensor) else torch.from_numpy(np.array(X, dtype=np.float32))
            rows = given.to(torch.float32)
            if rows.numel() == 0:
                raise DataError(f"X has shape {tuple(rows.shape)}: there is nothing in it")
        else:  # tables are scikit-learn's matter: names of columns, lists, sparse matrices
            device = X.device if isinstance(X, Tensor) else "cpu"
            table: Any = X.detach().cpu().numpy() if isinstance(X, Tensor) else X
            array = validate_data(self, table, reset=reset, dtype=np.float64, ensure_all_finite=False)
            with np.errstate(over="ignore"):  # a number too large is told below
                rows = torch.from_numpy(np.array(array, dtype=np.float32)).to(device)
        good = torch.isfinite(rows).reshape(len(rows), -1).all(dim=1)
        if not bool(good.all()):
            raise DataError(
                f"X holds NaN or infinite values, first in row {int((~good).nonzero()[0])}; leave out or fill those rows"
            )
        if reset:
            self.input_shape_, self.n_features_in_ = tuple(rows.shape[1:]), math.prod(rows.shape[1:])
        return rows

    @property
    def _n_features_out(self) -> int:
        return self.layer_.n_features

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # float32, whatever comes in
        return tags

    def _check(self, n: int) -> None:
        if (
            isinstance(self.n_clusters, bool)
            or not isinstance(self.n_clusters, (int, np.integer))
            or self.n_clusters < 2
        ):
            raise InputError(f"n_clusters must be a whole number of at least 2, got {self.n_clusters!r}")
        if self.n_clusters > n:
            raise InputError(f"n_clusters={self.n_clusters} is more than n_samples = {n} rows")
        if not (0 <= self.cluster_weight < math.inf and 0 < self.alpha < math.inf):
            raise InputError(f"need cluster_weight >= 0 and alpha > 0, got {self.cluster_weight} and {self.alpha}")
        if self.epochs < 1 or self.warmup_epochs < 0 or self.batch_size < 1 or self.latent_dim < 1:
            raise InputError(
                f"need epochs, batch_size, latent_dim >= 1 and warmup_epochs >= 0; got {self.epochs}, {self.batch_size}, "
                f"{self.latent_dim}, {self.warmup_epochs}"
            )
        for name, given, known in (
            ("optimizer", self.optimizer, ("adadelta", "adam")), ("init", self.init, ("random", "kmeans")),
        ):  # fmt: skip
            if given not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if not (self.encoder is None or isinstance(self.encoder, nn.Module) or self.encoder in ("auto", "conv", "mlp")):
            raise InputError(f'encoder must be "auto", "conv", "mlp", a module or None, got {self.encoder!r}')
        if not (self.decoder is None or isinstance(self.decoder, nn.Module) or self.decoder == "auto"):
            raise InputError(f'decoder must be "auto", a module or None, got {self.decoder!r}')

    def _is_small(self, x: Tensor) -> bool:
        return self.batch_size * x[0].numel() * 2048 < _SMALL


def _watched(y: Any, n: int) -> np.ndarray | None:
    """Labels to monitor, checked; InputError for values, which are no labels."""
    if y is None:
        return None
    labels = np.asarray(y)
    if labels.shape != (n,):
        raise InputError(f"labels to watch must be one per row, ({n},), got {labels.shape}")
    if type_of_target(labels) not in ("binary", "multiclass"):
        raise InputError(
            "Unknown label type: y must hold labels, not values; clustering has no target, and y is only watched: leave it out"
        )
    return labels
