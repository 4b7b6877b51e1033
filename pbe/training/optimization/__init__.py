"""Optimizer, averages, precision and sharding."""
