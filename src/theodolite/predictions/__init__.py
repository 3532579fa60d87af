"""Output space: label geometry, prediction sets, inference."""
