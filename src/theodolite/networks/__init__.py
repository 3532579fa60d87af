"""Trainable models whose insides can be read."""
