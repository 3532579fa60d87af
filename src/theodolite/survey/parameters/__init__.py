"""Charts of the parameter space, a file for each question."""
