"""Charts of the hidden space, a file for each question."""
