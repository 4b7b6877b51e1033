"""The plan before a run: memory, time and batch size."""
