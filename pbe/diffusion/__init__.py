"""The diffusion maths: schedule, solvers, guidance and training objective. Nothing here knows a network."""
