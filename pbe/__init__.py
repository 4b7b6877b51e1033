"""Paint by Example: exemplar-based image editing with a latent diffusion model."""
