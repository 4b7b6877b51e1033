"""Annotation sources: each turns one format into the same :class:`~pbe.data.sources.records.Annotations`."""
