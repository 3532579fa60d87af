"""Claims of Roberts et al., 2022, arXiv:2207.13179, on scikit-learn's digits, pen digits and exact examples."""

__all__ = ["claims"]

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF

from theodolite.core.estimate import Estimate, mean_of_runs, proportion
from theodolite.core.parallel import seeds_for
from theodolite.core.sources import find_data
from theodolite.data.latent_label_shift import (
    LatentLabelShift,
    class_posterior,
    cluster_shares,
    domain_posterior,
    factorize_shares,
    kmeans_labels,
    match_labels,
    naive_labels,
    share_error,
    simulate_label_shift,
)
from theodolite.data.latent_label_shift.factors import scaled
from theodolite.reproductions.claim import Claim, Comparator, Scale

_CLASSES, _DOMAINS, _CLUSTERS = 10, 20, 30
_SETTING = "scikit-learn's 8 x 8 digits for CIFAR and logistic regression for a ResNet-18"
_BRIGHTNESS = 0.3
_SHIFTS = ((0.5, 4.0), (3.0, 6.0), (10.0, 12.0))
_PEN_ROWS = 4000
_PEN = (
    "beats k-means on a larger set (pen digits: 10 classes, 20 domains, alpha 0.5)",
    "none given",
    "mean accuracy at least k-means' + 0.12",
)


def claims(scale: Scale, seed: int) -> Iterator[Claim]:
    """Every claim; quick runs take fewer seeds."""
    quick = scale is Scale.QUICK
    digits: Any = load_digits()
    X, y = digits.data / 16, digits.target
    runs = [_run(X, y, one, baselines=True) for one in seeds_for(seed, 2 if quick else 5)]
    yield _accuracy(runs)
    yield _mixes(runs)
    yield _dissimilar(X, y, seeds_for(seed + 1, 1 if quick else 3))
    yield _more_shift(X, y, seeds_for(seed + 2, 3))
    yield _pen_digits(seeds_for(seed + 3, 1 if quick else 3))
    yield from _identifiable(seed)
    yield _bayes(seed)
    yield _topics(seed)
    yield from _checks(X, y, runs, seeds_for(seed, 1 if quick else 5))


@dataclass(frozen=True)
class _Run:
    """One simulated set of domains: accuracies, L1 errors a domain, p-value and statistic of the shift test."""

    rows: int
    accuracy: float
    kmeans: float
    pca: float
    naive: float
    error: float
    kmeans_error: float
    p_value: float
    statistic: float


def _run(
    X: np.ndarray,
    y: np.ndarray,
    seed: int,
    *,
    n_domains: int = _DOMAINS,
    alpha: float = 0.5,
    condition: float = 4.0,
    brightness: float = 0.0,
    baselines: bool = False,
) -> _Run:
    made = simulate_label_shift(y, n_domains, alpha, condition, seed=seed)
    k, domains, truth = len(made.classes), made.domains, y[made.index]
    light = np.random.default_rng(seed).uniform(-brightness, brightness, n_domains)
    rows = X[made.index] + light[domains][:, None]
    with (
        warnings.catch_warnings()
    ):  # at weak shifts it rightly warns of its probabilities and of the classes' condition
        warnings.simplefilter("ignore", UserWarning)
        found = LatentLabelShift(k, n_clusters=3 * k, seed=seed).fit(rows, domains)
    plain = kmeans_labels(rows, k, seed=seed)

    def accuracy(labels: np.ndarray) -> float:
        return match_labels(labels, truth).accuracy

    return _Run(
        len(rows),
        accuracy(found.labels_),
        accuracy(plain),
        accuracy(kmeans_labels(rows, k, features="pca", seed=seed)) if baselines else np.nan,
        accuracy(naive_labels(found.out_of_fold_, domains, k, seed=seed)) if baselines else np.nan,
        float(share_error(found.class_shares_, made.class_shares).mean()),
        float(share_error(cluster_shares(plain, domains, k), made.class_shares).mean()),
        found.shift_test_.p_value,
        found.shift_test_.statistic,
    )


