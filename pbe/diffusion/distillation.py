"""The maths of distillation: steps of the flow as rotations, their targets, and the distance to them.

With the velocity ``v = sqrt(abar) e - sqrt(1 - abar) x_0`` a step of DDIM turns ``x`` by the angle between
two noise levels, ``z = cos x - sin v`` (Salimans and Ho 2022, appendix D). So an error of ``v`` is the error
of where a step ends over the sine of its angle, whatever the network predicts and however long the step is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers import FEW_STEPS_SOLVER, SolverChoice, get_solver
from pbe.diffusion.solvers.grid import Grid
from pbe.errors import UserError

TEACHER = SolverChoice("dpmpp_2m", spacing="trailing")  # in few steps the closest to many (docs/solvers.md)


def rotation(alpha: Tensor, alpha_next: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angle from levels ``alpha`` to ``alpha_next``.

    Levels are shares of signal variance ``(b,)`` or ``()`` in float64, the next ones larger. The results are
    ``(b or 1, 1, 1, 1)``, in the type and on the device of ``like``.
    """
    cosine = (alpha * alpha_next).sqrt() + ((1.0 - alpha) * (1.0 - alpha_next)).sqrt()
    sine = ((1.0 - alpha) * alpha_next).sqrt() - (alpha * (1.0 - alpha_next)).sqrt()
    return cosine.view(-1, 1, 1, 1).to(like), sine.view(-1, 1, 1, 1).to(like)


def step(x: Tensor, velocity: Tensor, alpha: Tensor, alpha_next: Tensor) -> Tensor:
    """Return the end of a DDIM step from ``x`` with this velocity, both ``(b, c, h, w)``."""
    cosine, sine = rotation(alpha, alpha_next, x)
    return cosine * x - sine * velocity


def velocity_to(x: Tensor, end: Tensor, alpha: Tensor, alpha_next: Tensor) -> Tensor:
    """Return the velocity with which a DDIM step goes from ``x`` to ``end``."""
    cosine, sine = rotation(alpha, alpha_next, x)
    return (cosine * x - end) / sine


def velocity_of(output: Tensor, x: Tensor, alpha: Tensor, prediction: str) -> Tensor:
    """Return the velocity at ``x`` that a network's output, ``eps`` or ``v``, stands for."""
    if prediction == "v":
        return output
    alpha = alpha.view(-1, 1, 1, 1)
    signal, sigma = alpha.sqrt().to(x), (1.0 - alpha).sqrt().to(x)
    return (output - sigma * x) / signal


def pseudo_huber(error: Tensor, width: float, valid: Tensor) -> Tensor:
    """Return the mean of ``sqrt(e^2 + width^2) - width`` over each sample's errors, ``(b,)`` float32.

    Args:
        error: ``(b, c, h, w)``.
        width: see :class:`pbe.config.DistillationConfig`.
        valid: ``(b, 1, h, w)`` in [0, 1], how much each position counts.
    """
    distance = (error.float() ** 2 + width**2).sqrt() - width
    counted = valid.sum(dim=(1, 2, 3)) * error.shape[1]
    return (distance * valid).sum(dim=(1, 2, 3)) / counted.clamp_min(torch.finfo(torch.float32).eps)


def grids(schedule: NoiseSchedule, steps: int, teacher_steps: int) -> tuple[Grid, Grid]:
    """Return the levels of student and teacher; the teacher's include the ends of the student's steps."""
    student = get_solver(FEW_STEPS_SOLVER.name).grid(schedule, steps, FEW_STEPS_SOLVER)
    teacher = get_solver(TEACHER.name).grid(schedule, teacher_steps, TEACHER)
    if teacher.alphas_next[teacher_steps // steps - 1 :: teacher_steps // steps] != student.alphas_next:
        raise UserError(
            f"'distillation.steps' is {steps}: no {teacher_steps} steps of the teacher, evenly spread over "
            f"{schedule.timesteps} timesteps, pass where those end; take divisors of {schedule.timesteps}"
        )
    return student, teacher
