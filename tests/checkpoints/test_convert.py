"""The command: what it prints, what it proves, and the start of a training from Stable Diffusion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from pbe.checkpoints import saving
from pbe.checkpoints.loading import load_checkpoint
from pbe.checkpoints.saving import LAYOUTS, save_checkpoint
from pbe.checkpoints.tensors import LazyTensor
from pbe.config import Config, ModelConfig, save_yaml
from pbe.models import LatentDiffusion
from tests.checkpoints.small import original_state, same_weights, save_original, small_config
from tests.commands import convert as convert_checkpoint
from tests.models.tiny import randomised, relative

TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"


@pytest.fixture
def yaml(tmp_path: Path) -> str:
    """A configuration with the small model's sizes."""
    config = Config()
    config = replace(config, model=small_config(), data=replace(config.data, image_size=32, exemplar_size=32))
    save_yaml(config, tmp_path / "small.yaml")
    return str(tmp_path / "small.yaml")


def succeeds(*arguments: object) -> None:
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 0


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_table_of_what_was_found(
    small: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str
) -> None:
    path = save_original(
        tmp_path / "model.ckpt", small, optimizer_states=[{"state": {0: torch.ones(250_000)}}]
    )
    succeeds(path, tmp_path / "out", "--config", yaml, "--dtype", "bf16", "--verify")
    printed = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in small.parameters())
    assert f"{path}: compvis\n" in printed
    assert "exemplar encoder" in printed
    assert f"{count:,}" in printed
    assert "note: 12 schedule buffers\n" in printed
    assert "note: optimizer_states (1.0 MB, not read)" in printed
    assert printed.endswith(f"{count:,} parameters as bf16 in {tmp_path / 'out'}, verified\n")


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_from_every_other(small: LatentDiffusion, tmp_path: Path, target: str) -> None:
    for source in LAYOUTS:
        save_checkpoint(tmp_path / source, small, source)
        succeeds(tmp_path / source, tmp_path / f"{source}-out", "--to", target, "--verify")
        assert same_weights(load_checkpoint(tmp_path / f"{source}-out").model, small)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_single_file(small: LatentDiffusion, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "native", small)
    path = tmp_path / "out" / name
    succeeds(tmp_path / "native", path, "--to", "compvis", "--dtype", "fp16", "--verify")
    assert sorted(p.name for p in path.parent.iterdir()) == sorted((name, "model.yaml"))
    found = load_checkpoint(path).model.state_dict()
    assert all(torch.equal(found[key], value.half().float()) for key, value in small.state_dict().items())
    state = (
        load_file(path)
        if path.suffix == ".safetensors"
        else torch.load(path, weights_only=True)["state_dict"]
    )
    assert state["betas"].dtype == torch.float32
    assert state["learnable_vector"].dtype == torch.float16


