"""LIME, perturbations and interval of the simulation test, beside the designs of the peers in the same run.

Peers: the lime package samples in numpy and calls the model once too, but is not needed for its design: its step of a loop over
features that draws each feature's bins, then scikit-learn's Ridge, is written here; the original study's perturbation sampler
draws every sample in a Python loop; its bootstrap draws rows of data frames.

Run: python benchmarks/simulation_explanations.py [PATH]      writes simulation_explanations.json beside this file, or PATH
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge

from theodolite.explanations.simulatability import Lime, SimulationProtocol, effects

ROUNDS, FEATURES, LEVELS, DRAWS, LOOP_DRAWS = 5, 12, 5, 10_000, 100


def seconds(call: Callable[[], Any]) -> float:
    """Median of five calls."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def model(rows: np.ndarray) -> np.ndarray:
    """Cheap, so that what is timed is the explanation."""
    return 0.1 + 0.4 * (rows[:, 0] > 2) + 0.3 * (rows[:, 1] > 2)


def looped_perturbations(row: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """One sample after another: how many features, which, and another value for each."""
    out = []
    for _ in range(n):
        new = row.copy()
        for slot in rng.choice(FEATURES, rng.integers(1, 4), replace=False):
            new[slot] = rng.choice([value for value in range(LEVELS) if value != row[slot]])
        out.append(new)
    return np.array(out)


def ridge_by_features(x: np.ndarray, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Feature by feature from its frequencies, then scikit-learn's weighted ridge."""
    drawn = np.empty((500, FEATURES), dtype=int)
    for slot in range(FEATURES):
        values, counts = np.unique(x[:, slot], return_counts=True)
        drawn[:, slot] = rng.choice(values, 500, p=counts / counts.sum())
    z = (drawn == row).astype(float)
    near = np.exp(-((1 - z) ** 2).sum(axis=1) / (0.75**2 * FEATURES))
    return Ridge(alpha=1.0).fit(z, model(drawn), sample_weight=near).coef_


def looped_bootstrap(table: pd.DataFrame, draws: int, rng: np.random.Generator) -> list[float]:
    """Rows of readers and items drawn again as data frames."""
    grid = table.assign(gain=table["post"] - table["pre"]).pivot(
        index=["method", "user"], columns="item", values="gain"
    )
    found = []
    for _ in range(draws):
        for _, own in grid.groupby(level="method"):
            users, items = rng.integers(0, len(own), len(own)), rng.integers(0, own.shape[1], own.shape[1])
            found.append(float(own.iloc[users, items].to_numpy().mean()))
    return found


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, LEVELS, (5000, FEATURES))
    y = np.where(rng.random(5000) < 0.7, model(x) > 0.5, model(x) <= 0.5).astype(int)
    protocol = SimulationProtocol(model, x, y, [f"x{i}" for i in range(FEATURES)], categorical=range(FEATURES))
    lime, row = Lime().bind(protocol), x[0]
    codes = protocol.codes[0]
    table = pd.DataFrame(
        [(u, i, m) for m in "abcde" for u in range(20) for i in range(32)], columns=["user", "item", "method"]
    ).assign(test="forward", model=1, pre=lambda t: rng.random(len(t)) < 0.6, post=lambda t: rng.random(len(t)) < 0.7)
    table = table.astype({"pre": int, "post": int})
    ours = {
        "LIME of one input": seconds(lambda: lime.explain(row)),
        "10,000 perturbations": seconds(lambda: protocol.domain.perturb(codes, DRAWS, rng)),
        "10,000 draws x 5 methods": seconds(lambda: effects(table, DRAWS)),
    }
    theirs = {
        "LIME of one input": seconds(lambda: ridge_by_features(x, row, rng)),
        "10,000 perturbations": seconds(lambda: looped_perturbations(row, DRAWS, rng)),
        "10,000 draws x 5 methods": seconds(lambda: looped_bootstrap(table, LOOP_DRAWS, rng)) * DRAWS / LOOP_DRAWS,
    }
    result = {
        "name": "explanations and intervals of the simulation test, one core",
        "peer": "the designs of lime (feature by feature, then a ridge), of the original sampler (a loop over samples) and "
        f"of a bootstrap over data frames ({LOOP_DRAWS} draws measured, scaled to {DRAWS:,})",
        "ratio, ours / peer, seconds": {name: round(ours[name] / theirs[name], 5) for name in ours},
        "ours, milliseconds": {name: round(1000 * value, 2) for name, value in ours.items()},
        "peer, milliseconds": {name: round(1000 * value, 2) for name, value in theirs.items()},
        "command": "OMP_NUM_THREADS=1 python benchmarks/simulation_explanations.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
