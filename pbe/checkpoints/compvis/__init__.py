"""The original's checkpoint layout."""
