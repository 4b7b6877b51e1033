"""The toy world's benchmark, its scores and sheets, and the demo that trains on it and shows it."""
