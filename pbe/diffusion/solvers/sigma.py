"""Solvers of the flow in sigma, the noise over the signal: Euler, Heun and LMS.

With ``x = x_t / sqrt(abar)``, data plus noise of deviation ``sigma = sqrt(1 / abar - 1)``, the probability
flow is ``dx / d sigma = noise(x)`` (Karras et al. 2022, equation 1 by sigma instead of time; the predicted
noise is ``-sigma`` times the score). The network gets ``x / sqrt(sigma^2 + 1)``, which has unit variance.
"""

from __future__ import annotations

from torch import Tensor

from pbe.diffusion.solvers.grid import sigma_grid
from pbe.diffusion.solvers.registry import Run, solver, weighted

LMS_ORDER = 4
# Two nodes of Gauss and Legendre integrate polynomials of degree up to 3 exactly: Adams-Bashforth of order 4.
GAUSS_NODES = (-(3.0**-0.5), 3.0**-0.5)


def _slope(run: Run, x: Tensor, index: int, sigma: float) -> Tensor:
    """Return dx / d sigma at level ``index``."""
    return run.noise(x / (sigma**2 + 1.0) ** 0.5, index)


@solver(sigma_grid, "linspace")
def euler(run: Run, x: Tensor) -> Tensor:
    """Euler's method (Karras et al. 2022, algorithm 1 without its correction); DDIM in another variable."""
    sigmas = run.grid.sigmas
    for index in range(len(run.grid)):
        x = x + (sigmas[index + 1] - sigmas[index]) * _slope(run, x, index, sigmas[index])
        run.report(index, x)
    return x


@solver(sigma_grid, "linspace", noise="always")
def euler_ancestral(run: Run, x: Tensor) -> Tensor:
    """Euler's method to a lower sigma, then fresh noise up to the level of the grid.

    The noise has the variance of the posterior of DDPM (Ho et al. 2020, equation 7), written in sigma.
    """
    sigmas = run.grid.sigmas
    for index in range(len(run.grid)):
        now, after = sigmas[index], sigmas[index + 1]
        up = after * (1.0 - (after / now) ** 2) ** 0.5
        down = after**2 / now  # sqrt(after^2 - up^2)
        x = x + (down - now) * _slope(run, x, index, now) + up * run.fresh(x, index)
        run.report(index, x)
    return x


@solver(sigma_grid, "linspace")
def heun(run: Run, x: Tensor) -> Tensor:
    """Heun's method of order 2 (Karras et al. 2022, algorithm 1): two calls a step, one in the last."""
    sigmas = run.grid.sigmas
    for index in range(len(run.grid)):
        now, after = sigmas[index], sigmas[index + 1]
        slope = _slope(run, x, index, now)
        ahead = x + (after - now) * slope
        if index + 1 < len(run.grid):
            slope = 0.5 * (slope + _slope(run, ahead, index + 1, after))
            ahead = x + (after - now) * slope
        x = ahead
        run.report(index, x)
    return x


@solver(sigma_grid, "linspace")
def lms(run: Run, x: Tensor) -> Tensor:
    """Linear multistep: Adams and Bashforth's method on the uneven grid of sigmas, of order up to 4."""
    sigmas = run.grid.sigmas
    history: list[Tensor] = []
    for index in range(len(run.grid)):
        history = [_slope(run, x, index, sigmas[index]), *history][:LMS_ORDER]
        nodes = [sigmas[index - back] for back in range(len(history))]
        x = x + weighted(lagrange_integrals(nodes, sigmas[index], sigmas[index + 1]), history)
        run.report(index, x)
    return x


def lagrange_integrals(nodes: list[float], start: float, end: float) -> tuple[float, ...]:
    """Integrate each Lagrange polynomial of up to four nodes from ``start`` to ``end``, exactly."""
    middle, half = (start + end) / 2.0, (end - start) / 2.0
    points = [middle + half * node for node in GAUSS_NODES]
    return tuple(
        half * sum(_lagrange(nodes, which, point) for point in points) for which in range(len(nodes))
    )


def _lagrange(nodes: list[float], which: int, point: float) -> float:
    """Return the Lagrange polynomial that is 1 at node ``which`` and 0 at all others, at ``point``."""
    product = 1.0
    for other, node in enumerate(nodes):
        if other != which:
            product *= (point - node) / (nodes[which] - node)
    return product
