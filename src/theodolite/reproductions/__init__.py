"""The papers' headline claims, measured: one file per paper, each with ``claims(scale, seed)``."""
