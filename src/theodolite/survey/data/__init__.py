"""Charts of the data space, a file for each question."""
