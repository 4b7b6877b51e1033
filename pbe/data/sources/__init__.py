"""Annotation sources: each format becomes the same :class:`~pbe.data.sources.annotations.Annotations`."""
