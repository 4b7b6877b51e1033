"""Models of few steps in the pipeline: solver, steps and guidance, by their own weights or an adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pbe.checkpoints.adapters import open_adapter, save_adapter, with_adapters
from pbe.checkpoints.loading import open_checkpoint
from pbe.checkpoints.saving import check_layout, save_checkpoint
from pbe.config import ModelConfig
from pbe.diffusion.schedule import make_schedule
from pbe.editing.engine import Conditioning, complete, noise_predictor, prepared_predictor
from pbe.editing.pipeline import PaintByExample
from pbe.editing.settings import EditSettings
from pbe.errors import EditValueError, UserError
from pbe.models import LatentDiffusion
from pbe.models.adapters import adapter_state, add_adapter, remove_adapter
from tests.editing.conftest import Scene
from tests.editing.tiny_model import make_tiny_model

DISTILLED = {"few_steps": 2, "guidance_range": [5.0, 5.0]}


def student(prediction: str = "eps") -> LatentDiffusion:
    model = make_tiny_model(prediction)
    model.unet.take_guidance([1.0, 8.0], 2)
    assert model.unet.guidance_embed is not None
    with torch.no_grad():
        model.unet.guidance_embed.weight.normal_(std=0.3)
    model.config = replace(model.config, unet=model.unet.config)
    return model.eval().requires_grad_(False)


def quiet(model: LatentDiffusion) -> PaintByExample:
    pipe = PaintByExample(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe: PaintByExample, scene: Scene, **settings: object) -> np.ndarray:
    call = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe(scene.exemplar, scene.picture, scene.mask, **(call | settings)).images.numpy()


def calls_of(pipe: PaintByExample, scene: Scene, **settings: object) -> list[int]:
    """Samples in each call of the UNet."""
    seen: list[int] = []
    handle = pipe.model.unet.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    try:
        edit(pipe, scene, **settings)
    finally:
        handle.remove()
    return seen


def test_an_edit_takes_as_many_calls_as_the_model_is_meant_for(scene: Scene):
    pipe = quiet(student())
    assert pipe.solver == "lcm"
    assert calls_of(pipe, scene) == [1, 1]
    assert (pipe.solver_steps(), pipe.solver_steps(50)) == (2, 50)
    assert quiet(make_tiny_model()).solver_steps() == 50
    assert calls_of(pipe, scene, num_inference_steps=8) == [1] * 8
    assert calls_of(pipe, scene, solver="ddim", num_inference_steps=3, guidance_scale=7.0) == [1] * 3
    assert calls_of(quiet(make_tiny_model()), scene, num_inference_steps=2, solver="lcm") == [2, 2]


def test_guidance_is_a_knob_within_its_range(scene: Scene):
    pipe = quiet(student())
    low, high = (edit(pipe, scene, guidance_scale=scale) for scale in (2.0, 7.0))
    assert np.abs(low - high).max() > 1e-3
    with pytest.raises(EditValueError, match=r"guidance_scale is 9; this model was distilled for 1 to 8$"):
        edit(pipe, scene, guidance_scale=9.0)
    with pytest.raises(EditValueError, match="guidance_interval: this model was distilled with guidance"):
        edit(pipe, scene, guidance_interval=(0.2, 0.8))


def test_fresh_noise_makes_the_stochastic_form(scene: Scene):
    pipe = quiet(student())
    plain, again, fresh = (edit(pipe, scene, eta=eta) for eta in (0.0, 0.0, 1.0))
    assert np.array_equal(plain, again)
    assert np.abs(fresh - plain).max() > 1e-3


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_prepared_calls_are_told_the_scale_too(prediction: str):
    model = student(prediction)
    schedule, generator = make_schedule(model.config.schedule), torch.Generator().manual_seed(0)
    condition = torch.randn(2, 1, 16, generator=generator)
    masked, x = torch.randn(2, 2, 4, 8, 8, generator=generator)
    given = Conditioning(condition, masked, torch.ones(2, 1, 8, 8))
    timesteps = torch.tensor([999, 499])
    for scale in (3.0, torch.tensor([2.0, 6.0]).view(2, 1, 1, 1)):
        plain = noise_predictor(model, schedule, given, scale)(x, torch.tensor([499, 499]))
        prepared = prepared_predictor(model, schedule, given, scale, timesteps)(x, torch.tensor([499, 499]))
        assert torch.allclose(plain, prepared, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_it_is_what_it_was(scene: Scene, tmp_path: Path):
    pipe = quiet(student())
    expected = edit(pipe, scene)
    pipe.save_pretrained(tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "config.json").read_text())["model"]["unet"]
    assert (told["guidance_range"], told["few_steps"]) == ([1.0, 8.0], 2)
    save_checkpoint(tmp_path / "bare", pipe.model)  # as training does, which says nothing of solvers
    for folder in ("saved", "bare"):
        again = PaintByExample.from_pretrained(tmp_path / folder)
        again.set_progress_bar_config(disable=True)
        assert again.solver == "lcm"
        # equal weights, but where they are in memory decides on kernels
        np.testing.assert_allclose(edit(again, scene), expected, rtol=1e-5, atol=1e-4)
    assert PaintByExample.from_pretrained(tmp_path / "saved", solver="ddim").solver == "ddim"
    pipe.solver = "plms"  # what other models take that do not say
    pipe.save_pretrained(tmp_path / "other")
    assert PaintByExample.from_pretrained(tmp_path / "other").solver == "plms"


@pytest.mark.parametrize("scales", [[5.0], [8.0, 1.0], [1.0, 2.0, 3.0]])
def test_a_range_that_is_none_is_told_with_its_file(tmp_path: Path, scales: list[float]):
    save_checkpoint(tmp_path / "saved", student())
    file = tmp_path / "saved" / "config.json"
    content = json.loads(file.read_text())
    content["model"]["unet"]["guidance_range"] = scales
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"unet\.guidance_range is \[.*\]; it must be two numbers from 0 up"):
        PaintByExample.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_other_layouts_refuse_it_in_one_line(layout: str):
    sizes = ModelConfig()
    check_layout(sizes, layout)
    sizes.unet.guidance_range, sizes.unet.few_steps = [1.0, 8.0], 4
    with pytest.raises(UserError) as caught:
        check_layout(sizes, layout)
    assert str(caught.value) == (
        f"the {layout} layout has no place for guidance in one call of few steps; keep the native layout"
    )


def test_settings_are_completed_with_what_the_model_is_meant_for():
    few, plain = student(), make_tiny_model()
    assert complete(EditSettings(), few).steps == 2
    assert complete(EditSettings(steps=5), few).steps == 5
    assert complete(EditSettings(), plain).steps == 50
    assert complete(EditSettings(guidance_scale=30.0), plain).guidance_scale == 30.0


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that was distilled, at guidance 5."""
    model = make_tiny_model()
    add_adapter(model, ["residual"], 2, 4.0)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in adapter_state(model).items()
    }
    remove_adapter(model)
    save_adapter(tmp_path / "fast.safetensors", state, 4.0, "base", DISTILLED)
    return tmp_path / "fast.safetensors"


