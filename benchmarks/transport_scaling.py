"""Transport scaling beside OTDD's loop: label distances once for a pool against anew at each call.

OTDD (the library of the published code) is unmaintained and not on PyPI, so its loop is written out here, in NumPy and without
torch's cost of each small call: every call makes three label-to-label tables (each set with itself and with the other), the costs
of its own rows, and solves by geomloss's Sinkhorn as the published code sets it (outer entropy 0.01, unbiased; inner 0.1; the
temperature falls by 4 from the square of the diameter, one step each). The same loop with POT's exact solver in both places, as
ours uses it, tells how much of the ratio is the solver's. Same rows, in turns.

Run: python benchmarks/transport_scaling.py [PATH]      writes transport_scaling.json beside this file, or PATH
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from theodolite.data.transport_scaling import Source, TransportScaling, dataset_transport, label_distances
from theodolite.data.transport_scaling.transport import distances, exact_transport

ROUNDS, CALLS = 5, 5
ROWS, TARGET, FEATURES, CLASSES = 300, 400, 16, 10


def cpu_seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU time of each call, taken in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def labelled(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(CLASSES), rng.integers(CLASSES, size=n - CLASSES)]
    centres = 2 * np.random.default_rng(9).normal(size=(CLASSES, FEATURES))
    return rng.normal(size=(n, FEATURES)) + centres[y], y


def softmin(eps: float, cost: np.ndarray, potential: np.ndarray, log_mass: float) -> np.ndarray:
    """-eps log sum_j exp((potential_j - cost_ij) / eps + log mass)."""
    return -eps * logsumexp((potential - cost) / eps + log_mass, axis=1)


def geomloss(across: np.ndarray, eps: float, within: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """Sinkhorn as geomloss does it: averaged steps, one for each temperature; unbiased where the costs within are given."""
    n, m = across.shape
    high = float(across.max())
    steps = max(1, math.ceil(math.log(high / eps) / math.log(4)))
    temperatures = [high, *(high * 4.0**-k for k in range(steps)), eps]
    log_a, log_b = -math.log(n), -math.log(m)
    f, g = softmin(high, across, np.zeros(m), log_b), softmin(high, across.T, np.zeros(n), log_a)
    own = [np.zeros(len(cost)) for cost in within or ()]
    for t in temperatures:
        f, g = (f + softmin(t, across, g, log_b)) / 2, (g + softmin(t, across.T, f, log_a)) / 2
        own = [
            (h + softmin(t, cost, h, log)) / 2 for h, cost, log in zip(own, within or (), (log_a, log_b), strict=False)
        ]
    f, g = softmin(eps, across, g, log_b), softmin(eps, across.T, f, log_a)
    own = [softmin(eps, cost, h, log) for h, cost, log in zip(own, within or (), (log_a, log_b), strict=False)]
    return float(f.mean() + g.mean() - sum(h.mean() for h in own))


def published(X: np.ndarray, y: np.ndarray, V: np.ndarray, v: np.ndarray) -> float:
    """One call of OTDD."""
    one, two = ([rows[of == label] for label in np.unique(of)] for rows, of in ((X, y), (V, v)))

    def table(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
        out = np.zeros((len(first), len(second)))
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                if first is second and j <= i:
                    out[i, j] = out[j, i]
                else:
                    out[i, j] = geomloss(distances(a, b, 2), 0.1)
        return out

    across = distances(X, V, 2) + table(one, two)[y][:, v]
    within = distances(X, X, 2) + table(one, one)[y][:, y], distances(V, V, 2) + table(two, two)[v][:, v]
    return geomloss(across, 0.01, within)


def exact_loop(X: np.ndarray, y: np.ndarray, V: np.ndarray, v: np.ndarray) -> float:
    """The same by the exact solver: the same three tables, of which it needs one."""
    label_distances(X, y, X, y)
    label_distances(V, v, V, v)
    return dataset_transport(X, y, V, v, label_reference="pooled").value


def main() -> None:
    X_val, y_val = labelled(TARGET, 0)
    sources = [Source(str(k), *labelled(ROWS, k + 1)) for k in range(3)]
    scaling = TransportScaling(LogisticRegression(), sizes=(100, ROWS), grid_step=0.5, n_repeats=1).fit(
        sources, X_val, y_val
    )
    pool = scaling.pool_
    rng = np.random.default_rng(0)
    draws = [pool.draw(np.full(3, 1 / 3), ROWS, rng) for _ in range(CALLS)]
    centre, scale = X_val.mean(axis=0), X_val.std(axis=0)
    V = (X_val - centre) / scale

    def ours() -> list[float]:
        return [pool.distance(rows) for rows in draws]

    def each(call: Callable[..., float]) -> list[float]:
        return [call((pool.X[rows] - centre) / scale, pool.y[rows], V, y_val) for rows in draws]

    def anew(X: np.ndarray, y: np.ndarray, V: np.ndarray, v: np.ndarray) -> float:
        return dataset_transport(X, y, V, v).value

    seconds = cpu_seconds(
        {
            "ours": ours,
            "anew": lambda: each(anew),
            "published": lambda: each(published),
            "exact": lambda: each(exact_loop),
            "solver": lambda: [exact_transport(pool.cost[rows], np.full(ROWS, 1 / ROWS)) for rows in draws],
        }
    )
    # the same values: the validation rows are taken in another order, which does not change the distance
    off = float(np.abs(np.array(ours()) - each(anew)).max())
    soft = float(np.abs(np.array(each(published)) / each(exact_loop) - 1).max())
    result = {
        "name": f"transport of {ROWS} rows of a pool to {TARGET}, {CLASSES} classes, {FEATURES} columns; CPU time, one core",
        "peer": "OTDD's loop (label distances at every call, Sinkhorn), written out here",
        "OTDD's loop with its own solver / ours": round(seconds["published"] / seconds["ours"], 2),
        "OTDD's loop with POT's exact solver / ours": round(seconds["exact"] / seconds["ours"], 2),
        "ours without a cache / ours": round(seconds["anew"] / seconds["ours"], 2),
        "ours without the solver, share": round(1 - min(1.0, seconds["solver"] / seconds["ours"]), 3),
        "one call of ours, milliseconds": round(1000 * seconds["ours"] / CALLS, 1),
        "largest difference of our values with and without a cache": off,
        "largest relative error of OTDD's Sinkhorn": round(soft, 4),
        "command": "OMP_NUM_THREADS=1 python benchmarks/transport_scaling.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
