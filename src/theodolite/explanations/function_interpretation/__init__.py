"""Tests interpretability tools on functions whose answers are known, and describes a unit of one's own model with the same loop.

    make_numeric, make_strings, make_neurons, load_published     the functions
    BlackBox, interpret                                          the experiment: an interpreter sees inputs and outputs only
    score_numeric, score_strings, unit_test, benchmark           how right its code and its words are

Published indicators are kept and completed: a cubic "succeeds" on half of the clean functions by the published normalisation
(a constant on a sixth), and a formula that misses a corrupted interval altogether passes on most of them. `NumericScore` has
the error beside the variance (r2_nmse), the error inside the interval (local_nmse) and the overlap of the stated interval
with the true one. Programs that interpreters write run in `theodolite.language.sandbox`.

Source: Schwettmann, Rott Shaham, Materzynska, Chowdhury, Li, Andreas, Bau, Torralba, 2023, arXiv:2309.03886 (FIND).
"""

__all__ = [
    "AnswerError",
    "BenchmarkRow",
    "BenchmarkTable",
    "BlackBox",
    "ConstantInterpreter",
    "Corruption",
    "DomainError",
    "EmbeddingBackend",
    "EmbeddingJudge",
    "EntityNeuron",
    "ExemplarInterpreter",
    "ExecutionJudge",
    "Interpretation",
    "LanguageModelBackend",
    "LanguageModelInterpreter",
    "LanguageModelJudge",
    "NumericFunction",
    "NumericScore",
    "OracleInterpreter",
    "PolynomialInterpreter",
    "PublishedNeuron",
    "PublishedStrings",
    "QueryBudgetExceeded",
    "Relation",
    "RelationNeuron",
    "StringFunction",
    "SymbolicInterpreter",
    "UnitTest",
    "UnitTestScore",
    "UnsafeCode",
    "activation_tests",
    "benchmark",
    "interpret",
    "load_published",
    "make_neurons",
    "make_numeric",
    "make_strings",
    "parse_answer",
    "run_sandboxed",
    "score_numeric",
    "score_strings",
    "unit_test",
]

from theodolite.explanations.function_interpretation.errors import DomainError, QueryBudgetExceeded
from theodolite.explanations.function_interpretation.interpreters import (
    ConstantInterpreter,
    LanguageModelInterpreter,
    OracleInterpreter,
    PolynomialInterpreter,
)
from theodolite.explanations.function_interpretation.judges import (
    EmbeddingJudge,
    ExecutionJudge,
    LanguageModelJudge,
    UnitTest,
    UnitTestScore,
    unit_test,
)
from theodolite.explanations.function_interpretation.loop import (
    AnswerError,
    BlackBox,
    Interpretation,
    interpret,
    parse_answer,
)
from theodolite.explanations.function_interpretation.neurons import (
    EmbeddingBackend,
    EntityNeuron,
    LanguageModelBackend,
    Relation,
    RelationNeuron,
    make_neurons,
)
from theodolite.explanations.function_interpretation.numeric import Corruption, NumericFunction, make_numeric
from theodolite.explanations.function_interpretation.published import (
    PublishedNeuron,
    PublishedStrings,
    load_published,
)
from theodolite.explanations.function_interpretation.scores import NumericScore, score_numeric, score_strings
from theodolite.explanations.function_interpretation.strings import StringFunction, make_strings
from theodolite.explanations.function_interpretation.symbolic import SymbolicInterpreter
from theodolite.explanations.function_interpretation.table import BenchmarkRow, BenchmarkTable, benchmark
from theodolite.explanations.function_interpretation.words import ExemplarInterpreter, activation_tests
from theodolite.language.sandbox import UnsafeCode, run_sandboxed
