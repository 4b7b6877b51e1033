"""Attention of the UNet: self-attention, cross-attention with an exact one-token path, and their blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.errors import UserError
from pbe.models.adapters import Adapted
from pbe.models.convolution import Convolution, is_channels_last
from pbe.models.layers import make_norm, zero_init

SHORT = 64 * 64
"""Product of queries and keys up to which training on the CPU is faster with explicit matrix products."""

SCORES_AT_ONCE = 2**19
"""Attention scores held at once when attention is computed in slices: one core's cache in bfloat16."""

FEW = 64
"""Number of queries or keys up to which slicing does not pay."""


class SlicedAttention(nn.Module):
    """What all attention layers share: the softmax over keys, for everything at once or in slices.

    ``queries_at_once`` queries, or ``heads_at_once`` heads of the whole batch, are computed together; None
    means all. The result is the same. Set them with :func:`set_attention_slicing`.
    """

    queries_at_once: int | None = None
    heads_at_once: int | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ``softmax(q k^T / sqrt(d)) v`` for ``b h n d`` queries and ``b h m d`` keys and values."""
        if self.heads_at_once is not None and q.shape[0] * q.shape[1] > self.heads_at_once:
            rows = (rearrange(each, "b h n d -> (b h) 1 n d").split(self.heads_at_once) for each in (q, k, v))
            slices = [self._attend(*parts) for parts in zip(*rows, strict=True)]
            return rearrange(torch.cat(slices), "(b h) 1 n d -> b h n d", b=q.shape[0])
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        training = torch.is_grad_enabled() and self.queries_at_once is None
        if training and q.device.type == "cpu" and q.shape[2] * k.shape[2] <= SHORT:
            # the backward pass of PyTorch's fused CPU kernel is slow for short sequences
            return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        slices = q.split(self.queries_at_once or q.shape[2], dim=2)
        outputs = [_kernel(part, k, v) for part in slices]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    if slow and min(q.shape[2], k.shape[2]) > FEW:
        return _written_out(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend slice by slice: in bfloat16 on the CPU matrix products outrun PyTorch's fused kernel."""
    batch, (queries, keys) = q.shape[0], (q.shape[2], k.shape[2])
    q, k, v = (rearrange(each, "b h n d -> (b h) n d") for each in (q, k, v))
    rows = min(max(SCORES_AT_ONCE // keys, 1), queries)
    heads = max(SCORES_AT_ONCE // (rows * keys), 1)
    output, nothing = torch.empty_like(q), q.new_empty(())
    for some in (slice(start, start + heads) for start in range(0, len(q), heads)):
        for part in (slice(start, start + rows) for start in range(0, queries, rows)):
            # baddbmm scales in float32, before scores are rounded; with beta 0 it reads nothing of `nothing`
            scores = torch.baddbmm(
                nothing, q[some, part], k[some].transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5
            )
            output[some, part] = scores.softmax(dim=-1) @ v[some]
    return rearrange(output, "(b h) n d -> b h n d", b=batch)


def set_attention_slicing(
    module: nn.Module, queries_at_once: int | None = None, heads_at_once: int | None = None
) -> None:
    """Let every attention layer of the UNet and the autoencoder inside ``module`` work in slices.

    PyTorch's fused kernels never hold the whole matrix of attention weights, so slices save nothing if there
    is one for the device. Without one, the matrix has ``queries_at_once`` rows instead of n, or there are
    ``heads_at_once`` matrices instead of one for every head of every sample.

    Args:
        module: a model or any part of one.
        queries_at_once: 1 and above; None means all.
        heads_at_once: likewise.
    """
    for count, what in ((queries_at_once, "queries"), (heads_at_once, "heads")):
        if count is not None and count < 1:
            raise UserError(f"attention slicing: {count} {what} at once; it must be 1 or more, or None")
    for layer in module.modules():
        if isinstance(layer, SlicedAttention):
            layer.queries_at_once, layer.heads_at_once = queries_at_once, heads_at_once


@dataclass(frozen=True)
class PreparedCondition:
    """A condition as each cross-attention needs it, computed once for many calls of the UNet.

    Attributes:
        shape: of the condition, ``(b, tokens, context_dim)``.
        known: the result of :meth:`Attention.prepare` for each layer.
    """

    shape: torch.Size
    known: dict[nn.Module, tuple[Tensor, ...]]


def repeat_to(x: Tensor, batch: int) -> Tensor:
    """Repeat ``x`` along the batch, which both halves of guidance share up to the first condition."""
    return x if batch <= len(x) else torch.cat([x] * (batch // len(x)))


class Attention(SlicedAttention):
    """Multi-head attention from ``x`` to ``context`` (to ``x`` itself when there is none).

    With a context of one token, the softmax over its single key is 1 whatever the query, so attention *is*
    ``to_out(to_v(context))``. That is computed instead; ``to_q`` and ``to_k`` stay in the state dict, without
    influence and without gradient.
    """

    def __init__(self, channels: int, *, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        source = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source, channels, bias=False)
        self.to_v = nn.Linear(source, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def prepare(self, context: Tensor) -> tuple[Tensor, ...]:
        """Return what does not depend on the queries: keys and values, or for one token the whole output."""
        if context.shape[1] == 1:
            return (self.to_out(self.to_v(context)),)
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, context: Tensor | PreparedCondition | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``(b, n, channels)`` queries.
            context: ``(b, m, context_dim)``, or prepared, or None for self-attention.

        Returns:
            ``(b, n, channels)``; ``(b, 1, channels)``, to be broadcast over n, when ``m`` is 1.
        """
        if isinstance(context, PreparedCondition):
            known = context.known[self]
        elif context is not None:
            known = self.prepare(context)
        else:
            known = self._split(self.to_k(x)), self._split(self.to_v(x))
        if len(known) == 1:
            return known[0]
        output = self.attend(self._split(self.to_q(x)), *known)
        return self.to_out(rearrange(output, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Gated feed-forward layer (GEGLU): ``out(value * gelu(gate))`` with four-fold width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, n, channels)`` to the same shape."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or self.proj._forward_hooks:
            value, gate = self.proj(x).chunk(2, dim=-1)
            return self.out(value * F.gelu(gate))
        # two products instead of one, so that each half is contiguous in memory
        weights, biases = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        value, gate = (F.linear(x, *pair) for pair in zip(weights, biases, strict=True))
        if isinstance(self.proj, Adapted):
            made = self.proj.added_to(torch.cat([value, gate], dim=-1), x)
            value, gate = (half.contiguous() for half in made.chunk(2, dim=-1))
        return self.out(F.gelu(gate).mul_(value))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the condition, feed-forward; each pre-normed and residual."""

    def __init__(self, channels: int, *, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, num_heads=num_heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | PreparedCondition) -> Tensor:
        """Map ``(b, n, channels)`` to the same shape, given a context ``(b, m, context_dim)``.

        If there are several conditions for each sample, ``x`` is repeated to match them.
        """
        x = repeat_to(x + self.attn1(self.norm1(x)), context.shape[0])
        # the one-token path ignores the query, so its norm is not worth computing
        query = x if context.shape[1] == 1 else self.norm2(x)
        x = x + self.attn2(query, context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, between two 1x1 convolutions, residual."""

    def __init__(self, channels: int, *, num_heads: int, context_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = make_norm(channels, groups, 1e-6)
        self.proj_in = Convolution(channels, channels, 1)
        self.block = TransformerBlock(channels, num_heads=num_heads, context_dim=context_dim)
        self.proj_out = zero_init(Convolution(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | PreparedCondition) -> Tensor:
        """Map ``(b, c, h, w)`` to the same shape, given a context ``(b, m, context_dim)``."""
        height = x.shape[2]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        tokens = self.block(tokens, context)
        tokens = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        output = self.proj_out(tokens if is_channels_last(x) else tokens.contiguous())
        return repeat_to(x, len(output)) + output
