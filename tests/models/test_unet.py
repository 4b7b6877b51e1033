"""The UNet: order of its inputs, starting point, sizes, and what its output depends on."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pbe.config import UNetConfig
from pbe.models import UNet
from pbe.models.convolution import is_channels_last
from pbe.models.layers import ChannelNorm, Downsample, GroupNorm, ResBlock, Upsample, timestep_embedding
from pbe.models.unet import DeepFeatures
from tests.models.tiny import randomised, relative, tiny_unet_config


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return randomised(UNet(tiny_unet_config()))


def inputs(batch: int = 2, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 9, size, size), torch.randint(0, 1000, (batch,)), torch.randn(batch, 1, 24)


def test_each_input_channel_meets_its_own_slice_of_the_first_kernel(unet: UNet) -> None:
    x, timesteps, context = inputs(1)
    before = unet(x, timesteps, context)
    for channel in range(9):
        moved = x.clone()
        moved[:, channel] += torch.randn(8, 8)
        muted = UNet(tiny_unet_config()).eval()
        muted.load_state_dict(unet.state_dict())
        with torch.no_grad():
            muted.conv_in.weight[:, channel] = 0.0
        assert relative(unet(moved, timesteps, context), before) > 1e-4
        assert torch.equal(muted(moved, timesteps, context), muted(x, timesteps, context))


def test_number_of_input_channels_follows_the_latents() -> None:
    wide = UNet(tiny_unet_config(), latent_channels=7)
    assert wide.conv_in.in_channels == 15
    assert wide(torch.randn(1, 15, 4, 4), torch.tensor([3]), torch.randn(1, 1, 24)).shape == (1, 7, 4, 4)


def test_fresh_unet_gives_zero() -> None:
    assert not bool(UNet(tiny_unet_config())(*inputs()).any())


def test_output_depends_on_timestep_and_condition(unet: UNet) -> None:
    x, _, context = inputs(1)
    early, late = unet(x, torch.tensor([1]), context), unet(x, torch.tensor([981]), context)
    assert relative(late, early) > 1e-3
    assert relative(unet(x, torch.tensor([1]), torch.randn(1, 1, 24)), early) > 1e-3


def test_samples_of_a_batch_do_not_meet(unet: UNet) -> None:
    x, timesteps, context = inputs(3)
    whole = unet(x, timesteps, context)
    alone = torch.cat([unet(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]) for i in range(3)])
    assert relative(whole, alone) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 10), (6, 4), (5, 4), (7, 3), (1, 1)])
def test_any_grid(unet: UNet, height: int, width: int) -> None:
    assert unet(torch.randn(1, 9, height, width), torch.tensor([5]), torch.randn(1, 1, 24)).shape == (
        1,
        4,
        height,
        width,
    )


def test_transformers_stand_where_the_configuration_says() -> None:
    config = UNetConfig(
        model_channels=8, channel_mult=[1, 2, 2], attention_factors=[2], num_heads=2, norm_groups=4
    )
    unet = UNet(config)
    assert [len(level.attentions) for level in unet.down] == [0, 2, 0]
    assert [len(level.attentions) for level in unet.up] == [0, 3, 0]
    assert [block.skip is not None for level in unet.up for block in level.blocks] == [True] * 9


def test_only_dead_weights_are_without_gradient(unet: UNet) -> None:
    fresh = UNet(tiny_unet_config())
    fresh.load_state_dict(unet.state_dict())
    fresh(*inputs()).square().sum().backward()
    dead = {name for name, parameter in fresh.named_parameters() if parameter.grad is None}
    assert dead
    assert all(".attn2.to_q" in name or ".attn2.to_k" in name or ".block.norm2" in name for name in dead)


def test_timestep_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0, 7, 999]), 8)
    for row, t in zip(embedding.tolist(), (0, 7, 999), strict=True):
        frequencies = [10_000.0 ** (-k / 4) for k in range(4)]
        expected = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
        assert row == pytest.approx(expected, abs=2e-5)


def test_residual_block_starts_as_its_skip_only_with_a_time_embedding() -> None:
    x, time = torch.randn(1, 8, 4, 4), torch.randn(1, 12)
    assert torch.equal(ResBlock(8, 8, groups=4, time_dim=12)(x, time), x)
    assert relative(ResBlock(8, 8, groups=4)(x), x) > 0.01


def test_epsilons_of_the_norms() -> None:
    """They show only where activations are faint, so they are read off: 1e-6 in front of transformers."""
    for name, module in UNet(tiny_unet_config()).named_modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            assert module.eps == (1e-6 if re.search(r"attention(s\.\d+)?\.norm$", name) else 1e-5), name


def test_changes_of_resolution() -> None:
    x = torch.randn(1, 4, 6, 8)
    assert Upsample(4)(x).shape == (1, 4, 12, 16)
    assert Downsample(4)(x).shape == Downsample(4, asymmetric=True)(x).shape == (1, 4, 3, 4)
    asymmetric = Downsample(4, asymmetric=True)
    with torch.no_grad():
        asymmetric.conv.weight.zero_()
        asymmetric.conv.bias.zero_()
        asymmetric.conv.weight[:, :, 0, 0] = torch.eye(4)
    # the kernel's first tap reads the very pixels when only right and bottom are padded
    assert torch.equal(asymmetric(x), x[:, :, ::2, ::2])


@pytest.mark.parametrize("side", [6, 40])
def test_group_norm_has_torchs_numbers_and_gradients_in_both_layouts(side: int) -> None:
    norm = GroupNorm(4, 8).double()
    torch.nn.init.normal_(norm.weight)
    x = (
        torch.randn(2, 8, side, side, dtype=torch.float64)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    made, expected = norm(x), F.group_norm(x.contiguous(), 4, norm.weight, norm.bias, norm.eps)
    assert is_channels_last(made)
    assert relative(made, expected) < 1e-12
    direction, given = torch.randn_like(expected), (x, norm.weight, norm.bias)
    pairs = zip(*(torch.autograd.grad(each, given, direction) for each in (made, expected)), strict=True)
    assert all(relative(*pair) < 1e-12 for pair in pairs)


def test_channel_norm_takes_mean_and_deviation_over_the_channels_of_a_position() -> None:
    norm = ChannelNorm(6, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
        norm.bias.copy_(torch.randn(6))
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
    weight, bias = (p.double().view(1, 6, 1, 1) for p in (norm.weight, norm.bias))
    expected = (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias
    torch.testing.assert_close(norm.double()(x), expected)


def test_norm_over_channels_sees_no_other_position() -> None:
    config = replace(tiny_unet_config(), norm="channel")
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in UNet(config).modules())


def test_modulation_scales_and_shifts_after_the_second_norm() -> None:
    block = randomised(ResBlock(8, 8, groups=4, time_dim=12, modulation=True))
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 12)
    scale, shift = block.time_proj(F.silu(time)).view(2, 2, 8, 1, 1).unbind(1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, time), x + block.conv2(F.silu(h)))


def test_modulation_brings_the_condition_to_blocks_without_attention() -> None:
    config = replace(tiny_unet_config(), attention_factors=[], modulation=True)
    unet = randomised(UNet(config))
    with torch.no_grad():  # the middle attends always: silence it
        unet.mid_attention.proj_out.weight.zero_()
    x, timesteps, context = inputs()
    assert relative(unet(x, timesteps, context + 1.0), unet(x, timesteps, context)) > 1e-3
    plain = randomised(UNet(replace(config, modulation=False)))
    with torch.no_grad():
        plain.mid_attention.proj_out.weight.zero_()
    assert torch.equal(plain(x, timesteps, context + 1.0), plain(x, timesteps, context))


VARIANTS = {
    "plain": {},
    "channel norm": {"norm": "channel"},
    "modulation": {"modulation": True},
    "first attention late": {"attention_factors": [2]},
    "toy": {"attention_factors": [2], "norm": "channel", "modulation": True},
}
# float32 differs by the rounding of the first convolution, which is split, through all layers
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("variant", list(VARIANTS))
@torch.no_grad()
def test_prepared_calls_give_what_plain_calls_give(variant: str, tokens: int, dtype: torch.dtype) -> None:
    unet = randomised(UNet(replace(tiny_unet_config(), **VARIANTS[variant]))).to(dtype)
    for samples, conditions in ((1, 1), (1, 2), (3, 1), (3, 2)):
        x, masked, keep = (torch.randn(samples, channels, 7, 6, dtype=dtype) for channels in (4, 4, 1))
        condition = torch.randn(samples * conditions, tokens, 24, dtype=dtype)
        prepared = unet.prepare(condition, masked, keep, torch.tensor([981.0, 2.5, 981.0]))
        for timestep in (2.5, 981.0):
            whole = torch.cat([x, masked, keep], dim=1).repeat(conditions, 1, 1, 1)
            expected = unet(whole, torch.full((len(whole),), timestep), condition)
            actual = unet(x.repeat(conditions, 1, 1, 1), torch.full((len(whole),), timestep), prepared)
            assert relative(actual, expected) < TOLERANCES[dtype]


@torch.no_grad()
def test_what_comes_before_the_condition_runs_once_for_both_halves(unet: UNet) -> None:
    seen = {}
    watched = {"block": unet.down[0].blocks[0], "attention": unet.down[0].attentions[0].block.attn1}
    watched |= {"feed-forward": unet.down[0].attentions[0].block.ff, "time": unet.time_embed}
    handles = [
        module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: len(inputs[0])}))
        for name, module in watched.items()
    ]
    prepared = unet.prepare(torch.randn(6, 1, 24), *torch.randn(3, 5, 8, 8).split([4, 1], 1), torch.arange(9))
    assert seen == {"time": 9}
    del seen["time"]
    unet(torch.randn(3, 4, 8, 8).repeat(2, 1, 1, 1), torch.full((6,), 5), prepared)
    assert seen == {"block": 3, "attention": 3, "feed-forward": 6}
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_a_timestep_that_was_not_prepared_gives_no_number(unet: UNet) -> None:
    prepared = unet.prepare(torch.randn(1, 1, 24), *torch.randn(1, 5, 4, 4).split([4, 1], 1), torch.arange(9))
    assert bool(unet(torch.randn(1, 4, 4, 4), torch.tensor([9]), prepared).isnan().all())


@torch.no_grad()
def test_prepared_calls_in_bfloat16_are_as_close_to_float32_as_plain_ones(unet: UNet) -> None:
    half = UNet(tiny_unet_config()).eval().to(torch.bfloat16)
    half.load_state_dict(unet.state_dict())
    x, masked, keep = (torch.randn(2, channels, 16, 16) for channels in (4, 4, 1))
    condition, timesteps = torch.randn(4, 1, 24), torch.tensor([300, 300])
    whole = torch.cat([x, masked, keep], dim=1).repeat(2, 1, 1, 1)
    expected = unet(whole, timesteps.repeat(2), condition)
    plain = half(whole.bfloat16(), timesteps.repeat(2), condition.bfloat16())
    prepared = half.prepare(*(part.bfloat16() for part in (condition, masked, keep)), timesteps)
    actual = half(x.bfloat16().repeat(2, 1, 1, 1), timesteps.repeat(2), prepared)
    assert (actual - expected).std() < 1.2 * (plain - expected).std()


@pytest.mark.parametrize("variant", ["plain", "toy"])
@torch.no_grad()
def test_shared_features_are_those_of_the_first_call(variant: str) -> None:
    """At the same input sharing is exact; inner levels run in one call of ``every``, the outermost in all."""
    unet = randomised(UNet(replace(tiny_unet_config(), **VARIANTS[variant]))).double()
    x, masked, keep = (torch.randn(2, channels, 7, 6, dtype=torch.float64) for channels in (4, 4, 1))
    prepared = unet.prepare(torch.randn(4, 1, 24, dtype=torch.float64), masked, keep, torch.tensor([5.0]))
    ran = {"outer": 0, "inner": 0}
    for name, level in (("outer", unet.down[0]), ("inner", unet.down[1])):
        level.register_forward_hook(lambda *_, name=name: ran.update({name: ran[name] + 1}))
    doubled, timesteps, deep = x.repeat(2, 1, 1, 1), torch.full((4,), 5.0), DeepFeatures(3)
    expected = unet(doubled, timesteps, prepared)
    for _ in range(7):
        assert relative(unet(doubled, timesteps, prepared, deep), expected) < 1e-12
    assert ran == {"outer": 8, "inner": 4}
    moved = unet(doubled + 0.5, timesteps, prepared, deep)
    assert 1e-6 < relative(moved, unet(doubled + 0.5, timesteps, prepared)) < 1.0


@torch.no_grad()
def test_features_of_another_batch_are_not_taken(unet: UNet) -> None:
    deep = DeepFeatures(5)
    for samples in (1, 2, 1):
        x, fixed = torch.randn(samples, 4, 8, 8), torch.randn(samples, 5, 8, 8).split([4, 1], 1)
        prepared = unet.prepare(torch.randn(samples, 1, 24), *fixed, torch.arange(9))
        timesteps = torch.full((samples,), 5)
        assert torch.equal(unet(x, timesteps, prepared, deep), unet(x, timesteps, prepared))


@pytest.mark.parametrize("modulation", [False, True])
def test_guidance_as_an_input_starts_without_effect_and_is_told_by_its_place(modulation: bool) -> None:
    torch.manual_seed(0)
    unet = randomised(UNet(replace(tiny_unet_config(), modulation=modulation)))
    x, timesteps, context = inputs()
    before = unet(x, timesteps, context)
    unet.take_guidance([1.0, 9.0], 4)
    assert (unet.config.guidance_range, unet.config.few_steps) == ([1.0, 9.0], 4)
    assert torch.equal(unet(x, timesteps, context, guidance=torch.tensor([2.0, 5.0])), before)
    assert unet.guidance_embed is not None
    with torch.no_grad():
        unet.guidance_embed.weight.normal_(std=0.5)
    low, high = (unet(x, timesteps, context, guidance=torch.tensor([scale])) for scale in (2.0, 5.0))
    each = unet(x, timesteps, context, guidance=torch.tensor([2.0, 5.0]))
    assert relative(low, high) > 1e-3
    assert torch.allclose(each, torch.stack([low[0], high[1]]), atol=1e-5)
    place = timestep_embedding(torch.tensor([999 * (5.0 - 1.0) / 8.0]), unet.config.model_channels)
    with torch.no_grad():  # the same as a bias of the time embedding
        unet.time_embed[2].bias += unet.guidance_embed(place)[0]
        unet.guidance_embed.weight.zero_()
    assert torch.allclose(unet(x, timesteps, context, guidance=torch.tensor([2.0])), high, atol=1e-5)


def test_prepared_calls_know_the_guidance_scale() -> None:
    torch.manual_seed(0)
    unet = UNet(replace(tiny_unet_config(), guidance_range=[1.0, 8.0]))
    unet = randomised(unet)
    x, condition, fixed = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 24), torch.randn(2, 5, 8, 8)
    timesteps = torch.tensor([700, 700])
    for scales in (torch.tensor([3.0]), torch.tensor([1.5, 6.0])):
        plain = unet(torch.cat([x, fixed], dim=1), timesteps, condition, guidance=scales)
        prepared = unet.prepare(condition, *fixed.split([4, 1], 1), torch.arange(900), scales)
        assert relative(unet(x, timesteps, prepared), plain) < 1e-5


def test_guidance_that_is_missing_is_an_error_and_one_scale_needs_none() -> None:
    with pytest.raises(ValueError, match="takes the guidance scale as an input"):
        UNet(replace(tiny_unet_config(), guidance_range=[1.0, 8.0]))(*inputs())
    assert UNet(replace(tiny_unet_config(), guidance_range=[5.0, 5.0])).guidance_embed is None
