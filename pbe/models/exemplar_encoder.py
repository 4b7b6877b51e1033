"""Exemplar encoder: image tower, information bottleneck, mapper and projection; and the null condition.

Paint by Example, section 3.2: only the class token of the tower describes the exemplar, so that the
network cannot copy it and has to understand it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pbe.config import ExemplarEncoderConfig
from pbe.errors import UserError
from pbe.models.adapters import Adapted
from pbe.models.image_tower import build_tower, stage_widths, tower_stages
from pbe.models.layers import zero_init

PYRAMID = 5
"""Stages that a convolutional tower has at most; what has more of them is a transformer with its blocks."""


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
            return self.proj(self._values(x))
        q, k, v = rearrange(self.qkv(x), "b n (h three d) -> three b h n d", h=self.heads, three=3)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))

    def _values(self, x: Tensor) -> Tensor:
        values = F.linear(x, *self._value_rows())
        if isinstance(self.qkv, Adapted):
            for adapter in (each for each in self.qkv.adapters if each.factor):
                parts = rearrange(adapter(x), "b n (h three d) -> three b n (h d)", h=self.heads, three=3)
                values = values + parts[2]
        return values

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


class LayoutPooling(nn.Module):
    """Learned pooling that keeps positions: one token from coarse maps of the image tower's stages.

    CLIP's class token is an attention pool with positions, so it can say where things are in the exemplar;
    the global average of a convolutional tower cannot. Here a linear layer reads each position, and after a
    GELU a linear map turns all positions into one token.

    Args:
        channels: of all chosen stages together.
        grid: positions along a side.
        hidden: channels per position after the first layer.
        width: width of the token.
    """

    def __init__(self, channels: int, grid: int, hidden: int, width: int) -> None:
        super().__init__()
        self.positions = grid * grid
        self.features = self.positions * channels
        self.read = nn.Linear(channels, hidden)
        self.gather = nn.Linear(self.positions * hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(b, 1, positions * channels)`` to ``(b, 1, width)``."""
        maps = rearrange(features, "b n (p c) -> b n p c", p=self.positions)
        return self.gather(rearrange(F.gelu(self.read(maps)), "b n p c -> b n (p c)"))


class ExemplarEncoder(nn.Module):
    """Tower (frozen), mapper, final norm and projection to the UNet's context, and the null condition."""

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
        self.null_condition = nn.Parameter(torch.empty(1, 1, context_dim))
        if not self.null_condition.is_meta:  # where a normal draw would import torch's compiler
            nn.init.normal_(self.null_condition)

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

    def add_layout_pooling(self, like: ExemplarEncoderConfig) -> None:
        """Give the encoder a fresh learned pooling of that grid and width, which changes nothing yet."""
        self.config = replace(self.config, layout_grid=like.layout_grid, layout_width=like.layout_width)
        self.layout = self._layout_pooling(self.proj.in_features)
        zero_init(self.layout.gather)

    def train(self, mode: bool = True) -> ExemplarEncoder:
        """Set training mode everywhere except in the frozen tower, whose batch statistics must not change."""
        super().train(mode)
        self.tower.eval()
        return self

    def features(self, pixels: Tensor) -> Tensor:
        """Return the tower's tokens before the mapper.

        Args:
            pixels: ``(b, 3, s, s)`` normalised with the tower's mean and deviation.

        Returns:
            ``(b, 1, width)`` pooled class token (global average for convolutional towers; followed by those
            of its stages with ``pooled_stages``, and by their coarse maps with ``layout_grid``), or with
            ``tokens: all`` ``(b, 1 + n, width)``: the pooled one, then the n positions row by row.
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

    Late layers of a classifier forget colour, and early ones do not represent shapes. Averaged over all
    positions, neither says where anything was, so it remains a bottleneck.
    """
    return [stage.mean(dim=(2, 3)) for stage in maps]  # b c h w