def test_an_adapter_makes_a_model_one_of_few_steps_and_takes_it_back(scene: Scene, adapter: Path):
    pipe = quiet(make_tiny_model())
    before, sizes = edit(pipe, scene, num_inference_steps=2), pipe.model.config
    pipe.load_adapter(adapter)
    assert (pipe.solver, calls_of(pipe, scene)) == ("lcm", [1, 1])
    with pytest.raises(EditValueError, match="guidance_scale is 3; this model was distilled for 5 alone"):
        edit(pipe, scene, guidance_scale=3.0)
    with pytest.raises(EditValueError, match=r"unload_adapter\('fast'\) turns it off"):
        pipe.set_adapter_scale("fast", 0)
    with pytest.raises(UserError, match="makes a model one of 2 steps, which this one is already"):
        pipe.load_adapter(adapter, name="twice")
    assert list(pipe.adapters) == ["fast"]
    pipe.unload_adapter("fast")
    with pytest.raises(EditValueError, match="scale is 0, but 'fast' is what makes"):
        pipe.load_adapter(adapter, 0)
    assert not pipe.adapters
    assert (pipe.solver, pipe.model.config) == ("plms", sizes)
    assert np.array_equal(edit(pipe, scene, num_inference_steps=2), before)


def test_merged_it_stays_one_of_few_steps(scene: Scene, adapter: Path, tmp_path: Path):
    pipe = quiet(make_tiny_model())
    save_checkpoint(tmp_path / "base", pipe.model)
    pipe.load_adapter(adapter)
    expected = edit(pipe, scene)
    opened = with_adapters(open_checkpoint(tmp_path / "base"), [(open_adapter(adapter), 1.0)])
    assert (opened.config.unet.few_steps, opened.usage.solver.name) == (2, "lcm")
    nothing = with_adapters(open_checkpoint(tmp_path / "base"), [(open_adapter(adapter), 0.0)])
    assert nothing.config.unet.few_steps == 0
    pipe.save_pretrained(tmp_path / "merged")
    pipe.merge_adapters()
    pipe.unload_adapter()
    for each in (pipe, PaintByExample.from_pretrained(tmp_path / "merged")):
        each.set_progress_bar_config(disable=True)
        assert each.model.config.unet.few_steps == 2
        assert calls_of(each, scene) == [1, 1]
        assert np.allclose(edit(each, scene), expected, rtol=1e-4, atol=1e-4)
