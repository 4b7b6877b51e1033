"""What all solvers share: names, signature, callback, noise, types and complaints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pbe.config import ScheduleConfig
from pbe.diffusion.guidance import noise_from_v
from pbe.diffusion.noise import draw_noise
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import SOLVERS, SolverChoice, get_solver, needs_noise
from pbe.errors import UserError

SCHEDULE = make_schedule(ScheduleConfig())
NAMES = [
    "ddim",
    "plms",
    "pndm",
    "dpmpp_2m",
    "dpmpp_sde",
    "unipc",
    "euler",
    "euler_ancestral",
    "heun",
    "lms",
    "lcm",
]
NOISY = ["dpmpp_sde", "euler_ancestral"]
KARRAS = [name for name in NAMES if name not in ("ddim", "plms", "pndm", "lcm")]


def predict(x: Tensor, timesteps: Tensor) -> Tensor:
    return torch.tanh(x) + 0.1 * torch.sin(timesteps.to(x) / 150).view(-1, 1, 1, 1)


def normal(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(name: str, x: Tensor, steps: int = 6, seed: int = 1, **options: Any) -> Tensor:
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return SOLVERS[name](predict, x, SCHEDULE, steps, **options)


def test_names() -> None:
    assert sorted(SOLVERS) == sorted(NAMES)
    for name in NAMES:
        assert get_solver(name) is SOLVERS[name]
        assert SOLVERS[name].name == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("Euler", "euler"),
        ("Euler a", "euler_ancestral"),
        ("euler-ancestral", "euler_ancestral"),
        ("k_lms", "lms"),
        ("DPM++", "dpmpp_2m"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpmsolver++", "dpmpp_2m"),
        ("DPM++ 2M SDE", "dpmpp_sde"),
        ("sde-dpmsolver++", "dpmpp_sde"),
        ("UniPC", "unipc"),
    ],
)
def test_other_spellings(alias: str, name: str) -> None:
    assert get_solver(alias) is SOLVERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_repeats_to_the_bit(name: str) -> None:
    x = normal(2, 1, 3, 3)
    assert torch.equal(run(name, x), run(name, x))
    assert torch.equal(x, normal(2, 1, 3, 3))


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_a_batch_do_not_touch_each_other(name: str) -> None:
    x = normal(3, 1, 3, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = run(name, x, generator=generators)
    alone = [run(name, x[i : i + 1], seed=seed) for i, seed in enumerate((5, 6, 7))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_callback_follows_the_grid(name: str) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    result = run(name, normal(1, 1, 2, 2), callback=lambda index, t, x: seen.append((index, t, x)))
    grid = SOLVERS[name].grid(SCHEDULE, 6)
    assert [index for index, _, _ in seen] == list(range(len(grid)))
    assert tuple(t for _, t, _ in seen) == grid.timesteps
    assert torch.equal(seen[-1][2], result)


@pytest.mark.parametrize(
    ("name", "calls"), [("ddim", 6), ("plms", 7), ("pndm", 7), ("unipc", 6), ("heun", 11), ("lms", 6)]
)
def test_number_of_network_calls(name: str, calls: int) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(timesteps)
        return predict(x, timesteps)

    SOLVERS[name](network, normal(2, 1, 2, 2), SCHEDULE, 6, spacing="leading")
    assert len(seen) == calls
    assert all(len(timesteps) == 2 for timesteps in seen)


@pytest.mark.parametrize("name", NAMES)
def test_networks_get_inputs_of_unit_variance(name: str) -> None:
    """The start is scaled to what the solver integrates, and every input back."""
    spread: list[float] = []

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        spread.append(float(x.std()))
        sigma = SCHEDULE.signal_noise(timesteps, x)[1]
        return sigma * x  # exact for standard normal data

    for spacing in ("leading", "trailing"):
        SOLVERS[name](
            network, normal(4, 4, 16, 16), SCHEDULE, 40, spacing=spacing, generator=torch.Generator()
        )
    assert min(spread) > 0.9
    assert max(spread) < 1.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_type_of_the_start_is_kept(name: str, dtype: torch.dtype) -> None:
    result = run(name, normal(1, 1, 2, 2, dtype=dtype))
    assert result.dtype == dtype
    assert bool(result.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 16])
def test_few_steps_end_in_numbers(name: str, steps: int) -> None:
    for spacing in ("uniform", "leading", "linspace", "trailing"):
        for karras in {False, name in KARRAS}:
            assert bool(run(name, normal(1, 1, 2, 2), steps, spacing=spacing, karras=karras).isfinite().all())


def test_who_needs_noise() -> None:
    assert [name for name in NAMES if needs_noise(name)] == NOISY
    assert [name for name in NAMES if needs_noise(name, 0.5)] == ["ddim", *NOISY, "lcm"]


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_one_draw_a_step(name: str) -> None:
    eta = 1.0 if name == "ddim" else 0.0
    generator, expected = (torch.Generator().manual_seed(11) for _ in range(2))
    run(name, normal(1, 2, 3, 3), generator=generator, eta=eta)
    if needs_noise(name, eta):
        for _ in SOLVERS[name].grid(SCHEDULE, 6).timesteps:
            torch.randn((1, 2, 3, 3), generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_a_generator_each_gives_each_its_own_noise() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    drawn = draw_noise((2, 3, 4), generators)
    for row, seed in zip(drawn, (1, 2), strict=True):
        assert torch.equal(row, torch.randn((3, 4), generator=torch.Generator().manual_seed(seed)))
    torch.manual_seed(4)
    free = draw_noise((2, 3))
    torch.manual_seed(4)
    assert torch.equal(free, torch.randn(2, 3))
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        draw_noise((3, 1), generators)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("ddim", "lcm")])
def test_eta_is_of_ddim_alone(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} .*eta must be 0"):
        run(name, normal(1, 1, 1, 1), eta=0.5)


@pytest.mark.parametrize("name", ["ddim", "plms", "pndm"])
def test_no_karras_sigmas_on_whole_strides(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} has no Karras sigmas.*euler"):
        run(name, normal(1, 1, 1, 1), karras=True)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpmpp_2m", {"variant": "bh1"}, "'bh1'.*midpoint, heun"),
        ("unipc", {"variant": "heun"}, "'heun'.*bh2, bh1"),
        ("dpmpp_2m", {"predicts": "noise"}, "cannot be carried to clean data"),
        ("dpmpp_sde", {"order": 3}, "order 1 or 2"),
        ("dpmpp_sde", {"predicts": "noise", "end": "first"}, "order 1 or 2"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SOLVERS[name].grid(SCHEDULE, 10, **settings)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("offset", [-1, 0.5, True, "1", None]),
        ("end", ["last", 0, []]),
        ("clip", [0, -1.0, float("nan"), float("inf"), True, "1"]),
        ("runge_kutta", [1, None, "no"]),
        ("order", [0, 4, 2.0, True, None]),
        ("variant", ["bh3", 1, {}]),
        ("predicts", ["v", None, []]),
    ],
)
def test_settings_without_a_meaning(setting: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{setting} is .*, which is not possible$"):
            SolverChoice("ddim", **{setting: value})


def test_runge_kutta_needs_four_steps() -> None:
    with pytest.raises(UserError, match="at least 4"):
        run("pndm", normal(1, 1, 1, 1), 3, runge_kutta=True)
    assert len(SOLVERS["pndm"].grid(SCHEDULE, 4, runge_kutta=True)) == 13


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("name", ["euler", "heun", "lms"])
def test_fractional_timesteps_of_v_networks(name: str, karras: bool) -> None:
    """A network of v and one of noise that say the same lead to the same latents."""

    def predict_v(x: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = SCHEDULE.signal_noise(timesteps, x)
        return (predict(x, timesteps) - sigma * x) / signal

    x = normal(2, 1, 3, 3, dtype=torch.float64)
    by_v = SOLVERS[name](noise_from_v(predict_v, SCHEDULE), x, SCHEDULE, 7, karras=karras)
    torch.testing.assert_close(by_v, run(name, x, 7, karras=karras), rtol=1e-9, atol=1e-9)
