"""How fast every solver converges, and that its formulae are exact where theory says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pbe.diffusion.solvers import SOLVERS, Grid, SolverChoice
from pbe.diffusion.solvers.dpm import Step, dpm_weights, unified_weights
from pbe.diffusion.solvers.registry import Run
from pbe.diffusion.solvers.sigma import lagrange_integrals

MEAN, DEVIATION = 0.7, 0.5
FIRST, LAST = 0.006, 0.95
IN_SIGMA = ("euler", "euler_ancestral", "heun", "lms")


def sigma_of(alpha: float) -> float:
    return (1.0 / alpha - 1.0) ** 0.5


def even_grid(steps: int, variable: str) -> Grid:
    """A grid from FIRST to LAST, even in sigma or in log sigma; the timestep is the index of the level."""
    start, end = sigma_of(FIRST), sigma_of(LAST)
    shares = [index / steps for index in range(steps + 1)]
    if variable == "sigma":
        sigmas = [start + (end - start) * share for share in shares]
    else:
        sigmas = [start * (end / start) ** share for share in shares]
    alphas = tuple(1.0 / (1.0 + sigma**2) for sigma in sigmas)
    return Grid(tuple(range(steps)), alphas[:-1], alphas[1:])


def variance(alpha: float) -> float:
    """Variance of noised data, which are normal with MEAN and DEVIATION."""
    return alpha * DEVIATION**2 + 1.0 - alpha


def solve(name: str, grid: Grid, settings: dict[str, Any], x: Tensor) -> Tensor:
    """Integrate x, of unit variance, over a grid with the exact noise prediction of the Gaussian data."""

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        alpha = grid.alphas[int(timesteps[0])]
        return (1.0 - alpha) ** 0.5 * (x - alpha**0.5 * MEAN) / variance(alpha)

    inside, outside = (grid.alphas[0], grid.alphas_next[-1]) if name in IN_SIGMA else (1.0, 1.0)
    run = Run(grid, SolverChoice(name, **settings), predict, 0.0, torch.Generator().manual_seed(1), None)
    return SOLVERS[name].integrate(run, x / inside**0.5) * outside**0.5


def error(name: str, steps: int, variable: str, settings: dict[str, Any]) -> float:
    """Root mean square distance to the exact flow: the mean moves, deviations stretch."""
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    stretch = (variance(LAST) / variance(FIRST)) ** 0.5
    exact = LAST**0.5 * MEAN + (x - FIRST**0.5 * MEAN) * stretch
    found = solve(name, even_grid(steps, variable), settings, x)
    return float((found - exact).square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "variable", "settings", "order"),
    [
        ("ddim", "log sigma", {}, 1),
        ("ddim", "sigma", {}, 1),
        ("euler", "log sigma", {}, 1),
        ("dpmpp_2m", "log sigma", {"order": 1}, 1),
        # steps of even length in sigma are what the weights of PLMS are for
        ("plms", "sigma", {}, 3),
        ("plms", "log sigma", {}, 2),
        # the first and the last step of these are of lower order
        ("dpmpp_2m", "log sigma", {"variant": "heun"}, 2),
        ("dpmpp_2m", "log sigma", {"order": 3}, 2),
        ("dpmpp_2m", "log sigma", {"predicts": "noise"}, 2),
        ("unipc", "log sigma", {"order": 1}, 2),
        ("unipc", "log sigma", {}, 2),
        ("unipc", "log sigma", {"variant": "bh1"}, 2),
        ("unipc", "log sigma", {"order": 3}, 2),
        ("heun", "log sigma", {}, 2),
        ("heun", "sigma", {}, 2),
        ("lms", "log sigma", {}, 3),
        ("lms", "sigma", {}, 3),
    ],
    ids=str,
)
def test_order_of_convergence(name: str, variable: str, settings: dict[str, Any], order: int) -> None:
    errors = [error(name, steps, variable, settings) for steps in (80, 160, 320)]
    falls = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert min(falls) > order - 0.2
    if order == 1:
        assert max(falls) < 1.2


@pytest.mark.parametrize("name", ["plms", "dpmpp_2m", "unipc", "heun", "lms"])
def test_higher_orders_beat_ddim(name: str) -> None:
    for steps in (20, 50):
        assert error(name, steps, "log sigma", {}) < 0.3 * error("ddim", steps, "log sigma", {})


def test_euler_is_ddim_in_another_variable() -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    grid = even_grid(12, "sigma")
    torch.testing.assert_close(
        solve("euler", grid, {}, x), solve("ddim", grid, {}, x), rtol=1e-12, atol=1e-12
    )


def test_dpm_of_order_one_is_ddim() -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    grid = even_grid(12, "log sigma")
    for settings in ({"order": 1}, {"order": 1, "predicts": "noise", "end": "first"}):
        torch.testing.assert_close(
            solve("dpmpp_2m", grid, settings, x), solve("ddim", grid, {}, x), rtol=1e-12, atol=1e-12
        )


def quadrature(function: Callable[[float], float], start: float, end: float) -> float:
    """Simpson's rule, fine enough for smooth functions to count as exact."""
    pieces = 2000
    width = (end - start) / pieces
    inner = sum((4 if index % 2 else 2) * function(start + index * width) for index in range(1, pieces))
    return width / 3 * (function(start) + inner + function(end))