def _mean(runs: list[_Run], name: str) -> float:
    return float(np.mean([getattr(run, name) for run in runs]))


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


# ---- claims on digits


def _accuracy(runs: list[_Run]) -> Claim:
    ours = mean_of_runs([run.accuracy for run in runs], unit="accuracy", within=(0, 1))
    kmeans = _mean(runs, "kmeans")
    return Claim(
        "beats competitive unsupervised classification (10 digits, 20 domains, alpha 0.5, 30 clusters)",
        "beats SCAN on CIFAR (numbers in its tables)",
        ours,
        "mean accuracy >= 0.92 and >= k-means + 0.12",
        ours.value >= 0.92 and ours.value >= kmeans + 0.12,
        Comparator("k-means on the pixels", kmeans),
        f"{_SETTING}; {len(runs)} sets of {min(r.rows for r in runs)} to {max(r.rows for r in runs)} rows: "
        f"{_listed([r.accuracy for r in runs])}; PCA and k-means {_mean(runs, 'pca'):.3f}, naive {_mean(runs, 'naive'):.3f}",
    )  # fmt: skip


def _mixes(runs: list[_Run]) -> Claim:
    ours = mean_of_runs([run.error for run in runs], unit="L1 a domain", within=(0, 2))
    counts = _mean(runs, "kmeans_error")
    return Claim(
        "recovers the domains' shares of the classes",
        "L1 errors below the baselines' (numbers in its tables)",
        ours,
        "mean L1 error a domain <= 0.20 and <= half of k-means counts'",
        ours.value <= 0.2 and ours.value <= counts / 2,
        Comparator("counts of k-means clusters", counts),
        f"{_SETTING}; the same runs: {_listed([r.error for r in runs])}",
    )


def _dissimilar(X: np.ndarray, y: np.ndarray, seeds: list[int]) -> Claim:
    runs = []
    for one in seeds:
        pair = np.argsort(np.random.default_rng(one).permutation(_CLASSES)) // 2
        runs.append(_run(X, pair[y], one, n_domains=10))
    ours = mean_of_runs([run.accuracy for run in runs], unit="accuracy", within=(0, 1))
    worst, kmeans = min(run.accuracy for run in runs), _mean(runs, "kmeans")
    return Claim(
        "finds classes whose members look nothing alike (5 classes, each a random pair of digits)",
        "none given (the failure of clustering by similarity)",
        ours,
        "accuracy >= 0.88 for each set, mean >= k-means + 0.30",
        worst >= 0.88 and ours.value >= kmeans + 0.3,
        Comparator("k-means on the pixels", kmeans),
        f"{_SETTING}; 10 domains, 15 clusters, {len(runs)} sets: {_listed([r.accuracy for r in runs])}; k-means "
        f"{_listed([r.kmeans for r in runs])}",
    )


def _more_shift(X: np.ndarray, y: np.ndarray, seeds: list[int]) -> Claim:
    table = {
        alpha: [_run(X, y, one, alpha=alpha, condition=condition) for one in seeds] for alpha, condition in _SHIFTS
    }
    ours = [_mean(runs, "accuracy") for runs in table.values()]
    kmeans = [_mean(runs, "kmeans") for runs in table.values()]
    drops = [table[0.5][i].accuracy - table[10.0][i].accuracy for i in range(len(seeds))]
    drop = mean_of_runs(drops, unit="accuracy lost from alpha 0.5 to 10", within=(-1, 1))
    winner = "k-means wins" if kmeans[-1] > ours[-1] else "k-means does not win"
    return Claim(
        "the more the shares shift, the easier",
        "best at the smallest alpha (its tables)",
        drop,
        "mean accuracy falls from alpha 0.5 to 3 to 10, by >= 0.15 in all; k-means flat within 0.08",
        ours[0] > ours[1] > ours[2] and ours[0] - ours[2] >= 0.15 and max(kmeans) - min(kmeans) <= 0.08,
        Comparator("k-means, from alpha 0.5 to 10", kmeans[0] - kmeans[2]),
        f"{_SETTING}; {len(seeds)} sets for each alpha, condition numbers up to 4, 6, 12; accuracy {_listed(ours)}, k-means "
        f"{_listed(kmeans)}: at alpha 10 {winner}",
    )


