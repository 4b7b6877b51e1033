"""What is no model of this kind, or a broken one: one clear line that says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.saving import save_checkpoint
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.checkpoints.small import original_state, save_original, small_config, small_model

TEXT = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
INPUT = "model.diffusion_model.input_blocks.0.0.weight"


def complaint(path: Path, config: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, config=config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(small: LatentDiffusion, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", small, "diffusers")
    return tmp_path / "model"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kept", [0.0, 0.00001, 0.3, 0.9, 0.99999])
@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_truncated(small: LatentDiffusion, tmp_path: Path, layout: str, kept: float) -> None:
    save_checkpoint(tmp_path, small, layout)
    (path,) = [*tmp_path.glob("model.ckpt"), *tmp_path.glob("unet/*.safetensors")]
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert f"{path}: damaged" in complaint(tmp_path)


def test_damaged_inside(small: LatentDiffusion, tmp_path: Path) -> None:
    path = save_original(tmp_path / "model.ckpt", small)
    content = bytearray(path.read_bytes())
    place = content.index(b"_rebuild_tensor_v2") - 60
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert "damaged" in complaint(path, small_config())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>404</html>", "was a web page downloaded"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "written by torch before 1.6"),
        (b"\x89PNG\r\n\x1a\n and more", "neither a torch checkpoint nor a safetensors file"),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert match in complaint(path)


@pytest.mark.parametrize("layout", ["native", "compvis", "diffusers"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(
    small: LatentDiffusion, tmp_path: Path, layout: str, value: float
) -> None:
    save_checkpoint(tmp_path, small, layout)
    if layout == "compvis":
        state = original_state(small)
        state["first_stage_model.quant_conv.bias"][1] = value
        torch.save(state, tmp_path / "model.ckpt")
    else:
        (path,) = [*tmp_path.glob("autoencoder.safetensors"), *tmp_path.glob("vae/*.safetensors")]
        state = load_file(path)
        state["quant_conv.bias"][1] = value
        save_file(state, path)
    assert "'autoencoder.quant_conv.bias' holds NaN or infinity" in complaint(tmp_path)


def test_a_text_to_image_model(small: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    state = {key: v for key, v in original_state(small).items() if not key.startswith("cond_stage_model.")}
    state |= {TEXT: torch.zeros(2, 2), INPUT: state[INPUT][:, :4].clone()}
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    message = complaint(tmp_path / "sd.ckpt", small_config())
    assert "looks like a Stable Diffusion text-to-image model" in message
    assert "--from-sd" in message
    assert f"1 unexpected: {TEXT}" in message
    (folder / "image_encoder").rename(folder / "text_encoder")
    change(
        folder / "text_encoder" / "config.json", model_type="clip_text_model", architectures=["CLIPTextModel"]
    )
    change(folder / "unet" / "config.json", in_channels=4)
    assert "not a Paint by Example model. It looks like a Stable Diffusion text-to-image" in complaint(folder)


def test_an_inpainting_model(small: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    state = {key: v for key, v in original_state(small).items() if not key.startswith("cond_stage_model.")}
    torch.save({"state_dict": state | {TEXT: torch.zeros(2, 2)}}, tmp_path / "sd.ckpt")
    for config in (small_config(), None):
        message = complaint(tmp_path / "sd.ckpt", config)
        assert "looks like a Stable Diffusion inpainting model" in message
        assert "another order (latents, mask, masked image; here latents, masked image, mask)" in message
    (folder / "image_encoder").rename(folder / "text_encoder")
    change(
        folder / "text_encoder" / "config.json", model_type="clip_text_model", architectures=["CLIPTextModel"]
    )
    assert "inpainting model" in complaint(folder)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["conditioner.embedders.0.x"], "Stable Diffusion XL"),
        (["model.diffusion_model.x", "cond_stage_model.model.transformer.x"], "Stable Diffusion 2"),
        (["lora_unet_down.x"], "a LoRA"),
        (["control_model.x"], "a ControlNet"),
        (["down_blocks.0.resnets.0.conv1.weight"], "UNet alone of a folder in diffusers' layout"),
        (["encoder.down_blocks.0.x"], "autoencoder alone of a folder in diffusers' layout"),
        (["encoder.down.0.x"], "an autoencoder alone in the original's layout"),
        (["model.vision_model.x", "mapper.blocks.0.x"], "image encoder alone"),
        (["text_model.encoder.x"], "a text encoder alone"),
        (["fc.weight"], "none of the layouts known here"),
    ],
)
def test_what_a_file_looks_like(tmp_path: Path, keys: list[str], match: str) -> None:
    torch.save({key: torch.zeros(1, 1, 1, 1) for key in keys}, tmp_path / "x.pt")
    assert match in complaint(tmp_path / "x.pt")


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder"])
def test_one_part_of_a_folder(folder: Path, part: str) -> None:
    assert "give the whole folder" in complaint(folder / part)


def test_directories_without_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a model folder: it holds no weights" in complaint(tmp_path / "empty")
    assert "does not exist" in complaint(tmp_path / "nowhere")
    for path in (folder / "vae").glob("*.safetensors"):
        path.unlink()
    assert f"'{folder / 'vae'}' is not a model folder: it holds no weights" in complaint(folder)
    (folder / "vae" / "config.json").unlink()
    assert "is not a complete model: it has no autoencoder" in complaint(folder)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model_index.json").write_text("{}")
    assert "model_index.json, but no network" in complaint(tmp_path / "index")


def test_two_models_in_one_folder(small: LatentDiffusion, tmp_path: Path) -> None:
    save_original(tmp_path / "a.ckpt", small)
    save_original(tmp_path / "b.ckpt", small)
    assert "holds several models (a.ckpt, b.ckpt); name one of them" in complaint(tmp_path)


def test_a_smaller_model_without_its_configuration(small: LatentDiffusion, tmp_path: Path) -> None:
    save_original(tmp_path / "model.ckpt", small)
    (tmp_path / "v1.yaml").write_text("model: {}")
    message = complaint(tmp_path / "model.ckpt")
    assert "missing: " in message
    assert "misshapen: " in message
    assert "looks like the original's layout (32 channels wide, 9 input channels)" in message
    assert message.endswith("The official sizes were assumed; give its own as config (v1.yaml?)")


def test_a_yaml_of_the_original_for_a_folder_that_needs_none(
    small: LatentDiffusion, folder: Path, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "compvis", small, "compvis")
    message = complaint(folder, tmp_path / "compvis" / "config.yaml")
    assert "has a configuration of its own" in message


def test_another_noise_schedule(small: LatentDiffusion, tmp_path: Path) -> None:
    path = save_original(tmp_path / "model.ckpt", small)
    config = small_config()
    config.schedule.beta_end = 0.02
    assert "trained with another noise schedule (1000 timesteps, betas 0.00085 to 0.012)" in complaint(
        path, config
    )


@pytest.mark.parametrize(
    ("file", "values", "match"),
    [
        (
            "unet/config.json",
            {"use_linear_projection": True},
            "'use_linear_projection' is true; this model has false",
        ),
        ("unet/config.json", {"attention_head_dim": [4, 8]}, "one whole number for all levels"),
        ("unet/config.json", {"block_out_channels": [32, 48]}, "each must be a multiple of the first"),
        ("unet/config.json", {"block_out_channels": None}, "'block_out_channels' is missing"),
        (
            "unet/config.json",
            {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]},
            "blocks that this model does not",
        ),
        (
            "unet/config.json",
            {"in_channels": 4},
            "'in_channels' is 4. It looks like a Stable Diffusion text-to-image",
        ),
        ("vae/config.json", {"latents_mean": [0.0]}, "'latents_mean' is [0.0]"),
        ("vae/config.json", {"latent_channels": 16}, "'in_channels' is 9"),
        ("image_encoder/config.json", {"hidden_act": "relu"}, "this model has quick_gelu and gelu"),
        (
            "image_encoder/config.json",
            {"projection_dim": 77},
            "'projection_dim' is 77, but the UNet's context is 24",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "'beta_schedule' is \"linear\""),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "epsilon and v_prediction"),
    ],
)
def test_settings_that_this_model_does_not_have(
    folder: Path, file: str, values: dict[str, Any], match: str
) -> None:
    change(folder / file, **values)
    assert match in complaint(folder)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_json(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    message = complaint(folder)
    assert {"{": "not valid JSON", "[]": "not an object of settings"}[content] in message


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("transformer_depth: 1", "transformer_depth: 2", "'transformer_depth' is 2; this model has 1 only"),
        ("embed_dim: 4", "embed_dim: 3", "'embed_dim' is 3; it must equal 'z_channels'"),
        ("num_heads: 4", "", "'num_heads' is missing"),
        ("model:", "model: [", "not valid YAML"),
    ],
)
def test_wrong_yaml(small: LatentDiffusion, tmp_path: Path, old: str, new: str, match: str) -> None:
    save_checkpoint(tmp_path, small, "compvis")
    yaml = tmp_path / "config.yaml"
    assert old in yaml.read_text()
    yaml.write_text(yaml.read_text().replace(old, new))
    assert match in complaint(tmp_path)


def test_wrong_keys_are_listed_under_the_files_own_names(folder: Path) -> None:
    (path,) = (folder / "unet").glob("*.safetensors")
    state = load_file(path)
    del state["conv_in.bias"]
    state |= {"stranger": torch.zeros(1), "conv_out.bias": torch.zeros(5)}
    save_file(state, path)
    message = complaint(folder)
    assert (
        f"{folder / 'unet'} does not fit the model: 1 missing: conv_in.bias; 1 unexpected: stranger"
        in message
    )
    assert "1 misshapen: conv_out.bias (has [5], not [4])" in message


def test_an_input_convolution_that_is_no_kernel_is_one_line(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_model(), "compvis")
    file = tmp_path / "model.ckpt"
    content = torch.load(file, weights_only=False)
    content["state_dict"]["model.diffusion_model.input_blocks.0.0.weight"] = torch.tensor(1.0)
    torch.save(content, file)
    with pytest.raises(UserError, match="no input convolution"):
        load_checkpoint(tmp_path)
