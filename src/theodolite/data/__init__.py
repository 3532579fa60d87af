"""Data space: selection, feature sets, shift, novel classes, honest holdouts."""
