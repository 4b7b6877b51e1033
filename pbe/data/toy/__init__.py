"""The toy world: sprites, scenes and rendering."""