def layout_stages(count: int) -> list[int]:
    """Return which of a tower's ``count`` stages a layout is read from.

    The first and the last three of a pyramid (colour and edges, then shapes); the ends of the four quarters
    of a transformer's blocks.
    """
    if count <= PYRAMID:
        return sorted({0, *range(max(count - 3, 0), count)})
    return [quarter * count // 4 - 1 for quarter in (1, 2, 3, 4)]


def layout_features(maps: list[Tensor], grid: int) -> Tensor:
    """Average the maps of :func:`layout_stages` to a grid: ``(b, grid * grid * channels)``.

    Positions run row by row, each with the channels of all stages. Coarser maps are repeated.
    """
    chosen = [F.adaptive_avg_pool2d(maps[index], grid) for index in layout_stages(len(maps))]
    return rearrange(torch.cat(chosen, dim=1), "b c h w -> b (h w c)")


def trunk_tokens(trunk: nn.Module, pixels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return a timm trunk's pooled feature ``(b, c)`` and the feature of every position ``(b, n, c)``."""
    features = trunk.forward_features(pixels)  # type: ignore[operator]
    pooled = trunk.forward_head(features, pre_logits=True)  # type: ignore[operator]
    if features.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        tokens = rearrange(features, "b h w c -> b (h w) c" if channels_last else "b c h w -> b (h w) c")
    else:
        tokens = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    if tokens.shape[-1] != pooled.shape[-1]:
        raise UserError(
            f"tower '{name}': pooled feature and tokens differ in width; use exemplar_encoder.tokens=class"
        )
    return pooled, tokens


def to_grid(tokens: Tensor, grid: int, name: str) -> Tensor:
    """Average the positions of a square map, ``(b, n, c)``, to ``(b, grid * grid, c)``; 0 keeps them."""
    if grid == 0:
        return tokens
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise UserError(
            f"tower '{name}' gives {tokens.shape[1]} tokens, not a square; set exemplar_encoder.token_grid=0"
        )
    return _pooled(rearrange(tokens, "b (h w) c -> b c h w", h=side), grid)


def stage_tokens(trunk: nn.Module, pixels: Tensor, grid: int, name: str) -> Tensor:
    """Return the features of all stages of a convolutional timm trunk at each position, ``(b, n, width)``.

    There are ``grid`` positions along a side, or with 0 those of the last layer; finer maps are averaged,
    coarser ones repeated. The order of the channels is that of the pooled stages, so that both go through
    the same layers: the last layer, then the stages from the first one up.
    """
    last, stages = trunk.forward_intermediates(pixels)  # type: ignore[operator]
    if last.ndim != 4 or trunk.forward_head(last, pre_logits=True).shape[1] != last.shape[1]:  # type: ignore[operator]
        raise UserError(
            f"tower '{name}' has no maps to take all tokens of its stages from; "
            "use exemplar_encoder.tokens=class or pooled_stages=false"
        )
    side = grid or int(last.shape[-1])
    return torch.cat([_pooled(values, side) for values in (last, *stages)], dim=2)


def _pooled(values: Tensor, side: int) -> Tensor:
    return rearrange(F.adaptive_avg_pool2d(values, side), "b c h w -> b (h w) c")


def position_code(tokens: Tensor) -> Tensor:
    """Return sines and cosines of row and column for ``(b, n, width)`` tokens of a square, same shape.

    Each takes a quarter of the width (Vaswani et al. 2017, section 3.5, for two axes); the rest is zero. The
    wavelengths go from twice the side down to two positions, so that all positions differ. The code has the
    root mean square of its sample's tokens, or it would be lost among them. Tokens of convolutional towers
    do not say where they are, and the mapper has no other way to know.
    """
    count, width = tokens.shape[1], tokens.shape[2]
    side, waves = math.isqrt(count), width // 4
    halves = side ** (torch.arange(waves, device=tokens.device) / max(waves - 1, 1))  # 1 ... side
    angles = (torch.arange(side, device=tokens.device)[:, None] + 0.5) / side * math.pi * halves
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # side 2*waves
    code = torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)
    code = F.pad(code, (0, width - code.shape[1]))
    loud = tokens.detach().float().pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    return (code * loud * math.sqrt(2.0)).to(tokens.dtype)
