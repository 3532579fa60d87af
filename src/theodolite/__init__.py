"""Surveys the spaces a machine-learning model lives in."""

__version__ = "0.1.0"
