"""Solvers of the flow in the logarithm of signal over noise: DPM-Solver++, its SDE form and UniPC.

All write a step of length ``h`` in ``lambda = log(signal / noise)`` as

    x_t = carry x_s - weight * (integral of exp against the interpolated prediction)

with, for predictions of the data, ``carry = noise_t / noise_s`` and ``weight = signal_t`` and exponent
``y = -h`` (Lu et al. 2022b, proposition 4.1), and for predictions of the noise
``carry = signal_t / signal_s``, ``weight = noise_t`` and ``y = h`` (Lu et al. 2022a, proposition 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pbe.diffusion.schedule import NoiseSchedule
from pbe.diffusion.solvers.grid import Grid, log_snr_grid
from pbe.diffusion.solvers.registry import MakeGrid, Run, solver, weighted
from pbe.diffusion.solvers.settings import SolverChoice
from pbe.errors import UserError

FEW_STEPS = 15  # below, the last steps are of lower order, for stability


@dataclass(frozen=True)
class Step:
    """Coefficients of one step, and where earlier predictions lie.

    Attributes:
        carry: factor of x.
        weight: factor of the integral.
        exponent: y above; minus infinity for the step to clean data.
        ratios: ``(lambda_earlier - lambda_now) / h`` of earlier predictions, newest first; negative.
        fresh: deviation of the fresh noise that the step adds.
    """

    carry: float
    weight: float
    exponent: float
    ratios: tuple[float, ...] = ()
    fresh: float = 0.0


def _log_snr(alpha: float) -> float:
    """Return lambda, half the log of signal variance over noise variance."""
    return math.inf if alpha >= 1.0 else 0.5 * (math.log(alpha) - math.log1p(-alpha))


def _step(run: Run, index: int, order: int, stochastic: bool = False) -> Step:
    """Return the step from level ``index``, with ``order - 1`` earlier predictions."""
    now, after = run.grid.alphas[index], run.grid.alphas_next[index]
    h = _log_snr(after) - _log_snr(now)
    lengths = [_log_snr(run.grid.alphas[index - back]) - _log_snr(now) for back in range(1, order)]
    ratios = tuple(length / h for length in lengths)
    if run.settings.predicts == "noise":
        return Step((after / now) ** 0.5, (1.0 - after) ** 0.5, h, ratios)
    carry = ((1.0 - after) / (1.0 - now)) ** 0.5
    if not stochastic:
        return Step(carry, after**0.5, -h, ratios)
    # the SDE's exponents are twice as steep (Lu et al. 2022b, section 5)
    fresh = (1.0 - after) ** 0.5 * (-math.expm1(-2.0 * h)) ** 0.5
    return Step(carry * math.exp(-h), after**0.5, -2.0 * h, ratios, fresh)


def _prediction(run: Run, x: Tensor, index: int) -> Tensor:
    """Ask the network, and return what the settings interpolate: the noise or the data."""
    noise, alpha = run.noise(x, index), run.grid.alphas[index]
    return noise if run.settings.predicts == "noise" else (x - (1.0 - alpha) ** 0.5 * noise) / alpha**0.5


def _order(run: Run, index: int, final: int) -> int:
    """Return the order of a step: it rises with the history, and falls to 1 over the last ``final`` steps."""
    order = min(run.settings.order, index + 1)
    left = len(run.grid) - index
    return min(order, left) if left <= final else order


def _grid_for(*variants: str, stochastic: bool = False) -> MakeGrid:
    """Return the layout of a solver that refuses settings which it does not have."""

    def lay_out(schedule: NoiseSchedule, steps: int, settings: SolverChoice) -> Grid:
        if settings.variant not in (None, *variants):
            raise UserError(f"no solver variant '{settings.variant}'; there are: {', '.join(variants)}")
        if stochastic and (settings.predicts == "noise" or settings.order > 2):
            raise UserError("dpmpp_sde works on predictions of the data, with order 1 or 2")
        if settings.predicts == "noise" and settings.end != "first":
            raise UserError(
                "predictions of the noise cannot be carried to clean data: set the end to 'first'"
            )
        return log_snr_grid(schedule, steps, settings)

    return lay_out


@solver(_grid_for("midpoint", "heun"), "linspace")
def dpmpp_2m(run: Run, x: Tensor) -> Tensor:
    """DPM-Solver++ (2M) (Lu et al. 2022b, algorithm 2); with ``predicts=noise`` DPM-Solver (2022a)."""
    return _dpm(run, x, stochastic=False)


@solver(_grid_for("midpoint", "heun", stochastic=True), "linspace", noise="always")
def dpmpp_sde(run: Run, x: Tensor) -> Tensor:
    """SDE-DPM-Solver++ (2M) (Lu et al. 2022b, section 5): fresh noise in every step."""
    return _dpm(run, x, stochastic=True)


def _dpm(run: Run, x: Tensor, stochastic: bool) -> Tensor:
    variant = run.settings.variant or "midpoint"
    clean = run.grid.alphas_next[-1] == 1.0
    final = 2 if len(run.grid) < FEW_STEPS else int(clean)
    history: list[Tensor] = []
    for index in range(len(run.grid)):
        order = _order(run, index, final)
        history = [_prediction(run, x, index), *history][:3]
        step = _step(run, index, order, stochastic)
        x = step.carry * x - step.weight * weighted(dpm_weights(step, variant), history[:order])
        if stochastic:
            x = x + step.fresh * run.fresh(x, index)
        run.report(index, x)
    return x


def dpm_weights(step: Step, variant: str) -> tuple[float, ...]:
    """Return the weights of the predictions, newest first: the integral over their interpolation.

    Differences D1 and D2 of the predictions stand for derivatives in units of the step, weighted by the
    functions phi of Lu et al. 2022a, appendix B; ``midpoint`` takes half of phi_1 for phi_2, which is as good
    at order 2. D2 is half of the second derivative that phi_3 belongs to; the authors' code and diffusers
    have it so and results are compared with theirs, but it keeps order 3 from being exact on parabolas.
    """
    y = step.exponent
    phi_1 = math.expm1(y)
    if not step.ratios:
        return (phi_1,)
    back = -step.ratios[0]
    if len(step.ratios) == 1:
        phi_2 = 0.5 * phi_1 if variant == "midpoint" else phi_1 / y - 1.0
        return (phi_1 + phi_2 / back, -phi_2 / back)
    phi_2, phi_3 = phi_1 / y - 1.0, (phi_1 - y) / y**2 - 0.5
    between = -step.ratios[1] - back
    newer = np.array([1.0, -1.0, 0.0]) / back
    older = np.array([0.0, 1.0, -1.0]) / between
    second = (newer - older) / (back + between)
    first = newer + back * second
    total = phi_1 * np.array([1.0, 0.0, 0.0]) + phi_2 * first + phi_3 * second
    return tuple(float(weight) for weight in total)


@solver(_grid_for("bh2", "bh1"), "linspace")
def unipc(run: Run, x: Tensor) -> Tensor:
    """UniPC (Zhao et al. 2023): each prediction first corrects the step that led to it, then makes the next.

    The callback sees x as it was predicted, before its correction.
    """
    variant = run.settings.variant or "bh2"
    history: list[Tensor] = []
    before, step = x, None
    for index in range(len(run.grid)):
        prediction = _prediction(run, x, index)
        if step is not None:
            ratios = (*step.ratios, 1.0)
            x = _unified(before, step, [*history[: len(step.ratios) + 1], prediction], ratios, variant)
        history = [prediction, *history][:3]
        before, step = x, _step(run, index, _order(run, index, final=3))
        x = _unified(before, step, history[: len(step.ratios) + 1], step.ratios, variant)
        run.report(index, x)
    return x


def _unified(
    x: Tensor, step: Step, predictions: list[Tensor], ratios: tuple[float, ...], variant: str
) -> Tensor:
    """One step of UniP or, with a prediction at its end (ratio 1), of UniC (Zhao et al. 2023, section 3).

    Args:
        x: where the step starts.
        step: its coefficients.
        predictions: at the start, then one for each ratio.
        ratios: where the other predictions lie, in units of the step.
        variant: ``bh1`` or ``bh2``.
    """
    phi_1 = math.expm1(step.exponent)
    weights = unified_weights(step.exponent, ratios, variant)
    rest = tuple(weight / ratio for weight, ratio in zip(weights, ratios, strict=True))
    return step.carry * x - step.weight * weighted((phi_1 - sum(rest), *rest), predictions)


def unified_weights(y: float, ratios: tuple[float, ...], variant: str) -> list[float]:
    """Return ``B(h) a`` with ``R a = phi / B(h)``, the order conditions (Zhao et al. 2023, theorem 3.1).

    With a single other prediction any B(h) of the right order will do and ``a = 1/2``: that choice is where
    ``bh1`` (B = h) and ``bh2`` (B = e^h - 1) differ.
    """
    if not ratios:
        return []
    if len(ratios) == 1:
        return [0.5 * (y if variant == "bh1" else math.expm1(y))]
    phi, factorial, targets = math.expm1(y) / y - 1.0, 1.0, []
    for order in range(1, len(ratios) + 1):
        factorial *= order
        targets.append(phi * factorial)
        phi = phi / y - 1.0 / (factorial * (order + 1))
    powers = np.vander(np.array(ratios), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.array(targets))]
