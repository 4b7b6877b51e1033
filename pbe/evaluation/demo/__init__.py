"""The demo: stages and page."""
