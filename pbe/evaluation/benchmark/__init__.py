"""A benchmark's cases, the edits that a model or another system makes of them, the page of their scores."""
