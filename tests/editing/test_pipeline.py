from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pbe.checkpoints.native import save_model
from pbe.diffusion.solvers import ddim
from pbe.editing import PaintByExample
from pbe.errors import EditTypeError, EditValueError, UserError
from pbe.models import LatentDiffusion
from tests.editing.conftest import Scene, make_scene
from tests.editing.tiny_model import make_tiny_model

STEPS = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("solver", ["plms", "ddim"])
def test_the_background_stays_bit_for_bit_and_the_hole_changes(
    pipe: PaintByExample, scene: Scene, solver: str
):
    call = {"num_inference_steps": STEPS, "solver": solver}
    edit = pipe(scene.exemplar, scene.picture, scene.mask, generator=seeded(), **call).images[0]
    source = pixels(scene.picture)
    assert edit.size == scene.picture.size
    np.testing.assert_array_equal(pixels(edit)[~scene.hole], source[~scene.hole])
    assert np.abs(pixels(edit) - source)[scene.hole].mean() > 10
    free = pipe(
        scene.exemplar, scene.picture, scene.mask, generator=seeded(), preserve_background=False, **call
    ).images[0]
    np.testing.assert_array_equal(pixels(edit)[scene.hole], pixels(free)[scene.hole])
    assert (pixels(free) != source)[~scene.hole].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 5), (8, 8), (33, 47), (100, 20), (64, 64)])
def test_any_size_is_edited_at_its_own(pipe: PaintByExample, size: tuple[int, int]):
    scene = make_scene(*size)
    output = pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1)
    assert output.edited_at == size
    assert output.images[0].size == scene.picture.size
    np.testing.assert_array_equal(pixels(output.images[0])[~scene.hole], pixels(scene.picture)[~scene.hole])


@pytest.mark.parametrize(("size", "at"), [((200, 300), (32, 48)), ((90, 3000), (11, 370))])
def test_large_images_are_edited_smaller_and_come_back_at_their_size(
    pipe: PaintByExample, size: tuple[int, int], at: tuple[int, int]
):
    scene = make_scene(*size)
    output = pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1)
    assert output.edited_at == at
    edit = output.images[0]
    assert edit.size == scene.picture.size
    np.testing.assert_array_equal(pixels(edit)[~scene.hole], pixels(scene.picture)[~scene.hole])


@pytest.mark.parametrize(
    ("asked", "size"), [((16, 48), (16, 48)), ((None, 50), (32, 50)), ((21, None), (21, 40))]
)
def test_height_and_width_resize(
    pipe: PaintByExample, scene: Scene, asked: tuple[int | None, int | None], size: tuple[int, int]
):
    height, width = asked
    call = {"height": height, "width": width, "num_inference_steps": 1}
    output = pipe(scene.exemplar, scene.picture, scene.mask, **call)
    assert output.edited_at == size
    edit = pixels(output.images[0])
    assert edit.shape == (*size, 3)
    resized = pixels(scene.picture.resize(size[::-1], Image.Resampling.BICUBIC))
    kept = np.asarray(scene.mask.resize(size[::-1], Image.Resampling.BOX)) == 0
    assert 0.5 < kept.mean() < 1.0
    np.testing.assert_array_equal(edit[kept], resized[kept])


def test_the_same_seed_gives_the_same_image_and_another_does_not(pipe: PaintByExample, scene: Scene):
    edits = [
        pipe(
            scene.exemplar, scene.picture, scene.mask, num_inference_steps=STEPS, generator=seeded(seed)
        ).images[0]
        for seed in (1, 1, 2)
    ]
    assert edits[0].tobytes() == edits[1].tobytes()
    assert edits[0].tobytes() != edits[2].tobytes()


def test_the_global_generator_is_the_default(pipe: PaintByExample, scene: Scene):
    edits = []
    for _ in range(2):
        torch.manual_seed(5)
        edits.append(
            pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=2).images[0].tobytes()
        )
    assert edits[0] == edits[1]


