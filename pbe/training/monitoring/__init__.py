"""Loggers, step log and sample grids."""
