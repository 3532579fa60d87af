"""Charts of the parameter space, a file for each question."""

__all__ = ["intrinsic_dimension"]

from theodolite.survey.parameters.subspace import intrinsic_dimension
