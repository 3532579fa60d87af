"""Hidden space: bases, dictionaries, probes, observables."""
