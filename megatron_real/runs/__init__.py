"""What a run leaves on disk and shows while it goes.

Its directory and who owns it, rollouts, metrics, curves, and which checkpoints are whole.
"""
