"""Exemplar encoder: image tower, information bottleneck, mapper and projection; and the null condition.

Paint by Example, section 3.2: only the class token of the tower describes the exemplar, so that the
network cannot copy it and has to understand it.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.tokens import position_code, stage_tokens, to_grid, trunk_tokens
from pbe.models.tower import build_tower


class MapperAttention(nn.Module):
    """Self-attention of the mapper; the fused projection holds ``[q | k | v]`` head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, n, width)`` to the same shape. With one token only the value rows matter."""
        if x.shape[1] == 1:
            return self.proj(F.linear(x, *self._value_rows()))
        q, k, v = rearrange(self.qkv(x), "b n (h three d) -> three b h n d", h=self.heads, three=3)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))

    def _value_rows(self) -> tuple[Tensor, Tensor]:
        weight = rearrange(self.qkv.weight, "(h three d) c -> three (h d) c", h=self.heads, three=3)
        bias = rearrange(self.qkv.bias, "(h three d) -> three (h d)", h=self.heads, three=3)
        return weight[2], bias[2]


class MapperBlock(nn.Module):
    """Pre-norm transformer block with an exact-GELU feed-forward layer."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = MapperAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, n, width)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ExemplarEncoder(nn.Module):
    """Tower (frozen), mapper, final norm and projection to the UNet's context, and the null condition.

    Args:
        config: tower, bottleneck and mapper.
        context_dim: width of the condition.
    """

    def __init__(self, config: ExemplarEncoderConfig, context_dim: int) -> None:
        super().__init__()
        self.config = config
        self.tower, tower_width = build_tower(config)
        self.tower.requires_grad_(False)
        self.tower.eval()
        width = config.mapper_width or tower_width
        if config.pooled_stages:
            tower_width += sum(_stage_widths(self.tower, config))
        self.tower_width = tower_width
        self.reduce = nn.Linear(tower_width, width) if width != tower_width else None
        self.mapper = nn.ModuleList(
            MapperBlock(width, config.mapper_heads, config.mapper_mlp_ratio)
            for _ in range(config.mapper_layers)
        )
        self.final_norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, context_dim)
        self.null_condition = nn.Parameter(torch.randn(1, 1, context_dim))

    def train(self, mode: bool = True) -> ExemplarEncoder:
        """Set training mode everywhere but in the frozen tower, whose batch statistics must not move."""
        super().train(mode)
        self.tower.eval()
        return self

    def features(self, pixels: Tensor) -> Tensor:
        """Return the tower's tokens before the mapper.

        Args:
            pixels: ``(b, 3, s, s)`` normalised with the tower's mean and deviation.

        Returns:
            ``(b, 1, width)`` pooled class token (global average for convolutional towers; with
            ``pooled_stages`` those of its stages behind it), or ``(b, 1 + n, width)`` with ``tokens: all``,
            the pooled one first, the n positions row by row.

        Raises:
            UserError: ``tokens: all`` with a tower that gives only a pooled feature.
        """
        if self.config.tokens == "all":
            return self._all_tokens(pixels)
        if self.config.pooled_stages:
            return _pooled_stages(self.tower.get_submodule("trunk"), pixels)[:, None]
        return self.tower(pixels)[:, None]

    def _all_tokens(self, pixels: Tensor) -> Tensor:
        trunk, name, grid = getattr(self.tower, "trunk", None), self.config.tower, self.config.token_grid
        if self.config.pooled_stages:
            assert trunk is not None  # it has stages
            pooled = _pooled_stages(trunk, pixels)
            return torch.cat([pooled[:, None], stage_tokens(trunk, pixels, grid, name)], dim=1)
        if trunk is not None:
            pooled, tokens = trunk_tokens(trunk, pixels, name)
        else:
            output = self.tower(pixels)
            if not isinstance(output, tuple):
                raise UserError(f"tower '{name}' gives no tokens; use exemplar_encoder.tokens=class")
            pooled, tokens = output
        return torch.cat([pooled[:, None], to_grid(tokens, grid, name)], dim=1)

    def condition(self, features: Tensor) -> Tensor:
        """Map tower tokens ``(b, n, width)`` to the condition ``(b, n, context_dim)``."""
        x = features if self.reduce is None else self.reduce(features)
        if self.config.pooled_stages and x.shape[1] > 1:
            x = torch.cat([x[:, :1], x[:, 1:] + position_code(x[:, 1:])], dim=1)
        for block in self.mapper:
            x = block(x)
        return self.proj(self.final_norm(x))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised exemplars ``(b, 3, s, s)`` to the condition ``(b, tokens, context_dim)``."""
        with torch.no_grad():
            features = self.features(pixels)
        return self.condition(features)


def _stage_widths(tower: nn.Module, config: ExemplarEncoderConfig) -> list[int]:
    """Return the channels of a timm trunk's stages, from the first one up.

    Raises:
        UserError: the tower has no stages that can be asked for.
    """
    trunk = getattr(tower, "trunk", None)
    if not hasattr(trunk, "forward_intermediates"):
        raise UserError(
            f"exemplar_encoder.pooled_stages needs a timm tower with stages, not '{config.tower}'"
        )
    return [int(stage["num_chs"]) for stage in trunk.feature_info]  # type: ignore[union-attr]


def _pooled_stages(trunk: nn.Module, pixels: Tensor) -> Tensor:
    """Return the pooled feature of a timm trunk and behind it the global average of every stage.

    Late layers of a classifier forget colour, early ones have not learnt shapes; averaged over all
    positions neither can tell where anything was, so the bottleneck stays one.
    """
    last, stages = trunk.forward_intermediates(pixels)  # type: ignore[operator]
    averages = [stage.mean(dim=(2, 3)) for stage in stages]  # b c h w
    return torch.cat([trunk.forward_head(last, pre_logits=True), *averages], dim=1)  # type: ignore[operator]
