"""Search spaces and the ask/tell protocol that every optimiser of hyperparameters here follows.

A `SearchSpace` names its parameters; each knows its bounds, how it is drawn, how it is written and how it is read back:

    Int(1, 15)   Float(1e-5, 0.1, "log")   Float(0.01, 0.99, "logit")   Ordinal((1, 2, 4, 8))   Categorical(("gini", "entropy"))

An `Optimizer` answers `ask()` with a configuration (a dict) and learns from `tell(config, score)`; `optimize` runs both and
can be stopped at any time and continued from a file.
"""

__all__ = [
    "Categorical",
    "Config",
    "Float",
    "Int",
    "Optimizer",
    "Ordinal",
    "Parameter",
    "SearchResult",
    "SearchSpace",
    "Trial",
    "best_so_far",
]

from theodolite.hyperparameters.space.optimizer import Optimizer, SearchResult, Trial, best_so_far
from theodolite.hyperparameters.space.parameters import Categorical, Float, Int, Ordinal, Parameter
from theodolite.hyperparameters.space.search_space import Config, SearchSpace
