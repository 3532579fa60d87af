"""Transport scaling beside the design of OTDD: label distances once for a pool against anew at each call.

OTDD (the published code's library) is unmaintained and not on PyPI, so its design is written out here: every call makes the
label-to-label table and the cost of its own rows. The solver is POT's in both; same rows, same values, in turns.

Run: python benchmarks/transport_scaling.py [PATH]      writes transport_scaling.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from theodolite.data.transport_scaling import Source, TransportScaling, dataset_transport
from theodolite.data.transport_scaling.transport import exact_transport

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

    def anew(reference: str) -> list[float]:
        return [
            dataset_transport((pool.X[rows] - centre) / scale, pool.y[rows], V, y_val, label_reference=reference).value
            for rows in draws
        ]

    seconds = cpu_seconds(
        {
            "ours": ours,
            "both classes from the validation rows, anew": lambda: anew("validation"),
            "as published, anew": lambda: anew("pooled"),
            "solver alone": lambda: [exact_transport(pool.cost[rows], np.full(ROWS, 1 / ROWS)) for rows in draws],
        }
    )
    # the same values: the validation rows are taken in another order, which does not change the distance
    off = float(np.abs(np.array(ours()) - anew("validation")).max())
    result = {
        "name": f"transport of {ROWS} rows of a pool to {TARGET}, {CLASSES} classes, {FEATURES} columns; CPU time, one core",
        "peer": "OTDD's design (label distances at every call), written out here",
        "peer as published / ours": round(seconds["as published, anew"] / seconds["ours"], 2),
        "validation reference anew / ours": round(
            seconds["both classes from the validation rows, anew"] / seconds["ours"], 2
        ),
        "ours without the solver, share": round(1 - min(1.0, seconds["solver alone"] / seconds["ours"]), 3),
        "one call of ours, milliseconds": round(1000 * seconds["ours"] / CALLS, 1),
        "largest difference of the values": off,
        "command": "OMP_NUM_THREADS=1 python benchmarks/transport_scaling.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
