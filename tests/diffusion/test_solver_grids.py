"""Timestep spacings, Karras sigmas and their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.diffusion.solvers import SOLVERS, SPACINGS, karras_sigmas, uniform_timesteps
from pbe.errors import UserError

SCHEDULE = make_schedule(ScheduleConfig())
ALPHAS = SCHEDULE.alphas_cumprod
STRIDED, SPARED, IN_SIGMA = (
    ("ddim", "plms", "pndm"),
    ("dpmpp_2m", "dpmpp_sde", "unipc"),
    ("euler", "heun", "lms"),
)


@pytest.mark.parametrize(
    ("name", "spacing", "expected"),
    [
        ("ddim", "uniform", (801, 601, 401, 201, 1)),
        ("ddim", "leading", (801, 601, 401, 201, 1)),
        ("ddim", "trailing", (999, 799, 599, 399, 199)),
        ("ddim", "linspace", (999, 749, 500, 250, 0)),
        ("pndm", "leading", (801, 601, 601, 401, 201, 1)),
        ("dpmpp_2m", "uniform", (801, 601, 401, 201, 1)),
        ("dpmpp_2m", "leading", (831, 665, 499, 333, 167)),
        ("dpmpp_2m", "trailing", (999, 799, 599, 399, 199)),
        ("lcm", "trailing", (999, 799, 599, 399, 199)),
        ("unipc", "linspace", (999, 799, 599, 400, 200)),
        ("euler", "leading", (801, 601, 401, 201, 1)),
        ("euler", "linspace", (999, 749.25, 499.5, 249.75, 0)),
        ("lms", "trailing", (999, 799, 599, 399, 199)),
    ],
)
def test_timesteps_of_five_steps(name: str, spacing: str, expected: tuple[float, ...]) -> None:
    assert SOLVERS[name].grid(SCHEDULE, 5, spacing=spacing).timesteps == expected


def test_own_spacings() -> None:
    own = {name: solver.spacing for name, solver in SOLVERS.items()}
    assert own.pop("ddim") == own.pop("plms") == "uniform"
    assert own.pop("pndm") == "leading"
    assert own.pop("lcm") == "trailing"
    assert set(own.values()) == {"linspace"}


def test_thirty_uniform_steps_are_thirty_one() -> None:
    assert len(SOLVERS["ddim"].grid(SCHEDULE, 30)) == 31
    assert len(SOLVERS["ddim"].grid(SCHEDULE, 30, spacing="leading")) == 30
    assert SOLVERS["ddim"].grid(SCHEDULE, 30).timesteps == tuple(reversed(uniform_timesteps(SCHEDULE, 30)))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_number_of_steps_fits_or_is_refused(name: str, spacing: str) -> None:
    for steps in [*range(1, 60), 333, 499, 500, 501, 998, 999, 1000, 1001]:
        try:
            grid = SOLVERS[name].grid(SCHEDULE, steps, spacing=spacing)
        except UserError as error:
            limit = int(str(error).rpartition(" ")[2])
            assert 500 <= limit < steps
            continue
        assert max(grid.timesteps) <= 999
        assert min(grid.timesteps) >= 0
        assert list(grid.timesteps) == sorted(grid.timesteps, reverse=True)
        assert all(after >= now for now, after in zip(grid.alphas, grid.alphas_next, strict=True))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [-1, 0])
def test_no_steps(name: str, spacing: str, steps: int) -> None:
    with pytest.raises(UserError, match=f"number of steps is {steps}; it must lie between 1 and"):
        SOLVERS[name].grid(SCHEDULE, steps, spacing=spacing)


@pytest.mark.parametrize("name", SOLVERS)
def test_unknown_spacing(name: str) -> None:
    with pytest.raises(UserError, match=r"'even'.*uniform, leading, linspace, trailing"):
        SOLVERS[name].grid(SCHEDULE, 5, spacing="even")


def test_an_offset_beyond_the_schedule() -> None:
    with pytest.raises(UserError, match="steps_offset is 300"):
        SOLVERS["ddim"].grid(SCHEDULE, 5, spacing="leading", offset=300)


@pytest.mark.parametrize("name", STRIDED)
def test_strided_steps_end_at_the_first_level_or_clean(name: str) -> None:
    grid = SOLVERS[name].grid(SCHEDULE, 10, spacing="leading")
    assert grid.alphas_next[-1] == float(ALPHAS[0])
    assert SOLVERS[name].grid(SCHEDULE, 10, spacing="leading", end="clean").alphas_next[-1] == 1.0
    assert grid.scale == 1.0


@pytest.mark.parametrize("name", SPARED + IN_SIGMA)
def test_the_others_end_clean_or_at_the_first_level(name: str) -> None:
    assert SOLVERS[name].grid(SCHEDULE, 10).sigmas[-1] == 0.0
    grid = SOLVERS[name].grid(SCHEDULE, 10, end="first")
    assert grid.sigmas[-1] == pytest.approx(float((1 / ALPHAS[0] - 1).sqrt()), rel=1e-12)


@pytest.mark.parametrize("name", IN_SIGMA)
def test_scale_of_the_start(name: str) -> None:
    solver = SOLVERS[name]
    last = float((1 / ALPHAS[-1] - 1).sqrt())
    assert last == pytest.approx(14.6146, abs=1e-3)
    for spacing in ("linspace", "trailing"):
        assert solver.grid(SCHEDULE, 10, spacing=spacing).scale == pytest.approx(last, rel=1e-12)
    leading = solver.grid(SCHEDULE, 10, spacing="leading")
    assert leading.scale == pytest.approx(math.hypot(leading.sigmas[0], 1.0), rel=1e-12)


def test_karras_sigmas_are_even_in_their_seventh_root() -> None:
    sigmas = karras_sigmas(80.0, 0.002, 18)
    assert sigmas[0] == pytest.approx(80.0)
    assert sigmas[-1] == pytest.approx(0.002)
    roots = np.diff(sigmas ** (1 / 7))
    assert np.ptp(roots) < 1e-12


@pytest.mark.parametrize("name", SPARED + IN_SIGMA)
def test_karras_grid(name: str) -> None:
    grid = SOLVERS[name].grid(SCHEDULE, 12, karras=True)
    ends = [float((1 / ALPHAS[t] - 1).sqrt()) for t in (999, 0)]
    np.testing.assert_allclose(grid.sigmas[:-1], karras_sigmas(*ends, 12), rtol=1e-9)
    assert len(grid) == 12
    sigmas = (1 / ALPHAS - 1).sqrt().numpy()
    told = np.interp(grid.timesteps, np.arange(1000), np.log(sigmas))
    # whole timesteps are up to half a timestep off, which is most in relation near the data
    np.testing.assert_allclose(told, np.log(grid.sigmas[:-1]), atol=0.2 if name in SPARED else 1e-9)
    assert all(isinstance(t, int) for t in grid.timesteps) == (name in SPARED)


def test_fractional_levels_lie_between_whole_ones() -> None:
    timesteps = torch.tensor([3.0, 3.5, 4.0, 999.0])
    signal, sigma = SCHEDULE.signal_noise(timesteps, torch.zeros(1, dtype=torch.float64))
    whole = SCHEDULE.signal_noise(torch.tensor([3, 4, 999]), torch.zeros(1, dtype=torch.float64))
    ratios, at_whole = (sigma / signal).flatten(), (whole[1] / whole[0]).flatten()
    torch.testing.assert_close(ratios[[0, 2, 3]], at_whole)
    assert float(ratios[1]) == pytest.approx(float((at_whole[0] + at_whole[1]) / 2))


def test_other_schedules() -> None:
    schedule = make_schedule(ScheduleConfig(timesteps=250))
    assert isinstance(schedule, NoiseSchedule)
    for name in SOLVERS:
        grid = SOLVERS[name].grid(schedule, 25, spacing="trailing")
        assert grid.timesteps[0] == 249
