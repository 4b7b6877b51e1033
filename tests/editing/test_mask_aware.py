"""Edits with a mask-aware decoder: it is told the images, loaded or not, and other layouts refuse it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.checkpoints.native import load_model, save_model
from pbe.checkpoints.saving import check_layout
from pbe.editing import PaintByExample
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.codec import known_pixels
from tests.editing.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def aware() -> LatentDiffusion:
    model = make_tiny_model()
    model.autoencoder.make_mask_aware()
    model.config.autoencoder = model.autoencoder.config
    for projection in model.autoencoder.decoder.known.projections:
        torch.nn.init.normal_(projection.weight, std=0.3)
    return model.eval().requires_grad_(False)


def edit(model: LatentDiffusion, shift: int = 0, count: int = 1) -> np.ndarray:
    """Return edits whose latents are the same, whatever the image: what differs is the decoder's doing."""
    rows = np.arange(32, dtype=np.uint8)[:, None, None] * 4 + shift
    picture, mask = np.broadcast_to(rows, (32, 32, 3)).copy(), np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    edits = PaintByExample(model)(
        example_image=Image.fromarray(picture),
        image=[Image.fromarray(picture)] * count,
        mask_image=[Image.fromarray(mask)] * count,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(3),
        masked_image_latents=torch.zeros(1, 4, 8, 8),
        exemplar_embeds=torch.zeros(1, 1, 16),
        latents=torch.zeros(count, 4, 8, 8),
        preserve_background=False,
        output_type="np",
    )
    return np.asarray(edits.images)


def test_the_pipeline_tells_the_decoder_the_images(aware):
    assert np.array_equal(edit(make_tiny_model()), edit(make_tiny_model(), shift=90))
    assert not np.array_equal(edit(aware), edit(aware, shift=90))


def test_the_decoder_is_told_what_the_networks_see(aware, monkeypatch):
    told: list[torch.Tensor] = []
    decode = aware.autoencoder.decode
    monkeypatch.setattr(aware.autoencoder, "decode", lambda z, known: told.append(known) or decode(z, known))
    edit(aware, count=2)
    (known,) = told
    keep = torch.ones(2, 1, 32, 32)
    keep[..., 8:24, 8:24] = 0.0
    rows = (torch.arange(32.0) * 4 / 127.5 - 1.0).view(1, 1, 32, 1).expand(2, 3, 32, 32)
    assert torch.allclose(known, known_pixels(rows, keep), atol=1e-6)


def test_folders_carry_the_branch_and_other_layouts_refuse_it(aware, tmp_path: Path):
    save_model(tmp_path, aware)
    loaded = load_model(tmp_path)
    assert loaded.config.autoencoder.mask_aware_decoder
    assert np.array_equal(edit(loaded), edit(aware))
    for layout in ("compvis", "diffusers"):
        with pytest.raises(UserError, match=f"the {layout} layout has no place for a mask-aware decoder"):
            check_layout(aware.config, layout)
