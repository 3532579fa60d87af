"""Charts of the networks whose insides can be read, a file for each question."""
