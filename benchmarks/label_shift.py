"""Latent label shift on scikit-learn's digits, beside scikit-learn's own parts put together the published way.

Peers: scikit-learn's NMF, ten starts one after another, on the same shares; scipy's non-negative least squares, row by row; and
the design of the authors' pipeline (one fit of the domain classifier that also scores its own training rows, k-means, one start
of NMF, the pseudo-inverse), written here out of scikit-learn's parts. Their code trains a network on a GPU and clusters with
faiss; it is not run.

Run: python benchmarks/label_shift.py [PATH]      writes label_shift.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from theodolite.data.latent_label_shift import (
    LatentLabelShift,
    class_posterior,
    cluster_shares,
    domain_posterior,
    factorize_shares,
    match_labels,
    simulate_label_shift,
)

K, M, DOMAINS, SEEDS = 10, 30, 20, 5
ROWS, ROWS_OF_PEER = 100_000, 5_000


def seconds(call: Callable[[], Any], rounds: int = 3) -> float:
    """Median time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def published_design(X: np.ndarray, domains: np.ndarray, seed: int) -> np.ndarray:
    """Classes (n,) with the classifier's scores on its own training rows, one start of NMF, and the pseudo-inverse."""
    model = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=1000)).fit(X, domains)
    q = model.predict_proba(X)
    clusters = KMeans(M, n_init=5, max_iter=100, random_state=seed).fit_predict(q)
    Q = cluster_shares(clusters, domains, M)
    factors = NMF(K, init="random", random_state=seed, max_iter=2000)
    C = factors.fit_transform(Q)
    W = factors.components_ * C.sum(axis=0)[:, None]
    W = W / W.sum(axis=0)
    return domain_posterior(class_posterior(q, W, None, "pinv"), W, None, domains).argmax(axis=1)


def whole_fits() -> dict[str, Any]:
    """Accuracy and time of both on the same simulated domains."""
    digits = load_digits()
    rows: dict[str, list[float]] = {"ours": [], "published design": [], "ours, seconds": [], "design, seconds": []}
    for seed in range(SEEDS):
        made = simulate_label_shift(digits.target, DOMAINS, seed=seed)
        X, y = digits.data[made.index] / 16, digits.target[made.index]
        began = time.perf_counter()
        ours = LatentLabelShift(K, n_clusters=M, seed=seed).fit(X, made.domains).labels_
        between = time.perf_counter()
        theirs = published_design(X, made.domains, seed)
        ended = time.perf_counter()
        rows["ours"].append(match_labels(ours, y).accuracy)
        rows["published design"].append(match_labels(theirs, y).accuracy)
        rows["ours, seconds"].append(between - began)
        rows["design, seconds"].append(ended - between)
    mean = {name: round(float(np.mean(values)), 3) for name, values in rows.items()}
    return mean | {"ratio of seconds, ours / design": round(mean["ours, seconds"] / mean["design, seconds"], 2)}


def parts() -> dict[str, Any]:
    """The factors and the posteriors alone."""
    rng = np.random.default_rng(0)
    C, W = rng.dirichlet(np.full(M, 0.2), size=K).T, rng.dirichlet(np.full(K, 0.05), size=DOMAINS).T
    Q = np.stack([rng.multinomial(60, column) / 60 for column in (C @ W).T], axis=1)
    starts = [NMF(K, init="random", random_state=s, max_iter=3000, tol=1e-5) for s in range(10)]
    ours, theirs = seconds(lambda: factorize_shares(Q, K)), seconds(lambda: [one.fit(Q) for one in starts])
    q = rng.dirichlet(np.full(DOMAINS, 0.3), size=ROWS)
    M_own = (W / W.sum(axis=1, keepdims=True)).T
    batch = seconds(lambda: class_posterior(q, W), 1)
    single = seconds(lambda: [nnls(M_own, row)[0] for row in q[:ROWS_OF_PEER]], 1) * ROWS / ROWS_OF_PEER
    return {
        "ten starts of NMF, 30 x 20, ratio of seconds, ours / scikit-learn": round(ours / theirs, 3),
        "least error, ours / scikit-learn": round(
            float(factorize_shares(Q, K).start_errors.min() / min(one.reconstruction_err_ for one in starts)), 5
        ),
        f"posteriors of {ROWS:,} rows, seconds, ours": round(batch, 2),
        "posteriors, ratio of seconds, ours / scipy's nnls row by row": round(batch / single, 3),
    }


def main() -> None:
    result = {
        "name": "latent label shift on digits, one core",
        "peer": "scikit-learn's NMF; scipy's nnls; the published pipeline's design out of scikit-learn's parts",
        f"whole fits, mean of {SEEDS} sets of domains": whole_fits(),
        "parts": parts(),
        "command": "OMP_NUM_THREADS=1 python benchmarks/label_shift.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
