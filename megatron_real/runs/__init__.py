"""What a run leaves on disk and shows while it goes: directory, rollouts, metrics, progress, curves, profiles."""