@pytest.mark.parametrize("spoiled", ["tensor", "output"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_file_that_differs_is_not_left(
    small: LatentDiffusion,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoiled: str,
    existing: bool,
) -> None:
    save_checkpoint(tmp_path / "native", small)
    if existing:
        save_checkpoint(tmp_path / "out", small)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*")}
    if spoiled == "tensor":
        write = saving.write_layout

        def flawed(
            folder: Path, layout: str, config: ModelConfig, native: dict[str, LazyTensor], *rest: object
        ) -> None:
            zeros = torch.zeros(4)
            native = native | {"unet.conv_out.bias": LazyTensor((4,), torch.float32, lambda: zeros)}
            write(folder, layout, config, native, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(saving, "write_layout", flawed)
        match = "differs from its source in 'unet.conv_out.bias'; nothing was written"
    else:
        monkeypatch.setattr(saving, "_output", lambda *rest: torch.randn(3))
        match = "the unet of the converted model differs from its source by"
    assert match in complaint(capsys, tmp_path / "native", tmp_path / "out", "--verify")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*")} == before
    assert (tmp_path / "out").exists() == existing


def test_mistakes(small: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "native", small)
    assert "does not exist" in complaint(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "name IN and OUT, or with --from-sd OUT alone" in complaint(capsys, tmp_path / "native")
    assert 'Invalid value "onnx" for --to' in complaint(
        capsys, tmp_path / "native", tmp_path / "out", "--to", "onnx"
    )
    assert "holds other files" in complaint(
        capsys, tmp_path / "native", tmp_path / "native", "--to", "compvis"
    )
    tower = complaint(capsys, tmp_path / "native", tmp_path / "out", "--tower", "openai")
    assert "--tower goes with --from-sd only" in tower
    assert not (tmp_path / "out").exists()


def stable_diffusion(small: LatentDiffusion) -> dict[str, Tensor]:
    """A checkpoint of text-to-image in the original's layout, of the small model's sizes."""
    state = {key: v for key, v in original_state(small).items() if not key.startswith("cond_stage_model.")}
    for key in ("proj_out.weight", "proj_out.bias", "learnable_vector"):
        del state[key]
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return state | {key: state[key][:, :4].clone(), TEXT: torch.ones(8)}


def with_average(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the UNet as the average of another one, as the files with both are."""
    unet = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    average = {"model_ema." + key.removeprefix("model.").replace(".", ""): v for key, v in unet.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    return state | {key: torch.zeros_like(value) for key, value in unet.items()} | average | counters


@pytest.mark.parametrize("to", LAYOUTS)
def test_the_start_of_a_training(
    small: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str, to: str
) -> None:
    state = with_average(stable_diffusion(small))
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "v1-4.ckpt")
    succeeds("--from-sd", tmp_path / "v1-4.ckpt", tmp_path / "out", "--config", yaml, "--to", to, "--verify")
    printed = capsys.readouterr().out
    for said in (
        "1 tensors of the text encoder",
        "averaged (EMA) weights taken",
        "first convolution widened from 4 to 9 channels, with zeros",
        "exemplar encoder: fresh (seed 0)",
    ):
        assert f"note: {said}" in printed
    found, wanted = load_checkpoint(tmp_path / "out").model, small.state_dict()
    for key, value in found.state_dict().items():
        if key == "unet.conv_in.weight":
            assert torch.equal(value[:, :4], wanted[key][:, :4])
            assert not value[:, 4:].any()
        elif not key.startswith("exemplar_encoder."):
            assert torch.equal(value, wanted[key]), key


def test_the_first_forward_is_stable_diffusions(tmp_path: Path, yaml: str) -> None:
    """From the folder, with their own UNet, for any image and mask behind the noisy latents."""
    sizes = {"layers_per_block": 1, "block_out_channels": (32, 64)}
    unet = UNet2DConditionModel(
        **sizes,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=24,
    )
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    randomised(unet, std=0.05).save_pretrained(tmp_path / "sd" / "unet")  # type: ignore[operator]
    randomised(AutoencoderKL(**sizes, **kinds)).save_pretrained(tmp_path / "sd" / "vae")  # type: ignore[operator]
    text = tmp_path / "sd" / "text_encoder"
    text.mkdir()
    (text / "config.json").write_text('{"model_type": "clip_text_model"}')
    succeeds("--from-sd", tmp_path / "sd", tmp_path / "out", "--config", yaml, "--verify")
    model = load_checkpoint(tmp_path / "out").model
    x, context, timesteps = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 24), torch.tensor([1, 801])
    with torch.no_grad():
        expected = unet(x, timesteps, encoder_hidden_states=context).sample
        found = model.predict(x, timesteps, context, torch.randn(2, 4, 16, 16), torch.rand(2, 1, 16, 16))
    assert relative(found, expected) < 1e-5


def test_the_seed_and_the_towers_weights(
    small: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str
) -> None:
    torch.save(stable_diffusion(small), tmp_path / "sd.ckpt")
    torch.save(small.exemplar_encoder.tower.state_dict(), tmp_path / "tower.pt")
    start = ("--from-sd", tmp_path / "sd.ckpt", "--config", yaml)
    for name, *options in (("a", "--seed", 1), ("b", "--seed", 1), ("c", "--tower", tmp_path / "tower.pt")):
        succeeds(*start, tmp_path / name, *options)
    a, b, c = (load_checkpoint(tmp_path / name).model for name in "abc")
    assert same_weights(a, b)
    assert not torch.equal(a.exemplar_encoder.null_condition, c.exemplar_encoder.null_condition)
    wanted = small.exemplar_encoder.tower.state_dict()
    assert all(
        torch.equal(value, wanted[key]) for key, value in c.exemplar_encoder.tower.state_dict().items()
    )
    assert f"its tower is {small.config.exemplar_encoder.tower}" in capsys.readouterr().out


def test_what_no_training_starts_from(
    small: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str
) -> None:
    state = stable_diffusion(small)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save(state | {key: torch.zeros(32, 9, 3, 3)}, tmp_path / "inpainting.ckpt")
    arguments = ("--config", yaml, tmp_path / "out", "--from-sd")
    message = complaint(capsys, *arguments, tmp_path / "inpainting.ckpt")
    assert (
        "--from-sd wants a text-to-image model. It looks like a Stable Diffusion inpainting model" in message
    )
    del state["first_stage_model.quant_conv.bias"]
    torch.save(state, tmp_path / "partial.ckpt")
    assert "1 missing: first_stage_model.quant_conv.bias" in complaint(
        capsys, *arguments, tmp_path / "partial.ckpt"
    )
    assert "does not exist" in complaint(capsys, *arguments, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in complaint(capsys, *arguments, tmp_path / "empty")
