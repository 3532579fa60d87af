"""Search space: architectures, hyperparameters, prompts as parameters."""
