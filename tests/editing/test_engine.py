"""Settings of every numeric type, and callbacks of every form."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import SOLVERS, SolverChoice
from pbe.editing.engine import (
    Conditioning,
    check_callback,
    network_timesteps,
    noise_predictor,
    prepared_predictor,
    solve,
)
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import EditSettings
from pbe.errors import EditTypeError, EditValueError, UserError
from pbe.models import LatentDiffusion
from tests.editing.conftest import Scene
from tests.models.tiny import randomised, relative, tiny_model_config


class Method:
    """A callback that is a method, and an object that can be called."""

    def watch(self, step: int, timestep: float, latents: torch.Tensor) -> None: ...

    def __call__(self, *given: Any) -> None: ...


def named(more: int, step: int, timestep: float, latents: torch.Tensor, again: int = 0) -> None: ...


@pytest.mark.parametrize("callback", [None, print, Method().watch, Method(), partial(named, 1), lambda *_: 3])
def test_callbacks_of_every_form(callback: Any):
    check_callback(callback)


@pytest.mark.parametrize(
    "callback", [3, "print", lambda: None, lambda step, latents: None, named, partial(named, 1, 2, 3)]
)
def test_callbacks_that_cannot_be_called(callback: Any):
    with pytest.raises(EditTypeError, match=r"^callback: ") as raised:
        check_callback(callback)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("solver", ["plms", "unipc", "heun", "lms"])
def test_a_call_that_was_stopped_leaves_nothing_behind(pipe: PaintByExample, scene: Scene, solver: str):
    def edit(callback: Any = None) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        call = (scene.exemplar, scene.picture, scene.mask)
        settings = {"num_inference_steps": 3, "solver": solver, "generator": generator, "output_type": "np"}
        return pipe(*call, callback=callback, **settings).images

    def stop(step: int, timestep: float, latents: torch.Tensor) -> None:
        if step == 1:
            raise KeyError("the caller's own")

    first, seen = edit(), []
    with pytest.raises(KeyError, match="the caller's own"):
        edit(stop)
    np.testing.assert_array_equal(edit(lambda step, timestep, _: seen.append((step, timestep))), first)
    steps, timesteps = zip(*seen, strict=True)
    assert list(steps) == list(range(len(seen)))
    assert all(before > after for before, after in pairwise(timesteps))


@pytest.mark.parametrize("name", ["latents", "exemplar_embeds", "masked_image_latents"])
def test_given_numbers_that_are_none_are_named(pipe: PaintByExample, scene: Scene, name: str):
    shape = (1, 1, 16) if name == "exemplar_embeds" else (1, 4, 8, 10)
    given = {name: torch.full(shape, torch.nan)}
    with pytest.raises(EditValueError, match=f"{name}: its values must be finite numbers"):
        pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1, **given)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_numbers_that_grow_beyond_all_bounds_name_the_guidance(
    pipe: PaintByExample, scene: Scene, output_type: str
):
    with pytest.raises(EditValueError, match=r"not finite: .* too large a guidance_scale \(1e\+39\)"):
        pipe(
            scene.exemplar,
            scene.picture,
            scene.mask,
            num_inference_steps=2,
            guidance_scale=1e39,
            output_type=output_type,
        )


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_timesteps_of_all_calls_are_known_beforehand(solver: str, steps: int):
    """Latents with values that matter ask for what the single zero asked for, down to the last bit."""
    schedule = make_schedule(ScheduleConfig())
    choice, settings = SolverChoice(solver), EditSettings(steps=steps)
    asked: list[torch.Tensor] = []

    def predict(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        asked.append(timesteps[0])
        return torch.tanh(x_t)

    try:
        known = network_timesteps(choice, settings, schedule)
    except UserError:  # some need more steps
        known = torch.zeros(0)
    else:
        generator = torch.Generator().manual_seed(0)
        solve(choice, settings, predict, torch.randn(2, 4, 3, 3), schedule, generator=generator)
    assert known.tolist() == [float(timestep) for timestep in asked]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@torch.no_grad()
def test_prepared_predictor_gives_what_the_plain_one_gives(scale: float, prediction: str) -> None:
    config = tiny_model_config()
    config.prediction = prediction
    model, schedule = randomised(LatentDiffusion(config)), make_schedule(config.schedule)
    latents, masked, keep = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.rand(3, 1, 8, 8)
    conditioning = Conditioning(torch.randn(3, 1, 24), masked, keep)
    timesteps = torch.full((3,), 481)
    expected = noise_predictor(model, schedule, conditioning, scale)(latents, timesteps)
    known = torch.tensor([981, 481, 1])
    actual = prepared_predictor(model, schedule, conditioning, scale, known)(latents, timesteps)
    assert relative(actual, expected) < 5e-5  # guidance multiplies the rounding of both halves


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (1.5, 4)])
@torch.no_grad()
def test_scale_one_costs_one_half(scale: float, rows: int) -> None:
    model = randomised(LatentDiffusion(tiny_model_config()))
    seen = []
    model.unet.mid1.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    conditioning = Conditioning(torch.randn(2, 1, 24), torch.randn(2, 4, 8, 8), torch.ones(2, 1, 8, 8))
    schedule = make_schedule(model.config.schedule)
    predict = prepared_predictor(model, schedule, conditioning, scale, torch.tensor([7]))
    assert predict(torch.randn(2, 4, 8, 8), torch.tensor([7, 7])).shape == (2, 4, 8, 8)
    assert seen == [rows]


@torch.no_grad()
def test_interval_and_sharing_in_a_whole_solve() -> None:
    """An interval of everything is plain guidance, of nothing is none; sharing moves the end a little."""
    model = randomised(LatentDiffusion(tiny_model_config()), std=0.05).double()
    schedule = make_schedule(model.config.schedule)
    fixed = torch.randn(2, 4, 8, 8).double(), torch.ones(2, 1, 8, 8).double()
    conditioning, start = Conditioning(torch.randn(2, 1, 24).double(), *fixed), torch.randn(2, 4, 8, 8)
    choice, settings = SolverChoice("unipc"), EditSettings(steps=8)
    known = network_timesteps(choice, settings, schedule)

    def end(scale: float, **options: Any) -> torch.Tensor:
        predict = prepared_predictor(model, schedule, conditioning, scale, known, **options)
        return solve(choice, settings, predict, start, schedule, generator=torch.Generator())

    whole, alone = end(3.0), end(1.0)
    assert torch.equal(end(3.0, interval=(0.0, 1.0)), whole)
    assert relative(end(3.0, interval=(0.0, 0.0)), alone) < 1e-6
    assert relative(whole, alone) > 1e-3
    half = end(3.0, interval=(0.0, 0.5))
    assert relative(half, whole) > 1e-4
    assert relative(half, alone) > 1e-4
    assert 0.0 < relative(end(3.0, reuse=2), whole) < 0.2


@torch.no_grad()
def test_what_is_shared_never_crosses_an_end_of_the_interval() -> None:
    """Below the interval the inner levels are made anew: what was kept above it is of far other noise."""
    model, made = randomised(LatentDiffusion(tiny_model_config())), list[int]()
    model.unet.mid1.register_forward_hook(lambda _, inputs, __: made.append(len(inputs[0])))
    conditioning = Conditioning(torch.randn(2, 1, 24), torch.randn(2, 4, 8, 8), torch.ones(2, 1, 8, 8))
    timesteps, schedule = torch.tensor([950, 900, 500, 450, 100, 50]), make_schedule(model.config.schedule)
    options: dict[str, Any] = {"interval": (0.2, 0.8), "reuse": 10}
    predict = prepared_predictor(model, schedule, conditioning, 3.0, timesteps, **options)
    for timestep in timesteps:
        predict(torch.randn(2, 4, 8, 8), timestep.expand(2))
    assert made == [2, 4, 2]
