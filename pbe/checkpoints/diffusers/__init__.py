"""The diffusers folder layout."""
