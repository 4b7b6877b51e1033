"""Whole runs that diffusers' pipeline recorded, through PaintByExample, from the model's three forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from pbe.editing import PaintByExample

RUNS = ["ddim20", "pndm20", "dpmpp_2m_20", "unipc20", "euler20", "lms20", "ddim7_g1", "ddim10_g7.5", "pndm50"]
RUNS += [
    "ddim50",
    "ddim5_rect_exemplar",
    "ddim1",
    "pndm3",
    "ddim5_n2",
    "ddim5_batch2",
    "seeded_ddim10_stochvae",
]
RUNS += ["seeded_ddim10_eta1_stochvae", "seeded_list_ddim4_stochvae"]
SPREAD = "vae_stochastic_quant_conv.safetensors"
LATENTS, BYTE_MAX, BYTE_MEAN = 1e-2, 2, 0.05  # the tolerances that the data's README suggests


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "diffusers" / "public"


@pytest.fixture(scope="module", params=("pipeline", "pipeline_hub2022", "pipeline_ldm"))
def pipe(folder: Path, request: pytest.FixtureRequest) -> PaintByExample:
    """The same weights as a folder of today, as the Hub keeps them, and in the original's layout."""
    pipe = PaintByExample.from_pretrained(folder / request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "sampling.npz") as arrays:
        return dict(arrays)


def inputs(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Exemplars, images and masks of a run; the second of a batch is turned or mirrored."""
    exemplar = Image.open(folder / ("exemplar_rect.png" if settings["rect"] else "exemplar.png"))
    picture, mask = (Image.open(folder / f"{name}.png") for name in ("image", "mask"))
    if settings["batch"] == 1:
        return {"example_image": exemplar, "image": picture, "mask_image": mask}
    turned = exemplar.transpose(Image.Transpose.ROTATE_90)
    return {
        "example_image": [exemplar, turned],
        "image": [picture, ImageOps.mirror(picture)],
        "mask_image": [mask, ImageOps.mirror(mask)],
    }


def noise(run: str, settings: dict[str, Any], recorded: dict[str, np.ndarray]) -> dict[str, Any]:
    seed = settings["seed"]
    if seed is None:
        return {"latents": torch.from_numpy(recorded[f"{run}/latents_in"])}
    if isinstance(seed, list):
        return {"generator": [torch.Generator().manual_seed(each) for each in seed]}
    return {"generator": torch.Generator().manual_seed(seed)}


def near(ours: Tensor, theirs: np.ndarray) -> None:
    assert np.abs(ours.numpy() - theirs).max() <= LATENTS * max(1.0, np.abs(theirs).max())


@pytest.fixture
def posterior(pipe: PaintByExample, folder: Path):
    """Gives the autoencoder a posterior with a spread, and takes it away again."""
    layer = pipe.autoencoder.quant_conv
    kept = {key: value.clone() for key, value in layer.state_dict().items()}
    yield lambda: layer.load_state_dict(
        {key.split(".")[-1]: value.float() for key, value in load_file(folder / SPREAD).items()}
    )
    layer.load_state_dict(kept)


@pytest.mark.parametrize("run", RUNS)
def test_a_run(pipe: PaintByExample, folder: Path, run: str, recorded, posterior):
    settings = json.loads((folder / "runs.json").read_text())["runs"][run]
    if settings["vae"] == "stoch":
        posterior()
    steps: list[Tensor] = []
    told: list[float] = []

    def watch(index: int, timestep: float, latents: Tensor) -> None:
        assert index == len(steps)
        told.append(timestep)
        steps.append(latents.clone())

    output = pipe(
        **inputs(folder, settings),
        **noise(run, settings, recorded),
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        num_images_per_prompt=settings["n"],
        eta=settings["eta"],
        output_type="np",
        callback=watch,
        preserve_background=False,
        conventions="diffusers",
        solver=settings["scheduler"],
    )
    np.testing.assert_allclose(told, recorded[f"{run}/timesteps"], atol=1e-3)
    if f"{run}/x" in recorded:
        trajectory = recorded[f"{run}/x"]
        assert len(steps) == len(trajectory) - 1
        for ours, theirs in zip(steps, trajectory[1:], strict=True):
            near(ours, theirs)
    else:
        near(steps[-1], recorded[f"{run}/x_first_last"][-1])
    difference = np.abs(np.round(output.images * 255.0) - recorded[f"{run}/image_uint8"])
    assert difference.max() <= BYTE_MAX
    assert difference.mean() < BYTE_MEAN
    if f"{run}/image_float" in recorded:
        assert np.abs(output.images - recorded[f"{run}/image_float"]).max() <= BYTE_MAX / 255.0


def test_every_recorded_run_is_tried(folder: Path):
    assert sorted(RUNS) == sorted(json.loads((folder / "runs.json").read_text())["runs"])
