"""Solvers of the reverse process: one registry and one signature.

``solver(predict_noise, x_T, schedule, steps, *, eta, generator, callback, settings) -> x_0``
"""

from pbe.diffusion.solvers.dpm import dpmpp_2m, dpmpp_sde, unipc
from pbe.diffusion.solvers.grid import Grid, karras_sigmas, uniform_timesteps
from pbe.diffusion.solvers.pseudo import ADAMS_BASHFORTH, ddim, lcm, plms, pndm
from pbe.diffusion.solvers.registry import SOLVERS, Callback, Solver, get_solver, needs_noise
from pbe.diffusion.solvers.settings import FEW_STEPS_SOLVER, SPACINGS, SolverChoice
from pbe.diffusion.solvers.sigma import euler, euler_ancestral, heun, lms

__all__ = [
    "ADAMS_BASHFORTH",
    "FEW_STEPS_SOLVER",
    "SOLVERS",
    "SPACINGS",
    "Callback",
    "Grid",
    "Solver",
    "SolverChoice",
    "ddim",
    "dpmpp_2m",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "get_solver",
    "heun",
    "karras_sigmas",
    "lcm",
    "lms",
    "needs_noise",
    "plms",
    "pndm",
    "uniform_timesteps",
    "unipc",
]
