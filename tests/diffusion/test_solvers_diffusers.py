"""Every solver against diffusers' scheduler class of it, live: same network, same noise, same trajectory."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pbe.checkpoints.diffusers.scheduler import solver_from_scheduler
from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import get_solver
from pbe.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SCHEDULE = make_schedule(ScheduleConfig())
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}
KARRAS = ["dpmpp_2m", "dpmpp_sde", "unipc", "euler", "heun", "lms"]
SPACINGS = ["leading", "linspace", "trailing"]
SEED = 17


def network(x: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth, bounded function of x and t that mixes the channels."""
    mixing = torch.tensor([[1.0, -0.4], [0.3, 0.8]], dtype=x.dtype)
    return torch.tanh(torch.einsum("oc,bchw->bohw", mixing, x)) + 0.1 * torch.sin(timesteps.to(x) / 150).view(
        -1, 1, 1, 1
    )


def start() -> Tensor:
    return torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(3))


def reference(scheduler: Any, steps: int, eta: float = 0.0) -> tuple[Tensor, list[float]]:
    """Run diffusers' loop; return x at the start and after every step, and the timesteps."""
    scheduler.set_timesteps(steps)
    x = start() * scheduler.init_noise_sigma
    visited = [x]
    generator = torch.Generator().manual_seed(SEED)
    extra: dict[str, Any] = {"eta": eta, "generator": generator} if eta else {}
    if type(scheduler).__name__ in ("DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"):
        extra["generator"] = generator
    for t in scheduler.timesteps:
        noise = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(noise, t, x, **extra).prev_sample
        visited.append(x)
    return torch.stack(visited), scheduler.timesteps.tolist()


def ours(scheduler: Any, steps: int, eta: float = 0.0) -> tuple[Tensor, list[float], Tensor]:
    """Run the solver that the scheduler's own configuration chooses."""
    choice = solver_from_scheduler({**scheduler.config, "_class_name": type(scheduler).__name__})
    visited: list[Tensor] = []
    timesteps: list[float] = []

    def watch(index: int, timestep: float, x: Tensor) -> None:
        assert index == len(visited)
        visited.append(x)
        timesteps.append(timestep)

    result = get_solver(choice.name)(
        network,
        start(),
        SCHEDULE,
        steps,
        eta=eta,
        generator=torch.Generator().manual_seed(SEED),
        callback=watch,
        settings=choice,
    )
    return torch.stack(visited), timesteps, result


def compare(scheduler: Any, steps: int, eta: float = 0.0) -> None:
    expected, expected_timesteps = reference(scheduler, steps, eta)
    found, timesteps, result = ours(scheduler, steps, eta)
    after = expected[1:]
    if type(scheduler).__name__ == "HeunDiscreteScheduler":
        # its first of two calls a step only looks ahead; the last step has one call
        rows = [*range(1, len(after) - 1, 2), len(after) - 1]
        after, expected_timesteps = after[rows], expected_timesteps[::2]
    assert timesteps == pytest.approx(expected_timesteps, abs=2e-3)
    assert float((found - after).abs().max()) < 2e-5 * float(expected.abs().max())
    assert torch.equal(result, found[-1])


def make(name: str, **settings: Any) -> Any:
    kind, own = SCHEDULERS[name]
    return getattr(diffusers, kind)(**{**BETAS, **own, **settings})


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_fifty_steps(name: str, spacing: str) -> None:
    compare(make(name, timestep_spacing=spacing), 50)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", KARRAS)
def test_fifty_steps_with_karras_sigmas(name: str, spacing: str) -> None:
    compare(make(name, timestep_spacing=spacing, use_karras_sigmas=True), 50)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15, 30])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_numbers_of_steps(name: str, steps: int) -> None:
    for spacing in SPACINGS:
        if name == "heun" and steps == 1:
            continue  # diffusers' class ends up with no step at all
        compare(make(name, timestep_spacing=spacing), steps)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_noise(spacing: str, eta: float) -> None:
    compare(make("ddim", timestep_spacing=spacing), 20, eta)


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddim", {"set_alpha_to_one": True}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 1.5}),
        ("ddim", {"steps_offset": 0}),
        ("pndm", {"skip_prk_steps": False}),
        ("pndm", {"set_alpha_to_one": True}),
        ("dpmpp_2m", {"solver_order": 1}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}),
        (
            "dpmpp_2m",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        ),
        ("dpmpp_sde", {"solver_order": 1}),
        ("dpmpp_sde", {"solver_type": "heun"}),
        ("unipc", {"solver_order": 1}),
        ("unipc", {"solver_order": 3}),
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("unipc", {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3}),
        ("euler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
    ],
    ids=str,
)
def test_other_settings(name: str, settings: dict[str, Any], steps: int) -> None:
    compare(make(name, **settings), steps)