@pytest.mark.parametrize(("solver", "eta"), [("plms", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_a_batch_gives_the_images_of_single_edits(pipe: PaintByExample, solver: str, eta: float):
    scenes = [make_scene(32, 40, seed) for seed in range(3)]
    call = {"num_inference_steps": STEPS, "solver": solver, "eta": eta, "output_type": "np"}
    batch = pipe(
        [s.exemplar for s in scenes],
        [s.picture for s in scenes],
        scenes[0].mask,
        num_images_per_prompt=2,
        generator=[seeded(k) for k in range(6)],
        **call,
    ).images
    assert batch.shape == (6, 32, 40, 3)
    for k in range(6):
        s = scenes[k // 2]
        alone = pipe(s.exemplar, s.picture, scenes[0].mask, generator=seeded(k), **call).images[0]
        # the same numbers up to the order in which a convolution adds them
        np.testing.assert_allclose(batch[k], alone, atol=1e-4)


def test_the_exemplar_and_the_guidance_matter(pipe: PaintByExample, scene: Scene):
    other = make_scene(32, 40, seed=9).exemplar

    def edit(exemplar: Image.Image, scale: float) -> np.ndarray:
        call = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "np"}
        return pipe(exemplar, scene.picture, scene.mask, guidance_scale=scale, **call).images

    assert np.abs(edit(scene.exemplar, 5.0) - edit(other, 5.0)).max() > 1e-3
    assert np.abs(edit(scene.exemplar, 5.0) - edit(scene.exemplar, 1.0)).max() > 1e-3
    assert np.abs(edit(scene.exemplar, 0.0) - edit(other, 0.0)).max() < 1e-6  # the null condition alone


def original_edit(
    model: LatentDiffusion, scene: Scene, x_T: Tensor, posterior_noise: Tensor, scale: float
) -> Tensor:
    """The original's inference written out: masking, posterior, mask resize, guidance, DDIM, decoding."""
    picture = torch.from_numpy(np.array(scene.picture)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    keep = 1.0 - torch.from_numpy(np.array(scene.mask))[None, None].float() / 255.0
    posterior = model.autoencoder.encode(picture * keep)
    masked = posterior.mean + posterior.std * posterior_noise
    factor = model.autoencoder.downsampling
    middle = factor // 2
    # bilinear without antialias: the mean of the central 2x2 of each block
    blocks = F.unfold(keep, factor, stride=factor).view(1, factor, factor, -1)
    small = blocks[:, middle - 1 : middle + 1, middle - 1 : middle + 1].mean(dim=(1, 2))
    small = small.view(1, 1, *x_T.shape[-2:])
    side = model.config.exemplar_encoder.image_size
    square = scene.exemplar.resize((side, side), Image.Resampling.BICUBIC)
    exemplar = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    condition = model.encode_exemplar(model.normalise_exemplar(exemplar))

    def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
        x = torch.cat([x_t, masked, small], dim=1)
        null = model.unet(x, timesteps, model.exemplar_encoder.null_condition)
        return null + scale * (model.unet(x, timesteps, condition) - null)

    schedule = PaintByExample(model).schedule
    latents = ddim(predict, x_T, schedule, STEPS)
    return (model.decode_latents(latents) / 2.0 + 0.5).clamp(0.0, 1.0)


def test_it_does_what_the_original_does(pipe: PaintByExample, tiny_model: LatentDiffusion, scene: Scene):
    generator = seeded(3)
    x_T, posterior_noise = (torch.randn((1, 4, 8, 10), generator=generator) for _ in range(2))
    expected = original_edit(tiny_model, scene, x_T, posterior_noise, scale=3.0)
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "solver": "ddim", "output_type": "pt"}
    call |= {"preserve_background": False}
    drawn = pipe(scene.exemplar, scene.picture, scene.mask, generator=seeded(3), **call).images
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    after_start = seeded(3)
    torch.randn((1, 4, 8, 10), generator=after_start)
    given = pipe(scene.exemplar, scene.picture, scene.mask, generator=after_start, latents=x_T, **call).images
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)


def test_v_prediction_is_turned_into_noise(scene: Scene):
    """With a v network that answers v = -sqrt(1 - abar) x_0 + ... for a fixed x_0, DDIM ends close to it."""
    model = make_tiny_model(prediction="v")
    pipe = PaintByExample(model)
    target = torch.randn(1, 4, 8, 10, generator=seeded(1))

    def exact(x: Tensor, timesteps: Tensor, *_: object) -> Tensor:
        signal, sigma = pipe.schedule.signal_noise(timesteps, x)
        noise = (x[:, :4] - signal * target) / sigma
        return signal * noise - sigma * target

    model.unet.forward = exact
    ends: list[Tensor] = []
    pipe(
        scene.exemplar,
        scene.picture,
        scene.mask,
        num_inference_steps=10,
        solver="ddim",
        callback=lambda step, timestep, latents: ends.append(latents),
    )
    signal = pipe.schedule.alphas_cumprod[0].sqrt()
    noise = (1.0 - pipe.schedule.alphas_cumprod[0]).sqrt()
    assert (ends[-1] - signal * target).abs().max() < 5 * noise


def test_output_types(pipe: PaintByExample, scene: Scene):
    def call(kind: str):
        return pipe(
            scene.exemplar,
            scene.picture,
            scene.mask,
            num_inference_steps=1,
            output_type=kind,
            generator=seeded(),
        ).images

    pil, array, tensor = call("pil"), call("np"), call("pt")
    assert isinstance(pil[0], Image.Image)
    assert array.shape == (1, 32, 40, 3)
    assert tensor.shape == (1, 3, 32, 40)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_array_equal(np.round(array[0] * 255), pixels(pil[0]))
    assert not tensor.is_inference()


def test_the_callback_sees_every_step(pipe: PaintByExample, scene: Scene):
    seen: list[int] = []
    pipe(
        scene.exemplar,
        scene.picture,
        scene.mask,
        num_inference_steps=5,
        callback=lambda step, timestep, latents: seen.append(timestep),
    )
    assert seen == [801, 601, 401, 201, 1]


def test_bfloat16(scene: Scene):
    pipe = PaintByExample(make_tiny_model().to(torch.bfloat16))
    edit = pipe(scene.exemplar, scene.picture, scene.mask, num_inference_steps=2).images[0]
    np.testing.assert_array_equal(pixels(edit)[~scene.hole], pixels(scene.picture)[~scene.hole])


def test_from_pretrained(tiny_model: LatentDiffusion, pipe: PaintByExample, scene: Scene, tmp_path: Path):
    save_model(tmp_path / "model", tiny_model)
    loaded = PaintByExample.from_pretrained(tmp_path / "model")
    edits = [
        p(scene.exemplar, scene.picture, scene.mask, num_inference_steps=2, generator=seeded())
        .images[0]
        .tobytes()
        for p in (pipe, loaded)
    ]
    assert edits[0] == edits[1]
    half = PaintByExample.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a model folder"):
        PaintByExample.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"num_inference_steps": 501}, "between 1 and 500"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"eta": 0.5}, "plms is deterministic"),
        ({"eta": 2.0, "solver": "ddim"}, "eta is 2.0"),
        ({"solver": "magic"}, "no solver 'magic'"),
        ({"output_type": "gif"}, "no output_type 'gif'; there are: pil, np, pt"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt: str"),
        (
            {"latents": torch.zeros(1, 4, 8, 8)},
            r"latents have the shape \(1, 4, 8, 8\); this edit needs \(1, 4, 8, 10\)",
        ),
        ({"latents": np.zeros((1, 4, 8, 10))}, "latents: ndarray"),
        ({"generator": 7}, "generator: int"),
        ({"mask_image": Image.new("L", (40, 32))}, "mask_image has no masked region"),
        ({"image": "a.png"}, "image: str; it must be a PIL image"),
        ({"image": Image.new("RGB", (0, 3))}, "0x3 pixels"),
    ],
)
def test_arguments_that_cannot_be_used(
    pipe: PaintByExample, scene: Scene, arguments: dict[str, object], message: str
):
    call = {"example_image": scene.exemplar, "image": scene.picture, "mask_image": scene.mask}
    with pytest.raises(UserError, match=message) as raised:
        pipe(**(call | {"num_inference_steps": 1} | arguments))
    assert "\n" not in str(raised.value)


def test_errors_are_those_that_python_callers_expect(pipe: PaintByExample, scene: Scene):
    with pytest.raises(ValueError, match="eta"):
        pipe(scene.exemplar, scene.picture, scene.mask, eta=-1.0)
    with pytest.raises(TypeError, match="image"):
        pipe(scene.exemplar, 5, scene.mask)
    assert issubclass(EditValueError, UserError)
    assert issubclass(EditTypeError, UserError)


def test_weights_that_are_not_numbers_do_not_give_a_black_image(scene: Scene):
    model = make_tiny_model()
    model.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="output is not finite"):
        PaintByExample(model)(scene.exemplar, scene.picture, scene.mask, num_inference_steps=1)
