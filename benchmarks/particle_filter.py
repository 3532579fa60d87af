"""Particle filters of four state-space models: programs, arrays, and the library particles in the same run.

Peer: particles (`pip install particles`), a bootstrap filter on arrays. Where it is not installed the file says so.

Run: python benchmarks/particle_filter.py [PATH]      writes particle_filter.json beside this file, or PATH
"""

import importlib
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from theodolite.predictions.inference import (
    Program,
    factor,
    hmm,
    hmm_log_evidence,
    mcmc,
    normal,
    scan,
    smc,
    smc_array,
)

ROUNDS = 5
STEPS = 1000
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


def log_normal(y: float, mean: np.ndarray, sd: np.ndarray | float) -> np.ndarray:
    return -0.5 * ((y - mean) / sd) ** 2 - np.log(sd) - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Model:
    """One model three times: start, move and weight on arrays, a program of observations, and a class of particles'."""

    name: str
    start: Callable[[int, np.random.Generator], np.ndarray]
    move: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    weigh: Callable[[np.ndarray, float], np.ndarray]
    program: Callable[[list[float]], Program]
    library: Callable[[Any], tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]]
    exact: Callable[[np.ndarray], float] | None = None

    def arrays(self, ys: np.ndarray, n: int) -> float:
        """Log evidence by `smc_array`."""
        return smc_array(self.start, self.move, self.weigh, ys, particles=n, rng=0).log_evidence

    def peer(self, ys: np.ndarray, n: int) -> float:
        """Log evidence by the bootstrap filter of particles, resampling systematically at every step."""
        particles: Any = importlib.import_module("particles")
        models: Any = importlib.import_module("particles.state_space_models")
        first, later, seen = self.library(importlib.import_module("particles.distributions"))
        names = {"PX0": lambda _: first(), "PX": lambda _, t, xp: later(xp), "PY": lambda _, t, xp, x: seen(x)}
        space = type("Space", (models.StateSpaceModel,), names)
        filtering = particles.SMC(fk=models.Bootstrap(ssm=space(), data=ys), N=n, ESSrmin=1.0)
        filtering.run()
        return float(filtering.logLt)


BELOW = ROWS.cumsum(axis=1)[:, :2]


def chain(step: Callable[[float, float], Program]) -> Callable[[list[float]], Program]:
    return lambda ys: scan(step, 0.0, ys)


def level(x: float, y: float) -> Program:
    return normal(x, 1).bind(lambda z: factor(normal(z, 1).log_prob(y)).map(lambda _: z))


def volatility(h: float, y: float) -> Program:
    return normal(0.95 * h, 0.3).bind(lambda z: factor(normal(0, math.exp(z / 2)).log_prob(y)).map(lambda _: z))


def growth(x: float, y: float) -> Program:
    moved = normal(0.5 * x + 25 * x / (1 + x * x), 2)
    return moved.bind(lambda z: factor(normal(z * z / 20, 1).log_prob(y)).map(lambda _: z))


def kalman(ys: np.ndarray) -> float:
    """Log evidence of the local level, exactly."""
    mean, variance, total = 0.0, 0.0, 0.0
    for y in ys.tolist():
        variance += 1
        total += normal(mean, math.sqrt(variance + 1)).log_prob(y)
        gain = variance / (variance + 1)
        mean, variance = mean + gain * (y - mean), gain
    return total


