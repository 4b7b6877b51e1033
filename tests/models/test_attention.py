"""Attention: the one-token path is exact, many tokens attend, and dead weights get no gradient."""

from __future__ import annotations

import pytest
import torch

from pbe.models.attention import Attention, FeedForward, SpatialTransformer, TransformerBlock
from tests.models.tiny import randomised, relative


def reference_attention(layer: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Softmax attention written out head by head, in double precision."""
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    size = q.shape[-1] // layer.num_heads
    heads = []
    for start in range(0, q.shape[-1], size):
        part = slice(start, start + size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    return layer.to_out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("tokens", [2, 5])
def test_cross_attention_equals_the_written_out_formula(tokens: int) -> None:
    layer = randomised(Attention(16, num_heads=4, context_dim=12)).double()
    x, context = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, tokens, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), reference_attention(layer, x, context))


def test_self_attention_equals_the_written_out_formula() -> None:
    layer = randomised(Attention(16, num_heads=2)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference_attention(layer, x, x))


def test_self_attention_of_a_single_position_is_not_taken_for_a_condition() -> None:
    layer = randomised(Attention(16, num_heads=2))
    x = torch.randn(2, 1, 16)
    torch.testing.assert_close(layer(x), layer.to_out(layer.to_v(x)))


def test_one_token_path_equals_full_attention_over_that_token() -> None:
    layer = randomised(Attention(16, num_heads=4, context_dim=12)).double()
    x, token = torch.randn(3, 9, 16, dtype=torch.float64), torch.randn(3, 1, 12, dtype=torch.float64)
    short = layer(x, token)
    assert short.shape == (3, 1, 16)
    torch.testing.assert_close(short.expand(3, 9, 16), reference_attention(layer, x, token))
    # two equal tokens share the softmax evenly and take the long way
    torch.testing.assert_close(layer(x, token.repeat(1, 2, 1)), short.expand(3, 9, 16))


def test_one_token_path_through_the_whole_transformer() -> None:
    layer = randomised(SpatialTransformer(16, num_heads=2, context_dim=12, groups=4)).double()
    x, token = torch.randn(2, 16, 3, 5, dtype=torch.float64), torch.randn(2, 1, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, token), layer(x, token.repeat(1, 2, 1)))


def test_dead_weights_get_no_gradient_with_one_token() -> None:
    block = randomised(TransformerBlock(16, num_heads=2, context_dim=12))
    x, token = torch.randn(2, 6, 16), torch.randn(2, 1, 12)
    block(x, token).square().sum().backward()
    dead = {name for name, parameter in block.named_parameters() if parameter.grad is None}
    assert dead == {"norm2.weight", "norm2.bias", "attn2.to_q.weight", "attn2.to_k.weight"}
    block.zero_grad()
    block(x, torch.randn(2, 3, 12)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in block.parameters())


def test_condition_reaches_every_position_alike_with_one_token() -> None:
    block = randomised(TransformerBlock(16, num_heads=2, context_dim=12))
    x = torch.randn(1, 6, 16)
    differences = block.attn2(x, torch.randn(1, 1, 12)) - block.attn2(x, torch.randn(1, 1, 12))
    assert bool((differences.abs() > 0.01).any())


def test_feed_forward_gates_with_the_second_half() -> None:
    layer = randomised(FeedForward(8)).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    hidden = layer.proj(x)
    value, gate = hidden[..., :32], hidden[..., 32:]
    exact_gelu = 0.5 * gate * (1.0 + torch.erf(gate / 2.0**0.5))
    torch.testing.assert_close(layer(x), layer.out(value * exact_gelu))


def test_transformer_starts_as_the_identity() -> None:
    layer = SpatialTransformer(16, num_heads=2, context_dim=12, groups=4)
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(layer(x, torch.randn(1, 1, 12)), x)


def test_memory_layout_does_not_matter() -> None:
    layer = randomised(SpatialTransformer(16, num_heads=2, context_dim=12, groups=4))
    x, token = torch.randn(2, 16, 4, 6), torch.randn(2, 1, 12)
    assert relative(layer(x.to(memory_format=torch.channels_last), token), layer(x, token)) < 1e-6