def _pen_digits(seeds: list[int]) -> Claim:
    path = find_data("tables/pendigits.csv")
    if path is None:
        return Claim(*_PEN[:2], None, _PEN[2], None, scaled="needs tables/pendigits.csv in the folder THEODOLITE_DATA")
    table = np.genfromtxt(path, delimiter=",", skip_header=1)[:, 1:]
    X, y = table[:, :-1] / 100, table[:, -1].astype(np.int64)
    runs = []
    for one in seeds:
        rows = np.random.default_rng(one).choice(len(X), _PEN_ROWS, replace=False)
        runs.append(_run(X[rows], y[rows], one))
    ours, kmeans = mean_of_runs([run.accuracy for run in runs], unit="accuracy", within=(0, 1)), _mean(runs, "kmeans")
    return Claim(
        *_PEN[:2], ours, _PEN[2], ours.value >= kmeans + 0.12, Comparator("k-means", kmeans),
        f"not in the paper; {_PEN_ROWS:,} of {len(X):,} rows to draw from, {runs[0].rows:,} drawn in the first of {len(runs)} "
        f"sets; logistic regression on 16 columns: {_listed([r.accuracy for r in runs])}; L1 error {_mean(runs, 'error'):.3f} "
        f"(k-means counts {_mean(runs, 'kmeans_error'):.3f})",
    )  # fmt: skip


def _checks(X: np.ndarray, y: np.ndarray, runs: list[_Run], seeds: list[int]) -> Iterator[Claim]:
    quiet = [run for run in runs if run.p_value >= 0.05]
    yield Claim(
        "the test of label shift stays quiet under label shift",
        "none given (added here)",
        proportion(len(quiet), len(runs), unit="of the sets with p >= 0.05"),
        "p >= 0.05 in 4 of 5 sets",
        len(quiet) >= 0.8 * len(runs),
        Comparator("mean statistic", _mean(runs, "statistic")),
        f"digits, {len(runs)} sets; p: {_listed([run.p_value for run in runs])}",
    )
    bright = [_run(X, y, one, brightness=_BRIGHTNESS) for one in seeds]
    found = [run for run in bright if run.p_value < 0.02]
    yield Claim(
        f"the test of label shift fires where each domain has a brightness of its own (up to {_BRIGHTNESS} either way)",
        "none given (added here)",
        proportion(len(found), len(bright), unit="of the sets with p < 0.02"),
        "p < 0.02 in every set",
        len(found) == len(bright),
        Comparator("mean statistic without it", _mean(runs, "statistic")),
        f"digits, {len(bright)} sets; statistic {_mean(bright, 'statistic'):.1f}; p: {_listed([run.p_value for run in bright])}",
    )


# ---- claims that hold exactly


def _identifiable(seed: int) -> Iterator[Claim]:
    rng = np.random.default_rng(seed)
    m, k, r = 12, 3, 6
    C = rng.dirichlet(np.ones(m), size=k).T
    C[:k] = np.diag(rng.uniform(0.1, 0.5, k))  # each class has a word of its own
    C /= C.sum(axis=0)
    W = rng.dirichlet(np.ones(k), size=r).T
    bars: dict[Literal["anchor", "nmf"], float] = {"anchor": 1e-6, "nmf": 1e-2}
    for method, bar in bars.items():
        found = factorize_shares(C @ W, k, method, seed=seed)
        off = max(_off(found.W, W), _off(found.C.T, C.T))
        plain = _nmf(k, seed).fit(C @ W)
        _, alone = scaled(plain.transform(C @ W), plain.components_)
        note = "" if method == "anchor" else "; positive shares have other exact factors, so the anchors' are preferred"
        yield Claim(
            f"with anchor words and exact shares the factors are unique: {method}",
            "its theorem 1",
            Estimate.exact(off, "largest error of any entry"),
            f"< {bar:g}",
            bool(off < bar),
            Comparator("one random start of scikit-learn's NMF, p_d(y)", _off(alone, W)),
            f"{m} words, {k} topics, {r} documents" + note,
        )  # fmt: skip