MODELS = (
    Model(
        "hidden Markov model, 3 states",
        lambda n, g: g.integers(0, 3, n),
        lambda x, g: (g.random(len(x))[:, None] > BELOW[x]).sum(axis=1),
        lambda x, y: log_normal(y, MEANS[x], 1.0),
        hmm,
        lambda d: (
            lambda: d.Categorical(p=ROWS.mean(axis=0)),
            lambda x: d.Categorical(p=ROWS[x]),
            lambda x: d.Normal(loc=MEANS[x], scale=1.0),
        ),
        lambda ys: hmm_log_evidence(ys.tolist()),
    ),
    Model(
        "local level",
        lambda n, g: np.zeros(n),
        lambda x, g: x + g.normal(size=len(x)),
        lambda x, y: log_normal(y, x, 1.0),
        chain(level),
        lambda d: (lambda: d.Normal(), lambda x: d.Normal(loc=x), lambda x: d.Normal(loc=x)),
        kalman,
    ),
    Model(
        "stochastic volatility",
        lambda n, g: np.zeros(n),
        lambda x, g: 0.95 * x + 0.3 * g.normal(size=len(x)),
        lambda x, y: log_normal(y, 0 * x, np.exp(x / 2)),
        chain(volatility),
        lambda d: (
            lambda: d.Normal(scale=0.3),
            lambda x: d.Normal(loc=0.95 * x, scale=0.3),
            lambda x: d.Normal(scale=np.exp(x / 2)),
        ),
    ),
    Model(
        "growth, not linear",
        lambda n, g: np.zeros(n),
        lambda x, g: 0.5 * x + 25 * x / (1 + x * x) + 2 * g.normal(size=len(x)),
        lambda x, y: log_normal(y, x * x / 20, 1.0),
        chain(growth),
        lambda d: (
            lambda: d.Normal(scale=2.0),
            lambda x: d.Normal(loc=0.5 * x + 25 * x / (1 + x * x), scale=2.0),
            lambda x: d.Normal(loc=x * x / 20),
        ),
    ),
)


def observations(model: Model) -> np.ndarray:
    """Drawn from the model's own states, each seen with unit noise; of volatility, noise of their own size."""
    rng = np.random.default_rng(0)
    x, ys = model.start(1, rng), []
    for _ in range(STEPS):
        x = model.move(x, rng)
        if model.name == "stochastic volatility":
            ys.append(math.exp(float(x[0]) / 2) * rng.normal())
        elif model.name.startswith("hidden"):
            ys.append(float(MEANS[x[0]]) + rng.normal())
        else:
            ys.append((float(x[0]) if model.name == "local level" else float(x[0]) ** 2 / 20) + rng.normal())
    return np.array(ys)


def main() -> None:
    installed = importlib.util.find_spec("particles") is not None
    result: dict[str, Any] = {
        "name": f"particle filters of state-space models with {STEPS:,} observations, one core",
        "peer": "particles (bootstrap filter)" + ("" if installed else " (not installed here: pip install particles)"),
    }
    for model in MODELS:
        ys = observations(model)
        works: dict[str, Callable[[], Any]] = {"smc_array": partial(model.arrays, ys, 1000)}
        if installed:
            works["particles"] = partial(model.peer, ys, 1000)
        taken = seconds(works)
        programs = seconds({
            "T=500": partial(smc, model.program(ys[:500].tolist()), particles=100, rng=0),
            "T=1000": partial(smc, model.program(ys.tolist()), particles=100, rng=0),
        }, 3)  # fmt: skip
        found: dict[str, Any] = {
            "arrays, 1,000 particles, seconds": {name: round(value, 3) for name, value in taken.items()},
            "log evidence": {name: round(work(), 2) for name, work in works.items()},
            "programs, 100 particles, seconds": {name: round(value, 3) for name, value in programs.items()},
            "ratio, T=1000 / T=500": round(programs["T=1000"] / programs["T=500"], 2),
            "particle-steps a second": round(100 * STEPS / programs["T=1000"]),
        }
        if model.exact is not None:
            found["log evidence, exactly"] = round(model.exact(ys), 2)
        if installed:
            found["ratio, smc_array / particles"] = round(taken["smc_array"] / taken["particles"], 3)
        result[model.name] = found
    walk = scan(lambda s, _: normal(s, 1), 0.0, range(50)).bind(lambda x: factor(-0.5 * (x - 3) ** 2).map(lambda _: x))
    sites = seconds({"mcmc": partial(mcmc, walk, steps=2000, rng=0)}, 1)
    result["2,000 Metropolis-Hastings steps of a 50-site trace, seconds"] = round(sites["mcmc"], 3)
    result["command"] = "OMP_NUM_THREADS=1 python benchmarks/particle_filter.py"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
