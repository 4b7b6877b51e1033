"""From uint8 images to what the UNet takes."""

from __future__ import annotations

from pathlib import Path

import torch

from pbe.models import LatentDiffusion
from pbe.training.tasks.encoding import encode_batch, to_keep_mask, to_pixels
from tests.training.tiny import tiny_config


def test_pixels_span_minus_one_to_one():
    values = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    torch.testing.assert_close(to_pixels(values).flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_the_keep_mask_is_the_mask_turned_round():
    mask = torch.tensor([255, 0], dtype=torch.uint8).view(1, 1, 1, 2)
    assert to_keep_mask(mask).flatten().tolist() == [0.0, 1.0]


def test_image_and_masked_image_are_encoded_apart():
    config = tiny_config(Path("nowhere"), Path("nowhere"))
    model = LatentDiffusion(config.model).eval()
    generator = torch.Generator().manual_seed(0)

    def pixels(channels: int) -> torch.Tensor:
        return torch.randint(0, 256, (2, channels, 32, 32), generator=generator, dtype=torch.uint8)

    mask = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    mask[..., 8:24, 8:24] = 255
    valid = torch.full((2, 1, 32, 32), 255, dtype=torch.uint8)
    valid[..., 28:] = 0
    batch = {"image": pixels(3), "mask": mask, "valid": valid, "exemplar": pixels(3)}
    encoded = encode_batch(model, batch | {"sample_index": torch.arange(2)})
    grey = torch.where(mask > 0, torch.zeros(()), to_pixels(batch["image"]))
    with torch.no_grad():
        expected = [model.autoencoder.encode(x) for x in (to_pixels(batch["image"]), grey)]
        features = model.exemplar_encoder.features(model.normalise_exemplar(batch["exemplar"]))
    for posterior, wanted in zip((encoded.image, encoded.masked), expected, strict=True):
        torch.testing.assert_close(posterior.mean, wanted.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.std, wanted.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.features, features)
    hole = torch.ones(8, 8)
    hole[2:6, 2:6] = 0.0
    assert torch.equal(encoded.keep_mask, hole.expand(2, 1, 8, 8))
    assert encoded.valid[0, 0, 0].tolist() == [1.0] * 7 + [0.0]
    assert not encoded.features.requires_grad
