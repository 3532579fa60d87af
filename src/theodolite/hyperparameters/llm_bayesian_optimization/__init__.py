"""Hyperparameters tuned in ten to thirty evaluations by a language model that reads the task and the trials as text.

    start:      n configurations that the model recommends before any was tried                          (section 4)
    sample:     h ~ p(h | s'),  s' = best + alpha (max - min):  configurations for a score that is wanted  (section 6)
    predict:    p(s | h) by reading the model's own answer, or p(s better than tau | h)                   (section 5)
    choose:     the candidate with the largest expected improvement; evaluate it, and again

Each part can be used alone. `LLAMBO` is the loop, `LLAMBOSearchCV` tunes a scikit-learn estimator with it, and
`LLAMBO.as_optuna_sampler` puts it into optuna. A language model that is too weak for this is told by `evaluate_surrogate`:
where its predictions do not rank held-out configurations, an optimiser without one is the better choice, and stands here
with the same ask and tell (`RandomSearch`, `SobolSearch`, `TPESearch`, `GaussianProcessSearch`).

Source: Liu, Astorga, Seedat, van der Schaar, 2024, arXiv:2402.03921 (Large Language Models to Enhance Bayesian Optimization).
"""

__all__ = [
    "LLAMBO",
    "Account",
    "CandidateReport",
    "CandidateSampler",
    "DiscriminativeSurrogate",
    "GaussianProcessSearch",
    "GaussianProcessSurrogate",
    "GenerativeSurrogate",
    "LLAMBOSearchCV",
    "RandomSearch",
    "SobolSearch",
    "SurrogateReport",
    "TPESearch",
    "TaskContext",
    "desired_score",
    "evaluate_candidates",
    "evaluate_surrogate",
    "expected_improvement",
    "known_space",
    "normalized_regret",
    "rank_agreement",
    "warm_start",
]

from theodolite.hyperparameters.llm_bayesian_optimization.asking import Account
from theodolite.hyperparameters.llm_bayesian_optimization.baselines import (
    GaussianProcessSearch,
    GaussianProcessSurrogate,
    RandomSearch,
    SobolSearch,
    TPESearch,
)
from theodolite.hyperparameters.llm_bayesian_optimization.context import TaskContext
from theodolite.hyperparameters.llm_bayesian_optimization.metrics import (
    CandidateReport,
    SurrogateReport,
    evaluate_candidates,
    evaluate_surrogate,
    normalized_regret,
    rank_agreement,
)
from theodolite.hyperparameters.llm_bayesian_optimization.optimizer import LLAMBO
from theodolite.hyperparameters.llm_bayesian_optimization.sampler import CandidateSampler, desired_score
from theodolite.hyperparameters.llm_bayesian_optimization.search_cv import LLAMBOSearchCV, known_space
from theodolite.hyperparameters.llm_bayesian_optimization.surrogate import (
    DiscriminativeSurrogate,
    GenerativeSurrogate,
    expected_improvement,
)
from theodolite.hyperparameters.llm_bayesian_optimization.warm_start import warm_start
