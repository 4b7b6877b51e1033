"""The paper's sizes, counted on the meta device, where a parameter takes no memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pbe.config import ModelConfig, load_config
from pbe.models import LatentDiffusion


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module", params=["defaults", "paper.yaml"])
def paper(request: pytest.FixtureRequest, project_root: Path) -> LatentDiffusion:
    config = (
        ModelConfig()
        if request.param == "defaults"
        else load_config(project_root / "configs" / request.param).model
    )
    with torch.device("meta"):
        return LatentDiffusion(config)


def test_networks_have_the_papers_sizes(paper: LatentDiffusion) -> None:
    assert count(paper.unet) == 859_535_364
    assert count(paper.autoencoder) == 83_653_863
    assert count(paper.exemplar_encoder.tower) == 303_179_776
    assert count(paper.exemplar_encoder.mapper) == 62_981_120


def test_parts_of_the_autoencoder(paper: LatentDiffusion) -> None:
    autoencoder = paper.autoencoder
    parts = (autoencoder.encoder, autoencoder.decoder, autoencoder.quant_conv, autoencoder.post_quant_conv)
    assert [count(part) for part in parts] == [34_163_592, 49_490_179, 72, 20]


def test_trained_parameters_are_those_of_the_original_optimizer(paper: LatentDiffusion) -> None:
    encoder = paper.exemplar_encoder
    trained = [paper.unet, encoder.mapper, encoder.final_norm, encoder.proj]
    assert sum(map(count, trained)) + encoder.null_condition.numel() == 923_306_500
    tensors = [tensor for module in trained for tensor in module.parameters()]
    assert len(tensors) + 1 == 751
    assert len(paper.unet.state_dict()) == 686
    assert encoder.reduce is None


def test_shapes_of_a_pass_at_512_pixels(paper: LatentDiffusion) -> None:
    with torch.device("meta"):
        images, exemplar = torch.randn(2, 3, 512, 512), torch.randn(2, 3, 224, 224)
        latents = paper.encode_images(images)
        condition = paper.encode_exemplar(exemplar)
        output = paper.predict(latents, torch.tensor([0, 999]), condition, latents, torch.ones(2, 1, 64, 64))
        decoded = paper.decode_latents(latents)
    assert latents.shape == output.shape == (2, 4, 64, 64)
    assert condition.shape == paper.null_condition(2).shape == (2, 1, 768)
    assert decoded.shape == images.shape
    assert paper.autoencoder.downsampling == 8
    assert paper.size_multiple == 8
