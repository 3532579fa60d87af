"""Charts of the output space, a file for each question."""
