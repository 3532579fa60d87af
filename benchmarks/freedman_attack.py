"""The attack on a reused holdout and the answers of Thresholdout, beside loops over rows as the published code has them.

Peer: the supplement of Dwork et al., 2015, Science 349, computes every correlation and every vote with a Python loop over
rows. `by_rows` below does that, on the same samples.

Run: python benchmarks/freedman_attack.py [PATH]      writes freedman_attack.json beside this file, or PATH
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np

from theodolite.core.memory import peak_memory
from theodolite.data.reusable_holdout import Thresholdout, freedman_attack

N, KEPT = 2_500, [25, 125, 250]
QUERIES = ROWS = 10_000


def by_rows(n: int, d: int, ks: list[int], seed: int) -> list[float]:
    """One repeat of the attack against the plain holdout; every sum over rows and features is a loop over rows."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(3):
        x = rng.standard_normal((n, d), dtype=np.float32)
        samples.append((x, (2 * rng.integers(0, 2, n) - 1).astype(np.float32)))
    correlations = []
    for x, y in samples[:2]:
        total = np.zeros(d)
        for row, label in zip(x, y, strict=True):
            total += row * label
        correlations.append(total / n)
    kept = (np.abs(correlations[0]) > 1 / math.sqrt(n)) & (np.abs(correlations[1]) > 1 / math.sqrt(n))
    kept &= correlations[0] * correlations[1] > 0
    order = np.argsort(-np.where(kept, np.abs(correlations[0]), -1))
    reported = []
    for k in ks:
        chosen = [j for j in order[:k] if kept[j]]
        signs = np.sign(correlations[0][chosen])
        for x, y in samples:
            right = 0.0
            for row, label in zip(x, y, strict=True):
                right += (np.sign(row[chosen] @ signs) * label + 1) / 2
            reported.append(right / n)
    return reported


def main() -> None:
    started = time.perf_counter()
    freedman_attack(N, N, KEPT, mechanism="standard", repeats=3)
    ours = (time.perf_counter() - started) / 3
    started = time.perf_counter()
    by_rows(N, N, KEPT, 0)
    theirs = time.perf_counter() - started
    rng = np.random.default_rng(0)
    train = rng.random((QUERIES, ROWS), dtype=np.float32)
    holdout = rng.random((QUERIES, ROWS), dtype=np.float32)
    x, y = rng.random((2 * ROWS, 1)), rng.integers(0, 2, 2 * ROWS)
    mechanism = Thresholdout(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:], preset="science")
    started = time.perf_counter()
    with peak_memory() as peak:
        mechanism.ask_many(train, holdout)
    many = time.perf_counter() - started
    asked = 2_000
    started = time.perf_counter()
    for i in range(asked):
        mechanism.ask((train[i], holdout[i]))
    one = (time.perf_counter() - started) / asked
    started = time.perf_counter()
    for i in range(asked):
        train[i].mean(dtype=np.float64), holdout[i].mean(dtype=np.float64)
    means = (time.perf_counter() - started) / asked
    result = {
        "name": f"a repeat of the attack at n = d = {N:,}, and {QUERIES:,} answers about {ROWS:,} rows, one core",
        "peer": "loops over rows, as in the supplement of Science 349",
        "ratios": {
            "a repeat of the attack, ours / by rows": round(ours / theirs, 3),
            "one answer, ours / its two means alone": round(one / means, 2),
        },
        "seconds": {
            "a repeat, ours": round(ours, 3),
            "a repeat, by rows": round(theirs, 3),
            "ask_many": round(many, 2),
        },
        "microseconds of an answer beyond its two means": round(1e6 * (one - means), 1),
        "MiB that ask_many takes": None if peak.bytes is None else round(peak.bytes / 2**20),
        "command": "OMP_NUM_THREADS=1 python benchmarks/freedman_attack.py",
    }
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