# Where predictions were made, in units of the step that follows, newest first.
PLACES = (0.0, -0.8, -1.9)


def dpm_integral(degree: int, order: int, exponent: float) -> float:
    """What DPM-Solver's weights make of ``u ** degree``."""
    weights = dpm_weights(Step(1.0, 1.0, exponent, PLACES[1:order]), "heun")
    return sum(weight * place**degree for weight, place in zip(weights, PLACES, strict=False))


def exact_integral(degree: int, exponent: float) -> float:
    return exponent * quadrature(lambda u: math.exp(exponent * (1.0 - u)) * u**degree, 0.0, 1.0)


@pytest.mark.parametrize("exponent", [-0.7, 0.7])
@pytest.mark.parametrize(("degree", "order"), [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)])
def test_dpm_integrates_polynomials_exactly(degree: int, order: int, exponent: float) -> None:
    found = dpm_integral(degree, order, exponent)
    assert found == pytest.approx(exact_integral(degree, exponent), abs=1e-10)


@pytest.mark.parametrize("exponent", [-0.7, 0.7])
def test_dpm_of_order_three_counts_half_the_curvature(exponent: float) -> None:
    """As its authors' code and diffusers do; see the docstring of the weights."""
    assert dpm_integral(2, 3, exponent) == pytest.approx(0.5 * exact_integral(2, exponent), abs=1e-10)


def test_the_midpoint_variant_agrees_to_its_order() -> None:
    """Both are of order two: the weights differ by the third power of the step."""

    def difference(exponent: float) -> float:
        step = Step(1.0, 1.0, exponent, (-1.0,))
        return abs(dpm_weights(step, "midpoint")[1] - dpm_weights(step, "heun")[1])

    assert difference(-0.1) == pytest.approx(difference(-0.2) / 4, rel=0.1)


@pytest.mark.parametrize("exponent", [-0.7, 0.7])
@pytest.mark.parametrize("ratios", [(-0.8, -1.9), (-0.8, 1.0), (-0.8, -1.9, 1.0)])
def test_unipc_integrates_polynomials_exactly(ratios: tuple[float, ...], exponent: float) -> None:
    """With the newest prediction taken off, p(0) = 0, so degrees 1 to the number of other predictions."""
    weights = unified_weights(exponent, ratios, "bh2")
    for degree in range(1, len(ratios) + 1):
        found = sum(weight / r * r**degree for weight, r in zip(weights, ratios, strict=True))
        integral = quadrature(lambda u, k=degree: math.exp(exponent * (1.0 - u)) * u**k, 0.0, 1.0)
        assert found == pytest.approx(exponent * integral, abs=1e-10)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_with_one_other_prediction_is_of_order_two(variant: str) -> None:
    def difference(exponent: float) -> float:
        exact = math.expm1(exponent) / exponent - 1.0
        return abs(unified_weights(exponent, (1.0,), variant)[0] - exact)

    assert difference(-0.1) == pytest.approx(difference(-0.2) / 4, rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_lms_integrates_polynomials_exactly(count: int) -> None:
    nodes = [3.0, 4.1, 5.7, 6.0][:count]
    weights = lagrange_integrals(nodes, 3.0, 2.2)
    for degree in range(count):
        found = sum(weight * node**degree for weight, node in zip(weights, nodes, strict=True))
        assert found == pytest.approx((2.2 ** (degree + 1) - 3.0 ** (degree + 1)) / (degree + 1), rel=1e-12)


@pytest.mark.parametrize("name", ["dpmpp_sde", "euler_ancestral", "ddim"])
def test_noisy_solvers_end_with_the_variance_of_the_data(name: str) -> None:
    """From noised Gaussian data to the same data with less noise: mean and variance must come out right."""
    noise = torch.randn(64, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grid = even_grid(400, "log sigma")
    x = FIRST**0.5 * MEAN + variance(FIRST) ** 0.5 * noise
    found = solve(name, grid, {}, x)
    # 65,536 values: the standard error of the mean is 0.002, of the variance 0.6 %
    assert float(found.mean()) == pytest.approx(LAST**0.5 * MEAN, abs=0.01)
    assert float(found.var()) == pytest.approx(variance(LAST), rel=0.03)


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_mean_of_the_sde_is_exact(variant: str, order: int, steps: int) -> None:
    """Of Gaussian data the predicted data are a martingale, so that no step is too long for the mean.

    The outcome is affine in the noise drawn: without any it is the mean, given the start. Noising,
    ``x_s = sqrt(abar_s / abar_t) x_t + noise``, tells the covariance of both ends and with it the exact one.
    """
    x = torch.full((1, 1, 1, 1), FIRST**0.5 * MEAN + 10.0, dtype=torch.float64)
    exact = LAST**0.5 * MEAN + 10.0 * (FIRST / LAST) ** 0.5 * variance(LAST) / variance(FIRST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pbe.diffusion.solvers.registry.draw_noise", lambda shape, _: torch.zeros(shape))
        settings = {"order": order, "variant": variant}
        found = solve("dpmpp_sde", even_grid(steps, "log sigma"), settings, x)
    assert float(found) == pytest.approx(exact, rel=1e-10)
