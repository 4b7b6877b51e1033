"""Training with Lightning: the two tasks, their callbacks, and the function that runs a configuration."""
