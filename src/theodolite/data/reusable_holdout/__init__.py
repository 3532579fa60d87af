"""A holdout that may be asked again and again: answers stay true although each question depends on earlier answers.

A statistical query q: X -> [0, 1] asks for its mean P[q] over a distribution, of which there is one sample S. Asking the
sample's own mean S[q] is safe for exp(n tau^2) questions that were fixed beforehand, but only for about n tau^2 that depend
on earlier answers: after d correlations were asked of n rows, a classifier built from pure noise seems to have accuracy

    Phi( sqrt(2 d / (pi n)) / sqrt(1 + n sigma^2) )                          (`adaptive_bias`; the truth is 1/2)

`Thresholdout` answers from the training rows while they agree with the holdout, and spends from a budget where not.
`PrivateMultiplicativeWeights` answers exponentially many questions about a finite universe. `Empirical`, `SampleSplitting`,
`GaussianNoise`, `SparseValidate` and `Ladder` are the alternatives; `freedman_attack` shows what each is worth.

Source: Dwork, Feldman, Hardt, Pitassi, Reingold, Roth, 2014, arXiv:1411.2664 (Preserving Statistical Validity in Adaptive
Data Analysis), and 2015, arXiv:1506.02629 (Generalization in Adaptive Data Analysis and Holdout Reuse).
"""

__all__ = [
    "Answer",
    "AttackResult",
    "AuditReport",
    "Bound",
    "BudgetExhausted",
    "Empirical",
    "GaussianNoise",
    "HoldoutLeakError",
    "Ladder",
    "Ledger",
    "NotAStatisticalQuery",
    "PrivateMultiplicativeWeights",
    "Query",
    "QueryRangeError",
    "RepeatedSeedWarning",
    "SampleSplitting",
    "SparseValidate",
    "Thresholdout",
    "adaptive_bias",
    "audit",
    "default_noise",
    "fingerprint",
    "freedman_attack",
    "holdout_ledger",
    "max_safe_queries",
    "required_sample_size",
    "reusable_scorer",
]

from theodolite.core.errors import BudgetExhausted
from theodolite.data.reusable_holdout.answers import (
    Answer,
    HoldoutLeakError,
    NotAStatisticalQuery,
    Query,
    QueryRangeError,
)
from theodolite.data.reusable_holdout.attack import AttackResult, freedman_attack
from theodolite.data.reusable_holdout.bounds import (
    Bound,
    adaptive_bias,
    default_noise,
    max_safe_queries,
    required_sample_size,
)
from theodolite.data.reusable_holdout.ledger import (
    AuditReport,
    Ledger,
    RepeatedSeedWarning,
    audit,
    fingerprint,
    holdout_ledger,
)
from theodolite.data.reusable_holdout.mechanisms import (
    Empirical,
    GaussianNoise,
    Ladder,
    PrivateMultiplicativeWeights,
    SampleSplitting,
    SparseValidate,
)
from theodolite.data.reusable_holdout.scorer import reusable_scorer
from theodolite.data.reusable_holdout.thresholdout import Thresholdout
