"""Shards of images: index, reading, writing, remote files."""
