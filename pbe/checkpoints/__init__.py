"""Weights in files: names, layouts and conversions; no arithmetic."""
