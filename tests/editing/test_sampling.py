"""Settings of every numeric type, and callbacks of every form."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from pbe.config import ScheduleConfig
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import SOLVERS, SolverChoice
from pbe.editing.pipeline import PaintByExample
from pbe.editing.placement import Placement
from pbe.editing.preprocess import check_count, check_number
from pbe.editing.problems import EditTypeError, EditValueError
from pbe.editing.sampling import Sampling, check_callback
from pbe.errors import UserError
from tests.editing.conftest import Scene


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), np.float64(3), Fraction(3)]
)
def test_whole_numbers_of_every_type(value: Any):
    assert check_count("steps", value) == 3
    assert type(check_count("steps", value)) is int
    assert type(check_number("scale", value)) is float


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, EditTypeError, "steps: bool; it must be an int"),
        (np.bool_(True), EditTypeError, "it must be an int"),
        ("3", EditTypeError, "steps: str; it must be an int"),
        (None, EditTypeError, "steps: NoneType; it must be an int"),
        (torch.tensor(3), EditTypeError, "steps: Tensor; it must be an int"),
        (np.array([3]), EditTypeError, "steps: ndarray; it must be an int"),
        (2.5, EditTypeError, "steps is 2.5; it must be a whole number"),
        (np.float32(2.5), EditTypeError, "steps is 2.5; it must be a whole number"),
        (0, EditValueError, "steps is 0; it must be at least 1"),
        (float("nan"), EditValueError, "steps is nan; it must be at least 1"),
        (float("inf"), EditValueError, "steps is inf; it must be at least 1"),
        (10**30, EditValueError, "steps is too large: 10+; it must be at most 2147483647"),
    ],
)
def test_no_counts(value: Any, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        check_count("steps", value)


def test_numbers_beyond_the_floats():
    with pytest.raises(EditValueError, match="scale is too large a number"):
        check_number("scale", 10**400)


def test_settings_become_plain_numbers():
    sampling = Sampling(SolverChoice("ddim"), np.int64(4), np.float32(5), np.float64(0), None, 2.0)  # type: ignore[arg-type]
    assert [type(value) for value in (sampling.steps, sampling.guidance_scale, sampling.callback_steps)] == [
        int,
        float,
        int,
    ]
    placement = Placement("full", np.int64(8), 16.0, np.float32(0.5), None, np.bool_(True))  # type: ignore[arg-type]
    assert [type(value) for value in (placement.height, placement.width, placement.margin)] == [
        int,
        int,
        float,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 70_000}, "height is 70000; it must be at most 65535"),
        ({"margin": 1e300}, "margin is 1e.300; it must lie between 0 and 65535"),
        ({"feather": float("nan")}, "feather is nan; it must lie between 0 and 65535"),
        ({"preserve_background": "no"}, "preserve_background: str; it must be True or False"),
        ({"preserve_background": None}, "preserve_background: NoneType; it must be True or False"),
    ],
)
def test_placements_of_no_meaning(settings: dict[str, Any], message: str):
    whole = {"region": "full", "height": None, "width": None, "margin": 0.5, "feather": None}
    with pytest.raises((EditTypeError, EditValueError), match=message):
        Placement(**(whole | {"preserve_background": True} | settings)).check()


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
    with pytest.raises(EditValueError, match=r"infinite numbers: .* too large a guidance_scale \(1e\+39\)"):
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
    sampling = Sampling(SolverChoice(solver), steps, 5.0, 0.0, None, 1)
    asked: list[torch.Tensor] = []

    def predict(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        asked.append(timesteps[0])
        return torch.tanh(x_t)

    try:
        known = sampling.timesteps(schedule)
    except UserError:  # some need more steps
        known = torch.zeros(0)
    else:
        generator = torch.Generator().manual_seed(0)
        sampling.run(predict, torch.randn(2, 4, 3, 3), schedule, generator, lambda *_: None)
    assert known.tolist() == [float(timestep) for timestep in asked]
