"""Held-out problems and benchmarks: their figures, and a directory that can be resumed."""
