"""Charts of the input space, a file for each question."""
