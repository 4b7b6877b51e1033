"""The training tasks: diffusion and autoencoder."""
