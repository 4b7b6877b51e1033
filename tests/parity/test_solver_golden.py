"""Recorded trajectories of diffusers' schedulers through the solvers that their settings choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pbe.checkpoints.diffusers.scheduler import solver_from_scheduler
from pbe.config import ScheduleConfig
from pbe.diffusion.guidance import noise_from_v
from pbe.diffusion.schedule import NoiseSchedule, make_schedule
from pbe.diffusion.solvers import get_solver

SCHEDULE = make_schedule(ScheduleConfig())
COMMON = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False},
    "pndm": {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True},
    "dpmpp_2m": {"_class_name": "DPMSolverMultistepScheduler"},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "lms": {"_class_name": "LMSDiscreteScheduler"},
}
# What the recording asks for is 1e-4; the recorded numbers are float32.
TOLERANCE = {torch.float64: 5e-6, torch.float32: 2e-5}


def without_terminal_signal(schedule: NoiseSchedule) -> NoiseSchedule:
    """Rescale to no signal at the last timestep (Lin et al. 2024, algorithm 1), but for a trace of it.

    Nothing can be told about the data from noise predicted in pure noise: the solvers, which are given noise,
    cannot take exactly none.
    """
    roots = schedule.alphas_cumprod.sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return NoiseSchedule(schedule.betas, roots.square().clamp(min=1e-14))


def recordings(golden: Path) -> list[tuple[str, Any, dict[str, Any]]]:
    """Every recorded case of every set: its name, the arrays and what is known about it."""
    found = []
    for path in sorted((golden / "diffusers").glob("*/schedulers.json")):
        arrays = np.load(path.with_suffix(".npz"))
        cases = json.loads(path.read_text())
        noisy = {key.removesuffix("/noise") for key in arrays if "eta=" in key and key.endswith("/noise")}
        cases |= {
            name: {"kind": "ddim", "steps": len(arrays[f"{name}/t"]), "overrides": {}} for name in noisy
        }
        found += [(name, arrays, case) for name, case in cases.items()]
    return found


def network(mixing: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The recording's stand-in for a network: ``tanh(w x) + 0.1 sin(t / 150)``."""

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        wave = 0.1 * torch.sin(timesteps.to(x) / 150).view(-1, 1, 1, 1)
        return torch.tanh(torch.einsum("oc,bchw->bohw", mixing.to(x), x)) + wave

    return predict


def run(name: str, arrays: Any, case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, list[float]]:
    """Return x after every step, and the timesteps."""
    overrides = dict(case["overrides"])
    schedule = without_terminal_signal(SCHEDULE) if overrides.pop("rescale_betas_zero_snr", 0) else SCHEDULE
    predict = network(torch.from_numpy(arrays["w"]))
    if overrides.get("prediction_type") == "v_prediction":
        predict = noise_from_v(predict, schedule)
    choice = solver_from_scheduler({**COMMON, **CONFIGS[case["kind"]], **overrides})
    visited: list[Tensor] = []
    timesteps: list[float] = []

    def watch(index: int, timestep: float, x: Tensor) -> None:
        visited.append(x)
        timesteps.append(timestep)

    get_solver(choice.name)(
        predict,
        torch.from_numpy(arrays["x_unit"]).to(dtype),
        schedule,
        case["steps"],
        eta=float(name.partition("eta=")[2] or 0.0),
        callback=watch,
        settings=choice,
    )
    return torch.stack(visited), timesteps


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_trajectories(golden: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = recordings(golden)
    assert len(cases) >= 70
    far = {}
    for name, arrays, case in cases:
        if "eta=" in name:
            draws = iter(torch.from_numpy(arrays[f"{name}/noise"]))
            monkeypatch.setattr(
                "pbe.diffusion.solvers.registry.draw_noise", lambda *_, draws=draws: next(draws)
            )
        if "rescale_betas_zero_snr" in name and dtype != torch.float64:
            continue  # the trace of signal that is left needs double precision
        found, timesteps = run(name, arrays, case, dtype)
        expected = torch.from_numpy(arrays[f"{name}/x"]).to(dtype)
        assert timesteps == pytest.approx(arrays[f"{name}/t"].tolist(), abs=2e-3), name
        difference = float((found - expected[1:]).abs().max() / expected.abs().max())
        if not difference < TOLERANCE[dtype]:
            far[name] = difference
    assert not far


def test_sigmas(golden: Path) -> None:
    for name, arrays, case in recordings(golden):
        if f"{name}/sigmas" in arrays:
            choice = solver_from_scheduler({**COMMON, **CONFIGS[case["kind"]], **case["overrides"]})
            grid = get_solver(choice.name).grid(SCHEDULE, case["steps"], choice)
            np.testing.assert_allclose(grid.sigmas, arrays[f"{name}/sigmas"], rtol=1e-4, err_msg=name)
            assert grid.scale == pytest.approx(float(arrays[f"{name}/sigma0"]), rel=1e-5), name


def test_forward_process(golden: Path) -> None:
    for path in sorted((golden / "diffusers").glob("*/schedulers.npz")):
        arrays = np.load(path)
        np.testing.assert_allclose(SCHEDULE.betas, arrays["betas"], rtol=1e-6)
        np.testing.assert_allclose(SCHEDULE.alphas_cumprod, arrays["alphas_cumprod"], rtol=2e-5)
        latents, noise = (torch.from_numpy(arrays[key]) for key in ("x_unit", "add_noise/noise"))
        for key in arrays:
            if key.startswith("add_noise/t"):
                noised = SCHEDULE.add_noise(
                    latents, noise, torch.tensor([int(key.removeprefix("add_noise/t"))])
                )
                torch.testing.assert_close(noised, torch.from_numpy(arrays[key]), rtol=0, atol=1e-5)
