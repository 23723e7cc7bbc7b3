"""What a run leaves on disk and shows while it goes.

Its directory, rollouts, metrics, checkpoints, progress, curves and profiles.
"""
