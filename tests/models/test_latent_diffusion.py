"""The model as a whole: masks, scaling, normalising, and the order of what the UNet is given."""

from __future__ import annotations

import copy

import pytest
import torch
from torchvision.transforms import InterpolationMode, functional as tvf

from pbe.models import LatentDiffusion
from pbe.models.latent_diffusion import latent_mask, masked_image
from tests.models.tiny import randomised, relative, tiny_model_config


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    model = LatentDiffusion(tiny_model_config()).eval()
    randomised(model.unet)
    return model


def test_latent_mask_is_the_mean_of_the_central_pixels_of_each_block() -> None:
    mask = (torch.rand(2, 1, 64, 128) > 0.5).float()
    small = latent_mask(mask, (8, 16))
    blocks = mask.reshape(2, 1, 8, 8, 16, 8)[:, :, :, 3:5, :, 3:5]
    torch.testing.assert_close(small, blocks.mean(dim=(3, 5)), atol=0.0, rtol=0.0)
    assert set(small.unique().tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_latent_mask_is_not_torchvisions_antialiased_resize() -> None:
    mask = (torch.rand(1, 1, 64, 64) > 0.5).float()
    ours = latent_mask(mask, (8, 8))
    plain = tvf.resize(mask, [8, 8], InterpolationMode.BILINEAR, antialias=False)
    smooth = tvf.resize(mask, [8, 8], InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours, plain)
    assert float((ours - smooth).abs().max()) > 0.2


def test_masked_image_is_grey_in_the_hole_and_untouched_outside() -> None:
    images, keep = torch.rand(2, 3, 8, 8) * 2 - 1, torch.ones(2, 1, 8, 8)
    keep[:, :, 2:5, 3:6] = 0.0
    masked = masked_image(images, keep)
    assert float(masked[:, :, 2:5, 3:6].abs().max()) == 0.0
    outside = keep.expand_as(images) == 1
    assert torch.equal(masked[outside], images[outside])


def test_exemplar_is_normalised_from_bytes_and_from_floats(model: LatentDiffusion) -> None:
    picture = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    config = model.config.exemplar_encoder
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    expected = (picture.float() / 255.0 - mean) / std
    torch.testing.assert_close(model.normalise_exemplar(picture), expected)
    torch.testing.assert_close(model.normalise_exemplar(picture.float() / 255.0), expected)


def test_latents_are_scaled_and_unscaled(model: LatentDiffusion) -> None:
    images, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    posterior = model.autoencoder.encode(images)
    assert torch.equal(model.encode_images(images), posterior.mean * 0.5)
    assert torch.equal(model.encode_images(images, noise), posterior.sample(noise) * 0.5)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(model.decode_latents(latents), model.autoencoder.decode(latents * 2.0))


def test_unet_is_given_noisy_masked_and_mask_in_that_order(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def record(x: torch.Tensor, *rest: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
        assert guidance is None
        seen.append((x, *rest))
        return x[:, :4]

    monkeypatch.setattr(model.unet, "forward", record)
    noisy, masked, keep = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.rand(2, 1, 4, 4)
    timesteps, condition = torch.tensor([1, 2]), torch.randn(2, 1, 24)
    model.predict(noisy, timesteps, condition, masked, keep)
    assert torch.equal(seen[0][0], torch.cat([noisy, masked, keep], dim=1))
    assert torch.equal(seen[0][1], timesteps)
    assert torch.equal(seen[0][2], condition)


def test_every_input_matters(model: LatentDiffusion) -> None:
    inputs = [torch.randn(1, 4, 4, 4), torch.tensor([3]), torch.randn(1, 1, 24), torch.randn(1, 4, 4, 4)]
    inputs.append(torch.ones(1, 1, 4, 4))
    before = model.predict(*inputs)
    for index in (0, 2, 3, 4):
        moved = list(inputs)
        moved[index] = inputs[index] + 0.5
        assert relative(model.predict(*moved), before) > 1e-4


def test_null_condition_is_repeated(model: LatentDiffusion) -> None:
    null = model.null_condition(3, tokens=5)
    assert null.shape == (3, 5, 24)
    assert torch.equal(null, model.exemplar_encoder.null_condition.repeat(3, 5, 1))


def test_images_of_any_multiple_of_the_downsampling(model: LatentDiffusion) -> None:
    assert model.size_multiple == 2
    pictures = torch.rand(1, 3, 14, 22) * 2 - 1
    latents = model.encode_images(pictures)
    output = model.predict(
        latents, torch.tensor([9]), model.null_condition(1), latents, torch.ones(1, 1, 7, 11)
    )
    assert model.decode_latents(output).shape == pictures.shape


def test_parts_that_are_given_are_taken_as_they_are(model: LatentDiffusion) -> None:
    other = LatentDiffusion(tiny_model_config(), unet=model.unet, exemplar_encoder=model.exemplar_encoder)
    assert other.unet is model.unet
    assert other.exemplar_encoder is model.exemplar_encoder
    assert other.autoencoder is not model.autoencoder


def test_every_part_is_announced_before_it_runs(model: LatentDiffusion) -> None:
    other = LatentDiffusion(model.config, unet=model.unet, exemplar_encoder=model.exemplar_encoder).eval()
    used: list[str] = []
    other.before_use = used.append
    condition = other.encode_exemplar(other.normalise_exemplar(torch.rand(1, 3, 64, 64)))
    latents = other.encode_images(torch.rand(1, 3, 8, 8))
    other.predict(latents, torch.tensor([1]), other.null_condition(1) + condition, latents, latents[:, :1])
    other.decode_latents(latents)
    assert used == ["exemplar_encoder", "autoencoder", "unet", "autoencoder"]


def test_inputs_go_where_the_parts_run(model: LatentDiffusion) -> None:
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    other = LatentDiffusion(model.config, unet=model.unet, exemplar_encoder=model.exemplar_encoder)
    other.run_on = torch.device("meta")
    assert other.device.type == "meta"
    assert other.normalise_exemplar(torch.rand(1, 3, 64, 64)).device.type == "meta"
    assert other.null_condition(1).device.type == "meta"
    assert other.exemplar_encoder.null_condition.device.type == "cpu"


def relative_to_float32(model: LatentDiffusion, dtype: torch.dtype) -> list[float]:
    """How far encoder, condition, prediction and decoder are from float32, given the same inputs."""
    half = copy.deepcopy(model).to(dtype)
    pixels = model.normalise_exemplar((torch.rand(2, 3, 64, 64) * 255).to(torch.uint8))
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    condition, keep, timesteps = torch.randn(2, 1, 24), torch.ones(2, 1, 8, 8), torch.tensor([3, 999])

    def outputs(which: LatentDiffusion) -> list[torch.Tensor]:
        kind = which.dtype
        inputs = [x.to(kind) for x in (condition, latents, keep)]
        return [
            which.encode_exemplar(pixels.to(kind)),
            which.encode_images(images.to(kind), latents.to(kind)),
            which.predict(latents.to(kind), timesteps, *inputs),
            which.decode_latents(latents.to(kind)),
        ]

    with torch.no_grad():
        results = outputs(half)
        assert {result.dtype for result in results} == {dtype}
        return [relative(a.float(), b) for a, b in zip(results, outputs(model), strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_half_precision_stays_close_to_float32(
    model: LatentDiffusion, dtype: torch.dtype, tolerance: float
) -> None:
    """Three of bfloat16's eight bits, of float16's eleven, are lost on the way through the layers."""
    assert max(relative_to_float32(model, dtype)) < tolerance


def test_tiling_is_the_autoencoders(model: LatentDiffusion) -> None:
    assert model.tile_above == model.autoencoder.tile_above == 1024
    other = LatentDiffusion(model.config, unet=model.unet, exemplar_encoder=model.exemplar_encoder)
    other.tile_above = None
    assert other.autoencoder.tile_above is None
    assert model.tile_above == 1024
