"""Every layout there and back without loss, and files of every shape and age recognised by what is inside."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbe.checkpoints import saving
from pbe.checkpoints.loading import Loaded, load_checkpoint, open_checkpoint
from pbe.checkpoints.saving import LAYOUTS, layout_files, save_checkpoint
from pbe.checkpoints.settings import Usage
from pbe.config import Config, ModelConfig, save_yaml
from pbe.errors import UserError
from pbe.models import LatentDiffusion
from tests.checkpoints.small import (
    original_state,
    same_weights,
    save_original,
    small_config,
    small_model,
    with_unet,
)
from tests.models.tiny import tiny_model_config

SHARDS = "diffusion_pytorch_model-0000{}-of-00002.safetensors"


@pytest.fixture
def folders(small: LatentDiffusion, tmp_path: Path) -> dict[str, Path]:
    for layout in LAYOUTS:
        save_checkpoint(tmp_path / layout, small, layout)
    return {layout: tmp_path / layout for layout in LAYOUTS}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def unusual_config() -> ModelConfig:
    """Everything that the layouts can hold, at values that none of them takes by itself."""
    config = with_unet(
        num_res_blocks=2, channel_mult=[1, 1, 3], attention_factors=[2, 4], norm_groups=8, time_embed_mult=2
    )
    autoencoder = replace(
        config.autoencoder,
        channel_mult=[1, 2, 2],
        norm_groups=16,
        scale_factor=0.5,
        num_res_blocks=2,
        mid_attention=False,
    )
    encoder = replace(
        config.exemplar_encoder, tower="vit/48x4-patch8-heads3-mlp50", image_size=24, mapper_heads=2,
        mapper_layers=2, mapper_mlp_ratio=3, mean=[0.5, 0.25, 0.5], std=[0.5, 0.5, 0.125],
    )  # fmt: skip
    return replace(
        config,
        prediction="v",
        image_size=64,
        autoencoder=autoencoder,
        exemplar_encoder=encoder,
        schedule=replace(config.schedule, timesteps=100, beta_start=0.001, beta_end=0.02),
    )


@pytest.mark.parametrize("config", [small_config(), unusual_config()], ids=["usual", "unusual"])
@pytest.mark.parametrize("first", ["compvis", "diffusers"])
def test_round_trips_are_bit_identical(tmp_path: Path, first: str, config: ModelConfig) -> None:
    model = small_model(config)
    save_checkpoint(tmp_path / "start", model)
    save_checkpoint(tmp_path / "there", load_checkpoint(tmp_path / "start").model, first)
    there = load_checkpoint(tmp_path / "there")
    assert there.layout == first
    assert there.model.config == config
    assert same_weights(there.model, model)
    save_checkpoint(tmp_path / "back", there.model)
    assert files(tmp_path / "back") == files(tmp_path / "start")


def test_original_to_native_to_original_is_bit_identical(small: LatentDiffusion, tmp_path: Path) -> None:
    """Buffers and position indices, which no native folder holds, come out as they went in."""
    path = save_original(tmp_path / "model.ckpt", small)
    save_checkpoint(tmp_path / "out", load_checkpoint(path, config=small_config()).model, "compvis")
    before, after = (
        torch.load(file, weights_only=True)["state_dict"] for file in (path, tmp_path / "out" / "model.ckpt")
    )
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_rounds_once(
    small: LatentDiffusion, tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    save_checkpoint(tmp_path / layout, small, layout, dtype)
    found = load_checkpoint(tmp_path / layout).model.state_dict()
    for key, value in small.state_dict().items():
        assert torch.equal(found[key], value.to(dtype).float()), key
    assert {value.dtype for value in open_checkpoint(tmp_path / layout).tensors.values()} == {dtype}
    loaded = load_checkpoint(tmp_path / layout, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_loaded_models_are_ready_to_run(folders: dict[str, Path], small: LatentDiffusion) -> None:
    for layout, folder in folders.items():
        loaded = load_checkpoint(folder)
        assert isinstance(loaded, Loaded)
        assert loaded.layout == layout
        files = (loaded.usage.scheduler, loaded.usage.preprocessor)
        assert [each is not None for each in files] == [layout == "diffusers"] * 2
        assert not any(module.training for module in loaded.model.modules())
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        pixels = torch.randn(1, 3, 32, 32)
        assert torch.equal(loaded.model.encode_exemplar(pixels), small.encode_exemplar(pixels))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_files_do_not_matter(folders: dict[str, Path], small: LatentDiffusion, layout: str) -> None:
    folder = folders[layout]
    if layout == "compvis":
        (folder / "model.ckpt").rename(folder / "last.pt")
        (folder / "config.yaml").rename(folder / "v1.yaml")
    elif layout == "diffusers":
        (folder / "unet").rename(folder / "denoiser")
        (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "x.safetensors")
        (folder / "model_index.json").unlink()
    loaded = load_checkpoint(folder.rename(folder.with_name("model")))
    assert loaded.layout == layout
    assert same_weights(loaded.model, small)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("suffix", ["ckpt", "bin", "weird"])
def test_bare_dictionaries(small: LatentDiffusion, tmp_path: Path, suffix: str, nested: bool) -> None:
    state = original_state(small)
    path = tmp_path / f"model.{suffix}"
    torch.save({"state_dict": state} if nested else state, path)
    assert same_weights(load_checkpoint(path, config=small_config()).model, small)


def test_original_layout_as_safetensors_and_in_shards(small: LatentDiffusion, tmp_path: Path) -> None:
    state = original_state(small)
    save_file(state, tmp_path / "one.safetensors")
    assert same_weights(load_checkpoint(tmp_path / "one.safetensors", config=small_config()).model, small)
    keys = sorted(state)
    folder = tmp_path / "shards"
    folder.mkdir()
    for index, part in enumerate((keys[:100], keys[100:])):
        save_file({key: state[key] for key in part}, folder / SHARDS.format(index + 1))
    assert same_weights(load_checkpoint(folder, config=small_config()).model, small)
    weight_map = {key: SHARDS.format(1 + (key not in keys[:100])) for key in keys}
    (folder / "x.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_weights(load_checkpoint(folder, config=small_config()).model, small)
    (folder / SHARDS.format(2)).unlink()
    with pytest.raises(
        UserError, match=r"shard 'diffusion_pytorch_model-00002-of-00002\.safetensors' is missing"
    ):
        load_checkpoint(folder, config=small_config())
    (folder / "x.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="not one complete model"):
        load_checkpoint(folder, config=small_config())


def test_the_state_dict_of_a_training_task(small: LatentDiffusion, tmp_path: Path) -> None:
    state = {f"model.{key}": value for key, value in small.state_dict().items()} | {"ema.x": torch.ones(1)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "last.ckpt")
    loaded = load_checkpoint(tmp_path / "last.ckpt", config=small_config())
    assert loaded.layout == "native"
    assert same_weights(loaded.model, small)


def older(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The names that the folder of 2022 has."""
    if part == "vae":
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for today, then in names.items():
            state = {
                key.replace(f".attentions.0.{today}.", f".attentions.0.{then}."): v
                for key, v in state.items()
            }
    if part == "image_encoder":
        state["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return state


def newer(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The names that transformers 5 writes."""
    return {key.replace("model.vision_model.", "model."): value for key, value in state.items()}


@pytest.mark.parametrize("age", [older, newer])
def test_folders_of_every_age(folders: dict[str, Path], small: LatentDiffusion, age: object) -> None:
    for part in ("unet", "vae", "image_encoder"):
        (path,) = (folders["diffusers"] / part).glob("*.safetensors")
        state = age(load_file(path), part)  # type: ignore[operator]
        path.unlink()
        torch.save(state, path.with_suffix(".bin"))
    assert same_weights(load_checkpoint(folders["diffusers"]).model, small)


def test_a_tower_as_transformers_5_names_it_in_a_checkpoint(small: LatentDiffusion, tmp_path: Path) -> None:
    state = {
        key.replace(".transformer.vision_model.", ".transformer."): v
        for key, v in original_state(small).items()
    }
    torch.save(state, tmp_path / "model.ckpt")
    assert same_weights(load_checkpoint(tmp_path / "model.ckpt", config=small_config()).model, small)


def test_full_precision_is_taken_before_a_variant(folders: dict[str, Path], small: LatentDiffusion) -> None:
    part = folders["diffusers"] / "unet"
    (path,) = part.glob("*.safetensors")
    save_file(
        {key: value.half() for key, value in load_file(path).items()},
        part / "diffusion_pytorch_model.fp16.safetensors",
    )
    torch.save(load_file(path), part / "diffusion_pytorch_model.bin")
    assert same_weights(load_checkpoint(folders["diffusers"]).model, small)


def test_configurations_of_every_kind(small: LatentDiffusion, tmp_path: Path) -> None:
    path = save_original(tmp_path / "model.ckpt", small)
    save_checkpoint(tmp_path / "folder", small, "compvis")
    save_yaml(
        replace(Config(), model=small_config(), data=replace(Config().data, image_size=32, exemplar_size=32)),
        tmp_path / "ours.yaml",
    )
    shutil.copy(tmp_path / "folder" / "config.yaml", tmp_path / "theirs.yaml")
    for config in (small_config(), tmp_path / "ours.yaml", str(tmp_path / "theirs.yaml")):
        assert same_weights(load_checkpoint(path, config=config).model, small)
    # the tower's sizes are not in the original's YAML, but its weights show them
    assert "params" not in OmegaConf.load(tmp_path / "theirs.yaml").model.params.cond_stage_config
    (tmp_path / "theirs.yaml").rename(tmp_path / "model.yaml")
    assert same_weights(load_checkpoint(path).model, small)


def test_a_safety_checker_inside_is_found(folders: dict[str, Path], small: LatentDiffusion) -> None:
    folder = folders["diffusers"] / "safety_checker"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"architectures": ["StableDiffusionSafetyChecker"], "model_type": "clip"}'
    )
    assert load_checkpoint(folders["diffusers"]).safety_checker is None
    torch.save({}, folder / "pytorch_model.bin")
    save_checkpoint(folders["diffusers"], small, "diffusers")
    assert load_checkpoint(folders["diffusers"]).safety_checker == folder


def test_the_scheduler_is_kept(small: LatentDiffusion, tmp_path: Path) -> None:
    scheduler = {"_class_name": "UniPCMultistepScheduler", "solver_order": 2, "beta_start": 7}
    save_checkpoint(tmp_path, small, "diffusers", usage=Usage(scheduler=scheduler))
    found = load_checkpoint(tmp_path).usage.scheduler
    assert found is not None
    assert found["_class_name"] == "UniPCMultistepScheduler"
    assert found["solver_order"] == 2
    assert found["beta_start"] == small.config.schedule.beta_start


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failing_save_leaves_the_older_model(
    small: LatentDiffusion, folders: dict[str, Path], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folders[layout])
    broken = small_model()
    with torch.no_grad():
        broken.exemplar_encoder.proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"the model: '\S*proj\S*' holds NaN"):
        save_checkpoint(folders[layout], broken, layout)
    assert files(folders[layout]) == before
    save_checkpoint(folders[layout], small, layout, torch.float16)
    assert (
        files(folders[layout]).keys()
        == before.keys()
        == {name.replace("/", "/") for name in layout_files(layout)}
    )


def test_numbers_too_large_for_half_precision(small: LatentDiffusion, tmp_path: Path) -> None:
    large = small_model()
    with torch.no_grad():
        large.unet.conv_out.bias[0] = 1e6
    with pytest.raises(UserError, match="too large for half precision; use bf16"):
        save_checkpoint(tmp_path / "out", large, "native", torch.float16)
    assert not (tmp_path / "out").exists()
    save_checkpoint(tmp_path / "out", large, "native", torch.bfloat16)


def test_no_two_models_in_one_folder(small: LatentDiffusion, folders: dict[str, Path]) -> None:
    for layout, folder in folders.items():
        for other in set(LAYOUTS) - {layout}:
            with pytest.raises(UserError, match="holds other files of a model"):
                save_checkpoint(folder, small, other)


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_models_that_other_layouts_cannot_hold(tmp_path: Path, layout: str) -> None:
    toy, shortcut, tokens = tiny_model_config(), small_config(), small_config()
    shortcut.autoencoder.patch_shortcut = True
    tokens.exemplar_encoder.tokens = "all"
    folded, channel, modulated, positions = (small_config() for _ in range(4))
    folded.autoencoder.patch = 2
    channel.unet.norm = "channel"
    modulated.unet.modulation = True
    positions.exemplar_encoder.layout_grid = 2
    for config, match in (
        (toy, "the tower 'timm/"),
        (shortcut, "patch shortcut"),
        (tokens, "all tokens"),
        (folded, "folds patches"),
        (channel, "norms over channels"),
        (modulated, "modulation"),
        (positions, "a layout pooling in the condition"),
    ):
        with pytest.raises(
            UserError, match=f"the {layout} layout has no place for .*{match}.*keep the native layout"
        ):
            save_checkpoint(tmp_path / "out", LatentDiffusion(config), layout)
    assert not (tmp_path / "out").exists()


def test_a_layout_that_is_none(small: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("no layout 'onnx'; there are: native, compvis, diffusers")):
        saving.save_checkpoint(tmp_path, small, "onnx")