VALUES: dict[str, list[Any]] = {
    "timestep_spacing": SPACINGS,
    "steps_offset": [0, 1, 2],
    "set_alpha_to_one": [False, True],
    "clip_sample": [False, True],
    "clip_sample_range": [0.5, 1.0],
    "skip_prk_steps": [False, True],
    "use_karras_sigmas": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "solver_order": [1, 2, 3],
    "solver_type": ["midpoint", "heun", "bh1", "bh2"],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
    "euler_at_final": [False, True],
    "thresholding": [False, True],
    "rescale_betas_zero_snr": [False, True],
    "use_exponential_sigmas": [False, True],
    "interpolation_type": ["linear", "log_linear"],
    "variance_type": [None, "fixed_small"],
    "lower_order_final": [True, False],
}


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in SCHEDULERS.values()}))
def test_any_configuration_keeps_its_meaning(kind: str) -> None:
    """Settings at random, those of other classes among them: the same trajectory, or a refusal."""
    draw, compared = random.Random(kind), 0
    for _ in range(40):
        names = draw.sample(sorted(VALUES), draw.randint(0, 4))
        config = {"_class_name": kind, **BETAS} | {name: draw.choice(VALUES[name]) for name in names}
        try:
            solver_from_scheduler(config)
            made = getattr(diffusers, kind).from_config(config)
        except (UserError, NotImplementedError, ValueError):
            continue
        if not reference(made, 6)[0].isfinite().all():
            continue  # UniPC with bh1 does not arrive there
        compare(made, 6)
        compared += 1
    assert compared > 12


def test_configuration_of_the_official_folder() -> None:
    """Written in 2022: newer keys are missing, and one is of another class."""
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.10.0.dev0",
        **BETAS,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "trained_betas": None,
    }
    choice = solver_from_scheduler(config)
    assert (choice.name, choice.spacing, choice.karras) == ("pndm", "leading", False)
    compare(diffusers.PNDMScheduler.from_config(config), 50)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_plms_is_pndm_but_for_the_first_step_of_uneven_grids(spacing: str) -> None:
    """Where every step is as long as the next, the original's PLMS and diffusers' PNDM are one method."""
    runs = [get_solver(name)(network, start(), SCHEDULE, 20, spacing=spacing) for name in ("plms", "pndm")]
    difference = float((runs[0] - runs[1]).abs().max())
    assert (difference < 1e-5) == (spacing != "linspace")


def test_lcm_without_fresh_noise_is_ddim_in_trailing_steps_to_clean_latents() -> None:
    scheduler = diffusers.DDIMScheduler(
        **BETAS, set_alpha_to_one=True, clip_sample=False, timestep_spacing="trailing"
    )
    expected, timesteps = reference(scheduler, 4)
    visited = [start()]
    get_solver("lcm")(network, start(), SCHEDULE, 4, callback=lambda index, timestep, x: visited.append(x))
    assert timesteps == [999, 749, 499, 249]
    torch.testing.assert_close(torch.stack(visited), expected, rtol=1e-4, atol=1e-5)


def test_lcm_with_fresh_noise_is_what_latent_consistency_models_are_sampled_with() -> None:
    """Diffusers keeps a share of x, which is below a millionth at these timesteps."""
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    x, generator = start(), torch.Generator().manual_seed(SEED)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), t, x, generator=generator).prev_sample
    own = torch.Generator().manual_seed(SEED)
    found = get_solver("lcm")(network, start(), SCHEDULE, 4, eta=1.0, generator=own)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_lcm_mixes_predicted_and_fresh_noise_at_one_variance() -> None:
    """Where the network knows the noise, the deviation behind a step is that of its level at any eta."""
    clean, many = torch.full((4000, 1, 1, 1), 0.7), torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 1, 1, generator=many)
    for eta in (0.0, 0.5, 1.0):
        seen: list[Tensor] = []

        def exact(x: Tensor, timesteps: Tensor) -> Tensor:
            signal, sigma = SCHEDULE.signal_noise(timesteps, x)
            return (x - signal * clean) / sigma

        signal, sigma = SCHEDULE.signal_noise(torch.tensor([999]), clean)
        found = get_solver("lcm")(
            exact, signal * clean + sigma * noise, SCHEDULE, 3, eta=eta, generator=many,
            callback=lambda index, timestep, x, seen=seen: seen.append(x),
        )  # fmt: skip
        torch.testing.assert_close(found, clean, rtol=0, atol=2e-3)
        signal, sigma = SCHEDULE.signal_noise(torch.tensor([666]), clean)
        spread = (seen[0] - signal * clean) / sigma
        assert float(spread.std()) == pytest.approx(1.0, abs=0.05)
        together = float((spread * noise).mean())
        assert together == pytest.approx((1 - eta**2) ** 0.5, abs=0.06)
