"""Packing annotated images into shards."""
