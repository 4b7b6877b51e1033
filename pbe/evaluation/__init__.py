"""Evaluation: scores, benchmarks and their edits, ablations, human studies, the toy benchmark, the demo."""
