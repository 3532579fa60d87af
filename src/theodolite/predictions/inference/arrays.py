"""The bootstrap filter on arrays, for models that need no program."""

__all__ = ["smc_array"]

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from theodolite.core.errors import InputError
from theodolite.predictions.inference.algorithms import Particles, Rng, check_options, checked, effective_size
from theodolite.predictions.inference.population import Ancestors
from theodolite.predictions.inference.program import DegeneratePopulation


def smc_array(
    init: Callable[[int, np.random.Generator], np.ndarray],
    transition: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    log_likelihood: Callable[[np.ndarray, Any], np.ndarray],
    observations: Sequence[Any] | np.ndarray,
    *,
    particles: int,
    resampler: str = "systematic",
    ess_threshold: float = 1.0,
    rng: Rng,
) -> Particles:
    """The bootstrap filter on arrays, all particles at once, for state-space models that need no branching.

    init(n, generator): states (n, ...) before the first observation. Then for each observation y: x = transition(x, generator),
    and weights by log_likelihood(x, y) (n,), as in `scan`. values: the states after the last observation. Raises
    `DegeneratePopulation` where all weights are zero.
    """
    check_options(None, resampler, ess_threshold)
    if particles < 1 or len(observations) == 0:
        raise InputError(f"needs particles and observations, got {particles} and {len(observations)}")
    generator = np.random.default_rng(rng)
    x = np.asarray(init(particles, generator))
    own = np.arange(particles)
    logs = np.full(particles, -math.log(particles))
    ancestors = np.tile(own, (len(observations) - 1, 1))
    for t, y in enumerate(observations):
        if t > 0 and (ess_threshold == 1 or effective_size(logs) <= ess_threshold * particles):
            total = float(np.logaddexp.reduce(logs))
            picked = Ancestors(resampler, np.exp(logs - total))
            ancestors[t - 1] = picked.indices(np.maximum(generator.random(picked.n_uniforms), 2.0**-54))
            x, logs = x[ancestors[t - 1]], np.full(particles, total - math.log(particles))
        x = np.asarray(transition(x, generator))
        gain = np.asarray(log_likelihood(x, y), dtype=np.float64)
        if gain.shape != (particles,) or np.isnan(gain).any() or (gain == math.inf).any():
            raise InputError(
                f"log_likelihood must give {particles} numbers below +inf, got shape {gain.shape} at observation {t}"
            )
        logs = logs + gain
        if logs.max() == -math.inf:
            raise DegeneratePopulation(t + 1)
    return checked(x, logs, ancestors)
