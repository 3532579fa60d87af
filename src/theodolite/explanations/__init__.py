"""Input space: attributions, counterfactuals, surrogates, fidelity."""
