"""DDIM and PLMS against closed forms: of Gaussian data the exact noise prediction and flow are known.

With data N(mu, s^2), x_t has the variance ``abar s^2 + 1 - abar``, the noise expected in it is
``sqrt(1 - abar) (x_t - sqrt(abar) mu) / (abar s^2 + 1 - abar)``, and the probability flow carries x from one
abar to another by moving it with the mean and stretching it by the ratio of the standard deviations.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import ADAMS_BASHFORTH, SOLVERS, ddim, get_solver, plms, uniform_timesteps
from pbe.errors import UserError

SCHEDULE = make_schedule(ScheduleConfig())
ALPHAS = SCHEDULE.alphas_cumprod
MEAN, DEVIATION = 0.7, 0.5


class GaussianData:
    """The exact noise predictor of Gaussian data; counts its calls."""

    def __init__(self, mean: float = MEAN, deviation: float = DEVIATION) -> None:
        self.mean, self.deviation, self.timesteps = mean, deviation, []

    def variance(self, alpha: float) -> float:
        return alpha * self.deviation**2 + 1.0 - alpha

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.shape == (len(x),)
        assert len(timesteps.unique()) == 1
        self.timesteps.append(int(timesteps[0]))
        alpha = float(ALPHAS[timesteps[0]])
        return (1.0 - alpha) ** 0.5 * (x - alpha**0.5 * self.mean) / self.variance(alpha)

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        stretch = (self.variance(end) / self.variance(start)) ** 0.5
        return end**0.5 * self.mean + (x - start**0.5 * self.mean) * stretch


def error_of(solver: str, steps: int, data: GaussianData) -> float:
    """Root mean square distance to the exact flow from the run's own first timestep to alphas_cumprod[0]."""
    x_T = torch.randn(4, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    start = float(ALPHAS[uniform_timesteps(SCHEDULE, steps)[-1]])
    exact = data.flow(x_T, start, float(ALPHAS[0]))
    return float((SOLVERS[solver](data, x_T, SCHEDULE, steps) - exact).square().mean().sqrt())


def slope(steps: list[int], errors: list[float]) -> float:
    """Order of convergence: least-squares slope of log error over log step size."""
    x = torch.tensor([-math.log(n) for n in steps], dtype=torch.float64)
    y = torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("deviation", [0.5, 1.5])
@pytest.mark.parametrize("mean", [0.0, MEAN])
def test_ddim_converges_with_order_one(mean: float, deviation: float) -> None:
    steps = [50, 100, 125, 200, 250, 500]
    errors = [error_of("ddim", n, GaussianData(mean, deviation)) for n in steps]
    assert 0.85 <= slope(steps, errors) <= 1.05
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("deviation", [0.5, 1.5])
@pytest.mark.parametrize("mean", [0.0, MEAN])
def test_plms_is_ten_times_closer_than_ddim(mean: float, deviation: float) -> None:
    data = GaussianData(mean, deviation)
    assert error_of("plms", 50, data) < 0.1 * error_of("ddim", 50, data)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_multistep_weights_integrate_polynomials_exactly(order: int) -> None:
    """Order k takes a polynomial of degree below k, known at 0, -1, -2, ..., exactly over the step to 1."""
    for degree in range(order):
        integral = sum(weight * (-back) ** degree for back, weight in enumerate(ADAMS_BASHFORTH[order]))
        assert integral == pytest.approx(1 / (degree + 1), abs=1e-14)


def test_plms_combines_the_last_four_predictions() -> None:
    """Every prediction is an axis of its own, so the outcome tells how much each of them weighs."""
    axes = list(torch.eye(6, dtype=torch.float64))
    calls = iter(axes)
    start = torch.zeros(1, 6, 1, 1, dtype=torch.float64)
    result = plms(lambda x, t: next(calls).view(1, 6, 1, 1), start, SCHEDULE, 5).flatten()
    combined = [
        (axes[0] + axes[1]) / 2,  # axes[1] is the look ahead of the first step, used only there
        (3 * axes[2] - axes[0]) / 2,
        (23 * axes[3] - 16 * axes[2] + 5 * axes[0]) / 12,
        (55 * axes[4] - 59 * axes[3] + 37 * axes[2] - 9 * axes[0]) / 24,
        (55 * axes[5] - 59 * axes[4] + 37 * axes[3] - 9 * axes[2]) / 24,
    ]
    expected = torch.zeros(6, dtype=torch.float64)
    alphas = [float(ALPHAS[t]) for t in (801, 601, 401, 201, 1, 0)]
    for now, after, noise in zip(alphas[:-1], alphas[1:], combined, strict=True):
        clean = (expected - (1 - now) ** 0.5 * noise) / now**0.5
        expected = after**0.5 * clean + (1 - after) ** 0.5 * noise
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("solver", ["ddim", "plms"])
def test_standard_normal_data_stay_where_they_are(solver: str) -> None:
    # x_t is standard normal at every t, so the flow is the identity
    x_T = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    result = SOLVERS[solver](GaussianData(0.0, 1.0), x_T, SCHEDULE, 500)
    assert float((result - x_T).abs().max()) < 0.01 * float(x_T.abs().max())


def ancestral_moments(data: GaussianData, steps: int) -> tuple[float, float]:
    """Mean and variance of DDIM's outcome at eta 1, where every step is affine in x plus fresh noise."""
    timesteps = uniform_timesteps(SCHEDULE, steps)
    mean, variance = 0.0, 1.0
    for index in reversed(range(len(timesteps))):
        now, after = float(ALPHAS[timesteps[index]]), float(ALPHAS[timesteps[index - 1] if index else 0])
        fresh = (1 - after) / (1 - now) * (1 - now / after)
        # noise = k (x - sqrt(now) mu), and x' = a x + b noise + fresh noise
        k = (1 - now) ** 0.5 / data.variance(now)
        a = (after / now) ** 0.5
        b = (1 - after - fresh) ** 0.5 - a * (1 - now) ** 0.5
        mean = (a + b * k) * mean - b * k * now**0.5 * data.mean
        variance = (a + b * k) ** 2 * variance + fresh
    return mean, variance


def test_ancestral_ddim_has_the_moments_of_its_recursion() -> None:
    data = GaussianData()
    x_T = torch.randn(64, 4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    result = ddim(data, x_T, SCHEDULE, 50, eta=1.0, generator=torch.Generator().manual_seed(6))
    mean, variance = ancestral_moments(data, 50)
    # 262,144 values: the standard error of the mean is 0.001, of the variance 0.3 %
    assert float(result.mean()) == pytest.approx(mean, abs=0.005)
    assert float(result.var()) == pytest.approx(variance, rel=0.015)


def test_ancestral_moments_approach_those_of_the_data() -> None:
    data, alpha = GaussianData(), float(ALPHAS[0])
    coarse, fine = ancestral_moments(data, 50), ancestral_moments(data, 500)
    assert fine[0] == pytest.approx(alpha**0.5 * data.mean, abs=0.02)
    assert fine[1] == pytest.approx(data.variance(alpha), rel=0.05)
    assert abs(fine[1] - data.variance(alpha)) < 0.2 * abs(coarse[1] - data.variance(alpha))


def test_ancestral_noise_is_one_draw_a_step_from_the_cpu_generator() -> None:
    x_T = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(11)
    ddim(GaussianData(), x_T, SCHEDULE, 10, eta=1.0, generator=generator)
    expected = torch.Generator().manual_seed(11)
    for _ in range(10):
        torch.randn(x_T.shape, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_eta_moves_between_flow_and_ancestral_sampling() -> None:
    x_T = torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def run(eta: float, seed: int) -> Tensor:
        return ddim(GaussianData(), x_T, SCHEDULE, 20, eta=eta, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0.0, 1), run(0.0, 2))
    assert torch.equal(run(0.5, 1), run(0.5, 1))
    assert not torch.equal(run(0.5, 1), run(0.5, 2))
    assert float((run(0.1, 1) - run(0.0, 1)).abs().mean()) < float((run(1.0, 1) - run(0.0, 1)).abs().mean())


@pytest.mark.parametrize("steps", [1, 2, 10, 30, 50, 500])
def test_number_of_network_calls(steps: int) -> None:
    x_T = torch.randn(2, 1, 2, 2)
    timesteps = uniform_timesteps(SCHEDULE, steps)
    single, multi = GaussianData(), GaussianData()
    ddim(single, x_T, SCHEDULE, steps)
    plms(multi, x_T, SCHEDULE, steps)
    assert single.timesteps == timesteps[::-1]
    # the first step of PLMS looks ahead to the timestep that follows
    second = timesteps[-2] if len(timesteps) > 1 else timesteps[-1]
    assert multi.timesteps == [timesteps[-1], second, *timesteps[-2::-1]]
    assert len(multi.timesteps) == len(timesteps) + 1


def test_timesteps_are_the_originals() -> None:
    assert uniform_timesteps(SCHEDULE, 50) == list(range(1, 982, 20))
    assert len(uniform_timesteps(SCHEDULE, 30)) == 31
    assert uniform_timesteps(SCHEDULE, 30)[-1] == 991
    assert len(uniform_timesteps(SCHEDULE, 400)) == 500
    assert uniform_timesteps(SCHEDULE, 1) == [1]


def test_no_number_of_steps_leaves_the_schedule() -> None:
    # a stride that divides 999 (3, 9, 27, 37, 111, 333 steps) leads the original to timestep 1000
    for steps in range(1, 501):
        originals = [t + 1 for t in range(0, 1000, 1000 // steps)]
        assert uniform_timesteps(SCHEDULE, steps) == [t for t in originals if t < 1000]


@pytest.mark.parametrize("solver", ["ddim", "plms"])
@pytest.mark.parametrize("steps", [-1, 0, 501, 1000])
def test_number_of_steps_out_of_range(solver: str, steps: int) -> None:
    with pytest.raises(UserError, match=rf"{steps}.*between 1 and 500"):
        SOLVERS[solver](GaussianData(), torch.zeros(1, 1, 1, 1), SCHEDULE, steps)


def test_plms_refuses_ancestral_noise() -> None:
    with pytest.raises(UserError, match="eta must be 0"):
        plms(GaussianData(), torch.zeros(1, 1, 1, 1), SCHEDULE, 10, eta=1.0)


def test_unknown_solver_names_those_there_are() -> None:
    assert get_solver("plms") is plms
    with pytest.raises(UserError, match=r"'midpoint'.*ddim.*plms"):
        get_solver("midpoint")


@pytest.mark.parametrize("solver", ["ddim", "plms"])
def test_callback_sees_every_step_in_order(solver: str) -> None:
    seen: list[tuple[int, int, Tensor]] = []
    x_T = torch.randn(1, 1, 2, 2)
    start = x_T.clone()
    result = SOLVERS[solver](
        GaussianData(), x_T, SCHEDULE, 30, callback=lambda index, t, x: seen.append((index, t, x))
    )
    assert [index for index, _, _ in seen] == list(range(31))
    assert [t for _, t, _ in seen] == uniform_timesteps(SCHEDULE, 30)[::-1]
    assert torch.equal(seen[-1][2], result)
    assert torch.equal(x_T, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("solver", ["ddim", "plms"])
def test_type_of_the_start_is_kept(solver: str, dtype: torch.dtype) -> None:
    result = SOLVERS[solver](GaussianData(), torch.randn(1, 1, 2, 2, dtype=dtype), SCHEDULE, 10)
    assert result.dtype == dtype
    assert bool(result.isfinite().all())
