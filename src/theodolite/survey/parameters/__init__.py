"""Charts of the parameter space, a file for each question."""

__all__ = ["intrinsic_dimension", "relevance_pruning", "tucker_updates"]

from theodolite.survey.parameters.pruning import relevance_pruning
from theodolite.survey.parameters.subspace import intrinsic_dimension
from theodolite.survey.parameters.updates import tucker_updates
