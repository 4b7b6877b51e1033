"""Evaluation: benchmark, feature tower, scores, picture sheets and the report page."""
