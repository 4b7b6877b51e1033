"""Checkpoints of a run, signals and resuming."""
