"""The latent cache: settings, building and reading."""
