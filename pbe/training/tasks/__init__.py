"""The training tasks: diffusion, distillation and autoencoder."""
