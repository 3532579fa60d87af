"""Bayesian inference whose algorithms are chains of small arrows, and a check to machine precision that they keep the measure.

A program is built of draws and factors; its meaning is an unnormalised measure,

    [ret x] = delta_x    [bind m k](B) = int [m](dx) [k(x)](B)    [sample d] = d    [factor w] = e^w delta_None

and its evidence is the mass Z = [m](A). An inference representation has the same four operations and a meaning map that
commutes with them; an arrow t between two is valid where [t(p)] = [p] for every p, as measures and not only after normalising.
Algorithms are chains of valid arrows: SMC = finish after (advance after resample)^k after spawn, on Sequential(Population(R)).
Every algorithm here is such a chain, and `validate` runs it over an enumerating base to show that it keeps the measure.

Weights are log weights in nats, float64. ``rng`` is a numpy Generator or an int.

The paper proves and does not measure. Programs must end: its meaning of infinite ones by limits is not implemented.

Source: Scibior, Kammar, Vakar, Staton, Yang, Cai, Ostermann, Moss, Heunen, Ghahramani, 2018, arXiv:1711.03219.
"""

__all__ = [
    "HMM_OBSERVATIONS",
    "SUITE",
    "Chain",
    "DegeneratePopulation",
    "Distribution",
    "Enumeration",
    "EnumerationError",
    "Enumerator",
    "Example",
    "GridMismatch",
    "InferenceWarning",
    "NoValidStart",
    "Particles",
    "Population",
    "Program",
    "Replay",
    "Sampler",
    "Sequential",
    "Traced",
    "ValidityReport",
    "Weighted",
    "bernoulli",
    "beta",
    "branching_sprinkler",
    "categorical",
    "coins",
    "collapse",
    "condition",
    "dirichlet",
    "enumerate_exact",
    "factor",
    "gamma",
    "geometric",
    "hmm",
    "hmm_log_evidence",
    "importance",
    "mcmc",
    "mcmc_program",
    "mh_log_ratio",
    "mh_matrix",
    "mv_normal",
    "normal",
    "pmmh",
    "pmmh_program",
    "poisson",
    "pooled_log_evidence",
    "program",
    "recalibration",
    "ret",
    "rmsmc",
    "rmsmc_program",
    "sample",
    "scan",
    "smc",
    "smc2",
    "smc_array",
    "smc_program",
    "sprinkler",
    "two_sync",
    "uniform",
    "uniform_discrete",
    "untraced",
    "validate",
]

from theodolite.predictions.inference.algorithms import (
    Chain,
    Particles,
    collapse,
    importance,
    mcmc,
    mcmc_program,
    pmmh,
    pmmh_program,
    pooled_log_evidence,
    rmsmc,
    rmsmc_program,
    smc,
    smc2,
    smc_program,
)
from theodolite.predictions.inference.arrays import smc_array
from theodolite.predictions.inference.bases import Enumeration, Enumerator, Sampler, enumerate_exact
from theodolite.predictions.inference.distributions import (
    bernoulli,
    beta,
    categorical,
    dirichlet,
    gamma,
    geometric,
    mv_normal,
    normal,
    poisson,
    uniform,
    uniform_discrete,
)
from theodolite.predictions.inference.models import (
    HMM_OBSERVATIONS,
    SUITE,
    Example,
    branching_sprinkler,
    coins,
    hmm,
    hmm_log_evidence,
    recalibration,
    sprinkler,
    two_sync,
)
from theodolite.predictions.inference.population import Population, Weighted
from theodolite.predictions.inference.program import (
    DegeneratePopulation,
    Distribution,
    EnumerationError,
    GridMismatch,
    InferenceWarning,
    NoValidStart,
    Program,
    condition,
    factor,
    program,
    ret,
    sample,
    scan,
    untraced,
)
from theodolite.predictions.inference.representations import (
    Replay,
    Sequential,
    Traced,
    mh_log_ratio,
)
from theodolite.predictions.inference.validation import ValidityReport, mh_matrix, validate
