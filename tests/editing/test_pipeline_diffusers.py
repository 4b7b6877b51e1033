"""The same random weights through diffusers' own pipeline, live: sizes, batches and draws of noise."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPImageProcessor

from pbe.checkpoints.saving import save_checkpoint
from pbe.config import AutoencoderConfig, ExemplarEncoderConfig, ModelConfig, UNetConfig
from pbe.editing import PaintByExample
from pbe.editing.safety import CheckerSizes, SafetyChecker
from pbe.models import LatentDiffusion
from pbe.models.image_tower import TowerSizes
from tests.editing.conftest import SCHEDULERS, Scene, make_scene

THEIRS = "diffusers.pipelines.deprecated.paint_by_example"
CALL: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[PaintByExample, Any]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=32,
        unet=UNetConfig(16, [1, 2, 2], 1, [1, 2], num_heads=2, context_dim=16, norm_groups=8),
        autoencoder=AutoencoderConfig(16, [1, 1, 2], 1, norm_groups=8),
        exemplar_encoder=ExemplarEncoderConfig(
            tower="vit/16x4-patch8-heads2-mlp32-quickgelu", image_size=32, mapper_layers=1
        ),
    )
    model = LatentDiffusion(config)
    for parameter in model.unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    PaintByExample(model.eval().requires_grad_(False)).save_pretrained(folder, "diffusers")
    ours = PaintByExample.from_pretrained(folder, solver="ddim", conventions="diffusers")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return ours, reference(folder, scheduler)


def reference(folder: Path, scheduler: Any) -> Any:
    module = importlib.import_module(THEIRS)
    pipe = module.PaintByExamplePipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        image_encoder=module.PaintByExampleImageEncoder.from_pretrained(folder / "image_encoder"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=CLIPImageProcessor.from_pretrained(folder / "feature_extractor"),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def compare(pipes: tuple[PaintByExample, Any], inputs: dict[str, Any], **settings: Any) -> None:
    """Run both, each with generators of its own."""
    ours, theirs = pipes
    results = []
    for pipe, more in ((ours, {"preserve_background": False}), (theirs, {})):
        made = {name: value() if name == "generator" else value for name, value in settings.items()}
        results.append(pipe(**inputs, **(CALL | made | more)).images)
    assert results[0].shape == results[1].shape
    np.testing.assert_allclose(*results, atol=2e-4)


def single(scene: Scene) -> dict[str, Any]:
    return {"example_image": scene.exemplar, "image": scene.picture, "mask_image": scene.mask}


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (8, 72), (72, 88), (120, 104)])
def test_any_size_that_diffusers_takes(pipes: tuple[PaintByExample, Any], size: tuple[int, int]):
    compare(pipes, single(make_scene(*size)), generator=lambda: seeds(3)[0])


@pytest.mark.parametrize("guidance", [0.0, 0.7, 1.0, 7.5])
def test_any_guidance(pipes: tuple[PaintByExample, Any], guidance: float):
    compare(pipes, single(make_scene(32, 40)), generator=lambda: seeds(3)[0], guidance_scale=guidance)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("numbers", [(5,), (5, 6)])
def test_several_images_draw_their_noise_alike(
    pipes: tuple[PaintByExample, Any], eta: float, numbers: tuple[int, ...]
):
    def generator() -> Any:
        return seeds(*numbers) if len(numbers) > 1 else seeds(*numbers)[0]

    compare(pipes, single(make_scene(32, 40)), generator=generator, eta=eta, num_images_per_prompt=2)


def test_a_batch_draws_its_noise_alike(pipes: tuple[PaintByExample, Any]):
    scenes = [make_scene(32, 40, seed) for seed in (1, 2)]
    names = ("exemplar", "picture", "mask")
    keys = ("example_image", "image", "mask_image")
    inputs = {key: [getattr(s, name) for s in scenes] for key, name in zip(keys, names, strict=True)}
    compare(pipes, inputs, generator=lambda: seeds(8, 9))
    compare(pipes, inputs, generator=lambda: seeds(8)[0], eta=1.0)


def test_tensors_are_taken_alike(pipes: tuple[PaintByExample, Any]):
    scene = make_scene(32, 40)
    mask = torch.from_numpy(scene.hole).float()
    mask[0, :8] = 0.5  # kept
    inputs = {
        "example_image": torch.randn(1, 3, 32, 32),
        "image": torch.rand(1, 3, 32, 40) * 2.0 - 1.0,
        "mask_image": mask,
    }
    compare(pipes, inputs, generator=lambda: seeds(3)[0])


@pytest.mark.parametrize("exported", [None, "plms", "unipc"])
def test_an_export_swaps_schedulers_as_solvers(
    pipes: tuple[PaintByExample, Any], exported: str | None, tmp_path: Path
):
    """Every class that ``from_config`` makes of an export's scheduler runs as the solver of its name."""
    ours = PaintByExample(ours_model := pipes[0].model, conventions="diffusers")
    if exported is None:
        save_checkpoint(tmp_path, ours_model, "diffusers")
    else:
        ours.solver = exported
        ours.save_pretrained(tmp_path, "diffusers")
    written = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    kind = getattr(diffusers, written["_class_name"])
    theirs = reference(tmp_path, kind.from_pretrained(tmp_path / "scheduler"))
    scene = make_scene(32, 40)
    latents = torch.randn(1, 4, 8, 10, generator=seeds(4)[0])
    for name, kind in SCHEDULERS.items():
        theirs.scheduler = getattr(diffusers, kind).from_config(theirs.scheduler.config)
        call = {"latents": latents, "generator": None, "num_inference_steps": 4, "output_type": "latent"}
        expected = theirs(**single(scene), **call | {"generator": seeds(3)[0]}).images
        found = ours(**single(scene), **call | {"generator": seeds(3)[0], "solver": name}).images
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max()), name


def test_diffusers_loads_an_export_with_its_checker(
    pipes: tuple[PaintByExample, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What this project notes in the files does not disturb it."""
    tower = TowerSizes(width=16, layers=1, patch=8, heads=2, mlp=32)
    checker = SafetyChecker(CheckerSizes(tower, 16, 1e-5, projection=8, concepts=17, special=3))
    pipe = PaintByExample(pipes[0].model, safety_checker=checker.eval(), conventions="original")
    pipe.save_pretrained(tmp_path, "diffusers")
    module = importlib.import_module(THEIRS)
    # its release looks for the image encoder's module where it stood in 2022
    monkeypatch.setattr(diffusers.pipelines, "paint_by_example", module, raising=False)
    theirs = module.PaintByExamplePipeline.from_pretrained(tmp_path)
    assert type(theirs.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    assert type(theirs.scheduler).__name__ == "PNDMScheduler"
    theirs.save_pretrained(tmp_path / "again")
    loaded = PaintByExample.from_pretrained(tmp_path / "again")
    assert (loaded.solver, loaded.conventions) == ("plms", "diffusers")
    assert isinstance(loaded.safety_checker, SafetyChecker)
