"""What a call of the pipeline takes and gives, beyond a plain edit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pbe.diffusion.solvers import SOLVERS, SolverChoice
from pbe.editing import EditOutput, PaintByExample
from pbe.errors import EditTypeError, EditValueError
from pbe.models import LatentDiffusion
from tests.editing.conftest import Scene, make_scene

STEPS = 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def edit(pipe: PaintByExample, scene: Scene, **settings: Any) -> np.ndarray:
    call = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "np"} | settings
    exemplar = call.pop("example_image", scene.exemplar)
    return pipe(exemplar, call.pop("image", scene.picture), call.pop("mask_image", scene.mask), **call).images


def as_tensors(scene: Scene) -> dict[str, torch.Tensor]:
    image = torch.from_numpy(np.array(scene.picture)).permute(2, 0, 1).float() / 127.5 - 1.0
    return {"image": image, "mask_image": torch.from_numpy(scene.hole).float()}


@pytest.mark.parametrize("conventions", ["original", "diffusers"])
@pytest.mark.parametrize("background", [True, False])
def test_every_form_of_input_gives_the_same_edit(
    pipe: PaintByExample, scene: Scene, conventions: str, background: bool
):
    settings = {"conventions": conventions, "preserve_background": background}
    plain = edit(pipe, scene, **settings)
    picture, tensors = np.array(scene.picture), as_tensors(scene)
    forms = [
        {"image": picture, "mask_image": scene.hole},
        {"image": picture[None] / 255.0, "mask_image": scene.hole.astype(float)[None]},
        tensors,
        {"image": [tensors["image"][None]], "mask_image": tensors["mask_image"][None, None]},
        {"exemplar_embeds": pipe.encode_exemplar(scene.exemplar, conventions), "example_image": None},
    ]
    for form in forms:
        np.testing.assert_allclose(edit(pipe, scene, **settings, **form), plain, atol=1e-5)


def test_an_exemplar_tensor_is_what_the_tower_takes(pipe: PaintByExample, scene: Scene):
    from pbe.editing.preprocess import exemplar_pixels

    config = pipe.model.config.exemplar_encoder
    pixels = exemplar_pixels([np.array(scene.exemplar)], config, None)
    plain = edit(pipe, scene)
    for form in (pixels, pixels[0], [pixels[0]]):
        np.testing.assert_array_equal(edit(pipe, scene, example_image=form), plain)
    with pytest.raises(EditValueError, match="normalised for the image tower"):
        edit(pipe, scene, example_image=torch.zeros(3, 8, 8))


def test_one_exemplar_and_one_mask_serve_a_batch(pipe: PaintByExample, scene: Scene):
    other = make_scene(32, 40, seed=3)
    generators = [seeded(1), seeded(2)]
    both = edit(pipe, scene, image=[scene.picture, other.picture], generator=generators)
    for index, each in enumerate((scene, other)):
        alone = edit(pipe, scene, image=each.picture, generator=seeded(index + 1))
        np.testing.assert_allclose(both[index], alone[0], atol=1e-4)


@pytest.mark.parametrize("conventions", ["original", "diffusers"])
def test_several_images_of_a_batch_are_paired_with_their_own(
    pipe: PaintByExample, scene: Scene, conventions: str
):
    scenes = [scene, make_scene(32, 40, seed=3)]
    noise = torch.randn(4, 4, 8, 10, generator=seeded(5))
    latents = torch.randn(2, 4, 8, 10, generator=seeded(6))
    settings = {"conventions": conventions, "num_images_per_prompt": 2}
    batch = edit(
        pipe,
        scene,
        example_image=[s.exemplar for s in scenes],
        image=[s.picture for s in scenes],
        latents=noise,
        masked_image_latents=latents,
        **settings,
    )
    for index, each in enumerate(scenes):
        rows = slice(2 * index, 2 * index + 2)
        alone = edit(pipe, each, latents=noise[rows], masked_image_latents=latents[[index]], **settings)
        np.testing.assert_allclose(batch[rows], alone, atol=1e-4)


def test_the_conventions_differ_and_the_pipelines_own_are_the_default(
    tiny_model: LatentDiffusion, scene: Scene
):
    original, diffusers = PaintByExample(tiny_model), PaintByExample(tiny_model, conventions="diffusers")
    ours, theirs = edit(original, scene), edit(diffusers, scene)
    assert np.abs(ours - theirs).max() > 1e-3
    np.testing.assert_array_equal(edit(original, scene, conventions="diffusers"), theirs)
    np.testing.assert_array_equal(edit(diffusers, scene, conventions="original"), ours)


def test_what_diffusers_makes_of_guidance_and_posterior(pipe: PaintByExample, scene: Scene):
    settings = {"conventions": "diffusers"}
    without = edit(pipe, scene, guidance_scale=1.0, **settings)
    np.testing.assert_array_equal(edit(pipe, scene, guidance_scale=0.0, **settings), without)
    start = torch.randn(1, 4, 8, 10, generator=seeded()).expand(2, -1, -1, -1)
    shared = edit(pipe, scene, latents=start, num_images_per_prompt=2, **settings)
    np.testing.assert_allclose(shared[0], shared[1], atol=1e-5)  # one posterior sample an image
    own = edit(pipe, scene, latents=start, num_images_per_prompt=2)
    assert np.abs(own[0] - own[1]).max() > 1e-3


def test_timesteps_follow_the_conventions(pipe: PaintByExample, scene: Scene):
    def steps(**settings: Any) -> list[float]:
        seen: list[float] = []
        edit(pipe, scene, num_inference_steps=30, callback=lambda i, t, x: seen.append(t), **settings)
        return seen

    assert len(steps()) == 31
    assert len(steps(conventions="diffusers", solver="ddim")) == 30
    assert steps(conventions="diffusers")[0] == 29 * 33 + 1
    assert len(steps(solver=SolverChoice("ddim", "trailing"))) == 30


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_edits(pipe: PaintByExample, scene: Scene, solver: str):
    result = edit(pipe, scene, solver=solver, num_inference_steps=6)
    np.testing.assert_array_equal(result, edit(pipe, scene, solver=solver, num_inference_steps=6))
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(
        np.round(result[0] * 255.0)[~scene.hole], np.asarray(scene.picture)[~scene.hole]
    )


def test_the_solver_of_the_pipeline(tiny_model: LatentDiffusion, scene: Scene):
    pipe = PaintByExample(tiny_model)
    assert pipe.solver == "plms"
    pipe.solver = "DPM++"
    assert pipe.solver == "dpmpp_2m"
    np.testing.assert_array_equal(
        edit(pipe, scene), edit(PaintByExample(tiny_model), scene, solver="dpmpp_2m")
    )
    pipe.solver = SolverChoice("euler", karras=True)
    six = {"num_inference_steps": 6}
    assert np.abs(edit(pipe, scene, **six) - edit(pipe, scene, solver="euler", **six)).max() > 1e-4
    with pytest.raises(EditValueError, match="no solver 'magic'; there are: "):
        pipe.solver = "magic"
    with pytest.raises(EditTypeError, match="solver: int"):
        pipe.solver = 3  # type: ignore[assignment]


def test_latents_are_given_back_before_they_are_decoded(pipe: PaintByExample, scene: Scene):
    seen: list[torch.Tensor] = []
    call = {"num_inference_steps": STEPS, "callback": lambda i, t, x: seen.append(x.clone())}
    output = pipe(scene.exemplar, scene.picture, scene.mask, generator=seeded(), output_type="latent", **call)
    assert output.images.shape == (1, 4, 8, 10)
    torch.testing.assert_close(output.images, seen[-1])
    assert output.nsfw_content_detected is None
    decoded = pipe.model.decode_latents(output.images) / 2.0 + 0.5
    plain = edit(pipe, scene, preserve_background=False)
    np.testing.assert_allclose(decoded[0].clamp(0, 1).permute(1, 2, 0).numpy(), plain[0], atol=1e-5)


def test_masked_latents_take_the_place_of_the_encoded_image(pipe: PaintByExample, scene: Scene):
    tensors = as_tensors(scene)
    hidden = tensors["image"] * (1.0 - tensors["mask_image"])
    latents = pipe.model.encode_images(hidden[None], torch.randn(1, 4, 8, 10, generator=seeded(9)))
    start = torch.randn(1, 4, 8, 10, generator=seeded())
    given = edit(pipe, scene, latents=start, masked_image_latents=latents)
    encoded = edit(pipe, scene, latents=start, generator=seeded(9))
    np.testing.assert_allclose(given, encoded, atol=1e-5)


def test_output_or_tuple(pipe: PaintByExample, scene: Scene):
    call = {"num_inference_steps": 1}
    output = pipe(scene.exemplar, scene.picture, scene.mask, **call)
    assert isinstance(output, EditOutput)
    images, flags = pipe(scene.exemplar, scene.picture, scene.mask, return_dict=False, **call)
    assert isinstance(images[0], Image.Image)
    assert flags is None


def test_callback_steps(pipe: PaintByExample, scene: Scene):
    seen: list[int] = []
    edit(pipe, scene, num_inference_steps=8, callback_steps=3, callback=lambda i, t, x: seen.append(i))
    assert seen == [0, 3, 6]


def test_the_progress_bar_can_be_turned_off(
    tiny_model: LatentDiffusion, scene: Scene, capsys: pytest.CaptureFixture[str]
):
    pipe = PaintByExample(tiny_model)
    edit(pipe, scene)
    assert "2/2" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    edit(pipe, scene)
    assert capsys.readouterr().err == ""


def test_a_small_mask_in_twelve_megapixels(pipe: PaintByExample):
    tile = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    picture = np.tile(tile, (30, 40, 1))
    hole = np.zeros((3000, 4000), bool)
    hole[1201:1290, 3700:3795] = True
    started = time.process_time()
    output = pipe(
        picture[:500, :400],
        picture,
        hole,
        region="mask",
        num_inference_steps=1,
        generator=seeded(),
    )
    assert time.process_time() - started < 20
    assert output.edited_at == (32, 32)
    result = np.asarray(output.images[0])
    assert result.shape == picture.shape
    np.testing.assert_array_equal(result[~hole], picture[~hole])
    assert (result != picture)[hole].mean() > 0.9


def test_a_region_without_its_background_changes_nothing_outside(pipe: PaintByExample):
    scene = make_scene(200, 300)
    mask = np.zeros((200, 300), bool)
    mask[90:110, 140:160] = True
    settings = {"region": "mask", "preserve_background": False, "feather": 3}
    result = np.round(edit(pipe, scene, mask_image=mask, **settings)[0] * 255.0)
    changed = (result != np.asarray(scene.picture)).any(axis=2)
    assert changed[80:120, 130:170].mean() > 0.9
    changed[80:120, 130:170] = False
    assert not changed.any()


def test_regions_of_a_batch_lie_where_their_masks_are(pipe: PaintByExample, scene: Scene):
    masks = [np.zeros((32, 40), bool) for _ in range(2)]
    masks[0][2:8, 3:9] = True
    masks[1][20:30, 25:38] = True
    noise = torch.randn(2, 4, 8, 8, generator=seeded(5))
    settings = {"region": "mask", "masked_image_latents": noise[:1]}
    both = edit(pipe, scene, mask_image=masks, latents=noise, **settings)
    for index, mask in enumerate(masks):
        alone = edit(pipe, scene, mask_image=mask, latents=noise[[index]], **settings)
        np.testing.assert_allclose(both[index], alone[0], atol=1e-4)
    sized = edit(pipe, scene, region="mask", height=16, width=24)
    assert sized.shape == (1, 32, 40, 3)


class Suspicious(nn.Module):
    """Flags what is brighter than the rest."""

    def forward(self, images: np.ndarray) -> list[bool]:
        assert images.dtype == np.float32
        assert images.shape[1:] == (32, 40, 3)
        assert 0.0 <= images.min() <= images.max() <= 1.0
        means = images.mean(axis=(1, 2, 3))
        return [bool(mean == means.max()) for mean in means]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_flagged_images_are_blackened(tiny_model: LatentDiffusion, scene: Scene, output_type: str):
    pipe = PaintByExample(tiny_model, safety_checker=Suspicious())
    call = {"num_inference_steps": 1, "num_images_per_prompt": 3, "generator": seeded()}
    output = pipe(scene.exemplar, scene.picture, scene.mask, output_type=output_type, **call)
    assert sorted(output.nsfw_content_detected) == [False, False, True]
    for image, flag in zip(output.images, output.nsfw_content_detected, strict=True):
        assert (np.asarray(image).max() == 0) == flag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback_steps": 0}, "callback_steps is 0"),
        ({"callback_steps": None}, "callback_steps: NoneType"),
        ({"callback_steps": 1.5}, "callback_steps is 1.5; it must be a whole number"),
        ({"num_inference_steps": 1001, "solver": "euler"}, "it must lie between 1 and 1000"),
        ({"region": "left"}, "no region 'left'; there are: full, mask"),
        ({"conventions": "mine"}, "no conventions 'mine'; there are: original, diffusers"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"feather": float("nan")}, "feather is nan"),
        ({"height": 0}, "height is 0"),
        ({"output_type": None}, "no output_type 'None'"),
        ({"masked_image_latents": torch.zeros(3, 4, 8, 10)}, "masked_image_latents have the shape"),
        ({"latents": torch.zeros(2, 4, 8, 10)}, "latents have the shape"),
        ({"exemplar_embeds": torch.zeros(1, 16)}, r"must be \(b, tokens, 16\)"),
        (
            {"exemplar_embeds": torch.zeros(3, 1, 16), "image": [Image.new("RGB", (40, 32))] * 2},
            "do not pair up",
        ),
        ({"solver": "euler", "eta": 0.5}, "euler is deterministic"),
        ({"solver": SolverChoice("plms", karras=True)}, "no Karras sigmas"),
        ({"solver": SolverChoice("ddim", "wide")}, "no timestep spacing 'wide'"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    ],
)
def test_values_that_cannot_be_used(
    pipe: PaintByExample, scene: Scene, arguments: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as raised:
        edit(pipe, scene, **({"num_inference_steps": 1} | arguments))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback": 3}, "callback: int"),
        ({"guidance_scale": "5"}, "guidance_scale: str"),
        ({"eta": None}, "eta: NoneType"),
        ({"height": 16.5}, "height is 16.5; it must be a whole number"),
        ({"margin": "wide"}, "margin: str"),
        ({"latents": torch.zeros(1, 4, 8, 10, dtype=torch.int64)}, "latents: torch.int64"),
        ({"masked_image_latents": [0.0]}, "masked_image_latents: list"),
        ({"image": torch.zeros(3, 32, 40)}, "both be tensors"),
        ({"solver": 5}, "solver: int"),
    ],
)
def test_types_that_cannot_be_used(
    pipe: PaintByExample, scene: Scene, arguments: dict[str, Any], message: str
):
    with pytest.raises(TypeError, match=message):
        edit(pipe, scene, **arguments)


def test_presets_and_intervals_of_a_call(pipe: PaintByExample, scene: Scene):
    def made(**settings: Any) -> np.ndarray:
        return pipe(
            scene.exemplar, scene.picture, scene.mask, generator=seeded(), output_type="np", **settings
        ).images

    draft = made(preset="draft")
    own = SolverChoice("dpmpp_2m", spacing="trailing")
    np.testing.assert_array_equal(made(solver=own, num_inference_steps=8), draft)
    fewer = made(preset="draft", num_inference_steps=3)
    np.testing.assert_array_equal(made(solver=own, num_inference_steps=3), fewer)
    everywhere = made(preset="draft", num_inference_steps=3, guidance_interval=(0.0, 1.0))
    np.testing.assert_array_equal(everywhere, fewer)
    assert np.abs(made(preset="draft", num_inference_steps=3, guidance_interval=(0.0, 0.5)) - fewer).max() > 0
    assert np.abs(made(preset="draft", num_inference_steps=3, reuse_features=2) - fewer).max() > 0
    with pytest.raises(EditValueError, match="preset and solver both name a solver"):
        made(preset="draft", solver="ddim")
