"""Targets, weights, losses and dropped conditions."""

from __future__ import annotations

import pytest
import torch

from pbe.config import ScheduleConfig
from pbe.diffusion.guidance import noise_from_v
from pbe.diffusion.objective import drop_condition, loss_weights, per_sample_loss, training_target
from pbe.diffusion.schedule import make_schedule

SCHEDULE = make_schedule(ScheduleConfig())
TIMESTEPS = torch.tensor([0, 1, 100, 500, 999])


def noised() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents, noise = torch.randn(2, len(TIMESTEPS), 4, 3, 3, dtype=torch.float64).unbind(0)
    return latents, noise, SCHEDULE.add_noise(latents, noise, TIMESTEPS)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_clean_latents_are_recovered_from_the_target(prediction: str) -> None:
    latents, noise, x_t = noised()
    target = training_target(prediction, latents, noise, TIMESTEPS, SCHEDULE)
    alpha = SCHEDULE.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    if prediction == "eps":
        recovered = (x_t - (1 - alpha).sqrt() * target) / alpha.sqrt()
    else:
        recovered = alpha.sqrt() * x_t - (1 - alpha).sqrt() * target
    torch.testing.assert_close(recovered, latents)


def test_noise_from_v_inverts_the_target() -> None:
    latents, noise, x_t = noised()
    v = training_target("v", latents, noise, TIMESTEPS, SCHEDULE)
    torch.testing.assert_close(noise_from_v(lambda x, t: v, SCHEDULE)(x_t, TIMESTEPS), noise)


def test_uniform_weights_are_one() -> None:
    assert torch.equal(loss_weights("uniform", "eps", TIMESTEPS, SCHEDULE), torch.ones(5))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_in_closed_form(gamma: float) -> None:
    eps = loss_weights("min_snr", "eps", TIMESTEPS, SCHEDULE, gamma)
    v = loss_weights("min_snr", "v", TIMESTEPS, SCHEDULE, gamma)
    assert eps.dtype == v.dtype == torch.float32
    for index, timestep in enumerate(TIMESTEPS.tolist()):
        alpha = float(SCHEDULE.alphas_cumprod[timestep])
        snr = alpha / (1 - alpha)
        assert float(eps[index]) == pytest.approx(min(snr, gamma) / snr, rel=1e-6)
        assert float(v[index]) == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-6)


def test_min_snr_weighs_the_error_of_the_clean_latents_alike_in_both_parameterisations() -> None:
    latents, noise, x_t = noised()
    guess = latents + 0.1 * torch.randn_like(latents)
    alpha = SCHEDULE.alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    guessed_noise = (x_t - alpha.sqrt() * guess) / (1 - alpha).sqrt()
    weighted = {}
    for prediction in ("eps", "v"):
        target = training_target(prediction, latents, noise, TIMESTEPS, SCHEDULE)
        output = training_target(prediction, guess, guessed_noise, TIMESTEPS, SCHEDULE)
        error = (output - target).square().mean(dim=(1, 2, 3))
        weighted[prediction] = error * loss_weights("min_snr", prediction, TIMESTEPS, SCHEDULE).double()
    snr = SCHEDULE.snr(TIMESTEPS)
    expected = snr.clamp(max=5.0) * (guess - latents).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighted["eps"], expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(weighted["v"], expected, rtol=1e-5, atol=0.0)


def test_loss_is_the_mean_square_of_each_sample() -> None:
    output, target = torch.randn(2, 3, 4, 5, 6).unbind(0)
    loss = per_sample_loss(output, target)
    assert loss.shape == (3,)
    for index in range(3):
        expected = torch.nn.functional.mse_loss(output[index], target[index])
        torch.testing.assert_close(loss[index], expected)
    everything = torch.ones(3, 1, 5, 6)
    torch.testing.assert_close(per_sample_loss(output, target, everything), loss)


def test_positions_that_do_not_count_are_left_out() -> None:
    output, target = torch.randn(2, 2, 4, 4, 4).unbind(0)
    valid = torch.zeros(2, 1, 4, 4)
    valid[0, :, :, :2] = 1.0
    valid[1, :, 1:] = 0.5
    loss = per_sample_loss(output, target, valid)
    error = (output - target).square()
    torch.testing.assert_close(loss, torch.stack([error[0, :, :, :2].mean(), error[1, :, 1:].mean()]))
    ruined = output.clone()
    ruined[0, :, :, 2:] = 1e6
    torch.testing.assert_close(per_sample_loss(ruined, target, valid), loss)


def test_sample_of_nothing_but_padding_counts_nothing() -> None:
    output = torch.randn(2, 4, 4, 4, requires_grad=True)
    valid = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    loss = per_sample_loss(output, torch.zeros(2, 4, 4, 4), valid)
    loss.mean().backward()
    assert float(loss[0].detach()) == 0.0
    assert bool(output.grad.isfinite().all())
    assert bool(output.grad[1].any())


def test_loss_is_computed_in_single_precision() -> None:
    output = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    assert float(per_sample_loss(output, torch.zeros_like(output))) == pytest.approx(90_000.0)


def test_condition_is_dropped_where_marked() -> None:
    condition, null = torch.randn(3, 2, 5), torch.randn(1, 1, 5, requires_grad=True)
    drop = torch.tensor([True, False, True])
    result = drop_condition(condition, null.expand(3, 2, 5), drop)
    assert torch.equal(result[1], condition[1])
    assert torch.equal(result[0], null[0].expand(2, 5))
    assert torch.equal(result[2], null[0].expand(2, 5))
    result.sum().backward()
    torch.testing.assert_close(null.grad, torch.full((1, 1, 5), 4.0))


def test_null_condition_takes_the_type_of_the_condition() -> None:
    condition = torch.randn(1, 1, 5, dtype=torch.bfloat16)
    assert drop_condition(condition, torch.randn(1, 1, 5), torch.tensor([True])).dtype == torch.bfloat16
