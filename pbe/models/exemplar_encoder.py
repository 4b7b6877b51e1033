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
from pbe.models.layout import LayoutPooling, layout_features, layout_stages, stage_widths, tower_stages
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
            tower_width += sum(self._widths("pooled_stages"))
        self.tower_width = tower_width
        self.layout = self._layout_pooling(width) if config.layout_grid else None
        self.reduce = nn.Linear(tower_width, width) if width != tower_width else None
        self.mapper = nn.ModuleList(
            MapperBlock(width, config.mapper_heads, config.mapper_mlp_ratio)
            for _ in range(config.mapper_layers)
        )
        self.final_norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, context_dim)
        self.null_condition = nn.Parameter(torch.randn(1, 1, context_dim))

    def _widths(self, option: str) -> list[int]:
        if not hasattr(getattr(self.tower, "trunk", self.tower), "forward_intermediates"):
            raise UserError(f"exemplar_encoder.{option} needs a tower with stages, not '{self.config.tower}'")
        return stage_widths(self.tower)

    def _layout_pooling(self, width: int) -> LayoutPooling:
        config = self.config
        if config.tokens != "class":
            raise UserError(
                "exemplar_encoder.layout_grid makes one token: use it with exemplar_encoder.tokens=class"
            )
        widths = self._widths("layout_grid")
        channels = sum(widths[index] for index in layout_stages(len(widths)))
        return LayoutPooling(channels, config.layout_grid, config.layout_width, width)

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
            ``(b, 1, width)`` pooled class token (global average for convolutional towers; behind it with
            ``pooled_stages`` those of its stages, with ``layout_grid`` their coarse maps), or
            ``(b, 1 + n, width)`` with ``tokens: all``, the pooled one first, the n positions row by row.
        """
        if self.config.tokens == "all":
            return self._all_tokens(pixels)
        if not (self.config.pooled_stages or self.layout):
            return self.tower(pixels)[:, None]
        pooled, maps = tower_stages(self.tower, pixels)
        parts = [pooled]
        if self.config.pooled_stages:
            parts += _averages(maps)
        if self.layout is not None:
            parts.append(layout_features(maps, self.config.layout_grid))
        return torch.cat(parts, dim=1)[:, None]

    def _all_tokens(self, pixels: Tensor) -> Tensor:
        trunk, name, grid = getattr(self.tower, "trunk", None), self.config.tower, self.config.token_grid
        if self.config.pooled_stages:
            if trunk is None:
                raise UserError(
                    "exemplar_encoder.pooled_stages with tokens=all needs a convolutional timm tower, "
                    f"not '{name}'"
                )
            pooled, maps = tower_stages(self.tower, pixels)
            pooled = torch.cat([pooled, *_averages(maps)], dim=1)
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
        layout = None
        if self.layout is not None:
            features, layout = features.split([self.tower_width, self.layout.features], dim=2)
        x = features if self.reduce is None else self.reduce(features)
        if self.layout is not None and layout is not None:
            x = x + self.layout(layout)
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


def _averages(maps: list[Tensor]) -> list[Tensor]:
    """Return the global average of every stage, ``(b, c)`` each.

    Late layers of a classifier forget colour, early ones have not learnt shapes; averaged over all
    positions neither can tell where anything was, so the bottleneck stays one.
    """
    return [stage.mean(dim=(2, 3)) for stage in maps]  # b c h w
