"""What a learnt clustering has to beat: k-means without learning, k-means on a plain autoencoder's codes, and DEC."""

__all__ = ["DEEP", "PLAIN", "baseline_labels", "deep_embedded_clustering", "spherical_kmeans"]

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus
from torch import Tensor, nn
from torch.nn import functional as F

from theodolite.core.errors import DataError, InputError
from theodolite.core.parallel import one_thread
from theodolite.core.view import ModelView
from theodolite.networks.clustering.networks import autoencoder

PLAIN = ("k-means", "spherical k-means", "mini-batch k-means")
DEEP = ("k-means on a plain autoencoder's codes", "DEC")
_STARTS: Any = 10
_ITERATIONS = 300
_REFRESH = 5  # epochs between two targets of DEC


def baseline_labels(
    X: Any,
    n_clusters: int,
    *,
    names: Sequence[str] = PLAIN,
    epochs: int = 50,
    batch_size: int = 64,
    latent_dim: int = 10,
    seed: int = 0,
) -> dict[str, Int[np.ndarray, " row"]]:
    """Labels (n,) of rows X by each of ``names``, of `PLAIN` (on the inputs as they are, flat) and `DEEP`.

    epochs, batch_size, latent_dim: of the two deep ones, which share an autoencoder trained that long (convolutional for
    images); DEC then runs as long again.
    """
    unknown = set(names) - {*PLAIN, *DEEP}
    if unknown:
        raise InputError(f"there is no baseline {', '.join(sorted(unknown))}; there are: {', '.join((*PLAIN, *DEEP))}")
    rows = _rows(X)
    flat = rows.reshape(len(rows), -1).cpu().numpy()
    options: dict[str, Any] = {"n_init": _STARTS, "random_state": seed}
    found: dict[str, np.ndarray] = {}
    if set(names) & set(DEEP):
        on_codes, dec = deep_embedded_clustering(
            rows, n_clusters, epochs=epochs, batch_size=batch_size, latent_dim=latent_dim, seed=seed
        )
        found = dict(zip(DEEP, (on_codes, dec), strict=True))
    makers = {
        "k-means": lambda: KMeans(n_clusters, **options).fit_predict(flat),
        "spherical k-means": lambda: spherical_kmeans(flat, n_clusters, seed=seed)[0],
        "mini-batch k-means": lambda: MiniBatchKMeans(n_clusters, **options).fit_predict(flat),
    }
    return {name: found[name] if name in found else makers[name]().astype(np.int64) for name in names}


def spherical_kmeans(
    X: Float[np.ndarray, "row feature"], n_clusters: int, *, n_init: int = 10, seed: int = 0
) -> tuple[Int[np.ndarray, " row"], Float[np.ndarray, "cluster feature"]]:
    """k-means of directions: labels (n,) and centres (k, d) of length 1 with the largest sum of cosines, best of n_init starts.

    Source: Dhillon and Modha, 2001, Machine Learning 42.
    """
    x = np.asarray(X, dtype=np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not (length > 0).all():
        raise DataError(f"row {int((length[:, 0] == 0).argmax())} is zero and has no direction")
    if not 1 <= n_clusters <= len(x) or n_init < 1:
        raise InputError(f"need 1 <= n_clusters <= {len(x)} rows and n_init >= 1, got {n_clusters} and {n_init}")
    x = x / length
    best = (-np.inf, np.zeros(len(x), dtype=np.int64), x[:n_clusters])
    for start in range(n_init):
        centers = kmeans_plusplus(x, n_clusters, random_state=seed + start)[0]
        total = -np.inf
        for _ in range(_ITERATIONS):
            cosine = x @ centers.T
            labels = cosine.argmax(axis=1)
            before, total = total, float(cosine.max(axis=1).sum())
            if total > best[0]:
                best = (total, labels, centers)
            if total <= before + 1e-12 * len(x):
                break
            sums = np.zeros_like(centers)
            np.add.at(sums, labels, x)
            norms = np.linalg.norm(sums, axis=1, keepdims=True)
            centers = np.where(norms > 0, sums / np.where(norms > 0, norms, 1.0), centers)
    return best[1], best[2]


def deep_embedded_clustering(
    X: Any, n_clusters: int, *, epochs: int = 50, batch_size: int = 64, latent_dim: int = 10, seed: int = 0
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Labels (n,) of k-means on a plain autoencoder's codes, and of DEC, which goes on from them.

    DEC has soft assignments q_ij in proportion to 1 / (1 + ||z_i - c_j||^2), sharpens them to p_ij in proportion to
    q_ij^2 / sum_i q_ij, and minimises KL(P || Q) by encoder and centres; P is made anew every 5 epochs. ``epochs`` of
    reconstruction come first and as many of DEC after them; Adadelta, the same networks as `TELL`.

    Source: Xie, Girshick, Farhadi, 2016, arXiv:1511.06335.
    """
    rows = _rows(X)
    if epochs < 1 or not 1 <= batch_size <= len(rows) or not 2 <= n_clusters <= len(rows):
        raise InputError(
            f"need epochs >= 1, and batch_size and n_clusters within {len(rows)} rows; got {epochs}, {batch_size}, {n_clusters}"
        )
    low = float(rows.min())
    span = float(rows.max()) - low
    if not 0 < span < float("inf"):
        raise DataError("X must hold finite numbers that are not all the same")
    kind = "mlp" if rows.ndim == 2 else "conv"
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        encoder, decoder = autoencoder(kind, tuple(rows.shape[1:]), latent_dim, low=low, span=span)

        def learn(parameters: list[nn.Parameter], loss: Any, count: int) -> None:
            options: Any = {"foreach": True}
            optimizer = torch.optim.Adadelta(parameters, **options)
            for _ in range(count):
                for batch in torch.randperm(len(rows), generator=order).split(batch_size):
                    if len(batch) == batch_size:
                        optimizer.zero_grad(set_to_none=True)
                        loss(batch).backward()
                        optimizer.step()

        both = [*encoder.parameters(), *decoder.parameters()]
        learn(both, lambda batch: F.mse_loss(decoder(encoder(rows[batch])), rows[batch]) / span**2, epochs)
        view = ModelView(encoder, output="raw")
        options: dict[str, Any] = {"n_init": _STARTS, "random_state": seed}
        plain: Any = KMeans(n_clusters, **options).fit(view(rows).numpy())
        centers = nn.Parameter(torch.as_tensor(plain.cluster_centers_, dtype=torch.float32))
        for start in range(0, epochs, _REFRESH):
            with torch.no_grad():
                q = _student(view(rows), centers)
                target = q**2 / q.sum(dim=0)
                target /= target.sum(dim=1, keepdim=True)

            def divergence(batch: Tensor, target: Tensor = target) -> Tensor:
                log_q = _student(encoder(rows[batch]), centers).log()
                return F.kl_div(log_q, target[batch], reduction="batchmean")

            learn([*encoder.parameters(), centers], divergence, min(_REFRESH, epochs - start))
        with torch.no_grad():
            labels = _student(view(rows), centers).argmax(dim=1)
    return plain.labels_.astype(np.int64), labels.numpy()


def _rows(X: Any) -> Tensor:
    """Rows of an array, a tensor, a frame or lists."""
    return X.to(torch.float32) if isinstance(X, Tensor) else torch.from_numpy(np.array(X, dtype=np.float32))


def _student(codes: Tensor, centers: Tensor) -> Tensor:
    q = 1 / (1 + (codes[:, None] - centers).square().sum(dim=2))
    return q / q.sum(dim=1, keepdim=True)
