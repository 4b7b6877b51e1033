"""Report pages and tables."""
