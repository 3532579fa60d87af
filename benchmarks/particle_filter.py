"""Particle filters of a hidden Markov model: programs, arrays, and the library particles in the same run.

Peer: particles (`pip install particles`), a bootstrap filter on arrays. Where it is not installed the file says so.

Run: python benchmarks/particle_filter.py [PATH]      writes particle_filter.json beside this file, or PATH
"""

import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.predictions.inference import factor, hmm, hmm_log_evidence, mcmc, normal, scan, smc, smc_array

ROUNDS = 5
ROWS = np.array([[0.1, 0.4, 0.5], [0.2, 0.6, 0.2], [0.15, 0.7, 0.15]])
MEANS = np.array([-1.0, 1.0, 0.0])


def seconds(works: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median processor time of each call, taken in turns so that other load hits all alike; the first is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            if i:
                taken[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def arrays(ys: np.ndarray, n: int) -> float:
    below = ROWS.cumsum(axis=1)[:, :2]
    found = smc_array(
        lambda k, g: g.integers(0, 3, k),
        lambda x, g: (g.random(len(x))[:, None] > below[x]).sum(axis=1),
        lambda x, y: -0.5 * (y - MEANS[x]) ** 2 - 0.5 * math.log(2 * math.pi),
        ys, particles=n, rng=0,
    )  # fmt: skip
    return found.log_evidence


def peer() -> Callable[[np.ndarray, int], float] | None:
    """The bootstrap filter of particles on the same model, resampling systematically at every step."""
    try:
        particles: Any = importlib.import_module("particles")
    except ImportError:
        return None
    models: Any = importlib.import_module("particles.state_space_models")
    dists: Any = importlib.import_module("particles.distributions")

    class Model(models.StateSpaceModel):
        def PX0(self):
            return dists.Categorical(p=ROWS.mean(axis=0))

        def PX(self, t, xp):
            return dists.Categorical(p=ROWS[xp])

        def PY(self, t, xp, x):
            return dists.Normal(loc=MEANS[x], scale=1.0)

    def run(ys: np.ndarray, n: int) -> float:
        filtering = particles.SMC(fk=models.Bootstrap(ssm=Model(), data=ys), N=n, ESSrmin=1.0)
        filtering.run()
        return float(filtering.logLt)

    return run


def main() -> None:
    ys = np.random.default_rng(0).normal(size=1000)
    exact = hmm_log_evidence(ys.tolist())
    library = peer()
    works: dict[str, Callable[[], Any]] = {"smc_array": partial(arrays, ys, 1000)}
    if library is not None:
        works["particles"] = partial(library, ys, 1000)
    taken = seconds(works)
    programs = seconds({
        "T=500": partial(smc, hmm(ys[:500].tolist()), particles=100, rng=0),
        "T=1000": partial(smc, hmm(ys.tolist()), particles=100, rng=0),
    }, 3)  # fmt: skip
    walk = scan(lambda s, _: normal(s, 1), 0.0, range(50)).bind(lambda x: factor(-0.5 * (x - 3) ** 2).map(lambda _: x))
    chain = seconds({"mcmc": partial(mcmc, walk, steps=2000, rng=0)}, 1)
    result: dict[str, Any] = {
        "name": "particle filters of a hidden Markov model with 1,000 observations, one core",
        "peer": "particles (bootstrap filter)" + ("" if library else " (not installed here: pip install particles)"),
        "arrays, 1,000 particles, seconds": {name: round(value, 3) for name, value in taken.items()},
        "log evidence, exactly": round(exact, 2),
        "log evidence": {name: round(work(), 2) for name, work in works.items()},
        "programs, 100 particles, seconds": {name: round(value, 3) for name, value in programs.items()},
        "ratio, T=1000 / T=500": round(programs["T=1000"] / programs["T=500"], 2),
        "particle-steps a second": round(100_000 / programs["T=1000"]),
        "2,000 Metropolis-Hastings steps of a 50-site trace, seconds": round(chain["mcmc"], 3),
        "command": "OMP_NUM_THREADS=1 python benchmarks/particle_filter.py",
    }
    if library is not None:
        result["ratio, smc_array / particles"] = round(taken["smc_array"] / taken["particles"], 3)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
