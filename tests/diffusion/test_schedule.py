"""The noise schedule: the published values, double precision, and consistency of what is derived from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import NoiseSchedule, make_schedule

# alphas_cumprod of Stable Diffusion's schedule, to the digits in which it is given
PUBLISHED = {
    0: (0.99915, 5e-6),
    1: (0.998296, 5e-7),
    21: (0.980381, 5e-7),
    500: (0.276333, 5e-7),
    981: (0.0057755, 5e-8),
    999: (0.0046601, 5e-8),
}


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return make_schedule(ScheduleConfig())


def test_published_values(schedule: NoiseSchedule) -> None:
    for timestep, (value, tolerance) in PUBLISHED.items():
        assert float(schedule.alphas_cumprod[timestep]) == pytest.approx(value, abs=tolerance)
    assert float(schedule.alphas_cumprod[999].sqrt()) == pytest.approx(0.06826, abs=5e-6)
    assert float(schedule.betas[0]) == pytest.approx(0.00085, rel=1e-14)
    assert float(schedule.betas[-1]) == pytest.approx(0.012, rel=1e-14)


def test_double_precision_against_numpy(schedule: NoiseSchedule) -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(schedule.betas.numpy(), betas, rtol=1e-13)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1.0 - betas), rtol=1e-12)
    assert schedule.timesteps == 1000


def test_square_roots_are_evenly_spaced(schedule: NoiseSchedule) -> None:
    steps = schedule.betas.sqrt().diff()
    assert float(steps.max() - steps.min()) < 1e-15


def test_signal_and_noise_are_shares_of_variance(schedule: NoiseSchedule) -> None:
    timesteps = torch.tensor([0, 17, 999])
    signal, sigma = schedule.signal_noise(timesteps, torch.zeros(1, dtype=torch.float64))
    assert signal.shape == sigma.shape == (3, 1, 1, 1)
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(3, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(schedule.snr(timesteps), (signal / sigma).flatten() ** 2)
    assert schedule.signal_noise(timesteps, torch.zeros(1, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_noise_is_added_per_sample(schedule: NoiseSchedule) -> None:
    latents, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64).unbind(0)
    timesteps = torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(latents, noise, timesteps)
    for index, timestep in enumerate(timesteps.tolist()):
        alpha = float(schedule.alphas_cumprod[timestep])
        expected = alpha**0.5 * latents[index] + (1 - alpha) ** 0.5 * noise[index]
        torch.testing.assert_close(noisy[index], expected)


def test_other_lengths_and_ends() -> None:
    schedule = make_schedule(ScheduleConfig(timesteps=10, beta_start=0.01, beta_end=0.04))
    assert schedule.timesteps == 10
    assert schedule.betas.sqrt()[[0, 9]].tolist() == pytest.approx([0.1, 0.2])
