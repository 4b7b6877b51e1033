"""Tiny networks of diffusers with their weights copied into ours: the same outputs, one token and many."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from pbe.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from pbe.diffusion.schedule import make_schedule
from pbe.diffusion.solvers import ddim
from pbe.models import UNet
from pbe.models.autoencoder import AutoencoderKL
from tests.models.tiny import randomised, relative
from tests.parity.compvis_keys import renamed

TIGHT = 1e-5
MULT = [1, 2, 3]
# Every level with and without transformers, with two blocks, so that no order of skips can pass by accident.
UNET = UNetConfig(
    model_channels=16,
    channel_mult=MULT,
    num_res_blocks=2,
    attention_factors=[1, 4],
    num_heads=4,
    context_dim=20,
    norm_groups=8,
)
AUTOENCODER = AutoencoderConfig(
    channels=16, channel_mult=MULT, num_res_blocks=2, latent_channels=4, norm_groups=8
)

RES = {"norm1": "norm1", "conv1": "conv1", "time_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
RES |= {"skip": "conv_shortcut"}


def attention(ours: str, theirs: str) -> dict[str, str]:
    names = {part: part for part in ("norm", "proj_in", "proj_out")}
    for layer in ("attn1", "attn2"):
        names |= {
            f"block.{layer}.{part}": f"transformer_blocks.0.{layer}.{part}"
            for part in ("to_q", "to_k", "to_v")
        }
        names[f"block.{layer}.to_out"] = f"transformer_blocks.0.{layer}.to_out.0"
    names |= {f"block.norm{i}": f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)}
    names |= {
        "block.ff.proj": "transformer_blocks.0.ff.net.0.proj",
        "block.ff.out": "transformer_blocks.0.ff.net.2",
    }
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


def block(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RES.items()}


def unet_names() -> dict[str, str]:
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    names |= block("mid1", "mid_block.resnets.0") | block("mid2", "mid_block.resnets.1")
    names |= attention("mid_attention", "mid_block.attentions.0")
    for level in range(len(MULT)):
        for side, count, change in (("down", 2, "downsample"), ("up", 3, "upsample")):
            ours, theirs = f"{side}.{level}", f"{side}_blocks.{level}"
            for index in range(count):
                names |= block(f"{ours}.blocks.{index}", f"{theirs}.resnets.{index}")
                names |= attention(f"{ours}.attentions.{index}", f"{theirs}.attentions.{index}")
            names[f"{ours}.{change}.conv"] = f"{theirs}.{change}rs.0.conv"
    return names


def autoencoder_names() -> dict[str, str]:
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, part, count, change in (
        ("encoder", "down_blocks", 2, "down"),
        ("decoder", "up_blocks", 3, "up"),
    ):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        names |= block(f"{side}.mid.block1", f"{side}.mid_block.resnets.0")
        names |= block(f"{side}.mid.block2", f"{side}.mid_block.resnets.1")
        middle = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        names |= {
            f"{side}.mid.attention.{a}": f"{side}.mid_block.attentions.0.{b}" for a, b in middle.items()
        }
        for level in range(len(MULT)):
            for index in range(count):
                names |= block(
                    f"{side}.levels.{level}.blocks.{index}", f"{side}.{part}.{level}.resnets.{index}"
                )
            names[f"{side}.levels.{level}.resample.conv"] = f"{side}.{part}.{level}.{change}samplers.0.conv"
    return names


def loaded(target: torch.nn.Module, source: torch.nn.Module, names: dict[str, str]) -> torch.nn.Module:
    """Copy the weights, linear layers into 1x1 convolutions too, and check that all of them went over."""
    state = renamed(source.state_dict(), names)
    assert sum(value.numel() for value in state.values()) == sum(p.numel() for p in source.parameters())
    shapes = {key: value.shape for key, value in target.state_dict().items()}
    target.load_state_dict({key: value.reshape(shapes[key]) for key, value in state.items()})
    return target.eval()


@pytest.fixture(scope="module")
def unets() -> tuple[UNet, UNet2DConditionModel]:
    reference = UNet2DConditionModel(
        in_channels=9,
        out_channels=4,
        block_out_channels=tuple(16 * mult for mult in MULT),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,  # under this name diffusers keeps the number of heads
        cross_attention_dim=20,
        norm_num_groups=8,
    )
    reference = randomised(reference)
    return loaded(UNet(UNET), reference, unet_names()), reference


@pytest.fixture(scope="module")
def autoencoders() -> tuple[AutoencoderKL, DiffusersAutoencoder]:
    reference = DiffusersAutoencoder(
        block_out_channels=tuple(16 * mult for mult in MULT),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
    )
    reference = randomised(reference)
    return loaded(AutoencoderKL(AUTOENCODER), reference, autoencoder_names()), reference


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, (8, 12)), (2, (8, 12)), (7, (8, 12)), (1, (9, 14)), (1, (5, 7))]
)
def test_unet(unets: tuple[UNet, UNet2DConditionModel], tokens: int, size: tuple[int, int]) -> None:
    ours, reference = unets
    x, timesteps, context = torch.randn(3, 9, *size), torch.tensor([0, 481, 999]), torch.randn(3, tokens, 20)
    with torch.no_grad():
        expected = reference(x, timesteps, encoder_hidden_states=context).sample
        assert relative(ours(x, timesteps, context), expected) < TIGHT


def test_autoencoder(autoencoders: tuple[AutoencoderKL, DiffusersAutoencoder]) -> None:
    ours, reference = autoencoders
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        expected, posterior = reference.encode(images).latent_dist, ours.encode(images)
        assert relative(posterior.mean, expected.mean) < TIGHT
        assert relative(posterior.std, expected.std) < TIGHT
        latents = posterior.sample(torch.randn_like(posterior.mean))
        assert relative(ours.decode(latents), reference.decode(latents).sample) < TIGHT


def test_divergence_sums_to_theirs(autoencoders: tuple[AutoencoderKL, DiffusersAutoencoder]) -> None:
    ours, reference = autoencoders
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = reference.encode(images).latent_dist.kl()
        assert relative(ours.encode(images).kl().sum(dim=(1, 2, 3)), expected) < TIGHT


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_follows_their_scheduler(steps: int) -> None:
    """With the original's settings: first timestep 1, and the last step ends at alphas_cumprod[0]."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)

    def noise(x: Tensor, timesteps: Tensor) -> Tensor:
        return torch.tanh(x.roll(1, dims=-1)) * (1 + timesteps[0] / 1000)

    x = x_T = torch.randn(2, 4, 6, 6)
    for timestep in scheduler.timesteps:
        x = scheduler.step(noise(x, timestep.repeat(2)), timestep, x).prev_sample
    assert relative(ddim(noise, x_T, make_schedule(ScheduleConfig()), steps), x) < TIGHT
