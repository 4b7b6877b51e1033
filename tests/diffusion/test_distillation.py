"""Steps as rotations, where they have to lead, and the distance, against closed forms."""

from __future__ import annotations

import pytest
import torch

from pbe.config import ScheduleConfig
from pbe.diffusion.distillation import grids, pseudo_huber, rotation, step, velocity_of, velocity_to
from pbe.diffusion.schedule import make_schedule
from pbe.errors import UserError

SCHEDULE = make_schedule(ScheduleConfig())
NOW, AFTER = SCHEDULE.alphas_cumprod[[999, 700, 30]], SCHEDULE.alphas_cumprod[[600, 20, 0]]


def parts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    return clean, noise


def mixed(clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def test_a_step_keeps_clean_latents_and_noise_and_changes_their_shares():
    clean, noise = parts()
    x, v = mixed(clean, noise, NOW), velocity(clean, noise, NOW)
    assert torch.allclose(step(x, v, NOW, AFTER), mixed(clean, noise, AFTER), atol=1e-12)
    assert torch.allclose(step(x, v, NOW, torch.ones(3).double()), clean, atol=1e-12)
    assert torch.allclose(step(x, v, NOW, NOW), x, atol=1e-12)  # the boundary condition


def test_steps_turn_and_keep_lengths():
    cosine, sine = rotation(NOW, AFTER, torch.zeros(()).double())
    assert torch.allclose(cosine**2 + sine**2, torch.ones_like(cosine))
    assert (sine > 0).all()
    angle = torch.acos(NOW.sqrt()) - torch.acos(AFTER.sqrt())
    assert torch.allclose(torch.sin(angle), sine.flatten())


def test_the_velocity_to_an_end_leads_there_and_its_error_is_that_of_the_end_over_the_sine():
    clean, noise = parts()
    x, end = mixed(clean, noise, NOW), torch.randn_like(clean)
    v = velocity_to(x, end, NOW, AFTER)
    assert torch.allclose(step(x, v, NOW, AFTER), end, atol=1e-12)
    other = torch.randn_like(clean)
    _, sine = rotation(NOW, AFTER, x)
    missed = end - step(x, other, NOW, AFTER)
    assert torch.allclose(other - v, missed / sine, atol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_networks_of_either_kind_give_one_velocity(prediction: str):
    clean, noise = parts()
    x, v = mixed(clean, noise, NOW), velocity(clean, noise, NOW)
    output = noise if prediction == "eps" else v
    assert torch.allclose(velocity_of(output, x, NOW, prediction), v, atol=1e-10)


def test_the_distance_is_squared_for_small_errors_and_linear_for_large_ones():
    valid = torch.ones(1, 1, 2, 2)
    small, large = torch.full((1, 3, 2, 2), 1e-2), torch.full((1, 3, 2, 2), -7.0)
    assert float(pseudo_huber(small, 0.1, valid)) == pytest.approx(1e-4 / 0.2, rel=1e-2)
    assert float(pseudo_huber(large, 0.1, valid)) == pytest.approx(7.0 - 0.1, rel=1e-3)
    half = valid.clone()
    half[..., 1] = 0.0
    uneven = small.clone()
    uneven[..., 1] = 100.0  # padding
    assert torch.allclose(pseudo_huber(uneven, 0.1, half), pseudo_huber(small, 0.1, valid))
    assert float(pseudo_huber(small, 0.1, 0 * valid)) == 0.0


@pytest.mark.parametrize(("steps", "teacher_steps"), [(1, 2), (2, 8), (3, 12), (4, 12), (4, 48), (8, 16)])
def test_the_teacher_passes_where_steps_of_the_student_end(steps: int, teacher_steps: int):
    student, teacher = grids(SCHEDULE, steps, teacher_steps)
    every = teacher_steps // steps
    assert teacher.alphas_next[every - 1 :: every] == student.alphas_next
    assert teacher.alphas[::every] == student.alphas
    assert student.alphas_next[-1] == 1.0
    assert student.timesteps[0] == 999


def test_steps_that_the_teacher_does_not_pass_are_refused():
    with pytest.raises(UserError, match="pass where those end; take divisors of 1000"):
        grids(SCHEDULE, 16, 48)
