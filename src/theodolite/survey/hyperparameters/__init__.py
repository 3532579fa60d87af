"""Charts of the hyperparameter space, a file for each question."""
