"""Attention: the one-token path is exact, many tokens attend, and dead weights get no gradient."""

from __future__ import annotations

import pytest
import torch

from pbe.errors import UserError
from pbe.models import LatentDiffusion
from pbe.models.adapters import LowRank, attach
from pbe.models.attention import (
    Attention,
    FeedForward,
    PreparedCondition,
    SlicedAttention,
    SpatialTransformer,
    TransformerBlock,
    _written_out,
    set_attention_slicing,
)
from pbe.models.codec import SpatialAttention
from tests.models.tiny import randomised, relative, tiny_model_config


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


@pytest.mark.parametrize("queries", [1, 4, 5, 9, 100])
@pytest.mark.parametrize("tokens", [0, 3])
def test_slices_change_nothing(queries: int, tokens: int) -> None:
    layer = randomised(Attention(16, num_heads=4, context_dim=12 if tokens else None)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    context = torch.randn(2, tokens, 12, dtype=torch.float64) if tokens else None
    whole = layer(x, context)
    set_attention_slicing(layer, queries)
    torch.testing.assert_close(layer(x, context), whole, rtol=0.0, atol=1e-13)


@torch.no_grad()
def test_no_more_queries_at_once_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, seen = torch.nn.functional.scaled_dot_product_attention, []

    def record(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(q.shape[2])
        return fused(q, *rest)

    monkeypatch.setattr("pbe.models.attention.F.scaled_dot_product_attention", record)
    layer = randomised(Attention(16, num_heads=4))
    set_attention_slicing(layer, 4)
    layer(torch.randn(1, 10, 16))
    set_attention_slicing(layer, None)
    layer(torch.randn(1, 10, 16))
    assert seen == [4, 4, 2, 10]


def test_slicing_reaches_unet_and_autoencoder() -> None:
    model = LatentDiffusion(tiny_model_config())
    set_attention_slicing(model, 7)
    layers = [layer for layer in model.modules() if isinstance(layer, SlicedAttention)]
    # 2 levels x (1 block down + 2 up) + the middle, self- and cross-attention each, and the autoencoder's two
    assert len(layers) == 2 * (2 * 3 + 1) + 2
    assert {layer.queries_at_once for layer in layers} == {7}
    with pytest.raises(UserError, match="1 or more"):
        set_attention_slicing(model, 0)


@torch.no_grad()
def test_attention_of_the_autoencoder_suits_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need the last dimension contiguous; without them 1536 px take 12 GB."""
    fused, strides = torch.nn.functional.scaled_dot_product_attention, []

    def record(*inputs: torch.Tensor) -> torch.Tensor:
        strides.extend(x.stride(-1) for x in inputs)
        return fused(*inputs)

    monkeypatch.setattr("pbe.models.attention.F.scaled_dot_product_attention", record)
    randomised(SpatialAttention(8, groups=4))(torch.randn(1, 8, 4, 6))
    assert strides == [1, 1, 1]


def test_training_on_short_sequences_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients on the CPU short attention is written out; longer ones and images take the kernel."""
    layer = randomised(Attention(16, num_heads=4)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def outcome() -> list[torch.Tensor]:
        layer.zero_grad()
        output = layer(x)
        output.square().sum().backward()
        return [output, *(p.grad.clone() for p in layer.parameters())]

    short = outcome()
    with torch.no_grad():
        torch.testing.assert_close(short[0], layer(x))
    monkeypatch.setattr("pbe.models.attention.SHORT", 80)  # one less than the 9 x 9 here
    for written_out, fused in zip(short, outcome(), strict=True):
        torch.testing.assert_close(written_out, fused)


@pytest.mark.parametrize("heads", [1, 3, 4, 100])
@torch.no_grad()
def test_so_many_heads_at_once_change_nothing(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, counts = torch.nn.functional.scaled_dot_product_attention, []

    def record(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        counts.append(q.shape[0] * q.shape[1])
        return fused(q, *rest)

    layer, x = randomised(Attention(24, num_heads=4)), torch.randn(2, 9, 24)
    expected = layer(x)
    monkeypatch.setattr("pbe.models.attention.F.scaled_dot_product_attention", record)
    set_attention_slicing(layer, heads_at_once=heads)
    torch.testing.assert_close(layer(x), expected)
    assert max(counts) <= heads
    assert sum(counts) == 8  # four heads of two samples
    with pytest.raises(UserError, match="0 heads at once"):
        set_attention_slicing(layer, heads_at_once=0)


@pytest.mark.parametrize(("queries", "keys"), [(65, 65), (70, 300), (300, 70)])
@pytest.mark.parametrize("at_once", [1, 100, 1000, 2**30])
@torch.no_grad()
def test_attention_written_out_in_slices_is_the_same(
    queries: int, keys: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbe.models.attention.SCORES_AT_ONCE", at_once)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (queries, keys, keys))
    weights = (q @ k.transpose(-1, -2) / 2.0).softmax(dim=-1)
    torch.testing.assert_close(_written_out(q, k, v), weights @ v, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "keys", "gradients", "written_out"),
    [
        (torch.bfloat16, 65, False, True),
        (torch.bfloat16, 64, False, False),
        (torch.bfloat16, 65, True, False),
        (torch.float32, 65, False, False),
        (torch.float16, 65, False, False),
    ],
)
def test_fused_kernel_is_left_only_where_it_is_slow(
    dtype: torch.dtype, keys: int, gradients: bool, written_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("pbe.models.attention._written_out", lambda q, k, v: calls.append(q) or q)
    q, kv = torch.randn(1, 2, 80, 4, dtype=dtype), torch.randn(1, 2, keys, 4, dtype=dtype)
    with torch.set_grad_enabled(gradients):
        SlicedAttention().attend(q, kv, kv)
    assert bool(calls) == written_out


@torch.no_grad()
def test_written_out_attention_in_bfloat16_stays_close_to_float32() -> None:
    """Scores and weights are rounded to 8 bits, in the fused kernel the weights alone: within twofold."""
    q, k, v = torch.randn(3, 2, 4, 256, 16).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    rounded = [each.bfloat16() for each in (q, k, v)]
    fused = torch.nn.functional.scaled_dot_product_attention(*rounded)
    distances = [float((made - expected).square().mean().sqrt()) for made in (_written_out(*rounded), fused)]
    assert distances[0] < 2.0 * distances[1]


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_prepared_condition_is_the_condition(tokens: int) -> None:
    layer = randomised(SpatialTransformer(16, num_heads=2, context_dim=12, groups=4)).double()
    x, condition = torch.randn(2, 16, 3, 5).double(), torch.randn(4, tokens, 12).double()
    attention = layer.block.attn2
    prepared = PreparedCondition(condition.shape, {attention: attention.prepare(condition)})
    expected = layer(x.repeat(2, 1, 1, 1), condition)
    torch.testing.assert_close(layer(x, prepared), expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_feed_forward_layer_is_the_same_without_gradients(adapted: bool) -> None:
    layer, x = randomised(FeedForward(8)).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    if adapted:
        adapter = LowRank(layer.proj, 2, 1.0)
        torch.nn.init.normal_(adapter.up)
        attach(layer.proj, adapter)
    value, gate = layer.proj(x).chunk(2, dim=-1)
    expected = layer.out(value * torch.nn.functional.gelu(gate))
    with torch.no_grad():
        assert relative(layer(x), expected) < 1e-12
    assert relative(layer(x), expected) < 1e-12