def _nmf(k: int, seed: int) -> Any:
    options: dict[str, Any] = {"n_components": k, "init": "random", "max_iter": 20_000, "tol": 1e-8}
    return NMF(random_state=seed, **options)


def _off(found: np.ndarray, true: np.ndarray) -> float:
    order = np.abs(found[:, None] - true).sum(axis=2).argmin(axis=0)
    return float(np.abs(found[order] - true).max())


def _bayes(seed: int) -> Claim:
    rng = np.random.default_rng(seed)
    W = rng.dirichlet(np.ones(3), size=5).T
    p_d = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    means = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    x, domains = rng.normal(size=(500, 2)) * 2, rng.integers(0, 5, 500)
    like = np.stack([stats.multivariate_normal(mean).pdf(x) for mean in means], axis=1)  # p(x | y)
    joint = like @ (W * p_d)
    p_domain = joint / joint.sum(axis=1, keepdims=True)
    plain, own = like * (W @ p_d), like * W.T[domains]
    plain, own = plain / plain.sum(axis=1, keepdims=True), own / own.sum(axis=1, keepdims=True)

    def off(weights: np.ndarray | None) -> float:
        p = class_posterior(p_domain, W, weights)
        return float(max(np.abs(p - plain).max(), np.abs(domain_posterior(p, W, weights, domains) - own).max()))

    ours, ignored = off(p_d), off(None)
    return Claim(
        "class probabilities are exactly Bayes' where p(d | x) and p_d(y) are, for domains of unequal size",
        "its equations (sizes are taken as equal)",
        Estimate.exact(ours, "largest error"),
        "<= 1e-10, and > 0.1 with the domains' sizes ignored",
        ours <= 1e-10 and ignored > 0.1,
        Comparator("sizes ignored", ignored),
        "three Gaussian classes in a plane, five domains with shares 0.5 to 0.03, 500 points",
    )


def _topics(seed: int) -> Claim:
    rng = np.random.default_rng(seed)
    words, topics, documents, length = 30, 4, 12, 3000
    C = rng.dirichlet(np.full(words, 0.1), size=topics).T
    W = rng.dirichlet(np.full(topics, 0.3), size=documents).T
    counts = np.stack([rng.multinomial(length, column) for column in (C @ W).T], axis=1)
    domains = np.repeat(np.arange(documents), counts.sum(axis=0))
    text = np.concatenate([np.repeat(np.arange(words), column) for column in counts.T])
    ours = factorize_shares(cluster_shares(text, domains, words), topics, seed=seed)
    fits = []
    for start in range(10):
        model = _nmf(topics, start)
        C_theirs = model.fit_transform(counts / length)
        fits.append((float(model.reconstruction_err_), scaled(C_theirs, model.components_)[1]))
    theirs = min(fits, key=lambda fit: fit[0])[1]
    off = _off(ours.W, theirs)
    return Claim(
        "a finite set of inputs is topic modelling: words are inputs, documents domains, topics classes",
        "its section 3",
        Estimate.exact(off, "largest difference of p_d(y)"),
        "same W as scikit-learn's NMF on the document-term matrix after scaling (within 0.01)",
        off < 0.01,
        Comparator("distance of scikit-learn's W from the truth", _off(theirs, W)),
        f"{documents} drawn documents of {length:,} words, {topics} topics, {words} words; both the best of their starts",
    )
