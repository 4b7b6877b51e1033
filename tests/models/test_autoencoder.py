"""The autoencoder: its Gaussian, its sizes, and that latents and images line up in space."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch.distributions import Normal, kl_divergence

from pbe.config import AutoencoderConfig
from pbe.models import AutoencoderKL
from pbe.models.codec import Posterior, SpatialAttention
from tests.models.tiny import randomised, relative, tiny_autoencoder_config


def test_divergence_equals_that_of_torch() -> None:
    mean, std = (
        torch.randn(2, 4, 3, 3, dtype=torch.float64),
        torch.rand(2, 4, 3, 3, dtype=torch.float64) + 0.1,
    )
    expected = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), torch.ones_like(std)))
    torch.testing.assert_close(Posterior(mean, std).kl(), expected)


def test_sample_is_mean_plus_scaled_noise() -> None:
    mean, std, noise = torch.randn(3, 1, 4, 2, 2).unbind(0)
    assert torch.equal(Posterior(mean, std.abs()).sample(noise), mean + std.abs() * noise)


@pytest.mark.parametrize(("log_variance", "expected"), [(100.0, 20.0), (-100.0, -30.0), (1.5, 1.5)])
def test_log_variance_is_clamped(log_variance: float, expected: float) -> None:
    model = AutoencoderKL(tiny_autoencoder_config()).eval()
    with torch.no_grad():
        model.quant_conv.weight.zero_()
        model.quant_conv.bias.copy_(torch.tensor([0.25] * 4 + [log_variance] * 4))
        posterior = model.encode(torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(posterior.std, torch.full((1, 4, 4, 4), expected / 2).exp())
    assert torch.equal(posterior.mean, torch.full((1, 4, 4, 4), 0.25))


@pytest.mark.parametrize("attention", [True, False])
def test_sizes(attention: bool) -> None:
    config = AutoencoderConfig(
        channels=8,
        channel_mult=[1, 1, 2],
        num_res_blocks=1,
        latent_channels=6,
        norm_groups=4,
        mid_attention=attention,
    )
    model = AutoencoderKL(config)
    assert model.downsampling == 4
    assert (model.encoder.mid.attention is not None) is attention
    posterior = model.encode(torch.randn(2, 3, 16, 24))
    assert posterior.mean.shape == posterior.std.shape == (2, 6, 4, 6)
    assert model.decode(posterior.mean).shape == (2, 3, 16, 24)


def test_patch_shortcut_adds_a_linear_map_of_whole_patches() -> None:
    config = tiny_autoencoder_config()
    config.patch_shortcut = True
    model = randomised(AutoencoderKL(config))
    plain = AutoencoderKL(tiny_autoencoder_config()).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("patch_")})
    images, latents = torch.rand(2, 3, 8, 12) * 2 - 1, torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        # row i of the kernel, flattened, is what latent channel i reads of a patch
        patches = torch.nn.functional.unfold(images, kernel_size=2, stride=2)
        kernel, bias = model.patch_encoder.weight.flatten(1), model.patch_encoder.bias.view(1, -1, 1)
        expected = plain.encode(images).mean + (kernel @ patches + bias).reshape(2, 4, 4, 6)
        torch.testing.assert_close(model.encode(images).mean, expected)
        assert torch.equal(model.encode(images).std, plain.encode(images).std)
        drawn = model.patch_decoder.weight.flatten(1).T @ latents.flatten(2)
        painted = torch.nn.functional.fold(drawn, (8, 12), kernel_size=2, stride=2)
        expected = plain.decode(latents) + painted + model.patch_decoder.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(model.decode(latents), expected)


def test_decoder_is_not_clamped() -> None:
    model = randomised(AutoencoderKL(tiny_autoencoder_config()))
    with torch.no_grad():
        model.decoder.conv_out.bias.fill_(7.0)
        assert float(model.decode(torch.randn(1, 4, 4, 4)).max()) > 1.0


def test_attention_over_positions_equals_the_written_out_formula() -> None:
    layer = randomised(SpatialAttention(8, groups=4)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    q, k, v = (f(layer.norm(x)).flatten(2) for f in (layer.q, layer.k, layer.v))
    weights = (q.transpose(1, 2) @ k / 8**0.5).softmax(dim=-1)
    out = (v @ weights.transpose(1, 2)).reshape(2, 8, 3, 5)
    torch.testing.assert_close(layer(x), x + layer.proj_out(out))


def test_gradient_reaches_every_parameter() -> None:
    model = randomised(AutoencoderKL(tiny_autoencoder_config())).train()
    posterior = model.encode(torch.randn(1, 3, 16, 16))
    loss = model.decode(posterior.sample(torch.randn(1, 4, 8, 8))).square().mean() + posterior.kl().mean()
    loss.backward()
    # a constant added to every key shifts a row of the softmax, which changes nothing
    silent = {
        name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-9
    }
    assert silent <= {"encoder.mid.attention.k.bias", "decoder.mid.attention.k.bias"}


def test_folding_is_a_rearrangement_around_the_network() -> None:
    config = AutoencoderConfig(8, [1, 2], 1, latent_channels=6, norm_groups=4, mid_attention=False, patch=4)
    torch.manual_seed(0)
    model = AutoencoderKL(config).eval()
    assert model.downsampling == 8
    images = torch.randn(2, 3, 32, 48)
    folded = rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=4, q=4)
    with torch.no_grad():
        mean, _ = model.quant_conv(model.encoder(folded)).chunk(2, dim=1)
        posterior = model.encode(images)
        unfolded = model.decoder(model.post_quant_conv(mean))
        decoded = model.decode(mean)
    assert torch.equal(posterior.mean, mean)
    assert mean.shape == (2, 6, 4, 6)
    expected = rearrange(unfolded, "b (c p q) h w -> b c (h p) (w q)", p=4, q=4)
    assert torch.equal(decoded, expected)


def test_folded_known_pixels_reach_the_decoder() -> None:
    config = AutoencoderConfig(8, [1, 2], 1, norm_groups=4, patch=2, mask_aware_decoder=True)
    model = randomised(AutoencoderKL(config))
    latents, known = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        assert model.decode(latents, known).shape == (1, 3, 16, 16)
        assert relative(model.decode(latents, known), model.decode(latents)) > 1e-3
